"""The page of an evaluation: every part, its numbers those of the folder, honest about ties, safe, the same each time."""

import json
import re
import subprocess
import sys
from xml.etree import ElementTree

import pytest

from evaluation_world import DELTAS, TASKS, make_evaluation, write_evaluation
from little_world import loralab
from loralab.errors import FolderError
from loralab.lab.evaluation import Evaluation, Measured, read_evaluation
from loralab.report import changes
from loralab.report.evaluation import render
from loralab.report.page import write
from loralab.report.transitions import bar_of_change, bar_of_items, examples, written
from page_reader import Page


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_evaluation(tmp_path_factory.mktemp("page") / "evaluation")


@pytest.fixture(scope="module")
def found(folder):
    return read_evaluation(folder)


@pytest.fixture(scope="module")
def html(folder):
    return write(folder).read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def page(html):
    return Page(html)


def test_the_page_has_every_part(page):
    for said in (
        "Before and after",
        "What changed: learned to the right, forgotten to the left",
        "Every change with its interval and p-value",
        "Item by item",
        "newly lost",
        "Many samples per problem",
        "How different the samples are",
        "Tasks and their versions",
        "What this page cannot tell",
    ):
        assert said in page.words


def test_the_verdict_of_each_delta_names_what_it_learned_and_forgot(page, found):
    base, tuned = (found.find(model, "gsm8k/exact_match").score.value for model in ("base", "full"))
    assert f"Learned: gsm8k/exact_match +{tuned - base:.3f} ({base:.3f} → {tuned:.3f})." in page.words
    assert page.words.count("Forgotten: forgetting (mean of 3) −") == len(DELTAS), "the suite comes first"
    assert "It learned nothing that can be told from zero." in page.words, "cola"
    assert "A tie with the base: hellaswag/acc, arc_challenge/acc_norm and gsm8k/exact_match." in page.words


def test_the_table_holds_the_scores_of_the_folder(page, found):
    table = page.table("task", "base")
    assert table[0] == ["task", "base", *DELTAS]
    rows = {row[0]: row for row in table[1:]}
    assert list(rows) == [*TASKS, "wikitext/word_loss", "forgetting (mean of 3)"]
    for name in TASKS:
        assert rows[name][1].startswith(f"{found.find('base', name).score.value:.3f} ±")
        for column, delta in enumerate(DELTAS, start=2):
            one = found.find(delta, name)
            mark = {"learned": "▲", "forgotten": "▼", "tie": "tie"}[found.verdicts()[delta, name].word]
            moved = f"{one.change['value']:+.3f}".replace("-", "−")
            assert rows[name][column] == f"{one.score.value:.3f}{mark} {moved}"
    assert "▼ +" in rows["wikitext/word_loss"][2], "a loss that rises is forgetting"


def test_every_change_stands_there_with_interval_and_p(page, found):
    table = page.table("task", "delta", "verdict")
    assert len(table) - 1 == sum(one.change is not None for one in found.measured)
    row = next(row for row in table if row[:2] == ["arc_challenge/acc_norm", "full"])
    change = found.find("full", "arc_challenge/acc_norm").change
    low, high = (f"{end:+.3f}".replace("-", "−") for end in change["interval"])
    assert row[6:9] == [f"[{low}, {high}]", str(change["lost"]), str(change["won"])]


def test_items_that_changed_sides_add_up(page, found):
    table = page.table("task", "delta", "items")
    assert len(table) - 1 == len(TASKS) * len(DELTAS)
    row = next(row for row in table if row[:2] == ["winogrande/acc", "full"])
    change = found.find("full", "winogrande/acc").change
    assert row[3] == f"{change['lost']} ({100 * change['lost'] / 300:.1f} %)"
    assert row[4] == "0 %" or row[4].startswith(f"{100 * change['lost_above_chance']:.1f}")
    answers = next(row for row in table if row[:2] == ["gsm8k/exact_match", "full"])
    assert (answers[4], answers[6]) == ("–", "–"), "nothing to guess, nothing to correct"
    said = [facts["aria-label"] for tag, facts in page.tags if facts.get("class") == "parts"]
    assert len(said) == len(table) - 1
    for text in said:
        *parts, whole = (int(number) for number in re.findall(r"\d+", text))
        assert sum(parts) == whole


def test_examples_are_shown_as_text_with_what_both_wrote(html, page, found):
    assert "<script>alert" not in html and "<b>the" not in html
    assert "<script>alert(1)</script> 12" in page.words and "<b>the surgeon</b>" in page.words
    assert "right answer" in page.words and "✓ right" in page.words and "✗ wrong" in page.words
    change = found.find("full", "hellaswag/acc_norm").change
    assert f"hellaswag/acc_norm: {change['lost']} newly lost" in page.words
    assert f"{change['lost'] - 12} others stand in items.parquet" in page.words
    assert "hellaswag/acc: " not in page.words, "one score of a task is enough for examples"


def test_versions_and_hashes_stand_there(page, found):
    table = page.table("task", "version")
    one = found.find("base", "gsm8k/exact_match")
    row = next(row for row in table if row[0] == one.name)
    assert row == [one.name, "1.0", "5", "200", "–", "share of items", one.prompt_hash[:16], one.template_hash[:16]]
    for delta, facts in found.facts["deltas"].items():
        assert facts["fingerprint"] in page.words and facts["path"] in page.words and delta in page.words
    assert "412 forwards over 81,250 tokens" in page.words and "3.2 times as many" in page.words
    assert "loralab evaluate org/tiny-3M --delta 'two words'" in page.words and "lm-eval 0.4.13" in page.words


def test_the_machine_is_described_but_not_named(html):
    assert "Linux-x86_64, 2 cores, 8.0 GiB memory" in html and "a-secret-host" not in html


def test_rebuilt_it_is_the_same_file_and_needs_no_network(folder, html, page, tmp_path):
    program = "import sys; from loralab.report.page import write; write(sys.argv[1], sys.argv[2])"
    subprocess.run([sys.executable, "-c", program, str(folder), str(tmp_path / "again.html")], check=True, cwd=tmp_path)
    assert (tmp_path / "again.html").read_text(encoding="utf-8") == html
    links = [v for _, facts in page.tags for k, v in facts.items() if k in ("src", "href", "xlink:href", "action")]
    assert links and all(link.startswith(("#", "data:")) for link in links)
    ids = re.findall(r'\sid="([^"]+)"', html)
    assert len(ids) == len(set(ids))


def test_a_table_that_is_wider_than_a_phone_can_be_scrolled_and_reached(page):
    wide = [facts for tag, facts in page.tags if facts.get("class") == "scroll"]
    assert len(wide) == sum(tag == "table" and "answers" not in facts.get("class", "") for tag, facts in page.tags)
    assert all(facts["tabindex"] == "0" and facts["role"] == "region" and facts["aria-label"] for facts in wide)


def test_the_command_writes_it(folder, tmp_path, capsys, html):
    assert loralab("report", folder, "--out", tmp_path / "page.html") == 0
    assert str(tmp_path / "page.html") in capsys.readouterr().out.replace("\n", "")
    assert (tmp_path / "page.html").read_text(encoding="utf-8") == html


def test_a_damaged_evaluation_is_refused(tmp_path, capsys):
    folder = write_evaluation(tmp_path / "e", deltas=("cola",))
    (folder / "items.parquet").write_bytes(b"PAR1")
    with pytest.raises(FolderError, match=r"damaged"):
        write(folder)
    assert loralab("report", folder) == 2
    assert "items.parquet" in capsys.readouterr().err and not (folder / "report.html").exists()


def test_a_base_alone_has_a_page():
    words = Page(render(make_evaluation(deltas=()), "alone")).words
    assert "No delta was given" in words and "Scores" in words
    assert "Item by item" not in words and "Every change" not in words


ODD = [
    {},
    {"suites": 3, "deltas": [1], "environment": "x", "cost": 7, "limit": "x"},
    {"suites": {"forgetting": None}, "deltas": {"full": 3}, "environment": {"packages": [1], "command": "x"}},
    {"cost": {"forwards": "x", "tokens": 0, "plain_tokens": 5}, "fingerprint": 3, "model": None},
]


@pytest.mark.parametrize("facts", ODD)
def test_odd_facts_are_no_traceback(found, facts):
    odd = Evaluation(found.models, found.measured[:12], [], facts, [{"model": 3}], [{"task": None}])
    assert "What this page cannot tell" in render(odd, "odd")
    assert odd.notes() == []


def test_an_empty_evaluation_has_a_page():
    assert "What this page cannot tell" in render(Evaluation(["base", "a"], []), "empty")


# Bars and examples


def test_a_bar_counts_what_became_of_the_items():
    bar = bar_of_items([1, 1, 1, 0, 0, 1.0], [1, 0, 1, 1, 0, 0.0])
    assert (bar.kept, bar.lost, bar.won, bar.missed, bar.n) == (2, 2, 1, 1, 6)
    assert [name for name, *_ in bar.parts] == ["won", "kept", "lost", "missed"]
    assert sum(float(width) for _, _, width, _ in bar.parts) == pytest.approx(100, abs=0.01)
    assert bar.said == "1 newly won, 2 kept right, 2 newly lost, 1 kept wrong of 6"


def test_a_recorded_change_and_its_items_give_the_same_bar(found):
    for delta in DELTAS:
        for name in TASKS:
            rows = [row for row in found.items if (row["model"], row["probe"]) == (delta, name)]
            counted = bar_of_items([row["base_right"] for row in rows], [row["tuned_right"] for row in rows])
            bar = bar_of_change(found.find(delta, name).change)
            assert (bar.won, bar.kept, bar.lost, bar.missed) == (
                counted.won,
                counted.kept,
                counted.lost,
                counted.missed,
            )


@pytest.mark.parametrize("change", [None, {}, {"value": 0.1, "n": 5}, {"lost": 1, "won": 2, "before": 0.5, "n": 0}])
def test_a_change_without_counts_has_no_bar(change):
    assert bar_of_change(change) is None


def test_examples_are_few_and_the_rest_is_counted():
    rows = [{"item": i, "prompt": "p" * 900, "reference": None} for i in range(30)]
    made = examples("a/acc", "lost", rows)
    assert (made.count, len(made.cards) + len(made.listed) + made.unseen) == (30, 30)
    assert [item["item"] for item in [*made.cards, *made.listed]] == list(range(len(made.cards) + len(made.listed)))
    assert len(made.listed[0]["prompt"]) < len(made.cards[0]["prompt"]) < 900


def test_a_p_value_is_never_written_as_zero():
    assert [written(p) for p in (None, 1e-9, 0.0031, 0.25)] == ["–", "< 0.0001", "0.0031", "0.250"]


# Figures


def marks(svg):
    return [e for e in ElementTree.fromstring(svg).iter() if e.get("class") == "mark"]


@pytest.fixture(scope="module")
def drawn(found):
    return changes.figures(found)


def test_figures_show_every_score_and_the_keyboard_reaches_them(found, drawn):
    titles = [figure.title for figure in drawn]
    assert titles[0] == "Before and after: share of items" and titles[2] == "Before and after: nats/word"
    shares, moved, *_ = drawn
    names = [*TASKS, "forgetting"]
    assert len(marks(shares.svg)) == len(names) * 4 and len(marks(moved.svg)) == len(names) * 3
    for figure in drawn:
        for mark in marks(figure.svg):
            assert mark.get("tabindex") == "0" and mark.get("aria-label") == mark.get("data-tip")
            assert mark.get("data-run") == mark.get("data-method") and mark.get("data-run") in found.models


def test_a_mark_of_a_change_says_what_it_comes_to(found, drawn):
    tips = [mark.get("data-tip") for mark in marks(drawn[1].svg)]
    change = found.find("full", "winogrande/acc").change
    low, high = (f"{end:+.3f}".replace("-", "−") for end in change["interval"])
    value = f"{change['value']:+.3f}".replace("-", "−")
    assert f"full, winogrande/acc: forgotten {value} (95\xa0%: {low} to {high})" in tips
    assert sum(": tie " in tip for tip in tips) == sum(
        verdict.word == "tie" for (_, name), verdict in found.verdicts().items() if name != "wikitext/word_loss"
    )


def test_a_loss_that_rises_lies_on_the_forgotten_side(drawn):
    places = {}
    for mark in marks(drawn[3].svg):
        assert ": forgotten +" in mark.get("data-tip")
        places[mark.get("data-run")] = float(next(mark.iter("{http://www.w3.org/2000/svg}use")).get("x"))
    assert places["full"] < places["lora-r8"] < places["cola"], "the more forgotten, the farther left"


def test_of_many_tasks_those_that_changed_most_are_drawn():
    def score(i, model, change=None):
        from loralab.evals.stats import Score

        return Measured(f"task{i}", "acc", model, Score(f"task{i}/acc", 0.5, "share of items", 50, 0.05), change)

    many = [score(i, "base") for i in range(60)]
    many += [
        score(i, "d", {"value": i / 100, "standard_error": 0.01, "interval": None, "p_value": 0.5}) for i in range(60)
    ]
    levels, moved = changes.figures(Evaluation(["base", "d"], many))
    assert len(marks(moved.svg)) == changes.MOST_ROWS and "The 20 of 60 scores" in moved.caption
    assert "task59/acc" in moved.svg and "task10/acc" not in moved.svg and levels.caption.endswith("the table has all.")


def test_pass_at_k_is_drawn_for_every_model_and_telling_k(found):
    (figure,) = changes.pass_at_k(found)
    tips = [mark.get("data-tip") for mark in marks(figure.svg)]
    assert len(tips) == 4 * 6
    for row in found.curves:
        assert f"{row['model']}: pass@{row['k']} {row['pass_at_k']:.3f}" in tips
    single = Evaluation(found.models, [], curves=[row for row in found.curves if row["k"] == 1])
    assert changes.pass_at_k(single) == []


def test_names_of_deltas_may_hold_what_they_like(tmp_path):
    base = make_evaluation(deltas=("full",))
    name = "a$b$ <i>&\u00df"
    renamed = [json.loads(json.dumps(one.as_line()).replace('"full"', json.dumps(name))) for one in base.measured]
    found = Evaluation(["base", name], [Measured.of_line(line, "x") for line in renamed])
    html = render(found, "odd <b>name</b>")
    assert "<i>&" not in html and "<b>name" not in html
    assert name in Page(html).words
