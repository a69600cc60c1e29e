"""Intervals, tests and the noise floor, against statsmodels, published examples and simulation."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import t as student
from statsmodels.stats.contingency_tables import mcnemar as reference_mcnemar
from statsmodels.stats.multitest import multipletests
from statsmodels.stats.proportion import proportion_confint

from loralab.errors import DataError
from loralab.evals.stats import (
    SHARE,
    Score,
    holm,
    matched,
    mcnemar,
    mean_score,
    noise_floor,
    skill_scores,
    t95,
    wilson,
    within_noise,
)


@st.composite
def cells(draw, largest: int = 300) -> tuple[int, int, int]:
    """Lost, won and all items."""
    lost, won, same = (draw(st.integers(0, largest)) for _ in range(3))
    return lost, won, max(1, lost + won + same)


# Shares


@pytest.mark.parametrize(("successes", "n"), [(0, 50), (50, 50), (1, 1), (0, 1), (17, 40), (999, 1000)])
def test_wilsons_interval_is_that_of_statsmodels(successes, n):
    assert wilson(successes, n) == pytest.approx(proportion_confint(successes, n, method="wilson"), abs=1e-7)


@given(st.integers(1, 500).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_wilsons_interval_holds_the_share_and_has_a_width(drawn):
    successes, n = drawn
    low, high = wilson(successes, n)
    assert 0 <= low <= successes / n <= high <= 1 and high - low > 1.9 / (n + 4)


def coverage(intervals: dict[int, tuple[float, float]], drawn: np.ndarray, truth: float) -> float:
    return float(np.mean([low <= truth <= high for low, high in (intervals[k] for k in drawn.tolist())]))


@pytest.mark.parametrize("share", [0.02, 0.3, 0.97])
def test_wilsons_interval_covers_the_truth_about_19_times_in_20(share):
    drawn = np.random.default_rng(0).binomial(60, share, 20_000)
    covered = coverage({k: wilson(k, 60) for k in range(61)}, drawn, share)
    assert 0.92 <= covered <= 0.99


# Paired shares


def test_the_matched_interval_is_wald_with_half_an_item_more_in_each_cell():
    # Prime minister's approval (Agresti, Categorical Data Analysis, table 11.1): 150 of 1600 turned away, 86 came over.
    lost, won, n = 150 + 0.5, 86 + 0.5, 1600 + 2
    value, error = (won - lost) / n, math.sqrt(lost / n + won / n - ((won - lost) / n) ** 2) / math.sqrt(n)
    assert matched(150, 86, 1600) == pytest.approx((value - 1.959964 * error, value + 1.959964 * error))
    assert matched(150, 86, 1600) == pytest.approx(
        (-0.0587, -0.0213), abs=5e-4
    )  # Wald, as published: so many items agree


@given(cells())
def test_the_matched_interval_holds_the_difference_and_turns_with_the_pair(drawn):
    lost, won, n = drawn
    low, high = matched(lost, won, n)
    assert -1 <= low <= (won - lost) / n <= high <= 1 and low < high
    assert matched(won, lost, n) == pytest.approx((-high, -low))


@pytest.mark.parametrize(("lost", "won"), [(0.02, 0.01), (0.1, 0.1), (0.3, 0.05), (0.0, 0.02)])
def test_the_matched_interval_covers_the_truth_about_19_times_in_20(lost, won):
    drawn = np.random.default_rng(1).multinomial(80, [lost, won, 1 - lost - won], 20_000)
    inside = [low <= won - lost <= high for low, high in (matched(a, b, 80) for a, b, _ in drawn.tolist())]
    assert np.mean(inside) >= 0.935


@pytest.mark.parametrize(("lost", "won"), [(0, 0), (1, 0), (0, 5), (5, 6), (150, 86), (2000, 2300)])
def test_mcnemars_exact_p_is_that_of_statsmodels(lost, won):
    exact, mid = mcnemar(lost, won)
    assert exact == pytest.approx(reference_mcnemar([[7, lost], [won, 9]], exact=True).pvalue, rel=1e-9)
    # mid-p is the exact p-value less the probability of the outcome itself.
    here = math.comb(lost + won, won) / 2 ** (lost + won) if lost + won else 0.0
    assert mid == pytest.approx(exact - here if lost != won else 1.0, rel=1e-9)


@given(st.integers(0, 400), st.integers(0, 400))
def test_mcnemar_gives_probabilities_whichever_model_comes_first(lost, won):
    exact, mid = mcnemar(lost, won)
    assert 0 <= mid <= exact <= 1 and mcnemar(won, lost) == (exact, mid)


def test_mcnemars_test_is_wrong_at_most_once_in_20():
    rng = np.random.default_rng(2)
    changed = rng.binomial(200, 0.2, 4000)
    outcomes = [
        mcnemar(int(lost), int(all_ - lost)) for lost, all_ in zip(rng.binomial(changed, 0.5), changed, strict=True)
    ]
    exact, mid = (np.mean([p[which] <= 0.05 for p in outcomes]) for which in (0, 1))
    assert exact <= 0.05 + 0.007 and exact <= mid <= 0.05 + 0.012  # Monte Carlo's own error is 0.0034


# Many tests


@pytest.mark.parametrize(
    "p_values",
    [[0.04], [0.01, 0.04, 0.03, 0.005], [0.02, 0.02, 0.9, 0.3, 1.0], [0.0, 0.5], [0.06, 0.001, 0.02, 0.5, 0.03]],
)
def test_holms_p_values_are_those_of_statsmodels(p_values):
    assert holm(p_values) == pytest.approx(multipletests(p_values, method="holm")[1].tolist())


def test_no_tests_need_no_adjustment():
    assert holm([]) == []


# Scores


@pytest.mark.parametrize("freedom", [1, 2, 3, 4, 5, 7, 10, 30, 49, 1000])
def test_students_quantile_is_that_of_scipy(freedom):
    assert t95(freedom) == pytest.approx(student.ppf(0.975, freedom), rel=2e-3)


@pytest.mark.parametrize("value", [0.0, 1.0])
def test_a_share_of_items_that_all_came_out_alike_is_not_certain(value):
    (score,) = skill_scores("target/accuracy", SHARE, np.full(50, value), ["calc"] * 50)
    assert score.standard_error == 0
    low, high = score.interval()
    assert (low, high) == pytest.approx(proportion_confint(50 * value, 50, method="wilson"), abs=1e-7)
    assert max(abs(value - low), abs(value - high)) > 0.07


@pytest.mark.parametrize(("value", "cells"), [(0.0, (0, 0)), (1.0, (0, 30)), (-1.0, (30, 0))])
def test_a_change_of_items_that_all_moved_alike_is_not_certain(value, cells):
    (score,) = skill_scores("source/choice_change", SHARE, np.full(30, value), ["copy"] * 30)
    assert score.standard_error == 0 and score.interval() == matched(*cells, 30)


@pytest.mark.parametrize(
    ("name", "unit", "ends"),
    [
        ("hellaswag/acc_norm", SHARE, (0, 1)),
        ("hellaswag/acc_norm_change", SHARE, (-1, 1)),
        ("drift/top1_flips", "share of tokens", (0, 1)),
        ("general/loss", "nats/token", (0, 1 + 3.1825 * 5)),
        ("general/loss_rise", "nats/token", (1 - 3.1825 * 5, 1 + 3.1825 * 5)),
    ],
)
def test_intervals_end_where_the_score_does(name, unit, ends):
    assert Score(name, 1.0, unit, 4, 5.0).interval() == pytest.approx(ends, abs=0.06)


def test_a_loss_that_is_the_same_everywhere_keeps_its_point():
    score = mean_score("general/loss", "nats/token", np.full(5, 2.0), np.ones(5))
    assert score.interval() == (2.0, 2.0)


# Seeds


def test_the_noise_floor_is_the_spread_between_seeds():
    floor = noise_floor([0.50, 0.52, 0.54, 0.48, 0.46])
    assert (floor.mean, floor.n_seeds) == (pytest.approx(0.5), 5)
    assert floor.sd == pytest.approx(math.sqrt(0.004 / 4))
    assert floor.interval == pytest.approx(
        (0.5 - 2.7764 * floor.sd / math.sqrt(5), 0.5 + 2.7764 * floor.sd / math.sqrt(5)), rel=1e-3
    )
    assert floor.smallest_detectable() == pytest.approx(2.7764 * math.sqrt(2) * floor.sd, rel=3e-3)
    assert floor.smallest_detectable(8) == pytest.approx(floor.smallest_detectable() / math.sqrt(8))
    assert within_noise(-0.05, floor) and not within_noise(0.2, floor)


def test_seeds_alone_exceed_the_smallest_detectable_difference_once_in_20():
    rng = np.random.default_rng(3)
    runs = rng.normal(0.6, 0.02, (4000, 5 + 2))
    beyond = [not within_noise(row[5] - row[6], noise_floor(row[:5].tolist())) for row in runs]
    assert np.mean(beyond) == pytest.approx(0.05, abs=0.012)


@pytest.mark.parametrize("values", [[], [0.5], [0.5, math.nan]])
def test_a_noise_floor_needs_two_finished_runs(values):
    with pytest.raises(DataError) as caught:
        noise_floor(values)
    assert caught.value.where == "noise floor" and caught.value.fix
