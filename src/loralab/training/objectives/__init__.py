"""What is optimised. The seam: batches come from the objective, and so does the loss."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Protocol

from torch import Tensor, nn

from loralab.base.data import Batch


@dataclass(frozen=True)
class Loss:
    """A sum and what it is divided by: the loop divides once per optimizer step, over all its micro-batches."""

    total: Tensor
    weight: float
    metrics: dict[str, float] = field(default_factory=dict)


class Objective(Protocol):
    """What is optimised."""

    def batches(self, model: nn.Module) -> Iterator[list[Batch]]:
        """Give the micro-batches of one optimizer step after another, without end."""
        ...

    def loss(self, model: nn.Module, batch: Batch) -> Loss:
        """Give the summed loss of a micro-batch and its weight."""
        ...

    def state(self) -> dict[str, Any]:
        """Give the cursor into the data."""
        ...

    def load_state(self, state: dict[str, Any]) -> None:
        """Continue from a cursor."""
        ...
