"""Learning and forgetting in one plane: places, the bar of uniform scaling, verdicts, budgets; by brute force and simulation."""

import math
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from loralab.errors import EvaluationError
from loralab.evals.paired import paired, paired_values, together
from loralab.lab.bar import BETTER, BEYOND, TIE, WORSE, Bar, Judge
from loralab.lab.repair_words import budget_line, control_lines, few_line, headline, intruder_line, unedited_lines
from loralab.lab.tradeoff import Budget, Part, Side, points, read_budget, within

SCALES = (0.0, 0.25, 0.5, 0.75, 1.0)


def edits(*rows: tuple[str, float], of: str = "", same_as: str = "") -> pd.DataFrame:
    """Name the usual scales, then further edits."""
    found = [("scale", c) for c in SCALES] + list(rows)
    table = pd.DataFrame(found, columns=["family", "strength"])
    table.insert(0, "edit", [f"{family} {strength:g}" for family, strength in found])
    return table.assign(of=of, same_as=same_as)


def shares(base: int, *right: int, items: int = 100) -> Side:
    """Give a side of one part on which the base has the first `base` items right, and each edit its first `right`."""
    rows = [(np.arange(items) < number).astype(float) for number in (base, *right)]
    return Side([Part("items", rows[0], np.array(rows[1:]), np.ones(items))])


# Places


def test_places_are_the_paired_changes_averaged_over_parts():
    rng = np.random.default_rng(0)
    base = [(rng.random(n) < 0.5).astype(float) for n in (40, 10)]
    tuned = [np.stack([(rng.random(n) < p).astype(float) for p in (0.5, 0.7, 0.9)]) for n in (40, 10)]
    target = Side([Part(str(k), base[k], tuned[k], np.ones(len(base[k]))) for k in range(2)])
    tokens, loss = rng.integers(5, 50, 30).astype(float), rng.random(30) * 90
    after = loss + rng.normal(5, 2, (3, 30))
    source = Side([Part("text", loss, after, tokens, sign=-1)], "nats/token")
    table = pd.DataFrame({"edit": list("abc"), "family": "top1", "strength": [0.1, 0.2, 0.3]})
    found = points(table, target, source)
    for i in range(3):
        gain = np.mean([(tuned[k][i] - base[k]).mean() for k in range(2)])  # unweighted: 10 items count as much as 40
        rise = (after[i] - loss).sum() / tokens.sum()
        row = found.iloc[i]
        assert (row["learning"], row["forgetting"]) == (pytest.approx(gain), pytest.approx(rise))
        parts = together([paired(base[k], tuned[k][i]) for k in range(2)])
        assert (row["learning_low"], row["learning_high"]) == pytest.approx(parts.interval)
        one = paired_values(loss, after[i], weights=tokens)
        assert (row["forgetting_low"], row["forgetting_high"]) == pytest.approx(one.interval)
        assert row["forgetting_low"] < row["forgetting"] < row["forgetting_high"]


def test_the_base_is_exactly_where_it_is():
    found = points(edits(), shares(3, 3, 4, 5, 6, 7), shares(9, 9, 9, 9, 8, 5)).iloc[0]
    assert [found[f"{name}{end}"] for name in ("learning", "forgetting") for end in ("", "_low", "_high")] == [0] * 6


def test_pieces_of_one_document_are_resampled_together():
    gains = np.random.default_rng(0).normal(0, 1, 40)
    alone = Part("text", np.zeros(40), gains[None], np.ones(40))
    copied = np.repeat(gains, 5)
    inside = Part("text", np.zeros(200), copied[None], np.ones(200), clusters=np.repeat(np.arange(40), 5))
    apart = Part("text", np.zeros(200), copied[None], np.ones(200))
    spread = [Side([part]).resampled(np.random.default_rng(1))[:, 0].std() for part in (alone, inside, apart)]
    assert spread[0] == pytest.approx(gains.std() / math.sqrt(40), rel=0.05)
    assert spread[1] == pytest.approx(spread[0], rel=0.05), "five copies of a document tell no more than one"
    assert spread[2] == pytest.approx(spread[0] / math.sqrt(5), rel=0.05)
    assert (Side([inside]).num_clusters, Side([apart]).num_clusters) == (40, 200)


def test_a_resample_is_the_ratio_of_its_sums():
    tokens = np.array([1.0, 100.0])
    part = Part("text", np.zeros(2), np.array([[0.0, 100.0], [2.0, 0.0]]), tokens)
    drawn = Side([part]).resampled(np.random.default_rng(0), 500)
    possible = {(0.0, 2.0), (1.0, 0.0), (round(100 / 101, 6), round(2 / 101, 6))}
    assert {tuple(row) for row in drawn.round(6).tolist()} == possible


# The bar


def brute(strengths, learning, forgetting, wanted, grid=4001):
    """Walk along the lines between the scales, and take the least forgetting where enough is learned."""
    at = np.linspace(strengths[0], strengths[-1], grid)
    at = np.union1d(at, strengths)
    L, F = np.interp(at, strengths, learning), np.interp(at, strengths, forgetting)
    enough = np.min([wanted, L.max()]) <= L
    return F[enough].min()


@given(st.integers(2, 7), st.integers(0, 10_000))
def test_the_bar_is_the_least_forgetting_along_the_lines(count, seed):
    rng = np.random.default_rng(seed)
    c = np.sort(rng.random(count))
    L, F = rng.normal(0, 1, count), rng.normal(0, 1, count)  # neither rises: no function of one another
    wanted = rng.normal(0, 1.5)
    bar = Bar(c, L[None], F[None])
    least, scale = (
        float(x[0]) for x in (bar.least_forgetting(np.array([wanted])), bar.strength_at(np.array([wanted])))
    )
    slope = np.abs(np.diff(F) / np.diff(c)).max() * (c[-1] - c[0]) / 4000
    assert brute(c, L, F, wanted) - slope <= least <= brute(c, L, F, wanted) + 1e-9
    assert np.interp(scale, c, F) == pytest.approx(least, abs=1e-9)
    assert np.interp(scale, c, L) >= min(wanted, L.max()) - 1e-9


def test_each_resample_has_its_own_bar():
    rng = np.random.default_rng(3)
    c, L, F = np.array([0.0, 0.5, 1.0]), rng.normal(0, 1, (50, 3)), rng.normal(0, 1, (50, 3))
    wanted = rng.normal(0, 1, 50)
    together_ = Bar(c, L, F).least_forgetting(wanted)
    alone = [Bar(c, L[i : i + 1], F[i : i + 1]).least_forgetting(wanted[i : i + 1])[0] for i in range(50)]
    assert together_.tolist() == alone


def test_a_bar_that_bends_back_is_met_where_it_forgets_least():
    # Scale 1 learns less than scale 0.5, and forgets more: nobody would take it.
    bar = Bar(np.array([0.0, 0.5, 1.0]), np.array([[0.0, 0.6, 0.4]]), np.array([[0.0, 0.2, 0.5]]))
    assert bar.least_forgetting(np.array([0.4]))[0] == pytest.approx(0.2 * 0.4 / 0.6)
    assert bar.strength_at(np.array([0.4]))[0] == pytest.approx(0.5 * 0.4 / 0.6)
    assert bar.reach()[0] == 0.6
    assert bar.least_forgetting(np.array([9.0]))[0] == 0.2, "beyond its reach the bar is its last point"


def test_the_scale_that_reaches_a_budget():
    bar = Bar(np.array([0.0, 0.5, 1.0]), np.array([[0.0, 0.6, 0.7]]), np.array([[0.0, 0.2, 0.5]]))
    assert bar.strength_of(0.35) == pytest.approx(0.75)
    assert bar.strength_of(0.1) == pytest.approx(0.25)
    assert bar.strength_of(0.6) is None


# Verdicts


def judge(*rows: tuple[str, float, int, int], **more: str) -> Judge:
    """Judge edits that have so many target and source items of 100 right, against scales from (0, 90) to (80, 10)."""
    table = edits(*[row[:2] for row in rows], **more)
    target = shares(0, 0, 20, 40, 60, 80, *[row[2] for row in rows])
    source = shares(90, 90, 70, 50, 30, 10, *[row[3] for row in rows])
    return Judge(table, target, source)


def test_a_verdict_says_where_an_edit_lies_to_the_bar():
    found = judge(("top1", 0.3, 60, 80), ("top1", 0.5, 60, 33), ("all", 0.3, 60, 8), ("all", 0.5, 99, 9)).verdicts()
    assert [one["verdict"] for one in found] == [BETTER, TIE, WORSE, BEYOND]
    best, tie, worse, beyond = found
    assert best["difference"] == pytest.approx(0.1 - 0.6) and best["high"] < 0
    assert best["scale_strength"] == pytest.approx(0.75) and best["scale_forgetting"] == pytest.approx(0.6)
    assert (best["learning"], best["forgetting"]) == (pytest.approx(0.6), pytest.approx(0.1))
    assert tie["difference"] == pytest.approx(-0.03) and tie["low"] < 0 < tie["high"]
    assert worse["difference"] == pytest.approx(0.22) and worse["low"] > 0
    assert beyond["scale_forgetting"] == pytest.approx(0.8), "its nearest neighbour on the curve"
    assert [one["edit"] for one in found] == ["top1 0.3", "top1 0.5", "all 0.3", "all 0.5"]


def test_losses_count_the_other_way_round():
    table, tokens = edits(("top1", 0.5)), np.full(50, 10.0)
    noise = np.random.default_rng(0).normal(0, 0.5, 50)

    def text(*rises: float) -> Side:
        return Side(
            [
                Part(
                    "loss",
                    20 + noise,
                    np.array([20 + (1 + abs(rise) / 10) * noise + 10 * rise for rise in rises]),
                    tokens,
                    -1,
                )
            ],
            "nats/token",
        )

    target, source = text(0, -1, -2, -3, -4, -2), text(0, 0.1, 0.3, 0.6, 1.0, 0.9)
    judge_ = Judge(table, target, source)
    (one,) = judge_.verdicts()
    placed_ = points(table, target, source)
    assert judge_.learning == pytest.approx(placed_["learning"]) and judge_.forgetting == pytest.approx(
        placed_["forgetting"]
    )
    assert (one["learning"], one["difference"], one["verdict"]) == (
        pytest.approx(2, abs=0.01),
        pytest.approx(0.6, abs=0.02),
        WORSE,
    )


def test_an_edit_that_learns_less_than_the_base_is_compared_with_the_base():
    (one,) = judge(("top1", 0.0, 0, 60)).verdicts()
    assert (one["scale_strength"], one["difference"], one["verdict"]) == (0.0, pytest.approx(0.3), WORSE)


def test_noise_beyond_the_curve_is_no_reason_to_call_it_beyond():
    (one,) = judge(("all", 0.9, 81, 40)).verdicts()
    assert one["verdict"] == BETTER and one["difference"] == pytest.approx(-0.3)


def test_several_edits_of_one_claim_are_judged_more_strictly_than_one():
    alone = judge(("top1", 0.5, 60, 35)).verdicts()[0]
    beside = judge(("top1", 0.5, 60, 35), ("all", 0.5, 40, 20), ("all", 0.1, 15, 45)).verdicts()[0]
    apart = judge(("top1", 0.5, 60, 35), ("taper", 0.5, 40, 20), ("taper", 0.1, 15, 45)).verdicts()[0]
    assert beside["high"] - beside["low"] > 1.05 * (alone["high"] - alone["low"])
    assert apart["high"] - apart["low"] == pytest.approx(alone["high"] - alone["low"])


def test_edits_that_equal_another_and_scales_get_no_verdict():
    assert judge(("top1", 0.5, 60, 35), same_as="scale 1").verdicts() == []
    assert judge().verdicts() == []


def test_few_items_prove_nothing_even_where_all_agree():
    def small(items: int) -> str:
        target = shares(0, 0, 0, 0, 0, items, items, items=items)
        source = shares(items, items, items, items, items, 0, items, items=items)
        return Judge(edits(("top1", 0.5)), target, source).verdicts()[0]["verdict"]

    assert [small(items) for items in (1, 2, 3)] == [TIE, TIE, TIE]
    assert small(60) == BETTER


def test_one_scale_is_no_bar():
    table = edits()[:1]
    with pytest.raises(EvaluationError, match="no curve"):
        Judge(table, shares(0, 0), shares(1, 1))


def world(rng: np.random.Generator, kept: float, items: int = 150) -> Judge:
    """Draw a delta whose repairs lie on the bar's own curve, or above it by `kept` of the source's items."""
    repairs = [("all", 0.5), ("all", 0.75), ("top1", 0.6)]
    table = edits(*repairs)
    luck = {side: rng.random(items) for side in ("target", "source")}

    def side(name: str, share, more: float) -> Side:
        rows = []
        for family, c in table[["family", "strength"]].itertuples(index=False):
            # An item is decided by its own luck, a third of the items anew for every edit.
            mine = np.where(rng.random(items) < 1 / 3, rng.random(items), luck[name]) if c else luck[name]
            rows.append((mine < share(c) + (more if family != "scale" else 0)).astype(float))
        return Side([Part(name, rows[0], np.array(rows), np.ones(items))])

    return Judge(table, side("target", lambda c: 0.1 + 0.6 * c, 0), side("source", lambda c: 0.95 - 0.6 * c, kept))


def test_repairs_on_the_curve_are_rarely_called_better_and_real_ones_are_found():
    def share_with(verdict: str, kept: float, count: int = 30) -> float:
        rows = [
            [one["verdict"] for one in world(np.random.default_rng(seed), kept).verdicts()] for seed in range(count)
        ]
        return sum(verdict in row for row in rows) / count

    assert share_with(BETTER, 0.0) <= 0.1
    assert share_with(BETTER, 0.25) >= 0.9
    assert share_with(WORSE, -0.25) >= 0.9


# Controls


def test_a_repair_is_compared_with_the_controls_of_its_own_strength():
    rows = [
        ("top1", 0.5, 60, 60),
        ("all", 0.5, 50, 55),
        ("matched", 0.5, 60, 20),
        ("matched", 0.7, 60, 20),
        ("neighbour", 0.5, 20, 20),
    ]
    table = edits(*[row[:2] for row in rows])
    table.loc[table["family"] == "matched", "of"] = ["top1", "all"]
    table.loc[table["family"] == "matched", "edit"] = ["matched top1 0.5", "matched all 0.7"]
    target = shares(0, 0, 20, 40, 60, 80, *[row[2] for row in rows])
    source = shares(90, 90, 70, 50, 30, 10, *[row[3] for row in rows])
    found = Judge(table, target, source).controls()
    assert [(one["edit"], one["control"]) for one in found] == [
        ("top1 0.5", "matched top1 0.5"),
        ("top1 0.5", "neighbour 0.5"),
    ]
    matched, neighbour = found
    assert matched["learning_difference"] == 0 and matched["forgetting_difference"] == pytest.approx(-0.4)
    assert matched["forgetting_high"] < 0 and matched["learning_low"] < 0 < matched["learning_high"]
    assert neighbour["learning_difference"] == pytest.approx(0.4) and neighbour["learning_low"] > 0
    said = control_lines(found)
    assert len(said) == 2 and "1 forget less, 0 forget more; 0 learn less, 0 learn more" in said[0]
    assert "1 forget less, 0 forget more; 0 learn less, 1 learn more" in said[1]


# Budgets


def test_budgets_are_read():
    assert read_budget("0.02") == Budget(0.02) == read_budget(0.02)
    assert read_budget(" 50% ") == Budget(0.5, is_share=True)
    assert (Budget(0.5, True).limit(0.3), Budget(0.5, True).limit(-0.1), Budget(0.1).limit(0.3)) == (0.15, 0.0, 0.1)
    for text in ("", "much", "-0.1", "nan", "inf", "%", "-5%", "1e999", True):
        with pytest.raises(EvaluationError, match="no budget"):
            read_budget(text)


def placed() -> pd.DataFrame:
    table = edits(("top1", 0.5), ("all", 0.5), ("all", 0.9))
    return table.assign(
        learning=[0.0, 0.1, 0.3, 0.5, 0.6, 0.5, 0.45, -0.1],
        forgetting=[0.0, 0.0, 0.1, 0.2, 0.4, 0.15, 0.19, -0.3],
        forgetting_low=0.0,
        forgetting_high=[0.0, 0.05, 0.15, 0.3, 0.5, 0.2, 0.21, -0.2],
    )


def test_the_best_within_a_budget_learns_most():
    cases = {
        "0.2": ("top1 0.5", True),
        "0.17": ("top1 0.5", False),
        "0.1": ("scale 0.5", False),
        "50%": ("top1 0.5", True),
    }
    for budget, (edit, surely) in cases.items():
        found = within(placed(), read_budget(budget))
        assert (found["best"]["edit"], found["best"]["surely"]) == (edit, surely), budget
    assert within(placed(), read_budget("50%"))["limit"] == 0.2
    assert within(placed(), read_budget("100%"))["best"]["edit"] == "scale 1"


def test_the_base_and_what_learns_nothing_are_no_choice():
    table = placed()
    table.loc[table["edit"] == "scale 0.25", "learning"] = 0.0
    found = within(table, read_budget("0.05"))
    assert found["best"] is None
    assert "nothing is chosen" in budget_line(found, {"source": {"unit": "share of items"}})


# Sentences


def verdict(edit: str, word: str, difference: float) -> dict:
    ends = {BETTER: (difference - 0.01, difference + 0.01), WORSE: (difference - 0.01, difference + 0.01)}
    low, high = ends.get(word, (-0.2, 0.2))
    row = {"edit": edit, "family": edit.split()[0], "strength": 0.5, "verdict": word, "difference": difference}
    return row | {"low": low, "high": high, "scale_strength": 0.8}


def test_the_headline_says_plainly_when_repair_does_not_beat_scaling():
    said = headline([verdict("top1 0.5", TIE, -0.01), verdict("all 0.5", WORSE, 0.1)], {})
    assert said.startswith(
        "No intruder repair forgets less than uniform scaling at equal learning: of 2, 1 tie and 1 forget more."
    )
    assert "top1 0.5, -0.01 [-0.2, +0.2], against scale 0.8" in said
    said = headline([verdict("top1 0.5", BETTER, -0.1), verdict("all 0.5", TIE, 0.1)], {})
    assert said.startswith(
        "Intruder repair forgets less than uniform scaling at equal learning: top1 0.5 by 0.1 [0.09, 0.11]"
    )
    assert "1 of 2; 1 tie" in said
    assert headline([], {}) == "No intruder repair was measured, so it was not compared with uniform scaling."


def test_a_delta_without_intruders_is_said_to_have_none():
    facts = {"k": 10, "epsilon": 0.5, "intruders": {"count": 0, "matrices": 0, "of": 14, "each": {}}}
    assert intruder_line(facts) == "The delta has no intruder in any of its 14 matrices, at k = 10 and ε = 0.5."
    assert "no intruder repair changes it" in headline([], facts)
    assert intruder_line({"intruders": None}) == ""


def test_nothing_to_mend_and_few_items_are_said():
    table = points(edits(), shares(0, 0, 2, 4, 6, 8, items=20), shares(9, 9, 9, 9, 9, 9, items=20))
    facts = {side: Side(s.parts).facts() for side, s in (("target", shares(0, 0, items=20)), ("source", shares(9, 9)))}
    said = unedited_lines(table, facts)
    assert "learning +0.4" in said[0] and "little to mend" in said[1]
    assert few_line(facts) == "Few items, 20 of the target: the intervals are rough."


def test_reading_a_repair_loads_no_torch():
    code = "import sys, loralab.lab.repaired, loralab.lab.bar; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
