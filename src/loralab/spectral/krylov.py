"""Leading singular triplets from products with thin blocks, by Krylov subspaces of WᵀW.

Legend: W (out, in), s its singular values, θ = s² the eigenvalues of WᵀW. Vectors are kept as rows, see `products.py`.

Both ways project WᵀW on a growing subspace and take the leading Ritz pairs (Rayleigh-Ritz). `lanczos` knows nothing of W and
starts at random: block Lanczos with full reorthogonalisation (Golub & Underwood 1977). `Davidson` is for W₀ + a thin change where
the head of W₀ is known: the subspace begins with the head's right vectors, whose images are known, and the change's, and grows
by the residuals Wᵀu − s v of the pairs that are wanted (Davidson 1975, without a preconditioner).

What is sure: a residual r means a singular value of W within r·s₁ of s, and a left vector within r·s₁/gap of the true one. What is
not proved: that no larger value was missed. A random start of a whole block misses one with probability zero; `Davidson` pursues
every pair that its residual could still lift above the k-th, and gives up where those are many.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from loralab.spectral.products import Matrix, Tuned

BLOCK = 16
"""Rows of a Lanczos block: fewer waste the pass over W, more converge later (512 dimensions with 16, over 800 with 48)."""

DRAWN = 6
"""Random rows of a Lanczos block at least, whatever start is handed in."""

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
        start: right vectors thought to be near the wanted ones; random ones join them.
        most: dimensions at which the subspace stops growing, 200 + 10 · size unless told.
        seed: of the random start; the global generator is not touched.
    """
    most = min(most or 200 + 10 * size, *matrix.shape)
    block = _start(matrix, start, seed)
    basis = block.new_empty(most + len(block), matrix.shape[1])
    projected = block.new_empty(len(basis), len(basis))
    dimensions, checked = 0, max(4 * size - 48, size)
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
        if is_last or dimensions >= checked + max(48, dimensions // 8):
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
    count = max(BLOCK - len(given), DRAWN)
    noise = torch.randn(count, matrix.shape[0], generator=torch.Generator().manual_seed(seed))
    drawn = matrix.transposed(noise.to(matrix.dense))
    # Rows may vanish or depend on each other where W has a small rank: QR then fills up with other directions, which do no harm.
    return torch.linalg.qr(torch.cat([given, drawn])[: min(matrix.shape)].t()).Q.t().contiguous()


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
    return _measured(matrix, *rayleigh_ritz(matrix, rows))[0]


def rayleigh_ritz(
    matrix: Matrix, rows: Float[Tensor, "c in"]
) -> tuple[Float[Tensor, "c in"], Float[Tensor, "c out"], Float[Tensor, " c"]]:
    """Give the Ritz vectors in the span of orthonormal rows, their images under W, and their values, largest first."""
    image = matrix.times(rows)
    theta, P = torch.linalg.eigh(image.double() @ image.double().t())
    theta, P = theta.flip(0).clamp_min(0), P.flip(1).t().to(rows)
    return P @ rows, P @ image, theta.sqrt()


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
    """Rounds in which `reach` gives up; four or five are usual."""

    @torch.no_grad()
    def __init__(self, tuned: Tuned, head: Triplets, k: int) -> None:
        thin = tuned.thin
        assert thin is not None
        assert len(head) > k
        self.k, self.beyond = k, float(head.values[-1]) ** 2
        V, image = head.right.t(), head.values.to(tuned.base)[:, None] * head.left.t()
        self.subspace = _Subspace(tuned.matrix, len(head) + len(thin.values) + (k + PURSUED) * self.ROUNDS)
        # The head's images cost no pass: W v = s u + ΔW v.
        self.subspace.grow(V, torch.addmm(image, V @ thin.source.t(), thin.reach))
        inside = thin.source @ V.t()
        outside = thin.source - inside @ V
        again = outside @ V.t()
        outside -= again @ V
        # What the change's right vectors add to the head: orthonormal mixtures of them, and as mixtures of known images their own.
        # Directions that lie in the head but for a tenth are left out, the residuals bring them if they are needed.
        size, mix = torch.linalg.eigh(outside.double() @ outside.double().t())
        T = (mix[:, size > 1e-2] / size[size > 1e-2].sqrt()).t().to(V)
        rows = T @ outside
        pushed = T @ (tuned.pushed - (inside + again) @ image)
        self.subspace.grow(rows, torch.addmm(pushed, rows @ thin.source.t(), thin.reach))

    @torch.no_grad()
    def reach(self, tolerance: float) -> Triplets:
        """Go on until the residuals of all k lie below the tolerance, or no further; they tell."""
        k, looked_at = self.k, self.k + PURSUED
        for _ in range(self.ROUNDS):
            triplets, rest = self.subspace.leading(looked_at)
            if len(triplets) < k:
                break
            wanted, near = self._pursued(triplets, tolerance)
            if near > 4 * k + PURSUED:  # the k do not stand out: only a random start can tell that none is missed
                break
            if not bool(wanted.any()) and near <= len(triplets):
                break
            wanted[:k] |= triplets.residuals[:k] > 0.3 * tolerance
            looked_at = max(near, k + PURSUED)
            if not self.subspace.expand(rest[wanted]):
                break
        return triplets.first(k + 1)

    def _pursued(self, triplets: Triplets, tolerance: float) -> tuple[Tensor, int]:
        """Mark the pairs that need more steps, and count the leading pairs that have to be looked at.

        A pair behind the k-th with θ' can rise by ‖WᵀW v − θ' v‖² / (θ_k − ‖W‖² outside the subspace) at most. It is pursued until
        that is a tenth of its distance to the k-th. Pairs that were not looked at are taken to rise as far as any that was.
        """
        k, theta, residuals = self.k, triplets.values.square(), triplets.residuals
        outside = max(float(theta[k - 1]) - self.beyond, 1e-3 * float(theta[k - 1]))
        rise = (residuals * triplets.values[0] * triplets.values).square() / outside
        wanted = residuals > tolerance
        wanted[k:] = rise[k:] > 0.1 * (theta[k - 1] - theta[k:])
        wanted[k : k + PURSUED] |= residuals[k : k + PURSUED] > 1e-3
        return wanted, int((self.subspace.values.square() > theta[k - 1] - rise.max()).sum())


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
        """Add rows that are orthonormal, and to the basis, with their images."""
        old, new = self.size, self.size + len(rows)
        self.basis[old:new], self.image[old:new], self.exact[old:new] = rows, image, image.double()
        overlap = self.exact[:new] @ self.exact[old:new].t()
        self.projected[:new, old:new] = overlap
        self.projected[old:new, :new] = overlap.t()
        self.size = new

    def leading(self, count: int) -> tuple[Triplets, Tensor]:
        """Give leading Ritz triplets, and their residuals Wᵀu − s v as rows."""
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
