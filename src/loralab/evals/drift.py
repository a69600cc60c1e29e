"""Probes on a fixed text: its loss, and how far the tuned model's predictions moved from the base's.

Legend: p base and q tuned next-token distributions at one position; K the k most likely tokens of the base. The base is
read once; K, log p on K and the base's best token stay in memory, k·6 + 4 bytes a position (k·8 + 4 where the vocabulary is
larger than 65,536). A reading is then one forward pass and no pass of the base. All measures pair tuned with base position by
position and average over tokens, with documents as clusters.

From K alone KL(p‖q) is known only from below; `drift/covered` says how much of p lies on K, and the unit says that it is a
bound. In exact mode a second forward, with the delta switched off, takes the place of the cache.

The two historic mistakes of such measures cannot happen here: targets are shifted once, where batches are made, and the
base is read with the delta switched off and compared with the tuned model at step 0.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from numpy import ndarray
from torch import Tensor

from loralab.base.data import Batch
from loralab.base.text import Example
from loralab.errors import DeltaError
from loralab.evals.probe import Reading, measuring
from loralab.evals.stats import Score, mean_score
from loralab.training.loss import NO_TARGET, LanguageHead

NATS = "nats/token"
BOUND = "nats/token (lower bound)"
STEP_0_KL = {torch.float32: 1e-6, torch.bfloat16: 1e-3, torch.float16: 1e-3}
SHORT = 1 << 16
"""Tokens that 16 bits can number."""


@dataclass(frozen=True)
class _BasePosition:
    """What is kept of the base for one chunk of positions: K (n, k), log p on K (n, k), best token (n)."""

    top: Tensor
    log_p: Tensor
    best: Tensor


class TextProbe:
    """Loss on a fixed text and, with `drift`, the distance of the tuned model from the base on it.

    Args:
        name: of the scores `<name>/loss` and `<name>/loss_rise`.
        batches: the text.
        head: of the model.
        drift: measure `drift/kl` and `drift/top1_flips`.
        top_k: tokens kept of the base per position.
        prefix: put before `kl` and `top1_flips`: `target_` where the text is of the new task. There, E KL(base‖tuned) over
            the task's inputs is what forgetting follows best (RL's Razor, arXiv:2509.04259).
        exact: gives a context in which the model is the base (`Method.without`). Then the KL is exact, nothing is cached, and
            a reading costs two forwards; the context is entered for every chunk of positions.
    """

    def __init__(
        self,
        name: str,
        batches: Sequence[Batch],
        head: LanguageHead,
        *,
        drift: bool = False,
        top_k: int = 64,
        prefix: str = "",
        exact: Callable[[], AbstractContextManager[None]] | None = None,
    ) -> None:
        self.name, self.batches, self.head = name, list(batches), head
        self.drift, self.top_k, self.prefix, self.exact = drift, top_k, prefix, exact
        self._documents = np.concatenate([_document_of_target(b) for b in _numbered(self.batches)])
        self._num_tokens = np.bincount(self._documents).astype(float)
        self._base: list[_BasePosition] = []
        self._base_sums: ndarray | None = None

    @property
    def cached_bytes(self) -> int:
        """Bytes kept of the base."""
        return sum(x.nbytes for kept in self._base for x in (kept.top, kept.log_p, kept.best))

    def read_base(self, without: AbstractContextManager[None] | None = None) -> Reading:
        """Read the base (inside `without`, which switches the delta off) and keep what later readings pair with."""
        losses: list[Tensor] = []
        covered: list[Tensor] = []
        self._base = []
        with without or nullcontext(), measuring(self.head.model):
            for batch in self.batches:
                for logits, targets in self.head.logits(batch):
                    log_p = torch.log_softmax(logits, -1)
                    losses.append(_losses(log_p, targets))
                    if self.drift and self.exact is None:
                        self._base.append(self._keep(logits, log_p))
                        covered.append(self._base[-1].log_p.exp().sum(-1).clamp_max(1))
        self._base_sums = self._per_document(torch.cat(losses))
        scores = [self._mean(f"{self.name}/loss", self._base_sums)]
        if covered:
            sums = self._per_document(torch.cat(covered))
            scores.append(self._mean(f"drift/{self.prefix}covered", sums, "share of probability"))
        return Reading(scores, self._items(self._base_sums))

    def _keep(self, logits: Float[Tensor, "n vocab"], log_p: Float[Tensor, "n vocab"]) -> _BasePosition:
        vocab = log_p.shape[-1]
        top = log_p.topk(min(self.top_k, vocab - 1), -1)
        numbers = top.indices.to(torch.uint16 if vocab <= SHORT else torch.int32)
        # Not the first of `top`: where tokens tie, two ways of finding the best may differ on the same logits.
        return _BasePosition(numbers, top.values, logits.argmax(-1).to(torch.int32))

    def read(self, step: int | None = None) -> Reading:
        """Read the model as it is now.

        Raises:
            DeltaError: at step 0 the model already differs from the base.
        """
        losses, divergences, flips = [], [], []
        with measuring(self.head.model):
            for logits, targets, base in self._beside_base():
                log_q = torch.log_softmax(logits, -1)
                losses.append(_losses(log_q, targets))
                if base is not None:
                    divergence, best = _distance(base, log_q)
                    divergences.append(divergence)
                    flips.append((logits.argmax(-1) != best).float())
        sums = self._per_document(torch.cat(losses))
        scores = [self._mean(f"{self.name}/loss", sums)]
        if self._base_sums is not None:
            scores.append(self._mean(f"{self.name}/loss_rise", sums - self._base_sums))
        if divergences:
            unit = NATS if self.exact is not None else BOUND
            kl = self._mean(f"drift/{self.prefix}kl", self._per_document(torch.cat(divergences)), unit)
            self._refuse_drift_at_start(kl.value, step)
            flipped = self._per_document(torch.cat(flips))
            scores += [kl, self._mean(f"drift/{self.prefix}top1_flips", flipped, "share of tokens")]
        return Reading(scores, self._items(sums))

    def _beside_base(self) -> Iterator[tuple[Tensor, Tensor, _BasePosition | Tensor | None]]:
        """Give logits and targets, chunk by chunk, with what is known of the base there: what was kept, or its logits."""
        kept = iter(self._base)
        for batch in self.batches:
            again = self.head.logits(batch)
            for logits, targets in self.head.logits(batch):
                if not self.drift:
                    yield logits, targets, None
                elif self.exact is None:
                    yield logits, targets, next(kept)
                else:
                    with self.exact():  # of every chunk, as the head may carry a pair too
                        base, _ = next(again)
                    yield logits, targets, base

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

    def _mean(self, name: str, sums: ndarray, unit: str = NATS) -> Score:
        return mean_score(name, unit, sums, self._num_tokens)


def on_prompts(examples: Sequence[Example]) -> list[Example]:
    """Label what is read of each example: its prompt and the first token of the answer, the whole of a text without prompt."""
    found = []
    for example in examples:
        begin = int(np.argmax(example.labelled)) if example.num_labelled else len(example)
        read = np.arange(len(example)) <= begin
        found.append(Example(example.tokens, read if begin > 1 else np.ones(len(example), dtype=np.bool_)))
    return found


def _losses(log_p: Float[Tensor, "n vocab"], targets: Tensor) -> Float[Tensor, " n"]:
    return -log_p.gather(-1, targets[:, None]).squeeze(-1)


def _distance(base: _BasePosition | Tensor, log_q: Float[Tensor, "n vocab"]) -> tuple[Float[Tensor, " n"], Tensor]:
    """Give KL(p‖q), or its bound, at each position, and the base's best token."""
    if isinstance(base, _BasePosition):
        return lower_bound_kl(base.log_p, log_q.gather(-1, base.top.long())), base.best
    return exact_kl(torch.log_softmax(base, -1), log_q), base.argmax(-1)


def exact_kl(log_p: Float[Tensor, "n vocab"], log_q: Float[Tensor, "n vocab"]) -> Float[Tensor, " n"]:
    """Give KL(p‖q) over the whole vocabulary, summed in float64; never negative."""
    # Where p is 0, its log-probability −inf would make a NaN of the difference.
    terms = torch.where(log_p > -torch.inf, log_p.exp() * (log_p - log_q), 0)
    return terms.sum(-1, dtype=torch.float64).clamp_min(0)


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
