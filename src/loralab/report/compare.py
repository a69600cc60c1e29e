"""Runs put side by side: which belong together, what they are called, and which differences are ties."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import count
from typing import Any

import numpy as np
import pandas as pd

from loralab.evals.judgement import areas_apart
from loralab.evals.stats import NoiseFloor, Score, mean_score, ratio_mean, skill_scores
from loralab.report.measures import (
    AREA,
    FORGETTING,
    LEARNING,
    LEARNING_BY,
    NATS,
    RANKED,
    REWARD,
    RIGHT,
    Side,
    View,
    change,
    half_width,
    level,
)
from loralab.report.read import Run, finite, printable, source_name


@dataclass(frozen=True)
class Comparison:
    """Runs that began from one base and were taught the same thing, measured on the same held-out data.

    Attributes:
        name: of the target data, for people.
        base: path of the base as the specs give it.
        runs: sorted by method and rank.
        labels: a short name per run, by folder; no two are equal.
    """

    name: str
    base: str
    base_mark: str | None
    runs: list[Run]
    labels: dict[str, str] = field(default_factory=dict)

    @property
    def objective(self) -> str:
        """What was optimised: `text`, `classify`, `reward` or `policy`."""
        return self.runs[0].objective

    @property
    def finished(self) -> list[Run]:
        return [run for run in self.runs if run.state == "done"]

    def label(self, run: Run) -> str:
        return self.labels[run.folder]

    @property
    def views(self) -> list[View]:
        """Answers first, then multiple choice, then losses, as far as they were measured; none if nothing was."""
        sides = LEARNING_BY.get(self.objective, LEARNING)
        learning = [side for side in sides if any(level(run, side) for run in self.runs)]
        forgetting = [side for side in FORGETTING if any(level(run, side) for run in self.runs)]
        first = View(learning[0] if learning else None, forgetting[0] if forgetting else None)
        found = [first]
        if self.objective != "text":
            found += [View(side, first.forgetting) for side in learning[1:]]
            found += [View(first.learning, side) for side in forgetting[1:]]
            return [view for i, view in enumerate(found) if view not in (*found[:i], View(None, None))]
        if FORGETTING[1] in forgetting:
            found.append(View(LEARNING[1] if LEARNING[1] in learning else first.learning, FORGETTING[1]))
        found.append(
            View(*(sides[-1] if sides and sides[-1].unit == NATS else None for sides in (learning, forgetting)))
        )
        return [view for i, view in enumerate(found) if view not in (*found[:i], View(None, None))]


def compare(runs: Sequence[Run]) -> list[Comparison]:
    """Group runs into comparisons, sorted by name. Damaged runs are left out: nothing can be said about them."""
    groups: dict[tuple[str, ...], list[Run]] = {}
    unknown = []
    for run in runs:
        if run.state == "damaged":
            continue
        if run.base_mark is None:
            unknown.append(run)
            continue
        # What a run is measured against is its base and the delta that it began from.
        mark = run.data_marks.get("model.delta", "") + run.base_mark
        held_out = run.data_marks.get("validation", run.data_marks.get("train", ""))
        groups.setdefault((run.target_data, mark, held_out, run.objective), []).append(run)
    for run in unknown:  # it never began; it belongs where its spec would have put it
        same = (key for key, group in groups.items() if _meant_for(run, group[0]))
        alone = (run.target_data, str(run.at("model.path")), "", run.objective)
        groups.setdefault(next(same, alone), []).append(run)
    names = [key[0] for key in groups]
    made = []
    for key, group in sorted(groups.items()):
        base = printable(source_name(str(group[0].at("model.path"))))
        if (start := group[0].at("model.delta")) is not None:
            base += f" with {printable(source_name(str(start)))}"
        kind = "" if key[3] == "text" else f"{OBJECTIVE_NAMES.get(key[3], key[3])}, "
        name = key[0] if names.count(key[0]) == 1 else f"{key[0]} ({kind}{base} {key[1][:4]}, data {key[2][:4]})"
        ordered = sorted(group, key=_order)
        made.append(Comparison(name, base, group[0].base_mark, ordered, labels_of(ordered)))
    return made


def _meant_for(run: Run, other: Run) -> bool:
    mine, theirs = (
        (one.target_data, one.objective, one.at("model.path"), one.at("model.delta")) for one in (run, other)
    )
    return mine == theirs


OBJECTIVE_NAMES = {"classify": "classifier", "reward": "reward model", "policy": "reinforcement"}
METHOD_ORDER = ("full", "lora", "lora_plus", "cola", "peft")
METHOD_NAMES = {"full": "full", "lora": "LoRA", "lora_plus": "LoRA+", "cola": "COLA", "peft": "PEFT"}


def _order(run: Run) -> tuple[Any, ...]:
    place = METHOD_ORDER.index(run.method) if run.method in METHOD_ORDER else len(METHOD_ORDER)
    return place, run.rank or 0, *(finite(run.at(key)) or 0.0 for key in TELLING), run.folder


def method_label(run: Run) -> str:
    """Name a run by what it is: `full`, `LoRA r16`, `COLA 3×r8`."""
    name = METHOD_NAMES.get(run.method, run.method)
    if run.method == "peft":
        name = printable(str(run.at("method.tuner") or name))
    ranks, links = run.at("method.ranks"), run.at("method.links")
    if run.method == "cola" and isinstance(ranks, list):
        return f"{name} r" + "+".join(map(str, ranks))
    if run.method == "cola" and isinstance(links, int):
        return f"{name} {links}×r{run.rank}"
    return f"{name} r{run.rank}" if run.rank else name


TELLING = {
    "optimizer.learning_rate": "lr",
    "seed": "seed",
    "train.steps": "steps",
    "train.epochs": "epochs",
    "train.tokens": "tokens",
    "method.alpha": "α",
    "method.ratio": "ratio",
    "train.batch_size": "batch",
    "objective.beta": "β",
    "objective.samples": "samples",
    "objective.centre": "centre",
    "objective.algorithm": "",
}
"""Keys that tell runs of the same method and rank apart, with their short names."""


def labels_of(runs: Sequence[Run]) -> dict[str, str]:
    """Give each run a short name, by folder; runs of one method and rank are told apart by what differs in their specs."""
    groups: dict[str, list[Run]] = {}
    for run in runs:
        groups.setdefault(method_label(run), []).append(run)
    labels: dict[str, str] = {}
    for label, group in groups.items():
        keys = [key for key in TELLING if len({str(run.at(key)) for run in group}) > 1]
        for run in group:
            parts = [_told(TELLING[key], run.at(key)) for key in keys if isinstance(run.at(key), int | float | str)]
            labels[run.folder] = ", ".join([label, *parts])
    taken: set[str] = set()
    for folder, label in labels.items():
        free = next(name for i in count(1) if (name := label if i == 1 else f"{label} #{i}") not in taken)
        taken.add(free)
        labels[folder] = free
    return labels


def _told(name: str, value: int | float | str) -> str:
    return f"{name} {value if isinstance(value, str) else format(value, 'g')}".strip()


def frontier(points: Sequence[tuple[float, float]]) -> list[int]:
    """Give the Pareto set of (forgetting, learning): no other point forgets less and learns as much, or the reverse.

    Returns:
        Indices in order of growing forgetting.
    """
    kept: list[int] = []
    best = -math.inf
    for i in sorted(range(len(points)), key=lambda i: (points[i][0], -points[i][1])):
        if points[i][1] > best:
            kept.append(i)
            best = points[i][1]
    return kept


def difference(first: Run, second: Run, side: Side) -> Score | None:
    """Give learning or forgetting of the first run minus that of the second.

    Paired item by item where both runs kept the outcomes of the same items; else as if measured on different items,
    which makes the interval too wide rather than too narrow.
    """
    a, b = change(first, side), change(second, side)
    if a is None or b is None:
        return None
    paired = _paired(first, second, side)
    if paired is not None:
        return paired
    errors = (a.standard_error, b.standard_error)
    error = None if errors[0] is None or errors[1] is None else math.hypot(errors[0], errors[1])
    return Score(side.change, a.value - b.value, side.unit, min(a.n, b.n), error)


def _paired(first: Run, second: Run, side: Side) -> Score | None:
    probe = "target" if side in (RANKED, RIGHT) else side.level.removesuffix("/loss")
    if side.unit == REWARD:
        probe, _, column = side.level.partition("/")
    if first.items is None or second.items is None:
        return None
    a, b = (items[items["probe"] == probe].reset_index(drop=True) for items in (first.items, second.items))
    same = [name for name in ("item", "num_tokens", "skill", "prompt", "label") if name in a and name in b]
    if a.empty or not a[same].equals(b[same]):
        return None
    if side == RANKED:
        return _areas_apart(a, b)
    if side.unit == REWARD:
        return _rewards_apart(a, b, column, side)
    if side.unit == NATS:
        value, error = ratio_mean(
            (a["tuned_loss_sum"] - b["tuned_loss_sum"]).to_numpy(float), a["num_tokens"].to_numpy(float)
        )
    elif "tuned_right" in a and "tuned_right" in b:
        skills = a["skill"].fillna("").astype(str).tolist() if "skill" in a else [""] * len(a)
        values = (a["tuned_right"] - b["tuned_right"]).to_numpy(float)
        mean = skill_scores(side.change, side.unit, values, skills)[0]
        value, error = mean.value, mean.standard_error
    else:
        return None
    return Score(side.change, side.sign * value, side.unit, len(a), error) if math.isfinite(value) else None


def _areas_apart(a: pd.DataFrame, b: pd.DataFrame) -> Score | None:
    """Compare two areas under the ROC curve on the same items; None where the rewards were not kept."""
    if not {"reward", "label"} <= set(a.columns) & set(b.columns):
        return None
    mine, other, labels = (
        pd.to_numeric(x, errors="coerce").to_numpy(float) for x in (a["reward"], b["reward"], a["label"])
    )
    if not np.isfinite([mine, other, labels]).all():
        return None
    found = areas_apart(mine, other, labels > 0.5)
    return None if found is None else Score(RANKED.change, found[0], AREA, len(a), found[1])


def _rewards_apart(a: pd.DataFrame, b: pd.DataFrame, column: str, side: Side) -> Score | None:
    """Compare two policies prompt by prompt; None where their rewards were not kept. The base cancels."""
    if column not in a or column not in b:
        return None
    apart = (pd.to_numeric(a[column], errors="coerce") - pd.to_numeric(b[column], errors="coerce")).to_numpy(float)
    return mean_score(side.change, side.unit, apart, np.ones(len(apart))) if np.isfinite(apart).all() else None


def tied(first: Run, second: Run, side: Side, luck: NoiseFloor | None = None) -> bool:
    """Tell whether the 95 % interval of the difference holds 0; without an interval nothing can be told apart.

    With `luck`, the spread between seeds, the interval covers both: the choice of items and the luck of two trainings.
    """
    found = difference(first, second, side)
    half = half_width(found)
    if found is None or half is None:
        return True
    return abs(found.value) <= math.hypot(half, luck.smallest_detectable() if luck is not None else 0.0)
