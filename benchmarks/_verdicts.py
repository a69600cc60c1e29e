"""Verdicts of the certified route against two dense float64 decompositions, over shapes, spectra, ranks and strengths.

Matrices below 1500 would take the dense route; here they are made to take the certified one. A vector counts once for each ε.
"""

from collections import Counter
from collections.abc import Iterator
from itertools import product
from typing import Any

import torch
from _synthetic import Known, dense, known, pair
from torch import Tensor

from loralab.delta.lowrank import LayerDelta
from loralab.spectral.heads import head_of
from loralab.spectral.intruders import intruders

SHAPES = ((512, 512), (768, 768), (1024, 1024), (1536, 768), (768, 1536), (1024, 512))
KINDS = ("llm", "power", "flat")
RANKS = (1, 4, 16, 64)
STRENGTHS = (0.3, 0.6, 1.0, 1.6)
EPSILONS = (0.3, 0.5, 0.7)
SLACK = 1e-3
"""An interval counts as missing the truth if it does so by more than this; a vector is near if its cosine is within 0.01 of ε."""


def changes(base: Known, seed: int) -> Iterator[tuple[str, LayerDelta]]:
    """Give low-rank changes of all ranks and strengths, and dense ones of all strengths."""
    for number, (rank, strength) in enumerate(product(RANKS, STRENGTHS)):
        yield "low-rank", pair(base, rank, strength, 1000 * seed + number)
    for number, strength in enumerate(STRENGTHS):
        yield "dense", dense(base, 16, strength, 1000 * seed + 100 + number)


def check(vectors: int) -> Iterator[dict[str, Any]]:
    """Check at least so many vectors, in whole passes; a row for each shape, spectrum and kind of change, and one for all."""
    total: Counter[str] = Counter()
    seed = 0
    while total["vectors"] < vectors:
        for (out, into), kind in product(SHAPES, KINDS):
            counts: dict[str, Counter[str]] = {"low-rank": Counter(), "dense": Counter()}
            base = known(out, into, kind, seed)
            head = head_of(base.weight)
            left = torch.linalg.svd(base.weight.double(), full_matrices=False).U
            for form, change in changes(base, seed):
                counts[form].update(judged(base.weight, change, left, head))
            for form, counted in counts.items():
                total.update(counted)  # `+=` would drop counts of 0
                yield {"out": out, "in": into, "kind": kind, "form": form, "head": len(head.values), **counted}
        seed += 1
    yield {"all": True, **total}


def judged(weight: Tensor, change: LayerDelta, left: Tensor, head: Any) -> Counter[str]:
    """Count what the certified route says of one matrix, at every ε, and where two dense decompositions say otherwise."""
    tuned = torch.linalg.svd(weight.double() + change.dense(torch.float64), full_matrices=False).U[:, :10]
    cosines = (tuned.T @ left).abs().max(dim=1).values.tolist()
    counts = Counter(vectors=len(cosines))
    for epsilon in EPSILONS:
        found = intruders(weight, change, k=10, epsilon=epsilon, head=head, dense_below=0)
        rows = zip(cosines, found.verdicts, found.routes, found.stable, found.lower, found.upper, strict=True)
        for cosine, verdict, route, stable, low, high in rows:
            wrong = verdict != (cosine < epsilon)
            counts["verdicts"] += 1
            counts["intruders"] += cosine < epsilon
            counts["near"] += abs(cosine - epsilon) < 0.01
            counts[f"by {route} route"] += 1
            counts["wrong"] += wrong
            counts["wrong though stable"] += wrong and stable
            counts["outside interval"] += not low - SLACK <= cosine <= high + SLACK
    return counts
