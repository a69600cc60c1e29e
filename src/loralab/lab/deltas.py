"""Deltas by path: PEFT folders, run folders, and fully fine-tuned checkpoints."""

from collections.abc import Sequence
from itertools import count
from pathlib import Path

import torch

from loralab.base.model import Base, load
from loralab.delta.layers import own_parameters
from loralab.delta.lowrank import Delta
from loralab.delta.opened import base_of_run, folder_of
from loralab.delta.store import check_base, is_adapter, load_lowrank
from loralab.errors import DeltaError


def read_delta(path: str, base: Base) -> Delta:
    """Read a delta and check that it is of this base.

    A checkpoint's parameters are compared with the base's; those that differ are the delta, held whole.

    Args:
        path: PEFT folder, run folder, or folder (or hub id) of a whole checkpoint.
        base: as loaded.

    Raises:
        DeltaError: there is no delta, or it belongs to another base.
        ModelError: a checkpoint cannot be loaded.
    """
    folder = folder_of(path)
    if is_adapter(folder):
        delta = load_lowrank(folder)
    elif (folder / "config.json").is_file() or not folder.exists():
        delta = _difference(str(folder), base)
    else:
        fix = "name a PEFT folder, a run folder, or a folder with config.json"
        raise DeltaError("this folder holds no delta", where=path, fix=fix)
    check_base(delta, base.model, base.fingerprint)
    trained_on = base_of_run(Path(path))
    if trained_on and trained_on != base.fingerprint:
        raise DeltaError(
            "this run was trained on other base weights",
            where=f"{path}: trained on {trained_on[:12]}, this base is {base.fingerprint[:12]}",
            fix="use the base that the run names in its spec.yaml",
        )
    return delta


def _difference(path: str, base: Base) -> Delta:
    dtype = str(base.model.dtype).removeprefix("torch.")
    tuned = load(path, dtype=dtype, device=str(base.model.device), need_tokenizer=False)
    before, after = own_parameters(base.model), dict(tuned.model.named_parameters(remove_duplicate=False))
    strange = sorted(set(before) ^ set(after))
    shapes = [name for name in before if name in after and before[name].shape != after[name].shape]
    if strange or shapes:
        raise DeltaError(
            "this checkpoint is no fine-tuning of the base: its parameters have other names or shapes",
            where=", ".join([*strange, *shapes][:3]),
            fix="use the base that it was trained from",
        )
    moved = {name: value.detach() for name, value in after.items() if not torch.equal(value, before[name])}
    return Delta({}, moved)


def names_of(paths: Sequence[str]) -> list[str]:
    """Give each delta a short name: of its run folder or its folder; a number makes equal ones different."""
    names: list[str] = []
    for path in paths:
        folder = Path(path)
        name = (folder.parent if folder.name == "delta" else folder).resolve().name or path
        name = f"{name}'s delta" if name == "base" else name
        free = (f"{name} ({copy})" if copy > 1 else name for copy in count(1))
        names.append(next(one for one in free if one not in names))
    return names
