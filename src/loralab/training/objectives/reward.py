"""Rewards from human judgement: of two answers to a prompt the better one, or a thumb for one answer.

Legend: r(x, y) the score of answer y to prompt x; y₊ chosen, y₋ rejected, σ the logistic function.
Source: P5 PERL (2403.10704) section 2; for the margin Touvron et al. 2023 (2307.09288, eq. 2), for the centring Eisenstein et
al. 2023 (2312.09244).
"""

from collections.abc import Iterator
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from loralab.training.objectives import Loss
from loralab.training.objectives.text import StepFeed
from loralab.training.scores import ScoreHead


def pair_losses(
    chosen: Float[Tensor, " pairs"],
    rejected: Float[Tensor, " pairs"],
    margins: Float[Tensor, " pairs"],
    centre: float = 0.0,
) -> Float[Tensor, " pairs"]:
    """Give −log σ(r₊ − r₋ − margin) + centre (r₊ + r₋)² of each pair (nats): Bradley-Terry."""
    return F.softplus(margins - chosen + rejected) + centre * (chosen + rejected).square()


def thumb_losses(rewards: Float[Tensor, " texts"], thumbs: Float[Tensor, " texts"]) -> Float[Tensor, " texts"]:
    """Give the cross-entropy of each thumb (nats): −log σ(r) where it is up (1), −log(1 − σ(r)) where it is down (0).

    The paper prints log σ(1 − r) for the negatives, which is no probability: both terms would not sum to one.
    """
    return F.binary_cross_entropy_with_logits(rewards, thumbs, reduction="none")


class RewardObjective:
    """Mean loss of pairs or of thumbs (nats each).

    Args:
        feed: gives batches of labelled rows.
        head: scores them, with one output.
        kind: of the rows; pairs are read as chosen, rejected, chosen, rejected, …
        centre: weight of (r₊ + r₋)², which keeps rewards around 0; pairs alone leave their level open.
    """

    def __init__(
        self, feed: StepFeed, head: ScoreHead, *, kind: Literal["pairs", "thumbs"] = "pairs", centre: float = 0.0
    ) -> None:
        self.feed, self.head, self.kind, self.centre = feed, head, kind, centre

    def batches(self, model: nn.Module) -> Iterator[list[Any]]:
        device = next(model.parameters()).device
        while True:
            yield [batch.to(device) for batch in self.feed.next_step()]

    def loss(self, model: nn.Module, batch: Any) -> Loss:
        rewards = self.head.scores(batch)[:, 0]
        if self.kind == "pairs":
            chosen, rejected = rewards[0::2], rewards[1::2]
            losses = pair_losses(chosen, rejected, batch.labels, self.centre)
            right = chosen > rejected
        else:
            losses = thumb_losses(rewards, batch.labels)
            right = (rewards > 0) == (batch.labels > 0.5)
        with torch.no_grad():
            metrics = {"accuracy": float(right.float().mean()), "reward_mean": float(rewards.mean())}
        return Loss(losses.sum(), float(len(losses)), metrics)

    def state(self) -> dict[str, Any]:
        return self.feed.state()

    def load_state(self, state: dict[str, Any]) -> None:
        self.feed.load_state(state)
