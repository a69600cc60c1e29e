import re
from itertools import pairwise
from xml.etree import ElementTree

import matplotlib
import pytest
from hypothesis import given
from hypothesis import strategies as st

from loralab.report import curves, figures, spectra
from loralab.report.compare import METHOD_ORDER, compare
from loralab.report.drawing import COLOURS, RANK_SHAPES, canvas, icon, shape
from loralab.report.labels import place_labels, spread, text_width
from loralab.report.read import Run, runs_below
from report_world import make_run, make_sweep

SVG = "{http://www.w3.org/2000/svg}"


@pytest.fixture(scope="module")
def calc(tmp_path_factory):
    (found,) = compare(runs_below(make_sweep(tmp_path_factory.mktemp("sweep"), targets=("calc",))))
    return found


@pytest.fixture(scope="module")
def drawn(calc):
    planes = [figures.plane(calc, view, f"p{i}") for i, view in enumerate(calc.views)]
    return [*planes, *curves.curves(calc, "c"), *spectra.figures(calc, "s")]


def elements(svg, **facts):
    named = {name.replace("_", "-"): value for name, value in facts.items()}
    return [e for e in ElementTree.fromstring(svg).iter() if all(e.get(k) == v for k, v in named.items())]


def texts(svg):
    return ["".join(e.itertext()).strip() for e in ElementTree.fromstring(svg).iter(f"{SVG}text")]


def place(element):
    """Give where a mark stands: the position of its `use`."""
    used = next(element.iter(f"{SVG}use"))
    return float(used.get("x")), float(used.get("y"))


def test_all_figures_are_drawn(drawn):
    assert [figure.title for figure in drawn] == [
        "By right answers",
        "By loss",
        "Loss on the training data",
        "New task calc: loss on held-out data",
        "Old skills: loss on general text",
        "Drift from the base: KL(base‖tuned)",
        "Singular values of the change, relative to the largest",
        "Directions that hold 90 % of the change, by kind of layer",
        "Directions that hold 90 % of the change, by depth",
    ]


def test_every_run_is_named_in_words_in_every_figure_but_those_of_marks_alone(calc, drawn):
    for figure in drawn:
        if "by kind of layer" not in figure.title:
            assert {calc.label(run) for run in calc.runs} <= set(texts(figure.svg)), figure.title


def test_marks_of_the_plane_stand_where_the_scores_say(calc, drawn):
    marks = {e.get("data-run"): place(e) for e in elements(drawn[0].svg, **{"class": "mark"})}
    assert len(marks) == len(calc.runs)
    view = calc.views[0]
    from loralab.report.compare import change

    lost = {run.folder: change(run, view.forgetting).value for run in calc.runs}
    learned = {run.folder: change(run, view.learning).value for run in calc.runs}
    (a, b, *_) = sorted(marks)
    across = (marks[a][0] - marks[b][0]) / (lost[a] - lost[b])
    down = (marks[a][1] - marks[b][1]) / (learned[a] - learned[b])
    assert across > 0 > down, "more forgotten is to the right, more learned is up"
    for folder, (x, y) in marks.items():
        assert x == pytest.approx(marks[a][0] + across * (lost[folder] - lost[a]), abs=0.05)
        assert y == pytest.approx(marks[a][1] + down * (learned[folder] - learned[a]), abs=0.05)


def test_a_mark_says_its_values_to_pointer_and_keyboard(calc, drawn):
    for mark in elements(drawn[0].svg, **{"class": "mark"}):
        assert re.fullmatch(
            r".+: learned [+−]\d\.\d{3}\s±\s\d\.\d{3}, forgot [+−]?\d\.\d{3}\s±\s\d\.\d{3}", mark.get("data-tip")
        )
        assert (mark.get("aria-label"), mark.get("tabindex")) == (mark.get("data-tip"), "0")


def test_colours_belong_to_methods_on_every_page(calc, drawn):
    assert list(COLOURS) == list(METHOD_ORDER)
    for figure in drawn:
        for part in elements(figure.svg):
            if part.get("data-method") and part.get("class") == "mark":
                assert (
                    COLOURS[part.get("data-method")].lower() in ElementTree.tostring(part, encoding="unicode").lower()
                )


def test_ranks_differ_in_shape_and_every_shape_can_be_drawn_on_the_page():
    runs = [Run("a", spec={"method": {"name": "lora", "rank": 2**k}}) for k in range(9)]
    assert [shape(run) for run in runs] == list(RANK_SHAPES)
    full = Run("a", spec={"method": {"name": "full"}})
    icons = [icon(run) for run in [*runs, full]]
    assert len(set(icons)) == len(icons)
    assert all(re.fullmatch(r"[MLQCZ\d. -]+", path) for path in icons)


def test_the_same_runs_give_the_same_bytes_whatever_a_person_has_set(calc, drawn):
    with matplotlib.rc_context({"lines.linestyle": ":", "axes.xmargin": 0.4, "svg.fonttype": "path", "font.size": 30}):
        again = [figures.plane(calc, calc.views[0], "p0"), *curves.curves(calc, "c")]
    assert [figure.svg for figure in again] == [drawn[0].svg, *(figure.svg for figure in drawn[2:6])]


def test_figures_take_ink_and_font_from_the_page_and_no_file_of_their_own(drawn):
    for figure in drawn:
        assert "currentColor" in figure.svg and "var(--line)" in figure.svg
        assert "font-family" not in figure.svg and "metadata" not in figure.svg
        assert not re.search(r"#0[123]0[123]0[123]|font: ", figure.svg)
        links = {value for e in elements(figure.svg) for key, value in e.attrib.items() if key.endswith("href")}
        assert all(link.startswith("#") for link in links)


def test_ids_do_not_clash_between_figures_of_a_page(drawn):
    ids = [e.get("id") for figure in drawn for e in elements(figure.svg) if e.get("id")]
    assert ids and len(ids) == len(set(ids))


def test_names_may_hold_what_they_like(tmp_path):
    make_run(tmp_path, "full", data={"train": "a$b$ <i>&\u00df\u4e2d.jsonl", "general": "pocket:source"})
    (comparison,) = compare(runs_below(tmp_path))
    plane = figures.plane(comparison, comparison.views[0], "p")
    assert "Learned: a$b$ <i>&\u00df\u4e2d, share answered right" in texts(plane.svg)


def test_no_plane_without_both_measures(tmp_path):
    path = make_run(tmp_path, "full")
    kept = [
        line
        for line in (path / "scores.jsonl").read_text().splitlines()
        if '"source/' not in line and "general" not in line
    ]
    (path / "scores.jsonl").write_text("\n".join(kept) + "\n")
    (comparison,) = compare(runs_below(tmp_path))
    assert [figures.plane(comparison, view, "p") for view in comparison.views] == [None, None]


def test_runs_that_read_more_per_step_are_drawn_over_tokens(tmp_path):
    make_run(tmp_path, "full")
    other = make_run(tmp_path, "lora-r4")
    (other / "metrics.jsonl").write_text(
        (other / "metrics.jsonl").read_text().replace('"tokens": 1024', '"tokens": 4096')
    )
    (comparison,) = compare(runs_below(tmp_path))
    for figure in curves.curves(comparison, "c"):
        assert "tokens read" in texts(figure.svg) and "optimizer steps" not in texts(figure.svg)


def test_a_long_training_curve_is_averaged_not_thinned(calc):
    run = Run("a", metrics=[{"step": i + 1, "loss": float(i % 2)} for i in range(1000)])
    found = curves._training(run, lambda _, step: float(step))
    assert len(found) <= curves.CURVE_POINTS
    assert found[-1][0] == 1000
    assert sum(score.value for _, score in found) / len(found) == pytest.approx(0.5, abs=0.03)


@given(st.lists(st.floats(0, 100), min_size=1, max_size=9))
def test_labels_are_spread_in_order_and_stay_inside(places):
    moved = spread(places, 10, 0, 100)
    order = sorted(range(len(places)), key=lambda i: places[i])
    in_order = [moved[i] for i in order]
    assert all(b - a >= 10 - 1e-9 for a, b in pairwise(in_order))
    assert in_order[0] >= -1e-9 and in_order[-1] <= 100 + 1e-9


def test_a_canvas_escapes_its_texts():
    with canvas("x", 'a "title" & <more>', 100, 100) as made:
        made.axes().set_xlabel("<script>alert(1)</script>")
    assert "<script" not in made.svg
    assert ElementTree.fromstring(made.svg).get("aria-label") == 'a "title" & <more>'


def test_labels_keep_clear_of_what_is_drawn_and_of_each_other():
    with canvas("x", "x", 400, 400) as made:
        axes = made.axes()
        axes.set(xlim=(0, 1), ylim=(0, 1))
        x, y = axes.transData.transform((0.5, 0.5))
        right = (x + 5, y - 40, x + 200, y + 40)
        texts = place_labels(axes, [(0.5, 0.5)] * 6, [f"label {i}" for i in range(6)], [right])
        middles = [axes.transData.transform(text.get_position()) for text in texts]
    half_wide, half_high = text_width("label 0") / 2, 6
    boxes = [(a - half_wide, b - half_high, a + half_wide, b + half_high) for a, b in middles]
    for i, box in enumerate(boxes):
        for other in [right, *boxes[:i]]:
            apart = box[0] >= other[2] or box[2] <= other[0] or box[1] >= other[3] or box[3] <= other[1]
            assert apart, f"label {i} covers something"
