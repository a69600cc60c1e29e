"""Scores and their uncertainty. Items are the documents (or pieces of split ones); tokens of one are not independent.

Intervals over items say how much the choice of items matters; only runs that differ by nothing but their seed say how much
the luck of training does (`noise_floor`).
"""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from jaxtyping import Float
from numpy import ndarray

from loralab.errors import DataError

Z95 = 1.959964
SHARE = "share of items"
"""Unit of scores whose items are right or wrong, or lie between; of their changes too."""

BOUNDS = {
    "loss": (0.0, math.inf),
    "pseudo_loss": (0.0, math.inf),
    "kl": (0.0, math.inf),
    "target_kl": (0.0, math.inf),
    "top1_flips": (0.0, 1.0),
    "target_top1_flips": (0.0, 1.0),
    "covered": (0.0, 1.0),
    "target_covered": (0.0, 1.0),
    "accuracy": (0.0, 1.0),
    "choice": (0.0, 1.0),
    "accuracy_change": (-1.0, 1.0),
    "choice_change": (-1.0, 1.0),
    "auc": (0.0, 1.0),
    "brier": (0.0, 1.0),
    "rmse": (0.0, math.inf),
    "pearson": (-1.0, 1.0),
    "spearman": (-1.0, 1.0),
    "length_correlation": (-1.0, 1.0),
    "margin_correlation": (-1.0, 1.0),
    "entropy": (0.0, math.inf),
    "length": (0.0, math.inf),
    "distinct": (0.0, 1.0),
    "truncated": (0.0, 1.0),
}
"""Scores that cannot lie everywhere, by the last part of their name; their intervals end there."""


def t95(freedom: int) -> float:
    """Give the two-sided 95 % quantile of Student's t (exact for 1 and 2 degrees, else within 0.2 %).

    Source: Abramowitz & Stegun 26.7.5, the expansion around the normal quantile.
    """
    if freedom <= 2:
        return {1: 12.7062, 2: 4.30265}[freedom]
    z, n = Z95, freedom
    terms = (
        (z**3 + z) / (4 * n),
        (5 * z**5 + 16 * z**3 + 3 * z) / (96 * n**2),
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / (384 * n**3),
        (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / (92160 * n**4),
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
        """Give the 95 % interval (Student's t over the items), or None without a standard error.

        A share whose items all come out alike has a standard error of 0, but is not certain: its interval is Wilson's, and
        that of its paired change is `matched`, both for `value · n` of `n` items. Of a mean over skills the score knows only
        all items together: where skills differ in size, a small one weighs more than its items, and the interval is then
        too narrow; where each is unanimous but they differ, it is too wide.
        """
        if self.standard_error is None or self.n < 2:
            return None
        measure = self.name.rpartition("/")[2]
        is_change = measure.endswith("_change")
        is_share = self.unit == SHARE or measure.removesuffix("_change") in ("accuracy", "choice")
        if is_share and self.standard_error == 0:
            moved = self.value * self.n
            return matched(max(0.0, -moved), max(0.0, moved), self.n) if is_change else wilson(moved, self.n)
        half = t95(self.n - 1) * self.standard_error
        anywhere = (-1.0 if is_change else 0.0, 1.0) if is_share else (-math.inf, math.inf)
        lowest, highest = BOUNDS.get(measure, anywhere)
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
    single item. Where all items of a skill come out alike its own is 0: `Score.interval` keeps a width all the same.

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


def wilson(successes: float, n: int) -> tuple[float, float]:
    """Give Wilson's 95 % interval of a share: it keeps a width at 0 and at 1.

    Source: Wilson 1927, Journal of the American Statistical Association 22:209-212. For values between 0 and 1 it is too wide
    rather than too narrow, as nothing of that mean has a larger variance than a coin.

    Args:
        successes: sum over the items, between 0 and n.
        n: items, at least 1.
    """
    share, z2 = successes / n, Z95**2
    centre = (share + z2 / (2 * n)) / (1 + z2 / n)
    half = Z95 * math.sqrt(share * (1 - share) / n + z2 / (4 * n * n)) / (1 + z2 / n)
    # At the ends, rounding must not push the share out of its own interval.
    return max(0.0, min(centre - half, share)), min(1.0, max(centre + half, share))


def matched(lost: float, won: float, n: int) -> tuple[float, float]:
    """Give the 95 % interval of a paired difference of shares, (won − lost) / n: it keeps a width where all items agree.

    Source: Agresti & Min, "Simple improved confidence intervals for comparing matched proportions", Statistics in Medicine
    24 (2005) 729-740: Wald's interval after half an item was added to each of the four cells ("Wald+2"), cut at −1 and 1.

    Args:
        lost: items that only the first has right.
        won: items that only the second has right.
        n: all items, at least 1.
    """
    more, moved = n + 2, won - lost
    half = Z95 * math.sqrt(lost + won + 1 - moved**2 / more) / more
    return max(-1.0, moved / more - half), min(1.0, moved / more + half)


def mcnemar(lost: int, won: int) -> tuple[float, float]:
    """Give the two-sided exact p-value and the mid-p value of McNemar's test that losses and wins are equally likely.

    If so, the losses among the items that changed are binomial with 1/2. The exact test is never liberal but
    often too cautious; mid-p counts half of the outcome itself (Fagerland, Lydersen & Laake 2013, BMC Medical Research
    Methodology 13:91).
    """
    from scipy.special import bdtr  # slow to import, and most users of this module never come here

    fewer, changed = min(lost, won), lost + won
    if changed == 0:
        return 1.0, 1.0
    below = float(bdtr(fewer - 1, changed, 0.5)) if fewer else 0.0
    up_to = float(bdtr(fewer, changed, 0.5))
    return min(1.0, 2 * up_to), min(1.0, below + up_to)


def holm(p_values: Sequence[float]) -> list[float]:
    """Adjust the p-values of a family of tests: any false one among those at or below α has a probability of at most α.

    Source: Holm 1979, "A simple sequentially rejective multiple test procedure", Scandinavian Journal of Statistics 6:65-70.

    Returns:
        The adjusted p-values in the order given.
    """
    adjusted = [1.0] * len(p_values)
    largest = 0.0
    for place, index in enumerate(sorted(range(len(p_values)), key=lambda i: p_values[i])):
        largest = max(largest, min(1.0, (len(p_values) - place) * p_values[index]))
        adjusted[index] = largest
    return adjusted


@dataclass(frozen=True)
class NoiseFloor:
    """How far a score moves between runs that differ by nothing but their seed.

    Attributes:
        mean: of the runs.
        sd: standard deviation between runs (n − 1).
        interval: 95 % interval of the mean (Student's t over the runs).
        n_seeds: runs.
    """

    mean: float
    sd: float
    interval: tuple[float, float]
    n_seeds: int

    def smallest_detectable(self, runs: int = 1) -> float:
        """Give the least difference between two means of `runs` runs each that seeds alone explain less than once in 20.

        t · sd · √(2 / runs), with t at `n_seeds − 1` degrees of freedom: a spread known from few seeds is itself uncertain.
        """
        return t95(self.n_seeds - 1) * self.sd * math.sqrt(2 / runs)


def noise_floor(values: Sequence[float]) -> NoiseFloor:
    """Measure the spread of a score, or of a paired change, between seeds.

    Args:
        values: one per run; the runs differ by nothing but their seed.

    Raises:
        DataError: fewer than two runs, or a value that is not finite.
    """
    found = np.asarray(values, float)
    if len(found) < 2:
        fix = "run the same spec again with another seed"
        raise DataError(f"{len(found)} run tells nothing about the spread between seeds", where="noise floor", fix=fix)
    if not np.isfinite(found).all():
        fix = "leave the runs that diverged out, and say so"
        raise DataError("a run has no finite score", where="noise floor", fix=fix)
    mean, sd = float(found.mean()), float(found.std(ddof=1))
    half = t95(len(found) - 1) * sd / math.sqrt(len(found))
    return NoiseFloor(mean, sd, (mean - half, mean + half), len(found))


def within_noise(difference: float, floor: NoiseFloor, runs: int = 1) -> bool:
    """Tell whether seeds alone may explain a difference between two means of `runs` runs each."""
    return bool(abs(difference) <= floor.smallest_detectable(runs))
