"""Keys and values of rows that come and go: a row leaves or joins without the others being copied.

Rows lie in slots and end at the same column, the newest. What stands left of a row's first token is padding, hidden by the
attention mask; columns that are padding for all rows are dropped by moving the first column in use. A token is written
into its column in place, so a step copies nothing either; buffers double when they are full, up to what can be needed.
"""

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import DynamicCache, PreTrainedConfig
from transformers.cache_utils import Cache, DummyLayer, DynamicLayer, DynamicSlidingWindowLayer

SPARE_COLUMNS = 64
"""A new buffer has at least so many free columns, if they may be needed."""


def layer_types(settings: PreTrainedConfig) -> list[type] | None:
    """List the kinds of cache that a model's layers would have; None where Transformers cannot tell."""
    try:
        return [type(layer) for layer in DynamicCache(config=settings).layers]
    except (AttributeError, KeyError, TypeError, ValueError):
        return None


def can_hold(types: Sequence[type] | None) -> bool:
    """Tell whether all layers keep keys and values column by column, so that rows can be cut out and joined.

    Layers with a sliding window may keep more than they see: the mask hides it. States that sum up what was read (Mamba's),
    compressed, indexed or quantised ones cannot be padded or cut.
    """
    held = (DynamicLayer, DynamicSlidingWindowLayer)
    return any(kind in held for kind in types or ()) and all(kind in (*held, DummyLayer) for kind in types or ())


def has_windows(types: Sequence[type]) -> bool:
    """Tell whether some layers see the newest columns only: then a row's columns must lie side by side."""
    return DynamicSlidingWindowLayer in types


class Rows(Cache):
    """A cache whose rows can leave (`keep`) and join (`join`) between two passes.

    Args:
        types: kind of cache of each layer, for which `can_hold` is true.
    """

    def __init__(self, types: Sequence[type]) -> None:
        super().__init__(layers=[DummyLayer() if kind is DummyLayer else _Layer() for kind in types])
        self._filled: list[_Layer] = [layer for layer in self.layers if isinstance(layer, _Layer)]

    @property
    def columns(self) -> int:
        """Number of columns in use."""
        return self._filled[0].get_seq_length()

    @property
    def rows(self) -> int:
        """Number of rows in use."""
        return self._filled[0].rows

    def expect(self, columns: int) -> None:
        """Say how many columns may follow at most: larger buffers have free ones, up to as many as are in use."""
        for layer in self._filled:
            layer.spare = columns

    def keep(self, rows: int, moved: Sequence[int], into: Sequence[int], columns: int) -> None:
        """Let rows leave and columns that are padding for all others.

        Args:
            rows: how many stay.
            moved: rows that change places.
            into: the slots, below `rows`, that they move to.
            columns: how many of the newest columns stay.
        """
        source, target = (torch.tensor(list(places), dtype=torch.long) for places in (moved, into))
        for layer in self._filled:
            if layer.device != source.device:  # layers may be spread over devices
                source, target = source.to(layer.device), target.to(layer.device)
            layer.keep(rows, source, target, columns)

    def join(self, other: "Rows", order: Int[Tensor, " rows"]) -> None:
        """Let rows of another cache join, in the given order; one may be taken several times."""
        for layer, theirs in zip(self._filled, other._filled, strict=True):
            layer.join(theirs, order.to(theirs.device))

    def close(self, before: int, missing: Int[Tensor, " rows"]) -> None:
        """Move the first `before` columns of each row to the right over the padding, `missing` columns, that follows them."""
        columns = torch.arange(self.columns, device=missing.device)
        moved = columns - missing[:, None]
        source = torch.where(moved < before, moved.clamp(min=0), columns)
        for layer in self._filled:
            layer.close(source.to(layer.device))


class _Layer(DynamicLayer):
    """Buffers (slots, heads, columns, width) of one layer; `:rows` of the slots and `start:end` of the columns are in use."""

    keys: Tensor
    values: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.rows = self.start = self.end = self.spare = 0

    def get_seq_length(self) -> int:
        return self.end - self.start

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Write the newest columns of all rows and give all that is in use."""
        count = key_states.shape[-2]
        if not self.is_initialized:
            self._begin(key_states, value_states)
        self._make_room(self.rows, before=0, behind=count)
        newest = slice(self.end, self.end + count)
        self.keys[: self.rows, :, newest], self.values[: self.rows, :, newest] = key_states, value_states
        self.end += count
        return self._used(self.keys), self._used(self.values)

    def keep(self, rows: int, source: Int[Tensor, " moved"], target: Int[Tensor, " moved"], columns: int) -> None:
        self.start, self.rows = self.end - columns, rows
        if len(source):
            for buffer in (self.keys, self.values):
                used = buffer[:, :, self.start : self.end]
                used[target] = used[source]

    def join(self, other: "_Layer", order: Int[Tensor, " rows"]) -> None:
        if not self.is_initialized:
            self._begin(other.keys, other.values)
            self.rows = 0
        columns, first = other.get_seq_length(), self.rows
        self._make_room(first + len(order), before=columns, behind=0)
        self.rows, self.start = first + len(order), min(self.start, self.end - columns)
        for buffer, theirs in ((self.keys, other.keys), (self.values, other.values)):
            buffer[first : self.rows, :, self.end - columns : self.end] = other._used(theirs)[order]

    def close(self, source: Int[Tensor, "rows columns"]) -> None:
        for buffer in (self.keys, self.values):
            used = self._used(buffer)
            used.copy_(used.gather(2, source[:, None, :, None].expand_as(used)))

    def _used(self, buffer: Tensor) -> Float[Tensor, "rows heads columns width"]:
        return buffer[: self.rows, :, self.start : self.end]

    def _begin(self, keys: Tensor, values: Tensor) -> None:
        self.dtype, self.device, self.rows = keys.dtype, keys.device, keys.shape[0]
        self.keys, self.values = (like.new_empty(0, like.shape[1], 0, like.shape[3]) for like in (keys, values))
        self.start = self.end = 0
        self.is_initialized = True

    def _make_room(self, slots: int, before: int, behind: int) -> None:
        """Provide `slots` slots, `before` columns up to the end and `behind` ones after it, by moving to a larger buffer."""
        if slots <= self.keys.shape[0] and before <= self.end and self.end + behind <= self.keys.shape[2]:
            return
        used = self.get_seq_length()
        end = max(used, before)
        columns = end + max(behind, min(self.spare, max(end, SPARE_COLUMNS)))
        for name in ("keys", "values"):
            old = getattr(self, name)
            # Zeros: what is hidden is multiplied by 0, and what stands in fresh memory may be no number.
            new = old.new_zeros(slots, old.shape[1], columns, old.shape[3])
            rows = min(old.shape[0], slots, self.rows)
            new[:rows, :, end - used : end] = old[:rows, :, self.start : self.end]
            setattr(self, name, new)
        self.start, self.end = end - used, end
