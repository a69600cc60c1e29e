"""Suites, programs and the pocket world: what each asks and how it is judged."""

from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from exam_world import WORDS, make_exam_world
from little_world import write_rows
from loralab.base.model import load
from loralab.evals.catalogue import load_tasks
from loralab.evals.code import CodeProblem
from loralab.evals.exam import Card, Outcome
from loralab.evals.exams import code_exam
from loralab.evals.generate import Answer
from loralab.evals.suites import OWN_TASKS, SUITES
from loralab.evals.taskfiles import Wanted
from loralab.evals.texts import TextEngine
from loralab.lab.evaluate import evaluate
from loralab.lab.judge import Judged, curves_of, diversity_of
from loralab.training.loss import LanguageHead


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    return make_exam_world(tmp_path_factory.mktemp("exams"))


def asked(world: Path, tasks: list[str], deltas=(), **more: Any):
    return evaluate(str(world / "base"), tasks, deltas=[str(world / name) for name in deltas], device="cpu", **more)


# Suites


def forgetting_data(folder: Path) -> dict[str, str]:
    hellaswag = [
        {
            "activity_label": "Walking",
            "ctx_a": f"a man is {w}.",
            "ctx_b": "he",
            "endings": [f"is {v}" for v in WORDS[i : i + 4]],
            "label": str(i % 4),
        }
        for i, w in enumerate(WORDS[:6])
    ]
    arc = [
        {
            "question": f"what is {w}?",
            "choices": {"text": WORDS[i : i + 3], "label": ["A", "B", "C"]},
            "answerKey": "ABC"[i % 3],
        }
        for i, w in enumerate(WORDS[:5])
    ]
    wino = [
        {"sentence": f"the {w} saw the hat so _ ran.", "option1": w, "option2": "hat", "answer": str(1 + i % 2)}
        for i, w in enumerate(WORDS)
    ]
    files = {"hellaswag": hellaswag, "arc_challenge": arc, "winogrande": wino}
    return {name: str(write_rows(folder / f"{name}.jsonl", found)) for name, found in files.items()}


def test_forgetting_is_the_unweighted_mean_of_its_three_tasks(world, tmp_path):
    found = asked(world, ["forgetting"], ["lora", "full"], data=forgetting_data(tmp_path))
    names = ["hellaswag/acc_norm", "arc_challenge/acc_norm", "winogrande/acc"]
    assert found.facts["suites"] == {"forgetting": names}
    for model in found.models:
        parts = [found.find(model, name) for name in names]
        mean = found.find(model, "forgetting")
        assert [part.score.n for part in parts] == [6, 5, 10] and mean.score.n == 21 and mean.is_suite
        assert mean.score.value == pytest.approx(sum(part.score.value for part in parts) / 3)
        error = sum(part.score.standard_error**2 for part in parts) ** 0.5 / 3
        assert mean.score.standard_error == pytest.approx(error)
        assert all(part.fewshot == 0 for part in parts)
        if model != "base":
            assert mean.change["value"] == pytest.approx(sum(part.change["value"] for part in parts) / 3)
    assert found.find("base", "hellaswag/acc") is not None, "other metrics are shown beside it"


def test_a_task_that_is_asked_twice_is_taken_once(world, tmp_path):
    data = forgetting_data(tmp_path)
    once, twice = (
        asked(world, tasks, data=data) for tasks in (["forgetting"], ["hellaswag", "forgetting", "hellaswag"])
    )
    assert sorted(one.name for one in once.measured) == sorted(one.name for one in twice.measured)
    assert len(once.items) == len(twice.items)
    assert once.find("base", "forgetting").score == twice.find("base", "forgetting").score
    assert once.facts["cost"]["forwards"] == twice.facts["cost"]["forwards"]


MEZO = {
    "sst2": (
        {"sentence": "a fine film ", "label": 1},
        ("a fine film It was", [" terrible", " great"], " great"),
    ),
    "rte": (
        {"premise": "A dog ran.", "hypothesis": "A dog moved.", "label": 0},
        ('A dog ran.\nDoes this mean that "A dog moved." is true? Yes or No?\n', ["Yes", "No"], "Yes"),
    ),
    "cb": (
        {"premise": "A dog ran.", "hypothesis": "A dog sat.", "label": 1},
        ('Suppose A dog ran. Can we infer that "A dog sat."? Yes, No, or Maybe?\n', ["Yes", "No", "Maybe"], "No"),
    ),
    "boolq": (
        {"passage": "Dogs bark.", "question": "do dogs bark", "label": 1},
        ("Dogs bark. Do dogs bark?", [" No", " Yes"], " Yes"),
    ),
    "wsc": (
        {"text": "Tom saw Ed and He ran.", "span1_text": "Tom", "span2_text": "He", "label": 0},
        (
            'Tom saw Ed and He ran.\nIn the previous sentence, does the pronoun "he" refer to Tom? Yes or No?\n',
            ["No", "Yes"],
            "No",
        ),
    ),
    "wic": (
        {"word": "bank", "sentence1": "A river bank.", "sentence2": "A bank pays.", "label": 0},
        (
            'Does the word "bank" have the same meaning in these two sentences? Yes, No?\nA river bank.\nA bank pays.\n',
            ["No", "Yes"],
            "No",
        ),
    ),
    "multirc": (
        {"paragraph": "Dogs bark.", "question": "Who barks?", "answer": "dogs", "label": 1},
        (
            'Dogs bark.\nQuestion: Who barks?\nI found this answer "dogs". Is that correct? Yes or No?\n',
            ["No", "Yes"],
            "Yes",
        ),
    ),
}
"""A row of each task, and by hand what MeZO's templates (Malladi et al. 2023, 2305.17333, table 14) make of it."""


@pytest.fixture(scope="module")
def pocket() -> TextEngine:
    base = load("pocket", device="cpu")
    return TextEngine(LanguageHead(base.model), base.tokenizer)


@pytest.mark.parametrize("name", MEZO)
def test_prompts_of_the_seven_tasks_are_mezos(pocket, tmp_path, name):
    row, (prompt, answers, right) = MEZO[name]
    file = write_rows(tmp_path / "rows.jsonl", [row, row])
    wanted = Wanted(f"mezo_{name}", data={"test": str(file)}, include=(OWN_TASKS,))
    (task,) = load_tasks([wanted], pocket)
    assert [instance.args for instance in task.instances[: len(answers)]] == [(prompt, answer) for answer in answers]
    for taken in answers:
        scored = [(-1.0 if answer == taken else -9.0, False) for answer in answers]
        assert [outcome.values["acc"] for outcome in task.judged(scored * 2)] == [float(taken == right)] * 2


def test_the_seven_tasks_are_one_suite(world, tmp_path):
    parts = SUITES["superglue"].parts
    assert set(parts) == {f"mezo_{name}" for name in MEZO}
    data = {f"mezo_{name}": str(write_rows(tmp_path / f"{name}.jsonl", [row] * 2)) for name, (row, _) in MEZO.items()}
    found = evaluate("pocket", ["superglue"], data=data, device="cpu")
    mean = sum(found.find("base", f"{part}/acc").score.value for part in parts) / 7
    assert found.find("base", "superglue").score.value == pytest.approx(mean)


# Programs


def problems() -> list[dict[str, str]]:
    return [
        {
            "task_id": f"T/{i}",
            "prompt": f'def add{i}(x):\n    """Add {i}."""\n',
            "canonical_solution": f"    return x + {i}\n",
            "test": f"def check(candidate):\n    assert candidate(1) == {1 + i}\n",
            "entry_point": f"add{i}",
        }
        for i in range(3)
    ]


def test_programs_of_a_base_that_knows_none_fail(tmp_path):
    file = write_rows(tmp_path / "he.jsonl", problems())
    found = evaluate("pocket", ["code"], data={"humaneval": str(file)}, limit=2, device="cpu")
    one = found.find("base", "humaneval/pass@1")
    assert (one.score.value, one.score.n) == (0.0, 2) and found.curves == []
    assert found.find("base", "code").score.value == 0.0
    outputs = [row["base_output"] for row in found.items]
    assert all(isinstance(text, str) for text in outputs)
    assert [row["reference"] for row in found.items] == [row["canonical_solution"] for row in problems()[:2]]


class Scribe:
    """Writes what it was told to: for each view, for each prompt, its samples."""

    def __init__(self, texts: list[list[list[str]]]) -> None:
        self.texts = texts

    def write(self, prompts, *, sampling, samples, views):
        assert len(views) == len(self.texts) and all(len(mine) == samples for view in self.texts for mine in view)
        return [[[Answer([1], text, "stop", None) for text in mine] for mine in view] for view in self.texts]


def test_canonical_solutions_pass_and_others_do_not(pocket):
    asked = [CodeProblem(**row) for row in problems()]
    right = [[row["canonical_solution"]] for row in problems()]
    wrong = [[mine[0].replace("+", "-")] for mine in right]
    exam = code_exam("humaneval", asked, pocket)
    exam.engine = type("Stub", (), {"writer": Scribe([right, [wrong[0], wrong[1], right[2]]])})()
    found = exam.outcomes([nullcontext, nullcontext])
    assert [[outcome.values["pass@1"] for outcome in view] for view in found] == [
        [1, 1, 1],
        [1, 0, 1],
    ]  # x + 0 is x - 0
    assert [outcome.output for outcome in found[1]] == [wrong[0][0], wrong[1][0], right[2][0]]
    changed = [replace(asked[0], test="def check(candidate):\n    pass\n"), *asked[1:]]
    assert code_exam("humaneval", changed, pocket).card.template_hash != exam.card.template_hash


def test_several_samples_give_curves_and_counts_of_distinct_programs(pocket):
    asked = [CodeProblem(**row) for row in problems()[1:]]
    good, bad = ([row["canonical_solution"] for row in problems()[1:]], ["    return x\n", "    return None\n"])
    samples = [[good[0], good[0], bad[0], bad[1]], [bad[0], bad[0], bad[0], bad[1]]]
    exam = code_exam("humaneval", asked, pocket, samples=4)
    exam.engine = type("Stub", (), {"writer": Scribe([samples])})()
    outcomes = exam.outcomes([nullcontext])
    assert [outcome.values["pass@1"] for outcome in outcomes[0]] == [0.5, 0.0]
    curve = curves_of("humaneval", ["base"], outcomes)
    assert [row["k"] for row in curve] == [1, 2, 3, 4]
    expected = [0.25, (1 - 1 / 6) / 2, 0.5, 0.5]  # 1 − C(2, k) / C(4, k) of the first, nothing of the second
    assert [row["pass_at_k"] for row in curve] == pytest.approx(expected)
    counts = {row["kind"]: row["distinct"] for row in diversity_of("humaneval", ["base"], outcomes)}
    assert counts == pytest.approx({"all": (3 + 2) / 2, "passing": 0.5, "failing": 2.0})


# The pocket world and files of rows


def test_pocket_suites_are_asked_skill_by_skill():
    found = evaluate("pocket", ["pocket:source"], limit=3, device="cpu")
    skills = {name.partition("/")[0] for name in found.names() if "/" in name}
    assert len(skills) == 10
    mean = found.find("base", "pocket:source by accuracy")
    parts = [found.find("base", f"{skill}/accuracy").score.value for skill in skills]
    assert mean.score.value == pytest.approx(sum(parts) / 10) and mean.score.value > 0.5
    assert all(found.find("base", name).score.n == 3 for name in found.names() if "/" in name)


def test_pocket_programs_are_sampled_and_graded():
    found = evaluate("pocket", ["pocket:calc", "pocket:stack"], samples=3, limit=4, device="cpu")
    assert {row["task"] for row in found.curves} == {"calc", "stack"}
    assert len(found.curves) == 2 * 3 and {row["samples"] for row in found.diversity} == {3}
    assert found.find("base", "calc/pass@1").score.n == 4
    greedy = evaluate("pocket", ["pocket:calc"], limit=4, device="cpu")
    assert greedy.curves == [] and greedy.find("base", "calc/accuracy").score.n == 4
    again = evaluate("pocket", ["pocket:calc"], samples=3, limit=4, device="cpu", seed=0)
    assert again.curves == [row for row in found.curves if row["task"] == "calc"]


# Judging


def test_judging_does_not_grow_faster_than_the_items():
    class Counting:
        def __init__(self, items: int) -> None:
            self.count, self.card, self.asked = items, Card("t", chances=(0.25,) * items), 0

        def items(self):
            return (("prompt", "reference") for _ in range(self.count))

        def aggregate(self, metric, values):
            self.asked += 1
            return sum(values) / len(values)

    asked = []
    for items in (10, 100):
        outcomes = [[Outcome({"acc": float((i + k) % 3 == 0)}) for i in range(items)] for k in range(3)]
        exam = Counting(items)
        judged = Judged(exam, "acc", ["base", "a", "b"], outcomes)
        assert len(list(judged.measured())) == 3 and len(list(judged.rows(outcomes))) == 2 * items
        asked.append(exam.asked)
    assert asked[0] == asked[1], "the values are put together as often, however many items there are"
