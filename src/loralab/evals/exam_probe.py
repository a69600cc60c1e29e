"""Exams as probes: tasks of the catalogue and programs, their requests built once, taken again and again in training."""

from contextlib import nullcontext
from typing import Any

import numpy as np
from jaxtyping import Float
from numpy import ndarray

from loralab.errors import EvaluationError
from loralab.evals.catalogue import CatalogueTask
from loralab.evals.exam import Exam
from loralab.evals.exams import text_hash
from loralab.evals.shares import ShareProbe
from loralab.evals.texts import TextEngine

PREFERRED = ("acc_norm", "acc", "exact_match", "em", "pass@1")
"""Metrics that say which items are right, the one to be taken first."""


class ExamProbe(ShareProbe):
    """Share of an exam's items that are right by one of its metrics; it is one skill, named as the exam.

    Args:
        role: `target` or `source`.
        exam: as it was built.
        engine: that answers it.
        metric: None takes the first of `PREFERRED` that it has.

    Raises:
        EvaluationError: no metric of the exam says which items are right.
    """

    def __init__(self, role: str, exam: Exam, engine: TextEngine, metric: str | None = None) -> None:
        card = exam.card
        self.exam, self.metric = exam, metric or metric_of(exam)
        self.skill = card.name.replace("/", "-")  # slashes divide the names of scores
        measure = "accuracy" if card.chances is None else "choice"
        asked = [(self.skill, prompt) for prompt, _ in exam.items()]
        super().__init__(f"{role}/{measure}", asked, engine.head.model)

    def right(self) -> Float[ndarray, " items"]:
        (outcomes,) = self.exam.outcomes([nullcontext])
        return np.array([float(outcome.values[self.metric]) for outcome in outcomes])

    @property
    def facts(self) -> dict[str, Any]:
        """Tell what was asked, so that another evaluation can be told to be the same."""
        card = self.exam.card
        return {
            "metric": self.metric,
            "version": card.version,
            "fewshot": card.fewshot,
            "prompt_hash": card.prompt_hash,
            "reference_hash": text_hash([reference for _, reference in self.exam.items()]),
            "template_hash": card.template_hash,
            "n": len(self.asked),
        }


def metric_of(exam: Exam) -> str:
    """Choose the metric that says which items are right. Raises EvaluationError where there is none."""
    known = _metrics(exam)
    shares = [metric for metric in known if _is_mean(exam, metric)]
    for wanted in PREFERRED:
        for metric in shares:
            if metric.partition(":")[0] == wanted:
                return metric
    raise EvaluationError(
        f"{exam.card.name} is measured by {', '.join(known) or 'nothing'}, which does not say how many items are right",
        where=exam.card.name,
        fix=f"take a task measured by one of {', '.join(PREFERRED)}; forgetting on text is watched by data.general",
    )


def _metrics(exam: Exam) -> list[str]:
    """Name the metrics of an exam before it is taken: of a task with several filters, each behind each."""
    if not isinstance(exam, CatalogueTask):
        return ["pass@1"]
    metrics = list(exam.task.aggregation())
    filters = [one["name"] for one in getattr(exam.task.config, "filter_list", None) or ()]
    return [f"{metric}:{name}" for name in filters for metric in metrics] if len(filters) > 1 else metrics


def _is_mean(exam: Exam, metric: str) -> bool:
    try:
        return bool(np.isclose(exam.aggregate(metric, [0.0, 1.0, 1.0]), 2 / 3))
    except Exception:  # of any type: an aggregation of lm-eval's, made for other values
        return False
