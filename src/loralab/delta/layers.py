"""Put low-rank layers into a model, choose which pairs act, and take them out again."""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from loralab.base.targets import in_out, weight_of
from loralab.delta.linear import LowRankEmbedding, LowRankLinear, LowRankModule, Pair
from loralab.delta.lowrank import Delta, LayerDelta, LowRank
from loralab.errors import DeltaError

SCORE_HEADS = ("score", "classifier", "classification_head")
"""Names of the heads of Transformers' models for sequence classification."""

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
    """Let only the named pairs act inside the block, each layer those of them that it has.

    Raises:
        DeltaError: no layer has a pair of that name.
    """
    chosen = tuple(names)
    before = {layer: layer.active for layer in low_rank_layers(model).values()}
    for name in chosen:
        if not any(name in layer.pairs for layer in before):
            known = sorted({pair for layer in before for pair in layer.pairs})
            raise DeltaError(f"no layer has a pair {name!r}", fix=f"pairs on this model: {', '.join(known) or 'none'}")
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
        DeltaError: the delta is dense, or a layer or parameter is missing in the model or has another shape there.
    """
    for path, change in delta.items():
        if not isinstance(change, LowRank):
            raise DeltaError("a dense delta cannot be attached as pairs", where=path, fix="merge it instead")
    set_whole_(model, delta)
    add_pairs_(model, delta, name)


def add_pairs_(model: nn.Module, delta: Mapping[str, LayerDelta], name: str) -> dict[str, LowRankModule]:
    """Put what a delta holds as pairs beside the model's layers, frozen, active behind those that act already."""
    pairs = {path: change for path, change in delta.items() if isinstance(change, LowRank)}
    layers = wrap_(model, pairs)
    for path, layer in layers.items():
        device = next(layer.base.parameters()).device
        pair = Pair(pairs[path].A.to(device), pairs[path].B.to(device), pairs[path].scale)
        layer.add_pair(name, pair.requires_grad_(False))
    return layers


def misfits(model: nn.Module, delta: Delta) -> list[str]:
    """Say of each layer and parameter of a delta that the model lacks or has in another shape what is wrong."""
    layers = unwrapped(model)
    parameters = {name: tuple(parameter.shape) for name, parameter in own_parameters(model).items()}
    shapes = {name: shape_of(layers[name]) for name in delta if name in layers}
    wanted = {name: tuple(change.shape) for name, change in delta.items()}
    wrong = [f"{name} is missing" for name in wanted if name not in shapes]
    wrong += [f"{name} is {s}, the delta has {wanted[name]}" for name, s in shapes.items() if s != wanted[name]]
    for name, value in delta.whole.items():
        if name not in parameters:
            wrong.append(f"{name} is missing")
        elif parameters[name] != tuple(value.shape):
            wrong.append(f"{name} is {parameters[name]}, the delta has {tuple(value.shape)}")
    return wrong


def refuse_misfit(model: nn.Module, delta: Delta, name: str = "this delta") -> None:
    """Raise DeltaError if the model lacks a layer or parameter of a delta, or has it in another shape; three are named."""
    if not (wrong := misfits(model, delta)):
        return
    parameters = own_parameters(model)
    heads = [path for path in delta.whole if path not in parameters and path.split(".")[0] in SCORE_HEADS]
    if len(heads) == len(wrong):
        fix = "name it as objective.reward of a policy, or load it on AutoModelForSequenceClassification"
        raise DeltaError(
            f"{name} scores texts: it has a head that a language model lacks", where=", ".join(heads), fix=fix
        )
    fix = "use the base that the delta was trained on"
    raise DeltaError(f"{name} belongs to another base", where="; ".join(wrong[:3]), fix=fix)


def own_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Name the parameters as they are named without pairs; tied ones under each of their names."""
    inside = {f"{name}.base.": f"{name}." for name in low_rank_layers(model)}
    found = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        path = next((wrapped for wrapped in inside if name.startswith(wrapped)), "")
        found[inside.get(path, "") + name.removeprefix(path)] = parameter
    return found


@torch.no_grad()
def set_whole_(model: nn.Module, delta: Delta) -> None:
    """Overwrite the parameters that the delta holds whole.

    Raises:
        DeltaError: a layer or parameter of the delta is missing in the model or has another shape there.
    """
    refuse_misfit(model, delta)
    parameters = own_parameters(model)
    for name, value in delta.whole.items():
        parameters[name].copy_(value)


def unwrapped(model: nn.Module) -> dict[str, nn.Module]:
    """List the linears and embeddings of a model by name, as they are without pairs."""
    wrapped = {name: layer.base for name, layer in low_rank_layers(model).items()}
    inside = {id(base) for base in wrapped.values()}
    kinds = (nn.Linear, nn.Embedding, Conv1D)
    plain = {n: m for n, m in model.named_modules() if isinstance(m, kinds) and id(m) not in inside}
    return plain | wrapped


def shape_of(module: nn.Module) -> tuple[int, int]:
    """Give (out, in) of a linear, wrapped or not; of an embedding (dim, vocab), as its pair acts on columns."""
    into, out = in_out(module.base if isinstance(module, LowRankModule) else module)
    return out, into
