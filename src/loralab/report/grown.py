"""Inside the deltas of runs over training, and their intruders against what was forgotten. Runs in, SVG text out."""

import re
from collections.abc import Sequence

import numpy as np
import pandas as pd
from matplotlib.ticker import MaxNLocator

from loralab.report.compare import Comparison
from loralab.report.drawing import BASE_COLOUR, canvas, colour, marker_size, shape
from loralab.report.figures import Drawn
from loralab.report.labels import place_labels
from loralab.report.measures import NATS, Side, change, level
from loralab.report.read import Run
from loralab.report.spectra import Subject, dot
from loralab.report.trajectories import Growth, Point, counted, drawn, from_tables, many
from loralab.report.wording import number, whole

SCORES = {
    "intruders": "intruders/count",
    "energy": "intruders/energy",
    "rank90": "spectrum/rank90",
    "effective_rank": "spectrum/effective_rank",
    "relative_norm": "spectrum/relative_norm",
}
"""Score over training that a part of the growth has; where there is none, the run's tables say it."""
PUBLISHED = 0.59
"""Spearman's ρ of intruders and forgetting for LLaMA2-7B (Shuttleworth et al. 2024, arXiv:2410.21228)."""
FEWEST_FOR_RANKS = 5
"""Runs from which on a rank correlation is said."""

Met = list[tuple[float, float, float]]
"""Intruders, forgetting and step, where both were measured."""


def figures(comparison: Comparison, prefix: str) -> list[Drawn]:
    """Draw how the deltas grew, then intruders against forgetting; runs without such measurements are left out."""
    grown = [_growth(comparison, run) for run in comparison.runs]
    made = drawn(grown, f"{prefix}-grown", "optimizer steps", setting_of(comparison.runs))
    against = against_forgetting(comparison, f"{prefix}-intruders-forgetting")
    return [*made, *([against] if against is not None else [])]


def _subject(comparison: Comparison, run: Run) -> Subject:
    table = run.spectra if run.spectra is not None else pd.DataFrame()
    label, size = comparison.label(run), marker_size(run)
    return Subject(run.folder, run.method, label, colour(run.method), shape(run), size, table)


def _growth(comparison: Comparison, run: Run) -> Growth:
    """Follow a run by its scores, which are there from the first evaluation on, and by its tables, written at its end."""
    found = from_tables(_subject(comparison, run), by_step(run.spectra_steps), by_step(run.intruders))
    points: dict[str, Sequence[Point]] = dict(found.points)
    for part, name in SCORES.items():
        scores = [(float(step), score.value, "") for step, score in run.history.get(name, [])]
        if len(scores) > len(points.get(part, ())):
            points[part] = scores
    return Growth(found.one, points)


def by_step(table: pd.DataFrame | None) -> list[tuple[float, pd.DataFrame]]:
    """Part a table with the column `step`, in order of steps; none of no table."""
    return [] if table is None else [(float(str(step)), rows) for step, rows in table.groupby("step", sort=True)]


def setting_of(runs: Sequence[Run]) -> str:
    """Say k and ε: as the unit of the count has them, else k as the most positions that a table holds."""
    units = {score.unit for run in runs for _, score in run.history.get(SCORES["intruders"], [])}
    said = sorted({match[1] for unit in units if (match := re.search(r"\((k = .*)\)", unit))})
    if said:
        return " or ".join(said)
    tables = [run.intruders for run in runs if run.intruders is not None]
    ks = sorted({int(table["position"].max()) for table in tables})
    return f"k = {' or '.join(map(str, ks))}" if ks else ""


def against_forgetting(comparison: Comparison, name: str) -> Drawn | None:
    """Draw intruders against what was forgotten, over steps (joined) and runs; None unless there are two points."""
    sides = dict.fromkeys(view.forgetting for view in comparison.views if view.forgetting is not None)
    met = [(side, [(run, points) for run in comparison.runs if (points := _met(run, side))]) for side in sides]
    side, found = max(met, key=lambda item: sum(len(points) for _, points in item[1]), default=(None, []))
    if side is None or sum(len(points) for _, points in found) < 2:
        return None
    title = "Intruders against what was forgotten"
    unit = "nats per token" if side.unit == NATS else f"share {side.phrase}"
    with canvas(name, title, 520, 360) as made:
        axes = made.axes(left=66, right=20, bottom=52)
        axes.axhline(0, color=BASE_COLOUR, lw=0.8)
        for run, points in found:
            one = _subject(comparison, run)
            xs, ys, _ = zip(*points, strict=True)
            made.mark(axes.plot(xs, ys, color=one.colour, lw=1.1, alpha=0.5)[0], one)
            for i, (x, y, step) in enumerate(points):
                tip = f"{one.label}, step {whole(step)}: {many(x)}, forgot {number(y, signed=True)} {unit}"
                dot(made, axes, one, x, y, tip, 1.0 if i == len(points) - 1 else 0.5)
        axes.margins(0.1)
        axes.autoscale_view()  # so that names stand beside marks where these will be
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        axes.yaxis.set_major_locator(MaxNLocator(6))
        around = axes.transData.transform([point[:2] for _, points in found for point in points]).tolist()
        taken = [(x - 4, y - 4, x + 4, y + 4) for x, y in around]
        ends = [(points[-1][0], points[-1][1]) for _, points in found]
        texts = place_labels(axes, ends, [comparison.label(run) for run, _ in found], taken)
        for (run, _), text in zip(found, texts, strict=True):
            made.mark(text, run)
        setting = setting_of([run for run, _ in found])
        axes.set_xlabel(f"Intruders in all matrices{f' ({setting})' if setting else ''}", labelpad=8)
        axes.set_ylabel(f"Forgotten: old skills, {unit}", labelpad=8, rotation_mode="anchor")
    return Drawn(made.svg, title, _caption(found))


def _met(run: Run, side: Side) -> Met:
    counts = {int(step): counted(table)["intruders"][0] for step, table in by_step(run.intruders)}
    counts |= {step: score.value for step, score in run.history.get(SCORES["intruders"], [])}
    lost = {step: side.sign * score.value for step, score in run.history.get(side.change, [])}
    before = level(run, side, "base")
    if not lost and before is not None:
        lost = {step: side.sign * (after.value - before.value) for step, after in run.history.get(side.level, [])}
    last = change(run, side)
    if counts and last is not None and not set(counts) & set(lost):
        lost = {max(counts): last.value}
    return [(counts[step], lost[step], float(step)) for step in sorted(counts) if step in lost]


def _caption(found: Sequence[tuple[Run, Met]]) -> str:
    several = any(len(points) > 1 for _, points in found)
    said = "Small marks are earlier steps, joined; the large mark is the last. " if several else ""
    said += "The count compares runs of low-rank methods with each other; it is no meter of forgetting across methods."
    ends = pd.DataFrame([points[-1][:2] for _, points in found], columns=["intruders", "forgetting"])
    if len(ends) >= FEWEST_FOR_RANKS and bool((ends.nunique() > 1).all()):
        correlation = float(np.corrcoef(ends.rank().to_numpy().T)[0, 1])
        said += (
            f" Spearman's ρ over the last marks: {number(correlation, 2)} (n = {len(ends)}; published for LLaMA2-7B: "
        )
        said += f"{PUBLISHED})."
    return said
