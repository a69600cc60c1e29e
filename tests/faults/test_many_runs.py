"""Calls of `train_all` that cannot work say so, and leave nothing behind."""

import subprocess
import sys
from pathlib import Path

import pytest

from little_world import make_world, overrides
from loralab.errors import LoralabError
from loralab.lab.engines import train_all
from loralab.run.folder import read_lines
from loralab.spec.recipes import dump, read

UNGUARDED = """
import sys
from loralab import LoralabError, recipe, train_all

try:
    train_all([recipe(sys.argv[1])], sys.argv[2])
except LoralabError as error:
    print(error)
    sys.exit(error.exit_code)
"""


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    return make_world(tmp_path_factory.mktemp("world"), train=30, held_out=6)


def test_a_script_without_a_guard_is_told_about_it(world, tmp_path):
    script, file = tmp_path / "script.py", tmp_path / "own.yaml"
    script.write_text(UNGUARDED)
    file.write_text(dump(read("sft-lora", overrides(world))), encoding="utf-8")
    words = [sys.executable, str(script), str(file), str(tmp_path / "runs")]
    ended = subprocess.run(words, capture_output=True, text=True, timeout=120, check=False)
    assert ended.returncode == 5 and not (tmp_path / "runs").exists()
    assert '__name__ == "__main__"' in ended.stdout and "Traceback" not in ended.stdout + ended.stderr


@pytest.mark.parametrize("workers", [0, -1])
def test_no_process_runs_nothing(world, tmp_path, workers):
    with pytest.raises(LoralabError, match="cannot run anything"):
        train_all([read("sft-lora", overrides(world))], tmp_path, workers=workers)
    assert list(tmp_path.iterdir()) == []


def test_more_processes_than_runs_and_the_same_run_twice(world, tmp_path):
    spec = read("sft-lora", overrides(world, train__steps=2))
    one, other = train_all([spec, spec], tmp_path, workers=5)
    assert one.path == other.path and [path.name for path in tmp_path.iterdir()] == [spec.folder_name]
    assert one.read_status()["state"] == "done"
    assert [line["step"] for line in read_lines(one.metrics)] == [1, 2]
