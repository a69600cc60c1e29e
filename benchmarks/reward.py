"""One step of a reward model on pairs: LoRA Lab, with and without shared prompts, against TRL's RewardTrainer.

Same random weights and head, same pairs, same start of the low-rank pairs, same AdamW, in float32; LoRA (rank 16, all linear
layers, with PEFT in TRL) and full fine-tuning. Contenders take turns step by step on one batch, medians of processor seconds are
compared, and the losses of all steps must agree, or the row is void. Prompts are as long as answers (P = R) or three times as
long (P = 3R); all answers have the same length, so TRL pads nothing. TRL runs without gradient checkpointing, its default, which
would compute every layer twice; its memory with it is given beside.

Peak memory is taken in a process of its own for each contender, over its loading and two steps, above what is resident when the
libraries are loaded and warm.

    python benchmarks/reward.py [--threads 1] [--steps 5] [--pairs 6] [--answer 48] [--hidden 512] [--layers 8]

Needs TRL: pip install trl
"""

import argparse
import json
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import trl
from _measured import Record, child, median
from _trl import RANK, SETTINGS, Ours, draw_base, lora, memory, quiet, run, same_start, take_turns, words, write_rows
from datasets import Dataset
from trl import RewardConfig, RewardTrainer

METHODS = ("lora", "full")
LEARNING_RATES = {"lora": 2e-4, "full": 1e-5}
CONTENDERS = ("loralab", "loralab, prompts not shared", "trl")
CHECKPOINTED = "trl, gradient checkpointing"
WARM_STEPS = 2
APART = 1e-3
"""Most nats between the losses of two contenders at the same step."""


@dataclass(frozen=True)
class Work:
    """One batch of pairs, as a file, on a base."""

    base: str
    rows: str
    pairs: int
    method: str

    def ours(self, share: bool) -> Ours:
        return Ours(
            model=self.base,
            data={"train": self.rows, "validation_share": 0.0, "packing": False},
            method={"name": self.method},
            objective={"name": "reward", "share_prompts": share},
            optimizer={"learning_rate": LEARNING_RATES[self.method]},
            train={"batch_size": self.pairs},
        )

    def theirs(self, steps: int, folder: str, *, checkpointing: bool = False) -> "Watched":
        settings = SETTINGS | {"gradient_checkpointing": checkpointing}
        asked = RewardConfig(
            output_dir=folder,
            per_device_train_batch_size=self.pairs,
            max_steps=steps,
            learning_rate=LEARNING_RATES[self.method],
            **settings,
        )
        rows = [json.loads(line) for line in Path(self.rows).read_text(encoding="utf-8").splitlines()]
        return Watched(
            self.base,
            asked,
            train_dataset=Dataset.from_list(rows),
            peft_config=lora(["score"]) if self.method == "lora" else None,
        )


class Watched(RewardTrainer):
    """TRL's trainer, with its losses and tokens noted."""

    def __init__(self, *given: Any, **named: Any) -> None:
        self.losses: list[float] = []
        self.tokens = 0
        super().__init__(*given, **named)

    def compute_loss(self, model: Any, inputs: Any, *given: Any, **named: Any) -> Any:
        self.tokens = inputs["input_ids"].numel()
        loss = super().compute_loss(model, inputs, *given, **named)
        self.losses.append(float(loss.detach()))
        return loss


def compare(work: Work, steps: int, folder: str) -> list[dict[str, Any]]:
    """Let all contenders take turns on one batch."""
    ours = {name: work.ours(share=name == "loralab") for name in CONTENDERS if name != "trl"}
    theirs = work.theirs(steps + 1, folder)
    for mine in ours.values():
        same_start(mine, theirs.model)
    trained = {
        sum(p.numel() for p in model.parameters() if p.requires_grad)
        for model in (theirs.model, *(o.model for o in ours.values()))
    }
    taken = take_turns(theirs, {name: mine.step for name, mine in ours.items()})
    losses = {name: [report.loss for report in mine.reports] for name, mine in ours.items()} | {"trl": theirs.losses}
    tokens = {name: mine.reports[-1].num_tokens for name, mine in ours.items()} | {"trl": theirs.tokens}
    rows = []
    for name in CONTENDERS:
        busy, wall = (median([each[k] for each in taken[name]]) for k in (0, 1))
        apart = max(abs(a - b) for a, b in zip(losses[name], losses["trl"], strict=True))
        rows.append(
            {
                "contender": name,
                "step_cpu_s": busy,
                "step_s": wall,
                "over_trl": round(median([each[0] for each in taken["trl"]]) / busy, 2),
                "tokens": tokens[name],
                "cpu_s_each": [round(each[0], 3) for each in taken[name]],
                "losses": [round(loss, 5) for loss in losses[name]],
                "losses_apart": float(f"{apart:.2g}"),
                "trained": max(trained),
                "valid": apart <= APART and len(trained) == 1,
            }
        )
    return rows


def measure(name: str, small: Work, large: Work, folder: str) -> None:
    """Measure the memory of one contender, in a child."""

    def made(work: Work) -> Callable[[], None]:
        if name.startswith("trl"):
            trainer = work.theirs(WARM_STEPS, folder, checkpointing=name == CHECKPOINTED)
            return lambda: run(trainer)
        mine = work.ours(share=name == CONTENDERS[0])
        return lambda: mine.steps(WARM_STEPS)

    print(json.dumps({"peak_mib": memory(lambda: made(small)(), lambda: made(large))}))


def pairs(count: int, prompt: int, answer: int) -> list[dict[str, Any]]:
    """Give pairs of random answers; with the end token that both sides put behind an answer it has `answer` tokens."""
    return [
        {
            "prompt": words(prompt, 3 * number) + " ",
            "chosen": words(answer - 1, 3 * number + 1),
            "rejected": words(answer - 1, 3 * number + 2),
        }
        for number in range(count)
    ]


def over_full(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Divide what LoRA takes by what full fine-tuning takes: the savings that P5 (2403.10704) reports."""
    found = {(row["workload"], row["contender"], row["method"]): row for row in rows}
    kept = ("step_cpu_s", "peak_mib")
    return [
        {
            "workload": workload,
            "contender": name,
            "lora_over_full": {
                key: round(row[key] / found[workload, name, "full"][key], 3) for key in kept if key in row
            },
        }
        for (workload, name, method), row in found.items()
        if method == "lora"
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--pairs", type=int, default=6)
    parser.add_argument("--answer", type=int, default=48, help="tokens of an answer")
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    asked = parser.parse_args()
    torch.set_num_threads(asked.threads)
    quiet()
    if asked.measure:
        told = json.loads(asked.measure)
        measure(told["contender"], Work(**told["small"]), Work(**told["large"]), told["folder"])
        return
    with tempfile.TemporaryDirectory() as folder:
        here = Path(folder)
        parameters = draw_base(here / "large", asked.hidden, asked.layers)
        draw_base(here / "small", 64, 2)
        shape = {key: value for key, value in vars(asked).items() if key not in ("threads", "measure")}
        record = Record("reward", trl=trl.__version__, parameters=parameters, rank=RANK, **shape)
        few = str(write_rows(here / "few.jsonl", pairs(2, 8, 8)))
        rows = []
        for workload, times in (("P = R", 1), ("P = 3R", 3)):
            file = write_rows(here / f"{times}.jsonl", pairs(asked.pairs, times * asked.answer, asked.answer))
            for method in METHODS:
                small = Work(str(here / "small"), few, 2, method)
                large = Work(str(here / "large"), str(file), asked.pairs, method)
                found = compare(large, asked.steps, folder)
                for row in [*found, {"contender": CHECKPOINTED}]:
                    told = {
                        "contender": row["contender"],
                        "small": asdict(small),
                        "large": asdict(large),
                        "folder": folder,
                    }
                    # With a fixed threshold the C library gives freed blocks back.
                    mib = child(
                        __file__, "--threads", "1", "--measure", json.dumps(told), MALLOC_MMAP_THRESHOLD_="65536"
                    )
                    rows.append({"workload": workload, "method": method, **row, **mib})
                    record.add(**rows[-1])
        for row in over_full(rows):
            record.add(**row)


if __name__ == "__main__":
    main()
