"""Where a run begins: at its start, at its last checkpoint, or at a checkpoint of another run."""

from pathlib import Path
from typing import Any

from loralab.errors import CheckpointError, FolderError
from loralab.lab.prepare import START, Prepared
from loralab.lab.reward_function import REWARD_FUNCTION
from loralab.lab.watch import RunWatch
from loralab.run.folder import RunFolder, environment, keep_lines, read_json, write_json
from loralab.spec.recipes import diff, read
from loralab.spec.spec import RunSpec
from loralab.training.checkpoint import checkpoints, read_checkpoint
from loralab.training.loop import Loop

TRUNK = ("seed", "model", "data", "method", "objective", "optimizer")
"""Sections that a branch shares with the run it comes from."""


def same_inputs_or_refuse(folder: RunFolder, prepared: Prepared) -> None:
    """Write what the run was begun with, or refuse to go on with other weights, data or deltas.

    A reward function may be mended; until which step another one was in use stays on record.
    """
    now: dict[str, Any] = {"base": prepared.base.fingerprint, "data": prepared.data.fingerprints}
    facts = read_json(folder.environment)
    before = facts.get("inputs")
    if before is None:
        write_json(folder.environment, {**environment(), "inputs": now, "data_report": prepared.data.report})
    elif changed := _changed(before, now):
        raise FolderError(
            f"the {changed} since this run began",
            where=str(folder.environment),
            fix="restore what it was, or move the run folder away to begin anew",
        )
    elif before != now:
        old = {name: mark for name, mark in before["data"].items() if now["data"].get(name) != mark}
        mended = [*facts.get("mended", []), {"step": folder.read_status().get("step", 0), **old}] if old else []
        write_json(folder.environment, {**facts, "inputs": now} | ({"mended": mended} if mended else {}))


def _changed(before: dict[str, Any], now: dict[str, Any]) -> str:
    """Say what is not what it was, "" for nothing; reward functions are free to change."""
    if before["base"] != now["base"]:
        return "base weights changed"
    names = (name for name in {**before["data"], **now["data"]} if not name.startswith(REWARD_FUNCTION))
    changed = [name for name in names if before["data"].get(name) != now["data"].get(name)]
    return f"data files changed ({', '.join(changed)})" if changed else ""


def resume(folder: RunFolder, loop: Loop, watch: RunWatch, *, spec: RunSpec, fingerprint: str) -> None:
    """Bring loop and watch to where the run goes on; drop what was written behind that step.

    Args:
        folder: of the run.
        loop: fresh.
        watch: fresh.
        spec: of the run; `branch_from` says where it begins if it has no checkpoint yet.
        fingerprint: of the base.

    Raises:
        CheckpointError: a checkpoint is missing, damaged, or of another method or base.
    """
    found = checkpoints(folder.checkpoints)
    if found:
        state = read_checkpoint(found[-1])
        loop.load_state(state)
        watch.load(state.facts["watch"], state.step)
        watch.total_steps = loop.total_steps
    elif spec.branch_from:
        point = _branch_point(spec.branch_from, folder.path.parent)
        _same_base_or_refuse(point, fingerprint, folder)
        _same_trunk_or_refuse(point, spec)
        loop.load_state(read_checkpoint(point), branch=True)
        if loop.step >= loop.total_steps:
            raise CheckpointError(
                f"the branch begins at step {loop.step} but ends at step {loop.total_steps}",
                where="branch_from",
                fix="give a longer train.steps, or an earlier checkpoint",
            )
    for lines in (folder.metrics, folder.scores, folder.samples):
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


def _same_trunk_or_refuse(point: Path, spec: RunSpec) -> None:
    """Refuse a branch that differs from its trunk in more than length, schedule, probes and checkpoints."""
    trunk = read(RunFolder(point.parents[1]).spec)
    # Paths may have moved and devices may change: what lies there is compared by content.
    changed = [
        key
        for key, _, _ in diff(trunk, spec)
        if key.partition(".")[0] in TRUNK and not key.endswith((".path", ".device", "model.delta"))
    ]
    if changed:
        raise CheckpointError(
            f"a branch goes on as its trunk did, but differs in {', '.join(changed[:4])}",
            where=str(point),
            fix="change only train, schedule, probes and checkpoints",
        )


def _same_base_or_refuse(point: Path, fingerprint: str, folder: RunFolder) -> None:
    inputs = read_json(RunFolder(point.parents[1]).environment).get("inputs", {})
    if inputs.get("base", fingerprint) != fingerprint:
        raise CheckpointError(
            "this checkpoint was trained on other base weights",
            where=str(point),
            fix="set model.path to the base of the run that it came from",
        )
    now = read_json(folder.environment)["inputs"]["data"]
    if "data" in inputs and inputs["data"].get(START) != now.get(START):
        raise CheckpointError(
            "this checkpoint's run began from another delta",
            where=str(point),
            fix="set model.delta to what the run that it came from began from",
        )
