"""A corpus of judged texts in flat arrays, and batches of it: texts side by side, a pair behind one prompt."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import torch
from jaxtyping import Float, Int
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from loralab.base.corpus import Corpus
from loralab.base.data import Batch
from loralab.base.judged import Kind, find_kind
from loralab.base.labelling import Labelled, LabelledReader
from loralab.base.labels import Classes
from loralab.base.reader import Overlong, Report, SourceReport
from loralab.base.sources import Source, read_rows
from loralab.base.trees import forest
from loralab.errors import DataError

__all__ = ["Labelled", "LabelledBatch", "LabelledCorpus", "collate_labelled", "read_labelled"]


@dataclass(frozen=True, eq=False)
class LabelledCorpus:
    """Judged texts in flat arrays; see `Labelled` for what each part means.

    Attributes:
        tokens: uint32 (total tokens,), example after example.
        offsets: int64 (examples + 1,), where each example begins.
        segments: int64 (examples, 1), of pairs (examples, 3).
        labels: float64 (examples,).
        answers: int64 (examples, 1), of pairs (examples, 2).
        seconds: int64 (examples,).
        source: int16 (examples,), index into `report.sources`.
        keys: uint64 (examples,), hash of the prompt of an answer, or of a classified text.
        max_length: most tokens of an example; of a pair twice as many as of a text.
        report: what became of every row.
        kind: what was judged.
        classes: names of the classes, in order; () where there are none.
    """

    tokens: NDArray[np.uint32]
    offsets: NDArray[np.int64]
    segments: NDArray[np.int64]
    labels: NDArray[np.float64]
    answers: NDArray[np.int64]
    seconds: NDArray[np.int64]
    source: NDArray[np.int16]
    keys: NDArray[np.uint64]
    max_length: int
    report: Report
    kind: Kind
    classes: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, index: int) -> Labelled:
        if not 0 <= index < len(self):
            raise IndexError(index)
        return Labelled(
            tokens=self.tokens[self.offsets[index] : self.offsets[index + 1]],
            segments=tuple(self.segments[index].tolist()),
            label=float(self.labels[index]),
            answers=tuple(self.answers[index].tolist()),
            second=int(self.seconds[index]),
            kind=self.kind,
        )

    @property
    def lengths(self) -> NDArray[np.int64]:
        """Tokens of each example."""
        return np.diff(self.offsets)

    @property
    def fingerprint(self) -> str:
        """SHA-256 of tokens, boundaries and labels: what training sees."""
        total = hashlib.sha256("\n".join((self.kind, *self.classes)).encode())
        for array in (self.tokens, self.offsets, self.segments, self.labels, self.answers, self.seconds):
            total.update(np.ascontiguousarray(array).data)
        return total.hexdigest()

    def hold_out(self, share: int | float) -> tuple["LabelledCorpus", "LabelledCorpus"]:
        """Split into training and held-out examples; answers to one prompt, and equal texts, stay together.

        Args:
            share: of the prompts (or texts) to be held out, as for `Corpus.hold_out`, which does it.

        Raises:
            DataError: there is only one example, so none can be held out.
        """
        numbers = Corpus(  # one token for each example: its number
            tokens=np.arange(len(self), dtype=np.uint32),
            labelled=np.ones(len(self), dtype=np.bool_),
            offsets=np.arange(len(self) + 1, dtype=np.int64),
            source=self.source,
            keys=self.keys,
            max_length=1,
            report=self.report,
        )
        train, held = numbers.hold_out(share)
        return self._select(train), self._select(held)

    def _select(self, numbers: Corpus) -> "LabelledCorpus":
        kept, lengths = numbers.tokens, self.lengths
        marks = np.zeros(len(self), dtype=np.bool_)
        marks[kept] = True
        reports = []
        for index, report in enumerate(numbers.report.sources):
            tokens = int(lengths[kept][numbers.source == index].sum())
            reports.append(replace(report, tokens=tokens, labelled=report.labelled * self.answers.shape[1]))
        return replace(
            self,
            tokens=self.tokens[np.repeat(marks, lengths)],
            offsets=np.concatenate([[0], np.cumsum(lengths[kept])]).astype(np.int64),
            report=Report(tuple(reports)),
            **{name: getattr(self, name)[kept] for name in ("segments", "labels", "answers", "seconds")},
            source=self.source[kept],
            keys=self.keys[kept],
        )


def read_labelled(
    sources: Sequence[Source],
    tokenizer: PreTrainedTokenizerBase,
    *,
    kind: Literal["auto", "classify", "regression", "pairs", "thumbs"] = "auto",
    max_length: int = 1024,
    overlong: Overlong = "auto",
    chat_template: str | None = None,
    classes: Sequence[str] | None = None,
    need_both: bool = True,
) -> LabelledCorpus:
    """Read all rows of all sources into a corpus of judged texts.

    Args:
        sources: what to read; all of one kind.
        tokenizer: a fast tokenizer.
        kind: what was judged; `auto` takes what the columns of the first source say.
        max_length: most tokens of a text.
        overlong: what to do with longer ones, see `LabelledReader`.
        chat_template: see `chat.ChatTemplate`.
        classes: names of the classes in order; None takes those that are found, sorted.
        need_both: refuse classes or thumbs that are all the same: nothing can be learned from them, nor measured on them.

    Raises:
        DataError: a source cannot be read, a row does not fit, no example is left, or all labels are the same.
    """
    numbered = Classes(classes)
    found: list[tuple[int, int, Labelled]] = []
    reports: list[SourceReport] = []
    sort: Kind | None = None if kind == "auto" else kind
    for index, source in enumerate(sources):
        rows = read_rows(source)
        sort = sort or find_kind(source, rows.columns)
        reader = LabelledReader(
            source,
            rows.columns,
            tokenizer,
            kind=sort,
            classes=numbered,
            chat_template=chat_template,
            max_length=max_length,
            overlong=overlong,
        )
        for batch in rows.batches():
            found += [(index, key, labelled) for key, labelled in reader.read(batch)]
        reports.append(reader.report)
        if not reader.report.examples:
            raise _nothing_left(reader.report, max_length)
    assert sort is not None  # there is a source
    labels = np.array([labelled.label for _, _, labelled in found], dtype=np.float64)
    names: tuple[str, ...] = ()
    if sort == "classify":
        names, labels = numbered.settle(labels)
    if need_both and sort in ("classify", "thumbs") and len(np.unique(labels)) < 2:
        raise _all_the_same(sort, labels, names, sources[0].path)
    return LabelledCorpus(
        tokens=np.concatenate([labelled.tokens for _, _, labelled in found]),
        offsets=np.concatenate([[0], np.cumsum([len(labelled) for _, _, labelled in found])]).astype(np.int64),
        segments=np.array([labelled.segments for _, _, labelled in found], dtype=np.int64),
        labels=labels,
        answers=np.array([labelled.answers for _, _, labelled in found], dtype=np.int64),
        seconds=np.array([labelled.second for _, _, labelled in found], dtype=np.int64),
        source=np.array([index for index, _, _ in found], dtype=np.int16),
        keys=np.array([key for _, key, _ in found], dtype=np.uint64),
        max_length=2 * max_length if sort == "pairs" else max_length,
        report=Report(tuple(reports)),
        kind=sort,
        classes=names,
    )


def _nothing_left(report: SourceReport, max_length: int) -> DataError:
    equal = f"{report.equal} have equal sides, " if report.equal else ""
    return DataError(
        f"no example is left of {report.rows} rows: {equal}{report.empty} have nothing that was judged, "
        f"{report.dropped} exceed {max_length} tokens",
        where=f"{report.path} (form {report.form})",
        fix="raise data.max_length, set data.overlong=truncate, or correct the columns",
    )


def _all_the_same(kind: Kind, labels: NDArray[np.float64], names: tuple[str, ...], where: str) -> DataError:
    if kind == "thumbs":
        what = f"all {len(labels)} thumbs are {'up' if labels[0] else 'down'}"
    else:
        what = f"all {len(labels)} texts are of class `{names[int(labels[0])]}`"
    return DataError(what, where=where, fix="add rows that were judged otherwise: one judgement teaches nothing")


@dataclass(frozen=True, eq=False)
class LabelledBatch:
    """Judged texts in one row, and where they are read.

    Attributes:
        row: documents, or of pairs with a shared prompt segments (`row.parents`); no targets.
        reads: where the last token of each text stands; of pairs chosen, rejected, chosen, rejected …
        firsts: where the first token of each text stands; both sides of a pair may share it.
        labels: of each example, see `Labelled`.
        types: 1 for the tokens of a second sentence, else 0; None where no text has one that the model is told of.
        answers: tokens of each answer.
        kind: what was judged.
    """

    row: Batch
    reads: Int[Tensor, " reads"]
    firsts: Int[Tensor, " reads"]
    labels: Float[Tensor, " examples"]
    types: Int[Tensor, "1 length"] | None
    answers: Int[Tensor, " reads"]
    kind: Kind

    @property
    def tokens(self) -> Int[Tensor, "1 length"]:
        """All tokens of the row."""
        return self.row.tokens

    @property
    def num_tokens(self) -> int:
        """Number of tokens read, prompts included."""
        return self.row.num_tokens

    @property
    def weight(self) -> int:
        """Number of examples: pairs, or texts."""
        return len(self.labels)

    def documents(self) -> list[Int[Tensor, " _"]]:
        """Give the tokens of each text, for models that do not take them side by side."""
        return self._texts(self.row.tokens[0])

    def document_types(self) -> list[Int[Tensor, " _"]] | None:
        """Give the token types of each text; None where there are none."""
        return None if self.types is None else self._texts(self.types[0])

    def _texts(self, values: Int[Tensor, " length"]) -> list[Int[Tensor, " _"]]:
        """Give what belongs to each text, the part that it shares with others included."""
        parts = values.split(self.row.lengths)
        parents = self.row.parents or (-1,) * len(parts)
        leaves = [number for number in range(len(parts)) if number not in parents]
        return [parts[leaf] if parents[leaf] < 0 else torch.cat([parts[parents[leaf]], parts[leaf]]) for leaf in leaves]

    def to(self, device: torch.device | str) -> "LabelledBatch":
        """Copy the tensors to a device."""
        moved = {name: getattr(self, name).to(device) for name in ("row", "reads", "firsts", "labels", "answers")}
        return replace(self, **moved, types=None if self.types is None else self.types.to(device))


def collate_labelled(examples: Sequence[Labelled], *, share: bool = True) -> LabelledBatch:
    """Lay judged texts side by side.

    Args:
        examples: of one kind, at least one.
        share: compute what the sides of a pair begin with once for both. Only right for models that look back alone.

    Raises:
        ValueError: there is no example.
    """
    groups: list[tuple[NDArray[np.uint32], list[NDArray[np.uint32]]]] = []
    seconds: list[int] = []  # of each segment
    for example in examples:
        shared, *rest = np.split(example.tokens, np.cumsum(example.segments)[:-1])
        if rest and len(shared) and share:
            groups.append((shared, rest))
            seconds += [example.second] * 3
            continue
        for text in [np.concatenate([shared, part]) for part in rest] or [shared]:
            groups.append((text[:1], [text[1:]]))
            seconds.append(example.second)
    laid = forest(groups)
    positions = laid.row.positions
    types = None
    if any(example.second < len(example) for example in examples):
        types = (positions >= torch.tensor(seconds).repeat_interleave(torch.tensor(laid.row.lengths))).long()
    begins = torch.nonzero(positions[0] == 0)[:, 0]
    return LabelledBatch(
        row=laid.row,
        reads=laid.ends,
        firsts=begins.repeat_interleave(torch.tensor([len(tails) for _, tails in groups])),
        labels=torch.tensor([example.label for example in examples], dtype=torch.float32),
        types=types,
        answers=torch.tensor([tokens for example in examples for tokens in example.answers]),
        kind=examples[0].kind,
    )
