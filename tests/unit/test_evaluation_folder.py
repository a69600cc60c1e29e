"""The folder of an evaluation: what is written is read back, damage is named, and changes are called what they are."""

import json
import subprocess
import sys
from io import StringIO

import numpy as np
import pytest
from rich.console import Console

from evaluation_world import DELTAS, TASKS, make_evaluation, write_evaluation
from loralab.console.found import evaluation_lines, evaluation_tables
from loralab.errors import FolderError
from loralab.evals.stats import Score
from loralab.lab.evaluation import ITEMS, Evaluation, Measured, changes_of, is_evaluation, read_evaluation
from loralab.lab.measured import PROMPT_LENGTH
from report_world import make_run


@pytest.fixture(scope="module")
def made():
    return make_evaluation()


@pytest.fixture
def folder(tmp_path, made):
    return made.write(tmp_path / "evaluation")


def one(change=None, *, model="tuned", task="a", value=0.5, higher_is_better=True, suite=False):
    name = task if suite else f"{task}/acc"
    score = Score(name, value, "share of items", 100, 0.05)
    return Measured(task, "acc", model, score, change, higher_is_better=higher_is_better)


def moved(value, p_value=None, interval=None):
    return {"value": value, "standard_error": 0.01, "interval": interval, "p_value": p_value}


# Written and read


def test_what_is_written_is_read_back(made, folder):
    found = read_evaluation(folder)
    assert found.measured == made.measured
    assert found.items == [dict(row) for row in made.items]
    assert (found.models, found.facts) == (["base", *DELTAS], made.facts)
    assert (found.curves, found.diversity) == (made.curves, made.diversity)
    assert found.summary() == made.summary()


def test_a_line_of_scores_says_what_other_programs_need(folder):
    lines = [json.loads(line) for line in (folder / "scores.jsonl").read_text().splitlines()]
    base, tuned = (
        next(x for x in lines if (x["model"], x["name"]) == (m, "hellaswag/acc_norm")) for m in ("base", "full")
    )
    assert base["change"] is None
    for line in (base, tuned):
        assert (line["task"], line["metric"], line["version"], line["fewshot"]) == ("hellaswag", "acc_norm", "1.0", 0)
        assert (line["n"], line["unit"], line["chance"]) == (400, "share of items", 0.25)
        assert len(line["prompt_hash"]) == len(line["template_hash"]) == 64
    change = tuned["change"]
    assert change["value"] == pytest.approx(tuned["value"] - base["value"])
    assert change["value"] == pytest.approx((change["won"] - change["lost"]) / 400)
    assert {x["name"] for x in lines if x["task"] == "forgetting"} == {"forgetting"}, "a suite has its own name"


def test_the_items_are_those_of_a_run_and_more(folder):
    from loralab.lab import result

    assert [ITEMS.field(name) for name in result.ITEMS.names] == list(result.ITEMS)
    import pandas as pd

    table = pd.read_parquet(folder / "items.parquet")
    assert list(table.columns) == ITEMS.names
    assert len(table) == len(DELTAS) * sum(n for n, _, _ in TASKS.values())


def test_numbers_of_any_kind_become_json(tmp_path):
    score = Score("a/acc", float(np.float64(0.5)), "share of items", 4, None)
    facts = {"seed": np.int64(3), "share": np.float32(0.5), "lost": float("nan"), "path": tmp_path, "pair": (1, 2)}
    found = Evaluation(["base"], [Measured("a", "acc", "base", score)], [], facts).write(tmp_path / "e")

    def no_constant(name):
        raise AssertionError(f"{name} is no JSON")

    text = (found / "evaluation.json").read_text()
    whole = json.loads(text, parse_constant=no_constant)["facts"]
    assert whole == {"seed": 3, "share": 0.5, "lost": None, "path": str(tmp_path), "pair": [1, 2]}


@pytest.mark.parametrize("file", ["scores.jsonl", "items.parquet", "curves.jsonl", "diversity.jsonl"])
@pytest.mark.parametrize("damage", ["missing", "short", "odd"])
def test_a_damaged_file_is_named(folder, file, damage):
    path = folder / file
    if damage == "missing":
        path.unlink()
    elif damage == "short":
        path.write_bytes(path.read_bytes()[:-30])
    else:
        path.write_bytes(b"\xff\n" + path.read_bytes())
    with pytest.raises(FolderError) as found:
        read_evaluation(folder)
    assert file in str(found.value.where) and found.value.fix


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("value", None),
        ("value", "x"),
        ("n", 1.5),
        ("n", True),
        ("name", 3),
        ("model", None),
        ("change", [1]),
        ("task", 1),
    ],
)
def test_an_odd_line_is_named_with_its_number(folder, key, value):
    path = folder / "scores.jsonl"
    lines = path.read_text().splitlines()
    lines[2] = json.dumps(json.loads(lines[2]) | {key: value})
    path.write_text("\n".join(lines) + "\n")
    with pytest.raises(FolderError) as found:
        read_evaluation(folder)
    assert found.value.where == f"{path}:3" and key in found.value.what


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"models": ["base"], "facts": {}}'])
def test_facts_that_say_nothing_are_damage(folder, content):
    (folder / "evaluation.json").write_text(content)
    with pytest.raises(FolderError) as found:
        read_evaluation(folder)
    assert "evaluation.json" in str(found.value.where)


def test_no_evaluation_is_an_error_with_a_way_out(tmp_path):
    with pytest.raises(FolderError, match="no evaluation here") as found:
        read_evaluation(tmp_path / "none")
    assert "loralab evaluate" in str(found.value.fix)


def test_an_older_evaluation_is_replaced_whole(folder):
    Evaluation(["base"], [one(model="base")]).write(folder)
    found = read_evaluation(folder)
    assert (found.models, found.items, found.curves) == (["base"], [], [])
    assert sorted(path.name for path in folder.iterdir()) == ["evaluation.json", "items.parquet", "scores.jsonl"]


def test_one_that_broke_off_is_none_and_may_be_written_again(folder, made):
    (folder / "evaluation.json").unlink()
    assert not is_evaluation(folder)
    assert is_evaluation(made.write(folder))


def test_other_folders_are_left_alone(tmp_path, made):
    run = make_run(tmp_path, "lora-r1")
    before = (run / "scores.jsonl").read_bytes()
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "mine.txt").write_text("mine")
    for taken in (run, tmp_path / "notes"):
        with pytest.raises(FolderError, match="no evaluation"):
            made.write(taken)
    assert (run / "scores.jsonl").read_bytes() == before
    (tmp_path / "file").write_text("")
    with pytest.raises(FolderError):
        made.write(tmp_path / "file")


def test_reading_and_reporting_need_no_torch(folder):
    program = (
        "import sys; from loralab.lab.evaluation import read_evaluation; from loralab.console.found import evaluation_tables\n"
        "from loralab.report.page import write; evaluation_tables(read_evaluation(sys.argv[1])); write(sys.argv[1])\n"
        "print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", program, str(folder)], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


# What the changes say


@pytest.mark.parametrize(
    ("change", "better", "word"),
    [
        (moved(0.1, 0.01), True, "learned"),
        (moved(-0.1, 0.01), True, "forgotten"),
        (moved(-0.1, 0.01), False, "learned"),
        (moved(0.1, 0.01), False, "forgotten"),
        (moved(0.1, 0.2), True, "tie"),
        (moved(0.0, 0.01), True, "tie"),
        (moved(0.1, None, [0.02, 0.2]), True, "learned"),
        (moved(0.1, None, [-0.02, 0.2]), True, "tie"),
        ({"value": 0.1, "standard_error": None}, True, ""),
        ({"value": None}, True, ""),
    ],
)
def test_a_change_is_called_what_it_is(change, better, word):
    found = Evaluation(["base", "tuned"], [one(model="base"), one(change, higher_is_better=better)])
    assert found.verdicts()["tuned", "a/acc"].word == word


def test_many_tasks_need_smaller_p_values_and_suites_are_counted_apart():
    alone = Evaluation(["base", "tuned"], [one(moved(0.1, 0.03), task="a")])
    assert alone.verdicts()["tuned", "a/acc"].word == "learned"
    tasks = [one(moved(0.1, p), task=t) for t, p in (("a", 0.03), ("b", 0.001), ("c", 0.6))]
    suite = one(moved(0.1, 0.03), task="all", suite=True)
    said = Evaluation(["base", "tuned"], [*tasks, suite]).verdicts()
    assert said["tuned", "a/acc"].p_adjusted == pytest.approx(0.06)
    assert said["tuned", "b/acc"].p_adjusted == pytest.approx(0.003)
    assert [said["tuned", name].word for name in ("a/acc", "b/acc", "c/acc", "all")] == [
        "tie",
        "learned",
        "tie",
        "learned",
    ]


def test_an_interval_that_was_not_recorded_is_made_of_the_error():
    interval = one({"value": 0.1, "standard_error": 0.01}).change_interval()
    assert interval is not None
    assert interval == pytest.approx((0.1 - 1.984 * 0.01, 0.1 + 1.984 * 0.01), abs=1e-4)


def test_items_newly_lost_and_newly_won_are_found(made):
    lost, won = changes_of(made.items, "full", "winogrande/acc")
    change = made.find("full", "winogrande/acc").change
    assert (len(lost), len(won)) == (change["lost"], change["won"])
    assert all((row["base_right"], row["tuned_right"]) == (1, 0) for row in lost)
    assert all((row["base_right"], row["tuned_right"]) == (0, 1) for row in won)
    assert {row["model"] for row in [*lost, *won]} == {"full"}
    assert [row["item"] for row in lost] == sorted(row["item"] for row in lost)
    assert changes_of(made.items, "full", "winogrande") == ([], []), "a score is named with its metric"


def test_a_long_prompt_keeps_the_question_at_its_end():
    row = {
        "model": "m",
        "probe": "a/acc",
        "base_right": 1.0,
        "tuned_right": 0.0,
        "prompt": "example " * 500 + "Question?",
    }
    ((found,), _) = changes_of([row, {**row, "base_right": None}], "m", "a/acc")
    assert found["prompt"].endswith("Question?") and found["prompt"].startswith("…")
    assert len(found["prompt"]) <= PROMPT_LENGTH + 2


# Tables in the terminal


def shown(found, width=200):
    out = StringIO()
    screen = Console(file=out, width=width, highlight=False)
    for table in evaluation_tables(found):
        screen.print(table)
    return [line.split() for line in out.getvalue().splitlines() if line.strip()]


def test_the_table_has_a_row_per_score_and_delta(made):
    lines = shown(made)
    assert lines[0][:5] == ["task", "delta", "base", "after", "change"]
    change = made.find("full", "winogrande/acc").change
    row = next(line for line in lines if line[:2] == ["winogrande/acc", "full"])
    assert row[-5:] == [str(change["lost"]), str(change["won"]), row[-3], "forgotten", "300"]
    assert row[4] == f"{change['value']:.4g}"
    assert any(line[:4] == ["forgetting", "(mean", "of", "3)"] for line in lines)
    assert any(line[:2] == ["arc_challenge/acc_norm", "cola"] and "tie" in line for line in lines)


def test_one_delta_needs_no_column_of_names_and_a_base_alone_no_changes():
    assert "delta" not in shown(make_evaluation(deltas=("cola",)))[0]
    lines = shown(make_evaluation(deltas=()))
    assert lines[0] == ["task", "base", "95", "%", "interval", "n"]
    assert len([line for line in lines if line[0] == "hellaswag/acc"]) == 1


def test_samples_have_tables_of_their_own(made):
    lines = shown(made)
    heads = next(line for line in lines if "pass@1" in line)
    assert heads == ["task", "model", "pass@1", "pass@2", "pass@5", "pass@10", "pass@20", "pass@50"]
    assert ["humaneval", "failing", "cola", "50", "22", "0.5"] in lines
    assert evaluation_tables(Evaluation(["base"], [])) == []


def test_the_notes_say_what_it_cost_and_what_limits_it(made):
    said = " ".join(made.notes())
    assert "412 forwards over 81,250 tokens in 12.5 s" in said and "3.2 times as many" in said
    assert "3 contexts were longer" in said and "At most 400 items" in said
    assert Evaluation(["base"], [], facts={"cost": {"forwards": None}, "limit": None}).notes() == []


def test_names_are_no_markup():
    odd = Measured("[red]a[/red]", "acc", "base", Score("[red]a[/red]/acc", 0.5, "", 9, None))
    assert shown(Evaluation(["base"], [odd]))[1][0] == "[red]a[/red]/acc"


def test_it_is_said_when_a_change_is_called_learned(made):
    tests = sum(one.change is not None and one.task != "forgetting" for one in made.measured)
    assert made.how_judged() == (
        f"learned, forgotten: the change has p below 0.05 after Holm's correction for {tests} comparisons, "
        "suites corrected apart; everything else is a tie."
    )
    assert evaluation_lines(made) == [made.how_judged(), *made.notes()]
    assert evaluation_lines(Evaluation(["base"], [])) == []


def test_everything_is_json(tmp_path):
    found = read_evaluation(write_evaluation(tmp_path / "e")).summary()
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    said = {(line["model"], line["name"]): line.get("verdict") for line in found["scores"]}
    assert (said["base", "winogrande/acc"], said["full", "winogrande/acc"]) == (None, "forgotten")
