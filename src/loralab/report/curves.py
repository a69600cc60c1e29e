"""Curves over training: the loss, what was learned, what was forgotten, and the drift. Runs in, SVG text out."""

import math
import re
import zlib
from collections.abc import Callable, Sequence
from functools import partial
from itertools import accumulate
from typing import Any

from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from loralab.evals.stats import SHARE, Score
from loralab.report.compare import Comparison
from loralab.report.drawing import BASE_COLOUR, PAPER, SIZE, Canvas, canvas, colour, marker_size, shape
from loralab.report.figures import Drawn
from loralab.report.labels import name_ends, right_margin
from loralab.report.measures import JUDGES, NATS
from loralab.report.read import Run, finite, printable
from loralab.report.wording import measured, whole

CURVE_POINTS = 60
"""Most points of a training curve; each is the mean of the steps it stands for."""
MOST_SKILL_CURVES = 24


def curves(comparison: Comparison, prefix: str) -> list[Drawn]:
    """Draw what was measured over training: its loss, then what was learned, what was forgotten, and the drift."""
    place, x_label = places(comparison.runs)
    title, unit = "Loss on the training data", loss_unit(comparison)
    drawn = []
    if comparison.objective != "policy":  # its loss is no distance from anything
        drawn.append(
            _curve(comparison, f"{prefix}-train", title, unit, x_label, lambda run: _training(run, place), dots=False)
        )
    drawn += [_probe_curve(comparison, prefix, name, place, x_label) for name in _probed_names(comparison, parts=2)]
    return [figure for figure in drawn if figure is not None]


def skill_curves(comparison: Comparison, prefix: str) -> list[Drawn]:
    """Draw the same for every skill or task that was probed over training on its own."""
    place, x_label = places(comparison.runs)
    names = _probed_names(comparison, parts=3)
    drawn = [_probe_curve(comparison, prefix, name, place, x_label) for name in names]
    return [figure for figure in drawn if figure is not None][:MOST_SKILL_CURVES]


def over_training(
    comparison: Comparison,
    prefix: str,
    name: str,
    title: str,
    unit: str,
    *,
    metric: str = "",
    baseline: tuple[float, str] | None = None,
    caption: str = "",
) -> Drawn | None:
    """Draw one score over training.

    Args:
        comparison: whose runs are drawn.
        prefix: of the figure's name.
        name: of the score.
        title: of the figure.
        unit: of the score.
        metric: key of the training lines that stands in for the score of a run that has none.
        baseline: a level, and what it is in words: a dashed line.
        caption: how to read the figure.
    """
    place, x_label = places(comparison.runs)

    def read(run: Run) -> Points:
        found = probed(run, name, place)
        return found if len(found) > 1 or not metric else _training(run, place, metric)

    key = f"{prefix}-{name.replace('/', '-').replace('_', '-')}"
    return _curve(comparison, key, title, unit, x_label, read, baseline=baseline, caption=caption)


def loss_unit(comparison: Comparison) -> str:
    """Give the unit of a loss: of text nats per token, else that of the loss on held-out rows, as far as it was measured."""
    return NATS if comparison.objective == "text" else _unit_of(comparison, "target/loss") or "nats per row"


TITLES = {
    "accuracy": ("share answered right", SHARE),
    "choice": ("share right by multiple choice", SHARE),
    "loss": ("loss on held-out data", NATS),
    "pseudo_loss": ("loss of tokens that are masked one at a time", NATS),
}
"""What levels say, by the last part of their names, and their units."""
ROLE_ORDER = ("target", "source", "general", "drift")
ELSEWHERE = ("spectrum", "intruders", "policy")
"""Roles of scores that have figures of their own: they look at weights, or at what a policy writes."""
NO_LEVELS = ("accuracy_change", "choice_change", "loss_rise", "pseudo_loss_rise", "top1_flips", "target_top1_flips")
"""Changes are seen in their levels, flips in the KL."""


def _probed_names(comparison: Comparison, parts: int) -> list[str]:
    """Give the levels measured over training, roles in order; of a role, answers before choices before losses."""
    names = dict.fromkeys(name for run in comparison.runs for name in run.history if name.count("/") == parts - 1)
    names = {name: None for name in names if name.partition("/")[0] not in ELSEWHERE}
    if comparison.objective in JUDGES:
        names = {name: None for name in names if not name.startswith("target/") or name == "target/loss"}
    kept = [name for name in names if name.rpartition("/")[2] not in NO_LEVELS and not name.endswith("_change")]
    measures = list(TITLES)

    def order(name: str) -> tuple[int, int]:
        role, measure = name.partition("/")[0], name.rpartition("/")[2]
        return (
            ROLE_ORDER.index(role) if role in ROLE_ORDER else len(ROLE_ORDER),
            measures.index(measure) if measure in measures else len(measures),
        )

    return sorted(kept, key=order)


def _probe_curve(comparison: Comparison, prefix: str, name: str, place: "Place", x_label: str) -> Drawn | None:
    role, _, measure = name.partition("/")
    skill, _, measure = measure.rpartition("/")
    said, unit = TITLES.get(measure, (measure, _unit_of(comparison, name)))
    unit = loss_unit(comparison) if name == "target/loss" else unit
    if name == "drift/kl":
        title, unit = "Drift from the base: KL(base‖tuned)", NATS
    elif name == "general/loss":
        title = "Old skills: loss on general text"
    elif name == "general/pseudo_loss":
        title = "Old skills: loss on general text, of tokens that are masked one at a time"
    elif role in ("target", "source"):
        of_what = f" {skill}" if skill else f" {comparison.name}" if role == "target" else "s"
        title = f"{'New task' if role == 'target' else 'Old skill'}{of_what}: {said}"
    else:
        title = printable(name)
    key = f"{prefix}-{re.sub('[^a-z0-9]+', '-', name.lower())}-{zlib.crc32(name.encode()):08x}"
    return _curve(comparison, key, title, unit, x_label, partial(probed, name=name, place=place))


def _unit_of(comparison: Comparison, name: str) -> str:
    return next((run.history[name][0][1].unit for run in comparison.runs if run.history.get(name)), "")


Place = Callable[[Run, int], float]
Points = list[tuple[float, Score]]


def places(runs: Sequence[Run]) -> tuple[Place, str]:
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


def _training(run: Run, place: Place, key: str = "loss") -> Points:
    """Average what was noted in training over equal stretches of steps."""
    lines = [line for line in run.metrics if finite(line.get(key)) is not None]
    size = math.ceil(len(lines) / CURVE_POINTS)
    parts = [lines[i : i + size] for i in range(0, len(lines), size or 1)]
    return [
        (place(run, part[-1]["step"]), Score(key, sum(line[key] for line in part) / len(part), "", 0, None))
        for part in parts
    ]


def probed(run: Run, name: str, place: Place) -> Points:
    """Give a score of a run over training, beginning with the base's where the first measurement came later."""
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
    baseline: tuple[float, str] | None = None,
    caption: str = "",
) -> Drawn | None:
    """Draw one line per run, named at its end; None unless some run has three points: two are in the table."""
    lines = [(run, points) for run in comparison.runs if len(points := read(run)) > 1]
    if max((len(points) for _, points in lines), default=0) < 3:
        return None
    with canvas(name, title, 520, 300) as made:
        axes = made.axes(left=58, right=right_margin([comparison.label(run) for run, _ in lines]), bottom=48)
        for run, points in lines:
            draw_run_line(made, axes, run, points, comparison.label(run), unit, x_label, dots=dots)
        axes.set_xlim(0, max(points[-1][0] for _, points in lines) or 1)
        if baseline is not None:
            draw_baseline(axes, *baseline)
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
    averaged = f"Each point is the mean of up to {mean} steps." if not dots and mean > 1 else ""
    return Drawn(made.svg, title, caption or averaged)


def draw_baseline(axes: Axes, value: float, words: str) -> None:
    """Draw a dashed line across, and write at its left end what it is."""
    axes.axhline(value, ls=(0, (4, 4)), lw=1.2, color=BASE_COLOUR)
    axes.annotate(words, (0, value), (4, 3), ("axes fraction", "data"), "offset points", size=SIZE - 2, va="bottom")


def _range(score: Score) -> tuple[float, float]:
    """Give the 95 % interval, which ends where the score cannot go; without one, the value itself."""
    found = score.interval() if score.n > 1 else None
    return (score.value, score.value) if found is None else found


def draw_run_line(
    made: Canvas,
    axes: Axes,
    run: Run,
    points: Points,
    label: str,
    unit: str,
    x_label: str,
    *,
    dots: bool,
    dashes: Any = "solid",
) -> None:
    """Draw the line of a run with its 95 % band; with `dots` every point says its value."""
    xs, ys = [x for x, _ in points], [score.value for _, score in points]
    ink = colour(run.method)
    ranges = [_range(score) for _, score in points]
    if any(low < high for low, high in ranges):
        low, high = zip(*ranges, strict=True)
        made.mark(axes.fill_between(xs, low, high, color=ink, alpha=0.13, lw=0), run)
    made.mark(axes.plot(xs, ys, color=ink, lw=1.7, ls=dashes, solid_joinstyle="round")[0], run)
    if not dots:
        return
    what = x_label.split(" ")[-1] if x_label.startswith("optimizer") else "tokens"
    for x, score in points:
        when = f"after {whole(x)} {what}" if x_label else f"at {x:.3g}"
        tip = f"{label}: {' '.join(part for part in (measured(score), unit, when) if part)}"
        dot = axes.plot([x], [score.value], shape(run), ms=0.6 * marker_size(run), color=ink, mec=PAPER, mew=0.6)
        made.mark(dot[0], run, tip)
