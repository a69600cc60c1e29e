"""Bounds on the cosine between a vector and EVERY left singular vector of a base, most of which are never computed.

Legend: W₀ = Σ sᵢ xᵢ zᵢᵀ (out, in) the base, y a unit vector, cᵢ = xᵢ·y, t = s². The head: the leading triplets that are computed.

1. The head. A computed left vector with residual r and gap g to the values beside it lies within sin = r / (g − r) of a true one
   (Wedin 1972), so its |cᵢ| is known to that. Columns without a clear gap do not count as head. Where that does not decide, those
   near the threshold are refined in float64 (`sharp.py`), for their own |cᵢ| alone: all else stands as it was.
2. What the head leaves of y, y' with ρ = ‖y'‖, bounds all other cosines at once: |cᵢ| ≤ ρ + Σ_l |c_l| sin_l.
3. The spectral measure of y'/ρ, μ = Σ (cᵢ/ρ)² δ(t − tᵢ). A few Golub-Kahan steps from y' give its first orthonormal polynomials pⱼ,
   and μ({t}) ≤ λ(t) = 1 / Σⱼ pⱼ(t)², the Christoffel function (Akhiezer 1965, ch. 2): |cᵢ| ≤ ρ √max λ. The same holds for the
   measure t dμ, which is blind to what W₀ᵀ maps to zero; at each t the smaller of the two bounds counts.
4. Tall W₀: the part of y' that no xᵢ can hold (in the left null space) sits at t = 0 and blocks step 3. It is projected out, by a
   Cholesky factor of W₀ᵀW₀ that is made when the first vector needs it.

Strict in exact arithmetic, the maximum of λ over all t included, if the head missed no value among its own (as sure as its random
start of 16 vectors); of the head's residuals, what is of second order (1e-8) is left out. Rounding of float32 is covered by margins
of ten times what was measured and more, not by proof. A vector is never found to be LIKE a direction outside the head, by a
converged Ritz vector say, since several base vectors might share it: it stays undecided.
"""

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from jaxtyping import Float
from numpy import ndarray
from torch import Tensor

from loralab.spectral.krylov import Triplets
from loralab.spectral.products import Matrix

ROUNDING = 5e-7
"""Rounding of a float32 product with W₀, in units of s₁: added to each residual."""

HEAD_MARGIN = 2e-5
"""Added to bounds on cosines with the head."""

SHARP_MARGIN = 1e-12
"""The same where both vectors are known in float64 (`sharp.py`): a scalar product of 10 000 terms rounds to 1e-14."""

BULK_MARGIN = 1e-4
"""Added to bounds on all other cosines: float32 steps moved them by 1e-7, and once by 2.5e-6."""

CLEAR = 0.05
"""Largest sine between a computed and a true left vector for which the one stands for the other."""

FIRST, MOST = 4, 40
"""Golub-Kahan steps after which the bound is first evaluated, and after which it is given up."""

SPREAD = 1.05
"""How far the proved maximum of λ may lie above the largest value seen."""

APART = 1000
"""How much farther apart than rounding moves them the zeros must lie: closer ones divide a mass that float32 cannot divide."""

FLOOR = 4e-7
"""Smallest eigenvalue of W₀ᵀW₀ / s₁² that float32 products tell from zero."""


@dataclass(frozen=True, eq=False)
class Interval:
    """For each vector y, what holds max_i |xᵢ·y| over all left vectors of the base."""

    lower: Float[ndarray, " k"]
    upper: Float[ndarray, " k"]


class Bounds:
    """Bounds for vectors against one base.

    Args:
        base: W₀ (out, in).
        head: its leading triplets, at least one.
    """

    def __init__(self, base: Matrix, head: Triplets) -> None:
        self.base, self.top = base, float(head.values[0])
        sines = _sines(head)
        clear = np.flatnonzero(sines <= CLEAR)
        self.columns, self.sines = clear, sines[clear]
        self.sharp: dict[int, tuple[Tensor, float]] = {}
        """Left vectors of the head known in float64, with their distances from the true ones, by their place in `columns`."""
        self.left = head.left.t()[clear].double()
        self.right = head.right.t()[clear].contiguous()

    @torch.no_grad()
    def of(self, rows: Float[Tensor, "k out"], errors: Float[ndarray, " k"], epsilon: float) -> Interval:
        """Bound the largest cosine of each vector as closely as it takes to tell on which side of epsilon it lies.

        Args:
            rows: unit vectors, each within its error of the vector y that is meant.
            errors: distances.
            epsilon: the threshold; an interval that holds it means undecided.
        """
        exact, head = rows.double(), self.left
        signed = exact @ head.t()
        rest = exact - signed @ head
        rest -= (rest @ head.t()) @ head
        cosines = signed.abs().cpu().numpy()
        low, high = self._of_head(exact, cosines, errors)
        lower, upper = low.max(1, initial=0.0), high.max(1, initial=0.0)
        beside = cosines @ self.sines + HEAD_MARGIN + errors
        others = rest.norm(dim=1).cpu().numpy() + beside
        todo = np.flatnonzero((lower < epsilon) & (upper < epsilon) & (others >= epsilon))
        is_tall = self.base.shape[0] > self.base.shape[1]
        if len(todo):
            bulk = self._of_bulk(rest[todo], epsilon - beside[todo], MOST // 4 if is_tall else MOST)
            others[todo] = np.minimum(others[todo], bulk + beside[todo])
            todo = todo[others[todo] >= epsilon]
        if len(todo) and is_tall:
            inside, lost = self._within_range(rest[todo])
            bulk = self._of_bulk(inside, epsilon - beside[todo] - lost, MOST)
            others[todo] = np.minimum(others[todo], bulk + beside[todo] + lost)
        upper = np.minimum(np.maximum(upper, others), 1.0)
        return Interval(np.clip(lower, 0.0, upper), upper)

    def near(self, row: Float[Tensor, " out"], error: float, epsilon: float) -> list[int]:
        """Give the places in `columns` that leave open whether a vector is like one of them."""
        rows = row[None]
        low, high = self._of_head(rows, (rows @ self.left.t()).abs().cpu().numpy(), np.array([error]))
        return [] if (low >= epsilon).any() else np.flatnonzero(high[0] >= epsilon).tolist()

    def _of_head(
        self, rows: Float[Tensor, "k out"], cosines: Float[ndarray, "k p"], errors: Float[ndarray, " k"]
    ) -> tuple[Float[ndarray, "k p"], Float[ndarray, "k p"]]:
        """Bound the cosines with the true vectors that the head stands for."""
        across = self.sines * np.sqrt(np.clip(1 - cosines**2, 0, 1))
        spread = HEAD_MARGIN + errors[:, None]
        low, high = cosines * np.sqrt(1 - self.sines**2) - across - spread, cosines + across + spread
        for i, (left, error) in self.sharp.items():
            cosine, spread = (rows @ left).abs().cpu().numpy(), error + errors + SHARP_MARGIN
            low[:, i], high[:, i] = np.maximum(low[:, i], cosine - spread), np.minimum(high[:, i], cosine + spread)
        return low, high

    def _of_bulk(self, rest: Tensor, target: Float[ndarray, " c"], most: int) -> Float[ndarray, " c"]:
        """Bound |xᵢ·y'| over all base vectors, until each lies below its target or `most` steps are done."""
        rho = rest.norm(dim=1)
        size = rho.cpu().numpy()
        found, share = size + BULK_MARGIN, ((target - BULK_MARGIN).clip(0) / size) ** 2
        steps = _Steps(self.base, (rest / rho[:, None]).to(self.base.dense), self.right)
        live = np.arange(len(rest))
        shares: list[list[float]] = [[] for _ in live]
        for count in range(1, most + 1):
            steps.advance()
            if count < FIRST:
                continue
            kept = []
            for i, row in enumerate(live):
                a, b = steps.coefficients(i)
                shares[row].append(largest_share(a, b, share[row], ROUNDING * self.top))
                if shares[row][-1] <= share[row]:  # above the target it is a mass seen, and bounds nothing
                    found[row] = min(found[row], size[row] * shares[row][-1] ** 0.5 + BULK_MARGIN)
                if found[row] >= target[row] and not _has_stalled(shares[row], share[row]):
                    kept.append(i)
            if not kept:
                break
            live = live[kept]
            steps.keep(kept)
        return found

    @cached_property
    def _range(self) -> tuple[Tensor, float] | None:
        """Cholesky factor of W₀ᵀW₀ and a lower bound of the smallest singular value; None if float32 cannot tell it from 0."""
        W, width = self.base.dense, self.base.shape[1]
        gram = W.new_empty(width, width, dtype=torch.float64)
        for i in range(0, width, 512):
            strip = W[:, i : i + 512].t() @ W[:, i:]  # the upper triangle only
            gram[i : i + 512, i:] = strip
            gram[i:, i : i + 512] = strip.t()
        factor, failed = torch.linalg.cholesky_ex(gram)
        if failed:
            return None
        vectors = torch.randn(width, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(W.device)
        for _ in range(12):
            vectors = torch.cholesky_solve(torch.linalg.qr(vectors).Q, factor)
        smallest = 0.5 / float(torch.linalg.matrix_norm(vectors, 2))
        return (factor, smallest**0.5) if smallest >= FLOOR * self.top**2 else None

    def _within_range(self, rest: Float[Tensor, "c out"]) -> tuple[Float[Tensor, "c out"], Float[ndarray, " c"]]:
        """Project rows on the range of W₀; also give how much a cosine may have changed by that (1 if it cannot be done)."""
        if self._range is None:
            return rest, np.ones(len(rest))
        factor, smallest = self._range
        null = rest
        for _ in range(3):
            pulled = self.base.transposed(null.to(self.base.dense)).double()
            null = null - self.base.times(torch.cholesky_solve(pulled.t(), factor).t().to(self.base.dense)).double()
        # A part z that was taken away held |xᵢ·z| ≤ ‖W₀ᵀz‖ / sᵢ of each base vector.
        pulled = self.base.transposed(null.to(self.base.dense)).double().norm(dim=1) + ROUNDING * self.top
        return rest - null, (pulled / smallest).clamp_max(1.0).cpu().numpy()


def _sines(head: Triplets) -> Float[ndarray, " p"]:
    """Give the largest sine between each computed left vector and a true one; 1 where nothing can be said.

    The gap behind the last value is not known, so nothing can be said of the last vector.
    """
    values = head.values.cpu().numpy() / float(head.values[0])
    apart = np.append(-np.diff(values), 0.0)
    gaps = np.minimum(apart, np.append(np.inf, apart[:-1]))
    residuals = head.residuals.cpu().numpy() + ROUNDING
    clear = gaps > 2 * residuals
    return np.where(clear, residuals / np.where(clear, gaps - residuals, 1.0), 1.0)


class _Steps:
    """Golub-Kahan bidiagonalisation of the deflated W₀ from several left vectors, side by side.

    It runs as Lanczos on W₀ᵀW₀ from W₀ᵀy', one pass over W₀ a step; a and b are the diagonal and the subdiagonal of the bidiagonal
    matrix. Deflating on the right is exact, since W₀ v = s x holds for the head to rounding.
    """

    def __init__(self, base: Matrix, rows: Float[Tensor, "c out"], deflated: Float[Tensor, "p in"]) -> None:
        self.base, self.deflated = base, deflated
        start = base.transposed(rows)
        start -= (start @ deflated.t()) @ deflated
        size = start.norm(dim=1)
        self.v = [start / size.clamp_min(1e-30)[:, None]]
        self.a, self.b = [size.double()], list[Tensor]()

    def advance(self) -> None:
        """Take one more step with every vector."""
        v, a = self.v[-1], self.a[-1]
        image, rest = self.base.squared(v)
        b = (image.double().square().sum(1) - a.square()).clamp_min(0).sqrt()
        known = torch.stack(self.v, 1)
        for _ in range(2):
            rest = rest - (rest @ self.deflated.t()) @ self.deflated
            rest = rest - (known.transpose(1, 2) @ (known @ rest[:, :, None]))[:, :, 0]
        size = rest.norm(dim=1)
        self.v.append(rest / size.clamp_min(1e-30)[:, None])
        self.b.append(b)
        self.a.append(torch.where(b > 0, size.double() / b.clamp_min(1e-30), 0.0))

    def coefficients(self, i: int) -> tuple[Float[ndarray, " q1"], Float[ndarray, " q"]]:
        """Give a and b of one vector."""
        return torch.stack(self.a)[:, i].cpu().numpy(), torch.stack(self.b)[:, i].cpu().numpy()

    def keep(self, rows: list[int]) -> None:
        """Go on with some of the vectors."""
        self.v, self.a, self.b = ([part[rows] for part in parts] for parts in (self.v, self.a, self.b))


def largest_share(a: Float[ndarray, " q1"], b: Float[ndarray, " q"], target: float, noise: float = 0.0) -> float:
    """Bound the largest point mass of a measure from above, from the first Golub-Kahan coefficients of its start vector.

    The polynomial K = Σⱼ pⱼ², j ≤ q, has degree d = 2q. Between the N points of a Chebyshev grid it leaves the range seen at them
    by at most the factor 1 / cos(πd / 2N) about its middle (Ehlich & Zeller 1964), so each cell has a proved minimum; cells are
    halved until that is close to what was seen. Beyond the last zero of p_q, K only grows, and so does t K: the cells between 0 and
    the last zero of both are all there is.

    Args:
        a: diagonal of the lower bidiagonal matrix, one more than steps.
        b: subdiagonal.
        target: give up, with a mass seen that is no bound, as soon as one above this is seen.
        noise: how far rounding may move a singular value. Base vectors of values nearer than that are any rotation of each other to
            float32, so their masses must stay one: where the polynomials begin to tell them apart there is no bound, which is 1.
    """
    q = len(b)
    if not (a.all() and b.all()):  # the Krylov space is exhausted: nothing more to learn
        return 1.0
    scale = float((a[:-1] ** 2 + b**2).max())
    a, b = a / scale**0.5, b / scale**0.5
    left = a[:q] ** 2 + np.append(0.0, b[:-1]) ** 2, a[:q] * b
    right = a[:q] ** 2 + b**2, a[1:] * b
    zeros = _zeros(*left), _zeros(*right)
    reach = 2 * APART * noise / scale**0.5
    if any((np.diff(each) < reach * np.sqrt(each[1:].clip(0))).any() for each in zeros):
        return 1.0
    edges = np.unique(np.concatenate([[0.0], *zeros]).clip(0.0))
    low, high = edges[:-1], edges[1:]
    count = 8 * q
    grid = (1 - np.cos(np.pi * (np.arange(count) + 0.5) / count)) / 2
    seen, proved = 0.0, 0.0
    for _ in range(40):
        t = low[:, None] + (high - low)[:, None] * grid
        kernel, shifted = _kernel(t, *left), _kernel(t, *right)
        with np.errstate(divide="ignore"):
            seen = max(seen, float(np.minimum(1 / kernel, a[0] ** 2 / (t * shifted)).max()))
            if seen > target:
                return min(seen, 1.0)
            mass = np.minimum(1 / _minimum(kernel), a[0] ** 2 / (low * _minimum(shifted)))
        is_open = mass > SPREAD * seen
        proved = max(proved, float(mass[~is_open].max(initial=0.0)))
        if not is_open.any():
            return min(proved, 1.0)
        middle = (low + high)[is_open] / 2
        low, high = np.append(low[is_open], middle), np.append(middle, high[is_open])
    return 1.0


def _zeros(alpha: Float[ndarray, " q"], beta: Float[ndarray, " q"]) -> Float[ndarray, " q"]:
    """Give the zeros of p_q, rising: the eigenvalues of the Jacobi matrix."""
    return np.linalg.eigvalsh(np.diag(alpha) + np.diag(beta[:-1], -1))


def _kernel(t: Float[ndarray, "c n"], alpha: Float[ndarray, " q"], beta: Float[ndarray, " q"]) -> Float[ndarray, "c n"]:
    """Give K(t) = p₀² + … + p_q² by the three-term recurrence of the orthonormal polynomials."""
    before, p, total = np.zeros_like(t), np.ones_like(t), np.ones_like(t)
    for j in range(len(alpha)):
        before, p = p, ((t - alpha[j]) * p - (beta[j - 1] * before if j else 0.0)) / beta[j]
        total += p * p
    return total


def _minimum(kernel: Float[ndarray, "c n"]) -> Float[ndarray, " c"]:
    """Bound each cell's minimum from below by its values on a Chebyshev grid of 4 points a degree; 0 where nothing is proved."""
    high, low = kernel.max(1), kernel.min(1)
    return ((high + low) / 2 - (high - low) / 2 / np.cos(np.pi / 8)).clip(0)


def _has_stalled(shares: list[float], target: float) -> bool:
    """Whether more steps are in vain: a bulk's largest share falls as 1/steps, that of one direction stays.

    Giving up early costs a decomposition, never a verdict.
    """
    return len(shares) > 4 and shares[-1] > max(1.2 * float(target), 0.9 * shares[-5])
