"""Several deltas over one base in memory: each is put on once, and a view says which of them acts.

Low-rank deltas lie beside the base's layers as named pairs. What a delta holds whole (dense matrices, biases, norms) is kept
as values that change places with the base's while it acts: a pointer each, nothing is copied or computed. A table that embedding
and head share is swapped for both, or for the one that the delta names, as `Delta.keeps_ties` says.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager

import torch
from torch import Tensor, nn

from loralab.base.targets import weight_of
from loralab.delta.layers import active, add_pairs_, own_parameters, refuse_misfit, unwrapped
from loralab.delta.lowrank import Delta, LowRank
from loralab.errors import DeltaError

View = Callable[[], AbstractContextManager[None]]
"""Gives a context inside which a model is its base, or wears one delta."""


class Wardrobe:
    """Deltas put on one model by name; outside of every view the model is its base.

    Args:
        model: the base, frozen.
        deltas: by name; each fits the model.

    Raises:
        DeltaError: a delta belongs to another base.
    """

    def __init__(self, model: nn.Module, deltas: Mapping[str, Delta]) -> None:
        self.model = model
        self.names = tuple(deltas)
        self._whole = {name: _whole_of(model, name, delta) for name, delta in deltas.items()}
        if any(self._whole.values()):
            _part_ties_(model)
        self._pairs: dict[str, list[str]] = {name: [] for name in deltas}
        for number, (name, delta) in enumerate(deltas.items()):
            key = f"delta_{number}"  # a module's name takes no dot, a folder's does
            for layer in add_pairs_(model, delta, key).values():
                layer.active = ()
                self._pairs[name] = [key]

    def view(self, name: str | None) -> View:
        """Give the view in which the delta `name` acts, or the base for None."""
        pairs = self._pairs[name] if name is not None else []
        whole = self._whole[name] if name is not None else {}

        @contextmanager
        def acting() -> Iterator[None]:
            with active(self.model, pairs), self._swapped(whole):
                yield

        return acting

    def views(self) -> list[View]:
        """Give the view of the base, then of each delta in turn."""
        return [self.view(None), *map(self.view, self.names)]

    @contextmanager
    def _swapped(self, values: dict[str, Tensor]) -> Iterator[None]:
        parameters = own_parameters(self.model) if values else {}
        before = {name: parameters[name].data for name in values}
        for name, value in values.items():
            parameters[name].data = value
        try:
            yield
        finally:
            for name, value in before.items():
                parameters[name].data = value


@torch.no_grad()
def _whole_of(model: nn.Module, name: str, delta: Delta) -> dict[str, Tensor]:
    """Give what a delta changes whole as the values that its parameters take, in the base's own dtypes."""
    refuse_misfit(model, delta, f"the delta {name!r}")
    parameters, layers = own_parameters(model), unwrapped(model)
    whole = {path: value.to(parameters[path]) for path, value in delta.whole.items()}
    for path, change in delta.items():
        if isinstance(change, LowRank):
            continue
        weight = parameters[f"{path}.weight"]
        if not weight.is_floating_point():
            fix = "load the base without quantising it"
            raise DeltaError("a dense delta cannot be added to a quantised weight", where=path, fix=fix)
        stored_turned = weight_of(layers[path]) is not weight
        moved = change.dense().t() if stored_turned else change.dense()
        whole[f"{path}.weight"] = (weight.float() + moved.to(weight.device)).to(weight.dtype).contiguous()
    if delta.keeps_ties:
        tied = {id(parameters[path]): value for path, value in whole.items()}
        whole = {path: tied[id(own)] for path, own in parameters.items() if id(own) in tied}
    return whole


def _part_ties_(model: nn.Module) -> None:
    """Let every name have a parameter of its own, of the same memory, so that a delta can change one of a tied pair."""
    seen: set[int] = set()
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if id(parameter) in seen:
                setattr(module, name, nn.Parameter(parameter.data, requires_grad=parameter.requires_grad))
            seen.add(id(parameter))
