"""How a policy was reinforced: reward and held-out reward, distance from the base, entropy, length, and what it wrote."""

import math
from dataclasses import dataclass
from typing import Any

from matplotlib.ticker import MaxNLocator

from loralab.evals.stats import Score
from loralab.report.compare import Comparison
from loralab.report.curves import draw_run_line, over_training, places, probed
from loralab.report.drawing import canvas
from loralab.report.figures import Drawn
from loralab.report.labels import name_ends, right_margin
from loralab.report.measures import half_width
from loralab.report.read import Run, finite, printable
from loralab.report.rendering import inlined
from loralab.report.tables import EMPTY, Cell
from loralab.report.wording import joined, measured, number, share, whole

ROLE = "policy"
"""Role of the samples of a policy, and first part of the names of its scores."""
MOST_PROMPTS = 8
"""Prompts whose answers are shown."""
TRAINED, HELD_OUT, KL = "policy/reward", "policy/held_out", "policy/kl"


def section(comparison: Comparison, prefix: str) -> dict[str, Any] | None:
    """Give what a page says of reinforced runs; None for others."""
    if comparison.objective != ROLE:
        return None
    heads, rows = table(comparison)
    return {
        "figures": inlined(figures(comparison, prefix)),
        "alike": [said for run in comparison.runs if (said := alike(run, comparison.label(run)))],
        "heads": heads,
        "rows": rows,
        "samples": samples(comparison),
    }


# Over training


def figures(comparison: Comparison, prefix: str) -> list[Drawn]:
    """Draw rewards over training, the KL, rewards against the KL, then what answers look like."""

    def drawn(name: str, title: str, unit: str, metric: str, caption: str = "") -> Drawn | None:
        return over_training(comparison, prefix, f"policy/{name}", title, unit, metric=metric, caption=caption)

    truncated = "Those that were cut off at the limit of tokens are counted too."
    found = [
        rewards(comparison, f"{prefix}-rewards"),
        drawn("kl", "Distance from the base: KL(policy‖base)", "nats/answer", "kl"),
        against_kl(comparison, f"{prefix}-reward-kl"),
        drawn("entropy", "Entropy of the next token", "nats/token", "entropy", "At 0 every answer is certain."),
        drawn("length", "Length of answers", "tokens/answer", "length", truncated),
        drawn("distinct", "Distinct answers to the same prompt", "share of answers", ""),
        drawn("truncated", "Answers cut off at the limit", "share of answers", "truncated"),
    ]
    return [figure for figure in found if figure is not None]


@dataclass(frozen=True)
class _Line:
    """A curve of a run: its points, its dashes, and what it is."""

    run: Run
    points: list[tuple[float, Score]]
    dashes: Any
    what: str


def _lines(comparison: Comparison) -> tuple[list[_Line], str]:
    """Give the curves of both rewards of every run, and the unit in which they lie on one axis.

    Rewards of other kinds have other scales. Where one spans more than three times the other, each is told in standard
    deviations of the base's own answers from prompt to prompt, above the base.
    """
    place, _ = places(comparison.runs)
    kinds = ((TRAINED, "solid", "reward trained on"), (HELD_OUT, (0, (4, 2)), "held-out reward"))
    found = [
        _Line(run, points, dashes, what)
        for run in comparison.runs
        for name, dashes, what in kinds
        if len(points := probed(run, name, place)) > 1
    ]
    names = {what: name for name, _, what in kinds}
    spans = {
        what: _span([score.value for line in found if line.what == what for _, score in line.points]) for what in names
    }
    low, high = (pick(spans.values()) for pick in (min, max))
    scales = [_scale(line.run, names[line.what]) for line in found]
    if not low or high <= 3 * low or not all(scales):
        return found, "mean reward of an answer"
    scaled = [
        _Line(line.run, [(x, _standardised(score, *scale)) for x, score in line.points], line.dashes, line.what)
        for line, scale in zip(found, scales, strict=True)
        if scale is not None
    ]
    return scaled, "rise, in spreads of the base's rewards"


def _span(values: list[float]) -> float:
    return max(values) - min(values) if values else 0.0


def _scale(run: Run, name: str) -> tuple[float, float] | None:
    """Give mean and spread over prompts of the base's reward, None where they are not known."""
    base = run.base.get(name)
    if base is None or not base.standard_error or base.n < 2:
        return None
    return base.value, base.standard_error * math.sqrt(base.n)


def _standardised(score: Score, mean: float, spread: float) -> Score:
    error = None if score.standard_error is None else score.standard_error / spread
    return Score(score.name, (score.value - mean) / spread, "spreads of the base", score.n, error)


def rewards(comparison: Comparison, name: str) -> Drawn | None:
    """Draw the reward that was trained on (solid) and the one held out (dashed) on one plot."""
    lines, unit = _lines(comparison)
    held_out = any(line.what == "held-out reward" for line in lines)
    title = "Reward trained on, and held-out reward" if held_out else "Reward"
    if not held_out:
        return over_training(comparison, name, TRAINED, title, "mean reward of an answer", metric="reward")
    if max(len(line.points) for line in lines) < 3:
        return None
    _, x_label = places(comparison.runs)
    with canvas(name, title, 520, 320) as made:
        labels = {line.run.folder: comparison.label(line.run) for line in lines}
        axes = made.axes(left=62, right=right_margin(list(labels.values())), bottom=48)
        for line in lines:
            label = f"{labels[line.run.folder]}, {line.what}"
            draw_run_line(made, axes, line.run, line.points, label, "", x_label, dots=True, dashes=line.dashes)
        axes.set_xlim(0, max(line.points[-1][0] for line in lines) or 1)
        axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
        axes.xaxis.set_major_formatter(lambda value, _: whole(value))
        axes.yaxis.set_major_locator(MaxNLocator(5))
        last = {line.run.folder: line for line in reversed(lines)}
        ends = [(line.run, line.points[-1]) for line in lines if last[line.run.folder] is line]
        name_ends(made, axes, [(run, labels[run.folder], x, score.value) for run, (x, score) in ends])
        axes.set_xlabel(x_label, labelpad=6)
        axes.set_ylabel(unit, labelpad=8, rotation_mode="anchor")
    caption = "Solid: what the policy is trained on. Dashed: what it never sees. Where that falls, it is being gamed."
    return Drawn(made.svg, title, caption)


def against_kl(comparison: Comparison, name: str) -> Drawn | None:
    """Draw rewards against the square root of the KL, the distance that over-optimisation follows.

    Source: Gao, Schulman & Hilton 2022, "Scaling laws for reward model overoptimization" (arXiv:2210.10760).
    """
    lines, unit = _lines(comparison)
    title = "Rewards against the distance from the base"
    drawn = []
    for line in lines:
        far = {step: score.value for step, score in line.run.history.get(KL, [])} | {0: 0.0}
        place, _ = places(comparison.runs)
        at = {place(line.run, step): math.sqrt(max(0.0, value)) for step, value in far.items()}
        points = [(at[x], score) for x, score in line.points if x in at]
        if len(points) > 2:
            drawn.append(_Line(line.run, points, line.dashes, line.what))
    if not drawn:
        return None
    with canvas(name, title, 520, 320) as made:
        labels = {line.run.folder: comparison.label(line.run) for line in drawn}
        axes = made.axes(left=62, right=20, bottom=52)
        for line in drawn:
            label = f"{labels[line.run.folder]}, {line.what}"
            draw_run_line(made, axes, line.run, line.points, label, "", "", dots=True, dashes=line.dashes)
        axes.set_xlim(left=0)
        axes.xaxis.set_major_locator(MaxNLocator(5))
        axes.yaxis.set_major_locator(MaxNLocator(5))
        axes.set_xlabel("√KL(policy‖base), √nats", labelpad=6)
        axes.set_ylabel(unit, labelpad=8, rotation_mode="anchor")
    caption = "Points are evaluations, joined in their order. Solid: trained on; dashed: held out."
    return Drawn(made.svg, title, caption)


# In words and numbers


def gamed(run: Run, label: str) -> str:
    """Say whether the held-out reward fell back from its height by more than chance while the reward rose on; else ""."""
    held_out = [(0, run.base[HELD_OUT])] if HELD_OUT in run.base else []
    held_out += [(step, score) for step, score in run.history.get(HELD_OUT, []) if step]
    trained = dict(run.history.get(TRAINED, []))
    if len(held_out) < 2:
        return ""
    step, best = max(held_out, key=lambda item: item[1].value)
    end, last = held_out[-1]
    halves = [half_width(score) for score in (best, last)]
    before, after = (run.base.get(TRAINED) if not step else trained.get(step)), trained.get(end)
    if before is None or after is None or None in halves:
        return ""
    fell = best.value - last.value > math.hypot(*(half for half in halves if half is not None))
    if not fell or after.value <= before.value:
        return ""
    when = f"step {whole(step)}" if step else "the base"
    return (
        f"{label} gamed its reward: from {when} to step {whole(end)} the held-out reward fell from {number(best.value)} to "
        f"{number(last.value)} while the reward trained on rose from {number(before.value)} to {number(after.value)}."
    )


def alike(run: Run, label: str) -> str:
    """Say how many prompts had answers that were all rewarded alike, "" where none had or it was not noted."""
    counts = [count for line in run.metrics if (count := finite(line.get("equal_rewards"))) is not None]
    prompts = finite(run.at("train.batch_size"))
    if not counts or not prompts or not sum(counts):
        return ""
    taught = "" if run.at("objective.algorithm") == "reinforce" else ", which taught nothing"
    part = share(min(1.0, sum(counts) / (len(run.metrics) * prompts)))
    return f"{label}: all answers to {part} of the training prompts were rewarded alike{taught}."


COLUMNS = (
    ("reward", "reward", "that it was trained on: mean over answers to held-out prompts"),
    ("held_out", "held-out reward", "watched and never trained on"),
    ("kl", "KL", "KL(policy‖base) of an answer, in nats"),
    ("entropy", "entropy", "of the next token, in nats"),
    ("length", "tokens", "of an answer"),
    ("distinct", "distinct", "share of different texts among the answers to one prompt"),
    ("truncated", "cut off", "share of answers that reached the limit of tokens"),
)


def table(comparison: Comparison) -> tuple[list[tuple[str, str]], list[tuple[Run, list[Cell]]]]:
    """Give heads with their meanings, and a row of cells per run, base → after; columns that no run has are left out."""
    kept = [c for c in COLUMNS if any(f"policy/{c[0]}" in run.after for run in comparison.runs)]
    rows = []
    for run in comparison.runs:
        cells = [_cell(run, f"policy/{name}") for name, _, _ in kept]
        if any(cell is not EMPTY for cell in cells):
            rows.append((run, cells))
    return [(head, meaning) for _, head, meaning in kept], rows


def _cell(run: Run, name: str) -> Cell:
    base, after = run.base.get(name), run.after.get(name)
    if after is None:
        return EMPTY
    return Cell(measured(after), after.value, "" if base is None or name == KL else f"{number(base.value)} → ")


# What it wrote


@dataclass(frozen=True)
class Card:
    """Answers to a prompt over time: rows of (run, step in words, what was written, its rewards in words)."""

    prompt: str
    rows: list[tuple[Run | None, str, str, str]]


def samples(comparison: Comparison) -> list[Card]:
    """Gather what policies wrote to the same prompts, the base's answer first, then each run's in order of steps."""
    asked: dict[str, list[tuple[Run | None, str, str, str]]] = {}
    for run in comparison.runs:
        for line in sorted((one for one in run.samples if one["role"] == ROLE), key=lambda one: one["step"]):
            rows = asked.setdefault(line["prompt"], [])
            is_base = line["model"] == "base"
            if is_base and any(owner is None for owner, *_ in rows):
                continue
            when = "base" if is_base else f"step {whole(line['step'])}"
            row = (None if is_base else run, when, line["output"], _worth(line))
            rows.insert(0, row) if is_base else rows.append(row)
    return [Card(prompt, rows) for prompt, rows in list(asked.items())[:MOST_PROMPTS]]


def _worth(line: dict[str, Any]) -> str:
    """Write the rewards of an answer: `reward 0.75, held out 0.50`."""
    known = [(key, value) for key in line if (value := finite(line[key])) is not None and key not in ("step", "right")]
    order = sorted(known, key=lambda item: {"reward": 0, "held_out": 1}.get(item[0], 2))
    words = [f"{printable(key).replace('_', ' ')} {number(value, 2)}" for key, value in order]
    return joined(words, "and") if len(words) > 4 else ", ".join(words)
