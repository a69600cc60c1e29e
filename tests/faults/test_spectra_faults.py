"""Bad input to spectra: an error that says what to do, or a row marked so while the other matrices are still measured."""

import json
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor

from little_world import make_base
from loralab.delta.lowrank import Delta, Dense, LayerDelta, LowRank
from loralab.delta.store import save_lowrank
from loralab.errors import DeltaError, FolderError, LoralabError, ModelError
from loralab.lab.spectra import Spectra, read_spectra, spectra

UP, QUERY, DOWN = "model.layers.0.mlp.up_proj", "model.layers.1.self_attn.q_proj", "model.layers.1.mlp.down_proj"
SHAPES = {UP: (48, 32), QUERY: (32, 32), DOWN: (32, 48)}


def pair(shape: tuple[int, int], scale: float = 0.3) -> LowRank:
    return LowRank(torch.randn(2, shape[1]), torch.randn(shape[0], 2), scale)


def pairs() -> dict[str, LayerDelta]:
    return {layer: pair(shape) for layer, shape in SHAPES.items()}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    transformers.utils.logging.disable_progress_bar()
    made = tmp_path_factory.mktemp("faults")
    make_base(made / "base")
    torch.manual_seed(3)
    save_lowrank(made / "lora", Delta(pairs()), "base")
    (made / "nothing").mkdir()
    return made


def look(world: Path, *deltas: Any, base: Any = None, **chosen: Any) -> Spectra:
    return spectra(base or world / "base", *deltas, cache=world / "heads", **{"k": 3, **chosen})


def with_tensors(world: Path, folder: Path, edit: Callable[[dict[str, Tensor]], Any], source: str = "base") -> Path:
    """Copy a model folder of the world with its tensors edited."""
    folder.mkdir()
    (folder / "config.json").write_bytes((world / source / "config.json").read_bytes())
    tensors = load_file(world / source / "model.safetensors")
    edit(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def problems(found: Spectra) -> dict[str, str]:
    return dict(zip(found.matrices["layer"], found.matrices["problem"], strict=True))


def measured(found: Spectra) -> set[str]:
    """Name the layers with numbers in every column and a row for each vector; the others must have none."""
    rows = found.matrices.set_index("layer")
    numbers = rows.select_dtypes("float64")
    good = set(rows.index[rows["problem"] == ""])
    assert numbers.loc[sorted(good), "frobenius"].notna().all()
    assert numbers.drop(index=sorted(good)).isna().all(axis=None)
    assert set(found.vectors["layer"]) == good
    return good


# Nothing to be done


CASES: dict[str, tuple[Callable[[Path], Any], type[LoralabError], tuple[str, ...]]] = {
    "no delta": (lambda w: look(w), DeltaError, ("no delta", "PEFT folder")),
    "no vector": (lambda w: look(w, w / "lora", k=0), DeltaError, ("at least one", "0")),
    "an epsilon of nothing": (lambda w: look(w, w / "lora", epsilon=0.0), DeltaError, ("(0, 1]",)),
    "an epsilon above one": (lambda w: look(w, w / "lora", epsilon=1.01), DeltaError, ("(0, 1]", "1.01")),
    "an epsilon that is no number": (lambda w: look(w, w / "lora", epsilon=math.nan), DeltaError, ("(0, 1]",)),
    "no such base": (lambda w: look(w, w / "lora", base=w / "bsae"), ModelError, ("no such folder", "did you mean")),
    "a base without weights": (lambda w: look(w, w / "lora", base=w / "nothing"), ModelError, ("config.json",)),
    "an adapter as the base": (lambda w: look(w, w / "lora", base=w / "lora"), ModelError, ("config.json",)),
    "no such delta": (lambda w: look(w, w / "lroa"), ModelError, ("no such folder", "did you mean")),
    "a folder without a delta": (lambda w: look(w, w / "nothing"), DeltaError, ("holds no delta", "nothing")),
    "a delta without matrices": (lambda w: look(w, Delta({})), DeltaError, ("changes no matrix", "delta 1")),
    "a delta of another size": (
        lambda w: look(w, Delta({UP: pair((48, 31)), QUERY: pair((31, 32))})),
        DeltaError,
        ("nothing of it fits", UP, "(48, 31)", "(48, 32)", QUERY),
    ),
    "a delta of another family": (
        lambda w: look(w, Delta({"transformer.h.0.attn.c_attn": pair((96, 32))})),
        DeltaError,
        ("nothing of it fits", "c_attn", "no such layer"),
    ),
    "one of two that does not fit": (
        lambda w: look(w, w / "lora", Delta({UP: pair((4, 4))})),
        DeltaError,
        ("nothing of it fits", "delta 2"),
    ),
    "a delta of other base weights": (
        lambda w: look(w, Delta(pairs(), base_fingerprint="ab" * 32)),
        DeltaError,
        ("other base weights", "abababababab"),
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_an_error_says_what_is_wrong_and_where(case: str, world: Path) -> None:
    ask, kind, words = CASES[case]
    with pytest.raises(kind) as error:
        ask(world)
    for word in words:
        assert word in str(error.value)
    assert error.value.fix


# Rows marked, the others measured


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dense", [True, False])
def test_a_change_that_is_not_finite_marks_its_row(bad: float, dense: bool, world: Path) -> None:
    layers = pairs()
    broken = torch.zeros(32, 32) if dense else torch.randn(2, 32)
    broken[1, 3] = bad
    layers[QUERY] = Dense(broken) if dense else LowRank(broken, torch.randn(32, 2), 1.0)
    found = look(world, Delta(layers), world / "lora")
    mine = Spectra(
        found.matrices[found.matrices["delta"] == "delta 1"],
        found.vectors[found.vectors["delta"] == "delta 1"],
        found.overlaps,
    )
    assert measured(mine) == {UP, DOWN} and "not finite" in problems(mine)[QUERY]
    assert len(found.matrices) == 6 and set(found.overlaps["layer"]) == {UP, DOWN}


def test_a_large_change_that_is_not_finite_marks_its_row(world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("loralab.spectral.spectrum.LIMIT", 10)
    broken = torch.randn(32, 32)
    broken[0, 0] = math.nan
    found = look(world, Delta({UP: Dense(torch.randn(48, 32)), QUERY: Dense(broken)}))
    assert measured(found) == {UP} and "not finite" in problems(found)[QUERY]


def test_a_base_weight_that_is_not_finite_marks_its_row(world: Path, tmp_path: Path) -> None:
    def spoil(tensors: dict[str, Tensor]) -> None:
        tensors[f"{QUERY}.weight"][0, 0] = math.inf

    found = look(world, world / "lora", base=with_tensors(world, tmp_path / "base", spoil))
    assert measured(found) == {UP, DOWN}
    assert "base" in problems(found)[QUERY] and "not finite" in problems(found)[QUERY]


def test_a_tensor_that_the_base_lacks_marks_its_row(world: Path, tmp_path: Path) -> None:
    base = with_tensors(world, tmp_path / "base", lambda tensors: tensors.pop(f"{QUERY}.weight"))
    found = look(world, world / "lora", base=base)
    assert measured(found) == {UP, DOWN}
    assert "lack this tensor" in problems(found)[QUERY] and QUERY in problems(found)[QUERY]
    none = with_tensors(world, tmp_path / "none", lambda tensors: [tensors.pop(f"{layer}.weight") for layer in SHAPES])
    with pytest.raises(ModelError, match="lack this tensor") as error:  # of the three nothing is left to show
        look(world, world / "lora", base=none)
    assert UP in str(error.value)


def test_a_tensor_that_a_checkpoint_lacks_marks_its_row(world: Path, tmp_path: Path) -> None:
    def move(tensors: dict[str, Tensor]) -> None:
        tensors[f"{UP}.weight"] += torch.randn(48, 32)
        del tensors[f"{QUERY}.weight"]

    found = look(world, with_tensors(world, tmp_path / "tuned", move))
    assert len(measured(found)) == 13 and "lack this tensor" in problems(found)[QUERY]
    assert found.matrices.set_index("layer").loc[UP, "frobenius"] > 1


def test_a_torn_checkpoint_is_an_error_that_names_the_file(world: Path, tmp_path: Path) -> None:
    tuned = with_tensors(world, tmp_path / "tuned", lambda tensors: None)
    file = tuned / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-64])
    with pytest.raises(ModelError, match="cannot be read") as error:
        look(world, tuned)
    assert str(file) in str(error.value.where)


def test_matrices_that_do_not_fit_are_marked_and_the_others_measured(world: Path) -> None:
    layers = pairs() | {
        QUERY: pair((32, 31)),
        "model.layers.9.mlp.up_proj": pair((48, 32)),
        DOWN: Dense(torch.ones(32)),
    }
    found = look(world, Delta(layers))
    assert measured(found) == {UP}
    said = problems(found)
    assert "(32, 31)" in said[QUERY] and "(32, 32)" in said[QUERY]
    assert said["model.layers.9.mlp.up_proj"] == "the base has no such layer"
    assert "no matrix" in said[DOWN]
    row = found.matrices.set_index("layer").loc["model.layers.9.mlp.up_proj"]
    assert (row["module"], row["depth"], row["singular_values"]) == ("up_proj", 9, [])
    totals = found.summary()["deltas"]["delta 1"]
    assert (totals["matrices"], totals["problems"]) == (1, 3) and totals["intruders"] == found.vectors["intruder"].sum()
    assert totals["modules"]["q_proj"]["frobenius"] == 0 and totals["modules"]["q_proj"]["relative_norm"] is None


def test_marked_rows_survive_the_folder(world: Path, tmp_path: Path) -> None:
    found = look(world, Delta(pairs() | {QUERY: pair((32, 31))}), out=tmp_path / "out")
    back = read_spectra(tmp_path / "out")
    assert problems(back) == problems(found) and measured(back) == {UP, DOWN}
    assert back.summary() == found.summary()


def test_no_change_at_all_is_measured_as_such(world: Path) -> None:
    found = look(world, Delta({UP: pair((48, 32), 0.0), QUERY: Dense(torch.zeros(32, 32))}))
    assert problems(found) == {UP: "", QUERY: ""} and set(found.matrices["note"]) == {"no change"}
    assert not found.vectors["intruder"].any() and (found.matrices["relative_norm"] == 0).all()
    assert found.counts([1, 3], [0.5, 1.0])["high"].tolist() == [0, 0, 0, 0]
    same = look(world, world / "base")  # a checkpoint that is its own base
    assert set(same.matrices["note"]) == {"no change"} and len(same.matrices) == 14


def test_a_quantised_base_is_dequantised_and_said_so(world: Path, tmp_path: Path) -> None:
    def quantise(tensors: dict[str, Tensor]) -> None:
        for name in [name for name in tensors if name.endswith("_proj.weight")]:
            scale = tensors[name].abs().max() / 448
            tensors[name] = (tensors[name] / scale).to(torch.float8_e4m3fn)
            tensors[f"{name}_scale_inv"] = scale.reshape(1, 1)

    base = with_tensors(world, tmp_path / "base", quantise)
    facts = json.loads((base / "config.json").read_text())
    told = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    (base / "config.json").write_text(json.dumps(facts | {"quantization_config": told}))
    found, plain = look(world, world / "lora", base=base), look(world, world / "lora")
    assert measured(found) == set(SHAPES) and any("dequantised" in note for note in found.facts["notes"])
    for mine, other in zip(found.matrices["base_frobenius"], plain.matrices["base_frobenius"], strict=True):
        assert mine == pytest.approx(other, rel=0.02) and mine != other
    told = {"quant_method": "gptq", "bits": 4}
    (base / "config.json").write_text(json.dumps(facts | {"quantization_config": told}))
    with pytest.raises(ModelError, match="optimum") as error:
        look(world, world / "lora", base=base)
    assert "unquantised" in str(error.value.fix)


# Folders


def test_a_folder_of_something_else_is_left_alone(world: Path, tmp_path: Path) -> None:
    run, notes, both = (tmp_path / name for name in ("run", "notes", "both"))
    for folder, files in ((run, ["spec.yaml"]), (notes, ["note.txt"]), (both, ["metrics.jsonl", "spectra.json"])):
        folder.mkdir()
        for file in files:
            (folder / file).write_text("mine")
        with pytest.raises(FolderError, match="no spectra") as error:
            look(world, world / "lora", out=folder)
        assert str(folder) in str(error.value.where)
        assert {path.name: path.read_text() for path in folder.iterdir()} == dict.fromkeys(files, "mine")


def test_a_folder_of_spectra_is_written_anew(world: Path, tmp_path: Path) -> None:
    look(world, world / "lora", world / "base", out=tmp_path / "out")
    (tmp_path / "out" / "report.html").write_text("a page of it")
    found = look(world, world / "lora", out=tmp_path / "out")
    assert len(read_spectra(tmp_path / "out").matrices) == len(found.matrices) == 3
    assert (tmp_path / "out" / "report.html").exists()


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_that_cannot_be_written_is_refused_first(world: Path, tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(FolderError, match="cannot write"):
        look(world, world / "lroa", out=tmp_path / "out")


def test_a_file_in_the_way_is_refused_first(world: Path, tmp_path: Path) -> None:
    (tmp_path / "out").write_text("a file")
    with pytest.raises(FolderError, match="cannot write"):
        look(world, world / "lroa", out=tmp_path / "out")
    assert (tmp_path / "out").read_text() == "a file"


@pytest.mark.parametrize("file", ["spectra.parquet", "intruders.parquet", "overlaps.parquet", "spectra.json"])
@pytest.mark.parametrize("damage", ["missing", "short", "odd", "other"])
def test_a_damaged_file_is_named(file: str, damage: str, world: Path, tmp_path: Path) -> None:
    look(world, world / "lora", out=tmp_path / "out")
    path = tmp_path / "out" / file
    if damage == "missing":
        path.unlink()
    elif damage == "short":
        path.write_bytes(path.read_bytes()[:-20])
    elif damage == "odd":
        path.write_bytes(path.read_bytes()[::-1])
    elif file == "spectra.json":
        path.write_text("{}")
    else:
        others = {"spectra": "overlaps", "intruders": "spectra", "overlaps": "intruders"}
        path.write_bytes((tmp_path / "out" / f"{others[path.stem]}.parquet").read_bytes())
    with pytest.raises(FolderError) as error:
        read_spectra(tmp_path / "out")
    assert (str(path) if file != "spectra.json" or damage != "missing" else "spectra.json") in str(error.value)
    assert error.value.fix


def test_a_table_of_another_time_is_noticed(world: Path, tmp_path: Path) -> None:
    """A crash between two files leaves tables that do not belong together."""
    look(world, world / "lora", out=tmp_path / "one")
    look(world, world / "lora", world / "base", out=tmp_path / "two")
    (tmp_path / "one" / "spectra.parquet").write_bytes((tmp_path / "two" / "spectra.parquet").read_bytes())
    with pytest.raises(FolderError, match="17 rows, but 3 were written"):
        read_spectra(tmp_path / "one")


def test_a_cache_that_cannot_be_written_costs_nothing_but_time(world: Path, tmp_path: Path) -> None:
    (tmp_path / "heads").write_text("a file in the way")
    found = spectra(world / "base", world / "lora", k=3, cache=tmp_path / "heads")
    assert measured(found) == set(SHAPES)
    assert (tmp_path / "heads").read_text() == "a file in the way"
