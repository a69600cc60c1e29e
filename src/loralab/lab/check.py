"""`loralab check`: what a recipe would do, before it does it."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from loralab.base.device import peak_bytes
from loralab.base.labelled import LabelledCorpus
from loralab.base.text import StopProof, pieces, prove_stop
from loralab.lab.experiment import loop_of
from loralab.lab.memory import Memory, estimate
from loralab.lab.objectives import prepare
from loralab.lab.policy import PolicyData
from loralab.lab.prepare import Data, Inputs
from loralab.lab.scored import LabelledData
from loralab.methods.base import Attachment, Knot
from loralab.spec.spec import RunSpec
from loralab.training.checkpoint import State
from loralab.training.loop import StepReport

STOP_SAMPLE = 256
"""Examples looked at for the stop token."""


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
            "estimated_parts": self.memory.parts(),
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
    sample = [data.train[i] for i in range(min(STOP_SAMPLE, len(data.train)))] if isinstance(data, Data) else []
    before = peak_bytes()
    if measure:
        loop_of(spec, prepared, total_steps=2).run(_NoWatch())
    return Check(
        spec,
        prepared.attachment,
        prepared.data.report,
        _examples(data, base.tokenizer, num_examples),
        prove_stop(sample, base.tokenizer),
        estimate(spec, prepared),
        prepared.total_steps,
        {f"{role} {one.skill}": one.facts for role, exams in getattr(data, "exams", {}).items() for one in exams},
        peak_bytes() - before if measure else None,
    )


def _examples(data: Inputs, tokenizer: PreTrainedTokenizerBase, count: int) -> list[list[tuple[str, bool]]]:
    """Cut the first examples into runs of (text, whether it is learned from): answers, or what a text was judged to be."""
    if isinstance(data, Data):
        return [pieces(data.train[i], tokenizer) for i in range(min(count, len(data.train)))]
    if isinstance(data, LabelledData):
        return [_judged(data.train, i, tokenizer) for i in range(min(count, len(data.train)))]
    if isinstance(data, PolicyData):
        return [[(asked.text, False)] for asked in data.train.asked[:count]]
    return []


def _judged(corpus: LabelledCorpus, index: int, tokenizer: PreTrainedTokenizerBase) -> list[tuple[str, bool]]:
    """Show what was judged and how: of a pair the prompt, then both answers; of others what the label says."""
    example = corpus[index]
    label = corpus.classes[int(example.label)] if corpus.classes else f"{example.label:g}"
    if corpus.kind == "pairs":
        shared, chosen, rejected = np.split(example.tokens, np.cumsum(example.segments)[:-1])
        # What both begin with may reach into the answers: those begin where they count from.
        prompt = shared[: len(shared) + len(chosen) - example.answers[0]]
        sides = [np.concatenate([shared, side])[len(prompt) :] for side in (chosen, rejected)]
        told = [
            f"\n  {name}: {_text(side, tokenizer)}" for name, side in zip(("chosen", "rejected"), sides, strict=True)
        ]
        margin = [(f"\n  margin: {label}", True)] if example.label else []
        return [(_text(prompt, tokenizer), False), *((text, True) for text in told), *margin]
    if corpus.kind == "thumbs":
        start, label = len(example) - example.answers[0], "up" if example.label else "down"
        parts = [(_text(example.tokens[:start], tokenizer), False), (_text(example.tokens[start:], tokenizer), True)]
    else:
        parts = [(_text(example.tokens, tokenizer), False)]
    return [*parts, (f"\n  label: {label}", True)]


def _text(tokens: NDArray[np.uint32], tokenizer: PreTrainedTokenizerBase) -> str:
    text = tokenizer.decode(tokens.tolist(), clean_up_tokenization_spaces=False)
    assert isinstance(text, str)
    return text


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
