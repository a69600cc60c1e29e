"""The value model beside a policy: what it leaves alone, what it computes, and that both train together."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from loralab.base.attention import NAME
from loralab.base.model import Base
from loralab.delta.layers import low_rank_layers
from loralab.errors import TargetError
from loralab.methods import METHODS
from loralab.methods.base import Progress
from loralab.methods.value import Value, WithValue
from tiny import tiny

WHERE = ["q_proj", "down_proj"]
TOKENS = torch.arange(3, 20)[None]
HOW: dict[str, dict[str, Any]] = {
    "lora": {"rank": 2, "targets": ["q_proj", "k_proj"]},
    "cola": {"rank": 2, "links": 2, "targets": ["q_proj", "k_proj"]},
    "full": {"targets": ["q_proj", "down_proj", "norm"]},
}


def base() -> Base:
    model = tiny("llama")
    model.set_attn_implementation(NAME)
    return Base(model.requires_grad_(False), None, "tiny", None, "mark")


def move(tensors: dict[str, Any], seed: int = 5) -> None:
    """Give tensors that began at zero something to say."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for tensor in tensors.values():
            tensor += 0.2 * torch.randn(tensor.shape, generator=generator)


def moved(method: Any) -> dict[str, Tensor]:
    tensors = {name: p for group in method.param_groups(1e-3, 0.0) for name, p in group.tensors.items()}
    move(tensors)
    return tensors


@torch.no_grad()
def logits(found: Base) -> Tensor:
    return found.model(TOKENS, use_cache=False).logits


@pytest.mark.parametrize("how", HOW)
def test_a_policy_is_the_same_bits_with_and_without_a_value_beside_it(how: str) -> None:
    alone, together = base(), base()
    method, both = METHODS[how](**HOW[how]), WithValue(METHODS[how](**HOW[how]), Value(rank=3, targets=WHERE))
    before = torch.get_rng_state()
    attached = method.attach(alone, 1)
    drawn = torch.get_rng_state()
    torch.set_rng_state(before)
    assert both.attach(together, 1) == attached, "what is counted is the policy's"
    assert torch.equal(torch.get_rng_state(), drawn)
    moved(method), moved(both.method)
    move(both.value.tensors())
    assert torch.equal(logits(together), logits(alone))
    with both.without():
        assert torch.equal(logits(together), logits(base()))


@pytest.mark.parametrize("how", HOW)
def test_values_are_those_of_the_base_with_its_own_pairs_merged(how: str) -> None:
    found, merged = base(), base()
    value = Value(rank=3, alpha=6.0, targets=WHERE)
    both = WithValue(METHODS[how](**HOW[how]), value)
    both.attach(found, 1)

    def values() -> Tensor:
        with both.without(), value.acting(), torch.no_grad():
            return value.values(found.model.model(TOKENS, use_cache=False).last_hidden_state[0])

    moved(both.method)
    assert torch.equal(values(), torch.zeros(TOKENS.shape[1])), "nothing is expected at first"
    move(value.tensors())
    tensors = value.tensors()
    with torch.no_grad():
        for name, layer in merged.model.named_modules():
            if name.split(".")[-1] in WHERE:
                layer.weight += 6.0 / 3 * tensors[f"value/{name}.B"] @ tensors[f"value/{name}.A"]
        hidden = merged.model.model(TOKENS, use_cache=False).last_hidden_state[0]
        expected = hidden @ tensors["value/head.weight"][0] + tensors["value/head.bias"]
    torch.testing.assert_close(values(), expected, rtol=1e-4, atol=1e-4)
    assert float(values().std()) > 0.01
    assert not any("value" in layer.active for layer in low_rank_layers(found.model).values()), "inactive again"


def test_pairs_start_from_their_own_seed_and_leave_what_acted_acting() -> None:
    first, second, other = (Value(rank=2, targets=targets) for targets in (WHERE, ["q_proj"], ["q_proj"]))
    for value, seed in ((first, 1), (second, 1), (other, 2)):
        value.attach(base(), seed)
    name = next(name for name in second.tensors() if name.endswith("q_proj.A"))
    assert torch.equal(first.tensors()[name], second.tensors()[name]), "another target leaves the others as they were"
    assert not torch.equal(other.tensors()[name], second.tensors()[name])
    assert float(first.tensors()[name].abs().max().detach()) > 0
    assert not any(p.any() for n, p in first.tensors().items() if n.endswith(".B") or "head" in n)


def test_groups_are_the_methods_then_the_values_at_its_own_rate() -> None:
    both = WithValue(METHODS["lora"](**HOW["lora"]), Value(rank=2, targets=WHERE), value_learning_rate=0.5)
    both.attach(base(), 0)
    groups = {group.name: group for group in both.param_groups(0.1, 0.01)}
    assert {name: (g.learning_rate, g.weight_decay) for name, g in groups.items()} == {
        "matrices": (0.1, 0.01),
        "value/matrices": (0.5, 0.01),
        "value/vectors": (0.5, 0.0),
    }
    assert list(groups["value/vectors"].tensors) == ["value/head.bias"]
    names = [name for group in groups.values() for name in group.tensors]
    assert len(names) == len(set(names)) and all(p.requires_grad for g in groups.values() for p in g.tensors.values())
    both.value_learning_rate = None
    assert [g.learning_rate for g in both.param_groups(0.1, 0.0)] == [0.1] * 3


@pytest.mark.parametrize("how", HOW)
def test_state_comes_back_and_the_delta_knows_nothing_of_the_value(how: str, tmp_path: Path) -> None:
    def fresh() -> tuple[Base, WithValue]:
        found = base()
        both = WithValue(METHODS[how](**HOW[how]), Value(rank=2, targets=WHERE))
        both.attach(found, 0)
        return found, both

    found, both = fresh()
    both.at_step(Progress(0, 4, lambda: None))
    both.at_step(Progress(2, 4, lambda: None))  # a chain ties its knot here
    moved(both)
    tensors, facts = both.state()
    kept = {name: tensor.clone() for name, tensor in tensors.items()}
    assert sum(name.startswith("value/") for name in kept) == len(both.value.tensors())
    again, other = fresh()
    other.load_state(kept, facts)
    assert all(torch.equal(tensor, kept[name]) for name, tensor in other.state()[0].items())
    assert kept.keys() == other.state()[0].keys()
    assert torch.equal(logits(again), logits(found))

    alone = METHODS[how](**HOW[how])
    plain = base()
    alone.attach(plain, 0)
    own = {name: tensor for name, tensor in kept.items() if not name.startswith("value/")}
    alone.load_state(own, facts)
    mine, theirs = both.delta(), alone.delta()
    assert list(mine) == list(theirs) and mine.whole.keys() == theirs.whole.keys()
    for name in theirs:
        assert torch.equal(mine[name].dense(), theirs[name].dense())
    assert len(both.links()) == len(alone.links())
    both.save(tmp_path / "both")
    alone.save(tmp_path / "alone")
    for path in (tmp_path / "alone").iterdir():
        if path.suffix == ".safetensors":
            expected, saved = load_file(path), load_file(tmp_path / "both" / path.name)
            assert expected.keys() == saved.keys() and all(torch.equal(saved[n], expected[n]) for n in expected)
        else:
            assert path.read_text() == (tmp_path / "both" / path.name).read_text(), path.name


def test_layers_of_the_peft_library_are_refused() -> None:
    both = WithValue(METHODS["peft"](tuner="LORA", keys={"r": 2}), Value(rank=2))
    with pytest.raises(TargetError, match="peft library"):
        both.attach(base(), 0)


def test_a_target_that_matches_nothing_is_refused_before_anything_is_wrapped() -> None:
    found = base()
    with pytest.raises(TargetError, match="wuery"):
        WithValue(METHODS["lora"](**HOW["lora"]), Value(targets=["wuery"])).attach(found, 0)
    assert not low_rank_layers(found.model)


def test_the_output_head_is_left_out() -> None:
    attached = Value(rank=2, targets=["q_proj", "lm_head"]).attach(base(), 0)
    assert attached.layers and all(name.endswith("q_proj") for name in attached.layers)
    with pytest.raises(TargetError, match="head alone"):
        Value(rank=2, targets=["lm_head"]).attach(base(), 0)


def test_a_rank_beyond_a_layer_is_lowered_to_it() -> None:
    value = Value(rank=1000, targets=WHERE)
    attached = value.attach(base(), 0)
    assert set(attached.ranks.values()) == {32}
    assert attached.trained_parameters == sum(p.numel() for p in value.tensors().values())
