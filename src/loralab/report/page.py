"""One self-contained HTML page about a run or a folder of runs: no network, no date of building, the same bytes each time."""

import base64
import hashlib
import shlex
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from loralab.console import size
from loralab.errors import FolderError
from loralab.report import figures, spectra, tables
from loralab.report.compare import METHOD_NAMES, METHOD_ORDER, Comparison, Side, View, compare, half_width, method_label
from loralab.report.drawing import colour, icon
from loralab.report.read import Run, runs_below
from loralab.report.verdict import verdict
from loralab.report.wording import whole
from loralab.run.folder import write_atomic

TEMPLATES = Path(__file__).with_name("templates")
STATES = {
    "done": "finished",
    "new": "not begun",
    "running": "still running",
    "interrupted": "stopped",
    "diverged": "diverged",
    "damaged": "damaged",
}


def write(path: str | Path, out: str | Path | None = None) -> Path:
    """Write the report of a run folder, or of a folder that holds run folders (or groups of them).

    Args:
        path: the folder.
        out: the page's file; None is `report.html` in the folder.

    Returns:
        The page's file.

    Raises:
        FolderError: there is no such folder, no run in it, or the page cannot be written.
        Interrupted: the disk is full.
    """
    runs = runs_below(path)
    target = Path(path, "report.html") if out is None else Path(out)
    if target.is_dir():
        raise FolderError("the page's file is a folder", where=str(target), fix="name a file: --out report.html")
    write_atomic(target, render(runs, Path(path).resolve().name))
    return target


def render(runs: list[Run], name: str) -> str:
    """Give the page as text; `name` is what the person calls the folder."""
    style, script = ((TEMPLATES / file).read_text(encoding="utf-8") for file in ("style.css", "page.js"))
    environment = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    comparisons = compare(runs)
    told = {run.folder for comparison in comparisons for run in comparison.finished}
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return environment.get_template("page.html.j2").render(
        name=name,
        style=Markup(style),
        script=Markup(script),
        script_hash=f"sha256-{digest}",
        colours={method: colour(method) for method in METHOD_ORDER},
        methods=_methods(runs),
        runs=runs,
        sections=[_section(comparison, f"c{i}") for i, comparison in enumerate(comparisons, start=1)],
        unfinished=[(run, method_label(run), _why(run)) for run in runs if run.folder not in told or run.problems],
        provenance=[_provenance(run, name) for run in runs],
        zero_width=any(_has_no_width(run) for run in runs),
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
        "results": results or [("", *tables.results(comparison, View(None, None), everything=True))],
        "planes": _inlined([figure for figure in planes if figure is not None]),
        "curves": _inlined(figures.curves(comparison, key)),
        "skills": tables.skills(comparison),
        "spectra": _inlined(spectra.figures(comparison, key)),
        "inside": tables.inside(comparison),
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


def _inlined(drawn: list[figures.Drawn]) -> list[dict[str, Any]]:
    # The SVG is our own, and every text in it was escaped when it was written.
    return [{"svg": Markup(figure.svg), "title": figure.title, "caption": figure.caption} for figure in drawn]


def _progress(run: Run) -> str:
    word = STATES.get(run.state, run.state)
    step, total = run.fact("step"), run.fact("total_steps")
    if step is None or total is None:
        return word
    return f"{word} at step {whole(step)} of {whole(total)}"


def _why(run: Run) -> str:
    said = run.status.get("message")
    parts = [str(said).partition("\n")[0]] if said and run.state != "done" else []
    return "; ".join([_progress(run), *parts, *run.problems])


def _has_no_width(run: Run) -> bool:
    return any(score.unit == "share of items" and half_width(score) == 0 for score in run.after.values())


# Samples


def _samples(comparison: Comparison) -> list[dict[str, Any]]:
    """Gather the answers to each prompt: the base's, then each run's at its last step; new task first."""
    asked: dict[tuple[str, str, str, str], dict[str, Any]] = {}
    for run in comparison.runs:
        last = max((line["step"] for line in run.samples if line["model"] != "base"), default=None)
        for line in run.samples:
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


# Provenance


def _provenance(run: Run, name: str) -> dict[str, Any]:
    """Say where a run came from and how to repeat it; the name of the machine stays out of a page that is passed on."""
    facts = run.environment
    command, packages = facts.get("command"), facts.get("packages")
    memory = facts.get("memory_bytes")
    hardware = [
        str(facts[key]) + unit for key, unit in (("platform", ""), ("cores", " cores")) if facts.get(key) is not None
    ]
    if isinstance(memory, int | float):
        hardware.append(f"{size(memory)} memory")
    report = facts.get("data_report")
    folder = name if run.folder == "." else f"{name}/{run.folder}"
    return {
        "run": run,
        "label": method_label(run),
        "folder": folder,
        "again": shlex.join(["loralab", "train", f"{folder}/spec.yaml", "--runs", "runs-again"]) if run.spec else "",
        "command": _command(command) if isinstance(command, list) and command else "",
        "date": str(facts.get("date") or ""),
        "hardware": ", ".join(hardware),
        "versions": ", ".join(f"{k} {v}" for k, v in {"Python": facts.get("python"), **_plain(packages)}.items() if v),
        "commit": _commit(facts),
        "marks": {name: mark for name, mark in {"base weights": run.base_mark, **run.data_marks}.items() if mark},
        "rows": _rows(report) if isinstance(report, dict) else {},
    }


def _command(words: list[Any]) -> str:
    first = str(words[0]).replace("\\", "/").rpartition("/")[2]
    return shlex.join([first, *map(str, words[1:])])


def _plain(found: Any) -> dict[str, Any]:
    return found if isinstance(found, dict) else {}


def _commit(facts: dict[str, Any]) -> str:
    if not facts.get("git_commit"):
        return ""
    return f"{facts['git_commit']}{', with changes that were not committed' if facts.get('git_dirty') else ''}"


def _rows(report: dict[str, Any]) -> dict[str, str]:
    """Count what was read, per part of the data."""
    made = {}
    for part, found in report.items():
        total = _plain(_plain(found).get("total"))
        counts = [
            f"{whole(total[key])} {key}" for key in ("rows", "examples", "tokens") if isinstance(total.get(key), int)
        ]
        if counts:
            made[str(part)] = ", ".join(counts)
    return made
