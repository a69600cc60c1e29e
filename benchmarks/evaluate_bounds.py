"""What could be had of scoring multiple choice: how fast any engine on these layers could be, and how exact float32 is.

Speed. The matrix products of LoRA Lab and of lm-eval's own Hugging Face backend are counted as they run, shape by shape. The
best rate that this machine reaches for each of those shapes, with either of torch's libraries and one thread, is measured in the
same run. Our products at those rates, and nothing else, are the least that our layout of the requests can take; the backend's
time divided by it is a ratio that cannot be reached. Nearer to what can be is the ratio with products at those rates, attention
and the head's softmax as they are, and norms, rotations, activations, sums, tokenising and Python for nothing. Beside these
stands where both spend their time (torch's profiler).

Exactness. Log-likelihoods of both, in float32, against the same model in float64 (with norms that stay in float64, which
Transformers' own do not), and of the backend against itself at batch size 1.

    python benchmarks/evaluate_bounds.py [--threads 1] [--rounds 3] [--items 1000] [--tasks hellaswag piqa_mosaic]

Rows go to `results/evaluate_bounds-DATE.jsonl`. Needs LORALAB_ASSETS: a folder with models/stories3M and data/.
"""

import argparse
import copy
import statistics
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import numpy as np
import torch
import transformers
from _measured import Record, median, timed
from evaluate import ASSETS, INCLUDE, TASKS, best_batch
from lm_eval.models.huggingface import HFLM
from torch import nn
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from loralab.base.model import load
from loralab.evals.catalogue import load_tasks
from loralab.evals.harness import HarnessModel
from loralab.evals.probe import Cost, counting
from loralab.evals.taskfiles import Wanted, quiet
from loralab.evals.texts import TextEngine
from loralab.training.loss import LanguageHead

AIM, EXACT = 3.0, 1e-4
"""What is aimed at: times faster; and how near log-likelihoods shall be, in nats."""
ROWS = (128, 256, 512, 1024, 2048)
ATTENTION = ("loralab::document_attention", "aten::scaled_dot_product_attention")
HEAD = ("aten::_log_softmax", "aten::argmax", "aten::amax")
Shapes = Counter[tuple[int, int, int]]
"""Products (rows, k) · (k, n), by how often they run."""


def visible_pairs(lengths: Sequence[int], parents: Sequence[int]) -> int:
    """Count the pairs of a token and one that it sees, itself among them, in documents or in segments of trees."""
    depths: list[int] = []
    for parent in parents or [-1] * len(lengths):
        depths.append(0 if parent < 0 else depths[parent] + lengths[parent])
    return sum(n * depth + n * (n + 1) // 2 for n, depth in zip(lengths, depths, strict=True))


def counted(work: Callable[[], Any], vocab: int) -> tuple[Shapes, dict[str, float]]:
    """Count what one call computes: its matrix products; in GFLOP those, and attention to what tokens may see."""
    shapes: Shapes = Counter()

    def product(a: Sequence[int], b: Sequence[int], **_: Any) -> int:
        shapes[a[0], a[1], b[1]] += 1
        return 2 * a[0] * a[1] * b[1]

    def ours(
        q: Sequence[int], k: Any, v: Any, lengths: Sequence[int], parents: Sequence[int], *_: Any, **__: Any
    ) -> int:
        return 4 * q[1] * q[2] * visible_pairs(lengths, parents)

    def theirs(q: Sequence[int], *_: Any, **__: Any) -> int:
        return 4 * q[0] * q[1] * q[3] * visible_pairs([q[2]], [])

    attention = {
        torch.ops.loralab.document_attention: ours,
        torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: theirs,
    }
    with FlopCounterMode(display=False, custom_mapping={torch.ops.aten.mm: product, **attention}) as counter:
        work()
    found = {str(operator): flops / 1e9 for operator, flops in counter.flop_counts["Global"].items()}
    products = found.pop("aten.mm")
    in_head = sum(2 * m * k * n * count for (m, k, n), count in shapes.items() if n == vocab) / 1e9
    spent = {"layers": products - in_head, "head": in_head, "attention": sum(found.values())}
    return shapes, {part: round(gflop, 2) for part, gflop in spent.items()}


def shares(work: Callable[[], Any]) -> dict[str, float]:
    """Say what shares of its time one call spends in products, attention, the softmax of the head, and all else."""
    with profile(activities=[ProfilerActivity.CPU]) as profiled:
        _, spent, _ = timed(work)
    rows = profiled.key_averages()
    found = {
        "products": sum(row.self_cpu_time_total for row in rows if row.key == "aten::mm") / 1e6 / spent,
        "attention": sum(row.cpu_time_total for row in rows if row.key in ATTENTION) / 1e6 / spent,
        "softmax of the head": sum(row.self_cpu_time_total for row in rows if row.key in HEAD) / 1e6 / spent,
    }
    return {name: round(value, 3) for name, value in (found | {"all else": 1 - sum(found.values())}).items()}


def best_rates(shapes: Shapes) -> dict[tuple[int, int], float]:
    """Find the best GFLOP/s of one thread for products with (k, n) matrices: over numbers of rows, libraries and repetitions."""
    rates: dict[tuple[int, int], float] = {}
    for k, n in sorted({shape[1:] for shape in shapes}):
        W = torch.randn(n, k)
        for rows in ROWS:
            x, out = torch.randn(rows, k), torch.empty(rows, n)
            for multiply in (
                lambda x=x, W=W: nn.functional.linear(x, W),
                lambda x=x, W=W, out=out: torch.mm(x, W.t(), out=out),
                lambda x=x, W=W: torch.ops.mkldnn._linear_pointwise(x, W, None, "none", [], ""),
            ):
                rates[k, n] = max(rates.get((k, n), 0.0), 2e-9 * rows * k * n / quickest(multiply))
    return rates


def quickest(work: Callable[[], Any]) -> float:
    """Give the processor seconds of a call at its quickest; short calls are taken together."""
    taken, calls = [], max(1, round(2e-3 / max(timed(work)[0], 1e-6)))
    for _ in range(12):
        begin = time.process_time()
        for _ in range(calls):
            work()
        taken.append((time.process_time() - begin) / calls)
    return min(taken)


def apart(some: np.ndarray, others: np.ndarray) -> dict[str, float]:
    """Say how far log-likelihoods are from others: absolutely, in nats, and relatively."""
    far = np.abs(some - others)
    return {
        "largest": float(f"{far.max():.3g}"),
        "median": float(f"{np.median(far):.3g}"),
        "share_above_1e-4": round(float((far > EXACT).mean()), 4),
        "largest_relative": float(f"{(far / np.abs(others)).max():.3g}"),
    }


def in_float64(model: Any) -> Any:
    """Copy a model to float64, with torch's own norms for those that would round to float32 in between."""
    exact = copy.deepcopy(model).double()
    for name, norm in list(exact.named_modules()):
        if type(norm).__name__.endswith("RMSNorm"):
            own = nn.RMSNorm(len(norm.weight), eps=norm.variance_epsilon, dtype=torch.float64)
            own.weight = norm.weight
            exact.set_submodule(name, own)
    return exact


class Backend:
    """lm-eval's own backend around a model, asked at a batch size."""

    def __init__(self, model: Any, tokenizer: Any) -> None:
        with quiet():
            self.peer = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=1)

    def asked(self, instances: list[Any], size: int) -> list[tuple[float, bool]]:
        self.peer.batch_size_per_gpu = size
        with quiet():
            found: list[tuple[float, bool]] = self.peer.loglikelihood(instances, disable_tqdm=True)
        return found


def speed(instances: list[Any], ours: HarnessModel, theirs: Backend, size: int, asked: Any) -> dict[str, Any]:
    """Measure both in turns, and what the least is that our products can take."""
    calls = {"loralab": lambda: ours.loglikelihood(instances), "lm-eval hf": lambda: theirs.asked(instances, size)}
    models = {"loralab": ours.engine.head.model, "lm-eval hf": theirs.peer.model}
    turns = [{name: timed(call)[:2] for name, call in calls.items()} for _ in range(asked.rounds)]
    busy, wall = ({name: median([turn[name][i] for turn in turns]) for name in calls} for i in range(2))
    torch.set_num_threads(
        1
    )  # what other threads compute is neither counted nor profiled, and rates are those of a core
    shapes, found = {}, {}
    for name, call in calls.items():
        cost = Cost()
        with counting(models[name], cost):
            shapes[name], gflop = counted(call, ours.engine.head.model.config.vocab_size)
        vocab = ours.engine.head.model.config.vocab_size
        positions = sum(m * count for (m, _, n), count in shapes[name].items() if n == vocab)
        found[name] = {"tokens": cost.tokens, "positions_in_head": positions, "gflop": gflop, "shares": shares(call)}
    rates = best_rates(shapes["loralab"] | shapes["lm-eval hf"])
    torch.set_num_threads(asked.threads)
    for name, row in found.items():
        least = sum(2e-9 * m * k * n * count / rates[k, n] for (m, k, n), count in shapes[name].items())
        gflop, spent = row["gflop"]["layers"] + row["gflop"]["head"], row["shares"]["products"] * busy[name]
        row |= {"wall": wall[name], "processor": busy[name], "least_products": round(least, 3)}
        row["gflops_of_products"] = round(gflop / spent, 1)
    mine = found["loralab"]
    least, rest = mine["least_products"], busy["loralab"] * (1 - mine["shares"]["products"])
    return {
        "best_gflops": {f"{k} x {n}": round(rate, 1) for (k, n), rate in rates.items()},
        **found,
        "ratio": {"wall": ratio(turns, 1), "processor": ratio(turns, 0)},
        "flop_ratio": round(sum(found["lm-eval hf"]["gflop"].values()) / sum(mine["gflop"].values()), 2),
        "ratio_if_nothing_but_products": {
            "wall": round(wall["lm-eval hf"] * asked.threads / least, 2),
            "processor": round(busy["lm-eval hf"] / least, 2),
        },
        "ratio_if_all_else_costs_nothing": round(
            busy["lm-eval hf"]
            / (least + busy["loralab"] * (mine["shares"]["attention"] + mine["shares"]["softmax of the head"])),
            2,
        ),
        "ratio_if_products_at_best": round(busy["lm-eval hf"] / (least + rest), 2),
        "rest": {"now": round(rest, 3), "allowed_by_aim": round(busy["lm-eval hf"] / AIM - least, 3)},
    }


def ratio(turns: list[dict[str, tuple[float, float]]], clock: int) -> float:
    """Give the median ratio of the backend's time to ours within a turn; clock 0 is the processor's, 1 the wall's."""
    return round(statistics.median(turn["lm-eval hf"][clock] / turn["loralab"][clock] for turn in turns), 2)


def exactness(
    instances: list[Any], ours: HarnessModel, theirs: Backend, exact: Backend, size: int
) -> dict[str, dict[str, float]]:
    """Compare log-likelihoods in float32 with those in float64 and with each other."""
    found = {
        "ours": ours.loglikelihood(instances),
        "hf": theirs.asked(instances, size),
        "hf, batch 1": theirs.asked(instances, 1),
        "float64": exact.asked(instances, size),
    }
    values = {name: np.array([value for value, _ in scored]) for name, scored in found.items()}
    pairs = [("ours", "float64"), ("hf", "float64"), ("hf, batch 1", "float64"), ("ours", "hf"), ("hf", "hf, batch 1")]
    return {f"{a} - {b}": apart(values[a], values[b]) for a, b in pairs}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--items", type=int)
    parser.add_argument("--tasks", nargs="*", default=["hellaswag", "piqa_mosaic"], choices=list(TASKS))
    asked = parser.parse_args()
    if not (ASSETS / "models").is_dir():
        raise SystemExit("set LORALAB_ASSETS to a folder with models/stories3M and data/")
    torch.set_num_threads(asked.threads)
    base = load(str(ASSETS / "models/stories3M"), dtype="float32", device="cpu")
    assert base.tokenizer is not None
    ours = HarnessModel(TextEngine(LanguageHead(base.model), base.tokenizer), nullcontext)
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(ASSETS / "models/stories3M", dtype=torch.float32)
    theirs, exact = Backend(model, base.tokenizer), Backend(in_float64(model), base.tokenizer)
    record = Record("evaluate_bounds", model="stories3M, float32", rounds=asked.rounds)
    for name in asked.tasks:
        wanted = Wanted(name, limit=asked.items, data={"test": str(ASSETS / TASKS[name])}, include=(INCLUDE,))
        (task,) = load_tasks([wanted], ours.engine)
        size = best_batch(theirs.peer, task)
        about = {"task": name, "items": len(task), "requests": len(task.instances), "peer_batch": size}
        record.add(**about, **speed(task.instances, ours, theirs, size, asked))
        record.add(**about, nats=exactness(task.instances, ours, theirs, exact, size))


if __name__ == "__main__":
    main()
