"""Forward passes over rows that come and go, and the proof that a model can be used that way."""

from collections.abc import Sequence
from inspect import signature
from typing import Any
from weakref import WeakKeyDictionary

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import PreTrainedModel

from loralab.evals.cache import Rows, can_hold, has_windows, layer_types


class Passes:
    """Forward passes of a model with `Rows`; only the last position goes through the head.

    Args:
        model: in evaluation mode.

    Attributes:
        refill: rows of different lengths may be padded, join and leave.
        share: a beginning of several prompts may be read once.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self.model, self.device = model, model.device
        self.types = layer_types(model.config.get_text_config(decoder=True)) or []
        taken = signature(model.forward).parameters
        self._positions = "position_ids" in taken
        self._last: dict[str, Any] = {"logits_to_keep": 1} if "logits_to_keep" in taken else {}
        if model not in _proven:
            refill = "past_key_values" in taken and can_hold(self.types) and self._proves()
            _proven[model] = refill, refill and not has_windows(self.types) and self._proves(shared=2)
        self.refill, self.share = _proven[model]

    def read(
        self, prompts: Sequence[Sequence[int]], begin: Rows | None = None
    ) -> tuple[Rows, Float[Tensor, "rows vocab"]]:
        """Read prompts, padded on the left.

        Args:
            prompts: tokens of each, at least one; what stands behind the shared beginning, if there is one.
            begin: a shared beginning that has been read: a cache of one row.

        Returns:
            The cache, beginning included, and the logits of each next token.
        """
        lengths = [len(prompt) for prompt in prompts]
        longest, before = max(lengths), 0 if begin is None else begin.columns
        tokens = torch.tensor([[0] * (longest - len(prompt)) + [*prompt] for prompt in prompts], device=self.device)
        missing = longest - torch.tensor(lengths, device=self.device)
        places = torch.arange(longest, device=self.device) - missing[:, None]
        cache, mask = Rows(self.types), None
        if begin is not None:
            cache.join(begin, torch.zeros(len(prompts), dtype=torch.long, device=self.device))
        if min(lengths) < longest:
            mask = torch.nn.functional.pad(places >= 0, (before, 0), value=True)
        logits = self._forward(tokens, places.clamp(min=0) + before, mask, cache)
        if before and mask is not None:
            cache.close(before, missing)
        return cache, logits

    def step(
        self, cache: Rows, tokens: Int[Tensor, " rows"], places: Int[Tensor, " rows"], *, padded: bool
    ) -> Float[Tensor, "rows vocab"]:
        """Read one more token of each row, at its place; `padded` if a row is shorter than another."""
        columns = cache.columns + 1
        mask = None
        if padded:
            mask = torch.arange(columns, device=self.device) >= columns - 1 - places[:, None]
        return self._forward(tokens[:, None], places[:, None], mask, cache)

    def _forward(self, tokens: Tensor, places: Tensor, mask: Tensor | None, cache: Rows) -> Float[Tensor, "rows vocab"]:
        positions = {"position_ids": places} if self._positions else {}
        found = self.model(
            input_ids=tokens,
            attention_mask=None if mask is None else mask.long(),
            past_key_values=cache,
            use_cache=True,
            **positions,
            **self._last,
        )
        logits: Tensor = found.logits[:, -1]
        return logits

    @torch.no_grad()
    def _proves(self, shared: int = 0) -> bool:
        """Prove that rows which were padded, joined, left and joined again get the logits of each row alone."""
        vocabulary = self.model.config.get_text_config().vocab_size
        whole = [[number % vocabulary for number in row] for row in ((3, 4, 5, 6), (3, 4, 9, 8, 7, 6, 5))]
        alone = torch.cat([self.model(input_ids=self._tensor([row]), use_cache=False).logits[:, -1] for row in whole])
        try:
            begin = self.read([whole[0][:shared]])[0] if shared else None
            cache, _ = self.read([row[shared:-1] for row in whole], begin)
            batch = Rows(self.types)
            batch.join(cache, self._tensor([1, 0]))
            batch.keep(1, [1], [0], 3)
            batch.join(cache, self._tensor([1]))
            newest, places = self._tensor([row[-1] for row in whole]), self._tensor([3, 6])
            together = self.step(batch, newest, places, padded=True)
        except Exception:  # whatever a model does with a cache that is not its own: it shall have its own
            return False
        tolerance = torch.finfo(alone.dtype).eps ** 0.5 * alone.abs().max()
        return bool((together - alone).abs().max() <= tolerance)

    def _tensor(self, numbers: Any) -> Int[Tensor, "..."]:
        return torch.tensor(numbers, device=self.device)


_proven: WeakKeyDictionary[PreTrainedModel, tuple[bool, bool]] = WeakKeyDictionary()
