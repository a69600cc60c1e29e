"""Paired outcomes: transitions, intervals and tests, against scipy, statsmodels, resampling by hand and simulated guessing."""

import json
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import bootstrap, permutation_test, ttest_rel
from statsmodels.stats.contingency_tables import mcnemar

from loralab.evals.paired import Paired, compare, paired, paired_values, together
from loralab.evals.resampling import sign_flip
from loralab.evals.stats import SHARE, matched, mean_score, skill_scores

OUTCOMES = st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=60)


def answers(lost: int, won: int, both: int, neither: int) -> tuple[np.ndarray, np.ndarray]:
    """Make outcomes with so many items in each cell, in a shuffled order."""
    cells = [(1, 0)] * lost + [(0, 1)] * won + [(1, 1)] * both + [(0, 0)] * neither
    base, tuned = np.array(cells)[np.random.default_rng(0).permutation(len(cells))].T
    return base, tuned


# One delta against its base


def test_losses_and_wins_that_cancel_are_seen():
    found = paired(*answers(30, 30, 20, 20))
    assert (found.n, found.before, found.after, found.value) == (100, 0.5, 0.5, 0.0)
    assert (found.lost, found.won) == (30, 30)
    assert found.standard_error == pytest.approx(math.sqrt(0.6 / 100)) and found.p_value == found.mid_p == 1
    assert found.is_tie


def test_the_table_is_that_of_statsmodels_and_of_the_formulas():
    base, tuned = answers(25, 9, 40, 31)
    found = paired(base, tuned)
    F, BT, n = 25 / 105, 9 / 105, 105
    assert (found.before, found.after) == (pytest.approx(base.mean()), pytest.approx(tuned.mean()))
    assert found.value == pytest.approx(tuned.mean() - base.mean())
    assert found.standard_error == pytest.approx(math.sqrt(F + BT - (F - BT) ** 2) / math.sqrt(n))
    assert found.interval == matched(25, 9, 105)
    assert found.p_value == pytest.approx(mcnemar([[40, 25], [9, 31]], exact=True).pvalue)
    assert not found.is_tie and found.p_value < 0.01


def test_mcnemars_error_is_that_of_the_paired_score():
    base, tuned = answers(25, 9, 40, 31)
    (score,) = skill_scores("source/accuracy_change", SHARE, (tuned - base).astype(float), ["a"] * 105)
    # The score divides by n − 1.
    assert paired(base, tuned).standard_error == pytest.approx(score.standard_error * math.sqrt(104 / 105))


@given(OUTCOMES)
def test_swapping_base_and_tuned_turns_everything_round(outcomes):
    base, tuned = ([pair[which] for pair in outcomes] for which in (0, 1))
    there, back = paired(base, tuned), paired(tuned, base)
    assert back.value == -there.value and (back.lost, back.won) == (there.won, there.lost)
    assert back.interval == pytest.approx((-there.interval[1], -there.interval[0]))
    assert (back.p_value, back.mid_p, back.standard_error) == (there.p_value, there.mid_p, there.standard_error)
    assert 0 <= there.p_value <= 1 and there.interval[0] <= there.value <= there.interval[1]
    assert there.bootstrap[0] <= there.value <= there.bootstrap[1]
    assert there.lost - there.won == sum(base) - sum(tuned)


def test_the_bootstrap_of_the_cells_is_that_of_the_items():
    base, tuned = answers(25, 9, 40, 31)
    reference = bootstrap(
        ((tuned - base).astype(float),), np.mean, n_resamples=20_000, method="percentile", rng=np.random.default_rng(5)
    ).confidence_interval
    # The mean moves in steps of 1/105; an end may fall a step aside.
    assert paired(base, tuned).bootstrap == pytest.approx((reference.low, reference.high), abs=1.5 / 105)
    assert paired(base, tuned, seed=1).bootstrap == paired(base, tuned, seed=1).bootstrap


def test_items_that_all_agree_leave_the_change_uncertain():
    found = paired(*answers(0, 0, 30, 20))
    assert (found.value, found.standard_error, found.bootstrap) == (0, 0, (0, 0))
    low, high = found.interval
    assert low == -high and high > 0.03 and found.p_value == 1
    assert paired([True], [False]).standard_error is None
    assert paired([True], [False]).interval[0] == -1


def test_the_p_value_is_wrong_once_in_20_at_most_and_the_interval_covers():
    rng = np.random.default_rng(0)
    found = []
    for _ in range(400):
        known = rng.random(150)
        found.append(paired(known + 0.3 * rng.random(150) > 0.6, known + 0.3 * rng.random(150) > 0.6))
    assert np.mean([f.p_value <= 0.05 for f in found]) <= 0.05 + 0.022
    assert np.mean([f.interval[0] <= 0 <= f.interval[1] for f in found]) >= 0.93
    assert np.mean([f.bootstrap[0] <= 0 <= f.bootstrap[1] for f in found]) >= 0.92


@pytest.mark.parametrize(
    ("base", "tuned", "keys"),
    [
        ([], [], {}),
        ([1, 0], [1], {}),
        ([1, 0.5], [1, 0], {}),
        ([1, math.nan], [1, 0], {}),
        ([1, 0], [1, 0], {"clusters": ["a"]}),
        ([1, 0], [1, 0], {"chance": 1.0}),
        ([1, 0], [1, 0], {"chance": [0.25, 0.0]}),
    ],
)
def test_outcomes_that_do_not_pair_are_refused(base, tuned, keys):
    with pytest.raises(ValueError):
        paired(base, tuned, **keys)


# Guessing


@pytest.mark.parametrize("k", [2, 4, 10])
def test_chance_is_taken_off_as_the_reference_derives_it(k):
    found = paired(*answers(30, 12, 100, 60), chance=1 / k)
    a0, a1 = found.before, found.after
    spurious, most = (1 - a0) * (1 - a1) / (k - 1), (1 - max(a0, a1)) / k
    assert found.by_chance == pytest.approx(spurious) and found.most_by_chance == pytest.approx(most)
    said = found.as_dict()
    assert (said["lost"], said["won"], said["lost_share"]) == (30, 12, pytest.approx(30 / 202))
    assert said["lost_above_chance"] == pytest.approx(max(0, 30 / 202 - spurious))
    assert said["won_above_chance"] == pytest.approx(max(0, 12 / 202 - spurious))
    assert said["lost_above_chance_least"] == pytest.approx(max(0, 30 / 202 - most))
    assert said["won_above_chance_least"] == pytest.approx(max(0, 12 / 202 - most))


@pytest.mark.parametrize("stays", [0.0, 0.5, 1.0])
def test_the_two_corrections_enclose_what_guessing_did(stays):
    """Draw models that know or guess: of what is unknown before, `stays` is unknown after; the rest independently."""
    rng = np.random.default_rng(1)
    n, choices = 200_000, rng.choice([2, 10], 200_000)
    knows = rng.random(n) < 0.4
    knows_after = np.where(rng.random(n) < stays, knows, rng.random(n) < 0.4)

    def answer(known: np.ndarray) -> np.ndarray:
        return known | (rng.random(n) < 1 / choices)

    before, after = answer(knows), answer(knows_after)
    # An item is truly lost only if it was known: what guessers lose by bad luck is spurious.
    spurious = float((before & ~after & ~knows).mean())
    found = paired(before, after, chance=1 / choices)
    assert found.by_chance - 0.003 <= spurious <= found.most_by_chance + 0.003
    if stays == 0:
        assert spurious == pytest.approx(found.by_chance, abs=0.003)
    if stays == 1:
        assert spurious == pytest.approx(found.most_by_chance, abs=0.003)
        assert found.above_chance(found.lost, least=True) == pytest.approx(0, abs=0.003)


def test_a_delta_that_guesses_as_its_base_did_is_corrected_too_much():
    """Both corrections suppose new guesses, so the raw counts are said beside them."""
    said = paired(*answers(3, 1, 100, 98), chance=0.25).as_dict()
    assert said["by_chance"] > said["lost_share"] and said["lost_above_chance"] == 0
    assert (said["lost"], said["won"]) == (3, 1)


def test_a_model_worse_than_guessing_is_held_to_be_a_guesser():
    found = paired(*answers(5, 5, 0, 90), chance=0.25)
    assert found.by_chance == found.most_by_chance == pytest.approx(0.25 * 0.75)
    assert found.above_chance(found.lost) == 0


def test_answers_that_cannot_be_guessed_have_no_correction():
    said = paired(*answers(30, 12, 100, 60)).as_dict()
    assert {said[key] for key in said if "chance" in key} == {None}
    assert json.loads(json.dumps(said)) == said


# Clusters


def test_sign_flips_of_single_items_are_mcnemars_test():
    base, tuned = answers(25, 9, 40, 31)
    alone = paired(base, tuned, clusters=range(105))
    assert alone.p_value == pytest.approx(paired(base, tuned).p_value) and alone.mid_p is None
    assert alone.standard_error == pytest.approx(paired(base, tuned).standard_error * math.sqrt(105 / 104))


@pytest.mark.parametrize(
    "differences", [[3, -1, 2, 0, 2], [1, 1, 1, 1, 1, 1], [4, -4], [0, 0], [5, 1, 1, -2, 3, -1, 2]]
)
def test_sign_flips_count_every_way_to_swap_the_models(differences):
    found = np.array(differences)
    exact = permutation_test(
        (found.astype(float), np.zeros(len(found))),
        lambda a, b: (a - b).sum(),
        permutation_type="samples",
        n_resamples=np.inf,
    ).pvalue
    assert sign_flip(found) == pytest.approx(exact)


def test_items_told_four_times_tell_no_more_than_once():
    base, tuned = answers(25, 9, 40, 31)
    four = paired(np.tile(base, 4), np.tile(tuned, 4), clusters=np.tile(np.arange(105), 4))
    once = paired(base, tuned, clusters=np.arange(105))
    assert (four.n, four.lost, four.value) == (420, 100, pytest.approx(once.value))
    assert four.standard_error == pytest.approx(once.standard_error)
    assert four.interval == pytest.approx(once.interval) and four.p_value == pytest.approx(once.p_value)
    assert four.bootstrap == pytest.approx(once.bootstrap)
    assert paired(np.tile(base, 4), np.tile(tuned, 4)).p_value < once.p_value / 100, "so clusters matter"


def test_clusters_that_all_agree_leave_the_change_uncertain():
    found = paired([1, 0] * 6, [1, 0] * 6, clusters=[0, 0, 1, 1, 2, 2] * 2)
    assert found.standard_error == 0 and found.interval == matched(0, 0, 3)
    single = paired([1, 0], [1, 1], clusters=["text", "text"])
    assert (single.standard_error, single.interval, single.bootstrap, single.is_tie) == (None, None, None, True)


# Values


def test_paired_values_are_the_paired_t_test():
    rng = np.random.default_rng(2)
    base = rng.normal(2, 1, 40)
    tuned = base + rng.normal(0.1, 0.3, 40)
    found = paired_values(base, tuned)
    reference = ttest_rel(tuned, base)
    assert found.value == pytest.approx((tuned - base).mean()) and found.p_value == pytest.approx(reference.pvalue)
    interval = reference.confidence_interval()
    assert found.interval == pytest.approx((interval.low, interval.high), abs=1e-4)
    drawn = bootstrap((tuned - base,), np.mean, method="percentile", rng=np.random.default_rng(3)).confidence_interval
    assert found.bootstrap == pytest.approx((drawn.low, drawn.high), abs=0.01)
    assert json.loads(json.dumps(found.as_dict()))["value"] == found.value


def test_paired_losses_weigh_documents_by_their_tokens():
    rng = np.random.default_rng(3)
    tokens = rng.integers(1, 40, 60).astype(float)
    base = tokens * rng.normal(3, 0.5, 60)
    tuned = base + tokens * rng.normal(0.2, 0.1, 60)
    found = paired_values(base, tuned, weights=tokens)
    score = mean_score("general/loss_rise", "nats/token", tuned - base, tokens)
    assert (found.value, found.standard_error) == (pytest.approx(score.value), pytest.approx(score.standard_error))
    assert found.interval == pytest.approx(score.interval())
    assert found.before == pytest.approx(base.sum() / tokens.sum())
    drawn = bootstrap(
        (tuned - base, tokens),
        lambda d, w, axis: d.sum(axis) / w.sum(axis),
        paired=True,
        method="percentile",
        rng=np.random.default_rng(4),
    ).confidence_interval
    assert found.bootstrap == pytest.approx(
        (drawn.low, drawn.high), abs=0.15 * found.standard_error
    )  # 4 σ of Monte Carlo
    halves = paired_values(
        np.repeat(base / 2, 2),
        np.repeat(tuned / 2, 2),
        weights=np.repeat(tokens / 2, 2),
        clusters=np.repeat(range(60), 2),
    )
    assert halves.n == 120 and halves.standard_error == pytest.approx(found.standard_error)


def test_values_that_do_not_move_are_no_difference():
    found = paired_values([1.0, 2.0, 3.0], [1.0, 2.0, 3.0])
    assert (found.value, found.standard_error, found.p_value) == (0, 0, 1)
    single = paired_values([1.0], [2.0])
    assert (single.standard_error, single.interval, single.bootstrap, single.p_value) == (None, None, None, None)


# Two deltas; several tasks


def test_two_deltas_are_compared_on_the_same_items():
    rng = np.random.default_rng(4)
    base = rng.random(300) < 0.7
    gone = rng.random(300) < 0.2
    first, second = base & ~gone, base & ~gone & (rng.random(300) < 0.97)
    a, b = paired(base, first, chance=0.25), paired(base, second, chance=0.25)
    found = compare(a, b)
    assert isinstance(found, Paired) and found.by_chance is not None
    assert found.value == pytest.approx(a.value - b.value)
    assert found.standard_error < math.hypot(a.standard_error, b.standard_error) / 3, (
        "pairing takes off what they share"
    )
    assert compare(b, a).value == -found.value
    assert compare(a, a).is_tie and compare(a, a).value == 0
    losses = [paired_values(np.arange(9.0), np.arange(9.0) + by, weights=np.ones(9) * 2) for by in (0.5, 0.25)]
    assert compare(*losses).value == pytest.approx(0.125)


def test_deltas_on_other_items_or_another_base_are_not_compared():
    a = paired([1, 0, 1], [1, 1, 1])
    for other in (
        paired([1, 1, 1], [1, 1, 1]),
        paired([1, 0], [1, 1]),
        paired([1, 0, 1], [1, 1, 1], clusters=[0, 0, 1]),
        paired_values([1, 0, 1], [1, 1, 1]),
    ):
        with pytest.raises(ValueError, match="same items"):
            compare(a, other)


def test_a_suite_is_the_unweighted_mean_of_its_tasks():
    small, large = paired(*answers(9, 1, 10, 10)), paired(*answers(20, 40, 300, 240))
    suite = together([small, large])
    assert suite.n == 630 and suite.value == pytest.approx((small.value + large.value) / 2)
    assert suite.before == pytest.approx((small.before + large.before) / 2)
    assert suite.standard_error == pytest.approx(math.hypot(small.standard_error, large.standard_error) / 2)
    assert suite.interval[0] < suite.value < suite.interval[1]
    # The z-test of the same hypothesis: changed items are lost or won by a coin.
    z = abs(suite.value) / (math.sqrt(10 / 30**2 + 60 / 600**2) / 2)
    assert suite.p_value == pytest.approx(math.erfc(z / math.sqrt(2)), abs=0.02)
    assert together([small]).p_value == small.p_value and together([small]).interval == pytest.approx(small.interval)
    assert json.loads(json.dumps(suite.as_dict()))["n"] == 630


def test_a_suite_whose_items_all_agree_is_not_certain():
    sure = together([paired(*answers(0, 0, 30, 10))] * 3)
    assert sure.value == 0 and sure.standard_error == 0 and sure.p_value == 1
    assert sure.interval[1] == pytest.approx(matched(0, 0, 40)[1] / math.sqrt(3))
    with pytest.raises(ValueError, match="no change"):
        together([])
    assert together([paired_values([1.0], [2.0])] * 2).standard_error is None
