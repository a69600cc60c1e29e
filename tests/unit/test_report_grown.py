"""Runs that looked inside their delta while they trained: curves, and intruders against forgetting."""

import re
from dataclasses import replace
from xml.etree import ElementTree

import pandas as pd
import pytest
from scipy.stats import spearmanr

from grown_world import EVALUATED, grow
from loralab.report import curves, grown, spectra
from loralab.report.compare import compare
from loralab.report.page import write
from loralab.report.read import read_run, runs_below
from page_reader import Page
from report_world import PLANS, STEPS, make_run, make_sweep

SVG = "{http://www.w3.org/2000/svg}"
COUNTS = {"full": 3, "lora-r1": 2, "lora-r4": 8, "lora-r16": 14, "lora-plus": 12, "cola": 9}


@pytest.fixture(scope="module")
def sweep(tmp_path_factory):
    root = make_sweep(tmp_path_factory.mktemp("grown"), targets=("calc",))
    for path in sorted((root / "calc").iterdir()):
        name = next(name for name in PLANS if path.name.startswith(f"{name}-"))
        grow(path, COUNTS[name], scores=name != "lora-r4")
    return root


@pytest.fixture(scope="module")
def calc(sweep):
    (found,) = compare(runs_below(sweep))
    return found


@pytest.fixture(scope="module")
def drawn(calc):
    return {figure.title: figure for figure in grown.figures(calc, "c")}


def marks(figure):
    return [e for e in ElementTree.fromstring(figure.svg).iter() if e.get("class") == "mark"]


def place(mark):
    used = next(mark.iter(f"{SVG}use"))
    return float(used.get("x")), float(used.get("y"))


def test_a_run_is_read_with_its_last_step_and_all_steps(sweep):
    path = next((sweep / "calc").glob("lora-r4-*"))
    found = read_run(path, path)
    assert set(found.spectra["step"]) == {STEPS} and len(found.spectra) == 28
    assert sorted(set(found.spectra_steps["step"])) == list(EVALUATED)
    assert found.intruders["intruder"].dtype == bool
    assert found.intruders.groupby("step")["intruder"].sum().loc[STEPS] == 8


def test_a_run_measured_once_has_no_growth(tmp_path):
    found = read_run(make_run(tmp_path, "lora-r4"), tmp_path)
    assert found.spectra is not None and found.spectra_steps is None and found.intruders is None
    (comparison,) = compare([found])
    assert grown.figures(comparison, "c") == []


def test_a_damaged_table_is_a_problem_of_the_run_and_no_error(sweep, tmp_path):
    path = grow(make_run(tmp_path, "lora-r4"), 3)
    (path / "intruders.parquet").write_bytes(b"not a table")
    found = read_run(path, path)
    assert found.intruders is None and any("intruders.parquet" in problem for problem in found.problems)


def test_figures_of_the_end_use_the_last_step_only(calc):
    for figure in spectra.figures(calc, "s"):
        assert figure is not None
    one = next(one for one in spectra.subjects(calc) if one.label == "LoRA r4")
    assert len(one.table) == 28
    figure = next(f for f in spectra.figures(calc, "s") if "by depth" in f.title)
    said = [mark.get("data-tip") for mark in marks(figure) if mark.get("data-tip").startswith("LoRA r4, block 0")]
    last = one.table[one.table["depth"] == 0]["rank90"].median()
    assert said == [f"LoRA r4, block 0: {last:g} directions (median over its layers)"]


def test_every_part_is_followed_over_the_steps(calc, drawn):
    assert list(drawn) == [
        "Intruders in all matrices",
        "Energy that intruders hold",
        "Size of the largest intruder",
        "Position of the largest intruder",
        "Directions that hold 90 % of the change",
        "Effective rank of the change",
        "Size of the change",
        "Intruders against what was forgotten",
    ]
    assert drawn["Intruders in all matrices"].caption == "k = 10, ε = 0.5."
    for run in calc.runs:
        medians = {step: rows["relative_norm"].median() for step, rows in run.spectra_steps.groupby("step")}
        mine = [mark for mark in marks(drawn["Size of the change"]) if mark.get("data-run") == run.folder]
        assert len(mine) == len(EVALUATED)
        for mark, (step, value) in zip(mine, medians.items(), strict=True):
            assert mark.get("data-tip").startswith(f"{calc.label(run)}, step {step}: {value:.3g}")


def test_scores_and_tables_say_the_same_count(calc, drawn):
    for run in calc.runs:
        counts = run.intruders.groupby("step")["intruder"].sum().tolist()
        mine = [m.get("data-tip") for m in marks(drawn["Intruders in all matrices"]) if m.get("data-run") == run.folder]
        assert [int(re.search(r": (\d+) intruder", tip)[1]) for tip in mine] == counts


def test_a_run_that_has_not_ended_is_followed_by_its_scores(calc):
    cut = [replace(run, spectra_steps=None, intruders=None) for run in calc.runs if calc.label(run) != "LoRA r4"]
    (comparison,) = compare(cut)
    titles = [figure.title for figure in grown.figures(comparison, "c")]
    assert "Intruders in all matrices" in titles and "Size of the largest intruder" not in titles


def test_the_position_has_the_top_above(drawn):
    by_place = {}
    for mark in marks(drawn["Position of the largest intruder"]):
        by_place[int(re.search(r"position (\d+)", mark.get("data-tip"))[1])] = place(mark)[1]
    assert len(by_place) > 3
    assert [by_place[key] for key in sorted(by_place)] == sorted(by_place.values())


def test_intruders_against_forgetting_stand_where_both_were_measured(calc, drawn):
    figure = drawn["Intruders against what was forgotten"]
    truth = {}
    for run in calc.runs:
        counts = run.intruders.groupby("step")["intruder"].sum()
        for step, score in run.history["general/loss_rise"]:
            if step in counts.index:
                truth[run.folder, step] = (counts[step], score.value)
    places = {}
    for mark in marks(figure):
        step = int(re.search(r"step (\d+)", mark.get("data-tip"))[1])
        places[mark.get("data-run"), step] = place(mark)
    assert set(places) == set(truth) and len(truth) == 6 * len(EVALUATED)
    a, b = max(truth, key=truth.get), min(truth, key=truth.get)
    across = (places[a][0] - places[b][0]) / (truth[a][0] - truth[b][0])
    top, bottom = max(truth, key=lambda key: truth[key][1]), min(truth, key=lambda key: truth[key][1])
    down = (places[top][1] - places[bottom][1]) / (truth[top][1] - truth[bottom][1])
    assert across > 0 > down
    for key, (x, y) in places.items():
        assert x == pytest.approx(places[a][0] + across * (truth[key][0] - truth[a][0]), abs=0.1)
        assert y == pytest.approx(places[top][1] + down * (truth[key][1] - truth[top][1]), abs=0.1)


def test_the_rank_correlation_is_that_of_the_last_marks(calc, drawn):
    counts, lost = [], []
    for run in calc.runs:
        counts.append(run.intruders.groupby("step")["intruder"].sum().loc[STEPS])
        lost.append(run.after["general/loss_rise"].value)
    expected = f"{spearmanr(counts, lost).statistic:.2f}".replace("-", "−")
    caption = drawn["Intruders against what was forgotten"].caption
    assert f"Spearman's ρ over the last marks: {expected} (n = 6; published for LLaMA2-7B: 0.59)" in caption
    assert "no meter of forgetting across methods" in caption


def test_few_runs_have_no_correlation(calc):
    few = replace(calc, runs=calc.runs[:3])
    assert "Spearman" not in grown.against_forgetting(few, "x").caption


def test_scores_of_weights_are_not_drawn_twice(calc):
    titles = [figure.title for figure in curves.curves(calc, "c")]
    assert titles and not any("spectrum/" in title or "intruders/" in title for title in titles)


def test_the_page_has_them(sweep, tmp_path):
    alone = next((sweep / "calc").glob("lora-r4-*"))
    page = Page(write(alone, tmp_path / "page.html").read_text(encoding="utf-8"))
    assert "Inside the change, over training" in page.words
    assert page.words.count("Intruders against what was forgotten") == 1


def test_steps_that_are_no_numbers_are_passed_over(tmp_path):
    path = grow(make_run(tmp_path, "lora-r4"), 3)
    table = pd.read_parquet(path / "spectra.parquet")
    odd = table.head(1).assign(step=float("nan"))
    pd.concat([table.astype({"step": float}), odd], ignore_index=True).to_parquet(path / "spectra.parquet", index=False)
    found = read_run(path, path)
    assert len(found.spectra) == 28 and found.spectra["step"].max() == STEPS
