"""One merge, in float32 from W₀, rounded once, with its errors measured.

Chains are never merged link by link: ten rounded merges of a small delta in bfloat16 lose most of it, one loses a
rounding.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from loralab.base.targets import weight_of
from loralab.delta.layers import set_whole_
from loralab.delta.lowrank import Delta, LayerDelta
from loralab.errors import DeltaError


@dataclass(frozen=True)
class LayerMerge:
    """How exactly one weight took its delta. Errors are norms relative to the delta's norm."""

    name: str
    float32_error: float
    """Of W₀ + ΔW in float32 against float64."""
    rounded_error: float
    """Of the stored weight against float64."""
    half_ulp_error: float
    """What rounding the exact sum to the stored dtype once must lose; `rounded_error` equals it."""
    unchanged_share: float
    """Share of the weight's numbers that the rounding left as they were."""


def merged_weight(weight: Tensor, change: LayerDelta, dtype: torch.dtype, name: str = "") -> tuple[Tensor, LayerMerge]:
    """Give the (out, in) weight plus its delta, rounded to `dtype`, and the errors of it.

    Raises:
        DeltaError: shapes differ, or the sum is not finite.
    """
    if tuple(weight.shape) != tuple(change.shape):
        raise DeltaError(f"the delta is {tuple(change.shape)}, the weight {tuple(weight.shape)}", where=name)
    moved = change.dense(torch.float64)
    exact = weight.double() + moved
    in_float32 = weight.float() + change.dense(torch.float32)
    stored = in_float32.to(dtype)
    if not bool(torch.isfinite(stored).all()):
        raise DeltaError("the merged weight is not finite", where=name, fix="look for NaN in the adapter")
    size = float(moved.norm()) or 1.0
    error = LayerMerge(
        name,
        float((in_float32.double() - exact).norm()) / size,
        float((stored.double() - exact).norm()) / size,
        float((exact.to(dtype).double() - exact).norm()) / size,
        float((stored == weight).double().mean()),
    )
    return stored, error


@torch.no_grad()
def merge_(model: nn.Module, delta: Delta, dtype: torch.dtype | None = None) -> list[LayerMerge]:
    """Write a delta into the model's own weights, each rounded once to `dtype`, and give the errors.

    Args:
        model: weights in `dtype` or a wider one.
        delta: of this model.
        dtype: that the weights are stored in later; None is the weights' own.

    Raises:
        DeltaError: a layer is missing or quantised, shapes differ, or a sum is not finite.
    """
    errors = []
    if not delta.keeps_ties:
        _untie_(model, {*delta, *(name.rpartition(".")[0] for name in delta.whole)})
    set_whole_(model, delta)
    for name, change in delta.items():
        module: Any = model.get_submodule(name)
        weight = weight_of(module)
        if weight.data_ptr() != module.weight.data_ptr():
            raise DeltaError(
                "a quantised weight cannot take a delta exactly",
                where=name,
                fix="load the base without model.quantize to merge",
            )
        stored, error = merged_weight(weight, change, dtype or weight.dtype, name)
        weight.copy_(stored)
        errors.append(error)
    return errors


def _untie_(model: Any, touched: set[str]) -> None:
    """Give the head its own copy of a table that it shares with the embedding, if only one of the two changes."""
    table, head = model.get_input_embeddings(), model.get_output_embeddings()
    if head is None or head.weight is not table.weight:
        return
    if any(name in touched for name, module in model.named_modules() if module is table or module is head):
        head.weight = nn.Parameter(head.weight.detach().clone(), requires_grad=False)
        model.config.tie_word_embeddings = False
