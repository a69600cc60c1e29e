import json

import pytest

from loralab.errors import FolderError
from loralab.report.read import read_run, runs_below, source_name
from loralab.run.folder import RunFolder, append_line
from report_world import SKILLS, STEPS, make_run, make_sweep, open_run


@pytest.fixture(scope="module")
def sweep(tmp_path_factory):
    return make_sweep(tmp_path_factory.mktemp("sweep"))


@pytest.fixture
def run(tmp_path):
    return make_run(tmp_path, "lora-r4")


def test_a_run_is_found_in_its_folder_and_below_one_or_two_folders(sweep):
    whole = runs_below(sweep)
    assert len(whole) == 12
    assert [run.folder for run in whole] == sorted(run.folder for run in whole)
    assert {run.folder.partition("/")[0] for run in whole} == {"calc", "cipher"}
    assert [run.folder for run in runs_below(sweep / "calc")] == [
        r.folder[5:] for r in whole if r.folder[:5] == "calc/"
    ]
    (alone,) = runs_below(sweep / whole[0].folder)
    assert alone.folder == "."


def test_runs_deeper_down_or_hidden_are_not_looked_for(tmp_path):
    open_run(tmp_path / "a" / "b", "full")
    open_run(tmp_path / ".hidden", "full")
    open_run(tmp_path / "c", "lora-r1")
    (run,) = runs_below(tmp_path)
    assert run.method == "lora"
    assert [r.method for r in runs_below(tmp_path / "a")] == ["full"]


@pytest.mark.parametrize("name", ["none", "file", "empty"])
def test_a_folder_without_a_run_is_an_error_with_a_way_out(tmp_path, name):
    (tmp_path / "file").write_text("")
    (tmp_path / "empty" / "figures").mkdir(parents=True)
    with pytest.raises(FolderError) as found:
        runs_below(tmp_path / name)
    assert found.value.where == str(tmp_path / name)
    assert found.value.fix


def test_a_finished_run_is_read_whole(run):
    found = read_run(run, run.parent)
    assert (found.state, found.problems) == ("done", ())
    assert (found.method, found.rank, found.target_data) == ("lora", 4, "calc")
    assert found.trained_share == 28_000 / 1_100_000
    assert len(found.metrics) == STEPS
    lines = [json.loads(line) for line in (run / "scores.jsonl").read_text().splitlines()]
    assert found.base["source/accuracy"].value == next(
        line["value"] for line in lines if (line["model"], line["name"]) == ("base", "source/accuracy")
    )
    assert found.after["target/loss"].value == [line["value"] for line in lines if line["name"] == "target/loss"][-1]
    assert [step for step, _ in found.history["target/loss"]] == list(range(0, STEPS + 1, STEPS // 6))
    assert found.items is not None and set(found.items["skill"].dropna()) == {*SKILLS, "calc"}
    assert found.spectra is not None and set(found.spectra["step"]) == {STEPS}
    assert {line["model"] for line in found.samples} == {"base", "tuned"}


def test_what_was_measured_before_training_is_no_result(tmp_path):
    folder = open_run(tmp_path, "lora-r4")
    line = {"step": 0, "model": "tuned", "name": "target/loss", "value": 2.0, "unit": "nats/token", "n": 3}
    append_line(folder.scores, {**line, "standard_error": 0.1})
    found = read_run(folder.path, tmp_path)
    assert (found.after, len(found.history["target/loss"])) == ({}, 1)


@pytest.mark.parametrize("value", ["x", None, True, float("nan"), float("inf"), [1]])
def test_odd_scores_are_passed_over(run, value):
    before = read_run(run, run.parent).after
    odd = {"step": 999, "model": "tuned", "name": "target/loss", "value": value, "unit": "", "n": 3}
    append_line(RunFolder(run).scores, odd)
    append_line(RunFolder(run).scores, {"name": 3})
    assert read_run(run, run.parent).after == before


@pytest.mark.parametrize(
    ("file", "content", "state"),
    [
        ("spec.yaml", b"a: [1", "damaged"),
        ("spec.yaml", b"\xff", "damaged"),
        ("spec.yaml", b"- 1", "damaged"),
        ("spec.yaml", None, "damaged"),
        ("status.json", b"{", "damaged"),
        ("environment.json", b"[]", "done"),
        ("metrics.jsonl", b"x\ny\n", "done"),
        ("scores.jsonl", b"x\ny\n", "done"),
        ("samples.jsonl", b"x\ny\n", "done"),
        ("items.parquet", b"PAR1", "done"),
        ("spectra.parquet", b"", "done"),
    ],
)
def test_a_damaged_file_is_named_and_the_rest_is_read(run, file, content, state):
    if content is None:
        (run / file).unlink()
    else:
        (run / file).write_bytes(content)
    found = read_run(run, run.parent)
    assert found.state == state
    assert len(found.problems) == 1
    assert found.problems[0].startswith(file)
    assert file == "scores.jsonl" or "target/loss" in found.after


@pytest.mark.parametrize(
    "file", ["environment.json", "metrics.jsonl", "scores.jsonl", "samples.jsonl", "items.parquet"]
)
def test_a_missing_file_is_no_damage(run, file):
    (run / file).unlink()
    assert (read_run(run, run.parent).state, read_run(run, run.parent).problems) == ("done", ())


def test_a_table_without_its_columns_is_named(run):
    import pandas as pd

    pd.DataFrame({"probe": ["a"]}).to_parquet(run / "items.parquet")
    (problem,) = read_run(run, run.parent).problems
    assert problem.startswith("items.parquet") and "num_tokens" in problem


def test_a_run_without_a_living_owner_is_not_running(tmp_path):
    folder = open_run(tmp_path, "full")
    folder.write_status(state="running", step=3)
    assert read_run(folder.path, tmp_path).state == "interrupted"
    with folder.lock():
        assert read_run(folder.path, tmp_path).state == "running"


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("pocket:calc", "calc"),
        ("pocket:calc/train?items=9", "calc"),
        ("data/calc-train.jsonl", "calc-train"),
        ("calc/train.jsonl", "calc"),
        ("C:\\data\\calc.parquet", "calc"),
        ("openai/gsm8k", "gsm8k"),
        ("org/Model-1.5", "Model-1.5"),
        ("runs/base-12345678/delta", "base-12345678"),
        ("train.jsonl.gz", "train"),
        ("", ""),
    ],
)
def test_sources_are_named_for_people(path, name):
    assert source_name(path) == name
