"""Pairs add exactly, merge with honest errors, and come back from disk unchanged, whatever their shapes."""

import itertools
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from loralab.delta.lowrank import Delta, Dense, LowRank, add, rank_sum
from loralab.delta.merge import merged_weight
from loralab.delta.store import load_lowrank, save_lowrank
from loralab.errors import DeltaError

quick = settings(max_examples=60)

sides = st.integers(1, 9)
seeds = st.integers(0, 2**32 - 1)
scales = st.floats(0.01, 64) | st.sampled_from([1.0, 2.0, -1.0, 1 / 3])
# A pair with scale 0 changes nothing, and only the first of a sum may not be one.
any_scales = scales | st.just(0.0)
names = st.lists(
    st.sampled_from(["q_proj", "layers.0.up_proj", "layers.1.up_proj", "layers.10.up_proj", "h.1.c_attn", "head"]),
    min_size=1,
    unique=True,
)


def tensor(generator: torch.Generator, *shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


@st.composite
def pairs_of_one_layer(draw: st.DrawFn) -> list[LowRank]:
    """Draw one to five pairs of a layer, of any ranks and scales."""
    out, into, generator = draw(sides), draw(sides), torch.Generator().manual_seed(draw(seeds))
    first = draw(scales)
    others = draw(st.lists(any_scales, max_size=4))
    return [
        LowRank(tensor(generator, rank, into), tensor(generator, out, rank), scale)
        for scale, rank in ((scale, draw(sides)) for scale in (first, *others))
    ]


def exact_sum(pairs: list[LowRank]) -> Tensor:
    """Sum the products as they are defined."""
    total = torch.zeros(pairs[0].shape, dtype=torch.float64)
    for pair in pairs:
        total += pair.scale * (pair.B @ pair.A)
    return total


def close(found: Tensor, expected: Tensor, pairs: list[LowRank]) -> None:
    """Compare to 1e-10 of the largest number that the sum may reach."""
    size = sum(abs(pair.scale) * float((pair.B.abs() @ pair.A.abs()).max()) for pair in pairs)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-10 * max(size, 1.0))


@quick
@given(pairs_of_one_layer())
def test_a_rank_sum_is_the_sum_of_the_products(pairs: list[LowRank]) -> None:
    whole = rank_sum(pairs)
    assert whole.rank == sum(pair.rank for pair in pairs)
    assert whole.shape == pairs[0].shape
    assert whole.num_parameters == sum(pair.num_parameters for pair in pairs)
    close(whole.dense(torch.float64), exact_sum(pairs), pairs)


@quick
@given(pairs_of_one_layer(), st.randoms(use_true_random=False))
def test_the_order_of_a_sum_does_not_matter(pairs: list[LowRank], random) -> None:
    mixed = random.sample(pairs, len(pairs))
    assume(mixed[0].scale != 0)
    close(rank_sum(mixed).dense(torch.float64), rank_sum(pairs).dense(torch.float64), pairs)


@quick
@given(pairs_of_one_layer(), st.integers(1, 4))
def test_a_sum_of_sums_is_the_sum(pairs: list[LowRank], cut: int) -> None:
    left, right = pairs[:cut], pairs[cut:]
    assume(right and right[0].scale != 0)
    nested = rank_sum([rank_sum(left), rank_sum(right)])
    assert nested.rank == rank_sum(pairs).rank
    close(nested.dense(torch.float64), exact_sum(pairs), pairs)


def test_what_cannot_be_added_is_refused() -> None:
    pair, other = (LowRank(torch.ones(1, into), torch.ones(3, 1), 1.0) for into in (2, 4))
    with pytest.raises(DeltaError, match="no links"):
        rank_sum([])
    with pytest.raises(DeltaError, match="different layers"):
        rank_sum([pair, other])
    with pytest.raises(DeltaError, match="low-rank"):
        add([Delta({"q": Dense(torch.ones(3, 2))}), Delta({"q": pair})])
    with pytest.raises(DeltaError, match="different bases"):
        add([Delta({"q": pair}, base_fingerprint=base) for base in "ab"])


@st.composite
def deltas(draw: st.DrawFn, dtype: torch.dtype = torch.float64) -> list[Delta]:
    """Draw one to three deltas of one model, each on layers of its own choice, each pair with its rank and scale."""
    generator = torch.Generator().manual_seed(draw(seeds))
    shapes = {name: (draw(sides), draw(sides)) for name in draw(names)}
    found = []
    for _ in range(draw(st.integers(1, 3))):
        layers = {}
        for name in draw(st.lists(st.sampled_from(sorted(shapes)), min_size=1, unique=True)):
            (out, into), rank = shapes[name], draw(sides)
            A, B = tensor(generator, rank, into, dtype=dtype), tensor(generator, out, rank, dtype=dtype)
            layers[name] = LowRank(A, B, draw(scales))
        whole = {"norm.weight": tensor(generator, 3, dtype=dtype)} if draw(st.booleans()) else {}
        embeddings = frozenset(layers) & ({"head"} if draw(st.booleans()) else set())
        found.append(Delta(layers, whole, draw(st.sampled_from([None, "f" * 64])), embeddings))
    return found


@quick
@given(deltas())
def test_deltas_add_layer_by_layer(given_deltas: list[Delta]) -> None:
    together = add(given_deltas)
    assert set(together) == set(itertools.chain(*given_deltas))
    for name, layer in together.items():
        pairs = [pair for delta in given_deltas if isinstance(pair := delta.get(name), LowRank)]
        close(layer.dense(torch.float64), exact_sum(pairs), pairs)
    expected = {name: value for delta in given_deltas for name, value in delta.whole.items()}
    assert together.whole.keys() == expected.keys()
    assert all(together.whole[name] is value for name, value in expected.items())
    assert together.base_fingerprint == next((d.base_fingerprint for d in given_deltas if d.base_fingerprint), None)
    assert together.embeddings == frozenset().union(*(delta.embeddings for delta in given_deltas))


@quick
@given(
    pairs_of_one_layer(),
    st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    st.sampled_from([torch.float32, torch.bfloat16]),
    st.booleans(),
)
def test_the_errors_of_a_merge_are_those_of_its_weight(
    pairs: list[LowRank], stored: torch.dtype, held: torch.dtype, dense: bool
) -> None:
    change = Dense(exact_sum(pairs)) if dense else rank_sum(pairs)
    assume(0.01 < float(exact_sum(pairs).abs().max()) < 1e4)
    weight = tensor(torch.Generator().manual_seed(0), *pairs[0].shape).to(held)
    merged, error = merged_weight(weight, change, stored, "layer")
    moved = exact_sum(pairs)
    exact, size = weight.double() + moved, float(moved.norm())
    assert merged.dtype == stored and error.name == "layer"
    assert error.rounded_error == pytest.approx(float((merged.double() - exact).norm()) / size, rel=1e-6, abs=1e-12)
    assert error.half_ulp_error == pytest.approx(
        float((exact.to(stored).double() - exact).norm()) / size, rel=1e-6, abs=1e-12
    )
    # No rounding can do better than the nearest number; ours adds the error of float32 at most, and a tie now and then.
    # Torch rounds float64 to bfloat16 by way of float32, so a tie may fall the other way: not better than one rounding.
    assert error.half_ulp_error <= error.rounded_error * (1 + 1e-5) + 1e-12
    assert error.rounded_error <= error.half_ulp_error + 2 * error.float32_error + 1e-12
    assert error.unchanged_share == float((merged == weight).double().mean())


def test_a_weight_of_another_shape_takes_no_delta() -> None:
    with pytest.raises(DeltaError, match="the weight"):
        merged_weight(torch.zeros(2, 3), LowRank(torch.ones(1, 2), torch.ones(3, 1), 1.0), torch.float32)
    with pytest.raises(DeltaError, match="finite"):
        merged_weight(torch.zeros(3, 2), LowRank(torch.ones(1, 2), torch.ones(3, 1), 1e38 * 100), torch.float32)


@quick
@given(deltas(dtype=torch.float32))
def test_a_delta_comes_back_from_disk_as_it_was(given_deltas: list[Delta]) -> None:
    delta = given_deltas[0]
    with TemporaryDirectory() as folder:
        save_lowrank(Path(folder), delta, "base")
        back = load_lowrank(Path(folder))
    assert set(back) == set(delta)
    for name, layer in delta.items():
        other = back[name]
        assert isinstance(layer, LowRank) and isinstance(other, LowRank)
        assert torch.equal(other.A, layer.A) and torch.equal(other.B, layer.B)
        assert other.scale == pytest.approx(layer.scale, rel=1e-12)
    assert back.whole.keys() == delta.whole.keys()
    assert all(torch.equal(back.whole[name], value) for name, value in delta.whole.items())
    assert (back.base_fingerprint, back.embeddings) == (delta.base_fingerprint, delta.embeddings)
