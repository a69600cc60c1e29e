"""Item by item: what each run of a comparison kept, lost and won, with examples."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any

import pandas as pd

from loralab.report.compare import Comparison
from loralab.report.read import Run
from loralab.report.transitions import Bar, Examples, bar_of_items, examples
from loralab.report.wording import joined

ROLES = {"target": "New task", "source": "Old skills"}
MEASURES = {"accuracy": "right answers", "choice": "multiple choice"}
COLUMNS = {"probe", "item", "skill", "prompt", "base_right", "tuned_right"}


@dataclass(frozen=True)
class Sides:
    """The bars of one probe: its title, and a name, the run and the bar of each row."""

    title: str
    rows: list[tuple[str, Run, Bar]]


def _graded(run: Run) -> pd.DataFrame | None:
    """Give the rows with an outcome on base and tuned model, None where there are none.

    Judgements are left out: those of a base whose head was never trained are chance, so none was lost or won.
    """
    if run.items is None or not set(run.items.columns) >= COLUMNS:
        return None
    both = run.items[["base_right", "tuned_right"]].apply(pd.to_numeric, errors="coerce").notna().all(axis=1)
    found = run.items[both & (run.items["probe"] != "target")]
    return None if found.empty else found.assign(skill=found["skill"].fillna("").astype(str))


def title(probe: str, comparison: Comparison) -> str:
    """Name a probe for a person."""
    role, _, measure = probe.partition("/")
    if role not in ROLES:
        return probe
    name = f"{ROLES[role]} {comparison.name}" if role == "target" else ROLES[role]
    return f"{name}, {MEASURES.get(measure, measure)}"


def sides(comparison: Comparison) -> list[Sides]:
    """Give the bars of every probe with right and wrong answers: a row per run, and of a single run a row per skill too."""
    tables = {run.folder: table for run in comparison.runs if (table := _graded(run)) is not None}
    made = []
    for probe in _in_order(str(probe) for table in tables.values() for probe in table["probe"]):
        rows = []
        for run in comparison.runs:
            if run.folder in tables:
                mine = tables[run.folder][tables[run.folder]["probe"] == probe]
                skills = list(dict.fromkeys(mine["skill"])) if len(comparison.runs) == 1 else []
                rows += [(skill, run, _bar(mine[mine["skill"] == skill])) for skill in skills if len(skills) > 1]
                if not mine.empty:
                    name = "all" if len(skills) > 1 else skills[0] if skills else ""
                    rows.append((name, run, _bar(mine)))
        made.append(Sides(title(probe, comparison), rows))
    return made


def _bar(rows: pd.DataFrame) -> Bar:
    return bar_of_items(rows["base_right"].astype(float).tolist(), rows["tuned_right"].astype(float).tolist())


def changed(comparison: Comparison, run: Run) -> tuple[str, list[Examples]]:
    """Give examples newly lost and newly won of a run, and say how many there are.

    Multiple choice stands in where no answers were graded. Items whose answers were kept come first; then each skill in turn.
    """
    table = _graded(run)
    if table is None:
        return "", []
    outputs = _outputs(run)
    groups, counts = [], []
    for probe in _telling(_in_order(table["probe"].astype(str))):
        mine = table[table["probe"] == probe]
        before, after = (mine[f"{model}_right"].astype(float) for model in ("base", "tuned"))
        role = probe.partition("/")[0]
        for way, rows in (("lost", mine[after < before]), ("won", mine[after > before])):
            if rows.empty:
                continue
            told = [{**row, **outputs.get((role, str(row["prompt"])), {})} for row in _in_turn(rows)]
            told.sort(key=lambda row: "tuned_output" not in row)  # those that show most come first
            groups.append(examples(title(probe, comparison), way, told))
            said = title(probe, comparison)
            counts.append(f"{len(rows)} newly {way} ({said[0].lower()}{said[1:]})")
    return joined(counts) if counts else "", groups


def _in_order(probes: Iterable[str]) -> list[str]:
    """Give each probe once, those of the new task first."""
    return sorted(dict.fromkeys(probes), key=lambda probe: not probe.startswith("target/"))


def _telling(probes: list[str]) -> list[str]:
    roles = [probe.partition("/")[0] for probe in probes if probe.endswith("/accuracy")]
    return [probe for probe in probes if not (probe.endswith("/choice") and probe.partition("/")[0] in roles)]


def _in_turn(rows: pd.DataFrame) -> list[Mapping[str, Any]]:
    """Order rows so that each skill comes in turn."""
    groups: list[list[dict[str, Any]]] = [part.to_dict("records") for _, part in rows.groupby("skill", sort=True)]
    return [row for turn in zip_longest(*groups) for row in turn if row is not None]


def _outputs(run: Run) -> dict[tuple[str, str], dict[str, str]]:
    """Give what base and tuned model wrote to a prompt, by role and prompt, as far as answers were kept."""
    last = max((line["step"] for line in run.samples if line["model"] != "base"), default=None)
    found: dict[tuple[str, str], dict[str, str]] = {}
    for line in run.samples:
        if line["model"] == "base" or line["step"] == last:
            told = found.setdefault((line["role"], line["prompt"]), {"reference": line["reference"]})
            told["base_output" if line["model"] == "base" else "tuned_output"] = line["output"]
    return found
