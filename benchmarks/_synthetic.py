"""Weights whose singular value decomposition is known, and changes of them that make intruders and borderline cases.

A weight is L · diag(s) · Rᵀ, where L and R are random rotations that cost n log n each: random signs and cosine transforms in turn.
So a 4096 x 4096 weight takes a second instead of a QR, and any of its singular vectors can be had alone, in float64.
"""

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from numpy import ndarray
from scipy.fft import dct

from loralab.delta.lowrank import Dense, LowRank

HEAD = 64
"""The base vectors that changes lean on lie among so many leading ones."""


class Rotation:
    """A random orthogonal matrix Q (n, n) that is never formed: Q = D₃ C D₂ C D₁, C the cosine transform, Dᵢ random signs."""

    def __init__(self, n: int, random: np.random.Generator) -> None:
        self.n = n
        self.signs = random.choice((-1.0, 1.0), size=(3, n))

    def apply(self, x: Float[ndarray, "n m"]) -> Float[ndarray, "n m"]:
        """Give Q x in the precision of x."""
        first, second, third = self.signs.astype(x.dtype)[:, :, None]
        x = dct(x * first, norm="ortho", axis=0, overwrite_x=True)
        x = dct(x * second, norm="ortho", axis=0, overwrite_x=True)
        return x * third

    def columns(self, positions: ndarray) -> Float[ndarray, "n k"]:
        """Give some columns of Q, in float64."""
        unit = np.zeros((self.n, len(positions)))
        unit[positions, np.arange(len(positions))] = 1
        return self.apply(unit)


def bulk(out: int, into: int) -> Float[ndarray, " k"]:
    """Give the singular values of a random matrix (entries of variance 1 / longer side) as quantiles of their limit law.

    Source: Marchenko & Pastur 1967; with y = shorter / longer side they lie between 1 − √y and 1 + √y.
    """
    k = min(out, into)
    y = k / max(out, into)
    s = np.linspace(1 - y**0.5, 1 + y**0.5, 20_001)[1:]
    density = np.sqrt(np.clip((s**2 - s[0] ** 2) * (s[-1] ** 2 - s**2), 0, None)) / s
    share = np.cumsum(density)
    return np.interp((np.arange(k)[::-1] + 0.5) / k, share / share[-1], s)


def spectrum(out: int, into: int, kind: str) -> Float[ndarray, " k"]:
    """Give singular values, largest first.

    Args:
        out: rows of the weight.
        into: its columns.
        kind: `llm`, a heavy head over a broad bulk, as trained projections have; `power`, a fall without a bulk, 300 times from
            first to last; `flat`, nearly no head: the worst case of every iteration.
    """
    i = np.arange(1, min(out, into) + 1)
    if kind == "llm":
        return bulk(out, into) + 10 * i**-0.7
    if kind == "flat":
        return bulk(out, into) + 0.2 * i**-0.5
    if kind == "power":
        return 10 * i ** -(np.log(300) / np.log(len(i)))
    raise ValueError(f"no such spectrum: {kind}")


@dataclass(frozen=True, eq=False)
class Known:
    """A weight with its decomposition: columns of `left` and `right` belong to `values`."""

    weight: torch.Tensor  # (out, in) float32
    values: Float[ndarray, " k"]
    left: Rotation
    right: Rotation

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in)."""
        return self.left.n, self.right.n


def known(out: int, into: int, kind: str, seed: int) -> Known:
    """Draw a weight of a spectrum, in float32."""
    random = np.random.default_rng(seed)
    values = spectrum(out, into, kind)
    left, right = Rotation(out, random), Rotation(into, random)
    matrix = np.zeros((out, into), np.float32)
    np.fill_diagonal(matrix, values)
    matrix = right.apply(np.ascontiguousarray(left.apply(matrix).T)).T
    return Known(torch.from_numpy(np.ascontiguousarray(matrix)), values, left, right)


def pair(base: Known, rank: int, strength: float, seed: int, scale: float = 2.0) -> LowRank:
    """Draw a low-rank change: half of its directions are new, half lean on leading base vectors by up to 90 %.

    So some vectors of the tuned weight are clear intruders, some the base's own, and many lie near the threshold.

    Args:
        base: that it changes.
        rank: of the change.
        strength: s₁ of the change over s₁ of the base, about; its other values fall to a twentieth of that.
        seed: of the draw.
        scale: of the pair.
    """
    random = np.random.default_rng(seed)
    values = base.values
    lean = random.uniform(0, 0.9, rank) * (np.arange(rank) % 2)
    chosen = random.integers(0, min(HEAD, len(values)), rank)

    def directions(rotation: Rotation) -> Float[ndarray, "n rank"]:
        new = np.linalg.qr(random.standard_normal((rotation.n, rank))).Q
        return new * np.sqrt(1 - lean**2) + rotation.columns(chosen) * lean

    sizes = strength * values[0] * np.geomspace(1, 1 / 20, rank)
    B, A = directions(base.left) * (sizes / scale), directions(base.right).T
    return LowRank(torch.from_numpy(A).float().contiguous(), torch.from_numpy(B).float().contiguous(), scale)


def dense(base: Known, rank: int, strength: float, seed: int) -> Dense:
    """Draw a dense change as full fine-tuning makes: the directions of `pair` over a bulk of full rank, a fifth as large."""
    random = np.random.default_rng(seed + 1)
    out, into = base.shape
    noise = torch.from_numpy(random.standard_normal((out, into), dtype=np.float32))
    edge = (out**0.5 + into**0.5) / (strength * float(base.values[0]) / 5)  # s₁ of the noise over what it is to be
    return Dense(pair(base, rank, strength, seed).dense() + noise / edge)
