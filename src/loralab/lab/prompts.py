"""Prompts that a policy answers: rows of files, chats and addresses into tokens, with the row at hand for whoever grades.

What the model reads before its answer is what it would have read in instruction tuning on the same row: where a row knows an
answer, both are tokenised together and the prompt is cut where the answer begins.
"""

import hashlib
import itertools
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from loralab.base.chat import ChatTemplate, Document
from loralab.base.data import Feed
from loralab.base.forms import FORMS, Chat, Prompted, as_text, find_form, template_form
from loralab.base.judged import judged_form
from loralab.base.reader import Report, SourceReport
from loralab.base.sources import Row, Source, read_rows
from loralab.base.text import encode, refuse_half_characters
from loralab.errors import DataError
from loralab.evals.code import STOPS
from loralab.evals.generate import Prompt
from loralab.pocket import world
from loralab.pocket.items import Item

GROUP = 1000
"""Rows tokenised at a time."""
EXPECTED = ("completion", "answer")
"""Columns of the right answer beside a `prompt` that is not part of a form."""


@dataclass(frozen=True)
class Asked:
    """A prompt, and what is known about it.

    Attributes:
        prompt: as a `Writer` takes it; its limit is the most tokens of an answer.
        row: its row; of an item of the pocket world, the item's fields.
        known: the right answer as the row tells it; None where it tells none.
        item: of the pocket world.
        where: where it stands.
    """

    prompt: Prompt
    row: Row
    known: str | None
    item: Item | None
    where: str

    @property
    def text(self) -> str:
        """The prompt as the model reads it."""
        return self.prompt.text or ""


@dataclass(frozen=True, eq=False)
class Prompts:
    """Prompts of all sources: what `base.data.Feed` asks of a corpus.

    Attributes:
        asked: one for each row kept.
        source: int16 (prompts,), index into `report.sources`.
        max_length: most tokens of a prompt and its answer.
        report: what became of every row.
    """

    asked: tuple[Asked, ...]
    source: NDArray[np.int16]
    max_length: int
    report: Report

    def __len__(self) -> int:
        return len(self.asked)

    def __getitem__(self, index: int) -> Asked:
        return self.asked[index]

    @property
    def lengths(self) -> NDArray[np.int64]:
        """Tokens of each prompt."""
        return np.array([len(one.prompt.tokens) for one in self.asked], dtype=np.int64)

    @property
    def fingerprint(self) -> str:
        """SHA-256 of prompts and rows: what the policy reads, and what its answers are graded by."""
        total = hashlib.sha256()
        for one in self.asked:
            line = json.dumps([one.prompt.tokens, one.row], sort_keys=True, default=str)
            total.update(line.encode("utf-8", "surrogatepass"))
        return total.hexdigest()

    def hold_out(self, share: float) -> tuple["Prompts", "Prompts"]:
        """Split into prompts to train on and held-out ones, at least one of each, by the hash of their text.

        Raises:
            DataError: there is only one.
        """
        digests = [hashlib.blake2b(one.text.encode("utf-8", "surrogatepass"), digest_size=8) for one in self.asked]
        keys = [int.from_bytes(digest.digest()) for digest in digests]
        known = sorted(set(keys))
        if len(known) < 2:
            fix = "name held-out prompts as data.validation, or set data.validation_share to 0"
            raise DataError("one prompt cannot be divided into training and validation", where="data.train", fix=fix)
        count = sum(key < share * 2**64 for key in known)
        held = set(known[: min(max(count, 1), len(known) - 1)])
        return self._select([key not in held for key in keys]), self._select([key in held for key in keys])

    def different(self) -> list[Asked]:
        """Give each prompt once, in order."""
        return list({one.text: one for one in reversed(self.asked)}.values())[::-1]

    def _select(self, kept: Sequence[bool]) -> "Prompts":
        mask = np.array(kept)
        reports = []
        for index, report in enumerate(self.report.sources):
            mine = self.source == index
            tokens = int(self.lengths[mine & mask].sum())
            held_out = int((mine & ~mask).sum())
            reports.append(replace(report, examples=int((mine & mask).sum()), tokens=tokens, held_out=held_out))
        asked = tuple(itertools.compress(self.asked, kept))
        return Prompts(asked, self.source[mask], self.max_length, Report(tuple(reports)))


class Batches:
    """Batches of prompts by number: a pure function of prompts, seed and number, however one comes to it.

    Args:
        prompts: at least one.
        batch_size: prompts of a batch.
        seed: of the order, which is another in each epoch.
    """

    def __init__(self, prompts: Prompts, *, batch_size: int, seed: int) -> None:
        self.prompts, self.batch_size, self.seed = prompts, batch_size, seed
        self._begin()

    def _begin(self) -> None:
        self.feed = Feed(self.prompts, batch_size=self.batch_size, packing=False, seed=self.seed, collate=list)
        self._next = 0

    def batch(self, number: int) -> list[Asked]:
        """Give a batch by its number, from 0."""
        if number < self._next:
            self._begin()
        while True:
            (found,) = self.feed.next_step()
            self._next += 1
            if self._next > number:
                return list(found)


def read_prompts(
    sources: Sequence[Source],
    tokenizer: PreTrainedTokenizerBase,
    *,
    chat_template: str | None,
    max_length: int,
    max_tokens: int,
) -> Prompts:
    """Read the prompts of all sources; those that leave no room for an answer are dropped and counted.

    Args:
        sources: files, hub ids and addresses of the pocket world.
        tokenizer: a fast tokenizer.
        chat_template: `chatml`, `plain`, or a Jinja file; None takes the tokenizer's own.
        max_length: most tokens of a prompt and its answer together.
        max_tokens: most tokens of an answer.

    Raises:
        DataError: a source cannot be read, a row has no prompt, or none is left.
    """
    kept: list[Asked] = []
    owners: list[int] = []
    reports = []
    for index, source in enumerate(sources):
        reader = _Reader(source, tokenizer, chat_template, max_length, max_tokens)
        for group in _groups(reader.documents()):
            kept += reader.fitting(group)
        report = reader.report
        report.examples = len(kept) - len(owners)
        report.tokens = sum(len(one.prompt.tokens) for one in kept[len(owners) :])
        owners += [index] * report.examples
        reports.append(report)
        if not report.examples:
            raise DataError(
                f"no prompt is left of {report.rows} rows: {report.empty} are empty, {report.dropped} have no room for"
                f" {max_tokens} tokens of an answer in {max_length}",
                where=source.path,
                fix="raise data.max_length, or lower objective.max_tokens",
            )
    return Prompts(tuple(kept), np.array(owners, dtype=np.int16), max_length, Report(tuple(reports)))


_Found = tuple[Document, str | None, Row, Item | None, str]
"""A document whose one span is the answer, that answer, and where both come from."""


def _groups(found: Iterable[_Found]) -> Iterator[list[_Found]]:
    rest = iter(found)
    while group := list(itertools.islice(rest, GROUP)):
        yield group


class _Reader:
    """Rows of one source into prompts."""

    def __init__(
        self,
        source: Source,
        tokenizer: PreTrainedTokenizerBase,
        chat_template: str | None,
        max_length: int,
        max_tokens: int,
    ) -> None:
        self.source, self.tokenizer, self.max_length, self.max_tokens = source, tokenizer, max_length, max_tokens
        self.report = SourceReport(source.path, "prompts", source.weight)
        self._chat_template_name = chat_template
        self._chat_template: ChatTemplate | None = None

    def documents(self) -> Iterator[_Found]:
        """Write every row as the text that the model would have learned from."""
        if world.is_address(self.source.path) and world.parse(self.source.path).name != world.PREFERENCES:
            address = world.parse(self.source.path)
            for item in itertools.islice(world.draws(address), address.items or world.TRAIN_ITEMS):
                self.report.rows += 1
                document = _joined(item.prompt, item.completion)
                yield document, item.completion, asdict(item), item, f"{self.source.path}, item {self.report.rows}"
            return
        rows = read_rows(self.source)
        read = self._form(rows.columns)
        for batch in rows.batches():
            for row in batch:
                self.report.rows += 1
                where = f"{self.source.path}, row {self.report.rows}"
                document, known = self._written(row, read, where)
                refuse_half_characters(document.text, where)
                yield document, known, row, None, where

    def _form(self, columns: list[str]) -> Callable[[Row, str], Prompted | Chat]:
        """Choose how rows are read: as in training on text, as pairs of answers, or as a `prompt` alone."""
        there, path = set(columns), self.source.path
        if {"chosen", "rejected"} <= there:
            _, judged = judged_form("pairs", self.source, columns)

            def chosen(row: Row, where: str) -> Prompted | Chat:
                said = judged(row, where).texts[0]
                return said if isinstance(said, Chat) else Prompted(*said)

            return chosen
        if self.source.template is not None:
            return template_form(self.source.template, columns, path).read
        chats = any(set(FORMS[name].needs) <= there for name in ("messages", "sharegpt"))
        if self.source.form == "auto" and "prompt" in there and "completion" not in there and not chats:
            return _prompt_alone
        name, form = find_form(self.source.form, columns, path)
        if name == "text":
            fix = "name the column `prompt`, or give data.template"
            raise DataError("a text without a prompt asks for nothing", where=path, fix=fix)
        return form.read

    def _written(
        self, row: Row, read: Callable[[Row, str], Prompted | Chat], where: str
    ) -> tuple[Document, str | None]:
        content = read(row, where)
        if isinstance(content, Chat):
            document, known = self._rendered(content, where)
        else:
            document, known = _joined(content.prompt, content.completion), content.completion or None
        if {"chosen", "rejected"} <= row.keys():
            known = None  # liked better than another, and not the right one
        return document, known or next((str(row[name]) for name in EXPECTED if row.get(name) is not None), None)

    def _rendered(self, chat: Chat, where: str) -> tuple[Document, str | None]:
        """Render a chat up to its last answer; one that ends with a question is given an answer, to see where it begins."""
        self._chat_template = self._chat_template or ChatTemplate(self.tokenizer, self._chat_template_name)
        messages, known = list(chat.messages), None
        if messages and messages[-1]["role"] == "assistant":
            known = str(messages[-1]["content"])
        else:
            messages.append({"role": "assistant", "content": "."})
        only_last = [0.0] * (len(messages) - 1) + [1.0]
        (document,) = self._chat_template.documents(Chat(messages, chat.tools, only_last), where)
        return document, known

    def fitting(self, group: Sequence[_Found]) -> Iterator[Asked]:
        """Tokenise, and give the prompts that are no longer than may be."""
        for (document, known, row, item, where), example in zip(
            group, encode([document for document, *_ in group], self.tokenizer), strict=True
        ):
            begin = int(np.argmax(example.labelled)) if example.num_labelled else len(example)
            text = document.text[: document.spans[-1][0]]
            if not text.strip() or begin < 1:
                self.report.empty += 1
            elif begin + self.max_tokens > self.max_length:
                self.report.dropped += 1
            else:
                stops = STOPS if "entry_point" in row else ()
                prompt = Prompt([int(t) for t in example.tokens[:begin]], text, self.max_tokens, stops)
                yield Asked(prompt, row, known, item, where)


def _prompt_alone(row: Row, where: str) -> Prompted | Chat:
    if isinstance(row.get("prompt"), list):
        return FORMS["messages"].read({"messages": row["prompt"], "tools": row.get("tools")}, where)
    return Prompted(as_text(row.get("prompt"), where), "")


def _joined(prompt: str, completion: str) -> Document:
    return Document(prompt + completion, ((len(prompt), len(prompt) + len(completion)),))
