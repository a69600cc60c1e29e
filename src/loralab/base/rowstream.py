"""Rows of one source, read as they are needed, with a cursor that can be saved as JSON."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets

from loralab.base.jsonrows import parse_rows
from loralab.base.sources import (
    Row,
    Source,
    columns_of,
    content_sha256,
    empty,
    file_options,
    has_mixed_types,
    hub_fingerprint,
    load_from_hub,
    local_files,
    pocket_rows,
    quiet,
    unreadable,
)
from loralab.errors import DataError
from loralab.pocket import world


class RowStream:
    """Rows of one source, one after another, without holding them.

    Raises:
        DataError: the source is missing, empty, unreadable or out of reach.
    """

    def __init__(self, source: Source) -> None:
        self.path = source.path
        files = local_files(source)
        if world.is_address(source.path):
            drawn = pocket_rows(source)
            self._use(_ListStream([row for batch in drawn.batches() for row in batch]))
            self.fingerprint = drawn.fingerprint
        elif files is None:
            self._use(load_from_hub(source, streaming=True))
            self.fingerprint = hub_fingerprint(source, self._table)
        else:
            self._open(files)
            self.fingerprint = content_sha256(files)
        first = self.take(1)
        if not first:
            raise empty(self.path)
        self.columns: list[str] = list(self._table.column_names or columns_of(first))
        self.restart()

    def _open(self, files: list[Path]) -> None:
        options = file_options(files, streaming=True)
        try:
            with quiet():
                self._use(datasets.load_dataset(split="train", streaming=True, **options))
                next(self._rows, None)
            if not has_mixed_types(self._table):
                return self.restart()
        except Exception as error:  # of many types, from the file or the library
            if options["path"] != "json":
                raise unreadable(self.path, error) from error
        self._use(_ListStream(parse_rows(files)))  # files that fit no table are read whole: they are small as a rule

    def _use(self, table: Any) -> None:
        self._table = table
        self._start = self._place = table.state_dict()
        self._rows: Iterator[Row] = iter(table)

    def take(self, count: int) -> list[Row]:
        """Take the next rows: fewer than `count` only at the end."""
        rows: list[Row] = []
        try:
            with quiet():
                while len(rows) < count:
                    rows.append(next(self._rows))
        except StopIteration:
            pass
        except OSError as error:
            fix = "run again: training goes on from its last checkpoint"
            raise DataError(f"reading broke off: {error}", where=self.path, fix=fix) from error
        except Exception as error:  # of many types, from the file or the library
            raise unreadable(self.path, error) from error
        if rows:
            self._place = self._table.state_dict()
        return rows

    def restart(self) -> None:
        """Go back to the first row."""
        self.load_state(self._start)

    def state(self) -> dict[str, Any]:
        """Give the cursor as plain values."""
        return self._place

    def load_state(self, state: dict[str, Any]) -> None:
        """Go to a cursor."""
        self._table.load_state_dict(state)
        self._rows = iter(self._table)
        self._place = state  # the library's own cursor moves when the first row is read


class _ListStream:
    """A list of rows with the cursor of a `datasets.IterableDataset`."""

    def __init__(self, rows: list[Row]) -> None:
        self._rows, self._next = rows, 0
        self.column_names = columns_of(rows)

    def __iter__(self) -> "_ListStream":
        return self

    def __next__(self) -> Row:
        if self._next >= len(self._rows):
            raise StopIteration
        self._next += 1
        return self._rows[self._next - 1]

    def state_dict(self) -> dict[str, Any]:
        return {"next": self._next}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._next = state["next"]
