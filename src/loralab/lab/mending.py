"""A delta on its base, ready to be edited: read, looked through for intruders, edited, and saved as what it was."""

import hashlib
import shutil
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from safetensors import SafetensorError
from torch import Tensor
from transformers.pytorch_utils import Conv1D

from loralab.base.model import Base, load
from loralab.base.targets import linears
from loralab.base.weights import Weights, open_weights
from loralab.delta.layers import own_parameters
from loralab.delta.lowrank import Delta, Dense, LowRank
from loralab.delta.opened import fit_delta, folder_of
from loralab.delta.several import Wardrobe
from loralab.delta.store import ADAPTER, check_base, difference, is_adapter, load_lowrank, save_lowrank
from loralab.errors import DeltaError, FolderError
from loralab.lab.deltas import read_delta
from loralab.lab.dissect import Question, view
from loralab.run.files import explain_failed_writes, read_json, write_json
from loralab.spectral.heads import HeadCache
from loralab.spectral.intruders import DENSE_BELOW, Intruders, intruders
from loralab.spectral.repair import Edit, depth_of, edited, sharpened, touched
from loralab.spectral.thresholds import compressed, norm_of

Told = Callable[[int, int, str], None]
"""Takes how far it is: what is done, of how many, and what."""

OF_THE_PAIRS = ("r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "base_model_name_or_path")
"""Keys of an adapter that an edit changes; all others stay as they were."""
DISCARDED = ("discarded", "discarded_norm")


def silent(done: int, of: int, what: str) -> None:
    """Take how far it is, and say nothing."""


@dataclass(frozen=True, eq=False)
class Subject:
    """A delta and the base it belongs to.

    Attributes:
        delta: pairs, or dense matrices of all linears that moved, and what was trained whole beside them.
        kind: `low-rank` or `dense`.
        weights: of the base.
        base_path: as it was given.
        base: in memory; None where only its files are read.
        adapter: folder of the PEFT adapter that it was read from, if any.
    """

    delta: Delta
    kind: str
    weights: Weights
    base_path: str
    base: Base | None = None
    adapter: Path | None = None

    @property
    def blocks(self) -> int:
        """Transformer blocks of the base."""
        return 1 + max(map(depth_of, self.weights.layers()), default=0)

    def search(self, question: Question, cache: Path | None = None, told: Told = silent) -> dict[str, Intruders]:
        """Find the intruders of every matrix, their triplets sharp enough to be taken out.

        Args:
            question: how many vectors of each tuned weight, and what counts as like none of the base's.
            cache: folder of the base's heads; None is the usual one.
            told: takes how far it is.

        Raises:
            DeltaError: a weight or a change is not finite; the matrix is named.
        """
        heads = HeadCache(cache)
        how: dict[str, Any] = {"k": question.k, "epsilon": question.epsilon, "exact": question.exact}
        found: dict[str, Intruders] = {}
        for done, (name, change) in enumerate(self.delta.items(), start=1):
            if len(change.shape) != 2:
                continue
            device = change.B.device if isinstance(change, LowRank) else change.weight.device
            weight = self.weights.weight(name).to(device)
            head = heads.of(weight) if min(weight.shape) >= DENSE_BELOW and not question.exact else None
            try:
                found[name] = sharpened(weight, change, intruders(weight, change, head=head, **how))
            except DeltaError as error:
                place = f"{name}: {error.where}" if error.where else name
                raise DeltaError(error.what, where=place, fix=error.fix) from error
            told(done, len(self.delta), f"intruders of {name}")
        return found

    def edit(self, edit: Edit, found: Mapping[str, Intruders], rank: int | None = None) -> tuple[Delta, pd.DataFrame]:
        """Edit the delta, compress pairs above a rank, and give a row per matrix as `Repaired.matrices` has them.

        Raises:
            DeltaError: the edit does not fit the delta, or a dense delta is to be compressed.
        """
        result = edited(self.delta, edit, found=found, whole=self._own, blocks=self.blocks)
        exact = {name: change.rank if isinstance(change, LowRank) else None for name, change in result.items()}
        lost = pd.DataFrame(columns=["layer", *DISCARDED])
        if rank is not None:
            result, lost = compressed(result, rank)
        losses = lost.set_index("layer")
        acts = edit.needs_intruders and edit.strength != edit.neutral
        rows: list[dict[str, Any]] = []
        for name, before in self.delta.items():
            after = result[name]
            row: dict[str, Any] = {"layer": name, "intruders": len(found[name].indices) if name in found else None}
            row["touched"] = len(touched(edit, found[name])) if acts and name in found else 0
            row["rank_before"] = before.rank if isinstance(before, LowRank) else None
            row["rank_exact"], row["rank"] = exact[name], after.rank if isinstance(after, LowRank) else None
            row["norm_before"] = norm_of(before)
            row["norm"] = row["norm_before"] if after is before else norm_of(after)
            rows.append(row | {key: float(losses.at[name, key]) if name in losses.index else 0.0 for key in DISCARDED})
        return result, pd.DataFrame(rows)

    def _own(self, name: str) -> Tensor:
        return self.weights.parameter(name)

    def save(self, folder: Path, delta: Delta) -> None:
        """Save an edit of the delta as what it was: a PEFT folder, or a checkpoint; whole or not at all.

        Raises:
            FolderError: the folder cannot be written.
            Interrupted: the disk is full.
        """
        partial = folder.with_name(f"{folder.name}.partial")
        shutil.rmtree(partial, ignore_errors=True)
        try:
            with explain_failed_writes(folder):
                if self.kind == "low-rank":
                    self._save_adapter(partial, delta)
                else:
                    self._save_checkpoint(partial, delta)
                partial.replace(folder)
        finally:
            shutil.rmtree(partial, ignore_errors=True)

    def _save_adapter(self, folder: Path, delta: Delta) -> None:
        save_lowrank(folder, delta, self.base_path, model=None if self.base is None else self.base.model)
        if self.adapter is not None:
            ours, theirs = read_json(folder / ADAPTER), read_json(self.adapter / ADAPTER)
            write_json(folder / ADAPTER, {**ours, **theirs, **{key: ours[key] for key in OF_THE_PAIRS}})

    def _save_checkpoint(self, folder: Path, delta: Delta) -> None:
        assert self.base is not None
        model = self.base.model
        tied = getattr(model.config, "tie_word_embeddings", False)
        try:
            with Wardrobe(model, {"edited": delta}).view("edited")():
                model.config.tie_word_embeddings = tied and _tables_are_equal(model)
                model.save_pretrained(folder)
            if self.base.tokenizer is not None:
                self.base.tokenizer.save_pretrained(folder)
        except SafetensorError as error:
            raise FolderError(f"the checkpoint cannot be written: {error}", where=str(folder)) from error
        finally:
            model.config.tie_word_embeddings = tied


def _tables_are_equal(model: Any) -> bool:
    table, head = model.get_input_embeddings(), model.get_output_embeddings()
    return head is None or torch.equal(table.weight, head.weight)


def open_subject(base: str | Base, delta: str | Delta, *, light: bool = False, **how: Any) -> Subject:
    """Read a delta and its base.

    Args:
        base: folder or hub id, or as loaded.
        delta: PEFT folder, run folder or checkpoint; or in memory.
        light: read only the files of the base, where the delta is an adapter and nothing has to be measured.
        how: of `load`: revision, dtype, device, trust_remote_code.

    Raises:
        DeltaError: there is no delta, it belongs to another base, or has nothing to edit.
        ModelError: the base or a checkpoint cannot be loaded.
    """
    adapter = _adapter_of(delta) if isinstance(delta, str) else None
    if light and adapter is not None and isinstance(base, str):
        trusted = how.get("trust_remote_code", False)
        files = open_weights(base, revision=how.get("revision"), trust_remote_code=trusted)
        read = load_lowrank(adapter)
        if not set(read) - set(files.layers()):  # else its layers may go by other names than the base's
            _refuse_shapes(read, files)
            fit_delta(read, files, where=str(delta))
            _refuse_infinite(read)
            return Subject(read, _kind(read), files, base, None, adapter)
    loaded = load(base, **how, need_tokenizer=not light) if isinstance(base, str) else base
    if isinstance(delta, str):
        read = read_delta(delta, loaded)
    else:
        read = delta
        check_base(read, loaded.model, loaded.fingerprint)
    if not read.layers and read.whole:
        read = _as_matrices(read, loaded)
    if not read.layers and not read.whole:
        raise DeltaError("this delta changes nothing", where=str(delta), fix="name a delta that was trained")
    _refuse_infinite(read)
    return Subject(read, _kind(read), view(loaded), loaded.path, loaded, adapter)


def _refuse_infinite(delta: Delta) -> None:
    """Refuse a delta with NaN or infinite numbers before anything is measured on it, naming the first three matrices."""
    tensors = {name: (c.A, c.B) if isinstance(c, LowRank) else (c.weight,) for name, c in delta.items()}
    odd = [name for name, parts in tensors.items() if not all(bool(torch.isfinite(part).all()) for part in parts)]
    if odd:
        fix = "train it again, or take an earlier checkpoint"
        raise DeltaError("the delta holds numbers that are not finite", where=", ".join(odd[:3]), fix=fix)


def _refuse_shapes(delta: Delta, weights: Weights) -> None:
    """Refuse a delta of which a matrix has another shape than the base's, naming the first three."""
    shapes = weights.layers()
    odd = [name for name, change in delta.items() if tuple(change.shape) != shapes[name]]
    if odd:
        said = "; ".join(f"{name} is {shapes[name]}, the delta has {tuple(delta[name].shape)}" for name in odd[:3])
        fix = "use the base that the delta was trained on"
        raise DeltaError("this delta belongs to another base", where=said, fix=fix)


def _kind(delta: Delta) -> str:
    pairs = [isinstance(change, LowRank) for change in delta.values()]
    return "low-rank" if pairs and all(pairs) else "dense"


def _adapter_of(path: str) -> Path | None:
    folder = folder_of(path)
    return folder if is_adapter(folder) else None


def _as_matrices(delta: Delta, base: Base) -> Delta:
    """Turn the linears of a checkpoint, held as their tuned values, into differences; all else stays whole."""
    layers = {name: isinstance(module, Conv1D) for name, module in linears(base.model).items()}
    before: dict[str, Tensor] = {name: value.detach() for name, value in own_parameters(base.model).items()}
    found = difference(delta.whole, before, layers, delta.base_fingerprint)
    return replace(found, keeps_ties=delta.keeps_ties)


def signature(delta: Delta, known: Mapping[int, str]) -> str:
    """Hash all that a delta does (SHA-256), so that equal edits are measured once.

    Args:
        delta: an edit.
        known: hashes of the tensors that it shares with the delta it was made of, by their `id`.
    """
    total = hashlib.sha256()
    for name, change in sorted(delta.items()):
        scale = change.scale if isinstance(change, LowRank) else 1.0
        tensors = (change.A, change.B) if isinstance(change, LowRank) else (change.weight,)
        total.update(f"{name} {scale!r} {[known.get(id(t)) or digest(t) for t in tensors]}\n".encode())
    for name, value in sorted(delta.whole.items()):
        total.update(f"{name} {known.get(id(value)) or digest(value)}\n".encode())
    return total.hexdigest()


def digest(tensor: Tensor) -> str:
    """Hash the dtype, shape and bytes of a tensor (SHA-256)."""
    plain = tensor.detach().cpu().contiguous()
    found = hashlib.sha256(f"{plain.dtype} {tuple(plain.shape)}".encode())
    found.update(plain.flatten().view(torch.uint8).numpy().data)
    return found.hexdigest()


def tensors_of(delta: Delta) -> Collection[Tensor]:
    """List all tensors of a delta."""
    found: list[Tensor] = list(delta.whole.values())
    for change in delta.values():
        found += [change.weight] if isinstance(change, Dense) else [change.A, change.B]
    return found
