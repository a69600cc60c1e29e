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
from loralab.spectral.krylov import Triplets, lanczos
from loralab.spectral.products import Matrix

LIMIT = 2**22
"""Elements of the largest dense matrix (2048 x 2048) that `table` decomposes unasked."""

FLOAT64_SIDE = 2048
"""Shorter side up to which a dense matrix is decomposed in float64; above it float32 saves time and half the memory."""

TIE = 1e-12
"""Share of the energy that rounding may take: n equal values hold exactly k/n in k of them."""

LEADING = 32
"""Triplets computed of a dense matrix that is larger: more bound its ranks little better, and take longer to converge."""

CERTAIN = 1e-4
"""Residual, as a share of s₁, up to which one of them is kept: a singular value lies that near."""

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


def is_large(change: LayerDelta) -> bool:
    """Tell whether a change is a dense matrix that is not decomposed unasked."""
    return isinstance(change, Dense) and change.num_parameters > LIMIT


@torch.no_grad()
def leading(change: Dense, size: int = LEADING) -> Triplets:
    """Give leading triplets of a dense change, at most `size`, each with its residual; none of a zero change.

    Raises:
        DeltaError: the change holds numbers that are not finite.
    """
    matrix = change.weight.detach().cpu().float()
    energy = frobenius(matrix)
    if not math.isfinite(energy):
        raise DeltaError("the change holds numbers that are not finite", fix="look for NaN and infinite values")
    if not energy:
        none = matrix.new_zeros(0, dtype=torch.float64)
        return Triplets(matrix.new_zeros(matrix.shape[0], 0), none, matrix.new_zeros(matrix.shape[1], 0), none)
    found = lanczos(Matrix(matrix), min(size, *matrix.shape), tolerance=CERTAIN / 10)
    return found.first(int((found.residuals <= CERTAIN).long().cumprod(0).sum()))


def row(
    name: str, change: LayerDelta, base_frobenius: float, *, exact: bool = False, known: Triplets | None = None
) -> tuple[dict[str, Any], str]:
    """Measure one matrix, a large dense one by its leading values: a row of `table`, and a note, "" where all is known.

    Of a dense change of more than 2²² elements the leading singular values are computed, each certified by its residual, and the
    whole energy. Those give norms and stable rank; the rank for 90 % lies in an interval, which the note gives where it is not
    one number (the column is NaN then); the effective rank needs all values and is NaN.

    Args:
        name: of the layer.
        change: a matrix.
        base_frobenius: ‖W‖_F of the base weight.
        exact: decompose large dense changes whole.
        known: leading triplets of a large dense change; None computes them.

    Raises:
        DeltaError: the change is not a matrix, or a large dense one with numbers that are not finite.
    """
    if exact or not is_large(change):
        return _row(name, change, base_frobenius), ""
    assert isinstance(change, Dense)
    found = known if known is not None else leading(change)
    energy, s = frobenius(change.weight) ** 2, found.values.numpy()
    if not energy:
        ranks = dict.fromkeys(("rank90", "effective_rank", "stable_rank", "frobenius", "spectral"), 0.0)
        return _placed(name, change, {"rank": min(change.shape), **ranks}, base_frobenius, np.zeros(1)), ""
    error = float(found.residuals.max() * s[0]) if s.size else 0.0
    low, high = rank_interval(s, energy, min(change.shape), error=error)
    ranks = {
        "rank": min(change.shape),
        "rank90": float(low) if low == high else math.nan,
        "effective_rank": math.nan,
        "stable_rank": energy / float(s[0]) ** 2 if s.size else math.nan,
        "frobenius": math.sqrt(energy),
        "spectral": float(s[0]) if s.size else math.nan,
    }
    said = "" if low == high else f"; at least {low} and at most {high} directions hold 90 % of the variance"
    note = f"only the {s.size} leading singular values were computed{said}"
    return _placed(name, change, ranks, base_frobenius, s), note


def _row(name: str, change: LayerDelta, base_frobenius: float) -> dict[str, Any]:
    s = spectrum(change)
    ranks = {
        "rank": s.size,
        "rank90": rank_share(s),
        "effective_rank": effective_rank(s),
        "stable_rank": stable_rank(s),
    }
    sizes = {"frobenius": math.hypot(*s), "spectral": float(s.max(initial=0.0))}
    return _placed(name, change, ranks | sizes, base_frobenius, s)


def _placed(
    name: str, change: LayerDelta, found: dict[str, Any], base_frobenius: float, s: Float[ndarray, " k"]
) -> dict[str, Any]:
    return {
        **place(name),
        "out_features": change.shape[0],
        "in_features": change.shape[1],
        **found,
        "base_frobenius": base_frobenius,
        "relative_norm": found["frobenius"] / base_frobenius if base_frobenius else math.nan,
        "singular_values": s.tolist(),
    }


def place(name: str) -> dict[str, Any]:
    """Say where a layer stands: layer, module (the last part of its name), depth (the first part that is a number, or −1)."""
    parts = name.split(".")
    depth = next((int(part) for part in parts if part.isdecimal()), -1)
    return {"layer": name, "module": parts[-1], "depth": depth}


def rank_interval(
    s: Float[ndarray, " k"], energy: float, length: int, share: float = 0.9, error: float = 0.0
) -> tuple[int, int]:
    """Bound the rank for a share of the energy by the leading singular values alone.

    No other value is larger than the last of them: if each were as large, the fewest were needed. If all the others were equal,
    the most.

    Args:
        s: the leading values, falling.
        energy: the sum of the squares of all values.
        length: how many values there are in all.
        share: of the energy, in (0, 1].
        error: how far each value may be off.
    """
    if energy <= 0:
        return 0, 0
    wanted, others = share * energy * (1 - TIE), length - s.size
    found = []
    for values in (s + error, (s - error).clip(0)):
        sums = np.cumsum(values**2)
        held = float(sums[-1]) if s.size else 0.0
        if held >= wanted or not others:
            found.append(min(int(np.searchsorted(sums, wanted)) + 1, length))
        elif not found:
            last = float(values[-1]) if s.size else 0.0
            found.append(s.size + min(others, math.ceil((wanted - held) / last**2) if last else 1))
        else:
            found.append(s.size + min(others, math.ceil((wanted - held) * others / (energy - held))))
    return found[0], found[1]


@torch.no_grad()
def frobenius(weight: Float[Tensor, "out in"]) -> float:
    """Give ‖W‖_F of a weight: rows in float32 where the weight lies, their sum in float64."""
    # A few rows at a time, as they are stored: a half-precision weight is widened within the cache, not as a whole.
    stored = weight if weight.is_contiguous() else weight.t()
    rows = torch.cat([torch.linalg.vector_norm(part.float(), dim=1) for part in stored.split(256)])
    return float(rows.cpu().double().norm())


def _size(name: str, change: LayerDelta, weights: Mapping[str, Tensor] | Callable[[str], Tensor]) -> float:
    """Give ‖W‖_F of the base weight of a layer."""
    try:
        weight = weights[name] if isinstance(weights, Mapping) else weights(name)
    except KeyError:
        raise DeltaError(
            "the base has no such layer", where=name, fix="use the base that the delta was made on"
        ) from None
    if tuple(weight.shape) != tuple(change.shape):
        raise DeltaError(f"the delta is {tuple(change.shape)}, the weight {tuple(weight.shape)}", where=name)
    return frobenius(weight)
