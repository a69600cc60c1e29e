"""The folder of a repair for tests of its page: items drawn from a seed, places and verdicts computed as a sweep computes them."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.random import default_rng

from loralab.lab.bar import Judge
from loralab.lab.repaired import Repaired, Sweep
from loralab.lab.tradeoff import Part, Side, points, read_budget, within

ITEMS = 300
SHRINK = (0.3, 0.5, 0.7, 0.9)
EDITS = [("scale", s, "") for s in (0.0, 1.0, 0.25, 0.5, 0.75)] + [("taper", s, "") for s in (0.25, 0.5, 0.75)]
EDITS += [(family, s, "") for family in ("top1", "all") for s in SHRINK]
EDITS += [("neighbour", s, "") for s in (0.3, 0.7)] + [("matched", s, of) for of in ("top1", "all") for s in SHRINK]
MENDS = {"taper": 0.02, "top1": 0.1, "all": 0.16, "neighbour": -0.02, "matched": 0.0}
"""How much less than uniform scaling a family forgets at its strongest."""


def place(family: str, strength: float, gain: float) -> tuple[float, float]:
    """Give the shares of items that an edit learns and loses."""
    if family == "scale":
        return 0.6 * (1 - (1 - strength) ** 2), 0.3 * strength**1.5
    shrunk = 1 - strength
    return 0.6 - 0.1 * shrunk**2, 0.3 - (0.04 + gain * MENDS[family]) * shrunk


def make_sweep(*, gain: float = 1.0, budget: str | None = "80%", edits: Sequence[Any] = tuple(EDITS)) -> Sweep:
    """Measure edits on drawn items; with gain 0 no repair is better than a scale."""
    rng = default_rng(4)
    luck, base = rng.random((2, ITEMS)), (rng.random(ITEMS) < 0.9).astype(float)
    target, source = [], []
    for family, strength, _ in edits:
        learned, lost = place(family, strength, gain)
        target.append((luck[0] < learned).astype(float))
        source.append(np.where(luck[1] < lost / 0.9, 0.0, base))
    one = np.ones(ITEMS)
    sides = [Side([Part("calc/accuracy", np.zeros(ITEMS), np.array(target), one)])]
    sides.append(Side([Part("source/accuracy", base, np.array(source), one)]))
    names = [" ".join(filter(None, (family, of, f"{strength:g}"))) for family, strength, of in edits]
    table = pd.DataFrame([(n, f, s, of) for n, (f, s, of) in zip(names, edits, strict=True)])
    table = table.set_axis(["edit", "family", "strength", "of"], axis=1).assign(same_as="")
    judge = Judge(table, *sides)
    placed = points(table, *sides).assign(norm_share=0.9, rank_extra=3, intruders=5, discarded=0.0)
    facts: dict[str, Any] = {"base": "org/tiny-3M", "delta": "runs/lora-hot/delta", "kind": "low-rank"}
    facts |= {"k": 10, "epsilon": 0.5, "matrices": 28, "intruders": {"count": 9, "matrices": 7, "of": 28}}
    facts |= {name: side.facts() for name, side in zip(("target", "source"), sides, strict=True)}
    facts |= {"cost": {"seconds": 40.5, "forwards": 812, "tokens": 90_000}, "notes": ["dequantised from 4 bits"]}
    facts["environment"] = {"date": "2026-01-02T03:04:05+00:00", "command": ["loralab", "repair", "base", "<delta>"]}
    choice = None if budget is None else within(placed, read_budget(budget))
    return Sweep(placed, judge.verdicts(), judge.controls(), facts, choice)


def write_sweep(folder: Path, **choices: Any) -> Path:
    folder.mkdir(parents=True)
    found = make_sweep(**choices)
    found.write_points(folder)
    return found.write(folder)


def write_single(folder: Path) -> Path:
    """Write the folder of one edit, which was not measured."""
    folder.mkdir(parents=True)
    row = {"touched": 1, "rank_before": 8.0, "rank": 9.0, "norm_before": 2.0, "norm": 1.8, "discarded": 0.0}
    rows = [{"layer": f"model.layers.{i}.q_proj", "intruders": i, **row, "discarded_norm": 0.0} for i in (1, 2)]
    rows.append({**rows[0], "layer": "model.layers.3.q_proj", "intruders": 0, "touched": 0, "rank": 8.0, "norm": 2.0})
    facts = {"base": "org/tiny-3M", "delta": "runs/lora/delta", "kind": "low-rank", "k": 10, "epsilon": 0.5}
    facts |= {"edit": "top1 0.75", "family": "top1", "strength": 0.75, "rank": None}
    facts |= {"intruders": {"count": 3, "matrices": 2, "of": 3}}
    return Repaired(pd.DataFrame(rows), facts).write(folder)
