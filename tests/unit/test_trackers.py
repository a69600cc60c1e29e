import json
import logging
import subprocess
import sys
from pathlib import Path

import pytest

from loralab.errors import LoralabError
from loralab.run.trackers import mirrors

FOREIGN = """
import json, pathlib

class Run:
    def __init__(self, keys):
        self.file = pathlib.Path({log!r})
        self.say("init", keys)

    def say(self, *words):
        with self.file.open("a") as file:
            file.write(json.dumps(words) + "\\n")

    def log(self, metrics, step=None):
        self.say("log", metrics, step)
        {when_logging}

    def finish(self):
        self.say("finish")
        {when_closing}

def init(**keys):
    {when_opening}
    return Run(keys)
"""


@pytest.fixture
def foreign(tmp_path, monkeypatch):
    """Install a stand-in for W&B or Trackio; returns a function that reads the calls it received."""

    def install(package, when_opening="pass", when_logging="pass", when_closing="pass"):
        log = tmp_path / "calls.jsonl"
        texts = {"when_opening": when_opening, "when_logging": when_logging, "when_closing": when_closing}
        site = tmp_path / "site"
        site.mkdir()
        (site / f"{package}.py").write_text(FOREIGN.format(log=str(log), **texts))
        monkeypatch.syspath_prepend(str(site))
        monkeypatch.delitem(sys.modules, package, raising=False)
        return lambda: [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []

    yield install
    for package in ("wandb", "trackio"):
        sys.modules.pop(package, None)


def test_no_names_no_mirrors(tmp_path):
    assert mirrors([], tmp_path, "a", {}) == []


def test_tensorboard_holds_the_numbers_without_torch(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    (mirror,) = mirrors(["tensorboard"], tmp_path, "a", {})
    for step, loss in enumerate([3.0, 2.0, 1.5]):
        mirror.log(step, {"train/loss": loss, "event": "knot", "nothing": None, "tokens": 10 * step})
    mirror.close()
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert sorted(events.Tags()["tensors"]) == ["tokens", "train/loss"]
    read = [(event.step, event.tensor_proto.float_val[0]) for event in events.Tensors("train/loss")]
    assert read == [(0, 3.0), (1, 2.0), (2, 1.5)]


def test_tensorboard_loads_no_torch(tmp_path):
    program = f"""
import sys
from loralab.run.trackers import mirrors
(mirror,) = mirrors(["tensorboard"], {str(tmp_path)!r}, "a", {{}})
mirror.log(1, {{"loss": 1.0}})
mirror.close()
print("torch" in sys.modules, "tensorflow" in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "False"]
    assert done.stderr == ""
    assert list((tmp_path / "tensorboard").iterdir())


@pytest.mark.parametrize("package", ["wandb", "trackio"])
def test_foreign_packages_receive_the_run_and_resume_it_by_name(tmp_path, foreign, package):
    calls = foreign(package)
    (mirror,) = mirrors([package], tmp_path, "lora-12345678", {"seed": 0})
    mirror.log(7, {"train/loss": 2.5, "note": "x"})
    mirror.close()
    mirror.log(8, {"train/loss": 2.0})
    mirror.close()
    opened, *others = calls()
    common = {"project": "loralab", "name": "lora-12345678", "config": {"seed": 0}, "resume": "allow"}
    assert opened[0] == "init"
    assert opened[1].items() >= common.items()
    assert others == [["log", {"train/loss": 2.5}, 7], ["finish"]]


def test_wandb_keeps_its_files_in_the_run_folder(tmp_path, foreign):
    calls = foreign("wandb")
    mirrors(["wandb"], tmp_path, "a", {})
    assert calls()[0][1].items() >= {"dir": str(tmp_path), "id": "a"}.items()


@pytest.mark.parametrize(
    ("failure", "expected"),
    [
        ("when_opening", []),
        ("when_logging", ["init", "log"]),
        ("when_closing", ["init", "log", "log", "finish"]),
    ],
)
def test_a_failing_mirror_warns_once_in_one_line_and_is_silent_afterwards(tmp_path, foreign, caplog, failure, expected):
    calls = foreign("wandb", **{failure: "raise ConnectionError('the service is away\\nmore')"})
    with caplog.at_level(logging.WARNING):
        (mirror,) = mirrors(["wandb"], tmp_path, "a", {})
        mirror.log(1, {"loss": 1.0})
        mirror.log(2, {"loss": 1.0})
        mirror.close()
        mirror.close()
    assert [call[0] for call in calls()] == expected
    (record,) = caplog.records
    message = record.getMessage()
    assert "wandb" in message
    assert "the service is away" in message
    assert "\n" not in message


def test_one_failing_mirror_leaves_the_others_on(tmp_path, foreign, caplog):
    calls = foreign("trackio", when_logging="raise OSError('full')")
    first, second = mirrors(["trackio", "tensorboard"], tmp_path, "a", {})
    for mirror in (first, second):
        mirror.log(1, {"loss": 1.0})
        mirror.close()
    assert [call[0] for call in calls()] == ["init", "log"]
    assert len(caplog.records) == 1
    assert list((tmp_path / "tensorboard").iterdir())


def test_a_missing_package_names_the_extra_before_anything_is_opened(tmp_path, monkeypatch, foreign):
    calls = foreign("trackio")
    monkeypatch.setattr(sys, "path", [path for path in sys.path if not Path(path, "wandb").exists()])
    (tmp_path / "cwd/wandb").mkdir(parents=True)  # W&B's own folder of offline runs is not the package
    monkeypatch.syspath_prepend(str(tmp_path / "cwd"))
    with pytest.raises(LoralabError) as caught:
        mirrors(["trackio", "wandb"], tmp_path, "a", {})
    assert 'pip install "loralab[wandb]"' in str(caught.value)
    assert caught.value.exit_code == 2
    assert calls() == []


def test_an_unknown_name_gets_a_suggestion(tmp_path):
    with pytest.raises(LoralabError, match="tensorbord") as caught:
        mirrors(["tensorbord"], tmp_path, "a", {})
    assert "did you mean tensorboard?" in str(caught.value)
