"""Outcomes into scores: each model's value with its error, and the paired change of each delta from the base."""

from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any

import numpy as np
from numpy import ndarray

from loralab.evals.code import pass_at_k_curve
from loralab.evals.diversity import diversity_scores
from loralab.evals.exam import Exam, Outcome
from loralab.evals.paired import Change, paired, paired_values, together
from loralab.evals.stats import Score, mean_score
from loralab.lab.evaluation import BASE
from loralab.lab.measured import Measured

SHARE = "share of items"
RESAMPLES = 200
PER_UNIT = {"word_perplexity", "byte_perplexity", "bits_per_byte"}
"""Metrics of whole texts: their values are (log p, number of words or bytes)."""


class Judged:
    """One metric of one exam on all models.

    Args:
        exam: that was taken.
        metric: of its outcomes.
        models: `base` first.
        outcomes: models × items.
    """

    def __init__(self, exam: Exam, metric: str, models: Sequence[str], outcomes: Sequence[Sequence[Outcome]]) -> None:
        self.exam, self.metric, self.models = exam, metric, list(models)
        self.name = f"{exam.card.name}/{metric}"
        self._values = [[outcome.values[metric] for outcome in mine] for mine in outcomes]
        self.changes: dict[str, Change | None] = {}
        self._draws: dict[int, ndarray] = {}
        self.scores = {model: self._score(values) for model, values in zip(models, self._values, strict=True)}
        for model, values in zip(models[1:], self._values[1:], strict=True):
            self.changes[model] = self._change(self._values[0], values)

    @cached_property
    def is_right_or_wrong(self) -> bool:
        """Whether each item is either right or wrong."""
        return all(_is_number(v) and float(v) in (0.0, 1.0) for values in self._values for v in values)

    @cached_property
    def is_mean(self) -> bool:
        """Whether the value is the mean over items."""
        if not all(_is_number(v) for values in self._values for v in values):
            return False
        base = self._values[0]
        return bool(np.isclose(self.exam.aggregate(self.metric, base), np.mean([float(v) for v in base])))

    def _score(self, values: list[Any]) -> Score:
        if self.is_mean:
            numbers = np.array([float(value) for value in values])
            unit = SHARE if self.is_right_or_wrong or "pass@" in self.metric else "mean over items"
            return mean_score(self.name, unit, numbers, np.ones(len(numbers)))
        whole = self.exam.aggregate(self.metric, values)
        draws = self._resampled(values)
        spread = float(np.std(draws, ddof=1)) if len(values) > 1 and np.isfinite(draws).all() else None
        return Score(self.name, whole, self.metric.replace("_", " "), len(values), spread)

    def _change(self, base: list[Any], tuned: list[Any]) -> Change:
        if self.is_right_or_wrong:
            return paired(np.array(base, float), np.array(tuned, float), chance=_chance(self.exam, len(base)))
        if self.is_mean:
            return paired_values(np.array(base, float), np.array(tuned, float))
        value = self.exam.aggregate(self.metric, tuned) - self.exam.aggregate(self.metric, base)
        before, after = (self.exam.aggregate(self.metric, values) for values in (base, tuned))
        draws = self._resampled(tuned), self._resampled(base)  # the same items are drawn for both
        if len(base) < 2 or not np.isfinite(draws).all():
            return Change(len(base), before, after, value, None, None, None, None)
        moved = draws[0] - draws[1]
        low, high = np.quantile(moved, (0.025, 0.975))
        ends = (float(low), float(high))
        return Change(len(base), before, after, value, float(np.std(moved, ddof=1)), ends, ends, None)

    def _resampled(self, values: list[Any]) -> ndarray:
        """Put the values of items drawn with replacement together, again and again: once for each model."""
        if id(values) not in self._draws:
            rng = np.random.default_rng(0)
            draws = rng.integers(0, len(values), (RESAMPLES, len(values)))
            found = [_whole(self.exam, self.metric, [values[i] for i in draw]) for draw in draws]
            self._draws[id(values)] = np.array(found)
        return self._draws[id(values)]

    def measured(self) -> Iterator[Measured]:
        """Give the score of each model with its change."""
        card = self.exam.card
        chances = card.chances if self.is_right_or_wrong and card.chances else None
        for model in self.models:
            change = self.changes.get(model)
            yield Measured(
                task=card.name,
                metric=self.metric,
                model=model,
                score=self.scores[model],
                change=None if change is None else change.as_dict(),
                version=card.version,
                fewshot=card.fewshot,
                prompt_hash=card.prompt_hash,
                template_hash=card.template_hash,
                chance=None if chances is None else float(np.mean(chances)),
                higher_is_better=self.metric.partition(":")[0] not in card.worse_if_more,
            )

    def rows(self, outcomes: Sequence[Sequence[Outcome]]) -> Iterator[dict[str, Any]]:
        """Give a row for each delta and item; without deltas, one for each item of the base."""
        pairs = list(zip(self.models, outcomes, strict=True))
        for model, mine in pairs[1:] or pairs:
            for number, ((prompt, reference), before, after) in enumerate(
                zip(self.exam.items(), outcomes[0], mine, strict=True)
            ):
                row: dict[str, Any] = {"probe": self.name, "item": number, "skill": self.exam.card.name}
                row |= {"prompt": prompt, "model": model, "reference": reference}
                row |= {"base_output": before.answer(self.metric)}
                row |= {"tuned_output": after.answer(self.metric) if model != BASE else None}
                yield row | self._measurements(before, after if model != BASE else None)

    def _measurements(self, before: Outcome, after: Outcome | None) -> dict[str, Any]:
        base, tuned = before.values[self.metric], None if after is None else after.values[self.metric]
        if self.metric in PER_UNIT:
            found = {"num_tokens": float(base[1]), "base_loss_sum": -float(base[0])}
            return found if tuned is None else found | {"tuned_loss_sum": -float(tuned[0])}
        if not self.is_mean:
            return {}
        return {"base_right": float(base), "tuned_right": None if tuned is None else float(tuned)}


def _whole(exam: Exam, metric: str, values: list[Any]) -> float:
    """Put drawn items together; NaN where the metric cannot be had of them, as F1 of a single class."""
    try:
        return exam.aggregate(metric, values)
    except Exception:  # of any type: an aggregation of lm-eval's
        return float("nan")


def is_finite(exam: Exam, metric: str, outcomes: Sequence[Sequence[Outcome]]) -> bool:
    """Tell whether a metric is a finite number on all models; the perplexity of a long word may be beyond all floats."""
    return all(np.isfinite(exam.aggregate(metric, [outcome.values[metric] for outcome in mine])) for mine in outcomes)


def _is_number(value: Any) -> bool:
    return isinstance(value, bool | int | float | np.number)


def _chance(exam: Exam, items: int) -> ndarray | None:
    chances = exam.card.chances
    usable = chances is not None and len(chances) == items and all(0 < chance < 1 for chance in chances)
    return np.array(chances) if usable else None


def suite_mean(name: str, parts: Sequence[Judged]) -> Iterator[Measured]:
    """Give the unweighted mean over tasks, each with the metric that counts, as a score of the suite's name."""
    first = parts[0]
    for model in first.models:
        scores = [part.scores[model] for part in parts]
        errors = [score.standard_error for score in scores if score.standard_error is not None]
        error = float(np.hypot.reduce(errors)) / len(parts) if len(errors) == len(parts) else None
        value = sum(score.value for score in scores) / len(parts)
        changes = [change for part in parts if (change := part.changes.get(model)) is not None]
        yield Measured(
            task=name,
            metric="mean",
            model=model,
            score=Score(name, value, scores[0].unit, sum(score.n for score in scores), error),
            change=together(changes).as_dict() if changes else None,
        )


def curves_of(name: str, models: Sequence[str], outcomes: Sequence[Sequence[Outcome]]) -> list[dict[str, Any]]:
    """Give pass@k for every k, where several answers were sampled."""
    rows: list[dict[str, Any]] = []
    for model, mine in zip(models, outcomes, strict=True):
        counted = [(one.samples.n, one.correct) for one in mine if one.samples is not None and one.correct is not None]
        if len(counted) == len(mine) and counted:
            for k, score in enumerate(pass_at_k_curve(counted[0][0], [correct for _, correct in counted]), 1):
                row = {"model": model, "task": name, "k": k, "pass_at_k": score.value}
                rows.append(row | {"standard_error": score.standard_error})
    return rows


def diversity_of(name: str, models: Sequence[str], outcomes: Sequence[Sequence[Outcome]]) -> list[dict[str, Any]]:
    """Give the distinct answers among the samples, passing and failing apart."""
    kinds: Mapping[str, str] = {"distinct": "all", "distinct_passing": "passing", "distinct_failing": "failing"}
    rows: list[dict[str, Any]] = []
    for model, mine in zip(models, outcomes, strict=True):
        tallies = [outcome.samples for outcome in mine if outcome.samples is not None]
        if len(tallies) == len(mine) and tallies:
            for score in diversity_scores(name, tallies):
                kind = kinds[score.name.rpartition("/")[2]]
                row = {"model": model, "task": name, "kind": kind, "samples": min(one.n for one in tallies)}
                rows.append(row | {"distinct": score.value, "standard_error": score.standard_error})
    return rows
