"""What every benchmark offers to an evaluation, wherever it comes from: the catalogue, the pocket world, a file, programs."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from loralab.delta.several import View
from loralab.evals.diversity import Tally


@dataclass(frozen=True)
class Outcome:
    """How one model did on one item.

    Attributes:
        values: of each metric: a number, or whatever the exam's own aggregation takes.
        output: what the model wrote; None where it wrote nothing.
        chosen: of multiple choice, what it took by each metric, as far as the metric tells.
        samples: how often each different answer was written, where several were sampled.
        correct: samples that were right, where several were sampled.
    """

    values: dict[str, Any]
    output: str | None = None
    chosen: dict[str, str] | None = None
    samples: Tally | None = None
    correct: int | None = None

    def answer(self, metric: str) -> str | None:
        """Give what the model answered, as the metric takes it."""
        return self.output if self.chosen is None else self.chosen.get(metric)


@dataclass(frozen=True)
class Card:
    """What an exam is, so that two evaluations can be told to be the same.

    Attributes:
        name: of the task.
        version: of the task.
        fewshot: examples before each item.
        prompt_hash: SHA-256 over all prompts, in order.
        template_hash: SHA-256 over what shapes prompts and judgements; None where nothing but the rows does.
        chances: of each item, the probability of guessing it right; None where there are no choices.
        worse_if_more: metrics of which less is better.
    """

    name: str
    version: str | None = None
    fewshot: int = 0
    prompt_hash: str = ""
    template_hash: str | None = None
    chances: tuple[float, ...] | None = None
    worse_if_more: frozenset[str] = field(default_factory=frozenset)


class Exam(Protocol):
    """A benchmark whose requests are built."""

    @property
    def card(self) -> Card: ...

    def items(self) -> Iterator[tuple[str, str]]:
        """Give of each item the prompt and the reference."""
        ...

    def outcomes(self, views: Sequence[View]) -> list[list[Outcome]]:
        """Judge every item in every view: views × items."""
        ...

    def aggregate(self, metric: str, values: Sequence[Any]) -> float:
        """Put the values of items together."""
        ...
