"""The singular values of a delta's matrices, one panel per kind of layer, one line per block. Table in, SVG text out."""

import math

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.ticker import FixedLocator, NullLocator

from loralab.report.drawing import SIZE, Canvas, canvas
from loralab.report.figures import Drawn
from loralab.report.read import finite
from loralab.report.spectra import FLOOR, Subject, in_order

ACROSS = 3
MOST_PANELS = 12
MOST_POINTS = 48
"""Points of a line; of more values, those evenly spread on the logarithmic axis."""
WIDTH, HIGH, GAP, LEFT, RIGHT, TOP, BOTTOM = 520, 118, 24, 66, 8, 22, 44


def by_kind(one: Subject, name: str) -> Drawn | None:
    """Draw every matrix's singular values on two logarithmic axes, early blocks faint and late ones strong."""
    found = one.table.assign(values=[_falling(values) for values in one.table["singular_values"]])
    found = found[found["values"].map(len) > 0]
    kinds = in_order(found["module"])[:MOST_PANELS]
    longest = max((len(values) for values in found["values"]), default=0)
    if not kinds or longest < 2:
        return None
    largest = max(float(values[0]) for values in found["values"])
    lowest = max(FLOOR * largest, min(float(values[-1]) for values in found["values"]))
    title = f"{one.label}: singular values of the change, by kind of layer"
    down, across = math.ceil(len(kinds) / ACROSS), min(ACROSS, len(kinds))
    height = TOP + down * (HIGH + GAP) - GAP + BOTTOM
    wide = (WIDTH - LEFT - RIGHT - (across - 1) * 12) / across
    with canvas(name, title, WIDTH, height) as made:
        for i, kind in enumerate(kinds):
            row, column = divmod(i, ACROSS)
            left, top = LEFT + column * (wide + 12), TOP + row * (HIGH + GAP)
            axes = made.axes(left=left, right=WIDTH - left - wide, top=top, bottom=height - top - HIGH)
            _panel(made, axes, one, kind, found[found["module"] == kind])
            axes.set(xlim=(0.9, 1.1 * longest), ylim=(0.7 * lowest, 1.5 * largest))
            _ticks(axes, longest, lowest, largest)
            if column:
                axes.tick_params(labelleft=False)
            if i + ACROSS < len(kinds):
                axes.tick_params(labelbottom=False)
        made.figure.text(0.5, 8 / height, "number of the singular value", ha="center", va="bottom", size=SIZE)
        made.figure.text(4 / WIDTH, 0.5, "singular value", rotation=90, ha="left", va="center", size=SIZE)
    blocks = found.loc[found["depth"] >= 0, "depth"]
    caption = "A line is a matrix"
    if blocks.nunique() > 1:
        caption += f", from faint (block {blocks.min():g}) to strong (block {blocks.max():g})"
    more = len(in_order(found["module"])) - len(kinds)
    return Drawn(made.svg, title, caption + "." + (f" {more} kinds of layer are left out." if more else ""))


def _falling(values: object) -> np.ndarray:
    """Give the values above 0, largest first."""
    there = [finite(value) or 0.0 for value in np.atleast_1d(np.asarray(values, dtype=object)).tolist()]
    return np.array(sorted((value for value in there if value > 0), reverse=True))


def _panel(made: Canvas, axes: Axes, one: Subject, kind: str, rows: pd.DataFrame) -> None:
    axes.set(xscale="log", yscale="log")
    deepest = float(rows["depth"].max())
    for row in rows.sort_values("depth").itertuples(index=False):
        values = row.values
        kept = np.unique(np.geomspace(1, len(values), min(MOST_POINTS, len(values))).round().astype(int))
        strength = 0.25 + 0.75 * max(0.0, float(row.depth)) / deepest if deepest > 0 else 1.0
        where = f"block {row.depth:g}, {kind}" if row.depth >= 0 else kind
        tip = f"{one.label}, {where}: largest {values[0]:.3g}, smallest {values[-1]:.3g} of {len(values)}"
        line = axes.plot(kept, values[kept - 1], color=one.colour, alpha=strength, lw=1.1)
        if len(values) == 1:
            line[0].set(marker="o", markersize=3)
        made.mark(line[0], one, tip)
    axes.text(0, 1.03, kind, transform=axes.transAxes, size=SIZE - 2, va="bottom")


def _ticks(axes: Axes, longest: int, lowest: float, largest: float) -> None:
    steps = [2**k for k in range(14) if 2**k <= longest]
    axes.xaxis.set_major_locator(FixedLocator(steps[:: max(1, math.ceil(len(steps) / 5))]))
    powers = range(math.floor(math.log10(lowest)), math.ceil(math.log10(largest)) + 1)
    few = (1, 2, 5) if largest < 20 * lowest else (1,)
    places = [step * 10.0**power for power in powers for step in few]
    axes.yaxis.set_major_locator(FixedLocator([p for p in places if 0.7 * lowest <= p <= 1.5 * largest]))
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_minor_locator(NullLocator())
        axis.set_major_formatter(
            lambda value, _: f"{value:g}" if value >= 0.001 else f"{value:.0e}".replace("e-0", "e−")
        )
