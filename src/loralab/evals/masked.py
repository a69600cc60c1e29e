"""Pseudo-log-likelihood of text under an encoder: each token is masked in turn and predicted from all others.

Σ_t log P(w_t | all tokens but w_t), summed over a text's tokens, its special ones aside (Salazar et al. 2020, arXiv:1910.14659,
equation 1). Negated and divided by the number of tokens it is the pseudo-loss, whose rise on text like that of pretraining
measures what an encoder forgot (arXiv:2410.21228). A text of n tokens costs n rows of n tokens; `positions` bounds that.
"""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from numpy import ndarray
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from loralab.base.model import backbone, reads_both_ways
from loralab.errors import DataError, ModelError
from loralab.evals.probe import PACKED_TOKENS, Reading, measuring
from loralab.evals.stats import Score, mean_score

NATS = "nats/token"


@dataclass(frozen=True)
class MaskedText:
    """Tokens of one text as an encoder reads it, special ones included, and which of them are predicted."""

    tokens: Int[ndarray, " length"]
    scored: Bool[ndarray, " length"]


def masked_texts(
    texts: Sequence[str], tokenizer: PreTrainedTokenizerBase, max_length: int | None = None
) -> list[MaskedText]:
    """Tokenise texts; what is longer than `max_length` (None: than the tokenizer says the model reads) comes in pieces.

    Raises:
        DataError: the tokenizer is not a fast one, which alone gives all pieces of a text; or no room for text is left.
    """
    if not tokenizer.is_fast:
        fix = "convert it to a fast tokenizer (tokenizer.json)"
        raise DataError("the tokenizer cannot cut long texts into pieces", where="model.path", fix=fix)
    longest = tokenizer.model_max_length if max_length is None else max_length
    if longest <= tokenizer.num_special_tokens_to_add():
        what = f"{longest} tokens leave no room beside {tokenizer.num_special_tokens_to_add()} special ones"
        raise DataError(what, where="data.max_length", fix="raise it")
    if not texts:
        return []
    found = tokenizer(
        list(texts),
        truncation=longest < 1 << 30,  # some tokenizers say "no limit" with a number that is too large for them
        max_length=longest if longest < 1 << 30 else None,
        return_overflowing_tokens=True,
        return_special_tokens_mask=True,
        verbose=False,
    )
    pieces = zip(found["input_ids"], found["special_tokens_mask"], strict=True)
    return [MaskedText(np.array(tokens, dtype=np.int64), np.array(special) == 0) for tokens, special in pieces]


class MaskedProbe:
    """Pseudo-loss of fixed texts, paired with the base text by text.

    Args:
        name: of the scores `<name>/pseudo_loss` and `<name>/pseudo_loss_rise`.
        texts: those without a token to predict are left out.
        model: a masked language model.
        tokenizer: tells the numbers of the mask and of padding.
        positions: most tokens predicted of each text, in a fixed random choice; None is all.
        at_once: most tokens in one pass.

    Raises:
        ModelError: the model predicts the next token, or the tokenizer has no mask.
        DataError: a text is longer than the model reads, or there is nothing to predict.
    """

    def __init__(
        self,
        name: str,
        texts: Sequence[MaskedText],
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        positions: int | None = None,
        at_once: int = PACKED_TOKENS,
    ) -> None:
        self.name, self.model = name, model
        self.texts = [text for text in texts if text.scored.any()]
        self._mask = _mask_of(model, tokenizer)
        self._pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0  # hidden by the attention mask
        _refuse_unreadable(self.texts, model, name)
        rng = np.random.default_rng(0)
        chosen = [_choose(np.flatnonzero(text.scored), positions, rng) for text in self.texts]
        self._num_tokens = np.array([len(places) for places in chosen], dtype=float)
        # A row is a text with one token masked; long ones first, so that a lack of memory shows at once.
        order = sorted(range(len(self.texts)), key=lambda i: -len(self.texts[i].tokens))
        self._owner = np.concatenate([np.full(len(chosen[i]), i) for i in order])
        self._place = np.concatenate([chosen[i] for i in order])
        self._passes = _cut([len(self.texts[i].tokens) for i in self._owner], at_once)
        self._heads_alone = self._head_reads_positions_alone()
        self._base_sums: ndarray | None = None

    def read_base(self, without: AbstractContextManager[None] | None = None) -> Reading:
        """Read the base (inside `without`, which switches the delta off) and keep what later readings pair with."""
        with without or nullcontext():
            self._base_sums = self._sums()
        return Reading([self._mean("pseudo_loss", self._base_sums)], self._items(self._base_sums))

    def read(self, step: int | None = None) -> Reading:
        """Read the model as it is now."""
        sums = self._sums()
        scores = [self._mean("pseudo_loss", sums)]
        if self._base_sums is not None:
            scores.append(self._mean("pseudo_loss_rise", sums - self._base_sums))
        return Reading(scores, self._items(sums))

    def _sums(self) -> Float[ndarray, " texts"]:
        """Sum −log P(w_t | all others) over the tokens of each text (nats)."""
        with measuring(self.model):
            losses = [self._losses(rows) for rows in self._passes]
        return np.bincount(self._owner, torch.cat(losses).double().cpu().numpy(), minlength=len(self.texts)).astype(
            float
        )

    def _losses(self, rows: slice) -> Float[Tensor, " rows"]:
        tokens, places, targets, visible = self._masked(rows)
        log_p = torch.log_softmax(self._logits(tokens, visible, places, self._heads_alone), -1)
        return -log_p.gather(-1, targets[:, None]).squeeze(-1)

    def _masked(self, rows: slice) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Lay out rows: tokens (rows, longest) with one masked each, its place, what it was, and what is no padding."""
        texts = [self.texts[i].tokens for i in self._owner[rows]]
        lengths = np.array([len(text) for text in texts])
        tokens = np.full((len(texts), lengths.max()), self._pad, dtype=np.int64)
        for row, text in enumerate(texts):
            tokens[row, : len(text)] = text
        here, places = np.arange(len(texts)), self._place[rows]
        targets = tokens[here, places]
        tokens[here, places] = self._mask
        visible = (np.arange(lengths.max()) < lengths[:, None]).astype(np.int64)
        found = [torch.from_numpy(x).to(self.model.device) for x in (tokens, places, targets, visible)]
        return found[0], found[1], found[2], found[3]

    def _logits(
        self,
        tokens: Int[Tensor, "rows length"],
        visible: Int[Tensor, "rows length"],
        places: Int[Tensor, " rows"],
        alone: bool,
    ) -> Float[Tensor, "rows vocab"]:
        rows = torch.arange(len(tokens), device=tokens.device)
        if alone:
            with _only(self.model, places):
                found: Tensor = self.model(input_ids=tokens, attention_mask=visible).logits[:, 0]
        else:
            found = self.model(input_ids=tokens, attention_mask=visible).logits[rows, places]
        return found.float()

    def _head_reads_positions_alone(self) -> bool:
        """Find out whether the head gives the same for one position as for all: then only masked ones go through it."""
        tokens, places, _, visible = self._masked(slice(0, 1))
        with measuring(self.model):
            whole = self._logits(tokens, visible, places, alone=False)
            try:
                single = self._logits(tokens, visible, places, alone=True)
            except (AttributeError, IndexError, RuntimeError, TypeError):  # the head wants the row as it was
                return False
        return whole.shape == single.shape and bool(
            torch.allclose(whole, single, rtol=1e-4, atol=1e-4 * float(whole.abs().max()))
        )

    def _mean(self, measure: str, sums: ndarray) -> Score:
        return mean_score(f"{self.name}/{measure}", NATS, sums, self._num_tokens)

    def _items(self, sums: ndarray) -> list[dict[str, Any]]:
        pairs = zip(self._num_tokens.tolist(), sums.tolist(), strict=True)
        return [{"num_tokens": number, "loss_sum": loss} for number, loss in pairs]


@contextmanager
def _only(model: PreTrainedModel, places: Int[Tensor, " rows"]) -> Iterator[None]:
    """Hand the head one position of each row: hidden states (rows, length, hidden) become (rows, 1, hidden)."""

    def keep(module: nn.Module, given: Any, output: Any) -> Any:
        hidden = output.last_hidden_state
        output.last_hidden_state = hidden[torch.arange(len(hidden), device=hidden.device), places][:, None]
        return output

    hook = backbone(model).register_forward_hook(keep)
    try:
        yield
    finally:
        hook.remove()


def _mask_of(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> int:
    if not reads_both_ways(model):
        what = f"{type(model).__name__} predicts the next token: a masked one means nothing to it"
        raise ModelError(what, where="model.path", fix="measure its loss on the text")
    if tokenizer.mask_token_id is None:
        fix = "use the tokenizer that belongs to the model, or set `mask_token` in its tokenizer_config.json"
        raise ModelError("the tokenizer has no mask token", where="model.path", fix=fix)
    return int(tokenizer.mask_token_id)


def _refuse_unreadable(texts: Sequence[MaskedText], model: PreTrainedModel, name: str) -> None:
    if not texts:
        raise DataError("no text has a token to predict", where=name, fix="give texts that are not empty")
    reach = getattr(model.config, "max_position_embeddings", None)
    for part in model.modules():
        embedding = getattr(part, "position_embeddings", None)
        if isinstance(embedding, nn.Embedding) and embedding.padding_idx is not None:
            reach = embedding.num_embeddings - embedding.padding_idx - 1  # RoBERTa counts from behind the padding
    longest = max(len(text.tokens) for text in texts)
    if reach is not None and longest > reach:
        what = f"a text has {longest} tokens, but the model reads {reach}"
        raise DataError(what, where=name, fix=f"cut the texts into pieces of {reach} tokens or less")


def _choose(places: Int[ndarray, " scored"], most: int | None, rng: np.random.Generator) -> Int[ndarray, " chosen"]:
    if most is None or len(places) <= most:
        return places
    return np.sort(rng.choice(places, most, replace=False))


def _cut(lengths: Sequence[int], most: int) -> list[slice]:
    """Cut rows, long ones first, into passes of at most so many tokens, padding included, and at least one row."""
    passes, first = [], 0
    for row, _ in enumerate(lengths):
        if row > first and lengths[first] * (row - first + 1) > most:
            passes.append(slice(first, row))
            first = row
    return [*passes, slice(first, len(lengths))]
