"""Next-token prediction: continued pretraining on text, instruction tuning on labelled completions."""

from collections.abc import Iterator
from typing import Any, Protocol

from torch import nn

from loralab.base.data import Batch
from loralab.training.loss import LanguageHead
from loralab.training.objectives import Loss


class StepFeed(Protocol):
    """Where batches come from; `loralab.base.data` has one for memory and one for streams."""

    def next_step(self) -> list[Batch]: ...

    def state(self) -> dict[str, Any]: ...

    def load_state(self, state: dict[str, Any]) -> None: ...


class TextObjective:
    """Mean negative log-likelihood of the labelled tokens (nats per token)."""

    def __init__(self, feed: StepFeed, language_head: LanguageHead) -> None:
        self.feed, self.head = feed, language_head

    def batches(self, model: nn.Module) -> Iterator[list[Batch]]:
        device = next(model.parameters()).device
        while True:
            yield [batch.to(device) for batch in self.feed.next_step()]

    def loss(self, model: nn.Module, batch: Batch) -> Loss:
        return Loss(self.head.loss(batch), float(batch.weight))

    def state(self) -> dict[str, Any]:
        return self.feed.state()

    def load_state(self, state: dict[str, Any]) -> None:
        self.feed.load_state(state)
