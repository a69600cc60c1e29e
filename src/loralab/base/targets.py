"""Which layers and parameters a pattern means.

A pattern is one of: a word for a kind of layer (`all-linear`, `attention`, `mlp`), the end of a dotted name (`q_proj`,
`self_attn.q_proj`), a glob (`*.layers.[01].*`), or a regular expression that matches the whole name (marked by `re:` where it
could be read otherwise). Nothing depends on the model's family: kinds follow from where a layer lies.
"""

import re
from collections.abc import Callable, Iterable, Sequence
from fnmatch import fnmatchcase
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from loralab.errors import TargetError, did_you_mean

KINDS = ("all-linear", "attention", "mlp")


def linears(model: nn.Module) -> dict[str, nn.Module]:
    """List the linear layers of the transformer by name: `nn.Linear`, quantised ones, and Transformers' `Conv1D`.

    What lies outside the backbone is a head (of a language model, classifier, reward model) and is left out.
    """
    backbone = getattr(model, "base_model", model)
    inside = {id(module) for module in backbone.modules()} - {id(_output_embedding(model))}
    return {name: m for name, m in model.named_modules() if isinstance(m, nn.Linear | Conv1D) and id(m) in inside}


def fused_weights(model: nn.Module) -> dict[str, int]:
    """Count the numbers of weights that are no linear layer, by name: experts stored as one 3-D tensor, for example.

    No target reaches them; `full` does.
    """
    backbone = getattr(model, "base_model", model)
    return {name: p.numel() for name, p in backbone.named_parameters() if p.ndim > 2 and not p.requires_grad}


def _output_embedding(model: nn.Module) -> nn.Module | None:
    find = getattr(model, "get_output_embeddings", None)
    found: nn.Module | None = find() if find is not None else None
    return found


def _kind(model: nn.Module, name: str) -> str | None:
    """Tell `attention` or `mlp` from what holds a layer and how it is called; None outside the blocks."""
    parts = name.split(".")
    holders = [model.get_submodule(".".join(parts[:depth])) for depth in range(1, len(parts))]
    words = [type(holder).__name__.lower() for holder in holders] + [part.lower() for part in parts]
    if any("attention" in word or "attn" in word for word in words):
        return "attention"
    return "mlp" if any(isinstance(holder, nn.ModuleList) for holder in holders) else None


def pattern_matches(pattern: str, name: str) -> bool:
    """Tell whether a name ends with the pattern (whole dotted parts), or matches it as a glob or regular expression.

    Raises:
        TargetError: the expression after `re:` is not a regular expression.
    """
    if pattern.startswith("re:"):
        return _expression(pattern).fullmatch(name) is not None
    if f".{name}".endswith(f".{pattern}") or fnmatchcase(name, pattern):
        return True
    try:
        return re.fullmatch(pattern, name) is not None
    except re.error:  # a glob, most likely
        return False


def _expression(pattern: str) -> re.Pattern[str]:
    try:
        return re.compile(pattern.removeprefix("re:"))
    except re.error as error:
        raise TargetError(
            f"{pattern!r} is not a regular expression: {error}", where="method.targets", fix="correct the expression"
        ) from None


def match(model: nn.Module, targets: Sequence[str], exclude: Sequence[str] = ()) -> list[str]:
    """List the layers that the targets name, in the model's order.

    Embeddings and the output head are taken only where a target is their name.

    Args:
        model: the base.
        targets: patterns.
        exclude: patterns taken out again.

    Raises:
        TargetError: a pattern matches nothing, or nothing is left.
    """
    layers = linears(model)
    named_only = [name for name, m in model.named_modules() if isinstance(m, nn.Embedding) or _is_head(model, m)]

    def found(pattern: str) -> set[str]:
        if pattern in KINDS:
            return {name for name in layers if pattern in ("all-linear", _kind(model, name))}
        whole = {name for name in named_only if f".{name}".endswith(f".{pattern}")}
        return whole | {name for name in layers if pattern_matches(pattern, name)}

    known = [*KINDS, *_endings([*layers, *named_only])]
    chosen = _union(targets, found, "method.targets", "layer", known)
    chosen -= _union(exclude, found, "method.exclude", "layer", known)
    if not chosen:
        raise TargetError("no layer is left to train", where="method.exclude", fix="exclude less, or name more targets")
    return [name for name, _ in model.named_modules() if name in chosen]


def _is_head(model: nn.Module, module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) and module is _output_embedding(model)


def match_parameters(model: nn.Module, patterns: Sequence[str], freeze: Sequence[str] = ()) -> list[str]:
    """List the parameters that the patterns name, in the model's order; tied ones once, under their first name.

    Args:
        model: the base.
        patterns: `all`, the name of a parameter or of a module that holds it (whole dotted parts, anywhere in the
            name), globs, or regular expressions.
        freeze: patterns taken out again.

    Raises:
        TargetError: a pattern matches nothing, nothing is left, or a parameter is quantised.
    """
    every = dict(model.named_parameters(remove_duplicate=False))
    first = {id(parameter): name for name, parameter in reversed(every.items())}

    def found(pattern: str) -> set[str]:
        names = {n for n in every if pattern == "all" or f".{pattern}." in f".{n}." or pattern_matches(pattern, n)}
        return {first[id(every[name])] for name in names}

    known = ["all", *_endings(name.removesuffix(".weight") for name in every)]
    chosen = _union(patterns, found, "method.targets", "parameter", known)
    chosen -= _union(freeze, found, "method.freeze", "parameter", known)
    if not chosen:
        raise TargetError("no parameter is left to train", where="method.freeze", fix="freeze less")
    for name in chosen:
        if not every[name].is_floating_point():
            raise TargetError("a quantised weight cannot move", where=name, fix="drop model.quantize")
    return [name for name in every if name in chosen]


def _union(
    patterns: Iterable[str], found: Callable[[str], set[str]], where: str, thing: str, known: list[str]
) -> set[str]:
    chosen: set[str] = set()
    for pattern in patterns:
        names = found(pattern)
        if not names:
            near = did_you_mean(pattern.rsplit(".", 1)[-1], known)
            listed = ", ".join(known[:16]) + (", …" if len(known) > 16 else "")
            raise TargetError(
                f"the pattern {pattern!r} matches no {thing} of this model",
                where=where,
                fix=f"did you mean {near!r}?" if near else f"known: {listed}",
            )
        chosen |= names
    return chosen


def _endings(names: Iterable[str]) -> list[str]:
    """List the last parts of dotted names, each once, in order."""
    return list(dict.fromkeys(name.rsplit(".", 1)[-1] for name in names))


def weight_of(linear: nn.Module) -> Float[Tensor, "out in"]:
    """View the weight as (out, in): transposed for Conv1D and embeddings, as a new tensor if it is quantised."""
    weight: Any = linear.weight
    if isinstance(linear, Conv1D | nn.Embedding):
        found: Tensor = weight.t()
        return found
    if getattr(weight, "quant_state", None) is not None:  # bitsandbytes' Linear4bit
        from bitsandbytes.functional import dequantize_4bit

        found = dequantize_4bit(weight.data, weight.quant_state)
        return found
    if weight.dtype is torch.int8:  # bitsandbytes' Linear8bitLt: rows scaled by their largest magnitude
        state: Any = linear.state  # takes the scale over from the weight in the first forward pass
        largest = state.SCB if weight.SCB is None else weight.SCB
        found = weight.data.float() * (largest[:, None].float() / 127)
        return found
    assert isinstance(weight, Tensor)
    return weight


def in_out(linear: nn.Module) -> tuple[int, int]:
    """Give the width of a layer's input (for an embedding: its vocabulary) and of its output."""
    if isinstance(linear, nn.Embedding):
        return linear.num_embeddings, linear.embedding_dim
    if isinstance(linear, Conv1D):
        return linear.weight.shape[0], linear.weight.shape[1]
    assert isinstance(linear, nn.Linear)
    return linear.in_features, linear.out_features
