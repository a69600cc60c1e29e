"""Intruders against the definition: two dense float64 decompositions, all base vectors, left ones only."""

import numpy as np
import pytest
import torch
from torch import Tensor

from loralab.delta.lowrank import Dense, LayerDelta, LowRank
from loralab.errors import DeltaError
from loralab.spectral.bounds import Bounds
from loralab.spectral.heads import head_of
from loralab.spectral.intruders import DENSE_BELOW, Intruders, intruders
from loralab.spectral.products import Matrix

F64 = torch.float64
ROUTES = {"certified": {"dense_below": 2}, "dense": {}, "exact": {"exact": True}}
"""How to take each route with a small matrix."""


def columns(out: int, count: int, seed: int) -> Tensor:
    """Orthonormal columns in float64."""
    noise = torch.randn(out, count, generator=torch.Generator().manual_seed(seed), dtype=F64)
    return torch.linalg.qr(noise).Q


class Known:
    """A base U diag(s) Vᵀ, and changes made of its directions."""

    def __init__(self, out: int, into: int, values: Tensor | None = None, seed: int = 0) -> None:
        count = min(out, into) if values is None else len(values)
        i = torch.arange(count, dtype=F64)
        self.values = 10 / (i + 1) ** 0.7 + 2 * (1 - i / count) if values is None else values.double()
        self.U, self.V = columns(out, count, seed), columns(into, count, seed + 1)
        self.weight = ((self.U * self.values) @ self.V.t()).float()

    def outside(self, seed: int = 9) -> tuple[Tensor, Tensor]:
        """Unit vectors spread over all base directions."""
        return columns(len(self.U), 1, seed)[:, 0], columns(len(self.V), 1, seed + 1)[:, 0]


def change_of(*terms: tuple[float, Tensor, Tensor]) -> LowRank:
    """The sum of s · x zᵀ."""
    sizes, left, right = zip(*terms, strict=True)
    return LowRank(torch.stack(right).float(), (torch.stack(left, 1) * torch.tensor(sizes)).float(), 1.0)


def truth(weight: Tensor, change: LayerDelta, k: int) -> np.ndarray:
    """The definition: the largest |cosine| of each leading left vector with any left vector of the base."""
    base = torch.linalg.svd(weight.double(), full_matrices=False).U
    tuned = torch.linalg.svd(weight.double() + change.dense(F64), full_matrices=False).U
    return (base.t() @ tuned[:, :k]).abs().amax(0).numpy()


def agrees(found: Intruders, cosines: np.ndarray) -> bool:
    """Whether the verdicts are those of the cosines and the intervals hold them."""
    inside = (found.lower <= cosines + 1e-9) & (cosines <= found.upper + 1e-9)
    return bool(inside.all()) and found.verdicts == tuple((cosines < found.epsilon).tolist())


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("shape", [(160, 160), (240, 120), (120, 240)])
def test_a_planted_direction_is_the_only_intruder(shape: tuple[int, int], route: str) -> None:
    base = Known(*shape)
    change = change_of((15.0, *base.outside()))
    found = intruders(base.weight, change, **ROUTES[route])
    assert found.indices == [0] and found.routes == (route,) * 10
    assert agrees(found, truth(base.weight, change, 10))
    assert float(found.triplets.left[:, 0].double() @ base.outside()[0]) ** 2 > 0.8


@pytest.mark.parametrize("route", ROUTES)
def test_every_base_vector_counts_the_last_as_well(route: str) -> None:
    base = Known(150, 170)
    change = change_of((20.0, base.U[:, -2], base.V[:, -2]))  # the last but one of 150 becomes the first
    found = intruders(base.weight, change, head=head_of(base.weight, 40), **ROUTES[route])
    assert found.indices == []
    assert found.lower[0] > 0.999 and agrees(found, truth(base.weight, change, 10))
    # Beyond the head nothing but the dense route may say that a vector is like a base vector.
    assert found.routes[0] == ("dense" if route == "certified" else route)


@pytest.mark.parametrize("route", ROUTES)
def test_left_vectors_alone_are_compared(route: str) -> None:
    base = Known(140, 140)
    turned = change_of((9.0, base.U[:, 0], base.outside()[1]))  # a new right vector, the old left one
    assert intruders(base.weight, turned, **ROUTES[route]).indices == []
    turned = change_of((40.0, base.outside()[0], base.V[:, 0]))  # a new left vector, the old right one
    assert 0 in intruders(base.weight, turned, **ROUTES[route]).indices


@pytest.mark.parametrize("route", ROUTES)
def test_the_threshold_is_the_callers(route: str) -> None:
    base = Known(150, 150)
    x, z = base.outside()
    change = change_of((14.0, (0.6 * base.U[:, 5] + 0.8 * x), z))
    cosine = truth(base.weight, change, 1)[0]
    assert 0.5 < cosine < 0.75
    for epsilon, count in ((cosine - 1e-3, 0), (cosine + 1e-3, 1), (1.0, 1)):
        found = intruders(base.weight, change, k=1, epsilon=float(epsilon), **ROUTES[route])
        assert len(found.indices) == count and found.epsilon == epsilon
        assert found.lower[0] - 1e-9 <= cosine <= found.upper[0] + 1e-9


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("dense", [False, True], ids=["pair", "dense"])
def test_what_is_measured_beside_the_verdicts(route: str, dense: bool) -> None:
    base = Known(130, 180)
    change: LayerDelta = change_of(
        (20.0, *base.outside()), (14.0, *base.outside(20)), (3.0, base.U[:, 3], base.V[:, 3])
    )
    change = Dense(change.dense()) if dense else change
    found = intruders(base.weight, change, k=6, **ROUTES[route])
    W = base.weight.double() + change.dense(F64)
    U, s, _ = torch.linalg.svd(W, full_matrices=False)
    assert found.energy == pytest.approx(float(W.square().sum()), rel=1e-5)
    np.testing.assert_allclose(found.triplets.values.numpy(), s[:6].numpy(), rtol=1e-5)
    apart = (s[:-1] - s[1:]).numpy()[:6] / float(s[0])
    np.testing.assert_allclose(found.gaps, np.minimum(apart, np.append(np.inf, apart[:-1])), atol=1e-4)
    u, v = found.triplets.left.double(), found.triplets.right.double()
    assert float((W.t() @ u - v * found.triplets.values).norm(dim=0).max()) < 2e-5 * float(s[0])
    np.testing.assert_allclose(found.similarity[:5], (base.U[:, :5].t() @ U[:, :6]).abs().numpy(), atol=2e-4)
    assert found.similarity.shape == (64, 6) and found.stable == (True,) * 6
    assert len(found.indices) == 2
    share = float(s[found.indices].square().sum() / s[:6].square().sum())
    assert found.energy_share == pytest.approx(share, rel=1e-5)


def test_small_matrices_take_the_dense_route_and_large_ones_do_not() -> None:
    assert DENSE_BELOW == 1500
    base = Known(80, 90)
    change = change_of((15.0, *base.outside()))
    assert set(intruders(base.weight, change, dense_below=81).routes) == {"dense"}
    assert set(intruders(base.weight, change, dense_below=80).routes) == {"certified"}


@pytest.mark.parametrize("shape", [(900, 700), (700, 900)])
def test_a_flat_spectrum_takes_the_dense_route_and_is_right(shape: tuple[int, int]) -> None:
    i = torch.arange(700, dtype=F64)
    base = Known(*shape, 2 * (1 - i / 700).clamp_min(1e-3) ** 0.7 + 0.2 / (i + 1).sqrt())
    change = change_of(*((1.2 - 0.1 * j, *base.outside(30 + 2 * j)) for j in range(6)))
    empty = head_of(base.weight).first(0)
    found = intruders(base.weight, change, head=empty, dense_below=2)
    assert set(found.routes) == {"dense"}
    assert agrees(found, truth(base.weight, change, 10))


@pytest.mark.parametrize("floor", [0.7, 0.02], ids=["far from 0", "near 0"])
def test_what_lies_outside_the_range_of_a_tall_base_is_an_intruder(floor: float) -> None:
    base = Known(600, 150, 8 / (torch.arange(150) + 1.0) + torch.linspace(2, floor, 150))
    x, z = base.outside()
    null = x - base.U @ (base.U.t() @ x)
    change = change_of((14.0, null / null.norm(), z), (9.0, *base.outside(40)))
    found = intruders(base.weight, change, head=head_of(base.weight, 32), dense_below=2)
    assert found.verdicts[0] and set(found.routes) == {"certified"}
    assert agrees(found, truth(base.weight, change, 10))


def test_the_left_null_space_is_projected_out_only_where_it_has_to_be() -> None:
    base = Known(600, 150, 8 / (torch.arange(150) + 1.0) + torch.linspace(2, 0.02, 150))
    bounds = Bounds(Matrix(base.weight), head_of(base.weight, 32))
    x = base.outside()[0]
    null = x - base.U @ (base.U.t() @ x)
    like, mixed = base.U[:, 4], 0.8 * null / null.norm() + 0.6 * base.U.sum(1) / 150**0.5
    assert bounds.of(like[None].float(), np.zeros(1), 0.5).lower[0] > 0.99
    assert "_range" not in vars(bounds)
    found = bounds.of(mixed[None].float(), np.zeros(1), 0.3)
    assert 0.6 / 150**0.5 <= found.upper[0] < 0.3
    assert "_range" in vars(bounds)
    # Three quarters of the last base vector, of value 0.02: nothing that is projected out may be a part of it.
    found = bounds.of((0.5 * null / null.norm() + 0.75**0.5 * base.U[:, -1])[None].float(), np.zeros(1), 0.8)
    assert found.upper[0] > 0.86


@pytest.mark.parametrize("route", ROUTES)
def test_a_rank_deficient_tall_base_is_no_obstacle(route: str) -> None:
    base = Known(300, 100, torch.linspace(9, 1, 40))
    change = change_of((12.0, *base.outside()))
    assert intruders(base.weight, change, k=5, **ROUTES[route]).indices == [0]


@pytest.mark.parametrize("route", ROUTES)
def test_a_direction_of_value_zero_is_no_base_vector(route: str) -> None:
    base = Known(90, 90)
    base.weight[[7, 31]] = 0.0  # two dead rows: a change that wakes one points where the base has nothing
    row = torch.zeros(90, dtype=F64)
    row[7] = 1.0
    found = intruders(base.weight, change_of((30.0, row, base.outside()[1])), k=4, **ROUTES[route])
    assert found.indices == [0] and found.upper[0] < (0.5 if route == "certified" else 0.1)


@pytest.mark.parametrize("route", ROUTES)
def test_a_zero_base_has_no_vectors_and_a_zero_sum_no_intruders(route: str) -> None:
    change = change_of((3.0, columns(40, 1, 1)[:, 0], columns(30, 1, 2)[:, 0]))
    found = intruders(torch.zeros(40, 30), change, k=4, **ROUTES[route])
    assert found.verdicts == (True, False, False, False)  # one direction; where W is zero there is no direction
    assert found.stable == (True, False, False, False) and found.energy_share == pytest.approx(1)
    weight = torch.randn(40, 30)
    cancelled = intruders(weight, Dense(-weight), **ROUTES[route])
    assert cancelled.indices == [] and cancelled.energy == 0 and cancelled.energy_share == 0
    assert not any(cancelled.stable)


@pytest.mark.parametrize("route", ROUTES)
def test_a_zero_change_makes_no_intruder_where_vectors_are_free_to_turn(route: str) -> None:
    for weight in (torch.eye(50), torch.randn(50, 50), torch.zeros(50, 50)):
        for change in (LowRank(torch.randn(3, 50), torch.zeros(50, 3), 2.0), Dense(torch.zeros(50, 50))):
            found = intruders(weight, change, **ROUTES[route])
            assert found.indices == [] and (found.lower == 1).all() and all(found.stable)
            assert found.similarity.shape[1] == 10 and len(found.triplets) == 10


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("shape", [(1, 12), (12, 1), (1, 1), (2, 3), (9, 7)])
def test_k_is_cut_to_the_matrix(shape: tuple[int, int], route: str) -> None:
    weight, change = torch.randn(shape), LowRank(torch.randn(1, shape[1]), torch.randn(shape[0], 1), 0.7)
    found = intruders(weight, change, **ROUTES[route])
    k = min(shape)
    assert len(found.triplets) == len(found.verdicts) == len(found.routes) == len(found.gaps) == len(found.stable) == k
    assert agrees(found, truth(weight, change, k))
    if shape[0] == 1:
        assert found.lower[0] == pytest.approx(1)


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_bases_in_any_precision(dtype: torch.dtype, route: str) -> None:
    base = Known(110, 100)
    weight, change = base.weight.to(dtype), change_of((20.0, *base.outside()), (14.0, *base.outside(40)))
    half = LowRank(change.A.bfloat16(), change.B.bfloat16(), change.scale)
    found = intruders(weight, half, **ROUTES[route])
    assert agrees(found, truth(weight, half, 10)) and len(found.indices) >= 2


def test_a_pair_of_high_rank_is_taken_as_it_is() -> None:
    base = Known(120, 120)
    change = LowRank(torch.randn(90, 120) / 11, torch.randn(120, 90) / 11, 6.0)
    found = intruders(base.weight, change, dense_below=2)
    assert agrees(found, truth(base.weight, change, 10)) and found.indices


@pytest.mark.parametrize("gap", [1e-7, 1e-13, 0.0])
def test_base_vectors_that_share_a_direction(gap: float) -> None:
    # u = (x₁ + x₂) / √2 of two base vectors with nearly one value: two cosines of 0.71 each, if the pair is told apart.
    values = torch.linspace(9, 1, 60).double()
    values[4] = values[3] - gap
    U, V = torch.eye(60, dtype=F64), torch.eye(60, dtype=F64)[torch.randperm(60)]
    weight = (U * values) @ V
    both = (U[:, 3] + U[:, 4]) / 2**0.5
    change = change_of((20.0, both, (V[3] + V[4]) / 2**0.5))
    for below in (2, 1500):
        found = intruders(weight, change, k=1, epsilon=0.8, dense_below=below)
        if gap == 1e-7:  # float64 tells them apart
            assert found.routes == ("dense",) and found.verdicts == (True,) and found.stable == (True,)
        else:  # nothing does: the direction may as well be one base vector
            assert found.routes == ("exact",) and found.stable == (False,)
        # Nothing depends on how the pair is turned at a threshold that both readings pass.
        loose = intruders(weight, change, k=1, epsilon=0.7, dense_below=below)
        assert loose.verdicts == (False,) and loose.stable == (True,)


@pytest.mark.parametrize("route", ROUTES)
def test_tuned_vectors_of_nearly_one_value_are_called_unstable(route: str) -> None:
    # A new direction gets the value of the base's first one but for 1e-7 of it: which mixtures u₁ and u₂ are, nobody can tell.
    base = Known(100, 90, torch.linspace(5, 1, 70).double().index_fill(0, torch.tensor(0), 10.0))
    x, z = base.outside()
    x, z = x - base.U @ (base.U.t() @ x), z - base.V @ (base.V.t() @ z)
    change = Dense((10 - 1e-6) * torch.outer(x / x.norm(), z / z.norm()).float())
    found = intruders(base.weight, change, k=4, **ROUTES[route])
    assert found.gaps[0] == found.gaps[1] < 1e-6
    assert found.stable == (False, False, True, True)


def test_the_same_question_has_the_same_answer_bit_for_bit() -> None:
    base = Known(700, 720)
    change, state = change_of((13.0, *base.outside()), (7.0, *base.outside(40))), torch.get_rng_state()
    first, second = (intruders(base.weight, change, dense_below=2) for _ in range(2))
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(first.triplets.left, second.triplets.left)
    assert (first.lower == second.lower).all() and (first.upper == second.upper).all()


def test_bad_questions_are_refused() -> None:
    weight, change = torch.randn(8, 6), LowRank(torch.randn(2, 6), torch.randn(8, 2), 1.0)
    for broken in (float("nan"), float("inf")):
        spoiled = weight.clone()
        spoiled[1, 1] = broken
        for bad in ((spoiled, change), (weight, Dense(spoiled)), (weight, LowRank(change.A, change.B, broken))):
            with pytest.raises(DeltaError):
                intruders(*bad)
    with pytest.raises(DeltaError, match=r"\(6, 8\).*\(8, 6\)"):
        intruders(weight, Dense(weight.t()))
    for asked in ({"k": 0}, {"epsilon": 0.0}, {"epsilon": 1.5}):
        with pytest.raises(DeltaError, match="epsilon"):
            intruders(weight, change, **asked)
    with pytest.raises(DeltaError, match="head"):
        intruders(weight, change, head=head_of(torch.randn(9, 6)))


@pytest.mark.parametrize("size", [1e-20, 1e25])
def test_weights_whose_squares_leave_float32(size: float) -> None:
    base = Known(60, 50)
    change = change_of((14.0, *base.outside()))
    scaled = LowRank(change.A, change.B * size, 1.0)
    found = intruders(base.weight * size, scaled, k=5, dense_below=2)
    assert found.verdicts == intruders(base.weight, change, k=5).verdicts and 0 in found.indices


@pytest.mark.parametrize("shape", [(160, 120), (120, 160), (140, 140)])
@pytest.mark.parametrize("seed", range(3))
def test_base_values_that_float32_cannot_tell_apart_are_left_to_a_decomposition(
    shape: tuple[int, int], seed: int
) -> None:
    """Of two equal values any rotation of their vectors is a base vector to float32: their joint mass must not be divided."""
    out, into = shape
    short = min(shape)
    generator = torch.Generator().manual_seed(seed)
    X, Z = (torch.linalg.qr(torch.randn(n, short, generator=generator, dtype=torch.float64)).Q for n in (out, into))
    values = torch.arange(short).div(2, rounding_mode="floor").add(1).double() ** -0.7
    weight = ((X * values) @ Z.t()).float()
    for rank in (4, 16):
        size = 2.5 * float(torch.rand(1, generator=generator)) / out**0.5
        A = torch.randn(rank, into, generator=generator) / into**0.5
        change = LowRank(A, torch.randn(out, rank, generator=generator) * size, 1.0)
        truth, found = intruders(weight, change, exact=True), intruders(weight, change, dense_below=1)
        assert found.verdicts == truth.verdicts
        assert (found.lower <= truth.upper + 1e-5).all() and (truth.lower <= found.upper + 1e-5).all()
        assert (found.lower <= found.upper).all()
