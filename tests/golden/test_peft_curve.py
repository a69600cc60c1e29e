"""Fifty steps of LoRA are the fifty steps of stock PEFT under a plain torch loop.

Ours: packed rows, our attention, our low-rank layer with its own backward pass, the chunked loss, named groups, the loop.
Theirs: Transformers' model with `sdpa`, PEFT's layers, padded rows with an attention mask, `cross_entropy` on all logits,
`torch.optim.AdamW`. Only the starting A, the batches and the numbers of the recipe are shared.
"""

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from battery import FixedFeed, NoWatch, World, fresh_base
from peft import LoraConfig, get_peft_model
from peft.optimizers import create_loraplus_optimizer
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from loralab.base.data import Batch, collate
from loralab.base.model import load
from loralab.base.text import encode, prompted
from loralab.methods import METHODS
from loralab.methods.lora import Lora
from loralab.training.loop import Loop
from loralab.training.loss import LanguageHead
from loralab.training.objectives.text import TextObjective
from loralab.training.optim import schedule, torch_optimizer
from tiny import tiny

LEARNING_RATE, WEIGHT_DECAY, CLIP, WARMUP = 1e-3, 0.1, 0.5, 0.1
RANK, ALPHA = 4, 8.0
TOLERANCE = 2e-5  # nats; ten times what was measured, a tenth of what no weight decay would change


class Recorded:
    """A feed that keeps what it gave."""

    def __init__(self, feed: Any) -> None:
        self.feed, self.steps = feed, []

    def next_step(self) -> list[Batch]:
        self.steps.append(self.feed.next_step())
        return self.steps[-1]


class Cycle(FixedFeed):
    """Five steps of six random documents, over and over, so that there is something to learn."""

    def __init__(self) -> None:
        super().__init__(sequences=6, micro=6)

    def next_step(self) -> list[Batch]:
        self.step %= 5
        return super().next_step()


class Rows:
    """Two rows of real text at a time, in order."""

    def __init__(self, batches: Sequence[Batch]) -> None:
        self.batches = iter(batches)

    def next_step(self) -> list[Batch]:
        return [next(self.batches)]


def train_ours(world: World, feed: Any, steps: int) -> list[float]:
    watch = NoWatch()
    Loop(
        model=world.base.model,
        method=world.method,
        objective=TextObjective(feed, world.head),
        make_optimizer=torch_optimizer("adamw"),
        learning_rate=LEARNING_RATE,
        weight_decay=WEIGHT_DECAY,
        schedule=schedule("cosine", warmup=WARMUP),
        total_steps=steps,
        clip=CLIP,
    ).run(watch)
    return watch.losses


def attach(base: Any, kind: str, **keys: Any) -> World:
    method = METHODS[kind](rank=RANK, alpha=ALPHA, **keys)
    method.attach(base, 0)
    return World(base, method, LanguageHead(base.model))


def stock_peft(model: PreTrainedModel, ours: World) -> nn.Module:
    """Put PEFT's LoRA on a stock model, beginning at our A."""
    wrapped = get_peft_model(model, LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules="all-linear"))
    assert isinstance(ours.method, Lora)
    layers = dict(wrapped.base_model.model.named_modules())
    assert {n for n, m in layers.items() if hasattr(m, "lora_A")} == set(ours.method.layers)
    with torch.no_grad():
        for name, pair in ours.method.delta().items():
            layers[name].lora_A["default"].weight.copy_(pair.A)
    return wrapped.train()


def cosine_with_warmup(step: int, steps: int) -> float:
    warm = round(WARMUP * steps)
    if step < warm:
        return (step + 1) / (warm + 1)
    return 0.5 * (1 + math.cos(math.pi * (step - warm) / (steps - warm)))


def padded(batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
    """Lay the documents of a packed row one below the other: tokens, mask, targets (documents, longest)."""
    parts = [torch.split(row[0], batch.lengths) for row in (batch.tokens, batch.targets)]
    tokens = nn.utils.rnn.pad_sequence(list(parts[0]), batch_first=True)
    targets = nn.utils.rnn.pad_sequence(list(parts[1]), batch_first=True, padding_value=-100)
    seen = torch.arange(tokens.shape[1])[None] < torch.tensor(batch.lengths)[:, None]
    return tokens, seen.long(), targets


def train_theirs(model: nn.Module, optimizer: torch.optim.Optimizer, steps: list[list[Batch]]) -> list[float]:
    """Run the loop of every tutorial."""
    scheduled = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: cosine_with_warmup(step, len(steps)))
    trained = [p for p in model.parameters() if p.requires_grad]
    losses = []
    for (batch,) in steps:
        tokens, seen, targets = padded(batch)
        logits = model(input_ids=tokens, attention_mask=seen).logits
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())
        loss.backward()
        nn.utils.clip_grad_norm_(trained, CLIP)
        optimizer.step()
        scheduled.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def adamw(model: nn.Module) -> torch.optim.Optimizer:
    trained = [p for p in model.parameters() if p.requires_grad]
    return torch.optim.AdamW(trained, lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY)


def lora_plus_of_peft(model: nn.Module) -> torch.optim.Optimizer:
    return create_loraplus_optimizer(
        model,
        torch.optim.AdamW,
        lr=LEARNING_RATE,
        loraplus_lr_ratio=8.0,
        loraplus_weight_decay=WEIGHT_DECAY,
    )


def same_curve(
    ours: World, stock: PreTrainedModel, feed: Any, steps: int, optimizer: Callable[[nn.Module], torch.optim.Optimizer]
) -> None:
    assert stock.config._attn_implementation == "sdpa"
    theirs = stock_peft(stock, ours)
    recorded = Recorded(feed)
    found = train_ours(ours, recorded, steps)
    expected = train_theirs(theirs, optimizer(theirs), recorded.steps)
    torch.testing.assert_close(torch.tensor(found), torch.tensor(expected), rtol=0, atol=TOLERANCE)
    assert len(found) == steps
    assert gain_on_the_last_step(ours, recorded.steps[-1]) > 0.01


def gain_on_the_last_step(ours: World, batches: list[Batch]) -> float:
    """Nats per token that the training gained: two curves of untouched models would agree too."""
    (batch,) = batches
    with torch.no_grad():
        tuned = ours.head.loss(batch)
        with ours.method.without():
            return float(ours.head.loss(batch) - tuned) / batch.weight


def test_fifty_steps_on_a_tiny_llama() -> None:
    same_curve(attach(fresh_base(), "lora"), tiny("llama"), Cycle(), 50, adamw)


def test_lora_plus_is_the_one_of_peft() -> None:
    ours = attach(fresh_base(), "lora_plus", ratio=8.0)
    same_curve(ours, tiny("llama"), Cycle(), 30, lora_plus_of_peft)


def real_rows(assets: Path, tokenizer: Any, steps: int) -> Rows:
    """GSM8K's shortest rows: the question is read, the answer learned."""
    lines = (assets / "data/gsm8k/train.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    short = sorted(rows, key=lambda row: len(row["question"]) + len(row["answer"]))[: 2 * steps]
    examples = encode([prompted(row["question"] + "\n", row["answer"]) for row in short], tokenizer)
    return Rows([collate(examples[i : i + 2]) for i in range(0, len(examples), 2)])


def test_fifty_steps_on_a_pretrained_model_and_real_text(assets: Path) -> None:
    folder = assets / "models/stories260K"
    base = load(str(folder), dtype="float32", device="cpu")
    stock = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    same_curve(attach(base, "lora"), stock, real_rows(assets, base.tokenizer, 50), 50, adamw)


def test_lora_plus_of_ratio_one_is_lora_bit_for_bit() -> None:
    states = []
    for kind, keys in (("lora", {}), ("lora_plus", {"ratio": 1.0})):
        world = attach(fresh_base(), kind, also_train=["*norm*"], **keys)
        losses = train_ours(world, FixedFeed(), 20)
        states.append((losses, world.method.state()[0]))
    (losses, tensors), (plus_losses, plus_tensors) = states
    assert losses == plus_losses
    assert tensors.keys() == plus_tensors.keys()
    assert all(torch.equal(tensors[name], plus_tensors[name]) for name in tensors)


@pytest.mark.parametrize("ratio", [2.0, 0.5])
def test_lora_plus_of_another_ratio_is_not_lora(ratio: float) -> None:
    curves = [train_ours(attach(fresh_base(), "lora_plus", ratio=r), FixedFeed(), 5) for r in (1.0, ratio)]
    assert curves[0] != curves[1]
