"""Intruder dimensions: leading directions of a tuned weight that are unlike every direction of its base.

Legend: W₀ (out, in) the base weight, ΔW its change, W = W₀ + ΔW; uⱼ, sⱼ the left singular vectors and values of W; xᵢ those of W₀.

Definition (Shuttleworth et al. 2024, 2410.21228v3, Def. 3.1): uⱼ, j ≤ k, is an intruder if max over ALL i of |uⱼ·xᵢ| < ε. What it
leaves open is read so: a direction of W₀ of value 0 is arbitrary and no xᵢ; a direction of W of value 0 is no uⱼ, hence no
intruder; and a zero change makes no intruder, even where equal values leave the vectors free to turn.

Three routes, each taking what the one before could not decide:
- certified: leading triplets of W by Krylov steps, bounds on all cosines from a cached head of W₀ (`bounds.py`); where float32 is
  what leaves a verdict open, the vectors that it depends on are refined in float64 (`sharp.py`);
- dense: one eigendecomposition of the smaller Gram matrix of W₀ in float64, and of W's where its triplets are not enough;
- exact: two dense SVDs in float64, the definition itself. The other two are tested against it.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from numpy import ndarray
from torch import Tensor

from loralab.delta.lowrank import LayerDelta
from loralab.errors import DeltaError
from loralab.spectral.bounds import Bounds
from loralab.spectral.dense import Gram
from loralab.spectral.heads import SIZE, head_of
from loralab.spectral.krylov import Davidson, Triplets, dense_triplets, lanczos
from loralab.spectral.products import Matrix, Tuned
from loralab.spectral.sharp import Refinement

VECTORS = 10
"""k of the paper: how many leading vectors of each matrix are looked at."""

EPSILON = 0.5
"""ε of the paper's code: below this cosine with every base vector, a vector is an intruder."""

DENSE_BELOW = 1500
"""Shorter side below which the dense route is as fast as the certified one."""

DOUBLE = 512
"""Shorter side up to which the dense route takes all triplets in float64."""

CONVERGED = 1e-5
"""Residual at which a triplet of W is good enough for the certified route."""

SHARP = 1e-4
"""Distance of a computed vector from the true one at which more steps on it are not worth while."""

NOISE = 1e-6
"""A change of W, in units of s₁, that float32 arithmetic makes unnoticed: what a stable verdict withstands."""


@dataclass(frozen=True, eq=False)
class Intruders:
    """The verdicts on the k leading left vectors of W₀ + ΔW.

    Attributes:
        triplets: of W₀ + ΔW, k leading ones.
        lower: with `upper`, an interval for each vector that holds its largest cosine with any base vector.
        upper: see `lower`.
        verdicts: True for an intruder.
        routes: "certified", "dense" or "exact": what decided.
        gaps: distance of each value to the nearest other one, in units of s₁.
        stable: whether the verdict outlives any change of W of 1e-6 s₁, by the gap theorem; in a pair of nearly equal values the
            vectors are arbitrary, for a dense float32 SVD as well.
        similarity: |cosine| with the base's p leading left vectors.
        energy: ‖W₀ + ΔW‖²_F.
        epsilon: the threshold.
    """

    triplets: Triplets
    lower: Float[ndarray, " k"]
    upper: Float[ndarray, " k"]
    verdicts: tuple[bool, ...]
    routes: tuple[str, ...]
    gaps: Float[ndarray, " k"]
    stable: tuple[bool, ...]
    similarity: Float[ndarray, "p k"]
    energy: float
    epsilon: float

    @property
    def indices(self) -> list[int]:
        """Positions of the intruders among the k, from 0."""
        return [position for position, intrudes in enumerate(self.verdicts) if intrudes]

    @property
    def energy_share(self) -> float:
        """Sum of s² over the intruders / sum of s² over the k; 0 where all values are 0."""
        squares = self.triplets.values.square()
        total = float(squares.sum())
        return float(squares[self.indices].sum()) / total if total else 0.0


@torch.no_grad()
def intruders(
    weight: Float[Tensor, "out in"],
    change: LayerDelta,
    *,
    k: int = VECTORS,
    epsilon: float = EPSILON,
    head: Triplets | None = None,
    exact: bool = False,
    dense_below: int = DENSE_BELOW,
) -> Intruders:
    """Decide which of the k leading left vectors of a tuned weight are intruders.

    Args:
        weight: W₀, of any floating dtype.
        change: ΔW, a pair or dense.
        k: how many vectors; at most min(out, in) are looked at.
        epsilon: the threshold, in (0, 1].
        head: `head_of(weight)`, or as `HeadCache` keeps it; computed where it is needed and not given.
        exact: take two dense float64 SVDs, whatever the size.
        dense_below: shorter side below which the dense route is taken at once.

    Raises:
        DeltaError: weight and change are not two matrices of one shape, or hold NaN or infinite values; k or epsilon is out of
            range.
    """
    if k < 1 or not 0 < epsilon <= 1:
        raise DeltaError(f"k must be at least 1 and epsilon lie in (0, 1], not {k} and {epsilon}")
    tuned = Tuned(weight, change)
    if head is not None and (head.left.shape[0], head.right.shape[0]) != tuple(weight.shape):
        raise DeltaError(
            f"the head belongs to another matrix than this of {tuple(weight.shape)}", fix="compute it anew"
        )
    search = _Search(tuned, min(k, *weight.shape), epsilon, head)
    if tuned.is_unchanged:
        search.leave_unchanged("exact" if exact else "dense" if min(weight.shape) < dense_below else "certified")
    else:
        if not exact and min(weight.shape) >= dense_below:
            search.certify()
        if not exact and search.undecided:
            search.decompose()
        if search.undecided:
            search.decide()
    return search.result()


class _Search:
    """What is known of the k vectors, and the routes that narrow it down."""

    def __init__(self, tuned: Tuned, k: int, epsilon: float, head: Triplets | None) -> None:
        self.tuned, self.k, self.epsilon, self.head = tuned, k, epsilon, head
        self.lower, self.upper = np.zeros(k), np.ones(k)
        self.routes = [""] * k
        self.triplets: Triplets | None = None
        """k leading triplets of W, and one more where there is one."""
        self.base_left: Tensor | None = None
        self.is_arbitrary = np.zeros(k, bool)
        """Where the dense route could not decide: values of W or W₀ are too near each other for float64 as well."""
        self.is_refined = np.zeros(k, bool)
        """Where the interval is that of a vector refined in float64."""

    @property
    def _nothing(self) -> float:
        """Share of the largest singular value at which float64 takes another one for 0."""
        return max(self.tuned.base.shape) * float(np.finfo(np.float64).eps)

    @property
    def undecided(self) -> list[int]:
        """Positions whose interval holds epsilon."""
        return [j for j in range(self.k) if not self.routes[j]]

    def certify(self) -> None:
        """Take the certified route."""
        self.head = self.head if self.head is not None else head_of(self.tuned.weight)
        if not len(self.head) or not self.tuned.is_ordinary:
            return
        bounds = Bounds(Matrix(self.tuned.base), self.head)
        for found in self._leading():
            if not self._is_converged(found):
                continue
            self.triplets = found
            errors, todo = self._errors(), self.undecided
            rows = found.left.t()[todo]
            interval = bounds.of(rows / rows.norm(dim=1, keepdim=True), errors[todo], self.epsilon)
            self._narrow(todo, interval.lower, interval.upper, "certified")
            if not any(errors[j] > SHARP for j in self.undecided):
                break
        if self.triplets is not None and self.undecided:
            self._refine(bounds, Refinement(self.tuned, self.triplets, self.head, bounds))

    def _refine(self, bounds: Bounds, refinement: Refinement) -> None:
        """Decide in float64 what lies too near epsilon for float32."""
        errors = self._errors()
        for j in self.undecided:
            refined = refinement.of(j, float(errors[j]), self.epsilon)
            if refined is not None:
                interval = bounds.of(refined.left[None], np.array([refined.error]), self.epsilon)
                self._narrow([j], interval.lower, interval.upper, "certified")
                self.is_refined[j] = True

    def _leading(self) -> Iterator[Triplets]:
        """Give leading triplets of W by Krylov steps; asked again, by more of them."""
        tuned, head = self.tuned, self.head
        if head is not None and len(head) > self.k and tuned.thin is not None:
            search = Davidson(tuned, head, self.k)
            yield search.reach(CONVERGED)
            if self.triplets is not None:
                yield search.reach(NOISE)
                return
        start = None if head is None else head.right.t()[: self.k]
        yield lanczos(tuned.matrix, min(self.k + 1, *tuned.base.shape), tolerance=NOISE, start=start, most=600)

    def decompose(self) -> None:
        """Take the dense route: one eigendecomposition of the base, and one of the tuned weight if need be."""
        base = Gram.of(self.tuned.weight.double())
        self.base_left = base.leading_left(SIZE)
        if self.triplets is None and self.tuned.is_ordinary and min(self.tuned.base.shape) > DOUBLE:
            found = next(self._leading())
            if self._is_converged(found):
                self.triplets = found
        if self.triplets is not None:
            self._compare(base)
        if self.undecided:
            self.triplets = Gram.of(self.tuned.double()).triplets(self.k + 1)
            self._compare(base)
        self.is_arbitrary[self.undecided] = True

    def _compare(self, base: Gram) -> None:
        assert self.triplets is not None
        todo = self.undecided
        lower, upper = base.cosines(self.triplets.left[:, todo].double())
        errors = self._errors()[todo]
        self._narrow(todo, lower - errors, upper + errors, "dense")

    def decide(self) -> None:
        """Take the exact route, which leaves nothing undecided."""
        X, s0, _ = torch.linalg.svd(self.tuned.weight.double(), full_matrices=False)
        self.base_left = X[:, :SIZE]
        self.triplets = dense_triplets(self.tuned.double(), self.k + 1)
        directions = X[:, s0 > s0[0] * self._nothing]
        cosines = (directions.t() @ self.triplets.left[:, : self.k]).abs()
        largest = torch.cat([cosines, cosines.new_zeros(1, self.k)]).amax(0).clamp_max(1).cpu().numpy()
        for j in self.undecided:
            self.lower[j] = self.upper[j] = largest[j]
            self.routes[j] = "exact"

    def leave_unchanged(self, route: str) -> None:
        """Say of a zero change that each vector is a base vector."""
        if self.head is None and route == "certified":
            self.head = head_of(self.tuned.weight)
        is_enough = self.head is not None and len(self.head) > self.k and route != "exact"
        self.triplets = self.head if is_enough else dense_triplets(self.tuned.weight, max(self.k + 1, SIZE))
        assert self.triplets is not None
        self.base_left = self.triplets.left[:, :SIZE]
        self.lower[:], self.routes = 1.0, [route] * self.k

    def _is_converged(self, found: Triplets) -> bool:
        return len(found) >= self.k and float(found.residuals[: self.k].max()) <= CONVERGED

    def _errors(self) -> Float[ndarray, " k"]:
        """Bound the distance of each computed left vector from the true one by residual / gap."""
        assert self.triplets is not None
        rounding = 1e-12 if self.triplets.left.dtype == torch.float64 else NOISE
        residuals = self.triplets.residuals[: self.k].cpu().numpy() + rounding
        return np.minimum(residuals / np.maximum(self._gaps(), 1e-300), 1.0)

    def _gaps(self) -> Float[ndarray, " k"]:
        assert self.triplets is not None
        values = np.append(self.triplets.values.cpu().numpy(), 0.0)
        if not values[0]:
            return np.zeros(self.k)
        behind = -np.diff(values)[: self.k]
        return np.minimum(behind, np.append(np.inf, behind[:-1])) / values[0]

    def _narrow(self, todo: list[int], lower: Float[ndarray, " c"], upper: Float[ndarray, " c"], route: str) -> None:
        """Take new intervals for some vectors, and note what they decide."""
        for i, j in enumerate(todo):
            self.lower[j], self.upper[j] = max(self.lower[j], lower[i]), min(self.upper[j], upper[i])
            if self.lower[j] >= self.epsilon or self.upper[j] < self.epsilon:
                self.routes[j] = route

    def result(self) -> Intruders:
        """Put together what was found."""
        assert self.triplets is not None
        triplets, gaps = self.triplets.first(self.k), self._gaps()
        values = triplets.values.cpu().numpy()
        is_nothing = values <= values[0] * self._nothing
        if not self.tuned.is_unchanged:
            self.lower[is_nothing], self.upper[is_nothing] = 0.0, 1.0
        verdicts = (self.upper < self.epsilon) & ~is_nothing
        room = np.where(verdicts, self.epsilon - self.upper, self.lower - self.epsilon)
        # Intervals of float32 triplets have room for the noise already.
        noise = np.where(self.is_refined | (triplets.left.dtype == torch.float64), NOISE, 0.0)
        stable = (room > noise / np.maximum(gaps, 1e-300)) & ~is_nothing & ~self.is_arbitrary | self.tuned.is_unchanged
        base_left = self.head.left if self.head is not None and len(self.head) else self.base_left
        base_left = triplets.left[:, :0] if base_left is None else base_left
        similarity = (base_left.double().t() @ triplets.left.double()).abs().clamp_max(1)
        return Intruders(
            triplets,
            self.lower,
            self.upper,
            tuple(verdicts.tolist()),
            tuple(self.routes),
            gaps,
            tuple(stable.tolist()),
            similarity.cpu().numpy(),
            self.tuned.energy,
            self.epsilon,
        )
