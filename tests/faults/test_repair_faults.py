"""Bad input to repairs and sweeps: said in words, with what to do, before anything is lost or written over."""

import json
import resource
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from safetensors.torch import load_file, save_file

from little_world import make_base, write_rows
from loralab.errors import FolderError, LoralabError
from loralab.lab.repair import repair, sweep
from loralab.lab.repaired import is_repair, read_repair
from repair_world import make_repair_world

LAYER = "model.layers.0.self_attn.q_proj"


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    made = make_repair_world(tmp_path_factory.mktemp("repairs"))
    make_base(made / "narrow", hidden_size=16, intermediate_size=24, seed=5)
    make_base(made / "other", seed=7)
    _changed(made, "nan", "A", torch.nan)
    _changed(made, "infinite", "B", torch.inf)
    (made / "empty").mkdir()
    write_rows(made / "nothing.jsonl", [])
    write_rows(made / "odd.jsonl", [{"prompt": "1+1="}])
    (made / "mine").mkdir()
    (made / "mine" / "note.txt").write_text("mine", encoding="utf-8")
    return made


def _changed(world: Path, name: str, factor: str, value: float) -> None:
    """Copy the planted adapter with one odd number in one layer."""
    folder = world / name
    folder.mkdir()
    for file in (world / "planted").iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    tensors = load_file(folder / "adapter_model.safetensors")
    tensors[f"base_model.model.{LAYER}.lora_{factor}.weight"][0, 0] = value
    save_file(tensors, folder / "adapter_model.safetensors")


def said(call, **asked: Any) -> str:
    """Give what an error says, after checking that it is one for people, of exit code 2."""
    with pytest.raises(LoralabError) as caught:
        call(**asked)
    assert caught.value.exit_code == 2
    return " ".join(str(caught.value).split())


SWEEPS: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "no target": ({"target": []}, ("neither tasks nor a text is named as the target", "--target TASKS")),
    "no source": ({"source": []}, ("neither", "source", "--source-text FILE")),
    "tasks and a text": (
        {"source_text": "{world}/source_text.jsonl"},
        ("both tasks and a text are named as the source",),
    ),
    "one task on both sides": ({"source": ["{world}/target.jsonl"]}, ("named as target and as source", "target.jsonl")),
    "one text on both sides": (
        {"target": [], "source": [], "target_text": "{world}/odd.txt", "source_text": "{world}/odd.txt"},
        ("odd.txt",),
    ),
    "the same items by two names": (
        {"target": ["pocket:calc"], "source": ["pocket:calc?items=40"]},
        ("on both sides", "calc"),
    ),
    "an unknown suite": ({"source": ["pocket:sources"]}, ("did you mean pocket:source?",)),
    "a text that is not there": ({"source": [], "source_text": "none.jsonl"}, ("none.jsonl",)),
    "training rows as the target's text": (
        {"target": [], "target_text": "pocket:calc"},
        ("training rows do not show what was learned", "pocket:calc/validation"),
    ),
    "an empty text": ({"source": [], "source_text": "{world}/nothing.jsonl"}, ("nothing.jsonl",)),
    "an odd row": ({"source": ["{world}/odd.jsonl"]}, ("`completion` is missing", "row 1")),
    "no tokens": ({"tokens": 1}, ("1 tokens cannot be read",)),
    "an unknown edit": ({"edits": ["top2 0.5"]}, ("no edit is called 'top2'", "top1")),
    "an edit without a strength": ({"edits": ["top1"]}, ("ends in its strength", "top1 0.75")),
    "a negative strength": ({"edits": ["scale -1"]}, ("strength of scale is 0 or above",)),
    "a strength that is no number": ({"edits": ["scale nan"]}, ("strength of scale is 0 or above",)),
    "a threshold of pairs": ({"edits": ["threshold 1"]}, ("low-rank pair", LAYER.split(".")[0])),
    "an odd budget": ({"budget": "half"}, ("'half' is no budget", "50%")),
    "a budget in points": ({"budget": 5}, ("a share of items, at most 1", "0.02")),
    "a rank too small for the delta": ({"rank": 1}, ("the delta itself has rank 2", "rank 2 or more")),
    "a rank for a dense delta": ({"delta": "{world}/full", "rank": 4}, ("dense",)),
    "no vectors": ({"k": 0}, ("at least one vector", "k = 10")),
    "a threshold of 0": ({"epsilon": 0.0}, ("(0, 1]", "epsilon = 0.5")),
    "a base that is not there": ({"base": "{world}/none"}, ("none",)),
    "a delta that is not there": ({"delta": "{world}/empty"}, ("holds no delta", "PEFT folder")),
    "a delta for another shape": ({"base": "{world}/narrow"}, ("another base", "(32, 32)", "(16, 16)")),
    "a delta for other weights": ({"base": "{world}/other"}, ("trained on other base weights",)),
    "a checkpoint of another shape": ({"delta": "{world}/narrow"}, ("no fine-tuning of the base",)),
    "NaN in the delta": ({"delta": "{world}/nan"}, (LAYER,)),
    "infinity in the delta": ({"delta": "{world}/infinite"}, (LAYER,)),
    "a folder that holds something": ({"out": "{world}/mine"}, ("holds something else", "note.txt", "new folder")),
}


def sides(world: Path, asked: dict[str, Any]) -> dict[str, Any]:
    """Give what a sound sweep is asked, changed as a case says."""
    sound = {"base": "{world}/base", "delta": "{world}/planted", "edits": ["top1 0.5"]}
    sound |= {"target": ["{world}/target.jsonl"], "source": ["{world}/source.jsonl"], "device": "cpu"}
    whole = json.dumps({**sound, **asked}).replace("{world}", str(world))
    return dict(json.loads(whole))


@pytest.mark.parametrize("case", SWEEPS)
def test_a_sweep_says_what_was_wrong_and_writes_nothing(world, tmp_path, case):
    asked, words = SWEEPS[case]
    out = {} if "out" in asked else {"out": str(tmp_path / "out")}
    found = said(sweep, **sides(world, {**asked, **out}))
    assert all(word in found for word in words), found
    assert not (tmp_path / "out").exists() or not any((tmp_path / "out").iterdir())
    assert [path.name for path in (world / "mine").iterdir()] == ["note.txt"]


REPAIRS: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "an unknown edit": ({"edit": "al 0.5"}, ("no edit is called 'al'", "did you mean all?")),
    "a delta for another shape": ({"base": "{world}/narrow"}, ("another base", "(32, 32)", "(16, 16)")),
    "a delta for other weights": ({"base": "{world}/other"}, ("trained on other base weights",)),
    "NaN in the delta": ({"delta": "{world}/nan"}, (LAYER,)),
    "a delta that is not there": ({"delta": "{world}/empty"}, ("no delta",)),
    "no such device": ({"device": "gpu"}, ("gpu",)),
    "no such dtype": ({"dtype": "half"}, ("half",)),
    "no rank": ({"rank": 0}, ("rank 1 or more",)),
    "a rank for a dense delta": ({"delta": "{world}/full", "rank": 4}, ("dense",)),
    "no vectors": ({"k": 0}, ("at least one vector",)),
    "a folder that holds something": ({"out": "{world}/mine"}, ("holds something else",)),
}


@pytest.mark.parametrize("case", REPAIRS)
def test_a_repair_says_what_was_wrong_and_writes_nothing(world, tmp_path, case):
    asked, words = REPAIRS[case]
    sound = {"base": "{world}/base", "delta": "{world}/planted", "edit": "top1 0.5", "out": str(tmp_path / "out")}
    found = said(repair, **json.loads(json.dumps({**sound, **asked}).replace("{world}", str(world))))
    assert all(word in found for word in words), found
    assert not (tmp_path / "out").exists() or not any((tmp_path / "out").iterdir())


def test_nothing_is_written_over_a_repair(world, tmp_path):
    asked = {"base": str(world / "base"), "delta": str(world / "planted"), "out": tmp_path / "out"}
    repair(edit="top1 0.5", **asked)
    before = {path: path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file()}
    assert "holds a repair already" in said(repair, edit="all 0.1", **asked)
    assert "holds a repair already" in said(sweep, **sides(world, {"out": str(tmp_path / "out")}))
    # Without its last file it is no whole repair; the delta is somebody's all the same.
    (tmp_path / "out" / "repair.json").unlink()
    assert "holds something else" in said(repair, edit="all 0.1", **asked)
    after = {path: path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file()}
    assert {path.name for path in before} - {path.name for path in after} == {"repair.json"}
    assert all(before[path] == content for path, content in after.items())


def test_what_was_measured_outlives_a_delta_that_cannot_be_saved(world, tmp_path):
    chosen = {"delta": "{world}/full", "edits": ["scale 1"], "budget": "1000%", "out": str(tmp_path / "out")}
    asked = sides(world, chosen)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, hard))
    try:
        found = said(sweep, **asked)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "cannot" in found and "out" in found
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["points.parquet"]
    assert {"scale 1", "scale 0.5"} <= set(pd.read_parquet(tmp_path / "out" / "points.parquet")["edit"])
    again = sweep(**asked)  # what an interrupted one left is no obstacle
    assert is_repair(tmp_path / "out") and again.best is not None


def damaged(folder: Path, **changes: Any) -> None:
    file = folder / "repair.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}), encoding="utf-8")


def test_a_damaged_folder_is_not_read_as_a_repair(world, tmp_path):
    out = tmp_path / "out"
    sweep(**sides(world, {"out": str(out), "edits": ["scale 1"]}))
    sound = (out / "repair.json").read_bytes()
    cases: list[tuple[dict[str, Any], str]] = [
        ({"facts": None}, "does not say what was repaired"),
        ({"kind": "other"}, "does not say what was repaired"),
        ({"verdicts": None}, "verdicts are missing"),
        ({"controls": [1]}, "controls are missing or odd"),
        ({"points": 3}, "3 were written"),
        ({"kind": "repair"}, "what became of each matrix"),
    ]
    for changes, words in cases:
        damaged(out, **changes)
        assert words in said(read_repair, folder=out), changes
        (out / "repair.json").write_bytes(sound)
    table = (out / "points.parquet").read_bytes()
    (out / "points.parquet").write_bytes(table[:-30])
    assert "points.parquet" in said(read_repair, folder=out)
    pd.DataFrame({"edit": ["a"]}).to_parquet(out / "points.parquet")
    assert "has no column" in said(read_repair, folder=out)
    (out / "points.parquet").unlink()
    assert "missing" in said(read_repair, folder=out)
    (out / "repair.json").write_text("{", encoding="utf-8")
    assert "damaged" in said(read_repair, folder=out)
    with pytest.raises(FolderError, match="no repair here"):
        read_repair(world / "mine")


def test_a_masked_model_is_refused(world, tmp_path):
    from tiny import tiny

    folder = tmp_path / "bert"
    tiny("bert").save_pretrained(folder)
    for file in (world / "base").glob("tokenizer*"):
        (folder / file.name).write_bytes(file.read_bytes())
    found = said(sweep, **sides(world, {"base": str(folder), "delta": str(folder)}))
    assert "reads both ways" in found or "changes nothing" in found
