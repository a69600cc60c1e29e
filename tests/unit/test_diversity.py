"""Distinct outputs, against counting, every way to draw samples, and models of known diversity."""

import math
from itertools import combinations, pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from loralab.evals.diversity import (
    Tally,
    diversity_changes,
    diversity_scores,
    expected_distinct,
    samples_in_common,
    tally,
)

COUNTS = st.lists(st.integers(1, 6), min_size=1, max_size=6)


def test_outputs_are_the_same_if_their_texts_are_but_for_white_space_at_the_end():
    found = tally(["a = 1\n", "a = 1", "a = 1  \n\n", " a = 1", "A = 1", "b"])
    assert found == Tally(all=(3, 1, 1, 1)) and found.n == 6


def test_passing_and_failing_outputs_are_counted_apart():
    found = tally(["x", "x", "y", "z", "z", "z", "w"], [True, True, True, False, False, False, False])
    assert found == Tally(all=(3, 2, 1, 1), passing=(2, 1), failing=(3, 1))
    # A program that passed once and ran out of time once.
    assert tally(["x", "x"], [True, False]) == Tally((2,), (1,), (1,))


@pytest.mark.parametrize(("outputs", "passed"), [([], None), (["a"], []), ([], []), (["a"], [True, False])])
def test_samples_and_verdicts_belong_together(outputs, passed):
    with pytest.raises(ValueError):
        tally(outputs, passed)


@given(COUNTS, st.data())
def test_fewer_samples_are_expected_to_hold_what_all_draws_hold_on_average(counts, data):
    n = sum(counts)
    m = data.draw(st.integers(0, min(n, 5)))
    samples = [i for i, count in enumerate(counts) for _ in range(count)][:12]
    counts, n = [samples.count(i) for i in set(samples)], len(samples)
    m = min(m, n)
    draws = [len(set(draw)) for draw in combinations(samples, m)]
    assert expected_distinct(counts, n, m) == pytest.approx(np.mean(draws))


@given(COUNTS, st.integers(0, 10))
def test_more_samples_never_hold_less(counts, others):
    n = sum(counts) + others  # samples of the other kind
    found = [expected_distinct(counts, n, m) for m in range(n + 1)]
    assert found[0] == 0 and found[-1] == pytest.approx(len(counts))
    assert all(a <= b + 1e-12 for a, b in pairwise(found))
    assert found[1] == pytest.approx(sum(counts) / n)


def test_many_samples_are_counted_without_overflow():
    assert expected_distinct([1] * 100_000, 100_000, 50_000) == pytest.approx(50_000)
    assert expected_distinct([2000], 4000, 2) == pytest.approx(1 - (2000 * 1999) / (4000 * 3999))
    with pytest.raises(ValueError, match="cannot be taken"):
        expected_distinct([1], 1, 2)


def test_repeats_are_the_probability_that_two_samples_are_the_same():
    samples = list("aaabbc")
    pairs = [a == b for a, b in combinations(samples, 2)]
    assert tally(samples).repeats == pytest.approx(np.mean(pairs))
    assert tally(["a"]).repeats is None and tally(["a", "a"]).repeats == 1
    rng = np.random.default_rng(0)
    few = [tally(rng.choice(list("abcd"), 5, p=[0.4, 0.3, 0.2, 0.1]).tolist()).repeats for _ in range(1500)]
    assert np.mean(few) == pytest.approx(0.16 + 0.09 + 0.04 + 0.01, abs=0.015), "unbiased however few the samples"


def test_scores_are_means_over_problems_at_the_samples_that_all_have():
    problems = [
        tally(["a", "b", "b", "c"], [True, False, False, False]),
        tally(["a", "a", "a", "a"], [False] * 4),
        tally(["a", "b", "c", "d", "e"], [True, True, False, False, True]),
    ]
    assert samples_in_common(problems) == 4
    whole, passing, failing = diversity_scores("humaneval", problems)
    assert (whole.name, passing.name, failing.name) == (
        "humaneval/distinct",
        "humaneval/distinct_passing",
        "humaneval/distinct_failing",
    )
    assert whole.unit == "distinct outputs of 4"
    assert whole.value == pytest.approx((3 + 1 + 4) / 3)
    assert whole.standard_error == pytest.approx(np.std([3, 1, 4], ddof=1) / math.sqrt(3))
    assert passing.value == pytest.approx((1 + 0 + 3 * 4 / 5) / 3)
    assert failing.value == pytest.approx((2 + 1 + 2 * 4 / 5) / 3)
    (single,) = diversity_scores("story", [tally(["a", "b"])], m=1)
    assert (single.value, single.standard_error) == (1, None)


def test_a_model_that_repeats_itself_is_seen_problem_by_problem_and_whatever_its_number_of_samples():
    rng = np.random.default_rng(1)

    def write(outputs: int, samples: int) -> list[Tally]:
        drawn = [rng.integers(0, outputs * kind, samples).tolist() for kind in rng.integers(1, 5, 40).tolist()]
        return [tally([str(x) for x in found], [x % 2 == 0 for x in found]) for found in drawn]

    changes = diversity_changes(write(8, 30), write(3, 20))
    assert list(changes) == ["distinct", "distinct_passing", "distinct_failing"]
    assert changes["distinct"].interval[1] < 0 and changes["distinct"].p_value < 1e-3
    same = diversity_changes(write(5, 50), write(5, 20))["distinct"]
    assert abs(same.value) < 3 * same.standard_error, "more samples alone make no difference"
    assert list(diversity_changes([tally(["a", "b"])], [tally(["a", "a"])])) == ["distinct"]
    with pytest.raises(ValueError, match="do not pair"):
        diversity_changes(write(5, 5), write(5, 5)[:3])
