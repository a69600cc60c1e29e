"""`loralab check`: what a recipe would do, before it does it."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from loralab.base.device import peak_bytes
from loralab.base.model import Base
from loralab.base.text import StopProof, pieces, prove_stop
from loralab.lab.experiment import loop_of
from loralab.lab.objectives import prepare
from loralab.lab.prepare import Data
from loralab.methods.base import Attachment, Knot
from loralab.spec.spec import RunSpec
from loralab.training.checkpoint import State
from loralab.training.loop import StepReport

STOP_SAMPLE = 256
"""Examples looked at for the stop token."""


@dataclass(frozen=True)
class Memory:
    """Estimated bytes of a step, by part. Formula: weights + 16 per trained number + activations + one chunk of logits."""

    weights: int
    trained: int
    activations: int
    logits: int

    @property
    def total(self) -> int:
        return self.weights + self.trained + self.activations + self.logits


@dataclass(frozen=True)
class Check:
    """What `check` found."""

    spec: RunSpec
    attachment: Attachment
    counts: dict[str, Any]
    examples: list[list[tuple[str, bool]]]
    """Each example as runs of (text, labelled)."""
    stop: StopProof
    memory: Memory
    total_steps: int
    exams: dict[str, dict[str, Any]]
    """Suites and tasks of the catalogue that would be probed, as the run's `environment.json` names them."""
    measured_bytes: int | None = None
    """By how much two real steps raised the peak of the process, model and data already loaded."""

    def summary(self) -> dict[str, Any]:
        """Give everything as plain values."""
        return {
            "run": self.spec.folder_name,
            "spec": self.spec.model_dump(mode="json"),
            "layers": list(self.attachment.layers),
            "trained_parameters": self.attachment.trained_parameters,
            "all_parameters": self.attachment.all_parameters,
            "data": self.counts,
            "exams": self.exams,
            "examples": [[{"text": text, "labelled": labelled} for text, labelled in runs] for runs in self.examples],
            "stop_tokens": dict(self.stop.stops),
            "every_completion_stops": self.stop.holds,
            "total_steps": self.total_steps,
            "estimated_bytes": self.memory.total,
            "measured_rise_bytes": self.measured_bytes,
        }


def check(spec: RunSpec, *, num_examples: int = 2, measure: bool = False) -> Check:
    """Resolve everything a run would use, without training (or, with `measure`, with two real steps).

    Raises:
        LoralabError: whatever is wrong with model, data or method.
    """
    prepared = prepare(spec)
    base, data = prepared.base, prepared.data
    assert base.tokenizer is not None
    assert isinstance(data, Data)
    corpus = data.train
    sample = [corpus[i] for i in range(min(STOP_SAMPLE, len(corpus)))]
    before = peak_bytes()
    if measure:
        loop_of(spec, prepared, total_steps=2).run(_NoWatch())
    return Check(
        spec,
        prepared.attachment,
        prepared.data.report,
        [pieces(example, base.tokenizer) for example in sample[:num_examples]],
        prove_stop(sample, base.tokenizer),
        estimate(spec, base, prepared.attachment),
        prepared.total_steps,
        {f"{role} {one.skill}": one.facts for role, exams in data.exams.items() for one in exams},
        peak_bytes() - before if measure else None,
    )


class _NoWatch:
    """Lets the loop run unobserved."""

    def measure(self, step: int, *, last: bool = False) -> None: ...

    def validation_loss(self, step: int) -> float | None:
        return None

    def on_step(self, report: StepReport) -> None: ...

    def on_knot(self, knot: Knot, step: int) -> None: ...

    def on_warning(self, message: str, step: int) -> None: ...

    def save_if_due(self, step: int, state: Callable[[], State], *, now: bool = False) -> None: ...

    def is_enough(self) -> bool:
        return False

    def stop_requested(self) -> bool:
        return False


def estimate(spec: RunSpec, base: Base, attachment: Attachment) -> Memory:
    """Estimate the bytes of one step.

    Weights as loaded; 16 bytes for each trained number (float32 master, gradient, two moments); per token of a
    micro-batch and block the lean activations 4·hidden + 2·kv + 2·mlp + Σ rank with selective recomputation, about half as
    much again without, 2·hidden with full; a chunk of logits twice in float32.
    """
    shape = base.model.config.get_text_config()
    width = torch.empty((), dtype=base.model.dtype).element_size()
    hidden, blocks = shape.hidden_size, shape.num_hidden_layers
    heads = shape.num_attention_heads
    kv = hidden * (getattr(shape, "num_key_value_heads", None) or heads) // heads
    mlp = getattr(shape, "intermediate_size", None) or 4 * hidden
    lean = 4 * hidden + 2 * kv + 2 * mlp + sum(attachment.ranks.values()) // max(1, blocks)
    per_block = {"none": int(1.5 * lean), "selective": lean, "full": 2 * hidden}[spec.train.recompute]
    tokens = (spec.train.micro_batch or spec.train.batch_size) * spec.data.max_length
    weights = sum(p.numel() * p.element_size() for p in base.model.parameters())
    return Memory(
        weights=weights,
        trained=16 * attachment.trained_parameters,
        activations=tokens * blocks * per_block * width,
        logits=2 * 4 * getattr(spec.objective, "chunk", 0) * shape.vocab_size,
    )
