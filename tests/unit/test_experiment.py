"""One spec, run: how it ends, how it goes on, and what its folder then tells."""

import json
import math
import signal
import threading
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from battery import NoWatch, World, loop_on
from battery import world as tiny_world

from little_world import make_world, overrides, rows, same_bits, untimed, write_rows
from loralab.errors import DeltaError, Diverged, Interrupted
from loralab.lab import experiment
from loralab.lab.experiment import train
from loralab.lab.watch import Silent
from loralab.methods import METHODS
from loralab.methods.lora import Lora
from loralab.run import trackers
from loralab.run.folder import RunFolder, read_lines
from loralab.spec.recipes import read
from loralab.spec.spec import RunSpec
from loralab.training.checkpoint import checkpoints, read_checkpoint
from loralab.training.objectives import Loss
from loralab.training.optim import schedule

DROPPED = {"method__rank": 4, "method__dropout": 0.1, "checkpoints__every": 2}
COOLING = {"schedule__name": "inverse_sqrt", "schedule__warmup": 2, "schedule__scale": 4}

T95_FOR_8 = 2.364624  # Student's t, 7 degrees of freedom, from a printed table


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    return make_world(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def whole(world) -> experiment.Result:
    """Return a finished LoRA run."""
    return train(spec(world), world / "whole")


def spec(world: Path, recipe: str = "sft-lora", **keys: Any) -> RunSpec:
    return read(recipe, overrides(world, **(keys if recipe == "sft-full" else {**DROPPED, **keys})))


class StopAt(Silent):
    """A display that does something in the middle of a run: after a step, before its probes and its checkpoint."""

    def __init__(self, step: int, act: Any) -> None:
        self.at, self.act = step, act

    def step(self, line: dict[str, Any], total_steps: int) -> None:
        if line["step"] == self.at:
            self.act()


def fall_over() -> None:
    raise OSError("the machine is gone")


def break_off(chosen: RunSpec, root: Path, step: int) -> RunFolder:
    """Run a spec until an error that nobody foresaw."""
    with pytest.raises(OSError, match="the machine is gone"):
        train(chosen, root, display=StopAt(step, fall_over))
    return RunFolder(root / chosen.folder_name)


def columns(path: Path, *names: str) -> list[tuple[Any, ...]]:
    return [tuple(line[name] for name in names) for line in read_lines(path) if names[0] in line]


# Ends


def test_a_finished_run_is_not_run_again(world, whole, monkeypatch):
    before = {path: path.stat().st_mtime_ns for path in whole.folder.path.rglob("*")}
    monkeypatch.setattr(experiment, "prepare", None)
    again = train(spec(world), world / "whole")
    assert again == experiment.Result(again.folder, whole.status, whole.base, whole.before, whole.after)
    assert {path: path.stat().st_mtime_ns for path in whole.folder.path.rglob("*")} == before


@pytest.mark.parametrize("chosen", [{"recipe": "sft-full"}, {"checkpoints__keep_best": False}])
def test_an_exploding_run_ends_as_diverged_and_keeps_its_last_good_checkpoint(world, tmp_path, chosen):
    exploding = spec(world, **chosen, optimizer__learning_rate=1e30, checkpoints__every=1)
    with pytest.raises(Diverged) as caught:
        train(exploding, tmp_path)
    assert caught.value.exit_code == 4
    assert "learning_rate" in str(caught.value.fix)
    folder = RunFolder(tmp_path / exploding.folder_name)
    status = folder.read_status()
    assert status["state"] == "diverged" and "diverged" in status["message"]
    kept = [read_checkpoint(path) for path in checkpoints(folder.checkpoints)]
    assert [state.step for state in kept] == [0], "a checkpoint of a broken model is none"
    assert all(bool(t.isfinite().all()) for state in kept for t in state.tensors["method"].values())
    for file in (folder.metrics, folder.scores):
        json.loads(json.dumps(read_lines(file)), parse_constant=pytest.fail)
    with pytest.raises(Diverged):
        train(exploding, tmp_path)
    assert [path.name for path in checkpoints(folder.checkpoints)] == ["step-0"]


def no_number(loss: Loss, _: World) -> Loss:
    return Loss(loss.total * float("nan"), loss.weight, loss.metrics)


def no_gradient(loss: Loss, w: World) -> Loss:
    steep = sum((p * 0).sum().sqrt() for p in w.base.model.parameters() if p.requires_grad)
    return Loss(loss.total + steep, loss.weight, loss.metrics)


def spike(loss: Loss, _: World) -> Loss:
    return Loss(loss.total * 20, loss.weight, loss.metrics)


@pytest.mark.parametrize(
    ("fault", "words"), [(no_number, "loss is nan"), (no_gradient, "norm is nan"), (spike, "times")]
)
def test_nothing_is_stepped_on_a_broken_loss(fault, words):
    w = tiny_world("lora")
    loop = loop_on(w, steps=20)
    sound = loop.objective.loss
    before: dict[str, torch.Tensor] = {}

    def loss(model: torch.nn.Module, batch: Any) -> Loss:
        found = sound(model, batch)
        if loop.step < 12:
            return found
        before.update({name: tensor.clone() for name, tensor in w.method.state()[0].items()})
        return fault(found, w)

    loop.objective.loss = loss
    with pytest.raises(Diverged, match=words) as caught:
        loop.run(NoWatch())
    assert loop.step == 12 and caught.value.where == "step 13"
    assert all(torch.equal(tensor, before[name]) for name, tensor in w.method.state()[0].items())


def test_a_step_of_nothing_but_zeros_moves_nothing_where_rest_is_allowed():
    """Moments of the steps before it would still move the tensors, and decay shrink them."""
    w = tiny_world("lora")
    loop = loop_on(w, steps=6)
    loop.may_rest = True
    sound, seen = loop.objective.loss, []

    def loss(model: torch.nn.Module, batch: Any) -> Loss:
        found = sound(model, batch)
        seen.append({name: tensor.clone() for name, tensor in w.method.state()[0].items()})
        return Loss(found.total * 0, found.weight) if loop.step == 4 else found

    loop.objective.loss = loss
    loop.run(NoWatch())
    moved = [any(not torch.equal(after[name], before[name]) for name in after) for before, after in pairwise(seen)]
    assert moved == [True, True, True, True, False], "what step 5 was given is what step 6 begins with"


def test_a_method_that_starts_off_the_identity_is_refused(world, tmp_path, monkeypatch):
    class Shifted(Lora):
        def attach(self, base, seed):
            attached = super().attach(base, seed)
            with torch.no_grad():
                next(iter(self.layers.values())).pair("link-1").B.add_(0.1)
            return attached

    monkeypatch.setitem(METHODS, "lora", Shifted)
    with pytest.raises(DeltaError, match="differs from its base") as caught:
        train(spec(world), tmp_path)
    assert caught.value.exit_code == 2


# Going on


@pytest.mark.parametrize("step", [1, 2, 3, 6], ids=lambda step: f"broken-off-at-{step}")
def test_a_broken_off_run_goes_on_to_the_same_bits(world, whole, tmp_path, step):
    folder = break_off(spec(world), tmp_path, step)
    train(spec(world), tmp_path)
    same_bits(folder.path, whole.folder.path)


def test_a_run_that_lost_only_its_last_files_writes_them_again(world, whole, tmp_path, monkeypatch):
    monkeypatch.setattr(experiment, "write_items", lambda *_: fall_over())
    with pytest.raises(OSError):
        train(spec(world), tmp_path)
    monkeypatch.undo()
    folder = train(spec(world), tmp_path).folder
    same_bits(folder.path, whole.folder.path)


def test_a_streamed_run_goes_on_to_the_same_bits(world, tmp_path):
    data = write_rows(tmp_path / "stream.jsonl", rows(2000))
    streamed = spec(world, data__train=data, data__streaming=True)
    whole = train(streamed, tmp_path / "whole")
    folder = break_off(streamed, tmp_path / "broken", 5)
    train(streamed, tmp_path / "broken")
    same_bits(folder.path, whole.folder.path)


def test_the_seed_alone_decides(world, whole, tmp_path):
    torch.manual_seed(12345)
    torch.rand(7)
    same_bits(train(spec(world), tmp_path).folder.path, whole.folder.path)
    other = train(spec(world, seed=1), tmp_path)
    assert untimed(other.folder.metrics) != untimed(whole.folder.metrics)


def test_probes_and_checkpoints_do_not_touch_training(world, whole, tmp_path):
    seldom = train(spec(world, probes__every=100, checkpoints__every=100, checkpoints__keep_best=False), tmp_path)
    delta = "delta/adapter_model.safetensors"
    assert (seldom.folder.path / delta).read_bytes() == (whole.folder.path / delta).read_bytes()
    assert untimed(seldom.folder.metrics) == untimed(whole.folder.metrics)
    steps = {line["step"] for line in read_lines(seldom.folder.scores)}
    assert steps == {0, 6}, "the base and the end are always measured"


def test_the_first_interrupt_ends_the_step_and_the_second_the_run(world, whole, tmp_path):
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    for number, expected in ((1, "stopped after step 3"), (2, "in the middle of a step")):
        root = tmp_path / str(number)
        ask = StopAt(3, lambda number=number: [signal.raise_signal(signal.SIGINT) for _ in range(number)])
        with pytest.raises(Interrupted, match=expected) as caught:
            train(spec(world), root, display=ask)
        assert caught.value.exit_code == 5
        folder = RunFolder(root / spec(world).folder_name)
        assert folder.read_status()["state"] == "interrupted"
        assert checkpoints(folder.checkpoints)[-1].name == ("step-3" if number == 1 else "step-2")
        train(spec(world), root)
        same_bits(folder.path, whole.folder.path)
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == handlers


def test_a_run_in_a_thread_leaves_signals_alone(world, whole, tmp_path):
    thread = threading.Thread(target=train, args=(spec(world), tmp_path))
    thread.start()
    thread.join()
    same_bits(tmp_path / spec(world).folder_name, whole.folder.path)


# Branches


@pytest.fixture(scope="module")
def long(world) -> experiment.Result:
    """Return a run of 12 steps whose learning rate falls as 1/sqrt, without a cooldown."""
    return train(
        spec(world, train__steps=12, checkpoints__keep_last=99, schedule__cooldown=0, **COOLING), world / "long"
    )


def cooling(world: Path, long: experiment.Result) -> RunSpec:
    branch = f"{long.folder.path}@6"
    return spec(world, train__steps=10, branch_from=branch, schedule__cooldown=3, **COOLING)


def test_a_cooldown_branch_goes_on_as_the_long_run_did_until_it_cools(world, long, tmp_path):
    result = train(cooling(world, long), tmp_path)
    ours = columns(result.folder.metrics, "loss", "step", "learning_rate")
    theirs = columns(long.folder.metrics, "loss", "step", "learning_rate")
    assert [step for _, step, _ in ours] == [7, 8, 9, 10]
    # Steps 7 and 8 are taken at the long run's rate; the loss of step 9 is the first that sees nothing else.
    assert ours[:2] == theirs[6:8]
    assert ours[2][0] == theirs[8][0]
    assert ours[2][2] != theirs[8][2] and ours[3][0] != theirs[9][0]
    rate = schedule("inverse_sqrt", warmup=2, scale=4, cooldown=3)
    assert [line[2]["matrices"] for line in ours] == [pytest.approx(0.01 * rate(step, 10)) for step in (6, 7, 8, 9)]
    held = rate(6, 12)
    assert rate(7, 10) == pytest.approx(1 / math.sqrt(1 + 5 / 4)) and held == pytest.approx(1 / math.sqrt(1 + 4 / 4))
    assert [rate(step, 10) / rate(7, 10) for step in (8, 9, 10)] == pytest.approx([2 / 3, 1 / 3, 0])
    assert result.status["tokens"] == sum(tokens for (tokens,) in columns(long.folder.metrics, "tokens")[:10])


def test_a_branch_measures_the_base_and_can_be_broken_off_itself(world, long, tmp_path):
    result = train(cooling(world, long), tmp_path / "whole")
    assert result.base["target/loss"] == long.base["target/loss"]
    assert result.before == {}
    folder = break_off(cooling(world, long), tmp_path / "broken", 9)
    train(cooling(world, long), tmp_path / "broken")
    same_bits(folder.path, result.folder.path)


# What the folder tells


def test_scores_hold_the_base_once_and_the_tuned_model_at_every_probe(whole):
    lines = read_lines(whole.folder.scores)
    keys = [(line["model"], line["step"], line["name"]) for line in lines]
    assert len(set(keys)) == len(keys)
    of_base = {"target/loss", "general/loss", "prompts/loss", "drift/covered", "drift/target_covered"}
    assert {key for key in keys if key[0] == "base"} == {("base", 0, name) for name in of_base}
    probed = [step for model, step, name in keys if name == "drift/kl"]
    assert probed == [0, 1, 2, 3, 4, 5, 6]
    assert all(math.isfinite(line["value"]) for line in lines)
    of_texts = [line for line in lines if not line["name"].startswith("spectrum/")]
    assert all(line["n"] == 8 and line["standard_error"] >= 0 for line in of_texts)
    assert [line["step"] for line in lines if line["name"] == "spectrum/rank90"] == [1, 2, 3, 4, 5, 6]
    before = {line["name"]: line["value"] for line in lines if line["model"] == "tuned" and line["step"] == 0}
    assert before["drift/kl"] == before["drift/top1_flips"] == before["target/loss_rise"] == 0
    assert before["target/loss"] == whole.score("target/loss", "base").value


def test_items_hold_what_paired_tests_need(whole):
    items = pd.read_parquet(whole.folder.path / "items.parquet")
    assert list(items)[:5] == ["probe", "item", "num_tokens", "base_loss_sum", "tuned_loss_sum"]
    for name in ("target", "general"):
        mine = items[items.probe == name]
        assert list(mine["item"]) == list(range(8))
        tokens = mine.num_tokens.sum()
        for when, column in (("base", "base_loss_sum"), ("after", "tuned_loss_sum")):
            assert mine[column].sum() / tokens == pytest.approx(whole.score(f"{name}/loss", when).value, rel=1e-12)
        rise = whole.score(f"{name}/loss_rise")
        differences = mine.tuned_loss_sum - mine.base_loss_sum
        assert differences.sum() / tokens == pytest.approx(rise.value, rel=1e-9)
        residuals = differences - rise.value * mine.num_tokens
        assert np.sqrt(8 / 7 * (residuals**2).sum()) / tokens == pytest.approx(rise.standard_error)


def test_the_end_table_pairs_the_end_with_the_base(whole):
    rows = {row[0]: row[1:] for row in whole.rows()}
    assert {"target/loss", "general/loss", "drift/kl"} <= set(rows)
    assert not any(name.endswith("loss_rise") for name in rows if not name.startswith("drift"))
    base, before, after, change, interval, n = rows["target/loss"]
    assert n == 8
    assert base == before == whole.base["target/loss"].value
    assert after == whole.after["target/loss"].value < base
    assert change == whole.after["target/loss_rise"].value == pytest.approx(after - base)
    low, high = (float(part) for part in interval.strip("[]").split(","))
    assert low < change < high
    assert (high - low) / 2 == pytest.approx(T95_FOR_8 * whole.after["target/loss_rise"].standard_error, abs=1e-4)


def test_the_summary_is_plain_and_the_status_counts(world, whole):
    summary = json.loads(json.dumps(whole.summary()))
    assert summary["status"]["state"] == "done" and summary["status"]["step"] == 6
    assert summary["status"]["tokens"] == sum(tokens for (tokens,) in columns(whole.folder.metrics, "tokens"))
    assert {score["model"] for score in summary["scores"]} == {"base", "before", "after"}
    trained = summary["status"]["trained_parameters"]
    from safetensors.torch import load_file

    assert trained == sum(t.numel() for t in load_file(whole.folder.delta / "adapter_model.safetensors").values())


# Mirrors


class Broken:
    """A mirror that fails at a moment."""

    def __init__(self, moment: str) -> None:
        self.moment = moment
        self._fail("open")

    def _fail(self, moment: str) -> None:
        if moment == self.moment:
            raise ConnectionError("no route to the service")

    def log(self, step: int, metrics: Any) -> None:
        self._fail("log")

    def close(self) -> None:
        self._fail("close")


@pytest.mark.parametrize("moment", ["open", "log", "close"])
def test_a_broken_tracker_does_not_stop_training(world, whole, tmp_path, monkeypatch, caplog, moment):
    monkeypatch.setitem(trackers._KINDS, "tensorboard", lambda *_: Broken(moment))
    result = train(spec(world, trackers=["tensorboard"]), tmp_path)
    same_bits(result.folder.path, whole.folder.path)
    assert caplog.text.count("no route to the service") == 1


def test_trackers_are_no_part_of_a_runs_identity(world, whole, tmp_path):
    folder = break_off(spec(world), tmp_path, 3)
    mirrored = train(spec(world, trackers=["tensorboard"]), tmp_path)
    assert mirrored.folder.path == folder.path
    same_bits(folder.path, whole.folder.path)
    assert list(folder.path.glob("tensorboard/*"))
