"""What edits of a delta are measured on: tasks or a text to be learned, tasks or a text to be kept; laid out once.

Exams and texts are built before anything is measured, and walked over once for as many views as are given at a time.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
from jaxtyping import Float, Int
from numpy import ndarray

from loralab.base.corpus import Corpus, tokenise
from loralab.base.model import Base
from loralab.base.sources import Source, local_files
from loralab.delta.several import View
from loralab.errors import DataError, EvaluationError
from loralab.evals.drift import NATS, TextProbe
from loralab.evals.exam import Exam
from loralab.evals.exam_probe import metric_of
from loralab.evals.exams import ItemExam
from loralab.evals.probe import side_by_side
from loralab.evals.stats import SHARE
from loralab.evals.suites import SUITES
from loralab.evals.texts import TextEngine
from loralab.lab.evaluate import exams_of
from loralab.lab.questions import Questions, refuse_before_loading
from loralab.lab.tradeoff import Part, Side
from loralab.pocket import world
from loralab.training.loss import NO_TARGET, LanguageHead

TEXT_TOKENS = 65_536
"""Most tokens of a text that are read, unless asked otherwise."""
TEXT_LENGTH = 1024
"""Most tokens of a document, or of a piece of it."""


@dataclass(frozen=True)
class Wanted:
    """What one side is asked: names as `Questions` takes them, or a text (a file of rows or of plain text, or pocket:NAME)."""

    tasks: Sequence[str] = ()
    text: str | None = None


@dataclass(frozen=True)
class Plan:
    """What both sides are asked, and how.

    Attributes:
        target: to be learned.
        source: to be kept.
        tokens: most of each text.
        asked: further fields of `Questions`: limit, fewshot, data, include, chat, samples, …
    """

    target: Wanted
    source: Wanted
    tokens: int = TEXT_TOKENS
    asked: dict[str, Any] = field(default_factory=dict)

    @property
    def questions(self) -> Questions | None:
        """What the tasks of both sides are asked; None where both sides are texts."""
        names = [*self.target.tasks, *self.source.tasks]
        return Questions(names, **self.asked) if names else None

    def facts(self) -> dict[str, Any]:
        """Give plain values of what is asked."""
        texts = {"target_text": self.target.text, "source_text": self.source.text, "tokens": self.tokens}
        return {"target": list(self.target.tasks), "source": list(self.source.tasks), **texts, **self.asked}

    def refuse_before_loading(self) -> None:
        """Look whether all of it can be meant, before a model is loaded.

        Raises:
            EvaluationError: a side has neither tasks nor a text, or both; a name stands on both sides; a task is unknown.
            DataError: a file is missing, or the target's text is of the pocket world's training rows.
        """
        for name, side in (("target", self.target), ("source", self.source)):
            if bool(side.tasks) == bool(side.text):
                what = "both tasks and a text are" if side.text else "neither tasks nor a text is"
                fix = f"write --{name} TASKS, or --{name}-text FILE"
                raise EvaluationError(f"{what} named as the {name}", where=f"--{name}", fix=fix)
            if side.text:
                local_files(Source(side.text))
        if self.target.text and world.is_address(self.target.text):
            split = world.parse(self.target.text).split
            if split in (None, "train"):
                fix = f"write {world.SCHEME}:{world.parse(self.target.text).name}/validation"
                raise DataError("training rows do not show what was learned", where=self.target.text, fix=fix)
        both = set(self.target.tasks) & set(self.source.tasks)
        if both or (self.target.text and self.target.text == self.source.text):
            name = sorted(both)[0] if both else str(self.target.text)
            fix = "name as the source what is to be kept"
            raise EvaluationError("this is named as target and as source", where=name, fix=fix)
        if self.tokens < 2:
            raise EvaluationError(f"a text of {self.tokens} tokens cannot be read", where="--tokens", fix="read more")
        if self.questions is not None:
            refuse_before_loading(self.questions)


class _Measure(Protocol):
    """One task or text: values of every item in every view, and what they are divided by."""

    name: str
    unit: str
    sign: int
    weights: Float[ndarray, " items"]
    clusters: Int[ndarray, " items"] | None

    def take(self, views: Sequence[View]) -> Float[ndarray, "views items"]: ...


class _OfExam:
    sign, unit = 1, SHARE
    clusters: Int[ndarray, " items"] | None = None

    def __init__(self, exam: Exam, metric: str) -> None:
        self.exam, self.metric, self.name = exam, metric, f"{exam.card.name}/{metric}"
        self.weights = np.ones(sum(1 for _ in exam.items()))

    def take(self, views: Sequence[View]) -> Float[ndarray, "views items"]:
        return np.array([[float(one.values[self.metric]) for one in mine] for mine in self.exam.outcomes(views)])


class _OfText:
    sign, unit = -1, NATS

    def __init__(self, name: str, corpus: Corpus, head: LanguageHead, tokens: int) -> None:
        chosen = _chosen(corpus, tokens)
        device = next(head.model.parameters()).device
        batches = side_by_side([corpus[i] for i in chosen], together=head.packs)
        self.name, self._probe = f"{name}/loss", TextProbe(name, [batch.to(device) for batch in batches], head)
        counts = [int((part != NO_TARGET).sum()) for b in batches for part in b.targets[0].split(list(b.lengths))]
        self.weights = np.array(counts, float)
        # Pieces of one row move together; a text that is one row is many documents in all but name.
        keys = corpus.keys[chosen]
        self.clusters = np.unique(keys, return_inverse=True)[1] if len(set(keys.tolist())) > 1 else None

    def take(self, views: Sequence[View]) -> Float[ndarray, "views items"]:
        found = []
        for view in views:
            with view():
                found.append([row["loss_sum"] for row in self._probe.read().items])
        return np.array(found)


def _chosen(corpus: Corpus, most_tokens: int) -> list[int]:
    """Choose documents with something to predict, in a fixed random order, up to `most_tokens` (at least one)."""
    chosen: list[int] = []
    total = 0
    for i in np.random.default_rng(0).permutation(len(corpus)).tolist():
        if not corpus[i].labelled[1:].any():
            continue
        total += len(corpus[i])
        if chosen and total > most_tokens:
            break
        chosen.append(i)
    return chosen


class Sides:
    """Both sides, laid out for one model, and what was measured so far: the base first, then edit after edit.

    Args:
        base: as loaded, not wearing anything.
        plan: what is asked.

    Raises:
        LoralabError: data that cannot be had, do not fit or hold no items; a task that does not say how many items are right.
    """

    def __init__(self, base: Base, plan: Plan) -> None:
        assert base.tokenizer is not None
        self._head = LanguageHead(base.model)
        self.engine = TextEngine(self._head, base.tokenizer)
        exams = exams_of(plan.questions, self.engine) if plan.questions is not None else {}
        self._measures: dict[str, list[_Measure]] = {}
        for name, side in (("target", plan.target), ("source", plan.source)):
            if side.text:
                corpus = tokenise([Source(side.text)], base.tokenizer, max_length=min(self.engine.window, TEXT_LENGTH))
                self._measures[name] = [_OfText(name, corpus, self._head, plan.tokens)]
            else:
                found = {m.name: m for task in side.tasks for m in _of_task(task, exams[task])}
                self._measures[name] = list(found.values())
        target, source = ({m.name for m in measures} for measures in self._measures.values())
        if both := sorted(target & source):
            fix = "name as the source what is to be kept"
            raise EvaluationError("the same items are on both sides", where=both[0], fix=fix)
        self._taken: dict[str, list[ndarray]] = {m.name: [] for mine in self._measures.values() for m in mine}

    def take(self, views: Sequence[View]) -> None:
        """Measure everything in further views: walk once over the data for all of them."""
        for measure in (m for mine in self._measures.values() for m in mine):
            self._taken[measure.name] += list(measure.take(views))

    def finite(self) -> list[bool]:
        """Tell of every view measured so far whether all that was measured is a number."""
        return [all(np.isfinite(values).all() for values in row) for row in zip(*self._taken.values(), strict=True)]

    def of(self, views: Sequence[int]) -> tuple[Side, Side]:
        """Give target and source for some of the views measured so far, by their places; the first of all is the base."""
        return self._side("target", views), self._side("source", views)

    def _side(self, name: str, views: Sequence[int]) -> Side:
        parts = []
        for m in self._measures[name]:
            rows = self._taken[m.name]
            parts.append(Part(m.name, rows[0], np.array([rows[i] for i in views]), m.weights, m.sign, m.clusters))
        return Side(parts, self._measures[name][0].unit)


def _of_task(task: str, exams: Sequence[Exam]) -> list[_Measure]:
    """Choose of each exam of a task the metric that says which items are right.

    A suite says which. Items of our own that have an exact answer and choices are asked once: in the pocket world by the answer,
    as only one text is right; in a file by the choices, if every item has some.
    """
    found: list[_Measure] = []
    for exam in exams:
        if isinstance(exam, ItemExam):
            if _asked_otherwise(task, exam, exams):
                continue
            metric = exam.metric
        else:
            wanted = SUITES[task].parts.get(exam.card.name) if task in SUITES else None
            metric = wanted or _metric_of(exam)
        found.append(_OfExam(exam, metric))
    return found


def _asked_otherwise(task: str, exam: ItemExam, exams: Sequence[Exam]) -> bool:
    twins = [e for e in exams if isinstance(e, ItemExam) and e is not exam and e.card.name == exam.card.name]
    if not twins:
        return False
    both_of_all = len(list(exam.items())) == len(list(twins[0].items()))
    by_choice = both_of_all and not world.is_address(task)
    return (exam.metric == "choice") is not by_choice


def _metric_of(exam: Exam) -> str:
    try:
        return metric_of(exam)
    except EvaluationError as error:
        fix = (error.fix or "").partition(";")[0]
        raise EvaluationError(error.what, where=error.where, fix=f"{fix}; of a text, name --source-text FILE") from None
