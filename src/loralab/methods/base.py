"""The seam of methods: how the weights may move.

A method attaches itself to a frozen base, says in named groups what trains at which learning rate, may tie knots while
training goes on, and gives the delta. The contract battery in `tests/contract/` runs on every entry of `METHODS`.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor, nn
from torch.nn import Parameter

from loralab.base.model import Base
from loralab.delta.lowrank import Delta


@dataclass(frozen=True)
class Attachment:
    """What a method changed on the model: which layers it moves and how many numbers that is."""

    layers: tuple[str, ...]
    """Targets, by module name (parameters, for full fine-tuning)."""
    trained_parameters: int
    all_parameters: int
    ranks: dict[str, int] = field(default_factory=dict)
    """Rank of each low-rank layer."""

    @property
    def share(self) -> float:
        """Trained numbers over the base's numbers."""
        return self.trained_parameters / self.all_parameters


@dataclass(frozen=True)
class ParamGroup:
    """Tensors that share a learning rate and a weight decay, under a name that checkpoints and logs use."""

    name: str
    tensors: dict[str, Parameter]
    learning_rate: float
    weight_decay: float

    @property
    def model(self) -> str:
        """Name of the model that it belongs to, where that is not the one that is tuned: `value` of `value/matrices`."""
        return self.name.rpartition("/")[0]


@dataclass(frozen=True)
class Progress:
    """Where training stands when the loop asks a method whether to tie a knot."""

    step: int
    total_steps: int
    validation_loss: Callable[[], float | None]
    """Measures now (nats per token); None where there is no validation text."""


@dataclass(frozen=True)
class Knot:
    """A link was frozen: the loop starts the optimizer anew, and ends if the chain ended."""

    link: int
    """Number of the link that was frozen, from 1."""
    gain: float | None
    """Fall of the validation loss over the link, where it was measured."""
    ends: bool = False


Wanted = Callable[[str, int], bool]
"""Asked with the name of a layer and the number of elements of its dense change, whether it is to be formed."""


def all_wanted(_name: str, _size: int) -> bool:
    """Want every layer."""
    return True


class Method(Protocol):
    """How the weights may move."""

    def attach(self, base: Base, seed: int) -> Attachment:
        """Replace or unfreeze the targets. Raises TargetError for a pattern that matches nothing."""
        ...

    def param_groups(self, learning_rate: float, weight_decay: float) -> list[ParamGroup]:
        """Name what trains now, with its learning rate and weight decay."""
        ...

    def phase(self, step: int, total_steps: int) -> tuple[int, int]:
        """Give first step and length of the part of the run over which the schedule stretches at `step`."""
        ...

    def at_step(self, progress: Progress) -> Knot | None:
        """Tie a knot if one is due after `progress.step` finished steps."""
        ...

    def delta(self, wanted: Wanted = all_wanted) -> Delta:
        """Give everything that changed since training began, for spectra.

        Dense changes, as large as the weights themselves, are formed where they are `wanted`; pairs are always given.

        Raises:
            DeltaError: the weights cannot show their change.
        """
        ...

    def links(self) -> list[Delta]:
        """Give the links of a chain, first to current; empty for other methods."""
        ...

    def without(self) -> AbstractContextManager[None]:
        """Restore exactly what training began from inside the block: the base, with the delta that it wore, if any."""
        ...

    def plain(self) -> AbstractContextManager[None]:
        """Restore the base exactly inside the block, without a delta that it wore when training began."""
        ...

    def save(self, folder: Path) -> None:
        """Write the delta of the base in its stock format: PEFT folder or checkpoint."""
        ...

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Give tensors and plain facts from which `load_state` continues."""
        ...

    def load_state(self, tensors: dict[str, Tensor], facts: dict[str, Any]) -> None:
        """Continue from a saved state of the same method on the same base."""
        ...


class OneStage:
    """What holds for methods that train in one piece from the base: no knots, no links, one schedule over the run."""

    def plain(self: Method) -> AbstractContextManager[None]:
        """Restore the base, which is what training began from."""
        return self.without()

    def phase(self, step: int, total_steps: int) -> tuple[int, int]:
        """Stretch the schedule over the whole run."""
        return 0, total_steps

    def at_step(self, progress: Progress) -> Knot | None:
        """Tie nothing."""
        return None

    def links(self) -> list[Delta]:
        """Give no links."""
        return []


class Around:
    """A method around another: everything is the inner method's, but for what a subclass adds."""

    method: Method

    def param_groups(self, learning_rate: float, weight_decay: float) -> list[ParamGroup]:
        return self.method.param_groups(learning_rate, weight_decay)

    def phase(self, step: int, total_steps: int) -> tuple[int, int]:
        return self.method.phase(step, total_steps)

    def at_step(self, progress: Progress) -> Knot | None:
        return self.method.at_step(progress)

    def delta(self, wanted: Wanted = all_wanted) -> Delta:
        return self.method.delta(wanted)

    def links(self) -> list[Delta]:
        return self.method.links()

    def without(self) -> AbstractContextManager[None]:
        return self.method.without()

    def plain(self) -> AbstractContextManager[None]:
        return self.method.plain()

    def save(self, folder: Path) -> None:
        self.method.save(folder)

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        return self.method.state()

    def load_state(self, tensors: dict[str, Tensor], facts: dict[str, Any]) -> None:
        self.method.load_state(tensors, facts)


def split_vectors(tensors: dict[str, Parameter], learning_rate: float, weight_decay: float) -> list[ParamGroup]:
    """Name two groups: matrices, and vectors (norms, biases), which are not decayed."""
    vectors = {name: p for name, p in tensors.items() if p.ndim < 2}
    matrices = {name: p for name, p in tensors.items() if p.ndim >= 2}
    groups = [
        ParamGroup("matrices", matrices, learning_rate, weight_decay),
        ParamGroup("vectors", vectors, learning_rate, 0.0),
    ]
    return [group for group in groups if group.tensors]


def count(parameters: "dict[str, Parameter] | list[Parameter]") -> int:
    """Count numbers, each tensor once."""
    values = parameters.values() if isinstance(parameters, dict) else parameters
    return sum(p.numel() for p in {id(p): p for p in values}.values())


def count_all(model: nn.Module) -> int:
    """Count the numbers of a model; a 4-bit weight holds two in a byte."""
    total = 0
    for parameter in model.parameters():
        packed = type(parameter).__name__ == "Params4bit"
        total += parameter.numel() * (2 if packed else 1)
    return total
