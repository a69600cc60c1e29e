"""A feed for corpora larger than memory: rows are read window by window, with a cursor that can be resumed."""

from collections.abc import Collection, Sequence
from math import floor
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from loralab.base.corpus import Corpus
from loralab.base.data import Batch, check_identity, micro_batches, pack_and_shuffle
from loralab.base.reader import Overlong, Reader, Report, nothing_left
from loralab.base.rowstream import RowStream
from loralab.base.sources import Source
from loralab.base.text import Example


def tokenise_head(
    sources: Sequence[Source],
    tokenizer: PreTrainedTokenizerBase,
    *,
    rows: int,
    chat_template: str | None = None,
    max_length: int = 1024,
    overlong: Overlong = "auto",
) -> Corpus:
    """Read the first rows of each source into a corpus: `hold_out` of it gives a stream its validation rows.

    Args:
        sources: what to read.
        tokenizer: a fast tokenizer.
        rows: most rows of each source.
        chat_template: see `corpus.tokenise`; so are `max_length` and `overlong`.

    Raises:
        DataError: a source cannot be read, a row does not fit its form, or no example is left.
    """
    examples: list[tuple[int, int, Example]] = []
    reports = []
    for index, source in enumerate(sources):
        stream = RowStream(source)
        reader = Reader(
            source, stream.columns, tokenizer, chat_template=chat_template, max_length=max_length, overlong=overlong
        )
        examples += [(index, key, example) for key, example in reader.read(stream.take(rows))]
        reports.append(reader.report)
        if not reader.report.examples:
            raise nothing_left(reader.report, max_length)
    return Corpus.of(examples, max_length=max_length, report=Report(tuple(reports)))


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
        self._barren = [0] * len(self._streams)
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
            found = [example for key, example in reader.read(rows) if key not in self._excluded]
            examples += found
            self._barren[index] *= not found
            if count > 0:
                self._barren[index] += 1
                if self._barren[index] == 2:  # the end was met twice with nothing between
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
        settings = {"seed": self.seed, "packing": self.packing, "max_length": self.max_length, "rows": self.window}
        return {**settings, "shares": self._shares, "corpus": corpus}
