"""The learning × forgetting plane of a comparison. Runs in, SVG text out."""

from collections.abc import Sequence
from dataclasses import dataclass

from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from loralab.evals.stats import Score
from loralab.report.compare import Comparison, frontier
from loralab.report.drawing import (
    BASE_COLOUR,
    PAPER,
    Canvas,
    canvas,
    colour,
    marker_size,
    shape,
)
from loralab.report.labels import Box, place_labels
from loralab.report.measures import NATS, Side, View, change, half_width
from loralab.report.read import Run
from loralab.report.wording import measured


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
    return "nats per token" if side.unit == NATS else side.words


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
