"""Text into tokens with a loss mask, and the proof that the mask is right.

Prompt and completion are tokenised together, as the model will read them; character offsets then tell which tokens are
learned. A token that straddles the boundary counts as completion.
"""

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from loralab.base.chat import Document
from loralab.errors import DataError

LONGEST = 1 << 20
"""Characters tokenised at once: with offsets, a tokenizer takes about a hundred bytes for each."""


HALF_CHARACTER = re.compile("[\ud800-\udfff]")


class Example:
    """Tokens of one document and which of them are learned.

    Args:
        tokens: (length,).
        labelled: (length,). The first is never labelled, whatever is given: nothing comes before it that could predict
            it, so the sum of `labelled` is the number of losses.

    Raises:
        ValueError: the lengths differ.
    """

    __slots__ = ("labelled", "tokens")

    def __init__(self, tokens: Sequence[int] | NDArray[Any], labelled: Sequence[bool] | NDArray[Any]) -> None:
        if len(tokens) != len(labelled):
            raise ValueError(f"{len(tokens)} tokens but {len(labelled)} labels")
        self.tokens: NDArray[np.uint32] = np.asarray(tokens, dtype=np.uint32)
        self.labelled: NDArray[np.bool_] = np.asarray(labelled, dtype=np.bool_)
        if self.labelled[:1].any():
            self.labelled = np.concatenate([[False], self.labelled[1:]])

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def num_labelled(self) -> int:
        """Number of tokens that have a loss."""
        return int(self.labelled.sum())


def refuse_half_characters(text: str, where: str) -> None:
    """Raise DataError if a text holds half of a surrogate pair, as broken JSON does: no tokenizer reads it."""
    if HALF_CHARACTER.search(text):
        fix = "write the file again, as UTF-8, or remove such rows"
        raise DataError("the row holds half a character", where=where, fix=fix)


def prompted(prompt: str, completion: str) -> Document:
    """Join a prompt and its completion; an end-of-sequence token will follow."""
    return Document(prompt + completion, ((len(prompt), len(prompt) + len(completion)),))


def encode(documents: Sequence[Document], tokenizer: PreTrainedTokenizerBase) -> list[Example]:
    """Tokenise documents, each as one text.

    Special tokens count only where a chat template wrote them: in all other text `</s>` is four characters. Around such
    text inside a rendered chat, and every 2^20 characters of a long text, the tokenizer begins anew.

    Raises:
        DataError: the tokenizer is not a fast one (no offsets), or has no end-of-sequence token.
    """
    if not tokenizer.is_fast:
        what = "the tokenizer gives no character offsets"
        raise DataError(what, where="model.path", fix="convert it to a fast tokenizer (tokenizer.json)")
    end = tokenizer.eos_token_id
    if end is None and not all(document.rendered for document in documents):
        what = "the tokenizer has no end-of-sequence token, so the model could not learn to stop"
        raise DataError(what, where="model.path", fix="set `eos_token` in its tokenizer_config.json")
    examples: dict[int, Example] = {}
    for rendered in (False, True):
        chosen = [i for i, d in enumerate(documents) if d.rendered is rendered and len(_parts(d)) <= 1]
        encoded = _tokenise([documents[i].text for i in chosen], tokenizer, literal=not rendered, whole=not rendered)
        for i, found in zip(chosen, encoded, strict=True):
            examples[i] = _label(documents[i], found, end)
    for i, document in enumerate(documents):
        if i not in examples:
            examples[i] = _label(document, _in_parts(document, tokenizer), end)
    return [examples[i] for i in range(len(documents))]


Tokenised = tuple[NDArray[np.uint32], NDArray[np.int64]]
"""Tokens (length,) and their character offsets (length, 2)."""


def _tokenise(
    texts: Sequence[str], tokenizer: PreTrainedTokenizerBase, *, literal: bool, whole: bool
) -> Iterator[Tokenised]:
    """Tokenise texts: `literal` parses no special tokens, `whole` adds those that the tokenizer puts around a text."""
    for group in _groups(texts):
        found = tokenizer(
            group,
            add_special_tokens=whole,
            split_special_tokens=literal,
            return_offsets_mapping=True,
            return_attention_mask=False,
            verbose=False,
        )
        for tokens, offsets in zip(found["input_ids"], found["offset_mapping"], strict=True):
            yield np.array(tokens, dtype=np.uint32), np.array(offsets, dtype=np.int64).reshape(-1, 2)


def _groups(texts: Sequence[str]) -> Iterator[list[str]]:
    """Group texts in order, closing a group when it has reached `LONGEST` characters."""
    group: list[str] = []
    size = 0
    for text in texts:
        group.append(text)
        size += len(text)
        if size >= LONGEST:
            yield group
            group, size = [], 0
    if group:
        yield group


def _label(document: Document, found: Tokenised, end: int | None) -> Example:
    tokens, offsets = found
    starts, ends = offsets[:, 0], offsets[:, 1]
    labelled = np.zeros(len(tokens), dtype=np.bool_)
    for first, last in document.spans:
        # Some tokenizers trim white space from offsets: a token of nothing else then has no width and sits at its end.
        labelled |= np.where(starts == ends, (starts > first) & (starts <= last), (ends > first) & (starts < last))
    if document.rendered:
        return Example(tokens, labelled)
    if len(tokens) and tokens[-1] == end:  # the tokenizer adds it itself
        labelled[-1] = True
        return Example(tokens, labelled)
    assert end is not None  # `encode` has seen to it
    return Example(np.append(tokens, np.uint32(end)), np.append(labelled, True))


def _in_parts(document: Document, tokenizer: PreTrainedTokenizerBase) -> Tokenised:
    tokens, offsets = [], []
    for start, end, literal in _parts(document):
        whole = start == 0 and not document.rendered
        for ids, places in _tokenise([document.text[start:end]], tokenizer, literal=literal, whole=whole):
            if whole and ids[-1:] == tokenizer.eos_token_id:  # it comes at the end of all parts
                ids, places = ids[:-1], places[:-1]
            tokens.append(ids)
            offsets.append(places + start)
    return np.concatenate(tokens), np.concatenate(offsets)


def _parts(document: Document) -> list[tuple[int, int, bool]]:
    """Cut a document where literal text begins and ends, and long stretches after a line break."""
    if not document.literal and len(document.text) <= LONGEST:
        return [(0, len(document.text), not document.rendered)]
    cuts = [0, *(edge for span in document.literal for edge in span), len(document.text)]
    parts = []
    for number, (start, end) in enumerate(pairwise(cuts)):
        literal = number % 2 == 1 or not document.rendered
        while end - start > LONGEST:
            line = document.text.rfind("\n", start, start + LONGEST) + 1
            cut = line if line > start else start + LONGEST
            parts.append((start, cut, literal))
            start = cut
        if end > start:
            parts.append((start, end, literal))
    return parts


def pieces(example: Example, tokenizer: PreTrainedTokenizerBase) -> list[tuple[str, bool]]:
    """Cut an example into runs of (text, labelled), to be shown in two colours; joined they are the whole text."""
    edges = [0, *(np.flatnonzero(np.diff(example.labelled)) + 1).tolist(), len(example)]
    found, before = [], ""
    for start, end in pairwise(edges):
        # Decoding from the start keeps the spaces that a tokenizer drops at the beginning of a text.
        text = tokenizer.decode(example.tokens[:end].tolist(), clean_up_tokenization_spaces=False)
        assert isinstance(text, str)
        found.append((text[len(before) :], bool(example.labelled[start])))
        before = text
    return found


@dataclass(frozen=True)
class StopProof:
    """How labelled runs of a sample end.

    Attributes:
        runs: labelled runs seen, one for each completion or assistant turn.
        stops: special tokens that end them, with counts.
    """

    runs: int
    stops: Counter[str]

    @property
    def holds(self) -> bool:
        """Every run ends with a special token, so a model trained on them learns to stop."""
        return self.runs > 0 and self.stops.total() == self.runs


def prove_stop(examples: Iterable[Example], tokenizer: PreTrainedTokenizerBase) -> StopProof:
    """Look at the last token of every labelled run of whole (neither cut nor split) examples."""
    special = {number for number, token in tokenizer.added_tokens_decoder.items() if token.special}
    special.update(tokenizer.all_special_ids)
    runs, stops = 0, Counter[str]()
    for example in examples:
        ends = np.flatnonzero(example.labelled & ~np.append(example.labelled[1:], False))
        runs += len(ends)
        last = [int(token) for token in example.tokens[ends]]
        stops.update(str(tokenizer.convert_ids_to_tokens(token)) for token in last if token in special)
    return StopProof(runs, stops)
