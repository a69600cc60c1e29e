"""What is optimised. The seam: batches come from the objective, and so does the loss."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Protocol

from torch import Tensor, nn


@dataclass(frozen=True)
class Loss:
    """A sum and what it is divided by: the loop divides once per optimizer step, over all its micro-batches."""

    total: Tensor
    weight: float
    metrics: dict[str, float] = field(default_factory=dict)


class Objective(Protocol):
    """What is optimised. A batch is of its own kind; the loop looks at nothing but `tokens`."""

    def batches(self, model: nn.Module) -> Iterator[list[Any]]:
        """Give the micro-batches of one optimizer step after another, without end."""
        ...

    def loss(self, model: nn.Module, batch: Any) -> Loss:
        """Give the summed loss of a micro-batch and its weight."""
        ...

    def state(self) -> dict[str, Any]:
        """Give the cursor into the data."""
        ...

    def load_state(self, state: dict[str, Any]) -> None:
        """Continue from a cursor."""
        ...
