"""Attention as Transformers calls it, registered there under the name `loralab`.

`document_mask(lengths)` travels in the slot of the attention mask: an integer tensor (1, 1, 1, documents), which
Transformers hands to every layer untouched, as it does with any 4-D mask. Every token then sees its own document only, or,
where documents are trees of segments (1, 1, 2, segments), its own segment and those that it continues.
Without it, attention is Transformers' `sdpa`; for models that cap their scores, which `sdpa` refuses, plain matrix products.
"""

from collections.abc import MutableMapping, Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from loralab.base.packed import document_attention
from loralab.errors import ModelError

NAME = "loralab"

_layout_of: MutableMapping[Tensor, tuple[tuple[int, ...], ...]] = WeakTensorKeyDictionary()


def document_mask(
    lengths: Sequence[int], device: torch.device | str = "cpu", parents: Sequence[int] = ()
) -> Int[Tensor, "1 1 lines segments"]:
    """Make the attention mask of a packed row: the tokens of each document, in order.

    Pass it as `attention_mask` with `position_ids` that restart in every document and `use_cache=False`. With `parents` the
    documents are segments of trees: each names the one that it continues, or -1, and its positions go on from there.
    """
    layout = (tuple(lengths), tuple(parents)) if len(parents) else (tuple(lengths),)
    mask = torch.tensor(layout, dtype=torch.int32, device=device).view(1, 1, len(layout), -1)
    _layout_of[mask] = layout
    return mask


def _document_layout(mask: Tensor) -> tuple[tuple[int, ...], ...]:
    # A mask that was copied on its way (to another device, say) is read once per forward pass, not once per layer.
    if mask not in _layout_of:
        _layout_of[mask] = tuple(tuple(line) for line in mask[0, 0].tolist())
    return _layout_of[mask]


def attention(
    module: nn.Module,
    query: Float[Tensor, "batch H rows D"],
    key: Float[Tensor, "batch G columns D"],
    value: Float[Tensor, "batch G columns D"],
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **others: Any,
) -> tuple[Float[Tensor, "batch rows H D"], None]:
    """Attend as Transformers asks its attention functions to: packed where the mask is a document mask, else as `sdpa`.

    Raises:
        ModelError: a packed row with a cache, several rows, or attention sinks or position biases.
    """
    causal = bool(getattr(module, "is_causal", True) if is_causal is None else is_causal)
    if attention_mask is not None and not (attention_mask.is_floating_point() or attention_mask.dtype is torch.bool):
        layout = _document_layout(attention_mask)
        _refuse_unpackable(query, key, layout[0], others)
        q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
        out = document_attention(
            q, k, v, *layout, causal=causal, window=sliding_window, scale=scaling, softcap=softcap, dropout=dropout
        )
        return out[None], None
    if softcap is not None:
        scale = query.shape[-1] ** -0.5 if scaling is None else scaling
        return _capped(query, key, value, attention_mask, causal, scale, softcap, dropout), None
    found: tuple[Tensor, None] = sdpa_attention_forward(
        module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, is_causal=is_causal, **others
    )
    return found


def _refuse_unpackable(query: Tensor, key: Tensor, lengths: tuple[int, ...], others: dict[str, Any]) -> None:
    fix = "set data.packing=false"
    for name in ("position_bias", "s_aux"):
        if others.get(name) is not None:
            raise ModelError(f"this model's attention uses `{name}`, which packed documents do not support", fix=fix)
    if query.shape[0] != 1 or not query.shape[2] == key.shape[2] == sum(lengths):
        raise ModelError(
            f"the documents have {sum(lengths)} tokens, but attention sees {query.shape[0]} rows of {query.shape[2]}"
            f" queries and {key.shape[2]} keys",
            fix="pass one row, the lengths of all its documents, and use_cache=False",
        )


def _capped(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    causal: bool,
    scale: float,
    softcap: float,
    dropout: float,
) -> Float[Tensor, "batch rows H D"]:
    """Attend with capped scores to what `sdpa`'s mask shows; no mask means causal from the first key on, or all."""
    rows, columns = query.shape[2], key.shape[2]
    if mask is None and causal and rows > 1:
        mask = torch.ones(rows, columns, dtype=torch.bool, device=query.device).tril_()[None, None]
    grouped = query.unflatten(1, (key.shape[1], -1))
    scores = softcap * torch.tanh(grouped @ key[:, :, None].transpose(-1, -2) * (scale / softcap))
    if mask is not None and mask.dtype is torch.bool:
        # The lowest number, not -inf: a row of padding that sees nothing must not become NaN.
        scores = scores.masked_fill(~mask[:, :, None], torch.finfo(scores.dtype).min)
    elif mask is not None:
        scores = scores + mask[:, :, None]
    P = nn.functional.dropout(torch.softmax(scores, -1, dtype=torch.float32).to(query.dtype), dropout)
    return (P @ value[:, :, None]).flatten(1, 2).transpose(1, 2).contiguous()


@torch.no_grad()
def packs(model: PreTrainedModel) -> bool:
    """Prove on the model itself that packed documents do not see each other and read their own positions.

    A document must have the same hidden states behind one document as behind another, and as alone. False for models with
    a state or convolution along the row, with attention of their own, or with unusual positions: they need one document
    per row.
    """
    if model.config._attn_implementation != NAME:
        return False
    inner, was_training = model.base_model, model.training
    first, second = 4, 5
    one = torch.arange(3, 3 + first + second, device=model.device)[None] % model.config.get_text_config().vocab_size
    other = torch.cat([one[:, :first].flip(1), one[:, first:]], 1)
    positions = torch.cat([torch.arange(length, device=model.device) for length in (first, second)])[None]
    packed = {"position_ids": positions, "attention_mask": document_mask((first, second), model.device)}
    model.eval()
    try:
        alone = inner(input_ids=one[:, first:], use_cache=False).last_hidden_state
        behind_one, behind_other = (
            inner(input_ids=tokens, **packed, use_cache=False).last_hidden_state[:, first:] for tokens in (one, other)
        )
    finally:
        model.train(was_training)
    # What lies before may change nothing but rounding; alone, the shapes differ and with them the order of sums.
    step, largest = torch.finfo(alone.dtype).eps, alone.abs().max()
    isolated = (behind_one - behind_other).abs().max() <= 4 * step * largest
    return bool(isolated and (behind_one - alone).abs().max() <= step**0.5 * largest)


AttentionInterface.register(NAME, attention)
AttentionMaskInterface.register(NAME, sdpa_mask)
