import math
import os
import subprocess
import sys

import pandas as pd
import pytest

from loralab.lab.index import COLUMNS, index
from loralab.run.folder import RunFolder, append_line

SPEC = """\
name: {name}
seed: 0
model: {{path: models/small}}
method: {{name: lora, rank: 8, alpha: 16.0}}
optimizer: {{name: adamw, learning_rate: 2e-4}}
"""


def _run(root, name="a", **status):
    run = RunFolder.create_or_open(root, f"{name}-12345678", SPEC.format(name=name))
    run.write_status(**status)
    return run


def _score(run, step, name, value):
    row = {"step": step, "name": name, "value": value, "unit": "nats/token", "n": 10, "standard_error": None}
    append_line(run.scores, row)


def _finished(root, name="a"):
    run = _run(
        root, name, state="done", step=20, total_steps=20, tokens=4096, wall_s=1.5,
        peak_bytes=1000, trained_parameters=5, all_parameters=200, end="all steps done",
    )  # fmt: skip
    for step, target, general in [(0, 3.0, 2.0), (10, 2.0, 2.125), (20, 1.75, 2.25)]:
        _score(run, step, "target/loss", target)
        _score(run, step, "general/loss", general)
        _score(run, step, "drift/kl", step / 100)
    return run


def test_an_empty_or_missing_root_is_an_empty_table(tmp_path):
    for root in (tmp_path, tmp_path / "none"):
        table = index(root)
        assert list(table.columns) == COLUMNS
        assert len(table) == 0


def test_a_finished_run_is_one_complete_row(tmp_path):
    _finished(tmp_path)
    (row,) = index(tmp_path).to_dict("records")
    assert row == {
        "folder": "a-12345678", "name": "a", "method": "lora", "rank": 8, "learning_rate": 2e-4,
        "model": "models/small", "state": "done", "step": 20, "total_steps": 20, "tokens": 4096,
        "target_loss_base": 3.0, "target_loss_end": 1.75, "general_loss_base": 2.0, "general_loss_end": 2.25,
        "learning": 1.25, "learned_by": "loss, nats per token", "forgetting": 0.25,
        "trained_share": 0.025, "wall_s": 1.5, "peak_bytes": 1000, "reason": "all steps done",
    }  # fmt: skip


def test_numbers_are_numbers_even_where_some_are_missing(tmp_path):
    _finished(tmp_path, "a")
    _run(tmp_path, "b", state="new")
    table = index(tmp_path)
    assert list(table["folder"]) == ["a-12345678", "b-12345678"]
    assert (table["learning"].dtype, table["step"].dtype) == ("float64", "float64")
    assert math.isnan(table["learning"][1])
    assert table["rank"][1] == 8


def test_one_measurement_is_a_base_without_an_end(tmp_path):
    _score(_run(tmp_path), 0, "target/loss", 3.0)
    (row,) = index(tmp_path).to_dict("records")
    assert row["target_loss_base"] == 3.0
    assert math.isnan(row["target_loss_end"])
    assert math.isnan(row["learning"])


def test_running_needs_a_living_owner(tmp_path):
    run = _run(tmp_path, state="running", step=3)
    assert list(index(tmp_path)["state"]) == ["interrupted"]
    with run.lock():
        assert list(index(tmp_path)["state"]) == ["running"]


@pytest.mark.parametrize("state", ["done", "diverged", "interrupted", "new"])
def test_other_states_are_shown_as_they_are(tmp_path, state):
    _run(tmp_path, state=state)
    assert list(index(tmp_path)["state"]) == [state]


@pytest.mark.parametrize(
    ("file", "content", "reason"),
    [
        ("spec.yaml", "a: [1", "spec.yaml"),
        ("spec.yaml", "- 1\n", "describes no run"),
        ("spec.yaml", "method: lora\nmodel: x\n", "describes no run"),
        ("spec.yaml", "\udcff", "spec.yaml"),
        ("spec.yaml", None, "missing"),
        ("status.json", '{"state": "do', "status.json"),
        ("status.json", "[]", "status.json"),
        ("scores.jsonl", '{"a": \n{"b": 1}\n', "scores.jsonl:1"),
    ],
)
def test_a_damaged_folder_is_a_row_with_its_reason(tmp_path, file, content, reason):
    _finished(tmp_path, "good")
    bad = _run(tmp_path, "bad", state="done").path / file
    if content is None:
        bad.unlink()
    else:
        bad.write_text(content, errors="surrogateescape")
    table = index(tmp_path).set_index("folder")
    assert table.loc["bad-12345678", "state"] == "damaged"
    assert reason in table.loc["bad-12345678", "reason"]
    assert table.loc["good-12345678", "learning"] == 1.25


def test_a_damaged_folder_keeps_what_can_be_read(tmp_path):
    run = _finished(tmp_path)
    run.scores.write_text("x\ny\n")
    (row,) = index(tmp_path).to_dict("records")
    assert (row["method"], row["rank"], row["step"]) == ("lora", 8, 20)


@pytest.mark.parametrize("odd", [{"name": "target/loss"}, {"name": "target/loss", "step": [1], "value": "x"}, {}])
def test_odd_score_lines_are_passed_over(tmp_path, odd):
    run = _finished(tmp_path)
    append_line(run.scores, odd)
    assert list(index(tmp_path)["target_loss_end"]) == [1.75]


def test_what_is_no_run_is_no_row(tmp_path):
    (tmp_path / "figures").mkdir()
    (tmp_path / "notes.txt").write_text("")
    assert len(index(tmp_path)) == 0


def test_the_table_is_sortable_by_its_numbers(tmp_path):
    for name, value in [("a", 2.0), ("b", 1.0), ("c", 1.5)]:
        run = _run(tmp_path, name)
        _score(run, 0, "target/loss", 3.0)
        _score(run, 5, "target/loss", value)
    ranked = index(tmp_path).sort_values("learning", ascending=False)
    assert list(ranked["name"]) == ["b", "c", "a"]
    assert isinstance(ranked, pd.DataFrame)


def test_the_index_loads_no_torch(tmp_path):
    _finished(tmp_path)
    program = "import sys; from loralab.lab.index import index; index(sys.argv[1]); print('torch' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path)], capture_output=True, text=True, env=os.environ, check=True
    )
    assert done.stdout.strip() == "False"
