"""Wrong input at the command line: what, where and next on stderr, the right exit code, and nothing lost."""

import json
import os
import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from little_world import loralab, make_base, make_world, only_run, overrides, rows, write_rows
from loralab.run.folder import RunFolder, read_lines
from loralab.training.checkpoint import checkpoints


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    return make_world(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def finished(world) -> Path:
    """Return the folder of a finished LoRA run."""
    assert train(world, world / "finished") == 0
    return only_run(world / "finished")


def train(world, runs, recipe="sft-lora", branch=None, **keys) -> int:
    keys = keys if recipe == "sft-full" else {"method__rank": 4, **keys}
    more = ["--from", branch] if branch else []
    keys = {"schedule__warmup": 1.0, **keys} if branch else keys  # a branch's warm-up is in steps
    return loralab("train", recipe, *overrides(world, **keys), "--runs", runs, *more)


def refusal(capsys, code, *, where, expected=2) -> str:
    """Check the form of a refusal and give its text."""
    said = capsys.readouterr().err
    assert code == expected, said
    assert "Traceback" not in said
    assert said.startswith("loralab: ")
    assert re.search(r"^  where: .*" + re.escape(str(where)), said, re.MULTILINE), said
    assert re.search(r"^  next:  \S", said, re.MULTILINE), said
    return said


# The recipe

BAD_KEYS = [
    ({"method__ranc": 4}, "method.ranc=4", "rank"),
    ({"optimizer__learning_rate": "fast"}, "optimizer.learning_rate=fast", "number"),
    ({"method__name": "lorra"}, "method.name=lorra", "lora"),
    ({"train__steps": 0}, "train.steps=0", "1"),
    ({"model__pth": "x"}, "model.pth=x", "model.path"),
]


@pytest.mark.parametrize(("keys", "where", "word"), BAD_KEYS, ids=[where for _, where, _ in BAD_KEYS])
def test_a_mistake_in_the_recipe(world, tmp_path, capsys, keys, where, word):
    said = refusal(capsys, loralab("train", "sft-lora", *overrides(world, **keys), "--runs", tmp_path), where=where)
    assert word in said
    assert list(tmp_path.iterdir()) == []


def test_an_unknown_recipe(world, tmp_path, capsys):
    code = loralab("train", "sft-lorra", *overrides(world), "--runs", tmp_path)
    assert "did you mean sft-lora" in refusal(capsys, code, where="sft-lorra")


# The data

TEMPLATE = "{prompt: '{questoin}', completion: '{completion}'}"
BAD_DATA = {
    "a missing file": (None, {}, "train.jsonl", "does not exist"),
    "an empty file": ("", {}, "train.jsonl", "no rows"),
    "wrong columns": ('{"a": "x", "b": "y"}\n' * 4, {}, "train.jsonl", "no form fits the columns a, b"),
    "a row that is not JSON": ('{"text": "a"}\n{"text": \n{"text": "b"}\n', {}, "train.jsonl:2", "not JSON"),
    "a row that is no object": ('{"text": "a"}\n{"text": "b"}\n7\n', {}, "train.jsonl:3", "number"),
    "a template with an absent column": (
        '{"question": "a", "completion": "b"}\n' * 4,
        {"data__template": TEMPLATE, "data__validation": None},
        "template.prompt",
        "`{questoin}`",
    ),
    "nothing but empty texts": ('{"text": ""}\n' * 4, {}, "train.jsonl", "no example is left of 4 rows"),
    "prompts longer than everything": (
        json.dumps({"prompt": "a" * 90, "completion": "b"}) + "\n",
        {},
        "train.jsonl",
        "1 exceed 64 tokens",
    ),
    "one row to divide": ('{"text": "abc"}\n', {"data__validation": None}, "data.train", "data.validation_share"),
    "bytes that are no text": (b'{"text": "\xff\xfe"}\n', {}, "train.jsonl", "UTF-8"),
}


@pytest.mark.parametrize("case", BAD_DATA)
def test_bad_data(world, tmp_path, capsys, case):
    content, keys, where, word = BAD_DATA[case]
    file = tmp_path / "train.jsonl"
    if content is not None:
        file.write_bytes(content if isinstance(content, bytes) else content.encode())
    code = train(world, tmp_path / "runs", data__train=file, **keys)
    assert word in refusal(capsys, code, where=where)


# Base and method

BAD_METHODS = {
    "a target that matches nothing": ({"method__targets": "[q_prj]"}, "method.targets", "'q_proj'"),
    "a rank above the layer": ({"method__rank": 33}, "method.rank at model.layers.0", "at most 32"),
    "a tuner that peft lacks": ({"method__tuner": "LORAA"}, "method.tuner", "LORA?"),
    "a key that the tuner lacks": ({"method__keys": "{rr: 4}"}, "method.keys.rr", "no key 'rr'"),
    "a value that the tuner refuses": ({"method__keys": "{r: -1}"}, "method.keys", "peft"),
    "a value of a wrong kind": ({"method__keys": "{r: many}"}, "method.keys", "peft"),
    "a target that peft cannot find": (
        {"method__keys": "{target_modules: [nothing]}"},
        "method.keys",
        "nothing",
    ),
    "more tokens than positions": ({"data__max_length": 65}, "data.max_length", "data.max_length=64"),
    "quantising without CUDA": ({"model__quantize": "4bit"}, "model.quantize", "CUDA"),
    "a missing base": ({"model__path": "no/such/base"}, "no/such/base", "no such folder"),
}


@pytest.mark.parametrize("case", BAD_METHODS)
def test_a_bad_base_or_method(world, tmp_path, capsys, case):
    keys, where, word = BAD_METHODS[case]
    recipe = tmp_path / "peft.yaml"  # no shipped recipe has this method
    recipe.write_text("method:\n  name: peft\ntrain:\n  epochs: 1\n")
    chosen = recipe if any(key in keys for key in ("method__tuner", "method__keys")) else "sft-lora"
    code = loralab("train", chosen, *overrides(world, **keys), "--runs", tmp_path / "runs")
    assert word in refusal(capsys, code, where=where)


def test_damaged_base_weights(world, tmp_path, capsys):
    base = shutil.copytree(world / "base", tmp_path / "base")
    weights = base / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    refusal(capsys, train(world, tmp_path / "runs", model__path=base), where=weights)


# A folder with a past


def interrupted(world, runs, monkeypatch, capsys, *, at=4, **keys) -> Path:
    """Leave a run that diverged at a step: its folder has checkpoints and is not done."""
    from loralab.errors import Interrupted
    from loralab.lab import watch

    whole = watch.RunWatch.on_step

    def stop(self, report):
        whole(self, report)
        if report.step == at:
            raise Interrupted("stopped by the test", where="here", fix="go on")

    with monkeypatch.context() as patched:
        patched.setattr(watch.RunWatch, "on_step", stop)
        refusal(capsys, train(world, runs, checkpoints__every=1, **keys), where="here", expected=5)
    return only_run(runs)


def snapshot(folder: Path) -> dict[str, bytes]:
    """Read everything that a refused command must leave alone."""
    moving = ("status.json", ".lock", ".lock.guard")
    return {str(p): p.read_bytes() for p in folder.rglob("*") if p.is_file() and p.name not in moving}


def test_a_damaged_checkpoint_is_refused_and_the_one_before_it_goes_on(world, tmp_path, monkeypatch, capsys):
    run = interrupted(world, tmp_path, monkeypatch, capsys)
    last = checkpoints(run / "checkpoints")[-1]
    for name in ("method.safetensors", "optimizer.safetensors", "facts.json"):
        file = last / name
        whole = file.read_bytes()
        file.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
        before = snapshot(run)
        said = refusal(capsys, train(world, tmp_path, checkpoints__every=1), where=file)
        assert f"delete {last}" in said
        assert snapshot(run) == before
        file.write_bytes(whole)
    (last / "method.safetensors").unlink()
    refusal(capsys, train(world, tmp_path, checkpoints__every=1), where=last / "method.safetensors")
    shutil.rmtree(last)
    assert train(world, tmp_path, checkpoints__every=1) == 0
    assert [line["step"] for line in read_lines(run / "metrics.jsonl")] == [1, 2, 3, 4, 5, 6]


def test_other_data_or_weights_than_the_run_began_with(world, tmp_path, monkeypatch, capsys):
    data = write_rows(tmp_path / "train.jsonl", rows(30, seed=5))
    base = shutil.copytree(world / "base", tmp_path / "base")
    keys = {"data__train": data, "model__path": base, "checkpoints__every": 1}
    run = interrupted(world, tmp_path / "runs", monkeypatch, capsys, **{k: keys[k] for k in list(keys)[:2]})
    before = snapshot(run)
    whole = data.read_text()
    data.write_text(whole.replace("a", "b", 1))
    said = refusal(capsys, train(world, tmp_path / "runs", **keys), where=run / "environment.json")
    assert "data files changed" in said
    data.write_text(whole)
    weights = load_file(base / "model.safetensors")
    weights["model.norm.weight"][0] += 1
    save_file(weights, base / "model.safetensors", metadata={"format": "pt"})
    said = refusal(capsys, train(world, tmp_path / "runs", **keys), where=run / "environment.json")
    assert "base weights changed" in said
    assert snapshot(run) == before
    shutil.copy(world / "base/model.safetensors", base)
    assert train(world, tmp_path / "runs", **keys) == 0


def test_a_folder_locked_by_a_living_run(world, tmp_path, monkeypatch, capsys):
    run = interrupted(world, tmp_path, monkeypatch, capsys)
    before = snapshot(run)
    with RunFolder(run).lock():
        said = refusal(capsys, train(world, tmp_path, checkpoints__every=1), where=run)
    assert f"process {os.getpid()}" in said
    assert snapshot(run) == before
    assert train(world, tmp_path, checkpoints__every=1) == 0


def test_another_spec_in_the_folder(world, finished, capsys):
    spec = finished / "spec.yaml"
    whole = spec.read_text()
    (line,) = [number for number, text in enumerate(whole.splitlines(), 1) if text.strip() == "rank: 4"]
    spec.write_text(whole.replace("rank: 4", "rank: 5"))
    refusal(capsys, train(world, world / "finished"), where=f"{spec}:{line}")
    assert spec.read_text() == whole.replace("rank: 4", "rank: 5")
    spec.write_text(whole)
    assert train(world, world / "finished") == 0


def test_a_damaged_line_of_metrics(world, tmp_path, monkeypatch, capsys):
    run = interrupted(world, tmp_path, monkeypatch, capsys)
    lines = (run / "metrics.jsonl").read_text().splitlines(keepends=True)
    (run / "metrics.jsonl").write_text(lines[0] + "{damaged\n" + "".join(lines[2:]))
    code = train(world, tmp_path, checkpoints__every=1)
    assert "damaged" in refusal(capsys, code, where=f"{run / 'metrics.jsonl'}:2")


# Branches


def test_a_branch_from_nothing(world, tmp_path, finished, capsys):
    for branch, where, word in (
        ("nowhere@5", "nowhere@5", "has checkpoints"),
        (f"{finished}@3", f"{finished}@3", "checkpoints there: "),
        (str(finished), "branch_from", "RUN@STEP"),
        (f"{finished}@last", "branch_from", "RUN@STEP"),
    ):
        code = train(world, tmp_path / "runs", branch=branch, train__steps=8)
        assert word in refusal(capsys, code, where=where)


def test_a_branch_that_ends_before_it_begins(world, tmp_path, finished, capsys):
    said = refusal(capsys, train(world, tmp_path, branch=f"{finished}@6", train__steps=4), where="branch_from")
    assert "train.steps" in said


def test_a_branch_by_another_method_or_on_another_base(world, tmp_path, finished, capsys):
    branch = f"{finished}@6"
    for keys in ({"method__rank": 2}, {"method__targets": "[q_proj]"}, {"recipe": "sft-full"}):
        said = refusal(capsys, train(world, tmp_path, branch=branch, train__steps=8, **keys), where="step-6")
        assert "differs in method" in said
    other = make_base(tmp_path / "other", seed=1)
    code = train(world, tmp_path, branch=branch, train__steps=8, model__path=other)
    assert "other base weights" in refusal(capsys, code, where="step-6")
    code = train(world, tmp_path, branch=branch, train__steps=8, seed=1)
    assert "differs in seed" in refusal(capsys, code, where="step-6")


def test_a_branch_with_a_share_for_its_warm_up(world, tmp_path, finished, capsys):
    code = train(world, tmp_path, branch=f"{finished}@6", train__steps=8, schedule__warmup=0.1)
    assert "in steps" in refusal(capsys, code, where="schedule.warmup")


# Merging


def merge(base, delta, out, *options) -> int:
    return loralab("merge", base, delta, "--out", out, *options)


def test_a_delta_of_another_base_is_not_merged(world, tmp_path, finished, capsys):
    other = make_base(tmp_path / "other", seed=1)
    refusal(capsys, merge(other, finished, tmp_path / "out"), where="this base is")
    narrow = make_base(tmp_path / "narrow", hidden_size=16)
    assert "(48, 16)" in refusal(capsys, merge(narrow, finished, tmp_path / "out"), where="mlp.")
    assert not (tmp_path / "out").exists()


def test_a_damaged_adapter_is_not_merged(world, tmp_path, finished, capsys):
    delta = shutil.copytree(finished / "delta", tmp_path / "delta")
    weights = delta / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-8])
    refusal(capsys, merge(world / "base", delta, tmp_path / "out"), where=weights)
    refusal(capsys, merge(world / "base", tmp_path / "none", tmp_path / "out"), where=tmp_path / "none")
    assert not (tmp_path / "out").exists()


def test_a_folder_that_is_not_empty_is_not_merged_into(world, tmp_path, finished, capsys):
    (tmp_path / "out").mkdir()
    (tmp_path / "out/thesis.txt").write_text("years of work")
    (tmp_path / "file").write_text("")
    for out in ("out", "file"):
        refusal(capsys, merge(world / "base", finished, tmp_path / out), where=tmp_path / out)
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["thesis.txt"]


def test_a_merge_that_changes_the_predictions_is_not_saved(world, tmp_path, finished, capsys):
    code = merge(world / "base", finished, tmp_path / "out", "--dtype", "bfloat16", "--limit-kl", "1e-12")
    said = refusal(capsys, code, where="bfloat16")
    assert "the limit is 1e-12" in said and "--limit-kl" in said
    assert list(tmp_path.iterdir()) == []
    assert merge(world / "base", finished, tmp_path / "out", "--dtype", "bfloat16") == 0
    assert load_file(tmp_path / "out/model.safetensors")["model.norm.weight"].dtype is torch.bfloat16


def test_a_merge_with_a_wrong_option(world, tmp_path, finished, capsys):
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "bytes.txt").write_bytes(b"\xff\xfe\x00")
    for name in ("none.txt", "empty.txt", "bytes.txt"):
        code = merge(world / "base", finished, tmp_path / "out", "--text", tmp_path / name)
        refusal(capsys, code, where=tmp_path / name)
    code = merge(world / "base", finished, tmp_path / "out", "--dtype", "float8")
    assert "bfloat16" in refusal(capsys, code, where="--dtype")
    assert not (tmp_path / "out").exists()


def test_missing_base_and_data_are_reported_together(world, tmp_path, capsys):
    code = train(world, tmp_path / "runs", model__path=tmp_path / "no-base", data__train=tmp_path / "no.jsonl")
    said = refusal(capsys, code, where="no-base")
    assert "2 problems" in said and "no.jsonl" in said
    assert list((tmp_path / "runs").iterdir()) == [], "a run that never began leaves no folder"
