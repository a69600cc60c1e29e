"""Whether an edit of a delta beats uniform scaling, and its controls, on the same items resampled. No torch here.

The bar is the curve of uniformly scaled deltas W₀ + c·ΔW (WiSE-FT, arXiv:2109.01903), which costs nothing to have: the measured
scales in order of c, joined by straight lines. It need not be a function of learning, nor rise. What an edit that learns l must
beat is the least forgetting anywhere on the curve where learning is l or more. Taking the least of noisy points flatters the
bar, never the edit; straight lines flatter the edit where the curve bends down between two scales, so `Bar.strength_at` names the
scale to be measured before a gain is believed.

Legend: S scales, D resamples of the items.
"""

import math
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Float
from numpy import ndarray

from loralab.errors import EvaluationError
from loralab.evals.stats import Z95, t95
from loralab.lab.tradeoff import CONTROLS, REPAIRS, SCALE, Side

LEVEL = 0.95
BETTER, TIE, WORSE, BEYOND = "better", "tie", "worse", "beyond the curve"


@dataclass(frozen=True, eq=False)
class Bar:
    """The curve of uniformly scaled deltas, in order of strength; D draws of it, or one.

    Attributes:
        strengths: S of them, rising.
        learning, forgetting: of each draw and scale.
    """

    strengths: Float[ndarray, " scales"]
    learning: Float[ndarray, "draws scales"]
    forgetting: Float[ndarray, "draws scales"]

    def reach(self) -> Float[ndarray, " draws"]:
        """Give the most that any scale learns."""
        found: ndarray = self.learning.max(1)
        return found

    def strength_of(self, limit: float) -> float | None:
        """Give the largest scale at which the (first) curve's line crosses this forgetting; None where it nowhere does."""
        F, c = self.forgetting[0], self.strengths
        crosses = (F[1:] - limit) * (F[:-1] - limit) < 0
        if not crosses.any():
            return None
        i = int(np.flatnonzero(crosses)[-1])
        return float(c[i] + (limit - F[i]) / (F[i + 1] - F[i]) * (c[i + 1] - c[i]))

    def least_forgetting(self, learning: Float[ndarray, " draws"]) -> Float[ndarray, " draws"]:
        """Give the least forgetting on the curve where learning is as much or more; beyond its reach, that of its last point."""
        return self._least(learning)[0]

    def strength_at(self, learning: Float[ndarray, " draws"]) -> Float[ndarray, " draws"]:
        """Give the scale (between measured ones, where they are joined) at which that least forgetting lies."""
        return self._least(learning)[1]

    def _least(self, wanted: ndarray) -> tuple[ndarray, ndarray]:
        L, F, c = self.learning, self.forgetting, self.strengths
        least = np.minimum(wanted, self.reach())[:, None]
        # The least of a line lies at an end of the stretch that learns enough: a measured scale, or where it crosses `least`.
        ends = np.where(least <= L, F, np.inf)
        rise = L[:, 1:] - L[:, :-1]
        crosses = (L[:, 1:] - least) * (L[:, :-1] - least) < 0
        share = np.where(crosses, (least - L[:, :-1]) / np.where(rise == 0, 1, rise), 0)
        between = np.where(crosses, F[:, :-1] + share * (F[:, 1:] - F[:, :-1]), np.inf)
        candidates = np.concatenate([ends, between], 1)
        scales = np.concatenate([np.broadcast_to(c, L.shape), c[:-1] + share * np.diff(c)], 1)
        place = candidates.argmin(1)[:, None]
        return np.take_along_axis(candidates, place, 1)[:, 0], np.take_along_axis(scales, place, 1)[:, 0]


def _bar(edits: pd.DataFrame, learning: ndarray, forgetting: ndarray) -> Bar:
    scales = edits.index[edits["family"] == SCALE].to_numpy()
    order = scales[np.argsort(edits["strength"].to_numpy(float)[scales], kind="stable")]
    return Bar(edits["strength"].to_numpy(float)[order], learning[:, order], forgetting[:, order])


class Judge:
    """Compares edits on the same resampled items.

    Args:
        edits: rows as in `points`, with `of` (the family that a `matched` edit is the control of, else "") and `same_as` (the edit
            that it equals, else "").
        target: to be learned.
        source: to be kept.
        seed: of the resampling.

    Raises:
        EvaluationError: fewer than two scales, so there is no curve.
    """

    def __init__(self, edits: pd.DataFrame, target: Side, source: Side, *, seed: int = 0) -> None:
        self.edits = edits.reset_index(drop=True)
        if int((self.edits["family"] == SCALE).sum()) < 2:
            fix = "measure scale 0 and scale 1, and some between"
            raise EvaluationError("one scale is no curve to compare with", where="edits", fix=fix)
        self.learning, self.forgetting = target.gains(), 0.0 - source.gains()  # 0, not −0
        self._least_error = {"learning": target.least_error, "forgetting": source.least_error}
        self._enough = min(target.num_clusters, source.num_clusters) > 1
        self._widening = max(_widening(side.num_clusters) for side in (target, source))
        streams = [np.random.default_rng([seed, number]) for number in range(2)]
        self._learning, self._forgetting = target.resampled(streams[0]), -source.resampled(streams[1])
        self.bar = _bar(self.edits, self.learning[None], self.forgetting[None])
        self._bars = _bar(self.edits, self._learning, self._forgetting)

    def verdicts(self) -> list[dict[str, Any]]:
        """Compare every edit that is no scale with the curve at equal learning.

        Keys: `edit`, `family`, `strength`, `learning`, `forgetting`, `scale_strength` and `scale_forgetting` (the curve there),
        `difference` (forgetting minus the curve's: below 0 is better), `low` and `high`, `verdict`. The intervals hold together,
        with 95 %, for all edits of one claim: `top1` and `all` are one, every other family is its own. An edit that equals
        another is left out. Without two items on both sides there are no intervals, and every verdict is a tie.
        """
        chosen = self._of(set(self.edits["family"]) - {SCALE})
        claims: dict[str, list[int]] = {}
        for i in chosen:
            family = self.edits.at[i, "family"]
            claims.setdefault("repair" if family in REPAIRS else family, []).append(i)
        rows = {i: row for mine in claims.values() for i, row in zip(mine, self._against_bar(mine), strict=True)}
        return [rows[i] for i in chosen]

    def _against_bar(self, chosen: list[int]) -> list[dict[str, Any]]:
        least = np.array([self.bar.least_forgetting(self.learning[[i]])[0] for i in chosen])
        drawn = np.stack([self._bars.least_forgetting(self._learning[:, i]) for i in chosen], 1)
        differences = self.forgetting[chosen] - least
        low, high = self._intervals(differences, self._forgetting[:, chosen] - drawn, "forgetting")
        excess = self.learning[chosen] - self.bar.reach()
        excess_low, _ = self._intervals(excess, self._learning[:, chosen] - self._bars.reach()[:, None], "learning")
        rows = []
        for place, i in enumerate(chosen):
            word = _word(low[place], high[place])
            # What learns more than any scale and still forgets less is better than all of them.
            verdict = BEYOND if excess_low[place] > 0 and word != BETTER else word
            row = {key: self.edits.at[i, key] for key in ("edit", "family", "strength")}
            row |= {"learning": self.learning[i], "forgetting": self.forgetting[i]}
            row |= {"scale_strength": float(self.bar.strength_at(self.learning[[i]])[0])}
            row |= {"scale_forgetting": least[place], "difference": differences[place]}
            rows.append(row | {"low": low[place], "high": high[place], "verdict": verdict})
        return rows

    def controls(self) -> list[dict[str, Any]]:
        """Compare edits with their controls of the same strength, in both directions of the plane: `matched` and `neighbour`.

        Keys: `edit`, `control`, `family` (the control's), then `learning_difference` and `forgetting_difference` (the edit's minus
        the control's), each with its `learning_low`, `learning_high`, …, which hold together for all pairs of one family. The
        neighbour, a single vector, is the control of `top1`. An edit that equals another is left out.
        """
        rows: list[dict[str, Any]] = []
        for family in CONTROLS:
            pairs = [(i, j) for j in self._of({family}) for i in self._controlled_by(j)]
            if not pairs:
                continue
            mine, other = (list(side) for side in zip(*pairs, strict=True))
            names = self.edits["edit"]
            found: list[dict[str, Any]] = [{"edit": names[i], "control": names[j], "family": family} for i, j in pairs]
            for name, values, drawn in (
                ("learning", self.learning, self._learning),
                ("forgetting", self.forgetting, self._forgetting),
            ):
                differences = values[mine] - values[other]
                low, high = self._intervals(differences, drawn[:, mine] - drawn[:, other], name)
                for row, *numbers in zip(found, differences, low, high, strict=True):
                    keys = (f"{name}_difference", f"{name}_low", f"{name}_high")
                    row |= dict(zip(keys, numbers, strict=True))
            rows += found
        return rows

    def _of(self, families: Collection[str]) -> list[int]:
        """List the edits of some families, those that equal another left out."""
        own = self.edits["family"].isin(list(families)) & (self.edits["same_as"] == "")
        return [int(i) for i in self.edits.index[own]]

    def _controlled_by(self, control: int) -> list[int]:
        family = self.edits.at[control, "of"] or "top1"
        strength = self.edits.at[control, "strength"]
        return [i for i in self._of({family}) if np.isclose(self.edits.at[i, "strength"], strength)]

    def _intervals(self, values: ndarray, drawn: ndarray, of: str) -> tuple[ndarray, ndarray]:
        """Give 95 % intervals that hold for all values together.

        Each is the value ± q · its standard error over the draws, q the 95 % quantile of the largest studentised deviation: the
        single-step maximum of Westfall & Young 1993, which knows that the values move together.
        """
        if not self._enough:
            return np.full(len(values), math.nan), np.full(len(values), math.nan)
        error = np.maximum(drawn.std(0, ddof=1), self._least_error[of])
        largest = (np.abs(drawn - values) / np.where(error > 0, error, 1)).max(1)
        half = max(Z95, float(np.quantile(largest, LEVEL))) * error * self._widening
        return values - half, values + half


def _widening(n: int) -> float:
    """Give by how much a bootstrap of few items is too narrow: Student's t for the normal, and n − 1 for n."""
    return 1.0 if n < 2 else t95(n - 1) / Z95 * math.sqrt(n / (n - 1))


def _word(low: float, high: float) -> str:
    return BETTER if high < 0 else WORSE if low > 0 else TIE
