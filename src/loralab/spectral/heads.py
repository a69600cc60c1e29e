"""The head of a base weight: its leading triplets, converged, computed once and kept on disk for every delta of the base.

The bounds on all other cosines (`bounds.py`) hold for converged columns only; so a head ends before the first column that is not,
and a matrix without any (a flat spectrum) has an empty head. Half precision would not do: heads are float32, 2.1 MB for a weight of
4096 x 4096.
"""

import hashlib
import os
from contextlib import suppress
from pathlib import Path

import torch
from jaxtyping import Float
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from loralab.errors import LoralabError
from loralab.run.files import write_atomic
from loralab.spectral.krylov import Triplets, dense_triplets, lanczos
from loralab.spectral.products import TINY, Matrix, energy_of

SIZE = 64
"""Columns of a head: enough for six to eight Golub-Kahan steps to decide the rest, and found in about a second at 4096 x 4096."""

TOLERANCE = 1e-6
"""Residual that ends the iteration; the last columns have it, the first are at float32's rounding, 1e-7."""

KEPT = 3e-6
"""Largest residual of a column that is kept, measured after the iteration."""

DENSE = 512
"""Shorter side up to which one dense SVD is faster than the iteration."""

VERSION = 1
"""Of the algorithm and the file: another number, another key."""


@torch.no_grad()
def head_of(weight: Float[Tensor, "out in"], size: int = SIZE) -> Triplets:
    """Give the leading triplets of a weight in float32, trimmed to the converged prefix; `size` of them at most.

    Values below 1e-6 s₁ are left out: there float32 cannot tell a direction from none.

    Raises:
        DeltaError: the weight holds NaN or infinite values.
    """
    base = weight.detach().float()
    size = min(size, *base.shape)
    if not TINY < energy_of(base, "the base weight") < 1 / TINY:
        empty = base.new_zeros(0, dtype=torch.float64)
        return Triplets(base.new_zeros(base.shape[0], 0), empty, base.new_zeros(base.shape[1], 0), empty)
    found = dense_triplets(base, size) if min(base.shape) <= DENSE else lanczos(Matrix(base), size, tolerance=TOLERANCE)
    good = (found.residuals <= KEPT) & (found.values > 1e-6 * found.values[:1])
    found = found.first(int(good.long().cumprod(0).sum()))
    return Triplets(found.left.float(), found.values, found.right.float(), found.residuals)


class HeadCache:
    """Heads on disk, found by what the weight holds, so that no name or path can mix them up.

    A cache never fails: a file that is damaged, or a folder that cannot be written, costs the time to compute the head again.

    Args:
        folder: where; unless given `heads` in $LORALAB_CACHE, in $XDG_CACHE_HOME/loralab or in ~/.cache/loralab.
        size: columns of each head.
    """

    def __init__(self, folder: Path | None = None, size: int = SIZE) -> None:
        self.folder, self.size = folder or _root() / "heads", size

    @torch.no_grad()
    def of(self, weight: Float[Tensor, "out in"]) -> Triplets:
        """Give the head of a weight, from disk where it is known.

        Raises:
            DeltaError: the weight holds NaN or infinite values.
        """
        path = self.folder / f"{self.key(weight)}.safetensors"
        kept = _read(path)
        if kept is not None:
            return Triplets(*(part.to(weight.device) for part in kept))
        head = head_of(weight, self.size)
        with suppress(OSError, LoralabError):
            self.folder.mkdir(parents=True, exist_ok=True)
            write_atomic(path, _packed(head))
        return head

    def key(self, weight: Float[Tensor, "out in"]) -> str:
        """Give what a head is found by: SHA-256 of the weight's bytes, shape, dtype, size and version."""
        stored = weight.detach().cpu().contiguous().view(torch.uint8).numpy()
        digest = hashlib.sha256(stored.data).hexdigest()
        dtype = str(weight.dtype).removeprefix("torch.")
        return f"{digest}-{weight.shape[0]}x{weight.shape[1]}-{dtype}-{self.size}-v{VERSION}"


def _root() -> Path:
    if own := os.environ.get("LORALAB_CACHE"):
        return Path(own)
    shared = os.environ.get("XDG_CACHE_HOME")
    return (Path(shared) if shared else Path.home() / ".cache") / "loralab"


def _packed(head: Triplets) -> bytes:
    """Give a safetensors file, vectors as rows, with a checksum of its tensors."""
    parts = {
        "left": head.left.t().cpu().contiguous(),
        "values": head.values.cpu().contiguous(),
        "right": head.right.t().cpu().contiguous(),
        "residuals": head.residuals.cpu().contiguous(),
    }
    return save(parts, metadata={"sha256": _checksum(parts)})


def _read(path: Path) -> tuple[Tensor, Tensor, Tensor, Tensor] | None:
    """Give left, values, right and residuals from a file; None if it is absent or not what was written."""
    try:
        with safe_open(path, framework="pt") as file:
            parts = {name: file.get_tensor(name) for name in ("left", "values", "right", "residuals")}
            if (file.metadata() or {}).get("sha256") != _checksum(parts):
                return None
    except (OSError, SafetensorError):
        return None
    return parts["left"].t(), parts["values"], parts["right"].t(), parts["residuals"]


def _checksum(parts: dict[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name in sorted(parts):
        digest.update(f"{name} {tuple(parts[name].shape)} {parts[name].dtype}".encode())
        digest.update(parts[name].view(torch.uint8).numpy().data)
    return digest.hexdigest()
