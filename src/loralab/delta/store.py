"""Deltas on disk: stock PEFT folders for low-rank ones, Hugging Face checkpoints for dense ones.

A PEFT folder written here loads in PEFT, vLLM and Transformers as it is; one written by PEFT (plain LoRA, rank-stabilised,
per-layer ranks, embeddings, modules trained whole) loads here. Beside it lies `loralab.json` with the base's fingerprint.
"""

import json
import math
import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn
from transformers import PreTrainedModel

from loralab.base.model import heads, scores_texts
from loralab.delta.layers import refuse_misfit, unwrapped
from loralab.delta.lowrank import Delta, Dense, LayerDelta, LowRank
from loralab.errors import DeltaError
from loralab.run.folder import write_atomic, write_json

PREFIX = "base_model.model."
WEIGHTS, ADAPTER, OURS = "adapter_model.safetensors", "adapter_config.json", "loralab.json"
BASE_LAYER = ".base_layer."
_FACTORS = re.compile(r"^(?P<layer>.+)\.(?P<embedding>lora_embedding_|lora_)(?P<factor>[AB])(\.weight)?$")


# Keys of an adapter that change what its pairs mean, and starts that rewrite the base's weights when PEFT loads them.
_OTHER_KINDS = (
    *("use_dora", "lora_bias", "trainable_token_indices", "target_parameters", "layer_replication", "use_qalora"),
    *("use_bdlora", "kasa_config", "alora_invocation_tokens", "arrow_config"),
)
_REWRITING_STARTS = ("pissa", "olora", "corda", "loftq", "lora_ga")


def save_lowrank(folder: Path, delta: Delta, base_path: str, *, model: nn.Module | None = None) -> None:
    """Write a low-rank delta as a stock PEFT folder.

    Args:
        folder: made if missing; its files are replaced whole.
        delta: every layer a pair.
        base_path: written as `base_model_name_or_path`.
        model: that the delta belongs to, with or without pairs on it: it tells the adapter's task, how weights are
            stored, and which short target names would match other layers. None is a causal model of plain linears.

    Raises:
        DeltaError: a layer is dense.
    """
    tensors: dict[str, Tensor] = {}
    for name, layer in delta.items():
        if not isinstance(layer, LowRank):
            raise DeltaError("a dense delta does not fit an adapter", where=name, fix="save it as a checkpoint")
        embedding = name in delta.embeddings
        kind, end = ("lora_embedding_", "") if embedding else ("lora_", ".weight")
        tensors[f"{PREFIX}{name}.{kind}A{end}"] = layer.A.detach().cpu().contiguous()
        tensors[f"{PREFIX}{name}.{kind}B{end}"] = layer.B.detach().cpu().contiguous()
    for name, value in (_neighbours(delta, model) | delta.whole).items():
        path, _, leaf = name.rpartition(".")
        key = f"{path}{BASE_LAYER}{leaf}" if path in delta else name
        tensors[PREFIX + key] = value.detach().cpu().contiguous()
    folder.mkdir(parents=True, exist_ok=True)
    write_atomic(folder / WEIGHTS, save(tensors, metadata={"format": "pt"}))
    write_json(folder / ADAPTER, _adapter_json(delta, base_path, model))
    write_json(folder / OURS, {"base_fingerprint": delta.base_fingerprint})


def _neighbours(delta: Delta, model: nn.Module | None) -> dict[str, Tensor]:
    """Give all that a module holds of which a part was trained whole: PEFT loads such a module whole or not at all."""
    modules = _saved_modules(delta, model)
    found = {} if model is None else {name: model.get_submodule(name).state_dict() for name in modules}
    return {f"{name}.{leaf}": value for name, held in found.items() for leaf, value in held.items()}


def _saved_modules(delta: Delta, model: nn.Module | None) -> set[str]:
    """Name the modules that hold what was trained whole beside the pairs; of a head that has parts, the head itself."""
    modules = {name.rpartition(".")[0] for name in delta.whole} - set(delta)
    tops = heads(model) if isinstance(model, PreTrainedModel) and scores_texts(model) else []
    return {next((top for top in tops if f"{name}.".startswith(f"{top}.")), name) for name in modules}


def task_type(model: nn.Module | None) -> str | None:
    """Name PEFT's kind of task."""
    if model is not None and scores_texts(model):
        return "SEQ_CLS"
    return "CAUSAL_LM" if model is None or hasattr(model, "prepare_inputs_for_generation") else None


def _adapter_json(delta: Delta, base_path: str, model: nn.Module | None) -> dict[str, Any]:
    pairs = {name: layer for name, layer in delta.items() if isinstance(layer, LowRank)}
    rank = Counter(pair.rank for pair in pairs.values()).most_common(1)[0][0] if pairs else 1
    scale = Counter(pair.scale for pair in pairs.values()).most_common(1)[0][0] if pairs else 1.0
    alpha = scale * rank
    whole = {name.rpartition(".")[0] for name in delta.whole}
    layers = {} if model is None else unwrapped(model)
    return {
        "peft_type": "LORA",
        "task_type": task_type(model),
        "base_model_name_or_path": base_path,
        "inference_mode": True,
        "r": rank,
        "lora_alpha": alpha,
        "lora_dropout": 0.0,
        "bias": "lora_only" if whole & set(pairs) else "none",
        "use_rslora": False,
        "fan_in_fan_out": any(type(layers.get(name)).__name__ == "Conv1D" for name in pairs),
        "target_modules": _short_names(list(pairs), list(layers)),
        "modules_to_save": sorted(_saved_modules(delta, model)) or None,
        "rank_pattern": {_exactly(name): pair.rank for name, pair in pairs.items() if pair.rank != rank},
        "alpha_pattern": {
            _exactly(name): pair.scale * pair.rank for name, pair in pairs.items() if pair.scale * pair.rank != alpha
        },
    }


def _exactly(name: str) -> str:
    return "^" + re.escape(name)


def _short_names(names: list[str], others: list[str]) -> list[str]:
    """Name targets by their last part (as vLLM expects) where that part means no other layer of the model."""
    foreign = {other.rpartition(".")[2] for other in others if other not in set(names)}
    return sorted({name if (leaf := name.rpartition(".")[2]) in foreign else leaf for name in names})


def is_adapter(folder: Path) -> bool:
    """Tell whether a folder holds a PEFT adapter."""
    return (folder / ADAPTER).is_file()


def load_lowrank(folder: Path) -> Delta:
    """Read a PEFT folder of plain LoRA pairs.

    Raises:
        DeltaError: no adapter there, a damaged file, or a kind of tuner that is not scale · B A.
    """
    facts = _read_json(folder / ADAPTER)
    if other := _other_kind(facts):
        raise DeltaError(
            f"this adapter is not made of plain low-rank pairs: {other}",
            where=str(folder / ADAPTER),
            fix="merge it with the peft library and load the merged checkpoint as a dense delta",
        )
    tensors = _read_tensors(folder / WEIGHTS)
    factors: dict[str, dict[str, Tensor]] = {}
    whole: dict[str, Tensor] = {}
    embeddings: set[str] = set()
    for key, value in tensors.items():
        name = key.removeprefix(PREFIX)
        if found := _FACTORS.match(name):
            factors.setdefault(found["layer"], {})[found["factor"]] = value
            if found["embedding"] == "lora_embedding_":
                embeddings.add(found["layer"])
        else:
            whole[name.replace(BASE_LAYER, ".")] = value
    layers: dict[str, LayerDelta] = {}
    for name, pair in factors.items():
        if set(pair) != {"A", "B"}:
            raise DeltaError("the adapter holds only one factor of this layer", where=f"{folder / WEIGHTS}: {name}")
        (rank, _), (_, columns) = pair["A"].shape, pair["B"].shape
        if rank != columns:
            fix = "copy or train the adapter again"
            raise DeltaError(f"A has {rank} rows, B {columns} columns", where=f"{folder / WEIGHTS}: {name}", fix=fix)
        layers[name] = LowRank(pair["A"], pair["B"], _scale(name, rank, facts))
    ours = _read_json(folder / OURS) if (folder / OURS).is_file() else {}
    return Delta(layers, whole, ours.get("base_fingerprint"), frozenset(embeddings))


def _other_kind(facts: dict[str, Any]) -> str | None:
    """Name what makes an adapter more than scale · B A; None where nothing does."""
    if facts.get("peft_type") != "LORA":
        return f"peft_type is {facts.get('peft_type')}"
    start = facts.get("init_lora_weights")
    if isinstance(start, str) and start.lower().startswith(_REWRITING_STARTS):
        return f"init_lora_weights is {start}, which rewrites the base's weights"
    return next((f"it has {key}" for key in _OTHER_KINDS if facts.get(key)), None)


def _scale(name: str, rank: int, facts: dict[str, Any]) -> float:
    alpha = facts.get("lora_alpha", 8)
    for pattern, value in (facts.get("alpha_pattern") or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", name):
            alpha = value
            break
    return float(alpha / math.sqrt(rank)) if facts.get("use_rslora") else float(alpha / rank)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise DeltaError("no adapter here", where=str(path), fix="name a folder with adapter_config.json") from None
    except ValueError as error:
        raise DeltaError(f"this file is not JSON: {error}", where=str(path)) from None
    return dict(found)


def _read_tensors(path: Path) -> dict[str, Tensor]:
    try:
        with safe_open(str(path), framework="pt") as file:
            return {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - not a dict
    except (FileNotFoundError, SafetensorError, OSError) as error:
        raise DeltaError(
            f"these weights cannot be read: {error}", where=str(path), fix="copy or train the adapter again"
        ) from None


def check_base(delta: Delta, model: nn.Module, fingerprint: str | None) -> None:
    """Refuse a delta that does not fit the model.

    Raises:
        DeltaError: a layer or parameter is missing or has another shape; the first three are named. Same shapes but
            another fingerprint is refused too: the numbers would be meaningless.
    """
    refuse_misfit(model, delta)
    if fingerprint and delta.base_fingerprint and fingerprint != delta.base_fingerprint:
        raise DeltaError(
            "this delta was trained on other base weights",
            where=f"trained on {delta.base_fingerprint[:12]}, this base is {fingerprint[:12]}",
            fix="use the base that the delta was trained on",
        )


def difference(
    tuned: Mapping[str, Tensor], base: Mapping[str, Tensor], layers: Mapping[str, bool], fingerprint: str | None = None
) -> Delta:
    """Give the dense delta between two sets of parameters, in float32 and without a gradient.

    Args:
        tuned: parameter name → tuned value, those that moved.
        base: the same names before.
        layers: module names whose `.weight` counts as a weight matrix → whether it is stored as (in, out), as Conv1D
            does; other parameters go to `whole`.
        fingerprint: of the base.
    """
    matrices = {f"{name}.weight": name for name in layers}
    changes: dict[str, LayerDelta] = {}
    whole: dict[str, Tensor] = {}
    for key, value in tuned.items():
        if name := matrices.get(key):
            moved = value.detach().float() - base[key].to(value.device).float()
            changes[name] = Dense(moved.t() if layers[name] else moved)
        else:
            whole[key] = value.detach()
    return Delta(changes, whole, fingerprint, keeps_ties=True)
