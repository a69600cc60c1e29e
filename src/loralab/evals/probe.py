"""What all probes share: their seam, the reading they give, how the model stands meanwhile, how documents are laid out."""

import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from threading import Lock
from typing import Any, Protocol

import torch
from torch import nn

from loralab.base.data import Batch, collate
from loralab.base.model import backbone
from loralab.base.text import Example
from loralab.evals.stats import Score

PACKED_TOKENS = 4096
"""Most tokens laid side by side in one pass."""


@dataclass(frozen=True)
class Reading:
    """One pass of a probe.

    Attributes:
        scores: what it measured.
        items: a row for each item, always in the same order: what was measured on it (`loss_sum` in nats, or `right`), and
            what it is.
    """

    scores: list[Score]
    items: list[dict[str, Any]]


class Probe(Protocol):
    """A measurement taken again and again while a model is trained."""

    @property
    def name(self) -> str: ...

    def read_base(self, without: AbstractContextManager[None] | None = None) -> Reading:
        """Read the base (inside `without`, which switches the delta off) and keep what later readings pair with."""
        ...

    def read(self, step: int | None = None) -> Reading:
        """Read the model as it is now."""
        ...


@contextmanager
def measuring(model: nn.Module) -> Iterator[None]:
    """Evaluation mode, no gradients, random state untouched. Every module is left in its own mode: some belong to two models."""
    modes, random = {module: module.training for module in model.modules()}, torch.get_rng_state()
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, was_training in modes.items():
            module.training = was_training
        torch.set_rng_state(random)


@dataclass
class Cost:
    """What measuring took: seconds, passes through the model, and tokens that passed through it (padding included)."""

    seconds: float = 0.0
    forwards: int = 0
    tokens: int = 0


@contextmanager
def counting(model: nn.Module, cost: Cost) -> Iterator[None]:
    """Add to `cost` what a model does inside, whoever asks it."""

    def count(module: nn.Module, given: tuple[Any, ...], named: dict[str, Any]) -> None:
        tokens = named.get("input_ids", given[0] if given else None)
        with one_at_a_time:
            cost.forwards += 1
            cost.tokens += 0 if tokens is None else tokens.numel()

    one_at_a_time = Lock()  # rows may be read by several threads
    begin = time.perf_counter()
    hook = backbone(model).register_forward_pre_hook(count, with_kwargs=True)
    try:
        yield
    finally:
        hook.remove()
        cost.seconds += time.perf_counter() - begin


def side_by_side(examples: Sequence[Example], *, together: bool = True) -> list[Batch]:
    """Lay examples side by side in batches of `PACKED_TOKENS`, in order; one in each where they cannot be kept apart."""
    batches: list[Batch] = []
    group: list[Example] = []
    size = 0
    for example in examples:
        if group and (not together or size + len(example) > PACKED_TOKENS):
            batches.append(collate(group))
            group, size = [], 0
        group.append(example)
        size += len(example)
    return [*batches, collate(group)] if group else batches
