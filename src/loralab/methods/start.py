"""A method whose run begins from a delta that exists already, an SFT adapter say, without a new base.

The delta is put on once, and three models lie in one set of weights: the tuned one; `without()`, what training began from: base +
delta, the reference of a policy; and `plain()`, the base, on which other deltas (reward, value) stand. Beside pairs the delta is a
frozen first pair in each of its own layers, as a tied link of a chain is (P2, 2401.04151), whether the method moves that layer or
not. Full fine-tuning begins from the merged weights, rounded once.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import Parameter

from loralab.base.model import Base
from loralab.delta.layers import active, add_pairs_, own_parameters
from loralab.delta.lowrank import Delta, LayerDelta, LowRank, add
from loralab.delta.merge import merge_
from loralab.delta.store import save_lowrank
from loralab.errors import DeltaError
from loralab.methods.base import Around, Attachment
from loralab.methods.full import Full
from loralab.methods.lora import Lora

START = "start"
"""Name of the pairs that a run began from."""


class FromDelta(Around):
    """A method that goes on from a delta: what is put on, restored and saved has it; all else is the method's own.

    Its `delta()` is what changed since training began. The delta that it began from is frozen: no part of the state, read again.

    Args:
        method: moves the weights.
        start: low-rank delta of the base; what it holds whole (norms, heads) is overwritten in place.
    """

    method: Lora | Full

    def __init__(self, method: Lora | Full, start: Delta) -> None:
        self.method, self.start = method, start
        self._is_merged = isinstance(method, Full)
        self._base_values: list[tuple[Parameter, Tensor]] = []

    def attach(self, base: Base, seed: int) -> Attachment:
        """Put the delta on and attach the method; what is counted is the method's.

        Raises:
            TargetError: as the method.
            DeltaError: the delta belongs to another base, or cannot be merged.
        """
        self._base, model = base, base.model
        pairs: dict[str, LayerDelta] = {n: _as_trained(n, change, model.device) for n, change in self.start.items()}
        self.start = replace(self.start, layers=pairs)
        in_place = self.start if self._is_merged else replace(self.start, layers={})
        touched = [*in_place.whole, *(f"{name}.weight" for name in in_place)]
        before = {name: p.detach().cpu().clone() for name, p in own_parameters(model).items() if name in touched}
        merge_(model, in_place)
        now = own_parameters(model)  # a table that embedding and head shared may have been parted
        self._base_values = [(now[name], value) for name, value in before.items()]
        attachment = self.method.attach(base, seed)
        if not self._is_merged:
            for layer in add_pairs_(model, self.start, START).values():
                layer.active = (START, *(name for name in layer.active if name != START))
        return attachment

    def links(self) -> list[Delta]:
        """Give the delta that the run began from, then the method's own links, or what it learned; empty for full fine-tuning."""
        return [] if self._is_merged else [self.start, *(self.method.links() or [self.method.delta()])]

    @contextmanager
    def without(self) -> Iterator[None]:
        """Restore base + delta exactly inside the block.

        The method's first pairs act too, with B = 0: sums then round as when training begins, so that a policy that has not moved
        is its reference bit by bit.
        """
        if isinstance(self.method, Full):
            with self.method.without():
                yield
            return
        first = self.method.pair_names[0]
        learned = [layer.pair(first).B for layer in self.method.layers.values()]
        held = [B.data for B in learned]
        with self.method.without(), active(self._base.model, [START, first] if self.start.layers else []):
            try:
                for B in learned:
                    B.data = torch.zeros_like(B)
                yield
            finally:
                for B, values in zip(learned, held, strict=True):
                    B.data = values

    @contextmanager
    def plain(self) -> Iterator[None]:
        """Restore the base exactly inside the block."""
        with self.method.without():  # where no pair acts
            worn = [(parameter, parameter.detach().clone()) for parameter, _ in self._base_values]
            _set(self._base_values)
            try:
                yield
            finally:
                _set(worn)

    def save(self, folder: Path) -> None:
        """Write one delta of the base: the sum of all pairs as one stock PEFT folder, or the checkpoint."""
        if self._is_merged:
            self.method.save(folder)
        else:
            whole = add([self.start, self.method.delta()])
            save_lowrank(folder, whole, self._base.path, model=self._base.model)


def _as_trained(name: str, change: LayerDelta, device: torch.device) -> LowRank:
    """Give a pair as a method's own are: beside the weights, in float32, whatever a file holds it in."""
    if not isinstance(change, LowRank):
        raise DeltaError("a dense delta cannot be attached as pairs", where=name, fix="merge it instead")
    return LowRank(change.A.to(device, torch.float32), change.B.to(device, torch.float32), change.scale)


def _set(values: list[tuple[Parameter, Tensor]]) -> None:
    with torch.no_grad():
        for parameter, value in values:
            parameter.copy_(value)
