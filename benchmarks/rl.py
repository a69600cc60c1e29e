"""One step of RLOO and of GRPO with LoRA: policy, reference and reward on one base, against TRL with a reward model beside it.

Same weights, prompts, number of answers and of tokens in them (no stop token ends one), same low-rank pairs (rank 16, all linear
layers, with PEFT in TRL), temperature 1, β = 0.05, AdamW, float32. TRL loads the reward, the same delta merged into the base, as a
model of its own, as its documentation says; it runs without gradient checkpointing, its default, which would compute every layer
twice (its memory with it is given beside). A step is everything: writing the answers, rewarding them, asking the reference, and
the update. Contenders take turns step by step; medians of processor seconds are compared.

- parts: processor seconds of a step. `log_probs` are passes over the answers without gradient: of the reference, and in TRL's RLOO
  of the policy as it wrote them, which ours takes from the pass that learns.
- valid: before the first step both get the same answers and rewards, with pairs that are not zero, and the gradients of all factors
  must agree (`gradient_apart`: norm of the difference over the norm); both reward models must give these answers the same rewards.
  `OF_TRL` holds the two settings that make TRL's losses those of the papers and ours.
- peak_mib: over loading and two steps, in a process of its own, above what is resident when the libraries are loaded and warm.
- base_copies: how often the matrices of the base's layers are in memory, counted as tensors alive, each storage once.

    python benchmarks/rl.py [--threads 1] [--steps 5] [--prompts 4] [--samples 4] [--tokens 32] [--bases drawn stories3M]

Needs TRL: pip install trl. The base stories3M needs LORALAB_ASSETS: a folder with models/stories3M and data/tinystories.
"""

import argparse
import json
import os
import sys
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import trl
from _measured import Record, child, median
from _trl import (
    ALPHA,
    RANK,
    SETTINGS,
    Ours,
    Parts,
    base_copies,
    draw_base,
    lora,
    memory,
    quiet,
    run,
    same_start,
    take_turns,
    words,
    write_rows,
)
from datasets import Dataset
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification
from trl import GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer

from loralab.delta.opened import folder_of
from loralab.evals.generate import Writer
from loralab.lab.experiment import train
from loralab.spec.spec import RunSpec
from loralab.training.objectives.answers import Rollout

ASSETS = Path(os.environ.get("LORALAB_ASSETS", ""))
ALGORITHMS = ("rloo", "grpo")
CONTENDERS = ("loralab", "trl")
CHECKPOINTED = "trl, gradient checkpointing"
BETA, LEARNING_RATE = 0.05, 1e-4
STRENGTH = 0.01
"""Standard deviation of B where the gradients are compared."""
APART = 1e-3
WARM_STEPS = 2
LENGTHS = {"max_length": 512, "packing": False}


@dataclass(frozen=True)
class World:
    """A base, a reward on it (as our run, and merged, as TRL needs it), and prompts."""

    base: str
    reward: str
    merged: str
    prompts: str
    samples: int
    tokens: int

    def asked(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in Path(self.prompts).read_text(encoding="utf-8").splitlines()]


def prepared(folder: Path, base: Path, prompts: list[str], samples: int, tokens: int) -> World:
    """Train a reward on a base for two steps, and merge it into a copy."""
    pairs = [{"prompt": text, "chosen": text[: len(text) // 2], "rejected": text[len(text) // 2 :]} for text in prompts]
    plain = {
        "model": {"path": str(base), "device": "cpu", "dtype": "float32"},
        "data": {"train": str(write_rows(folder / "pairs.jsonl", pairs)), "validation_share": 0.0, **LENGTHS},
        "method": {"name": "lora", "rank": RANK},
        "objective": {"name": "reward"},
        "optimizer": {"learning_rate": 1e-3},
        "schedule": {"name": "constant"},
        "train": {"steps": 2, "batch_size": 2},
        "probes": {"every": 2, "spectra": False, "samples": 0},
    }
    reward = train(RunSpec.model_validate(plain), folder / "runs").folder.path
    from peft import PeftModel

    whole = AutoModelForSequenceClassification.from_pretrained(base, num_labels=1, dtype="float32")
    merged = PeftModel.from_pretrained(whole, folder_of(reward)).merge_and_unload()
    merged.save_pretrained(folder / "merged")
    for file in base.glob("*token*"):
        (folder / "merged" / file.name).write_bytes(file.read_bytes())
    asked = write_rows(folder / "prompts.jsonl", [{"prompt": text} for text in prompts])
    return World(str(base), str(reward), str(folder / "merged"), str(asked), samples, tokens)


class Policy(Ours):
    """Our side, with clocks on its parts."""

    def __init__(self, world: World, algorithm: str) -> None:
        super().__init__(
            model=world.base,
            data={"train": world.prompts, "validation_share": 0.0, **LENGTHS},
            method={"name": "lora", "rank": RANK, "alpha": ALPHA},
            objective={
                "name": "policy",
                "algorithm": algorithm,
                "reward": world.reward,
                "samples": world.samples,
                "max_tokens": world.tokens,
                "temperature": 1.0,
                "beta": BETA,
            },
            optimizer={"learning_rate": LEARNING_RATE},
            train={"batch_size": len(world.asked())},
        )
        self.parts = Parts()
        self.objective = getattr(self.prepared.objective, "objective", self.prepared.objective)
        rollouts, head, base = self.objective.sample, self.objective.head, self.prepared.base
        writer = Writer(base.model, base.tokenizer, stops=[], together=head.packs)
        write, rewards, reference = writer.write, rollouts.rewards, self.objective.reference
        writer.write = self._clocked("sampling", write)
        rollouts.writer, rollouts.rewards = writer, self._clocked("reward", rewards)

        @contextmanager
        def clocked_reference() -> Iterator[None]:
            with self.parts("log_probs"), reference():
                yield

        self.objective.reference = clocked_reference

    def _clocked(self, part: str, work: Callable[..., Any]) -> Callable[..., Any]:
        def clocked(*given: Any, **named: Any) -> Any:
            with self.parts(part):
                return work(*given, **named)

        return clocked

    def first(self) -> tuple[list[Rollout], dict[str, Tensor]]:
        """Write answers, and give the gradients of all factors on them, unclipped."""
        (batch,) = next(self.objective.batches(self.model))
        loss = self.objective.loss(self.model, batch)
        loss.total.backward()
        found = {name: factor.grad / loss.weight for name, factor in self.factors().items()}
        self.model.zero_grad()
        self.parts.take()
        return self.objective.rollouts, found


class Clocked:
    """Looks on while a trainer of TRL works; its first step gets the answers and rewards that it is given."""

    parts: Parts
    given: dict[tuple[int, ...], Rollout] | None = None
    gradients: dict[str, Tensor]

    def _generate_single_turn(self, prompt_ids: list[list[int]], *rest: Any, **named: Any) -> Any:
        if self.given is None:
            with self.parts("sampling"):
                return super()._generate_single_turn(prompt_ids, *rest, **named)
        left = {prompt: list(zip(r.answers, r.rewards, strict=True)) for prompt, r in self.given.items()}
        taken = [left[tuple(ids)].pop(0) for ids in prompt_ids]
        self.rewards = [reward for _, reward in taken]
        answers = [answer for answer, _ in taken]
        return (answers, None) if isinstance(self, GRPOTrainer) else answers

    def _calculate_rewards(self, *given: Any) -> Tensor:
        if self.given is not None:
            return torch.tensor(self.rewards)[:, None]
        with self.parts("reward"):
            return super()._calculate_rewards(*given)

    def _get_per_token_logps_and_entropies(self, *given: Any, **named: Any) -> Any:
        if torch.is_grad_enabled():
            return super()._get_per_token_logps_and_entropies(*given, **named)
        with self.parts("log_probs"):
            return super()._get_per_token_logps_and_entropies(*given, **named)

    def training_step(self, *given: Any, **named: Any) -> Tensor:
        loss = super().training_step(*given, **named)
        if self.given is not None:
            self.gradients = {n: p.grad.clone() for n, p in self.model.named_parameters() if p.grad is not None}
            self.given = None
        return loss


class ClockedRloo(Clocked, RLOOTrainer):
    """RLOO of TRL with clocks."""


class ClockedGrpo(Clocked, GRPOTrainer):
    """GRPO of TRL with clocks."""


OF_TRL: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    # Our RLOO climbs (1 - beta) r - beta KL, TRL's r - beta KL.
    "rloo": (ClockedRloo, RLOOConfig, {"reward_weights": [1 - BETA]}),
    # Ours is the paper's k3; TRL multiplies it by the ratio unless told not to.
    "grpo": (ClockedGrpo, GRPOConfig, {"use_bias_correction_kl": False}),
}
"""Trainer, settings, and what makes its loss the same as ours."""


def theirs(world: World, algorithm: str, steps: int, folder: str, *, checkpointing: bool = False) -> Any:
    """Give TRL's trainer: a step reads every prompt once, and computes all answers at a time, as ours does."""
    trainer, settings, same = OF_TRL[algorithm]
    rows = world.asked()
    asked = settings(
        output_dir=folder,
        per_device_train_batch_size=len(rows) * world.samples,
        num_generations=world.samples,
        max_completion_length=world.tokens,
        generation_kwargs={"min_new_tokens": world.tokens},
        temperature=1.0,
        beta=BETA,
        max_steps=steps,
        learning_rate=LEARNING_RATE,
        **SETTINGS | same | {"gradient_checkpointing": checkpointing},
    )
    model = AutoModelForCausalLM.from_pretrained(world.base, dtype="float32")
    made = trainer(model, world.merged, asked, train_dataset=Dataset.from_list(rows), peft_config=lora())
    made.parts = Parts()
    return made


@torch.no_grad()
def rewards_apart(rollouts: list[Rollout], reward: Any, end: int) -> float:
    """Give the largest difference between our rewards and those of TRL's reward model, as a share of their spread."""
    own = torch.tensor([r for rollout in rollouts for r in rollout.rewards])
    rows = [[*rollout.prompt, *answer, end] for rollout in rollouts for answer in rollout.answers]
    other = torch.cat([reward(input_ids=torch.tensor([row])).logits[:, 0] for row in rows])
    return float((own - other).abs().max() / own.std())


def compare(world: World, algorithm: str, steps: int, folder: str) -> list[dict[str, Any]]:
    """Let both see the same answers, then take turns."""
    ours, trainer = Policy(world, algorithm), theirs(world, algorithm, steps + 1, folder)
    same_start(ours, trainer.model, STRENGTH)
    rollouts, gradients = ours.first()
    trainer.given = {tuple(rollout.prompt): rollout for rollout in rollouts}
    tokenizer = ours.prepared.base.tokenizer
    rewards = rewards_apart(rollouts, trainer.reward_funcs[0], tokenizer.eos_token_id)
    parts: dict[str, list[dict[str, float]]] = defaultdict(list)

    def step() -> None:
        parts["trl"].append(trainer.parts.take())
        ours.step()
        parts["loralab"].append(ours.parts.take())

    taken = take_turns(trainer, {"loralab": step})
    joint, other = (torch.cat([g[name].flatten() for name in gradients]) for g in (gradients, trainer.gradients))
    apart = float((joint - other).norm() / joint.norm())
    written = {len(answer) for rollout in ours.objective.rollouts for answer in rollout.answers}
    rows = []
    for name in CONTENDERS:
        busy, wall = (median([each[k] for each in taken[name]]) for k in (0, 1))
        mine = {
            part: median([found[part] for found in parts[name][1:]]) for part in ("sampling", "reward", "log_probs")
        }
        rows.append(
            {
                "contender": name,
                "step_cpu_s": busy,
                "step_s": wall,
                "over_trl": round(median([each[0] for each in taken["trl"]]) / busy, 2),
                "parts": mine | {"update": float(f"{busy - sum(mine.values()):.4g}")},
                "cpu_s_each": [round(each[0], 3) for each in taken[name]],
                "gradient_apart": float(f"{apart:.2g}"),
                "rewards_apart": float(f"{rewards:.2g}"),
                "valid": apart <= APART and rewards <= APART and written == {world.tokens},
            }
        )
    return rows


def measure(name: str, algorithm: str, small: World, large: World, folder: str) -> None:
    """Measure the memory of one contender, in a child, and count the copies of its base."""
    alive = []

    def made(world: World) -> Callable[[], None]:
        if name == "loralab":
            mine = Policy(world, algorithm)
            alive.append(mine)
            return lambda: mine.steps(WARM_STEPS)
        trainer = theirs(world, algorithm, WARM_STEPS, folder, checkpointing=name == CHECKPOINTED)
        alive.append(trainer)
        return lambda: run(trainer)

    def warm() -> None:
        made(small)()
        alive.clear()

    print(json.dumps({"peak_mib": memory(warm, lambda: made(large)), "base_copies": base_copies(large.base)}))


def stories(count: int, letters: int = 240) -> list[str]:
    """Give beginnings of stories, cut between words."""
    told = json.loads((ASSETS / "data/tinystories/train_1000.json").read_text(encoding="utf-8"))
    return [story[:letters].rpartition(" ")[0] for story in told[:count]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--prompts", type=int, default=4)
    parser.add_argument("--prompt-tokens", type=int, default=64)
    parser.add_argument("--samples", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=32, help="of an answer")
    parser.add_argument("--hidden", type=int, default=640, help="of the drawn base")
    parser.add_argument("--layers", type=int, default=8, help="of the drawn base")
    parser.add_argument("--bases", nargs="+", default=["stories3M", "drawn"], choices=["stories3M", "drawn"])
    parser.add_argument("--algorithms", nargs="+", default=list(ALGORITHMS), choices=list(ALGORITHMS))
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    asked = parser.parse_args()
    torch.set_num_threads(asked.threads)
    quiet()
    if asked.measure:
        told = json.loads(asked.measure)
        worlds = (World(**told[size]) for size in ("small", "large"))
        measure(told["contender"], told["algorithm"], *worlds, told["folder"])
        return
    if "stories3M" in asked.bases and not (ASSETS / "models/stories3M").is_dir():
        sys.exit("set LORALAB_ASSETS to the folder of real small models and data, or give --bases drawn")
    shape = {key: value for key, value in vars(asked).items() if key not in ("threads", "measure")}
    with tempfile.TemporaryDirectory() as folder:
        record = Record("rl", trl=trl.__version__, rank=RANK, beta=BETA, **shape)
        small = drawn_world(Path(folder) / "small", 64, 2, 2, 8, 2, 4)
        for base in asked.bases:
            large = world_of(base, Path(folder) / base, asked)
            for algorithm in asked.algorithms:
                found = compare(large, algorithm, asked.steps, folder)
                # Its memory is the same for both algorithms.
                also = [{"contender": CHECKPOINTED}] if algorithm == asked.algorithms[0] else []
                for row in [*found, *also]:
                    told = {"contender": row["contender"], "algorithm": algorithm, "folder": folder}
                    told |= {"small": asdict(small), "large": asdict(large)}
                    # With a fixed threshold the C library gives freed blocks back.
                    mib = child(__file__, "--measure", json.dumps(told), MALLOC_MMAP_THRESHOLD_="65536")
                    record.add(base=base, algorithm=algorithm, **row, **mib)


def world_of(base: str, folder: Path, asked: argparse.Namespace) -> World:
    """Make the world of a base by its name."""
    sizes = (asked.samples, asked.tokens)
    if base == "drawn":
        return drawn_world(folder, asked.hidden, asked.layers, asked.prompts, asked.prompt_tokens, *sizes)
    folder.mkdir()
    return prepared(folder, ASSETS / "models/stories3M", stories(asked.prompts), *sizes)


def drawn_world(folder: Path, hidden: int, layers: int, prompts: int, length: int, *sizes: int) -> World:
    draw_base(folder / "base", hidden, layers)
    return prepared(folder, folder / "base", [words(length, seed) + " " for seed in range(prompts)], *sizes)


if __name__ == "__main__":
    main()
