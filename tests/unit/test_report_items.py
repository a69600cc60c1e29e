"""What the page of runs says item by item, over training, of probes' cost, and of the luck of training."""

import json
import math
import shutil

import numpy as np
import pandas as pd
import pytest

from loralab.evals.stats import NoiseFloor, Score, t95
from loralab.report import curves, items, seeds
from loralab.report.compare import FORGETTING, LEARNING, compare, half_width, tied
from loralab.report.page import write
from loralab.report.read import Run, runs_below
from loralab.report.tables import cost, probe_cost
from loralab.report.verdict import verdict
from loralab.run.folder import RunFolder
from page_reader import Page
from report_world import SKILLS, make_run, make_seeds, probe_choices

ANSWERS, KEPT = LEARNING[0], FORGETTING[0]


def only(path):
    (found,) = compare(runs_below(path))
    return found


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """One run that probed multiple choice over training."""
    run = make_run(tmp_path_factory.mktemp("alone"), "lora-r16")
    probe_choices(run)
    return run


@pytest.fixture(scope="module")
def repeated(tmp_path_factory):
    return make_seeds(tmp_path_factory.mktemp("seeds"))


# Item by item


def test_each_skill_of_a_single_run_has_a_bar(alone):
    table = pd.read_parquet(alone / "items.parquet")
    target, source = items.sides(only(alone))
    assert (target.title, source.title) == ("New task calc, right answers", "Old skills, right answers")
    assert [name for name, _, _ in source.rows] == [*SKILLS, "all"]
    for name, _, bar in source.rows:
        mine = table[(table["probe"] == "source/accuracy") & ((table["skill"] == name) | (name == "all"))]
        lost = mine[(mine["base_right"] == 1) & (mine["tuned_right"] == 0)]
        assert (bar.lost, bar.n) == (len(lost), len(mine))
    assert [name for name, _, _ in target.rows] == ["calc"]


def test_many_runs_have_a_bar_each(repeated):
    comparison = only(repeated)
    for part in items.sides(comparison):
        assert [run for _, run, _ in part.rows] == comparison.runs


def test_examples_take_each_skill_in_turn_and_say_what_was_written(alone):
    (run,) = only(alone).runs
    asked = {"step": 60, "role": "source", "skill": "spell", "reference": "a-b"}
    lost = (
        pd.read_parquet(alone / "items.parquet")
        .query("skill == 'spell' and base_right > tuned_right")["prompt"]
        .iloc[0]
    )
    run.samples.extend({**asked, "prompt": lost, "model": m, "output": f"{m} wrote"} for m in ("base", "tuned"))
    said, groups = items.changed(only(alone), run)
    target, source = groups
    assert (
        said
        == f"{target.count} newly won (new task calc, right answers) and {source.count} newly lost (old skills, right answers)"
    )
    told, *others = [*source.cards, *source.listed]
    assert len({item["skill"] for item in others[:7]} | {"spell"}) == 8, "each skill once before any comes again"
    assert told["prompt"] == lost, "what was written comes first"
    assert (told["reference"], told["base"], told["tuned"]) == ("a-b", "base wrote", "tuned wrote")


def test_multiple_choice_stands_in_where_nothing_was_written(alone):
    (run,) = only(alone).runs
    run.items.loc[run.items["probe"] == "source/accuracy", "probe"] = "source/choice"
    said, _ = items.changed(only(alone), run)
    assert "old skills, multiple choice" in said
    assert items._telling(["source/accuracy", "source/choice", "target/choice"]) == ["source/accuracy", "target/choice"]


@pytest.mark.parametrize("table", [None, pd.DataFrame({"probe": []}), pd.DataFrame({c: ["x"] for c in items.COLUMNS})])
def test_without_outcomes_there_are_no_bars(table):
    run = Run("a", "done", {"method": {"name": "lora", "rank": 4}}, items=table, environment={"inputs": {"base": "b"}})
    (comparison,) = compare([run])
    assert items.sides(comparison) == [] and items.changed(comparison, run) == ("", [])


# Over training


def test_everything_probed_over_training_is_drawn(alone):
    comparison = only(alone)
    titles = [figure.title for figure in curves.curves(comparison, "c")]
    assert titles == [
        "Loss on the training data",
        "New task calc: loss on held-out data",
        "Old skills: share right by multiple choice",
        "Old skills: loss on general text",
        "Drift from the base: KL(base‖tuned)",
    ]
    assert [figure.title for figure in curves.skill_curves(comparison, "c")] == [
        "Old skill hellaswag: share right by multiple choice",
        "Old skill winogrande: share right by multiple choice",
    ]


def test_a_name_that_no_one_foresaw_is_drawn_under_itself(alone):
    comparison = only(alone)
    (run,) = comparison.runs
    scores = [Score("wiki/perplexity", 20.0 + i, "perplexity", 9, 0.5) for i in range(4)]
    run.history["wiki/perplexity"] = [(20 * i, score) for i, score in enumerate(scores)]
    assert curves.curves(comparison, "c")[-1].title == "wiki/perplexity"


def test_what_was_measured_twice_is_no_curve(alone):
    comparison = only(alone)
    (run,) = comparison.runs
    run.history["source/hellaswag/choice"][1:-1] = []
    assert [figure.title for figure in curves.skill_curves(comparison, "c")] == [
        "Old skill winogrande: share right by multiple choice"
    ]


def test_the_page_says_what_the_probes_cost(alone, repeated):
    comparison = only(alone)
    assert probe_cost(comparison) == "Probes took 3.4 % of the time of the run: 1.5 s, over 12\u202f000 tokens."
    (bars,) = [bars for bars in cost(comparison) if bars.title == "Share of the time that probes took"]
    assert [text for _, _, text in bars.rows] == ["3.4 %"]
    assert probe_cost(only(repeated)) == "", "a run from before it was recorded"


def test_of_several_runs_the_range_is_told(tmp_path):
    for name, seconds in (("lora-r1", 4.1), ("lora-r4", 2.1)):
        RunFolder(make_run(tmp_path, name)).write_status(probe_s=seconds)
    assert probe_cost(only(tmp_path)) == "Probes took 5.0 % to 10.0 % of the time of each run: 6.2 s in all."


def test_the_page_of_a_run_shows_all_of_it(alone):
    page = Page(write(alone).read_text(encoding="utf-8"))
    for said in (
        "Items that changed sides",
        "Over training, skill by skill",
        "Probes took 3.4 %",
        "newly lost (old skills",
    ):
        assert said in page.words
    assert "The luck of training" not in page.words, "a single seed tells nothing of it"


# Luck


def test_runs_that_differ_only_in_their_seed_are_one_experiment(repeated, tmp_path):
    shutil.copytree(repeated, tmp_path / "all")
    make_run(tmp_path / "all", "lora-r16")
    found = seeds.repeated(only(tmp_path / "all"))
    assert [(group.label, len(group.runs)) for group in found] == [("full", 3), ("LoRA r4", 3)]


def test_the_spread_is_that_of_the_runs(repeated):
    table = seeds.table(only(repeated))
    for _, label, cells in table.rows:
        folder = {"full": "full", "LoRA r4": "lora-r4"}[label]
        found = []
        for path in repeated.glob(f"{folder}-*/scores.jsonl"):
            lines = [json.loads(line) for line in path.read_text().splitlines()]
            found.append(-next(line["value"] for line in lines if line["name"] == "source/accuracy_change"))
        half = t95(2) * np.std(found, ddof=1) / math.sqrt(3)
        ends = ", ".join(f"{np.mean(found) + sign * half:+.3f}".replace("-", "−") for sign in (-1, 1))
        assert cells[0] == "3"
        assert cells[3:] == [f"{np.mean(found):+.3f} [{ends}]", f"{np.std(found, ddof=1):.3f}"]
    assert [head for head, _ in table.heads] == ["seeds", "learned", "spread", "forgotten", "spread"]


def test_experiments_weigh_by_their_runs_when_the_spread_is_pooled(repeated):
    comparison = only(repeated)
    each = [seeds.floor_of(group.runs, KEPT) for group in seeds.repeated(comparison)]
    pooled = seeds.luck(comparison, KEPT)
    assert pooled.sd == pytest.approx(math.sqrt((each[0].sd ** 2 + each[1].sd ** 2) / 2))
    assert pooled.n_seeds == 5, "two and two degrees of freedom"


def test_the_luck_of_training_is_told_and_the_better_is_named(repeated):
    page = Page(write(repeated, repeated / "page.html").read_text(encoding="utf-8"))
    assert "The luck of training" in page.words
    assert "Over seeds, LoRA r4 forgot least" in page.words and "Over seeds, full learned most" in page.words
    least = seeds.luck(only(repeated), KEPT).smallest_detectable()
    assert f"Two single runs must differ by more than {least:.3f} in what they forget" in page.words


def made(folder, lost, seed=0, rank=4):
    """Make a run by hand whose items tell it apart from any other, so that luck alone can make a tie."""
    marks = {"inputs": {"base": "b", "data": {"validation": "v"}}}
    scores = [
        Score("source/accuracy", 0.9 - lost, "", 500, 0.001),
        Score("source/accuracy_change", -lost, "", 500, 0.001),
    ]
    spec = {"method": {"name": "lora", "rank": rank}, "seed": seed, "data": {"train": "pocket:calc"}}
    return Run(folder, "done", spec, after={s.name: s for s in scores}, environment=marks)


def test_a_difference_within_the_luck_of_training_is_a_tie():
    first, second = made("a", 0.10), made("b", 0.13, rank=8)
    assert not tied(first, second, KEPT)
    floor = NoiseFloor(0.1, 0.02, (0.0, 0.2), 5)
    assert abs(0.03) < floor.smallest_detectable()
    assert tied(first, second, KEPT, floor)
    assert not tied(first, made("c", 0.30, rank=8), KEPT, floor)


def test_the_verdict_calls_ties_by_luck_where_it_is_known():
    apart = [made("a", 0.10), made("b", 0.16, rank=8)]
    (plain,) = compare(apart)
    assert "tie in forgetting" not in verdict(plain).forgot
    (lucky,) = compare([*apart, made("c", 0.14, seed=1), made("d", 0.19, seed=1, rank=8)])
    said = verdict(lucky)
    assert "The 4 runs tie in forgetting" in said.forgot
    assert said.limit.endswith("Runs tie where their difference is within both together.")


def test_experiments_within_the_luck_of_training_tie():
    (close,) = compare(
        [made(f"{rank}-{s}", 0.10 + 0.02 * s + rank / 1000, seed=s, rank=rank) for rank in (4, 8) for s in range(3)]
    )
    assert "LoRA r4 forgot least, +0.124; LoRA r8 ties with it" in seeds.table(close).said[-1]


def test_an_item_that_always_goes_one_way_is_no_certainty():
    half = half_width(Score("source/accuracy_change", 0.0, "share of items", 40, 0.0))
    assert half == pytest.approx(1.96 / 42, abs=1e-4), "half an item in each cell: 1.96 · √1 / (40 + 2)"
