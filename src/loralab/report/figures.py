"""Figures of one comparison: the learning × forgetting plane, and curves over training. Runs in, SVG text out."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import accumulate

from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from loralab.evals.stats import Score
from loralab.report.compare import NATS, SHARE, Comparison, Side, View, change, frontier, half_width
from loralab.report.drawing import (
    BASE_COLOUR,
    PAPER,
    Canvas,
    canvas,
    colour,
    marker_size,
    shape,
)
from loralab.report.labels import Box, name_ends, place_labels, right_margin
from loralab.report.read import Run
from loralab.report.wording import measured, whole

CURVE_POINTS = 60
"""Most points of a training curve; each is the mean of the steps it stands for."""


@dataclass(frozen=True)
class Drawn:
    """A figure for the page: SVG text, what it shows in a line, and how to read it."""

    svg: str
    title: str
    caption: str = ""


# The plane


def plane(comparison: Comparison, view: View, name: str) -> Drawn | None:
    """Draw every finished run by what it learned and what it forgot, with 95 % intervals; None if no run has both."""
    learning, forgetting = view.learning, view.forgetting
    if learning is None or forgetting is None:
        return None
    measures = [(run, change(run, forgetting), change(run, learning)) for run in comparison.finished]
    found = [(run, lost, learned) for run, lost, learned in measures if lost is not None and learned is not None]
    if not found:
        return None
    same = learning.way == forgetting.way
    title = f"By {learning.way}" if same else f"New task by {learning.way}, old skills by {forgetting.way}"
    # Where every run learned much, the way from the base would leave no room to tell them apart.
    gains = [learned.value for _, _, learned in found]
    with_base = min(gains) <= max(gains) / 2
    title += "" if with_base else " (the base is far below, at 0)"
    with canvas(name, f"Learning against forgetting on {comparison.name}. {title}", 520, 420) as made:
        axes = made.axes(left=66, bottom=54)
        _frame_plane(axes, found, with_base)
        points = [(lost.value, learned.value) for _, lost, learned in found]
        origin = [(0.0, 0.0)] if with_base else []
        _draw_frontier(axes, [*origin, *points])
        for x, y in origin:
            axes.plot([x], [y], "o", ms=8, mfc=PAPER, mec=BASE_COLOUR, mew=2)
        arms: list[Box] = []
        for run, lost, learned in found:
            arms += _draw_run(made, axes, run, lost, learned, f"{comparison.label(run)}: {_both(learned, lost)}")
        labels = [*("base" for _ in origin), *(comparison.label(run) for run, _, _ in found)]
        texts = place_labels(axes, [*origin, *points], labels, arms)
        for run, text in zip([item[0] for item in found], texts[len(origin) :], strict=True):
            made.mark(text, run)
        axes.set_xlabel(f"Forgotten: old skills, {_axis_unit(forgetting)}", labelpad=8)
        axes.set_ylabel(f"Learned: {comparison.name}, {_axis_unit(learning)}", labelpad=8, rotation_mode="anchor")
    return Drawn(made.svg, title)


def _axis_unit(side: Side) -> str:
    return "nats per token" if side.unit == NATS else f"share {side.phrase}"


def _both(learned: Score, lost: Score) -> str:
    units = ["" if s.unit != NATS else " nats/token" for s in (learned, lost)]
    return f"learned {measured(learned, signed=True)}{units[0]}, forgot {measured(lost, signed=True)}{units[1]}"


def _frame_plane(axes: Axes, found: Sequence[tuple[Run, Score, Score]], with_base: bool) -> None:
    """Set limits that hold every interval, and the base if it is shown, and draw the lines through the base."""
    for low_high, index in ((axes.set_xlim, 1), (axes.set_ylim, 2)):
        ends = [0.0] if with_base or index == 1 else []
        for item in found:
            score = item[index]
            assert isinstance(score, Score)
            ends += [score.value - (half_width(score) or 0), score.value + (half_width(score) or 0)]
        low, high = min(ends), max(ends)
        room = 0.12 * (high - low or 1.0)
        low_high(low - room, high + room)
    if with_base:
        axes.axhline(0, color=BASE_COLOUR, lw=0.8)
    axes.axvline(0, color=BASE_COLOUR, lw=0.8)
    for ticks in (axes.xaxis, axes.yaxis):
        ticks.set_major_locator(MaxNLocator(6))


def _draw_frontier(axes: Axes, points: Sequence[tuple[float, float]]) -> None:
    kept = [points[i] for i in frontier(points)]
    axes.plot(*zip(*kept, strict=True), ls=(0, (4, 4)), lw=1.2, color=BASE_COLOUR, alpha=0.7)


def _draw_run(made: Canvas, axes: Axes, run: Run, lost: Score, learned: Score, tip: str) -> list[Box]:
    """Draw one point with its intervals; give the boxes that the intervals cover, in pixels."""
    x, y, ink = lost.value, learned.value, colour(run.method)
    ends = [((x - h, x + h), (y, y)) for h in [half_width(lost)] if h]
    ends += [((x, x), (y - h, y + h)) for h in [half_width(learned)] if h]
    boxes = []
    for xs, ys in ends:
        made.mark(axes.plot(xs, ys, color=ink, lw=1.6, alpha=0.55, solid_capstyle="butt")[0], run)
        corners = axes.transData.transform(list(zip(xs, ys, strict=True)))
        boxes.append((corners[0][0] - 1, corners[0][1] - 1, corners[1][0] + 1, corners[1][1] + 1))
    made.mark(axes.plot([x], [y], shape(run), ms=marker_size(run), color=ink, mec=PAPER, mew=1)[0], run, tip, stop=True)
    return boxes


# Curves


def curves(comparison: Comparison, prefix: str) -> list[Drawn]:
    """Draw what was measured over training: its loss, the held-out losses, answers where they were probed on the way."""
    place, x_label = _places(comparison.runs)
    title = "Loss on the training data"
    drawn = [_curve(comparison, f"{prefix}-train", title, NATS, x_label, lambda run: _training(run, place), dots=False)]
    for name, title, unit in (
        ("target/accuracy", f"New task {comparison.name}: share answered right", "share of items"),
        ("target/loss", f"New task {comparison.name}: loss on held-out data", NATS),
        ("source/accuracy", "Old skills: share answered right", "share of items"),
        ("general/loss", "Old skills: loss on general text", NATS),
        ("drift/kl", "Drift from the base: KL(base‖tuned)", NATS),
    ):
        drawn.append(
            _curve(
                comparison,
                f"{prefix}-{name.replace('/', '-')}",
                title,
                unit,
                x_label,
                partial(_probed, name=name, place=place),
            )
        )
    return [figure for figure in drawn if figure is not None]


Place = Callable[[Run, int], float]
Points = list[tuple[float, Score]]


def _places(runs: Sequence[Run]) -> tuple[Place, str]:
    """Put steps on the x axis, or tokens where runs read a different number per step."""
    per_step = [sum(line.get("tokens") or 0 for line in run.metrics) / len(run.metrics) for run in runs if run.metrics]
    if not per_step or max(per_step) <= 1.1 * min(per_step):
        return lambda run, step: float(step), "optimizer steps"
    read = {
        run.folder: dict(
            zip(
                [line["step"] for line in run.metrics],
                accumulate(float(line.get("tokens") or 0) for line in run.metrics),
                strict=True,
            )
        )
        for run in runs
    }
    return lambda run, step: read[run.folder].get(step, math.nan if step else 0.0), "tokens read"


def _training(run: Run, place: Place) -> Points:
    """Average the training loss over equal stretches of steps."""
    lines = run.metrics
    size = math.ceil(len(lines) / CURVE_POINTS)
    parts = [lines[i : i + size] for i in range(0, len(lines), size or 1)]
    return [
        (place(run, part[-1]["step"]), Score("loss", sum(line["loss"] for line in part) / len(part), NATS, 0, None))
        for part in parts
    ]


def _probed(run: Run, name: str, place: Place) -> Points:
    found = run.history.get(name, [])
    if found and found[0][0] > 0 and name in run.base:
        found = [(0, run.base[name]), *found]
    points = [(place(run, step), score) for step, score in found]
    return [point for point in points if math.isfinite(point[0])]


def _curve(
    comparison: Comparison,
    name: str,
    title: str,
    unit: str,
    x_label: str,
    read: Callable[[Run], Points],
    *,
    dots: bool = True,
) -> Drawn | None:
    """Draw one line per run, named at its end; None unless some run has three points: two are in the table."""
    lines = [(run, points) for run in comparison.runs if len(points := read(run)) > 1]
    if max((len(points) for _, points in lines), default=0) < 3:
        return None
    with canvas(name, title, 520, 300) as made:
        axes = made.axes(left=58, right=right_margin([comparison.label(run) for run, _ in lines]), bottom=48)
        for run, points in lines:
            _draw_line(made, axes, run, points, comparison.label(run), unit, x_label, dots=dots)
        axes.set_xlim(0, max(points[-1][0] for _, points in lines) or 1)
        axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
        axes.xaxis.set_major_formatter(lambda value, _: whole(value))
        axes.yaxis.set_major_locator(MaxNLocator(5))
        if unit == SHARE:
            low, high = axes.get_ylim()
            axes.set_ylim(max(low, -0.02), min(high, 1.02))
        ends = [(run, points[-1]) for run, points in lines]
        name_ends(made, axes, [(run, comparison.label(run), x, score.value) for run, (x, score) in ends])
        axes.set_xlabel(x_label, labelpad=6)
        axes.set_ylabel(unit, labelpad=8, rotation_mode="anchor")
    mean = max(math.ceil(len(run.metrics) / CURVE_POINTS) for run, _ in lines)
    caption = f"Each point is the mean of up to {mean} steps." if not dots and mean > 1 else ""
    return Drawn(made.svg, title, caption)


def _range(score: Score) -> tuple[float, float]:
    """Give the 95 % interval, which ends where the score cannot go; without one, the value itself."""
    found = score.interval() if score.n > 1 else None
    return (score.value, score.value) if found is None else found


def _draw_line(
    made: Canvas, axes: Axes, run: Run, points: Points, label: str, unit: str, x_label: str, *, dots: bool
) -> None:
    xs, ys = [x for x, _ in points], [score.value for _, score in points]
    ink = colour(run.method)
    ranges = [_range(score) for _, score in points]
    if any(low < high for low, high in ranges):
        low, high = zip(*ranges, strict=True)
        made.mark(axes.fill_between(xs, low, high, color=ink, alpha=0.13, lw=0), run)
    made.mark(axes.plot(xs, ys, color=ink, lw=1.7, solid_joinstyle="round")[0], run)
    if not dots:
        return
    what = x_label.split(" ")[-1] if x_label.startswith("optimizer") else "tokens"
    for x, score in points:
        tip = f"{label}: {measured(score)} {unit} after {whole(x)} {what}"
        dot = axes.plot([x], [score.value], shape(run), ms=0.6 * marker_size(run), color=ink, mec=PAPER, mew=0.6)
        made.mark(dot[0], run, tip)
