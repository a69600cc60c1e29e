"""Statistics of judgements against definitions written out, sklearn, SciPy, and what repeated draws do."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from loralab.evals.judgement import (
    area_under_curve,
    areas_apart,
    brier,
    calibration_error,
    midranks,
    minus_log_sigmoid,
    pearson,
    reliability,
    sigmoid,
    softmax,
    spearman,
    wins,
)
from loralab.evals.stats import Score

metrics = pytest.importorskip("sklearn.metrics", reason="scikit-learn is the peer")

FEW = st.lists(st.tuples(st.integers(-3, 3), st.booleans()), min_size=2, max_size=30)


def drawn(n, share=0.3, apart=1.0, seed=0, rounded=False):
    rng = np.random.default_rng(seed)
    is_up = rng.random(n) < share
    values = rng.normal(size=n) + apart * is_up
    return (np.round(values) if rounded else values), is_up


def area_by_pairs(values, is_up):
    """Count pairs, ties as half of one."""
    up, down = values[is_up][:, None], values[~is_up]
    return float(((up > down) + 0.5 * (up == down)).mean())


@given(FEW)
@settings(max_examples=60, deadline=None)
def test_the_area_is_the_share_of_pairs_won_with_ties_as_half(rows):
    values, is_up = np.array([v for v, _ in rows], float), np.array([u for _, u in rows])
    found = area_under_curve(values, is_up)
    if is_up.all() or not is_up.any():
        assert found is None
        return
    assert found[0] == pytest.approx(area_by_pairs(values, is_up), abs=1e-12)
    assert found[0] == pytest.approx(metrics.roc_auc_score(is_up, values), abs=1e-12)
    tested = stats.mannwhitneyu(values[is_up], values[~is_up]).statistic / (is_up.sum() * (~is_up).sum())
    assert found[0] == pytest.approx(tested, abs=1e-12)


@pytest.mark.parametrize("rounded", [False, True])
def test_the_error_of_the_area_is_delongs(rounded):
    values, is_up = drawn(60, rounded=rounded)
    won = np.array([[(u > d) + 0.5 * (u == d) for d in values[~is_up]] for u in values[is_up]])
    m, n = won.shape
    expected = math.sqrt(won.mean(1).var(ddof=1) / m + won.mean(0).var(ddof=1) / n)
    assert area_under_curve(values, is_up)[1] == pytest.approx(expected, rel=1e-12)


def test_the_error_of_the_area_is_the_spread_over_draws():
    found = [area_under_curve(*drawn(150, seed=seed)) for seed in range(400)]
    areas, errors = np.array(found).T
    assert np.mean(errors) == pytest.approx(areas.std(ddof=1), rel=0.1)
    truth = stats.norm.cdf(1 / math.sqrt(2))
    assert np.mean(np.abs(areas - truth) < 1.96 * errors) == pytest.approx(0.95, abs=0.03)


@pytest.mark.parametrize("sign", [1, -1])
def test_a_perfect_area_is_not_certain(sign):
    is_up = np.arange(30) < 10
    area, error = area_under_curve(sign * np.where(is_up, 1.0, -1.0), is_up)
    assert area == (1.0 if sign == 1 else 0.0)
    low, high = Score("target/auc", area, "", 30, error).interval()
    z2 = 1.959964**2
    assert (area - low if sign == 1 else high - area) == pytest.approx(z2 / (10 + z2), rel=0.01), "as of ten items"


def test_one_item_of_a_class_has_no_error_and_a_missing_class_no_area():
    values = np.array([3.0, 1.0, 2.0])
    assert area_under_curve(values, np.array([True, False, False])) == (1.0, None)
    assert area_under_curve(values, np.zeros(3, bool)) is None
    assert areas_apart(values, values, np.ones(3, bool)) is None


def test_two_areas_on_the_same_items_are_paired():
    rng = np.random.default_rng(3)
    apart, errors = [], []
    for _ in range(300):
        is_up = rng.random(120) < 0.4
        common = rng.normal(size=120) + is_up
        first, second = (common + rng.normal(size=120) * spread for spread in (0.3, 0.6))
        value, error = areas_apart(first, second, is_up)
        assert value == pytest.approx(area_by_pairs(first, is_up) - area_by_pairs(second, is_up), abs=1e-12)
        apart.append(value)
        errors.append(error)
    assert np.mean(errors) == pytest.approx(np.std(apart, ddof=1), rel=0.1)
    alone = [area_under_curve(x, is_up)[1] for x in (first, second)]
    assert errors[-1] < 0.7 * math.hypot(*alone), "what both have in common cancels"


@given(st.lists(st.integers(-4, 4), min_size=1, max_size=30))
@settings(max_examples=50, deadline=None)
def test_ranks_are_scipys(values):
    assert midranks(np.array(values, float)).tolist() == stats.rankdata(values).tolist()


@pytest.mark.parametrize("ours", [pearson, spearman])
@pytest.mark.parametrize("rounded", [False, True])
def test_correlations_are_scipys(ours, rounded):
    rng = np.random.default_rng(1)
    x = rng.normal(size=40)
    y = -0.6 * x + rng.normal(size=40)
    x, y = (np.round(x), np.round(y)) if rounded else (x, y)
    theirs = {pearson: stats.pearsonr, spearman: stats.spearmanr}[ours](x, y).statistic
    assert ours(x, y)[0] == pytest.approx(theirs, abs=1e-12)
    assert theirs < -0.3


@pytest.mark.parametrize("ours", [pearson, spearman])
def test_errors_of_correlations_are_the_spread_over_draws(ours):
    rng = np.random.default_rng(2)
    found = []
    for _ in range(500):
        x = rng.normal(size=80)
        found.append(ours(x, 0.7 * x + rng.normal(size=80)))
    values, errors = np.array(found).T
    assert np.mean(errors) == pytest.approx(values.std(ddof=1), rel=0.1)


def test_what_does_not_vary_has_no_correlation():
    constant, rising = np.ones(5), np.arange(5.0)
    assert pearson(constant, rising) is None and spearman(rising, constant) is None
    assert spearman(rising[:1], rising[:1]) is None
    assert spearman(rising[:3], rising[:3]) == (pytest.approx(1.0), None), "three items say nothing of the error"


def test_answers_of_one_pair_count_as_one_item_in_the_error():
    rng = np.random.default_rng(4)
    x = rng.normal(size=100)
    y = x + rng.normal(size=100)
    (value, narrow), (same, wide) = spearman(x, y), spearman(x, y, 50)
    assert value == same and wide / narrow == pytest.approx(math.sqrt(97 / 47))


@pytest.mark.parametrize("value", [-800.0, -3.0, 0.0, 2.0, 800.0])
def test_the_sigmoid_and_its_loss_do_not_overflow(value):
    x = np.array([value])
    expected = 1 / (1 + math.exp(-value)) if value > -700 else 0.0
    assert sigmoid(x)[0] == pytest.approx(expected, abs=1e-15)
    assert minus_log_sigmoid(x)[0] == pytest.approx(-math.log(expected) if expected else -value)


def test_ties_are_half_won():
    assert wins(np.array([2.0, 1.0, 1.0]), np.array([1.0, 2.0, 1.0])).tolist() == [1.0, 0.0, 0.5]


def test_bins_hold_equally_many_and_equal_claims_stay_together():
    claimed = np.random.default_rng(0).permutation(np.linspace(0.01, 0.99, 100))
    found = reliability(claimed, (claimed > 0.5).astype(float))
    assert [one.count for one in found] == [10] * 10
    edges = np.sort(claimed).reshape(10, 10)
    assert [one.claimed for one in found] == pytest.approx(edges.mean(1).tolist())
    assert [one.true for one in found] == pytest.approx((edges > 0.5).mean(1).tolist())
    alike = reliability(np.full(40, 0.7), np.tile([1.0, 1.0, 1.0, 0.0], 10))
    assert [(one.claimed, one.true, one.count) for one in alike] == [(pytest.approx(0.7), 0.75, 40)]
    assert calibration_error(alike) == pytest.approx(0.05)


def test_the_calibration_error_is_the_mean_distance_of_the_bins():
    rng = np.random.default_rng(5)
    claimed = np.sort(rng.random(200))
    true = (rng.random(200) < claimed**2).astype(float)
    parts = zip(np.split(claimed, 10), np.split(true, 10), strict=True)
    expected = np.mean([abs(c.mean() - t.mean()) for c, t in parts])
    assert calibration_error(reliability(claimed, true)) == pytest.approx(expected)
    honest = (rng.random(20_000) < (many := rng.random(20_000))).astype(float)
    assert calibration_error(reliability(many, honest)) < 0.02 < 0.1 < expected


def test_a_bin_knows_how_little_it_knows():
    (only,) = reliability(np.array([0.9, 0.9]), np.array([1.0, 1.0]))
    low, high = only.interval
    assert low < 0.5 and high == 1.0
    assert reliability(np.zeros(0), np.zeros(0)) == []


def test_brier_is_sklearns():
    rng = np.random.default_rng(6)
    claimed = softmax(rng.normal(size=(50, 3)))
    labels = rng.integers(0, 3, 50)
    expected = metrics.brier_score_loss(labels, claimed, scale_by_half=True, labels=[0, 1, 2])
    assert brier(claimed, np.eye(3)[labels]).mean() == pytest.approx(expected)
    up = rng.random(50)
    two, truth = np.stack([1 - up, up], 1), rng.integers(0, 2, 50)
    assert brier(two, np.eye(2)[truth]) == pytest.approx((up - truth) ** 2)


def test_softmax_does_not_overflow():
    assert softmax(np.array([[1000.0, 1000.0], [0.0, math.log(3)]])).ravel() == pytest.approx([0.5, 0.5, 0.25, 0.75])
