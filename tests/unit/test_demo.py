"""The demo in miniature: its specs are fair, its story is told, and its page stands."""

import re
import shlex
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path

import pytest

from little_world import loralab
from loralab.demo import ARMS, STEPS, TASKS, spec, tell
from loralab.pocket.world import rows, suite
from loralab.report.compare import compare
from loralab.report.read import runs_below
from loralab.report.verdict import verdict
from loralab.run.folder import RunFolder

SMALL = [
    "data.validation=pocket:calc/validation?items=6",
    "data.general=pocket:source/validation?items=10",
    "probes.tokens=512",
    "probes.every=2",
    "probes.target.0.items=4",
    "probes.source.0.items=1",
    "probes.samples=1",
]
"""What makes a run of the demo short."""


@pytest.mark.parametrize("task", TASKS)
def test_ways_to_teach_differ_in_nothing_but_method_and_rate(task):
    specs = {arm: spec(task, arm) for arm in ARMS}
    kept = {
        arm: {key: value for key, value in made.model_dump(mode="json").items() if key not in ("name", "method")}
        for arm, made in specs.items()
    }
    for plain in kept.values():
        plain["optimizer"].pop("learning_rate")
    assert len({repr(plain) for plain in kept.values()}) == 1
    assert len({made.hash8 for made in specs.values()}) == len(ARMS)
    assert {made.method.name for made in specs.values()} == {"full", "lora", "lora_plus", "cola"}
    assert {made.train.steps for made in specs.values()} == {STEPS}


def test_each_way_is_what_its_name_says():
    ranks = {arm: getattr(spec("calc", arm).method, "rank", None) for arm in ARMS}
    assert {arm: str(rank) for arm, rank in ranks.items() if rank} == {
        arm: match[0] for arm in ARMS if (match := re.search(r"\d+$", arm))
    }
    assert spec("calc", "cola-3x4").method.links == 3


@pytest.mark.parametrize("task", TASKS)
def test_what_is_graded_was_neither_trained_nor_validated_on(task):
    made = spec(task, "full")
    (train,), (validation,), (graded,) = made.data.train, made.data.validation, made.probes.target
    read, held_out = ({row.get("text") or row["prompt"] for row in rows(source.path)} for source in (train, validation))
    prompts = tuple({item.prompt for item in suite(graded.path, graded.items)})
    assert len(read) > 1000 and len(held_out) > 50 and len(prompts) > 50
    assert not read & held_out
    assert [text for text in read | held_out if text.startswith(prompts)] == []


@pytest.fixture(scope="module")
def story(tmp_path_factory) -> tuple[Path, str]:
    """Tell the story once; give its folder and what was said."""
    out = tmp_path_factory.mktemp("demo") / "story"
    return out, told(out)


def told(out: Path) -> str:
    said = StringIO()
    with redirect_stdout(said):
        page = tell(out, steps=2, tasks=["calc"], arms=["full", "lora-r4"], changes=SMALL)
    assert page == out / "report.html"
    return said.getvalue()


def folders(out: Path) -> dict[str, RunFolder]:
    return {path.name.rpartition("-")[0]: RunFolder(path) for path in out.iterdir() if path.is_dir()}


def test_the_story_says_how_each_run_ended(story):
    out, said = story
    assert sorted(folders(out)) == ["calc-full", "calc-lora-r4"]
    for name, folder in folders(out).items():
        assert folder.read_status()["state"] == "done"
        assert f"{name.replace('-', ' ', 1)}: done, step 2/2" in said
    assert len({folder.read_status()["tokens"] for folder in folders(out).values()}) == 1, "equal tokens"


def test_the_story_ends_with_results_verdict_and_page(story):
    out, said = story
    (comparison,) = compare(runs_below(out))
    judged = verdict(comparison)
    plain = " ".join(said.split())
    for part in (judged.learned, judged.forgot, judged.limit, f"The page: {out / 'report.html'}"):
        assert " ".join(part.split()) in plain
    table = said[said.index(f"\n{comparison.name}\n") :]
    assert all(comparison.label(run) in table for run in comparison.finished)
    page = (out / "report.html").read_text(encoding="utf-8")
    assert all(folder.path.name in page for folder in folders(out).values())


def test_the_story_told_again_runs_nothing(story):
    out, said = story
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*") if path.parent != out}
    page = (out / "report.html").read_bytes()
    again = told(out)
    assert again.splitlines()[-3:] == said.splitlines()[-3:]
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*") if path.parent != out} == before
    assert (out / "report.html").read_bytes() == page


def test_the_command_that_the_story_ends_with_runs(story, tmp_path):
    (line,) = [line for line in story[1].splitlines() if line.startswith("Next: ")]
    small = ["data.train=pocket:stack?items=200", "train.steps=1", "train.batch_size=2", "probes.target.0.items=2"]
    words = shlex.split(line.removeprefix("Next: "))
    assert words[0] == "loralab"
    assert loralab(*words[1:], *small, "probes.tokens=512", "--runs", tmp_path) == 0
