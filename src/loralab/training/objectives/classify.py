"""One of several classes for a text, or a number: cross-entropy over the classes, or the squared error."""

from collections.abc import Iterator
from typing import Any, Protocol

from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from loralab.training.objectives import Loss
from loralab.training.objectives.text import StepFeed


class Scorer(Protocol):
    """What scores every text of a batch: a head on the model, or the likelihood of words that stand for classes."""

    def scores(self, batch: Any) -> Float[Tensor, "texts outputs"]: ...


class ClassifyObjective:
    """Mean cross-entropy of the right classes (nats per text), or mean squared error.

    Args:
        feed: gives batches of labelled texts.
        head: scores them: an output for each class, or one for a number.
        regression: labels are numbers.
    """

    def __init__(self, feed: StepFeed, head: Scorer, *, regression: bool = False) -> None:
        self.feed, self.head, self.regression = feed, head, regression

    def batches(self, model: nn.Module) -> Iterator[list[Any]]:
        device = next(model.parameters()).device
        while True:
            yield [batch.to(device) for batch in self.feed.next_step()]

    def loss(self, model: nn.Module, batch: Any) -> Loss:
        scores, weight = self.head.scores(batch), float(len(batch.labels))
        if self.regression:
            return Loss(F.mse_loss(scores[:, 0], batch.labels, reduction="sum"), weight)
        classes = batch.labels.long()
        right = (scores.detach().argmax(-1) == classes).float().mean()
        return Loss(F.cross_entropy(scores, classes, reduction="sum"), weight, {"accuracy": float(right)})

    def state(self) -> dict[str, Any]:
        return self.feed.state()

    def load_state(self, state: dict[str, Any]) -> None:
        self.feed.load_state(state)
