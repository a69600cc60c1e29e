"""Spectra folders for tests of their page, made with numpy alone: small matrices, deltas with planted directions, dense SVDs."""

from collections.abc import Mapping
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
from numpy.random import Generator, default_rng

from loralab.lab.spectra import NUMBERS, SHARES, TABLES, Spectra, read_spectra, typed

MODULES = ("q_proj", "v_proj", "up_proj", "down_proj")
WIDTH, DEPTH, RANK, HEAD = 40, 4, 4, 24
DELTAS = {"lora-r4": 0.9, "lora-hot": 2.5}
"""How strong each delta's planted directions are, in units of the base's largest singular value."""


def base_of(layer: str, width: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Give the SVD of a base weight with falling values, the same for the same layer."""
    rng = default_rng([3, *layer.encode()])
    left, right = (np.linalg.qr(rng.normal(size=(width, width)))[0] for _ in range(2))
    return left, np.sort(1 / (1 + np.arange(width)) ** 0.6)[::-1], right.T


def pair(rng: Generator, strength: float, width: int) -> np.ndarray:
    """Give a change of rank 4 whose first direction has `strength`, the others less."""
    left, right = (np.linalg.qr(rng.normal(size=(width, RANK)))[0] for _ in range(2))
    values = np.array([1.0, *np.sort(rng.uniform(0.05, 0.9, RANK - 1))[::-1]])
    return left * (strength * values) @ right.T


def layers(depth: int = DEPTH) -> list[tuple[str, str, int]]:
    return [
        (f"model.layers.{d}.{'mlp' if module[0] in 'ud' else 'self_attn'}.{module}", module, d)
        for d in range(depth)
        for module in MODULES
    ]


def make_inside(
    folder: Path,
    *,
    deltas: Mapping[str, float] = DELTAS,
    depth: int = DEPTH,
    k: int = 6,
    epsilon: float = 0.5,
    told: Mapping[str, Mapping[str, Any]] | None = None,
    width: int = WIDTH,
) -> Path:
    """Write a spectra folder.

    Args:
        deltas: strength of each, above 0; the planted direction of a block grows with its depth.
        told: more facts of each delta (`step`, `link`, `path`).
    """
    matrices, vectors, changes = [], [], {}
    for name, strength in deltas.items():
        for layer, module, d in layers(depth):
            seed = default_rng([5, *layer.encode(), *name.partition("@")[0].encode()])
            change = pair(seed, strength * (0.2 + d / depth), width)
            changes[name, layer] = change
            found, rows = measured(layer, change, k, epsilon, width)
            facts = {"delta": name, "layer": layer, "module": module, "depth": d}
            matrices.append(facts | found)
            vectors += [facts | row for row in rows]
    paths = {name: {"path": f"runs/{name}/delta", "kind": "low-rank", **(told or {}).get(name, {})} for name in deltas}
    environment = {"date": "2026-01-02T03:04:05+00:00", "command": ["loralab", "spectra", "base", *deltas]}
    facts: dict[str, Any] = {
        "base": "org/tiny-3M",
        "deltas": paths,
        "k": k,
        "epsilon": epsilon,
        "exact": False,
        "notes": [],
    }
    facts |= {"cost": {"seconds": 1.25}, "environment": environment, "version": 1}
    rows = (matrices, vectors, overlaps(list(deltas), changes, depth))
    tables = [typed(part, TABLES[name]) for part, name in zip(rows, ("spectra", "intruders", "overlaps"), strict=True)]
    return Spectra(*tables, facts).write(folder)


def measured(
    layer: str, change: np.ndarray, k: int, epsilon: float, width: int
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Take a matrix apart with dense SVDs: its row, and a row per leading vector."""
    left0, values0, right0 = base_of(layer, width)
    values = np.linalg.svd(change, compute_uv=False)[:RANK]
    left, tuned, _ = np.linalg.svd(left0 * values0 @ right0 + change)
    cosines = np.abs(left0.T @ left[:, :k])
    largest = cosines.max(axis=0)
    intruder = largest < epsilon
    energy, share = values**2, values / values.sum()
    rank90 = int(np.searchsorted(np.cumsum(energy) / energy.sum(), 0.9) + 1)
    inside = np.linalg.norm(left0[:, :k].T @ change) ** 2, np.linalg.norm(change @ right0[:k].T) ** 2
    both = np.linalg.norm(left0[:, :k].T @ change @ right0[:k].T) ** 2
    row = {"out_features": width, "in_features": width, "rank": RANK, "rank90": rank90, "rank90_share": rank90 / RANK}
    row |= {"effective_rank": float(np.exp(-(share * np.log(share)).sum()))}
    row |= {"stable_rank": float(energy.sum() / energy[0]), "frobenius": float(np.sqrt(energy.sum()))}
    row |= {"spectral": float(values[0]), "base_frobenius": float(np.linalg.norm(values0))}
    row |= {"relative_norm": float(np.sqrt(energy.sum()) / np.linalg.norm(values0)), "singular_values": values.tolist()}
    row |= {"intruders": int(intruder.sum()), "intruder_values": float((tuned[:k] / tuned[0])[intruder].sum())}
    row |= {"intruder_energy": float((tuned[:k] ** 2)[intruder].sum() / (tuned[:k] ** 2).sum())}
    row |= {"overlap_left": inside[0] / energy.sum(), "overlap_right": inside[1] / energy.sum()}
    row |= {"overlap_both": both / energy.sum(), "note": "", "problem": ""}
    rows = [
        {
            **{"position": j + 1, "value": float(tuned[j]), "relative_value": float(tuned[j] / tuned[0])},
            **{"cosine_low": float(largest[j]), "cosine_high": float(largest[j]), "intruder": bool(intruder[j])},
            **{"route": "dense", "gap": 0.01, "stable": True, "similarity": cosines[:HEAD, j].tolist()},
        }
        for j in range(k)
    ]
    return row, rows


def overlaps(names: list[str], changes: Mapping[tuple[str, str], np.ndarray], depth: int) -> list[dict[str, Any]]:
    """Give the share of directions that each pair of deltas has in common, per layer."""
    rows = []
    for a, b in combinations(names, 2):
        for layer, _, _ in layers(depth):
            (ua, _, va), (ub, _, vb) = (np.linalg.svd(changes[name, layer]) for name in (a, b))
            left = np.linalg.norm(ua[:, :RANK].T @ ub[:, :RANK]) ** 2 / RANK
            right = np.linalg.norm(va[:RANK] @ vb[:RANK].T) ** 2 / RANK
            rows.append({"delta_a": a, "delta_b": b, "layer": layer, "left": left, "right": right})
    return rows


def spoil(folder: Path, delta: str, layer: str, problem: str) -> None:
    """Make a matrix of a delta one that could not be measured."""
    found = read_spectra(folder)
    matrices, vectors = found.matrices, found.vectors
    here = (matrices["delta"] == delta) & (matrices["layer"] == layer)
    assert here.sum() == 1
    matrices.loc[here, [*NUMBERS, *SHARES]] = np.nan
    matrices.loc[here, "problem"] = problem
    matrices["singular_values"] = [
        [] if bad else values for bad, values in zip(here, matrices["singular_values"], strict=True)
    ]
    kept = vectors[(vectors["delta"] != delta) | (vectors["layer"] != layer)]
    Spectra(matrices, kept, found.overlaps, found.facts).write(folder)
