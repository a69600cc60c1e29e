"""Dense decompositions in float64: the definition, and the route for matrices that are small or hard."""

from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from numpy import ndarray
from torch import Tensor

from loralab.spectral.krylov import Triplets, dense_triplets

LINKED = 1e-10
"""Eigenvalues of a float64 Gram matrix nearer than this, in units of the largest, share their eigenvectors' rounding."""

EIGENVECTOR = 1e-14
"""Rounding of an eigenvector of a float64 Gram matrix, times its gap in units of the largest eigenvalue."""


class Gram(NamedTuple):
    """A dense decomposition of a matrix in float64 by the eigenvectors of its smaller Gram matrix."""

    matrix: Tensor
    eigenvalues: Tensor
    vectors: Tensor

    @classmethod
    def of(cls, matrix: Float[Tensor, "out in"]) -> "Gram":
        is_tall = matrix.shape[0] > matrix.shape[1]
        eigenvalues, vectors = torch.linalg.eigh(matrix.t() @ matrix if is_tall else matrix @ matrix.t())
        return cls(matrix, eigenvalues.flip(0).clamp_min(0), vectors.flip(1))

    @property
    def is_tall(self) -> bool:
        return self.matrix.shape[0] > self.matrix.shape[1]

    def leading_left(self, count: int) -> Float[Tensor, "out c"]:
        """Give leading left vectors."""
        if not self.is_tall:
            return self.vectors[:, :count]
        images = self.matrix @ self.vectors[:, :count]
        return images / images.norm(dim=0).clamp_min(torch.finfo(images.dtype).tiny)

    def triplets(self, count: int) -> Triplets:
        """Give leading triplets; by an SVD where a value is too small for the Gram matrix."""
        values = self.eigenvalues[:count].sqrt()
        if float(values[-1]) <= 1e-5 * float(values[0]):
            return dense_triplets(self.matrix, count)
        one = self.vectors[:, :count]
        other = (self.matrix @ one if self.is_tall else self.matrix.t() @ one) / values
        rest = (self.matrix.t() @ other - one * values) if self.is_tall else (self.matrix @ other - one * values)
        left, right = (other, one) if self.is_tall else (one, other)
        return Triplets(left, values, right, rest.norm(dim=0) / values[0])

    def cosines(self, left: Float[Tensor, "out k"]) -> tuple[Float[ndarray, " k"], Float[ndarray, " k"]]:
        """Bound the largest |cosine| of each column with any left vector of a value above 0.

        Eigenvalues that rounding cannot part are one group: where q of them hold the mass M of a column together, its largest
        cosine with one of them lies between √(M/q) and √M, whatever the vectors are. A group that reaches 0 may hold no direction
        at all, and of a tall matrix its left vectors are not known: all that is said of it is that it has what the others leave.
        """
        largest = float(self.eigenvalues[0])
        if not largest:
            return np.zeros(left.shape[1]), np.zeros(left.shape[1])
        values = self.eigenvalues.cpu().numpy() / largest
        apart = np.append(-np.diff(values), np.inf)
        ends = np.flatnonzero(apart > LINKED) + 1
        starts = np.append(0, ends[:-1])
        is_known = values[ends - 1] > LINKED
        starts, ends = starts[is_known], ends[is_known]
        if not len(starts):
            return np.zeros(left.shape[1]), np.ones(left.shape[1])
        one = self.vectors[:, : ends[-1]]
        inner = one.t() @ (self.matrix.t() @ left if self.is_tall else left)
        if self.is_tall:
            inner /= self.eigenvalues[: ends[-1]].sqrt()[:, None]
        masses = np.add.reduceat(inner.square().cpu().numpy(), starts, axis=0)
        behind = apart[ends - 1].clip(max=1.0)
        error = EIGENVECTOR / np.minimum(behind, np.append(1.0, behind[:-1]))[:, None]
        lower = np.sqrt(masses / (ends - starts)[:, None]) - error
        upper = np.sqrt(masses) + error
        rest = np.sqrt((1 - masses.sum(0)).clip(0)) if len(ends) and ends[-1] < len(values) else 0.0
        return lower.max(0).clip(0), np.maximum(upper.max(0), rest).clip(max=1.0)
