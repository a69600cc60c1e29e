"""Rollouts: a batch of prompts, the answers that the policy writes to them, and what these are worth."""

import hashlib
from collections.abc import Callable, Sequence

from loralab.evals.generate import Answer, Sampling, Writer
from loralab.evals.served import ServedWriter
from loralab.lab.prompts import Asked, Batches
from loralab.lab.rewards import Answered, Rewarded
from loralab.training.objectives.answers import Rollout


def seed_of(seed: int, number: int) -> int:
    """Give the seed of a batch's answers: the same for the same run and batch, whatever was sampled before."""
    digest = hashlib.sha256(f"{seed}/answers/{number}".encode()).digest()
    return int.from_bytes(digest[:7], "big")


def answered(asked: Sequence[Asked], written: Sequence[Sequence[Answer]]) -> list[Answered]:
    """Join prompts and their answers in one list, prompt after prompt."""
    pairs = zip(asked, written, strict=True)
    return [Answered(one, answer.tokens, answer.text or "") for one, mine in pairs for answer in mine]


class Rollouts:
    """Writes and rewards the answers of a batch by its number: a function of the policy as it is, the run's seed and the number.

    Args:
        writer: of the policy, or of a server that stands in for it.
        batches: of prompts.
        rewards: of answers.
        samples: answers to each prompt.
        temperature: that is sampled at.
        top_p: share of probability that is sampled from.
        seed: of the run.
    """

    def __init__(
        self,
        writer: Writer | ServedWriter,
        batches: Batches,
        rewards: Callable[[Sequence[Answered]], Rewarded],
        *,
        samples: int,
        temperature: float,
        top_p: float,
        seed: int,
    ) -> None:
        self.writer, self.batches, self.rewards, self.samples = writer, batches, rewards, samples
        self.temperature, self.top_p, self.seed = temperature, top_p, seed

    def __call__(self, number: int) -> list[Rollout]:
        """Give a rollout for each prompt of batch `number`, from 0.

        Raises:
            EvaluationError: logits that are not numbers, or a reward that fails.
        """
        asked = self.batches.batch(number)
        sampling = Sampling(self.temperature, self.top_p, seed=seed_of(self.seed, number))
        (written,) = self.writer.write([one.prompt for one in asked], sampling=sampling, samples=self.samples)
        rewarded = self.rewards(answered(asked, written))
        return [
            Rollout(
                prompt=one.prompt.tokens,
                answers=[answer.tokens for answer in mine],
                rewards=rewarded.total[place : place + self.samples],
                parts={name: part[place : place + self.samples] for name, part in rewarded.parts.items()},
                truncated=[answer.ended == "limit" for answer in mine],
                texts=[answer.text or "" for answer in mine],
                log_probs=[answer.log_probs for answer in mine if answer.log_probs is not None],
            )
            for one, mine, place in zip(asked, written, range(0, len(asked) * self.samples, self.samples), strict=True)
        ]
