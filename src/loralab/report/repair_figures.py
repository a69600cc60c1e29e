"""Figures of a sweep of repairs: every edit in the plane of learning and forgetting, by strength, and against uniform scaling."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator

from loralab.lab.measured import finite
from loralab.lab.repaired import Sweep
from loralab.lab.tradeoff import CONTROLS, SCALE
from loralab.report.changes import Model
from loralab.report.drawing import BASE_COLOUR, FAINT, PAPER, Canvas, canvas
from loralab.report.figures import Drawn
from loralab.report.labels import Box, name_ends, place_labels, right_margin, text_width
from loralab.report.provenance import plain
from loralab.report.read import printable
from loralab.report.wording import number

LOOKS = {
    SCALE: ("uniform scale", "#6B7280", "o"),
    "taper": ("taper by depth", "#009E73", "v"),
    "top1": ("top intruder", "#0072B2", "D"),
    "all": ("all intruders", "#D55E00", "s"),
    "threshold": ("hard threshold", "#7F4FA3", "P"),
    "neighbour": ("neighbour", "#CC79A7", "^"),
    "matched top1": ("norm as top intruder", "#56B4E9", "D"),
    "matched all": ("norm as all intruders", "#E69F00", "s"),
    "matched threshold": ("norm as threshold", "#B79BD1", "P"),
}
"""Curve → name, colour, marker. Controls are hollow and dotted."""


@dataclass(frozen=True, eq=False)
class Curve:
    """Edits of one family, in order of strength; of a control, the family that it is the control of belongs to the name."""

    name: str
    rows: pd.DataFrame

    @property
    def folder(self) -> str:
        return self.name

    @property
    def method(self) -> str:
        return self.name

    @property
    def label(self) -> str:
        return LOOKS.get(self.name, (printable(self.name),))[0]

    @property
    def colour(self) -> str:
        return LOOKS[self.name][1] if self.name in LOOKS else BASE_COLOUR

    @property
    def marker(self) -> str:
        return LOOKS[self.name][2] if self.name in LOOKS else "X"

    @property
    def is_control(self) -> bool:
        return self.name.partition(" ")[0] in CONTROLS

    @property
    def model(self) -> Model:
        """What its marks and its icon are drawn with."""
        return Model(self.name, self.colour, self.marker)


def curves_of(points: pd.DataFrame) -> list[Curve]:
    """Part the edits into curves: uniform scaling first, then edits, then controls; each with the unedited delta on it."""
    of = points["of"].fillna("").astype(str) if "of" in points else pd.Series("", index=points.index)
    names = points["family"].astype(str) + of.map(lambda family: f" {family}" if family else "")
    order = [*(name for name in LOOKS if (names == name).any()), *sorted(set(names) - set(LOOKS))]
    whole = _unedited(points)
    made = []
    for name in order:
        rows = points[names == name]
        neutral = 0.0 if name.endswith("threshold") else 1.0
        if len(whole) and not (rows["strength"] == neutral).any():
            rows = pd.concat([rows, whole.assign(strength=neutral)])
        made.append(Curve(name, rows.sort_values("strength", kind="stable")))
    return made


def label(side: str, facts: Mapping[str, Any]) -> str:
    """Name an axis: what was measured, and its unit."""
    found = plain(facts.get(side))
    parts = found.get("parts")
    names = [printable(str(plain(part).get("name"))) for part in parts] if isinstance(parts, list) else []
    what = names[0] if len(names) == 1 else f"mean of {len(names)} scores" if names else ""
    return ", ".join(part for part in (what, str(found.get("unit") or "")) if part)


def figures(found: Sweep) -> list[Drawn]:
    """Draw the plane, what each strength gives, and the differences from uniform scaling."""
    curves = curves_of(found.points)
    in_plane, against = planes(found, curves), against_scale(found, curves)
    by_strength = [_by_strength(found, curves, side) for side in ("learning", "forgetting")]
    # Two figures stand side by side: of what belongs together, pairs.
    rest = [against, *by_strength] if len(in_plane) == 1 else [*by_strength, against]
    return [*in_plane, *(figure for figure in rest if figure is not None)]


def tip_of(row: Mapping[str, Any]) -> str:
    """Say where an edit lies."""
    parts = []
    for side, word in (("learning", "learned"), ("forgetting", "forgot")):
        low, high = (finite(row[f"{side}_{end}"]) for end in ("low", "high"))
        span = "" if low is None or high is None else f" [{number(low, signed=True)}, {number(high, signed=True)}]"
        parts.append(f"{word} {number(finite(row[side]), signed=True)}{span}")
    return f"{row['edit']}: {', '.join(parts)}"


# The plane

CLOSE = 0.5
"""Where the edits that are no scales take less than this share of the plane both ways, a second figure shows them close."""
Limits = tuple[tuple[float, float], tuple[float, float]]
"""Ends of the forgetting axis, and of the learning axis."""


def planes(found: Sweep, curves: Sequence[Curve]) -> list[Drawn]:
    """Draw the whole plane, and where the edits crowd near the unedited delta, that corner by itself."""
    placed = found.points.dropna(subset=["learning", "forgetting"])
    if placed.empty:
        return []
    limit = finite(plain(found.choice).get("limit"))
    ends = [
        placed[[side, f"{side}_low", f"{side}_high"]].to_numpy(float).ravel() for side in ("forgetting", "learning")
    ]
    whole = _around([*ends[0], 0.0, *([] if limit is None else [limit])], 0.06), _around([*ends[1], 0.0], 0.06)
    others = placed[placed["family"] != SCALE]
    near = others if others.empty else pd.concat([others, _unedited(placed)])
    if len(near) < 3:
        return [_plane(found, curves, whole, None)]
    close = _around(near["forgetting"].tolist(), 0.15), _around(near["learning"].tolist(), 0.2)
    shares = [(c[1] - c[0]) / (w[1] - w[0]) for c, w in zip(close, whole, strict=True)]
    if max(shares) > CLOSE:
        return [_plane(found, curves, whole, None)]
    return [_plane(found, curves, whole, close), _plane(found, curves, close, None)]


def _around(values: Sequence[float], share: float) -> tuple[float, float]:
    kept = [float(value) for value in values if math.isfinite(value)]
    room = share * (max(kept) - min(kept) or 1.0)
    return min(kept) - room, max(kept) + room


def _unedited(points: pd.DataFrame) -> pd.DataFrame:
    return points[(points["family"] == SCALE) & (points["strength"] == 1)]


def _plane(found: Sweep, curves: Sequence[Curve], limits: Limits, close: Limits | None) -> Drawn:
    """Draw the plane within limits; with `close`, that corner has a frame, and its curves are named in the other figure."""
    is_whole = limits[0][0] <= 0 <= limits[0][1] and limits[1][0] <= 0 <= limits[1][1]
    title = "Learning against forgetting, a curve per family of edits" + ("" if is_whole else ": the frame, close")
    with canvas(f"repair-plane{'' if is_whole else '-close'}", title, 520, 440) as made:
        axes = made.axes(left=66, bottom=54)
        axes.set(xlim=limits[0], ylim=limits[1])
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_locator(MaxNLocator(6))
        if is_whole:
            axes.axhline(0, color=BASE_COLOUR, lw=0.8)
            axes.axvline(0, color=BASE_COLOUR, lw=0.8)
        _budget(made, axes, found)
        taken: list[Box] = []
        for curve in curves:
            taken += _draw_curve(made, axes, curve, intervals=is_whole)
        if close is not None:
            (left, right), (low, high) = close
            frame = Rectangle((left, low), right - left, high - low, fc="none", ec=BASE_COLOUR, lw=1, zorder=6)
            axes.add_patch(frame)
        _name(made, axes, found, curves if close is None else curves[:1], taken)
        axes.set_xlabel(f"Forgotten: {label('source', found.facts)}", labelpad=8)
        axes.set_ylabel(f"Learned: {label('target', found.facts)}", labelpad=8, rotation_mode="anchor")
    if not is_whole:
        return Drawn(made.svg, title, "Without the intervals, which are larger than this figure or nearly so.")
    caption = (
        "Up is more learned, right is more forgotten: the best place is top left. The thick grey curve is uniform "
    )
    caption += "scaling, the bar that an edit must beat. Hollow marks are controls. Thin lines are 95\N{NO-BREAK SPACE}% intervals."
    return Drawn(made.svg, title, caption)


def _name(made: Canvas, axes: Axes, found: Sweep, curves: Sequence[Curve], taken: list[Box]) -> None:
    """Write names beside curves, at their strongest mark, and beside the base, the unedited delta and the chosen edit."""
    spots: list[tuple[float, float, str, Curve | None]] = []
    for strength, word in ((0.0, "base"), (1.0, "unedited")):
        rows = found.points[(found.points["family"] == SCALE) & (found.points["strength"] == strength)]
        spots += [(float(row["forgetting"]), float(row["learning"]), word, None) for row in rows.to_dict("records")]
    best = plain(found.best)
    if best:
        x, y = float(best["forgetting"]), float(best["learning"])
        axes.plot(x, y, "o", ms=16, mfc="none", mec=BASE_COLOUR, mew=2, zorder=5)
        spots.append((x, y, f"chosen: {printable(str(best['edit']))}", None))
    for curve in curves:
        rows = curve.rows.dropna(subset=["learning", "forgetting"])
        if curve.name == SCALE:
            rows = rows[rows["strength"].between(0.01, 0.99)]
            rows = rows[_within(axes, rows)]
            rows = rows.iloc[len(rows) // 2 :]
        spots += [
            (float(row["forgetting"]), float(row["learning"]), curve.label, curve)
            for row in rows.head(1).to_dict("records")
        ]
    (left, right), (low, high) = axes.get_xlim(), axes.get_ylim()
    spots = [spot for spot in spots if left <= spot[0] <= right and low <= spot[1] <= high]
    texts = place_labels(axes, [spot[:2] for spot in spots], [spot[2] for spot in spots], taken)
    for (_, _, _, owner), text in zip(spots, texts, strict=True):
        made.mark(text, owner)


def _within(axes: Axes, rows: pd.DataFrame) -> pd.Series:
    return rows["forgetting"].between(*axes.get_xlim()) & rows["learning"].between(*axes.get_ylim())


def _budget(made: Canvas, axes: Axes, found: Sweep) -> None:
    """Draw the budget as a line, what is beyond it shaded."""
    limit = finite(plain(found.choice).get("limit"))
    if limit is None or limit > axes.get_xlim()[1]:
        return
    axes.axvspan(max(limit, axes.get_xlim()[0]), axes.get_xlim()[1], color=FAINT, alpha=0.35, lw=0, zorder=0)
    line = axes.axvline(limit, color=BASE_COLOUR, lw=1.4, ls=(0, (5, 3)))
    made.mark(line, None, f"the budget: forgetting of at most {number(limit)}")
    if not axes.get_xlim()[0] <= limit <= axes.get_xlim()[1]:
        return
    text = axes.text(limit, 0.02, " beyond the budget", transform=axes.get_xaxis_transform(), size=11, ha="left")
    if axes.transData.transform((limit, 0))[0] > axes.get_window_extent().x1 - text_width("beyond the budget", 11):
        text.set(ha="right", text="the budget ")


def _draw_curve(made: Canvas, axes: Axes, curve: Curve, *, intervals: bool) -> list[Box]:
    """Draw a curve with its intervals; give the boxes that its marks and the stretches between them cover, in pixels."""
    rows, bar = curve.rows.dropna(subset=["learning", "forgetting"]), curve.name == SCALE
    xs, ys = rows["forgetting"].to_numpy(float), rows["learning"].to_numpy(float)
    style: dict[str, Any] = {"ls": (0, (1.5, 2.5))} if curve.is_control else {}
    line = axes.plot(xs, ys, color=curve.colour, lw=4 if bar else 1.6, alpha=0.45 if bar else 0.8, zorder=2, **style)
    made.mark(line[0], curve)
    for row in rows[_within(axes, rows)].to_dict("records"):
        if str(row["family"]) != curve.name.partition(" ")[0]:
            continue  # the unedited delta, which stands on the curve of scales
        x, y = float(row["forgetting"]), float(row["learning"])
        spans = (("forgetting", lambda end, y=y: (end, y)), ("learning", lambda end, x=x: (x, end)))
        for side, point in spans if intervals else ():
            ends = [finite(row[f"{side}_{end}"]) for end in ("low", "high")]
            if None not in ends:
                both = [point(end) for end in ends]
                ink = axes.plot(*zip(*both, strict=True), color=curve.colour, lw=0.8, alpha=0.28, zorder=1)
                made.mark(ink[0], curve)
        face, edge = (PAPER, curve.colour) if curve.is_control else (curve.colour, PAPER)
        size = 6.0 if curve.is_control else 7.5
        mark = axes.plot([x], [y], curve.marker, ms=size, mfc=face, mec=edge, mew=1.2 if curve.is_control else 0.8)
        made.mark(mark[0], curve, tip_of(row), stop=True)
    pixels = axes.transData.transform(list(zip(xs, ys, strict=True))).tolist() if len(xs) else []
    return [(x - 5, y - 5, x + 5, y + 5) for x, y in _dense(pixels)]


def _dense(pixels: Sequence[Sequence[float]]) -> list[tuple[float, float]]:
    """Give the corners of a line and points between them, every 24 pixels."""
    found = [(float(x), float(y)) for x, y in pixels]
    between = []
    for (x, y), (u, v) in pairwise(found):
        steps = int(math.hypot(u - x, v - y) / 24)
        between += [(x + (u - x) * i / steps, y + (v - y) * i / steps) for i in range(1, steps)]
    return [*found, *between]


# By strength


def _by_strength(found: Sweep, curves: Sequence[Curve], side: str) -> Drawn | None:
    """Draw learning or forgetting against strength; a threshold, whose strength is none of a share, is left out."""
    kept = [curve for curve in curves if curve.rows["strength"].nunique() > 1 and not curve.name.endswith("threshold")]
    if not kept:
        return None
    word, role = ("learned", "target") if side == "learning" else ("forgotten", "source")
    title = f"What is {word} by strength"
    with canvas(f"repair-{side}", title, 520, 320) as made:
        axes = made.axes(left=62, right=right_margin([curve.label for curve in kept]), bottom=48)
        ends = []
        for curve in kept:
            rows = curve.rows.dropna(subset=[side])
            style: dict[str, Any] = {"ls": (0, (1.5, 2.5))} if curve.is_control else {}
            bar = curve.name == SCALE
            xs, ys = rows["strength"].to_numpy(float), rows[side].to_numpy(float)
            line = axes.plot(xs, ys, color=curve.colour, lw=4 if bar else 1.6, alpha=0.45 if bar else 0.9, **style)
            made.mark(line[0], curve)
            face, edge = (PAPER, curve.colour) if curve.is_control else (curve.colour, PAPER)
            for row in rows.to_dict("records"):
                mark = axes.plot([row["strength"]], [row[side]], curve.marker, ms=5.5, mfc=face, mec=edge, mew=0.8)
                made.mark(mark[0], curve, tip_of(row))
            if len(rows):
                ends.append((curve.model, curve.label, float(xs[0]), float(ys[0])))
        axes.invert_xaxis()
        axes.xaxis.set_major_locator(MaxNLocator(6))
        axes.yaxis.set_major_locator(MaxNLocator(5))
        name_ends(made, axes, ends)
        axes.set_xlabel("strength λ: 1 is the unedited delta", labelpad=6)
        axes.set_ylabel(label(role, found.facts), labelpad=8, rotation_mode="anchor")
    return Drawn(made.svg, title, "To the right the edit grows stronger. At λ = 1 nothing is changed.")


# Against uniform scaling


def against_scale(found: Sweep, curves: Sequence[Curve]) -> Drawn | None:
    """Draw how much more each edit forgets than the curve of scales where that learns as much, with intervals."""
    rows = [(row, value) for row in found.verdicts if (value := finite(row.get("difference"))) is not None]
    if not rows:
        return None
    owners = {str(edit): curve for curve in curves for edit in curve.rows["edit"]}
    title = "Forgetting beside uniform scaling at equal learning"
    with canvas("repair-against-scale", title, 520, 66 + 17 * len(rows)) as made:
        names = [printable(str(row["edit"])) for row, _ in rows]
        axes = made.axes(left=16 + max(text_width(name, 11.3) for name in names), bottom=50, top=8)
        axes.set_ylim(len(rows) - 0.5, -0.5)
        axes.set_yticks(range(len(rows)), names)
        axes.yaxis.grid(False)
        axes.axvline(0, color=BASE_COLOUR, lw=1.2)
        for place, (row, value) in enumerate(rows):
            curve = owners.get(str(row["edit"]))
            ink, marker = (curve.colour, curve.marker) if curve is not None else (BASE_COLOUR, "X")
            low, high = (finite(row.get(key)) for key in ("low", "high"))
            hollow = row.get("verdict") == "tie"
            span = "" if low is None or high is None else f" [{number(low, signed=True)}, {number(high, signed=True)}]"
            if low is not None and high is not None:
                made.mark(axes.plot([low, high], [place] * 2, color=ink, lw=1.5, alpha=0.6)[0], curve)
            scale = number(finite(row.get("scale_strength")), 2)
            tip = f"{row['edit']}: forgets {number(value, signed=True)}{span} beside scale {scale}"
            face, edge = (PAPER, ink) if hollow else (ink, PAPER)
            mark = axes.plot([value], [place], marker, ms=6.5, mfc=face, mec=edge, mew=1.5 if hollow else 0.8)
            made.mark(mark[0], curve, f"{tip}: {row.get('verdict')}", stop=True)
        axes.xaxis.set_major_locator(MaxNLocator(5))
        axes.set_xlabel(f"difference in forgetting, {plain(found.facts.get('source')).get('unit') or ''}".rstrip(", "))
    caption = "Left of the line: forgets less than the uniform scale that learns as much. Hollow marks are ties. Intervals hold "
    caption += "together, with 95\N{NO-BREAK SPACE}%, for all edits of one claim."
    return Drawn(made.svg, title, caption)
