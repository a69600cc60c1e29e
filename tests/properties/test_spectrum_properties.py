"""Spectra keep what linear algebra promises of them, whatever the shapes, ranks and scales."""

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from torch import Tensor

from loralab.delta.lowrank import Delta, Dense, LowRank, rank_sum
from loralab.spectral.spectrum import effective_rank, rank_share, spectrum, stable_rank, table

quick = settings(max_examples=60)

sides = st.integers(1, 9)
scales = st.floats(0.01, 64) | st.sampled_from([1.0, -1.0, 1 / 3])
values = arrays(np.float64, st.integers(0, 12), elements=st.just(0.0) | st.floats(1e-6, 1e6))
dtypes = st.sampled_from([torch.float64, torch.float32, torch.bfloat16])


def tensor(generator: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(shape, generator=generator, dtype=torch.float64)


@st.composite
def chains(draw: st.DrawFn) -> list[LowRank]:
    """Draw one to three pairs of a layer, of any ranks (over the sides too), scales and dtypes."""
    out, into, generator = draw(sides), draw(sides), torch.Generator().manual_seed(draw(st.integers(0, 2**32 - 1)))
    found = []
    for scale in draw(st.lists(scales, min_size=1, max_size=3)):
        rank, dtype = draw(st.integers(1, 12)), draw(dtypes)
        found.append(LowRank(tensor(generator, rank, into).to(dtype), tensor(generator, out, rank).to(dtype), scale))
    return found


def close(found: np.ndarray, expected: np.ndarray) -> None:
    """Compare to 1e-9 of the largest value; the shorter one ends in zeros."""
    length = max(len(found), len(expected))
    found, expected = (np.pad(s, (0, length - len(s))) for s in (found, expected))
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-9 * expected.max(initial=1e-6))


@quick
@given(chains())
def test_a_pair_agrees_with_its_dense_form_and_numpy(chain: list[LowRank]) -> None:
    pair = rank_sum(chain)
    found, formed = spectrum(pair), pair.dense(torch.float64)
    assert len(found) == min(pair.rank, *pair.shape)
    close(found, spectrum(Dense(formed)))
    close(found, np.linalg.svd(formed.numpy(), compute_uv=False))


@quick
@given(chains())
def test_the_table_of_a_pair_is_that_of_its_dense_form(chain: list[LowRank]) -> None:
    pair = rank_sum(chain)
    weights = {"a": torch.ones(pair.shape)}
    low, dense = (table(Delta({"a": c}), weights)[0].loc[0] for c in (pair, Dense(pair.dense(torch.float64))))
    assert low["rank90"] == dense["rank90"]
    for column in ("effective_rank", "stable_rank", "frobenius", "spectral", "relative_norm"):
        assert low[column] == pytest.approx(dense[column], rel=1e-9)
    assert low["base_frobenius"] == dense["base_frobenius"]


@quick
@given(chains(), st.floats(1e-6, 1e6))
def test_values_scale_and_ranks_do_not(chain: list[LowRank], factor: float) -> None:
    pair = rank_sum(chain)
    s, scaled = spectrum(pair), spectrum(LowRank(pair.A, pair.B, -factor * pair.scale))
    np.testing.assert_allclose(scaled, factor * s, rtol=0, atol=1e-12 * factor * s[0])
    for rank in (rank_share, effective_rank, stable_rank):
        assert rank(scaled) == pytest.approx(rank(s), rel=1e-9)


@quick
@given(chains(), st.integers(0, 2**32 - 1))
def test_orthogonal_maps_of_input_and_output_change_nothing(chain: list[LowRank], seed: int) -> None:
    pair, generator = rank_sum(chain), torch.Generator().manual_seed(seed)
    left, right = (torch.linalg.qr(tensor(generator, side, side)).Q for side in pair.shape)
    turned = LowRank(pair.A.double() @ right, left @ pair.B.double(), pair.scale)
    close(spectrum(turned), spectrum(pair))


@quick
@given(chains())
def test_a_transposed_pair_has_the_same_values(chain: list[LowRank]) -> None:
    pair = rank_sum(chain)
    close(spectrum(LowRank(pair.B.t(), pair.A.t(), pair.scale)), spectrum(pair))


@quick
@given(values)
def test_ranks_lie_between_one_and_the_number_of_directions(s: np.ndarray) -> None:
    there = np.count_nonzero(s)
    found = [rank_share(s), effective_rank(s), stable_rank(s)]
    if not there:
        assert found == [0, 0, 0]
        return
    assert all(1 - 1e-9 <= rank <= there * (1 + 1e-9) for rank in found)
    # Σ (s/s₁)² is at most Σ s/s₁ = 1/p₁, and the entropy is at least ln 1/p₁.
    assert stable_rank(s) <= effective_rank(s) * (1 + 1e-9)


@quick
@given(values, st.floats(1e-3, 1), st.floats(1e-3, 1))
def test_a_larger_share_needs_no_fewer_directions(s: np.ndarray, one: float, other: float) -> None:
    few, many = (rank_share(s, share) for share in sorted((one, other)))
    assert few <= many


@quick
@given(values, st.floats(0.01, 1))
def test_the_directions_hold_the_share_and_one_fewer_does_not(s: np.ndarray, share: float) -> None:
    assume(s.any())
    energy = np.sort(s)[::-1] ** 2
    q = int(rank_share(s, share))
    assert energy[:q].sum() >= share * energy.sum() * (1 - 1e-11)
    assert energy[: q - 1].sum() < share * energy.sum()
