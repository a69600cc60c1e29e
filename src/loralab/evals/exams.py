"""Exams of our own: items with known answers, and tasks whose answers are sampled and graded, programs among them."""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from loralab.delta.several import View
from loralab.evals.code import STOPS, CodeProblem, grade_code
from loralab.evals.diversity import tally
from loralab.evals.exam import Card, Outcome
from loralab.evals.generate import Prompt, Sampling, fitted
from loralab.evals.sandbox import Limits
from loralab.evals.tasks import AccuracyProbe, ChoiceProbe, Task
from loralab.evals.texts import TextEngine
from loralab.pocket.items import Item

CODE_TOKENS = 512
"""Most new tokens of a program."""


def text_hash(texts: Iterator[str] | Sequence[str]) -> str:
    """Hash texts in order (SHA-256)."""
    total = hashlib.sha256()
    for text in texts:
        encoded = text.encode("utf-8", "surrogatepass")
        total.update(len(encoded).to_bytes(8, "little") + encoded)
    return total.hexdigest()


class ItemExam:
    """Items of one skill, graded by exact answer or by choice: one metric, `accuracy` or `choice`.

    Args:
        task: items of one skill.
        engine: that answers.
        metric: `accuracy` or `choice`.
    """

    def __init__(self, task: Task, engine: TextEngine, metric: str) -> None:
        skill = task.items[0].skill
        self.metric = metric
        named = f"{skill}/{metric}", [task], engine.head, engine.tokenizer
        self._probe = AccuracyProbe(*named) if metric == "accuracy" else ChoiceProbe(*named, engine.likelihood)
        items = self._probe.items
        self.card = Card(
            name=skill,
            prompt_hash=text_hash([item.prompt for item in items]),
            chances=tuple(1 / len(item.choices) for item in items) if metric == "choice" else None,
        )

    def items(self) -> Iterator[tuple[str, str]]:
        for item in self._probe.items:
            yield item.prompt, item.completion

    def outcomes(self, views: Sequence[View]) -> list[list[Outcome]]:
        found = []
        for view in views:
            with view():
                rows = self._probe.read().items
            found.append([Outcome({self.metric: row["right"]}) for row in rows])
        return found

    def aggregate(self, metric: str, values: Sequence[Any]) -> float:
        return float(np.mean(values))


class SampledExam:
    """Prompts with several answers each, of which any may be right: `pass@1` is the share of samples that are.

    Args:
        card: what the exam is.
        prompts: as texts, with what a right answer looks like.
        grade: tells of the answers to each prompt which are right.
        engine: that writes.
        limit: most new tokens.
        stop_texts: that end an answer.
        samples: answers to each prompt; greedy ones are all alike, so that one is enough.
        sampling: how they are drawn.
    """

    def __init__(
        self,
        card: Card,
        prompts: Sequence[tuple[str, str]],
        grade: Callable[[list[list[str]]], list[list[bool]]],
        engine: TextEngine,
        *,
        limit: int,
        stop_texts: Sequence[str] = (),
        samples: int = 1,
        sampling: Sampling = Sampling(),  # noqa: B008, it is frozen
    ) -> None:
        self.card, self._items, self._grade, self.engine = card, list(prompts), grade, engine
        self.samples, self.sampling = samples, sampling
        known = engine.tokens(prompt for prompt, _ in self._items)
        asked = [Prompt(known[prompt], prompt, limit, tuple(stop_texts)) for prompt, _ in self._items]
        cut = [fitted(prompt, engine.window) for prompt in asked]
        self._prompts = [prompt for prompt, _ in cut]
        engine.likelihood.tally.truncated += sum(lost > 0 for _, lost in cut)

    def items(self) -> Iterator[tuple[str, str]]:
        yield from self._items

    def outcomes(self, views: Sequence[View]) -> list[list[Outcome]]:
        written = self.engine.writer.write(self._prompts, sampling=self.sampling, samples=self.samples, views=views)
        texts = [[[answer.text or "" for answer in answers] for answers in view] for view in written]
        # Graded together, so that a program which several models wrote runs once.
        verdicts = iter(self._grade([answers for view in texts for answers in view]))
        return [[_outcome(answers, next(verdicts)) for answers in view] for view in texts]

    def aggregate(self, metric: str, values: Sequence[Any]) -> float:
        return float(np.mean(values))


def _outcome(answers: list[str], right: list[bool]) -> Outcome:
    share = sum(right) / len(right)
    if len(answers) == 1:
        return Outcome({"pass@1": share}, answers[0])
    return Outcome({"pass@1": share}, answers[0], samples=tally(answers, right), correct=sum(right))


def code_exam(
    name: str,
    problems: Sequence[CodeProblem],
    engine: TextEngine,
    *,
    samples: int = 1,
    sampling: Sampling = Sampling(),  # noqa: B008, it is frozen
    limits: Limits | None = None,
    unsafe: bool = False,
) -> SampledExam:
    """Make an exam of functions to be written, run against their tests in a sandbox (Chen et al. 2021)."""

    def grade(answers: list[list[str]]) -> list[list[bool]]:
        rounds = len(answers) // len(problems)
        found = grade_code([*problems] * rounds, answers, limits or Limits(), unsafe=unsafe)
        return [[outcome.passed for outcome in mine] for mine in found]

    tests = text_hash([text for p in problems for text in (p.test, p.entry_point)])
    card = Card(name, "1", 0, text_hash([problem.prompt for problem in problems]), tests)
    prompts = [(problem.prompt, problem.canonical_solution) for problem in problems]
    return SampledExam(
        card, prompts, grade, engine, limit=CODE_TOKENS, stop_texts=STOPS, samples=samples, sampling=sampling
    )


def written_exam(
    name: str,
    items: Sequence[Item],
    grade: Callable[[Item, str], bool],
    engine: TextEngine,
    *,
    samples: int,
    sampling: Sampling,
) -> SampledExam:
    """Make an exam of items of which several samples each are graded, as programs of the pocket world."""

    def grade_all(answers: list[list[str]]) -> list[list[bool]]:
        rounds = len(answers) // len(items)
        return [[grade(item, text) for text in mine] for item, mine in zip([*items] * rounds, answers, strict=True)]

    card = Card(name, None, 0, text_hash([item.prompt for item in items]))
    longest = max(len(engine.tokenizer(item.completion)["input_ids"]) for item in items)
    prompts = [(item.prompt, item.completion) for item in items]
    return SampledExam(card, prompts, grade_all, engine, limit=2 * longest + 16, samples=samples, sampling=sampling)
