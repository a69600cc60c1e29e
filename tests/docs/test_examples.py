"""The examples run as a newcomer runs them: a process of its own, in an empty folder, with a few keys on the command line."""

import os
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest

from loralab.run.folder import RunFolder, read_lines
from loralab.spec.recipes import read

ROOT = Path(__file__).parents[2]
SMALL = [
    "train.steps=2",
    "data.train=pocket:calc?items=20",
    "data.validation=pocket:calc/validation?items=6",
    "data.general=pocket:source/validation?items=10",
    "probes.every=2",
    "probes.tokens=512",
    "probes.target.0.items=4",
    "probes.source.0.items=1",
]


def run(name: str, folder: Path, *overrides: str) -> str:
    """Run an example in a folder; give what it said, checked to be all that it said."""
    command = [sys.executable, str(ROOT / "examples" / name), *SMALL, *overrides]
    quiet = {**os.environ, "PYTHONWARNINGS": "error", "TRANSFORMERS_VERBOSITY": "error"}
    done = subprocess.run(command, cwd=folder, env=quiet, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "Warning" not in done.stderr and "Traceback" not in done.stderr
    return done.stdout


def after(said: str, line: str) -> list[str]:
    """Give the paragraph that begins with a line."""
    paragraph = said[said.index(f"{line}\n") + len(line) + 1 :].partition("\n\n")[0]
    return paragraph.splitlines()


@pytest.fixture(scope="module")
def finetuned(tmp_path_factory) -> tuple[Path, str]:
    folder = tmp_path_factory.mktemp("finetune")
    return folder, run("finetune.py", folder)


def test_finetune_leaves_one_finished_run_with_model_and_page(finetuned):
    folder, said = finetuned
    (path,) = (folder / "runs").iterdir()
    assert [item.name for item in folder.iterdir()] == ["runs"]
    assert RunFolder(path).read_status()["state"] == "done"
    for name, place in (("delta", "delta"), ("model", "merged"), ("page", "report.html")):
        assert (path / place).exists()
        assert f"{name}:" in said and f"runs/{path.name}/{place}\n" in said


def test_finetune_shows_what_stands_in_the_folder(finetuned):
    folder, said = finetuned
    (path,) = (folder / "runs").iterdir()
    last = {line["name"]: line for line in read_lines(path / "scores.jsonl")}
    shown = {cells[0]: cells[1:] for line in said.splitlines() if (cells := line.split()) and cells[0] in last}
    for name in ("target/loss", "target/accuracy", "general/loss", "source/accuracy", "drift/kl"):
        assert float(shown[name][1]) == pytest.approx(last[name]["value"], abs=6e-4)
        assert int(shown[name][-1]) == last[name]["n"]
    drop = min(v["value"] for n, v in last.items() if n.count("/") == 2 and n.endswith("/accuracy_change"))
    assert float(after(said, "old skills, the worst first:")[0].split()[1]) == pytest.approx(drop, abs=6e-3)
    spectra = pd.read_parquet(path / "spectra.parquet")
    assert {line.split()[0] for line in said.splitlines() if line.split()[1:]} >= set(spectra["module"])


def test_the_merged_model_answers_as_the_tuned_one_did(finetuned):
    folder, said = finetuned
    (path,) = (folder / "runs").iterdir()
    tuned = [
        line for line in read_lines(path / "samples.jsonl") if (line["model"], line["role"]) == ("tuned", "target")
    ]
    (answered,) = after(said, "the merged model, by Transformers alone:")
    assert answered.strip().startswith(f"{tuned[0]['prompt']}{tuned[0]['output']}")


def test_finetune_again_only_shows(finetuned):
    folder, said = finetuned
    before = {path: path.stat().st_mtime_ns for path in (folder / "runs").rglob("*.safetensors")}
    again = run("finetune.py", folder)
    assert {path: path.stat().st_mtime_ns for path in (folder / "runs").rglob("*.safetensors")} == before
    assert [part for part in said.split("\n\n") if not part.startswith("merged:")] == again.split("\n\n")


def test_compare_shows_every_run_and_names_the_frontier(tmp_path):
    said = run("compare.py", tmp_path)
    runs = [RunFolder(path) for path in (tmp_path / "runs/compare").iterdir() if path.is_dir()]
    assert [run.read_status()["state"] for run in runs] == ["done"] * 6
    assert len({run.read_status()["tokens"] for run in runs}) == 1
    assert "6 of 6 runs done" in said
    (head,) = [line for line in said.splitlines() if line.split()[:2] == ["way", "seed"]]
    ended = {}
    for line in after(said, head):
        way, seed, learned, forgot, loss = line.split()[:5]
        ended[way, int(seed)] = (learned, forgot, loss)
    for each in runs:
        last = {line["name"]: line["value"] for line in read_lines(each.scores)}
        told = (last["target/accuracy_change"], 0 - last["source/accuracy_change"], last["target/loss"])
        made = read(each.spec)
        assert ended.pop((made.name, made.seed)) == tuple(f"{value:.3f}" for value in told)
    assert not ended
    means = after(said, "mean over seeds (lowest to highest)")
    frontier = after(said, "the frontier of learning and forgetting")
    assert (
        [line.split()[0] for line in means] == [line.split()[0] for line in frontier] == ["full", "lora-r1", "lora-r16"]
    )
    assert any(line.endswith("on the frontier") for line in frontier)
    assert "sign test p = " in said
    assert f"page: {Path('runs/compare/report.html')}" in said and (tmp_path / "runs/compare/report.html").exists()
