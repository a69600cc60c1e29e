"""Written answers: the batch with a cache against one prompt at a time without, and their text."""

from typing import Any

import pytest
import torch
import transformers
from battery import fresh_base, world
from tiny_tokenizers import byte_tokenizer
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedModel

from loralab.evals.generate import Prompt, Writer, answers, generate, room, stop_tokens, text_behind
from loralab.evals.passes import Passes
from tiny import DECODERS, tiny

STOPS = [2, *range(60, 70)]
"""Enough tokens that some answers of a random model stop early."""


def prompts(count: int = 12, seed: int = 0) -> list[list[int]]:
    """Make prompts of 1 to 9 tokens."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, 10, (count,), generator=generator).tolist()
    return [torch.randint(3, 97, (length,), generator=generator).tolist() for length in lengths]


@torch.no_grad()
def alone(model: PreTrainedModel, prompt: list[int], limit: int, stops: list[int]) -> list[int]:
    """Take the most likely token of a whole forward pass again and again."""
    tokens = list(prompt)
    while len(tokens) < len(prompt) + limit and (len(tokens) == len(prompt) or tokens[-1] not in stops):
        logits = model(input_ids=torch.tensor([tokens]), use_cache=False).logits
        tokens.append(int(logits[0, -1].argmax()))
    return tokens[len(prompt) :]


def model_of(family: str) -> PreTrainedModel:
    """Give a model whose next token hangs on all that stands before it: biases of a random one would drown the rest."""
    model = fresh_base(family).model
    model.config.final_logit_softcapping = 30.0  # gemma2's is so low that tokens tie
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.zero_()
            elif parameter.ndim == 1:
                parameter.fill_(1.0)
            elif "attn" in name or "attention" in name:
                parameter.mul_(3)
    return model


@pytest.mark.parametrize("together", [True, False])
@pytest.mark.parametrize("family", DECODERS)
def test_a_batch_writes_what_each_prompt_gets_alone(family, together):
    model, asked = model_of(family), prompts()
    limits = [6 + i % 5 for i in range(len(asked))]
    stops = [alone(model, prompt, 3, [])[-1] for prompt in asked[:3]]  # so that some stop early
    found = generate(model, asked, limits=limits, stops=stops, together=together)
    assert found == [alone(model, prompt, limit, stops) for prompt, limit in zip(asked, limits, strict=True)]
    early = [answer[-1] in stops and len(answer) < limit for answer, limit in zip(found, limits, strict=True)]
    assert any(early) and not all(early)
    assert len({tuple(answer) for answer in found}) > 8


@pytest.mark.parametrize("family", DECODERS)
def test_a_batch_writes_what_transformers_generate_writes_for_each_prompt(family):
    model, asked = model_of(family), [*prompts(4), *[[5, 6, 7]] * 2]
    model.generation_config = GenerationConfig()
    wanted = GenerationConfig(do_sample=False, max_new_tokens=20, eos_token_id=STOPS, pad_token_id=0)
    expected = []
    for prompt in asked:
        tokens = torch.tensor([prompt])
        found = model.generate(tokens, attention_mask=torch.ones_like(tokens), generation_config=wanted)
        expected.append(found[0, len(prompt) :].tolist())
    assert generate(model, asked, limits=[20] * 6, stops=STOPS) == expected


_SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 32}
_GROUPS = {**_SMALL, "num_key_value_heads": 2, "head_dim": 8}
_MAMBA = {"mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_head": 8, "mamba_d_state": 8, "mamba_chunk_size": 8}
_SHARED_KEYS = {"num_kv_shared_layers": 2, "vocab_size_per_layer_input": 101, "hidden_size_per_layer_input": 8}
UNUSUAL: dict[str, tuple[dict[str, Any], bool, bool]] = {
    # Positions read from the mask, or from the columns: then no hole may be left where a beginning is shared.
    "Bloom": ({"hidden_size": 32, "n_layer": 2, "n_head": 4}, True, True),
    "Mpt": ({"d_model": 32, "n_heads": 4, "n_layers": 2}, True, False),
    # A window and sinks; chunks; layers that use the keys of others.
    "GptOss": ({**_GROUPS, "num_local_experts": 4, "sliding_window": 4}, True, False),
    "Llama4Text": (
        {
            **_GROUPS,
            **{"num_hidden_layers": 4, "intermediate_size_mlp": 32, "num_local_experts": 2},
            **{"attention_chunk_size": 4, "pad_token_id": 0},
        },
        True,
        False,
    ),
    "Gemma3nText": (
        {
            **_GROUPS,
            **{"num_hidden_layers": 4, "sliding_window": 4, "laurel_rank": 4, "altup_num_inputs": 2},
            **{"activation_sparsity_pattern": [0.0] * 4},
            **_SHARED_KEYS,
        },
        True,
        False,
    ),
    # States that sum up what was read, beside attention, within it, or alone; no cache at all.
    "Mamba": ({"hidden_size": 32, "num_hidden_layers": 2}, False, False),
    "FalconH1": ({**_GROUPS, **_MAMBA}, False, False),
    "Lfm2": ({**_GROUPS, "layer_types": ["conv", "full_attention"]}, False, False),
    "OpenAIGPT": ({"n_embd": 32, "n_layer": 2, "n_head": 4}, False, False),
}


def unusual(name: str) -> PreTrainedModel:
    settings = getattr(transformers, f"{name}Config")(vocab_size=101, **UNUSUAL[name][0])
    model = AutoModelForCausalLM.from_config(settings)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model.eval()


@pytest.mark.parametrize("name", UNUSUAL)
def test_what_a_model_can_do_is_read_from_its_cache_and_proved_on_it(name):
    model = unusual(name)
    passes = Passes(model)
    assert (passes.refill, passes.share) == UNUSUAL[name][1:]
    begin = list(range(20, 40))
    asked = [*prompts(), *[[5, 6, 7]] * 3]
    assert generate(model, asked, limits=[6] * 15, stops=STOPS) == [alone(model, p, 6, STOPS) for p in asked]
    assert generate(model, asked[-3:], limits=[6] * 3, stops=[]) == [alone(model, asked[-1], 6, [])] * 3
    shared = [begin + prompt for prompt in prompts()]
    writer = Writer(model, stops=STOPS)
    found = writer.write([Prompt(prompt, None, 6) for prompt in shared])[0]
    assert [answer.tokens for (answer,) in found] == [alone(model, p, 6, STOPS) for p in shared]
    distinct = sum(map(len, {tuple(p) for p in prompts()}))
    assert (writer.tally.prompt_tokens == distinct + 20) == passes.share


def test_a_window_wider_than_the_proof_forbids_holes_too():
    passes = Passes(tiny("mistral", sliding_window=50))
    assert passes.refill and not passes.share
    assert Passes(tiny("mistral", sliding_window=None)).share


def test_a_model_that_fails_its_proof_is_asked_with_prompts_of_one_length():
    class Forgetful(type(tiny("llama"))):  # type: ignore[misc]
        def forward(self, *given, position_ids=None, **kinds):
            return super().forward(*given, **kinds)

    model = tiny("llama")
    model.__class__ = Forgetful
    assert not Passes(model).refill
    assert generate(model, prompts(), limits=[6] * 12, stops=STOPS) == [alone(model, p, 6, STOPS) for p in prompts()]


def test_the_delta_writes_along_and_can_be_switched_off():
    w = world("lora")
    asked, chosen = prompts(), {"limits": [8] * 12, "stops": STOPS}
    before = generate(w.base.model, asked, **chosen)
    for layer in w.method.layers.values():
        layer.pair("link-1").B.data.normal_(std=0.5)
    after = generate(w.base.model, asked, **chosen)
    assert after == [alone(w.base.model, prompt, 8, STOPS) for prompt in asked]
    assert after != before
    with w.method.without():
        assert generate(w.base.model, asked, **chosen) == before


@pytest.mark.parametrize("family", ["gpt2", "opt", "llama"])
def test_a_long_prompt_is_not_led_beyond_the_positions_by_anothers_limit(family):
    model = model_of(family)
    asked, limits = [list(range(5, 65)), [7, 8, 9], list(range(5, 60))], [4, 30, 9]
    assert room(model) == 64
    found = generate(model, asked, limits=limits, stops=[])
    assert found == [alone(model, prompt, limit, []) for prompt, limit in zip(asked, limits, strict=True)]


def test_a_models_own_taste_in_sampling_counts_for_nothing():
    model, asked = model_of("llama"), prompts()
    plain = generate(model, asked, limits=[8] * 12, stops=STOPS)
    tastes = {"do_sample": True, "temperature": 3.0, "repetition_penalty": 5.0, "no_repeat_ngram_size": 1}
    own = model.generation_config = GenerationConfig(**tastes, min_new_tokens=8, suppress_tokens=[5, 6])
    assert generate(model, asked, limits=[8] * 12, stops=STOPS) == plain
    assert model.generation_config is own
    with pytest.raises(IndexError):
        generate(model, [[500]], limits=[1], stops=STOPS)
    assert model.generation_config is own


@pytest.mark.parametrize("training", [True, False])
def test_writing_leaves_random_state_and_mode_as_they_were(training):
    model = tiny("gpt2", attn_pdrop=0.5, resid_pdrop=0.5).train(training)
    before = torch.get_rng_state()
    first, second = (generate(model, prompts(), limits=[8] * 12, stops=STOPS) for _ in range(2))
    assert first == second, "dropout is off"
    assert torch.equal(torch.get_rng_state(), before)
    assert model.training == training


# Text


def prompt_of(text: str, tokenizer, tokens: int | None = None) -> Prompt:
    return Prompt(tokenizer(text)["input_ids"][:tokens], text, 9)


@pytest.mark.parametrize("bos", [True, False])
def test_the_text_of_an_answer_is_what_stands_behind_the_prompt(bos):
    tokenizer = byte_tokenizer(bos=bos)
    prompt = prompt_of("say é: ", tokenizer)
    answer = tokenizer(" ü.", add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id]
    assert text_behind(prompt, answer, tokenizer) == " ü."
    assert text_behind(prompt, [], tokenizer) == ""


def test_a_token_that_reaches_over_the_end_of_the_prompt_is_cut_there():
    tokenizer = byte_tokenizer(merges=[("=", "4")])
    tokens = tokenizer("2+2=4!")["input_ids"]
    assert len(tokens) == 5, "`=4` is one token"
    asked = Prompt(tokens[:3], "2+2=", 9)
    assert text_behind(asked, tokens[3:], tokenizer) == "4!"
    other = tokenizer("-1")["input_ids"]
    assert text_behind(asked, other, tokenizer) == "-1", (
        "it wrote something else: nothing of the prompt is taken off twice"
    )


def test_answers_stop_at_the_end_token_and_come_as_text():
    tokenizer = byte_tokenizer()
    model = tiny("llama", vocab_size=len(tokenizer), eos_token_id=[7, 9])
    assert stop_tokens(model, tokenizer) == [tokenizer.eos_token_id, 7, 9]
    asked = [prompt_of(text, tokenizer) for text in ("a", "what is it? ", "no")]
    found = answers(model, tokenizer, asked)
    expected = [alone(model, prompt.tokens, 9, stop_tokens(model, tokenizer)) for prompt in asked]
    assert found == [text_behind(p, tokens, tokenizer) for p, tokens in zip(asked, expected, strict=True)]


def test_room_is_the_number_of_positions():
    assert room(tiny("llama")) == room(tiny("gpt2")) == 64
