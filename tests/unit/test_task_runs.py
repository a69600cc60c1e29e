"""Tasks in a run: files and addresses into items, what the folder holds of them, and going on after a break."""

import json
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from little_world import make_world, overrides, rows, same_bits, write_rows
from loralab.console.progress import scores_text
from loralab.errors import DataError, FolderError, Interrupted, SpecError
from loralab.lab import experiment
from loralab.lab.check import check
from loralab.lab.experiment import train
from loralab.lab.result import Result
from loralab.lab.tasks import look_for, read_tasks
from loralab.lab.watch import RunWatch, Silent
from loralab.run.folder import read_lines
from loralab.spec.recipes import explain, read
from loralab.spec.spec import RunSpec, TaskSpec

TASKED = {"method__rank": 4, "method__dropout": 0.1, "checkpoints__every": 2, "probes__every": 3, "probes__samples": 4}


def spec(world: Path, **keys: Any) -> RunSpec:
    return read("sft-lora", overrides(world, **{**TASKED, **keys}))


def tasked(world: Path, **keys: Any) -> RunSpec:
    """Give a run with a file of two skills as target, one of them with choices, and a suite as source."""
    tasks = {"probes__target": world / "tasks.jsonl", "probes__source": [{"path": "pocket:copy", "items": 5}]}
    return spec(world, **{**tasks, **keys})


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    made = make_world(tmp_path_factory.mktemp("world"))
    plain = [{**row, "skill": "reverse"} for row in rows(6, seed=3)]
    chosen = [
        {"prompt": f"last {row['completion']} = ", "choices": [*"abcdef"], "right": i % 6, "skill": "last"}
        for i, row in enumerate(rows(4, seed=4))
    ]
    write_rows(made / "tasks.jsonl", [*plain, *chosen])
    return made


@pytest.fixture(scope="module")
def whole(world) -> Result:
    return train(tasked(world), world / "whole")


# Items


def test_rows_become_items(world, tmp_path):
    (task,) = read_tasks([TaskSpec(path=str(world / "tasks.jsonl"), items=3)])
    assert task.grade is None
    assert [item.skill for item in task.items] == ["reverse"] * 3 + ["last"] * 3
    first, last = task.items[0], task.items[5]
    assert (first.prompt, first.completion) == tuple(rows(6, seed=3)[0].values()) and first.choices == ()
    assert (last.completion, last.choices, last.right) == ("c", ("a", "b", "c", "d", "e", "f"), 2)
    short = write_rows(tmp_path / "sums.jsonl", [{"prompt": "1+1=", "completion": "2", "choices": ["3", "2"]}])
    (item,) = read_tasks([TaskSpec(path=str(short))])[0].items
    assert (item.skill, item.right) == ("sums", 1)
    slashed = write_rows(tmp_path / "s.jsonl", [{"prompt": "a", "completion": "b", "skill": "x/y"}])
    assert read_tasks([TaskSpec(path=str(slashed))])[0].items[0].skill == "x-y"


def test_suites_of_the_pocket_world_come_with_their_graders():
    exact, written = (read_tasks([TaskSpec(path=f"pocket:{name}", items=3)]) for name in ("source", "calc"))
    assert [task.grade for task in exact] == [None]
    counts = pd.Series([item.skill for item in exact[0].items]).value_counts()
    assert len(counts) == 10 and set(counts) == {3}
    (task,) = written
    item = task.items[0]
    assert task.grade(item, item.completion) and not task.grade(item, item.completion + "1")
    assert task.grade(item, f"whatever. answer {item.completion.rpartition(' ')[2]}"), "only the final answer counts"


BAD_ROWS = {
    "no prompt": ({"completion": "a"}, "`prompt` is missing"),
    "an empty completion": ({"prompt": "a", "completion": ""}, "`completion` is empty"),
    "a number": ({"prompt": "a", "completion": 3}, "`completion` is no text"),
    "one choice": ({"prompt": "a", "completion": "b", "choices": ["b"]}, "two or more"),
    "choices that are no texts": ({"prompt": "a", "completion": "b", "choices": [1, 2]}, "two or more"),
    "no right choice": ({"prompt": "a", "completion": "x", "choices": ["b", "c"]}, "which of its choices"),
    "a right choice that there is not": ({"prompt": "a", "choices": ["b", "c"], "right": 2}, "which of its choices"),
    "the same choice twice": ({"prompt": "a", "choices": ["b", "c", "b"], "right": 0}, "stands twice"),
    "two right choices": ({"prompt": "a", "completion": "b", "choices": ["b", "c"], "right": 1}, "another choice"),
    "half a character": ({"prompt": "a\ud800", "completion": "b"}, "half a character"),
    "a right choice before the first": ({"prompt": "a", "choices": ["b", "c"], "right": -1}, "which of its choices"),
}


@pytest.mark.parametrize("case", BAD_ROWS)
def test_a_row_that_is_no_item_is_named(tmp_path, case):
    row, words = BAD_ROWS[case]
    file = write_rows(tmp_path / "tasks.jsonl", [row])
    with pytest.raises(DataError, match=words) as caught:
        read_tasks([TaskSpec(path=str(file))])
    assert caught.value.where == f"{file}, row 1" and caught.value.fix


def test_an_item_that_comes_again_counts_once(tmp_path):
    twice = write_rows(tmp_path / "sums.jsonl", rows(3, seed=3) + rows(3, seed=3))
    (task,) = read_tasks([TaskSpec(path=str(twice))])
    assert len(task.items) == 3
    both = read_tasks([TaskSpec(path=f"pocket:{name}", items=3) for name in ("source", "copy", "calc")])
    assert [len(task.items) for task in both] == [30, 3]
    assert read_tasks([TaskSpec(path="pocket:copy")] * 2) == read_tasks([TaskSpec(path="pocket:copy")])


def test_cloze_items_are_asked_as_choices_only():
    (task,) = read_tasks([TaskSpec(path="pocket:cipher", items=3)])
    assert (task.ends, task.grade, len(task.items)) == (False, None, 3)


def test_names_that_there_are_not_are_met_with_the_nearest():
    with pytest.raises(DataError) as caught:
        look_for(TaskSpec(path="pocket:clac"))
    assert "did you mean pocket:calc" in str(caught.value)
    with pytest.raises(DataError, match="no right answer"):
        look_for(TaskSpec(path="pocket:story"))


def test_missing_tasks_are_reported_with_the_other_missing_files(world, tmp_path):
    broken = tasked(world, data__train="no.jsonl", probes__target="pocket:stak", probes__source="tsks.jsonl")
    with pytest.raises(SpecError, match="3 problems") as caught:
        train(broken, tmp_path)
    assert all(word in str(caught.value) for word in ("no.jsonl", "pocket:stack", "tsks.jsonl"))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("streaming", [False, True])
def test_test_items_are_no_training_data(world, tmp_path, streaming):
    length = {"data__streaming": True, "train__steps": 2} if streaming else {}
    with pytest.raises(DataError, match="no training data") as caught:
        train(spec(world, data__train=["pocket:copy", "pocket:copy/test?items=5"], **length), tmp_path)
    assert "write pocket:copy?items=5" in str(caught.value)
    written = spec(world, data__train="pocket:copy/validation?items=9", data__validation="pocket:copy/test?items=9")
    assert check(written).total_steps == 6


@pytest.mark.parametrize("path", ["pocket:copy?seed=1", "pocket:copy/train"])
def test_training_rows_are_no_validation(world, tmp_path, path):
    with pytest.raises(DataError, match="no validation") as caught:
        train(spec(world, data__train="pocket:copy", data__validation=path), tmp_path)
    assert "write pocket:copy/validation" in str(caught.value) and list(tmp_path.iterdir()) == []


def test_streams_of_the_pocket_world_are_read_as_they_come(world, tmp_path):
    streamed = spec(world, data__train="pocket:copy?items=50", data__streaming=True, train__steps=3)
    assert train(streamed, tmp_path).status["step"] == 3


# What the folder holds


def test_scores_name_role_skill_and_change(whole):
    names = {"base": set(), "tuned": set()}
    for line in read_lines(whole.folder.scores):
        names[line["model"]].add(line["name"])
        if "accuracy" in line["name"] or "choice" in line["name"]:
            assert line["unit"] == "share of items" and line["standard_error"] >= 0
    accuracies = {"target/accuracy", "target/reverse/accuracy", "target/last/accuracy", "source/accuracy"}
    choices = {"target/choice", "source/choice"}
    covered = {"drift/covered", "drift/target_covered"}
    assert {name for name in names["base"] if "loss" not in name} == accuracies | choices | covered
    others = ("drift", "spectrum")
    measured = {name for name in names["tuned"] if "loss" not in name and not name.startswith(others)}
    assert measured == {name + change for name in accuracies | choices for change in ("", "_change")}
    counts = {name: whole.score(name).n for name in ("target/accuracy", "target/choice", "source/choice")}
    assert counts == {"target/accuracy": 10, "target/choice": 4, "source/choice": 5}


def test_items_hold_the_outcome_of_every_item(whole):
    items = pd.read_parquet(whole.folder.path / "items.parquet")
    facts, outcomes = ["probe", "item", "num_tokens"], ["base_loss_sum", "tuned_loss_sum"]
    assert list(items) == [*facts, *outcomes, "skill", "base_right", "tuned_right", "prompt"]
    texts, tasks = items[items.skill.isna()], items[items.skill.notna()]
    assert set(texts.probe) == {"target", "general", "prompts"}
    assert texts.base_right.isna().all() and texts.prompt.isna().all()
    assert set(tasks.probe) == {f"{role}/{kind}" for role in ("target", "source") for kind in ("accuracy", "choice")}
    assert tasks.base_loss_sum.isna().all() and tasks.num_tokens.isna().all() and tasks.prompt.notna().all()
    for probe, mine in tasks.groupby("probe"):
        assert list(mine["item"]) == list(range(len(mine)))
        by_skill = mine.groupby("skill")[["base_right", "tuned_right"]].mean()
        assert whole.score(probe, "base").value == pytest.approx(by_skill.base_right.mean())
        assert whole.score(probe).value == pytest.approx(by_skill.tuned_right.mean())
        change = (by_skill.tuned_right - by_skill.base_right).mean()
        assert whole.score(f"{probe}_change").value == pytest.approx(change)
    assert (tasks.base_right != tasks.tuned_right).any()


def test_samples_stand_once_for_the_base_and_once_for_the_end(whole):
    lines = read_lines(whole.folder.samples)
    assert [(line["model"], line["step"]) for line in lines] == [("base", 0)] * 8 + [("tuned", 6)] * 8
    for base, tuned in zip(lines[:8], lines[8:], strict=True):
        same = ("role", "skill", "prompt", "reference")
        assert [base[key] for key in same] == [tuned[key] for key in same]
    assert [line["skill"] for line in lines[:4]] == ["reverse", "last"] * 2
    assert {type(line["right"]) for line in lines} == {bool}
    assert any(base["output"] != tuned["output"] for base, tuned in zip(lines[:8], lines[8:], strict=True))


def test_without_tasks_samples_are_of_the_validation_rows(world, tmp_path):
    result = train(spec(world, train__steps=2), tmp_path)
    lines = read_lines(result.folder.samples)
    assert [line["prompt"] for line in lines[:4]] == [row["prompt"] for row in rows(8, seed=2)[:4]]
    assert [line["reference"] for line in lines[:4]] == [row["completion"] for row in rows(8, seed=2)[:4]]
    assert [(line["model"], line["role"], line["right"]) for line in lines[3:5]] == [
        ("base", "target", None),
        ("tuned", "target", None),
    ]
    assert not train(spec(world, train__steps=2, probes__samples=0), tmp_path).folder.samples.exists()


def test_the_end_table_gives_each_share_its_paired_change(whole):
    table = {row[0]: row[1:] for row in whole.rows()}
    assert not any(name.endswith(("_change", "/loss_rise")) for name in table)
    for name in ("target/accuracy", "target/reverse/accuracy", "target/choice", "source/accuracy"):
        base, before, after, change, interval, n = table[name]
        assert base == before == whole.score(name, "base").value
        assert change == whole.score(f"{name}_change").value == pytest.approx(after - base)
        low, high = (float(part) for part in interval.strip("[]").split(","))
        assert low <= change <= high and n == whole.score(name).n
    json.dumps(whole.summary())


def test_the_display_leaves_single_skills_to_the_files(whole):
    said = scores_text({name: score.value for name, score in whole.after.items()})
    assert "target/accuracy " in said and "general/loss " in said and "drift/kl " in said
    assert "reverse" not in said and "target/last" not in said


def test_tasks_do_not_touch_training(world, whole, tmp_path):
    plain = train(spec(world, probes__samples=0), tmp_path)
    delta = "delta/adapter_model.safetensors"
    assert (plain.folder.path / delta).read_bytes() == (whole.folder.path / delta).read_bytes()


def test_check_reads_tasks_too(world):
    assert check(tasked(world)).total_steps == 6
    with pytest.raises(DataError):
        check(tasked(world, probes__target="pocket:clac"))


# Going on


class StopAt(Silent):
    """A display that breaks the run off after a step."""

    def __init__(self, step: int, error: BaseException) -> None:
        self.at, self.error = step, error

    def step(self, line: dict[str, Any], total_steps: int) -> None:
        if line["step"] == self.at:
            raise self.error


@pytest.mark.parametrize("step", [1, 3, 6])
def test_a_broken_off_run_goes_on_to_the_same_bits(world, whole, tmp_path, step):
    with pytest.raises(OSError):
        train(tasked(world), tmp_path, display=StopAt(step, OSError("the machine is gone")))
    same_bits(train(tasked(world), tmp_path).folder.path, whole.folder.path)


@pytest.mark.parametrize("lines", [3, 9, 13])
def test_samples_broken_off_halfway_are_written_again(world, whole, tmp_path, monkeypatch, lines):
    from loralab.lab import watch

    sound, written = watch.append_line, []

    def append(path: Path, line: dict[str, Any]) -> None:
        if path.name == "samples.jsonl":
            written.append(line)
            if len(written) == lines:
                raise OSError("the machine is gone")
        sound(path, line)

    monkeypatch.setattr(watch, "append_line", append)
    with pytest.raises(OSError):
        train(tasked(world), tmp_path)
    monkeypatch.undo()
    same_bits(train(tasked(world), tmp_path).folder.path, whole.folder.path)


def test_a_run_that_lost_only_its_last_files_does_not_sample_twice(world, whole, tmp_path, monkeypatch):
    def fall_over(*_: Any) -> None:
        raise OSError("the machine is gone")

    monkeypatch.setattr(experiment, "write_items", fall_over)
    with pytest.raises(OSError):
        train(tasked(world), tmp_path)
    monkeypatch.undo()
    monkeypatch.setattr(RunWatch, "_sample", fall_over)
    same_bits(train(tasked(world), tmp_path).folder.path, whole.folder.path)


def test_a_run_does_not_go_on_with_other_items(world, tmp_path):
    tasks = write_rows(tmp_path / "own.jsonl", rows(6, seed=5))
    with pytest.raises(Interrupted):
        train(tasked(world, probes__target=tasks), tmp_path, display=StopAt(3, KeyboardInterrupt()))
    write_rows(tasks, rows(6, seed=6))
    with pytest.raises(FolderError, match="data files changed"):
        train(tasked(world, probes__target=tasks), tmp_path)


# The spec


@pytest.mark.parametrize("recipe", ["sft-lora", "sft-lora-plus", "sft-cola"])
def test_random_weights_are_no_base_of_a_method_that_keeps_its_base(world, recipe):
    with pytest.raises(SpecError, match="random weights") as caught:
        read(recipe, overrides(world, **{"model.random_init": True}))
    assert "method.name=full" in str(caught.value)


def test_paths_stand_for_tasks(world):
    written = spec(world, probes__target="pocket:calc", probes__source=["pocket:copy", {"path": "b.jsonl", "items": 3}])
    assert written.probes.target == [TaskSpec(path="pocket:calc")]
    assert written.probes.source == [TaskSpec(path="pocket:copy"), TaskSpec(path="b.jsonl", items=3)]
    assert spec(world).probes.target == spec(world, probes__target=None).probes.target == []
    again = spec(world, **{"probes__target": "pocket:calc", "probes__target.0.items": 3})
    assert again.probes.target == [TaskSpec(path="pocket:calc", items=3)]
    assert again.hash8 != written.hash8
    told = {e.key: e for e in explain("sft-lora", overrides(world, probes__target="pocket:calc"))}
    assert told["probes.target.0.path"].source == 'override "probes.target=pocket:calc"'
    assert "prompt, completion" in told["probes.target.0.path"].meaning


@pytest.mark.parametrize(
    ("value", "words"),
    [({"path": "a", "item": 3}, "did you mean probes.target.0.items"), ({"path": "a", "items": 0}, "at least 1")],
)
def test_mistakes_in_tasks_are_said(world, value, words):
    with pytest.raises(SpecError) as caught:
        spec(world, probes__target=value)
    assert words in str(caught.value)
