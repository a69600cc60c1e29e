"""How much two sets of directions have in common: a delta's with its base's leading ones, and one delta's with another's.

Legend: ΔW (out, in) a change, for a pair scale · B A and never formed; U_k (out, k) and V_k (in, k) the base's leading singular
vectors, as orthonormal columns.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from loralab.delta.lowrank import Dense, LayerDelta, LowRank
from loralab.spectral.krylov import Triplets, dense_triplets
from loralab.spectral.spectrum import LEADING, is_large, leading


@dataclass(frozen=True)
class Shares:
    """Shares of ‖ΔW‖²_F, each in [0, 1]: inside the base's leading left, right, and both subspaces. NaN for a zero change."""

    left: float
    right: float
    both: float


@dataclass(frozen=True, eq=False)
class Directions:
    """The directions that a change moves: orthonormal columns in the output and in the input, as many on either side."""

    left: Float[Tensor, "out r"]
    right: Float[Tensor, "in r"]


@torch.no_grad()
def shares(change: LayerDelta, head: Triplets, k: int) -> Shares:
    """Give the shares of a change's energy inside the base's k leading directions.

    They are ‖U_kᵀΔW‖²_F, ‖ΔW V_k‖²_F and ‖U_kᵀΔW V_k‖²_F over ‖ΔW‖²_F. A random change of a square n x n weight has k/n of its
    energy in either one and (k/n)² in both.

    Args:
        change: of any kind.
        head: leading triplets of the base weight; with fewer than k of them, those there are count.
        k: directions.
    """
    U, V = head.left[:, :k].double(), head.right[:, :k].double()
    if isinstance(change, LowRank):
        B, A = change.B.to(U), change.A.to(V)
        R, T = torch.linalg.qr(B, mode="r").R, torch.linalg.qr(A.t(), mode="r").R
        inner, outer = U.t() @ B, A @ V
        parts = [change.scale * part for part in (R @ T.t(), inner @ T.t(), R @ outer, inner @ outer)]
        nothing = change.rank * _rounding(change, R, T) ** 2
    else:
        # In float32, and only thin products: a change in float64 would take twice the memory of the change itself.
        matrix = change.dense().to(head.left.device)
        inner = (head.left[:, :k].float().t() @ matrix).double()
        outer = (matrix @ head.right[:, :k].float()).double()
        parts = [torch.linalg.vector_norm(matrix, dim=1).double(), inner, outer, inner @ V]
        nothing = 0.0
    whole, *inside = (float(part.square().sum()) for part in parts)
    if whole <= nothing:
        return Shares(*[float("nan")] * 3)
    return Shares(*(min(1.0, part / whole) for part in inside))


@torch.no_grad()
def directions(change: LayerDelta, k: int, known: Triplets | None = None) -> Directions:
    """Give the k leading singular directions of a change; fewer where it has fewer of size above zero.

    Args:
        change: a pair, by two thin QRs and the SVD of a small core, in float64; or dense, a large one by Lanczos steps.
        k: the most directions to give.
        known: leading triplets of a dense change; None computes them.
    """
    if isinstance(change, LowRank):
        P, R = torch.linalg.qr(change.B.cpu().double())
        Q, T = torch.linalg.qr(change.A.cpu().double().t())
        U, s, Vh = torch.linalg.svd(change.scale * (R @ T.t()), full_matrices=False)
        left, right = P @ U, Q @ Vh.t()
        reach = abs(change.scale) * float(
            R.norm(dim=0) @ T.norm(dim=0)
        )  # what rounding is relative to, as in `spectrum`
        floor = torch.finfo(torch.float64).eps * max(change.shape) * reach
    else:
        found = known if known is not None else _leading(change, k)
        left, s, right = found.left, found.values, found.right
        floor = torch.finfo(torch.float32).eps * max(change.shape) * float(s.max()) if len(s) else 0.0
    count = min(k, int((s > floor).sum()))
    return Directions(left[:, :count].float(), right[:, :count].float())


def _leading(change: Dense, k: int) -> Triplets:
    if is_large(change):
        return leading(change, max(k, LEADING))
    return dense_triplets(change.dense().cpu(), min(k, *change.shape))


def _rounding(pair: LowRank, R: Tensor, T: Tensor) -> float:
    """Give the size below which singular values of a pair are rounding, as `spectrum` does: links of a chain may cancel."""
    return torch.finfo(torch.float64).eps * max(pair.shape) * abs(pair.scale) * float(R.norm(dim=0) @ T.norm(dim=0))


def similarity(one: Float[Tensor, "side a"], other: Float[Tensor, "side b"]) -> float:
    """Give ‖UaᵀUb‖²_F / min(a, b) of two orthonormal bases: 0 if they are orthogonal, 1 if one holds the other.

    Source: Hu et al. 2021 (2106.09685), eq. 4. NaN where one is empty. Two random subspaces of a space of `side` dimensions have
    max(a, b) / side on average.
    """
    fewest = min(one.shape[1], other.shape[1])
    if not fewest:
        return float("nan")
    return min(1.0, float((one.t() @ other).double().square().sum()) / fewest)


def cosines(tuned: Float[Tensor, "side k"], base: Float[Tensor, "side p"]) -> Float[Tensor, "p k"]:
    """Give |cos| of each base vector with each tuned one, all of length 1: the map of Shuttleworth et al. 2024 (2410.21228)."""
    return (base.to(tuned).t() @ tuned).abs()
