"""Answers that a policy wrote, graded, and laid out for training: one prompt with its answers is a group that shares its prefix."""

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from loralab.base.trees import Forest, forest
from loralab.errors import EvaluationError


@dataclass(frozen=True, eq=False)
class Rollout:
    """One prompt, the answers that the policy wrote to it, and what they are worth.

    Attributes:
        prompt: its tokens.
        answers: tokens of each answer, its end token included where it was written.
        rewards: one number for each answer.
        parts: what the rewards are made of, by name: a number for each answer.
        truncated: whether an answer was cut off before its end; empty where that is not known.
        texts: the answers in words, for people.
        log_probs: what each answer's tokens were drawn with (nats), where not the policy itself but a stand-in for it wrote them.

    Raises:
        ValueError: there is no answer, an empty one, or a list of another length.
    """

    prompt: list[int]
    answers: list[list[int]]
    rewards: list[float]
    parts: dict[str, list[float]] = field(default_factory=dict)
    truncated: list[bool] = field(default_factory=list)
    texts: list[str] = field(default_factory=list)
    log_probs: list[list[float]] = field(default_factory=list)

    def __post_init__(self) -> None:
        lists: list[list[Any]] = [self.rewards, *self.parts.values()]
        lists += [found for found in (self.truncated, self.texts, self.log_probs) if found]
        if not self.prompt or not self.answers or not all(self.answers):
            raise ValueError("a rollout needs a prompt and answers, each of a token at least")
        if any(len(found) != len(self.answers) for found in lists):
            raise ValueError(f"{len(self.answers)} answers, but lists of {sorted({len(found) for found in lists})}")
        if self.log_probs and list(map(len, self.log_probs)) != list(map(len, self.answers)):
            raise ValueError("a log-probability is missing, or one too many")

    @property
    def num_tokens(self) -> int:
        """Number of tokens of all its answers."""
        return sum(map(len, self.answers))


STRANGER = 0.5
"""KL per token (nats) from which on a writer is not taken for the policy; other kernels and bfloat16 make some 0.001."""

Known = dict[str, Tensor]
"""Numbers (tokens,) of answer tokens, float64 in main memory: log-probabilities (`drawn` by who wrote them if that was a stand-in,
`old` by the policy then, `reference`), `kl`, `values`.
"""


@dataclass(frozen=True, eq=False)
class PolicyBatch:
    """The rollouts of one micro-batch, laid out, and what is already known of them.

    Attributes:
        rollouts: prompts with their answers.
        rows: one row with all of them, or one for each answer where the model cannot keep documents apart.
        known: of their answer tokens; `old` is missing where the policy that learns is still the one that wrote.
        signal: whether anything can be learned from the optimizer step that it belongs to.
        number: in that step.
        step: what the micro-batches of that step found, by number.
        facts: averages over the whole batch of rollouts.
    """

    rollouts: list[Rollout]
    rows: tuple[Forest, ...]
    known: Known
    signal: bool
    number: int
    step: dict[int, Known]
    facts: dict[str, float]

    @property
    def tokens(self) -> Tensor:
        """All tokens that are read, (1, length)."""
        return torch.cat([row.tokens for row in self.rows], dim=1)

    @property
    def tails(self) -> list[int]:
        """Tokens of each answer."""
        return [len(answer) for rollout in self.rollouts for answer in rollout.answers]


def lay_out(rollouts: list[Rollout], *, packs: bool, share: bool) -> tuple[Forest, ...]:
    """Lay rollouts side by side in one row; each answer in a row of its own, behind its prompt, where the model cannot pack."""
    if packs:
        return (forest([(rollout.prompt, rollout.answers) for rollout in rollouts], share=share),)
    return tuple(forest([(rollout.prompt, [answer])]) for rollout in rollouts for answer in rollout.answers)


def equal(rollout: Rollout) -> bool:
    """Tell whether all answers to a prompt have the same reward."""
    return min(rollout.rewards) == max(rollout.rewards)


def facts(rollouts: list[Rollout]) -> dict[str, float]:
    """Average what is known of a batch of rollouts before anything is computed."""
    answers = sum(len(rollout.answers) for rollout in rollouts)

    def mean(lists: Iterable[list[Any]]) -> float:
        return sum(sum(map(float, each)) for each in lists) / answers

    found = {"reward": mean(r.rewards for r in rollouts), "length": sum(r.num_tokens for r in rollouts) / answers}
    for name in rollouts[0].parts:
        found[f"reward/{name}"] = mean(r.parts[name] for r in rollouts)
    if all(rollout.truncated for rollout in rollouts):
        found["truncated"] = mean(r.truncated for r in rollouts)
    return found


def drawn(rollout: Rollout) -> Known:
    """Note what a stand-in drew an answer's tokens with; nothing where the policy itself wrote."""
    if not rollout.log_probs:
        return {}
    return {"drawn": torch.tensor([each for answer in rollout.log_probs for each in answer], dtype=torch.float64)}


def refuse_strangers(known: Known) -> None:
    """Refuse answers that somebody else wrote, where that is beyond doubt: learning from them would go astray without a word."""
    if "drawn" not in known:
        return
    apart = known["drawn"] - known["old"]
    doubt = 2 * float(apart.std()) / len(apart) ** 0.5 if len(apart) > 1 else math.inf
    if not float(apart.mean()) - doubt <= STRANGER:
        raise EvaluationError(
            f"the answers were not written by the policy: KL(writer‖policy) is {float(apart.mean()):.3g} nats per token",
            where="objective.server",
            fix="serve the run's own base, with no other settings than those that `objective.server` asks for",
        )
