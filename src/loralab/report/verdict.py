"""The verdict: two sentences per comparison, which say no more than the intervals allow."""

from collections.abc import Sequence
from dataclasses import dataclass

from loralab.evals.stats import Score
from loralab.report.compare import Comparison, tied
from loralab.report.measures import JUDGES, NATS, REWARD, Side, against, change, half_width, level
from loralab.report.policy import gamed
from loralab.report.read import Run
from loralab.report.seeds import luck
from loralab.report.wording import joined, measured, number

Ranked = list[tuple[Run, Score]]


@dataclass(frozen=True)
class Verdict:
    """What a comparison comes to: a sentence on learning, one on forgetting, what limits them, and which run gamed its reward."""

    name: str
    learned: str
    forgot: str
    limit: str
    gamed: str = ""


def verdict(comparison: Comparison) -> Verdict:
    """Judge the finished runs of a comparison by its first measures on which any of them moved."""
    runs, views = comparison.finished, comparison.views
    if not runs:
        return Verdict(comparison.name, "No run has finished yet, so there is nothing to judge.", "", "")
    learning, before = _telling(comparison, [view.learning for view in views])
    forgetting, ahead = _telling(comparison, [view.forgetting for view in views])
    learned, forgot = ranked(comparison, learning, best=max), ranked(comparison, forgetting, best=min)
    first = before + _learned(comparison, learning, learned) if learning and learned else ""
    second = ahead + _forgot(comparison, forgetting, forgot) if forgetting and forgot else ""
    if first and second:
        second += _cheapest(comparison, learned, forgot, learning, forgetting)
    unmeasured = "What was forgotten was not measured: give data.general or probes.source."
    return Verdict(
        comparison.name,
        _sentence(first) or "What was learned was not measured: give data.validation or probes.target.",
        _sentence(second) or ("" if comparison.objective in JUDGES else unmeasured),
        limit(runs, with_luck=any(luck(comparison, side) is not None for side in (learning, forgetting) if side)),
        " ".join(said for run in runs if (said := gamed(run, comparison.label(run)))),
    )


def _telling(comparison: Comparison, sides: Sequence[Side | None]) -> tuple[Side | None, str]:
    """Give the first measure on which some run moved beyond chance, and words for those before it; else the first."""
    still = list[str]()
    known = [side for side in sides if side is not None]
    for side in known:
        found = [change(run, side) for run in comparison.finished]
        if any(score is not None and score.value and not _is_nothing(score) for score in found):
            return side, f"by {joined(still)} no run moved beyond chance; by {side.way}, " if still else ""
        if side.way not in still:
            still.append(side.way)
    return known[0] if known else None, ""


def limit(runs: Sequence[Run], *, with_luck: bool = False) -> str:
    """Say how many seeds there are, and what a tie is where there is something to compare.

    Args:
        runs: those that are judged.
        with_luck: whether some of them differ by nothing but their seed, so that the luck of training is known.
    """
    seeds = sorted({str(run.at("seed")) for run in runs})
    said = (
        f"One seed ({seeds[0]})"
        if len(seeds) == 1
        else f"{len(seeds)} seeds ({', '.join(seeds)}), each a run of its own"
    )
    text = f"{said}: the intervals cover the choice of test items, not the luck of training."
    if with_luck:
        return f"{text} Runs tie where their difference is within both together."
    if len(runs) > 1:
        text += " Runs tie where the 95\N{NO-BREAK SPACE}% interval of their difference holds zero."
    return text


def ranked(comparison: Comparison, side: Side | None, *, best: object) -> Ranked:
    """Sort the finished runs by learning (`best` is max) or forgetting (min), the best first."""
    found = [(run, score) for run in comparison.finished if (score := change(run, side)) is not None]
    return sorted(found, key=lambda item: -item[1].value if best is max else item[1].value)


def ties(comparison: Comparison, order: Ranked, side: Side) -> list[Run]:
    """Give the best run and all that cannot be told from it."""
    seeds = luck(comparison, side)
    return [run for run, _ in order if run is order[0][0] or tied(order[0][0], run, side, seeds)]


def _learned(comparison: Comparison, side: Side, order: Ranked) -> str:
    (first, score), name = order[0], comparison.label
    unit, way = _unit(side), _way(first, side)
    task = f"of the new task {comparison.name}"
    if side.unit == NATS:
        task = f"off the loss of the new task {comparison.name}"
    elif side.against:
        task = f"above {against(first, side)} on {comparison.name}"
    elif side.unit == REWARD:
        task = f"of {side.phrase} on {comparison.name}"
    amount = f"{measured(score, signed=True)}{unit} {task}{way}"
    if len(order) == 1:
        if _is_nothing(score):
            return f"{name(first)} learned nothing that can be told from zero: {amount}"
        if score.value > 0:
            return f"{name(first)} learned {amount}"
        worse = f"is worse than {against(first, side)}" if side.against else "became worse"
        return f"{name(first)} {worse}: {amount}"
    best = ties(comparison, order, side)
    rest = [(run, score) for run, score in order if run not in best]
    if not rest:
        ends = f"from {amount} for {name(first)} to {measured(order[-1][1], signed=True)} for {name(order[-1][0])}"
        return f"the {len(order)} runs tie in learning, {ends}"
    lead = _lead([name(run) for run in best], "learned most")
    return f"{lead} {amount}; {_trail(comparison, rest, side, 'learned least', measured(rest[-1][1], signed=True))}"


def _forgot(comparison: Comparison, side: Side, order: Ranked) -> str:
    (first, score), name = order[0], comparison.label
    skills = "of the old skills" if side.unit != NATS else "on the text of the old skills"
    way = _way(first, side)
    gained = " (below zero: it gained)" if score.value < 0 and not _is_nothing(score) else ""
    amount = f"{measured(score)}{_unit(side)} {skills}{gained}"
    if len(order) == 1:
        if _is_nothing(score):
            told = f"{measured(score)}{_unit(side)}{way}"
            return f"it lost nothing {skills} that can be told from zero: {told}"
        return f"it lost {amount}{way}"
    best = ties(comparison, order, side)
    rest = [(run, score) for run, score in order if run not in best]
    if not rest:
        ends = f"from {amount} for {name(first)} to {measured(order[-1][1])} for {name(order[-1][0])}"
        return f"the {len(order)} runs tie in forgetting, {ends}"
    lead = _lead([name(run) for run in best], "forgot least")
    return f"{lead} {amount}; {_trail(comparison, rest, side, 'forgot most', measured(rest[-1][1]))}"


def _trail(comparison: Comparison, rest: Ranked, side: Side, did: str, amount: str) -> str:
    """Name the last of those behind the best, and all of them that cannot be told from it."""
    last = rest[-1][0]
    seeds = luck(comparison, side)
    same = [comparison.label(run) for run, _ in reversed(rest) if run is last or tied(last, run, side, seeds)]
    if len(same) == 1:
        return f"{same[0]} {did}, {amount}"
    return f"{joined(same)} {did} (a tie), {same[0]} with {amount}"


def _cheapest(
    comparison: Comparison, learned: Ranked, forgot: Ranked, learning: Side | None, forgetting: Side | None
) -> str:
    """Of several runs that tie in learning, name the one that forgot least, if that can be told."""
    if learning is None or forgetting is None:
        return ""
    best = ties(comparison, learned, learning)
    order = [(run, score) for run, score in forgot if run in best]
    if not 1 < len(order) < len(forgot) or len(least := ties(comparison, order, forgetting)) == len(order):
        return ""
    name = joined([comparison.label(run) for run in least])
    return f"; of those that learned most, {name} forgot least, {measured(order[0][1])}"


def _sentence(text: str) -> str:
    return f"{text[0].upper()}{text[1:]}." if text else ""


def _lead(best: list[str], did: str) -> str:
    """Begin a sentence about the best; where several are, the first is the one whose number follows."""
    return f"{best[0]} {did}:" if len(best) == 1 else f"{joined(best)} {did} (a tie), {best[0]} with"


def _unit(side: Side) -> str:
    return " nats per token" if side.unit == NATS else ""


def _way(run: Run, side: Side) -> str:
    """Say from where to where the level went."""
    base, after = level(run, side, "base"), level(run, side)
    if base is None or after is None:
        return ""
    what = "" if side.unit in (NATS, REWARD) else f" {side.phrase}"
    return f" ({number(base.value)} → {number(after.value)}{what})"


def _is_nothing(score: Score) -> bool:
    half = half_width(score)
    return half is not None and abs(score.value) <= half
