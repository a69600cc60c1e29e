"""The page of an evaluation: before and after per task, items that changed sides, examples, cost, versions."""

from collections.abc import Mapping
from itertools import product
from typing import Any

from loralab.evals.stats import Z95
from loralab.lab.evaluation import BASE, Evaluation
from loralab.lab.measured import Measured, changes_of, finite
from loralab.report import changes, provenance
from loralab.report.changes import Model, models_of
from loralab.report.drawing import marker_path
from loralab.report.rendering import inlined, rendered
from loralab.report.tables import SkillCell
from loralab.report.transitions import Bar, Examples, bar_of_change, examples, written
from loralab.report.wording import NOTHING, joined, number, whole

Rows = dict[str, list[Mapping[str, Any]]]
"""Items of a delta by score."""
FULL_TINT = 0.1
"""A change of this size has the strongest tint."""
MOST_TASKS = 12
"""Tasks whose examples a delta shows; of more, those in which most items changed sides."""
SIGNS = {"learned": "▲", "forgotten": "▼", "tie": "tie", "": ""}


def render(found: Evaluation, name: str) -> str:
    """Give the page as text; `name` is what the person calls the folder."""
    models = models_of(found)
    deltas = [_named(model) for model in models if model.name != BASE]
    by_score: dict[str, Rows] = {delta["folder"]: {} for delta in deltas}
    for row in found.items:
        by_score.get(str(row.get("model")), {}).setdefault(str(row.get("probe")), []).append(row)
    return rendered(
        "evaluation.html.j2",
        name=name,
        kind="evaluation",
        chips=[(model.name, model.label, model.colour) for model in models if model.name != BASE],
        chips_of="deltas",
        models=[_named(model) for model in models],
        deltas=deltas,
        base=_base_line(found),
        verdicts=[(delta["label"], *_verdict(found, delta["folder"])) for delta in deltas],
        how_judged=found.how_judged(),
        rows=[_row(found, score, deltas) for score in found.names()],
        figures=inlined(changes.figures(found)),
        bars=_bars(found, deltas),
        examples=[(delta, *_examples(found, delta["folder"], by_score[delta["folder"]])) for delta in deltas],
        curves=inlined(changes.pass_at_k(found)),
        diversity=_diversity(found, models),
        notes=found.notes(),
        every=_every(found),
        tasks=[_task(found, score) for score in found.names()],
        facts=_facts(found),
    )


def _named(model: Model) -> dict[str, Any]:
    icon = {"icon": marker_path(model.marker), "colour": model.colour, "state": ""}
    return {"folder": model.folder, "method": model.method, "label": model.label, **icon}


def _base_line(found: Evaluation) -> str:
    mark = found.facts.get("fingerprint")
    said = f" (weights {str(mark)[:8]})" if mark else ""
    return f"Base: {found.facts.get('model') or 'unknown'}{said}."


# The verdict


def _verdict(found: Evaluation, delta: str) -> tuple[str, str, str]:
    """Say in a sentence each what a delta learned, what it forgot, and where it ties with the base."""
    said = found.verdicts()
    mine = [one for one in found.measured if one.model == delta and one.change_score() is not None]
    parts = {
        word: [one for one in mine if said[delta, one.name].word == word] for word in ("learned", "forgotten", "tie")
    }
    learned, forgotten = (_amounts(found, parts[word]) for word in ("learned", "forgotten"))
    ties = [found.title(one) for one in parts["tie"]]
    return (
        f"Learned: {learned}."
        if learned
        else "It learned nothing that can be told from zero."
        if mine
        else "Nothing was compared.",
        f"Forgotten: {forgotten}." if forgotten else "It forgot nothing that can be told from zero." if mine else "",
        f"A tie with the base: {joined(ties)}." if ties else "",
    )


def _amounts(found: Evaluation, those: list[Measured]) -> str:
    """Name the suites first, then the tasks that changed most."""
    order = sorted(those, key=lambda one: (not one.is_suite, -abs(_moved(one))))
    return (
        joined([f"{found.title(one)} {number(_moved(one), signed=True)}{_ways(found, one)}" for one in order])
        if order
        else ""
    )


def _moved(one: Measured) -> float:
    change = one.change_score()
    return 0.0 if change is None else change.value


def _ways(found: Evaluation, one: Measured) -> str:
    base = found.find(BASE, one.name)
    return f" ({number(base.score.value)} → {number(one.score.value)})" if base is not None else ""


# Tables


def _row(found: Evaluation, name: str, deltas: list[dict[str, Any]]) -> tuple[str, bool, str, list[SkillCell | None]]:
    """Give a score's title, whether it is a suite's, the base's value, and a cell per delta."""
    one = next(one for one in found.measured if one.name == name)
    base = found.find(BASE, name)
    cells = [_cell(found, delta["folder"], name) for delta in deltas]
    return found.title(one), one.is_suite, _with_half(base), cells


def _with_half(one: Measured | None) -> str:
    if one is None:
        return NOTHING
    ends = one.score.interval()
    if ends is None:
        return number(one.score.value)
    half = max(ends[1] - one.score.value, one.score.value - ends[0])
    return f"{number(one.score.value)}\N{NO-BREAK SPACE}±\N{NO-BREAK SPACE}{number(half)}"


def _cell(found: Evaluation, delta: str, name: str) -> SkillCell | None:
    one = found.find(delta, name)
    if one is None:
        return None
    change, verdict = one.change_score(), found.verdicts().get((delta, name))
    if change is None or verdict is None:
        return SkillCell(number(one.score.value), "", "", 0, f"{delta}, {found.title(one)}: {number(one.score.value)}")
    way = (1 if change.value > 0 else -1) * (1 if one.higher_is_better else -1)
    tint = round((30 if verdict.word == "tie" else 100) * min(1.0, abs(change.value) / FULL_TINT)) * way
    tip = f"{delta}, {found.title(one)}: {_ways(found, one).strip(' ()')}, change {number(change.value, signed=True)}"
    tip += f" {_interval(one)}, {verdict.word or 'not judged'}"
    return SkillCell(number(one.score.value), number(change.value, signed=True), SIGNS[verdict.word], tint, tip)


def _interval(one: Measured) -> str:
    ends = one.change_interval()
    return "" if ends is None else f"[{number(ends[0], signed=True)}, {number(ends[1], signed=True)}]"


def _every(found: Evaluation) -> list[tuple[str, dict[str, Any]]]:
    """Give every change with all that is known of it, in order of scores and deltas."""
    said, rows = found.verdicts(), []
    for name in found.names():
        for delta in found.deltas:
            one = found.find(delta, name)
            if one is None or one.change is None:
                continue
            base, verdict = found.find(BASE, name), said[delta, name]
            counts = (finite(one.change.get(key)) for key in ("lost", "won"))
            numbers = [number(base.score.value if base else None), number(one.score.value)]
            numbers += [
                number(_moved(one), signed=True),
                _interval(one) or NOTHING,
                *(whole(count) for count in counts),
            ]
            numbers += [written(finite(one.change.get("p_value"))), written(verdict.p_adjusted), whole(one.score.n)]
            cells = {"delta": delta, "numbers": numbers, "word": verdict.word or NOTHING}
            rows.append((found.title(one), cells))
    return rows


def _bars(found: Evaluation, deltas: list[dict[str, Any]]) -> list[tuple[str, dict[str, Any], Bar]]:
    rows = []
    for name in found.names():
        for delta in deltas:
            one = found.find(delta["folder"], name)
            bar = bar_of_change(one.change) if one is not None else None
            if bar is not None:
                rows.append((name, delta, bar))
    return rows


def _examples(found: Evaluation, delta: str, rows: Rows) -> tuple[list[Examples], int, int]:
    """Give examples of one score per task, and how many items were lost and won in all of these."""
    names = _one_per_task(found)
    lost_won = {name: changes_of(rows.get(name, []), delta, name) for name in names}
    order = sorted(names, key=lambda name: -sum(map(len, lost_won[name])))[:MOST_TASKS]
    groups = [
        examples(name, way, changed)
        for name in names
        if name in order
        for way, changed in zip(("lost", "won"), lost_won[name], strict=True)
        if changed
    ]
    lost, won = (sum(len(pair[i]) for pair in lost_won.values()) for i in (0, 1))
    return groups, lost, won


def _one_per_task(found: Evaluation) -> list[str]:
    """Choose the score of each task that a suite takes, else accuracy by length, else its first."""
    suites = found.facts.get("suites")
    taken = [name for part in provenance.plain(suites).values() if isinstance(part, list) for name in part]
    chosen: dict[str, str] = {}
    for one in (one for one in found.measured if not one.is_suite):
        best = chosen.setdefault(one.task, one.name)
        if best not in taken and (one.name in taken or one.metric == "acc_norm"):
            chosen[one.task] = one.name
    return list(chosen.values())


def _diversity(found: Evaluation, models: list[Model]) -> list[tuple[str, dict[str, Any], str, list[str]]]:
    """Give distinct outputs, passing and failing apart: task, model, kind, and the numbers as written."""
    rows = []
    tasks, kinds = (list(dict.fromkeys(str(row.get(key)) for row in found.diversity)) for key in ("task", "kind"))
    for task, kind, model in product(tasks, kinds, models):
        for row in found.diversity:
            if (str(row.get("task")), str(row.get("kind")), row.get("model")) == (task, kind, model.name):
                distinct, error = (finite(row.get(key)) for key in ("distinct", "standard_error"))
                half = "" if error is None else f"\N{NO-BREAK SPACE}±\N{NO-BREAK SPACE}{number(Z95 * error, 2)}"
                rows.append(
                    (task, _named(model), kind, [whole(finite(row.get("samples"))), number(distinct, 2) + half])
                )
    return rows


# Where it comes from


def _task(found: Evaluation, name: str) -> list[str]:
    one = next(one for one in found.measured if one.name == name)
    marks = [(mark or "")[:16] or NOTHING for mark in (one.prompt_hash, one.template_hash)]
    few = NOTHING if one.is_suite else str(one.fewshot)
    chance = NOTHING if one.chance is None else number(one.chance)
    return [found.title(one), one.version or NOTHING, few, whole(one.score.n), chance, one.score.unit, *marks]


def _facts(found: Evaluation) -> list[tuple[str, str, bool]]:
    """Give what stands at the end of the page: a word, its value, whether the value is written as code."""
    where = provenance.of_environment(provenance.plain(found.facts.get("environment")))
    rows = [("Command", where["command"], True), ("Date", where["date"], False), ("Machine", where["hardware"], False)]
    rows += [("Versions", where["versions"], False), ("Commit", where["commit"], True)]
    rows.append(("SHA-256 of the base", str(found.facts.get("fingerprint") or ""), True))
    for delta, facts in provenance.plain(found.facts.get("deltas")).items():
        rows.append((f"Delta {delta}", str(provenance.plain(facts).get("path") or ""), True))
        rows.append((f"SHA-256 of {delta}", str(provenance.plain(facts).get("fingerprint") or ""), True))
    rows.append(("Seed", "" if found.facts.get("seed") is None else str(found.facts["seed"]), False))
    return [row for row in rows if row[1]]
