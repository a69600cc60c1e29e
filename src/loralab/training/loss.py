"""Next-token loss over labelled positions only, in chunks, so that no (tokens, vocab) matrix is ever whole.

Legend: H (labelled, hidden) the hidden states of the labelled positions, W (vocab, hidden) the head, t (labelled) targets.
With a frozen head the gradient of H is formed chunk by chunk in the forward pass (two GEMMs, nothing recomputed).
"""

from collections.abc import Iterator
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from loralab.base.attention import document_mask, packs
from loralab.base.data import Batch
from loralab.base.model import backbone, head
from loralab.errors import ModelError

NO_TARGET = -100


class _ChunkedCrossEntropy(torch.autograd.Function):
    """Sum of −log p(t) over rows; the gradients are computed with the loss and only scaled in backward."""

    @staticmethod
    def forward(ctx: Any, H: Tensor, W: Tensor, bias: Tensor | None, targets: Tensor, chunk: int) -> Tensor:
        total = H.new_zeros((), dtype=torch.float32)
        needs_H, needs_W, needs_bias = ctx.needs_input_grad[:3]
        dH = torch.empty_like(H) if needs_H else None
        dW = torch.zeros_like(W, dtype=torch.float32) if needs_W else None
        dbias = torch.zeros_like(bias, dtype=torch.float32) if needs_bias and bias is not None else None
        for rows in _chunks(H.shape[0], chunk):
            h, t = H[rows], targets[rows]
            logits = F.linear(h, W, bias).float()
            log_norm = torch.logsumexp(logits, -1)
            total += (log_norm - logits.gather(-1, t[:, None]).squeeze(-1)).sum()
            if not (needs_H or needs_W or needs_bias):
                continue
            # Softmax minus one-hot, in the buffer of the logits.
            error = logits.sub_(log_norm[:, None]).exp_()
            error.scatter_add_(-1, t[:, None], error.new_full((len(t), 1), -1.0))
            narrow = error.to(H.dtype)
            if dH is not None:
                torch.mm(narrow, W, out=dH[rows])
            if dW is not None:
                dW += torch.mm(narrow.t(), h)
            if dbias is not None:
                dbias += error.sum(0)
        ctx.save_for_backward(*(g for g in (dH, dW, dbias) if g is not None))
        ctx.present = (dH is not None, dW is not None, dbias is not None)
        ctx.dtypes = (H.dtype, W.dtype, None if bias is None else bias.dtype)
        return total

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, scale: Tensor) -> Any:
        saved = iter(ctx.saved_tensors)
        grads = [
            (next(saved) * scale).to(dtype) if there else None
            for there, dtype in zip(ctx.present, ctx.dtypes, strict=True)
        ]
        return *grads, None, None


def _chunks(rows: int, chunk: int) -> Iterator[slice]:
    for start in range(0, rows, chunk):
        yield slice(start, min(start + chunk, rows))


def chunked_cross_entropy(
    H: Float[Tensor, "labelled hidden"],
    W: Float[Tensor, "vocab hidden"],
    bias: Float[Tensor, " vocab"] | None,
    targets: Int[Tensor, " labelled"],
    chunk: int = 1024,
) -> Float[Tensor, ""]:
    """Sum the cross-entropy of rows against targets (nats), `chunk` rows of logits at a time."""
    total: Tensor = _ChunkedCrossEntropy.apply(H, W, bias, targets, chunk)
    return total


class LanguageHead:
    """How this model turns hidden states into logits, found out once by comparing with its own forward pass.

    Where the logits are just the head's linear map of the last hidden state, labelled rows go through it in chunks.
    Where the model scales, caps or otherwise shapes its logits, or the head itself carries a pair, its own forward pass
    computes them, for the labelled positions only.
    """

    def __init__(self, model: PreTrainedModel, chunk: int = 1024) -> None:
        self.model, self.chunk = model, chunk
        self.packs = packs(model)
        self.is_plain = self._proves_plain()

    @torch.no_grad()
    def _proves_plain(self) -> bool:
        linear = head(self.model)
        if not isinstance(linear, nn.Linear) or not linear.weight.is_floating_point():
            return False
        device = linear.weight.device
        tokens = (torch.arange(8, device=device) % linear.weight.shape[0])[None]
        was_training = self.model.training
        self.model.eval()
        try:
            own = self.model(input_ids=tokens, use_cache=False).logits.float()
            hidden = backbone(self.model)(input_ids=tokens, use_cache=False).last_hidden_state
            if hidden.shape[-1] != linear.weight.shape[1]:
                return False
            ours = linear(hidden).float()
        finally:
            self.model.train(was_training)
        return bool(torch.allclose(own, ours, rtol=1e-4, atol=1e-4 * float(own.abs().max())))

    def _mask(self, batch: Batch) -> Tensor | None:
        if self.packs:
            return document_mask(batch.lengths, batch.tokens.device, batch.parents)
        if len(batch.lengths) > 1:
            raise self.unpackable()
        return None

    def unpackable(self) -> ModelError:
        """Make the error for documents side by side in a model that cannot keep them apart."""
        return ModelError(
            f"{type(self.model).__name__} cannot keep packed documents apart",
            where="data.packing",
            fix="set data.packing=false and train.micro_batch=1: one document at a time",
        )

    def _hidden(self, batch: Batch) -> Float[Tensor, "tokens hidden"]:
        output = backbone(self.model)(
            input_ids=batch.tokens, position_ids=batch.positions, attention_mask=self._mask(batch), use_cache=False
        )
        hidden: Tensor = output.last_hidden_state[0]
        return hidden

    def loss(self, batch: Batch) -> Float[Tensor, ""]:
        """Sum the negative log-likelihood of the batch's targets (nats)."""
        rows = (batch.targets[0] != NO_TARGET).nonzero().squeeze(-1)
        targets = batch.targets[0, rows]
        linear = head(self.model)
        if self.is_plain and isinstance(linear, nn.Linear):
            return chunked_cross_entropy(self._hidden(batch)[rows], linear.weight, linear.bias, targets, self.chunk)
        return F.cross_entropy(self._own_logits(batch, rows), targets, reduction="sum")

    def _own_logits(self, batch: Batch, rows: Tensor) -> Float[Tensor, "labelled vocab"]:
        logits: Tensor = self.model(
            input_ids=batch.tokens,
            position_ids=batch.positions,
            attention_mask=self._mask(batch),
            use_cache=False,
            logits_to_keep=rows,
        ).logits[0]
        return logits.float()

    def logits(self, batch: Batch) -> Iterator[tuple[Float[Tensor, "chunk vocab"], Int[Tensor, " chunk"]]]:
        """Give logits (float32, no gradient) and targets of the labelled positions, a chunk at a time, in order."""
        rows = (batch.targets[0] != NO_TARGET).nonzero().squeeze(-1)
        targets = batch.targets[0, rows]
        for part, logits in zip(_chunks(len(rows), self.chunk), self.logits_at(batch, rows), strict=True):
            yield logits, targets[part]

    def logits_at(self, batch: Batch, rows: Int[Tensor, " rows"]) -> Iterator[Float[Tensor, "chunk vocab"]]:
        """Give logits (float32, no gradient) of positions of the row, `chunk` at a time, in order."""
        linear = head(self.model)
        plain = linear if self.is_plain and isinstance(linear, nn.Linear) else None
        with torch.no_grad():
            source = self._own_logits(batch, rows) if plain is None else self._hidden(batch)[rows]
        for part in _chunks(len(rows), self.chunk):
            with torch.no_grad():
                chunk = source[part] if plain is None else F.linear(source[part], plain.weight, plain.bias).float()
            yield chunk
