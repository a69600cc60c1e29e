"""The batch that is refilled: what it computes, what it shares, and that nothing of it shows in the answers."""

import re
from contextlib import contextmanager, nullcontext

import pytest
import torch
from test_generate import STOPS, alone, model_of, prompts
from tiny_tokenizers import byte_tokenizer

from loralab.base import attention
from loralab.base.model import load
from loralab.errors import EvaluationError
from loralab.evals.generate import Answer, Prompt, Sampling, Writer, fitted, generate, room
from tiny import tiny

DRAWN = Sampling(temperature=0.8, top_p=0.95, top_k=50, seed=7)


def asked_of(count: int = 24, limit: int | None = None) -> list[Prompt]:
    """Make prompts of 1 to 9 tokens, with limits of 2 to 40 unless one is given."""
    return [Prompt(p, None, limit or 2 + (7 * i * i) % 39) for i, p in enumerate(prompts(count))]


def write(model, asked, sampling=DRAWN, *, stops=STOPS, **chosen) -> tuple[list[list[Answer]], Writer]:
    samples = chosen.pop("samples", 1)
    writer = Writer(model, stops=stops, **chosen)
    return writer.write(asked, sampling=sampling, samples=samples)[0], writer


# What is computed


def test_rows_leave_as_they_end_and_others_join():
    model, asked = model_of("llama"), asked_of(60)
    found, writer = write(model, asked, Sampling(), stops=[], budget=400)
    tally, lengths = writer.tally, [len(answer.tokens) for (answer,) in found]
    assert lengths == [prompt.limit for prompt in asked]
    needed = sum(length - 1 for length in lengths)
    assert tally.rows == tally.needed == needed, "no row is computed beyond its end"
    assert tally.largest <= 400 and tally.refills > 3
    size = round(needed / tally.steps)  # rows a step, on average
    in_batches = sum(len(batch) * (max(batch) - 1) for i in range(0, 60, size) if (batch := lengths[i : i + size]))
    assert size > 5 and in_batches > 1.5 * needed, "fixed batches of as many rows compute far more"
    _, apart = write(model, asked, Sampling(), stops=[], budget=400, together=False)
    assert apart.tally.rows > 1.3 * apart.tally.needed == 1.3 * needed


def test_samples_of_a_prompt_share_its_pass():
    model = model_of("llama")
    asked = [Prompt([5, 6, 7, 8], None, 6), Prompt([9, 8], None, 6), Prompt([5, 6, 7, 8], None, 5)]
    found, writer = write(model, asked, samples=8)
    assert writer.tally.prompt_tokens == 6, "a prompt that stands there twice is read once"
    assert [len(group) for group in found] == [8, 8, 8]
    assert len({tuple(answer.tokens) for answer in found[0]}) > 4
    greedy, writer = write(model, asked, Sampling(), samples=8)
    assert writer.tally.rows <= 15 and greedy[0] == greedy[0][:1] * 8


def test_answers_that_outgrow_the_budget_wait_and_go_on_as_if_nothing_had_been():
    model = model_of("llama")
    asked = [Prompt([3 + i], None, 50) for i in range(80)]  # limits that few answers come to
    stops = [2, 60, 61, 62, 63]
    expected, ample = write(model, asked, stops=stops)
    found, writer = write(model, asked, stops=stops, budget=300)
    assert found == expected
    lengths = sorted(len(answer.tokens) for (answer,) in found)
    assert lengths[40] < 20 and lengths[-1] == 50
    assert writer.tally.put_back > 5 and ample.tally.put_back == 0
    assert writer.tally.largest <= 300
    assert writer.tally.rows / writer.tally.steps > 7, "room for 51 columns a row would be room for 5 rows"


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt"])
def test_a_beginning_of_all_prompts_is_read_once(family):
    model, begin = model_of(family), list(range(10, 30))
    asked = [Prompt(begin + tokens, None, 9) for tokens in prompts()]
    found, writer = write(model, asked, Sampling())
    assert [answer.tokens for (answer,) in found] == [alone(model, p.tokens, 9, STOPS) for p in asked]
    assert writer.tally.prompt_tokens == 20 + sum(len(tokens) for tokens in {tuple(p) for p in prompts()})
    alike = [Prompt([*begin, i, 7, 9], None, 9) for i in range(40, 46)]  # none is padded
    found, _ = write(model, alike, Sampling())
    assert [answer.tokens for (answer,) in found] == [alone(model, p.tokens, 9, STOPS) for p in alike]
    inside = [Prompt(begin[: 17 + i], None, 9) for i in range(4)]  # one prompt begins all others
    found, writer = write(model, inside, Sampling())
    assert [answer.tokens for (answer,) in found] == [alone(model, p.tokens, 9, STOPS) for p in inside]
    assert writer.tally.prompt_tokens == 16 + 1 + 2 + 3 + 4


# What does not show


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_drawn_answers_hang_on_seed_prompt_and_sample_only(family):
    model, asked = model_of(family), asked_of(12)
    whole, _ = write(model, asked, samples=3)
    for chosen in ({"budget": 60}, {"budget": 1}, {"budget": 300}, {"together": False}):
        assert write(model, asked, samples=3, **chosen)[0] == whole
    assert write(model, asked[:5], samples=2)[0] == [group[:2] for group in whole[:5]]
    other, _ = write(model, asked, Sampling(0.8, 0.95, 50, seed=8), samples=3)
    assert sum(a.tokens == b.tokens for x, y in zip(whole, other, strict=True) for a, b in zip(x, y, strict=True)) < 30


def test_the_first_tokens_follow_the_models_distribution():
    from scipy.stats import chisquare

    model = model_of("llama")
    found, _ = write(model, [Prompt([5, 6, 7], None, 1)], Sampling(1.0, seed=1), samples=20000)
    with torch.no_grad():
        expected = torch.softmax(model(input_ids=torch.tensor([[5, 6, 7]])).logits[0, -1].double(), -1) * 20000
    counts = torch.bincount(torch.tensor([answer.tokens[0] for answer in found[0]]), minlength=101)
    usual = expected >= 5
    pooled = [torch.cat([x[usual], x[~usual].sum()[None]]) for x in (counts.double(), expected)]
    assert chisquare(pooled[0], pooled[1] * pooled[0].sum() / pooled[1].sum()).pvalue > 0.001


@pytest.mark.parametrize("together", [True, False])
def test_log_probabilities_are_those_of_a_whole_pass_at_temperature_1(together):
    model, asked = model_of("qwen3"), asked_of(10)
    found, _ = write(model, asked, together=together)
    assert all(answer.log_probs is None for (answer,) in found)
    given = Writer(model, stops=STOPS, together=together).write(asked, sampling=DRAWN, log_probs=True)[0]
    for prompt, (answer,), (plain,) in zip(asked, given, found, strict=True):
        assert answer.tokens == plain.tokens
        tokens = torch.tensor([prompt.tokens + answer.tokens])
        with torch.no_grad():
            exact = torch.log_softmax(model(input_ids=tokens).logits[0, len(prompt.tokens) - 1 : -1], -1)
        expected = exact.gather(-1, tokens[0, len(prompt.tokens) :, None]).squeeze(-1)
        assert torch.allclose(torch.tensor(answer.log_probs), expected, atol=1e-4)


def test_views_are_asked_in_turn_and_draw_the_same_numbers():
    model, asked, entered = model_of("llama"), asked_of(8), []

    @contextmanager
    def changed():
        entered.append(True)
        model.lm_head.weight.data.neg_()
        yield
        model.lm_head.weight.data.neg_()

    base, tuned, again = Writer(model, stops=STOPS).write(
        asked, sampling=DRAWN, views=[nullcontext, changed, nullcontext]
    )
    assert entered == [True] and base == again != tuned
    with changed():
        assert write(model, asked)[0] == tuned


@pytest.mark.parametrize("together", [True, False])
def test_model_mode_random_state_and_settings_are_left_as_they_were(together):
    model, before = model_of("llama").train(), torch.get_rng_state()
    own = model.generation_config
    write(model, asked_of(4), together=together)
    assert model.training and model.generation_config is own and torch.equal(torch.get_rng_state(), before)


# How answers end


@pytest.mark.parametrize("together", [True, False])
def test_an_answer_ends_with_the_token_that_completes_a_stop_text(together):
    tokenizer = byte_tokenizer(merges=[("a", "b"), ("b", "c")])
    model = tiny("llama", vocab_size=len(tokenizer) + 3, eos_token_id=0)  # more rows than the tokenizer has tokens
    free = Writer(model, tokenizer, stops=[], together=together)
    asked = [Prompt(tokenizer(text)["input_ids"], text, 50) for text in ("a", "what is it? ", "no")]
    (whole,) = free.write(asked, sampling=DRAWN)
    ends = [re.findall("[ -~]{2}", answer.text[3:])[0] for (answer,) in whole]
    stopped = [Prompt(p.tokens, p.text, 50, ("", "never seen", end)) for p, end in zip(asked, ends, strict=True)]
    (found,) = free.write(stopped, sampling=DRAWN)
    for prompt, end, (answer,), (before,) in zip(asked, ends, found, whole, strict=True):
        assert answer.ended == "text" and before.ended == "limit"
        assert answer.text == before.text.split(end)[0]
        assert answer.tokens == before.tokens[: len(answer.tokens)]
        decoded = [
            tokenizer.decode([*prompt.tokens, *before.tokens[:n]], skip_special_tokens=True)[len(prompt.text) :]
            for n in (len(answer.tokens) - 1, len(answer.tokens))
        ]
        assert [end in text for text in decoded] == [False, True]


def test_a_special_token_as_stop_text_ends_the_answer():
    tokenizer = byte_tokenizer(special=["<|im_end|>"])
    model = tiny("llama", vocab_size=len(tokenizer))
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    with torch.no_grad():
        model.lm_head.weight[end] = 0.05 * torch.sign(model.lm_head.weight[end])
    writer = Writer(model, tokenizer, stops=[])
    prompt = Prompt(tokenizer("go")["input_ids"], "go", 55, ("<|im_end|>",))
    found = writer.write([prompt], sampling=Sampling(50.0), samples=30)[0][0]
    stopped = [answer for answer in found if answer.ended == "stop"]
    assert stopped and all(a.tokens.index(end) == len(a.tokens) - 1 and "<|im" not in a.text for a in stopped)
    assert all(end not in answer.tokens for answer in found if answer.ended == "limit")


@pytest.mark.parametrize("together", [True, False])
def test_small_and_odd_questions(together):
    model = model_of("llama")
    assert write(model, [], together=together)[0] == []
    nothing = Prompt([5], None, 0)
    assert write(model, [nothing], together=together, samples=2)[0] == [[Answer([], None, "limit")] * 2]
    assert write(model, [nothing], together=together, samples=0)[0] == [[]]
    first = alone(model, [5], 1, [])
    asked = [Prompt([5], None, 9), nothing, Prompt([5], None, 1)]
    found, _ = write(model, asked, Sampling(), stops=first, together=together)
    assert found == [[Answer(first, None, "stop")], [Answer([], None, "limit")], [Answer(first, None, "stop")]]
    same, writer = write(model, [Prompt([5, 6], None, 7)] * 40, Sampling(), stops=[], together=together)
    assert len({tuple(answer.tokens) for (answer,) in same}) == 1 and writer.tally.steps == 6
    for sampling in (Sampling(1.0, top_p=1e-9), Sampling(1.0, top_k=1)):
        assert write(model, asked_of(5), sampling, together=together)[0] == write(model, asked_of(5), Sampling())[0]
    wild, _ = write(model, asked_of(5, limit=20), Sampling(1e6), stops=[], together=together)
    assert all(len(set(answer.tokens)) > 10 for (answer,) in wild)


@pytest.mark.parametrize("together", [True, False])
@pytest.mark.parametrize("sampling", [Sampling(), DRAWN])
def test_logits_that_are_not_numbers_are_reported_with_what_to_do(sampling, together):
    model = model_of("llama")
    with torch.no_grad():
        model.lm_head.weight[17] = torch.nan
    with pytest.raises(EvaluationError, match="not numbers") as caught:
        write(model, asked_of(3), sampling, together=together)
    assert "float32" in str(caught.value) and not model.training


def test_questions_that_cannot_be_asked():
    model = tiny("gpt2")
    for prompt, said in (
        (Prompt([], None, 3), "no tokens"),
        (Prompt([5] * 60, None, 5), "longer than the model reads"),
        (Prompt([5], None, 5, ("\n",)), "no tokenizer"),
    ):
        with pytest.raises(EvaluationError, match=said) as caught:
            write(model, [Prompt([5], None, 2), prompt])
        assert caught.value.where == "prompt 2 of 2" and caught.value.fix


def test_a_long_prompt_is_cut_on_the_left():
    long = Prompt(list(range(5, 75)), "text", 10, ("x",))
    kept, cut = fitted(long, 64)
    assert (kept.tokens, kept.text, kept.limit, kept.stop_texts, cut) == (list(range(21, 75)), None, 10, ("x",), 16)
    assert fitted(kept, 64) == (kept, 0) and fitted(long, float("inf")) == (long, 0)
    assert fitted(Prompt([1, 2, 3], "t", 900), 64) == (Prompt([3], None, 63), 2)
    model = tiny("gpt2")
    assert len(generate(model, [kept.tokens], limits=[10], stops=[])[0]) == 10 and room(model) == 64


# A real model


def test_a_real_model_writes_what_transformers_generate_writes(assets):
    base = load(str(assets / "models/stories3M"), device="cpu", dtype="float32")
    tokenizer, model = base.tokenizer, base.model
    assert tokenizer is not None and model.config._attn_implementation == attention.NAME
    texts = [
        "Once upon a time",
        "Lily had a red ball. One day,",
        "The dog",
        "Tom and his mom went to the big park. There,",
    ]
    asked = [
        Prompt(tokenizer(text)["input_ids"], text, limit) for text, limit in zip(texts, (90, 12, 60, 40), strict=True)
    ]
    writer = Writer(model, tokenizer, stops=[1], budget=250)
    (found,) = writer.write(asked)
    for prompt, (answer,) in zip(asked, found, strict=True):
        tokens = torch.tensor([prompt.tokens])
        expected = model.generate(
            tokens,
            attention_mask=torch.ones_like(tokens),
            do_sample=False,
            max_new_tokens=prompt.limit,
            eos_token_id=1,
            pad_token_id=0,
        )
        assert answer.tokens == expected[0, len(prompt.tokens) :].tolist()
    assert writer.tally.refills > 0
    assert found[0][0].text.startswith(", there was a little girl named Lily.")
    (stopped,) = writer.write([Prompt(p.tokens, p.text, p.limit, (".", " she")) for p in asked])
    for (whole,), (short,) in zip(found, stopped, strict=True):
        assert short.text == whole.text.split(".")[0].split(" she")[0]
        assert whole.tokens[: len(short.tokens)] == short.tokens
