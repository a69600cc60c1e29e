"""What a policy writes to held-out prompts, again and again: its reward, a reward that it never trains on, and what that costs.

The same prompts, the same random numbers for every reading and for the base, so rewards are paired prompt by prompt. KL and entropy
are those of the distribution that is sampled from (but for top-p), exact at every position of the answers that were written; summed
over an answer the mean of the former is KL(policy ‖ base) of whole answers.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float
from numpy import ndarray
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from loralab.base.trees import forest
from loralab.delta.several import View
from loralab.evals.generate import Answer, Prompt, Sampling, Writer
from loralab.evals.probe import PACKED_TOKENS, Reading, measuring
from loralab.evals.samples import Sample, Samples
from loralab.evals.stats import Score, mean_score
from loralab.training.loss import LanguageHead

REWARD, HELD_OUT = "reward", "held_out"
Judge = Callable[[list[list[Answer]]], dict[str, list[float]]]
"""Rewards the answers to all prompts: by name, `reward` and perhaps `held_out` among them, a number for each answer in turn."""


@dataclass(frozen=True)
class _Reading:
    """Sums over the answers to each prompt, by measure; how many answers or tokens they have; what each answer is, and is worth."""

    sums: dict[str, Float[ndarray, " prompts"]]
    weights: dict[str, Float[ndarray, " prompts"]]
    answers: list[list[Answer]]
    rewards: dict[str, Float[ndarray, "prompts samples"]]


UNITS = {"kl": "nats/answer", "entropy": "nats/token", "length": "tokens/answer", "distinct": "share of answers"}


class PolicyProbe:
    """Rewards, KL, entropy, length and variety of answers to a fixed set of prompts; scores `policy/…`.

    `policy/distinct` is the share of different texts among the answers to the same prompt (to all of them, where each has one), and
    `policy/truncated` the share of those that reached the limit of tokens.

    Args:
        prompts: held out from training.
        judge: rewards their answers.
        head: of the model.
        writer: of the model.
        sampling: how answers are drawn.
        samples: answers to each prompt.
        reference: a view in which the model is its base.
    """

    name = "policy"

    def __init__(
        self,
        prompts: Sequence[Prompt],
        judge: Judge,
        head: LanguageHead,
        writer: Writer,
        *,
        sampling: Sampling,
        samples: int,
        reference: View,
    ) -> None:
        self.prompts, self.judge, self.head, self.writer = list(prompts), judge, head, writer
        self.sampling, self.samples, self.reference = sampling, samples, reference
        self._base: _Reading | None = None
        self._last: _Reading | None = None

    def read_base(self, without: AbstractContextManager[None] | None = None) -> Reading:
        """Read the base (inside `without`, which switches the delta off) and keep what later readings pair with."""
        with without or nullcontext(), measuring(self.head.model):
            self._base = self._read(is_base=True)
        return self._reading(self._base)

    def read(self, step: int | None = None) -> Reading:
        """Read the policy as it is now."""
        with measuring(self.head.model):
            self._last = self._read(is_base=False)
        reading = self._reading(self._last)
        if self._base is not None:
            changes = {n: sums - self._base.sums[n] for n, sums in self._last.sums.items() if _is_reward(n)}
            weights = self._last.weights
            reading.scores.extend(_score(f"{n}_change", "reward", sums, weights[n]) for n, sums in changes.items())
        return reading

    def _read(self, *, is_base: bool) -> _Reading:
        (written,) = self.writer.write(self.prompts, sampling=self.sampling, samples=self.samples)
        count = np.full(len(written), float(self.samples))
        tokens = np.array([float(sum(len(answer.tokens) for answer in mine)) for mine in written])
        judged = {n: np.array(values, float).reshape(len(written), -1) for n, values in self.judge(written).items()}
        sums: dict[str, ndarray] = {name: values.sum(1) for name, values in judged.items()}
        sums["kl"], sums["entropy"] = self._distances(written, is_base=is_base)
        sums["length"] = tokens
        sums["distinct"] = _distinct(written)
        sums["truncated"] = np.array([float(sum(a.ended == "limit" for a in mine)) for mine in written])
        return _Reading(sums, {name: tokens if name == "entropy" else count for name in sums}, written, judged)

    def _distances(self, written: list[list[Answer]], *, is_base: bool) -> tuple[ndarray, ndarray]:
        """Sum exact KL from the base and entropy over the tokens of the answers to each prompt (nats)."""
        temperature = self.sampling.temperature or 1.0
        kl, entropy = np.zeros(len(written)), np.zeros(len(written))
        device = self.head.model.device
        for part in self._parts(written):
            row = forest([(self.prompts[i].tokens, [written[i][k].tokens for k in mine]) for i, mine in part]).to(
                device
            )
            owners = np.repeat([i for i, mine in part for _ in mine], row.tails)
            other = None
            if not is_base:
                with self.reference():
                    other = self.head.logits_of(row.row, row.before)
            found = self.head.written(row.row, row.before, row.next_tokens(), temperature=temperature, reference=other)
            entropy += np.bincount(owners, found.entropy.double().cpu().numpy(), minlength=len(written))
            if found.kl is not None:
                kl += np.bincount(owners, found.kl.double().cpu().numpy(), minlength=len(written))
        return kl, entropy

    def _parts(self, written: list[list[Answer]]) -> list[list[tuple[int, list[int]]]]:
        """Choose which answers, as (prompt, samples), are laid side by side: one where the model cannot keep them apart."""
        groups = [(i, list(range(self.samples))) for i in range(len(written))]
        if not self.head.packs:
            return [[(i, [k])] for i, mine in groups for k in mine]
        parts: list[list[tuple[int, list[int]]]] = []
        room = 0
        for i, mine in groups:
            size = len(self.prompts[i].tokens) + sum(len(answer.tokens) for answer in written[i])
            if size > room:
                parts.append([])
                room = PACKED_TOKENS
            parts[-1].append((i, mine))
            room -= size
        return parts

    def _reading(self, found: _Reading) -> Reading:
        scores = [
            _score(
                name, UNITS.get(name, "reward" if _is_reward(name) else "share of answers"), sums, found.weights[name]
            )
            for name, sums in found.sums.items()
        ]
        means = {name: (sums / found.weights[name]).tolist() for name, sums in found.sums.items()}
        rows = [
            {"skill": "policy", "prompt": prompt.text, **{name: values[i] for name, values in means.items()}}
            for i, prompt in enumerate(self.prompts)
        ]
        return Reading(scores, rows)

    def lines(self, step: int, model: str, count: int) -> list[dict[str, Any]]:
        """Give the first answer to the first prompts as lines of `samples.jsonl`, as they stood at the last reading."""
        found = self._base if model == "base" else self._last
        if found is None:
            return []
        return [
            {
                "step": step,
                "model": model,
                "role": "policy",
                "skill": "policy",
                "prompt": self.prompts[i].text,
                "reference": "",
                "output": found.answers[i][0].text,
                "right": None,
                **{name: float(values[i, 0]) for name, values in found.rewards.items()},
            }
            for i in range(min(count, len(self.prompts)))
        ]


class PolicySamples(Samples):
    """Samples of tasks, and with them answers of the policy to held-out prompts, as its probe read them last."""

    is_often_taken = True

    def __init__(
        self,
        probe: PolicyProbe,
        count: int,
        samples: Sequence[Sample],
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        together: bool = True,
    ) -> None:
        super().__init__(samples, model, tokenizer, together=together)
        self.probe, self.count = probe, count

    def lines(self, step: int, model: str) -> list[dict[str, Any]]:
        return [*super().lines(step, model), *self.probe.lines(step, model, self.count)]


def _score(name: str, unit: str, sums: ndarray, weights: ndarray) -> Score:
    return mean_score(f"policy/{name}", unit, sums, weights)


def _is_reward(name: str) -> bool:
    return name.rpartition("/")[2] in (REWARD, HELD_OUT)


def _distinct(written: list[list[Answer]]) -> Float[ndarray, " prompts"]:
    """Count for each prompt the answers whose text none before them has: of the same prompt, or of any where each has one."""
    alone = all(len(mine) == 1 for mine in written)
    seen: set[tuple[int, str | None]] = set()
    counts = np.zeros(len(written))
    for i, mine in enumerate(written):
        for answer in mine:
            key = (0 if alone else i, answer.text)
            counts[i] += key not in seen
            seen.add(key)
    return counts
