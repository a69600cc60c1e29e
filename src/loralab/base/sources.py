"""Rows of text data from files, folders and the hub, read through the Hugging Face `datasets` library.

Files are memory-mapped: text may be larger than memory as long as its tokens fit; `rowstream.RowStream` reads rows as they
are needed. JSON that fits no table (broken rows, columns whose type changes) is parsed with the standard library
instead, so that a row is what the file says and an error names its line.
"""

import hashlib
import json
import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets

from loralab.base.jsonrows import not_utf8, parse_rows
from loralab.errors import DataError, did_you_mean
from loralab.pocket import world

Row = dict[str, Any]

BUILDERS = {".json": "json", ".jsonl": "json", ".parquet": "parquet", ".csv": "csv", ".tsv": "csv", ".txt": "text"}
ENDINGS = ", ".join(ending.removeprefix(".") for ending in BUILDERS)
HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?(:[\w.-]+)?")
BATCH_ROWS = 1000


@dataclass(frozen=True)
class Template:
    """Prompt and completion with column names in braces, as in `Question: {question}`."""

    prompt: str
    completion: str


@dataclass(frozen=True)
class Source:
    """One source of rows.

    Attributes:
        path: a file, a folder of files with one kind of ending, a hub id `owner/name`, `owner/name:subset`, or `pocket:NAME`.
        weight: how often each example is seen per epoch on average.
        form: how a row becomes text, see `forms.FORMS`.
        template: prompt and completion in words of the columns; takes the place of `form`.
        split: split of a hub data set; None is `train`.
    """

    path: str
    weight: float = 1.0
    form: str = "auto"
    template: Template | None = None
    split: str | None = None


class Rows:
    """Rows of one source, in the order of its files; absent columns are None or missing."""

    def __init__(self, table: "datasets.Dataset | list[Row]", *, path: str, fingerprint: str) -> None:
        self.table, self.path, self.fingerprint = table, path, fingerprint

    def __len__(self) -> int:
        return len(self.table)

    @property
    def columns(self) -> list[str]:
        """Names of all columns."""
        return columns_of(self.table) if isinstance(self.table, list) else list(self.table.column_names)

    def batches(self, size: int = BATCH_ROWS) -> Iterator[list[Row]]:
        """Yield the rows as lists of at most `size`.

        Raises:
            DataError: a text is not UTF-8.
        """
        for start in range(0, len(self), size):
            try:
                part = self.table[start : start + size]
            except UnicodeDecodeError as error:
                raise not_utf8(self.path, error) from error
            yield part if isinstance(part, list) else as_rows(part)


def columns_of(rows: list[Row]) -> list[str]:
    """Name every column that occurs in the rows, in order of appearance."""
    return list(dict.fromkeys(name for row in rows for name in row))


def as_rows(columns: dict[str, list[Any]]) -> list[Row]:
    """Turn a dict of columns into a list of rows."""
    return [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]


def read_rows(source: Source) -> Rows:
    """Read all rows of a source.

    Raises:
        DataError: the source is missing, empty, unreadable or out of reach.
    """
    if world.is_address(source.path):
        return pocket_rows(source)
    files = local_files(source)
    if files is None:
        table: Any = load_from_hub(source, streaming=False)
        rows = Rows(table, path=source.path, fingerprint=hub_fingerprint(source, table))
    else:
        rows = Rows(_read_files(files), path=source.path, fingerprint=content_sha256(files))
    if not len(rows):
        raise empty(source.path)
    return rows


def pocket_rows(source: Source) -> Rows:
    """Draw the rows of an address of the pocket world. Raises DataError for an address that there is not."""
    table = world.rows(source.path)
    return Rows(table, path=source.path, fingerprint=hashlib.sha256(json.dumps(table).encode()).hexdigest())


def empty(path: str) -> DataError:
    """Say that a source has no rows."""
    return DataError(
        "the source has no rows", where=path, fix="check how the file was written, or take it out of the list"
    )


def local_files(source: Source) -> list[Path] | None:
    """List the data files behind a path in sorted order; None stands for a hub id or a checked address `pocket:NAME`.

    Raises:
        DataError: nothing is there, or a folder holds no or more than one kind of data file.
    """
    if world.is_address(source.path):
        if source.split is not None:
            fix = f"write the split into the address: pocket:NAME/{source.split}"
            raise DataError(f"split `{source.split}` was asked of the pocket world", where=source.path, fix=fix)
        world.parse(source.path)
        return None
    path = Path(source.path).expanduser()
    if not path.exists():
        if path.suffix in BUILDERS or not HUB_ID.fullmatch(source.path):
            raise _missing(path)
        return None
    if source.split is not None:
        raise DataError(
            f"split `{source.split}` was asked of a local file", where=source.path, fix="name the file itself"
        )
    files = sorted(p for p in path.rglob("*") if p.suffix in BUILDERS and p.is_file()) if path.is_dir() else [path]
    files = [p for p in files if not any(part.startswith(".") for part in p.relative_to(path).parts)]
    if not files:
        raise DataError("the folder has no data files", where=str(path), fix=f"known endings: {ENDINGS}")
    kinds = {file.suffix for file in files} - ({".json"} if any(f.suffix == ".jsonl" for f in files) else set())
    if unknown := kinds - set(BUILDERS):
        raise DataError(f"unknown file ending `{unknown.pop()}`", where=str(path), fix=f"known endings: {ENDINGS}")
    if len(kinds) > 1:
        raise DataError(
            f"the folder mixes {', '.join(sorted(kinds))} files", where=str(path), fix="name one source per kind"
        )
    files = [file for file in files if file.stat().st_size]
    if not files:
        raise empty(source.path)
    return files


def _missing(path: Path) -> DataError:
    parent = next(folder for folder in path.parents if folder.is_dir())
    if parent != path.parent:
        return DataError("the folder does not exist", where=str(path.parent), fix=f"the last that does is {parent}")
    near = did_you_mean(path.name, [entry.name for entry in parent.iterdir()])
    fix = f"did you mean `{parent / near}`?" if near else f"list what is in `{parent}`"
    return DataError("the file does not exist", where=str(path), fix=fix)


def content_sha256(files: list[Path]) -> str:
    """Hash the content of files, in order; names and dates do not count."""
    total = hashlib.sha256()
    for file in files:
        with file.open("rb") as stream:
            total.update(hashlib.file_digest(stream, "sha256").digest())
    return total.hexdigest()


def file_options(files: list[Path], *, streaming: bool) -> dict[str, Any]:
    """Choose the `datasets` builder and its options for files of one kind.

    A text file is one document; when streaming, a paragraph is one, as a document need not fit in memory.
    """
    options: dict[str, Any] = {"path": BUILDERS[files[0].suffix], "data_files": [str(file) for file in files]}
    if options["path"] == "text":
        options["sample_by"] = "paragraph" if streaming else "document"
    if options["path"] == "csv":
        options |= {"sep": "\t" if files[0].suffix == ".tsv" else ",", "keep_default_na": False}  # "NA" is a text
    return options


def _read_files(files: list[Path]) -> "datasets.Dataset | list[Row]":
    try:
        with quiet():
            table = datasets.load_dataset(split="train", **file_options(files, streaming=False))
    except Exception as error:  # the library wraps what it meets in many types, StopIteration among them
        if BUILDERS[files[0].suffix] == "json":
            return parse_rows(files)
        if "corresponds to no data" in str(error):
            return []
        raise unreadable(str(files[0]), error) from error
    return parse_rows(files) if has_mixed_types(table) else table


def has_mixed_types(table: Any) -> bool:
    """Tell whether `datasets` keeps a column as JSON: it then takes strings that look like JSON for values."""
    return "Json(" in str(table.features)


def unreadable(path: str, error: BaseException) -> DataError:
    """Say that files could not be read, with the deepest reason known."""
    while error.__cause__ is not None:
        error = error.__cause__
    reason = str(error).strip() or type(error).__name__
    return DataError(f"the rows cannot be read: {reason}", where=path, fix="write the file again, as jsonl or parquet")


def load_from_hub(source: Source, *, streaming: bool) -> Any:
    """Load one split of a hub data set.

    Raises:
        DataError: the hub is out of reach, or has no such data set, subset or split.
    """
    name, _, subset = source.path.partition(":")
    try:
        with quiet():
            return datasets.load_dataset(name, subset or None, split=source.split or "train", streaming=streaming)
    except datasets.exceptions.DatasetNotFoundError as error:
        fix = "check the path; for a private data set log in with `hf auth login`"
        raise DataError("neither a local file nor a data set on the hub", where=source.path, fix=fix) from error
    except OSError as error:
        fix = "check the path if it is a local one; else run again when online: a download resumes where it stopped"
        raise DataError(f"the hub cannot be reached: {error}", where=source.path, fix=fix) from error
    except ValueError as error:
        fix = "name a subset as `owner/name:subset` and a split as `split: NAME`"
        raise DataError(f"the data set cannot be loaded: {error}", where=source.path, fix=fix) from error


def hub_fingerprint(source: Source, table: Any) -> str:
    """Hash what a hub data set was made of: its files, whose names carry the commit; without them, its name."""
    files = sorted(table.info.download_checksums or ())
    return hashlib.sha256("\n".join([source.path, source.split or "train", *files]).encode()).hexdigest()


@contextmanager
def quiet() -> Iterator[None]:
    """Silence progress bars and log lines of `datasets` and `huggingface_hub`, and restore them at the end."""
    loggers = [logging.getLogger(name) for name in ("datasets", "huggingface_hub")]
    levels, bars = [logger.level for logger in loggers], datasets.are_progress_bars_disabled()
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
        if not bars:
            datasets.enable_progress_bars()
