"""Training on a disk that is really full: exit 5, what stands stays whole, and with more room the run goes on."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from little_world import loralab, make_world, only_run, overrides, same_bits
from loralab.run.folder import RunFolder
from loralab.training.checkpoint import checkpoints, read_checkpoint

RECIPES = ("sft-full", "sft-cola")
LEVELS = 8
"""Amounts of room that the run is tried with, from none to all that it needs."""


def command(world: Path, runs: Path, recipe: str) -> list[str]:
    return [
        "train",
        recipe,
        *overrides(world, train__steps=3, checkpoints__every=3, checkpoints__keep_last=9),
        "--runs",
        str(runs),
    ]


def train_with_growing_room(world: Path, disk: Path, recipe: str) -> None:
    """Train again and again with more room each time; runs in a small file system of its own."""
    assert loralab(*command(world, world / recipe, recipe)) == 0
    whole = only_run(world / recipe)
    needed = sum(-(-path.stat().st_size // 4096) * 4096 for path in whole.rglob("*") if path.is_file())
    size = os.statvfs(disk).f_blocks * os.statvfs(disk).f_frsize
    codes, reached = [], -1
    with (disk / "ballast").open("wb") as ballast:
        os.posix_fallocate(ballast.fileno(), 0, size - 4096)
        for level in range(LEVELS + 1):
            os.ftruncate(ballast.fileno(), size - 4096 - needed * level // LEVELS)
            codes.append(loralab(*command(world, disk / "runs", recipe)))
            standing = checkpoints(disk / "runs" / whole.name / "checkpoints")
            steps = [read_checkpoint(folder).step for folder in standing]
            assert max(steps, default=-1) >= reached, "a checkpoint was lost"
            reached = max(steps, default=-1)
            if reached >= 0:
                assert RunFolder(disk / "runs" / whole.name).read_status()["state"] != "done" or codes[-1] == 0
        os.ftruncate(ballast.fileno(), 0)
        codes.append(loralab(*command(world, disk / "runs", recipe)))
    until_done = codes[: codes.index(0)]
    assert len(until_done) > LEVELS / 2 and set(until_done) == {5}, codes
    assert set(codes[len(until_done) :]) == {0}, codes
    same_bits(disk / "runs" / whole.name, whole)
    shutil.rmtree(disk / "runs")


def test_a_run_on_a_full_disk_stops_and_goes_on_with_more_room(tmp_path):
    world, disk = make_world(tmp_path / "world"), tmp_path / "disk"
    disk.mkdir()
    small_disk = f'mount -t tmpfs -o size=4m tmpfs "{disk}" && exec "$@"'
    unshare = [shutil.which("unshare") or "unshare", "-Urm", "sh", "-c", small_disk, "sh"]
    try:
        subprocess.run([*unshare, "true"], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("no user name space may mount a small disk here")
    here = Path(__file__).parent
    program = f"import sys; sys.path[:0] = {[str(here), str(here.parent)]!r}; import test_full_disk as me"
    program += f"; [me.train_with_growing_room(me.Path({str(world)!r}), me.Path({str(disk)!r}), r) for r in me.RECIPES]"
    done = subprocess.run([*unshare, sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("loralab: ") > LEVELS / 2 * len(RECIPES)
    assert "Traceback" not in done.stderr
