"""Figures over steps, or over the links of a chain: how the inside of a delta grew. Numbers in, SVG text out."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import pandas as pd
from matplotlib.ticker import FixedLocator, MaxNLocator

from loralab.report.drawing import canvas
from loralab.report.figures import Drawn
from loralab.report.labels import name_ends, right_margin
from loralab.report.spectra import Subject, dot
from loralab.report.spectra_folder import MARKER_SIZE, Inside, short
from loralab.report.wording import whole

Point = tuple[float, float, str]
"""A step, the value there, and what its tooltip says behind the value."""


@dataclass(frozen=True)
class Part:
    """One thing that is followed: its title, its axis, a value in words, and how to read it."""

    title: str
    axis: str
    write: Callable[[float], str]
    caption: str


def many(count: float) -> str:
    """Count intruders in words."""
    return f"{count:.0f} intruder{'' if count == 1 else 's'}"


PARTS = {
    "intruders": Part("Intruders in all matrices", "intruders", many, ""),
    "energy": Part(
        "Energy that intruders hold",
        "share of the energy",
        lambda value: f"{value:.3g} of the energy",
        "Of the squared leading singular values of a matrix, the mean over matrices.",
    ),
    "value": Part(
        "Size of the largest intruder",
        "share of the largest value",
        lambda value: f"{value:.3f} of the largest value",
        "Of all matrices, the intruder that is largest beside its matrix's largest singular value.",
    ),
    "position": Part(
        "Position of the largest intruder",
        "position",
        lambda value: f"position {value:.0f}",
        "The same intruder's place among its matrix's singular values.",
    ),
    "rank90": Part(
        "Directions that hold 90 % of the change", "directions", lambda value: f"{value:.3g}", "Median over matrices."
    ),
    "effective_rank": Part(
        "Effective rank of the change", "effective rank", lambda value: f"{value:.3g}", "Median over matrices."
    ),
    "relative_norm": Part(
        "Size of the change", "‖ΔW‖_F / ‖W₀‖_F", lambda value: f"{value:.3g}", "Median over matrices."
    ),
}


@dataclass(frozen=True, eq=False)
class Growth:
    """What one subject was at each step, by part: points in order of steps."""

    one: Subject
    points: Mapping[str, Sequence[Point]]


def drawn(grown: Sequence[Growth], prefix: str, x_label: str, setting: str) -> list[Drawn]:
    """Draw a figure per part that some subject has two points of.

    Args:
        setting: k and ε, said with every count.
    """
    figures = []
    for key, part in PARTS.items():
        lines = [(growth.one, [p for p in growth.points.get(key, ()) if math.isfinite(p[1])]) for growth in grown]
        lines = [(one, points) for one, points in lines if points]
        if max((len(points) for _, points in lines), default=0) > 1:
            caption = f"{setting}." if key == "intruders" and setting else part.caption
            figures.append(_over_steps(lines, part, f"{prefix}-{key.replace('_', '-')}", x_label, caption))
    return figures


def _over_steps(
    lines: Sequence[tuple[Subject, Sequence[Point]]], part: Part, name: str, x_label: str, caption: str
) -> Drawn:
    """Draw a line per subject, named at its end."""
    with canvas(name, part.title, 520, 290) as made:
        axes = made.axes(left=62, right=right_margin([one.label for one, _ in lines]), bottom=48)
        where = x_label.split(" ")[0 if x_label.startswith("link") else -1].rstrip("s")
        for one, points in lines:
            xs, ys, _ = zip(*points, strict=True)
            made.mark(axes.plot(xs, ys, color=one.colour, lw=1.7)[0], one)
            for x, y, said in points:
                dot(made, axes, one, x, y, f"{one.label}, {where} {whole(x)}: {part.write(y)}{said}")
        most = max(y for _, points in lines for _, y, _ in points)
        last = max(points[-1][0] for _, points in lines)
        axes.set_ylim(-0.03 * (most or 1), 1.08 * (most or 1))
        axes.set_xlim(0.6 if where == "link" else 0, last + (0.4 if where == "link" else 0.03 * last))
        axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
        axes.xaxis.set_major_formatter(lambda value, _: whole(value))
        axes.yaxis.set_major_locator(MaxNLocator(5, integer=most >= 3))
        if part is PARTS["position"]:
            axes.set_ylim(most + 0.5, 0.5)
            axes.yaxis.set_major_locator(FixedLocator(range(1, int(most) + 1, max(1, round(most / 6)))))
        name_ends(made, axes, [(one, one.label, *points[-1][:2]) for one, points in lines])
        axes.set_xlabel(x_label, labelpad=6)
        axes.set_ylabel(part.axis, labelpad=8, rotation_mode="anchor")
    return Drawn(made.svg, part.title, caption)


# What is measured at a step


def counted(vectors: pd.DataFrame) -> dict[str, tuple[float, str]]:
    """Sum up the leading vectors of one delta at one step.

    Returns:
        Value and words by `intruders` (how many), `energy` (the share they hold of a matrix's squared leading values, mean over
        matrices), `value` (of the largest intruder, relative to its matrix's largest) and `position` (of the same); the last
        two are NaN where there is no intruder, the energy where there is no vector.
    """
    found = vectors[vectors["intruder"]]
    energy = vectors["value"] ** 2
    sums = (
        pd.DataFrame({"all": energy, "theirs": energy.where(vectors["intruder"], 0.0)}).groupby(vectors["layer"]).sum()
    )
    shares = (sums["theirs"] / sums["all"]).fillna(0.0)  # a tuned matrix of zeros has none
    made = {"intruders": (float(len(found)), f" in {found['layer'].nunique()} matrices")}
    made |= {"energy": (float(shares.mean()) if len(shares) else math.nan, "")}
    if found["relative_value"].notna().any():
        top = found.loc[found["relative_value"].idxmax()]
        made["value"] = (float(top["relative_value"]), f", {top['layer']}, position {top['position']:.0f}")
        return made | {"position": (float(top["position"]), f", {top['layer']}")}
    return made | {"value": (math.nan, ""), "position": (math.nan, "")}


def from_tables(
    one: Subject, matrices: Sequence[tuple[float, pd.DataFrame]], vectors: Sequence[tuple[float, pd.DataFrame]]
) -> Growth:
    """Follow a subject through its tables of matrices and of leading vectors, each by step."""
    points: dict[str, list[Point]] = {}
    for step, table in vectors:
        for part, (value, said) in counted(table).items():
            points.setdefault(part, []).append((step, value, said))
    for column in ("rank90", "effective_rank", "relative_norm"):
        for step, table in matrices:
            values = pd.to_numeric(table.get(column, pd.Series(dtype=float)), errors="coerce").dropna()
            if len(values):
                points.setdefault(column, []).append((step, float(values.median()), f" (median of {len(values)})"))
    return Growth(one, points)


# Of a spectra folder


def of_chains(inside: Inside, prefix: str) -> list[Drawn]:
    """Draw a folder's checkpoints over steps, and a COLA chain over its links."""
    figures = []
    shown = {model.name: model for model in inside.models}
    for way, x_label in (("step", "optimizer steps"), ("link", "link of the chain")):
        grown = []
        for chain in (chain for chain in inside.chains if chain.way == way):
            model = shown.get(chain.places[-1][1])
            if model is None:
                continue
            facts = (model.folder, model.method, short(chain.label), model.colour, model.marker, MARKER_SIZE)
            tables = [(float(x), inside.matrices[inside.matrices["delta"] == name]) for x, name in chain.places]
            vectors = [(float(x), inside.vectors_of(name)) for x, name in chain.places]
            grown.append(from_tables(Subject(*facts, inside.matrices), tables, [v for v in vectors if len(v[1])]))
        figures += drawn(grown, f"{prefix}-{way}", x_label, inside.setting)
    return figures
