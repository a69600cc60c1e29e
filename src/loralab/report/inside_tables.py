"""The tables of a spectra folder's page as rows of written cells: deltas, matrices, intruders."""

from dataclasses import dataclass

import numpy as np
import pandas as pd

from loralab.report.maps import between
from loralab.report.spectra_folder import Inside
from loralab.report.tables import EMPTY, Cell
from loralab.report.trajectories import counted
from loralab.report.wording import share

MOST_ROWS = 400
"""Rows of a table on the page; of more, those with most intruders or the largest ones. The folder's files have all."""


@dataclass(frozen=True)
class Grid:
    """A table that can be sorted: heads with meanings, rows of a delta's name, the first cell and the others.

    `left_out` says which rows are missing, "" if none is.
    """

    heads: list[tuple[str, str]]
    rows: list[tuple[str, str, list[Cell]]]
    left_out: str = ""


def _number(value: float, written: str) -> Cell:
    return Cell(written, float(value)) if np.isfinite(value) else EMPTY


def _median(table: pd.DataFrame, column: str, form: str = "{:.3g}") -> Cell:
    if column not in table:
        return EMPTY
    value = float(table[column].median())
    return _number(value, form.format(value))


def _share(value: float) -> Cell:
    return _number(value, share(value))


SUMMARY = (
    ("matrices", "that could be measured"),
    ("intruders", "in all of them"),
    ("with intruders", "matrices that have at least one"),
    ("energy held", "by intruders: share of a matrix's squared leading singular values, mean over matrices"),
    ("sum of values", "of intruders, each as a share of its matrix's largest"),
    ("rank for 90\N{NO-BREAK SPACE}%", "directions that hold 90 % of the energy, median"),
    ("of its rank", "the same as a share of the directions it can have, median"),
    ("effective rank", "exp of the entropy of the singular values (Roy & Vetterli 2007), median"),
    ("stable rank", "‖ΔW‖²_F / ‖ΔW‖²₂, median"),
    ("size", "‖ΔW‖_F / ‖W₀‖_F, median"),
    ("in base's top", "share of ‖ΔW‖²_F inside the base's top-k subspaces, left and right at once, median"),
)


def summary_rows(inside: Inside) -> Grid:
    """Give a row per delta, checkpoints included."""
    rows = []
    for delta in inside.deltas:
        table = inside.matrices[(inside.matrices["delta"] == delta) & (inside.matrices["problem"] == "")]
        vectors = inside.vectors_of(delta)
        found = counted(vectors)
        count, energy = (found[part][0] for part in ("intruders", "energy"))
        values = float(table["intruder_values"].sum()) if "intruder_values" in table else np.nan
        cells = [Cell(f"{len(table)}", len(table)), _number(count, f"{count:.0f}")]
        cells.append(_number(spread := float(vectors.loc[vectors["intruder"], "layer"].nunique()), f"{spread:.0f}"))
        cells += [_share(energy), _number(values, f"{values:.3g}"), _median(table, "rank90")]
        cells.append(_share(float(table["rank90_share"].median())) if "rank90_share" in table else EMPTY)
        cells += [
            _median(table, column) for column in ("effective_rank", "stable_rank", "relative_norm", "overlap_both")
        ]
        rows.append((delta, delta, cells))
    return Grid(list(SUMMARY), rows)


MATRICES = (
    ("intruders", "intruders", "among the k leading left vectors of the tuned weight", "{:.0f}"),
    ("intruder_energy", "energy held", "by intruders, share of the squared leading singular values", "%"),
    ("rank", "rank at most", "directions that the change can have", "{:.0f}"),
    ("rank90", "rank for 90\N{NO-BREAK SPACE}%", "directions that hold 90 % of the energy", "{:.0f}"),
    ("rank90_share", "of its rank", "the same as a share", "%"),
    ("effective_rank", "effective rank", "exp of the entropy of the singular values (Roy & Vetterli 2007)", "{:.3g}"),
    ("stable_rank", "stable rank", "‖ΔW‖²_F / ‖ΔW‖²₂", "{:.3g}"),
    ("spectral", "largest value", "of ΔW", "{:.3g}"),
    ("relative_norm", "size", "‖ΔW‖_F / ‖W₀‖_F", "{:.3g}"),
    ("overlap_left", "left", "share of ‖ΔW‖²_F inside the base's top-k left subspace", "{:.3g}"),
    ("overlap_right", "right", "share of ‖ΔW‖²_F inside the base's top-k right subspace", "{:.3g}"),
    ("overlap_both", "both", "inside both at once", "{:.3g}"),
)


def matrix_rows(inside: Inside) -> Grid:
    """Give a row per matrix of the deltas that figures show."""
    names = [model.name for model in inside.models]
    table = inside.matrices[inside.matrices["delta"].isin(names) & (inside.matrices["problem"] == "")]
    kept = [part for part in MATRICES if part[0] in table and table[part[0]].notna().any()]
    order = table["intruders"].fillna(0) if "intruders" in table else pd.Series(0.0, index=table.index)
    shown = table.loc[order.sort_values(ascending=False, kind="stable").index[:MOST_ROWS]]
    shown = shown.sort_index()
    rows = []
    for _, row in shown.iterrows():
        cells = []
        for column, _, _, form in kept:
            value = float(row[column])
            cells.append(_share(value) if form == "%" else _number(value, form.format(value)))
        shape = [row.get(key) for key in ("out_features", "in_features")]
        there = all(value is not None and np.isfinite(value) for value in shape)
        text = f"{shape[0]:.0f}\N{MULTIPLICATION SIGN}{shape[1]:.0f}" if there else ""
        first = Cell(text, float(shape[0] * shape[1])) if there else EMPTY
        rows.append((str(row["delta"]), str(row["layer"]), [first, *cells]))
    heads = [("shape", "rows × columns of the weight"), *((head, meaning) for _, head, meaning, _ in kept)]
    missing = len(table) - len(shown)
    said = f"The {MOST_ROWS} rows with most intruders; spectra.parquet has {missing} more." if missing else ""
    return Grid(heads, rows, said)


INTRUDERS = (
    ("position", "among the tuned weight's singular vectors, 1 is the largest"),
    ("singular value", "of the tuned weight"),
    ("of the largest", "the same as a share of the matrix's largest"),
    ("largest |cos|", "with any left singular vector of the base; an interval where it is known as one"),
    ("gap", "distance to the nearest other singular value, as a share of the largest"),
)


def intruder_rows(inside: Inside) -> Grid:
    """Give a row per intruder of the deltas that figures show, with the route that decided it."""
    names = [model.name for model in inside.models]
    found = inside.vectors[inside.vectors["intruder"] & inside.vectors["delta"].isin(names)]
    largest = found["relative_value"].sort_values(ascending=False, kind="stable").index[:MOST_ROWS]
    rows = []
    for row in found.loc[largest].sort_index().itertuples(index=False):
        gap = float(getattr(row, "gap", np.nan))
        cells = [Cell(f"{row.position:.0f}", float(row.position)), _number(row.value, f"{row.value:.4g}")]
        cells.append(_number(row.relative_value, f"{row.relative_value:.3f}"))
        sure = "" if getattr(row, "stable", True) else " (unstable)"
        cells.append(_number(row.cosine_high, between(row) + sure))
        rows.append((str(row.delta), str(row.layer), [*cells, _number(gap, f"{gap:.2g}")]))
    missing = len(found) - len(rows)
    said = f"The {MOST_ROWS} largest; intruders.parquet has {missing} more." if missing else ""
    return Grid(list(INTRUDERS), rows, said)
