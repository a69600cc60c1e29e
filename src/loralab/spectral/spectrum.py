"""The spectrum of a delta: how large each change is and over how many directions it is spread.

Legend: s the singular values of one change ΔW (out, in); energy the sum of their squares, ‖ΔW‖²_F. All is computed on the CPU, so
the numbers do not depend on where the delta lies. Ranks of numbers that are not finite are NaN, those of a zero change are 0.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from numpy import ndarray
from torch import Tensor

from loralab.delta.lowrank import Delta, Dense, LayerDelta, LowRank
from loralab.errors import DeltaError

LIMIT = 2**22
"""Elements of the largest dense matrix (2048 x 2048) that `table` decomposes unasked."""

FLOAT64_SIDE = 2048
"""Shorter side up to which a dense matrix is decomposed in float64; above it float32 saves time and half the memory."""

TIE = 1e-12
"""Share of the energy that rounding may take: n equal values hold exactly k/n in k of them."""

COLUMNS = (
    *("layer", "module", "depth", "out_features", "in_features", "rank", "rank90", "effective_rank", "stable_rank"),
    *("frobenius", "spectral", "base_frobenius", "relative_norm", "singular_values"),
)


@torch.no_grad()
def spectrum(change: LayerDelta) -> Float[ndarray, " k"]:
    """Give the singular values of one change, largest first: k = min(out, in), for a pair min(rank, out, in).

    A pair never forms out x in: with thin QRs B = Q R and Aᵀ = P T, the values of scale · B A are those of the small core
    scale · R Tᵀ, in float64. This takes the stacked pairs of a chain as well; where its links cancel, what is left below the
    rounding of their products is 0. A dense change is decomposed whole, in float64, or in float32 (and no finer than float32
    is) where both sides exceed 2048.

    Raises:
        DeltaError: the change is not a matrix. Numbers that are not finite give NaN for all values instead.
    """
    if len(change.shape) != 2:
        raise DeltaError(f"only a matrix has a spectrum, this change is {change.shape}")
    matrix, floor = _core(change) if isinstance(change, LowRank) else (_widened(change), 0.0)
    if not bool(torch.isfinite(matrix).all()):
        return np.full(min(matrix.shape), np.nan)
    values = torch.linalg.svdvals(matrix).double().numpy()
    values[values <= floor] = 0.0
    return values


def _core(pair: LowRank) -> tuple[Tensor, float]:
    """Give the core of a pair, and the size below which its values are rounding.

    QR and the product err by float64's unit times the norms of each column of B and its row of A; their sum bounds s₁ from
    above and does not move when a factor is exchanged between A and B.
    """
    R = torch.linalg.qr(pair.B.cpu().double(), mode="r").R
    T = torch.linalg.qr(pair.A.cpu().double().t(), mode="r").R
    reach = abs(pair.scale) * float(R.norm(dim=0) @ T.norm(dim=0))
    return pair.scale * (R @ T.t()), torch.finfo(torch.float64).eps * max(pair.shape) * reach


def _widened(change: Dense) -> Tensor:
    exact = min(change.shape) <= FLOAT64_SIDE
    return change.weight.cpu().to(torch.float64 if exact else torch.float32)


def rank_share(s: Float[ndarray, " k"], share: float = 0.9) -> float:
    """Give the smallest number of directions that hold a share of the energy, in (0, 1].

    Source: Biderman et al. 2024 (2405.09673), rank_90(M) = min k such that Σ_{i≤k} sᵢ² / Σ sᵢ² ≥ 0.9.
    """
    if not 0 < share <= 1:
        raise ValueError(f"a share lies in (0, 1], not at {share}")
    energy = np.cumsum(_relative(s) ** 2)
    if not energy.size:
        return 0.0
    if np.isnan(energy[-1]):
        return math.nan
    return float(np.searchsorted(energy, share * energy[-1] * (1 - TIE)) + 1)


def effective_rank(s: Float[ndarray, " k"]) -> float:
    """Give exp(−Σ pᵢ ln pᵢ) with pᵢ = sᵢ / Σ s: the number of equal values that are spread as much.

    Source: Roy & Vetterli 2007, The effective rank. It lies between 1 and the number of values that are not 0.
    """
    relative = _relative(s)
    if not relative.size:
        return 0.0
    total = float(relative.sum())
    return total * math.exp(-float(relative @ np.log(relative)) / total)


def stable_rank(s: Float[ndarray, " k"]) -> float:
    """Give ‖ΔW‖²_F / s₁²: the energy in units of the largest direction's, between 1 and the rank."""
    return float((_relative(s) ** 2).sum())


def _relative(s: Float[ndarray, " k"]) -> Float[ndarray, " m"]:
    """Give the values above 0 as shares of the largest, falling, so that no square overflows; one NaN if s is not finite."""
    if not np.isfinite(s).all():
        return np.array([math.nan])
    relative = np.sort(s[s > 0])[::-1]
    relative = relative / relative[:1]
    return relative[relative > 0]


def table(
    delta: Delta, weights: Mapping[str, Tensor] | Callable[[str], Tensor], *, exact: bool = False
) -> tuple[pd.DataFrame, list[str]]:
    """Measure every matrix of a delta: one row each, in the delta's order, and the names of those left out for their cost.

    Columns: layer (full name), module (its last part), depth (its first part that is a number, or −1), out_features,
    in_features, rank (the most directions the change can have), rank90, effective_rank, stable_rank, frobenius, spectral (s₁),
    base_frobenius, relative_norm (frobenius / base_frobenius, NaN for a zero base), singular_values (list). Vectors have no
    row; a matrix with numbers that are not finite has one with NaN.

    Args:
        delta: of any method; what it holds whole beside its layers (norms, biases, heads) is left out.
        weights: layer name → base weight (out, in), as `weight_of` views it.
        exact: decompose dense matrices of more than 2²² elements too; the time grows with the cube of their side.

    Raises:
        DeltaError: the base lacks a layer, or has it in another shape.
    """
    rows, left_out = [], []
    for name, change in delta.items():
        if len(change.shape) != 2:
            continue
        if isinstance(change, Dense) and change.num_parameters > LIMIT and not exact:
            left_out.append(name)
            continue
        rows.append(_row(name, change, _size(name, change, weights)))
    return pd.DataFrame(rows, columns=list(COLUMNS)), left_out


def _row(name: str, change: LayerDelta, base_frobenius: float) -> dict[str, Any]:
    s = spectrum(change)
    parts = name.split(".")
    frobenius = math.hypot(*s)
    return {
        "layer": name,
        "module": parts[-1],
        "depth": next((int(part) for part in parts if part.isdecimal()), -1),
        "out_features": change.shape[0],
        "in_features": change.shape[1],
        "rank": s.size,
        "rank90": rank_share(s),
        "effective_rank": effective_rank(s),
        "stable_rank": stable_rank(s),
        "frobenius": frobenius,
        "spectral": float(s.max(initial=0.0)),
        "base_frobenius": base_frobenius,
        "relative_norm": frobenius / base_frobenius if base_frobenius else math.nan,
        "singular_values": s.tolist(),
    }


@torch.no_grad()
def _size(name: str, change: LayerDelta, weights: Mapping[str, Tensor] | Callable[[str], Tensor]) -> float:
    """Give ‖W‖_F of the base weight of a layer: rows in float32 where the weight lies, their sum in float64."""
    try:
        weight = weights[name] if isinstance(weights, Mapping) else weights(name)
    except KeyError:
        raise DeltaError(
            "the base has no such layer", where=name, fix="use the base that the delta was made on"
        ) from None
    if tuple(weight.shape) != tuple(change.shape):
        raise DeltaError(f"the delta is {tuple(change.shape)}, the weight {tuple(weight.shape)}", where=name)
    # A few rows at a time, as they are stored: a half-precision weight is widened within the cache, not as a whole.
    stored = weight if weight.is_contiguous() else weight.t()
    rows = torch.cat([torch.linalg.vector_norm(part.float(), dim=1) for part in stored.split(256)])
    return float(rows.cpu().double().norm())
