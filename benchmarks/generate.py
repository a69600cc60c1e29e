"""Writing answers of very different lengths: LoRA Lab against Transformers' `generate` at its best batch size.

Both continue the same prompts greedily, in float32, and take turns; ratios of medians are reported, of wall time and of
processor time. Transformers gets the batch size and the order of prompts (as they come, by limit, by length) that are fastest
for it, which is looked for first on every second prompt. A batch of Transformers goes on until its last row has ended; each
row is cut where its own answer ends. Answers must agree token by token, or the row is void.

    python benchmarks/generate.py [--threads 1] [--rounds 3] [--prompts 200]

Needs LORALAB_ASSETS: a folder with models/stories3M and data/tinystories.
"""

import argparse
import json
import os
import platform
import random
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from datetime import UTC, datetime
from itertools import product
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from loralab.base.model import load
from loralab.evals.generate import Prompt, Tally, Writer

ASSETS = Path(os.environ.get("LORALAB_ASSETS", ""))
BATCHES = (16, 32, 64, 128)
STORY_ENDS = 1
"""The token with which this model ends a story."""


def workloads(tokenizer: PreTrainedTokenizerBase, count: int) -> dict[str, tuple[list[Prompt], list[int]]]:
    """Give prompts and stop tokens: lengths that are known, lengths that are not, and prompts that begin alike."""
    stories = json.loads((ASSETS / "data/tinystories/train_1000.json").read_text())[:count]
    tokens = [tokenizer(story)["input_ids"] for story in stories]
    choose = random.Random(0)
    known = [Prompt(t[: choose.randint(8, 64)], None, choose.randint(4, 200)) for t in tokens]
    unknown = [Prompt(t[: max(8, len(t) - choose.randint(4, 200))][-300:], None, 200) for t in tokens]
    begin = tokenizer(stories[0])["input_ids"][:200]
    alike = [Prompt(begin + prompt.tokens[1:], None, prompt.limit) for prompt in known]
    return {
        "limits of 4 to 200 tokens": (known, []),
        "200 tokens at most, ended by a stop token": (unknown, [STORY_ENDS]),
        "limits of 4 to 200 tokens behind 200 that all share": (alike, []),
    }


def ours(model: PreTrainedModel, prompts: list[Prompt], stops: list[int]) -> tuple[list[list[int]], Tally]:
    writer = Writer(model, stops=stops)
    (found,) = writer.write(prompts)
    return [answer.tokens for (answer,) in found], writer.tally


ORDERS: dict[str, Callable[[Prompt], int]] = {
    "as they come": lambda prompt: 0,
    "by limit": lambda prompt: prompt.limit,
    "by length": lambda prompt: len(prompt.tokens),
}


@torch.no_grad()
def theirs(
    model: PreTrainedModel, prompts: list[Prompt], stops: list[int], batch: int, order: str
) -> tuple[list[list[int]], Tally]:
    answers: list[list[int]] = [[]] * len(prompts)
    tally = Tally()
    places = sorted(range(len(prompts)), key=lambda i: ORDERS[order](prompts[i]))
    for begin in range(0, len(places), batch):
        group = [prompts[i] for i in places[begin : begin + batch]]
        longest, most = max(len(p.tokens) for p in group), max(p.limit for p in group)
        padding = [longest - len(p.tokens) for p in group]
        found: Any = model.generate(  # type: ignore[operator]
            torch.tensor([[0] * n + p.tokens for n, p in zip(padding, group, strict=True)]),
            attention_mask=torch.tensor([[0] * n + [1] * (longest - n) for n in padding]),
            generation_config=GenerationConfig(
                do_sample=False, max_new_tokens=most, eos_token_id=stops or None, pad_token_id=0
            ),
        )
        tally.steps += found.shape[1] - longest - 1
        tally.rows += len(group) * (found.shape[1] - longest - 1)
        for i, row in zip(places[begin : begin + batch], found[:, longest:].tolist(), strict=True):
            answer = row[: prompts[i].limit]
            end = next((n for n, token in enumerate(answer, 1) if token in stops), len(answer))
            answers[i] = answer[:end]
            tally.needed += end - 1
    return answers, tally


def timed(work: Callable[[], tuple[list[list[int]], Tally]]) -> tuple[tuple[float, float], list[list[int]], Tally]:
    wall, busy = time.perf_counter(), time.process_time()
    answers, tally = work()
    return (time.perf_counter() - wall, time.process_time() - busy), answers, tally


def best_way(model: PreTrainedModel, prompts: list[Prompt], stops: list[int]) -> tuple[int, str]:
    """Find the peer's fastest batch size and order; the best three are tried twice, as a single time may be a bad one."""

    def taken(way: tuple[int, str]) -> float:
        return timed(lambda: theirs(model, prompts, stops, *way))[0][1]

    tried = {way: taken(way) for way in product(BATCHES, ORDERS)}
    first = sorted(tried, key=tried.__getitem__)[:3]
    return min(first, key=lambda way: min(tried[way], taken(way)))


def compare(model: PreTrainedModel, prompts: list[Prompt], stops: list[int], rounds: int) -> list[dict[str, Any]]:
    """Look for the peer's best way, then take turns."""
    batch, order = best_way(model, prompts[::2], stops)
    contenders: dict[str, Callable[[], tuple[list[list[int]], Tally]]] = {
        "loralab": lambda: ours(model, prompts, stops),
        f"transformers.generate, batches of {batch}, {order}": lambda: theirs(model, prompts, stops, batch, order),
    }
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in contenders}
    answers, tallies = {}, {}
    for _ in range(rounds):
        for name, work in contenders.items():
            taken, answers[name], tallies[name] = timed(work)
            times[name].append(taken)
    wall, busy = ({name: statistics.median(t[k] for t in values) for name, values in times.items()} for k in (0, 1))
    first, peer = contenders
    written = sum(map(len, answers[first]))
    return [
        {
            "contender": name,
            "seconds": round(wall[name], 2),
            "tokens_per_second": round(written / wall[name]),
            "over_peer": round(wall[peer] / wall[name], 2),
            "over_peer_processor_time": round(busy[peer] / busy[name], 2),
            "rows_over_needed": round(tallies[name].rows / tallies[name].needed, 3),
            "tally": asdict(tallies[name]),
            "valid": answers[first] == answers[peer],
        }
        for name in contenders
    ]


def calibration() -> dict[str, object]:
    """Time one matrix product over and over: on a busy machine its times spread, and no ratio means much."""
    a = torch.randn(1024, 1024)
    times = []
    for _ in range(20):
        begin = time.perf_counter()
        a @ a
        times.append(time.perf_counter() - begin)
    best, middle = min(times), statistics.median(times)
    return {
        "gemm_gflops": round(2 * 1024**3 / best / 1e9, 1),
        "gemm_spread": round(middle / best - 1, 3),
        "load": round(os.getloadavg()[0], 2),
        "quiet": middle / best < 1.05,
    }


def main() -> None:
    """Run all workloads and print one JSON line for each contender."""
    reader = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    reader.add_argument("--threads", type=int, default=1)
    reader.add_argument("--rounds", type=int, default=3)
    reader.add_argument("--prompts", type=int, default=200)
    asked = reader.parse_args()
    if not (ASSETS / "models/stories3M").is_dir():
        sys.exit("set LORALAB_ASSETS to the folder of real small models and data")
    torch.set_num_threads(asked.threads)
    header = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "processor": platform.processor() or platform.machine(),
        "threads": asked.threads,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "model": "stories3M, float32",
        "prompts": asked.prompts,
    }
    print(json.dumps(header | calibration()))
    base = load(str(ASSETS / "models/stories3M"), device="cpu", dtype="float32")
    assert base.tokenizer is not None
    base.model.generation_config = GenerationConfig()
    base.model.eval()
    for workload, (prompts, stops) in workloads(base.tokenizer, asked.prompts).items():
        for row in compare(base.model, prompts, stops, asked.rounds):
            print(json.dumps({"workload": workload, **row}), flush=True)


if __name__ == "__main__":
    main()
