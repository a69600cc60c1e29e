"""Judged rows into labelled tokens of at most `max_length` a text, and the account of what became of every row."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from loralab.base.chat import ChatTemplate, Document
from loralab.base.forms import Chat
from loralab.base.judged import Kind, Said, common, is_empty, judged_form
from loralab.base.labels import Classes, as_number, as_thumb
from loralab.base.reader import Overlong, SourceReport, row_key
from loralab.base.sources import Row, Source
from loralab.base.text import Example, encode, prompted, refuse_half_characters
from loralab.errors import DataError


@dataclass(frozen=True, eq=False, slots=True)
class Labelled:
    """Tokens of a judged text, or of a pair of them, and the judgement.

    Attributes:
        tokens: (length,); of a pair what both texts begin with, the rest of the chosen, the rest of the rejected.
        segments: tokens of the text, or of these three parts (the first may be 0, the others are not).
        label: number of the class, or number; 1 for a thumb up, 0 for one down; of a pair the margin, 0 where none is given.
        answers: tokens of each answer, its end-of-sequence token included; of a classified text all of them.
        second: where in a text the second of two sentences begins for a model that is told (token types); else the length.
        kind: what was judged.
    """

    tokens: NDArray[np.uint32]
    segments: tuple[int, ...]
    label: float
    answers: tuple[int, ...]
    second: int
    kind: Kind

    def __len__(self) -> int:
        return len(self.tokens)


class LabelledReader:
    """Turns judged rows of one source into labelled tokens, and counts.

    Args:
        source: where the rows come from.
        columns: of the rows.
        tokenizer: a fast tokenizer.
        kind: what was judged.
        classes: numbers the classes.
        chat_template: see `chat.ChatTemplate`.
        max_length: most tokens of a text.
        overlong: `auto` and `drop` leave longer ones out; `truncate` cuts the end of a classified text and the beginning of
            a prompt. An answer is never cut.

    Raises:
        DataError: the columns do not fit the kind, or a labelled text is to be split.
    """

    def __init__(
        self,
        source: Source,
        columns: list[str],
        tokenizer: PreTrainedTokenizerBase,
        *,
        kind: Kind,
        classes: Classes,
        chat_template: str | None,
        max_length: int,
        overlong: Overlong,
    ) -> None:
        if overlong == "split":
            fix = "set data.overlong to drop or truncate"
            raise DataError(
                "a judged text cannot be split: the judgement is of the whole", where="data.overlong", fix=fix
            )
        self.source, self.tokenizer, self.kind, self.classes = source, tokenizer, kind, classes
        self.max_length, self.overlong = max_length, overlong
        name, self._read = judged_form(kind, source, columns)
        self._chat_template_name = chat_template
        self._joins = joins_texts(tokenizer)
        self._typed = self._joins and "token_type_ids" in tokenizer.model_input_names
        self.report = SourceReport(source.path, name, source.weight)

    def read(self, rows: Sequence[Row]) -> list[tuple[int, Labelled]]:
        """Turn rows into (hash of what is asked, tokens), in order; a row gives one or none.

        Raises:
            DataError: a row does not fit the form, or its label the kind; the number of the row is named.
        """
        texts: list[Said] = []
        places: list[str] = []
        judged: list[tuple[float, int]] = []  # label, texts of the row
        for row in rows:
            self.report.rows += 1
            where = f"{self.source.path}, row {self.report.rows}"
            found = self._read(row, where)
            label = self._label(found.label, where)
            if len(found.texts) == 2 and found.texts[0] == found.texts[1]:
                self.report.equal += 1
            elif any(map(is_empty, found.texts)):
                self.report.empty += 1
            else:
                texts += found.texts
                places += [where] * len(found.texts)
                judged.append((label, len(found.texts)))
        examples = self._tokenise(texts, places)
        kept, start = [], 0
        for label, count in judged:
            said, sides = texts[start : start + count], examples[start : start + count]
            start += count
            fitting = self._fit(said, sides)
            if fitting and (labelled := self._join(said, fitting, label)) is not None:
                kept.append((self._key(said[0]), labelled))
        self.report.examples += len(kept)
        self.report.tokens += sum(len(labelled) for _, labelled in kept)
        self.report.labelled += sum(len(labelled.answers) for _, labelled in kept)
        return kept

    def _label(self, value: Any, where: str) -> float:
        if self.kind == "classify":
            return self.classes.number(value, where)
        if self.kind == "thumbs":
            return as_thumb(value, where)
        if self.kind == "pairs" and (value is None or value == ""):
            return 0.0
        return as_number(value, where)

    @cached_property
    def _chat_template(self) -> ChatTemplate:
        return ChatTemplate(self.tokenizer, self._chat_template_name)

    def _tokenise(self, texts: Sequence[Said], places: Sequence[str]) -> list[Example]:
        """Tokenise texts; what is labelled is what was judged, and the last token always ends the text."""
        examples: dict[int, Example] = {}
        documents: dict[int, Document] = {}
        for number, (said, where) in enumerate(zip(texts, places, strict=True)):
            if isinstance(said, Chat):
                (documents[number],) = self._chat_template.documents(said, where)
                refuse_half_characters(documents[number].text, where)
                continue
            before, text = said
            refuse_half_characters(before + text, where)
            if not self._joins:
                joint = "\n" if before and self.kind in ("classify", "regression") else ""
                documents[number] = prompted(before + joint, text)
        for number, example in zip(documents, encode(list(documents.values()), self.tokenizer), strict=True):
            examples[number] = self._ended(example) if documents[number].rendered else example
        rest = {n: said for n, said in enumerate(texts) if n not in documents and not isinstance(said, Chat)}
        for both in (False, True):
            chosen = {n: said for n, said in rest.items() if bool(said[0]) is both}
            examples.update(zip(chosen, _joined(list(chosen.values()), self.tokenizer), strict=True))
        return [examples[number] for number in range(len(texts))]

    def _ended(self, example: Example) -> Example:
        """Cut a chat behind its last turn, which a special token ends: the template's, or that of a sequence."""
        end = len(example) - int(np.argmax(example.labelled[::-1])) if example.num_labelled else 0
        tokens, labelled = example.tokens[:end], example.labelled[:end]
        stop = self.tokenizer.eos_token_id
        if end and stop is not None and int(tokens[-1]) not in self.tokenizer.all_special_ids:
            tokens, labelled = np.append(tokens, np.uint32(stop)), np.append(labelled, True)
        return Example(tokens, labelled)

    def _fit(self, said: Sequence[Said], sides: list[Example]) -> list[Example]:
        """Apply the rule for texts above `max_length`; nothing is left of a row that is left out."""
        if any(len(side) < 2 or not side.num_labelled for side in sides):
            self.report.empty += 1
            return []
        excess = max(map(len, sides)) - self.max_length
        if excess <= 0:
            return sides
        cut = self._cut(said, sides, excess) if self.overlong == "truncate" else []
        self.report.truncated += bool(cut)
        self.report.dropped += not cut
        return cut

    def _cut(self, said: Sequence[Said], sides: list[Example], excess: int) -> list[Example]:
        if self.kind in ("classify", "regression"):
            if self._joins and not isinstance(said[0], Chat):
                return list(_joined([said[0]], self.tokenizer, most=self.max_length))
            kept = [*range(self.max_length - 1), len(sides[0]) - 1]
            return [Example(sides[0].tokens[kept], sides[0].labelled[kept])]
        first = int(sides[0].tokens[0]) in self.tokenizer.all_special_ids  # such a beginning stays
        if any(first + excess >= int(np.argmax(side.labelled)) for side in sides):
            return []
        gone = slice(int(first), int(first) + excess)
        return [Example(np.delete(side.tokens, gone), np.delete(side.labelled, gone)) for side in sides]

    def _join(self, said: Sequence[Said], sides: list[Example], label: float) -> Labelled | None:
        """Join the sides of a pair where they cease to be alike; None if they never do."""
        tokens = sides[0].tokens
        segments: tuple[int, ...] = (len(tokens),)
        answers: tuple[int, ...] = tuple(side.num_labelled for side in sides)
        if self.kind == "pairs":
            other = sides[1].tokens
            if np.array_equal(tokens, other):
                self.report.equal += 1
                return None
            shared = min(common(tokens.tolist(), other.tolist()), len(tokens) - 1, len(other) - 1)
            segments = (shared, len(tokens) - shared, len(other) - shared)
            tokens = np.concatenate([tokens, other[shared:]])
        elif self.kind != "thumbs":
            answers = segments
        two = self._typed and not isinstance(said[0], Chat) and said[0][0]
        second = int(np.argmax(sides[0].labelled)) if two else len(tokens)
        return Labelled(tokens, segments, label, answers, second, self.kind)

    def _key(self, said: Said) -> int:
        """Hash what an answer replies to, so that all answers to it stay together; where it is empty, and of a text, all."""
        whole: Any = said.messages if isinstance(said, Chat) else list(said)
        asked = whole[:-1] if self.kind in ("pairs", "thumbs") and any(whole[:-1]) else whole
        return row_key({"asked": asked}, ["asked"])


def joins_texts(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Tell whether the tokenizer ends a text with a separator of its own, as an encoder's does, and so can join two."""
    found = tokenizer("a", return_special_tokens_mask=True)
    tokens, special = found["input_ids"], found["special_tokens_mask"]
    return any(special[-1:]) and tokens[-1] in (tokenizer.sep_token_id, tokenizer.cls_token_id)


def _joined(
    texts: Sequence[tuple[str, str]], tokenizer: PreTrainedTokenizerBase, most: int | None = None
) -> list[Example]:
    """Tokenise texts, all of them or none with one before, as the tokenizer joins and ends them."""
    if not texts:
        return []
    both = bool(texts[0][0])
    found = tokenizer(
        [before if both else text for before, text in texts],
        [text for _, text in texts] if both else None,
        split_special_tokens=True,
        truncation=most is not None,
        max_length=most,
        verbose=False,
    )
    parts = [found.sequence_ids(number) for number in range(len(texts))]
    return [
        Example(tokens, [part == int(both) for part in own])
        for tokens, own in zip(found["input_ids"], parts, strict=True)
    ]
