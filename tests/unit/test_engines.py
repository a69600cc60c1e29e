"""Many runs side by side: each ends as it would alone, and no failure, signal or kill loses a run or leaves a process."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from little_world import make_world, overrides, same_bits
from loralab.errors import Diverged, Interrupted, LoralabError
from loralab.lab.engines import train_all
from loralab.lab.experiment import train
from loralab.run.folder import RunFolder, read_lines
from loralab.spec.recipes import dump, read
from loralab.spec.spec import RunSpec
from loralab.training.checkpoint import checkpoints

PATIENCE_S = 60.0
LONG = {"train__steps": 240, "checkpoints__every": 240, "checkpoints__keep_best": False, "probes__every": 240}
CALL = """
import sys
from loralab import LoralabError, recipe, train_all

root, *specs = sys.argv[1:]
try:
    train_all([recipe(spec) for spec in specs], root, workers=1)
except LoralabError as error:
    print(error)
    sys.exit(error.exit_code)
"""


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    return make_world(tmp_path_factory.mktemp("world"), train=30, held_out=6)


def spec(world: Path, name: str, **keys: Any) -> RunSpec:
    return read("sft-lora", overrides(world, **{"name": name, "method__rank": 4, "train__steps": 4, **keys}))


def state(folder: RunFolder) -> str:
    return str(folder.read_status()["state"])


def steps(folder: RunFolder) -> int:
    return sum("loss" in line for line in read_lines(folder.metrics))


def waits_to_go_on(folder: RunFolder) -> bool:
    """Tell whether a run was stopped before its end, with a checkpoint at its last step."""
    stopped = state(folder) == "interrupted" and 0 < steps(folder) < LONG["train__steps"]
    return stopped and checkpoints(folder.checkpoints)[-1].name == f"step-{steps(folder)}"


class Passer:
    """Looks on, and acts once as soon as every run that it watches has made its first steps."""

    def __init__(self, act: Callable[[Sequence[RunFolder]], None], count: int) -> None:
        self.act, self.count, self.acted = act, count, False

    def __call__(self, folders: Sequence[RunFolder]) -> None:
        if not self.acted and all(steps(folder) >= 3 for folder in folders[: self.count]):
            self.acted = True
            self.act(folders)


# Ends


@pytest.fixture(scope="module")
def finished(world) -> list[RunFolder]:
    return train_all([spec(world, name) for name in ("c", "a", "b")], world / "beside", workers=2)


def test_runs_side_by_side_end_in_the_bits_of_a_run_alone(world, finished):
    assert [folder.path.name[:2] for folder in finished] == ["c-", "a-", "b-"]
    for folder, name in zip(finished, "cab", strict=True):
        same_bits(folder.path, train(spec(world, name), world / "alone").folder.path)


def test_finished_runs_are_not_run_again(world, finished):
    before = {path: path.stat().st_mtime_ns for path in (world / "beside").rglob("*")}
    seen: list[list[str]] = []
    specs = [spec(world, name) for name in ("b", "c", "b")]
    begin = time.perf_counter()
    folders = train_all(specs, world / "beside", look=lambda found: seen.append([state(each) for each in found]))
    assert time.perf_counter() - begin < 1.0, "no process is begun where there is nothing to run"
    assert [folder.path for folder in folders] == [finished[number].path for number in (2, 0, 2)]
    assert seen[-1] == ["done"] * 3
    assert {path: path.stat().st_mtime_ns for path in (world / "beside").rglob("*")} == before
    assert train_all([], world / "none") == []


def test_failing_runs_stop_no_other_and_are_named(world, tmp_path):
    missing = spec(world, "missing", data__train=tmp_path / "none.jsonl")
    exploding = spec(world, "exploding", optimizer__learning_rate=1e30)
    good = spec(world, "good")
    with pytest.raises(LoralabError) as caught:
        train_all([missing, good, good], tmp_path, workers=1)
    assert (type(caught.value), caught.value.exit_code) == (LoralabError, 2)
    assert all(words in str(caught.value) for words in (missing.folder_name, "none.jsonl", "1 of"))
    assert good.folder_name not in str(caught.value)
    assert state(RunFolder(tmp_path / good.folder_name)) == "done"
    with pytest.raises(Diverged) as worse:
        train_all([exploding, missing, good], tmp_path, workers=1)
    assert worse.value.exit_code == 4
    assert all(words in str(worse.value) for words in (exploding.folder_name, missing.folder_name, "learning_rate"))


# Breaks


def left_of(group: int) -> list[str]:
    """List the processes of a group that still live."""
    found = subprocess.run(["ps", "-A", "-o", "pgid=,stat=,args="], capture_output=True, text=True, check=True)
    lines = [line.split(None, 2) for line in found.stdout.splitlines()]
    return [line[2] for line in lines if line[0] == str(group) and not line[1].startswith("Z")]


def wait_for(is_so: Callable[[], bool]) -> None:
    begin = time.perf_counter()
    while not is_so():
        assert time.perf_counter() - begin < PATIENCE_S, "it takes too long"
        time.sleep(0.02)


class Calling:
    """A process group of its own that runs two long runs one after the other."""

    def __init__(self, specs: Sequence[RunSpec], root: Path) -> None:
        root.mkdir()
        self.folders = [RunFolder(root / each.folder_name) for each in specs]
        files = [root / f"{each.name}.yaml" for each in specs]
        for file, each in zip(files, specs, strict=True):
            file.write_text(dump(each), encoding="utf-8")
        words = [sys.executable, "-c", CALL, str(root), *map(str, files)]
        self.process = subprocess.Popen(words, stdout=subprocess.PIPE, text=True, start_new_session=True)

    def wait_for_the_first_steps(self) -> None:
        wait_for(lambda: steps(self.folders[0]) >= 3 or self.process.poll() is not None)

    def clean_up(self) -> None:
        if left_of(self.process.pid):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.communicate()


@pytest.fixture
def calling(world, tmp_path) -> Iterator[Calling]:
    made = Calling([spec(world, name, **LONG) for name in ("first", "second")], tmp_path / "runs")
    yield made
    made.clean_up()


def terminate(call: Calling) -> None:
    call.process.terminate()


def press_ctrl_c(call: Calling) -> None:
    os.killpg(call.process.pid, signal.SIGINT)  # a terminal sends it to every process in the foreground


@pytest.mark.parametrize("stop", [terminate, press_ctrl_c])
def test_a_stopped_call_leaves_no_process_and_goes_on(world, tmp_path, calling, stop):
    calling.wait_for_the_first_steps()
    stop(calling)
    said, _ = calling.process.communicate(timeout=PATIENCE_S)
    assert calling.process.returncode == 5, said
    assert "stopped" in said and "same command" in said
    wait_for(lambda: not left_of(calling.process.pid))
    first, second = calling.folders
    assert waits_to_go_on(first)
    assert not second.path.exists(), "no run is begun after the stop"
    if stop is terminate:
        train_all([spec(world, name, **LONG) for name in ("first", "second")], first.path.parent, workers=1)
        assert [(state(each), steps(each)) for each in calling.folders] == [("done", LONG["train__steps"])] * 2


def test_a_killed_call_leaves_no_process(calling):
    calling.wait_for_the_first_steps()
    calling.process.kill()
    wait_for(lambda: not left_of(calling.process.pid))
    first, second = calling.folders
    assert waits_to_go_on(first) and not second.path.exists()


def test_a_killed_run_stops_the_others_and_all_go_on(world, tmp_path):
    def kill_the_first(folders: Sequence[RunFolder]) -> None:
        owner = folders[0].owner()
        assert owner is not None
        os.kill(owner.pid, signal.SIGKILL)

    specs = [spec(world, name, **LONG) for name in ("first", "second", "third")]
    with pytest.raises(Interrupted, match="killed") as caught:
        train_all(specs, tmp_path, workers=2, look=Passer(kill_the_first, 2))
    assert "same command" in str(caught.value.fix)
    first, second, third = (RunFolder(tmp_path / each.folder_name) for each in specs)
    assert (state(first), first.owner()) == ("running", None)
    assert waits_to_go_on(second)
    assert not third.path.exists()
    for each in specs[:2]:
        same_bits(train(each, tmp_path).folder.path, train(each, tmp_path / "alone").folder.path)


def test_an_error_of_who_looks_on_stops_the_runs(world, tmp_path):
    def fall_over(_: Sequence[RunFolder]) -> None:
        raise OSError("the screen is gone")

    specs = [spec(world, name, **LONG) for name in ("first", "second")]
    with pytest.raises(OSError, match="the screen is gone"):
        train_all(specs, tmp_path, workers=1, look=Passer(fall_over, 1))
    first, second = (RunFolder(tmp_path / each.folder_name) for each in specs)
    assert waits_to_go_on(first) and not second.path.exists()
