"""Runs that are killed at random moments, again and again, end in the same bits as runs that were left alone.

Every attempt is a process of its own, forked by a server that has imported the packages, and every kill is a SIGKILL.
"""

import multiprocessing
import os
import random
import signal
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from little_world import in_child, make_world, only_run, overrides, same_bits
from loralab.run.folder import RunFolder, read_lines
from loralab.training.checkpoint import checkpoints

STEPS = 12
KILLS = 4
"""At least, of each method."""
PATIENCE_S = 60.0
IMPORTED = [
    "__main__",
    "little_world",
    "loralab.cli",
    "loralab.lab.experiment",
    "peft.mapping",
    "transformers.models.llama.modeling_llama",
    "pyarrow.parquet",
]
SHORT = {"train__steps": STEPS, "train__batch_size": 3, "train__micro_batch": 1, "checkpoints__every": 3}
DROPPED = {"method__rank": 4, "method__dropout": 0.1}  # dropout, so that the random state matters
DORA = "{r: 4, lora_alpha: 8, lora_dropout: 0.1, use_dora: true}"
METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "full": ("sft-full", {}),
    "lora": ("sft-lora", {**DROPPED, "probes__source": [{"path": "pocket:copy", "items": 4}]}),
    "lora_plus": ("sft-lora-plus", DROPPED),
    "cola": ("sft-cola", {**DROPPED, "method__stop_gain": 0, "checkpoints__every": 2}),
    "peft-dora": ("peft", {"method__keys": DORA, "checkpoints__every": 2}),
}


@dataclass(frozen=True)
class Attempt:
    """A running process of the command, and the folder that it writes."""

    process: Any
    root: Path
    begin: float

    @property
    def step(self) -> int:
        """Steps that stand in the metrics."""
        try:
            return sum(b'"loss"' in line for line in (only_run(self.root) / "metrics.jsonl").read_bytes().splitlines())
        except (FileNotFoundError, ValueError):  # no folder yet
            return 0

    def wait_for(self, step: int) -> float:
        """Wait until a step is done or the process has ended; give the seconds since it began."""
        while self.step < step and self.process.is_alive() and time.perf_counter() - self.begin < PATIENCE_S:
            time.sleep(0.001)
        return time.perf_counter() - self.begin

    def end(self, number: int | None = None) -> int:
        """Send a signal, or wait for the end; give the exit code, negative for the signal that killed it."""
        if number is not None:
            with suppress(ProcessLookupError):  # it has just ended
                os.kill(self.process.pid, number)
        self.process.join(PATIENCE_S)
        assert self.process.exitcode is not None, "the process hangs"
        return self.process.exitcode


@dataclass(frozen=True)
class Whole:
    """An uninterrupted run and its seconds: until the first step, of a step, after the last one."""

    run: Path
    until_first: float
    of_step: float
    after_last: float


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    return make_world(tmp_path_factory.mktemp("world"), train=30, held_out=6)


@pytest.fixture(scope="module")
def start(world) -> Callable[[str, Path], Attempt]:
    """Return what starts a method's training in a process of its own."""
    server = multiprocessing.get_context("forkserver")
    server.set_forkserver_preload(IMPORTED)
    own = world / "peft.yaml"
    own.write_text("method:\n  name: peft\ntrain:\n  epochs: 1\n")

    def begin(method: str, root: Path) -> Attempt:
        root.mkdir(exist_ok=True)
        recipe, keys = METHODS[method]
        words = ["train", str(own) if recipe == "peft" else recipe, *overrides(world, **{**SHORT, **keys})]
        process = server.Process(target=in_child, args=(str(root / "log"), *words, "--runs", str(root)))
        process.start()
        return Attempt(process, root, time.perf_counter())

    return begin


@pytest.fixture(scope="module")
def whole(world, start) -> Callable[[str], Whole]:
    """Return what gives a method's uninterrupted run."""
    done: dict[str, Whole] = {}

    def run(method: str) -> Whole:
        if method not in done:
            attempt = start(method, world / f"whole-{method}")
            first, last = attempt.wait_for(1), attempt.wait_for(STEPS)
            assert attempt.end() == 0, (attempt.root / "log").read_text()
            end = time.perf_counter() - attempt.begin
            done[method] = Whole(only_run(attempt.root), first, (last - first) / STEPS, end - last)
        return done[method]

    return run


def moments(whole: Whole, rng: random.Random) -> list[tuple[int, float]]:
    """Choose when to kill: (step to wait for, seconds after it): at the start, in the middle, and after the end."""
    middle = sorted(rng.randrange(1, STEPS) for _ in range(KILLS - 1))
    return [
        (0, rng.uniform(0, whole.until_first)),
        *((step, rng.uniform(0, whole.of_step)) for step in middle),
        (STEPS, rng.uniform(0, whole.after_last)),
    ]


@pytest.mark.parametrize("method", METHODS)
def test_killed_runs_end_in_the_same_bits(method, world, start, whole):
    reference, rng = whole(method), random.Random(method)
    kills, roots = 0, [world / f"killed-{method}-0"]
    while kills < KILLS:
        for step, delay in moments(reference, rng):
            attempt = start(method, roots[-1])
            attempt.wait_for(step)
            time.sleep(delay)
            code = attempt.end(signal.SIGKILL)
            kills += code == -signal.SIGKILL
            assert code in (-signal.SIGKILL, 0), (roots[-1] / "log").read_text()
            if code == 0:  # it was done before the kill: begin another
                roots.append(world / f"killed-{method}-{len(roots)}")
                break
    for root in roots:
        if root.exists():
            assert start(method, root).end() == 0, (root / "log").read_text()
            same_bits(only_run(root), reference.run)
            assert not list(only_run(root).rglob("*.tmp")) + list(only_run(root).rglob("*.partial"))


@pytest.mark.parametrize("method", ["lora", "cola"])
def test_a_terminated_run_finishes_its_step_and_goes_on(method, world, start, whole):
    root = world / f"terminated-{method}"
    attempt = start(method, root)
    attempt.wait_for(4)
    assert attempt.end(signal.SIGTERM) == 5
    run = only_run(root)
    done = read_lines(run / "metrics.jsonl")[-1]["step"]
    assert 4 <= done < STEPS
    assert checkpoints(run / "checkpoints")[-1].name == f"step-{done}"
    status = RunFolder(run).read_status()
    assert (status["state"], status["step"]) == ("interrupted", done)
    log = (root / "log").read_text()
    assert f"loralab: stopped after step {done}\n" in log and "same command" in log and "Traceback" not in log
    assert start(method, root).end() == 0
    same_bits(run, whole(method).run)
