"""Leading triplets by Krylov steps, against dense decompositions in float64."""

import numpy as np
import pytest
import torch
from torch import Tensor

from loralab.delta.lowrank import Dense, LowRank
from loralab.errors import DeltaError
from loralab.spectral.heads import head_of
from loralab.spectral.krylov import Davidson, Triplets, lanczos
from loralab.spectral.products import Matrix, Tuned


def rows(count: int, width: int, seed: int) -> Tensor:
    """Orthonormal rows."""
    noise = torch.randn(width, count, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return torch.linalg.qr(noise).Q.t()


def weight_of(out: int, into: int, values: Tensor, seed: int = 0) -> Tensor:
    """A float32 weight with these singular values."""
    count = len(values)
    return ((rows(count, out, seed).t() * values.double()) @ rows(count, into, seed + 1)).float()


def heavy(count: int) -> Tensor:
    """A heavy head over a broad bulk."""
    i = torch.arange(count, dtype=torch.float64)
    return 10 / (i + 1) ** 0.7 + 2 * (1 - i / count).clamp_min(0.05)


def check(found: Triplets, matrix: np.ndarray, k: int, tolerance: float = 2e-6) -> None:
    """Compare k triplets with those of a dense SVD; vectors by their distance up to sign, allowed residual / gap."""
    U, s, Vh = (part.numpy() for part in torch.linalg.svd(torch.from_numpy(matrix).double(), full_matrices=False))
    assert len(found) >= k
    np.testing.assert_allclose(found.values[:k].numpy(), s[:k], rtol=0, atol=tolerance * s[0])
    gaps = np.minimum(-np.diff(s)[:k], np.append(np.inf, -np.diff(s)[: k - 1])) / s[0]
    for side, true in ((found.left, U), (found.right, Vh.T)):
        side = side[:, :k].double().numpy()
        distances = np.linalg.norm(side * np.sign((side * true[:, :k]).sum(0)) - true[:, :k], axis=0)
        assert (distances <= 2 * tolerance / gaps + 5e-6).all()
    left, right = found.left[:, :k].double().numpy(), found.right[:, :k].double().numpy()
    np.testing.assert_allclose(left.T @ left, np.eye(k), atol=5e-6)
    residuals = np.linalg.norm(matrix.T @ left - right * found.values[:k].numpy(), axis=0) / s[0]
    np.testing.assert_allclose(found.residuals[:k].numpy(), residuals, atol=1e-6)


def pair(out: int, into: int, rank: int, strength: float, seed: int = 5) -> LowRank:
    scale = torch.logspace(0, -1, rank) * strength
    return LowRank(rows(rank, into, seed).float() * 2.0, (rows(rank, out, seed + 1).float() * scale[:, None]).t(), 0.5)


def test_products_of_a_pair_equal_those_of_the_formed_weight() -> None:
    weight, change = torch.randn(300, 210), LowRank(torch.randn(5, 210), torch.randn(300, 5), -0.7)
    matrix, formed = Tuned(weight, change).matrix, weight + change.dense()
    right, left = torch.randn(7, 210), torch.randn(7, 300)
    assert matrix.thin is not None  # the pair is not formed
    torch.testing.assert_close(matrix.times(right), right @ formed.t(), rtol=1e-4, atol=2e-3)
    torch.testing.assert_close(matrix.transposed(left), left @ formed, rtol=1e-4, atol=2e-3)
    image, square = matrix.squared(right)  # 300 rows: a whole strip and a part
    torch.testing.assert_close(image, right @ formed.t(), rtol=1e-4, atol=2e-3)
    torch.testing.assert_close(square, right @ formed.t() @ formed, rtol=1e-4, atol=0.2)


@pytest.mark.parametrize("rank", [3, 40], ids=["thin", "thick"])
def test_the_energy_of_the_tuned_weight_needs_no_forming(rank: int) -> None:
    weight, change = torch.randn(60, 90), LowRank(torch.randn(rank, 90), torch.randn(60, rank), 0.3)
    energy = float(((weight + change.dense()).double() ** 2).sum())
    assert Tuned(weight, change).energy == pytest.approx(energy, rel=1e-5)
    assert Tuned(weight, Dense(change.dense())).energy == pytest.approx(energy, rel=1e-5)


def test_zero_changes_are_known_as_such() -> None:
    weight = torch.randn(40, 30)
    nothing = [
        LowRank(torch.randn(2, 30), torch.zeros(40, 2), 1.0),
        LowRank(torch.zeros(20, 30), torch.randn(40, 20), 1.0),
        LowRank(torch.randn(2, 30), torch.randn(40, 2), 0.0),
        Dense(torch.zeros(40, 30)),
    ]
    assert all(Tuned(weight, change).is_unchanged for change in nothing)
    one = torch.zeros(40, 30)
    one[3, 4] = 1e-30  # its square underflows in float32
    assert not Tuned(weight, Dense(one)).is_unchanged
    assert not Tuned(weight, LowRank(torch.randn(2, 30), torch.randn(40, 2), 1e-3)).is_unchanged


@pytest.mark.parametrize("shape", [(260, 260), (400, 150), (150, 400)])
def test_lanczos_finds_the_leading_triplets(shape: tuple[int, int]) -> None:
    weight = weight_of(*shape, heavy(min(shape)))
    check(lanczos(Matrix(weight), 12, tolerance=1e-6), weight.numpy(), 12)


def test_lanczos_says_so_when_it_stops_before_the_end() -> None:
    weight = weight_of(600, 600, torch.linspace(1, 0.9, 600))
    found = lanczos(Matrix(weight), 10, tolerance=1e-6, most=64)
    assert float(found.residuals.max()) > 1e-4
    u, v, s = found.left.double(), found.right.double(), found.values
    measured = (weight.double().t() @ u - v * s).norm(dim=0) / float(torch.linalg.matrix_norm(weight.double(), 2))
    torch.testing.assert_close(found.residuals, measured, rtol=1e-2, atol=1e-6)


@pytest.mark.parametrize("rank", [4, 16])
def test_a_start_that_has_nearly_converged_loses_no_direction(rank: int) -> None:
    # The residuals of ten head vectors then lie in 2 · rank directions: what one adds to the others is rounding, and dropping it
    # carelessly drops directions of the random rows behind it.
    weight = weight_of(384, 512, heavy(384))
    change = pair(384, 512, rank, 7.0)
    start = head_of(weight).right.t()[:10]
    tuned = weight + change.dense()
    check(lanczos(Matrix(tuned), 11, tolerance=1e-6, start=start), tuned.numpy(), 11)


def test_a_small_rank_is_exhausted() -> None:
    weight = weight_of(300, 280, torch.tensor([5.0, 3.0, 2.0, 1.0]))
    found = lanczos(Matrix(weight), 12, tolerance=1e-6)
    assert len(found) == 4
    check(found.first(3), weight.numpy(), 3)
    assert not len(lanczos(Matrix(torch.zeros(40, 50)), 5, tolerance=1e-6))


def test_lanczos_leaves_the_global_generator_alone_and_repeats_itself() -> None:
    weight, state = weight_of(200, 200, heavy(200)), torch.get_rng_state()
    first, second = (lanczos(Matrix(weight), 5, tolerance=1e-6) for _ in range(2))
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(first.left, second.left) and torch.equal(first.values, second.values)


@pytest.mark.parametrize("rank", [1, 4, 32])
@pytest.mark.parametrize("shape", [(512, 512), (640, 300), (300, 640)])
def test_davidson_finds_the_leading_triplets_of_a_pair(shape: tuple[int, int], rank: int) -> None:
    weight, change = weight_of(*shape, heavy(min(shape))), pair(*shape, rank, 8.0)
    head = head_of(weight)
    search = Davidson(Tuned(weight, change), head, 10)
    found = search.reach(1e-6)
    assert float(found.residuals[:10].max()) < 1e-6
    check(found.first(10), (weight + change.dense()).numpy(), 10)


@pytest.mark.parametrize("floor", [1.0, 30.0], ids=["heavy base", "flat base"])
def test_davidson_misses_no_value_among_many_near_ones(floor: float) -> None:
    # 40 directions of the change lie within 2 % of each other, around the tenth place; steps change their order.
    values = heavy(400) + floor
    weight = weight_of(400, 400, values)
    scale = torch.linspace(1.0, 0.98, 40) * float(values[9])
    change = LowRank(rows(40, 400, 8).float(), (rows(40, 400, 9).float() * scale[:, None]).t(), 1.0)
    found = Davidson(Tuned(weight, change), head_of(weight), 10).reach(1e-5)
    true = torch.linalg.svdvals((weight + change.dense()).double()).numpy()
    assert float(found.residuals[:10].max()) <= 1e-5
    np.testing.assert_allclose(found.values[:10].numpy(), true[:10], rtol=1e-5)


def test_davidson_gives_up_where_nothing_stands_out() -> None:
    i = torch.arange(500, dtype=torch.float64)
    weight = weight_of(500, 500, 2 * (1 - i / 500).clamp_min(1e-3) ** 0.7 + 0.2 / (i + 1).sqrt())
    found = Davidson(Tuned(weight, pair(500, 500, 16, 1.3)), head_of(weight).first(20), 10).reach(1e-6)
    assert float(found.residuals[:10].max()) > 1e-3


def test_what_cannot_be_multiplied_is_refused() -> None:
    weight, change = torch.randn(8, 6), LowRank(torch.randn(2, 6), torch.randn(8, 2), 1.0)
    with pytest.raises(DeltaError, match=r"\(8, 7\)"):
        Tuned(weight, Dense(torch.randn(8, 7)))
    for broken in (float("nan"), float("inf")):
        spoiled = weight.clone()
        spoiled[3, 2] = broken
        with pytest.raises(DeltaError, match="base weight holds"):
            Tuned(spoiled, change)
        with pytest.raises(DeltaError, match="change holds"):
            Tuned(weight, Dense(spoiled))
        with pytest.raises(DeltaError, match="scale"):
            Tuned(weight, LowRank(change.A, change.B, broken))
    assert Tuned(weight * 1e30, change).base_energy == float("inf")  # large, but numbers
