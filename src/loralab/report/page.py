"""One self-contained HTML page about a run, a folder of runs, an evaluation, a spectra folder, or a repair.

No network, no date of building, the same bytes each time.
"""

from pathlib import Path
from typing import Any

from loralab.errors import FolderError
from loralab.lab.evaluation import is_evaluation, read_evaluation
from loralab.lab.repaired import is_repair, read_repair
from loralab.lab.spectra import is_spectra, read_spectra
from loralab.report import (
    curves,
    evaluation,
    figures,
    grown,
    inside,
    items,
    judged,
    policy,
    provenance,
    repaired,
    seeds,
    spectra,
    tables,
)
from loralab.report.compare import METHOD_NAMES, METHOD_ORDER, Comparison, compare, method_label
from loralab.report.drawing import colour, icon
from loralab.report.measures import Side, View
from loralab.report.read import Run, runs_below
from loralab.report.rendering import inlined, rendered
from loralab.report.spectra_folder import Inside
from loralab.report.verdict import verdict
from loralab.report.wording import whole
from loralab.run.folder import write_atomic

STATES = {
    "done": "finished",
    "new": "not begun",
    "running": "still running",
    "interrupted": "stopped",
    "diverged": "diverged",
    "damaged": "damaged",
}


def write(path: str | Path, out: str | Path | None = None) -> Path:
    """Write the report of a folder: a run's, one that holds runs (or groups of them), an evaluation's, spectra, a repair.

    Args:
        path: the folder.
        out: the page's file; None is `report.html` in the folder.

    Returns:
        The page's file.

    Raises:
        FolderError: there is no such folder, nothing to report in it, what it holds is damaged, or the page cannot be
            written.
        Interrupted: the disk is full.
    """
    target = Path(path, "report.html") if out is None else Path(out)
    if target.is_dir():
        raise FolderError("the page's file is a folder", where=str(target), fix="name a file: --out report.html")
    write_atomic(target, of_folder(path))
    return target


def of_folder(path: str | Path) -> str:
    """Give the page of whatever a folder holds, as text.

    Raises:
        FolderError: there is no such folder, nothing to report in it, or what it holds is damaged.
    """
    name = Path(path).resolve().name
    if is_evaluation(path):
        return evaluation.render(read_evaluation(path), name)
    if is_spectra(path):
        return inside.render(Inside(read_spectra(path)), name)
    if is_repair(path):
        return repaired.render(read_repair(path), name)
    return render(runs_below(path), name)


def render(runs: list[Run], name: str) -> str:
    """Give the page as text; `name` is what the person calls the folder."""
    comparisons = compare(runs)
    told = {run.folder for comparison in comparisons for run in comparison.finished}
    return rendered(
        "page.html.j2",
        name=name,
        kind="report on",
        chips=[(method, title, colour(method)) for method, title in _methods(runs)],
        chips_of="methods",
        runs=runs,
        sections=[_section(comparison, f"c{i}") for i, comparison in enumerate(comparisons, start=1)],
        unfinished=[(run, method_label(run), _why(run)) for run in runs if run.folder not in told or run.problems],
        provenance=[provenance.of_run(run, name) for run in runs],
    )


def _methods(runs: list[Run]) -> list[tuple[str, str]]:
    found = {run.method for run in runs if run.state != "damaged"}
    known = [method for method in METHOD_ORDER if method in found]
    return [(method, METHOD_NAMES.get(method, method)) for method in [*known, *sorted(found.difference(METHOD_ORDER))]]


def _section(comparison: Comparison, key: str) -> dict[str, Any]:
    """Give everything that the page says about one comparison."""
    results, told = [], set[Side | None]()
    for i, view in enumerate(comparison.views):
        new = View(*(None if side in told else side for side in (view.learning, view.forgetting)))
        way = next((side.way for side in (new.learning, new.forgetting) if side is not None), "")
        results.append((way, *tables.results(comparison, new, everything=i == 0)))
        told |= {view.learning, view.forgetting}
    planes = [figures.plane(comparison, view, f"{key}-plane-{i}") for i, view in enumerate(comparison.views)]
    return {
        "key": key,
        "name": comparison.name,
        "base": comparison.base,
        "base_mark": comparison.base_mark,
        "runs": [_named(comparison, run) for run in comparison.runs],
        "verdict": verdict(comparison),
        "kept": [said for run in comparison.runs if (said := _kept(comparison, run))],
        "results": results or [("", *tables.results(comparison, View(None, None), everything=True))],
        "planes": inlined([figure for figure in planes if figure is not None]),
        "judged": judged.section(comparison, key),
        "policy": policy.section(comparison, key),
        "curves": inlined(curves.curves(comparison, key)),
        "skill_curves": inlined(curves.skill_curves(comparison, key)),
        "sides": items.sides(comparison),
        "changed": [(_named(comparison, run), *items.changed(comparison, run)) for run in comparison.runs],
        "seeds": seeds.table(comparison),
        "probe_cost": tables.probe_cost(comparison),
        "skills": tables.skills(comparison),
        "spectra": inlined(spectra.figures(comparison, key)),
        "inside": tables.inside(comparison),
        "grown": inlined(grown.figures(comparison, key)),
        "samples": _samples(comparison),
        "cost": tables.cost(comparison),
        "all_scores": tables.all_scores(comparison),
    }


def _named(comparison: Comparison, run: Run) -> dict[str, Any]:
    return {
        "folder": run.folder,
        "label": comparison.label(run),
        "method": run.method,
        "icon": icon(run),
        "colour": colour(run.method),
        "state": "" if run.state == "done" else _progress(run),
    }


def _progress(run: Run) -> str:
    word = STATES.get(run.state, run.state)
    step, total = run.fact("step"), run.fact("total_steps")
    if step is None or total is None:
        return word
    return f"{word} at step {whole(step)} of {whole(total)}"


def _kept(comparison: Comparison, run: Run) -> str:
    """Say why a policy ended early, and of which step the weights are that were kept where it is not the last."""
    label, said = comparison.label(run), []
    kept, last, total = (run.fact(key) for key in ("delta_step", "step", "total_steps"))
    if last is None or run.state != "done":
        return ""
    if comparison.objective == "policy" and total is not None and last < total and run.status.get("end"):
        said.append(f"{label} ended after step {whole(last)} of {whole(total)}: {run.status['end']}.")
    if kept is not None and kept != last:
        said.append(f"{label} was best after step {whole(kept)} of {whole(last)}: those weights were kept.")
    return " ".join(said)


def _why(run: Run) -> str:
    said = run.status.get("message")
    parts = [str(said).partition("\n")[0]] if said and run.state != "done" else []
    return "; ".join([_progress(run), *parts, *run.problems])


# Samples


def _samples(comparison: Comparison) -> list[dict[str, Any]]:
    """Gather the answers to each prompt: the base's, then each run's at its last step; new task first."""
    asked: dict[tuple[str, str, str, str], dict[str, Any]] = {}
    for run in comparison.runs:
        last = max((line["step"] for line in run.samples if line["model"] != "base"), default=None)
        for line in run.samples:
            if line["role"] == policy.ROLE:
                continue
            key = (line["role"], line["skill"], line["prompt"], line["reference"])
            card = asked.setdefault(key, {"base": None, "answers": []})
            answer = {"output": line["output"], "right": line.get("right")}
            if line["model"] == "base":
                card["base"] = card["base"] or answer
            elif line["step"] == last:
                card["answers"].append({**answer, **_named(comparison, run)})
    words = {"target": "new task", "source": "old skill"}
    cards = [
        {"role": words.get(role, role), "skill": skill, "prompt": prompt, "reference": reference, **card}
        for (role, skill, prompt, reference), card in asked.items()
    ]
    return sorted(cards, key=lambda card: card["role"] != "new task")
