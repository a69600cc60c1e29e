"""Rows of one source into examples of at most `max_length` tokens, and the account of what became of every row."""

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from functools import cached_property
from typing import Any, Literal

from transformers import PreTrainedTokenizerBase

from loralab.base.chat import ChatTemplate, Document
from loralab.base.forms import Chat, find_form, template_form
from loralab.base.sources import Row, Source
from loralab.base.text import Example, encode, prompted, refuse_half_characters
from loralab.errors import DataError

Overlong = Literal["auto", "split", "drop", "truncate"]


@dataclass
class SourceReport:
    """What became of the rows of one source; all are counts.

    Attributes:
        rows: rows read.
        empty: rows without anything to learn (no text, no completion, no labelled turn), left out.
        dropped: examples above `max_length`, left out.
        truncated: examples cut at `max_length`.
        split: examples cut into pieces.
        examples: examples kept, pieces counted singly.
        tokens: their tokens.
        labelled: their tokens with a loss.
        held_out: examples kept back for validation, not among `examples`.
        equal: pairs whose sides are the same, left out.
    """

    path: str
    form: str
    weight: float = 1.0
    rows: int = 0
    empty: int = 0
    dropped: int = 0
    truncated: int = 0
    split: int = 0
    examples: int = 0
    tokens: int = 0
    labelled: int = 0
    held_out: int = 0
    equal: int = 0


@dataclass(frozen=True)
class Report:
    """The counts of every source."""

    sources: tuple[SourceReport, ...]

    @property
    def total(self) -> SourceReport:
        """Sums over all sources."""
        counts = [f.name for f in fields(SourceReport) if f.name not in ("path", "form", "weight")]
        return SourceReport("total", "", **{name: sum(getattr(s, name) for s in self.sources) for name in counts})

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {"sources": [asdict(source) for source in self.sources], "total": asdict(self.total)}


class Reader:
    """Turns rows of one source into examples of at most `max_length` tokens, and counts.

    Raises:
        DataError: no form fits the columns, a template names an absent one, or a chat has no template.
    """

    def __init__(
        self,
        source: Source,
        columns: list[str],
        tokenizer: PreTrainedTokenizerBase,
        *,
        chat_template: str | None,
        max_length: int,
        overlong: Overlong,
    ) -> None:
        self.source, self.tokenizer = source, tokenizer
        self.max_length, self.overlong = max_length, overlong
        if source.template is None:
            name, self.form = find_form(source.form, columns, source.path)
        else:
            name, self.form = "template", template_form(source.template, columns, source.path)
        self._chat_template_name = chat_template
        self.report = SourceReport(source.path, name, source.weight)

    def read(self, rows: Sequence[Row]) -> list[tuple[int, Example]]:
        """Turn rows into (hash of the row, example), in order; a row may give none or several.

        Raises:
            DataError: a row does not fit the form; the number of the row is named.
        """
        written = self.write(rows)
        examples = encode([document for _, document in written], self.tokenizer)
        kept = [(key, part) for (key, d), e in zip(written, examples, strict=True) for part in self._fit(e, d)]
        self.report.examples += len(kept)
        self.report.tokens += sum(len(example) for _, example in kept)
        self.report.labelled += sum(example.num_labelled for _, example in kept)
        return kept

    def write(self, rows: Sequence[Row]) -> list[tuple[int, Document]]:
        """Turn rows into (hash of the row, text), in order, and count them; a row may give none or several.

        Raises:
            DataError: a row does not fit the form; the number of the row is named.
        """
        found = []
        for row in rows:
            self.report.rows += 1
            where = f"{self.source.path}, row {self.report.rows}"
            written = self._write(row, where)
            for document in written:
                refuse_half_characters(document.text, where)
            self.report.empty += not written
            found += [(row_key(row, self.form.columns), document) for document in written]
        return found

    @cached_property
    def _chat_template(self) -> ChatTemplate:
        return ChatTemplate(self.tokenizer, self._chat_template_name)

    def _write(self, row: Row, where: str) -> list[Document]:
        """Write a row as text; no document if there is nothing to learn in it."""
        content = self.form.read(row, where)
        if isinstance(content, Chat):
            return self._chat_template.documents(content, where)
        return [prompted(content.prompt, content.completion)] if content.completion.strip() else []

    def _fit(self, example: Example, document: Document) -> list[Example]:
        """Apply the rule for examples above `max_length`."""
        if not example.num_labelled:
            self.report.empty += 1
            return []
        if len(example) <= self.max_length:
            return [example]
        rule = self.overlong
        if rule == "auto":
            rule = "split" if document.is_text else "drop"
        if rule == "split":
            self.report.split += 1
            return split(example, self.max_length)
        cut = Example(example.tokens[: self.max_length], example.labelled[: self.max_length])
        if rule == "drop" or not cut.num_labelled:
            self.report.dropped += 1
            return []
        self.report.truncated += 1
        return [cut]


def split(example: Example, max_length: int) -> list[Example]:
    """Cut an example into pieces of at most `max_length`; pieces without a labelled token are left out.

    Each piece begins with the last token of the one before, so that every labelled token is predicted exactly once.
    """
    starts = range(0, len(example) - 1, max_length - 1)
    cut = [
        Example(example.tokens[start : start + max_length], example.labelled[start : start + max_length])
        for start in starts
    ]
    return [piece for piece in cut if piece.num_labelled]


def row_key(row: Row, columns: Iterable[str]) -> int:
    """Hash the columns that are read from a row to 64 bits; absent and empty ones do not count."""
    read = {name: row[name] for name in columns if row.get(name) is not None}
    canonical = json.dumps(read, sort_keys=True, ensure_ascii=False, default=str)
    return int.from_bytes(hashlib.blake2b(canonical.encode("utf-8", "surrogatepass"), digest_size=8).digest())


def nothing_left(report: SourceReport, max_length: int) -> DataError:
    """Say that a source gave no example, and why."""
    return DataError(
        f"no example is left of {report.rows} rows: {report.empty} have nothing to learn, "
        f"{report.dropped} exceed {max_length} tokens",
        where=f"{report.path} (form {report.form})",
        fix="raise data.max_length, set data.overlong, or correct the form",
    )
