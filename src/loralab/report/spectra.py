"""Inside the deltas: how fast their singular values fall, and how many directions hold 90 % of a delta's energy."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.ticker import FixedLocator, MaxNLocator, NullLocator

from loralab.report.compare import Comparison
from loralab.report.drawing import FAINT, PAPER, Canvas, canvas, colour, marker_size, shape
from loralab.report.figures import Drawn
from loralab.report.labels import name_ends, place_labels, right_margin, text_width
from loralab.report.read import Run, finite, printable

FLOOR = 1e-4
"""Singular values below this share of the largest are not drawn."""

CROWDED = 560
"""Pixels of names, together, beyond which they stand at the right instead of beside their lines."""
ORDER = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def middle(run: Run, column: str) -> tuple[float, float, float] | None:
    """Give the median over layers, and the quartiles, of a column of spectra; None where it was not measured."""
    if run.spectra is None or column not in run.spectra:
        return None
    values = pd.to_numeric(run.spectra[column], errors="coerce").dropna()
    if values.empty:
        return None
    low, median, high = (float(values.quantile(q)) for q in (0.25, 0.5, 0.75))
    return low, median, high


@dataclass(frozen=True, eq=False)
class Subject:
    """Whose change is drawn: its name in words, its ink and marker, and a row per matrix as in spectra.parquet.

    `folder` and `method` are what its marks carry.
    """

    folder: str
    method: str
    label: str
    colour: str
    marker: str
    size: float
    table: pd.DataFrame


def subjects(comparison: Comparison) -> list[Subject]:
    """Give the runs that have spectra, as figures show them."""
    return [
        Subject(run.folder, run.method, comparison.label(run), colour(run.method), shape(run), marker_size(run), table)
        for run in comparison.runs
        if (table := run.spectra) is not None
    ]


def figures(comparison: Comparison, prefix: str) -> list[Drawn]:
    """Draw spectra and ranks of the runs that have them."""
    return drawn(subjects(comparison), prefix)


def drawn(shown: Sequence[Subject], prefix: str) -> list[Drawn]:
    """Draw spectra, then ranks by kind of layer and by depth; what has no numbers is left out."""
    if not shown:
        return []
    made = [_spectrum(shown, f"{prefix}-spectrum"), _by_module(shown, f"{prefix}-modules")]
    made.append(_by_depth(shown, f"{prefix}-depth"))
    return [figure for figure in made if figure is not None]


def dot(made: Canvas, axes: Axes, one: Subject, x: float, y: float, tip: str, share: float = 0.6) -> None:
    """Draw a subject's marker, a share of its full size."""
    ink = axes.plot([x], [y], one.marker, ms=share * one.size, color=one.colour, mec=PAPER, mew=0.6)
    made.mark(ink[0], one, tip)


def _decay(one: Subject) -> np.ndarray | None:
    """Give quartiles over layers of σᵢ/σ₁, (3, number of values that at least half of the layers have)."""
    rows = []
    for values in one.table["singular_values"]:
        found = np.asarray([finite(value) or 0.0 for value in np.atleast_1d(values).tolist()], dtype=float)
        if found.size and found.max() > 0:
            rows.append(np.sort(found)[::-1] / found.max())
    if not rows:
        return None
    columns = []
    for i in range(max(map(len, rows))):
        there = [row[i] for row in rows if len(row) > i]
        if 2 * len(there) < len(rows):
            break
        columns.append(np.quantile(there, (0.25, 0.5, 0.75)))
    return np.array(columns).T


def _spectrum(shown: Sequence[Subject], name: str) -> Drawn | None:
    found = [(one, decay) for one in shown if (decay := _decay(one)) is not None]
    if not found:
        return None
    title = "Singular values of the change, relative to the largest"
    with canvas(name, title, 520, 340) as made:
        labels = [one.label for one, _ in found]
        crowded = sum(map(text_width, labels)) > CROWDED
        axes = made.axes(left=62, right=right_margin(labels) if crowded else 40, bottom=50)
        ends, lines = [], []
        for one, decay in found:
            seen = np.where(decay < FLOOR, np.nan, decay)
            places, ink = np.arange(1, decay.shape[1] + 1), one.colour
            made.mark(axes.fill_between(places, *np.maximum(decay[[0, 2]], FLOOR), color=ink, alpha=0.15, lw=0), one)
            made.mark(axes.plot(places, seen[1], color=ink, lw=1.7)[0], one)
            for i in _few(int(np.isfinite(seen[1]).sum())):
                tip = f"{one.label}: singular value {i + 1} is {decay[1, i]:.3g} of the largest (median over layers)"
                dot(made, axes, one, i + 1, decay[1, i], tip)
            there = np.flatnonzero(np.isfinite(seen[1]))
            ends.append((one, (float(places[there[-1]]), float(decay[1, there[-1]]))))
            lines.append(np.column_stack((places[there], decay[1, there])))
        longest_place = max(decay.shape[1] for _, decay in found)
        axes.set(xscale="log", yscale="log", xlim=(0.93, 1.07 * max(2, longest_place)))
        axes.xaxis.set_major_locator(FixedLocator([2**k for k in range(14) if 2**k <= max(2, longest_place)]))
        axes.xaxis.set_minor_locator(NullLocator())
        lowest = min(float(np.nanmin(line[:, 1])) for line in lines)
        steps = (1, 2, 5) if lowest > 0.02 else (1,)
        axes.yaxis.set_major_locator(
            FixedLocator([step * 10.0**-k for k in range(5) for step in steps if step * 10.0**-k <= 1])
        )
        axes.yaxis.set_minor_locator(NullLocator())
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:.0f}")
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
        if crowded:
            name_ends(made, axes, [(one, one.label, *end) for one, end in ends])
        else:
            spots = np.concatenate([axes.transData.transform(line) for line in lines])
            taken = [(x - 3, y - 3, x + 3, y + 3) for x, y in spots.tolist()]
            texts = place_labels(axes, [end for _, end in ends], [one.label for one, _ in ends], taken)
            for (one, _), text in zip(ends, texts, strict=True):
                made.mark(text, one)
        axes.set_xlabel("number of the singular value, largest first", labelpad=6)
        axes.set_ylabel("share of the largest", labelpad=8, rotation_mode="anchor")
    caption = (
        "Each line is the median over layers, its band the middle half of them. A line that falls slowly is a change spread "
        "over many directions; a line that ends is a change that cannot have more."
    )
    return Drawn(made.svg, title, caption)


def _few(number: int) -> list[int]:
    """Choose the places that get a marker: 1, 2, 3, 4, 6, 8, 12, 16 and so on."""
    wanted = sorted({n - 1 for k in range(13) for n in (2**k, 3 * 2**k) if n <= number})
    return wanted


def _by_module(shown: Sequence[Subject], name: str) -> Drawn | None:
    title = "Directions that hold 90 % of the change, by kind of layer"
    with_ranks = [(one, _positive(one.table, "rank90")) for one in shown]
    modules = in_order(module for _, table in with_ranks for module in table["module"])
    if not 1 < len(modules) <= 24:
        return None
    with canvas(name, title, 520, 90 + 38 * len(modules)) as made:
        axes = rows_of_modules(made, modules)
        for number, (one, table) in enumerate(with_ranks):
            shift = 0.62 * ((number + 0.5) / len(shown) - 0.5)
            for row, module in enumerate(modules):
                there = table.loc[table["module"] == module, "rank90"]
                if there.empty:
                    continue
                low, median, high = float(there.min()), float(there.median()), float(there.max())
                made.mark(axes.plot([low, high], [row + shift] * 2, color=one.colour, lw=1.4, alpha=0.5)[0], one)
                tip = f"{one.label}, {module}: {median:g} directions (median of {len(there)}; {low:g} to {high:g})"
                dot(made, axes, one, median, row + shift, tip, 0.72)
        _rank_scale(axes, "x", max(float(table["rank90"].max()) for _, table in with_ranks if len(table)))
        axes.set_xlabel("singular directions needed for 90 % of the energy", labelpad=6)
    return Drawn(made.svg, title, "Marks are medians over depth; lines reach from the lowest to the highest layer.")


def in_order(modules: Iterable[str]) -> list[str]:
    """Give kinds of layer once each: those of a Llama in the order of its block, the others behind them by name."""
    known = set(modules)
    return [*(m for m in ORDER if m in known), *sorted(known.difference(ORDER))]


def rows_of_modules(made: Canvas, modules: Sequence[str]) -> Axes:
    """Make axes with a row per kind of layer, named at the left."""
    axes = made.axes(left=18 + 7.2 * max(map(len, modules)), bottom=50)
    axes.set_ylim(len(modules) - 0.5, -0.5)
    axes.set_yticks(range(len(modules)), modules)
    axes.yaxis.grid(False)
    for row in range(1, len(modules)):
        axes.axhline(row - 0.5, color=FAINT, lw=0.7)
    return axes


def _positive(table: pd.DataFrame, column: str) -> pd.DataFrame:
    """Give the rows with a number above 0 in a column: what a logarithmic scale can show."""
    numbers = pd.to_numeric(table[column], errors="coerce")
    kept = table.assign(**{column: numbers, "module": [printable(str(module)) for module in table["module"]]})
    return kept[numbers > 0]


def _rank_scale(axes: Axes, way: Literal["x", "y"], highest: float) -> None:
    """Use powers of two, as ranks are chosen."""
    (axes.set_xscale if way == "x" else axes.set_yscale)("log", base=2)
    axis = axes.xaxis if way == "x" else axes.yaxis
    axis.set_major_locator(FixedLocator([2**k for k in range(15) if 2**k <= 1.3 * highest]))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(lambda value, _: f"{value:.0f}")


def _by_depth(shown: Sequence[Subject], name: str) -> Drawn | None:
    medians = []
    for one in shown:
        table = _positive(one.table, "rank90")
        found = table[table["depth"] >= 0].groupby("depth")["rank90"].median()
        if len(found) > 2:
            medians.append((one, found))
    if not medians:
        return None
    title = "Directions that hold 90 % of the change, by depth"
    with canvas(name, title, 520, 300) as made:
        axes = made.axes(left=58, right=right_margin([one.label for one, _ in medians]), bottom=48)
        for one, found in medians:
            made.mark(axes.plot(found.index, found.to_numpy(), color=one.colour, lw=1.7)[0], one)
            for depth, value in found.items():
                tip = f"{one.label}, block {depth:g}: {value:g} directions (median over its layers)"
                dot(made, axes, one, float(depth), value, tip)
        _rank_scale(axes, "y", max(float(found.max()) for _, found in medians))
        axes.xaxis.set_major_locator(MaxNLocator(8, integer=True))
        ends = [(one, one.label, float(found.index[-1]), float(found.iloc[-1])) for one, found in medians]
        name_ends(made, axes, ends)
        axes.set_xlabel("block of the model, from input to output", labelpad=6)
        axes.set_ylabel("directions", labelpad=8, rotation_mode="anchor")
    return Drawn(made.svg, title, "Median over the layers of each block.")
