"""Put low-rank layers into a model, choose which pairs act, and take them out again."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import nn

from loralab.base.targets import in_out, weight_of
from loralab.delta.linear import LowRankEmbedding, LowRankLinear, LowRankModule, Pair
from loralab.delta.lowrank import Delta, LowRank
from loralab.errors import DeltaError

DENSE_LINEARS = ("Linear", "NonDynamicallyQuantizableLinear", "Conv1D")


def wrap_(model: nn.Module, names: Iterable[str], dropout: float = 0.0) -> dict[str, LowRankModule]:
    """Replace the named linears and embeddings by low-rank layers without pairs yet; wrapped ones stay as they are."""
    wrapped: dict[str, LowRankModule] = {}
    for name in names:
        module = model.get_submodule(name)
        if not isinstance(module, LowRankModule):
            module = _wrapped(module, dropout)
            _replace(model, name, module)
        wrapped[name] = module
    return wrapped


def _wrapped(module: nn.Module, dropout: float) -> LowRankModule:
    if isinstance(module, nn.Embedding):
        layer: LowRankModule = LowRankEmbedding(module)
    else:
        # A quantised linear multiplies by its own kernel; a plain one is fused with its pairs.
        plain = type(module).__name__ in DENSE_LINEARS
        layer = LowRankLinear(module, weight_of(module) if plain else None, dropout)
    layer.train(module.training)
    return layer


def _replace(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(parent), leaf, module)


def unwrap_(model: nn.Module) -> None:
    """Put every base layer back where it was; the pairs are dropped."""
    for name, layer in low_rank_layers(model).items():
        _replace(model, name, layer.base)


def low_rank_layers(model: nn.Module) -> dict[str, LowRankModule]:
    """List the low-rank layers of a model by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, LowRankModule)}


@contextmanager
def active(model: nn.Module, names: Iterable[str]) -> Iterator[None]:
    """Let only the named pairs act inside the block, each layer those of them that it has."""
    chosen = tuple(names)
    before = {layer: layer.active for layer in low_rank_layers(model).values()}
    try:
        for layer in before:
            layer.active = tuple(name for name in chosen if name in layer.pairs)
        yield
    finally:
        for layer, pairs in before.items():
            layer.active = pairs


def load_delta_(model: nn.Module, delta: Delta, name: str = "default") -> None:
    """Put a low-rank delta on the model as frozen, active pairs called `name`; parameters trained whole are overwritten.

    Raises:
        DeltaError: the delta is dense, names a layer that the model lacks, or its shape differs.
    """
    for path, change in delta.items():
        if not isinstance(change, LowRank):
            raise DeltaError("a dense delta cannot be attached as pairs", where=path, fix="merge it instead")
        try:
            module = model.get_submodule(path)
        except AttributeError:
            raise DeltaError(
                "the delta names a layer that this base does not have",
                where=path,
                fix="use the base that the adapter was trained on",
            ) from None
        shape = shape_of(module)
        if shape != change.shape:
            raise DeltaError(
                f"the delta's layer is {change.shape[0]}×{change.shape[1]}, the base's is {shape[0]}×{shape[1]}",
                where=path,
                fix="use the base that the adapter was trained on",
            )
    with torch.no_grad():
        for path, value in delta.whole.items():
            model.get_parameter(path).copy_(value)
    for path, layer in wrap_(model, delta).items():
        change = delta[path]
        assert isinstance(change, LowRank)
        device = next(layer.base.parameters()).device
        pair = Pair(change.A.to(device), change.B.to(device), change.scale).requires_grad_(False)
        layer.add_pair(name, pair)


def shape_of(module: nn.Module) -> tuple[int, int]:
    """Give (out, in) of a linear, wrapped or not; of an embedding (dim, vocab), as its pair acts on columns."""
    into, out = in_out(module.base if isinstance(module, LowRankModule) else module)
    return out, into
