"""What is asked of a model and what it writes: prompts, answers, the text of tokens, and where an answer ends."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from itertools import chain, islice
from typing import Any, Literal

from transformers import PreTrainedTokenizerBase

Ended = Literal["stop", "text", "limit"]

_HALF_A_CHARACTER = "\ufffd"
_MARGIN = 4
"""Tokens that may be unreadable where a tail of the tokens begins: a character has up to four bytes."""


@dataclass(frozen=True)
class Prompt:
    """A prompt to be answered.

    Attributes:
        tokens: at least one. Where a token reaches over the end of the prompt, they end before it.
        text: the prompt as it was written; None where only its tokens are known.
        limit: most new tokens.
        stop_texts: texts that end an answer, which is cut before them; empty ones count for nothing.
    """

    tokens: list[int]
    text: str | None
    limit: int
    stop_texts: tuple[str, ...] = ()


@dataclass(frozen=True)
class Answer:
    """What a model wrote behind a prompt.

    Attributes:
        tokens: all that were chosen, the stop token and those of a stop text included.
        text: without special tokens, cut before the first stop text; None where there is no tokenizer.
        ended: by a stop token, by a stop text, or at the prompt's limit.
        log_probs: of each token under the model itself (nats): temperature 1, no token left out. None unless asked for. Of a
            server's answer: as it was drawn.
    """

    tokens: list[int]
    text: str | None
    ended: Ended
    log_probs: list[float] | None = None


def text_behind(prompt: Prompt, tokens: Sequence[int], tokenizer: PreTrainedTokenizerBase) -> str:
    """Decode tokens that follow a prompt.

    They are decoded together and what the prompt wrote is taken off: alone, a tokenizer would write the beginning of a text.
    """
    before, whole = (_decoded(found, tokenizer) for found in (prompt.tokens, [*prompt.tokens, *tokens]))
    known = prompt.text if prompt.text is not None and whole.startswith(prompt.text) else before
    return whole[len(known) :]


def _decoded(tokens: Sequence[int], tokenizer: PreTrainedTokenizerBase) -> str:
    return str(tokenizer.decode(list(tokens), skip_special_tokens=True, clean_up_tokenization_spaces=False))


def cut(text: str, stop_texts: Sequence[str]) -> str:
    """Cut a text before each stop text in turn, as lm-eval does: the order counts where they overlap."""
    for stop in stop_texts:
        text = text.split(stop)[0] if stop else text
    return text


class Stops:
    """Where answers end.

    Args:
        tokens: stop tokens of all answers.
        tokenizer: None where no prompt has stop texts.
    """

    def __init__(self, tokens: Collection[int], tokenizer: PreTrainedTokenizerBase | None) -> None:
        self.tokens, self._tokenizer = frozenset(tokens), tokenizer
        self._special = _special_tokens(tokenizer) if tokenizer is not None else frozenset()
        self._alone: dict[int, str] = {}

    def tokens_of(self, prompt: Prompt) -> frozenset[int]:
        """Give the tokens that end an answer to this prompt: a stop text that is a special token is never read as text."""
        if self._tokenizer is None or not prompt.stop_texts:
            return self.tokens
        own = {self._tokenizer.convert_tokens_to_ids(text) for text in prompt.stop_texts if text}
        return self.tokens | (self._special & own)

    def text_ends(self, prompt: Prompt, tokens: list[int]) -> bool:
        """Tell whether the newest of the tokens has completed a stop text.

        Most tokens cannot, which a look at the last characters of the stop texts tells; for the others a tail of the tokens
        is decoded, and all of them only where that holds a stop text.
        """
        texts = [text for text in prompt.stop_texts if text]
        if not texts or self._tokenizer is None or not self._may_complete(tokens[-1], texts):
            return False
        visible = (token for token in chain(reversed(tokens), reversed(prompt.tokens)) if token not in self._special)
        # Every token that shows writes a byte or more.
        tail = list(islice(visible, max(len(text.encode()) for text in texts) + _MARGIN))[::-1]
        seen = _decoded(tail, self._tokenizer)
        if not any(text in seen for text in texts):
            return False
        behind = text_behind(prompt, tokens, self._tokenizer)
        return any(text in behind for text in texts)

    def _may_complete(self, token: int, texts: list[str]) -> bool:
        if self._tokenizer is None or token in self._special:
            return False
        if token not in self._alone:
            self._alone[token] = _decoded([token], self._tokenizer)
        alone = self._alone[token]
        # Alone, a token may lose the space it begins with, and half a character shows only with its other half.
        unsure = _HALF_A_CHARACTER in alone or any(text[-1] == " " for text in texts)
        return unsure or any(text[-1] in alone for text in texts)


def _special_tokens(tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """List the tokens that are left out of a text: those with a role, and others that were added as special."""
    added: dict[int, Any] = getattr(tokenizer, "added_tokens_decoder", {})
    return frozenset(tokenizer.all_special_ids) | {i for i, token in added.items() if token.special}


@dataclass(eq=False)
class Row:
    """An answer while it is written.

    Attributes:
        prompt: what it answers.
        stream: key of its random stream.
        group: the same for all rows of the same prompt.
        stop_tokens: tokens that end it.
        tokens: what has been written.
        log_probs: of the tokens, if asked for.
        ended: how, or None while it goes on.
    """

    prompt: Prompt
    stream: int
    group: int
    stop_tokens: frozenset[int]
    tokens: list[int] = field(default_factory=list)
    log_probs: list[float] = field(default_factory=list)
    ended: Ended | None = None

    @property
    def longest(self) -> int:
        """Most tokens that it can come to, the prompt included."""
        return len(self.prompt.tokens) + self.prompt.limit

    @property
    def size(self) -> int:
        """Tokens so far, the prompt included."""
        return len(self.prompt.tokens) + len(self.tokens)

    @property
    def cached(self) -> int:
        """Tokens whose keys and values are needed for the next one: all but the newest."""
        return self.size - 1

    @property
    def read(self) -> list[int]:
        """All tokens so far, the prompt included."""
        return [*self.prompt.tokens, *self.tokens]

    def take(self, token: int, log_prob: float | None, stops: Stops) -> None:
        """Write the next token, which may end the answer."""
        self.tokens.append(token)
        if log_prob is not None:
            self.log_probs.append(log_prob)
        if token in self.stop_tokens:
            self.ended = "stop"
        elif stops.text_ends(self.prompt, self.tokens):
            self.ended = "text"
        elif len(self.tokens) >= self.prompt.limit:
            self.ended = "limit"
