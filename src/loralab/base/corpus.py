"""A tokenised corpus in flat arrays, and its division into training and held-out examples."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from loralab.base.reader import Overlong, Reader, Report, nothing_left, row_key
from loralab.base.sources import Source, read_rows
from loralab.base.text import Example
from loralab.errors import DataError


@dataclass(frozen=True, eq=False)
class Corpus:
    """Examples in flat arrays.

    Attributes:
        tokens: uint32 (total tokens,), example after example.
        labelled: bool (total tokens,).
        offsets: int64 (examples + 1,), where each example begins.
        source: int16 (examples,), index into `report.sources`.
        keys: uint64 (examples,), hash of the row that an example came from.
        max_length: most tokens of an example.
        report: what became of every row.
    """

    tokens: NDArray[np.uint32]
    labelled: NDArray[np.bool_]
    offsets: NDArray[np.int64]
    source: NDArray[np.int16]
    keys: NDArray[np.uint64]
    max_length: int
    report: Report

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, index: int) -> Example:
        if not 0 <= index < len(self):
            raise IndexError(index)
        place = slice(self.offsets[index], self.offsets[index + 1])
        return Example(self.tokens[place], self.labelled[place])

    @property
    def lengths(self) -> NDArray[np.int64]:
        """Tokens of each example."""
        return np.diff(self.offsets)

    @property
    def fingerprint(self) -> str:
        """SHA-256 of tokens, labels and boundaries: what training sees."""
        total = hashlib.sha256()
        for array in (self.tokens, self.labelled, self.offsets):
            total.update(np.ascontiguousarray(array).data)
        return total.hexdigest()

    @classmethod
    def of(cls, examples: Sequence[tuple[int, int, Example]], *, max_length: int, report: Report) -> "Corpus":
        """Join (source index, row hash, example) triples."""
        lengths = [len(example) for _, _, example in examples]
        return cls(
            tokens=np.concatenate([np.empty(0, np.uint32), *(e.tokens for _, _, e in examples)]),
            labelled=np.concatenate([np.empty(0, np.bool_), *(e.labelled for _, _, e in examples)]),
            offsets=np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)]).astype(np.int64),
            source=np.array([source for source, _, _ in examples], dtype=np.int16),
            keys=np.array([key for _, key, _ in examples], dtype=np.uint64),
            max_length=max_length,
            report=report,
        )

    def hold_out(self, share: int | float) -> tuple["Corpus", "Corpus"]:
        """Split into training and held-out examples by the hash of their rows.

        A row goes to the same side wherever it stands, in whichever order and source, and however often; both sides get
        at least one row. A corpus of one row (a text file) is divided by its pieces instead.

        Args:
            share: of the rows to be held out, from 0 to 1; 0 gives an empty second corpus.

        Raises:
            DataError: there is only one example, so none can be held out.
        """
        keys = self.keys
        if share > 0 and len(np.unique(keys)) < 2:
            keys = np.array(
                [row_key({"": e.tokens.tolist()}, [""]) for e in map(self.__getitem__, range(len(self)))],
                dtype=np.uint64,
            )
        known = np.unique(keys)
        if share > 0 and len(known) < 2:
            fix = "name a held-out file as data.validation, or set data.validation_share to 0"
            raise DataError("one example cannot be divided into training and validation", where="data.train", fix=fix)
        count = int(np.searchsorted(known, np.uint64(min(int(share * 2**64), 2**64 - 1))))
        count = min(max(count, 1), len(known) - 1) if share > 0 else 0
        held = np.isin(keys, known[:count])
        return self._select(~held, held), self._select(held, np.zeros_like(held))

    def _select(self, kept: NDArray[np.bool_], held: NDArray[np.bool_]) -> "Corpus":
        lengths = self.lengths
        marks = np.repeat(kept, lengths)
        labelled_before = np.concatenate([[0], np.cumsum(self.labelled)])
        num_labelled = labelled_before[self.offsets[1:]] - labelled_before[self.offsets[:-1]]
        reports = []
        for index, report in enumerate(self.report.sources):
            mine = kept & (self.source == index)
            reports.append(
                replace(
                    report,
                    examples=int(mine.sum()),
                    tokens=int(lengths[mine].sum()),
                    labelled=int(num_labelled[mine].sum()),
                    held_out=int((held & (self.source == index)).sum()),
                )
            )
        return Corpus(
            tokens=self.tokens[marks],
            labelled=self.labelled[marks],
            offsets=np.concatenate([[0], np.cumsum(lengths[kept])]).astype(np.int64),
            source=self.source[kept],
            keys=self.keys[kept],
            max_length=self.max_length,
            report=Report(tuple(reports)),
        )


def tokenise(
    sources: Sequence[Source],
    tokenizer: PreTrainedTokenizerBase,
    *,
    chat_template: str | None = None,
    max_length: int = 1024,
    overlong: Overlong = "auto",
) -> Corpus:
    """Read all rows of all sources into a corpus.

    Args:
        sources: what to read.
        tokenizer: a fast tokenizer.
        chat_template: `chatml`, `plain`, or a Jinja file; None takes the tokenizer's own.
        max_length: most tokens of an example.
        overlong: what to do with longer ones. `split` cuts them into pieces, `drop` leaves them out, `truncate` cuts
            their end off (and drops them if nothing labelled remains), `auto` splits text that is labelled throughout
            and drops the others.

    Raises:
        DataError: a source cannot be read, a row does not fit its form, or no example is left.
    """
    examples: list[tuple[int, int, Example]] = []
    reports = []
    for index, source in enumerate(sources):
        rows = read_rows(source)
        reader = Reader(
            source, rows.columns, tokenizer, chat_template=chat_template, max_length=max_length, overlong=overlong
        )
        for batch in rows.batches():
            examples += [(index, key, example) for key, example in reader.read(batch)]
        reports.append(reader.report)
        if not reader.report.examples:
            raise nothing_left(reader.report, max_length)
    return Corpus.of(examples, max_length=max_length, report=Report(tuple(reports)))
