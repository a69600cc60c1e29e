"""The README's commands are executed, its links lead somewhere, and the tables of the docs are complete."""

import json
import re
import shlex
from pathlib import Path

import pytest

from little_world import loralab, make_world

ROOT = Path(__file__).parents[2]
DOCS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def commands(text: str) -> list[str]:
    """Take the `loralab …` lines out of indented code; a backslash at the end continues the line."""
    joined = re.sub(r"\\\n\s+", "", text)
    return [line.strip() for line in joined.splitlines() if line.startswith("    loralab ")]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_world(tmp_path_factory.mktemp("readme"))


def test_every_command_of_the_readme_runs(world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(world)
    found = commands((ROOT / "README.md").read_text(encoding="utf-8"))
    assert len(found) >= 5
    small = ["data.max_length=64", "train.steps=2", "train.batch_size=2", "model.device=cpu"]
    (world / "general.txt").write_text("a quiet day. " * 40)
    sums = ({"question": f"one more than {i} is", "answer": str(i + 1)} for i in range(20))
    (world / "gsm8k.jsonl").write_text("".join(json.dumps(row) + "\n" for row in sums))
    pairs = [{"prompt": f"say {i}:", "chosen": f" {i}", "rejected": " no"} for i in range(20)]
    (world / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in pairs))
    (world / "prompts.jsonl").write_text("".join(json.dumps({"prompt": row["prompt"]}) + "\n" for row in pairs))
    (world / "score.py").write_text("def score(prompts, answers, rows):\n    return [len(a) for a in answers]\n")
    suite = forgetting_files(world)
    for command in found:
        words = [w.replace("FOLDER", str(world / "base")) for w in shlex.split(command)[1:]]
        words = [re.sub(r"runs/\S+-[0-9a-f]{8}$", lambda run: str(run_like(world / run[0])), w) for w in words]
        if words[0] in ("train", "check"):
            words += small + (["objective.max_tokens=4", "objective.samples=2"] if words[1].startswith("rl-") else [])
        if "forgetting" in words:
            words += [word for task, file in suite.items() for word in ("--data", f"{task}={file}")]
        assert loralab(*words) == 0, command


def forgetting_files(folder: Path) -> dict[str, Path]:
    """Write two rows for each task of the suite `forgetting`, in the columns of its data set on the hub."""
    ending = {
        "activity_label": "Rain",
        "ctx_a": "It rains.",
        "ctx_b": "the cat",
        "endings": ["runs.", "is wet.", "a", "b"],
    }
    choice = {"question": "What is wet?", "choices": {"text": ["rain", "sand"], "label": ["A", "B"]}, "answerKey": "A"}
    blank = {"sentence": "The cat saw the dog as _ ran.", "option1": "cat", "option2": "dog", "answer": "2"}
    found = {}
    for task, row in {"hellaswag": {**ending, "label": "1"}, "arc_challenge": choice, "winogrande": blank}.items():
        found[task] = folder / f"{task}.jsonl"
        found[task].write_text(2 * (json.dumps(row) + "\n"))
    return found


def run_like(path: Path) -> Path:
    """Give the first run that has the same name before the hash."""
    name = path.name.rpartition("-")[0]
    found = [run for run in path.parent.iterdir() if run.name.rpartition("-")[0] == name]
    return min(found, key=lambda run: run.stat().st_ctime_ns)


def test_links_lead_to_files() -> None:
    for page in DOCS:
        for target in re.findall(r"\]\(([^)#]+)\)", page.read_text(encoding="utf-8")):
            if not target.startswith("http"):
                assert (page.parent / target).exists(), f"{page.name}: {target}"


def test_every_method_stands_in_the_tables() -> None:
    from loralab.methods import METHODS

    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    papers = (ROOT / "docs/papers.md").read_text(encoding="utf-8")
    for name in METHODS:
        assert f"`{name}`" in readme, name
        assert f"methods/{name}.py" in papers, name


def test_every_shipped_recipe_stands_in_the_readme() -> None:
    from loralab.spec.recipes import shipped

    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    for name, _ in shipped():
        assert f"`{name}`" in readme, name


def test_every_file_that_the_papers_table_names_exists() -> None:
    for name in re.findall(r"`([a-z_]+/[a-z_]+\.py)`", (ROOT / "docs/papers.md").read_text(encoding="utf-8")):
        assert (ROOT / "src/loralab" / name).is_file(), name
