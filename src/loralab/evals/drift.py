"""Probes on a fixed text: its loss, and how far the tuned model's predictions moved from the base's.

Legend: p base and q tuned next-token distributions at one position; K the k most likely tokens of the base. The base is
read once; K, log p on K and the loss of each position stay in memory. All measures pair tuned with base position by position
and average over tokens, with documents as clusters.

The two historic mistakes of such measures cannot happen here: targets are shifted once, where batches are made, and the
base is read with the delta switched off and compared with the tuned model at step 0.
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from numpy import ndarray
from torch import Tensor

from loralab.base.data import Batch
from loralab.errors import DeltaError
from loralab.evals.probe import Reading, measuring
from loralab.evals.stats import Score, mean_score
from loralab.training.loss import NO_TARGET, LanguageHead

NATS = "nats/token"
STEP_0_KL = {torch.float32: 1e-6, torch.bfloat16: 1e-3, torch.float16: 1e-3}


@dataclass
class _BasePosition:
    """What is kept of the base for one chunk of positions: loss (n), K (n, k), log p on K (n, k), best token (n)."""

    loss: Tensor
    top: Tensor
    log_p: Tensor
    best: Tensor


class TextProbe:
    """Loss on a fixed text and, with `drift`, the distance of the tuned model from the base on it."""

    def __init__(
        self, name: str, batches: Sequence[Batch], head: LanguageHead, *, drift: bool = False, top_k: int = 64
    ) -> None:
        self.name, self.batches, self.head = name, list(batches), head
        self.drift, self.top_k = drift, top_k
        self._documents = np.concatenate([_document_of_target(b) for b in _numbered(self.batches)])
        self._num_tokens = np.bincount(self._documents).astype(float)
        self._base: list[_BasePosition] = []
        self._base_sums: ndarray | None = None

    def read_base(self, without: AbstractContextManager[None] | None = None) -> Reading:
        """Read the base (inside `without`, which switches the delta off) and keep what later readings pair with."""
        with without or nullcontext(), measuring(self.head.model):
            self._base = [self._keep(logits, t) for batch in self.batches for logits, t in self.head.logits(batch)]
        self._base_sums = self._per_document(torch.cat([part.loss for part in self._base]))
        if not self.drift:
            self._base = []
        return Reading([self._mean(f"{self.name}/loss", self._base_sums)], self._items(self._base_sums))

    def _keep(self, logits: Tensor, targets: Tensor) -> _BasePosition:
        log_p = torch.log_softmax(logits, -1)
        loss = -log_p.gather(-1, targets[:, None]).squeeze(-1)
        if not self.drift:
            return _BasePosition(loss, loss, loss, loss)
        top = log_p.topk(min(self.top_k, log_p.shape[-1] - 1), -1)
        # Not the first of `top`: where tokens tie, two ways of finding the best may differ on the same logits.
        return _BasePosition(loss, top.indices.to(torch.int32), top.values, logits.argmax(-1))

    def read(self, step: int | None = None) -> Reading:
        """Read the model as it is now.

        Raises:
            DeltaError: at step 0 the model already differs from the base.
        """
        losses, divergences, flips = [], [], []
        kept = iter(self._base)
        with measuring(self.head.model):
            for batch in self.batches:
                for logits, targets in self.head.logits(batch):
                    log_q = torch.log_softmax(logits, -1)
                    losses.append(-log_q.gather(-1, targets[:, None]).squeeze(-1))
                    if self.drift:
                        base = next(kept)
                        divergences.append(lower_bound_kl(base.log_p, log_q.gather(-1, base.top.long())))
                        flips.append((logits.argmax(-1) != base.best).float())
        sums = self._per_document(torch.cat(losses))
        scores = [self._mean(f"{self.name}/loss", sums)]
        if self._base_sums is not None:
            scores.append(self._mean(f"{self.name}/loss_rise", sums - self._base_sums))
        if self.drift:
            kl = self._mean("drift/kl", self._per_document(torch.cat(divergences)))
            self._refuse_drift_at_start(kl.value, step)
            flipped = self._per_document(torch.cat(flips))
            scores += [kl, mean_score("drift/top1_flips", "share of tokens", flipped, self._num_tokens)]
        return Reading(scores, self._items(sums))

    def _items(self, sums: ndarray) -> list[dict[str, Any]]:
        pairs = zip(self._num_tokens.tolist(), sums.tolist(), strict=True)
        return [{"num_tokens": number, "loss_sum": loss} for number, loss in pairs]

    def _refuse_drift_at_start(self, kl: float, step: int | None) -> None:
        dtype = next(p.dtype for p in self.head.model.parameters() if p.is_floating_point())
        if step == 0 and kl > STEP_0_KL.get(dtype, 1e-3):
            raise DeltaError(
                f"the model differs from its base before training: KL {kl:.2g} nats/token",
                where="step 0",
                fix="use a method that starts as the identity",
            )

    def _per_document(self, values: Tensor) -> ndarray:
        return np.bincount(self._documents, values.double().cpu().numpy(), minlength=len(self._num_tokens))

    def _mean(self, name: str, sums: ndarray) -> Score:
        return mean_score(name, NATS, sums, self._num_tokens)


def lower_bound_kl(log_p: Float[Tensor, "n k"], log_q: Float[Tensor, "n k"]) -> Float[Tensor, " n"]:
    """Bound KL(p‖q) from below by lumping all tokens outside K into one (log-sum inequality); never negative."""
    inside = (log_p.double().exp() * (log_p.double() - log_q.double())).sum(-1)
    # Below the rounding of the log-probabilities the rests are noise, of which a logarithm would make a great deal.
    noise = torch.finfo(log_p.dtype).eps
    rest_p = (1 - log_p.double().exp().sum(-1)).clamp_min(noise)
    rest_q = (1 - log_q.double().exp().sum(-1)).clamp_min(noise)
    return (inside + rest_p * (rest_p.log() - rest_q.log())).clamp_min(0)


def _numbered(batches: Sequence[Batch]) -> list[tuple[int, Batch]]:
    """Give each batch with the number of its first document that has a target."""
    numbered, first = [], 0
    for batch in batches:
        numbered.append((first, batch))
        first += int(_with_targets(batch).sum())
    return numbered


def _with_targets(batch: Batch) -> Tensor:
    """Tell for each document of a batch whether it has a target."""
    return torch.tensor([bool((part != NO_TARGET).any()) for part in batch.targets[0].cpu().split(list(batch.lengths))])


def _document_of_target(numbered: tuple[int, Batch]) -> ndarray:
    """Give for each target of a batch the number of its document, counting only documents with targets."""
    first, batch = numbered
    number = first + torch.cumsum(_with_targets(batch), 0) - 1
    of_token = torch.repeat_interleave(number, torch.tensor(batch.lengths))
    found: ndarray = of_token[batch.targets[0].cpu() != NO_TARGET].numpy()
    return found
