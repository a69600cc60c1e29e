"""The page as a whole: complete, honest about what is missing, safe, and the same each time."""

import base64
import hashlib
import json
import re
import subprocess
import sys

import pytest

from loralab.errors import FolderError
from loralab.report.page import write
from loralab.run.folder import RunFolder, keep_lines
from loralab.spec.recipes import read
from page_reader import Page
from report_world import PLANS, SKILLS, make_run, make_sweep, open_run, write_environment


@pytest.fixture(scope="module")
def sweep(tmp_path_factory):
    root = make_sweep(tmp_path_factory.mktemp("page") / "sweep")
    write(root)
    return root


@pytest.fixture(scope="module")
def html(sweep):
    return (sweep / "report.html").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def page(html):
    return Page(html)


def test_the_page_has_every_part(page):
    for heading in (
        "What was learned, what was forgotten",
        "Learning against forgetting",
        "Old skills, one by one",
        "Over training",
        "Inside the change",
        "Answers before and after",
        "What it cost",
        "All scores at the end",
        "Where this comes from",
        "What this page cannot tell",
    ):
        assert heading in page.words
    assert page.words.count("One seed (0)") == 1, "what holds for all comparisons is said once"


def test_a_row_per_run_and_every_value_is_in_the_run_folder(sweep, page):
    table = next(t for t in page.tables if any("base → after" in cell for row in t for cell in row))
    rows = {row[0]: row for row in table[2:]}
    assert set(rows) == {"full", "LoRA r1", "LoRA r4", "LoRA r16", "LoRA+ r8", "COLA 3×r4"}
    (folder,) = sweep.glob("calc/lora-r4-*")
    scores = [json.loads(line) for line in (folder / "scores.jsonl").read_text().splitlines()]
    base = {s["name"]: s["value"] for s in scores if s["model"] == "base"}
    tuned = {s["name"]: s for s in scores if s["model"] == "tuned"}
    row = rows["LoRA r4"]
    for place, role, sign in ((1, "target", 1), (3, "source", -1)):
        before, after = row[place].split(" → ")
        assert before == f"{base[f'{role}/accuracy']:.3f}"
        assert after.split()[0] == f"{tuned[f'{role}/accuracy']['value']:.3f}"
        assert row[place + 1].split()[0] == f"{sign * tuned[f'{role}/accuracy_change']['value']:+.3f}"
    status = json.loads((folder / "status.json").read_text())
    assert row[5] == f"{100 * status['trained_parameters'] / status['all_parameters']:.1f} %"
    assert row[8] == f"{status['wall_s']:.1f} s"


def test_which_skill_was_lost_is_shown(sweep, page):
    table = next(t for t in page.tables if t[0][:2] == ["skill", "base"])
    assert {row[0] for row in table[1:]} == set(SKILLS)
    (folder,) = sweep.glob("calc/full-*")
    scores = [json.loads(line) for line in (folder / "scores.jsonl").read_text().splitlines()]
    found = {s["name"]: s for s in scores if s["model"] == "tuned"}
    for row in table[1:]:
        after, moved = found[f"source/{row[0]}/accuracy"], found[f"source/{row[0]}/accuracy_change"]
        assert row[2].startswith(f"{after['value']:.2f}")
        clear = abs(moved["value"]) > 2.03 * moved["standard_error"]
        assert ("▼" in row[2]) == clear


def test_rebuilt_from_the_same_runs_it_is_the_same_file(sweep, html, tmp_path):
    assert write(sweep, tmp_path / "again.html").read_text(encoding="utf-8") == html
    program = "import sys; from loralab.report.page import write; write(sys.argv[1], sys.argv[2]); print('torch' in sys.modules)"
    command = [sys.executable, "-c", program, str(sweep), str(tmp_path / "other.html")]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=sweep)
    assert done.stdout.strip() == "False", "the report needs no torch"
    assert (tmp_path / "other.html").read_text(encoding="utf-8") == html


def test_the_page_needs_no_network(html, page):
    links = [v for _, facts in page.tags for k, v in facts.items() if k in ("src", "href", "xlink:href", "action")]
    assert links and all(link.startswith(("#", "data:")) for link in links)
    assert set(re.findall(r"https?://[\w./]+", html)) <= {
        "http://www.w3.org/2000/svg",
        "http://www.w3.org/1999/xlink",
    }
    assert not re.search(r"@import|url\((?!#)", html)


def test_only_our_own_script_may_run(html, page):
    (script,) = re.findall(r"<script>(.*?)</script>", html, flags=re.S)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = next(facts["content"] for tag, facts in page.tags if facts.get("http-equiv") == "Content-Security-Policy")
    assert f"script-src 'sha256-{digest}'" in policy and "default-src 'none'" in policy
    assert not any(key.startswith("on") for _, facts in page.tags for key in facts)


def test_what_a_model_wrote_stays_text(html, page):
    assert "alert(1)" in page.words
    assert "<script>alert" not in html and "<b>apple" not in html
    assert "<b>apple</b>" in page.words


def test_right_and_wrong_are_said_in_words(page):
    assert page.words.count("✓ right") > 10 and page.words.count("✗ wrong") > 5


def test_it_says_how_to_repeat_each_run(sweep, page):
    again = re.findall(r"loralab train (sweep/\S+/spec\.yaml) --runs runs-again", page.words)
    assert len(again) == len(set(again)) == 2 * len(PLANS)
    for place in again:
        spec = read(sweep.parent / place)
        assert place.split("/")[2] == spec.folder_name
    assert "loralab train sft-lora data.train=pocket:calc 'name=two words'" in page.words


def test_the_machine_is_described_but_not_named(html):
    assert "Linux-x86_64" in html and "8.0 GiB memory" in html and "torch 2.13.0" in html
    assert "a-secret-host" not in html


def test_a_single_run_has_its_page_inside_its_folder(tmp_path):
    run = make_run(tmp_path, "lora-r4")
    assert write(run) == run / "report.html"
    words = Page((run / "report.html").read_text(encoding="utf-8")).words
    assert "LoRA r4 learned +" in words and "It lost " in words
    assert f"{run.name}/spec.yaml" in words
    assert write(tmp_path) == tmp_path / "report.html", "the page in the run is no obstacle"


def _stop(path):
    folder = RunFolder(path)
    folder.write_status(state="interrupted", step=30, message="stopped after step 30\n  next: go on")
    for file in (folder.metrics, folder.scores):
        keep_lines(file, lambda line: line["step"] <= 30)
    for name in ("items.parquet", "spectra.parquet", "samples.jsonl"):
        (path / name).unlink()


def test_unfinished_and_damaged_runs_are_shown_as_such(tmp_path):
    make_run(tmp_path, "lora-r4")
    _stop(make_run(tmp_path, "full"))
    diverged = open_run(tmp_path, "lora-r16")
    write_environment(diverged, "calc")
    diverged.write_status(state="diverged", step=3, total_steps=60, message="training diverged: the loss is nan")
    open_run(tmp_path, "lora-plus")
    (make_run(tmp_path, "cola") / "spec.yaml").write_text("a: [1")
    words = Page(write(tmp_path).read_text(encoding="utf-8")).words
    assert "LoRA r4 learned +" in words
    for said in (
        "full stopped at step 30 of 60",
        "LoRA r16 diverged at step 3 of 60",
        "LoRA+ r8 not begun",
        "training diverged: the loss is nan",
        "spec.yaml: the file is damaged",
        "the verdict and the planes leave them out",
    ):
        assert said in words


@pytest.mark.parametrize(
    "missing", ["scores.jsonl", "samples.jsonl", "spectra.parquet", "metrics.jsonl", "environment.json"]
)
def test_a_missing_file_leaves_its_section_out(tmp_path, missing):
    run = make_run(tmp_path, "lora-r4")
    (run / missing).unlink()
    words = Page(write(run).read_text(encoding="utf-8")).words
    sections = {"samples.jsonl": "Answers before and after", "spectra.parquet": "Inside the change"}
    sections |= {"metrics.jsonl": "Loss on the training data", "scores.jsonl": "Learning against forgetting"}
    assert sections.get(missing, "SHA-256") not in words
    assert missing != "scores.jsonl" or "What was learned was not measured" in words


def test_runs_that_cannot_be_read_at_all_still_give_a_page(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "metrics.jsonl").write_text("")
    words = Page(write(tmp_path).read_text(encoding="utf-8")).words
    assert "nothing to compare" in words and "spec.yaml: the file is missing" in words


SAMPLE = {"step": 60, "model": "tuned", "role": "x", "skill": "", "prompt": "", "reference": "", "output": ""}
GARBAGE = [
    ("status.json", {"state": 7}),
    ("status.json", {"state": "done", "wall_s": "x", "step": None, "peak_bytes": [1]}),
    ("environment.json", {"inputs": 3, "command": "x", "packages": [1]}),
    ("environment.json", {"inputs": {"base": 1, "data": [2]}, "command": [], "data_report": {"train": 3}}),
    ("samples.jsonl", {"step": 1}),
    ("samples.jsonl", SAMPLE),
    ("metrics.jsonl", {"step": 1, "loss": 2.0}),
    ("metrics.jsonl", {"step": 2, "loss": None}),
]


@pytest.mark.parametrize(("file", "content"), GARBAGE)
def test_odd_values_are_no_traceback(tmp_path, file, content):
    run = make_run(tmp_path, "lora-r4")
    (run / file).write_text(json.dumps(content) + "\n")
    assert "What this page cannot tell" in write(run).read_text(encoding="utf-8")


@pytest.mark.parametrize("column", ["rank", "rank90", "singular_values", "depth", "module"])
def test_odd_spectra_are_no_traceback(tmp_path, column):
    import pandas as pd

    run = make_run(tmp_path, "lora-r4")
    table = pd.read_parquet(run / "spectra.parquet")
    table[column] = [[]] * len(table) if column == "singular_values" else None
    table.to_parquet(run / "spectra.parquet")
    assert "What this page cannot tell" in write(run).read_text(encoding="utf-8")


def test_the_page_is_not_written_over_a_folder(tmp_path):
    run = make_run(tmp_path, "full")
    with pytest.raises(FolderError, match="is a folder"):
        write(run, tmp_path)
    assert write(run, tmp_path / "page.html").is_file()
    assert not (run / "report.html").exists()
