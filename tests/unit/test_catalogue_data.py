"""Tasks of the catalogue on local files, and what cannot be asked: unknown names, data that do not fit."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from catalogue_world import PLAIN, WORDS, made_engine, made_peer, make_tasks, one
from lm_eval.models.huggingface import HFLM

from little_world import write_rows
from loralab.errors import DataError, EvaluationError
from loralab.evals.catalogue import load_tasks
from loralab.evals.taskfiles import Wanted, quiet
from loralab.evals.texts import TextEngine


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return make_tasks(tmp_path_factory.mktemp("own"))


@pytest.fixture(scope="module")
def engine() -> TextEngine:
    return made_engine()


@pytest.fixture(scope="module")
def peer() -> HFLM:
    return made_peer()


# Tasks of the catalogue itself


def hellaswag_rows(count: int) -> list[dict[str, Any]]:
    rng = np.random.default_rng(5)
    return [
        {
            "ind": i,
            "activity_label": "Walking [title] home",
            "ctx_a": "A man is here.",
            "ctx_b": "the dog",
            "ctx": "A man is here. the dog",
            "endings": [" ".join(rng.choice(WORDS, 3)) for _ in range(4)],
            "source_id": f"x~{i}",
            "split": "val",
            "split_type": "indomain",
            "label": str(i % 4),
        }
        for i in range(count)
    ]


def test_hellaswag_runs_on_a_local_file(engine, peer, tmp_path):
    file = write_rows(tmp_path / "val.jsonl", hellaswag_rows(12))
    task = one(engine, "hellaswag", data={"test": str(file)})
    prompt, reference = next(task.items())
    assert prompt == "Walking. home: A man is here. The dog"
    assert reference == hellaswag_rows(1)[0]["endings"][0]
    assert task.card.chances == (0.25,) * 12 and task.card.version == "1.0"
    (outcomes,) = task.outcomes(PLAIN)
    with quiet():
        theirs = task.judged(peer.loglikelihood(task.instances, disable_tqdm=True))
    assert [outcome.values for outcome in outcomes] == [outcome.values for outcome in theirs]
    assert set(outcomes[0].values) == {"acc", "acc_norm"}
    endings = {str(one.args[1]).strip() for one in task.instances}
    assert all({outcome.answer("acc"), outcome.answer("acc_norm")} <= endings for outcome in outcomes)


def test_gsm8k_takes_its_examples_from_a_training_file(engine, tmp_path):
    rows = [{"question": f"{i}+1?", "answer": f"Add one.\n#### {i + 1}"} for i in range(8)]
    data = {
        "test": str(write_rows(tmp_path / "t.jsonl", rows[:3])),
        "train": str(write_rows(tmp_path / "r.jsonl", rows[3:])),
    }
    task = one(engine, "gsm8k", data=data)
    assert task.card.fewshot == 5 and next(task.items())[0].count("Question:") == 6
    judged = task.judged(["so\n#### 1", "it is 2.", "nothing"])
    assert [outcome.values for outcome in judged] == [
        {"exact_match:strict-match": 1.0, "exact_match:flexible-extract": 1.0},
        {"exact_match:strict-match": 0.0, "exact_match:flexible-extract": 1.0},
        {"exact_match:strict-match": 0.0, "exact_match:flexible-extract": 0.0},
    ]
    assert [outcome.output for outcome in judged] == ["so\n#### 1", "it is 2.", "nothing"]


def test_winogrande_scores_what_follows_each_beginning(engine, tmp_path):
    rows = [{"sentence": "The dog saw the cat so _ ran.", "option1": "dog", "option2": "cat", "answer": "2"}] * 2
    task = one(engine, "winogrande", data={"test": str(write_rows(tmp_path / "w.jsonl", rows))})
    assert [i.args for i in task.instances[:2]] == [
        ("The dog saw the cat so dog", " ran."),
        ("The dog saw the cat so cat", " ran."),
    ]
    assert task.card.chances == (0.5, 0.5)
    (outcomes,) = task.outcomes(PLAIN)
    assert set(outcomes[0].values) == {"acc"}


# Bad input


def test_tasks_that_run_code_unprotected_are_refused(engine, folder):
    with pytest.raises(EvaluationError, match="without protection") as caught:
        one(engine, "own_unsafe", folder)
    assert "--unsafe" in str(caught.value)
    (task,) = load_tasks([Wanted("own_unsafe", include=(str(folder),))], engine, unsafe=True)
    assert len(task) == len(WORDS)


def test_a_missing_folder_of_tasks_is_named(engine, tmp_path):
    with pytest.raises(EvaluationError, match="no such folder of tasks"):
        one(engine, "own_choice", tmp_path / "none")


BAD_DATA = {
    "no file": ("none.jsonl", None, "no such file"),
    "another type": ("rows.txt", "a", "type '.txt' cannot be read"),
    "no rows": ("rows.jsonl", "", "data do not fit|no rows"),
    "no JSON": ("rows.jsonl", "{not json\n", "data do not fit"),
    "other columns": ("rows.jsonl", '{"question": "a", "choices": ["b", "c"]}\n', "asked|right"),
}


@pytest.mark.parametrize("case", BAD_DATA)
def test_data_that_do_not_fit_are_refused(engine, folder, tmp_path, case):
    name, text, words = BAD_DATA[case]
    file = tmp_path / name
    if text is not None:
        file.write_text(text, encoding="utf-8")
    with pytest.raises(DataError, match=words) as caught:
        one(engine, "own_choice", folder, data={"test": str(file)})
    said = str(caught.value)
    assert str(file) in said
    if case == "other columns":
        assert "question, choices" in said, "the columns that there are"


def test_a_split_that_the_task_does_not_have_is_refused(engine, folder):
    file = str(folder / "train.jsonl")
    with pytest.raises(EvaluationError, match="no split 'trian'") as caught:
        one(engine, "own_choice", folder, data={"test": file, "trian": file})
    assert "train" in str(caught.value.fix)


def test_a_group_takes_no_files(engine, folder):
    with pytest.raises(EvaluationError, match="only a single task"):
        one(engine, "own_group", folder, data={"test": str(folder / "test.jsonl")})


def test_data_that_cannot_be_fetched_are_said_with_what_to_do(engine):
    with pytest.raises(DataError, match="cannot be had") as caught:
        one(engine, "arc_challenge")
    assert "--data arc_challenge=FILE" in str(caught.value)


def test_nothing_is_said_between_our_lines(engine, folder, capfd):
    for name in ("own_choice", "own_written", "own_rolling"):
        one(engine, name, folder, limit=2).outcomes(PLAIN)
    said = capfd.readouterr()
    assert (said.out, said.err) == ("", "")


def test_examples_never_come_from_the_evaluated_file(engine, tmp_path):
    rows = [{"question": f"{i} and {i}?", "answer": f"{2 * i} #### {2 * i}"} for i in range(8)]
    tested, taught = (write_rows(tmp_path / f"{name}.jsonl", rows[k::2]) for k, name in enumerate(("test", "train")))
    with pytest.raises(DataError, match="come from the evaluated file") as caught:
        one(engine, "gsm8k", data={"test": str(tested)}, fewshot=2)
    assert "--data gsm8k:train=FILE" in str(caught.value)
    task = one(engine, "gsm8k", data={"test": str(tested), "train": str(taught)}, fewshot=2)
    for prompt, reference in task.items():
        assert prompt.count("####") == 2 and reference not in prompt


def test_what_was_taken_depends_on_the_metric(engine, tmp_path):
    """Of the pocket base, one letter is likelier than a long text, and the long text likelier for its length."""
    row = hellaswag_rows(1)[0] | {"endings": ["a", "the dog is here and the man", "b", "c"]}
    task = one(engine, "hellaswag", data={"test": str(write_rows(tmp_path / "val.jsonl", [row]))})
    found = task.judged([(-9.0, False), (-10.0, False), (-30.0, False), (-30.0, False)])[0]
    assert (found.answer("acc"), found.answer("acc_norm")) == ("a", "the dog is here and the man")
    assert found.answer("brier_score") is None
