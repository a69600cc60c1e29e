"""The page of a repair: every edit where it was measured, the bar, the budget, the chosen one, and plain words."""

import re
import subprocess
import sys
from dataclasses import replace
from xml.etree import ElementTree

import numpy as np
import pandas as pd
import pytest

from loralab.lab.repaired import read_repair
from loralab.report import repair_figures as drawing
from loralab.report import repaired
from loralab.report.page import write
from mended_world import EDITS, make_sweep, write_single, write_sweep
from page_reader import Page

SVG = "{http://www.w3.org/2000/svg}"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_sweep(tmp_path_factory.mktemp("repair") / "sweep")


@pytest.fixture(scope="module")
def found(folder):
    return read_repair(folder)


@pytest.fixture(scope="module")
def drawn(found):
    return {figure.title: figure for figure in drawing.figures(found)}


@pytest.fixture(scope="module")
def html(folder):
    return write(folder).read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def page(html):
    return Page(html)


def marks(figure):
    return [e for e in ElementTree.fromstring(figure.svg).iter() if e.get("class") == "mark"]


def texts(figure):
    return ["".join(e.itertext()).strip() for e in ElementTree.fromstring(figure.svg).iter(f"{SVG}text")]


def place(mark):
    used = next(mark.iter(f"{SVG}use"))
    return float(used.get("x")), float(used.get("y"))


def of_edits(figure):
    return {mark.get("data-tip").split(": ")[0]: mark for mark in marks(figure) if ": learned" in mark.get("data-tip")}


WHOLE = "Learning against forgetting, a curve per family of edits"


def test_the_page_says_what_the_sweep_says(found, page):
    assert "What can be mended, and what it costs" in page.words
    for line in found.said():
        assert " ".join(line.split()) in page.words
    assert any("uniform scaling at equal learning" in line for line in found.said())
    assert "dequantised from 4 bits" in page.words and "40.5 s" in page.words


def test_every_edit_stands_where_it_was_measured(found, drawn):
    rows = {row["edit"]: row for row in found.points.to_dict("records")}
    for title in (WHOLE, f"{WHOLE}: the frame, close"):
        places = {edit: place(mark) for edit, mark in of_edits(drawn[title]).items()}
        assert (
            set(places) == set(rows) if title == WHOLE else {edit for edit in rows if "scale" not in edit} < set(places)
        )
        a, b = max(places, key=lambda edit: rows[edit]["learning"]), min(places, key=lambda e: rows[e]["learning"])
        across = (places[a][0] - places[b][0]) / (rows[a]["forgetting"] - rows[b]["forgetting"])
        down = (places[a][1] - places[b][1]) / (rows[a]["learning"] - rows[b]["learning"])
        assert across > 0 > down
        for edit, (x, y) in places.items():
            assert x == pytest.approx(
                places[a][0] + across * (rows[edit]["forgetting"] - rows[a]["forgetting"]), abs=0.1
            )
            assert y == pytest.approx(places[a][1] + down * (rows[edit]["learning"] - rows[a]["learning"]), abs=0.1)


def test_a_curve_joins_a_family_in_order_of_strength_and_begins_at_the_unedited_delta(found):
    curves = {curve.name: curve for curve in drawing.curves_of(found.points)}
    assert list(curves) == ["scale", "taper", "top1", "all", "neighbour", "matched top1", "matched all"]
    whole = found.at("scale 1")
    for curve in curves.values():
        strengths = curve.rows["strength"].tolist()
        assert strengths == sorted(strengths) and strengths[-1] == 1.0
        assert curve.rows["learning"].iloc[-1] == whole["learning"]
    assert curves["matched top1"].rows["edit"].tolist()[:-1] == [f"matched top1 {s}" for s in (0.3, 0.5, 0.7, 0.9)]
    assert [name for name, curve in curves.items() if curve.is_control] == ["neighbour", "matched top1", "matched all"]


def test_a_threshold_begins_at_zero():
    edits = [("scale", 0.0, ""), ("scale", 1.0, ""), ("scale", 0.5, "")]
    placed = make_sweep(edits=edits, budget=None).points
    one = placed.iloc[[2]].assign(edit="threshold 1", family="threshold", strength=1.0)
    curve = drawing.curves_of(pd.concat([placed, one], ignore_index=True))[-1]
    assert (curve.name, curve.rows["strength"].tolist()) == ("threshold", [0.0, 1.0])
    assert curve.rows["learning"].iloc[0] == placed["learning"].iloc[1]


def test_the_budget_is_a_line_at_its_limit_and_the_chosen_edit_is_named(found, drawn):
    figure = drawn[WHOLE]
    limit = found.choice["limit"]
    (line,) = (mark for mark in marks(figure) if "budget" in mark.get("data-tip"))
    assert f"at most {limit:.3f}" in line.get("data-tip")
    x = float(re.search(r"M ([\d.]+)", next(line.iter(f"{SVG}path")).get("d"))[1])
    places = {edit: place(mark)[0] for edit, mark in of_edits(figure).items()}
    rows = {row["edit"]: row["forgetting"] for row in found.points.to_dict("records")}
    for edit, at in places.items():
        assert (at <= x + 0.01) == (rows[edit] <= limit + 1e-12), edit
    assert f"chosen: {found.best['edit']}" in texts(figure)
    table = Page(repaired.render(found, "x")).table("edit", "learned", "95 % interval")
    assert [row[0] for row in table if "★" in row[0]] == [f"{found.best['edit']} ★ chosen"]


def test_without_a_budget_there_is_no_line_and_nothing_is_chosen(found):
    title, figure = next((f.title, f) for f in drawing.figures(replace(found, choice=None)))
    assert title == WHOLE and not any("budget" in mark.get("data-tip") for mark in marks(figure))
    assert not any("chosen" in text for text in texts(figure))


def test_differences_from_uniform_scaling_have_their_interval_and_ties_are_hollow(found, drawn):
    figure = drawn["Forgetting beside uniform scaling at equal learning"]
    rows = {row["edit"]: row for row in found.verdicts}
    verdicts = set()
    places = {}
    for mark in marks(figure):
        edit, verdict = mark.get("data-tip").split(": ")[0], mark.get("data-tip").split(": ")[-1]
        assert verdict == rows[edit]["verdict"]
        verdicts.add(verdict)
        style = next(mark.iter(f"{SVG}use")).get("style")
        assert ("fill: var(--paper)" in style) == (verdict == "tie")
        places[edit] = place(mark)[0]
    assert set(places) == set(rows) and len(verdicts) > 1
    order = sorted(rows, key=lambda edit: rows[edit]["difference"])
    assert [places[edit] for edit in order] == sorted(places.values())


def test_tables_hold_every_edit_verdict_and_control(found, page):
    table = page.table("edit", "verdict")
    assert {row[0]: row[1] for row in table[1:]} == {row["edit"]: row["verdict"] for row in found.verdicts}
    controls = page.table("edit", "learns")
    assert len(controls) - 1 == len(found.controls) > 0
    first = found.controls[0]
    assert controls[1][0] == f"{first['edit']} beside {first['control']}"
    assert controls[1][3].replace("−", "-") == f"{first['forgetting_difference']:+.3f}"
    points = page.table("edit", "learned", "95 % interval")
    assert len(points) - 1 == len(EDITS)
    row = found.at("all 0.5")
    (cells,) = (cells for cells in points if cells[0].startswith("all 0.5"))
    assert cells[1] == f"{row['learning']:+.3f}"
    assert cells[4] == f"{row['forgetting_low']:+.3f} to {row['forgetting_high']:+.3f}"


def test_the_same_folder_gives_the_same_bytes_and_no_torch(folder, html, tmp_path):
    program = "import sys; from loralab.report.page import write; write(sys.argv[1], sys.argv[2]); print('torch' in sys.modules)"
    command = [sys.executable, "-c", program, str(folder), str(tmp_path / "again.html")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
    assert (tmp_path / "again.html").read_text(encoding="utf-8") == html


def test_a_single_edit_is_never_said_to_mend_anything(tmp_path):
    page = Page(write(write_single(tmp_path / "one")).read_text(encoding="utf-8"))
    assert "What was edited" in page.words and "mended" not in page.words
    assert "Nothing was measured" in page.words
    table = page.table("matrix", "intruders")
    assert [row[0] for row in table[1:]] == [f"model.layers.{i}.q_proj" for i in (1, 2, 3)]
    assert [row[4] for row in table[1:]] == ["9", "9", "8"]


def test_scales_alone_and_edits_without_intervals():
    edits = [("scale", 0.0, ""), ("scale", 0.5, ""), ("scale", 1.0, "")]
    alone = make_sweep(edits=edits, budget=None)
    drawn = drawing.figures(alone)
    assert [figure.title for figure in drawn] == [WHOLE, "What is learned by strength", "What is forgotten by strength"]
    ends = [f"{side}_{end}" for side in ("learning", "forgetting") for end in ("low", "high")]
    bare = replace(alone, points=alone.points.assign(**dict.fromkeys(ends, np.nan)))
    page = Page(repaired.render(bare, "bare"))
    assert page.table("edit", "learned")[1][2] == "–"
    assert all("[" not in mark.get("data-tip") for mark in marks(drawing.figures(bare)[0]))


def test_an_edit_that_could_not_be_placed_is_left_out_of_the_plane(found):
    points = found.points.copy()
    points.loc[points["edit"] == "top1 0.5", ["learning", "forgetting"]] = np.nan
    figure = drawing.figures(replace(found, points=points))[0]
    assert set(of_edits(figure)) == set(points["edit"]) - {"top1 0.5"}
