import json
import math

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from loralab.evals.stats import Score, t95
from loralab.report.compare import (
    FORGETTING,
    LEARNING,
    change,
    compare,
    difference,
    frontier,
    half_width,
    labels_of,
    method_label,
    tied,
)
from loralab.report.read import Run, runs_below
from loralab.report.verdict import verdict
from report_world import make_run, make_sweep, open_run, write_environment

ANSWERS, _, LOSS = LEARNING
KEPT = FORGETTING[0]


def run(folder="a", method=None, *, state="done", scores=(), base=(), items=None, **spec):
    """Make a run by hand; scores are (name, value, standard error)."""
    spec = {
        "method": method or {"name": "lora", "rank": 4},
        "seed": 0,
        "data": {"train": [{"path": "pocket:calc"}]},
        **spec,
    }
    found = [{name: Score(name, value, "", 50, error) for name, value, error in part} for part in (base, scores)]
    marks = {"inputs": {"base": "b", "data": {"validation": "v"}}}
    return Run(folder, state, spec, base=found[0], after=found[1], items=items, environment=marks)


def graded(folder, learned, lost, error=0.02, **more):
    """Make a run that learned and lost, with its base at 0 and 0.9."""
    scores = [("target/accuracy", learned, error), ("target/accuracy_change", learned, error)]
    scores += [("source/accuracy", 0.9 - lost, error), ("source/accuracy_change", -lost, error)]
    return run(folder, scores=scores, base=[("target/accuracy", 0.0, 0.0), ("source/accuracy", 0.9, 0.01)], **more)


# Which belong together


def test_other_targets_are_other_comparisons(tmp_path):
    found = compare(runs_below(make_sweep(tmp_path)))
    assert [c.name for c in found] == ["calc", "cipher"]
    calc, cipher = found
    assert [calc.label(r) for r in calc.runs] == ["full", "LoRA r1", "LoRA r4", "LoRA r16", "LoRA+ r8", "COLA 3×r4"]
    assert [(v.learning.level, v.forgetting.level) for v in calc.views] == [
        ("target/accuracy", "source/accuracy"),
        ("target/loss", "general/loss"),
    ]
    assert [(v.learning.level, v.forgetting.level) for v in cipher.views] == [
        ("target/loss", "source/accuracy"),
        ("target/loss", "general/loss"),
    ]


@pytest.mark.parametrize("part", ["base", "data", "start"])
def test_another_base_or_other_held_out_data_is_another_comparison_with_another_name(tmp_path, part):
    make_run(tmp_path, "full")
    other = make_run(tmp_path, "lora-r4")
    facts = json.loads((other / "environment.json").read_text())
    if part == "base":
        facts["inputs"]["base"] = "f" * 64
    else:
        facts["inputs"]["data"]["validation" if part == "data" else "model.delta"] = "f" * 64
    (other / "environment.json").write_text(json.dumps(facts))
    found = compare(runs_below(tmp_path))
    assert len({c.name for c in found}) == 2
    assert [len(c.runs) for c in found] == [1, 1]


def test_a_run_that_never_began_stands_where_its_spec_would_have_put_it(tmp_path):
    make_run(tmp_path, "full")
    open_run(tmp_path, "lora-r4")
    open_run(tmp_path, "lora-r4", target="cipher")
    assert [(c.name, len(c.runs), len(c.finished)) for c in compare(runs_below(tmp_path))] == [
        ("calc", 2, 1),
        ("cipher", 1, 0),
    ]


def test_nothing_measured_is_no_view(tmp_path):
    folder = open_run(tmp_path, "full")
    write_environment(folder, "calc")
    (comparison,) = compare(runs_below(tmp_path))
    assert comparison.views == []


# Names


@pytest.mark.parametrize(
    ("method", "label"),
    [
        ({"name": "full"}, "full"),
        ({"name": "lora", "rank": 16}, "LoRA r16"),
        ({"name": "lora_plus", "rank": 8}, "LoRA+ r8"),
        ({"name": "cola", "rank": 4, "links": 3}, "COLA 3×r4"),
        ({"name": "cola", "rank": 8, "links": 2, "ranks": [8, 2]}, "COLA r8+2"),
        ({"name": "peft", "tuner": "OFT", "keys": {"r": 4}}, "OFT r4"),
        ({"name": "peft", "tuner": "IA3", "keys": {}}, "IA3"),
        ({"name": "novel"}, "novel"),
    ],
)
def test_runs_are_named_by_what_they_are(method, label):
    assert method_label(run(method=method)) == label


def test_runs_of_one_kind_are_told_apart_by_what_differs():
    runs = [run("a"), run("b", seed=1), run("c", method={"name": "full"}), run("d", optimizer={"learning_rate": 1e-3})]
    assert labels_of(runs) == {
        "a": "LoRA r4, seed 0",
        "b": "LoRA r4, seed 1",
        "c": "full",
        "d": "LoRA r4, lr 0.001, seed 0",
    }


def test_no_two_runs_have_one_name():
    labels = labels_of([run(folder) for folder in "abc"])
    assert sorted(labels.values()) == ["LoRA r4", "LoRA r4 #2", "LoRA r4 #3"]


# Changes


def test_learning_and_forgetting_are_above_zero_when_answers_rise_and_fall():
    found = graded("a", 0.6, 0.1)
    assert change(found, ANSWERS).value == 0.6
    assert change(found, KEPT).value == 0.1
    losses = run(scores=[("target/loss_rise", -1.5, 0.1), ("general/loss_rise", 0.25, 0.1)])
    assert (change(losses, LOSS).value, change(losses, FORGETTING[2]).value) == (1.5, 0.25)


def test_without_a_paired_change_the_difference_has_no_interval():
    found = run(scores=[("target/loss", 1.0, 0.1)], base=[("target/loss", 3.0, 0.1)])
    assert (change(found, LOSS).value, half_width(change(found, LOSS))) == (2.0, None)
    assert change(found, ANSWERS) is None


def test_half_an_interval_is_t_times_the_standard_error():
    assert half_width(Score("x", 0.0, "", 50, 0.1)) == pytest.approx(t95(49) * 0.1)
    assert half_width(Score("x", 0.0, "", 1, None)) is None


def items(right, probe="target/accuracy", skills=None):
    rows = {"probe": probe, "item": range(len(right)), "num_tokens": 1.0, "base_right": 0.0, "tuned_right": right}
    return pd.DataFrame(
        {**rows, "skill": skills or "calc", "prompt": "p", "base_loss_sum": np.nan, "tuned_loss_sum": np.nan}
    )


def test_runs_on_the_same_items_are_compared_item_by_item():
    a, b = np.array([1.0, 1, 1, 1, 0, 0]), np.array([1.0, 1, 1, 0, 0, 0])
    first, second = (graded(name, right.mean(), 0.1, items=items(right)) for name, right in (("a", a), ("b", b)))
    found = difference(first, second, ANSWERS)
    assert found.value == pytest.approx(1 / 6)
    assert found.standard_error == pytest.approx(np.std(a - b, ddof=1) / math.sqrt(6))


def test_skills_weigh_alike_when_runs_are_compared():
    skills = ["x"] * 4 + ["y"] * 2
    a, b = np.array([1.0, 1, 0, 0, 1, 1]), np.zeros(6)
    first, second = (graded(n, 0.5, 0.1, items=items(r, skills=skills)) for n, r in (("a", a), ("b", b)))
    found = difference(first, second, ANSWERS)
    assert found.value == pytest.approx((0.5 + 1.0) / 2)
    assert found.standard_error == pytest.approx(np.std(a[:4], ddof=1) / math.sqrt(4) / 2)


def test_losses_are_compared_document_by_document():
    weights = np.array([1.0, 2.0, 3.0])

    def made(name, sums):
        rows = {
            "probe": "target",
            "item": range(3),
            "num_tokens": weights,
            "base_loss_sum": 9.0,
            "tuned_loss_sum": sums,
        }
        return run(name, scores=[("target/loss_rise", -1.0, 0.5)], items=pd.DataFrame(rows))

    found = difference(made("a", np.array([1.0, 2.0, 3.0])), made("b", np.array([2.0, 4.0, 6.0])), LOSS)
    assert found.value == pytest.approx(1.0), "a's loss is one nat per token lower, so it learned one more"
    assert found.standard_error == pytest.approx(0.0, abs=1e-12)


def test_runs_on_other_items_are_compared_as_independent():
    first, second = (
        graded("a", 0.7, 0.1, 0.03, items=items(np.ones(4))),
        graded("b", 0.5, 0.1, 0.04, items=items(np.ones(5))),
    )
    assert difference(first, second, ANSWERS).standard_error == pytest.approx(0.05)


def test_a_tie_is_a_difference_whose_interval_holds_zero():
    best = graded("a", 0.60, 0.1)
    assert tied(best, graded("b", 0.55, 0.1), ANSWERS)
    assert not tied(best, graded("c", 0.45, 0.1), ANSWERS)
    assert tied(best, graded("d", 0.10, 0.1, error=None), ANSWERS), "without an interval nothing can be told apart"


points = st.lists(st.tuples(st.integers(-3, 6).map(float), st.integers(-3, 6).map(float)), max_size=12)


@given(points)
def test_the_frontier_holds_what_no_other_point_beats(found):
    def beaten(point):
        return any(x <= point[0] and y >= point[1] and (x, y) != point for x, y in found)

    kept = [found[i] for i in frontier(found)]
    assert set(kept) == {point for point in found if not beaten(point)}
    assert kept == sorted(kept)


# The verdict


def judged(*runs):
    (comparison,) = compare(list(runs))
    return verdict(comparison)


def test_a_clear_best_is_named_with_its_interval():
    made = judged(
        graded("a", 0.9, 0.3, method={"name": "full"}),
        graded("b", 0.5, 0.02),
        graded("c", 0.2, 0.1, seed=0, method={"name": "lora", "rank": 1}),
    )
    half = f"{t95(49) * 0.02:.3f}"
    assert made.learned.replace("\xa0", " ") == (
        f"Full learned most: +0.900 ± {half} of the new task calc (0.000 → 0.900 answered right); "
        f"LoRA r1 learned least, +0.200 ± {half}."
    )
    assert made.forgot.replace("\xa0", " ") == (
        f"LoRA r4 forgot least: 0.020 ± {half} of the old skills; full forgot most, 0.300 ± {half}."
    )
    assert made.limit.startswith("One seed (0)")


def test_differences_inside_the_intervals_are_ties():
    made = judged(
        graded("a", 0.90, 0.3, method={"name": "full"}),
        graded("b", 0.88, 0.02),
        graded("c", 0.2, 0.02, method={"name": "cola", "rank": 1, "links": 2}),
    )
    assert made.learned.startswith("Full and LoRA r4 learned most (a tie), full with")
    assert "LoRA r4 and COLA 2×r1 forgot least (a tie)" in made.forgot
    assert "of those that learned most, LoRA r4 forgot least" in made.forgot


def test_when_all_tie_nobody_wins():
    made = judged(graded("a", 0.90, 0.10, method={"name": "full"}), graded("b", 0.88, 0.09))
    assert made.learned.startswith("The 2 runs tie in learning")
    assert made.forgot.startswith("The 2 runs tie in forgetting")
    assert "most" not in made.learned + made.forgot


@pytest.mark.parametrize(
    ("learned", "lost", "first", "second"),
    [
        (0.6, 0.2, "LoRA r4 learned +0.600", "It lost 0.200"),
        (
            0.01,
            0.01,
            "LoRA r4 learned nothing that can be told from zero",
            "It lost nothing of the old skills that can be told",
        ),
        (-0.3, -0.3, "LoRA r4 became worse", "It lost −0.300"),
    ],
)
def test_a_single_run_is_told_as_it_is(learned, lost, first, second):
    made = judged(graded("a", learned, lost))
    assert made.learned.startswith(first)
    assert made.forgot.startswith(second)
    assert lost >= 0 or "it gained" in made.forgot


def test_what_was_not_measured_is_said_with_what_to_do():
    made = judged(run())
    assert "was not measured" in made.learned and "data.validation" in made.learned
    assert "was not measured" in made.forgot and "data.general" in made.forgot


def test_unfinished_runs_are_not_judged():
    made = judged(graded("a", 0.5, 0.1), graded("b", 0.9, 0.0, state="interrupted"))
    assert "0.900" not in made.learned
    assert judged(graded("b", 0.9, 0.0, state="diverged")).learned.startswith("No run has finished")


def test_the_number_of_seeds_is_said():
    assert judged(graded("a", 0.5, 0.1), graded("b", 0.5, 0.1, seed=3)).limit.startswith("2 seeds (0, 3)")


def test_where_no_answer_moved_the_losses_are_told():
    def made(folder, loss, **more):
        scores = [("target/accuracy", 0.0, 0.0), ("target/accuracy_change", 0.0, 0.0)]
        scores += [
            ("target/loss", 4 - loss, 0.1),
            ("target/loss_rise", -loss, 0.1),
            ("general/loss_rise", 0.5 * loss, 0.01),
        ]
        base = [("target/accuracy", 0.0, 0.0), ("target/loss", 4.0, 0.1)]
        return run(folder, scores=scores, base=base, **more)

    told = judged(made("a", 3.0, method={"name": "full"}), made("b", 1.0)).learned
    assert told.startswith("By right answers no run moved beyond chance; by loss, full learned most: +3.000")
    assert "nats per token" in told


def test_multiple_choice_has_a_view_of_its_own():
    scores = [(f"source/{kind}", 0.5, 0.1) for kind in ("accuracy", "choice")] + [("target/loss", 1.0, 0.1)]
    (comparison,) = compare([run(scores=scores)])
    found = [(view.learning.level, view.forgetting and view.forgetting.level) for view in comparison.views]
    assert found == [("target/loss", "source/accuracy"), ("target/loss", "source/choice"), ("target/loss", None)]
