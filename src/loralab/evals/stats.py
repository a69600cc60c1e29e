"""Scores and their uncertainty. Items are the documents (or pieces of split ones); tokens of one are not independent."""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from jaxtyping import Float
from numpy import ndarray

Z95 = 1.959964

BOUNDS = {
    "loss": (0.0, math.inf),
    "kl": (0.0, math.inf),
    "top1_flips": (0.0, 1.0),
    "accuracy": (0.0, 1.0),
    "choice": (0.0, 1.0),
    "accuracy_change": (-1.0, 1.0),
    "choice_change": (-1.0, 1.0),
}
"""Scores that cannot lie everywhere, by the last part of their name; their intervals end there."""


def t95(freedom: int) -> float:
    """Give the two-sided 95 % quantile of Student's t (exact for 1 and 2 degrees, else within 0.3 %).

    Source: Abramowitz & Stegun 26.7.5, the expansion around the normal quantile.
    """
    if freedom <= 2:
        return {1: 12.7062, 2: 4.30265}[freedom]
    z, n = Z95, freedom
    terms = (
        (z**3 + z) / (4 * n),
        (5 * z**5 + 16 * z**3 + 3 * z) / (96 * n**2),
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / (384 * n**3),
    )
    return z + sum(terms)


@dataclass(frozen=True)
class Score:
    """One number with its unit, the number of items behind it and its standard error."""

    name: str
    value: float
    unit: str
    n: int
    standard_error: float | None

    def interval(self) -> tuple[float, float] | None:
        """Give the 95 % interval (Student's t over the items), or None without a standard error."""
        if self.standard_error is None:
            return None
        half = t95(self.n - 1) * self.standard_error
        lowest, highest = BOUNDS.get(self.name.rpartition("/")[2], (-math.inf, math.inf))
        return max(lowest, self.value - half), min(highest, self.value + half)

    def as_line(self, step: int, model: str) -> dict[str, Any]:
        """Give the line of `scores.jsonl`."""
        return {"step": step, "model": model, **asdict(self)}


def ratio_mean(sums: Float[ndarray, " items"], weights: Float[ndarray, " items"]) -> tuple[float, float | None]:
    """Give Σ sums / Σ weights and its standard error with items as clusters.

    The linearised residuals sᵢ − mean·wᵢ carry the variance (Cochran 1977, section 6.4); None for fewer than two items.
    """
    whole = float(weights.sum())
    mean = float(sums.sum()) / whole
    n = len(sums)
    if n < 2:
        return mean, None
    residuals = sums - mean * weights
    return mean, math.sqrt(n / (n - 1) * float((residuals**2).sum())) / whole


def mean_score(name: str, unit: str, sums: ndarray, weights: ndarray) -> Score:
    """Make the score of a weighted mean over items."""
    mean, error = ratio_mean(np.asarray(sums, float), np.asarray(weights, float))
    return Score(name, mean, unit, len(sums), error)


def skill_scores(name: str, unit: str, values: Float[ndarray, " items"], skills: Sequence[str]) -> list[Score]:
    """Score items that belong to skills: the unweighted mean over skills, then each skill if there are several.

    The standard error of the mean over K skills is √(Σ seₖ²) / K, as their items are drawn apart; None if one of them has a
    single item. Where all items of a skill come out alike its own is 0, which says little if the items are few.

    Args:
        name: of the mean, `<role>/<measure>`; a skill's is `<role>/<skill>/<measure>`.
        unit: of the values.
        values: of each item.
        skills: of each item.
    """
    role, _, measure = name.rpartition("/")
    each = []
    for skill in dict.fromkeys(skills):
        mine = values[np.array([other == skill for other in skills])]
        each.append(mean_score(f"{role}/{skill}/{measure}", unit, mine, np.ones(len(mine))))
    errors = [score.standard_error for score in each if score.standard_error is not None]
    error = math.sqrt(sum(e * e for e in errors)) / len(each) if len(errors) == len(each) else None
    mean = Score(name, sum(score.value for score in each) / len(each), unit, len(values), error)
    return [mean, *each] if len(each) > 1 else [mean]
