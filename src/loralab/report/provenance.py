"""Where numbers come from: command, machine, versions, hashes; the name of the machine stays out of a page that is passed on."""

import shlex
from typing import Any

from loralab.console.screen import size
from loralab.report.compare import method_label
from loralab.report.read import Run
from loralab.report.wording import whole


def of_run(run: Run, name: str) -> dict[str, Any]:
    """Say where a run came from and how to repeat it; `name` is what the person calls the report's folder."""
    report = run.environment.get("data_report")
    folder = name if run.folder == "." else f"{name}/{run.folder}"
    return {
        "run": run,
        "label": method_label(run),
        "folder": folder,
        "again": shlex.join(["loralab", "train", f"{folder}/spec.yaml", "--runs", "runs-again"]) if run.spec else "",
        **of_environment(run.environment),
        "marks": {name: mark for name, mark in {"base weights": run.base_mark, **run.data_marks}.items() if mark},
        "rows": _rows(report) if isinstance(report, dict) else {},
    }


def of_environment(facts: dict[str, Any]) -> dict[str, str]:
    """Write what `run.folder.environment` noted: command, date, hardware, versions, commit; "" for what is not known."""
    command, packages, memory = facts.get("command"), facts.get("packages"), facts.get("memory_bytes")
    hardware = [
        str(facts[key]) + unit for key, unit in (("platform", ""), ("cores", " cores")) if facts.get(key) is not None
    ]
    if isinstance(memory, int | float):
        hardware.append(f"{size(memory)} memory")
    return {
        "command": _command(command) if isinstance(command, list) and command else "",
        "date": str(facts.get("date") or ""),
        "hardware": ", ".join(hardware),
        "versions": ", ".join(f"{k} {v}" for k, v in {"Python": facts.get("python"), **plain(packages)}.items() if v),
        "commit": _commit(facts),
    }


def _command(words: list[Any]) -> str:
    first = str(words[0]).replace("\\", "/").rpartition("/")[2]
    return shlex.join([first, *map(str, words[1:])])


def plain(found: Any) -> dict[str, Any]:
    """Give a mapping as it is, anything else as an empty one."""
    return found if isinstance(found, dict) else {}


def _commit(facts: dict[str, Any]) -> str:
    if not facts.get("git_commit"):
        return ""
    return f"{facts['git_commit']}{', with changes that were not committed' if facts.get('git_dirty') else ''}"


def _rows(report: dict[str, Any]) -> dict[str, str]:
    """Count what was read, per part of the data."""
    made = {}
    for part, found in report.items():
        total = plain(plain(found).get("total"))
        counts = [
            f"{whole(total[key])} {key}" for key in ("rows", "examples", "tokens") if isinstance(total.get(key), int)
        ]
        if total.get("in_training"):
            counts.append(f"{whole(total['in_training'])} of them trained on too")
        if counts:
            made[str(part)] = ", ".join(counts)
    return made
