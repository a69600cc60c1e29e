"""The folder of a repair: one edit of a delta, or a sweep of many with its measured trade-off. No torch here.

    <folder>/
      delta/           the edited delta (of a sweep the best within the budget): a PEFT folder, or a checkpoint of a dense one
      points.parquet   of a sweep: a row per edit, with its place in the plane
      repair.json      facts, and of a sweep budget, best, verdicts and controls; written last, so that it says the rest is whole

Nothing is ever written over another thing: a folder that holds a repair, or anything else, is refused.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa

from loralab.errors import FolderError
from loralab.lab.measured import plain
from loralab.lab.repair_words import budget_line, control_lines, few_line, headline, intruder_line, unedited_lines
from loralab.lab.tradeoff import REPAIRS
from loralab.run.files import explain_failed_writes, read_json, write_atomic, write_json

FACTS, POINTS, DELTA = "repair.json", "points.parquet", "delta"
LEFT_BEHIND = {POINTS, f"{DELTA}.partial"}
"""What a repair that was interrupted may leave; the delta itself is never replaced."""
AGAIN = "run the repair again into a new folder"
UNMEASURED = (
    "Nothing was measured: what this edit recovers, and what it costs, is not known. Name a target and a source to sweep, "
    "or evaluate the edited delta."
)
PLACED = (
    *("edit", "family", "strength", "learning", "learning_low", "learning_high"),
    *("forgetting", "forgetting_low", "forgetting_high", "norm_share", "rank_extra", "intruders"),
)
"""Columns that every `points.parquet` has."""


@dataclass(frozen=True, eq=False)
class Repaired:
    """One edit of a delta, not measured.

    Attributes:
        matrices: a row per matrix: layer, intruders (how many), touched (how many triplets were scaled), rank_before, rank
            (NaN of a dense matrix), norm_before, norm (‖ΔW‖_F), discarded (share of the norm that compression lost) and
            discarded_norm.
        facts: base, delta, kind, edit, family, strength, k, epsilon, rank, intruders, …
    """

    matrices: pd.DataFrame
    facts: Mapping[str, Any]

    def summary(self) -> dict[str, Any]:
        """Give everything as plain values."""
        found: dict[str, Any] = plain({"facts": dict(self.facts), "matrices": self.matrices.to_dict("records")})
        return found | {"measured": False, "said": self.said()}

    def said(self) -> list[str]:
        """Say in sentences what was done."""
        rows, edit = self.matrices, self.facts.get("edit")
        lines = [intruder_line(self.facts)]
        before, after = ((rows[name] ** 2).sum() ** 0.5 for name in ("norm_before", "norm"))
        if (rows["touched"] > 0).any() or before != after:
            share = f": the norm of the change is {after / before:.1%} of what it was" if before else ""
            lines.append(f"{edit}{share}.")
        else:
            lines.append(f"{edit} changes nothing here.")
        grown = rows[rows["rank"] > rows["rank_before"]]
        if len(grown):
            most = int((grown["rank"] - grown["rank_before"]).max())
            exact = "Exact: " if self.facts.get("rank") is None else ""
            lines.append(f"{exact}{len(grown)} of {len(rows)} matrices have a higher rank, by {most} at most.")
        if self.facts.get("rank") is not None:
            lost = (rows["discarded_norm"] ** 2).sum() ** 0.5
            worst = rows.loc[rows["discarded"].idxmax()] if len(rows) else None
            of_all = f"{lost:.3g}, {lost_share(rows):.2%} of the change"
            at_most = (
                f"; at most {worst['discarded']:.2%} of one matrix ({worst['layer']})" if worst is not None else ""
            )
            lines.append(f"Compressed to rank {self.facts['rank']}: the discarded norm is {of_all}{at_most}.")
        return [line for line in lines if line] + [UNMEASURED]

    def write(self, folder: str | Path) -> Path:
        """Write `repair.json`; the delta lies there already. Raises FolderError, or Interrupted if the disk is full."""
        path = Path(folder)
        write_json(path / FACTS, {"kind": "repair", **self.summary()})
        return path


@dataclass(frozen=True, eq=False)
class Sweep:
    """Many edits of a delta in the plane of learning and forgetting.

    Attributes:
        points: a row per edit, with the columns `PLACED`, `of`, `same_as` and `discarded`; in order of measuring.
        verdicts: edits against the curve of uniform scaling, as `bar.Judge.verdicts` gives them.
        controls: repairs against their controls, as `bar.Judge.controls` gives them.
        facts: base, delta, kind, k, epsilon, intruders, target, source, cost, environment, …
        choice: budget, limit and best, as `tradeoff.within` gives them; None where no budget was named.
    """

    points: pd.DataFrame
    verdicts: Sequence[Mapping[str, Any]]
    controls: Sequence[Mapping[str, Any]]
    facts: Mapping[str, Any]
    choice: Mapping[str, Any] | None = None

    @property
    def best(self) -> Mapping[str, Any] | None:
        """The chosen point; None where nothing is within the budget, or none was named."""
        found: Mapping[str, Any] | None = (self.choice or {}).get("best")
        return found

    def at(self, edit: str) -> Mapping[str, Any]:
        """Give the row of an edit by its name. Raises KeyError."""
        rows = self.points[self.points["edit"] == edit]
        if rows.empty:
            raise KeyError(edit)
        found: Mapping[str, Any] = rows.iloc[0].to_dict()
        return found

    def summary(self) -> dict[str, Any]:
        """Give everything as plain values."""
        found: dict[str, Any] = plain(
            {
                "facts": dict(self.facts),
                "budget": (self.choice or {}).get("budget"),
                "limit": (self.choice or {}).get("limit"),
                "best": self.best,
                "verdicts": list(self.verdicts),
                "controls": list(self.controls),
                "points": self.points.to_dict("records"),
            }
        )
        return found | {"measured": True, "said": self.said()}

    def said(self) -> list[str]:
        """Say in sentences what was found: whether intruder repair beats uniform scaling before all."""
        repairs = [one for one in self.verdicts if one["family"] in REPAIRS and one["strength"] < 1]
        lines = [intruder_line(self.facts), *unedited_lines(self.points, self.facts)]
        lines.append(headline(repairs, self.facts))
        lines += control_lines(self.controls)
        lines += [budget_line(self.choice, self.facts)] if self.choice is not None else []
        return [line for line in [*lines, few_line(self.facts)] if line]

    def write(self, folder: str | Path) -> Path:
        """Write `points.parquet`, then `repair.json`; the chosen delta lies there already.

        Raises:
            FolderError: the folder cannot be written.
            Interrupted: the disk is full.
        """
        path = Path(folder)
        self.write_points(path)
        facts = self.summary()
        facts["points"] = len(self.points)
        write_json(path / FACTS, {"kind": "sweep", **facts})
        return path

    def write_points(self, folder: Path) -> None:
        """Write `points.parquet` alone: what was measured is safe before the chosen delta is saved. Raises as `write`."""
        table = BytesIO()
        self.points.to_parquet(table, index=False)
        write_atomic(folder / POINTS, table.getvalue())


def lost_share(matrices: pd.DataFrame) -> float:
    """Give the norm that compression discarded in all matrices, relative to the change before: the two parts are orthogonal."""
    kept, lost = (float((matrices[name] ** 2).sum() ** 0.5) for name in ("norm", "discarded_norm"))
    return lost / math.hypot(kept, lost) if lost else 0.0


def claim_folder(folder: str | Path) -> Path:
    """Make the folder of a repair, and raise FolderError if it holds a repair or anything else, or cannot be written."""
    path = Path(folder)
    with explain_failed_writes(path):
        names = {file.name for file in path.iterdir() if not file.name.startswith(".")} if path.is_dir() else set()
        if FACTS in names:
            raise FolderError("the folder holds a repair already", where=str(path), fix="name a new folder")
        if names - LEFT_BEHIND:
            fix = "name a new folder"
            raise FolderError(
                "the folder holds something else", where=str(path / sorted(names - LEFT_BEHIND)[0]), fix=fix
            )
        path.mkdir(parents=True, exist_ok=True)
    return path


def is_repair(path: str | Path) -> bool:
    """Tell whether a folder holds a whole repair."""
    return Path(path, FACTS).is_file()


def read_repair(folder: str | Path) -> Repaired | Sweep:
    """Read a repair's folder.

    Raises:
        FolderError: there is no repair, or one of its files is missing, damaged or shorter than it was.
    """
    path = Path(folder)
    if not is_repair(path):
        fix = "name the folder that loralab repair wrote"
        raise FolderError(f"there is no repair here: no {FACTS}", where=str(path), fix=fix)
    whole = read_json(path / FACTS)
    facts, where = whole.get("facts"), str(path / FACTS)
    if not isinstance(facts, dict) or whole.get("kind") not in ("repair", "sweep"):
        raise FolderError("the file does not say what was repaired", where=where, fix=AGAIN)
    if whole["kind"] == "repair":
        rows = whole.get("matrices")
        if not isinstance(rows, list) or not all(isinstance(row, dict) and "layer" in row for row in rows):
            raise FolderError("the file does not say what became of each matrix", where=where, fix=AGAIN)
        return Repaired(pd.DataFrame(rows), facts)
    lists = {name: whole.get(name) for name in ("verdicts", "controls")}
    for name, found in lists.items():
        if not isinstance(found, list) or not all(isinstance(row, dict) and "edit" in row for row in found):
            raise FolderError(f"the file's {name} are missing or odd", where=where, fix=AGAIN)
    points = _read_points(path / POINTS)
    if len(points) != whole.get("points"):
        what = f"the table holds {len(points)} rows, but {whole.get('points')} were written"
        raise FolderError(what, where=str(path / POINTS), fix=AGAIN)
    choice = {key: whole.get(key) for key in ("budget", "limit", "best")} if whole.get("budget") else None
    return Sweep(points, lists["verdicts"] or [], lists["controls"] or [], facts, choice)


def _read_points(path: Path) -> pd.DataFrame:
    try:
        found = pd.read_parquet(path)
    except (OSError, ValueError, pa.ArrowException) as error:
        what = "the file is damaged" if path.exists() else "the file is missing"
        raise FolderError(what, where=str(path), fix=AGAIN) from error
    if missing := [name for name in PLACED if name not in found]:
        raise FolderError(f"the table has no column {', '.join(missing)}", where=str(path), fix=AGAIN)
    return found
