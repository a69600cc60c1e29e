"""Suites and tasks of lm-eval's catalogue as probes of a run: their curves, what the folder records, what cannot be asked."""

import shutil
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from little_world import overrides, same_bits, write_rows
from loralab.errors import DataError, EvaluationError, FolderError, Interrupted, LoralabError, SpecError
from loralab.evals.code import CodeProblem
from loralab.evals.exam_probe import ExamProbe, metric_of
from loralab.evals.exams import code_exam
from loralab.evals.probe import Reading
from loralab.evals.sandbox import protection
from loralab.evals.shares import ShareProbe, Together
from loralab.evals.texts import TextEngine
from loralab.lab.check import check
from loralab.lab.evaluate import evaluate
from loralab.lab.exam_probes import PROBED_ITEMS
from loralab.lab.experiment import train
from loralab.lab.objectives import prepare
from loralab.lab.result import Result
from loralab.run.folder import read_json, read_lines
from loralab.spec.recipes import read
from loralab.spec.spec import TaskSpec
from probe_world import COUNTS, StopAt, backwards, files, forgetting, make_probe_world, probed, spec


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    return make_probe_world(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def whole(world) -> Result:
    return train(probed(world), world / "whole")


# Curves


def test_every_task_has_a_curve_beside_the_items(whole):
    lines = read_lines(whole.folder.scores)
    told = {(line["model"], line["step"], line["name"]): line for line in lines}
    assert len(told) == len(lines)
    source = ["", *(f"{name}/" for name in (*COUNTS, "copy"))]
    levels = [f"source/{name}choice" for name in source] + ["source/accuracy"]
    levels += [f"target/{name}accuracy" for name in ("", "tasks/", "backwards/")]
    for name in levels:
        assert ("base", 0, name) in told
        assert all(("tuned", step, name + end) in told for step in (0, 3, 6) for end in ("", "_change")), name
        assert told["tuned", 0, f"{name}_change"]["value"] == 0
    mine = {name for _, _, name in told if name.startswith(("target/", "source/"))}
    assert {name.removesuffix("_change") for name in mine if "loss" not in name} == set(levels)
    assert {whole.score(f"source/{name}/choice").n for name in COUNTS} == set(COUNTS.values())
    skills = [whole.score(f"source/{name}choice").value for name in source[1:]]
    assert whole.score("source/choice").value == pytest.approx(sum(skills) / len(skills))


def test_it_is_what_evaluating_the_finished_delta_gives(world, whole):
    """The run measures in training; `evaluate` loads base and delta anew."""
    found = evaluate(
        str(world / "base"), ["forgetting"], deltas=[str(whole.folder.path)], data=files(world), device="cpu"
    )
    (delta,) = found.deltas
    metrics = {"hellaswag": "acc_norm", "arc_challenge": "acc_norm", "winogrande": "acc"}
    items = pd.read_parquet(whole.folder.path / "items.parquet")
    for name, metric in metrics.items():
        score = f"source/{name}/choice"
        base, tuned = (found.find(model, f"{name}/{metric}") for model in ("base", delta))
        assert whole.score(score, "base").value == base.score.value
        assert whole.score(score).value == tuned.score.value
        assert whole.score(f"{score}_change").value == pytest.approx(tuned.change["value"])
        assert whole.score(f"{score}_change").standard_error == pytest.approx(
            tuned.change["standard_error"] * (COUNTS[name] / (COUNTS[name] - 1)) ** 0.5  # there n, here n − 1
        )
        mine = items[(items.probe == "source/choice") & (items.skill == name)]
        outcomes = [row for row in found.items if row["probe"] == f"{name}/{metric}"]
        for column in ("prompt", "base_right", "tuned_right"):
            assert list(mine[column]) == [row[column] for row in outcomes]
    assert items.base_right.notna().sum() == sum(COUNTS.values()) + 5 + 5 + 6 + 4


def test_the_folder_records_what_was_asked(world, whole):
    asked = read_json(whole.folder.environment)["inputs"]["data"]
    assert {"source hellaswag", "source arc_challenge", "source winogrande", "target backwards"} <= set(asked)
    found = evaluate(str(world / "base"), ["hellaswag"], data=files(world, "hellaswag"), fewshot=0, device="cpu")
    one = found.find("base", "hellaswag/acc_norm")
    facts = asked["source hellaswag"]
    same = ("version", "fewshot", "prompt_hash", "template_hash", "metric")
    assert {key: facts[key] for key in same} == {key: getattr(one, key) for key in same}
    assert facts["n"] == COUNTS["hellaswag"] and asked["target backwards"]["metric"] == "exact_match"


def test_a_limit_and_examples_are_the_tasks_own(world):
    limited = spec(world, probes=[forgetting(world, items=3, fewshot=0)])
    assert limited.probes.source == [TaskSpec(path="forgetting", items=3, fewshot=0, data=files(world))]
    facts = prepare(limited).data.fingerprints
    assert {facts[f"source {name}"]["n"] for name in COUNTS} == {3}
    train_split = {"hellaswag": str(world / "hellaswag.jsonl"), "hellaswag:train": str(world / "hellaswag.jsonl")}
    few = spec(world, probes={"source": {"path": "hellaswag", "fewshot": 1, "data": train_split}})
    again = prepare(few).data.fingerprints["source hellaswag"]
    assert again["fewshot"] == 1 and again["prompt_hash"] != facts["source hellaswag"]["prompt_hash"]


def test_check_tells_what_would_be_asked(world):
    found = check(probed(world)).summary()["exams"]
    assert set(found) == {f"source {name}" for name in COUNTS} | {"target backwards"}
    assert found["target backwards"]["n"] == 4


def test_without_a_limit_a_probe_takes_some_items_of_each_task(world, tmp_path):
    many = write_rows(tmp_path / "many.jsonl", [{"word": f"{i}"} for i in range(PROBED_ITEMS + 5)])
    asking = {**backwards(world), "data": {"backwards": str(many)}}
    for items, expected in ((None, PROBED_ITEMS), (PROBED_ITEMS + 3, PROBED_ITEMS + 3)):
        (probe,) = prepare(spec(world, probes=[{**asking, "items": items}])).data.exams["source"]
        assert len(probe.asked) == expected


def test_a_task_in_the_place_of_the_section_is_the_source(world, tmp_path):
    named = spec(world, probes__every=3, probes__target="pocket:copy", probes="forgetting")
    assert named.probes.source == [TaskSpec(path="forgetting")] and named.probes.every == 3
    assert named.probes.target == [TaskSpec(path="pocket:copy")] and spec(world, probes=["a"]).probes.every == 3
    file = tmp_path / "own.yaml"
    file.write_text("method: {name: lora}\ntrain: {steps: 2}\nprobes:\n  - forgetting\n  - pocket:copy\n")
    written = read(str(file), overrides(world))
    assert [task.path for task in written.probes.source] == ["forgetting", "pocket:copy"]
    file.write_text("method: {name: lora}\ntrain: {steps: 2}\nprobes:\n  - path: forgetting\n    item: 3\n")
    with pytest.raises(SpecError) as caught:
        read(str(file), overrides(world))
    assert "did you mean probes.source.0.items" in str(caught.value) and "own.yaml:5" in str(caught.value)


def test_probes_do_not_touch_training(world, whole, tmp_path):
    plain = train(spec(world, probes__samples=0, probes__drift=False), tmp_path)
    delta = "delta/adapter_model.safetensors"
    assert (plain.folder.path / delta).read_bytes() == (whole.folder.path / delta).read_bytes()


@pytest.mark.parametrize("step", [1, 3, 6])
def test_a_broken_off_run_goes_on_to_the_same_bits(world, whole, tmp_path, step):
    with pytest.raises(OSError):
        train(probed(world), tmp_path, display=StopAt(step, OSError("the machine is gone")))
    same_bits(train(probed(world), tmp_path).folder.path, whole.folder.path)


@pytest.mark.parametrize("column", ["label", "ctx_a"])
def test_a_run_does_not_go_on_with_another_answer_or_prompt(world, tmp_path, column):
    file = Path(shutil.copy(world / "hellaswag.jsonl", tmp_path / "own.jsonl"))
    asking = spec(world, probes__source={"path": "hellaswag", "data": {"hellaswag": str(file)}})
    with pytest.raises(Interrupted):
        train(asking, tmp_path, display=StopAt(3, KeyboardInterrupt()))
    found = read_lines(file)
    found[0][column] = 3 if column == "label" else "another."
    write_rows(file, found)
    with pytest.raises(FolderError, match="data files changed"):
        train(asking, tmp_path)


# What cannot be asked


def told(world: Path, asking: Any, root: Path) -> str:
    """Give what is said of a source that cannot be probed; nothing is left behind, and `check` says the same."""
    wanted = spec(world, probes={"source": asking})
    with pytest.raises(LoralabError) as caught:
        train(wanted, root)
    assert caught.value.exit_code == 2 and list(root.iterdir()) == []
    assert "probes.source" in str(caught.value) and "--" not in str(caught.value)
    with pytest.raises(type(caught.value)):
        check(wanted)
    return str(caught.value)


def test_what_cannot_be_asked_is_said_before_anything_is_loaded(world, tmp_path, monkeypatch):
    monkeypatch.setattr("loralab.lab.prepare.load_base", None)
    own, data = str(world / "own"), files(world)
    cases: list[tuple[Any, list[str]]] = [
        ("hellaswga", ["no task 'hellaswga'", "did you mean 'hellaswag'"]),
        (forgetting(world, data={**data, "winogrande": "no.jsonl"}), ["no such file", "no.jsonl"]),
        (forgetting(world, data={**data, "piqa": data["hellaswag"]}), ["'piqa', which is not asked", "winogrande"]),
        (forgetting(world, data={**data, "winogrande": str(world / "own" / "backwards.yaml")}), ["'.yaml'", ".jsonl"]),
        ({**backwards(world), "include": ["nowhere"]}, ["no such folder of tasks", "nowhere"]),
    ]
    for asking, words in cases:
        said = told(world, asking, tmp_path)
        assert all(word in said for word in words), said
    for key, value in (("fewshot", 0), ("data", data), ("include", [own])):
        with pytest.raises(DataError, match=f"`{key}` is for suites"):
            train(spec(world, probes={"source": {"path": "pocket:copy", key: value}}), tmp_path)
    with pytest.raises(SpecError, match="2 problems"):
        train(spec(world, probes={"source": "hellaswga", "target": "pocket:clac"}), tmp_path)


def test_data_that_do_not_fit_are_said_before_the_run_begins(world, tmp_path):
    short = write_rows(tmp_path / "short.jsonl", [{"question": "a", "choices": {"text": ["b", "c"]}}])
    root = tmp_path / "runs"
    root.mkdir()
    said = told(world, {"path": "hellaswag", "data": {"hellaswag": str(short)}}, root)
    assert "ctx_a" in said and "columns question, choices" in said
    assert "data: {hellaswag: FILE}" in told(world, "hellaswag", root), "tests have no network"
    said = told(world, backwards(world, "whole_texts"), root)
    assert "word_perplexity" in said and "data.general" in said
    twice = [forgetting(world), {"path": "hellaswag", "data": files(world, "hellaswag"), "items": 2}]
    assert "hellaswag is asked in two ways" in told(world, twice, root)
    again = [forgetting(world), {"path": "hellaswag", "data": files(world, "hellaswag")}]
    assert len(prepare(spec(world, probes=again)).data.exams["source"]) == 3


def test_programs_are_probed_where_they_can_be_confined(world, tmp_path):
    check_of_it = "def check(f):\n    assert f(2) == 3\n"
    problem = CodeProblem("p/1", "def add(n):\n", check_of_it, "add", "    return n + 1\n")
    row = {key: getattr(problem, key) for key in ("task_id", "prompt", "test", "entry_point", "canonical_solution")}
    file = write_rows(tmp_path / "problems.jsonl", [row])
    asking = spec(world, probes={"target": {"path": "code", "data": {"humaneval": str(file)}}})
    if not protection().complete:
        with pytest.raises(EvaluationError, match="cannot be run safely"):
            prepare(asking)
        return
    (probe,) = prepare(asking).data.exams["target"]
    assert (probe.name, probe.skill, probe.metric) == ("target/accuracy", "humaneval", "pass@1")
    assert probe.read_base().scores[0].value == 0
    assert metric_of(code_exam("humaneval", [problem], probe.exam.engine)) == "pass@1"


# Parts of one probe


class Fixed(ShareProbe):
    def __init__(self, model: Any, skill: str, values: list[float]) -> None:
        super().__init__("source/choice", [(skill, f"{skill}{i}") for i in range(len(values))], model)
        self.values = values

    def right(self) -> Any:
        return pd.Series(self.values, dtype=float).to_numpy()


def test_parts_are_read_side_by_side_and_skills_weigh_alike(world):
    model = prepare(spec(world)).base.model
    parts = [Fixed(model, "a", [1, 1, 0, 1]), Fixed(model, "b", [0, 0.5])]
    both = Together("source/choice", parts)
    base = both.read_base()
    assert {score.name: score.value for score in base.scores} == {
        "source/choice": 0.5,
        "source/a/choice": 0.75,
        "source/b/choice": 0.25,
    }
    parts[1].values = [1, 0.5]
    after: Reading = both.read(3)
    changes = {score.name: score.value for score in after.scores if score.name.endswith("_change")}
    assert changes == {"source/choice_change": 0.25, "source/a/choice_change": 0, "source/b/choice_change": 0.5}
    assert [row["right"] for row in after.items] == [1, 1, 0, 1, 1, 0.5]
    assert [row["prompt"] for row in after.items] == ["a0", "a1", "a2", "a3", "b0", "b1"]


def test_of_several_metrics_the_one_that_says_what_is_right_is_taken(world):
    prepared = prepare(spec(world, probes=[forgetting(world)]))
    engine = TextEngine(prepared.objective.head, prepared.base.tokenizer)
    found = {probe.skill: probe for probe in prepared.data.exams["source"]}
    metrics = {name: ExamProbe("source", probe.exam, engine).metric for name, probe in found.items()}
    assert metrics == {"hellaswag": "acc_norm", "arc_challenge": "acc_norm", "winogrande": "acc"}
    assert ExamProbe("source", found["hellaswag"].exam, engine, "acc").metric == "acc"
