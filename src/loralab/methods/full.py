"""Full fine-tuning: the chosen weights themselves move.

The counterpart in every comparison of P1 and P4. A copy of the moved weights as they were stays in main memory, so that
the base can be restored exactly and the delta given; the master weights of a half-precision model live in the optimizer.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import Parameter

from loralab.base.model import Base
from loralab.base.targets import linears, match_parameters
from loralab.delta.layers import low_rank_layers
from loralab.delta.lowrank import Delta
from loralab.delta.store import difference
from loralab.methods.base import Attachment, OneStage, ParamGroup, Wanted, all_wanted, count, count_all, split_vectors


class Full(OneStage):
    """Unfreeze parameters by pattern and train them whole."""

    def __init__(self, *, targets: Sequence[str] = ("all",), freeze: Sequence[str] = ()) -> None:
        self.targets, self.freeze = list(targets), list(freeze)
        self.parameters: dict[str, Parameter] = {}

    def attach(self, base: Base, seed: int) -> Attachment:
        """Unfreeze the matching parameters.

        Raises:
            TargetError: a pattern matches nothing.
        """
        self._base = base
        model: nn.Module = base.model
        names = match_parameters(model, self.targets, self.freeze)
        # By their own names: others (a value, a reward) may put pairs on them later.
        self._turned = {name: type(layer).__name__ == "Conv1D" for name, layer in linears(model).items()}
        self.parameters = {name: model.get_parameter(name) for name in names}
        self._before = {name: p.detach().cpu().clone() for name, p in self.parameters.items()}
        for parameter in self.parameters.values():
            parameter.requires_grad_(True)
        return Attachment(tuple(names), count(self.parameters), count_all(model))

    def param_groups(self, learning_rate: float, weight_decay: float) -> list[ParamGroup]:
        return split_vectors(self.parameters, learning_rate, weight_decay)

    def delta(self, wanted: Wanted = all_wanted) -> Delta:
        """Give the dense difference of every linear layer, and other parameters as they are now."""
        moved = dict(self.parameters)
        for name in self._turned:
            weight = moved.get(f"{name}.weight")
            if weight is not None and not wanted(name, weight.numel()):
                del moved[f"{name}.weight"]
        return difference(moved, self._before, self._turned, self._base.fingerprint)

    @contextmanager
    def without(self) -> Iterator[None]:
        """Restore the base exactly inside the block."""
        tuned = {name: parameter.detach().clone() for name, parameter in self.parameters.items()}
        self._set(self._before)
        try:
            yield
        finally:
            self._set(tuned)

    def _set(self, values: dict[str, Tensor]) -> None:
        with torch.no_grad():
            for name, parameter in self.parameters.items():
                parameter.copy_(values[name])

    def save(self, folder: Path) -> None:
        """Write the tuned model as a Hugging Face checkpoint with its tokenizer; pairs that others put on it are left out."""
        self._base.model.save_pretrained(folder, state_dict=_without_pairs(self._base.model))
        if self._base.tokenizer is not None:
            self._base.tokenizer.save_pretrained(folder)

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        return {name: parameter.detach() for name, parameter in self.parameters.items()}, {}

    def load_state(self, tensors: dict[str, Tensor], facts: dict[str, Any]) -> None:
        self._set(tensors)


def _without_pairs(model: nn.Module) -> dict[str, Tensor]:
    """Give the state of a model as it would be named without low-rank layers, and without their pairs."""
    wrapped = list(low_rank_layers(model))
    state = model.state_dict()
    for name in wrapped:
        for key in [key for key in state if key.startswith(f"{name}.")]:
            value = state.pop(key)
            if key.startswith(f"{name}.base."):
                state[f"{name}.{key.removeprefix(f'{name}.base.')}"] = value
    return state
