"""Files that survive a crash: written whole, or appended a line at a time.

A file is replaced in one step (temporary file, fsync, rename), so it holds the old content or the new one. In a file of
JSON lines a line counts once its newline is written, so only the last one can be torn.
"""

import errno
import json
import os
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from loralab.errors import FolderError, Interrupted

RESTORE = "restore the file from a copy, or move the run folder away and begin anew"


@contextmanager
def explain_failed_writes(path: Path) -> Iterator[None]:
    """Turn a failed write into Interrupted if the disk is full, else into FolderError, both naming `path`."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            fix = "free space and run the same command: it resumes"
            raise Interrupted("the disk is full", where=str(path), fix=fix) from error
        fix = "check the folder's permissions, or choose another one"
        raise FolderError(f"cannot write: {error.strerror or error}", where=str(path), fix=fix) from error


def _sync_folder(folder: Path) -> None:
    if os.name == "nt":  # Windows opens no folders
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_atomic(path: str | Path, content: bytes | str) -> None:
    """Write a file whole: after a crash it holds either the old content or the new one, on the disk itself.

    Raises:
        Interrupted: the disk is full; the old content stays.
        FolderError: the folder cannot be written.
    """
    path = Path(path)
    data = content.encode() if isinstance(content, str) else content
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.tmp")
    with explain_failed_writes(path):
        try:
            with temporary.open("xb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        _sync_folder(path.parent)


def write_json(path: str | Path, value: Any) -> None:
    """Write a value as indented JSON, whole. Raises as `write_atomic`."""
    write_atomic(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def read_json(path: str | Path) -> dict[str, Any]:
    """Read a JSON object, {} if there is no such file. Raises FolderError if it is damaged."""
    try:
        value = json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise FolderError(f"the file is damaged: {error}", where=str(path), fix=RESTORE) from error
    if not isinstance(value, dict):
        raise FolderError(f"expected a JSON object, found {type(value).__name__}", where=str(path), fix=RESTORE)
    return value


def append_line(path: str | Path, value: dict[str, Any]) -> None:
    """Append one JSON line and hand it to the operating system; a line that does not fit leaves no trace.

    Raises:
        Interrupted: the disk is full.
        FolderError: the file cannot be written.
    """
    path = Path(path)
    line = (json.dumps(value, ensure_ascii=False) + "\n").encode()
    with explain_failed_writes(path), path.open("ab", buffering=0) as file:
        start = file.tell()
        try:
            written = file.write(line)
            while written < len(line):  # a short write is how a disk begins to be full
                written += file.write(line[written:])
        except OSError:
            with suppress(OSError):
                file.truncate(start)
            raise


def _parse(line: bytes, path: Path, number: int) -> dict[str, Any]:
    try:
        value = json.loads(line)
    except ValueError as error:
        raise FolderError(f"the line is damaged: {error}", where=f"{path}:{number}", fix=RESTORE) from error
    if not isinstance(value, dict):
        raise FolderError(
            f"expected a JSON object, found {type(value).__name__}", where=f"{path}:{number}", fix=RESTORE
        )
    return value


def _whole_lines(path: Path) -> tuple[list[bytes], list[dict[str, Any]]]:
    """Lines and their values, without a torn last one. Raises FolderError if an earlier line is damaged."""
    try:
        lines = path.read_bytes().splitlines(keepends=True)
    except FileNotFoundError:
        return [], []
    except OSError as error:
        raise FolderError(f"cannot read: {error.strerror or error}", where=str(path)) from error
    if lines and not lines[-1].endswith(b"\n"):
        lines.pop()
    values = [_parse(line, path, number) for number, line in enumerate(lines[:-1], start=1)]
    if lines:
        try:
            values.append(_parse(lines[-1], path, len(lines)))
        except FolderError:  # a power cut can leave zeros or half a page before the newline
            lines.pop()
    return lines, values


def read_lines(path: str | Path) -> list[dict[str, Any]]:
    """Read a file of JSON lines; a torn last line is dropped, a missing file is empty.

    Raises:
        FolderError: a line before the last is damaged.
    """
    return _whole_lines(Path(path))[1]


def repair(path: str | Path) -> None:
    """Cut off a torn last line, so that the next one can be appended. Raises FolderError as `read_lines`."""
    path = Path(path)
    length = sum(map(len, _whole_lines(path)[0]))
    if path.exists() and path.stat().st_size > length:
        with explain_failed_writes(path):
            os.truncate(path, length)


def keep_lines(path: str | Path, predicate: Callable[[dict[str, Any]], bool]) -> None:
    """Rewrite a file of JSON lines whole with the lines for which `predicate` holds, byte for byte.

    On resume it drops what was measured after the checkpoint. Raises as `read_lines` and `write_atomic`.
    """
    path = Path(path)
    lines, values = _whole_lines(path)
    kept = b"".join(line for line, value in zip(lines, values, strict=True) if predicate(value))
    if path.exists() and path.stat().st_size > len(kept):
        write_atomic(path, kept)
