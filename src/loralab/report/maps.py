"""Heat maps: a cell per block and kind of layer, per k and ε, per pair of deltas. Numbers in, SVG text out.

A cell's tint is its colour with an opacity, so that it is right on light and dark paper; its value is in its tooltip, and
written on it where there is room.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.patches import Rectangle
from matplotlib.ticker import FixedLocator, FuncFormatter

from loralab.report.changes import Model
from loralab.report.drawing import BASE_COLOUR, FAINT, PAPER, Canvas, canvas
from loralab.report.figures import Drawn
from loralab.report.labels import text_width
from loralab.report.spectra import Subject, in_order
from loralab.report.spectra_folder import short

FAINTEST, STRONGEST = 0.14, 0.75
"""Opacities of the least and of the largest value: ink on both is readable on light and dark paper."""
ZERO = 0.35
"""Opacity of the grey of a cell that is 0."""
SMALLEST, LARGEST = 7.5, 11.5
"""Sizes of numbers in cells; where they do not fit, they are left to the tooltip."""


@dataclass(frozen=True)
class Cell:
    """A cell around (x, y): the share of the strongest tint, what is written on it, and what it says when pointed at."""

    x: float
    y: float
    share: float
    text: str
    tip: str


def fill(made: Canvas, axes: Axes, cells: Sequence[Cell], colour: str, owner: Model | Subject | None) -> None:
    """Draw cells of width and height 1 into axes whose limits are set."""
    corner, other = axes.transData.transform([(0, 0), (1, 1)])
    wide, high = (abs(float(value)) for value in other - corner)
    longest = max((len(cell.text) for cell in cells), default=0)
    size = min(LARGEST, (high - 4) / 1.1, (wide - 3) / max(0.62 * longest, 0.01))
    for cell in cells:
        tint = FAINTEST + (STRONGEST - FAINTEST) * min(1.0, cell.share)
        ink, opacity = (colour, tint) if cell.share > 0 else (FAINT, ZERO)
        box = Rectangle((cell.x - 0.5, cell.y - 0.5), 1, 1, facecolor=ink, alpha=opacity, lw=0)
        made.mark(axes.add_artist(box), owner, cell.tip)  # limits are set: no need to look for them
        if cell.text and size >= SMALLEST:
            made.mark(axes.text(cell.x, cell.y, cell.text, size=size, ha="center", va="center_baseline"), owner)
    # Hairlines of paper between the cells; drawn last, since edges would take the cells' opacity.
    for x in {cell.x - 0.5 for cell in cells}:
        axes.axvline(x, color=PAPER, lw=0.8 if wide > 8 else 0.4)
    for y in {cell.y - 0.5 for cell in cells}:
        axes.axhline(y, color=PAPER, lw=0.8)


def bare(axes: Axes) -> None:
    """Take grid and frame away: cells need none."""
    axes.grid(False)
    for side in axes.spines.values():
        side.set_visible(False)


# Where in the model


@dataclass(frozen=True)
class Measure:
    """What a map of the model shows.

    Attributes:
        column: of the table of matrices.
        title: of the figure.
        join: how a cell that holds several matrices joins them.
        full: the value with the strongest tint, the same for all deltas so that their maps can be compared.
        write: a value as a tooltip says it.
        on_cell: a value as it stands on its cell.
    """

    column: str
    title: str
    join: Literal["sum", "median"]
    full: float
    write: Callable[[float], str]
    on_cell: Callable[[float], str]


def of_the_model(one: Subject, measure: Measure, name: str, caption: str) -> Drawn | None:
    """Draw a cell per block (across) and kind of layer (down); layers outside of blocks stand at the left."""
    table = one.table[np.isfinite(pd.to_numeric(one.table.get(measure.column), errors="coerce"))]
    if table.empty:
        return None
    modules, depths = in_order(table["module"]), sorted({int(d) for d in table["depth"] if d >= 0})
    outside, rows = bool((table["depth"] < 0).any()), {module: row for row, module in enumerate(modules)}
    first = depths[0] if depths else 1
    cells, full = [], measure.full
    found = table.groupby(["depth", "module"])[measure.column].agg([measure.join, "size"]).reset_index()
    for (depth, module), value, count in zip(
        found[["depth", "module"]].itertuples(index=False), found[measure.join], found["size"], strict=True
    ):
        where = f"block {int(depth)}, {module}" if depth >= 0 else f"{module}, in no block"
        of = f" ({measure.join} of {count} matrices)" if count > 1 else ""
        tip = f"{one.label}, {where}: {measure.write(float(value))}{of}"
        x = float(depth) if depth >= 0 else first - 1.5
        cells.append(Cell(x, rows[module], float(value) / full if full else 0.0, measure.on_cell(float(value)), tip))
    with canvas(name, f"{one.label}: {measure.title}", 520, 84 + 23 * len(modules)) as made:
        left = 14 + max(text_width(module, 11.3) for module in modules)
        axes = made.axes(left=left, right=8, top=6, bottom=46)
        low = first - 2.1 if outside else first - 0.5
        axes.set(xlim=(low, max((cell.x for cell in cells), default=0) + 0.5), ylim=(len(modules) - 0.5, -0.5))
        bare(axes)
        axes.set_yticks(range(len(modules)), modules)
        _block_ticks(axes, depths, outside, first)
        fill(made, axes, cells, one.colour, one)
        axes.set_xlabel("block of the model, from input to output" if depths else "no block", labelpad=6)
    return Drawn(made.svg, f"{one.label}: {measure.title}", caption)


def _block_ticks(axes: Axes, depths: Sequence[int], outside: bool, first: int) -> None:
    every = next(step for step in (1, 2, 4, 5, 10, 20, 50, 100, 10**9) if len(depths) / step <= 14)
    ticks = [float(depth) for depth in depths if depth % every == 0] or [float(depth) for depth in depths[::every]]
    names = [f"{depth:.0f}" for depth in ticks]
    if outside and depths:
        ticks, names = [first - 1.5, *ticks], ["none", *names]
    axes.set_xticks([] if not depths else ticks, [] if not depths else names)


# k and ε


def of_counts(model: Model, counts: pd.DataFrame, k: int, epsilon: float, name: str, full: float) -> Drawn | None:
    """Draw how many intruders there are by k (down) and ε (across).

    Args:
        counts: rows of k, epsilon, low, high: an interval where the cosine itself is known as one.
        k, epsilon: those of the folder; their cell has a frame.
        name: of the canvas.
        full: the count with the strongest tint.
    """
    if counts.empty or counts["high"].max() == 0:
        return None
    title = f"{short(model.label)}: intruders by k and ε"
    ks, limits = sorted(counts["k"].unique()), sorted(counts["epsilon"].unique())
    cells = []
    for row in counts.itertuples(index=False):
        text = f"{row.low:.0f}" if row.low == row.high else f"{row.low:.0f}–{row.high:.0f}"
        tip = f"{model.label}, k = {row.k:.0f}, ε = {row.epsilon:g}: {text} intruder{'' if text == '1' else 's'}"
        cells.append(Cell(limits.index(row.epsilon), ks.index(row.k), (row.low + row.high) / 2 / full, text, tip))
    with canvas(name, title, 520, 76 + 24 * len(ks)) as made:
        axes = made.axes(left=52, right=8, top=6, bottom=48)
        axes.set(xlim=(-0.5, len(limits) - 0.5), ylim=(len(ks) - 0.5, -0.5))
        bare(axes)
        axes.set_yticks(range(len(ks)), [f"{value:.0f}" for value in ks])
        axes.set_xticks(range(len(limits)), [f"{value:g}" for value in limits])
        fill(made, axes, cells, model.colour, model)
        if k in ks and epsilon in limits:
            corner = (limits.index(epsilon) - 0.5, ks.index(k) - 0.5)
            axes.add_patch(Rectangle(corner, 1, 1, facecolor="none", edgecolor=BASE_COLOUR, lw=2, clip_on=False))
        axes.set_xlabel("ε: a cosine below it is no likeness", labelpad=6)
        axes.set_ylabel("k leading vectors", labelpad=8, rotation_mode="anchor")
    caption = f"Counted over all matrices. The frame is the setting of this folder: k = {k}, ε = {epsilon:g}."
    if (counts["low"] != counts["high"]).any():
        caption += " Two numbers: cosines are known as intervals, and the count lies between them."
    return Drawn(made.svg, title, caption)


# Similarity of directions


def of_similarity(model: Model, vectors: pd.DataFrame, layer: str, name: str, setting: str) -> Drawn | None:
    """Draw |cos| of a matrix's leading tuned left vectors (down) with the base's leading ones (across).

    Args:
        vectors: the rows of one delta and layer, with `similarity`: a list over the base's head.
    """
    rows = vectors.sort_values("position")
    found = [np.atleast_1d(np.asarray(values, dtype=float)) for values in rows["similarity"] if values is not None]
    width = max(map(len, found), default=0)
    if len(found) != len(rows) or width < 2:
        return None
    count = int(rows["intruder"].sum())
    title = f"{short(model.label)}, {layer}: {count or 'no'} intruder{'' if count == 1 else 's'}"
    with canvas(name, title, 520, 76 + 20 * len(rows)) as made:
        axes = made.axes(left=58, right=10, top=6, bottom=46)
        axes.set(xlim=(0.5, width + 0.5), ylim=(len(rows) + 0.5, 0.5))
        bare(axes)
        _tints(axes, found, model.colour)
        for place, (row, cosines) in enumerate(zip(rows.itertuples(index=False), found, strict=True), start=1):
            best = int(np.nanargmax(np.nan_to_num(cosines))) + 1 if len(cosines) else 0
            tip = f"tuned vector {row.position:.0f}: largest |cos| with any base vector {between(row)}"
            tip += f"; among the first {len(cosines)} it is most like number {best} ({np.nanmax(cosines):.2f})"
            tip += "; an intruder" if row.intruder else "; no intruder"
            box = Rectangle((0.5, place - 0.5), width, 1, facecolor="none", edgecolor=FAINT, lw=0.7)
            box.set_fill(True)
            box.set_facecolor((0.5, 0.5, 0.5, 0.001))  # a fill that answers the pointer
            made.mark(axes.add_patch(box), model, tip)
        names = [f"{'◆ ' if row.intruder else ''}{row.position:.0f}" for row in rows.itertuples(index=False)]
        axes.set_yticks(range(1, len(rows) + 1), names)
        axes.xaxis.set_major_locator(FixedLocator([1, *range(8, width + 1, 8)]))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.0f}"))
        axes.set_xlabel("base vector, largest singular value first", labelpad=6)
        axes.set_ylabel("tuned vector", labelpad=8, rotation_mode="anchor")
    caption = f"|cos| of left singular vectors: the stronger the tint, the more alike. ◆ marks intruders ({setting})."
    return Drawn(made.svg, title, caption)


def between(row: object) -> str:
    """Write the interval of a vector's largest cosine."""
    low, high = (round(float(getattr(row, name)), 3) for name in ("cosine_low", "cosine_high"))
    return f"{low:.3f}" if low == high or not np.isfinite(high) else f"{low:.3f} to {high:.3f}"


def _tints(axes: Axes, found: Sequence[np.ndarray], colour: str) -> None:
    """Fill the cells that can be seen, in one piece: a mark each would be hundreds."""
    for place, cosines in enumerate(found, start=1):
        for i in np.flatnonzero(np.nan_to_num(cosines) >= 0.04):
            axes.add_artist(
                Rectangle((i + 0.5, place - 0.5), 1, 1, facecolor=colour, alpha=min(1.0, float(cosines[i])), lw=0)
            )


# Pairs of deltas


def of_pairs(models: Sequence[Model], shares: pd.DataFrame, way: str, name: str) -> Drawn | None:
    """Draw how much of their subspaces each pair of deltas has in common: the mean over layers.

    Args:
        shares: rows of delta_a, delta_b and the mean of `way`, `left` or `right`.
    """
    names = [model.name for model in models]
    cells = []
    for row in shares.itertuples(index=False):
        share = float(getattr(row, way))
        if row.delta_a not in names or row.delta_b not in names or not np.isfinite(share):
            continue
        tip = f"{row.delta_a} and {row.delta_b}: {share:.3f} of their {way} subspaces in common (mean over layers)"
        a, b = names.index(row.delta_a), names.index(row.delta_b)
        text = f"{share:.2f}".lstrip("0") if share < 1 else "1"
        cells += [Cell(x, y, share, text, tip) for x, y in ((a, b), (b, a))]
    if not cells:
        return None
    title = f"{way[0].upper()}{way[1:]} subspaces that deltas have in common"
    labels = [short(model.label) for model in models]
    with canvas(name, title, 520, 60 + 34 * len(models)) as made:
        axes = made.axes(left=14 + max(text_width(label, 11.3) for label in labels), right=8, top=6, bottom=36)
        axes.set(xlim=(-0.5, len(models) - 0.5), ylim=(len(models) - 0.5, -0.5))
        bare(axes)
        axes.set_yticks(range(len(models)), labels)
        axes.set_xticks(range(len(models)), [f"{i}" for i in range(1, len(models) + 1)])
        axes.set_yticklabels([f"{label}  {i}" for i, label in enumerate(labels, start=1)])
        fill(made, axes, cells, BASE_COLOUR, None)
    return Drawn(made.svg, title, "‖UₐᵀU_b‖²_F divided by the smaller rank: 1 where one subspace holds the other.")
