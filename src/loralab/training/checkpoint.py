"""Checkpoints: everything a run needs to go on as if it had never stopped.

A folder `step-N` holds safetensors for tensors and JSON for the rest, with the SHA-256 of each file in `manifest.json`,
which is written last: a folder without it is not a checkpoint. Nothing is pickled.
"""

import hashlib
import json
import re
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load, save
from torch import Tensor

from loralab.errors import CheckpointError
from loralab.run.files import explain_failed_writes, write_atomic, write_json

MANIFEST, FACTS = "manifest.json", "facts.json"
_NAME = re.compile(r"^step-(\d+)$")


@dataclass
class State:
    """The state of a run at a step: named tensor groups (method, optimizer, rng) and plain facts."""

    step: int
    tensors: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    facts: dict[str, Any] = field(default_factory=dict)


def write_checkpoint(root: Path, state: State) -> Path:
    """Write `root/step-N` whole and return it. Raises Interrupted when the disk is full; older checkpoints stay."""
    folder = root / f"step-{state.step}"
    if folder.exists():
        shutil.rmtree(folder)
    with explain_failed_writes(folder):
        folder.mkdir(parents=True)
    sums = {}
    try:
        for group, tensors in state.tensors.items():
            data = save(_unshared(tensors))
            sums[f"{group}.safetensors"] = _put(folder / f"{group}.safetensors", data)
        sums[FACTS] = _put(folder / FACTS, json.dumps(state.facts).encode())
        write_json(folder / MANIFEST, {"step": state.step, "sha256": sums})
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    return folder


def _unshared(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Bring tensors to main memory; only tied ones and views are copied, which the file format does not take."""
    found: dict[str, Tensor] = {}
    storages: set[int] = set()
    for name, tensor in tensors.items():
        here = tensor.detach().cpu().contiguous()
        storage = here.untyped_storage()
        if storage.data_ptr() in storages or storage.nbytes() != here.nbytes:
            here = here.clone()
        storages.add(here.untyped_storage().data_ptr())
        found[name] = here
    return found


def _put(path: Path, data: bytes) -> str:
    write_atomic(path, data)
    return hashlib.sha256(data).hexdigest()


def read_checkpoint(folder: Path) -> State:
    """Read a checkpoint and verify every file.

    Raises:
        CheckpointError: a file is missing or its SHA-256 differs.
    """
    manifest = _manifest(folder)
    state = State(manifest["step"])
    for name, expected in manifest["sha256"].items():
        try:
            data = (folder / name).read_bytes()
        except FileNotFoundError:
            raise _damaged(folder / name, "is missing") from None
        if hashlib.sha256(data).hexdigest() != expected:
            raise _damaged(folder / name, "does not have the checksum it was written with")
        if name == FACTS:
            state.facts = json.loads(data)
        else:
            state.tensors[name.removesuffix(".safetensors")] = load(data)
    return state


def _manifest(folder: Path) -> dict[str, Any]:
    try:
        return dict(json.loads((folder / MANIFEST).read_text()))
    except FileNotFoundError:
        raise _damaged(folder / MANIFEST, "is missing") from None
    except ValueError:
        raise _damaged(folder / MANIFEST, "is not JSON") from None


def _damaged(path: Path, what: str) -> CheckpointError:
    return CheckpointError(
        f"this checkpoint file {what}",
        where=str(path),
        fix=f"delete {path.parent} and a run goes on from the checkpoint before it",
    )


def checkpoints(root: Path) -> list[Path]:
    """List finished checkpoints, oldest first."""
    found = [(int(m[1]), p) for p in root.glob("step-*") if (m := _NAME.match(p.name)) and (p / MANIFEST).is_file()]
    return [path for _, path in sorted(found)]


def prune(root: Path, keep_last: int, best: int | None) -> None:
    """Delete all but the last `keep_last` checkpoints and the best one, and folders that were never finished."""
    finished = checkpoints(root)
    keep = {path.name for path in finished[-keep_last:]} | ({f"step-{best}"} if best is not None else set())
    for path in root.glob("step-*"):
        if _NAME.match(path.name) and path.name not in keep:
            shutil.rmtree(path)


def random_state() -> dict[str, Tensor]:
    """Give the state of torch's random generators."""
    state = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        state |= {f"cuda-{i}": s for i, s in enumerate(torch.cuda.get_rng_state_all())}
    return state


def set_random_state(state: dict[str, Tensor]) -> None:
    """Set torch's random generators."""
    torch.set_rng_state(state["cpu"])
    for name, value in state.items():
        if name.startswith("cuda-") and torch.cuda.is_available():
            torch.cuda.set_rng_state(value, int(name.removeprefix("cuda-")))
