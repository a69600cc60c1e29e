"""Intruders of one matrix: LoRA Lab's certified route against two dense decompositions, and its repair against PEFT's.

One process, one thread; contenders take turns, and medians of processor seconds are compared. The weights have a known spectrum
(`llm`: heavy head over a broad bulk; `flat`: nearly no head, the worst case); the changes are pairs, new ones in every round,
that make many vectors of the tuned weight lie near the threshold. One that lies on it takes the dense route: `routes` tells.

- two SVDs: the published definition, `torch.linalg.svd` in float32 of the base and of the tuned weight, all cosines of the first
  k vectors. The base is decomposed once a round and its time counts for every rank; `over_one_svd` is what is left if a dense
  method kept the base's decomposition too.
- cold, warm: the base's head from a cache on disk, empty or filled (hashing, reading and writing are in the time); `in memory`: the
  head is at hand, as for the second delta of a call.
- peft: `reduce_intruder_dimension`, which scales all intruders among the first k to λ and cuts the result back to the old rank;
  ours finds and scales them in an exact pair of rank r + intruders. `off` is each result's distance from the exact one.

Peak memory is taken in a process of its own for each contender: the largest resident size over the one before the call, when the
weight and the pair lie in memory and the libraries are loaded and warm.

    python benchmarks/spectra.py [--sizes 1024 2048 4096] [--ranks 16 64] [--rounds 3] [--kinds llm flat]
    python benchmarks/spectra.py --verdicts 2000      (verdicts against two dense float64 decompositions)
"""

import argparse
import json
import shutil
import tempfile
from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from _measured import Record, child, median, peak_mib, resident_mib, timed
from _synthetic import Known, known, pair
from peft import LoraConfig, get_peft_model
from peft.tuners.lora.intruders import reduce_intruder_dimension
from torch import Tensor, nn

from loralab.delta.lowrank import Delta, LowRank
from loralab.spectral.heads import HeadCache
from loralab.spectral.intruders import EPSILON, VECTORS, Intruders, intruders
from loralab.spectral.repair import Edit, edited, sharpened

LAYER = "linear"
KEPT = 0.75
"""What is left of an intruder after repair; PEFT's own default."""

STRENGTH = 0.6
"""s₁ of a change over s₁ of its base."""

T = TypeVar("T")


@dataclass(frozen=True, eq=False)
class Case:
    """One weight, one pair, and where heads of the base are kept."""

    weight: Tensor
    change: LowRank
    heads: Path

    def cold(self) -> Intruders:
        """Find the intruders with nothing known of the base."""
        shutil.rmtree(self.heads, ignore_errors=True)
        return self.warm()

    def warm(self) -> Intruders:
        """Find the intruders with the base's head on disk."""
        head = HeadCache(self.heads).of(self.weight)
        return intruders(self.weight, self.change, k=VECTORS, epsilon=EPSILON, head=head)

    def repaired(self, found: Intruders) -> Delta:
        """Scale all intruders exactly, as `loralab repair` does: their triplets refined in float64, then the edit."""
        sharp = sharpened(self.weight, self.change, found)
        return edited(Delta({LAYER: self.change}), Edit("all", KEPT), found={LAYER: sharp})

    def two_svds(self, base_left: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Give left vectors, values and right vectors of the tuned weight, and the largest cosine of each with the base's."""
        if base_left is None:
            base_left = torch.linalg.svd(self.weight, full_matrices=False).U
        tuned = torch.linalg.svd(self.weight + self.change.dense(), full_matrices=False)
        u = tuned.U[:, :VECTORS]
        return u, tuned.S[:VECTORS], tuned.Vh[:VECTORS].T, (u.T @ base_left).abs().max(dim=1).values


class Toy(nn.Module):
    """A model of one linear layer, for PEFT to wrap."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
        self.linear.weight = nn.Parameter(weight, requires_grad=False)


class Peft:
    """The same pair as an adapter of PEFT."""

    def __init__(self, case: Case) -> None:
        rank = case.change.rank
        chosen = LoraConfig(r=rank, lora_alpha=case.change.scale * rank, target_modules=[LAYER])
        self.model = get_peft_model(Toy(case.weight), chosen)
        self.layer: Any = self.model.base_model.model.linear
        with torch.no_grad():
            self.layer.lora_A["default"].weight.copy_(case.change.A)
            self.layer.lora_B["default"].weight.copy_(case.change.B)

    def reduced(self) -> list[str]:
        """Make the repaired adapter and give what PEFT says about it."""
        said: list[str] = []
        if "less" in self.layer.lora_A:
            self.model.delete_adapter("less")
        with torch.no_grad():
            reduce_intruder_dimension(
                self.model, "default", "less", VECTORS, EPSILON, mitigation_lambda=KEPT, logging_sink=said.append
            )
        return said


def case_of(base: Known, rank: int, draw: int, folder: Path) -> Case:
    return Case(base.weight, pair(base, rank, STRENGTH, seed=base.shape[0] + rank + 1000 * draw), folder / "heads")


class Taken:
    """What one rank took, a value for each round and contender, and what came out."""

    def __init__(self) -> None:
        self.busy: dict[str, list[float]] = defaultdict(list)
        self.wall: dict[str, list[float]] = defaultdict(list)
        self.found: list[dict[str, Any]] = []

    def take(self, name: str, work: Callable[[], T], before: tuple[float, float] = (0.0, 0.0)) -> T:
        """Time one call, with the seconds that something shared took before it."""
        busy, wall, result = timed(work)
        self.busy[name].append(busy + before[0])
        self.wall[name].append(wall + before[1])
        return result

    def row(self) -> dict[str, Any]:
        """Give medians, the processor seconds of every round, and our advantage."""
        spent = {name: median(values) for name, values in self.busy.items()}
        ours = {name: spent[name] for name in ("cold", "warm", "in memory")}
        row: dict[str, Any] = {"cpu_s": spent, "wall_s": {name: median(values) for name, values in self.wall.items()}}
        row["over_two_svds"] = {name: round(spent["two svds"] / s, 2) for name, s in ours.items()}
        row["over_one_svd"] = {name: round(spent["one svd"] / s, 2) for name, s in ours.items() if name != "cold"}
        if "peft" in spent:
            row["over_peft"] = {name: round(spent["peft"] / (s + spent["repair"]), 2) for name, s in ours.items()}
        row["cpu_s_each"] = {name: [round(s, 3) for s in values] for name, values in self.busy.items()}
        return row | {key: [found[key] for found in self.found] for key in self.found[0]}


def compare(size: int, kind: str, ranks: list[int], rounds: int, peft: bool, folder: Path) -> list[dict[str, Any]]:
    """Let all contenders take turns on one base, with new pairs in every round."""
    base = known(size, size, kind, seed=size)
    taken = {rank: Taken() for rank in ranks}
    for draw in range(rounds):
        busy, wall, left = timed(lambda: torch.linalg.svd(base.weight, full_matrices=False).U)
        for rank, clock in taken.items():
            case = case_of(base, rank, draw, folder)
            clock.take("cold", case.cold)
            found = clock.take("warm", case.warm)
            head = HeadCache(case.heads).of(case.weight)
            clock.take("in memory", lambda case=case, head=head: intruders(case.weight, case.change, head=head))
            dense = clock.take("two svds", lambda case=case, left=left: case.two_svds(left), (busy, wall))
            clock.busy["one svd"].append(clock.busy["two svds"][-1] - busy)
            clock.found.append(agreement(found, dense[3]))
            if peft:
                mine = clock.take("repair", lambda case=case, found=found: case.repaired(found))
                theirs = Peft(case)
                said = clock.take("peft", theirs.reduced)
                clock.found[-1] |= repairs(case, mine, said, theirs, dense)
    contenders = ["cold", "warm", "two svds", *(["repair", "peft"] if peft else [])]
    rows = []
    for rank, clock in taken.items():
        row = {"size": size, "kind": kind, "rank": rank, "rounds": rounds, **clock.row()}
        rows.append(row | {"peak_mib": memory(case_of(base, rank, rounds - 1, folder), folder, contenders)})
    return rows


def agreement(found: Intruders, cosines: Tensor) -> dict[str, Any]:
    theirs = (cosines < EPSILON).tolist()
    return {
        "intruders": sum(found.verdicts),
        "other_verdicts": sum(a != b for a, b in zip(found.verdicts, theirs, strict=True)),
        "routes": dict(Counter(found.routes)),
        "nearest_to_epsilon": round(float((cosines - EPSILON).abs().min()), 5),
    }


def repairs(case: Case, ours: Delta, said: list[str], theirs: Peft, dense: tuple[Tensor, ...]) -> dict[str, Any]:
    """Compare both repaired changes with the exact one, taken from the dense decomposition."""
    u, s, v, cosines = dense
    low = cosines < EPSILON
    exact = case.change.dense() - (1 - KEPT) * (u[:, low] * s[low]) @ v[:, low].T

    def off(change: Tensor) -> float:
        return float(f"{float((change - exact).norm() / exact.norm()):.3g}")

    mine = ours[LAYER]
    return {
        "peft_intruders": next((int(line.rpartition(" ")[2]) for line in said if ": Intruders:" in line), 0),
        "rank_after": mine.rank if isinstance(mine, LowRank) else None,
        "off_loralab": off(mine.dense()),
        "off_peft": off(theirs.layer.get_delta_weight("less").detach()),
    }


def memory(case: Case, folder: Path, contenders: list[str]) -> dict[str, float]:
    """Measure each contender's peak memory in a process of its own."""
    for name, tensor in (("weight", case.weight), ("A", case.change.A), ("B", case.change.B)):
        np.save(folder / f"{name}.npy", tensor.numpy())
    # With a fixed threshold the C library gives freed blocks back, so that none is left over for the measured call.
    asked = {name: (__file__, "--measure", name, str(folder), str(case.heads)) for name in contenders}
    return {name: child(*told, MALLOC_MMAP_THRESHOLD_="65536")["mib"] for name, told in asked.items()}


def measure(name: str, folder: Path, heads: Path) -> None:
    """Run one contender, in a child, and print how much memory it took above what it was given."""
    weight, A, B = (torch.from_numpy(np.load(folder / f"{part}.npy")) for part in ("weight", "A", "B"))
    large = Case(weight, LowRank(A, B, 2.0), heads)
    with tempfile.TemporaryDirectory() as other:
        small = case_of(known(1536, 1536, "llm", seed=0), 16, 0, Path(other))
        for case in (small, large):  # the small one first, so that libraries are loaded and their code is in memory
            peft = Peft(case) if name == "peft" else None
            before = resident_mib()
            if peft is not None:
                peft.reduced()
            elif name == "repair":
                case.repaired(case.warm())
            else:
                {"cold": case.cold, "warm": case.warm, "two svds": case.two_svds}[name]()
    print(json.dumps({"mib": round(peak_mib() - before, 1)}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="+", default=[1024, 2048, 4096])
    parser.add_argument("--ranks", type=int, nargs="+", default=[16, 64])
    parser.add_argument("--kinds", nargs="+", default=["llm", "flat"], choices=["llm", "flat", "power"])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--no-peft", action="store_true", help="leave PEFT out (it is left out on flat spectra anyway)")
    parser.add_argument("--verdicts", type=int, metavar="N", help="check the verdicts of at least N vectors instead")
    parser.add_argument("--measure", nargs=3, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    torch.set_num_threads(1)
    if asked.measure:
        name, folder, heads = asked.measure
        measure(name, Path(folder), Path(heads))
        return
    if asked.verdicts:
        from _verdicts import check

        record = Record("verdicts", vectors=asked.verdicts)
        for row in check(asked.verdicts):
            record.add(**row)
        return
    record = Record("spectra", k=VECTORS, epsilon=EPSILON, repair=f"all {KEPT}", strength=STRENGTH)
    for kind in asked.kinds:
        for size in asked.sizes:
            with tempfile.TemporaryDirectory() as folder:
                peft = not asked.no_peft and kind != "flat"
                for row in compare(size, kind, asked.ranks, asked.rounds, peft, Path(folder)):
                    record.add(**row)


if __name__ == "__main__":
    main()
