"""A frozen linear layer with low-rank pairs beside it, and the autograd that keeps it lean.

Legend: x (tokens, in), W (out, in) frozen, A (rank, in), B (out, rank), s the pairs' scale,
h = s · (x Aᵀ) (tokens, rank), y = x Wᵀ + bias + h Bᵀ.

Cost per call beyond the base GEMM: two r-wide GEMMs forward, four backward. Saved for backward: x once (a tensor shared by
q, k, v is stored once) and h. The scale touches (tokens, rank) only; the low-rank part is added into the base output in
place. Master A and B stay float32; the r-wide factors, not x, are cast to the compute dtype.
"""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from loralab.delta.lowrank import LowRank


class Pair(nn.Module):
    """One named low-rank pair: A (rank, in), B (out, rank), and the scale of their product."""

    def __init__(self, A: Float[Tensor, "rank in"], B: Float[Tensor, "out rank"], scale: float) -> None:
        super().__init__()
        self.A, self.B, self.scale = nn.Parameter(A), nn.Parameter(B), scale

    def layer_delta(self) -> LowRank:
        """Give the pair as detached float32 tensors."""
        return LowRank(self.A.detach(), self.B.detach(), self.scale)


class LowRankModule(nn.Module):
    """A frozen module and its pairs; `active` names those that take part in the next forward pass."""

    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        self.base = base
        self.pairs = nn.ModuleDict()
        self.active: tuple[str, ...] = ()

    def add_pair(self, name: str, pair: Pair) -> None:
        """Put a pair beside the layer and make it active."""
        self.pairs[name] = pair
        self.active = (*self.active, name)

    def pair(self, name: str) -> Pair:
        """Give one pair by name."""
        found = self.pairs[name]
        assert isinstance(found, Pair)
        return found

    def stacked(self) -> tuple[Float[Tensor, "rank in"], Float[Tensor, "out rank"], float]:
        """Give the active pairs as one: A stacked by rows, B by columns, one scale.

        As in `rank_sum`, a scale that differs from the first goes, as their ratio, into that B.
        """
        pairs = [self.pair(name) for name in self.active]
        scale = pairs[0].scale
        if len(pairs) == 1:
            return pairs[0].A, pairs[0].B, scale
        B = torch.cat([p.B if p.scale == scale else p.B * (p.scale / scale) for p in pairs], dim=1)
        return torch.cat([p.A for p in pairs]), B, scale


class LowRankLinear(LowRankModule):
    """A frozen linear layer (nn.Linear, Conv1D or quantised) with named low-rank pairs.

    Paper: Hu et al. 2021 (2106.09685), eq. 3. Here: several pairs act as one stacked pair; dropout on the input of A
    regenerates its mask in backward from a saved seed instead of storing it.
    """

    def __init__(self, base: nn.Module, weight: Float[Tensor, "out in"] | None, dropout: float = 0.0) -> None:
        """Wrap `base`; `weight` is its (out, in) view, or None where the base must be called (quantised layers)."""
        super().__init__(base)
        self.dropout = dropout
        self._transposed = weight is not None and weight is not getattr(base, "weight", None)
        self._callable_only = weight is None

    def forward(self, x: Float[Tensor, "*batch in"]) -> Float[Tensor, "*batch out"]:
        if not self.active:
            return self.base(x)
        A, B, scale = self.stacked()
        dropout = self.dropout if self.training else 0.0
        if self._callable_only:
            return self._through_base(x, A, B, scale, dropout)
        base: Any = self.base
        weight = base.weight.t() if self._transposed else base.weight
        seed = int(torch.randint(2**62, ()).item()) if dropout else 0
        return _LowRankLinear.apply(x, weight, base.bias, A, B, scale, dropout, seed)

    def _through_base(self, x: Tensor, A: Tensor, B: Tensor, scale: float, dropout: float) -> Tensor:
        """Do the same with plain autograd where only the base itself can multiply by its weight."""
        y = self.base(x)
        h = F.linear(F.dropout(x, dropout), A.to(x.dtype)) * scale
        return y + F.linear(h, B.to(x.dtype)).to(y.dtype)


class LowRankEmbedding(LowRankModule):
    """A frozen embedding with low-rank pairs: row i of the table gains scale · B A[:, i].

    Legend: A (rank, vocab), B (dim, rank), as PEFT stores them in `lora_embedding_A` and `lora_embedding_B`.
    """

    def forward(self, ids: Tensor) -> Float[Tensor, "*batch dim"]:
        rows = self.base(ids)
        if not self.active:
            return rows
        A, B, scale = self.stacked()
        h = F.embedding(ids, A.t()) * scale
        gain = getattr(self.base, "embed_scale", 1.0)
        return rows + (F.linear(h, B) * gain).to(rows.dtype)


def _limit(dropout: float) -> int:
    """Give the share that is dropped in units of 2⁻¹⁶; some always stays."""
    return min(round(dropout * 2**16), 2**16 - 1)


def _kept(tokens: int, inputs: int, dropout: float, seed: int, device: torch.device) -> Tensor | None:
    """Draw which of tokens × inputs stay: the same for a seed. None is all.

    On a CPU sixteen random bits an entry are compared with the limit, several times faster than a random float for each.
    """
    if not (limit := _limit(dropout)):
        return None
    count, generator = tokens * inputs, torch.Generator(device).manual_seed(seed)
    if device.type != "cpu":
        return torch.rand(tokens, inputs, device=device, generator=generator) >= limit / 2**16
    words = torch.empty(count // 4 + 1, dtype=torch.int64).random_(-(2**63), None, generator=generator)
    return words.view(torch.int16)[:count].view(tokens, inputs) >= limit - 2**15


def _dropped(x: Tensor, kept: Tensor | None) -> Tensor:
    """Zero the other entries; `_rescaled` makes up for them."""
    return x if kept is None else torch.where(kept, x, 0)


def _rescaled(scale: float, dropout: float) -> float:
    """Divide the scale by the share that is kept."""
    return scale / (1 - _limit(dropout) / 2**16)


def _compute_forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, A: Tensor, B: Tensor, scale: float, dropout: float, seed: int
) -> tuple[Tensor, Tensor]:
    """Compute y (tokens, out) and h (tokens, rank) for x (tokens, in)."""
    y = torch.mm(x, weight.t()) if bias is None else torch.addmm(bias, x, weight.t())
    kept = _kept(len(x), x.shape[1], dropout, seed, x.device)
    h = torch.mm(_dropped(x, kept), A.to(x.dtype).t()).mul_(_rescaled(scale, dropout))
    y.addmm_(h, B.to(x.dtype).t())
    return y, h


# One opaque operator, so that selective recomputation keeps its outputs and torch.compile does not look inside.
_library = torch.library.Library("loralab", "FRAGMENT")
_library.define(
    "low_rank_linear(Tensor x, Tensor weight, Tensor? bias, Tensor A, Tensor B, float scale, float dropout, int seed)"
    " -> (Tensor, Tensor)"
)
_library.impl("low_rank_linear", _compute_forward, "CompositeExplicitAutograd")


@torch.library.register_fake("loralab::low_rank_linear", lib=_library)
def _fake_forward(x: Tensor, weight: Tensor, bias: Any, A: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape[0], weight.shape[0]), x.new_empty(x.shape[0], A.shape[0])


class _LowRankLinear(torch.autograd.Function):
    """y = x Wᵀ + bias + s · (x Aᵀ) Bᵀ, saving x and h; gradients for x, bias, A and B."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        A: Tensor,
        B: Tensor,
        scale: float,
        dropout: float,
        seed: int,
    ) -> Tensor:
        flat = x.reshape(-1, x.shape[-1])
        y, h = torch.ops.loralab.low_rank_linear(flat, weight, bias, A, B, scale, dropout, seed)
        # x is needed for A's gradient only, h for B's: a frozen factor keeps nothing.
        trains_A, trains_B = ctx.needs_input_grad[3:5]
        ctx.save_for_backward(flat if trains_A else None, h if trains_B else None, weight, A, B)
        ctx.scale, ctx.dropout, ctx.seed, ctx.shape = scale, dropout, seed, x.shape
        return y.view(*x.shape[:-1], y.shape[-1])

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dy: Tensor) -> Any:
        x, h, weight, A, B = ctx.saved_tensors
        needs_x, _, needs_bias, needs_A, needs_B = ctx.needs_input_grad[:5]
        dy = dy.reshape(-1, dy.shape[-1])
        dx = dbias = dA = dB = None
        if needs_B:
            dB = torch.mm(dy.t(), h).to(B.dtype)
        if needs_A or needs_x:
            dh = torch.mm(dy, B.to(dy.dtype)).mul_(_rescaled(ctx.scale, ctx.dropout))
            kept = _kept(len(dy), A.shape[1], ctx.dropout, ctx.seed, dy.device)
        if needs_A:
            dA = torch.mm(dh.t(), _dropped(x, kept)).to(A.dtype)
        if needs_x:
            dx = torch.mm(dy, weight)
            if kept is not None:
                dx += _dropped(torch.mm(dh, A.to(dy.dtype)), kept)
            else:
                dx.addmm_(dh, A.to(dy.dtype))
            dx = dx.view(ctx.shape)
        if needs_bias:
            dbias = dy.sum(0)
        return dx, None, dbias, dA, dB, None, None, None
