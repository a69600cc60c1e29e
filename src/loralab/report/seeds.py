"""Runs that differ by nothing but their seed: how far luck alone moves what is learned and forgotten."""

import json
import math
from dataclasses import dataclass

from loralab.evals.stats import NoiseFloor, noise_floor, within_noise
from loralab.report.compare import Comparison, labels_of
from loralab.report.measures import NATS, Side, change
from loralab.report.read import Run
from loralab.report.wording import joined, number

NOT_TELLING = ("seed", "name", "trackers", "branch_from")
"""Keys of a spec that make no other experiment."""


@dataclass(frozen=True)
class Repeated:
    """One experiment run with several seeds: its name, and its runs."""

    label: str
    runs: list[Run]


def repeated(comparison: Comparison) -> list[Repeated]:
    """Gather the finished runs that differ by nothing but their seed; those that stand alone are left out."""
    groups: dict[str, list[Run]] = {}
    for run in comparison.finished:
        spec = {key: value for key, value in run.spec.items() if key not in NOT_TELLING}
        groups.setdefault(json.dumps(spec, sort_keys=True, default=str), []).append(run)
    found = [runs for runs in groups.values() if len({str(run.at("seed")) for run in runs}) > 1]
    labels = labels_of([runs[0] for runs in found])
    return [Repeated(labels[runs[0].folder], runs) for runs in found]


def floor_of(runs: list[Run], side: Side | None) -> NoiseFloor | None:
    """Measure the spread of learning or forgetting between runs; None for fewer than two that measured it."""
    values = [score.value for run in runs if (score := change(run, side)) is not None]
    return noise_floor(values) if len(values) > 1 else None


def luck(comparison: Comparison, side: Side | None) -> NoiseFloor | None:
    """Pool the spread between seeds over all repeated experiments: its square is the mean of theirs by degrees of freedom."""
    found = [floor for group in repeated(comparison) if (floor := floor_of(group.runs, side)) is not None]
    if not found:
        return None
    freedom = sum(floor.n_seeds - 1 for floor in found)
    sd = math.sqrt(sum((floor.n_seeds - 1) * floor.sd**2 for floor in found) / freedom)
    mean = sum(floor.mean for floor in found) / len(found)
    return NoiseFloor(mean, sd, (mean, mean), freedom + 1)


@dataclass(frozen=True)
class Seeds:
    """The table of repeated experiments: heads, rows of written cells, and what they come to in sentences."""

    heads: list[tuple[str, str]]
    rows: list[tuple[Run, str, list[str]]]
    said: list[str]


def table(comparison: Comparison) -> Seeds | None:
    """Give mean and spread over seeds of the first measures of learning and forgetting; None where no run was repeated."""
    groups = repeated(comparison)
    if not groups or not comparison.views:
        return None
    view = comparison.views[0]
    sides = [("learned", view.learning), ("forgotten", view.forgetting)]
    heads, said = [("seeds", "")], list[str]()
    rows: list[tuple[Run, str, list[str]]] = [(g.runs[0], g.label, [str(len(g.runs))]) for g in groups]
    for word, side in sides:
        pooled = luck(comparison, side)
        if side is None or pooled is None:
            continue
        unit = " nats per token" if side.unit == NATS else ""
        heads += [
            (word, f"mean over seeds, 95 % interval{unit and ', in' + unit}"),
            ("spread", "standard deviation between seeds"),
        ]
        floors = [floor_of(group.runs, side) for group in groups]
        for (_, _, cells), floor in zip(rows, floors, strict=True):
            cells += _cells(floor)
        least = number(pooled.smallest_detectable())
        said.append(
            f"Two single runs must differ by more than {least}{unit} in what they {_verb(word)} "
            "before the luck of training is no explanation."
        )
        known = [(group.label, floor) for group, floor in zip(groups, floors, strict=True) if floor is not None]
        if len(known) > 1:
            said.append(_best(known, pooled, word))
    return Seeds(heads, rows, said)


def _cells(floor: NoiseFloor | None) -> list[str]:
    if floor is None:
        return ["–", "–"]
    low, high = floor.interval
    mean = f"{number(floor.mean, signed=True)} [{number(low, signed=True)}, {number(high, signed=True)}]"
    return [mean, number(floor.sd)]


def _verb(word: str) -> str:
    return {"learned": "learn", "forgotten": "forget"}[word]


def _best(known: list[tuple[str, NoiseFloor]], pooled: NoiseFloor, word: str) -> str:
    """Name the best experiment by its mean over seeds, and those that seeds alone may hold apart from it."""
    sign = 1 if word == "learned" else -1
    order = sorted(known, key=lambda item: -sign * item[1].mean)
    (first, best), rest = order[0], order[1:]
    ties = [
        label for label, floor in rest if within_noise(best.mean - floor.mean, pooled, min(best.n_seeds, floor.n_seeds))
    ]
    did = "learned most" if word == "learned" else "forgot least"
    lead = f"Over seeds, {first} {did}, {number(best.mean, signed=True)}"
    if not ties:
        return f"{lead}; the others are beyond the spread between seeds."
    return f"{lead}; {joined(ties)} {'ties' if len(ties) == 1 else 'tie'} with it: seeds alone may make the difference."
