"""Pages of reward models and classifiers: told against a baseline, drawn from the folder, in units that are right."""

import re

import numpy as np
import pandas as pd
import pytest

from judged_world import EVERY, PAIRS, make_judged
from loralab.evals.stats import Score
from loralab.report.compare import compare, difference
from loralab.report.judged import judged, section, table
from loralab.report.measures import LEARNING_BY, against, change
from loralab.report.page import write
from loralab.report.read import Run, runs_below
from loralab.report.verdict import verdict
from loralab.run.folder import RunFolder
from page_reader import Page
from report_world import STEPS, make_run

KINDS = ("pairs", "thumbs", "classify", "regression")


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("judged")
    for kind in KINDS:
        make_judged(root / kind, kind=kind)
    make_judged(root / "pairs", "full", kind="pairs", skill=0.3)
    return root


@pytest.fixture(scope="module")
def pages(root):
    return {kind: write(root / kind).read_text(encoding="utf-8") for kind in KINDS}


def one(root, kind, plan="lora"):
    return next(run for run in runs_below(root / kind) if run.method == plan)


@pytest.mark.parametrize("kind", ["thumbs", "regression"])
def test_the_page_is_the_same_file_when_rebuilt(root, pages, kind, tmp_path):
    again = write(root / kind, tmp_path / "again.html").read_text(encoding="utf-8")
    assert again == pages[kind]


def test_the_verdict_is_told_against_the_baseline(root, pages):
    words = {kind: Page(pages[kind]).words for kind in KINDS}
    run = one(root, "pairs")
    accuracy = run.after["target/accuracy"].value
    assert f"LoRA r4 learned most: +{accuracy - 0.5:.3f}" in words["pairs"]
    assert f"above a coin on judged (0.500 → {accuracy:.3f} judged right)" in words["pairs"]
    area = one(root, "thumbs").after["target/auc"].value
    assert f"+{area - 0.5:.3f}" in words["thumbs"] and "above chance on judged (0.500 →" in words["thumbs"]
    assert "area under the ROC curve" in words["thumbs"]
    run = one(root, "classify")
    base, after = (run.after[f"target/{name}"].value for name in ("majority", "accuracy"))
    assert f"above always naming the commonest label on judged ({base:.3f} → {after:.3f}" in words["classify"]
    assert "above chance on judged (0.000 →" in words["regression"]
    for kind in KINDS:
        assert "forgotten was not measured" not in words[kind], "a model that judges writes nothing"
        assert "nats per token" not in words[kind], "a loss of judgements is none of text"


@pytest.mark.parametrize(
    ("kind", "unit"), [("pairs", "nats/pair"), ("thumbs", "nats/text"), ("regression", "squared error")]
)
def test_losses_have_the_unit_of_their_rows(pages, kind, unit):
    figures = re.findall(r"<figure>.*?</figure>", pages[kind], flags=re.S)
    told = [figure for figure in figures if "Loss on the training data" in figure or "loss on held-out data" in figure]
    assert len(told) == 2 and all(unit in figure for figure in told)


def test_accuracy_and_area_are_drawn_over_their_baselines(pages):
    titles = {kind: re.findall(r"<figcaption><strong>(.*?)</strong>", pages[kind]) for kind in KINDS}
    assert {"Judged right on held-out items", "Area under the ROC curve", "Claims against what came true"} <= set(
        titles["thumbs"]
    )
    assert "Area under the ROC curve" not in titles["pairs"]
    assert "Correlation with the labels" in titles["regression"]
    assert ">a coin</text>" in pages["pairs"] and ">always the commonest label</text>" in pages["thumbs"]
    assert ">chance</text>" in pages["thumbs"]
    for kind in KINDS:
        assert len(titles[kind]) == len(set(titles[kind])), "nothing is drawn twice"


def test_the_table_holds_what_stands_in_the_folder(root, pages):
    run = one(root, "thumbs")
    rows = Page(pages["thumbs"]).table("run", "judged right", "commonest label", "balanced", "area (AUC)")
    shown = dict(zip(rows[0], rows[1], strict=True))
    names = {"judged right": "accuracy", "commonest label": "majority", "balanced": "balanced_accuracy"}
    names |= {"area (AUC)": "auc", "calibration error": "calibration_error", "Brier": "brier"}
    names |= {"mean reward": "reward_mean", "its spread": "reward_sd", "with length": "length_correlation"}
    for head, name in names.items():
        assert shown[head].split()[0].replace("−", "-") == f"{run.after[f'target/{name}'].value:.3f}", head


def test_the_diagram_has_a_point_for_each_bin_with_its_numbers(root, pages):
    run = one(root, "pairs")
    tips = re.findall(r'data-tip="(LoRA r4: claimed [^"]*)"', pages["pairs"])
    rows = run.items[run.items["probe"] == "target"].sort_values("claimed")
    bins = np.array_split(rows[["claimed", "tuned_right"]].to_numpy(float), 10)
    assert len(tips) == 10 and PAIRS % 10 == 0
    for tip, mine in zip(tips, bins, strict=True):
        claimed, true = mine.mean(0)
        assert (
            tip.startswith(f"LoRA r4: claimed {claimed:.3f}, came true {true:.3f} [") and f"of {len(mine)} items" in tip
        )


def test_histograms_hold_every_text(root, pages):
    rows = one(root, "pairs").items
    for group, name in (("chosen", "reward"), ("rejected", "rejected_reward")):
        mean = f"{rows[name].mean():.3f}".replace("-", "−")
        assert f"{group}: {PAIRS} texts, mean reward {mean}" in pages["pairs"]
    assert "LoRA r4: reward against the length of the answer" in pages["pairs"]
    up = one(root, "thumbs").items
    assert f"up: {int((up['label'] == 1).sum())} texts" in pages["thumbs"]


def test_two_areas_are_compared_on_the_same_items(tmp_path):
    for plan, skill in (("lora-r4", 0.3), ("full", 0.2)):
        make_judged(tmp_path, plan, kind="thumbs", skill=skill)
    (comparison,) = compare(runs_below(tmp_path))
    side = comparison.views[0].learning
    full, lora = comparison.runs
    found = difference(lora, full, side)
    assert found.value == pytest.approx(lora.after["target/auc"].value - full.after["target/auc"].value)
    alone = np.hypot(*(run.after["target/auc"].standard_error for run in (lora, full)))
    assert found.standard_error < 0.5 * alone, "the noise that both share cancels"
    mixed = Run("x", "done", full.spec, after=full.after, items=full.items.assign(label=1.0 - full.items["label"]))
    assert difference(lora, mixed, side).standard_error == pytest.approx(alone), "other labels: other items"


def test_two_accuracies_are_compared_on_the_same_items(root):
    (comparison,) = compare(runs_below(root / "pairs"))
    full, lora = comparison.runs
    apart = (lora.items["tuned_right"] - full.items["tuned_right"]).to_numpy(float)
    found = difference(lora, full, comparison.views[0].learning)
    assert found.value == pytest.approx(apart.mean()) and apart.mean() > 0.1
    assert found.standard_error == pytest.approx(apart.std(ddof=1) / np.sqrt(PAIRS))


def run_of(kind, **scores):
    """Make a run by hand; scores are (value, standard error)."""
    after = {f"target/{name}": Score(f"target/{name}", v, "share of items", 50, e) for name, (v, e) in scores.items()}
    spec = {"method": {"name": "lora", "rank": 4}, "objective": {"name": kind}, "seed": 0, "data": {"train": "a"}}
    marks = {"inputs": {"base": "b", "data": {"validation": "v"}}}
    return Run("a", "done", spec, after=after, environment=marks)


def test_below_the_baseline_is_said_and_within_it_too():
    worse = {"accuracy": (0.6, 0.02), "majority": (0.86, 0.02), "majority_change": (-0.26, 0.03)}
    said = verdict(*compare([run_of("classify", **worse)])).learned
    assert said.startswith("LoRA r4 is worse than always naming the commonest label: −0.260")
    chance = {"auc": (0.52, 0.03), "accuracy": (0.86, 0.02), "majority_change": (0.0, 0.0)}
    said = verdict(*compare([run_of("reward", **chance)])).learned
    assert "learned nothing that can be told from zero: +0.020" in said


def test_the_error_over_chance_is_that_of_the_area():
    run = run_of("reward", auc=(0.8, 0.03))
    found = change(run, LEARNING_BY["reward"][0])
    assert (found.value, found.standard_error) == (pytest.approx(0.3), 0.03)
    assert against(run, LEARNING_BY["reward"][0]) == "chance"


def test_other_objectives_on_the_same_data_are_other_comparisons(tmp_path):
    make_run(tmp_path, "lora-r4", target="judged", probes={})
    make_judged(tmp_path, "lora-r4")
    found = compare(runs_below(tmp_path))
    assert sorted(comparison.objective for comparison in found) == ["reward", "text"]
    assert len({comparison.name for comparison in found}) == 2
    assert any("reward model" in comparison.name for comparison in found)
    assert section(found[[c.objective for c in found].index("text")], "x") is None


@pytest.mark.parametrize("missing", [["claimed", "tuned_right"], ["label"]])
def test_items_of_an_older_run_leave_figures_out(tmp_path, missing):
    path = make_judged(tmp_path)
    items = pd.read_parquet(path / "items.parquet")
    items.drop(columns=missing).to_parquet(path / "items.parquet", index=False)
    words = Page(write(path).read_text(encoding="utf-8")).words
    assert "How it judges" in words and "Judged right on held-out items" in words


def test_rewards_that_are_no_numbers_are_not_drawn(tmp_path):
    path = make_judged(tmp_path)
    items = pd.read_parquet(path / "items.parquet")
    items.assign(reward=np.nan).to_parquet(path / "items.parquet", index=False)
    (run,) = runs_below(tmp_path)
    assert judged(run).kind == "classify", "what is left is whether it judged right"
    assert "rewards of chosen" not in write(path).read_text(encoding="utf-8")


def test_rewards_that_are_all_alike_are_not_drawn(tmp_path):
    path = make_judged(tmp_path)
    items = pd.read_parquet(path / "items.parquet")
    items.assign(reward=0.0, rejected_reward=0.0, length=3, rejected_length=3).to_parquet(path / "items.parquet")
    page = write(path).read_text(encoding="utf-8")
    assert "rewards of chosen" not in page and "Claims against what came true" in page


def test_the_page_says_which_weights_were_kept(tmp_path):
    make_judged(tmp_path / "best", delta_step=2 * EVERY)
    make_judged(tmp_path / "last", delta_step=STEPS)
    best, last = (Page(write(tmp_path / name).read_text(encoding="utf-8")).words for name in ("best", "last"))
    assert f"LoRA r4 was best after step {2 * EVERY} of {STEPS}: those weights were kept." in best
    assert "weights were kept" not in last
    accuracy = runs_below(tmp_path / "best")[0].after["target/accuracy"].value
    assert f"(0.500 → {accuracy:.3f} judged right)" in best


def test_a_run_that_has_just_begun_has_a_page(tmp_path):
    path = make_judged(tmp_path)
    for name in ("scores.jsonl", "items.parquet", "metrics.jsonl"):
        (path / name).unlink()
    RunFolder(path).write_status(state="interrupted", step=0)
    words = Page(write(path).read_text(encoding="utf-8")).words
    assert "No run has finished yet" in words
    (comparison,) = compare(runs_below(tmp_path))
    assert table(comparison) == ([], [])
