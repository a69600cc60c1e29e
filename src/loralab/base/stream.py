"""A feed for corpora larger than memory: rows are read window by window, with a cursor that can be resumed."""

from collections.abc import Collection, Sequence
from math import floor
from typing import Any

import datasets
import numpy as np
from transformers import PreTrainedTokenizerBase

from loralab.base.data import Batch, check_identity, micro_batches, pack_and_shuffle
from loralab.base.jsonrows import parse_rows
from loralab.base.reader import Overlong, Reader, Report, nothing_left
from loralab.base.sources import (
    Row,
    Source,
    columns_of,
    content_sha256,
    empty,
    file_options,
    hub_fingerprint,
    load_from_hub,
    local_files,
    quiet,
    unreadable,
)
from loralab.base.text import Example


class RowStream:
    """Rows of one source, one after another, without holding them.

    Raises:
        DataError: the source is missing, empty, unreadable or out of reach.
    """

    def __init__(self, source: Source) -> None:
        self.path = source.path
        files = local_files(source)
        if files is None:
            self._table: Any = load_from_hub(source, streaming=True)
            self.fingerprint = hub_fingerprint(source, self._table)
        else:
            self.fingerprint = content_sha256(files)
            self._table = self._open(files)
        self._start = self._table.state_dict()
        self._rows = iter(self._table)
        self.columns = self._peek()

    def _open(self, files: list[Any]) -> Any:
        with quiet():
            try:
                table = datasets.load_dataset(split="train", streaming=True, **file_options(files, streaming=True))
                next(iter(table))
            except Exception as error:
                if file_options(files, streaming=True)["path"] != "json":
                    raise unreadable(self.path, error) from error
                # The library cannot put these in a table: they are read as they are, and are small as a rule.
                return _ListStream(parse_rows(files))
        return table

    def _peek(self) -> list[str]:
        first = self.take(1)
        if not first:
            raise empty(self.path)
        self.restart()
        return list(self._table.column_names or columns_of(first))

    def take(self, count: int) -> list[Row]:
        """Take the next rows: fewer than `count` only at the end."""
        rows: list[Row] = []
        try:
            with quiet():
                while len(rows) < count:
                    rows.append(next(self._rows))
        except StopIteration:
            pass
        except Exception as error:  # of many types, from the file, the network or the library
            raise unreadable(self.path, error) from error
        return rows

    def restart(self) -> None:
        """Go back to the first row."""
        self.load_state(self._start)

    def state(self) -> dict[str, Any]:
        """Give the cursor as plain values."""
        return self._table.state_dict()

    def load_state(self, state: dict[str, Any]) -> None:
        """Go to a cursor."""
        self._table.load_state_dict(state)
        self._rows = iter(self._table)


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


class StreamingFeed:
    """Optimizer steps of `batch_size` sequences from sources that are read as they are needed.

    A window takes `window` rows, from each source in proportion to its weight, tokenises them, shuffles them by the
    seed and packs them. A source that ends begins again. The cursor holds where the window began and how many of its
    sequences were taken: resuming reads one window again, not the whole past.

    Args:
        sources: what to read.
        tokenizer: a fast tokenizer.
        batch_size: sequences of one optimizer step.
        micro_batch: sequences computed at a time; None is all.
        chat_template: see `corpus.tokenise`; so are `max_length` and `overlong`.
        packing: fill sequences with whole examples.
        seed: of the order within a window.
        window: rows read at a time; also the reach of the shuffling.
        excluded: hashes of rows to leave out (`Corpus.keys` of the validation rows).

    Raises:
        DataError: a source cannot be read, or gives no example.
    """

    def __init__(
        self,
        sources: Sequence[Source],
        tokenizer: PreTrainedTokenizerBase,
        *,
        batch_size: int,
        micro_batch: int | None = None,
        chat_template: str | None = None,
        max_length: int = 1024,
        overlong: Overlong = "auto",
        packing: bool = True,
        seed: int = 0,
        window: int = 4096,
        excluded: Collection[int] = (),
    ) -> None:
        self.batch_size, self.micro_batch, self.packing, self.seed = batch_size, micro_batch, packing, seed
        self.max_length, self.window = max_length, window
        self._excluded = frozenset(int(key) for key in excluded)
        self._streams = [RowStream(source) for source in sources]
        self._readers = [
            Reader(
                source, stream.columns, tokenizer, chat_template=chat_template, max_length=max_length, overlong=overlong
            )
            for source, stream in zip(sources, self._streams, strict=True)
        ]
        weights = np.array([source.weight for source in sources], dtype=np.float64)
        self._shares = (weights / weights.sum()).tolist()
        self._next_window, self._position = 0, 0
        self._began: dict[str, Any] = {}
        self._sequences: list[list[Example]] = []

    @property
    def report(self) -> Report:
        """What became of the rows read so far by this process."""
        return Report(tuple(reader.report for reader in self._readers))

    def next_step(self) -> list[Batch]:
        """Take the micro-batches of the next optimizer step."""
        step: list[list[Example]] = []
        while len(step) < self.batch_size:
            if self._position >= len(self._sequences):
                self._read_window()
            taken = self._sequences[self._position : self._position + self.batch_size - len(step)]
            step += taken
            self._position += len(taken)
        return micro_batches(step, self.micro_batch)

    def _read_window(self) -> None:
        self._began = self._place()
        number = self._next_window
        examples = [
            example
            for index in range(len(self._streams))
            for example in self._read_source(index, self._quota(index, number))
        ]
        rng = np.random.default_rng([self.seed, number])
        examples = [examples[i] for i in rng.permutation(len(examples))]
        if self.packing:
            lengths = np.array([len(example) for example in examples], dtype=np.int64)
            bins = pack_and_shuffle(lengths, self.max_length, rng)
            self._sequences = [[examples[i] for i in members] for members in bins]
        else:
            self._sequences = [[example] for example in examples]
        self._next_window, self._position = number + 1, 0

    def _quota(self, index: int, number: int) -> int:
        """Rows of a source in window `number`: over all windows exactly its share."""
        share = self._shares[index] * self.window
        return floor((number + 1) * share) - floor(number * share)

    def _read_source(self, index: int, count: int) -> list[Example]:
        stream, reader = self._streams[index], self._readers[index]
        examples: list[Example] = []
        while count > 0:
            rows = stream.take(count)
            count -= len(rows)
            examples += [example for key, example in reader.read(rows) if key not in self._excluded]
            if count > 0:
                if not reader.report.examples:
                    raise nothing_left(reader.report, self.max_length)
                stream.restart()
        return examples

    def _place(self) -> dict[str, Any]:
        return {"window": self._next_window, "streams": [stream.state() for stream in self._streams]}

    def state(self) -> dict[str, Any]:
        """Give the cursor as plain values."""
        open_window = self._position < len(self._sequences)
        place = self._began if open_window else self._place()
        return {**place, "position": self._position if open_window else 0, **self._identity()}

    def load_state(self, state: dict[str, Any]) -> None:
        """Continue from a cursor: the next steps are those that an uninterrupted feed would give.

        Raises:
            DataError: the cursor belongs to other data or another order.
        """
        check_identity(self._identity(), state)
        for stream, place in zip(self._streams, state["streams"], strict=True):
            stream.load_state(place)
        self._next_window, self._sequences = state["window"], []
        if state["position"]:
            self._read_window()
        self._position = state["position"]

    def _identity(self) -> dict[str, Any]:
        corpus = [stream.fingerprint for stream in self._streams]
        return {"seed": self.seed, "packing": self.packing, "window size": self.window, "corpus": corpus}
