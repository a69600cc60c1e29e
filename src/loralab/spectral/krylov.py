"""Leading singular triplets from products with thin blocks, by Krylov subspaces of WᵀW.

Legend: W (out, in), s its singular values, θ = s² the eigenvalues of WᵀW; p the columns of a base head. Bases are rows.

Both ways project WᵀW on a growing subspace and take the leading Ritz pairs (Rayleigh-Ritz). `lanczos` knows nothing of W and
starts at random: block Lanczos with full reorthogonalisation (Golub & Underwood 1977). `Davidson` is for W₀ + a thin change, when
the head of W₀ is known: the subspace begins with the head's right vectors, whose images are known, and the change's, and grows
by the residuals Wᵀu − s v of the pairs that are wanted (Davidson 1975, unpreconditioned).

What is sure: a residual r certifies a singular value of W within r·s₁ of s, and a left vector within r·s₁/gap. What is not proved:
that no larger value was missed. A random start of 16 vectors misses one with probability zero; `Davidson` pursues every pair that
its residual could still lift above the k-th.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from loralab.spectral.products import Matrix, Tuned

BLOCK = 16
"""Rows of a Lanczos block: fewer waste the pass over W, more converge later (512 dimensions at 16, over 800 at 48)."""

ROUNDING = 2e-7
"""Rounding of float32 products, in units of s₁ (with W) or s₁² (with WᵀW)."""

PURSUED = 4
"""Pairs behind the k-th that `Davidson` improves as well; they speed up the k-th and give the gap behind it."""


@dataclass(frozen=True, eq=False)
class Triplets:
    """Leading singular triplets of a matrix W (out, in), largest first.

    Attributes:
        left: left singular vectors u, orthonormal columns; float32, from the dense routes float64.
        values: singular values s, float64.
        right: right singular vectors v, orthonormal columns, of the dtype of `left`.
        residuals: ‖Wᵀu − s v‖ / s₁, float64; W v = s u holds to rounding.
    """

    left: Float[Tensor, "out k"]
    values: Float[Tensor, " k"]
    right: Float[Tensor, "in k"]
    residuals: Float[Tensor, " k"]

    def __len__(self) -> int:
        return self.values.numel()

    def first(self, k: int) -> "Triplets":
        """Give the k leading ones."""
        return Triplets(self.left[:, :k], self.values[:k], self.right[:, :k], self.residuals[:k])


@torch.no_grad()
def lanczos(
    matrix: Matrix,
    size: int,
    *,
    tolerance: float,
    start: Float[Tensor, "c in"] | None = None,
    most: int | None = None,
    seed: int = 0,
) -> Triplets:
    """Give `size` leading triplets (fewer if the matrix has a smaller rank), whether they converged or not.

    Args:
        matrix: W (out, in).
        size: how many.
        tolerance: the residual at which a triplet counts as converged; 1e-6 is about what float32 can reach.
        start: right vectors thought to be near the wanted ones; the block is filled up with at least 6 random ones.
        most: dimensions at which the subspace stops growing, 200 + 8 · size unless told.
        seed: of the random start; the global generator is not touched.
    """
    width = matrix.shape[1]
    most = min(most or 200 + 8 * size, *matrix.shape)
    block = _start(matrix, start, seed)
    basis = block.new_empty(most + len(block), width)
    projected = block.new_zeros(most + len(block), most + len(block))
    dimensions, checked = 0, 0
    while True:
        known, dimensions = dimensions, dimensions + len(block)
        basis[known:dimensions] = block
        space = basis[:dimensions]
        _, square = matrix.squared(block)
        overlap = space @ square.t()
        projected[:dimensions, known:dimensions] = overlap
        projected[known:dimensions, :dimensions] = overlap.t()
        rest = square - overlap.t() @ space
        rest -= (rest @ space.t()) @ space
        block = _fresh(rest, space, ROUNDING * float(overlap.abs().max()))
        is_last = dimensions >= most or not len(block)
        if is_last or (dimensions >= size + 2 * BLOCK and dimensions >= checked + max(48, dimensions // 8)):
            checked = dimensions
            theta, P = torch.linalg.eigh(projected[:dimensions, :dimensions].double())
            theta, P = theta.flip(0)[:size].clamp_min(0), P.flip(1)[:, :size]
            # WᵀW v − θ v of a Ritz vector is what its coordinates in the last block make of `rest`.
            pull = rest.t().double() @ P[known:]
            residuals = pull.norm(dim=0) / (theta * theta[0]).sqrt().clamp_min(torch.finfo(theta.dtype).tiny)
            if is_last or not float(theta[0]) or float(residuals.max()) < tolerance:
                return _refined(matrix, P.t().to(basis) @ space)


def _start(matrix: Matrix, start: Tensor | None, seed: int) -> Tensor:
    """Give orthonormal rows in the row space of W: those handed in and random ones behind them."""
    given = matrix.dense.new_empty(0, matrix.shape[1]) if start is None else start
    count = min(max(BLOCK - len(given), 6), min(matrix.shape))
    noise = torch.randn(count, matrix.shape[0], generator=torch.Generator().manual_seed(seed))
    drawn = matrix.transposed(noise.to(matrix.dense))
    # Rows of a zero or rank-deficient W vanish or depend on each other; QR fills up with other directions.
    return torch.linalg.qr(torch.cat([given, drawn]).t()).Q.t().contiguous()[: min(matrix.shape)]


def _fresh(rest: Float[Tensor, "c in"], space: Float[Tensor, "d in"], nothing: float) -> Float[Tensor, "b in"]:
    """Give orthonormal rows that span what is left of some rows beside a space; what is smaller than `nothing` is rounding.

    No direction above that may be lost: Lanczos never comes back to it. Where rows depend on each other, what one adds to those
    before it can be largely rounding, which points back into the space; then it is made orthogonal again.
    """
    sizes = rest.norm(dim=1)
    rows, sizes = (rest / sizes[:, None])[sizes > nothing], sizes[sizes > nothing]
    Q, R = torch.linalg.qr(rows.t())
    added = R.diagonal().abs()
    if len(rows) and float(added.min()) < 0.1:
        # A row that adds nothing is dropped before the others are taken apart, or its rounding takes a direction from them.
        Q = torch.linalg.qr(rows[added * sizes > nothing].t()).Q
        for _ in range(2):
            Q = torch.linalg.qr(Q - space.t() @ (space @ Q)).Q
    return Q.t()[: max(space.shape[1] - len(space), 0)].contiguous()


def _refined(matrix: Matrix, rows: Float[Tensor, "c in"]) -> Triplets:
    """Make triplets of right Ritz vectors by one more Rayleigh-Ritz in float64, and measure their residuals."""
    image = matrix.times(rows)
    theta, P = torch.linalg.eigh(image.double() @ image.double().t())
    theta, P = theta.flip(0).clamp_min(0), P.flip(1).t()
    return _measured(matrix, P.to(rows) @ rows, P.to(rows) @ image, theta.sqrt())[0]


def _measured(matrix: Matrix, right: Tensor, image: Tensor, values: Tensor) -> tuple[Triplets, Tensor]:
    """Pair right rows with left ones, and give the residual vectors Wᵀu − s v beside the triplets.

    Values below float32's rounding of the largest have no left vector here, and are left out.
    """
    kept = values > values[:1] * 1e-6
    right, values = right[kept], values[kept]
    left = image[kept] / values[:, None].to(image)
    rest = matrix.transposed(left) - right * values[:, None].to(right)
    residuals = rest.norm(dim=1).double() / values[:1]
    return Triplets(left.t(), values, right.t(), residuals), rest


class Davidson:
    """The k leading triplets of W₀ + a thin change, and one more where there is one (its residual may be larger).

    Args:
        tuned: with a thin change.
        head: converged leading triplets of W₀, more than k.
        k: how many.
    """

    ROUNDS = 24

    @torch.no_grad()
    def __init__(self, tuned: Tuned, head: Triplets, k: int) -> None:
        thin = tuned.thin
        assert thin is not None
        assert len(head) > k
        self.k, self.floor = k, float(head.values[-1]) ** 2
        V, U, s0 = head.right.t(), head.left.t(), head.values.to(tuned.base)
        self.subspace = _Subspace(tuned.matrix, len(head) + len(thin.values) + (k + PURSUED) * self.ROUNDS)
        # The head's images cost no pass: W v = s u + ΔW v.
        self.subspace.grow(V, torch.addmm(s0[:, None] * U, V @ thin.source.t(), thin.reach))
        inside = thin.source @ V.t()
        outside = thin.source - inside @ V
        again = outside @ V.t()
        outside -= again @ V
        # The rows kept are orthonormal mixtures T of `outside`; their images are the same mixtures of images that are known.
        size, mix = torch.linalg.eigh(outside.double() @ outside.double().t())
        T = (mix[:, size > 1e-2] / size[size > 1e-2].sqrt()).t().to(V)
        rows = T @ outside
        pushed = T @ (tuned.pushed - (inside + again) @ (s0[:, None] * U))
        self.subspace.grow(rows, torch.addmm(pushed, rows @ thin.source.t(), thin.reach))

    @torch.no_grad()
    def reach(self, tolerance: float) -> Triplets:
        """Go on until the residuals of all k lie below the tolerance, or no further; they say so."""
        k, looked_at = self.k, self.k + PURSUED
        for _ in range(self.ROUNDS):
            triplets, rest = self.subspace.leading(looked_at)
            if len(triplets) < min(k, *self.subspace.matrix.shape):
                break
            theta, residuals = triplets.values.square(), triplets.residuals
            # A pair behind the k-th rises by |WᵀW v − θ v|² / (θ_k − ‖W₀‖² beyond the head) at most.
            pull = (residuals * triplets.values[0] * triplets.values).square()
            pull /= max(float(theta[k - 1]) - self.floor, 1e-3 * float(theta[k - 1]))
            wanted = residuals > tolerance
            wanted[k:] = (residuals[k:] > 1e-3) & (torch.arange(k, len(theta), device=theta.device) < k + PURSUED)
            wanted[k:] |= pull[k:] > 0.1 * (theta[k - 1] - theta[k:])
            near = int((self.subspace.values.square() > theta[k - 1] - pull.max()).sum())
            looked_at = max(near, k + PURSUED)
            if near > 4 * k + PURSUED:  # the k do not stand out: only a random start can tell that none is missed
                break
            if not bool(wanted.any()) and near <= len(triplets):
                break
            wanted[:k] |= residuals[:k] > 0.3 * tolerance
            if not self.subspace.expand(rest[wanted]):
                break
        return triplets.first(k + 1)


class _Subspace:
    """A growing orthonormal basis (rows), its images under W, and the projection of WᵀW on it in float64."""

    def __init__(self, matrix: Matrix, most: int) -> None:
        self.matrix, self.size = matrix, 0
        height, width = matrix.shape
        self.basis = matrix.dense.new_empty(most, width)
        self.image = matrix.dense.new_empty(most, height)
        self.exact = matrix.dense.new_empty(most, height, dtype=torch.float64)
        self.projected = matrix.dense.new_empty(most, most, dtype=torch.float64)
        self.values = matrix.dense.new_zeros(0, dtype=torch.float64)

    def grow(self, rows: Tensor, image: Tensor) -> None:
        old, new = self.size, self.size + len(rows)
        self.basis[old:new], self.image[old:new], self.exact[old:new] = rows, image, image.double()
        overlap = self.exact[:new] @ self.exact[old:new].t()
        self.projected[:new, old:new] = overlap
        self.projected[old:new, :new] = overlap.t()
        self.size = new

    def leading(self, count: int) -> tuple[Triplets, Tensor]:
        theta, P = torch.linalg.eigh(self.projected[: self.size, : self.size])
        self.values = theta.flip(0).clamp_min(0).sqrt()
        P = P.flip(1)[:, :count].t().to(self.basis)
        return _measured(self.matrix, P @ self.basis[: self.size], P @ self.image[: self.size], self.values[:count])

    def expand(self, rest: Tensor) -> bool:
        """Add what residuals hold beyond the basis; False if that is nothing, or there is no room."""
        space = self.basis[: self.size]
        for _ in range(2):
            rest = rest - (rest @ space.t()) @ space
        rows = _fresh(rest, space, ROUNDING * float(self.values[0]))
        if not len(rows) or self.size + len(rows) > len(self.basis):
            return False
        self.grow(rows, self.matrix.times(rows))
        return True


def dense_triplets(matrix: Float[Tensor, "out in"], k: int) -> Triplets:
    """Give the k leading triplets by one dense SVD in float64."""
    W = matrix.double()
    U, s, Vh = torch.linalg.svd(W, full_matrices=False)
    u, s, v = U[:, :k], s[:k], Vh[:k].t()
    residuals = (W.t() @ u - v * s).norm(dim=0) / s[:1].clamp_min(torch.finfo(s.dtype).tiny)
    return Triplets(u, s, v, residuals)
