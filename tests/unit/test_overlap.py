"""Overlaps are those of the dense matrices: shares of energy inside the base's leading directions, and subspaces in common."""

import math

import numpy as np
import pandas as pd
import pytest
import torch

from loralab.delta.lowrank import Dense, LayerDelta, LowRank
from loralab.errors import DeltaError
from loralab.spectral.krylov import Triplets
from loralab.spectral.maps import counts
from loralab.spectral.overlap import cosines, directions, shares, similarity

OUT, IN, K = 40, 30, 5


def pair(rank: int = 4, scale: float = -0.7, dtype: torch.dtype = torch.float32) -> LowRank:
    return LowRank(torch.randn(rank, IN).to(dtype), torch.randn(OUT, rank).to(dtype), scale)


def matrix_of(change: LayerDelta) -> np.ndarray:
    if isinstance(change, LowRank):
        return change.scale * (change.B.double().numpy() @ change.A.double().numpy())
    return change.weight.double().numpy()


def head_of_base(size: int = 12) -> tuple[Triplets, np.ndarray, np.ndarray]:
    """Make leading triplets of a random base, and its left and right vectors by numpy."""
    base = np.random.default_rng(3).normal(size=(OUT, IN))
    U, s, Vh = np.linalg.svd(base)
    left, right = (torch.from_numpy(m[:, :size].copy()).float() for m in (U, Vh.T))
    values = torch.from_numpy(s[:size].copy())
    return Triplets(left, values, right, torch.zeros(size, dtype=torch.float64)), U, Vh.T


CHANGES = [pair(), pair(1, 2.0), pair(35), pair(dtype=torch.bfloat16), Dense(torch.randn(OUT, IN))]


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("k", [1, K])
def test_shares_are_those_of_the_projected_matrix(change: LayerDelta, k: int) -> None:
    head, U, V = head_of_base()
    matrix, left, right = matrix_of(change), U[:, :k] @ U[:, :k].T, V[:, :k] @ V[:, :k].T
    whole = np.linalg.norm(matrix) ** 2
    found = shares(change, head, k)
    assert found.left == pytest.approx(np.linalg.norm(left @ matrix) ** 2 / whole, rel=1e-4)
    assert found.right == pytest.approx(np.linalg.norm(matrix @ right) ** 2 / whole, rel=1e-4)
    assert found.both == pytest.approx(np.linalg.norm(left @ matrix @ right) ** 2 / whole, rel=1e-4)


def test_shares_of_changes_made_of_the_bases_own_directions() -> None:
    head, U, V = head_of_base()
    left, right = (torch.from_numpy(m).float() for m in (U, V))
    inside = LowRank(right[:, :2].t(), left[:, :2], 3.0)  # the two leading triplets
    crossed = LowRank(right[:, 20:21].t(), left[:, :1], 1.0)  # a leading left direction, a late right one
    found = shares(inside, head, 2)
    assert (found.left, found.right, found.both) == pytest.approx((1, 1, 1), abs=1e-6) and found.both <= 1
    found = shares(crossed, head, K)
    assert (found.left, found.right, found.both) == pytest.approx((1, 0, 0), abs=1e-6)
    found = shares(Dense(crossed.dense() * 2), head, K)
    assert (found.left, found.right, found.both) == pytest.approx((1, 0, 0), abs=1e-6)


def test_fewer_directions_than_asked_for_count_alone() -> None:
    change = pair()
    assert shares(change, head_of_base(3)[0], K) == shares(change, head_of_base()[0], 3)


@pytest.mark.parametrize("change", [pair(scale=0.0), Dense(torch.zeros(OUT, IN))])
def test_no_change_has_no_share(change: LayerDelta) -> None:
    found = shares(change, head_of_base()[0], K)
    assert all(math.isnan(share) for share in (found.left, found.right, found.both))
    assert directions(change, 4).left.shape == (OUT, 0) and directions(change, 4).right.shape == (IN, 0)


@pytest.mark.parametrize(("change", "k"), [(pair(), 4), (pair(6), 3), (pair(35), 30), (Dense(torch.randn(OUT, IN)), 6)])
def test_directions_are_the_leading_singular_vectors(change: LayerDelta, k: int) -> None:
    found = directions(change, k)
    U, _, Vh = np.linalg.svd(matrix_of(change))
    for side, expected in ((found.left, U[:, :k]), (found.right, Vh[:k].T)):
        assert side.shape[1] == k
        projector = side.double().numpy() @ side.double().numpy().T
        np.testing.assert_allclose(projector, expected @ expected.T, atol=2e-5)


def test_only_directions_that_are_there_count() -> None:
    change = pair(3)
    doubled = LowRank(change.A.repeat(2, 1), torch.cat([change.B, torch.randn(OUT, 3)], 1), 1.0)
    assert directions(doubled, 6).left.shape == (OUT, 3)
    cancelled = LowRank(change.A.repeat(2, 1), torch.cat([change.B, -change.B], 1), 1.0)
    assert directions(cancelled, 6).left.shape == (OUT, 0)
    assert math.isnan(shares(cancelled, head_of_base()[0], K).left)


def reference(a: LayerDelta, b: LayerDelta, ra: int, rb: int) -> tuple[float, float]:
    """Take Hu et al. 2021, eq. 4, from the dense matrices' singular vectors, left and right."""
    (Ua, _, Va), (Ub, _, Vb) = (np.linalg.svd(matrix_of(change)) for change in (a, b))
    left, right = Ua[:, :ra].T @ Ub[:, :rb], Va[:ra] @ Vb[:rb].T
    return np.linalg.norm(left) ** 2 / min(ra, rb), np.linalg.norm(right) ** 2 / min(ra, rb)


@pytest.mark.parametrize(
    ("a", "b", "ra", "rb"),
    [(pair(3), pair(5), 3, 5), (pair(3), Dense(torch.randn(OUT, IN)), 3, 6), (pair(2), pair(2), 2, 2)],
)
def test_similarity_is_the_papers(a: LayerDelta, b: LayerDelta, ra: int, rb: int) -> None:
    one, other = directions(a, ra), directions(b, rb)
    left, right = reference(a, b, ra, rb)
    assert similarity(one.left, other.left) == pytest.approx(left, abs=1e-5)
    assert similarity(one.right, other.right) == pytest.approx(right, abs=1e-5)


def test_similarity_ends_at_none_and_all() -> None:
    axes = torch.eye(8)
    assert similarity(axes[:, :3], axes[:, 3:6]) == 0
    assert similarity(axes[:, :2], axes[:, :5]) == 1, "one holds the other"
    assert similarity(axes[:, :2], axes[:, 1:3]) == 0.5
    assert math.isnan(similarity(axes[:, :0], axes))
    wide = torch.linalg.qr(torch.randn(400, 40)).Q, torch.linalg.qr(torch.randn(400, 20)).Q
    assert similarity(*wide) == pytest.approx(40 / 400, rel=0.15), "random ones: max(a, b) / side"


def test_cosines_have_a_row_for_each_base_vector() -> None:
    tuned, base = torch.linalg.qr(torch.randn(OUT, 3)).Q, torch.linalg.qr(torch.randn(OUT, 7).double()).Q
    found = cosines(tuned, base)
    assert found.shape == (7, 3)
    for i, j in ((0, 2), (6, 1)):
        assert float(found[i, j]) == pytest.approx(abs(float(base[:, i] @ tuned[:, j].double())), abs=1e-6)


def vectors(rows: list[tuple[str, int, float, float]]) -> pd.DataFrame:
    return pd.DataFrame(rows, columns=["delta", "position", "cosine_low", "cosine_high"])


def test_counts_are_intervals_where_cosines_are() -> None:
    # Two matrices of delta b, one of delta a; the second vector of b's first matrix may or may not be below 0.5.
    found = counts(
        vectors([("b", 1, 0.9, 0.9), ("b", 2, 0.4, 0.6), ("b", 1, 0.2, 0.3), ("b", 2, 0.1, 0.1), ("a", 1, 0.5, 0.5)]),
        ks=[2, 1],
        epsilons=[0.5, 0.95],
    )
    assert found.to_dict("split")["data"] == [
        ["b", 2, 0.5, 2, 3],
        ["b", 2, 0.95, 4, 4],
        ["b", 1, 0.5, 1, 1],
        ["b", 1, 0.95, 2, 2],
        ["a", 2, 0.5, 0, 0],  # a cosine of ε itself is no intruder's
        ["a", 2, 0.95, 1, 1],
        ["a", 1, 0.5, 0, 0],
        ["a", 1, 0.95, 1, 1],
    ]


def test_counts_name_every_delta_and_refuse_what_was_not_measured() -> None:
    one = vectors([("a", 1, 0.1, 0.1), ("a", 2, 0.1, 0.1)])
    found = counts(one, [1], [0.5], ["a", "nothing"])
    assert found["delta"].tolist() == ["a", "nothing"] and found["high"].tolist() == [1, 0]
    for ks, epsilons, said in (([3], [0.5], "2 were measured"), ([0], [0.5], "0 vectors"), ([1], [1.2], "1.2")):
        with pytest.raises(DeltaError, match=said):
            counts(one, ks, epsilons)


def test_every_k_is_counted_as_one_cut() -> None:
    rng = np.random.default_rng(0)
    low = rng.uniform(0, 1, 60)
    table = vectors([("a", i % 10 + 1, c, min(1.0, c + 0.05)) for i, c in enumerate(low)])
    for _, row in counts(table, range(1, 11), [0.3, 0.7]).iterrows():
        chosen = [c for i, c in enumerate(low) if i % 10 < row["k"]]
        assert row["high"] == sum(c < row["epsilon"] for c in chosen)
        assert row["low"] == sum(min(1.0, c + 0.05) < row["epsilon"] for c in chosen)
