"""Scoring multiple choice: LoRA Lab against lm-eval's own Hugging Face backend, on the same requests of the same tasks.

Then a base and three deltas in one call against four calls.

Both get the same lm-eval task objects and answer the same requests, tokenising included; they take turns, and ratios of
medians are reported. The backend runs at the batch size that is fastest for it, which is looked for first on some of the
requests. Decisions (acc, acc_norm) of every item and the log-likelihoods of every request are compared.

    python benchmarks/evaluate.py [--threads 1] [--rounds 3] [--items 1000] [--tasks hellaswag …]

Needs LORALAB_ASSETS: a folder with models/stories3M and data/.
"""

import argparse
import json
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from contextlib import nullcontext
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
import transformers
from lm_eval.models.huggingface import HFLM

from loralab.base.model import load
from loralab.base.targets import in_out, linears
from loralab.delta.lowrank import Delta, LowRank
from loralab.delta.several import Wardrobe
from loralab.delta.store import load_lowrank, save_lowrank
from loralab.evals.catalogue import CatalogueTask, load_tasks
from loralab.evals.harness import HarnessModel
from loralab.evals.taskfiles import Wanted, quiet
from loralab.evals.texts import TextEngine
from loralab.lab.evaluate import evaluate
from loralab.training.loss import LanguageHead

ASSETS = Path(os.environ.get("LORALAB_ASSETS", ""))
TASKS = {
    "hellaswag": "data/hellaswag/val_1000.jsonl",
    "arc_adapters": "data/arc_challenge/test.json",
    "winogrande_mosaic": "data/mosaic_winogrande/val.jsonl",
    "boolq_adapters": "data/boolq/test.json",
    "piqa_mosaic": "data/mosaic_piqa/val.jsonl",
}
BATCHES = (1, 4, 8, 16, 32, 64)
INCLUDE = str(Path(__file__).parent.parent / "examples" / "tasks")


def seconds(work: Callable[[], Any]) -> tuple[float, Any]:
    begin = time.perf_counter()
    with quiet():
        found = work()
    return time.perf_counter() - begin, found


def best_batch(peer: HFLM, task: CatalogueTask) -> int:
    """Find the batch size at which the peer is fastest, on a spread of the requests."""
    some = task.instances[:: max(1, len(task.instances) // 256)]
    taken = {}
    for size in BATCHES:
        peer.batch_size_per_gpu = size
        taken[size] = min(seconds(lambda: peer.loglikelihood(some, disable_tqdm=True))[0] for _ in range(2))
    return min(taken, key=taken.__getitem__)


def decisions(task: CatalogueTask, scored: list[tuple[float, bool]]) -> list[dict[str, Any]]:
    return [outcome.values for outcome in task.judged(scored)]


def measure(task: CatalogueTask, ours: HarnessModel, peer: HFLM, rounds: int) -> dict[str, Any]:
    peer.batch_size_per_gpu = best_batch(peer, task)
    taken: dict[str, list[float]] = {"loralab": [], "lm-eval hf": []}
    for _ in range(rounds):
        spent, mine = seconds(lambda: ours.loglikelihood(task.instances))
        taken["loralab"].append(spent)
        spent, theirs = seconds(lambda: peer.loglikelihood(task.instances, disable_tqdm=True))
        taken["lm-eval hf"].append(spent)
    pairs = list(zip(decisions(task, mine), decisions(task, theirs), strict=True))
    same = {metric: sum(a[metric] == b[metric] for a, b in pairs) / len(pairs) for metric in pairs[0][0]}
    medians = {name: statistics.median(times) for name, times in taken.items()}
    return {
        "task": task.name,
        "items": len(task),
        "requests": len(task.instances),
        "peer_batch": peer.batch_size_per_gpu,
        "seconds": {name: round(value, 2) for name, value in medians.items()},
        "ratio": round(medians["lm-eval hf"] / medians["loralab"], 2),
        "ratios": [round(b / a, 2) for a, b in zip(*taken.values(), strict=True)],
        "same_decisions": same,
        "largest_difference": max(abs(a[0] - b[0]) for a, b in zip(mine, theirs, strict=True)),
        "same_greedy": sum(a[1] == b[1] for a, b in zip(mine, theirs, strict=True)) / len(mine),
        "values": {metric: sum(a[metric] for a, _ in pairs) / len(pairs) for metric in pairs[0][0]},
    }


def random_deltas(folder: Path, number: int) -> list[str]:
    """Write adapters of rank 8 on all linear layers, with random numbers in both factors."""
    base = load(str(ASSETS / "models/stories3M"), dtype="float32", device="cpu")
    paths = []
    for seed in range(number):
        generator = torch.Generator().manual_seed(seed)
        pairs = {
            name: LowRank(*(torch.randn(s, generator=generator) * 0.02 for s in ((8, into), (out, 8))), 2.0)
            for name, layer in linears(base.model).items()
            for into, out in [in_out(layer)]
        }
        save_lowrank(folder / str(seed), Delta(pairs, base_fingerprint=base.fingerprint), base.path, model=base.model)
        paths.append(str(folder / str(seed)))
    return paths


def several(items: int | None, rounds: int) -> dict[str, Any]:
    """Time one call with three deltas, and four calls: the base, and each delta alone."""
    data = {"hellaswag": str(ASSETS / TASKS["hellaswag"])}

    def call(deltas: list[str]) -> Any:
        return evaluate(
            str(ASSETS / "models/stories3M"),
            ["hellaswag"],
            deltas=deltas,
            data=data,
            limit=items,
            dtype="float32",
            device="cpu",
        )

    with tempfile.TemporaryDirectory() as folder:
        deltas = random_deltas(Path(folder), 3)
        together, apart = [], []
        for _ in range(rounds):
            spent, found = seconds(lambda: call(deltas))
            together.append(spent)
            # Alone, a delta is measured without its base: half of what a paired call computes.
            apart.append(sum(seconds(lambda d=d: alone(d, data, items))[0] for d in (None, *deltas)))
        (_, one) = seconds(lambda: call([]))
    return {
        "task": "hellaswag, a base and three deltas",
        "seconds": {
            "one call": round(statistics.median(together), 2),
            "four calls": round(statistics.median(apart), 2),
        },
        "forwards": {"one call": found.facts["cost"]["forwards"], "base alone": one.facts["cost"]["forwards"]},
    }


def alone(delta: str | None, data: dict[str, str], items: int | None) -> None:
    """Score a base, or one delta without its base, as a call of its own: load, tokenise, score."""
    base = load(str(ASSETS / "models/stories3M"), dtype="float32", device="cpu")
    assert base.tokenizer is not None
    engine = TextEngine(LanguageHead(base.model), base.tokenizer)
    wanted = Wanted("hellaswag", limit=items, data={"test": data["hellaswag"]})
    (task,) = load_tasks([wanted], engine)
    wardrobe = Wardrobe(base.model, {} if delta is None else {"delta": load_lowrank(Path(delta))})
    task.outcomes([wardrobe.view(None if delta is None else "delta")])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--items", type=int)
    parser.add_argument("--tasks", nargs="*", default=list(TASKS))
    chosen = parser.parse_args()
    if not (ASSETS / "models").is_dir():
        raise SystemExit("set LORALAB_ASSETS to a folder with models/stories3M and data/")
    torch.set_num_threads(chosen.threads)
    base = load(str(ASSETS / "models/stories3M"), dtype="float32", device="cpu")
    assert base.tokenizer is not None
    ours = HarnessModel(TextEngine(LanguageHead(base.model), base.tokenizer), nullcontext)
    theirs: Any = transformers.AutoModelForCausalLM.from_pretrained(ASSETS / "models/stories3M", dtype=torch.float32)
    with quiet():
        peer = HFLM(pretrained=theirs, tokenizer=base.tokenizer, batch_size=1)
    facts = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": platform.processor() or platform.machine(),
        "threads": chosen.threads,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "model": "stories3M, float32",
    }
    print(json.dumps(facts))
    for name in chosen.tasks:
        wanted = Wanted(name, limit=chosen.items, data={"test": str(ASSETS / TASKS[name])}, include=(INCLUDE,))
        (task,) = load_tasks([wanted], ours.engine)
        print(json.dumps(measure(task, ours, peer, chosen.rounds)), flush=True)
    print(json.dumps(several(chosen.items, chosen.rounds)))


if __name__ == "__main__":
    main()
