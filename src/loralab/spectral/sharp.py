"""Single triplets refined in float64, where nothing but the rounding of float32 leaves a verdict open.

Legend: W (out, in) a base weight or a tuned one, s, u, v one of its triplets, s₁ its largest value, θ = s².

Float32 knows a product with W to 5e-7 s₁, and so a vector to 5e-7 / gap: 3e-4 with gaps as trained weights have them. From there
a Davidson iteration in float64 (Davidson 1975; a pass over a weight of 4096 x 4096 takes 10 ms of one core) gains a digit every
round or two. Nearly all of WᵀW is known where the vector errs most, so the residual is divided by what WᵀW − θ is there: θ_q − θ
along each approximate right vector q, −θ or so in what they leave. Should that be wrong, rounds are lost and nothing else: the
error is measured anew, as residual / gap (Wedin 1972), where the gap is that of the float32 values less what those may be off by.
"""

from functools import cached_property

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from loralab.spectral.bounds import Bounds
from loralab.spectral.krylov import Triplets, rayleigh_ritz
from loralab.spectral.products import Stored, Tuned

LOOSE = 1e-6
"""Rounding of a float32 value, in units of s₁."""

FLOOR = 1e-13
"""Rounding of a residual in float64, in units of s₁: a hundred times what was measured."""

HOPELESS = 0.02
"""Error of a float32 vector above which values lie too near each other to begin."""

ENOUGH = 1e-9
"""Error at which what is still open is left to a decomposition."""

ROUNDS = 24
"""Rounds for each vector, on average, after which it is as well."""


class Refined:
    """A triplet of W that gets better.

    Args:
        matrix: W.
        known: approximate right vectors of W in float64, orthonormal rows, and their values; one of them is the triplet's own.
        start: right vector to begin with.
        value: its value.
        gap: from there to the nearest true value that is not its own, at least.
        top: s₁.

    Attributes:
        left: u, of unit norm, in float64.
        error: its distance from the true one, up to sign, at most; 1 where nothing can be said.
    """

    left: Float[Tensor, " out"]
    error: float

    def __init__(
        self,
        matrix: Stored,
        known: tuple[Float[Tensor, "d in"], Float[Tensor, " d"]],
        start: Float[Tensor, " in"],
        value: float,
        gap: float,
        top: float,
    ) -> None:
        self.matrix, self.known, self.value, self.gap, self.top = matrix, known, value, gap, top
        self.space, self.images, self.squares = list[Tensor](), list[Tensor](), list[Tensor]()  # x, W x and WᵀW x
        self._grow(start.double())

    @classmethod
    def of(cls, matrix: Stored, known: tuple[Tensor, Tensor], found: Triplets, j: int) -> "Refined":
        """Begin with triplet j of those found.

        The true values beside it lie within their residuals of the computed ones; of what is behind the last nothing is known.
        """
        values = found.values.cpu().numpy()
        loose = (found.residuals.cpu().numpy() + LOOSE) * values[0]
        before = values[j - 1] - loose[j - 1] - values[j] if j else np.inf
        behind = values[j] - values[j + 1] - loose[j + 1] if j + 1 < len(values) else 0.0
        return cls(matrix, known, found.right[:, j], float(values[j]), float(min(before, behind)), float(values[0]))

    def advance(self) -> bool:
        """Take one round; False if there is nothing left to improve."""
        rows, values = self.known
        apart = values.square() - self.theta
        inverse = 1 / apart
        inverse[apart.abs().argmin()] = 0.0  # its own, which is to be kept, not to be corrected
        step = ((rows @ self.rest) * (inverse + 1 / self.theta)) @ rows - self.rest / self.theta
        size, space = step.norm(), torch.stack(self.space)
        for _ in range(2):
            step = step - (space @ step) @ space
        if not float(step.norm()) > 1e-6 * float(size):  # the space holds it already, but for rounding
            return False
        self._grow(step)
        return True

    def _grow(self, row: Float[Tensor, " in"]) -> None:
        """Add a direction outside the space, take the Ritz triplet nearest the start, and measure it."""
        row = row / row.norm()
        image, square = self.matrix.squared(row)
        self.space, self.images, self.squares = [*self.space, row], [*self.images, image], [*self.squares, square]
        images = torch.stack(self.images)
        theta, P = torch.linalg.eigh(images @ images.t())
        nearest = P[0].abs().argmax()
        self.theta, mix = theta[nearest], P[:, nearest]
        s = self.theta.sqrt()
        self.left = mix @ images / s
        self.rest = mix @ torch.stack(self.squares) / s - s * (mix @ torch.stack(self.space))
        # W v = s u holds to rounding, so one residual is all. A sine below 0.1 is a distance but for 1 %.
        room = self.gap - abs(float(s) - self.value)
        sine = (float(self.rest.norm()) + FLOOR * self.top) / max(room, 1e-300)
        self.error = 1.01 * sine if room > 0 and sine < 0.1 else 1.0


class Refinement:
    """What float64 adds to the triplets of a tuned weight and to the head of its base.

    Args:
        tuned: both weights.
        found: leading triplets of W₀ + ΔW.
        head: those of W₀.
        bounds: of that head; columns that are refined are refined in it.
    """

    def __init__(self, tuned: Tuned, found: Triplets, head: Triplets, bounds: Bounds) -> None:
        self.tuned, self.found, self.head, self.bounds = tuned, found, head, bounds

    @torch.no_grad()
    def of(self, j: int, error: float, epsilon: float) -> Refined | None:
        """Refine vector j of W and the head's vectors near it, until epsilon lies clear of their cosines or no more can be done.

        None where that could decide nothing: epsilon is not near, or a value is not alone.

        Args:
            j: position of a vector.
            error: its distance from the true one in float32.
            epsilon: the threshold.
        """
        left = self.found.left[:, j].double()
        near = self.bounds.near(left / left.norm(), error, epsilon)
        if error > HOPELESS or not near:
            return None
        weight = Stored(self.tuned.weight)
        refined = Refined.of(Stored(self.tuned.weight, self.tuned.change), self._of_tuned, self.found, j)
        columns = {i: Refined.of(weight, self._of_base, self.head, int(self.bounds.columns[i])) for i in near}
        for _ in range(ROUNDS * (1 + len(near))):
            for i, each in columns.items():
                self.bounds.sharp[i] = each.left, each.error
            loosest = max(refined, *columns.values(), key=lambda each: each.error)
            is_settled = not self.bounds.near(refined.left, refined.error, epsilon)
            if is_settled or loosest.error < ENOUGH or not loosest.advance():
                break
        return refined

    @cached_property
    def _of_tuned(self) -> tuple[Tensor, Tensor]:
        """Approximate right vectors of W: the best in the span of those found, the head's and the change's."""
        thin = self.tuned.thin
        rows = torch.cat([self.found.right.t(), self.head.right.t(), *([] if thin is None else [thin.source])])
        rows = torch.linalg.qr(rows[: rows.shape[1]].t()).Q.t().contiguous()
        right, _, values = rayleigh_ritz(self.tuned.matrix, rows)
        return right.double(), values

    @cached_property
    def _of_base(self) -> tuple[Tensor, Tensor]:
        return self.head.right.t().double().contiguous(), self.head.values
