"""Next-token loss and log-probabilities of chosen tokens, in chunks, so that no (tokens, vocab) matrix is ever whole.

Legend: H (labelled, hidden) the hidden states of the labelled positions, W (vocab, hidden) the head, t (labelled) targets.
With a frozen head the gradient of H is formed chunk by chunk in the forward pass (two GEMMs, nothing recomputed): of a sum it is
only scaled in backward, of numbers per row each row is scaled by its own.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
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


LogitsOf = Callable[[slice], Tensor]
"""Gives the logits (rows, vocab) of a slice of the rows, without gradient."""


@dataclass(frozen=True, eq=False)
class Written:
    """What a model says of tokens that were written, one number each (float32, nats).

    Attributes:
        log_probs: log p(token), with gradient.
        entropy: of the distribution that the token was drawn from; without gradient.
        kl: KL(p‖reference) of those distributions, summed over the vocabulary, with gradient; None without a reference.
    """

    log_probs: Float[Tensor, " tokens"]
    entropy: Float[Tensor, " tokens"]
    kl: Float[Tensor, " tokens"] | None


def _said(logits: Tensor, t: Tensor, temperature: float, reference: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Give log p(t), entropy and KL of rows of logits by plain autograd; the KL is empty without a reference."""
    log_p = torch.log_softmax(_wide(logits, temperature), -1)
    p = log_p.exp()
    entropy = -torch.linalg.vecdot(p, log_p).detach()
    chosen = log_p.gather(-1, t[:, None]).squeeze(-1)
    if reference is None:
        return chosen, entropy, chosen.new_empty(0)
    log_q = torch.log_softmax(_wide(reference, temperature), -1)
    return chosen, entropy, torch.linalg.vecdot(p, log_p - log_q)


def _wide(logits: Tensor, temperature: float) -> Tensor:
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return wide if temperature == 1 else wide / temperature


class _WrittenTokens(torch.autograd.Function):
    """The same through a frozen head, `chunk` rows at a time, with the gradient of each row of H formed in the forward pass.

    log p: ∂/∂h = (one-hot − p) W / T. KL: ∂/∂h = p (log p − log q − KL) W / T.
    """

    @staticmethod
    def forward(
        ctx: Any,
        H: Tensor,
        W: Tensor,
        bias: Tensor | None,
        tokens: Tensor,
        chunk: int,
        temperature: float,
        reference: LogitsOf | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        said, slopes, kl_slopes = [], [], []
        for rows in _chunks(H.shape[0], chunk):
            h, t = H[rows], tokens[rows]
            log_p = torch.log_softmax(_wide(F.linear(h, W, bias), temperature), -1)
            p = log_p.exp()
            chosen = log_p.gather(-1, t[:, None]).squeeze(-1)
            entropy, kl = -torch.linalg.vecdot(p, log_p), chosen.new_empty(0)
            if reference is not None:
                log_q = torch.log_softmax(_wide(reference(rows), temperature), -1)
                apart = log_p.sub_(log_q)
                kl = torch.linalg.vecdot(p, apart)
                if ctx.needs_input_grad[0]:
                    kl_slopes.append(_through(apart.sub_(kl[:, None]).mul_(p), W, temperature, H.dtype))
            said.append((chosen, entropy, kl))
            if ctx.needs_input_grad[0]:
                error = p.neg_().scatter_add_(-1, t[:, None], p.new_ones(len(t), 1))
                slopes.append(_through(error, W, temperature, H.dtype))
        ctx.save_for_backward(*(torch.cat(parts) for parts in (slopes, kl_slopes) if parts))
        chosen, entropy, kl = (torch.cat(parts) for parts in zip(*said, strict=True))
        ctx.mark_non_differentiable(entropy)
        return chosen, entropy, kl

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, d_chosen: Tensor, _: Tensor, d_kl: Tensor) -> Any:
        slope, *kl_slope = ctx.saved_tensors
        dH = d_chosen.to(slope.dtype)[:, None] * slope
        if kl_slope:
            dH.addcmul_(d_kl.to(slope.dtype)[:, None], kl_slope[0])
        return dH, *[None] * 6


def _through(d_logits: Tensor, W: Tensor, temperature: float, dtype: torch.dtype) -> Tensor:
    """Take a gradient of logits, divided by the temperature, to the hidden states; rows that the head reads are few bits wide."""
    return torch.mm(d_logits.div_(temperature).to(dtype), W)


def chunked_written(
    H: Float[Tensor, "tokens hidden"],
    W: Float[Tensor, "vocab hidden"],
    bias: Float[Tensor, " vocab"] | None,
    tokens: Int[Tensor, " tokens"],
    *,
    chunk: int = 1024,
    temperature: float = 1.0,
    reference: LogitsOf | None = None,
) -> Written:
    """Give log-probability, entropy and (with a reference) KL of each row's token, `chunk` rows of logits at a time.

    A head that trains needs the weight of each row before its own gradient can be summed, so its chunks are computed again in
    backward; a frozen one computes them once.

    Args:
        H: hidden states that predict the tokens.
        W: the head.
        bias: of the head.
        tokens: one for each row.
        chunk: rows whose logits are in memory at a time.
        temperature: that logits are divided by, those of the reference too.
        reference: logits to compare with.
    """
    if W.requires_grad or (bias is not None and bias.requires_grad):

        def said(rows: slice) -> tuple[Tensor, Tensor, Tensor]:
            other = None if reference is None else reference(rows)
            return _said(F.linear(H[rows], W, bias), tokens[rows], temperature, other)

        parts = [
            checkpoint(said, rows, use_reentrant=False, preserve_rng_state=False) for rows in _chunks(len(H), chunk)
        ]
        log_probs, entropy, kl = (torch.cat(part) for part in zip(*parts, strict=True))
    else:
        log_probs, entropy, kl = _WrittenTokens.apply(H, W, bias, tokens, chunk, temperature, reference)
    return Written(log_probs, entropy, None if reference is None else kl)


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

    def hidden(self, batch: Batch) -> Float[Tensor, "tokens hidden"]:
        """Give the last hidden state of every position of the row.

        Raises:
            ModelError: there are several documents, and the model cannot keep them apart.
        """
        output = backbone(self.model)(
            input_ids=batch.tokens, position_ids=batch.positions, attention_mask=self._mask(batch), use_cache=False
        )
        hidden: Tensor = output.last_hidden_state[0]
        return hidden

    def loss(self, batch: Batch) -> Float[Tensor, ""]:
        """Sum the negative log-likelihood of the batch's targets (nats)."""
        rows = (batch.targets[0] != NO_TARGET).nonzero().squeeze(-1)
        targets = batch.targets[0, rows]
        if (linear := self._plain()) is not None:
            return chunked_cross_entropy(self.hidden(batch)[rows], linear.weight, linear.bias, targets, self.chunk)
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

    def written(
        self,
        row: Batch,
        before: Int[Tensor, " tokens"],
        next_tokens: Int[Tensor, " tokens"],
        *,
        temperature: float = 1.0,
        reference: LogitsOf | None = None,
    ) -> Written:
        """Give log-probability (with gradient), entropy and KL of tokens at given positions.

        Only a model that shapes its logits, or whose head carries a pair, holds the logits of all positions at once.

        Args:
            row: packed documents or trees; its targets are not read.
            before: position whose output predicts each token; the same one several times where answers begin alike.
            next_tokens: the tokens.
            temperature: that logits are divided by: log-probabilities are those of the distribution that was sampled from.
            reference: logits at the same positions, from `logits_of`; None computes no KL.
        """
        linear = self._plain()
        if linear is None:
            logits = self._own_logits(row, before)
            other = None if reference is None else reference(slice(None))
            log_probs, entropy, kl = _said(logits, next_tokens, temperature, other)
            return Written(log_probs, entropy, None if reference is None else kl)
        H = self.hidden(row)[before]
        more: Any = {"chunk": self.chunk, "temperature": temperature, "reference": reference}
        return chunked_written(H, linear.weight, linear.bias, next_tokens, **more)

    def log_probs(
        self, row: Batch, before: Int[Tensor, " tokens"], next_tokens: Int[Tensor, " tokens"], temperature: float = 1.0
    ) -> Float[Tensor, " tokens"]:
        """Give log p of tokens at given positions (float32, nats, with gradient); see `written`."""
        return self.written(row, before, next_tokens, temperature=temperature).log_probs

    @torch.no_grad()
    def logits_of(self, row: Batch, before: Int[Tensor, " tokens"]) -> LogitsOf:
        """Read positions once, as the model is now, and give their logits slice by slice whenever asked.

        For the reference: called inside its view, used outside. A head that trains is copied, because the view gives it back.
        """
        linear = self._plain()
        if linear is None:
            return self._own_logits(row, before).__getitem__
        H, trains = self.hidden(row)[before], linear.weight.requires_grad
        W = linear.weight.detach().clone() if trains else linear.weight.detach()
        bias = None if linear.bias is None else linear.bias.detach().clone()

        def logits(rows: slice) -> Tensor:
            return F.linear(H[rows], W, bias)

        return logits

    def _plain(self) -> nn.Linear | None:
        """Give the head if it alone makes the logits."""
        linear = head(self.model)
        return linear if self.is_plain and isinstance(linear, nn.Linear) else None

    def logits(self, batch: Batch) -> Iterator[tuple[Float[Tensor, "chunk vocab"], Int[Tensor, " chunk"]]]:
        """Give logits (float32, no gradient) and targets of the labelled positions, a chunk at a time, in order."""
        rows = (batch.targets[0] != NO_TARGET).nonzero().squeeze(-1)
        targets = batch.targets[0, rows]
        for part, logits in zip(_chunks(len(rows), self.chunk), self.logits_at(batch, rows), strict=True):
            yield logits, targets[part]

    def logits_at(self, batch: Batch, rows: Int[Tensor, " rows"]) -> Iterator[Float[Tensor, "chunk vocab"]]:
        """Give logits (float32, no gradient) of positions of the row, `chunk` at a time, in order."""
        plain = self._plain()
        with torch.no_grad():
            source = self._own_logits(batch, rows) if plain is None else self.hidden(batch)[rows]
        for part in _chunks(len(rows), self.chunk):
            with torch.no_grad():
                chunk = source[part] if plain is None else F.linear(source[part], plain.weight, plain.bias).float()
            yield chunk
