"""A base of the shape of a 7B model, on disk, and an adapter for it: memory and time of `loralab spectra` on the pair.

A few layers are written one by one as sharded safetensors in bfloat16 (hidden 4096, feed-forward 11008, vocabulary 32,000), with
the spectra of trained weights, and a PEFT folder of rank 16 on all seven projections. Then child processes look into the pair,
first without and then with the heads of the base on disk; each reports its largest resident size, libraries included. What
a model of 32 layers would take is computed from the seconds of each matrix, and printed as extrapolated.

    python benchmarks/disk.py [--layers 2] [--rank 16] [--folder FOLDER]
"""

import argparse
import json
import shutil
import statistics
import tempfile
import time
from collections import defaultdict
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from _measured import Record, child, peak_mib
from _synthetic import known, pair
from safetensors.torch import save_file
from torch import Tensor

from loralab.base.weights import open_weights
from loralab.delta.lowrank import Delta, LayerDelta
from loralab.delta.store import save_lowrank
from loralab.lab.spectra import spectra

HIDDEN, MIDDLE, VOCABULARY, HEADS, LAYERS = 4096, 11008, 32_000, 32, 32
PROJECTIONS = {
    **{f"self_attn.{name}_proj": (HIDDEN, HIDDEN) for name in "qkvo"},
    "mlp.gate_proj": (MIDDLE, HIDDEN),
    "mlp.up_proj": (MIDDLE, HIDDEN),
    "mlp.down_proj": (HIDDEN, MIDDLE),
}
NORMS = ("input", "post_attention")
LIMIT_GB = 2.0


def write(folder: Path, layers: int, rank: int) -> None:
    """Write the base and the adapter, a layer of the base at a time."""
    base, changes = folder / "base", dict[str, LayerDelta]()
    base.mkdir(parents=True)
    where: dict[str, str] = {}

    def shard(name: str, tensors: dict[str, Tensor]) -> None:
        save_file(tensors, base / name, metadata={"format": "pt"})
        where.update(dict.fromkeys(tensors, name))

    for layer in range(layers):
        held = {f"model.layers.{layer}.{norm}_layernorm.weight": torch.ones(HIDDEN).bfloat16() for norm in NORMS}
        for number, (name, (out, into)) in enumerate(PROJECTIONS.items()):
            path, seed = f"model.layers.{layer}.{name}", 100 * layer + number
            weight = known(out, into, "llm", seed)
            held[f"{path}.weight"] = weight.weight.bfloat16()
            changes[path] = pair(weight, rank, strength=(0.1, 0.3, 0.6, 1.0)[(layer + number) % 4], seed=seed)
        shard(f"layer-{layer:02}.safetensors", held)
    tables = ("model.embed_tokens.weight", "lm_head.weight")
    for name in tables:
        shard(f"{name}.safetensors", {name: torch.randn(VOCABULARY, HIDDEN).mul_(0.02).bfloat16()})
    shard("norm.safetensors", {"model.norm.weight": torch.ones(HIDDEN).bfloat16()})
    (base / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))
    facts = {
        **{"architectures": ["LlamaForCausalLM"], "model_type": "llama", "dtype": "bfloat16", "hidden_act": "silu"},
        **{"hidden_size": HIDDEN, "intermediate_size": MIDDLE, "vocab_size": VOCABULARY, "num_hidden_layers": layers},
        **{"num_attention_heads": HEADS, "num_key_value_heads": HEADS, "tie_word_embeddings": False},
    }
    (base / "config.json").write_text(json.dumps(facts))
    # With the fingerprint, as our own runs write it: then the whole base is read once to compare it.
    mark = open_weights(str(base)).fingerprint()
    save_lowrank(folder / "adapter", Delta(changes, base_fingerprint=mark), str(base))


def look(folder: Path) -> dict[str, Any]:
    """Look into the pair, and say what it cost: in all, before the first matrix was done, and by matrix."""
    begin, wall, ends = peak_mib(), time.perf_counter(), [(time.process_time(), "")]
    found = spectra(
        *(str(folder / "base"), str(folder / "adapter")),
        cache=folder / "heads",
        told=lambda _done, _of, layer: ends.append((time.process_time(), layer)),
    )
    each = {layer: end - before for (before, _), (end, layer) in pairwise(ends)}
    rows = found.matrices.set_index("layer")
    return {
        "cpu_s": round(time.process_time() - ends[0][0], 2),
        "wall_s": round(time.perf_counter() - wall, 2),
        "peak_gb": round(peak_mib() * 2**20 / 1e9, 3),
        "libraries_gb": round(begin * 2**20 / 1e9, 3),
        "matrices": len(rows),
        "problems": int((rows.problem != "").sum()),
        "intruders": int(rows.intruders.sum()),
        "routes": found.vectors.route.value_counts().to_dict(),
        "each": {layer: [*map(int, rows.loc[layer, ["out_features", "in_features"]]), s] for layer, s in each.items()},
    }


def by_shape(each: dict[str, tuple[int, int, float]], layers: int) -> dict[str, Any]:
    """Give the mean seconds of each shape, the first matrix left out as it has the opening in it; and extrapolate."""
    seconds = defaultdict(list)
    for number, (out, into, spent) in enumerate(each.values()):
        if number:
            seconds[out, into].append(spent)
    means = {shape: statistics.mean(values) for shape, values in seconds.items()}
    whole = sum(means[shape] for shape in PROJECTIONS.values()) * LAYERS
    return {
        "cpu_s_by_shape": {
            f"{out}x{into}": [round(s, 2) for s in sorted(all_)] for (out, into), all_ in seconds.items()
        },
        "cpu_s_mean": {f"{out}x{into}": round(value, 2) for (out, into), value in means.items()},
        f"extrapolated_from_{layers}_to_{LAYERS}_layers_cpu_min": round(whole / 60, 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument(
        "--folder", help="keep the base and the adapter here; a folder that holds them is used as it is"
    )
    parser.add_argument("--look", help=argparse.SUPPRESS)
    asked = parser.parse_args()
    torch.set_num_threads(1)
    if asked.look:
        print(json.dumps(look(Path(asked.look))))
        return
    record = Record("disk", layers=asked.layers, rank=asked.rank)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(asked.folder or temporary)
        if not (folder / "adapter").is_dir():
            write(folder, asked.layers, asked.rank)
        size = sum(file.stat().st_size for file in (folder / "base").iterdir()) / 1e9
        for heads in ("absent", "on disk"):
            if heads == "absent":
                shutil.rmtree(folder / "heads", ignore_errors=True)
            found = child(__file__, "--look", str(folder))
            extrapolated = by_shape(found.pop("each"), asked.layers)
            kept = sum(file.stat().st_size for file in (folder / "heads").rglob("*") if file.is_file()) / 1e6
            below = found["peak_gb"] < LIMIT_GB
            told = {"base_gb": round(size, 2), "heads": heads, "heads_mb_after": round(kept, 1), "below_2_gb": below}
            record.add(**told, **found, **extrapolated)


if __name__ == "__main__":
    main()
