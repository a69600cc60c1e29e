"""A delta opened by its path is what its files say, by the base's names, a matrix at a time; misfits are said, not hidden."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import nn

from exam_world import make_adapter
from little_world import make_base
from loralab.base.weights import loaded_weights, open_weights
from loralab.delta.lowrank import Delta, Dense, LayerDelta, LowRank
from loralab.delta.opened import OpenedDelta, fit_delta, open_delta
from loralab.delta.store import save_lowrank
from loralab.errors import DeltaError, ModelError
from tiny import tiny

UP, QUERY = "model.layers.0.mlp.up_proj", "model.layers.1.self_attn.q_proj"


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make a base, an adapter by peft, and a tuned copy of which two matrices and a norm moved."""
    transformers.utils.logging.disable_progress_bar()
    made = tmp_path_factory.mktemp("opened")
    make_base(made / "base")
    make_adapter(
        made / "lora", 1, r=3, lora_alpha=12, target_modules=["q_proj", "up_proj"], rank_pattern={"up_proj": 5}
    )
    tuned = tiny("llama")
    for name in (UP, QUERY):
        tuned.get_submodule(name).weight.data += torch.randn(tuned.get_submodule(name).weight.shape) / 10
    tuned.model.norm.weight.data += 1
    tuned.save_pretrained(made / "tuned")
    (made / "empty").mkdir()
    return made


@pytest.fixture
def weights(world: Path) -> Any:
    return open_weights(str(world / "base"))


def pair(shape: tuple[int, int], rank: int = 2) -> LowRank:
    return LowRank(torch.randn(rank, shape[1]), torch.randn(shape[0], rank), 0.5)


def names(found: OpenedDelta) -> set[str]:
    return {name.rpartition(".")[2] for name in found}


def test_an_adapter_of_peft_is_what_peft_adds(world: Path, weights: Any) -> None:
    from peft import PeftModel

    found = open_delta(str(world / "lora"), weights)
    assert (found.kind, found.base_fingerprint, found.problems, found.notes) == ("low-rank", None, {}, [])
    assert len(found) == 4 and names(found) == {"q_proj", "up_proj"}
    merged = PeftModel.from_pretrained(tiny("llama"), world / "lora").merge_and_unload()
    for name, change in found.items():
        assert isinstance(change, LowRank) and change.rank == (5 if "up" in name else 3)
        moved = merged.get_submodule(name).weight - tiny("llama").get_submodule(name).weight
        torch.testing.assert_close(change.dense(), moved.detach(), atol=1e-5, rtol=1e-5)


def test_a_checkpoint_is_its_difference_from_the_base(world: Path, weights: Any) -> None:
    found = open_delta(str(world / "tuned"), weights)
    assert (found.kind, found.problems) == ("dense", {})
    assert set(found) == set(weights.linears()) and len(found.notes) == 1 and "norms" in found.notes[0]
    base, tuned = (load_file(world / f"{which}/model.safetensors") for which in ("base", "tuned"))
    for name, change in found.items():
        assert isinstance(change, Dense) and change.weight.dtype is torch.float32
        assert torch.equal(change.weight, tuned[f"{name}.weight"] - base[f"{name}.weight"])
        assert bool(change.weight.any()) == (name in (UP, QUERY)), "what did not move is zero"


class Counted:
    """Weights that say which of their matrices were read."""

    def __init__(self, inner: Any) -> None:
        self.inner, self.read, self.path, self.notes = inner, list[str](), inner.path, inner.notes

    def layers(self) -> Any:
        return self.inner.layers()

    def linears(self) -> Any:
        return self.inner.linears()

    def weight(self, name: str) -> Any:
        self.read.append(name)
        return self.inner.weight(name)

    def parameter(self, name: str) -> Any:
        self.read.append(name)
        return self.inner.parameter(name)

    def fingerprint(self) -> Any:
        return self.inner.fingerprint()


def test_nothing_is_formed_before_it_is_read(world: Path, weights: Any) -> None:
    counted = Counted(weights)
    found = open_delta(str(world / "tuned"), counted)
    counted.read.clear()  # the tests' check of types looks into what is returned
    assert UP in found and len(found) == 14 and counted.read == []
    assert bool(found[UP].dense().any())
    assert counted.read == [UP]


def test_layers_that_are_formed_when_asked_for_are_not_all_formed(weights: Any) -> None:
    asked: list[str] = []

    class Lazily(dict[str, LayerDelta]):
        def __getitem__(self, name: str) -> LayerDelta:
            asked.append(name)
            return Dense(torch.ones(weights.layers()[UP]))

    delta = Delta(Lazily({UP: Dense(torch.empty(0)), QUERY: Dense(torch.empty(0))}))
    found = fit_delta(delta, weights)
    assert set(found) == {UP, QUERY} and found.kind == "dense"
    asked.clear()  # the tests' check of types looks into what is handed over
    assert found[UP].shape == (48, 32) and UP in asked
    with pytest.raises(DeltaError, match=r"\(48, 32\).*\(32, 32\)"):
        found[QUERY]


@pytest.mark.parametrize(("stored", "trained"), [("bfloat16", "float32"), ("float32", "bfloat16")])
def test_dtypes_may_differ_without_moving_what_did_not_train(stored: str, trained: str, tmp_path: Path) -> None:
    """Training begins from the base rounded to its own dtype; that rounding is no change of the fine-tuning's."""
    model = tiny("llama").to(getattr(torch, stored))
    model.save_pretrained(tmp_path / "base")
    model.to(getattr(torch, trained))
    step = 0.25 * torch.ones_like(model.get_submodule(UP).weight)
    model.get_submodule(UP).weight.data += step
    model.save_pretrained(tmp_path / "tuned")
    found = open_delta(str(tmp_path / "tuned"), open_weights(str(tmp_path / "base")))
    assert not found[QUERY].dense().any()
    assert found[UP].dense().mean() == pytest.approx(0.25, rel=1e-2)


@pytest.mark.parametrize("how", ["checkpoint", "memory"])
def test_what_is_stored_as_in_out_is_turned(how: str, tmp_path: Path) -> None:
    """Also where the matrix is square, so that its shape tells nothing."""
    base, tuned = tiny("gpt2"), tiny("gpt2")
    name, square = "transformer.h.0.mlp.c_fc", "transformer.h.1.attn.c_proj"
    for moved in (name, square):
        tuned.get_submodule(moved).weight.data += torch.randn(tuned.get_submodule(moved).weight.shape)
    base.save_pretrained(tmp_path / "base")
    tuned.save_pretrained(tmp_path / "tuned")
    weights = open_weights(str(tmp_path / "base"))
    whole = {f"{moved}.weight": tuned.get_submodule(moved).weight.detach() for moved in (name, square)}
    found = (
        open_delta(str(tmp_path / "tuned"), weights) if how == "checkpoint" else fit_delta(Delta({}, whole), weights)
    )
    for moved in (name, square):
        difference = (tuned.get_submodule(moved).weight - base.get_submodule(moved).weight).detach().t()
        torch.testing.assert_close(found[moved].dense(), difference)


def test_linears_trained_whole_are_dense_and_the_rest_is_named(weights: Any) -> None:
    moved = weights.weight(UP) + 2
    whole = {f"{UP}.weight": moved, "model.norm.weight": torch.ones(32), "lm_head.weight": torch.zeros(101, 32)}
    found = fit_delta(Delta({QUERY: pair((32, 32))}, whole), weights)
    assert found.kind == "low-rank" and set(found) == {QUERY, UP}
    torch.testing.assert_close(found[UP].dense(), torch.full((48, 32), 2.0))
    assert found.notes == ["not measured, since it was trained whole beside the matrices: model.norm.weight and 1 more"]


def test_embeddings_of_an_adapter_are_matrices(world: Path, weights: Any, tmp_path: Path) -> None:
    pairs = {"model.embed_tokens": pair((32, 101))}
    save_lowrank(tmp_path / "embedded", Delta(pairs, embeddings=frozenset(pairs)), "base")
    found = open_delta(str(tmp_path / "embedded"), weights)
    assert {name: change.shape for name, change in found.items()} == {"model.embed_tokens": (32, 101)}
    assert weights.weight("model.embed_tokens").shape == (32, 101)


def test_a_delta_of_a_wrapped_model_goes_by_the_bases_names(tmp_path: Path) -> None:
    """An encoder's adapter is trained with a classifier around it, which gives its layers a prefix."""
    encoder, classifier = tiny("bert", task="Model"), tiny("bert", task="ForSequenceClassification")
    encoder.save_pretrained(tmp_path / "base")
    name = "encoder.layer.0.attention.self.query"
    save_lowrank(tmp_path / "lora", Delta({f"bert.{name}": pair((32, 32))}), "base")
    classifier.bert.load_state_dict(encoder.state_dict())
    classifier.get_submodule(f"bert.{name}").weight.data += 1
    classifier.save_pretrained(tmp_path / "tuned")
    weights = open_weights(str(tmp_path / "base"))
    assert list(open_delta(str(tmp_path / "lora"), weights)) == [name]
    found = open_delta(str(tmp_path / "tuned"), weights)
    assert [layer for layer, change in found.items() if change.dense().any()] == [name]
    assert set(found) == set(weights.linears()) and found.problems == {}


# What does not fit


def test_misfits_are_said_and_the_others_are_read(weights: Any) -> None:
    layers: dict[str, LayerDelta] = {
        UP: pair((48, 32)),
        QUERY: pair((32, 31)),
        "model.layers.7.mlp.up_proj": pair((48, 32)),
        "model.layers.1.mlp.up_proj": Dense(torch.ones(48)),
    }
    found = fit_delta(Delta(layers, {"model.layers.1.mlp.down_proj.weight": torch.ones(32, 47)}), weights)
    assert list(found) == [UP]
    assert found.problems == {
        QUERY: "the delta is (32, 31), the base's weight (32, 32)",
        "model.layers.7.mlp.up_proj": "the base has no such layer",
        "model.layers.1.mlp.up_proj": "the change is no matrix: (48,)",
        "model.layers.1.mlp.down_proj": "the delta's weight is (32, 47), the base's (32, 48)",
    }


def test_a_checkpoint_of_another_size_is_compared_where_it_can_be(world: Path, weights: Any, tmp_path: Path) -> None:
    tiny("llama", intermediate_size=56, num_hidden_layers=3).save_pretrained(tmp_path / "other")
    found = open_delta(str(tmp_path / "other"), weights)
    assert names(found) == {"q_proj", "k_proj", "v_proj", "o_proj"} and len(found) == 8
    assert found.problems[UP] == "the checkpoint's weight is (56, 32), the base's (48, 32)"
    assert found.problems["model.layers.2.self_attn.q_proj"] == "the base has no such layer"
    tiny("llama", num_hidden_layers=1).save_pretrained(tmp_path / "less")
    assert open_delta(str(tmp_path / "less"), weights).problems[QUERY] == "the checkpoint has no such layer"


@pytest.mark.parametrize("what", ["lora", "memory", "checkpoint"])
def test_a_delta_of_which_nothing_fits_is_an_error(what: str, world: Path, weights: Any, tmp_path: Path) -> None:
    wide = {"hidden_size": 64, "intermediate_size": 80}
    if what == "checkpoint":
        tiny("llama", **wide).save_pretrained(tmp_path / "other")
    else:
        save_lowrank(tmp_path / "other", Delta({UP: pair((48, 31))}), "base")
    with pytest.raises(DeltaError, match="nothing of it fits") as error:
        if what == "memory":
            fit_delta(Delta({UP: pair((48, 31))}), weights, where="mine")
        else:
            open_delta(str(tmp_path / "other"), weights)
    assert "model.layers.0" in str(error.value.where)
    assert ("mine" if what == "memory" else "other") in str(error.value.where)


def test_other_base_weights_are_refused(world: Path, weights: Any, tmp_path: Path) -> None:
    delta = Delta({UP: pair((48, 32))}, base_fingerprint="0123456789abcdef")
    save_lowrank(tmp_path / "lora", delta, "base")
    for read in (lambda: fit_delta(delta, weights), lambda: open_delta(str(tmp_path / "lora"), weights)):
        with pytest.raises(DeltaError, match="other base weights") as error:
            read()
        assert "0123456789ab" in str(error.value.where) and weights.fingerprint()[:12] in str(error.value.where)
    mine = Delta(delta.layers, base_fingerprint=weights.fingerprint())
    assert fit_delta(mine, weights).base_fingerprint == weights.fingerprint()


@pytest.mark.parametrize("kind", ["lora", "tuned"])
def test_a_run_says_which_base_it_began_with(kind: str, world: Path, weights: Any, tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    (run / "delta").symlink_to(world / kind)
    for mark, fits in ((weights.fingerprint(), True), ("feedbeef", False)):
        (run / "environment.json").write_text(json.dumps({"inputs": {"base": mark}}))
        if fits:
            found = open_delta(str(run), weights)
            assert len(found) > 3 and found.base_fingerprint == mark
        else:
            with pytest.raises(DeltaError, match="other base weights"):
                open_delta(str(run), weights)


def test_a_base_whose_fingerprint_is_not_known_is_taken_at_its_word() -> None:
    weights = loaded_weights("memory", tiny("llama"), None)
    assert list(fit_delta(Delta({UP: pair((48, 32))}, base_fingerprint="anything"), weights)) == [UP]


def test_what_is_no_delta_is_an_error(world: Path, weights: Any) -> None:
    with pytest.raises(DeltaError, match="holds no delta"):
        open_delta(str(world / "empty"), weights)
    with pytest.raises(ModelError, match="no such folder") as error:
        open_delta(str(world / "lroa"), weights)
    assert "lora" in str(error.value.fix)
    with pytest.raises(DeltaError, match="changes no matrix"):
        fit_delta(Delta({}, {"model.norm.weight": torch.ones(32)}), weights)


def test_a_tensor_that_the_checkpoint_lacks_is_an_error_of_that_matrix(
    world: Path, weights: Any, tmp_path: Path
) -> None:
    tensors = load_file(world / "tuned" / "model.safetensors")
    del tensors[f"{UP}.weight"]
    for file in ("config.json",):
        (tmp_path / file).write_bytes((world / "tuned" / file).read_bytes())
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    found = open_delta(str(tmp_path), weights)
    assert bool(found[QUERY].dense().any())
    with pytest.raises(ModelError, match="lack") as error:
        found[UP]
    assert UP in str(error.value.where)


def test_a_plain_module_is_enough_for_weights() -> None:
    """Nothing here asks for Transformers: a base in memory is any module."""
    model = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2))
    found = fit_delta(Delta({"1": pair((2, 3))}), loaded_weights("plain", model, None))
    assert list(found) == ["1"]
