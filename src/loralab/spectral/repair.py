"""Edits of a delta: scale it, taper it by depth, shrink its intruders, with the controls they must beat; and compress it.

Legend: W₀ (out, in) a base weight, ΔW its change, W = W₀ + ΔW the tuned weight with singular triplets (u, s, v), largest first; λ
the strength of an edit. Everything is a pure function of tensors. What an edit does not touch stays the very object that it was,
so λ = 1 changes nothing, bit for bit; what it touches is kept in float32 at least. A pair stays a pair: W is never formed.
"""

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from loralab.delta.lowrank import Delta, Dense, LayerDelta, LowRank
from loralab.errors import DeltaError, did_you_mean
from loralab.spectral.intruders import Intruders
from loralab.spectral.krylov import Triplets
from loralab.spectral.products import Stored
from loralab.spectral.thresholds import compressed, norm_of, thresholded, widened

__all__ = ["FAMILIES", "Edit", "compressed", "default_sweep", "depth_of", "edited", "norm_of", "sharpened", "touched"]

FAMILIES = {
    "scale": (0.0, math.inf, "the whole change times λ (WiSE-FT, Wortsman et al. 2021, 2109.01903)"),
    "taper": (0.0, 1.0, "λ at the first block, rising evenly to 1 at the last (LiNeS, Wang et al. 2024, 2410.17146)"),
    "top1": (0.0, math.inf, "each matrix's top-ranked intruder times λ (Shuttleworth et al. 2024, 2410.21228)"),
    "all": (0.0, math.inf, "every intruder among the leading vectors times λ (as PEFT's reduce_intruder_dimension)"),
    "neighbour": (0.0, math.inf, "control: the nearest vector that is no intruder times λ"),
    "matched": (0.0, math.inf, "control: each change shrunk as a whole to the norm that another edit leaves it"),
    "threshold": (0.0, math.inf, "dense changes without singular values under λ · τ (Gavish & Donoho 2014, 1305.5870)"),
}
"""Family → least and largest strength, and what it does."""

MATCHED = ("top1", "all", "threshold")
"""Families that `matched` is a control of."""

TOLERANCE, STEPS = 1e-9, 60
"""Residual ‖Wᵀu − s v‖ / s₁ that `sharpened` aims at, and its most steps."""

# What a token passes before the first block; gpt_neox calls its head embed_out.
_BEFORE = re.compile(r"embed(?!_out)|(^|\.)(wte|wpe|shared|project_in)(\.|$)")


@dataclass(frozen=True)
class Edit:
    """One point of a sweep: a family, its strength λ, and for `matched` the family it is the control `of`.

    Raises:
        DeltaError: no such family, or a strength that it does not take.
    """

    family: str
    strength: float
    of: str | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "strength", float(self.strength))  # a NumPy number writes itself differently
        if self.family not in FAMILIES:
            near = did_you_mean(self.family, list(FAMILIES))
            fix = f"did you mean {near}?" if near else f"take one of {', '.join(FAMILIES)}"
            raise DeltaError(f"no edit is called {self.family!r}", where=self._text(), fix=fix)
        least, most, _ = FAMILIES[self.family]
        if not (math.isfinite(self.strength) and least <= self.strength <= most):
            room = "0 or above" if most == math.inf else f"from {least:g} to {most:g}"
            fix = f"{self.neutral:g} changes nothing"
            raise DeltaError(f"the strength of {self.family} is {room}", where=self._text(), fix=fix)
        if (self.family == "matched") != (self.of is not None) or self.of not in (None, *MATCHED):
            fix = f"write matched {' or '.join(MATCHED)} and a strength, as in: matched top1 0.7"
            raise DeltaError(
                "matched, and nothing else, names the edit that it is a control of", where=self._text(), fix=fix
            )

    @classmethod
    def parse(cls, text: str) -> "Edit":
        """Read what `str` writes: `top1 0.75`, `matched top1 0.75`.

        Raises:
            DeltaError: that is no edit.
        """
        words = text.split()
        try:
            strength = float(words[-1])
        except (ValueError, IndexError):
            fix = "write a family and a number, as in: top1 0.75"
            raise DeltaError("an edit ends in its strength", where=repr(text), fix=fix) from None
        if not 2 <= len(words) <= 3:
            raise DeltaError("an edit is a family and its strength", where=repr(text), fix="as in: top1 0.75")
        return cls(words[0], strength, *words[1:-1])

    def __str__(self) -> str:
        return self._text()

    def _text(self) -> str:
        return f"{self.curve} {repr(self.strength).removesuffix('.0')}"

    @property
    def curve(self) -> str:
        """Name what edits of all strengths share: `top1`, `matched top1`."""
        return f"{self.family} {self.of}" if self.of else self.family

    @property
    def acts(self) -> str:
        """Give the family that decides what is edited, `top1` for `matched top1`."""
        return self.of or self.family

    @property
    def needs_intruders(self) -> bool:
        """Tell whether the singular triplets of the tuned weights are needed."""
        return self.acts in ("top1", "all", "neighbour")

    @property
    def neutral(self) -> float:
        """Give the strength that leaves a delta as it is: 1, or 0 for a threshold."""
        return 0.0 if self.acts == "threshold" else 1.0


def default_sweep(kind: str) -> list[Edit]:
    """Give the edits worth trying on a delta of a kind, `low-rank` or `dense`; `scale` 0 is the base, 1 the delta as it is."""
    shrink = (0.0, 0.3, 0.5, 0.7, 0.9)
    grid: dict[tuple[str, str | None], tuple[float, ...]] = {
        ("scale", None): (0.0, 0.25, 0.5, 0.7, 0.8, 0.9, 1.0),
        ("taper", None): (0.0, 0.25, 0.5, 0.75),
        ("top1", None): shrink,
        ("all", None): shrink,
        ("neighbour", None): (0.3, 0.7),
        ("matched", "top1"): shrink,
        ("matched", "all"): shrink,
    }
    if kind == "dense":
        grid |= {("threshold", None): (0.5, 1.0, 1.5), ("matched", "threshold"): (1.0,)}
    return [Edit(family, strength, of) for (family, of), strengths in grid.items() for strength in strengths]


@torch.no_grad()
def edited(
    delta: Delta,
    edit: Edit,
    *,
    found: Mapping[str, Intruders] | None = None,
    whole: Callable[[str], Tensor] | None = None,
    blocks: int | None = None,
) -> Delta:
    """Apply one edit to a delta.

    `scale` and `taper` also move the parameters that were trained whole: between the base's values and the tuned ones. Other
    edits leave those, and vectors, as they are. A matrix without intruder is untouched by edits of intruders and their
    controls. `matched` may also enlarge a change: removing an intruder takes part of the base's weight along.

    Args:
        delta: of any method.
        edit: what to do.
        found: every matrix by name, where the edit `needs_intruders`; best `sharpened`.
        whole: parameter name → the base's value, where the delta holds parameters whole and the edit scales them.
        blocks: number of the base's transformer blocks; None is up to the deepest that the delta reaches.

    Raises:
        DeltaError: what the edit needs is missing or of another shape, there is nothing it could act on, or (`threshold`) a
            layer is a low-rank pair.
    """
    if edit.strength == edit.neutral:
        return delta
    if edit.family in ("scale", "taper"):
        share = _shares(delta, edit, blocks)
        layers = {name: _scaled(change, share(name)) for name, change in delta.items()}
        moved = {name: _between(name, value, share(name), whole) for name, value in delta.whole.items()}
        return replace(delta, layers=layers, whole=moved)
    if not delta.layers:
        fix = "read it as differences of weight matrices, against its base"
        raise DeltaError(f"{edit} acts on weight matrices, and this delta names none as such", fix=fix)
    return replace(delta, layers={name: _edited(name, change, edit, found) for name, change in delta.items()})


def _shares(delta: Delta, edit: Edit, blocks: int | None) -> Callable[[str], float]:
    """Give the factor of each layer or parameter by name."""
    if edit.family == "scale":
        return lambda _: edit.strength
    last = (blocks or 1 + max(map(depth_of, (*delta, *delta.whole)), default=0)) - 1

    def taper(name: str) -> float:
        depth = depth_of(name)
        if depth < 0:
            # LiNeS' code gives λ to all outside the blocks; here what comes behind the last block counts as deepest.
            return edit.strength if name in delta.embeddings or _BEFORE.search(name) else 1.0
        return 1.0 if depth >= last else edit.strength + (1 - edit.strength) * depth / last

    return taper


def depth_of(name: str) -> int:
    """Give the block that a layer or parameter lies in, counted from 0: the first number in its name, or −1."""
    return next((int(part) for part in name.split(".") if part.isdecimal()), -1)


def _between(name: str, tuned: Tensor, share: float, whole: Callable[[str], Tensor] | None) -> Tensor:
    """Give base + share · (tuned − base) of a parameter that was trained whole, in its own dtype."""
    if share == 1:
        return tuned
    try:
        base = None if whole is None else whole(name)
    except KeyError:
        base = None
    if base is None:
        fix = "give `whole`, the base's parameters by name"
        raise DeltaError("to scale a parameter that was trained whole, the base's value is needed", where=name, fix=fix)
    if base.shape != tuned.shape:
        raise DeltaError(f"the base has {tuple(base.shape)} here, the delta {tuple(tuned.shape)}", where=name)
    return torch.lerp(base.to(tuned.device).double(), tuned.double(), share).to(tuned.dtype)


def _scaled(change: LayerDelta, share: float) -> LayerDelta:
    """Multiply a change: of a pair the scale alone."""
    if share == 1:
        return change
    if isinstance(change, LowRank):
        return replace(change, scale=change.scale * share)
    return Dense(widened(change.weight) * share)


def _edited(name: str, change: LayerDelta, edit: Edit, found: Mapping[str, Intruders] | None) -> LayerDelta:
    if len(change.shape) != 2:
        return change
    if edit.acts == "threshold":
        if isinstance(change, LowRank):
            why = "a low-rank pair has no bulk of noise whose size a threshold could be read from"
            raise DeltaError(why, where=name, fix="compress it to a smaller rank instead")
        result: LayerDelta = thresholded(change, edit.strength)
    else:
        known = _known(name, change, found)
        result = _shifted(change, known.triplets, touched(edit, known), edit.strength)
    if edit.family != "matched" or result is change:
        return result
    size = norm_of(change)
    return _scaled(change, norm_of(result) / size) if size else change


def _known(name: str, change: LayerDelta, found: Mapping[str, Intruders] | None) -> Intruders:
    if found is None or name not in found:
        raise DeltaError(
            "the intruders of this matrix were not looked for", where=name, fix="give `found` for every matrix"
        )
    shape = (found[name].triplets.left.shape[0], found[name].triplets.right.shape[0])
    if shape != tuple(change.shape):
        raise DeltaError(f"these intruders are of a matrix {shape}, the change is {tuple(change.shape)}", where=name)
    return found[name]


def touched(edit: Edit, known: Intruders) -> list[int]:
    """Give the positions, from 0, of the singular vectors that an edit of intruders scales in one matrix; none without intruder.

    The neighbour is the vector that is no intruder with the singular value nearest to the top-ranked intruder's (of two as
    near, the larger), so that the control moves the weight by nearly as much; where all vectors are intruders there is none.
    """
    indices = list(known.indices)
    if not indices or not edit.needs_intruders:
        return []
    if edit.acts != "neighbour":
        return indices if edit.acts == "all" else indices[:1]
    values, top = known.triplets.values.tolist(), indices[0]
    others = [j for j, verdict in enumerate(known.verdicts) if not verdict]
    return sorted(others, key=lambda j: abs(values[j] - values[top]))[:1]


def _shifted(change: LayerDelta, triplets: Triplets, chosen: list[int], strength: float) -> LayerDelta:
    """Add (λ − 1) Σ sⱼ uⱼ vⱼᵀ over the chosen triplets: to a pair as further columns of B and rows of A.

    The number that a triplet is multiplied by goes to both factors alike, as its square root, so neither leaves the range of
    half precision.
    """
    if not chosen:
        return change
    u, v = triplets.left[:, chosen].double(), triplets.right[:, chosen].double()
    gain = (strength - 1) * triplets.values[chosen].double()
    if isinstance(change, Dense):
        weight = widened(change.weight)
        return Dense(torch.addmm(weight, (u * gain).to(weight), v.t().to(weight)))
    # A pair of scale 0 changes nothing and can carry nothing: its columns give way to zeros at scale 1.
    scale = change.scale or 1.0
    root = (gain / scale).abs().sqrt()
    A, B = widened(change.A), widened(change.B if change.scale else torch.zeros_like(change.B))
    columns, rows = u * (root * gain.sign() * math.copysign(1, scale)), (v * root).t()
    return LowRank(torch.cat([A, rows.to(A)]), torch.cat([B, columns.to(B)], dim=1), scale)


@torch.no_grad()
def sharpened(weight: Float[Tensor, "out in"], change: LayerDelta, known: Intruders) -> Intruders:
    """Refine the triplets that edits use until removing one leaves nothing of it: ‖Wᵀu − s v‖ ≤ 1e-9 s₁, in float64.

    The triplets found are the start of a Krylov space that grows by the residuals of those still apart (Golub–Kahan–Davidson),
    with products in float64 by a few rows of the weight at a time. Vectors whose singular values are nearly equal may turn
    among themselves; each keeps the position whose vector it is most like, and its verdict.

    Args:
        weight: of the base, as stored.
        change: of the weight.
        known: its intruders; without any it is given back as it is.

    Raises:
        DeltaError: the weight has another shape.
    """
    old, k = known.triplets, len(known.verdicts)
    # A value of nearly 0 has nothing that could be left, and its vectors are arbitrary.
    solid = (old.values > 1e-6 * old.values.max()).tolist()
    wanted = [j for j in sorted({*known.indices, *touched(Edit("neighbour", 0.0), known)}) if solid[j]]
    if not wanted:
        return known
    if tuple(weight.shape) != tuple(change.shape):
        raise DeltaError(f"the delta is {tuple(change.shape)}, the weight {tuple(weight.shape)}")
    matrix = Stored(weight, change)
    left, right = old.left.to(weight.device).double(), old.right.to(weight.device).double()
    V = torch.linalg.qr(right).Q
    WV, SV = matrix.squared(V)
    for step in range(STEPS + 1):
        P = torch.linalg.eigh(WV.t() @ WV).eigenvectors.flip(1)[:, :k]
        P = P[:, linear_sum_assignment(-(right.t() @ (V @ P)).abs().cpu().numpy())[1]]
        u, v = WV @ P, V @ P
        s = u.norm(dim=0)
        u = u / s.clamp_min(1e-300)
        R = SV @ P / s.clamp_min(1e-300) - v * s
        residuals = R.norm(dim=0) / s.max()
        apart = [j for j in wanted if residuals[j] > TOLERANCE]
        fresh = _directions(V, R[:, apart]) if apart and step < STEPS else R[:, :0]
        if not fresh.shape[1]:
            break
        V, WV, SV = (
            torch.cat(parts, dim=1) for parts in zip((V, WV, SV), (fresh, *matrix.squared(fresh)), strict=True)
        )
    for column in (j for j in range(k) if not solid[j]):
        u[:, column], v[:, column] = left[:, column], right[:, column]
    there = old.left.device
    return replace(known, triplets=Triplets(u.to(there), s.to(there), v.to(there), residuals.to(there)))


def _directions(V: Float[Tensor, "in c"], R: Float[Tensor, "in a"]) -> Float[Tensor, "in b"]:
    """Give an orthonormal basis of what R adds to V; none where rounding is all that it adds."""
    sizes = R.norm(dim=0)
    for _ in range(2):
        R = R - V @ (V.t() @ R)
    # V may fill the space: what is left of a residual is then rounding.
    R = R[:, R.norm(dim=0) > 0.5 * sizes]
    if not R.shape[1]:
        return R
    U, s, _ = torch.linalg.svd(R / R.norm(dim=0), full_matrices=False)
    U = U[:, s > 1e-6]
    return torch.linalg.qr(U - V @ (V.t() @ U)).Q
