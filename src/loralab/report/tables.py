"""The tables of a comparison as rows of written cells: results, skills, all scores, cost."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from loralab.console.screen import size
from loralab.evals.stats import Score
from loralab.report.compare import Comparison
from loralab.report.measures import JUDGES, Side, View, change, half_width, level
from loralab.report.read import Run
from loralab.report.spectra import middle
from loralab.report.wording import NOTHING, duration, measured, number, share, whole


@dataclass(frozen=True)
class Cell:
    """A written value, what comes before it in small print, and the number by which its column is sorted."""

    text: str
    sort: float | None = None
    before: str = ""


EMPTY = Cell(NOTHING)


@dataclass(frozen=True)
class Column:
    """A column: the group it stands under, its head, what it means, and its cell of a run."""

    group: str
    head: str
    meaning: str
    cell: Callable[[Run], Cell]


def results(
    comparison: Comparison, view: View, *, everything: bool
) -> tuple[list[Column], list[tuple[Run, list[Cell]]]]:
    """Give the results by one view; with `everything` also size, drift and cost. Columns without a value are left out."""
    columns: list[Column] = []
    for side, group, head, meaning in (
        (view.learning, f"New task: {comparison.name}", "learned", "the change; more is better"),
        (view.forgetting, "Old skills", "forgotten", "the change; less is better"),
    ):
        if side is not None:
            group = f"{group}, {side.words}"
            ways = ("base → after", "before and after training")
            if side.against:
                ways = ("baseline → after", f"{side.against}; after training")
            columns.append(Column(group, *ways, partial(_ways, side=side)))
            columns.append(Column(group, head, meaning, partial(_changed, side=side)))
    if everything:
        columns += [
            Column("The change", "trained", "share of the model's numbers that move", _share),
            Column("The change", "drift", "KL(base‖tuned) on the general text, nats per token", _drift),
            Column(
                "The change",
                "rank for 90\N{NO-BREAK SPACE}%",
                "directions that hold 90 % of it, median over layers",
                _rank90,
            ),
            Column("Cost", "time", "wall clock, probes included", partial(_fact, key="wall_s", write=duration)),
            Column("Cost", "tokens", "read in training", partial(_fact, key="tokens", write=whole)),
            Column(
                "Cost",
                "memory",
                "peak of the process or the accelerator",
                partial(_fact, key="peak_bytes", write=_bytes),
            ),
        ]
    rows = [(run, [column.cell(run) for column in columns]) for run in comparison.runs]
    kept = [i for i in range(len(columns)) if any(cells[i].text != NOTHING for _, cells in rows)]
    return [columns[i] for i in kept], [(run, [cells[i] for i in kept]) for run, cells in rows]


def _ways(run: Run, side: Side) -> Cell:
    base, after = level(run, side, "base"), level(run, side)
    if after is None:
        return EMPTY if base is None else Cell(NOTHING, None, f"{number(base.value)} → ")
    return Cell(measured(after), after.value, "" if base is None else f"{number(base.value)} → ")


def _changed(run: Run, side: Side) -> Cell:
    found = change(run, side)
    return EMPTY if found is None else Cell(measured(found, signed=True), found.value)


def _share(run: Run) -> Cell:
    return Cell(share(run.trained_share), run.trained_share)


def _drift(run: Run) -> Cell:
    found = run.after.get("drift/kl")
    return EMPTY if found is None else Cell(measured(found), found.value)


def _rank90(run: Run) -> Cell:
    found = middle(run, "rank90")
    return EMPTY if found is None else Cell(f"{found[1]:g}", found[1])


def _fact(run: Run, key: str, write: Callable[[float | None], str]) -> Cell:
    value = run.fact(key)
    return Cell(write(value), value)


def probe_share(run: Run) -> float | None:
    """Give the share of a run's time that its probes took, None where it was not recorded."""
    probes, wall = run.fact("probe_s"), run.fact("wall_s")
    return probes / wall if probes is not None and wall else None


def probe_cost(comparison: Comparison) -> str:
    """Say what the probes cost, "" where it was not recorded."""
    found = [(run, cost) for run in comparison.runs if (cost := probe_share(run)) is not None]
    if not found:
        return ""
    shares = sorted(cost for _, cost in found)
    spread = share(shares[0]) if shares[0] == shares[-1] else f"{share(shares[0])} to {share(shares[-1])}"
    seconds = sum(run.fact("probe_s") or 0.0 for run, _ in found)
    tokens = [count for run, _ in found if (count := run.fact("probe_tokens")) is not None]
    read = f", over {whole(sum(tokens))} tokens" if tokens else ""
    who = "the run" if len(found) == 1 else "each run"
    total = "" if len(found) == 1 else " in all"
    return f"Probes took {spread} of the time of {who}: {duration(seconds)}{total}{read}."


def _bytes(value: float | None) -> str:
    return NOTHING if value is None else size(value)


# Inside the deltas


INSIDE = (
    ("rank", "rank at most", "directions that the method allows"),
    ("rank90", "rank for 90\N{NO-BREAK SPACE}%", "directions that hold 90 % of the energy"),
    ("effective_rank", "effective rank", "exp of the entropy of the singular values (Roy & Vetterli 2007)"),
    ("stable_rank", "stable rank", "‖ΔW‖²_F / ‖ΔW‖²₂"),
    ("relative_norm", "size", "‖ΔW‖_F / ‖W₀‖_F"),
)


def inside(comparison: Comparison) -> tuple[list[tuple[str, str]], list[tuple[Run, list[Cell]]]]:
    """Give median and middle half over layers of what spectra.parquet holds."""
    kept = [item for item in INSIDE if any(middle(run, item[0]) for run in comparison.runs)]
    rows = []
    for run in comparison.runs:
        found = [middle(run, key) for key, _, _ in kept]
        if any(found):
            rows.append((run, [EMPTY if f is None else Cell(f"{f[1]:.3g}", f[1], "") for f in found]))
    return [(head, meaning) for _, head, meaning in kept], rows


# Skills


@dataclass(frozen=True)
class SkillCell:
    """After training: the share right, the change, whether it is more than chance, and the tint of the cell."""

    text: str
    change: str
    sign: str
    tint: int
    tip: str


@dataclass(frozen=True)
class Skills:
    """A table of skills × runs."""

    title: str
    rows: list[tuple[str, str, list[SkillCell | None]]]
    """Skill, the base's share right, and a cell per run."""


SKILL_TABLES = (
    ("source", "accuracy", "Old skills, one by one: share answered right"),
    ("source", "choice", "Old skills, one by one: share right by multiple choice"),
    ("target", "accuracy", "New task, skill by skill: share answered right"),
    ("target", "choice", "New task, skill by skill: share right by multiple choice"),
)
FULL_TINT = 0.4
"""A change of this size has the strongest tint; changes that may be chance are paler."""


def skills(comparison: Comparison) -> list[Skills]:
    """Give a table per role and measure for which skills were measured one by one; classes are no skills."""
    made = []
    for role, kind, title in () if comparison.objective in JUDGES else SKILL_TABLES:
        names = list(
            dict.fromkeys(n for run in comparison.runs for n in [*run.base, *run.after] if _is_skill(n, role, kind))
        )
        rows = []
        for name in names:
            skill = name.split("/")[1]
            base = next((run.base[name] for run in comparison.runs if name in run.base), None)
            cells = [_skill_cell(comparison.label(run), run, name, skill) for run in comparison.runs]
            rows.append((skill, number(base.value if base else None, 2), cells))
        if rows:
            made.append(Skills(title, rows))
    return made


def _is_skill(name: str, role: str, kind: str) -> bool:
    parts = name.split("/")
    return len(parts) == 3 and parts[0] == role and parts[2] == kind


def _skill_cell(label: str, run: Run, name: str, skill: str) -> SkillCell | None:
    base, after = run.base.get(name), run.after.get(name)
    if after is None:
        return None
    if base is None:
        return SkillCell(number(after.value, 2), "", "", 0, f"{label}, {skill}: {measured(after)}")
    moved = run.after.get(f"{name}_change") or Score(name, after.value - base.value, after.unit, after.n, None)
    half = half_width(moved)
    clear = half is not None and abs(moved.value) > half
    sign = "" if not clear else "▲" if moved.value > 0 else "▼"
    tint = round((100 if clear else 35) * min(1.0, abs(moved.value) / FULL_TINT)) * (1 if moved.value > 0 else -1)
    said = "" if clear or half is None else ", no more than chance"
    tip = f"{label}, {skill}: {number(base.value)} → {measured(after)}, change {measured(moved, signed=True)}{said}"
    return SkillCell(number(after.value, 2), number(moved.value, 2, signed=True), sign, tint, tip)


# Every score, and cost


def all_scores(comparison: Comparison) -> list[tuple[str, str, str, list[str]]]:
    """Give every score at the end: name, unit, the base's, and each run's."""
    names = list(dict.fromkeys(name for run in comparison.runs for name in [*run.base, *run.after]))
    rows = []
    for name in names:
        found = [run.after.get(name) for run in comparison.runs]
        base = next((run.base[name] for run in comparison.runs if name in run.base), None)
        unit = next((score.unit for score in [base, *found] if score is not None), "")
        rows.append((name, unit, measured(base), [measured(score) for score in found]))
    return rows


@dataclass(frozen=True)
class Bars:
    """A bar per run: the share of the longest, in percent, and what is written at its end."""

    title: str
    rows: list[tuple[Run, float, str]]


def cost(comparison: Comparison) -> list[Bars]:
    """Give time, the probes' part of it, tokens, peak memory and trained share, of those that are known."""
    made = []
    for title, read, write in (
        ("Time", lambda run: run.fact("wall_s"), duration),
        ("Share of the time that probes took", probe_share, share),
        ("Peak memory", lambda run: run.fact("peak_bytes"), _bytes),
        ("Tokens read", lambda run: run.fact("tokens"), whole),
        ("Share of the model that is trained", lambda run: run.trained_share, share),
    ):
        found = [(run, value) for run in comparison.runs if (value := read(run)) is not None]
        longest = max((value for _, value in found), default=0.0)
        if longest > 0 and math.isfinite(longest):
            made.append(Bars(title, [(run, 100 * value / longest, write(value)) for run, value in found]))
    return made
