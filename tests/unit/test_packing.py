import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loralab.base.packing import pack


@st.composite
def problems(draw):
    capacity = draw(st.integers(1, 70))
    return draw(st.lists(st.integers(1, capacity), max_size=60)), capacity


def best_fit_decreasing(lengths, capacity):
    """Do the same the slow way: look at every bin for every document."""
    free = []
    for length in sorted(lengths, reverse=True):
        fitting = [i for i, space in enumerate(free) if space >= length]
        if fitting:
            free[min(fitting, key=free.__getitem__)] -= length
        else:
            free.append(capacity - length)
    return sorted(capacity - space for space in free)


@given(problems())
def test_every_document_once_and_no_bin_overflows(problem):
    lengths, capacity = problem
    bins = pack(lengths, capacity)
    assert sorted(i for members in bins for i in members) == list(range(len(lengths)))
    assert all(0 < sum(lengths[i] for i in members) <= capacity for members in bins)


@given(problems())
def test_bins_are_those_of_the_definition(problem):
    lengths, capacity = problem
    assert sorted(sum(lengths[i] for i in b) for b in pack(lengths, capacity)) == best_fit_decreasing(lengths, capacity)


@given(problems())
def test_no_two_bins_could_be_one(problem):
    lengths, capacity = problem
    fills = sorted(sum(lengths[i] for i in members) for members in pack(lengths, capacity))
    assert len(fills) < 2 or fills[0] + fills[1] > capacity


@given(problems(), st.randoms(use_true_random=False))
def test_order_does_not_change_the_number_of_bins(problem, rng):
    lengths, capacity = problem
    shuffled = rng.sample(lengths, len(lengths))
    assert len(pack(shuffled, capacity)) == len(pack(lengths, capacity))


def test_mixed_lengths_leave_almost_no_waste():
    rng = random.Random(0)
    lengths = [min(1024, max(1, int(rng.lognormvariate(5, 0.8)))) for _ in range(20_000)]
    assert sum(lengths) / (len(pack(lengths, 1024)) * 1024) > 0.995


@pytest.mark.parametrize("lengths", [[0], [3, 9], [-1]])
def test_a_length_that_fits_no_bin_is_refused(lengths):
    with pytest.raises(ValueError, match="do not fit bins of 1 to 8"):
        pack(lengths, 8)


def test_nothing_gives_nothing():
    assert pack([], 8) == []
