"""Scores and their uncertainty. Items are the documents (or pieces of split ones); tokens of one are not independent."""

import math
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from jaxtyping import Float
from numpy import ndarray

Z95 = 1.959964

BOUNDS = {"drift/kl": (0.0, math.inf), "drift/top1_flips": (0.0, 1.0)}
"""Scores that cannot lie everywhere; their intervals end there."""


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
        lowest, highest = BOUNDS.get(self.name, (-math.inf, math.inf))
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
