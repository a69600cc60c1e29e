"""Figures of subspaces: how much of a change lies in the base's leading directions, and what deltas have in common."""

from collections.abc import Sequence
from itertools import combinations

import numpy as np
import pandas as pd
from matplotlib.ticker import MaxNLocator

from loralab.report import maps
from loralab.report.changes import Model
from loralab.report.drawing import BASE_COLOUR, DELTA_COLOURS, PAPER, RANK_SHAPES, canvas
from loralab.report.figures import Drawn
from loralab.report.labels import name_ends, right_margin
from loralab.report.spectra import dot, in_order, rows_of_modules
from loralab.report.spectra_folder import Inside, named, short

MOST_PAIRS = 6
"""Pairs of deltas with a line each; of more, only the map of all pairs is drawn."""


def with_base(inside: Inside, name: str) -> Drawn | None:
    """Draw the share of each change's energy that lies in the base's top-k subspaces, by kind of layer."""
    way, shown = "overlap_both", inside.subjects
    found = [(one, one.table[np.isfinite(one.table[way])]) for one in shown if way in one.table]
    modules = in_order(module for _, table in found for module in table["module"])
    if not 1 < len(modules) <= 24:
        return None
    title = f"Share of the change inside the base's top {inside.k} directions"
    with canvas(name, title, 520, 90 + 38 * len(modules)) as made:
        axes = rows_of_modules(made, modules)
        for number, (one, table) in enumerate(found):
            shift = 0.62 * ((number + 0.5) / len(found) - 0.5)
            for row, module in enumerate(modules):
                there = table.loc[table["module"] == module]
                if there.empty:
                    continue
                low, median, high = (float(getattr(there[way], part)()) for part in ("min", "median", "max"))
                made.mark(axes.plot([low, high], [row + shift] * 2, color=one.colour, lw=1.4, alpha=0.5)[0], one)
                tip = f"{one.label}, {module}: {median:.3g} of the energy (median of {len(there)}; {low:.3g} to {high:.3g})"
                for side in ("left", "right"):
                    if f"overlap_{side}" in there:
                        tip += f"; {side} {float(there[f'overlap_{side}'].median()):.3g}"
                dot(made, axes, one, median, row + shift, tip, 0.72)
        axes.set_xlim(left=0)
        axes.xaxis.set_major_locator(MaxNLocator(5))
        axes.set_xlabel("share of ‖ΔW‖²_F, left and right subspace at once", labelpad=6)
    caption = "Medians over depth; lines reach from the lowest to the highest layer. The tooltip has the left and the "
    caption += "right subspace alone. Near 0: the change points where the base's largest directions do not."
    return Drawn(made.svg, title, caption)


def of_deltas(inside: Inside, prefix: str) -> list[Drawn]:
    """Draw what pairs of deltas have in common: by depth for a few pairs, as a map for three deltas and more."""
    names = [model.name for model in inside.models]
    table = inside.overlaps
    table = table[table["delta_a"].isin(names) & table["delta_b"].isin(names)]
    if table.empty:
        return []
    drawn: list[Drawn | None] = []
    if len(names) > 2:
        shares = table.groupby(["delta_a", "delta_b"], sort=False)[["left", "right"]].mean().reset_index()
        drawn += [maps.of_pairs(inside.models, shares, way, f"{prefix}-{way}") for way in ("left", "right")]
    pairs = [pair for pair in combinations(names, 2) if not _of_pair(table, pair).empty]
    placed = table.assign(depth=named(table, inside.matrices)["depth"])
    placed = placed[placed["depth"] >= 0]
    if len(pairs) == 1:
        lines = [(way, placed, way) for way in ("left", "right")]
        title = f"Subspaces of {short(names[0])} and {short(names[1])} by depth"
        drawn.append(_by_depth(title, lines, _by_luck(inside, pairs, ("left", "right")), f"{prefix}-depth"))
    elif len(pairs) <= MOST_PAIRS:
        for way in ("left", "right"):
            lines = [(" and ".join(short(one, 11) for one in pair), _of_pair(placed, pair), way) for pair in pairs]
            title = f"{way[0].upper()}{way[1:]} subspaces of pairs of deltas by depth"
            drawn.append(_by_depth(title, lines, _by_luck(inside, pairs, (way,)), f"{prefix}-depth-{way}"))
    return [figure for figure in drawn if figure is not None]


def _of_pair(table: pd.DataFrame, pair: tuple[str, str]) -> pd.DataFrame:
    a, b = pair
    there = (table["delta_a"] == a) & (table["delta_b"] == b) | (table["delta_a"] == b) & (table["delta_b"] == a)
    return table[there]


def _by_depth(
    title: str, asked: Sequence[tuple[str, pd.DataFrame, str]], luck: float | None, name: str
) -> Drawn | None:
    """Draw a line per label: the median of a way's column over the layers of each block.

    Args:
        title: of the figure.
        asked: label, rows with their depth, and column.
        luck: what random subspaces would have in common, None if it is not known.
        name: of the canvas.
    """
    lines = []
    for i, (label, rows, way) in enumerate(asked):
        found = rows[np.isfinite(rows[way])].groupby("depth")[way].median()
        if len(found) > 1:
            lines.append((Model(label, DELTA_COLOURS[i], RANK_SHAPES[i]), found))
    if not lines:
        return None
    with canvas(name, title, 520, 280) as made:
        axes = made.axes(left=58, right=right_margin([line.label for line, _ in lines]), bottom=48)
        for line, found in lines:
            made.mark(axes.plot(found.index, found.to_numpy(), color=line.colour, lw=1.7)[0], line)
            for depth, value in found.items():
                tip = f"{line.label}, block {depth:g}: {value:.3f} in common (median over its layers)"
                mark = axes.plot([depth], [value], line.marker, ms=5.5, color=line.colour, mec=PAPER, mew=0.6)
                made.mark(mark[0], line, tip)
        if luck is not None:
            axes.axhline(luck, color=BASE_COLOUR, lw=1, ls=(0, (4, 3)), zorder=1)
        axes.set_ylim(0, 1.08 * max(luck or 0.0, *(float(found.max()) for _, found in lines)) + 0.02)
        axes.xaxis.set_major_locator(MaxNLocator(8, integer=True))
        axes.yaxis.set_major_locator(MaxNLocator(5))
        name_ends(made, axes, [(line, line.label, float(f.index[-1]), float(f.iloc[-1])) for line, f in lines])
        axes.set_xlabel("block of the model, from input to output", labelpad=6)
        axes.set_ylabel("share in common", labelpad=8, rotation_mode="anchor")
    caption = "‖UₐᵀU_b‖²_F divided by the smaller rank, median over the layers of each block."
    caption += "" if luck is None else f" Dashed: what two random subspaces have in common ({luck:.3f})."
    return Drawn(made.svg, title, caption)


def _by_luck(inside: Inside, pairs: Sequence[tuple[str, str]], ways: Sequence[str]) -> float | None:
    """Give what random subspaces of these ranks share on average: the larger rank over the dimension, median over layers."""
    columns = [{"left": "out_features", "right": "in_features"}[way] for way in ways]
    if any(column not in inside.matrices for column in columns):
        return None
    names = {name for pair in pairs for name in pair}
    rows = inside.matrices[inside.matrices["delta"].isin(names)]
    most = rows.groupby("layer")["rank"].max()
    found = pd.concat([(most / rows.groupby("layer")[column].max()).dropna() for column in columns])
    return float(found.median()) if len(found) else None
