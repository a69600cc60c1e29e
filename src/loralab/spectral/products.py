"""Products of a weight with thin blocks; where its change is a pair, the tuned weight is never formed.

Legend: W₀ (out, in) the base weight, ΔW its change, W = W₀ + ΔW. A block is a few vectors kept as ROWS: (c, in) on the right side,
(c, out) on the left. With columns, MKL's `W.T @ X` takes 7 to 25 times as long for 8 to 15 of them; rows are fast either way.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Float
from torch import Tensor

from loralab.delta.lowrank import LayerDelta, LowRank
from loralab.errors import DeltaError

STRIP = 256
"""Rows of W (4096 wide: 4 MB) that W x and then Wᵀ(W x) pass over while they lie in the cache."""

WIDE_STRIP = 128
"""The same for rows that are converted to float64: 4 MB where W is 4096 wide, still in the cache for the second product."""

THIN = 4
"""A pair is kept as a pair while its rank is at most min(out, in) / THIN; above that forming W is cheaper."""

TINY = 1e-24
"""Energies below it, or above its inverse, are not ordinary."""

NOTHING = 1e-9
"""Singular values of ΔW below this share of its largest are dropped: they lie below float32's rounding of ΔW."""


@dataclass(frozen=True, eq=False)
class Thin:
    """A change as its thin singular value decomposition, ΔW = Σ sᵢ xᵢ zᵢᵀ.

    Attributes:
        reach: rows sᵢ xᵢ.
        values: sᵢ, largest first, float64.
        source: rows zᵢ, orthonormal.
    """

    reach: Float[Tensor, "rank out"]
    values: Float[Tensor, " rank"]
    source: Float[Tensor, "rank in"]


class Matrix:
    """A matrix W = dense + thin in float32, known by its products with blocks of rows."""

    def __init__(self, dense: Float[Tensor, "out in"], thin: Thin | None = None) -> None:
        self.dense, self.thin = dense, thin

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in)."""
        return self.dense.shape[0], self.dense.shape[1]

    def times(self, rows: Float[Tensor, "c in"]) -> Float[Tensor, "c out"]:
        """Give W x for each row x."""
        product = rows @ self.dense.t()
        return product if self.thin is None else product.addmm_(rows @ self.thin.source.t(), self.thin.reach)

    def transposed(self, rows: Float[Tensor, "c out"]) -> Float[Tensor, "c in"]:
        """Give Wᵀ y for each row y."""
        product = rows @ self.dense
        return product if self.thin is None else product.addmm_(rows @ self.thin.reach.t(), self.thin.source)

    def squared(self, rows: Float[Tensor, "c in"]) -> tuple[Float[Tensor, "c out"], Float[Tensor, "c in"]]:
        """Give W x and Wᵀ W x for each row x, in one pass over W: a fifth faster than one product after the other."""
        image = rows.new_empty(rows.shape[0], self.shape[0])
        square = torch.zeros_like(rows)
        through = None if self.thin is None else rows @ self.thin.source.t()
        for start in range(0, self.shape[0], STRIP):
            strip = self.dense[start : start + STRIP]
            part = rows @ strip.t()
            if self.thin is not None and through is not None:
                part.addmm_(through, self.thin.reach[:, start : start + STRIP])
            image[:, start : start + STRIP] = part
            square.addmm_(part, strip)
        if self.thin is not None:
            square.addmm_(image @ self.thin.reach.t(), self.thin.source)
        return image, square


class Stored:
    """W₀, or W₀ + ΔW, in float64 from what is stored: `Tuned.double()`, but a strip of rows at a time."""

    def __init__(self, weight: Float[Tensor, "out in"], change: LayerDelta | None = None) -> None:
        self.height, self.is_turned = weight.shape[0], not weight.is_contiguous()
        self.weight = self._as_it_lies(weight.detach())
        self.whole: Tensor | None = None
        self.pair: tuple[Tensor, Tensor] | None = None
        if isinstance(change, LowRank):
            B, A = (part.detach().to(weight.device, torch.float64) for part in (change.B, change.A))
            self.pair = B * change.scale, A
        elif change is not None:
            self.whole = self._as_it_lies(change.weight.detach().to(weight.device))

    def _as_it_lies(self, matrix: Tensor) -> Tensor:
        return matrix.t() if self.is_turned else matrix

    def _strips(self) -> Iterator[tuple[slice, Tensor]]:
        for start in range(0, self.weight.shape[0], WIDE_STRIP):
            rows = slice(start, start + WIDE_STRIP)
            strip = self.weight[rows].double()
            yield rows, strip if self.whole is None else strip + self.whole[rows].double()

    def squared(self, X: Float[Tensor, "in ..."]) -> tuple[Float[Tensor, "out ..."], Float[Tensor, "in ..."]]:
        """Give W X and WᵀW X of a vector or of columns, in one pass over W; in two where it is stored turned."""
        image = X.new_zeros(self.height, *X.shape[1:]) if self.pair is None else self.pair[0] @ (self.pair[1] @ X)
        # Yᵀ W, not Wᵀ Y: MKL is many times slower at the latter for a dozen columns.
        if self.is_turned:
            for rows, strip in self._strips():
                image += (X[rows].t() @ strip).t()
            square = torch.cat([strip @ image for _, strip in self._strips()])
        else:
            turned = torch.zeros_like(X.t())
            for rows, strip in self._strips():
                image[rows] += strip @ X
                turned += image[rows].t() @ strip
            square = turned.t()
        return image, square if self.pair is None else square + self.pair[1].t() @ (self.pair[0].t() @ image)


class Tuned:
    """A base weight and its change, both checked.

    Attributes:
        base: W₀ (out, in) in float32; the caller's own tensor where it is float32 already.
        base_energy: ‖W₀‖²_F.
        is_ordinary: whether squares of the numbers stay within float32, so that Krylov steps can be taken.

    Raises:
        DeltaError: weight and change are not two matrices of one shape, or hold numbers that are not finite.
    """

    def __init__(self, weight: Tensor, change: LayerDelta) -> None:
        if weight.ndim != 2 or 0 in weight.shape or tuple(weight.shape) != tuple(change.shape):
            raise DeltaError(
                f"the change is {tuple(change.shape)}, the weight {tuple(weight.shape)}",
                fix="use the base that the delta was made on",
            )
        self.weight, self.change = weight, change
        self.base: Float[Tensor, "out in"] = weight.detach().float()
        self.base_energy = energy_of(self.base, "the base weight")
        parts = (change.A, change.B) if isinstance(change, LowRank) else (change.weight,)
        energies = [energy_of(part.detach().float(), "the change") for part in parts]
        if isinstance(change, LowRank) and not math.isfinite(change.scale):
            raise DeltaError(f"the scale of the change is {change.scale}")
        self._may_be_zero = 0.0 in energies or (isinstance(change, LowRank) and not change.scale)
        if isinstance(change, LowRank):
            energies.append(energies[0] * energies[1] * change.scale * change.scale)
        self.is_ordinary = all(energy == 0 or TINY < energy < 1 / TINY for energy in [self.base_energy, *energies])

    @cached_property
    def thin(self) -> Thin | None:
        """The change as a thin decomposition; None where it is dense, or a pair of a large rank."""
        change = self.change
        if not isinstance(change, LowRank) or change.rank * THIN > min(change.shape):
            return None
        # The factors come from float32, where QR is three times as fast; only the small core needs more.
        Q, R = torch.linalg.qr(change.B.detach().to(self.base) * change.scale)
        P, T = torch.linalg.qr(change.A.detach().to(self.base).t())
        U, s, Vh = torch.linalg.svd(R.double() @ T.double().t())
        kept = s > s[:1] * NOTHING
        U, s, Vh = U[:, kept], s[kept], Vh[kept]
        return Thin((Q @ (U * s).to(Q)).t().contiguous(), s, (P @ Vh.t().to(P)).t().contiguous())

    @cached_property
    def matrix(self) -> Matrix:
        """W, as products."""
        if self.thin is not None:
            return Matrix(self.base, self.thin)
        return Matrix(self.base + self.change.dense(torch.float32).to(self.base.device))

    @cached_property
    def pushed(self) -> Float[Tensor, "rank out"]:
        """W₀ zᵢ for each right singular vector zᵢ of a thin change."""
        assert self.thin is not None
        return self.thin.source @ self.base.t()

    @cached_property
    def is_unchanged(self) -> bool:
        """Whether ΔW is zero in every element."""
        if self._may_be_zero:  # a sum of squares may have underflowed
            return not bool(self.change.dense(torch.float64).any())
        return self.thin is not None and not len(self.thin.values)

    @cached_property
    def energy(self) -> float:
        """‖W₀ + ΔW‖²_F; for a pair from ‖W₀‖², ⟨W₀, ΔW⟩ and ‖ΔW‖², without forming it."""
        if self.thin is None:
            return float(_row_energies(self.matrix.dense).sum())
        cross = float((self.pushed.double() * self.thin.reach.double()).sum())
        return self.base_energy + 2 * cross + float(self.thin.values.square().sum())

    def double(self) -> Float[Tensor, "out in"]:
        """W formed in float64 from what is stored."""
        return self.weight.detach().double() + self.change.dense(torch.float64).to(self.weight.device)


def energy_of(tensor: Float[Tensor, "rows columns"], name: str) -> float:
    """Give the sum of squares of a float32 tensor: one pass that also finds out whether a number is not finite.

    Raises:
        DeltaError: it holds NaN or an infinite value.
    """
    energy = float(_row_energies(tensor).sum())
    if not energy < float("inf") and not bool(torch.isfinite(tensor).all()):
        raise DeltaError(f"{name} holds NaN or infinite values", fix="look at where it was trained or saved")
    return energy


def _row_energies(tensor: Float[Tensor, "rows columns"]) -> Float[Tensor, " rows"]:
    """Give the squared norm of each row: float32 within a row, float64 between them."""
    return torch.linalg.vector_norm(tensor, dim=1).double().square()
