"""Attention within documents that lie side by side in one row: torch's variable-length kernel, or tiles.

On CUDA the variable-length kernel takes what it can; the rest goes through tiles: a block of query rows against the keys it
may see. Only q, k and v are saved; the probabilities are recomputed in backward tile by tile, so the T×T matrix never
exists (the idea of FlashAttention-2, Dao 2023, 2307.08691, with whole score rows instead of a running softmax). On a CPU
this is faster than fused SDPA for each document in bfloat16, and in float32 for all but the shortest ones.

Legend: T tokens, H query heads, G key heads, D head size; q (T, H, D), k and v (T, G, D); P probabilities, S scores,
O output, d before a letter its gradient.
"""

import inspect
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from loralab.base.tiles import Tile, bias_template, document_tiles, tree_biases, tree_tiles


class _Rule(NamedTuple):
    """Who sees whom, and how scores become probabilities. `window` w: only keys less than w positions away."""

    lengths: tuple[int, ...]
    parents: tuple[int, ...]
    causal: bool
    window: int | None
    scale: float
    softcap: float | None
    dropout: float
    seed: int


class _TiledRow:
    """One packed row cut into tiles; the forward and the backward pass walk the same tiles in the same order."""

    def __init__(self, q: Tensor, k: Tensor, rule: _Rule) -> None:
        self.q, self.k, self.rule = q, k, rule
        self.groups, self.repeats = k.shape[1], q.shape[1] // k.shape[1]
        # Blocks that stay in a core's cache, measured; on an accelerator few launches matter more.
        block = 256 // q.element_size() if q.device.type == "cpu" else 512
        if rule.parents:
            block = max(block, 128)  # trees are small and branch: fewer, larger tiles are faster, measured
            segments = rule.lengths, rule.parents, block
            self.tiles = tree_tiles(*segments)
            self.biases: Iterable[Tensor] = tree_biases(*segments, self.repeats, rule.window, q.dtype, q.device)
        else:
            self.tiles = document_tiles(rule.lengths, rule.causal, rule.window, block)
            self.biases = self._template_biases(block)
        self.generator = torch.Generator(q.device).manual_seed(rule.seed) if rule.dropout else None

    def _template_biases(self, block: int) -> Iterable[Tensor]:
        """View the bias of each tile in one that serves all: within a document only distances count."""
        rule, q = self.rule, self.q
        left = max(tile.start - tile.spans[0][0] for tile in self.tiles)
        right = max(tile.spans[0][1] - tile.stop for tile in self.tiles)
        template = bias_template(block, self.repeats, left, right, rule.causal, rule.window, q.dtype, q.device)
        for tile in self.tiles:
            shift, rows = left - tile.start, (tile.stop - tile.start) * self.repeats
            first, last = tile.spans[0]
            yield template[:rows, shift + first : shift + last]

    def __iter__(self) -> Iterator[tuple[Tile, Tensor]]:
        """Walk the tiles, each with its bias."""
        return zip(self.tiles, self.biases, strict=True)

    def rows(self, x: Float[Tensor, "T H D"], tile: Tile) -> Float[Tensor, "G rows D"]:
        """Take the tile's rows of x with the heads of one key head below each other."""
        part = x[tile.start : tile.stop].unflatten(1, (self.groups, self.repeats))
        return part.transpose(0, 1).reshape(self.groups, -1, x.shape[2])

    def put(self, out: Float[Tensor, "T H D"], tile: Tile, rows: Float[Tensor, "G rows D"]) -> None:
        """Write rows back to where `rows` took them."""
        place = out[tile.start : tile.stop].unflatten(1, (self.groups, self.repeats))
        place.copy_(rows.view(self.groups, -1, self.repeats, out.shape[2]).transpose(0, 1))

    def columns(self, x: Float[Tensor, "T G D"], tile: Tile) -> Float[Tensor, "G columns D"]:
        """Take the keys or values that the tile sees; a view of them where they lie side by side."""
        parts = [x[first:last] for first, last in tile.spans]
        return (parts[0] if len(parts) == 1 else torch.cat(parts)).transpose(0, 1)

    def add(self, total: Float[Tensor, "T G D"], tile: Tile, columns: Float[Tensor, "G columns D"]) -> None:
        """Add columns to where `columns` took them."""
        begin = 0
        for first, last in tile.spans:
            end = begin + last - first
            total[first:last].transpose(0, 1).add_(columns[:, begin:end])
            begin = end

    def probabilities(self, tile: Tile, bias: Tensor) -> tuple[Tensor, Tensor | None]:
        """Compute softmax(scores) (G, rows, columns), and tanh of the scaled scores where they are capped."""
        rows, keys = self.rows(self.q, tile), self.columns(self.k, tile).transpose(1, 2)
        scale, cap = self.rule.scale, self.rule.softcap
        if cap is None:
            return torch.softmax(torch.baddbmm(bias, rows, keys, alpha=scale), -1), None
        bent = torch.baddbmm(bias, rows, keys, beta=0, alpha=scale / cap).tanh_()
        return torch.softmax(torch.add(bias, bent, alpha=cap), -1), bent

    def kept(self, probabilities: Tensor) -> Tensor | None:
        """Draw the dropout mask of the next tile, already divided by the share that is kept."""
        if self.generator is None:
            return None
        share = 1 - self.rule.dropout
        return torch.empty_like(probabilities).bernoulli_(share, generator=self.generator).div_(share)


def _tiled_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lengths: Sequence[int],
    parents: Sequence[int],
    causal: bool,
    window: int | None,
    scale: float,
    softcap: float | None,
    dropout: float,
    seed: int,
) -> Tensor:
    row = _TiledRow(q, k, _Rule(tuple(lengths), tuple(parents), causal, window, scale, softcap, dropout, seed))
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    for tile, bias in row:
        P, _ = row.probabilities(tile, bias)
        if (kept := row.kept(P)) is not None:
            P = P.mul_(kept)
        row.put(out, tile, torch.bmm(P, row.columns(v, tile)))
    return out


# One opaque operator, so that selective recomputation keeps its output and torch.compile does not look inside.
_library = torch.library.Library("loralab", "FRAGMENT")
_library.define(
    "document_attention(Tensor q, Tensor k, Tensor v, int[] lengths, int[] parents, bool causal, int? window,"
    " float scale, float? softcap, float dropout, int seed) -> Tensor"
)
_library.impl("document_attention", _tiled_forward, "CompositeExplicitAutograd")


@torch.library.register_fake("loralab::document_attention", lib=_library)
def _fake_forward(q: Tensor, *_: Any) -> Tensor:
    return torch.empty(q.shape, dtype=q.dtype, device=q.device)


class _TiledAttention(torch.autograd.Function):
    """O = P V with P = softmax(cap(scale · Q Kᵀ)), document by document; P is recomputed in backward."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, rule: _Rule) -> Tensor:
        ctx.save_for_backward(q, k, v)
        ctx.rule = rule
        out: Tensor = torch.ops.loralab.document_attention(q, k, v, *rule)
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dO: Tensor) -> Any:
        q, k, v = ctx.saved_tensors
        row = _TiledRow(q, k, ctx.rule)
        dq = torch.empty(q.shape, dtype=q.dtype, device=q.device)
        # Keys are seen by several tiles: their gradients are summed in at least float32.
        wide = torch.promote_types(k.dtype, torch.float32)
        dk, dv = (torch.zeros(k.shape, dtype=wide, device=k.device) for _ in range(2))
        for tile, bias in row:
            P, bent = row.probabilities(tile, bias)
            kept = row.kept(P)
            dO_rows = row.rows(dO, tile)
            dP = torch.bmm(dO_rows, row.columns(v, tile).transpose(1, 2))
            if kept is not None:
                dP.mul_(kept)
            row.add(dv, tile, torch.bmm((P if kept is None else P * kept).transpose(1, 2), dO_rows))
            dS = torch._softmax_backward_data(dP, P, -1, P.dtype)
            if bent is not None:
                dS.mul_(bent.square_().neg_().add_(1))
            row.put(dq, tile, torch.bmm(dS, row.columns(k, tile)))
            row.add(dk, tile, torch.bmm(dS.transpose(1, 2), row.rows(q, tile)))
        return dq.mul_(row.rule.scale), dk.mul_(row.rule.scale).to(k.dtype), dv.to(v.dtype), None


def document_attention(
    q: Float[Tensor, "T H D"],
    k: Float[Tensor, "T G D"],
    v: Float[Tensor, "T G D"],
    lengths: tuple[int, ...],
    parents: tuple[int, ...] = (),
    *,
    causal: bool = True,
    window: int | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    dropout: float = 0.0,
) -> Float[Tensor, "T H D"]:
    """Attend within each document of a packed row.

    Args:
        q: queries, H a multiple of G.
        k: keys.
        v: values.
        lengths: tokens of each document, or of each segment of trees; their sum is T.
        parents: for each segment the number of the one that it continues, which lies before it, or -1; none of it means
            that every segment is a document.
        causal: whether a token sees only itself and what lies before it; trees are always causal.
        window: see only keys less than this many positions away.
        scale: of the scores; None is 1/√D.
        softcap: c · tanh(score / c) before the softmax (Gemma 2, 2408.00118).
        dropout: of the probabilities; its mask is drawn from torch's global generator through a seed.
    """
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    if max(parents, default=-1) < 0:
        parents = ()
    if not parents and q.is_cuda and q.dtype in (torch.bfloat16, torch.float16) and softcap is None and not dropout:
        kernel = _varlen_kernel()
        if kernel is not None and q.shape[-1] <= 256:
            grouped = k.shape[1] != q.shape[1]
            named = varlen_arguments(lengths, causal, window, q.device)
            packed: Tensor = kernel(q, k, v, **named, scale=scale, enable_gqa=grouped)
            return packed
    seed = int(torch.randint(2**62, ())) if dropout else 0
    out: Tensor = _TiledAttention.apply(q, k, v, _Rule(lengths, parents, causal, window, scale, softcap, dropout, seed))
    return out


@lru_cache(maxsize=1)
def _varlen_kernel() -> Callable[..., Any] | None:
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:  # torch below 2.10
        return None
    # Its first release had neither windows nor grouped heads.
    known = inspect.signature(varlen_attn).parameters
    return varlen_attn if {"window_size", "enable_gqa", "scale"} <= known.keys() else None


def varlen_arguments(
    lengths: tuple[int, ...], causal: bool, window: int | None, device: torch.device
) -> dict[str, Any]:
    """Describe the documents to torch's variable-length kernel: offsets, longest document, visible span (inclusive)."""
    offsets, span = _offsets(lengths, device), -1 if window is None else window - 1
    return {
        "cu_seq_q": offsets,
        "cu_seq_k": offsets,
        "max_q": max(lengths),
        "max_k": max(lengths),
        "window_size": (span, 0 if causal else span),
    }


@lru_cache(maxsize=16)
def _offsets(lengths: tuple[int, ...], device: torch.device) -> Int[Tensor, " documents_and_one"]:
    ends = torch.tensor((0, *lengths), dtype=torch.int32).cumsum(0, dtype=torch.int32)
    return ends.to(device)
