"""Samples: what the model writes behind a few prompts, kept before and after training for people to read."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain, islice, zip_longest
from typing import Any

import numpy as np
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from loralab.base.text import Example, encode, prompted
from loralab.evals.generate import Prompt, answers, room, text_behind
from loralab.evals.tasks import Task, prompt_of

TEXT_TOKENS = 64
"""Of a text without prompts, most tokens that are given, and most that are to follow."""
ANSWER_TOKENS = 128
"""Most tokens of the answer to a validation row."""


@dataclass(frozen=True)
class Sample:
    """A prompt whose answers are kept.

    Attributes:
        role: `target` or `source`.
        skill: of the item, or what kind of text it is.
        prompt: what the model is given.
        shown: the prompt as text.
        reference: the answer that is known.
        grade: tells of an answer whether it is right; None where nothing can be right.
    """

    role: str
    skill: str
    prompt: Prompt
    shown: str
    reference: str
    grade: Callable[[str], bool] | None


class Samples:
    """Prompts whose answers are kept; `together` as in `generate`."""

    is_often_taken = False
    """Whether they are taken at every evaluation, and not only before and after training."""

    def __init__(
        self,
        samples: Sequence[Sample],
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        together: bool = True,
    ) -> None:
        self.samples, self.model, self.tokenizer, self.together = list(samples), model, tokenizer, together

    def lines(self, step: int, model: str) -> list[dict[str, Any]]:
        """Write the answers as the lines of `samples.jsonl`; `model` says whose they are, `base` or `tuned`."""
        prompts = [sample.prompt for sample in self.samples]
        found = answers(self.model, self.tokenizer, prompts, together=self.together)
        return [
            {
                "step": step,
                "model": model,
                "role": sample.role,
                "skill": sample.skill,
                "prompt": sample.shown,
                "reference": sample.reference,
                "output": text,
                "right": None if sample.grade is None else bool(sample.grade(text)),
            }
            for sample, text in zip(self.samples, found, strict=True)
        ]


def samples_of_tasks(
    role: str, tasks: Sequence[Task], model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, count: int
) -> Iterator[Sample]:
    """Take the first items of each skill in turn, `count` in all."""
    skills: dict[str, list[tuple[Any, Task]]] = {}
    for task in tasks:
        for item in task.items:
            skills.setdefault(item.skill, []).append((item, task))
    in_turn = (pair for pair in chain.from_iterable(zip_longest(*skills.values())) if pair is not None)
    for item, task in islice(in_turn, count):
        (example,) = encode([prompted(item.prompt, item.completion)], tokenizer)
        grade = partial(task.grade or _is_the_text, item) if task.ends else None
        prompt = prompt_of(example, item.prompt, model)
        yield Sample(role, item.skill, prompt, item.prompt, item.completion, grade)


def _is_the_text(item: Any, text: str) -> bool:
    return bool(text == item.completion)


def samples_of_texts(
    role: str, examples: Sequence[Example], model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, count: int
) -> Iterator[Sample]:
    """Take the first texts: of a prompted one its prompt and its first answer, of plain text its first half and what follows.

    Args:
        role: of the samples.
        examples: validation rows.
        model: tells how much it can read.
        tokenizer: of the examples.
        count: most samples.
    """
    for example in islice((e for e in examples if len(e) > 1), count):
        tokens = [int(token) for token in example.tokens]
        begin = int(np.argmax(example.labelled))
        if begin > 1:  # the first token of plain text has no loss either
            ends = np.flatnonzero(~example.labelled[begin:])
            end = begin + (int(ends[0]) if len(ends) else len(tokens))
            kind, most = "answer", ANSWER_TOKENS
        else:
            begin = min((len(tokens) + 1) // 2, TEXT_TOKENS)
            end, kind, most = len(tokens), "text", TEXT_TOKENS
        prompt = Prompt(tokens[:begin], None, int(min(most, room(model) - begin)))
        shown = text_behind(Prompt([], "", 0), tokens[:begin], tokenizer)
        yield Sample(role, kind, prompt, shown, text_behind(prompt, tokens[begin:end][:most], tokenizer), None)
