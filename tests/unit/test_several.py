"""Several deltas on one base: each acts as if it stood alone, and the base is what it was, bit for bit."""

import copy

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model

from loralab.delta.lowrank import Delta, Dense, LowRank
from loralab.delta.several import Wardrobe
from loralab.delta.store import difference, load_lowrank
from loralab.errors import DeltaError
from tiny import tiny

TOKENS = torch.tensor([[5, 9, 17, 33, 2, 40]])


@torch.no_grad()
def logits(model) -> torch.Tensor:
    return model(input_ids=TOKENS, use_cache=False).logits


def bits(model) -> dict[str, torch.Tensor]:
    return {
        name.replace(".base.", "."): value.clone() for name, value in model.state_dict().items() if "pairs" not in name
    }


def same_bits(model, before: dict[str, torch.Tensor]) -> bool:
    now = bits(model)
    return now.keys() == before.keys() and all(torch.equal(now[name], value) for name, value in before.items())


def pair(out: int, into: int, rank: int = 3, seed: int = 0, scale: float = 0.5) -> LowRank:
    generator = torch.Generator().manual_seed(seed)
    A, B = torch.randn(rank, into, generator=generator), torch.randn(out, rank, generator=generator)
    return LowRank(A / 3, B / 3, scale)


def adapter(folder, family: str = "llama", **chosen):
    """Save an adapter by peft with random weights, and give its folder."""
    model = get_peft_model(tiny(family), LoraConfig(task_type="CAUSAL_LM", **chosen))
    with torch.no_grad():
        for number, parameter in enumerate(p for p in model.parameters() if p.requires_grad):
            noise = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(number))
            parameter.add_(noise / 5)
    model.save_pretrained(folder)
    return folder


KINDS = {
    "llama": [
        {"r": 4, "target_modules": ["q_proj", "v_proj"], "lora_alpha": 8},
        {
            "r": 2,
            "target_modules": ["q_proj", "down_proj"],
            "modules_to_save": ["lm_head"],
            "rank_pattern": {"q_proj": 7},
        },
    ],
    "qwen2": [
        {"r": 3, "target_modules": "all-linear", "bias": "lora_only"},
        {"r": 2, "target_modules": ["o_proj"], "modules_to_save": ["embed_tokens", "input_layernorm"]},
    ],
    "gpt2": [
        {"r": 3, "target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True, "bias": "lora_only"},
        {"r": 2, "target_modules": ["c_fc"], "fan_in_fan_out": True},
    ],
}


@pytest.mark.parametrize("family", KINDS)
def test_every_view_is_that_delta_alone_as_peft_reads_it(family, tmp_path):
    folders = [adapter(tmp_path / str(number), family, **chosen) for number, chosen in enumerate(KINDS[family])]
    tuned = tiny(family, seed=1)  # every parameter of it is another one
    parameters, base = dict(tuned.named_parameters(remove_duplicate=False)), tiny(family)
    deltas = {f"d{number}": load_lowrank(folder) for number, folder in enumerate(folders)}
    deltas["full"] = Delta({}, {name: value.detach() for name, value in parameters.items()})
    expected = [
        logits(base),
        *(logits(PeftModel.from_pretrained(tiny(family), folder)) for folder in folders),
        logits(tuned),
    ]
    before, wardrobe = bits(base), Wardrobe(base, deltas)
    assert wardrobe.names == ("d0", "d1", "full")
    for _ in range(2):
        for view, right in zip(wardrobe.views(), expected, strict=True):
            with view():
                torch.testing.assert_close(logits(base), right, rtol=1e-4, atol=1e-4)
            assert torch.equal(logits(base), expected[0])
    assert same_bits(base, before)
    differences = [(one - other).abs().max() for i, one in enumerate(expected) for other in expected[:i]]
    assert min(differences) > 0.01, "a test in which deltas do nothing would show nothing"


def test_the_base_is_back_when_work_in_a_view_breaks_off():
    base = tiny("llama")
    before, whole = bits(base), {"model.norm.weight": torch.full((32,), 3.0)}
    wardrobe = Wardrobe(base, {"a": Delta({"lm_head": pair(101, 32)}, whole)})
    with pytest.raises(KeyError), wardrobe.view("a")():
        assert not torch.equal(base.model.norm.weight, before["model.norm.weight"])
        raise KeyError
    assert same_bits(base, before) and torch.equal(logits(base), logits(tiny("llama")))


def test_nothing_is_copied_when_a_whole_parameter_is_put_on():
    base, value = tiny("llama"), torch.ones(32)
    wardrobe = Wardrobe(base, {"a": Delta({}, {"model.norm.weight": value})})
    stored = base.model.norm.weight.data_ptr()
    with wardrobe.view("a")():
        assert base.model.norm.weight.data_ptr() == value.data_ptr()
    assert base.model.norm.weight.data_ptr() == stored


@pytest.mark.parametrize(
    ("family", "layer"), [("llama", "model.layers.0.mlp.up_proj"), ("gpt2", "transformer.h.0.mlp.c_fc")]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dense_differences_are_added_in_float32_and_rounded_once(family, layer, dtype):
    base = tiny(family).to(dtype)
    stored = base.get_submodule(layer).weight.detach().clone()
    turned = family == "gpt2"
    change = torch.randn(stored.shape[::-1] if turned else stored.shape) / 50
    with Wardrobe(base, {"a": Delta({layer: Dense(change)})}).view("a")():
        worn = base.get_submodule(layer).weight
        exact = stored.float() + (change.t() if turned else change)
        assert worn.dtype is dtype and torch.equal(worn, exact.to(dtype))


# A table that embedding and head share


def tied():
    model = tiny("llama", tie_word_embeddings=True)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    return model


@pytest.mark.parametrize("name", ["lm_head.weight", "model.embed_tokens.weight"])
def test_one_of_two_tied_tables_can_be_trained_whole(name):
    value = torch.randn(101, 32, generator=torch.Generator().manual_seed(3)) / 3
    expected = tiny("llama", tie_word_embeddings=True)
    expected.lm_head.weight = torch.nn.Parameter(expected.lm_head.weight.detach().clone())
    expected.get_parameter(name).data = value
    base = tied()
    right = logits(base)
    wardrobe = Wardrobe(base, {"a": Delta({}, {name: value}), "b": Delta({"lm_head": pair(101, 32)})})
    with wardrobe.view("a")():
        torch.testing.assert_close(logits(base), logits(expected))
    assert torch.equal(logits(base), right)
    assert base.lm_head.base.weight.data_ptr() == base.model.embed_tokens.weight.data_ptr(), "still one table in memory"


def test_a_shared_table_that_was_fine_tuned_stays_shared():
    base, tuned = tied(), tied()
    with torch.no_grad():
        tuned.model.embed_tokens.weight.mul_(1.5)
    before = {"model.embed_tokens.weight": base.model.embed_tokens.weight}
    moved = {"model.embed_tokens.weight": tuned.model.embed_tokens.weight}
    assert difference(moved, before, {}).keeps_ties
    for layers in ({}, {"model.embed_tokens": False}):
        worn = tied()
        delta = difference(moved, before, layers)
        delta = (
            delta
            if not layers
            else Delta({"model.embed_tokens": Dense(delta["model.embed_tokens"].weight.t())}, keeps_ties=True)
        )
        with Wardrobe(worn, {"a": delta}).view("a")():
            torch.testing.assert_close(logits(worn), logits(tuned))


# What does not fit


@pytest.mark.parametrize(
    ("delta", "words"),
    [
        (Delta({"model.layers.7.mlp.up_proj": pair(48, 32)}), "model.layers.7.mlp.up_proj is missing"),
        (Delta({"lm_head": pair(99, 32)}), r"lm_head is \(101, 32\), the delta has \(99, 32\)"),
        (Delta({}, {"model.norm.bias": torch.ones(32)}), "model.norm.bias is missing"),
        (Delta({}, {"model.norm.weight": torch.ones(31)}), "model.norm.weight is"),
    ],
)
def test_a_delta_of_another_base_is_refused_with_what_differs(delta, words):
    base = tiny("llama")
    whole = copy.deepcopy(base)
    with pytest.raises(DeltaError, match="'bad' belongs to another base") as caught:
        Wardrobe(base, {"good": Delta({"lm_head": pair(101, 32)}), "bad": delta})
    import re

    assert re.search(words, str(caught.value)) and caught.value.fix
    assert same_bits(base, bits(whole)), "and nothing was put on"


def test_a_delta_that_scores_texts_is_told_from_one_of_another_base():
    head = {"score.weight": torch.ones(1, 32)}
    with pytest.raises(DeltaError, match="'judge' scores texts") as caught:
        Wardrobe(tiny("llama"), {"judge": Delta({"lm_head": pair(101, 32)}, head)})
    assert "score.weight" in str(caught.value) and "objective.reward" in str(caught.value.fix)
    with pytest.raises(DeltaError, match="another base"):
        Wardrobe(tiny("llama"), {"judge": Delta({"lm_head": pair(99, 32)}, head)})


def test_the_same_name_is_never_two_deltas():
    base = tiny("llama")
    wardrobe = Wardrobe(
        base, {"a": Delta({"lm_head": pair(101, 32)}), "b": Delta({"lm_head": pair(101, 32, rank=1, seed=5)})}
    )
    found = []
    for view in wardrobe.views():
        with view():
            found.append(logits(base))
    assert not torch.equal(found[1], found[2]) and torch.equal(found[0], logits(base))
    with pytest.raises(KeyError):
        wardrobe.view("c")


@pytest.mark.parametrize("name", ["v-lr0.5", "values", "type", "org/adapter"])
def test_a_delta_may_be_called_as_any_folder_is(name):
    model = tiny("llama")
    path = "model.layers.0.self_attn.q_proj"
    before = logits(model)
    wardrobe = Wardrobe(model, {name: Delta({path: pair(32, 32)})})
    with wardrobe.view(name)():
        assert not torch.equal(logits(model), before)
    assert torch.equal(logits(model), before)
