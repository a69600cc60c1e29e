"""How well a model judges: statistics of rewards, classes and numbers against what people said. Numbers in, numbers out.

Legend: an item is a text, or a pair of a chosen and a rejected answer. Where two rewards tie, half of a right judgement is
counted, in shares and in areas alike, so that a model that says nothing lies at one half.
"""

import math
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float
from numpy import ndarray

from loralab.evals.stats import t95, wilson

BINS = 10
"""Bins of equally many items in which claimed and true shares are compared."""

Values = Float[ndarray, " items"]
Estimate = tuple[float, float | None]
"""A number and its standard error."""


def sigmoid(values: Values) -> Values:
    """Give 1 / (1 + exp(−x)) without overflow."""
    return 0.5 * (1 + np.tanh(0.5 * values))


def minus_log_sigmoid(values: Values) -> Values:
    """Give −log σ(x) in nats without overflow: the loss of a claim σ(x) that came true."""
    return np.logaddexp(0.0, -values)


def midranks(values: Values) -> Values:
    """Give ranks from 1 on; equal values share the mean of theirs."""
    _, where, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    ranks: Values = (last - (counts - 1) / 2)[where]
    return ranks


def wins(first: Values, second: Values) -> Values:
    """Tell of each item whether the first value is the larger (1), the smaller (0), or neither (one half)."""
    return 0.5 * (1 + np.sign(first - second))


def area_under_curve(values: Values, is_up: Bool[ndarray, " items"]) -> Estimate | None:
    """Give the share of (up, down) pairs of items in which the up one has the larger value: the area under the ROC curve.

    Source of the error: DeLong, DeLong & Clarke-Pearson 1988, Biometrics 44:837-845, with the ranks of Sun & Xu 2014. Where
    all pairs come out alike that variance is 0, though nothing is certain: then the interval reaches as far as Wilson's for
    as many items as the smaller class has.

    Returns:
        None where one of the two classes is missing; no error for a class of a single item.
    """
    if is_up.all() or not is_up.any():
        return None
    above, below = _placements(values, is_up)
    m, n = len(above), len(below)
    area = float(above.mean())
    error = _spread_of_area(above, below)
    if error is not None and error < 1e-12:
        low, high = wilson(area * min(m, n), min(m, n))
        error = max(area - low, high - area) / t95(m + n - 1)
    return area, error


def areas_apart(first: Values, second: Values, is_up: Bool[ndarray, " items"]) -> Estimate | None:
    """Give the first area under the ROC curve minus the second on the same items, with DeLong's error of their difference.

    Returns:
        None where one of the two classes is missing; no error where it has a single item.
    """
    if is_up.all() or not is_up.any():
        return None
    (above, below), (others_above, others_below) = (_placements(values, is_up) for values in (first, second))
    apart = above - others_above
    return float(apart.mean()), _spread_of_area(apart, below - others_below)


def _placements(values: Values, is_up: ndarray) -> tuple[ndarray, ndarray]:
    """Give of each up item the share of down items below it, and of each down item the share of up items above it."""
    up, down, ranks = values[is_up], values[~is_up], midranks(values)
    return (ranks[is_up] - midranks(up)) / len(down), 1 - (ranks[~is_up] - midranks(down)) / len(up)


def _spread_of_area(above: ndarray, below: ndarray) -> float | None:
    if min(len(above), len(below)) < 2:
        return None
    return math.sqrt(float(above.var(ddof=1)) / len(above) + float(below.var(ddof=1)) / len(below))


def pearson(first: Values, second: Values) -> Estimate | None:
    """Give the linear correlation, with the error of Fisher's z carried back: (1 − r²) / √(n − 3).

    Returns:
        None where one side does not vary.
    """
    found = _correlation(first, second)
    if found is None:
        return None
    n = len(first)
    return found, (1 - found**2) / math.sqrt(n - 3) if n > 3 else None


def spearman(first: Values, second: Values, independent: int | None = None) -> Estimate | None:
    """Give the correlation of ranks, ties at their mean.

    Source of the error: Bonett & Wright 2000, Psychometrika 65:23-28: z has variance (1 + r²/2) / (n − 3).

    Args:
        first: of each item.
        second: of each item.
        independent: items that do not depend on each other, where they are fewer than all (answers of one pair).

    Returns:
        None where one side does not vary.
    """
    found = _correlation(midranks(first), midranks(second))
    if found is None:
        return None
    n = len(first) if independent is None else independent
    return found, (1 - found**2) * math.sqrt((1 + found**2 / 2) / (n - 3)) if n > 3 else None


def _correlation(first: Values, second: Values) -> float | None:
    if len(first) < 2 or np.ptp(first) == 0 or np.ptp(second) == 0:
        return None
    x, y = first - first.mean(), second - second.mean()
    scale = math.sqrt(float(x @ x)) * math.sqrt(float(y @ y))
    return max(-1.0, min(1.0, float(x @ y) / scale)) if scale > 0 else None


@dataclass(frozen=True)
class Bin:
    """Items of alike claims.

    Attributes:
        claimed: mean of the claimed probabilities.
        true: share of the claims that came true.
        count: items.
        interval: Wilson's 95 % interval of `true`.
    """

    claimed: float
    true: float
    count: int
    interval: tuple[float, float]


def reliability(claimed: Values, true: Values, bins: int = BINS) -> list[Bin]:
    """Sort claims into bins of equally many items and give in each what was claimed and what came true.

    Equal claims stay in one bin, so bins may differ in size, and those of many equal claims leave others empty.
    Equal counts rather than equal widths: Nixon et al. 2019, "Measuring calibration in deep learning" (arXiv:1904.01685).

    Args:
        claimed: probabilities.
        true: 1 where the claim came true, 0 where not, one half for neither.
        bins: most bins.
    """
    if not len(claimed):
        return []
    number = np.floor(bins * (midranks(claimed) - 0.5) / len(claimed)).astype(int)
    found = []
    for each in np.unique(number):
        mine = number == each
        count, came_true = int(mine.sum()), float(true[mine].sum())
        found.append(Bin(float(claimed[mine].mean()), came_true / count, count, wilson(came_true, count)))
    return found


def calibration_error(bins: list[Bin]) -> float:
    """Give the expected calibration error: the mean over items of |claimed − true| of their bins.

    Above 0 by chance alone, the more so the fewer items a bin has. Source: Naeini, Cooper & Hauskrecht 2015, AAAI.
    """
    return sum(one.count * abs(one.claimed - one.true) for one in bins) / sum(one.count for one in bins)


def brier(claimed: Float[ndarray, "items classes"], is_class: Float[ndarray, "items classes"]) -> Values:
    """Give half of the squared distance between claimed and true probabilities of each item (Brier 1950), from 0 to 1.

    Of two classes it is (p − y)² of either.
    """
    squares: Values = 0.5 * ((claimed - is_class) ** 2).sum(1)
    return squares


def softmax(values: Float[ndarray, "items classes"]) -> Float[ndarray, "items classes"]:
    """Give probabilities of classes from their scores."""
    raised = np.exp(values - values.max(1, keepdims=True))
    shares: Float[ndarray, "items classes"] = raised / raised.sum(1, keepdims=True)
    return shares
