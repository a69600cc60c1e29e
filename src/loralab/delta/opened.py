"""Any delta by path, a matrix at a time: PEFT folders, run folders, and fully fine-tuned checkpoints beside their base.

A layer goes by the base's name for it, also where the delta was made on a model that carries another prefix. What does not fit the
base is said layer by layer and keeps nobody from reading the others.
"""

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from loralab.base.weights import Weights, open_weights, same_name
from loralab.delta.lowrank import Delta, Dense, LayerDelta, LowRank
from loralab.delta.store import is_adapter, load_lowrank
from loralab.errors import DeltaError
from loralab.run.files import read_json

USE_ITS_BASE = "use the base that the delta was trained on"


class OpenedDelta(Mapping[str, LayerDelta]):
    """The matrices of a delta that fit a base, by the base's names; reading one forms that one only.

    Attributes:
        kind: "low-rank" if any matrix is a pair, else "dense".
        base_fingerprint: of the base that the delta was made on; None where unknown.
        problems: layer → why it cannot be measured against this base.
        notes: what of the delta is not among its matrices, and what was done to those; may grow while they are read.
    """

    def __init__(
        self,
        forms: Mapping[str, Callable[[], LayerDelta]],
        *,
        kind: str,
        base_fingerprint: str | None = None,
        problems: Mapping[str, str] | None = None,
        notes: list[str] | None = None,
    ) -> None:
        self._forms = dict(forms)
        self.kind, self.base_fingerprint = kind, base_fingerprint
        self.problems, self.notes = dict(problems or {}), [] if notes is None else notes

    def __getitem__(self, name: str) -> LayerDelta:
        return self._forms[name]()

    def __contains__(self, name: object) -> bool:
        return name in self._forms  # a Mapping's own test would form the matrix

    def __iter__(self) -> Iterator[str]:
        return iter(self._forms)

    def __len__(self) -> int:
        return len(self._forms)


def open_delta(path: str, weights: Weights, *, trust_remote_code: bool = False) -> OpenedDelta:
    """Open the delta at a path against its base; no dense matrix is formed yet.

    Args:
        path: PEFT folder, run folder, or folder (or hub id) of a whole checkpoint.
        weights: of the base.
        trust_remote_code: run a checkpoint's own code.

    Raises:
        DeltaError: there is no delta, it was made on other base weights, or nothing of it fits the base.
        ModelError: a checkpoint cannot be read.
    """
    given = Path(path).expanduser()
    folder = folder_of(given)
    if is_adapter(folder):
        return fit_delta(load_lowrank(folder), weights, where=path, trained_on=base_of_run(given))
    if not (folder / "config.json").is_file() and folder.exists():
        fix = "name a PEFT folder, a run folder, or a folder with config.json"
        raise DeltaError("this folder holds no delta", where=path, fix=fix)
    mark = base_of_run(given)
    _refuse_other_base(mark, weights, path)
    target = path if folder == given else str(folder)
    return _difference(open_weights(target, trust_remote_code=trust_remote_code), weights, mark)


def fit_delta(delta: Delta, weights: Weights, *, where: str = "delta", trained_on: str | None = None) -> OpenedDelta:
    """Fit a delta in memory to its base.

    A linear that was trained whole counts as a dense matrix, as in full fine-tuning; norms, biases, embeddings and heads do not.

    Args:
        delta: of any method.
        weights: of the base.
        where: what to call the delta.
        trained_on: fingerprint of its base, where the delta itself does not know it.

    Raises:
        DeltaError: it was made on other base weights, or nothing of it fits the base.
    """
    mark = delta.base_fingerprint or trained_on
    _refuse_other_base(mark, weights, where)
    shapes, inside = weights.layers(), set(weights.linears())
    forms: dict[str, Callable[[], LayerDelta]] = {}
    problems: dict[str, str] = {}
    kind = "dense"
    # Layers of another type than dict are formed as they are asked for (`lab.trajectory`): their shapes show when they are read.
    ready = type(delta.layers) is dict
    for name in delta:
        own = same_name(name, shapes)
        if own is None:
            problems[name] = "the base has no such layer"
        elif ready and (problem := _misfit(delta[name].shape, shapes[own])):
            problems[own] = problem
        else:
            forms[own] = partial(_given, delta, name, shapes[own])
        if ready and isinstance(delta[name], LowRank):
            kind = "low-rank"
    beside = []
    for name, value in delta.whole.items():
        layer = same_name(name.removesuffix(".weight"), shapes) if name.endswith(".weight") else None
        if layer not in inside or layer in forms or layer in problems:
            beside.append(name)
        elif sorted(value.shape) != sorted(shapes[layer]):
            problems[layer] = f"the delta's weight is {tuple(value.shape)}, the base's {shapes[layer]}"
        else:
            forms[layer] = partial(_moved, value, weights, layer)
    found = OpenedDelta(
        forms,
        kind=kind,
        base_fingerprint=mark,
        problems=problems,
        notes=[_left_out(beside)] if beside else [],
    )
    return _with_something(found, where)


def _given(delta: Delta, name: str, wanted: tuple[int, int]) -> LayerDelta:
    change = delta[name]
    if problem := _misfit(change.shape, wanted):
        raise DeltaError(problem, where=name, fix=USE_ITS_BASE)
    return change if isinstance(change, LowRank) else Dense(change.weight)  # formed once, where it was not yet


def _moved(value: Tensor, weights: Weights, layer: str) -> Dense:
    """Give the change of a linear that was trained whole (its parameter, as it is stored), as (out, in)."""
    moved = _minus(value.detach().cpu(), weights.parameter(f"{layer}.weight").cpu())
    seen = weights.weight(layer)  # a turned view where the layer stores (in, out), as Conv1D does
    return Dense(moved if seen.is_contiguous() and seen.shape == moved.shape else moved.t())


def _subtracted(tuned: Weights, own: str, base: Weights, name: str) -> Dense:
    return Dense(_minus(tuned.weight(own).cpu(), base.weight(name).cpu()))


def _minus(tuned: Tensor, base: Tensor) -> Tensor:
    """Subtract in float32. The base is rounded to the tuned weight's dtype first, the one in which training began from it."""
    moved = tuned.to(torch.float32, copy=True)
    # A few rows at a time, in place: widened whole, the base's weight would take as much memory again.
    for rows, before in zip(moved.split(256), base.split(256), strict=True):
        rows.sub_(before.to(tuned.dtype).float())
    return moved


def _difference(tuned: Weights, base: Weights, mark: str | None) -> OpenedDelta:
    """Give the dense delta between a checkpoint and its base, over the linears of either."""
    before, after = base.layers(), tuned.layers()
    forms: dict[str, Callable[[], LayerDelta]] = {}
    problems: dict[str, str] = {}
    known = set[str]()
    for name in base.linears():
        own = same_name(name, after)
        known.add(own or name)
        if own is None:
            problems[name] = "the checkpoint has no such layer"
        elif after[own] != before[name]:
            problems[name] = f"the checkpoint's weight is {after[own]}, the base's {before[name]}"
        else:
            forms[name] = partial(_subtracted, tuned, own, base, name)
    problems |= {name: "the base has no such layer" for name in tuned.linears() if name not in known}
    tuned.notes.append("of a checkpoint the linears are measured; embeddings, heads, norms and biases are not")
    found = OpenedDelta(forms, kind="dense", base_fingerprint=mark, problems=problems, notes=tuned.notes)
    return _with_something(found, tuned.path)


def _misfit(shape: tuple[int, ...], wanted: tuple[int, int]) -> str:
    """Say why a change does not fit the base's layer, "" if it does."""
    if len(shape) != 2:
        return f"the change is no matrix: {shape}"
    return "" if shape == wanted else f"the delta is {shape}, the base's weight {wanted}"


def _left_out(names: list[str]) -> str:
    more = f" and {len(names) - 1} more" if len(names) > 1 else ""
    return f"not measured, since it was trained whole beside the matrices: {names[0]}{more}"


def _with_something(found: OpenedDelta, where: str) -> OpenedDelta:
    if not found and found.problems:
        said = "; ".join(f"{layer}: {problem}" for layer, problem in list(found.problems.items())[:3])
        raise DeltaError(
            "this delta belongs to another base: nothing of it fits", where=f"{where}: {said}", fix=USE_ITS_BASE
        )
    if not found:
        raise DeltaError("this delta changes no matrix", where=where, fix="name a delta that changes linear layers")
    return found


def _refuse_other_base(trained_on: str | None, weights: Weights, where: str) -> None:
    """Refuse a delta of other base weights: with the same shapes its numbers would be meaningless, and nothing would show it."""
    mark = weights.fingerprint() if trained_on else None
    if mark and trained_on != mark:
        raise DeltaError(
            "this delta was trained on other base weights",
            where=f"{where}: trained on {str(trained_on)[:12]}, this base is {mark[:12]}",
            fix=USE_ITS_BASE,
        )


def folder_of(path: str | Path) -> Path:
    """Give the folder that holds a delta: of a run its `delta/`, else the one that is named."""
    given = Path(path).expanduser()
    return given / "delta" if (given / "delta").is_dir() else given


def base_of_run(folder: Path) -> str | None:
    """Give the fingerprint of the base that a run began with; None where this is no run, or one that does not say."""
    inputs = read_json(folder / "environment.json").get("inputs")
    return inputs.get("base") if isinstance(inputs, dict) else None
