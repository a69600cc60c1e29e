"""Ways to build each method, also on a delta that exists already, and the tiny world in which the battery runs."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from transformers import PreTrainedModel

from loralab.base import attention
from loralab.base.data import Batch, collate
from loralab.base.model import Base
from loralab.base.text import Example
from loralab.delta.lowrank import Delta, LayerDelta, LowRank
from loralab.delta.merge import merge_
from loralab.methods import METHODS, Method
from loralab.methods.full import Full
from loralab.methods.lora import Lora
from loralab.methods.start import FromDelta
from loralab.training.loop import Loop
from loralab.training.loss import LanguageHead
from loralab.training.objectives.text import TextObjective
from loralab.training.optim import schedule, torch_optimizer
from tiny import tiny

VOCAB = 97

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "full": ("full", {}),
    "full-attention": ("full", {"targets": ["*self_attn*"]}),
    "lora": ("lora", {"rank": 4, "alpha": 8.0}),
    "lora-rslora-patterns": (
        "lora",
        {
            "rank": 4,
            "alpha": 8.0,
            "scaling": "alpha/sqrt(r)",
            "rank_pattern": {"q_proj": 2},
            "alpha_pattern": {"v_proj": 3.0},
            "init": "gaussian",
        },
    ),
    "lora-b-only": ("lora", {"rank": 4, "alpha": 8.0, "train": "B", "init": "orthogonal"}),
    "lora-norms": ("lora", {"rank": 4, "alpha": 8.0, "also_train": ["*norm*"]}),
    "lora-embedding": ("lora", {"rank": 4, "alpha": 8.0, "targets": ["q_proj", "embed_tokens"]}),
    "lora_plus": ("lora_plus", {"rank": 4, "alpha": 8.0, "ratio": 8.0}),
    "cola": ("cola", {"rank": 4, "alpha": 8.0, "links": 3}),
    "cola-step-down": ("cola", {"rank": 4, "alpha": 8.0, "links": 2, "ranks": [4, 2], "schedule": "global"}),
    "peft-lora": ("peft", {"tuner": "LORA", "keys": {"r": 4, "lora_alpha": 8}}),
    "peft-dora": ("peft", {"tuner": "LORA", "keys": {"r": 4, "lora_alpha": 8, "use_dora": True}}),
    "peft-pissa": ("peft", {"tuner": "LORA", "keys": {"r": 4, "lora_alpha": 4, "init_lora_weights": "pissa"}}),
    "peft-bias": ("peft", {"tuner": "LORA", "keys": {"r": 4, "lora_alpha": 8, "bias": "all"}}),
    "peft-head": (
        "peft",
        {"tuner": "LORA", "keys": {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "lm_head"]}},
    ),
    "peft-saved-norm": ("peft", {"tuner": "LORA", "keys": {"r": 4, "lora_alpha": 8, "modules_to_save": ["norm"]}}),
    "peft-oft": ("peft", {"tuner": "OFT", "keys": {"oft_block_size": 4}}),
    "full-from-delta": ("full", {}),
    "lora-from-delta": ("lora", {"rank": 4, "alpha": 8.0, "targets": ["q_proj", "up_proj"], "also_train": ["*norm*"]}),
    "lora_plus-from-delta": ("lora_plus", {"rank": 4, "alpha": 8.0, "ratio": 8.0}),
    "cola-from-delta": ("cola", {"rank": 4, "alpha": 8.0, "links": 2, "ranks": [4, 2]}),
}
STARTED = [name for name in CASES if name.endswith("-from-delta")]
OURS = [name for name, (kind, _) in CASES.items() if kind in ("lora", "lora_plus", "cola")]


@dataclass
class World:
    """A tiny base with a method on it."""

    base: Base
    method: Method
    head: LanguageHead

    def carry(self, model: PreTrainedModel) -> None:
        """Put another model in the base's place."""
        self.base, self.head = replace(self.base, model=model), LanguageHead(model)


def fresh_base(family: str = "llama", dtype: torch.dtype = torch.float32) -> Base:
    model = tiny(family).to(dtype).requires_grad_(False)
    model.set_attn_implementation(attention.NAME)
    return Base(model=model, tokenizer=None, path="tiny", revision=None, fingerprint="0" * 64)


def start() -> Delta:
    """A delta of the base: ranks and scales differ, layers are those of the cases in part, a norm was trained whole."""
    generator = torch.Generator().manual_seed(3)

    def pair(out: int, into: int, rank: int, scale: float) -> LowRank:
        A, B = torch.randn(rank, into, generator=generator), torch.randn(out, rank, generator=generator)
        return LowRank(A / 5, B / 5, scale)

    layers: dict[str, LayerDelta] = {
        "model.embed_tokens": pair(32, 101, 1, 1.0),
        "model.layers.0.self_attn.q_proj": pair(32, 32, 3, 0.5),
        "model.layers.1.self_attn.q_proj": pair(32, 32, 2, 2.0),
        "model.layers.1.mlp.down_proj": pair(32, 48, 2, 3.0),
    }
    whole = {"model.norm.weight": 1 + torch.randn(32, generator=generator) / 5}
    return Delta(layers, whole, "0" * 64, frozenset({"model.embed_tokens"}))


def begun(case: str, dtype: torch.dtype = torch.float32) -> World:
    """What training begins from, in plain weights: the base, or the base with the delta merged."""
    base = fresh_base(dtype=dtype)
    if case in STARTED:
        merge_(base.model, start())
    return World(base, Full(), LanguageHead(base.model))


def world(case: str, *, family: str = "llama", dtype: torch.dtype = torch.float32, seed: int = 0) -> World:
    kind, keys = CASES[case]
    base = fresh_base(family, dtype)
    method = METHODS[kind](**keys)
    if case in STARTED:
        assert isinstance(method, Lora | Full)
        method = FromDelta(method, start())
    method.attach(base, seed)
    return World(base, method, LanguageHead(base.model))


class FixedFeed:
    """Steps of random sequences, a pure function of the step; `micro` sequences at a time."""

    def __init__(self, *, sequences: int = 4, micro: int = 4, seed: int = 0) -> None:
        self.sequences, self.micro, self.seed, self.step = sequences, micro, seed, 0

    def next_step(self) -> list[Batch]:
        generator = torch.Generator().manual_seed(1000 * self.seed + self.step)
        self.step += 1
        examples = []
        for _ in range(self.sequences):
            length = int(torch.randint(6, 14, (), generator=generator))
            tokens = torch.randint(4, VOCAB, (length,), generator=generator).tolist()
            examples.append(Example(tokens, [i >= 3 for i in range(length)]))
        return [collate(examples[i : i + self.micro]) for i in range(0, self.sequences, self.micro)]

    def state(self) -> dict[str, Any]:
        return {"step": self.step}

    def load_state(self, state: dict[str, Any]) -> None:
        self.step = state["step"]


class NoWatch:
    """Looks on without doing anything; keeps the losses."""

    def __init__(self, on_state: Callable[[int, Any], None] | None = None) -> None:
        self.losses: list[float] = []
        self.knots: list[int] = []
        self.on_state = on_state

    def measure(self, step: int, *, last: bool = False) -> None: ...

    def validation_loss(self, step: int) -> float | None:
        return None

    def on_step(self, report: Any) -> None:
        self.losses.append(report.loss)

    def on_knot(self, knot: Any, step: int) -> None:
        self.knots.append(step)

    def on_warning(self, message: str, step: int) -> None: ...

    def save_if_due(self, step: int, state: Callable[[], Any], *, now: bool = False) -> None:
        if self.on_state is not None:
            self.on_state(step, state)

    def is_enough(self) -> bool:
        return False

    def stop_requested(self) -> bool:
        return False


def loop_on(w: World, *, steps: int, feed: FixedFeed | None = None, lr: float = 1e-2, optimizer: str = "adamw") -> Loop:
    return Loop(
        model=w.base.model,
        method=w.method,
        objective=TextObjective(feed or FixedFeed(), w.head),
        make_optimizer=torch_optimizer(optimizer),
        learning_rate=lr,
        weight_decay=0.01,
        schedule=schedule("cosine", warmup=0.1),
        total_steps=steps,
    )


def logits(w: World) -> torch.Tensor:
    """Logits of a fixed batch in evaluation mode."""
    model = w.base.model
    was_training = model.training
    model.eval()
    batch = FixedFeed(seed=99).next_step()[0]
    with torch.no_grad():
        found = torch.cat([chunk for chunk, _ in w.head.logits(batch)])
    model.train(was_training)
    return found
