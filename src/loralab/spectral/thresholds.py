"""Which singular values of a change are kept: those of a dense one above its noise, or as many of a pair as a rank allows.

Legend: ΔW (out, in) a change, s its singular values, β = shorter / longer side, τ the threshold. Source of the threshold: Gavish &
Donoho 2014, The optimal hard threshold for singular values is 4/√3 (1305.5870). For a matrix of low rank under white noise of
unknown size, τ = ω(β) · median(s) with ω(β) = λ*(β) / √μ_β minimises the squared error of what is kept, as the sides grow.
"""

import math
from collections.abc import Mapping
from dataclasses import replace
from functools import lru_cache
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from numpy import ndarray
from scipy.integrate import quad
from scipy.optimize import brentq
from torch import Tensor

from loralab.delta.lowrank import Delta, Dense, LayerDelta, LowRank, rank_sum
from loralab.errors import DeltaError

BULK = 16
"""Fewest singular values whose median may stand for noise; the median of fewer is the signal itself (our choice)."""


@lru_cache(maxsize=256)
def omega(beta: float) -> float:
    """Give ω(β), the threshold in units of the median singular value, for β in (0, 1]; λ* is eq. 11 of the paper.

    The median of the Marchenko–Pastur law is found numerically; the paper's cubic in β is off by up to 0.02.
    """
    if not 0 < beta <= 1:
        raise ValueError(f"shorter / longer side lies in (0, 1], not at {beta}")
    knee = 8 * beta / (beta + 1 + math.sqrt(beta**2 + 14 * beta + 1))
    return math.sqrt((2 * (beta + 1) + knee) / _median(beta))


def _median(beta: float) -> float:
    """Give μ_β, the median of the eigenvalues of a white-noise covariance.

    With t = 1 + β + 2√β cos θ the density of the law becomes (2/π) sin²θ / t on (0, π): smooth, also at β = 1, where the
    law itself has a pole at 0.
    """
    root = 2 * math.sqrt(beta)

    def eigenvalue(theta: float) -> float:
        return 1 + beta + root * math.cos(theta)

    def above(theta: float) -> float:
        share: float = quad(lambda angle: 2 / math.pi * math.sin(angle) ** 2 / eigenvalue(angle), 0, theta)[0]
        return share

    return eigenvalue(brentq(lambda theta: above(theta) - 0.5, 1e-3, math.pi - 1e-6, xtol=1e-13))


def threshold(values: Float[ndarray, " k"], shape: tuple[int, int]) -> float:
    """Give τ for all the singular values of a matrix of this shape, in the values' units."""
    return omega(min(shape) / max(shape)) * float(np.median(values))


@torch.no_grad()
def thresholded(change: Dense, strength: float) -> Dense:
    """Keep of a dense change its singular values above strength · τ, unchanged, and drop the others.

    A change of which all is kept, and one that is a vector or has a side under 16, is given back as it is. The kept part is a
    projection on the leading eigenvectors of the smaller Gram matrix, in float64: half the time of a decomposition, and
    values below 1e-8 of the largest, which rounding decides, are below any threshold that matters.

    Raises:
        DeltaError: the change is not finite.
    """
    if len(change.shape) != 2 or min(change.shape) < BULK:
        return change
    D = change.weight.double()
    if not bool(torch.isfinite(D).all()):
        raise DeltaError("this change is not finite", fix="look for NaN in the tuned weights")
    wide = D.shape[0] <= D.shape[1]
    squares, vectors = torch.linalg.eigh(D @ D.t() if wide else D.t() @ D)
    values = squares.clamp_min(0).sqrt()
    kept = values > strength * threshold(values.cpu().numpy(), (D.shape[0], D.shape[1]))
    if bool(kept.all()):
        return change
    P = vectors[:, kept]
    left = P @ (P.t() @ D) if wide else (D @ P) @ P.t()
    return Dense(left.to(widened(change.weight)))


def widened(tensor: Tensor) -> Tensor:
    """Give a tensor in float32 at least: what half precision holds, exactly."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


@torch.no_grad()
def norm_of(change: LayerDelta) -> float:
    """Give ‖ΔW‖_F in float64; of a pair as that of scale · R Tᵀ with B = Q R and Aᵀ = P T."""
    if isinstance(change, Dense):
        return float(torch.linalg.vector_norm(change.weight, dtype=torch.float64))
    return float(_thin(change)[1].norm())


def _thin(pair: LowRank) -> tuple[Tensor, Tensor, Tensor]:
    """Give Q, scale · R Tᵀ, P of a pair in float64, on the CPU: its change is their product, P transposed."""
    Q, R = torch.linalg.qr(pair.B.cpu().double())
    P, T = torch.linalg.qr(pair.A.cpu().double().t())
    return Q, pair.scale * (R @ T.t()), P


@torch.no_grad()
def compressed(delta: Delta, rank: int | Mapping[str, int]) -> tuple[Delta, pd.DataFrame]:
    """Replace each pair by the best of a smaller rank (Eckart–Young), by two thin QRs in float64, and say what was lost.

    The table has a row per layer: layer, rank_before, rank, discarded (relative to ‖ΔW‖_F), discarded_norm. The norm is that of
    the difference of the stored pairs, so the rounding of the new factors is in it. Pairs that are small enough stay.

    Args:
        delta: every layer a pair.
        rank: the most that a pair may have; or by layer, where layers that are not named stay.

    Raises:
        DeltaError: a layer is dense or not finite, or a rank is below 1.
    """
    layers: dict[str, LayerDelta] = {}
    rows: list[dict[str, Any]] = []
    for name, pair in delta.items():
        if not isinstance(pair, LowRank):
            raise DeltaError("only low-rank pairs are compressed, this layer is dense", where=name)
        most = rank if isinstance(rank, int) else rank.get(name, pair.rank)
        if most < 1:
            raise DeltaError(
                f"a pair has rank 1 or more, not {most}", where=name, fix="to drop the change, scale it by 0"
            )
        small, lost, size = (pair, 0.0, 1.0) if pair.rank <= most else _truncated(name, pair, most)
        layers[name], share = small, lost / size if size else 0.0
        rows.append(
            {"layer": name, "rank_before": pair.rank, "rank": small.rank, "discarded": share, "discarded_norm": lost}
        )
    columns = ["layer", "rank_before", "rank", "discarded", "discarded_norm"]
    return replace(delta, layers=layers), pd.DataFrame(rows, columns=columns)


def _truncated(name: str, pair: LowRank, rank: int) -> tuple[LowRank, float, float]:
    """Give the best pair of a rank, the norm of what it leaves out, and ‖ΔW‖_F."""
    Q, core, P = _thin(pair)
    if not bool(torch.isfinite(core).all()):
        raise DeltaError("this change is not finite", where=name, fix="look for NaN in the adapter")
    U, s, Vh = torch.linalg.svd(core, full_matrices=False)
    scale = pair.scale or 1.0
    root = (s[:rank] / abs(scale)).sqrt()
    A, B = (root[:, None] * Vh[:rank]) @ P.t(), Q @ (U[:, :rank] * root * math.copysign(1, scale))
    small = LowRank(A.to(widened(pair.A)), B.to(widened(pair.B)), scale)
    exact = [LowRank(p.A.double(), p.B.double(), p.scale) for p in (small, replace(pair, scale=-pair.scale))]
    return small, norm_of(rank_sum(exact)), float(s.norm())
