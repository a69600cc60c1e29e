"""The page of a spectra folder: every number is the folder's, every mark stands where its number says."""

import math
import re
import subprocess
import sys
from dataclasses import replace
from xml.etree import ElementTree

import numpy as np
import pandas as pd
import pytest

from inside_world import layers, make_inside, spoil
from loralab.lab.spectra import Spectra, read_spectra
from loralab.report import inside, intruders, maps, panels, subspaces, trajectories
from loralab.report.page import write
from loralab.report.spectra_folder import Inside, kinds, short
from page_reader import Page

SVG = "{http://www.w3.org/2000/svg}"
BAD = "model.layers.1.mlp.up_proj"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    made = make_inside(tmp_path_factory.mktemp("inside") / "spectra", depth=3)
    spoil(made, "lora-hot", BAD, "the base has no tensor <of> this name")
    return made


@pytest.fixture(scope="module")
def found(folder):
    return Inside(read_spectra(folder))


@pytest.fixture(scope="module")
def drawn(found):
    return inside.figures(found)


@pytest.fixture(scope="module")
def html(folder):
    return write(folder).read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def page(html):
    return Page(html)


@pytest.fixture(scope="module")
def chained(tmp_path_factory):
    told = {f"run step {step}": {"step": step, "path": f"r/run/checkpoints/step-{step}"} for step in (10, 20)}
    told |= {"run": {"step": 40, "path": "r/run"}}
    strengths = dict(zip(told, (0.2, 0.8, 2.0), strict=True))
    return make_inside(tmp_path_factory.mktemp("chained") / "spectra", deltas=strengths, depth=1, told=told)


def marks(figure):
    return [e for e in ElementTree.fromstring(figure.svg).iter() if e.get("class") == "mark"]


def texts(figure):
    return ["".join(e.itertext()).strip() for e in ElementTree.fromstring(figure.svg).iter(f"{SVG}text")]


def box(mark):
    """Give left, top, right and bottom of a cell."""
    numbers = [float(number) for number in re.findall(r"-?[\d.]+", next(mark.iter(f"{SVG}path")).get("d"))]
    return min(numbers[::2]), min(numbers[1::2]), max(numbers[::2]), max(numbers[1::2])


def place(mark):
    used = next(mark.iter(f"{SVG}use"))
    return float(used.get("x")), float(used.get("y"))


def opacity(mark):
    style = next(mark.iter(f"{SVG}path")).get("style")
    return float(re.search(r"opacity: ([\d.]+)", style)[1])


# The page


def test_the_page_says_base_k_and_epsilon_beside_every_count(page):
    assert "What is inside the deltas" in page.words
    assert "Base: org/tiny-3M. All counts of intruders: k = 6, ε = 0.5." in page.words
    for heading in (
        "Where the intruders are",
        "What they resemble",
        "How the count depends on k and ε",
        "Where it points",
    ):
        assert heading in page.words
    assert "a within-LoRA diagnostic, not a method-independent meter of forgetting" in page.words


def test_the_verdict_counts_what_the_folder_holds(folder, page):
    vectors = pd.read_parquet(folder / "intruders.parquet")
    for delta, of in (("lora-r4", 12), ("lora-hot", 11)):
        mine = vectors[(vectors["delta"] == delta)]
        count = sum(cosine < 0.5 for cosine in mine["cosine_high"])
        touched = mine.loc[mine["cosine_high"] < 0.5, "layer"].nunique()
        assert f"{count} intruders in {touched} of {of} matrices (k = 6, ε = 0.5)" in page.words
        shares = []
        for _, rows in mine.groupby("layer"):
            energy = np.array([s**2 for s in rows["value"]])
            shares.append(energy[(rows["cosine_high"] < 0.5).to_numpy()].sum() / energy.sum())
        assert f"they hold {100 * np.mean(shares):.1f} % of the energy of the 6 leading vectors" in page.words


def test_a_matrix_that_could_not_be_measured_is_named_and_the_others_are_shown(page, drawn):
    assert "1 matrix could not be measured" in page.words
    (table,) = (t for t in page.tables if t[0] == ["matrix", "delta", "why"])
    assert table[1:] == [[BAD, "lora-hot", "the base has no tensor <of> this name"]]
    tips = [mark.get("data-tip") for mark in marks(drawn["where"][1])]
    assert len(tips) == 11 and not any("block 1, up_proj" in tip for tip in tips)


def test_the_table_of_deltas_sums_up_each(folder, page):
    matrices = pd.read_parquet(folder / "spectra.parquet")
    table = page.table("delta ".strip(), "matrices")
    for row in table[1:]:
        mine = matrices[(matrices["delta"] == row[0]) & (matrices["problem"] == "")]
        assert row[1:3] == [str(len(mine)), f"{mine['intruders'].sum():.0f}"]
        assert row[3] == str((mine["intruders"] > 0).sum())
        assert row[5] == f"{mine['intruder_values'].sum():.3g}"
        assert row[6] == f"{mine['rank90'].median():.3g}"
        assert row[10] == f"{mine['relative_norm'].median():.3g}"


def test_every_matrix_and_every_intruder_has_a_row(folder, page):
    vectors = pd.read_parquet(folder / "intruders.parquet")
    table = page.table("matrix", "delta", "shape")
    assert len(table) == 1 + 12 + 11
    row = next(row for row in table if row[:2] == ["model.layers.2.self_attn.q_proj", "lora-hot"])
    layer = vectors[(vectors["delta"] == "lora-hot") & (vectors["layer"] == row[0])]
    assert row[2] == "40×40" and row[3] == str((layer["cosine_high"] < 0.5).sum())
    table = page.table("matrix", "delta", "position")
    said = {(row[1], row[0], int(row[2])) for row in table[1:]}
    below = vectors[vectors["cosine_high"] < 0.5]
    assert said == set(zip(below["delta"], below["layer"], below["position"], strict=True))


def test_the_same_folder_gives_the_same_bytes_and_no_torch(folder, html, tmp_path):
    program = "import sys; from loralab.report.page import write; write(sys.argv[1], sys.argv[2]); print('torch' in sys.modules)"
    command = [sys.executable, "-c", program, str(folder), str(tmp_path / "again.html")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
    assert (tmp_path / "again.html").read_text(encoding="utf-8") == html


# Maps


def test_cells_of_the_map_stand_by_block_and_kind_and_say_their_number(folder, drawn):
    matrices = pd.read_parquet(folder / "spectra.parquet").set_index(["delta", "depth", "module"])["intruders"]
    cells = {}
    for mark in marks(drawn["where"][0]):
        block, kind, count = re.fullmatch(
            r"lora-r4, block (\d), (\w+): (\d+) intruders?", mark.get("data-tip")
        ).groups()
        assert int(count) == matrices["lora-r4", int(block), kind]
        cells[int(block), kind] = (box(mark), opacity(mark), int(count))
    assert len(cells) == 12
    kinds_down = [module for _, module, d in layers(1)]
    for (block, kind), ((left, top, right, bottom), _, _) in cells.items():
        if block:
            assert left == pytest.approx(cells[block - 1, kind][0][2], abs=0.02)
        if kind != kinds_down[0]:
            above = cells[block, kinds_down[kinds_down.index(kind) - 1]][0]
            assert top == pytest.approx(above[3], abs=0.02)
        assert right > left and bottom > top


def test_tints_grow_with_the_count_and_are_the_same_for_all_deltas(drawn):
    tints = {}
    for figure in drawn["where"]:
        for mark in marks(figure):
            count = int(mark.get("data-tip").split(": ")[1].split()[0])
            tints.setdefault(count, set()).add(opacity(mark))
    assert all(len(found) == 1 for found in tints.values())
    rising = [tints[count].pop() for count in sorted(tints) if count]
    assert len(rising) > 2 and rising == sorted(rising) and rising[-1] == pytest.approx(maps.STRONGEST)


def test_the_map_of_k_and_epsilon_counts_the_cosines(folder, drawn):
    vectors = pd.read_parquet(folder / "intruders.parquet")
    (figure,) = (f for f in drawn["settings"] if f.title == "lora-hot: intruders by k and ε")
    seen = 0
    for mark in marks(figure):
        k, epsilon, count = re.fullmatch(
            r"lora-hot, k = (\d), ε = ([\d.]+): (\d+) intruders?", mark.get("data-tip")
        ).groups()
        mine = vectors[(vectors["delta"] == "lora-hot") & (vectors["position"] <= int(k))]
        assert int(count) == sum(cosine < float(epsilon) for cosine in mine["cosine_low"])
        seen += 1
    assert seen == 6 * 9
    assert "k = 6, ε = 0.5" in figure.caption


def test_a_count_between_two_bounds_is_shown_as_both(found):
    vectors = found.found.vectors.assign(cosine_high=lambda table: np.minimum(1, table["cosine_high"] + 0.2))
    wide = Inside(replace(found.found, vectors=vectors))
    table = intruders.counts(wide, "lora-hot")
    row = table[(table["k"] == 6) & (table["epsilon"] == 0.7)].iloc[0]
    mine = vectors[vectors["delta"] == "lora-hot"]
    assert (row["low"], row["high"]) == ((mine["cosine_high"] < 0.7).sum(), (mine["cosine_low"] < 0.7).sum())
    figure = maps.of_counts(wide.models[1], table, 6, 0.5, "x", 100.0)
    assert f"{row['low']}–{row['high']}" in texts(figure)
    assert "the count lies between them" in figure.caption


def test_similarities_are_those_of_the_matrix_with_most_intruders_and_of_one_without(folder, drawn):
    vectors = pd.read_parquet(folder / "intruders.parquet")
    mine = vectors[vectors["delta"] == "lora-hot"]
    counts = mine.groupby("layer")["intruder"].sum()
    titles = [figure.title for figure in drawn["similar"] if figure.title.startswith("lora-hot")]
    most = [re.fullmatch(r"lora-hot, (\S+): (\w+) intruders?", title).groups() for title in titles]
    assert [counts[layer] for layer, _ in most[:2]] == sorted(counts, reverse=True)[:2]
    assert counts[most[2][0]] == 0 and most[2][1] == "no"
    figure = next(f for f in drawn["similar"] if f.title == titles[0])
    rows = mine[mine["layer"] == most[0][0]].sort_values("position")
    flagged = [int(text.removeprefix("◆ ")) for text in texts(figure) if text.startswith("◆ ")]
    assert flagged == rows.loc[rows["intruder"], "position"].tolist()
    shown = sum(float(value) >= 0.04 for values in rows["similarity"] for value in values)
    fills = re.findall(r"fill: #d55e00", figure.svg)
    assert len(fills) == shown
    for mark, row in zip(marks(figure), rows.itertuples(), strict=True):
        cosines = np.array(row.similarity)
        assert f"most like number {cosines.argmax() + 1} ({cosines.max():.2f})" in mark.get("data-tip")


def test_layers_outside_of_blocks_stand_at_the_left_under_none(found):
    table = found.found.matrices
    head = table[table["layer"] == "model.layers.0.self_attn.q_proj"].assign(
        layer="lm_head", module="lm_head", depth=-1
    )
    more = Inside(replace(found.found, matrices=pd.concat([table, head], ignore_index=True)))
    measure = replace(inside.SHARE_OF_RANK, full=1.0)
    figure = maps.of_the_model(more.subjects[0], measure, "x", "")
    assert "none" in texts(figure)
    boxes = {mark.get("data-tip"): box(mark) for mark in marks(figure)}
    (outside,) = (place for tip, place in boxes.items() if "lm_head, in no block" in tip)
    assert outside[2] < min(place[0] for tip, place in boxes.items() if "in no block" not in tip)


# Leading values, spectra, subspaces


def test_intruders_stand_at_their_position_and_value(folder, drawn):
    vectors = pd.read_parquet(folder / "intruders.parquet")
    found = vectors[(vectors["delta"] == "lora-hot") & vectors["intruder"]]
    (figure,) = (f for f in drawn["leading"] if f.title.startswith("lora-hot"))
    places = {}
    for mark in marks(figure):
        layer, position = re.match(r"lora-hot, (\S+): intruder at position (\d)", mark.get("data-tip")).groups()
        places[layer, int(position)] = place(mark)
    assert set(places) == set(zip(found["layer"], found["position"], strict=True))
    rows = {(row.layer, row.position): row.relative_value for row in found.itertuples()}
    low, high = min(rows, key=rows.get), max(rows, key=rows.get)
    per_log = (places[high][1] - places[low][1]) / math.log(rows[high] / rows[low])
    assert per_log < 0, "larger is up"
    for key, value in rows.items():
        assert places[key][1] == pytest.approx(places[low][1] + per_log * math.log(value / rows[low]), abs=0.1)
    across = {position: x for (_, position), (x, _) in places.items()}
    steps = {round((x - across[max(across)]) / (p - max(across)), 2) for p, x in across.items() if p < max(across)}
    assert len(steps) == 1


def test_panels_have_a_line_per_matrix_at_its_singular_values(folder, found):
    matrices = pd.read_parquet(folder / "spectra.parquet")
    one = found.subjects[0]
    figure = panels.by_kind(one, "x")
    tips = {mark.get("data-tip"): mark for mark in marks(figure)}
    assert len(tips) == 12 and len([t for t in texts(figure) if t.endswith("_proj")]) == 4
    points = {}
    for row in matrices[matrices["delta"] == "lora-r4"].itertuples():
        values = sorted(row.singular_values, reverse=True)
        tip = f"lora-r4, block {row.depth}, {row.module}: largest {values[0]:.3g}, smallest {values[-1]:.3g} of 4"
        path = next(tips[tip].iter(f"{SVG}path")).get("d")
        numbers = [float(number) for number in re.findall(r"-?[\d.]+", path)]
        if row.module == "q_proj":
            points |= dict(zip(values, numbers[1::2], strict=True))
    least, most = min(points), max(points)
    scale = (points[most] - points[least]) / math.log(most / least)
    assert all(y == pytest.approx(points[least] + scale * math.log(v / least), abs=0.05) for v, y in points.items())
    assert scale < 0


def test_subspaces_of_a_pair_are_medians_by_block_beside_luck(folder, found):
    shares = pd.read_parquet(folder / "overlaps.parquet")
    shares["depth"] = [int(layer.split(".")[2]) for layer in shares["layer"]]
    (figure,) = subspaces.of_deltas(found, "x")
    for way in ("left", "right"):
        for depth, value in shares.groupby("depth")[way].median().items():
            assert any(
                mark.get("data-tip") == f"{way}, block {depth}: {value:.3f} in common (median over its layers)"
                for mark in marks(figure)
            )
    assert "what two random subspaces have in common (0.100)" in figure.caption  # rank 4 in 40 dimensions


def test_shares_inside_the_bases_leading_directions_are_medians_by_kind(folder, found):
    matrices = pd.read_parquet(folder / "spectra.parquet")
    matrices = matrices[matrices["problem"] == ""]
    tips = [mark.get("data-tip") for mark in marks(subspaces.with_base(found, "x"))]
    groups = matrices.groupby(["delta", "module"])
    assert len(tips) == len(groups) == 8
    for (delta, module), rows in groups:
        middle = {side: rows[f"overlap_{side}"].median() for side in ("both", "left", "right")}
        (tip,) = (tip for tip in tips if tip.startswith(f"{delta}, {module}: {middle['both']:.3g} of the energy"))
        assert tip.endswith(f"; left {middle['left']:.3g}; right {middle['right']:.3g}")


def test_three_deltas_have_a_map_of_pairs(tmp_path):
    made = make_inside(tmp_path / "three", deltas={"a": 0.5, "b": 1.0, "c": 2.0}, depth=1)
    shares = pd.read_parquet(made / "overlaps.parquet")
    drawn = subspaces.of_deltas(Inside(read_spectra(made)), "x")
    left = drawn[0]
    mean = shares[(shares["delta_a"] == "a") & (shares["delta_b"] == "c")]["left"].mean()
    found = [mark for mark in marks(left) if mark.get("data-tip").startswith(f"a and c: {mean:.3f}")]
    assert len(found) == 2, "on both sides of the diagonal"
    (one, two) = (box(mark) for mark in found)
    assert one[0] < two[0] and one[1] > two[1]


# Over steps


def test_of_a_run_the_last_checkpoint_speaks_and_the_others_are_on_the_curves(chained):
    page = Page(write(chained).read_text(encoding="utf-8"))
    found = Inside(read_spectra(chained))
    assert [model.name for model in found.models] == ["run"]
    assert "the last stands for the run; the 2 others are in the trajectories" in page.words
    vectors = pd.read_parquet(chained / "intruders.parquet")
    counts = vectors.groupby("delta")["intruder"].sum()
    figure = next(f for f in trajectories.of_chains(found, "x") if f.title == "Intruders in all matrices")
    said = [mark.get("data-tip") for mark in marks(figure)]
    steps = {10: "run step 10", 20: "run step 20", 40: "run"}
    assert len(said) == 3
    for tip, (step, name) in zip(said, steps.items(), strict=True):
        assert re.match(rf"run, step {step}: {counts[name]} intruders? in \d matrices", tip)
    xs = [place(mark)[0] for mark in marks(figure)]
    assert (xs[2] - xs[0]) / (xs[1] - xs[0]) == pytest.approx(3.0, abs=0.01)
    assert figure.caption == "k = 6, ε = 0.5."


def test_the_largest_intruder_is_the_one_whose_value_is_largest(chained):
    vectors = pd.read_parquet(chained / "intruders.parquet")
    mine = vectors[vectors["delta"] == "run"]
    value, said = trajectories.counted(mine)["value"]
    rows = mine[mine["intruder"]]
    best = max(rows.itertuples(), key=lambda row: row.relative_value)
    assert value == best.relative_value and said == f", {best.layer}, position {best.position}"
    nothing = trajectories.counted(mine[mine["cosine_low"] > 0.9].assign(intruder=False))
    assert nothing["intruders"][0] == 0 and nothing["energy"][0] == 0 and math.isnan(nothing["value"][0])


def test_links_of_a_chain_are_shown_side_by_side_and_over_links(tmp_path):
    told = {f"cola link {i}": {"link": i, "path": f"r/cola/links/link-{i}"} for i in (1, 2, 3)} | {
        "cola": {"path": "r/cola"}
    }
    made = make_inside(tmp_path / "links", deltas=dict.fromkeys(told, 1.0), depth=1, told=told)
    found = Inside(read_spectra(made))
    assert [model.name for model in found.models] == list(told)
    (chain,) = found.chains
    assert (chain.label, chain.way, [x for x, _ in chain.places]) == ("cola", "link", [1, 2, 3])
    figure = trajectories.of_chains(found, "x")[0]
    assert "link of the chain" in texts(figure)


# Odd folders


def test_no_intruder_anywhere(tmp_path):
    page = Page(write(make_inside(tmp_path / "weak", deltas={"weak": 1e-3}, depth=1)).read_text(encoding="utf-8"))
    assert "What is inside the delta" in page.words
    assert "No intruder in its 4 matrices (k = 6, ε = 0.5)" in page.words
    assert "Where the intruders are" not in page.words and "Every intruder" not in page.words
    assert "Leading singular values of the tuned weights" in page.words, "a delta alone is not named in every title"


def test_no_matrix_could_be_measured(tmp_path):
    made = make_inside(tmp_path / "spoiled", deltas={"bad": 1.0}, depth=1)
    for layer, _, _ in layers(1):
        spoil(made, "bad", layer, "numbers that are not finite")
    page = Page(write(made).read_text(encoding="utf-8"))
    assert "None of its matrices could be measured." in page.words
    assert len(page.table("matrix", "delta", "why")) == 5


def test_a_zero_delta_of_a_name_that_is_markup(tmp_path):
    name = "<script>alert('x')</script>"
    found = read_spectra(make_inside(tmp_path / "zero", deltas={name: 1.0}, depth=1))
    nothing = ["rank90", "rank90_share", "effective_rank", "stable_rank", "frobenius", "spectral", "relative_norm"]
    nothing += ["intruders", "intruder_energy", "intruder_values"]
    unknown = ["overlap_left", "overlap_right", "overlap_both"]
    matrices = found.matrices.assign(**dict.fromkeys(nothing, 0.0), **dict.fromkeys(unknown, np.nan))
    matrices["singular_values"] = [[0.0] * 4] * len(matrices)
    vectors = found.vectors.assign(intruder=False, cosine_low=1.0, cosine_high=1.0)
    Spectra(matrices, vectors, found.overlaps, found.facts).write(tmp_path / "zero")
    text = write(tmp_path / "zero").read_text(encoding="utf-8")
    assert "No intruder in its 4 matrices" in Page(text).words
    assert "A change needs 0 of 4 directions" in Page(text).words
    assert "<script>alert" not in text and "&lt;script&gt;alert" in text


def test_more_vectors_asked_for_than_a_matrix_has(tmp_path):
    made = make_inside(tmp_path / "small", deltas={"a": 2.0}, depth=1, k=6)
    found = read_spectra(made)
    asked = Spectra(found.matrices, found.vectors, found.overlaps, {**found.facts, "k": 50})
    table = intruders.counts(Inside(asked), "a")
    assert table["k"].max() == 6
    assert Inside(asked).setting == "k = 50, ε = 0.5"


def test_many_deltas_are_in_the_table_and_the_first_in_the_figures(tmp_path):
    names = {f"delta-{i}-of-a-very-long-name": 0.3 + 0.2 * i for i in range(10)}
    made = make_inside(tmp_path / "many", deltas=names, depth=1, width=24)
    found = Inside(read_spectra(made))
    assert [model.name for model in found.models] == list(names)[:8]
    table = inside.summary_rows(found)
    assert [delta for delta, _, _ in table.rows] == list(names)
    told = inside._more(found)
    assert "the first 8 deltas; 2 more are in the tables" in told and "first 4" in told
    assert len({owner["colour"] for owner in (inside.owner(found, name) for name in names)}) == 9
    for label in (short(name) for name in names):
        assert len(label) == 22


def test_kinds_of_layer_are_as_short_as_they_can_be():
    def of(*names):
        parts = [name.split(".") for name in names]
        depths = [next((int(p) for p in part if p.isdecimal()), -1) for part in parts]
        table = pd.DataFrame({"delta": "a", "layer": names, "module": [p[-1] for p in parts], "depth": depths})
        return kinds(table).tolist()

    assert of("model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.q_proj", "lm_head") == [
        "q_proj",
        "q_proj",
        "lm_head",
    ]
    assert of("encoder.layer.0.attention.output.dense", "encoder.layer.0.output.dense") == [
        "attention.output.dense",
        "output.dense",
    ]
    assert of("encoder.block.0.layer.0.SelfAttention.q", "decoder.block.0.layer.0.SelfAttention.q") == [
        "encoder.block.#.layer.0.SelfAttention.q",
        "decoder.block.#.layer.0.SelfAttention.q",
    ]
    experts = [f"model.layers.0.mlp.experts.{i}.up_proj" for i in range(60)]
    assert set(of(*experts)) == {"up_proj"}, "too many to have a row each"
