"""Inside the deltas: how fast their singular values fall, and how many directions hold 90 % of a delta's energy."""

from collections.abc import Sequence
from typing import Literal

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.ticker import FixedLocator, MaxNLocator, NullLocator

from loralab.report.compare import Comparison
from loralab.report.drawing import FAINT, PAPER, canvas, colour, marker_size, shape
from loralab.report.figures import Drawn
from loralab.report.labels import name_ends, place_labels, right_margin
from loralab.report.read import Run, finite, printable

FLOOR = 1e-4
"""Singular values below this share of the largest are not drawn."""

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


def figures(comparison: Comparison, prefix: str) -> list[Drawn]:
    """Draw spectra and ranks of the runs that have them."""
    runs = [run for run in comparison.runs if run.spectra is not None]
    if not runs:
        return []
    drawn = [_spectrum(comparison, runs, f"{prefix}-spectrum"), _by_module(comparison, runs, f"{prefix}-modules")]
    drawn.append(_by_depth(comparison, runs, f"{prefix}-depth"))
    return [figure for figure in drawn if figure is not None]


def _decay(run: Run) -> np.ndarray | None:
    """Give quartiles over layers of σᵢ/σ₁, (3, number of values that at least half of the layers have)."""
    assert run.spectra is not None
    rows = []
    for values in run.spectra["singular_values"]:
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


def _spectrum(comparison: Comparison, runs: Sequence[Run], name: str) -> Drawn | None:
    found = [(run, decay) for run in runs if (decay := _decay(run)) is not None]
    if not found:
        return None
    title = "Singular values of the change, relative to the largest"
    with canvas(name, title, 520, 340) as made:
        axes = made.axes(left=62, right=40, bottom=50)
        ends, lines = [], []
        for run, decay in found:
            seen = np.where(decay < FLOOR, np.nan, decay)
            places = np.arange(1, decay.shape[1] + 1)
            ink, label = colour(run.method), comparison.label(run)
            made.mark(axes.fill_between(places, *np.maximum(decay[[0, 2]], FLOOR), color=ink, alpha=0.15, lw=0), run)
            line = axes.plot(places, seen[1], color=ink, lw=1.7)
            made.mark(line[0], run)
            for i in _few(int(np.isfinite(seen[1]).sum())):
                tip = f"{label}: singular value {i + 1} is {decay[1, i]:.3g} of the largest (median over layers)"
                dot = axes.plot(
                    [i + 1], [decay[1, i]], shape(run), ms=0.6 * marker_size(run), color=ink, mec=PAPER, mew=0.6
                )
                made.mark(dot[0], run, tip)
            there = np.flatnonzero(np.isfinite(seen[1]))
            ends.append((run, (float(places[there[-1]]), float(decay[1, there[-1]]))))
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
        spots = np.concatenate([axes.transData.transform(line) for line in lines])
        taken = [(x - 3, y - 3, x + 3, y + 3) for x, y in spots.tolist()]
        texts = place_labels(axes, [end for _, end in ends], [comparison.label(run) for run, _ in ends], taken)
        for (run, _), text in zip(ends, texts, strict=True):
            made.mark(text, run)
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


def _by_module(comparison: Comparison, runs: Sequence[Run], name: str) -> Drawn | None:
    known = {printable(str(module)) for run in runs if run.spectra is not None for module in run.spectra["module"]}
    modules = [*(m for m in ORDER if m in known), *sorted(known.difference(ORDER))]
    if not 1 < len(modules) <= 24:
        return None
    title = "Directions that hold 90 % of the change, by kind of layer"
    with canvas(name, title, 520, 90 + 38 * len(modules)) as made:
        axes = made.axes(left=18 + 7.2 * max(map(len, modules)), bottom=50)
        for number, run in enumerate(runs):
            assert run.spectra is not None
            shift = 0.62 * ((number + 0.5) / len(runs) - 0.5)
            for row, module in enumerate(modules):
                there = run.spectra[run.spectra["module"].astype(str).map(printable) == module]["rank90"].dropna()
                if there.empty:
                    continue
                low, median, high = float(there.min()), float(there.median()), float(there.max())
                ink = colour(run.method)
                made.mark(axes.plot([low, high], [row + shift] * 2, color=ink, lw=1.4, alpha=0.5)[0], run)
                tip = f"{comparison.label(run)}, {module}: {median:g} directions (median of {len(there)}; {low:g} to {high:g})"
                dot = axes.plot(
                    [median], [row + shift], shape(run), ms=0.72 * marker_size(run), color=ink, mec=PAPER, mew=0.6
                )
                made.mark(dot[0], run, tip)
        _rank_scale(axes, "x", runs)
        axes.set_ylim(len(modules) - 0.5, -0.5)
        axes.set_yticks(range(len(modules)), modules)
        axes.yaxis.grid(False)
        for row in range(1, len(modules)):
            axes.axhline(row - 0.5, color=FAINT, lw=0.7)
        axes.set_xlabel("singular directions needed for 90 % of the energy", labelpad=6)
    return Drawn(made.svg, title, "Marks are medians over depth; lines reach from the lowest to the highest layer.")


def _rank_scale(axes: Axes, way: Literal["x", "y"], runs: Sequence[Run]) -> None:
    """Use powers of two, as ranks are chosen."""
    highest = max(float(run.spectra["rank90"].max()) for run in runs if run.spectra is not None)
    (axes.set_xscale if way == "x" else axes.set_yscale)("log", base=2)
    axis = axes.xaxis if way == "x" else axes.yaxis
    axis.set_major_locator(FixedLocator([2**k for k in range(15) if 2**k <= 1.3 * highest]))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(lambda value, _: f"{value:.0f}")


def _by_depth(comparison: Comparison, runs: Sequence[Run], name: str) -> Drawn | None:
    medians = []
    for run in runs:
        assert run.spectra is not None
        placed = run.spectra[run.spectra["depth"] >= 0]
        found = placed.groupby("depth")["rank90"].median()
        if len(found) > 2:
            medians.append((run, found))
    if not medians:
        return None
    title = "Directions that hold 90 % of the change, by depth"
    with canvas(name, title, 520, 300) as made:
        axes = made.axes(left=58, right=right_margin([comparison.label(run) for run, _ in medians]), bottom=48)
        for run, found in medians:
            ink = colour(run.method)
            made.mark(axes.plot(found.index, found.to_numpy(), color=ink, lw=1.7)[0], run)
            for depth, value in found.items():
                tip = f"{comparison.label(run)}, block {depth}: {value:g} directions (median over its layers)"
                dot = axes.plot([depth], [value], shape(run), ms=0.6 * marker_size(run), color=ink, mec=PAPER, mew=0.6)
                made.mark(dot[0], run, tip)
        _rank_scale(axes, "y", runs)
        axes.xaxis.set_major_locator(MaxNLocator(8, integer=True))
        ends = [(run, comparison.label(run), float(found.index[-1]), float(found.iloc[-1])) for run, found in medians]
        name_ends(made, axes, ends)
        axes.set_xlabel("block of the model, from input to output", labelpad=6)
        axes.set_ylabel("directions", labelpad=8, rotation_mode="anchor")
    return Drawn(made.svg, title, "Median over the layers of each block.")
