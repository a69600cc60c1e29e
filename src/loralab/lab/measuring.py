"""Measures edits of a delta, each different one once and as many as fit in one pass over the data, and has them judged."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import pandas as pd

from loralab.delta.layers import unwrap_
from loralab.delta.lowrank import Delta
from loralab.delta.several import Wardrobe
from loralab.errors import EvaluationError
from loralab.lab.bar import BETTER, Judge
from loralab.lab.mending import Subject, Told, digest, signature, tensors_of
from loralab.lab.repaired import lost_share
from loralab.lab.sides import Sides
from loralab.lab.tradeoff import SCALE, Budget, points
from loralab.spectral.intruders import Intruders
from loralab.spectral.repair import Edit

GROUP_BYTES = 2**31
"""Most memory that edited deltas take at a time; together they are measured in one pass over the data."""
NEAR = 0.002
"""How near to a measured scale the one that a gain is compared with may lie, before it is measured itself."""
ROUNDS = 3
"""Most times that further scales are measured."""

UNTOUCHED, WHOLE = Edit(SCALE, 0.0), Edit(SCALE, 1.0)
"""The base, and the delta as it was trained."""


@dataclass
class Measuring:
    """Edits that are measured group by group, each different one once.

    Attributes:
        rows: of every edit what is known of it; `view` is its place among the views of `sides`.
        refined: scales that were measured where an edit seemed better than the line between two others, or at the budget.
        passes: over the data.
    """

    subject: Subject
    sides: Sides
    rank: int | None
    told: Told
    found: dict[str, Intruders] = field(default_factory=dict)
    rows: list[dict[str, Any]] = field(default_factory=list)
    refined: list[float] = field(default_factory=list)
    passes: int = 0

    def __post_init__(self) -> None:
        self._known = {id(tensor): digest(tensor) for tensor in tensors_of(self.subject.delta)}
        self._seen: dict[str, dict[str, Any]] = {}
        self._views = 0

    def edited(self, edit: Edit) -> tuple[Delta, pd.DataFrame]:
        """Give an edit as it is measured and saved."""
        return self.subject.edit(edit, self.found, self.rank)

    def measure(self, edits: Sequence[Edit]) -> None:
        """Measure edits: pairs together, in one pass over the data, a dense edit at a time.

        Raises:
            EvaluationError: what is measured on the base, or on the delta as it was trained, is no number.
        """
        group: dict[str, Delta] = {}
        for number, edit in enumerate(edits, 1):
            if edit == UNTOUCHED:
                self._add(edit, None, None, 0)
                continue
            delta, matrices = self.edited(edit)
            mark = signature(delta, self._known)
            twin = self._seen.get(mark)
            self._add(edit, matrices, twin, self._views_to_be + len(group))
            if twin is not None:
                continue
            self._seen[mark] = self.rows[-1]
            group[str(edit)] = delta
            is_full = 4 * sum(one.num_parameters for one in group.values()) > GROUP_BYTES
            if is_full or self.subject.kind == "dense":
                self._take(group, number, len(edits))
                group = {}
        if group:
            self._take(group, len(edits), len(edits))
        finite = self.sides.finite()
        for row in self.rows:
            row["problem"] = "" if finite[row["view"]] else "what is measured on it is no number"
            if row["problem"] and row["edit"] in (str(UNTOUCHED), str(WHOLE)):
                raise EvaluationError(row["problem"], where=f"{row['edit']} of {self.subject.base_path}")

    @property
    def _views_to_be(self) -> int:
        """Place of the next view: the base comes first of all."""
        return max(1, self._views)

    def _take(self, group: dict[str, Delta], number: int, of: int) -> None:
        self.passes += 1
        with _worn(self.subject, group) as wardrobe:
            views = wardrobe.views() if not self._views else wardrobe.views()[1:]
            self.sides.take(views)
            self._views += len(views)
        self.told(
            number, of, f"edits measured, in {self.passes} passes" if self.passes > 1 else "edits measured, in 1 pass"
        )

    def _add(self, edit: Edit, matrices: pd.DataFrame | None, twin: dict[str, Any] | None, view: int) -> None:
        row: dict[str, Any] = {"edit": str(edit), "family": edit.family, "of": edit.of or "", "strength": edit.strength}
        row |= {"view": twin["view"] if twin else view, "same_as": twin["edit"] if twin else ""}
        row |= {"norm_share": 0.0, "rank_extra": 0, "intruders": 0, "discarded": 0.0}
        if matrices is not None:
            before, after = ((matrices[name] ** 2).sum() ** 0.5 for name in ("norm_before", "norm"))
            row["norm_share"] = after / before if before else 1.0
            row["rank_extra"] = int((matrices["rank"] - matrices["rank_before"]).fillna(0).sum())
            row["intruders"] = int(matrices["touched"].sum())
            row["discarded"] = lost_share(matrices)
        self.rows.append(row)

    def measure_at(self, budget: Budget) -> None:
        """Measure the scale at which the curve's lines reach the budget, so that the best within it is not far below.

        The curve bends between two scales, so that the one measured may lie beyond the budget; then it is looked for anew.
        """
        tried: str | None = None
        for _ in range(ROUNDS):
            rows = self._finite()
            target, source = self.sides.of(rows["view"].tolist())
            forgotten = points(rows, target, source).set_index("edit")["forgetting"]
            limit = budget.limit(float(forgotten.at[str(WHOLE)]))
            if tried is not None and float(forgotten.at[tried]) <= limit:
                break
            strength = Judge(rows, target, source).bar.strength_of(limit)
            wanted = [] if strength is None else self._unmeasured([strength])
            if not wanted:
                break
            tried = str(Edit(SCALE, wanted[0]))
            self.refined += wanted
            self.measure([Edit(SCALE, wanted[0])])

    def judged(self, seed: int) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
        """Compare what was measured, measuring further scales where an edit seems better than the line between two."""
        for last in range(ROUNDS + 1):
            rows = self._finite()
            target, source = self.sides.of(rows["view"].tolist())
            judge = Judge(rows, target, source, seed=seed)
            verdicts = judge.verdicts()
            better = [one for one in verdicts if one["verdict"] == BETTER]
            wanted = self._unmeasured([one["scale_strength"] for one in better]) if last < ROUNDS else []
            if not wanted:
                break
            self.refined += wanted
            self.measure([Edit(SCALE, strength) for strength in wanted])
        return verdicts, judge.controls()

    def _unmeasured(self, strengths: Sequence[float]) -> list[float]:
        """Give the strengths that are not near a measured scale, nor near each other."""
        known = [row["strength"] for row in self.rows if row["family"] == SCALE]
        found: list[float] = []
        for strength in strengths:
            if all(abs(strength - other) > NEAR for other in (*known, *found)):
                found.append(round(float(strength), 3))
        return found

    def _finite(self) -> pd.DataFrame:
        table = pd.DataFrame(self.rows)
        return table[table["problem"] == ""].reset_index(drop=True)

    def placed(self) -> pd.DataFrame:
        """Give a row per edit with its place in the plane; NaN where what was measured is no number."""
        rows = self._finite()
        found = points(rows, *self.sides.of(rows["view"].tolist()))
        odd = pd.DataFrame([row for row in self.rows if row["problem"]])
        whole = pd.concat([found, odd], ignore_index=True) if len(odd) else found
        return whole.drop(columns="view")


@contextmanager
def _worn(subject: Subject, deltas: dict[str, Delta]) -> Iterator[Wardrobe]:
    """Put deltas on the base, and take them off again."""
    assert subject.base is not None
    try:
        yield Wardrobe(subject.base.model, deltas)
    finally:
        unwrap_(subject.base.model)
