"""Parse json and jsonl files with the standard library, where a table does not fit or an error must name its line."""

import json
from pathlib import Path
from typing import Any

from loralab.errors import DataError


def parse_rows(files: list[Path]) -> list[dict[str, Any]]:
    """Parse files that hold a list of objects or strings, or one object a line.

    Raises:
        DataError: something is not JSON, or a row is neither an object nor a string.
    """
    rows: list[dict[str, Any]] = []
    for file in files:
        text = _read_text(file)
        rows += _parse_list(text, file) if text.lstrip().startswith("[") else _parse_lines(text, file)
    return rows


def _read_text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise not_utf8(str(file), error) from error


def not_utf8(path: str, error: UnicodeDecodeError) -> DataError:
    """Say that a file is in another encoding."""
    return DataError(f"the text is not UTF-8: {error.reason}", where=path, fix="save the file as UTF-8")


def _parse_list(text: str, file: Path) -> list[dict[str, Any]]:
    try:
        values = json.loads(text)
    except json.JSONDecodeError as error:
        raise _not_json(error, f"{file}:{error.lineno}") from error
    return [_as_row(value, f"{file}: row {number}") for number, value in enumerate(values, 1)]


def _parse_lines(text: str, file: Path) -> list[dict[str, Any]]:
    try:
        return [_as_row(json.loads(text), f"{file}:1")]  # one object over many lines
    except json.JSONDecodeError:
        pass
    rows = []
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            try:
                rows.append(_as_row(json.loads(line), f"{file}:{number}"))
            except json.JSONDecodeError as error:
                raise _not_json(error, f"{file}:{number}") from error
    return rows


def _not_json(error: json.JSONDecodeError, where: str) -> DataError:
    return DataError(f"a row is not JSON: {error.msg} (column {error.colno})", where=where, fix="correct or remove it")


def _as_row(value: Any, where: str) -> dict[str, Any]:
    if isinstance(value, str):
        return {"text": value}
    if isinstance(value, dict):
        return value
    kind = {list: "list", type(None): "null"}.get(type(value), "number")
    raise DataError(f"a row is a {kind}, not an object", where=where, fix='write rows as {"column": value, ...}')
