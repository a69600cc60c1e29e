"""What people wrote as a judgement, as a number: thumbs, classes, numbers."""

from collections.abc import Sequence
from math import isfinite
from typing import Any

import numpy as np
from numpy.typing import NDArray

from loralab.errors import DataError, did_you_mean

THUMBS = {
    **dict.fromkeys(("true", "1", "1.0", "up", "good"), 1.0),
    **dict.fromkeys(("false", "0", "0.0", "down", "bad"), 0.0),
}


def as_thumb(value: Any, where: str) -> float:
    """Read a thumb: 1 up, 0 down. Raises DataError for anything else."""
    word = str(value).strip().lower()
    if word not in THUMBS:
        fix = "write true or false, 1 or 0, up or down, good or bad; for other classes set objective.name=classify"
        raise DataError(f"{_shown(value)} is no thumb", where=where, fix=fix)
    return THUMBS[word]


def as_number(value: Any, where: str) -> float:
    """Read a finite number. Raises DataError for anything else."""
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = float("nan")
    if not isfinite(number) or isinstance(value, bool):
        raise DataError(f"{_shown(value)} is no number", where=where, fix="write a finite number, or remove such rows")
    return number


def as_class(value: Any, where: str) -> str:
    """Read the name of a class; whole numbers have one name however they are written. Raises DataError if there is none."""
    if value is None or isinstance(value, list | dict) or not str(value).strip() or value != value:
        fix = "write the name of its class, or remove such rows"
        raise DataError(f"{_shown(value)} is no class", where=where, fix=fix)
    if isinstance(value, bool):
        return str(value).lower()
    return str(int(value) if isinstance(value, float) and value.is_integer() else value).strip()


def _shown(value: Any) -> str:
    text = "an empty label" if value is None or value == "" else repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


class Classes:
    """Numbers for the names of classes: those that were given, or those that are found.

    Args:
        given: names in order; None takes what is found.
    """

    def __init__(self, given: Sequence[str] | None) -> None:
        self.given = given
        self._found: dict[str, int] = {}

    def number(self, value: Any, where: str) -> float:
        """Number a label as it stands in a row: for good if the names were given, else in order of appearance.

        Raises:
            DataError: it is empty, or not among those given.
        """
        name = as_class(value, where)
        if self.given is not None:
            return float(class_index(name, self.given, where))
        return float(self._found.setdefault(name, len(self._found)))

    def settle(self, labels: NDArray[np.float64]) -> tuple[tuple[str, ...], NDArray[np.float64]]:
        """Give the names in order, and the labels as their numbers."""
        if self.given is not None:
            return tuple(self.given), labels
        names = class_order(list(self._found))
        places = np.array([names.index(name) for name in self._found], dtype=np.float64)
        return names, places[labels.astype(np.int64)]


def class_order(names: Sequence[str]) -> tuple[str, ...]:
    """Order the classes found: numbers by size, words by alphabet."""
    found = set(names)
    return tuple(sorted(found, key=int) if all(_is_whole(name) for name in found) else sorted(found))


def _is_whole(name: str) -> bool:
    return name.removeprefix("-").isdecimal()


def class_index(name: str, classes: Sequence[str], where: str) -> int:
    """Look a class up by name, or by number where all classes are words, as in GLUE.

    Raises:
        DataError: there is no such class; the nearest is named.
    """
    if name in classes:
        return list(classes).index(name)
    if name.isdecimal() and int(name) < len(classes) and not any(map(_is_whole, classes)):
        return int(name)
    near = did_you_mean(name, list(classes))
    fix = f"did you mean `{near}`?" if near else f"classes: {', '.join(classes)}"
    raise DataError(f"`{name}` is not among the classes", where=where, fix=fix)
