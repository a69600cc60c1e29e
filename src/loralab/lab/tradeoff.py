"""The plane of learning and forgetting: where each edit of a delta lies, and the best within a budget. No torch here.

Legend: E edits, scale 0 (the base itself) and scale 1 (the delta as it was trained) among them; I items or documents of one part.
Learning is the rise of the target's score or the fall of its text's loss, forgetting the fall of the source's score or the rise of
its text's loss: both paired with the base item by item, and averaged over parts with equal weight.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Float, Int
from numpy import ndarray

from loralab.errors import EvaluationError
from loralab.evals.paired import Change, paired, paired_values, together
from loralab.evals.stats import SHARE

DRAWS = 4000
"""Resamples of the items behind each interval of a difference."""
AT_ONCE = 1 << 22
"""Numbers held by one step of a resampling."""

SCALE = "scale"
REPAIRS = ("top1", "all")
"""Families that shrink intruders: one claim, judged together."""
CONTROLS = {
    "matched": "a uniform scaling to the same norm",
    "neighbour": "the same shrink of a neighbour that is no intruder",
}
"""Family that a repair of the same strength is compared with → what it is, for people."""


@dataclass(frozen=True, eq=False)
class Part:
    """One task or text, on the base and on every edit.

    Attributes:
        name: of the score.
        base: of each item what the base did: right (1) or wrong (0), or between; of a text the loss summed over its tokens, nats.
        tuned: the same of each edit.
        weights: what the mean divides by: 1 for each item, of a text its tokens.
        sign: 1 where more is better, −1 where less is.
        clusters: of each item a number; items of one cluster (pieces of one document) are not independent. None: all are.
    """

    name: str
    base: Float[ndarray, " items"]
    tuned: Float[ndarray, "edits items"]
    weights: Float[ndarray, " items"]
    sign: int = 1
    clusters: Int[ndarray, " items"] | None = None

    @property
    def gains(self) -> Float[ndarray, "edits items"]:
        """What each edit gained on each item, larger is better."""
        return self.sign * (self.tuned - self.base)

    @property
    def base_score(self) -> float:
        return float(self.base.sum() / self.weights.sum())

    def over_clusters(self) -> tuple[Float[ndarray, "edits clusters"], Float[ndarray, " clusters"]]:
        """Sum gains and weights over each cluster; an item without one is its own."""
        if self.clusters is None:
            return self.gains, self.weights
        number = np.unique(self.clusters, return_inverse=True)[1]
        return np.stack([np.bincount(number, gain) for gain in self.gains]), np.bincount(number, self.weights)

    def change(self, edit: int) -> Change:
        """Give the paired change of one edit from the base, signed so that more is better."""
        before, after = self.sign * self.base, self.sign * self.tuned[edit]
        whole = bool(np.isin([self.base, self.tuned[edit]], (0, 1)).all() and (self.weights == 1).all())
        if whole and self.sign == 1:
            return paired(self.base, self.tuned[edit], clusters=self.clusters)
        return paired_values(before, after, weights=self.weights, clusters=self.clusters)


@dataclass(frozen=True, eq=False)
class Side:
    """All that is to be learned, or all that is to be kept: parts of equal weight, in one unit."""

    parts: Sequence[Part]
    unit: str = SHARE

    def gains(self) -> Float[ndarray, " edits"]:
        """What each edit gained over the base: the mean over parts."""
        return np.mean([part.gains.sum(1) / part.weights.sum() for part in self.parts], axis=0)

    def changes(self) -> list[Change]:
        """Give the paired change of every edit from the base, with its 95 % interval."""
        edits = len(self.parts[0].tuned)
        return [together([part.change(edit) for part in self.parts]) for edit in range(edits)]

    @property
    def num_clusters(self) -> int:
        """Independent items, over all parts."""
        return sum(len(part.over_clusters()[1]) for part in self.parts)

    @property
    def least_error(self) -> float:
        """Least standard error of a difference: of shares as if one item more had moved, as in `stats.matched`; of losses 0.

        Where all items move alike, resampling them finds no error, but few of them prove little.
        """
        if self.unit != SHARE:
            return 0.0
        return math.hypot(*(1 / (len(part.over_clusters()[1]) + 2) for part in self.parts)) / len(self.parts)

    def resampled(self, rng: np.random.Generator, draws: int = DRAWS) -> Float[ndarray, "draws edits"]:
        """Give what each edit gained on items drawn anew, clusters whole; every edit on the same items."""
        total = np.zeros((draws, len(self.parts[0].tuned)))
        for part in self.parts:
            sums, weights = part.over_clusters()
            n, first = len(weights), 0
            while first < draws:
                rows = min(draws - first, max(1, AT_ONCE // n))
                drawn = rng.integers(0, n, (rows, n)) + n * np.arange(rows)[:, None]
                counts = np.bincount(drawn.ravel(), minlength=rows * n).reshape(rows, n).astype(float)
                total[first : first + rows] += (counts @ sums.T) / (counts @ weights)[:, None]
                first += rows
        return total / len(self.parts)

    def facts(self) -> dict[str, Any]:
        """Name what was measured: of each part its items and the base's score."""
        parts: list[dict[str, Any]] = []
        for part in self.parts:
            sizes = {"n": len(part.base), "clusters": len(part.over_clusters()[1])}
            parts.append({"name": part.name, **sizes, "base": part.base_score})
        return {"unit": self.unit, "parts": parts}


def points(edits: pd.DataFrame, target: Side, source: Side) -> pd.DataFrame:
    """Place every edit in the plane.

    Args:
        edits: a row per edit: `edit` (its name), `family`, `strength`, and whatever else is known of it.
        target: to be learned.
        source: to be kept.

    Returns:
        The rows with `learning`, `learning_low`, `learning_high`, `forgetting`, `forgetting_low`, `forgetting_high`: 95 %
        intervals, NaN for a single item.
    """
    found = edits.reset_index(drop=True).copy()
    for name, side, sign in (("learning", target, 1), ("forgetting", source, -1)):
        rows = []
        for change in side.changes():
            ends = sorted(sign * end for end in change.interval) if change.interval else [math.nan, math.nan]
            rows.append((sign * change.value, *ends))
        found[[name, f"{name}_low", f"{name}_high"]] = np.array(rows, float) + 0.0  # 0, not −0
    # The base differs from itself on no items at all, however few were seen.
    places = [f"{name}{end}" for name in ("learning", "forgetting") for end in ("", "_low", "_high")]
    found.loc[(found["family"] == SCALE) & (found["strength"] == 0), places] = 0.0
    return found


# Within a budget


@dataclass(frozen=True)
class Budget:
    """The largest forgetting allowed: in the source's unit, or as a share of the unedited delta's."""

    amount: float
    is_share: bool = False

    def limit(self, unedited: float) -> float:
        """Give it in the source's unit, for a delta that forgets `unedited`; of one that forgets nothing a share is 0."""
        return self.amount * max(0.0, unedited) if self.is_share else self.amount

    def __str__(self) -> str:
        return f"{100 * self.amount:g}% of what the unedited delta forgets" if self.is_share else f"{self.amount:g}"


def read_budget(text: str | float) -> Budget:
    """Read `0.02` (in the source's unit) or `50%` (of what the unedited delta forgets).

    Raises:
        EvaluationError: it is no number, not finite, or below 0.
    """
    words = str(text).strip()
    is_share = words.endswith("%")
    try:
        amount = float(words.removesuffix("%")) / (100 if is_share else 1)
    except ValueError:
        amount = math.nan
    if isinstance(text, bool) or not (math.isfinite(amount) and amount >= 0):
        fix = "write the largest forgetting allowed: 0.02 in the source's unit, or 50% of the unedited delta's"
        raise EvaluationError(f"{words!r} is no budget", where="--budget", fix=fix)
    return Budget(amount, is_share)


def within(placed: pd.DataFrame, budget: Budget) -> dict[str, Any]:
    """Choose the edit that learns most among those that forget no more than the budget, by point estimates.

    The base itself (scale 0) and edits that learn nothing are no choice. Of equals the one that forgets less is taken, then the
    first.

    Returns:
        `budget`, `limit` (in the source's unit), and `best`: the row's `edit`, `learning`, `forgetting` and its interval, and
        `surely` (whether the interval's upper end is within the limit too); None where nothing is within.
    """
    unedited = placed[(placed["family"] == SCALE) & (placed["strength"] == 1)]
    limit = budget.limit(float(unedited["forgetting"].iloc[0])) if len(unedited) else budget.limit(0.0)
    is_base = (placed["family"] == SCALE) & (placed["strength"] == 0)
    allowed = placed[~is_base & (placed["forgetting"] <= limit) & (placed["learning"] > 0)]
    found: dict[str, Any] = {"budget": str(budget), "limit": limit, "best": None}
    if allowed.empty:
        return found
    order = allowed.sort_values(["learning", "forgetting"], ascending=[False, True], kind="stable")
    keys = ("edit", "family", "strength", "learning", "forgetting", "forgetting_low", "forgetting_high")
    best: Mapping[str, Any] = {key: order.iloc[0][key] for key in keys}
    return found | {"best": {**best, "surely": bool(best["forgetting_high"] <= limit)}}
