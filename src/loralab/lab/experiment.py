"""Runs one spec: the composition root, and the only place where a spec becomes objects."""

import shutil
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from safetensors import SafetensorError

from loralab.base.device import peak_bytes
from loralab.delta.store import save_lowrank
from loralab.errors import CheckpointError, Diverged, FolderError, Interrupted
from loralab.evals.drift import Reading
from loralab.evals.stats import Score
from loralab.lab.prepare import Prepared, prepare
from loralab.lab.watch import Display, RunWatch
from loralab.run.folder import RunFolder, environment, keep_lines, read_json, read_lines, write_atomic, write_json
from loralab.run.trackers import mirrors
from loralab.spec.recipes import dump
from loralab.spec.spec import RunSpec
from loralab.train.checkpoint import checkpoints, read_checkpoint
from loralab.train.loop import Loop
from loralab.train.objectives.text import TextObjective
from loralab.train.optim import schedule, torch_optimizer


class Silent:
    """A display that shows nothing."""

    def begin(self, facts: dict[str, Any]) -> None: ...

    def step(self, line: dict[str, Any], total_steps: int) -> None: ...

    def scores(self, step: int, scores: Any) -> None: ...

    def note(self, message: str) -> None: ...

    def end(self) -> None: ...


@dataclass(frozen=True)
class Result:
    """A finished run: its folder, its status, and its scores on the base, before and after training."""

    folder: RunFolder
    status: dict[str, Any]
    base: dict[str, Score] = field(default_factory=dict)
    before: dict[str, Score] = field(default_factory=dict)
    after: dict[str, Score] = field(default_factory=dict)

    def score(self, name: str, when: str = "after") -> Score:
        """Give one score of the base, before or after training. Raises KeyError for a name that was not measured."""
        found: dict[str, Score] = getattr(self, when)
        return found[name]

    def rows(self) -> list[tuple[Any, ...]]:
        """Give the end table: name, base, before, after, change with its 95 % interval (paired where possible)."""
        rows: list[tuple[Any, ...]] = []
        for name, after in self.after.items():
            if name.endswith("/loss_rise"):
                continue
            rise = self.after.get(name.removesuffix("/loss") + "/loss_rise") if name.endswith("/loss") else after
            base = self.base.get(name)
            change, interval = (None, None) if rise is None else (rise.value, rise.interval())
            text = "" if interval is None else f"[{interval[0]:+.4f}, {interval[1]:+.4f}]"
            before = self.before.get(name)
            rows.append((name, base and base.value, before and before.value, after.value, change, text))
        return rows

    def summary(self) -> dict[str, Any]:
        """Give everything as plain values."""
        return {
            "folder": str(self.folder.path),
            "status": self.status,
            "scores": [
                score.as_line(0, when) | {"interval": score.interval()}
                for when in ("base", "before", "after")
                for score in getattr(self, when).values()
            ],
        }


def train(spec: RunSpec, root: str | Path = "runs", *, display: Display | None = None) -> Result:
    """Run a spec in its folder below `root`, from the beginning or from where it stopped.

    Raises:
        LoralabError: bad input (exit code 2); nothing already written is lost.
        Diverged: NaN or a loss spike; the last good checkpoint is kept.
        Interrupted: a stop was requested or the disk is full; the same command goes on.
    """
    # Trackers are no part of the run's identity: another list of them resumes the same run.
    folder = RunFolder.create_or_open(root, spec.folder_name, dump(spec.model_copy(update={"trackers": []})))
    if folder.read_status()["state"] == "done":
        return result_of(folder)
    with folder.lock(), _stop_on_signals() as stop:
        try:
            with _interrupts_explained():
                return _run(spec, folder, display or Silent(), stop)
        except Interrupted as error:
            folder.write_status(state="interrupted", message=str(error))
            raise
        except Diverged as error:
            folder.write_status(state="diverged", message=str(error))
            raise


def _run(spec: RunSpec, folder: RunFolder, display: Display, stop: "_Stop") -> Result:
    prepared = prepare(spec)
    torch.manual_seed(spec.seed)  # of dropout; the methods draw their starts from generators of their own
    _same_inputs_or_refuse(folder, prepared)
    loop = loop_of(spec, prepared)
    watch = RunWatch(
        folder=folder,
        method=prepared.method,
        probes=prepared.probes,
        total_steps=prepared.total_steps,
        probe_every=spec.probes.every,
        checkpoint_every=spec.checkpoints.every,
        keep_last=spec.checkpoints.keep_last,
        keep_best=spec.checkpoints.keep_best,
        display=display,
        mirrors=mirrors(list(spec.trackers), folder.path, spec.folder_name, spec.model_dump(mode="json")),
        stop_requested=lambda: stop.requested,
    )
    _resume(spec, folder, loop, watch, prepared.base.fingerprint)
    share = {
        "trained_parameters": prepared.attachment.trained_parameters,
        "all_parameters": prepared.attachment.all_parameters,
    }
    folder.write_status(state="running", message=None, step=loop.step, total_steps=loop.total_steps, **share)
    display.begin(
        {
            "folder": folder.path,
            "method": spec.method.name,
            "model": spec.model.path,
            "device": str(prepared.base.model.device),
            "dtype": str(prepared.base.model.dtype).removeprefix("torch."),
            "share": prepared.attachment.share,
            "step": loop.step,
            "total_steps": loop.total_steps,
            **share,
        }
    )
    try:
        loop.run(watch)
    finally:
        display.end()
        for mirror in watch.mirrors:
            mirror.close()
    _write_items(folder, watch.base_readings, watch.final_readings())
    _save_delta(spec, folder, prepared)
    folder.write_status(
        state="done",
        step=loop.step,
        total_steps=loop.total_steps,
        tokens=loop.num_tokens,
        wall_s=round(watch.wall_s, 3),
        peak_bytes=peak_bytes(),
        end="all steps done" if loop.step == prepared.total_steps else "the chain ended early",
    )
    return result_of(folder)


def loop_of(spec: RunSpec, prepared: Prepared, total_steps: int | None = None) -> Loop:
    """Make the loop of a spec; `total_steps` overrides its length."""
    chosen = spec.optimizer.model_dump(exclude={"learning_rate", "weight_decay"})
    assert spec.optimizer.learning_rate is not None
    return Loop(
        model=prepared.base.model,
        method=prepared.method,
        objective=TextObjective(prepared.data.feed, prepared.head),
        make_optimizer=torch_optimizer(**chosen),
        learning_rate=spec.optimizer.learning_rate,
        weight_decay=spec.optimizer.weight_decay,
        schedule=schedule(**spec.schedule.model_dump()),
        total_steps=total_steps or prepared.total_steps,
        clip=spec.train.clip,
        spike=spec.train.spike,
    )


def _same_inputs_or_refuse(folder: RunFolder, prepared: Prepared) -> None:
    """Write what the run was begun with, or refuse to go on with other weights or data."""
    now = {"base": prepared.base.fingerprint, "data": prepared.data.fingerprints}
    before = read_json(folder.environment).get("inputs")
    if before is None:
        write_json(folder.environment, {**environment(), "inputs": now, "data_report": prepared.data.report})
    elif before != now:
        changed = "base weights" if before["base"] != now["base"] else "data files"
        raise FolderError(
            f"the {changed} changed since this run began",
            where=str(folder.environment),
            fix="restore them, or move the run folder away to begin anew",
        )


def _resume(spec: RunSpec, folder: RunFolder, loop: Loop, watch: RunWatch, fingerprint: str) -> None:
    found = checkpoints(folder.checkpoints)
    if found:
        state = read_checkpoint(found[-1])
        loop.load_state(state)
        watch.load(state.facts["watch"], state.step)
        watch.total_steps = loop.total_steps
    elif spec.branch_from:
        point = _branch_point(spec.branch_from, folder.path.parent)
        _same_base_or_refuse(point, fingerprint)
        loop.load_state(read_checkpoint(point), branch=True)
        if loop.step >= loop.total_steps:
            raise CheckpointError(
                f"the branch begins at step {loop.step} but ends at step {loop.total_steps}",
                where="branch_from",
                fix="give a longer train.steps, or an earlier checkpoint",
            )
    for lines in (folder.metrics, folder.scores):
        # What stands at step 0 is measured again by a loop that begins there.
        keep_lines(lines, lambda line: bool(found) and 0 < loop.step >= line["step"])
    if loop.step:
        watch.read_base(0 if not found else loop.step)


def _branch_point(branch: str, root: Path) -> Path:
    run, at, step = branch.rpartition("@")
    if not at or not step.isdigit():
        raise CheckpointError(f"{branch!r} does not name a checkpoint", where="branch_from", fix="write RUN@STEP")
    places = [Path(run), root / run]
    steps: list[str] = []
    for place in places:
        if (folder := place / "checkpoints" / f"step-{step}").is_dir():
            return folder
        steps += [path.name.removeprefix("step-") for path in checkpoints(place / "checkpoints")]
    fix = f"checkpoints there: {', '.join(steps)}" if steps else "name a run folder that has checkpoints"
    raise CheckpointError("no such checkpoint", where=branch, fix=fix)


def _same_base_or_refuse(point: Path, fingerprint: str) -> None:
    inputs = read_json(RunFolder(point.parents[1]).environment).get("inputs", {})
    if inputs.get("base", fingerprint) != fingerprint:
        raise CheckpointError(
            "this checkpoint was trained on other base weights",
            where=str(point),
            fix="set model.path to the base of the run that it came from",
        )


def _save_delta(spec: RunSpec, folder: RunFolder, prepared: Prepared) -> None:
    """Save the delta whole: into a folder beside its place, then moved there."""
    partial = folder.path / "delta.partial"
    shutil.rmtree(partial, ignore_errors=True)
    try:
        prepared.method.save(partial)
        if prepared.base.tokenizer is not None:
            prepared.base.tokenizer.save_pretrained(partial)
        for number, link in enumerate(prepared.method.links(), start=1):
            save_lowrank(folder.links / f"link-{number}", link, spec.model.path, model=prepared.base.model)
    except (OSError, SafetensorError) as error:
        fix = "free space, or make the folder writable, and run the same command again"
        raise Interrupted(f"the delta could not be written: {error}", where=str(partial), fix=fix) from error
    shutil.rmtree(folder.delta, ignore_errors=True)
    partial.rename(folder.delta)


def _write_items(folder: RunFolder, base: dict[str, Reading], after: dict[str, Reading]) -> None:
    """Write per document and probe the summed loss of base and tuned: what paired tests need."""
    parts = []
    for name, reading in after.items():
        parts.append(
            pd.DataFrame(
                {
                    "probe": name,
                    "item": range(len(reading.loss_sums)),
                    "num_tokens": reading.num_tokens,
                    "base_loss_sum": base[name].loss_sums,
                    "tuned_loss_sum": reading.loss_sums,
                }
            )
        )
    if parts:
        table = BytesIO()
        pd.concat(parts, ignore_index=True).to_parquet(table, index=False)
        write_atomic(folder.path / "items.parquet", table.getvalue())


def result_of(folder: RunFolder) -> Result:
    """Read a finished run's result from its folder."""
    status = folder.read_status()
    found: dict[str, dict[str, Score]] = {"base": {}, "before": {}, "after": {}}
    for line in read_lines(folder.scores):
        score = Score(line["name"], line["value"], line["unit"], line["n"], line["standard_error"])
        if line["model"] == "base":
            found["base"][score.name] = score
        else:
            if line["step"] == 0:
                found["before"][score.name] = score
            found["after"][score.name] = score
    return Result(folder, status, **found)


@contextmanager
def _interrupts_explained() -> Iterator[None]:
    try:
        yield
    except KeyboardInterrupt:
        fix = "run the same command again: it goes on from its last checkpoint"
        raise Interrupted("stopped in the middle of a step", fix=fix) from None


class _Stop:
    requested = False


@contextmanager
def _stop_on_signals() -> Iterator[_Stop]:
    """Ask the loop to stop after the current step on the first SIGINT or SIGTERM; the second SIGINT stops at once."""
    stop = _Stop()

    def ask(number: int, _frame: Any) -> None:
        if stop.requested and number == signal.SIGINT:
            raise KeyboardInterrupt
        stop.requested = True

    try:
        before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    except ValueError:  # not the main thread: signals stay with whoever owns them
        before = {}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
