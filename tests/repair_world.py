"""A base, deltas with planted intruders and things to measure them on, for tests of repairs; and the paper's definition."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from little_world import make_base, rows, write_rows
from loralab.base.model import Base, load
from loralab.delta.lowrank import Delta, LowRank
from loralab.delta.several import Wardrobe
from loralab.delta.store import save_lowrank
from loralab.evals.texts import TextEngine
from loralab.training.loss import LanguageHead

PLANTED = (
    *("model.layers.0.self_attn.q_proj", "model.layers.0.mlp.down_proj"),
    *("model.layers.1.self_attn.v_proj", "model.layers.1.mlp.up_proj"),
)
QUIET = ("model.layers.0.self_attn.v_proj", "model.layers.1.self_attn.q_proj")
"""Layers whose change lies along the base's own first direction: no intruder."""


def spread(weight: Tensor, rng: np.random.Generator) -> np.ndarray:
    """Give a direction that is as unlike every left vector of a weight as can be."""
    U = np.linalg.svd(weight.double().numpy(), full_matrices=False)[0]
    return U @ rng.choice([-1.0, 1.0], U.shape[1]) / np.sqrt(U.shape[1])


def planted_delta(base: Base, strength: float = 3.0, seed: int = 0) -> Delta:
    """Make a low-rank delta with one intruder in each `PLANTED` layer, and none in the others."""
    rng = np.random.default_rng(seed)
    layers = {}
    for name in (*PLANTED, *QUIET):
        weight = base.model.get_submodule(name).weight.detach()
        U, s, Vh = np.linalg.svd(weight.double().numpy(), full_matrices=False)
        if name in PLANTED:
            v = rng.normal(size=weight.shape[1])
            left, right = [spread(weight, rng)], [strength * s[0] * v / np.linalg.norm(v)]
        else:
            left, right = [U[:, 0]], [0.3 * s[0] * Vh[0]]
        left.append(U[:, 1])
        right.append(0.1 * s[1] * Vh[1])
        A, B = torch.tensor(np.array(right)).float(), torch.tensor(np.array(left).T).float()
        layers[name] = LowRank(A / 2, B.contiguous(), 2.0)
    return Delta(layers, base_fingerprint=base.fingerprint)


def quiet_delta(base: Base) -> Delta:
    """Make a delta without any intruder."""
    found = planted_delta(base)
    return Delta({name: found[name] for name in QUIET}, base_fingerprint=base.fingerprint)


def make_repair_world(folder: Path) -> Path:
    """Write `base/`, the adapters `planted/` and `quiet/`, the checkpoint `full/`, and items and texts of both sides."""
    make_base(folder / "base")
    base = load(str(folder / "base"), device="cpu")
    for name, delta in {"planted": planted_delta(base), "quiet": quiet_delta(base)}.items():
        save_lowrank(folder / name, delta, str(folder / "base"), model=base.model)
    _write_checkpoint(folder)
    _write_sides(folder, base)
    return folder


def _write_sides(folder: Path, base: Base) -> None:
    """Write what the planted delta does as the target, and what the base does as the source.

    Of items the right one of two choices is what the model prefers, so the tuned model has all of the target right and the base
    all of the source; in half of the items the two differ. Texts are sampled from the models.
    """
    wardrobe = Wardrobe(base.model, {"planted": planted_delta(base)})
    engine = TextEngine(LanguageHead(base.model), base.tokenizer)
    items = [(f"say {row['completion']} = ", [row["completion"], row["completion"][::-1]]) for row in rows(240, 3)]
    items = [item for item in dict(items).items() if len(set(item[1])) == 2]
    scored = engine.log_likelihoods([(p, choice) for p, choices in items for choice in choices], wardrobe.views())
    likely = [[int(b.log_likelihood > a.log_likelihood) for a, b in zip(m[::2], m[1::2], strict=True)] for m in scored]
    found: dict[str, list[dict[str, Any]]] = {"target": [], "source": []}
    for (prompt, choices), by_base, by_tuned in zip(items, *likely, strict=True):
        # Every item goes to one side; those on which the models agree come last.
        side = min(found, key=lambda name: len(found[name]))
        right = by_tuned if side == "target" else by_base
        found[side].append({"prompt": prompt, "choices": choices, "right": right, "differs": by_base != by_tuned})
    for (side, mine), name in zip(found.items(), ("planted", None), strict=True):
        differing = [item for item in mine if item["differs"]][:14]
        same = [item for item in mine if not item["differs"]][: len(differing)]
        write_rows(
            folder / f"{side}.jsonl", [{k: v for k, v in item.items() if k != "differs"} for item in differing + same]
        )
        with wardrobe.view(name)():
            torch.manual_seed(1)
            start = torch.full((40, 1), base.tokenizer.bos_token_id)
            unwritten = [*range(4), *range(len(base.tokenizer), base.model.config.vocab_size)]
            how = {"do_sample": True, "top_k": 0, "suppress_tokens": unwritten}
            written = base.model.generate(start, max_new_tokens=24, **how)
        texts = base.tokenizer.batch_decode(written, skip_special_tokens=True)
        write_rows(folder / f"{side}_text.jsonl", [{"text": text} for text in dict.fromkeys(texts)])


def _write_checkpoint(folder: Path) -> None:
    """Write a base that was tuned as a whole: every parameter moved, the planted layers most."""
    tuned = load(str(folder / "base"), device="cpu")
    torch.manual_seed(5)
    with torch.no_grad():
        for name, change in planted_delta(tuned).items():
            tuned.model.get_submodule(name).weight += change.dense()
        for parameter in tuned.model.parameters():
            parameter += 0.02 * torch.randn_like(parameter)
    tuned.model.save_pretrained(folder / "full")
    tuned.tokenizer.save_pretrained(folder / "full")


def oracle(weight: Tensor, change: Tensor, k: int = 10, epsilon: float = 0.5) -> tuple[list[int], list[np.ndarray]]:
    """Find the intruders by two whole decompositions in float64: positions, and the rank-1 matrices s u vᵀ of them.

    Shuttleworth et al. 2024 (2410.21228), definition 3.1.
    """
    U0 = np.linalg.svd(weight.double().numpy(), full_matrices=False)[0]
    U, s, Vh = np.linalg.svd((weight + change).double().numpy(), full_matrices=False)
    cosines = np.abs(U0.T @ U[:, :k]).max(0)
    places = [int(i) for i in np.flatnonzero(cosines < epsilon)]
    return places, [s[i] * np.outer(U[:, i], Vh[i]) for i in places]
