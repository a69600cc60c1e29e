"""Tasks of the catalogue and suites as probes of a run: named in a recipe, looked for first, then built."""

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from loralab.errors import DataError, EvaluationError
from loralab.evals.exam_probe import ExamProbe
from loralab.evals.suites import SUITES
from loralab.evals.texts import TextEngine
from loralab.lab.evaluate import exams_of
from loralab.lab.questions import Questions, refuse_before_loading
from loralab.spec.spec import TaskSpec

PROBED_ITEMS = 200
"""Of each task, unless the recipe says how many: a probe is taken again and again."""


def look_for_exams(role: str, task: TaskSpec) -> None:
    """Look whether a task of the catalogue or a suite can be asked, before anything is loaded.

    Raises:
        EvaluationError: there is no such task, or its programs cannot be run here.
        DataError: a file or folder of it is missing, or of a type that cannot be read.
    """
    with _in_the_words_of_a_recipe(role):
        refuse_before_loading(_questions(task))


def exam_probes(role: str, tasks: Sequence[TaskSpec], engine: TextEngine) -> list[ExamProbe]:
    """Build the probes of a role's suites and tasks of the catalogue; one that comes again counts once.

    Raises:
        LoralabError: the data cannot be had or lack columns; a task has no share of right items; two tasks of one name.
    """
    found: dict[str, ExamProbe] = {}
    for task in tasks:
        with _in_the_words_of_a_recipe(role):
            for exam in exams_of(_questions(task), engine)[task.path]:
                wanted = SUITES[task.path].parts.get(exam.card.name) if task.path in SUITES else None
                probe = ExamProbe(role, exam, engine, wanted)
                same = found.setdefault(probe.skill, probe)
                if same.facts != probe.facts:
                    fix = "ask it in one way: the same files, examples, metric and number of items"
                    raise EvaluationError(f"{probe.skill} is asked in two ways", where=task.path, fix=fix)
    return list(found.values())


def _questions(task: TaskSpec) -> Questions:
    return Questions([task.path], task.items or PROBED_ITEMS, task.fewshot, task.data, task.include)


@contextmanager
def _in_the_words_of_a_recipe(role: str) -> Iterator[None]:
    """Say what `loralab evaluate` says of its options as a recipe's keys."""
    try:
        yield
    except (DataError, EvaluationError) as error:
        where = error.where if error.where and not error.where.startswith("--") else None
        fix = re.sub(r"--data (\S+)=FILE", rf"probes.{role} with data: {{\1: FILE}}", error.fix or "")
        fix = fix.replace(", or say --unsafe", "")
        place = f"probes.{role}" if where is None else f"probes.{role}, {where}"
        raise type(error)(error.what, where=place, fix=fix or None) from error
