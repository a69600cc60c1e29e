"""Addresses of tasks into items with graders: suites of the pocket world, and files of rows."""

import hashlib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from loralab.base.sources import BUILDERS, Row, Source, local_files, read_rows
from loralab.base.text import refuse_half_characters
from loralab.errors import DataError
from loralab.evals.tasks import Task
from loralab.pocket import world
from loralab.pocket.grading import grade
from loralab.pocket.items import Item
from loralab.spec.spec import TaskSpec

CLOZE = {"cipher"}
"""Skills of the pocket world that ask for the next word of a text that goes on."""
ROW_FILES = BUILDERS.keys() - {".txt"}


def is_file_of_items(path: str) -> bool:
    """Tell whether a task is named by a file of rows."""
    return Path(path).suffix in ROW_FILES


def has_items(task: TaskSpec) -> bool:
    """Tell whether a task is an address or file of items, and no name of a suite or of the catalogue."""
    path = task.path
    named = "/" not in path and "\\" not in path and not is_file_of_items(path) and not Path(path).is_file()
    return world.is_address(path) or not named


def look_for(task: TaskSpec) -> None:
    """Look whether items can be read.

    Raises:
        DataError: a file is missing, a name unknown (with the nearest one), or it is to be asked as only the catalogue can.
    """
    for key in ("data", "include", "fewshot"):
        if getattr(task, key) not in (None, {}, []):
            fix = "leave it out: such items are asked as they stand"
            raise DataError(f"`{key}` is for suites and tasks of lm-eval's catalogue", where=task.path, fix=fix)
    if world.is_address(task.path):
        world.suite(task.path, 1)
    else:
        local_files(Source(task.path))


def read_tasks(tasks: Sequence[TaskSpec]) -> list[Task]:
    """Read the items of tasks. An item that comes again, in another task of the list too, counts once.

    Raises:
        DataError: a task cannot be read, or one of its rows is no item.
    """
    seen: set[Item] = set()
    found = []
    for part in (part for task in tasks for part in _read(task)):
        items = [item for item in dict.fromkeys(part.items) if item not in seen]
        seen.update(items)
        if items:
            found.append(replace(part, items=items))
    return found


def _read(task: TaskSpec) -> list[Task]:
    if not world.is_address(task.path):
        return [Task(_first(_read_rows(task.path), task.items))]
    items = world.suite(task.path, task.items)
    # Of the source skills only one text is a right answer, so that nothing has to be written to grade them.
    known = [item for item in items if item.skill in world.GRADED]
    clozes = [item for item in items if item.skill in CLOZE]
    written = [item for item in items if item.skill not in {*world.GRADED, *CLOZE}]
    return [task for task in (Task(known), Task(clozes, ends=False), Task(written, grade)) if task.items]


def _first(items: list[Item], most: int | None) -> list[Item]:
    """Take the first items of each skill."""
    kept: dict[str, list[Item]] = {}
    for item in items:
        kept.setdefault(item.skill, []).append(item)
    return [item for mine in kept.values() for item in mine[:most]]


def _read_rows(path: str) -> list[Item]:
    rows = [row for batch in read_rows(Source(path)).batches() for row in batch]
    return [_item(row, f"{path}, row {number}", Path(path).stem) for number, row in enumerate(rows, 1)]


def _item(row: Row, where: str, skill: str) -> Item:
    """Make an item of a row: `prompt`, `completion`, and perhaps `choices`, `right` (from 0) and `skill`."""
    prompt, completion, choices = _text(row, "prompt", where), row.get("completion"), row.get("choices") or []
    if not isinstance(choices, list) or not all(isinstance(choice, str) for choice in choices) or len(choices) == 1:
        raise DataError("`choices` is no list of two or more texts", where=where, fix='write ["one", "another"]')
    if len(set(choices)) < len(choices):
        raise DataError(
            "a choice stands twice, so none of the two can be the likeliest", where=where, fix="keep one of them"
        )
    right: Any = row.get("right")
    if right is None and completion in choices:
        right = choices.index(completion)
    if choices and not (type(right) is int and 0 <= right < len(choices)):
        fix = f"write its number as `right`, from 0 to {len(choices) - 1}"
        raise DataError("the row does not say which of its choices is right", where=where, fix=fix)
    if completion is None and choices:
        completion = choices[right]
    if completion in choices and completion != choices[right]:
        fix = f"`right` of this `completion` is {choices.index(completion)}, counted from 0"
        raise DataError("`completion` is another choice than the `right` one", where=where, fix=fix)
    return Item(
        skill=str(row.get("skill") or skill).replace("/", "-"),  # slashes divide the names of scores
        prompt=prompt,
        completion=_text({"completion": completion}, "completion", where),
        choices=tuple(choices),
        right=right or 0,
    )


def _text(row: Row, column: str, where: str) -> str:
    value: Any = row.get(column)
    if not isinstance(value, str) or not value:
        found = "missing" if value is None else "empty" if value == "" else "no text"
        fix = 'write {"prompt": "2+3=", "completion": "5"}'
        raise DataError(f"the row's `{column}` is {found}", where=where, fix=fix)
    refuse_half_characters(value, where)
    return value


def fingerprint(tasks: Sequence[Task]) -> str:
    """Hash the content of all items (SHA-256)."""
    total = hashlib.sha256()
    for task in tasks:
        for item in task.items:
            total.update(repr(item).encode("utf-8", "surrogatepass"))
    return total.hexdigest()
