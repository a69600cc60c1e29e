"""How reward models and classifiers judge: accuracy and ranking over training, calibration, rewards, and what length does."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator
from numpy import ndarray

from loralab.evals.judgement import BINS, Bin, calibration_error, midranks, pearson, reliability, spearman
from loralab.evals.stats import SHARE, Z95, Score
from loralab.report.compare import Comparison
from loralab.report.curves import over_training
from loralab.report.drawing import BASE_COLOUR, FAINT, PAPER, SIZE, Canvas, canvas, colour, marker_size, shape
from loralab.report.figures import Drawn
from loralab.report.measures import JUDGES
from loralab.report.read import Run
from loralab.report.rendering import inlined
from loralab.report.tables import EMPTY, Cell
from loralab.report.wording import measured, number, whole

BARS = 24
"""Bars of a histogram."""
MOST_POINTS = 400
"""Most texts of a cloud, evenly spread over all."""
GROUPS = {"pairs": ("chosen", "rejected"), "thumbs": ("up", "down")}
GROUP_COLOURS = ("#0072B2", "#D55E00")


@dataclass(frozen=True, eq=False)
class Judged:
    """What a run said of the held-out items.

    Attributes:
        run: whose they are.
        kind: `pairs`, `thumbs`, `classify` or `regression`.
        rewards, lengths: of each text, by group: chosen and rejected, up and down; of other kinds all under "".
        claimed, true: what each claim said, and whether it came true; empty of numbers.
        labels: of each item.
    """

    run: Run
    kind: str
    rewards: dict[str, ndarray]
    lengths: dict[str, ndarray]
    claimed: ndarray
    true: ndarray
    labels: ndarray


def judged(run: Run) -> Judged | None:
    """Read the items of a run; None where none were kept, or not what is needed."""
    if run.items is None:
        return None
    rows = run.items[run.items["probe"] == "target"]
    found = {name: _column(rows, name) for name in ("reward", "rejected_reward", "length", "rejected_length")}
    label, claimed, right = (_column(rows, name) for name in ("label", "claimed", "tuned_right"))
    if rows.empty or label is None:
        return None
    reward, length, nothing = found["reward"], found["length"], np.zeros(0)
    if reward is None or length is None:
        if claimed is None or right is None:
            return None
        return Judged(run, "classify", {}, {}, claimed, right, label)
    if found["rejected_reward"] is not None and found["rejected_length"] is not None:
        rewards = {"chosen": reward, "rejected": found["rejected_reward"]}
        lengths = {"chosen": length, "rejected": found["rejected_length"]}
        if claimed is None or right is None:
            claimed = right = nothing
        return Judged(run, "pairs", rewards, lengths, claimed, right, label)
    if claimed is None:
        return Judged(run, "regression", {"": reward}, {"": length}, nothing, nothing, label)
    up = label > 0.5
    groups = {name: {"up": values[up], "down": values[~up]} for name, values in (("r", reward), ("n", length))}
    return Judged(run, "thumbs", groups["r"], groups["n"], claimed, up.astype(float), label)


def _column(rows: pd.DataFrame, name: str) -> ndarray | None:
    """Give a column of finite numbers, None where one is missing."""
    if name not in rows or rows.empty:
        return None
    values: ndarray = pd.to_numeric(rows[name], errors="coerce").to_numpy(float)
    return values if np.isfinite(values).all() else None


def section(comparison: Comparison, prefix: str) -> dict[str, Any] | None:
    """Give what a page says of runs that judge; None for others."""
    if comparison.objective not in JUDGES:
        return None
    found = [one for run in comparison.runs if (one := judged(run)) is not None]
    drawn = [*_over_training(comparison, prefix), _reliability(comparison, found, prefix)]
    each = [figure for i, one in enumerate(found) for figure in _of_run(comparison, one, f"{prefix}-judged-{i}")]
    heads, rows = table(comparison)
    return {
        "figures": inlined([figure for figure in drawn if figure is not None]),
        "each": inlined([figure for figure in each if figure is not None]),
        "heads": heads,
        "rows": rows,
        "single": len(comparison.runs) == 1,
    }


# In numbers

COLUMNS = (
    ("accuracy", "judged right", "share of held-out items"),
    ("majority", "commonest label", "share judged right by always naming it; of pairs, by a coin"),
    ("balanced_accuracy", "balanced", "mean over classes of the share judged right"),
    ("auc", "area (AUC)", "share of up and down pairs of texts in which the up one has the larger reward"),
    ("calibration_error", "calibration error", "mean distance between claimed and true shares, over ten bins of items"),
    ("brier", "Brier", "mean squared distance of the claimed probability from the truth"),
    ("pearson", "Pearson", "correlation of the numbers said with those of people"),
    ("spearman", "Spearman", "the same of their ranks"),
    ("rmse", "error", "root of the mean squared error"),
    ("label_sd", "spread of labels", "their standard deviation: the error of always saying their mean"),
    ("reward_mean", "mean reward", "over all held-out texts"),
    ("reward_sd", "its spread", "standard deviation of the rewards"),
    ("margin_mean", "margin", "mean reward of chosen (up) texts minus that of rejected (down) ones"),
    ("length_correlation", "with length", "rank correlation of reward and tokens of the answer"),
    ("longer_wins", "longer wins", "share of pairs in which the longer answer has the larger reward"),
    ("longer_chosen", "longer was chosen", "the same of the people's choices"),
)


def table(comparison: Comparison) -> tuple[list[tuple[str, str]], list[tuple[Run, list[Cell]]]]:
    """Give heads with their meanings, and a row of cells per run; columns that no run has are left out."""
    kept = [c for c in COLUMNS if any(f"target/{c[0]}" in run.after for run in comparison.runs)]
    rows = []
    for run in comparison.runs:
        scores = [run.after.get(f"target/{name}") for name, _, _ in kept]
        if any(score is not None for score in scores):
            rows.append((run, [EMPTY if s is None else Cell(measured(s), s.value) for s in scores]))
    return [(head, meaning) for _, head, meaning in kept], rows


# Over training


def _over_training(comparison: Comparison, prefix: str) -> list[Drawn | None]:
    majority = next((run.after["target/majority"] for run in comparison.runs if "target/majority" in run.after), None)
    words = "a coin" if majority is not None and majority.standard_error is None else "always the commonest label"
    line = None if majority is None else (majority.value, words)
    area = "share of up and down pairs"
    liked = "How often a text that people liked has a larger reward than one they did not."
    if comparison.objective == "classify":
        liked = "How often a text of the second class is found more likely to be of it than one of the first."
    return [
        over_training(comparison, prefix, "target/accuracy", "Judged right on held-out items", SHARE, baseline=line),
        over_training(
            comparison, prefix, "target/auc", "Area under the ROC curve", area, baseline=(0.5, "chance"),
            caption=liked,
        ),
        over_training(
            comparison, prefix, "target/balanced_accuracy", "Judged right, classes counted alike", SHARE,
        ),
        over_training(comparison, prefix, "target/pearson", "Correlation with the labels", "Pearson correlation"),
        over_training(
            comparison, prefix, "target/calibration_error", "Expected calibration error", "probability",
            caption="0 where claimed probabilities come true as often as they say. Few items alone keep it above 0.",
        ),
    ]  # fmt: skip


# Calibration


def _reliability(comparison: Comparison, found: Sequence[Judged], prefix: str) -> Drawn | None:
    """Draw what was claimed against what came true; on the diagonal claims are honest."""
    found = [one for one in found if len(one.claimed)]
    if not found:
        return None
    title = "Claims against what came true"
    lowest = 0.5 if min(float(one.claimed.min()) for one in found) >= 0.5 else 0.0
    said = "that the text is liked" if found[0].kind == "thumbs" else "that it judges right"
    with canvas(f"{prefix}-reliability", title, 520, 380) as made:
        axes = made.axes(left=62, bottom=52)
        axes.plot([lowest, 1], [lowest, 1], ls=(0, (4, 4)), lw=1.2, color=BASE_COLOUR)
        for one in found:
            _draw_bins(made, axes, one.run, comparison.label(one.run), reliability(one.claimed, one.true))
        axes.set(xlim=(lowest - 0.02, 1.02), ylim=(-0.03, 1.03))
        axes.set_xlabel(f"claimed probability {said}", labelpad=6)
        axes.set_ylabel("share that came true", labelpad=8, rotation_mode="anchor")
    errors = [
        f"{comparison.label(one.run)} {number(calibration_error(reliability(one.claimed, one.true)))}" for one in found
    ]
    caption = f"{BINS} bins of equally many items with 95 % intervals (Wilson). On the dashed line claims are honest, below it "
    return Drawn(made.svg, title, f"{caption}they say too much. Expected calibration error: {', '.join(errors)}.")


def _draw_bins(made: Canvas, axes: Axes, run: Run, label: str, bins: Sequence[Bin]) -> None:
    ink = colour(run.method)
    made.mark(axes.plot([b.claimed for b in bins], [b.true for b in bins], color=ink, lw=1.5)[0], run)
    for each in bins:
        made.mark(axes.plot([each.claimed] * 2, each.interval, color=ink, lw=1.2, alpha=0.5)[0], run)
        low, high = (number(end, 2) for end in each.interval)
        tip = f"{label}: claimed {number(each.claimed)}, came true {number(each.true)} [{low}, {high}] of {each.count} items"
        dot = axes.plot(
            [each.claimed], [each.true], shape(run), ms=0.7 * marker_size(run), color=ink, mec=PAPER, mew=0.6
        )
        made.mark(dot[0], run, tip)


# Rewards of a run


def _of_run(comparison: Comparison, one: Judged, name: str) -> list[Drawn | None]:
    label = comparison.label(one.run)
    if one.kind in GROUPS:
        return [_histogram(one, label, f"{name}-rewards"), _by_length(one, label, f"{name}-length")]
    return [_cloud(one, label, f"{name}-said")] if one.kind == "regression" else []


def _legend(axes: Axes, names: Sequence[str]) -> None:
    """Write above the axes what the two colours are."""
    for i, (name, ink) in enumerate(zip(names, GROUP_COLOURS, strict=True)):
        left = 0.01 + 0.24 * i
        axes.plot([left], [1.07], "s", ms=8, color=ink, transform=axes.transAxes, clip_on=False)
        axes.text(left + 0.025, 1.07, name, transform=axes.transAxes, size=SIZE - 1, va="center")


def _histogram(one: Judged, label: str, name: str) -> Drawn | None:
    everything = np.concatenate(list(one.rewards.values()))
    low, high = np.percentile(everything, (0.5, 99.5)).tolist()
    if low == high:
        return None
    title = f"{label}: rewards of {' and '.join(one.rewards)} texts"
    edges = np.linspace(low, high, BARS + 1)
    with canvas(name, title, 520, 300) as made:
        axes = made.axes(left=58, top=30, bottom=48)
        for (group, values), ink in zip(one.rewards.items(), GROUP_COLOURS, strict=True):
            if not len(values):
                continue
            shares = np.histogram(np.clip(values, low, high), edges)[0] / len(values)
            made.mark(axes.stairs(shares, edges, fill=True, color=ink, alpha=0.3, lw=0), one.run)
            tip = f"{group}: {len(values)} texts, mean reward {number(float(values.mean()))}, spread {number(float(values.std()))}"
            made.mark(axes.stairs(shares, edges, color=ink, lw=1.6), one.run, tip)
            axes.axvline(float(np.clip(values.mean(), low, high)), color=ink, lw=1.2, ls=(0, (4, 4)))
        _legend(axes, list(one.rewards))
        axes.set_xlim(low, high)
        axes.yaxis.set_major_locator(MaxNLocator(5))
        axes.set_xlabel("reward", labelpad=6)
        axes.set_ylabel("share of texts", labelpad=8, rotation_mode="anchor")
    return Drawn(
        made.svg, title, "Dashed: means. The outermost bars hold what lies beyond them, at most one text in a hundred."
    )


def _by_length(one: Judged, label: str, name: str) -> Drawn | None:
    """Draw the mean reward of texts of alike length; where it rises, length alone is rewarded."""
    every = np.concatenate(list(one.lengths.values()))
    if every.max() == every.min():
        return None
    title = f"{label}: reward against the length of the answer"
    with canvas(name, title, 520, 300) as made:
        axes = made.axes(left=58, top=30, bottom=48)
        for (group, rewards), ink in zip(one.rewards.items(), GROUP_COLOURS, strict=True):
            _draw_lengths(made, axes, one.run, group, one.lengths[group], rewards, ink)
        _legend(axes, list(one.rewards))
        axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
        axes.xaxis.set_major_formatter(lambda value, _: whole(value))
        axes.yaxis.set_major_locator(MaxNLocator(5))
        axes.set_xlabel("tokens of the answer", labelpad=6)
        axes.set_ylabel("mean reward", labelpad=8, rotation_mode="anchor")
    found = spearman(np.concatenate(list(one.rewards.values())), every)
    said = "" if found is None else f" Rank correlation over all of them: {number(found[0])}."
    return Drawn(made.svg, title, f"Each point is the mean of a tenth of the texts, with its 95 % interval.{said}")


def _draw_lengths(made: Canvas, axes: Axes, run: Run, group: str, lengths: ndarray, rewards: ndarray, ink: str) -> None:
    if not len(lengths):
        return
    bins = np.floor(BINS * (midranks(lengths) - 0.5) / len(lengths)).astype(int)
    points = []
    for each in np.unique(bins):
        mine = bins == each
        count, mean, at = int(mine.sum()), float(rewards[mine].mean()), float(lengths[mine].mean())
        half = Z95 * float(rewards[mine].std(ddof=1)) / np.sqrt(count) if count > 1 else 0.0
        points.append((at, mean))
        made.mark(axes.plot([at, at], [mean - half, mean + half], color=ink, lw=1.2, alpha=0.5)[0], run)
        tip = f"{group}: {count} texts of about {whole(at)} tokens, mean reward {number(mean)} ± {number(half)}"
        made.mark(axes.plot([at], [mean], "o", ms=5, color=ink, mec=PAPER, mew=0.6)[0], run, tip)
    made.mark(axes.plot(*zip(*points, strict=True), color=ink, lw=1.4)[0], run)


def _cloud(one: Judged, label: str, name: str) -> Drawn | None:
    """Draw numbers said against those of people."""
    said, labels = one.rewards[""], one.labels
    title = f"{label}: numbers said against the labels"
    kept = np.unique(np.linspace(0, len(said) - 1, min(MOST_POINTS, len(said))).round().astype(int))
    ends = [float(min(said.min(), labels.min())), float(max(said.max(), labels.max()))]
    with canvas(name, title, 520, 380) as made:
        axes = made.axes(left=62, bottom=52)
        axes.plot(ends, ends, ls=(0, (4, 4)), lw=1.2, color=BASE_COLOUR)
        cloud = axes.plot(
            labels[kept], said[kept], "o", ms=4, alpha=0.5, color=colour(one.run.method), mec=FAINT, mew=0.3
        )
        made.mark(cloud[0], one.run)
        axes.set_xlabel("label", labelpad=6)
        axes.set_ylabel("said", labelpad=8, rotation_mode="anchor")
    found = pearson(said, labels)
    score = None if found is None else Score("pearson", found[0], "", len(said), found[1])
    return Drawn(made.svg, title, "" if score is None else f"Pearson correlation {measured(score)}.")
