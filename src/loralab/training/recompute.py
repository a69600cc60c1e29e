"""What the backward pass computes again instead of keeping.

`selective` keeps the outputs of matrix products and of attention, and recomputes norms, activations, rotary positions and
other cheap operations: per token and block that leaves about 2h (residuals) + h + 2kv (q, k, v) + h (attention) + 2i (gate,
up) + Σ ranks numbers. `full` keeps only the input of each block, at the price of a second forward pass.
"""

from typing import Any, Literal

import torch
from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts
from transformers import PreTrainedModel

from loralab.errors import ModelError

_KEPT_NAMES = (
    "mm",
    "addmm",
    "_scaled_dot_product_flash_attention_for_cpu",
    "_scaled_dot_product_flash_attention",
    "_scaled_dot_product_efficient_attention",
    "_scaled_dot_product_cudnn_attention",
    "_scaled_dot_product_fused_attention_overrideable",
)
_KEPT = {getattr(torch.ops.aten, name).default for name in _KEPT_NAMES if hasattr(torch.ops.aten, name)}


def _ours() -> tuple[Any, ...]:
    return torch.ops.loralab.low_rank_linear.default, torch.ops.loralab.document_attention.default


def _policy(_context: Any, operator: Any, *_inputs: Any, **_named: Any) -> CheckpointPolicy:
    kept = operator in _KEPT or operator in _ours()
    return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE


def _contexts() -> Any:
    return create_selective_checkpoint_contexts(_policy)


def recompute_(model: PreTrainedModel, how: Literal["none", "selective", "full"]) -> None:
    """Set what the blocks of a model recompute in backward.

    Raises:
        ModelError: the architecture offers no recomputation.
    """
    if how == "none":
        return
    if not model.supports_gradient_checkpointing:
        raise ModelError(
            f"{type(model).__name__} cannot recompute its blocks",
            where="train.recompute",
            fix="set train.recompute=none",
        )
    extra = {"context_fn": _contexts} if how == "selective" else {}
    model.activation_checkpointing_enable({"use_reentrant": False, **extra})
