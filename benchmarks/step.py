"""Time and saved bytes of one LoRA step: LoRA Lab against PEFT, and both against the frozen model (the ceiling).

Same random weights, same tokens, same labels, rank 16 on all linear layers, no dropout; contenders take turns step by step
and ratios of medians are reported. PEFT runs at its default and with `autocast_adapter_dtype=False`, its documented way to
keep half-precision adapters; both with the model's own loss and with the unlabelled rows dropped before the head, as
TRL does. Losses of the first step must agree, or the row is void.

    python benchmarks/step.py [--threads 1] [--steps 12] [--hidden 512] [--layers 4]
"""

import argparse
import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from datetime import UTC, datetime

import torch
import transformers
from peft import LoraConfig, get_peft_model
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM

from loralab.base import attention
from loralab.base.data import Batch, collate
from loralab.base.model import Base
from loralab.base.text import Example
from loralab.methods import METHODS
from loralab.training.loss import NO_TARGET, LanguageHead
from loralab.training.recompute import recompute_

Step = Callable[[], float]


def model_of(hidden: int, layers: int, dtype: torch.dtype, implementation: str) -> LlamaForCausalLM:
    """Build a Llama-type model with seeded random weights: mlp 2.75 × hidden, a quarter of the heads for keys."""
    torch.manual_seed(0)
    heads = hidden // 64
    shape = LlamaConfig(
        vocab_size=8192,
        hidden_size=hidden,
        intermediate_size=int(2.75 * hidden),
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=max(1, heads // 4),
        max_position_embeddings=2048,
        attn_implementation=implementation,
    )
    return LlamaForCausalLM(shape).to(dtype).requires_grad_(False).train()


def batch_of(lengths: list[int], labelled: float) -> Batch:
    """Lay random documents side by side; the last `labelled` share of each has a loss."""
    generator = torch.Generator().manual_seed(1)
    examples = []
    for n in lengths:
        tokens = torch.randint(8192, (n,), generator=generator).tolist()
        examples.append(Example(tokens, [i >= n * (1 - labelled) for i in range(n)]))
    return collate(examples)


def padded(batch: Batch) -> dict[str, torch.Tensor]:
    """Give the same documents as padded rows, as a collator for PEFT would."""
    longest, rows = max(batch.lengths), len(batch.lengths)
    tokens = torch.zeros(rows, longest, dtype=torch.long)
    mask, targets = torch.zeros_like(tokens), torch.full_like(tokens, NO_TARGET)
    start = 0
    for row, n in enumerate(batch.lengths):
        tokens[row, :n] = batch.tokens[0, start : start + n]
        targets[row, :n] = batch.targets[0, start : start + n]
        mask[row, :n] = 1
        start += n
    return {"input_ids": tokens, "attention_mask": mask, "targets": targets}


def ours(hidden: int, layers: int, dtype: torch.dtype, batch: Batch, recompute: str = "none") -> Step:
    """One step of LoRA Lab."""
    model = model_of(hidden, layers, dtype, attention.NAME)
    method = METHODS["lora"](rank=16, alpha=32.0)
    method.attach(Base(model=model, tokenizer=None, path="", revision=None, fingerprint=""), 0)
    recompute_(model, recompute)  # type: ignore[arg-type]
    head = LanguageHead(model)
    model.train()

    def step() -> float:
        loss = head.loss(batch)
        loss.backward()
        return float(loss.detach()) / batch.weight

    return step


def theirs(hidden: int, layers: int, dtype: torch.dtype, batch: Batch, *, narrow: bool, drop_rows: bool) -> Step:
    """One step of PEFT on padded rows."""
    model = model_of(hidden, layers, dtype, "sdpa")
    chosen = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
    tuned = get_peft_model(model, chosen, autocast_adapter_dtype=not narrow)
    rows = padded(batch)
    targets = rows.pop("targets")

    def step() -> float:
        if drop_rows:
            hidden_states = tuned.base_model.model.model(**rows, use_cache=False).last_hidden_state
            keep = targets != NO_TARGET
            logits, t = tuned.base_model.model.lm_head(hidden_states[keep]), targets[keep]
        else:
            logits, t = tuned(**rows, use_cache=False).logits.flatten(0, 1), targets.flatten()
        loss = F.cross_entropy(logits.float(), t, ignore_index=NO_TARGET, reduction="sum")
        loss.backward()
        return float(loss.detach()) / batch.weight

    return step


def ceiling(hidden: int, layers: int, dtype: torch.dtype, batch: Batch) -> Step:
    """Forward and input gradient of the frozen model alone: what no adapter can beat."""
    model = model_of(hidden, layers, dtype, attention.NAME)
    head = LanguageHead(model)
    embeddings = model.get_input_embeddings()
    embeddings.register_forward_hook(lambda _m, _i, out: out.requires_grad_(True))
    model.train()

    def step() -> float:
        loss = head.loss(batch)
        loss.backward()
        return float(loss.detach()) / batch.weight

    return step


def saved_bytes(step: Step) -> int:
    """Bytes kept for backward in one step, each storage once; the weights among them are the same for all."""
    kept: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        step()
    return sum(kept.values())


def main() -> None:
    """Run all rows and print one JSON line for each contender."""
    reader = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    reader.add_argument("--threads", type=int, default=1)
    reader.add_argument("--steps", type=int, default=12)
    reader.add_argument("--hidden", type=int, default=512)
    reader.add_argument("--layers", type=int, default=4)
    given = reader.parse_args()
    torch.set_num_threads(given.threads)
    print(json.dumps(machine(given.threads) | calibration()))
    for workload, lengths, labelled in (
        ("equal work: 512 tokens, all labelled", [512], 1.0),
        ("512 tokens, half labelled", [512], 0.5),
        ("mixed lengths, half labelled", [40, 300, 90, 150, 60, 220, 30, 134], 0.5),
    ):
        for dtype in (torch.float32, torch.bfloat16):
            for row in compare(given.hidden, given.layers, dtype, batch_of(lengths, labelled), given.steps):
                print(json.dumps({"workload": workload, "dtype": str(dtype).removeprefix("torch."), **row}))


def compare(hidden: int, layers: int, dtype: torch.dtype, batch: Batch, steps: int) -> list[dict[str, object]]:
    """Interleave all contenders and give a row for each."""
    shape = (hidden, layers, dtype, batch)
    contenders = {
        "loralab": ours(*shape),
        "loralab selective": ours(*shape, recompute="selective"),
        "peft": theirs(*shape, narrow=False, drop_rows=False),
        "peft, rows dropped": theirs(*shape, narrow=False, drop_rows=True),
        "peft, narrow adapters, rows dropped": theirs(*shape, narrow=True, drop_rows=True),
        "frozen ceiling": ceiling(*shape),
    }
    losses = {name: step() for name, step in contenders.items()}
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(steps):
        for name, step in contenders.items():
            begin = time.perf_counter()
            step()
            times[name].append(time.perf_counter() - begin)
    median = {name: statistics.median(values) for name, values in times.items()}
    apart = max(losses.values()) - min(losses.values())
    tolerance = 1e-4 if dtype is torch.float32 else 2e-2
    return [
        {
            "contender": name,
            "step_ms": round(1000 * median[name], 1),
            "over_peft": round(median["peft"] / median[name], 3),
            "over_ceiling": round(median[name] / median["frozen ceiling"], 3),
            # What selective recomputation keeps does not go through autograd's hooks: see tests/unit/test_memory.py.
            "saved_mib": None if "selective" in name else round(saved_bytes(step) / 2**20, 1),
            "loss": round(losses[name], 5),
            "valid": apart <= tolerance * losses["peft"],
        }
        for name, step in contenders.items()
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


def machine(threads: int) -> dict[str, object]:
    """Name the date, machine and versions behind the numbers."""
    import peft

    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "processor": platform.processor() or platform.machine(),
        "threads": threads,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "peft": peft.__version__,
    }


if __name__ == "__main__":
    main()
