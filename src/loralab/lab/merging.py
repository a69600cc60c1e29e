"""Export: one merged checkpoint from a base and a low-rank delta, with proof."""

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from loralab.base.data import Batch, collate
from loralab.base.hub import find, read_facts
from loralab.base.model import Base, load
from loralab.base.text import Example
from loralab.delta.layers import load_delta_, unwrap_
from loralab.delta.merge import LayerMerge, merge_
from loralab.delta.opened import folder_of
from loralab.delta.store import check_base, is_adapter, load_lowrank
from loralab.errors import DataError, DeltaError, FolderError, MergeError
from loralab.run.folder import write_json
from loralab.training.loss import LanguageHead

PROBE_TEXT = (
    "Once upon a time a small river ran past an old mill. The miller counted the sacks: seven of wheat, four of rye. "
    "In 1887 the bridge was rebuilt in iron, and the road to the market town became shorter by half a day. "
    "def area(width, height): return width * height\n"
    "Question: If a train leaves at noon and travels 60 miles each hour, how far has it gone by three? Answer: 180 miles."
)
REPORT = "merge.json"
DTYPES = ("float32", "bfloat16", "float16")


@dataclass(frozen=True)
class MergeReport:
    """The proof of a merge: errors per layer and the change of the predictions."""

    layers: list[LayerMerge]
    dtype: str
    kl_nats: float
    """Mean KL(unmerged‖merged) per position of the probe text."""
    max_logit_difference: float
    num_positions: int

    @property
    def rounded_error(self) -> float:
        """Root mean square over layers of the delta's share lost to rounding."""
        return _rms([layer.rounded_error for layer in self.layers])

    @property
    def half_ulp_error(self) -> float:
        """The same for one rounding of the exact sum: what cannot be avoided in this dtype."""
        return _rms([layer.half_ulp_error for layer in self.layers])

    @property
    def float32_error(self) -> float:
        """The same before rounding."""
        return _rms([layer.float32_error for layer in self.layers])

    def summary(self) -> dict[str, Any]:
        """Give the numbers of the report as plain values."""
        return {
            "dtype": self.dtype,
            "layers": len(self.layers),
            "float32_error": self.float32_error,
            "rounded_error": self.rounded_error,
            "one_rounding_error": self.half_ulp_error,
            "unchanged_share": sum(layer.unchanged_share for layer in self.layers) / max(1, len(self.layers)),
            "kl_nats": self.kl_nats,
            "max_logit_difference": self.max_logit_difference,
            "positions": self.num_positions,
        }


def _rms(values: list[float]) -> float:
    return (sum(v * v for v in values) / max(1, len(values))) ** 0.5


def merge(
    base_path: str,
    delta_path: str,
    out: str,
    *,
    dtype: str | None = None,
    text: str | None = None,
    limit_kl: float = 0.01,
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> MergeReport:
    """Merge a PEFT folder into its base and save the checkpoint with tokenizer and chat template.

    Args:
        base_path: folder or hub id of the base.
        delta_path: PEFT folder, or a run folder that holds one in `delta/`.
        out: new folder.
        dtype: of the saved weights; None is the base file's own.
        text: a text file on which the predictions are compared; None takes a short built-in passage.
        limit_kl: largest mean KL(unmerged‖merged) in nats per position.
        revision: of a hub base.
        trust_remote_code: run the base's own code.

    Raises:
        FolderError: `out` holds something already, or cannot be written.
        DataError: `text` cannot be read.
        DeltaError: the delta is a whole model already, of another base, or damaged; `dtype` is none of `DTYPES`.
        MergeError: the KL exceeds its limit; nothing is saved.
    """
    target = Path(out)
    folder = folder_of(delta_path)
    _refuse_whole(folder)
    if dtype not in (None, *DTYPES):
        raise DeltaError(f"a model cannot be merged into {dtype!r}", where="--dtype", fix=f"use {', '.join(DTYPES)}")
    if target.exists() and not (target.is_dir() and not any(target.iterdir())):
        raise FolderError("the folder to write is not empty", where=out, fix="name a new folder")
    delta = load_lowrank(folder)
    stored = _stored_dtype(base_path, revision)
    chosen = getattr(torch, dtype) if dtype else stored
    wide = "bfloat16" if stored is torch.bfloat16 and chosen is torch.bfloat16 else "float32"
    base = load(base_path, revision=revision, dtype=wide, device="cpu", trust_remote_code=trust_remote_code)
    base.model.eval()
    check_base(delta, base.model, base.fingerprint)
    batch = _probe_batch(base, text)

    load_delta_(base.model, delta)
    unmerged = _logits(base, batch)
    unwrap_(base.model)
    layers = merge_(base.model, delta, chosen)
    merged = _logits(base, batch)
    log_p, log_q = unmerged.log_softmax(-1), merged.log_softmax(-1)
    kl = float((log_p.exp() * (log_p - log_q)).sum(-1).mean())
    report = MergeReport(
        layers, str(chosen).removeprefix("torch."), kl, float((unmerged - merged).abs().max()), len(unmerged)
    )
    if not kl <= limit_kl:
        raise MergeError(
            f"the merged model's predictions differ: KL {kl:.3g} nats per position, the limit is {limit_kl:g}",
            where=f"{delta_path} in {report.dtype}",
            fix="save with --dtype float32, keep the adapter unmerged, or raise --limit-kl",
        )
    nn.Module.to(base.model, dtype=chosen)
    _save(base, target, {**report.summary(), "base": base_path, "delta": str(delta_path)})
    return report


def _refuse_whole(folder: Path) -> None:
    """Refuse what full fine-tuning left, and say where it lies and what it is."""
    if is_adapter(folder) or not (folder / "config.json").is_file():
        return
    kinds = read_facts(folder).get("architectures")
    kind = f", a {kinds[0]}" if isinstance(kinds, list) and kinds else ""
    what = f"this is a whole model already{kind}: full fine-tuning moved its weights, so there is nothing to merge"
    raise DeltaError(what, where=str(folder), fix=f"use {folder} as it is, wherever a model is asked for")


def _save(base: Base, target: Path, facts: dict[str, Any]) -> None:
    """Save beside the folder, then move there: the folder is whole or absent."""
    partial = target.with_name(f"{target.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        base.model.save_pretrained(partial)
        if base.tokenizer is not None:
            base.tokenizer.save_pretrained(partial)
        write_json(partial / REPORT, facts)
        partial.replace(target)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(partial, ignore_errors=True)
        fix = "free space, or name another folder"
        raise FolderError(f"the merged model cannot be written: {error}", where=str(target), fix=fix) from error


def _stored_dtype(path: str, revision: str | None) -> torch.dtype:
    """Read the dtype that a model says its weights have, in a folder or on the hub; float32 where it says none."""
    facts = read_facts(find(path, revision)[0])
    named = [part.get(key) for part in (facts, facts.get("text_config") or {}) for key in ("dtype", "torch_dtype")]
    found = getattr(torch, str(next((name for name in named if name), "float32")), torch.float32)
    assert isinstance(found, torch.dtype)
    return found


def _probe_batch(base: Base, path: str | None) -> Batch:
    if base.tokenizer is None:
        raise DeltaError("the base has no tokenizer to read the probe text with", where=base.path)
    try:
        text = Path(path).read_text(encoding="utf-8") if path else PROBE_TEXT
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"the text cannot be read: {error}", where=path, fix="name a UTF-8 text file") from None
    longest = getattr(base.model.config, "max_position_embeddings", None) or 1024
    tokens = base.tokenizer(text)["input_ids"][: min(longest, 1024)]
    if len(tokens) < 2:
        raise DataError("the text has fewer than two tokens", where=path, fix="name a longer one")
    return collate([Example(tokens, [True] * len(tokens))])


@torch.no_grad()
def _logits(base: Base, batch: Batch) -> Tensor:
    return torch.cat([logits for logits, _ in LanguageHead(base.model).logits(batch)]).double()
