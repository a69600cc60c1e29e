"""What the benchmarks against TRL share: bases with words of their own, both sides step by step, from one start.

TRL is no dependency of LoRA Lab: `pip install trl` (1.16.0 was measured). Its trainers are used as documented, with the settings
that are fastest for equal work (`SETTINGS`); subclasses only look on, or hand it the answers of the first step.
"""

import gc
import itertools
import json
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import datasets
import torch
import transformers
from _measured import peak_mib, resident_mib
from safetensors import safe_open
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from loralab.base.hub import weight_files
from loralab.delta.layers import low_rank_layers
from loralab.lab.experiment import loop_of
from loralab.lab.objectives import prepare
from loralab.methods.lora import FIRST
from loralab.spec.spec import RunSpec
from loralab.training.loop import StepReport

VOCABULARY = 16384
SPECIAL = {"unk_token": "<unk>", "pad_token": "<pad>", "eos_token": "</s>"}
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
RANK, ALPHA = 16, 32
SETTINGS: dict[str, Any] = {
    "use_cpu": True,
    "bf16": False,  # its default; the comparison is in float32
    "gradient_checkpointing": False,  # its default computes every layer twice
    "logging_strategy": "no",
    "save_strategy": "no",
    "report_to": "none",
    "disable_tqdm": True,
    "dataloader_pin_memory": False,
    "lr_scheduler_type": "constant",
    "weight_decay": 0.0,
    "max_grad_norm": 1.0,
    "seed": 0,
}
FOUND_BY = "base_model.model."
"""Stands before the name of every module of a PEFT model."""


def draw_base(folder: Path, hidden: int, layers: int) -> int:
    """Write a Llama-type model with seeded random weights and a tokenizer of one token a word; give its number of parameters."""
    torch.manual_seed(0)
    shape = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=hidden,
        intermediate_size=int(2.7 * hidden) // 64 * 64,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 64,
        num_key_value_heads=hidden // 64,
        max_position_embeddings=2048,
        bos_token_id=None,
        pad_token_id=1,
        eos_token_id=2,
    )
    model = LlamaForCausalLM(shape)
    model.save_pretrained(folder)
    known = {word: place for place, word in enumerate([*SPECIAL.values(), *map(word, range(3, VOCABULARY))])}
    tokenizer = Tokenizer(WordLevel(known, unk_token=SPECIAL["unk_token"]))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **SPECIAL).save_pretrained(folder)
    return sum(parameter.numel() for parameter in model.parameters())


def word(token: int) -> str:
    """Name a token of a drawn base."""
    return f"w{token}"


def words(count: int, seed: int) -> str:
    """Give random words of a drawn base: as many tokens."""
    drawn = torch.randint(3, VOCABULARY, (count,), generator=torch.Generator().manual_seed(seed))
    return " ".join(map(word, drawn.tolist()))


def write_rows(path: Path, rows: list[dict[str, Any]]) -> Path:
    """Write rows as JSON lines."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


class Parts:
    """Clocks of the parts of a step: processor seconds of every part since it was last asked."""

    def __init__(self) -> None:
        self.spent: Counter[str] = Counter()

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        begin = time.process_time()
        yield
        self.spent[name] += time.process_time() - begin

    def take(self) -> dict[str, float]:
        found, self.spent = dict(self.spent), Counter()
        return found


class Ours:
    """A run of LoRA Lab as its users start it, one step at a time; looks on as a run's watch does."""

    def __init__(self, **spec: Any) -> None:
        quiet = {"every": 10**6, "spectra": False, "drift": False, "samples": 0}
        plain = {"schedule": {"name": "constant"}, "probes": quiet, **spec}
        plain["model"] = {"path": spec["model"], "device": "cpu", "dtype": "float32"}
        plain["train"] = {"steps": 10**6, "clip": SETTINGS["max_grad_norm"], **spec["train"]}
        asked = RunSpec.model_validate(plain)
        self.prepared = prepare(asked)
        torch.manual_seed(asked.seed)
        self.model = self.prepared.base.model
        self.loop = loop_of(asked, self.prepared)
        self.loop.total_steps = 0
        self.reports: list[StepReport] = []

    def step(self) -> None:
        self.steps(1)

    def steps(self, count: int) -> None:
        self.loop.total_steps += count
        self.loop.run(self)

    def on_step(self, report: StepReport) -> None:
        self.reports.append(report)

    def measure(self, step: int, *, last: bool = False) -> None: ...
    def validation_loss(self, step: int) -> None: ...
    def on_knot(self, knot: Any, step: int) -> None: ...
    def on_warning(self, message: str, step: int) -> None: ...
    def save_if_due(self, step: int, state: Any, *, now: bool = False) -> None: ...
    def is_enough(self) -> bool:
        return False

    def stop_requested(self) -> bool:
        return False

    def factors(self) -> dict[str, nn.Parameter]:
        """Name the factors of its pairs as PEFT names them."""
        layers = low_rank_layers(self.model)
        pairs = {name: layer.pair(FIRST) for name, layer in layers.items()}
        return {
            f"{FOUND_BY}{name}.lora_{factor}.default.weight": getattr(pair, factor)
            for (name, pair), factor in itertools.product(pairs.items(), "AB")
        }


@torch.no_grad()
def same_start(ours: Ours, theirs: nn.Module, strength: float = 0.0) -> None:
    """Begin both from our A and our head, and from a random B of this standard deviation (0, where both begin by themselves)."""
    generator = torch.Generator().manual_seed(1)
    own = dict(theirs.named_parameters())
    for name, factor in ours.factors().items():
        if strength and ".lora_B." in name:
            factor.normal_(std=strength, generator=generator)
        own[name].copy_(factor)
    for name, parameter in own.items():
        if "score" in name.split("."):
            parameter.copy_(ours.model.get_parameter("score.weight"))


def quiet() -> None:
    """Show no progress, and no reports of a head that is new."""
    datasets.disable_progress_bars()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()


def lora(whole: Sequence[str] = ()) -> Any:
    """Give PEFT's settings of the same pairs, and of modules that are trained whole."""
    from peft import LoraConfig

    return LoraConfig(
        r=RANK, lora_alpha=ALPHA, lora_dropout=0.0, target_modules=TARGETS, modules_to_save=[*whole] or None
    )


def take_turns(
    trainer: Any, others: dict[str, Callable[[], None]], peer: str = "trl"
) -> dict[str, list[tuple[float, float]]]:
    """Let TRL's trainer run, and all others take a step after each of its steps.

    Returns:
        Processor and wall seconds of every step, the first (a warm-up) left out.
    """
    from transformers import TrainerCallback

    taken: dict[str, list[tuple[float, float]]] = {name: [] for name in (peer, *others)}

    class Turns(TrainerCallback):
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            self.begin = (time.process_time(), time.perf_counter())

        def on_step_end(self, *_: Any, **__: Any) -> None:
            self._note(peer)
            for name, step in others.items():
                self.on_step_begin()
                step()
                self._note(name)

        def _note(self, name: str) -> None:
            taken[name].append((time.process_time() - self.begin[0], time.perf_counter() - self.begin[1]))

    trainer.add_callback(Turns())
    run(trainer)
    return {name: each[1:] for name, each in taken.items()}


def run(trainer: Any) -> None:
    """Let a trainer do its steps without a word."""
    from transformers import PrinterCallback

    trainer.remove_callback(PrinterCallback)
    trainer.train()


def base_copies(folder: str) -> float:
    """Count how often the matrices of a base's layers are in memory: tensors alive of their shapes, each storage once."""
    shapes: Counter[tuple[int, ...]] = Counter()
    for file in weight_files(Path(folder)):
        with safe_open(file, "pt") as opened:
            names = [name for name in opened.keys() if ".layers." in name]  # noqa: SIM118 - not a dict
            shapes.update(s for name in names if len(s := tuple(opened.get_slice(name).get_shape())) == 2)
    gc.collect()
    alive = [found for found in gc.get_objects() if type(found) in (Tensor, nn.Parameter)]
    return len({t.data_ptr() for t in alive if tuple(t.shape) in shapes and t.is_floating_point()}) / shapes.total()


def memory(small: Callable[[], None], large: Callable[[], Callable[[], None]]) -> float:
    """Give the most memory (MiB) that a contender takes while it is made and steps, above what was resident before.

    For a process of its own. A small one goes first, so that all code is loaded and warm.
    """
    small()
    gc.collect()
    before = resident_mib()
    large()()
    return round(peak_mib() - before, 1)
