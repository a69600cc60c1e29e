"""Figures about intruders: which leading vectors they are, how they depend on k and ε, what they resemble."""

import re
from collections.abc import Sequence

import numpy as np
import pandas as pd
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, MaxNLocator, NullLocator

from loralab.report import maps
from loralab.report.changes import Model
from loralab.report.drawing import BASE_COLOUR, PAPER, canvas
from loralab.report.figures import Drawn
from loralab.report.labels import name_ends, right_margin
from loralab.report.spectra_folder import Inside, short
from loralab.spectral.maps import EPSILONS

MOST_ROWS = 12
"""Values of k in a map; of more, those that are 1, 2 or 5 times a power of ten, and the last."""
MOST_LINES = 60
"""Matrices whose leading values are drawn as lines; of more, those with most intruders."""
MOST_MARKS = 300
MOST_SIMILAR = 2
"""Matrices with most intruders whose similarities are drawn; one without stands beside them."""


def counts(inside: Inside, delta: str) -> pd.DataFrame:
    """Count a delta's intruders by k and ε: rows of k, epsilon, low, high."""
    ks = list(range(1, inside.k + 1))
    if inside.k > MOST_ROWS:
        ks = sorted({inside.k, *(k for k in ks if str(k).rstrip("0") in ("1", "2", "5"))})
    # A matrix may be smaller than k: then fewer vectors than k were measured, and all of them count.
    most = int(inside.vectors["position"].max()) if len(inside.vectors) else inside.k
    ks = sorted({min(k, most) for k in ks})
    table = inside.found.counts(ks, sorted({*EPSILONS, inside.epsilon}))
    return table[table["delta"] == delta]


def by_epsilon(inside: Inside, name: str) -> Drawn | None:
    """Draw the number of intruders against ε, a line per delta; None unless there are several."""
    found = [(model, counts(inside, model.name)) for model in inside.models]
    lines = [(model, table[table["k"] == table["k"].max()]) for model, table in found if table["high"].max() > 0]
    if len(lines) < 2:
        return None
    title = f"Intruders by ε (k = {inside.k})"
    with canvas(name, title, 520, 300) as made:
        axes = made.axes(left=58, right=right_margin([short(model.label) for model, _ in lines]), bottom=48)
        for model, table in lines:
            xs, low, high = (table[column].to_numpy(float) for column in ("epsilon", "low", "high"))
            made.mark(axes.fill_between(xs, low, high, color=model.colour, alpha=0.2, lw=0), model)
            made.mark(axes.plot(xs, high, color=model.colour, lw=1.7)[0], model)
            for x, least, most in zip(xs, low, high, strict=True):
                span = f"{most:.0f}" if least == most else f"{least:.0f} to {most:.0f}"
                dot = axes.plot([x], [most], model.marker, ms=5.5, color=model.colour, mec=PAPER, mew=0.6)
                made.mark(dot[0], model, f"{model.label}, ε = {x:g}, k = {inside.k}: {span} intruders")
        axes.axvline(inside.epsilon, color=BASE_COLOUR, lw=1, ls=(0, (4, 3)), zorder=1)
        axes.yaxis.set_major_locator(MaxNLocator(5, integer=True))
        ends = [
            (model, short(model.label), float(t["epsilon"].iloc[-1]), float(t["high"].iloc[-1])) for model, t in lines
        ]
        name_ends(made, axes, ends)
        axes.set_xlabel("ε: a cosine below it is no likeness", labelpad=6)
        axes.set_ylabel("intruders in all matrices", labelpad=8, rotation_mode="anchor")
    return Drawn(made.svg, title, f"The dashed line is the ε of this folder, {inside.epsilon:g}.")


def leading(inside: Inside, model: Model, name: str) -> Drawn | None:
    """Draw the leading singular values of each tuned matrix by position, intruders marked."""
    table = inside.vectors_of(model.name)
    table = table[np.isfinite(table["relative_value"]) & (table["relative_value"] > 0)]
    if table.empty or table["position"].max() < 2:
        return None
    order = table.groupby("layer", sort=False)["intruder"].sum().sort_values(ascending=False, kind="stable")
    found = table[table["intruder"]].sort_values("relative_value", ascending=False, kind="stable").head(MOST_MARKS)
    title = f"{short(model.label)}: leading singular values of the tuned weights"
    with canvas(name, title, 520, 320) as made:
        axes = made.axes(left=62, right=14, bottom=50)
        axes.set_yscale("log")
        for layer in order.index[:MOST_LINES]:
            rows = table[table["layer"] == layer].sort_values("position")
            line = axes.plot(rows["position"], rows["relative_value"], color=BASE_COLOUR, lw=0.8, alpha=0.45)
            made.mark(line[0], model)
        for row in found.itertuples(index=False):
            tip = f"{model.label}, {row.layer}: intruder at position {row.position:.0f}, "
            tip += f"singular value {row.value:.4g} ({row.relative_value:.3f} of the largest), "
            tip += f"largest |cos| {maps.between(row)}"
            dot = axes.plot(
                [row.position], [row.relative_value], model.marker, ms=6.5, color=model.colour, mec=PAPER, mew=0.7
            )
            made.mark(dot[0], model, tip)
        _log_ticks(axes, float(table["relative_value"].min()))
        last = int(table["position"].max())
        axes.set_xlim(0.6, last + 0.4)
        axes.xaxis.set_major_locator(MaxNLocator(min(10, last), integer=True))
        axes.set_xlabel("position of the singular value, largest first", labelpad=6)
        axes.set_ylabel("share of the largest", labelpad=8, rotation_mode="anchor")
    said = [f"A grey line is a matrix; coloured marks are its intruders ({inside.setting})."]
    if len(order) > MOST_LINES:
        said.append(f"Lines: the {MOST_LINES} of {len(order)} matrices with most intruders.")
    if int(table["intruder"].sum()) > MOST_MARKS:
        said.append(f"Marks: the {MOST_MARKS} largest of {int(table['intruder'].sum())} intruders.")
    return Drawn(made.svg, title, " ".join(said))


def _log_ticks(axes: object, lowest: float) -> None:
    """Name powers of ten, and their doubles and halves where the axis is short."""
    axis = axes.yaxis  # type: ignore[attr-defined]
    if lowest > 0.02:
        steps = [step * 10.0**-power for power in range(3) for step in (1, 2, 3, 5, 7) if step * 10.0**-power <= 1]
        kept = [step for step in steps if step >= 0.8 * lowest]
        axis.set_major_locator(FixedLocator(kept if len(kept) > 1 else [lowest, 1.0]))
    else:
        axis.set_major_locator(LogLocator(10))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.3g}"))


def slug(name: str) -> str:
    """Make a name one that a file can have anywhere."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")[-60:] or "delta"


def similar(inside: Inside, model: Model, prefix: str) -> list[Drawn]:
    """Draw the similarities of the matrices with most intruders, and of one without for comparison."""
    table = inside.vectors_of(model.name)
    if table.empty or "similarity" not in table:
        return []
    order = table.groupby("layer", sort=False)["intruder"].sum().sort_values(ascending=False, kind="stable")
    chosen: Sequence[str] = [*order.index[order > 0][:MOST_SIMILAR], *order.index[order == 0][:1]]
    drawn = [
        maps.of_similarity(model, table[table["layer"] == layer], layer, f"{prefix}-{slug(layer)}", inside.setting)
        for layer in chosen
    ]
    return [figure for figure in drawn if figure is not None]
