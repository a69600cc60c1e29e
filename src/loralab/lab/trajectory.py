"""The deltas that a run passed through, read from its checkpoints without building the model."""

import hashlib
import re
import tempfile
import weakref
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load, save_file
from torch import Tensor

from loralab.base.weights import Weights
from loralab.delta.lowrank import Delta, Dense, LayerDelta, LowRank, rank_sum
from loralab.delta.store import ADAPTER, WEIGHTS, is_adapter, load_lowrank
from loralab.errors import CheckpointError, DeltaError
from loralab.methods import METHODS, Method
from loralab.methods.cola import Cola
from loralab.methods.lora import Lora
from loralab.methods.peft import ADAPTER as PEFT_NAME
from loralab.methods.peft import Peft
from loralab.methods.value import PREFIX as OF_THE_VALUE
from loralab.run.folder import RunFolder, read_json, write_json
from loralab.spec.recipes import read
from loralab.training.checkpoint import MANIFEST, checkpoints

METHOD = "method.safetensors"
OTHER_BASE = "use the base that the run names in its spec.yaml"

_FACTOR = re.compile(r"^(?P<layer>.+)\.link-(?P<link>\d+)\.(?P<factor>[AB])$")
_WRAPPED = re.compile(rf"\.modules_to_save\.{PEFT_NAME}(?=\.)|\.{PEFT_NAME}(?=\.|$)")
"""What PEFT puts into the names of its parameters and leaves out of those that it saves."""


def checkpoints_of(run: Path) -> list[int]:
    """Give the steps of a run that have a finished checkpoint, in order."""
    return [int(path.name.removeprefix("step-")) for path in checkpoints(Path(run) / "checkpoints")]


def links_of(run: Path) -> list[Path]:
    """Give the links of a finished chain, PEFT folders, first to last; none for other methods."""
    named = [(re.fullmatch(r"link-(\d+)", path.name), path) for path in (Path(run) / "links").glob("link-*")]
    return [path for _, path in sorted((int(found[1]), path) for found, path in named if found and is_adapter(path))]


def delta_at(run: Path, step: int, weights: Weights) -> Delta:
    """Give the delta that a run had after `step` steps: what its method gave then, apart from where it is computed.

    Pairs come as they were trained, those of a chain as their sum, those of the PEFT library as it would save them. Of full
    fine-tuning a layer's difference from the base is formed when it is asked for, so that memory holds one at a time.

    Args:
        run: folder of a run, finished or not.
        step: of a checkpoint that is there.
        weights: of the base that the run began with.

    Raises:
        CheckpointError: there is no such checkpoint, or it is damaged (the large file of full fine-tuning is not summed up).
        DeltaError: the delta is of another base, or of a kind that a checkpoint cannot show.
    """
    point, method = _point(Path(run), step), _method(Path(run))
    if isinstance(method, Lora):
        links = _links(method, point, weights)
        summed: dict[str, LayerDelta] = {n: rank_sum([_pair(link, n) for link in links]) for n in links[0]}
        return replace(links[0], layers=summed)
    if isinstance(method, Peft):
        return _of_peft(method, point, weights)
    return _of_full(point, weights)


def links_at(run: Path, step: int, weights: Weights) -> list[Delta]:
    """Give the links that a chain had after `step` steps, first to current, each a delta; none for other methods.

    Raises:
        CheckpointError, DeltaError: as `delta_at`.
    """
    point, method = _point(Path(run), step), _method(Path(run))
    return _links(method, point, weights) if isinstance(method, Cola) else []


def _point(run: Path, step: int) -> Path:
    known = checkpoints_of(run)
    if step not in known:
        fix = f"checkpoints there: {', '.join(map(str, known))}" if known else "name a run folder that has checkpoints"
        raise CheckpointError("no such checkpoint", where=f"{run}@{step}", fix=fix)
    return run / "checkpoints" / f"step-{step}"


def _method(run: Path) -> Method:
    """Make the method of a run, attached to nothing: it knows ranks, scales and tuners.

    Raises:
        DeltaError: the run began from random weights, which are in no file, or its pairs from a delta, which checkpoints leave out.
    """
    spec = read(RunFolder(run).spec)
    if spec.model.random_init:
        fix = "measure it while it trains: probes.spectra"
        raise DeltaError("this run began from random weights, so its base is in no file", where=str(run), fix=fix)
    if spec.model.delta is not None and spec.method.name != "full":
        what = "checkpoints of a run that began from a delta hold what was learned on top of it, its `delta` the sum"
        raise DeltaError(what, where=str(run), fix="look at its links, or measure it while it trains: probes.spectra")
    return METHODS[spec.method.name](**spec.method.model_dump(exclude={"name"}))


def _fingerprint(point: Path) -> str | None:
    """Give the fingerprint of the base that the run of a checkpoint began with."""
    inputs = read_json(RunFolder(point.parents[1]).environment).get("inputs")
    return inputs.get("base") if isinstance(inputs, dict) else None


def _tensors(point: Path) -> dict[str, Tensor]:
    """Read the method's tensors and verify them. The optimizer's stay on disk; a value model beside a policy is none of them."""
    data = (point / METHOD).read_bytes() if (point / METHOD).is_file() else b""
    if hashlib.sha256(data).hexdigest() != read_json(point / MANIFEST).get("sha256", {}).get(METHOD):
        fix = "take another checkpoint of the run"
        what = "this checkpoint file is missing, or has not the checksum it was written with"
        raise CheckpointError(what, where=str(point / METHOD), fix=fix)
    tensors = sorted(load(data).items())  # the library gives them in any order
    return {name: tensor for name, tensor in tensors if not name.startswith(OF_THE_VALUE)}


# Pairs


def _links(method: Lora, point: Path, weights: Weights) -> list[Delta]:
    """Give every link as a delta, its layers in the model's order."""
    factors: dict[int, dict[str, dict[str, Tensor]]] = {}
    whole: dict[str, Tensor] = {}
    for key, tensor in _tensors(point).items():
        if found := _FACTOR.match(key):
            factors.setdefault(int(found["link"]), {}).setdefault(found["layer"], {})[found["factor"]] = tensor
        else:
            whole[key] = tensor
    links, mark, linears = [], _fingerprint(point), set(weights.linears())
    for _, link in sorted(factors.items()):
        pairs = {n: LowRank(f["A"], f["B"], method.scale_of(n, f["A"].shape[0])) for n, f in link.items()}
        _refuse_misfits({name: pair.shape for name, pair in pairs.items()}, weights, point)
        layers: dict[str, LayerDelta] = {name: pairs[name] for name in weights.layers() if name in pairs}
        embeddings = frozenset(name for name in layers if name not in linears and _is_turned(name, weights))
        links.append(Delta(layers, whole, mark, embeddings))
    return links


def _pair(link: Delta, name: str) -> LowRank:
    pair = link[name]
    assert isinstance(pair, LowRank)
    return pair


def _refuse_misfits(shapes: Mapping[str, tuple[int, ...]], weights: Weights, point: Path) -> None:
    known = weights.layers()
    wrong = [f"{name} is missing" for name in shapes if name not in known]
    wrong += [f"{n} is {known[n]}, the delta has {s}" for n, s in shapes.items() if n in known and known[n] != s]
    if wrong:
        raise DeltaError(
            "this run was trained on another base", where=f"{point}: {'; '.join(wrong[:3])}", fix=OTHER_BASE
        )


def _is_turned(name: str, weights: Weights) -> bool:
    """Tell whether a layer's parameter is held as (in, out), as Conv1D and embeddings do."""
    held, weight = weights.parameter(f"{name}.weight"), weights.weight(name)
    if held.shape != weight.shape:
        return True
    return held.shape[0] == held.shape[1] and not torch.equal(held, weight)


# Of the PEFT library


def _of_peft(method: Peft, point: Path, weights: Weights) -> Delta:
    """Read what the library would have saved; only plain pairs can be told from its tensors alone."""
    named = {
        _WRAPPED.sub("", name): tensor for name, tensor in _tensors(point).items() if not name.startswith("buffer/")
    }
    with tempfile.TemporaryDirectory() as folder:
        write_json(Path(folder, ADAPTER), {"peft_type": method.tuner, **method.keys})
        save_file(named, Path(folder, WEIGHTS))
        try:
            delta = load_lowrank(Path(folder))
        except DeltaError as error:
            fix = "measure it while it trains (probes.spectra), or at its end: the run's delta"
            raise DeltaError(f"a checkpoint cannot show this delta: {error.what}", where=str(point), fix=fix) from None
    _refuse_misfits({name: change.shape for name, change in delta.items()}, weights, point)
    layers = {name: delta[name] for name in weights.layers() if name in delta}
    return replace(delta, layers=layers, base_fingerprint=_fingerprint(point))


# Of full fine-tuning


def _of_full(point: Path, weights: Weights) -> Delta:
    file, linears = point / METHOD, {f"{name}.weight": name for name in weights.linears()}
    try:
        with safe_open(file, "pt") as opened:
            shapes = {key: tuple(opened.get_slice(key).get_shape()) for key in sorted(opened.keys())}
            whole = {key: opened.get_tensor(key) for key in shapes if key not in linears}
    except (OSError, SafetensorError) as error:
        fix = "take another checkpoint of the run"
        raise CheckpointError(f"this checkpoint file cannot be read: {error}", where=str(file), fix=fix) from None
    known = weights.layers()
    matrices = {key.removesuffix(".weight"): s for key, s in shapes.items() if key.endswith(".weight") and len(s) == 2}
    # What a model holds as (in, out) fits when it is turned.
    turned = {name for name, shape in matrices.items() if known.get(name, shape)[::-1] == shape}
    _refuse_misfits({n: shape[::-1] if n in turned else shape for n, shape in matrices.items()}, weights, point)

    def form(name: str) -> Tensor:
        with safe_open(file, "pt") as opened:
            tuned = opened.get_tensor(f"{name}.weight")
        # In training the base had the dtype of the tuned weights, whatever its files hold.
        before = weights.parameter(f"{name}.weight").to(tuned)
        moved = tuned.float() - before.float()
        return moved.t() if _is_turned(name, weights) else moved

    moved = {name: Unformed(known[name], partial(form, name)) for key, name in linears.items() if key in shapes}
    return Delta(dict(moved), whole, _fingerprint(point), keeps_ties=True)


class Unformed(Dense):
    """A dense change that is formed when its numbers are asked for, and anew if nobody holds them any more.

    Args:
        shape: (out, in).
        form: gives the difference tuned minus base.
    """

    def __init__(self, shape: tuple[int, int], form: Callable[[], Tensor]) -> None:
        self.__dict__.update(known=shape, form=form, formed=None)  # as every `Dense` it is frozen

    @property
    def weight(self) -> Tensor:
        found: Tensor | None = self.__dict__["formed"]() if self.__dict__["formed"] else None
        if found is None:
            found = self.__dict__["form"]()
            self.__dict__["formed"] = weakref.ref(found)
        return found

    @property
    def shape(self) -> tuple[int, ...]:
        known: tuple[int, int] = self.__dict__["known"]
        return known

    @property
    def num_parameters(self) -> int:
        return self.shape[0] * self.shape[1]
