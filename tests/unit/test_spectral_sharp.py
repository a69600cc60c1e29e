"""Triplets refined in float64, and the verdicts that hang on them, against dense decompositions in float64."""

from collections import Counter

import numpy as np
import pytest
import torch
from torch import Tensor

from loralab.delta.lowrank import Dense, LayerDelta, LowRank
from loralab.spectral.bounds import Bounds
from loralab.spectral.heads import head_of
from loralab.spectral.intruders import NOISE, intruders
from loralab.spectral.krylov import Triplets, lanczos
from loralab.spectral.products import Matrix, Tuned
from loralab.spectral.sharp import Refined, Refinement, Stored

F64 = torch.float64
SHAPES = [(320, 320), (460, 300), (300, 460)]


def columns(size: int, count: int, seed: int) -> Tensor:
    """Orthonormal columns in float64."""
    noise = torch.randn(size, count, generator=torch.Generator().manual_seed(seed), dtype=F64)
    return torch.linalg.qr(noise).Q


def base_of(out: int, into: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """A float32 weight with a heavy head over a broad bulk, and its singular vectors but for rounding."""
    count = min(out, into)
    i = torch.arange(count, dtype=F64)
    U, V = columns(out, count, seed), columns(into, count, seed + 1)
    return ((U * (10 / (i + 1) ** 0.7 + 2 * (1 - i / count))) @ V.t()).float(), U, V


def change_of(U: Tensor, V: Tensor, form: str, seed: int = 3) -> LayerDelta:
    """Twelve directions, each leaning on a base direction by a cosine of 0.1 to 0.8; `dense` moves every element besides."""
    lean = torch.linspace(0.1, 0.8, 12, dtype=F64)
    near = torch.arange(12) * 3 % 25
    B, A = (
        columns(len(side), 12, seed + i) * (1 - lean**2).sqrt() + side[:, near] * lean for i, side in enumerate((U, V))
    )
    B = B * torch.linspace(15, 5, 12, dtype=F64)
    if form == "pair":
        return LowRank(A.t().float().contiguous(), (B / 2).float(), 2.0)
    noise = torch.randn(len(U), len(V), generator=torch.Generator().manual_seed(seed), dtype=F64)
    return Dense((B @ A.t() + 0.02 * noise).float())


def svd(matrix: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    U, s, Vh = torch.linalg.svd(matrix.double(), full_matrices=False)
    return U, s, Vh.t()


def distance(left: Tensor, true: Tensor) -> float:
    """Distance of unit vectors up to sign."""
    return float((left - true * torch.sign(left @ true)).norm())


@pytest.mark.parametrize("form", ["pair", "dense", "none"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, F64])
def test_products_are_those_of_the_weight_formed_in_float64(dtype: torch.dtype, form: str) -> None:
    weight, U, V = base_of(300, 220)  # two whole strips and a part
    weight = (weight.double() / 3).to(dtype)
    change = None if form == "none" else change_of(U, V, form)
    formed = weight.double() if change is None else Tuned(weight, change).double()
    v = torch.randn(220, dtype=F64)
    image, square = Stored(weight, change).squared(v)
    torch.testing.assert_close(image, formed @ v, rtol=1e-12, atol=1e-11)
    torch.testing.assert_close(square, formed.t() @ (formed @ v), rtol=1e-12, atol=1e-10)


@pytest.mark.parametrize("place", [0, 6, 20])
@pytest.mark.parametrize("shape", SHAPES)
def test_a_vector_converges_and_is_never_farther_off_than_it_says(shape: tuple[int, int], place: int) -> None:
    weight = base_of(*shape)[0]
    X, s, Z = svd(weight)
    # Right vectors as float32 leaves them, only worse: each off by 1e-3, mostly towards the others known.
    generator = torch.Generator().manual_seed(place)
    noise = torch.randn(40, 40, generator=generator, dtype=F64) * 1e-4
    outside = columns(shape[1], 40, 5) * 1e-4
    rows = torch.linalg.qr(Z[:, :40] @ (torch.eye(40, dtype=F64) + noise) + outside).Q.t()
    gap = float(torch.minimum(s[place - 1] - s[place], s[place] - s[place + 1]) if place else s[0] - s[1])
    known = rows, s[:40] * (1 + 1e-6)
    refined = Refined(Stored(weight), known, rows[place], float(s[place]) + 1e-6, 0.99 * gap, float(s[0]))
    errors = []
    for _ in range(14):
        errors.append(refined.error)
        assert distance(refined.left, X[:, place]) <= refined.error + 1e-13
        assert abs(float(refined.left.norm()) - 1) < 1e-12
        refined.advance()
    assert errors[0] > 1e-4 and min(errors) < 1e-9
    assert errors[3] < 0.05 * errors[0]  # what is known of the other vectors is made use of


def test_nothing_is_said_where_the_value_is_not_alone_or_not_its_own() -> None:
    weight = base_of(300, 300)[0]
    _, s, Z = svd(weight)
    known, top = (Z[:, :30].t(), s[:30]), float(s[0])
    gap = float(s[9] - s[10])
    right = Refined(Stored(weight), known, Z[:, 10], float(s[10]), 0.9 * gap, top)
    assert right.error < 1e-9
    assert Refined(Stored(weight), known, Z[:, 10], float(s[10]), 0.0, top).error == 1
    assert Refined(Stored(weight), known, Z[:, 9], float(s[10]), 0.9 * gap, top).error == 1  # the neighbour's vector
    mixed = (Z[:, 9] + Z[:, 10]) / 2**0.5
    assert Refined(Stored(weight), known, mixed, float(s[9] + s[10]) / 2, 0.9 * gap, top).error == 1


@pytest.mark.parametrize("shape", [(5, 3), (3, 5), (2, 2), (1, 4)])
def test_a_small_space_is_exhausted(shape: tuple[int, int]) -> None:
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    X, s, Z = svd(weight)
    known = Z[:, :1].t().contiguous(), s[:1]
    start = Z[:, 0] + 1e-3 * torch.randn(shape[1], dtype=F64, generator=torch.Generator().manual_seed(2))
    refined = Refined(Stored(weight), known, start / start.norm(), float(s[0]), 0.2 * float(s[0]), float(s[0]))
    rounds = 0
    while rounds < 20 and refined.advance():
        rounds += 1
    assert rounds < 20
    assert distance(refined.left, X[:, 0]) < 1e-9


def test_gaps_are_those_to_both_neighbours_less_what_these_may_be_off_by() -> None:
    weight = base_of(300, 300)[0]
    weight[:, :2] *= 1.5  # uneven steps
    found, s = lanczos(Matrix(weight), 20, tolerance=1e-6), svd(weight)[1]
    known = found.right.t().double(), found.values
    loose = Triplets(found.left, found.values, found.right, torch.full((20,), 1e-3, dtype=F64))
    tighter_before = 0
    for j in range(20):
        before, behind = float(s[j - 1] - s[j]) if j else np.inf, float(s[j] - s[j + 1])
        tighter_before += before < 0.9 * behind
        gap = Refined.of(Stored(weight), known, found, j).gap
        assert gap <= (min(before, behind) if j < 19 else 0.0)
        assert j == 19 or gap > min(before, behind) - 3e-6 * float(s[0])
        wary = Refined.of(Stored(weight), known, loose, j).gap
        assert j == 19 or wary == pytest.approx(min(before, behind) - 1e-3 * float(s[0]), abs=3e-6 * float(s[0]))
    assert tighter_before >= 2


@pytest.mark.parametrize("sign", [-1, 1])
@pytest.mark.parametrize("off", [(0.9, 0.0), (0.0, 0.9), (0.9, 0.9)], ids=["base", "tuned", "both"])
def test_an_interval_allows_for_the_errors_of_both_vectors(off: tuple[float, float], sign: int) -> None:
    # Both vectors lie off by nearly the error that is claimed, in the worst direction, and epsilon is the true cosine.
    weight = base_of(300, 300)[0]
    bounds, X, error = Bounds(Matrix(weight), head_of(weight)), svd(weight)[0], 1e-6
    x, z = X[:, 7], columns(300, 1, 11)[:, 0]
    z -= (z @ x) * x
    z /= z.norm()
    y = 0.6 * x + 0.8 * z
    i = int(np.flatnonzero(bounds.columns == 7)[0])
    bounds.sharp[i] = x * (1 - error**2) + sign * off[0] * error * z, error
    assert bounds.near(y + sign * off[1] * error * x, error, 0.6) == [i]
    for epsilon in (0.6 - 4e-6, 0.6 + 4e-6):  # nor does it allow for much more
        assert bounds.near(y + sign * off[1] * error * x, error, epsilon) == []


def test_refinement_is_for_what_float32_leaves_open() -> None:
    weight, U, V = base_of(320, 320)
    tuned, head = Tuned(weight, change_of(U, V, "pair")), head_of(weight)
    found = lanczos(tuned.matrix, 11, tolerance=1e-6)
    cosines = (svd(weight)[0].t() @ svd(tuned.double())[0][:, :10]).abs()
    j = int((cosines.amax(0) - 0.6).abs().argmin())
    largest = float(cosines[:, j].max())

    def refined(error: float, epsilon: float, found: Triplets = found) -> tuple[Refined | None, Bounds]:
        bounds = Bounds(Matrix(weight), head)
        return Refinement(tuned, found, head, bounds).of(j, error, epsilon), bounds

    assert refined(1e-4, largest + 0.01)[0] is None and refined(1e-4, largest - 0.01)[0] is None
    assert refined(0.5, largest)[0] is None  # a value that is not alone
    done, bounds = refined(1e-4, largest + 1e-5)
    assert done is not None and done.error > 1e-8  # as far as it takes, and no farther
    done, bounds = refined(1e-4, largest + 1e-7)
    assert done is not None and list(bounds.sharp) == [int(cosines[:, j].argmax())]
    assert not bounds.near(done.left, done.error, largest + 1e-7)
    # Nothing tells a cosine from itself: the attempt ends, and the question stays open.
    done, bounds = refined(1e-4, largest)
    assert done is not None and done.error < 1e-6 and bounds.near(done.left, done.error, largest)
    # Of the values behind the last one that was found nothing is known.
    done, bounds = refined(1e-4, largest + 1e-7, found.first(j + 1))
    assert done is not None and done.error == 1


@pytest.mark.parametrize("form", ["pair", "dense"])
@pytest.mark.parametrize("shape", SHAPES)
def test_verdicts_a_millionth_beside_the_threshold(shape: tuple[int, int], form: str) -> None:
    counts = Counter[str]()
    for seed in (0, 10):
        weight, U, V = base_of(*shape, seed)
        change, head = change_of(U, V, form, seed + 3), head_of(weight)
        base, tuned = svd(weight)[0], svd(weight.double() + change.dense(F64))[0][:, :10]
        cosines = (base.t() @ tuned).abs().amax(0).numpy()
        for j in np.flatnonzero((cosines > 0.4) & (cosines < 0.98)):
            for offset in (-1e-5, -1e-6, -1e-7, 1e-7, 1e-6, 1e-5):
                epsilon = float(cosines[j] + offset)
                found = intruders(weight, change, epsilon=epsilon, head=head, dense_below=2)
                assert found.verdicts == tuple((cosines < epsilon).tolist())
                assert (found.lower <= cosines + 1e-11).all() and (cosines <= found.upper + 1e-11).all()
                # A change of W that float32 makes unnoticed may turn such a verdict, and it says so.
                assert not found.stable[j] or abs(offset) > NOISE / found.gaps[j]
                counts[found.routes[j]] += 1
                counts["intruder" if found.verdicts[j] else "like"] += 1
    assert counts["intruder"] >= 10 and counts["like"] >= 10
    assert counts["certified"] >= 0.9 * counts.total() / 2


def test_a_float64_base_is_taken_as_it_is_stored() -> None:
    _, U, V = base_of(300, 300)
    i = torch.arange(300, dtype=F64)
    weight, change = (U * (10 / (i + 1) ** 0.7 + 2 * (1 - i / 300))) @ V.t(), change_of(U, V, "pair")
    exact, rounded = (
        (svd(base)[0].t() @ svd(base.double() + change.dense(F64))[0][:, :10]).abs().amax(0).numpy()
        for base in (weight, weight.float())
    )
    told_apart = np.flatnonzero((exact > 0.4) & (exact < 0.98) & (np.abs(exact - rounded) > 5e-9))
    assert len(told_apart)
    for j in told_apart:
        epsilon = float(exact[j] + rounded[j]) / 2
        for base, cosines in ((weight, exact), (weight.float(), rounded)):
            found = intruders(base, change, epsilon=epsilon, dense_below=2)
            assert found.routes[j] == "certified" and found.verdicts[j] == (cosines[j] < epsilon)
