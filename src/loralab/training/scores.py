"""From hidden states to scores of a text, as rewards and classifiers need them: a few positions, not a row of logits."""

from collections.abc import Sequence
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel

from loralab.base.attention import document_mask, packs
from loralab.base.labelled import LabelledBatch
from loralab.base.model import POOLER, backbone, heads

Way = Literal["last", "first", "pooled", "own"]


class ScoreHead:
    """How this model turns hidden states into scores, found out once by comparing with its own forward pass.

    Decoders score the last token of a text: `last`. Encoders score the first, which their head reads as it is (`first`) or
    behind the backbone's pooler (`pooled`). Then texts lie side by side in one row, answers behind a shared prompt if the
    model reads from left to right, and the head sees only the positions that count, in float32. What scores otherwise, or
    cannot keep texts apart, is asked for itself: texts padded to one length, a row for each.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        self.names = heads(model)
        self.name = self.names[-1]
        self.packs = packs(model)
        self.way: Way = self._find_out()

    @property
    def shares(self) -> bool:
        """Whether answers may continue one prompt: only what reads from left to right sees it as if it were alone."""
        return self.packs and self.way == "last"

    def scores(self, batch: LabelledBatch) -> Float[Tensor, "reads outputs"]:
        """Score every text of a batch.

        Raises:
            ValueError: texts share prompts, which this model cannot.
        """
        row = batch.row
        if row.parents and not self.shares:
            raise ValueError("texts share prompts, but this model reads both ways or cannot pack them")
        if self.way == "own" or not self.packs:
            return self._own(batch.documents(), batch.document_types())
        types = {} if batch.types is None or not self._has_types else {"token_type_ids": batch.types}
        mask = document_mask(row.lengths, row.tokens.device, row.parents)
        hidden = self._hidden(row.tokens, position_ids=row.positions, attention_mask=mask, **types)[0]
        return self._read(hidden[batch.reads if self.way == "last" else batch.firsts], self.way)

    @property
    def _has_types(self) -> bool:
        return getattr(self.model.config, "type_vocab_size", 0) > 1

    def _hidden(self, tokens: Int[Tensor, "rows tokens"], **named: Any) -> Float[Tensor, "rows tokens hidden"]:
        if hasattr(self.model.config, "use_cache"):
            named["use_cache"] = False
        hidden: Tensor = backbone(self.model)(input_ids=tokens, **named).last_hidden_state
        return hidden

    def _read(self, hidden: Float[Tensor, "reads hidden"], way: Way) -> Float[Tensor, "reads outputs"]:
        """Score the positions that count, behind pooler and dropout where there are any."""
        if way == "pooled":
            hidden = getattr(backbone(self.model), POOLER)(hidden[:, None])
            dropout = getattr(self.model, "dropout", None)
            hidden = dropout(hidden) if isinstance(dropout, nn.Dropout) else hidden
        # Heads that take the first token themselves are given one of a single token.
        return _in_float32(self.model.get_submodule(self.name), hidden[:, None] if way == "first" else hidden)

    def _own(
        self, documents: Sequence[Int[Tensor, " _"]], types: Sequence[Int[Tensor, " _"]] | None
    ) -> Float[Tensor, "reads outputs"]:
        """Let the model score texts itself, padded on the right."""
        padding = getattr(self.model.config.get_text_config(), "pad_token_id", None) or 0
        seen = [torch.ones_like(document) for document in documents]
        named = {"attention_mask": pad_sequence(seen, batch_first=True)}
        if types is not None and self._has_types:
            named["token_type_ids"] = pad_sequence(list(types), batch_first=True)
        tokens = pad_sequence(list(documents), batch_first=True, padding_value=padding)
        logits: Tensor = self.model(input_ids=tokens, **named).logits
        return logits.float()

    @torch.no_grad()
    def _find_out(self) -> Way:
        if getattr(self.model.config, "is_encoder_decoder", False):
            return "own"
        settings, was_training = self.model.config.get_text_config(), self.model.training
        known = [token for token in range(3, 14) if token != getattr(settings, "pad_token_id", None)]
        texts = [torch.tensor([known[:length]], device=self.model.device) for length in (5, 8)]
        self.model.eval()
        try:
            hidden = [self._hidden(text)[0] for text in texts]
            is_causal = _alike(hidden[1][:5], hidden[0])
            theirs = torch.cat([self._own([text[0]], None) for text in texts])
            ways: tuple[Way, ...] = ("last",) if is_causal else ("pooled", "first")
            for way in ways:
                if way == "pooled" and len(self.names) == 1:
                    continue
                read = torch.stack([text[-1] if is_causal else text[0] for text in hidden])
                ours = self._tried(read, way)
                if ours is not None and _alike(ours, theirs, hidden[0].dtype):
                    return way
        finally:
            self.model.train(was_training)
        return "own"

    def _tried(self, read: Float[Tensor, "reads hidden"], way: Way) -> Float[Tensor, "reads outputs"] | None:
        """Score positions in one way; None where this model's head takes another shape."""
        try:
            ours = self._read(read, way)
        except (RuntimeError, IndexError, AttributeError, TypeError):
            return None
        return ours if ours.ndim == 2 else None


def _in_float32(module: nn.Module, hidden: Tensor) -> Tensor:
    """Run a module as if its weights were float32."""
    if all(parameter.dtype is torch.float32 for parameter in module.parameters()):
        wide: Tensor = module(hidden.float())
        return wide
    weights = {name: parameter.float() for name, parameter in module.named_parameters()}
    wide = functional_call(module, weights, (hidden.float(),))
    return wide


def _alike(ours: Tensor, theirs: Tensor, computed: torch.dtype | None = None) -> bool:
    """Tell whether two ways to compute the same agree: the order of sums differs, and half precision rounds."""
    step = torch.finfo(computed or theirs.dtype).eps ** 0.5
    return torch.allclose(ours, theirs, rtol=step, atol=step * float(theirs.abs().max()))
