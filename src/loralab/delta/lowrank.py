"""Pair algebra: a delta as plain tensors, apart from any model.

Legend: A (rank, in), B (out, rank), scale a number; the change of a weight W (out, in) is scale · B A.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from jaxtyping import Float
from torch import Tensor

from loralab.errors import DeltaError


@dataclass(frozen=True, eq=False)
class LowRank:
    """The change scale · B A of one weight matrix, never formed unless asked."""

    A: Float[Tensor, "rank in"]
    B: Float[Tensor, "out rank"]
    scale: float

    @property
    def rank(self) -> int:
        """Columns of B: an upper bound of the matrix rank."""
        return self.A.shape[0]

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in) of the weight that changes."""
        return self.B.shape[0], self.A.shape[1]

    @property
    def num_parameters(self) -> int:
        return self.A.numel() + self.B.numel()

    def dense(self, dtype: torch.dtype = torch.float32) -> Float[Tensor, "out in"]:
        """Form scale · B A with the product taken in `dtype`."""
        return (self.B.to(dtype) * self.scale) @ self.A.to(dtype)


@dataclass(frozen=True, eq=False)
class Dense:
    """The change of one weight matrix (or vector) as the difference tuned minus base."""

    weight: Tensor

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.weight.shape)

    @property
    def num_parameters(self) -> int:
        return self.weight.numel()

    def dense(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """Give the difference in `dtype`."""
        return self.weight.to(dtype)


LayerDelta = LowRank | Dense


@dataclass(frozen=True)
class Delta(Mapping[str, LayerDelta]):
    """Everything a fine-tuning changed: layer name → its change.

    `layers` holds weight matrices by module name (`model.layers.0.self_attn.q_proj`); `whole` holds parameters that
    were trained whole beside them (norms, biases, heads), by parameter name and as their tuned values; `embeddings` names
    the layers that are embeddings. `base_fingerprint` says which base it was made on. With `keeps_ties`, a table that
    embedding and head share stays shared, as in full fine-tuning; a pair belongs to one of the two.
    """

    layers: dict[str, LayerDelta]
    whole: dict[str, Tensor] = field(default_factory=dict)
    base_fingerprint: str | None = None
    embeddings: frozenset[str] = frozenset()
    keeps_ties: bool = False

    def __getitem__(self, name: str) -> LayerDelta:
        return self.layers[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.layers)

    def __len__(self) -> int:
        return len(self.layers)

    @property
    def num_parameters(self) -> int:
        return sum(layer.num_parameters for layer in self.layers.values()) + sum(t.numel() for t in self.whole.values())


def rank_sum(pairs: Sequence[LowRank]) -> LowRank:
    """Add pairs exactly by stacking them: rank Σ rᵢ, no product formed.

    The scale of the first pair is kept; where another scale differs, its ratio to the first goes into that B.

    Raises:
        DeltaError: no pairs, or pairs of different layers.
    """
    if not pairs:
        raise DeltaError("nothing to add: the chain has no links")
    shapes = {pair.shape for pair in pairs}
    if len(shapes) > 1:
        raise DeltaError(f"pairs of different layers cannot be added: {sorted(shapes)}")
    if len(pairs) == 1:
        return pairs[0]
    scale = pairs[0].scale
    if scale == 0:
        raise DeltaError("the first pair has scale 0 and cannot carry the sum")
    B = torch.cat([p.B if p.scale == scale else p.B * (p.scale / scale) for p in pairs], dim=1)
    return LowRank(torch.cat([p.A for p in pairs]), B, scale)


def add(deltas: Sequence[Delta]) -> Delta:
    """Add low-rank deltas of one base layer by layer; parameters trained whole are taken from the last one.

    Raises:
        DeltaError: a dense layer among them, or different bases.
    """
    bases = {delta.base_fingerprint for delta in deltas} - {None}
    if len(bases) > 1:
        raise DeltaError("deltas of different bases cannot be added", where=", ".join(sorted(str(b) for b in bases)))
    stacked: dict[str, list[LowRank]] = {}
    whole: dict[str, Tensor] = {}
    for delta in deltas:
        for name, layer in delta.items():
            if not isinstance(layer, LowRank):
                raise DeltaError("only low-rank deltas can be added exactly", where=name)
            stacked.setdefault(name, []).append(layer)
        whole.update(delta.whole)
    layers: dict[str, LayerDelta] = {name: rank_sum(pairs) for name, pairs in stacked.items()}
    embeddings = frozenset().union(*(delta.embeddings for delta in deltas))
    return Delta(layers, whole, next(iter(bases), None), embeddings)
