"""Deltas read from checkpoints are, bit for bit, those that the method itself gives when it goes on from them."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from little_world import make_base, make_world, overrides
from loralab.base.weights import open_weights
from loralab.delta.lowrank import Delta, Dense, LowRank
from loralab.delta.store import load_lowrank
from loralab.errors import CheckpointError, DeltaError
from loralab.lab.experiment import train
from loralab.lab.objectives import prepare
from loralab.lab.trajectory import Unformed, checkpoints_of, delta_at, links_at, links_of
from loralab.methods import Method
from loralab.spec.recipes import read
from loralab.spec.spec import RunSpec
from loralab.training.checkpoint import read_checkpoint
from tiny import tiny

SHORT = {
    **{"train__steps": 4, "checkpoints__every": 2, "checkpoints__keep_last": 9, "checkpoints__keep_best": False},
    **{
        "probes__every": 4,
        "probes__tokens": 64,
        "probes__samples": 0,
        "probes__drift": False,
        "probes__spectra": False,
    },
}
PATTERNS = {"method__rank_pattern": '{"q_proj": 2}', "method__alpha_pattern": '{"v_proj": 3.0, "q_proj": 5.0}'}
RUNS: dict[str, tuple[str, dict[str, Any]]] = {
    "lora": ("sft-lora", {"method__scaling": "alpha/sqrt(r)", **PATTERNS}),
    "lora-embedding": ("sft-lora", {"method__targets": '["embed_tokens", "up_proj"]'}),
    "lora-norms": ("sft-lora", {"method__also_train": '["*norm*"]', "method__train": "B"}),
    "lora_plus": ("sft-lora-plus", {"method__rank_pattern": '{"*.mlp.*": 3}'}),
    "cola": ("sft-cola", {"method__links": 2, "method__ranks": "[4, 2]", **PATTERNS}),
    "full": ("sft-full", {}),
    "full-some": ("sft-full", {"method__targets": '["*self_attn*", "embed_tokens", "norm"]'}),
    "full-bfloat16": ("sft-full", {"model__dtype": "bfloat16"}),
}


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    return make_world(tmp_path_factory.mktemp("world"), train=12, held_out=2)


def spec(world: Path, kind: str, **more: Any) -> RunSpec:
    recipe, keys = RUNS[kind]
    rank = {} if recipe == "sft-full" else {"method__rank": 4}
    return read(recipe, overrides(world, **{**SHORT, **rank, **keys, **more}))


def peft_spec(world: Path, folder: Path, keys: str, tuner: str = "LORA") -> RunSpec:
    own = folder / "peft.yaml"
    own.write_text(f"method:\n  name: peft\n  tuner: {tuner}\n  keys: {keys}\ntrain:\n  epochs: 1\n")
    return read(str(own), overrides(world, **SHORT))


def method_at(chosen: RunSpec, run: Path, step: int, method: Method | None = None) -> Method:
    """Make the model, unless its method is given, and let the method go on from a checkpoint."""
    method = method or prepare(chosen).method
    state = read_checkpoint(run / "checkpoints" / f"step-{step}")
    method.load_state(state.tensors["method"], state.facts["method"])
    return method


def same(found: Delta, expected: Delta) -> None:
    assert list(found) == list(expected) and len(found) > 0
    assert (found.base_fingerprint, found.embeddings) == (expected.base_fingerprint, expected.embeddings)
    assert found.keeps_ties == expected.keeps_ties
    for name, change in expected.items():
        other = found[name]
        assert other.shape == change.shape
        if isinstance(change, LowRank):
            assert isinstance(other, LowRank)
            assert torch.equal(other.A, change.A) and torch.equal(other.B, change.B) and other.scale == change.scale
        else:
            assert isinstance(other, Dense)
            assert torch.equal(other.weight, change.weight) and bool(change.weight.any())
    assert found.whole.keys() == expected.whole.keys()
    assert all(torch.equal(found.whole[name], value) for name, value in expected.whole.items())


@pytest.mark.parametrize("kind", RUNS)
def test_the_delta_of_a_checkpoint_is_the_one_that_its_method_gives(world, tmp_path, kind):
    chosen = spec(world, kind)
    run = train(chosen, tmp_path).folder.path
    assert checkpoints_of(run) == [0, 2, 4]
    weights, method = open_weights(str(world / "base")), prepare(chosen).method
    for step in (2, 4):
        method_at(chosen, run, step, method)
        same(delta_at(run, step, weights), method.delta())
        links = links_at(run, step, weights)
        assert len(links) == len(method.links()) == (2 if kind == "cola" else 0)
        for found, expected in zip(links, method.links(), strict=True):
            same(found, expected)
    if kind.startswith("full"):
        return
    saved, at_end = load_lowrank(run / "delta"), delta_at(run, 4, weights)
    assert list(saved) != [] and set(saved) == set(at_end)
    for name, pair in saved.items():
        other = at_end[name]
        assert isinstance(pair, LowRank) and isinstance(other, LowRank)
        assert torch.equal(pair.A, other.A) and torch.equal(pair.B, other.B)
        assert other.scale == pytest.approx(pair.scale, rel=1e-15)
    assert saved.embeddings == at_end.embeddings


def test_links_are_found_in_their_order(world, tmp_path):
    chosen = spec(world, "cola", method__ranks="[2, 3]", method__rank_pattern="{}")
    run = train(chosen, tmp_path).folder.path
    found = links_of(run)
    assert [path.name for path in found] == ["link-1", "link-2"]
    ranks = [{pair.rank for pair in load_lowrank(path).values() if isinstance(pair, LowRank)} for path in found]
    assert ranks == [{2}, {3}]
    for number in (10, 11):
        shutil.copytree(run / "links" / "link-1", run / "links" / f"link-{number}")
    (run / "links" / "link-12").mkdir()  # not an adapter
    assert [path.name for path in links_of(run)] == ["link-1", "link-2", "link-10", "link-11"]
    assert links_of(tmp_path) == [] and checkpoints_of(tmp_path) == []


def test_weights_that_are_held_turned_have_their_change_turned(tmp_path):
    """Transformers' Conv1D holds (in, out); the square ones tell it by nothing but their numbers."""
    world = make_world(tmp_path / "world", train=12, held_out=2)
    tiny("gpt2").save_pretrained(world / "base")
    weights = open_weights(str(world / "base"))
    for kind, keys in (("full", {}), ("lora-embedding", {"method__targets": '["c_proj", "c_attn", "wpe"]'})):
        chosen = spec(world, kind, **keys)
        run = train(chosen, tmp_path).folder.path
        delta = delta_at(run, 4, weights)
        assert {True, False} == {change.shape[0] == change.shape[1] for change in delta.values()}
        same(delta, method_at(chosen, run, 4).delta())
        assert delta.embeddings == ({"transformer.wpe"} if kind != "full" else set())


def test_a_dense_change_is_formed_when_it_is_asked_for_one_at_a_time(world, tmp_path):
    run = train(spec(world, "full"), tmp_path).folder.path
    weights = open_weights(str(world / "base"))
    asked: list[str] = []

    class Counted:
        """Weights that say what was read of them."""

        path, notes = weights.path, weights.notes
        layers, linears, weight, fingerprint = weights.layers, weights.linears, weights.weight, weights.fingerprint

        def parameter(self, name: str) -> torch.Tensor:
            asked.append(name)
            return weights.parameter(name)

    delta = delta_at(run, 4, Counted())
    shapes = {name: change.shape for name, change in delta.items()}
    assert asked == [] and delta.num_parameters > 0, "shapes and sizes are known without reading"
    assert shapes == {name: weights.layers()[name] for name in weights.linears()}
    first = next(change for change in delta.values() if change.shape[0] != change.shape[1])
    assert isinstance(first, Unformed)
    numbers = first.weight
    assert first.weight is numbers and numbers.shape == first.shape and bool(numbers.any())
    assert len(asked) == 2  # the numbers, and how they are held
    del numbers
    assert first.dense(torch.float64).dtype is torch.float64 and len(asked) == 4, "nobody held them"


# Of the PEFT library


def test_pairs_of_the_peft_library_are_those_that_it_saves(world, tmp_path):
    keys = (
        "{r: 4, lora_alpha: 6, use_rslora: true, rank_pattern: {q_proj: 2}, bias: lora_only, modules_to_save: [norm]}"
    )
    chosen = peft_spec(world, tmp_path, keys)
    run = train(chosen, tmp_path).folder.path
    found, saved = delta_at(run, 4, open_weights(str(world / "base"))), load_lowrank(run / "delta")
    same(Delta(dict(found), found.whole), Delta({name: saved[name] for name in found}, saved.whole))
    assert len(saved) == len(found) and {change.rank for change in found.values() if isinstance(change, LowRank)} == {
        2,
        4,
    }
    assert "model.norm.weight" in found.whole
    expected = method_at(chosen, run, 4).delta()
    assert expected.base_fingerprint == found.base_fingerprint is not None
    for name, change in expected.items():
        torch.testing.assert_close(found[name].dense(), change.dense(), atol=1e-6, rtol=1e-4)
    assert all(torch.equal(found.whole[name], value) for name, value in expected.whole.items() if name in found.whole)


@pytest.mark.parametrize(
    ("tuner", "keys", "said"),
    [
        ("LORA", "{r: 4, use_dora: true}", "use_dora"),
        ("IA3", "{}", "IA3"),
        ("LORA", "{r: 4, init_lora_weights: pissa}", "pissa"),
    ],
)
def test_other_tuners_are_refused_by_name(world, tmp_path, tuner, keys, said):
    run = train(peft_spec(world, tmp_path, keys, tuner), tmp_path).folder.path
    with pytest.raises(DeltaError, match=said) as caught:
        delta_at(run, 4, open_weights(str(world / "base")))
    assert "step-4" in str(caught.value.where) and "probes.spectra" in str(caught.value.fix)


# What is wrong


@pytest.fixture(scope="module")
def runs(world, tmp_path_factory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("runs")
    return {kind: train(spec(world, kind), root).folder.path for kind in ("cola", "full")}


def copied(run: Path, to: Path) -> Path:
    return Path(shutil.copytree(run, to / "run"))


def test_a_checkpoint_that_is_not_there_is_said_with_those_that_are(world, runs):
    weights = open_weights(str(world / "base"))
    with pytest.raises(CheckpointError) as caught:
        delta_at(runs["cola"], 3, weights)
    assert str(caught.value.where).endswith("@3") and str(caught.value.fix).endswith("0, 2, 4")
    with pytest.raises(CheckpointError, match="no such checkpoint"):
        links_at(world, 2, weights)


@pytest.mark.parametrize("kind", ["cola", "full"])
def test_damage_is_found(world, runs, tmp_path, kind):
    weights, run = open_weights(str(world / "base")), copied(runs[kind], tmp_path)
    file = run / "checkpoints" / "step-4" / "method.safetensors"
    data = file.read_bytes()
    file.write_bytes(data[: len(data) // 2])
    with pytest.raises(CheckpointError) as caught:
        delta_at(run, 4, weights)
    assert caught.value.where == str(file)
    file.unlink()
    with pytest.raises(CheckpointError):
        delta_at(run, 4, weights)
    if kind == "cola":
        file.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
        with pytest.raises(CheckpointError, match="checksum"):
            delta_at(run, 4, weights)


@pytest.mark.parametrize("kind", ["cola", "full"])
@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"num_hidden_layers": 1}, "model.layers.1"),
        ({"intermediate_size": 40}, "gate_proj is (40, 32), the delta has (48, 32)"),
    ],
)
def test_another_base_is_refused_by_what_differs(runs, tmp_path, kind, changes, said):
    other = open_weights(str(make_base(tmp_path / "other", **changes)))
    with pytest.raises(DeltaError, match="another base") as caught:
        delta_at(runs[kind], 4, other)
    assert said in str(caught.value.where)


def test_a_run_from_random_weights_has_no_base_in_a_file(world, tmp_path):
    run = train(spec(world, "full", **{"model.random_init": True}), tmp_path).folder.path
    with pytest.raises(DeltaError, match="random weights"):
        delta_at(run, 4, open_weights(str(world / "base")))
