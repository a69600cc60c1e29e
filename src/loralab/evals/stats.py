"""Scores and their uncertainty. Items are documents; tokens of one document are not independent."""

import math
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from jaxtyping import Float
from numpy import ndarray

Z95 = 1.959964


@dataclass(frozen=True)
class Score:
    """One number with its unit, the number of items behind it and its standard error."""

    name: str
    value: float
    unit: str
    n: int
    standard_error: float | None

    def interval(self) -> tuple[float, float] | None:
        """Give the 95 % interval (normal), or None without a standard error."""
        if self.standard_error is None:
            return None
        return self.value - Z95 * self.standard_error, self.value + Z95 * self.standard_error

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
