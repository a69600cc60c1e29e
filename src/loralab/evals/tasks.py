"""Tasks: items with right answers, measured in two ways, each item on the base and on the tuned model.

Accuracy: an item is right if the model, always taking its most likely token, writes the right answer and stops. Where only
one text is right, that is so if and only if each token of it and the end token are the most likely ones behind those before,
which a single pass over prompt and answer tells; other graders read what the model really writes.

Choice: an item is right if the right one of its choices has the highest likelihood behind the prompt: the largest sum of
log-probabilities over the choice's tokens. Where one choice begins another, the end token counts for each of them, as the
shorter one could never lose otherwise. Guessing gives the mean of 1 / choices.

Prompts and answers become tokens as training rows do (`base/text.py`): what is measured is what is trained.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from jaxtyping import Float, Int
from numpy import ndarray
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from loralab.base.text import Example, encode, prompted
from loralab.errors import DataError, ModelError
from loralab.evals.generate import Prompt, answers, room, stop_tokens
from loralab.evals.likelihood import Engine, Request
from loralab.evals.probe import side_by_side
from loralab.evals.shares import ShareProbe
from loralab.training.loss import LanguageHead

MORE_TOKENS = 16
"""An answer may be twice as long as the one that is known, and this much longer."""


class Item(Protocol):
    """A prompt with a right completion; `choices` are completions to choose from, `right` the index of the right one."""

    @property
    def skill(self) -> str: ...

    @property
    def prompt(self) -> str: ...

    @property
    def completion(self) -> str: ...

    @property
    def choices(self) -> tuple[str, ...]: ...

    @property
    def right(self) -> int: ...


@dataclass(frozen=True)
class Task:
    """Items and how their answers are graded.

    Attributes:
        items: with a completion each, and choices where they have any.
        grade: tells of an item and an answer whether it is right; None where only the very text of the completion is.
        ends: an answer ends behind its completion. Where a text would go on (a cloze), no answer that stops there is
            learned from it: such items have no accuracy, only choices.
    """

    items: Sequence[Any]
    grade: Callable[[Any, str], bool] | None = None
    ends: bool = True


class _ItemProbe(ShareProbe):
    """A share of items with known answers."""

    def __init__(self, name: str, items: Sequence[Any], head: LanguageHead) -> None:
        self.items, self.head = list(items), head
        super().__init__(name, [(item.skill, item.prompt) for item in self.items], head.model)


class AccuracyProbe(_ItemProbe):
    """Share of items that the model answers right.

    Raises:
        DataError: an item is longer than the model can read.
        ModelError: answers have to be written, but the model cannot generate.
    """

    def __init__(
        self, name: str, tasks: Sequence[Task], head: LanguageHead, tokenizer: PreTrainedTokenizerBase
    ) -> None:
        graded = [(item, task.grade) for task in tasks for item in task.items]
        super().__init__(name, [item for item, _ in graded], head)
        examples = _examples([(item.prompt, item.completion) for item in self.items], head.model, tokenizer, name)
        self._exact = [i for i, (_, grade) in enumerate(graded) if grade is None]
        self._known = _Packed([examples[i] for i in self._exact], head)
        self._written = [(i, item, grade) for i, (item, grade) in enumerate(graded) if grade is not None]
        self._prompts = [prompt_of(examples[i], item.prompt, head.model) for i, item, _ in self._written]
        self._tokenizer = tokenizer
        self._stops = torch.tensor(stop_tokens(head.model, tokenizer))
        if self._written and not head.model.can_generate():
            what = f"{type(head.model).__name__} cannot generate, so no answer of {self._written[0][1].skill} is graded"
            raise ModelError(what, where=_key_of(name), fix="leave that task out")

    def right(self) -> Float[ndarray, " items"]:
        right = np.zeros(len(self.items))
        right[self._exact] = self._known.sums(self._misses) == 0
        if self._written:
            texts = answers(self.head.model, self._tokenizer, self._prompts, together=self.head.packs)
            for (i, item, grade), text in zip(self._written, texts, strict=True):
                right[i] = grade(item, text)
        return right

    def _misses(self, logits: Float[Tensor, "n vocab"], targets: Int[Tensor, " n"]) -> Float[Tensor, " n"]:
        """Mark positions whose most likely token is another; one stop token is as good as another."""
        best, stops = logits.argmax(-1), self._stops.to(targets.device)
        both_stop = torch.isin(best, stops) & torch.isin(targets, stops)
        return ((best != targets) & ~both_stop).float()


class ChoiceProbe(_ItemProbe):
    """Share of items whose right choice is the likeliest.

    Args:
        name: `<role>/choice`, or another.
        tasks: of their items, those with choices are asked.
        head: of the model.
        tokenizer: of the model.
        engine: that scores; None makes one.

    Raises:
        DataError: an item is longer than the model can read.
    """

    def __init__(
        self,
        name: str,
        tasks: Sequence[Task],
        head: LanguageHead,
        tokenizer: PreTrainedTokenizerBase,
        engine: Engine | None = None,
    ) -> None:
        super().__init__(name, [item for task in tasks for item in task.items if item.choices], head)
        pairs = [(item.prompt, choice) for item in self.items for choice in item.choices]
        found = iter(_examples(pairs, head.model, tokenizer, name))
        examples = [_comparable([next(found) for _ in item.choices]) for item in self.items]
        requests = [_request(example) for group in examples for example in group]
        self._scored = [i for i, request in enumerate(requests) if request.continuation]
        self._count = len(requests)
        self._requests = (engine or Engine(head)).prepared([requests[i] for i in self._scored])

    @property
    def chance(self) -> float:
        """Expected share of a guesser: the mean over items of 1 / choices."""
        return sum(1 / len(item.choices) for item in self.items) / len(self.items)

    def log_likelihoods(self) -> list[list[float]]:
        """Give log p of each choice of each item behind its prompt, in nats."""
        sums = [0.0] * self._count  # of a choice of which no token can be predicted
        (found,) = self._requests.score([nullcontext])
        for i, one in zip(self._scored, found, strict=True):
            sums[i] = one.log_likelihood
        in_order = iter(sums)
        return [[next(in_order) for _ in item.choices] for item in self.items]

    def right(self) -> Float[ndarray, " items"]:
        taken = [int(np.argmax(group)) for group in self.log_likelihoods()]
        return np.array([float(choice == item.right) for choice, item in zip(taken, self.items, strict=True)])


class _Packed:
    """Examples laid side by side once, and sums over the labelled positions of each."""

    def __init__(self, examples: Sequence[Example], head: LanguageHead) -> None:
        self.head = head
        self._batches = [batch.to(head.model.device) for batch in side_by_side(examples, together=head.packs)]
        self._owner = np.repeat(
            np.arange(len(examples)), np.array([example.num_labelled for example in examples], dtype=int)
        )
        self._count = len(examples)

    def sums(self, measure: Callable[[Tensor, Tensor], Tensor]) -> Float[ndarray, " examples"]:
        """Sum `measure(logits, targets)` over each example's positions."""
        parts = [measure(logits, targets) for batch in self._batches for logits, targets in self.head.logits(batch)]
        values = torch.cat(parts).double().cpu().numpy() if parts else np.empty(0)
        return np.bincount(self._owner, values, minlength=self._count).astype(float)


def _request(example: Example) -> Request:
    """Cut an example where its choice begins; its first token is never predicted, as nothing comes before it."""
    begin = int(np.argmax(example.labelled)) if example.num_labelled else len(example)
    tokens = tuple(example.tokens.tolist())
    return Request(tokens[:begin], tokens[begin:])


def _comparable(choices: list[Example]) -> list[Example]:
    """Leave out the end token, unless one choice begins another."""
    bare = [Example(choice.tokens[:-1], choice.labelled[:-1]) for choice in choices]
    texts = [tuple(choice.tokens.tolist()) for choice in bare]
    begins = any(
        i != j and long[: len(short)] == short for i, short in enumerate(texts) for j, long in enumerate(texts)
    )
    return choices if begins else bare


def _examples(
    pairs: Sequence[tuple[str, str]], model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, name: str
) -> list[Example]:
    """Make prompts and completions into tokens as training does, the end token included."""
    examples = encode([prompted(prompt, completion) for prompt, completion in pairs], tokenizer)
    for (prompt, _), example in zip(pairs, examples, strict=True):
        if len(example) > room(model):
            what = f"an item has {len(example)} tokens, but the model reads {room(model)}: {prompt[:60]!r} …"
            raise DataError(what, where=_key_of(name), fix="leave out long items")
    return examples


def _key_of(name: str) -> str:
    return f"probes.{name.partition('/')[0]}"


def prompt_of(example: Example, text: str | None, model: PreTrainedModel) -> Prompt:
    """Cut an example where its completion begins; the answer may be rather longer than the completion."""
    begin = int(np.argmax(example.labelled))
    most = min(2 * example.num_labelled + MORE_TOKENS, room(model) - begin)
    return Prompt(example.tokens[:begin].tolist(), text, int(most))


def probes_of(
    role: str, tasks: Sequence[Task], head: LanguageHead, tokenizer: PreTrainedTokenizerBase
) -> Iterator[AccuracyProbe | ChoiceProbe]:
    """Make the probes of a role, `target` or `source`: accuracy, and choice if some items have choices."""
    if answered := [task for task in tasks if task.ends]:
        yield AccuracyProbe(f"{role}/accuracy", answered, head, tokenizer)
    if any(item.choices for task in tasks for item in task.items):
        yield ChoiceProbe(f"{role}/choice", tasks, head, tokenizer)
