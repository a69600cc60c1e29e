"""Diversity: how many different outputs a model writes among n samples for one problem, passing and failing ones apart.

Outputs are the same if their texts are, white space at the end aside; so counted in "LoRA Learns Less and Forgets Less"
(arXiv:2405.09673), where the base is the most diverse and full fine-tuning the least.

Legend: nᵢ how often the i-th different output of a problem was written; n = Σ nᵢ samples. More samples find more outputs, so
models are compared at one m ≤ n: the number expected among m samples drawn from the n without replacement (rarefaction),
Σ [1 − C(n − nᵢ, m) / C(n, m)], which is exact and for m = n the plain count (Hurlbert 1971, Ecology 52:577-586).
"""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, fields

import numpy as np

from loralab.evals.paired import PairedValues, paired_values
from loralab.evals.stats import Score, mean_score

OUTPUTS = "distinct outputs"


@dataclass(frozen=True)
class Tally:
    """How often each different output of one problem was written.

    Attributes:
        all: of each output.
        passing: of each output, samples that passed; only outputs that did.
        failing: the same of those that failed. An output that did both, by chance or by time, stands in both.
    """

    all: tuple[int, ...]
    passing: tuple[int, ...] = ()
    failing: tuple[int, ...] = ()

    @property
    def n(self) -> int:
        """Number of samples."""
        return sum(self.all)

    @property
    def repeats(self) -> float | None:
        """Give the probability that two samples are the same, Σ nᵢ (nᵢ − 1) / n (n − 1); None for a single one.

        Unbiased for any n (Simpson 1949, Nature 163:688).
        """
        if self.n < 2:
            return None
        return sum(count * (count - 1) for count in self.all) / (self.n * (self.n - 1))


def tally(outputs: Sequence[str], passed: Sequence[bool] | None = None) -> Tally:
    """Count the different outputs of one problem.

    Args:
        outputs: samples, at least one.
        passed: of each, whether it solves the problem; None where nothing tells.

    Raises:
        ValueError: no outputs, or as many verdicts as outputs are not there.
    """
    if not outputs or (passed is not None and len(passed) != len(outputs)):
        raise ValueError(f"{len(outputs)} outputs and {'no' if passed is None else len(passed)} verdicts")
    texts = [output.rstrip() for output in outputs]

    def counts(verdict: bool | None) -> tuple[int, ...]:
        chosen = texts if verdict is None else [t for t, p in zip(texts, passed or (), strict=True) if p is verdict]
        return tuple(sorted(Counter(chosen).values(), reverse=True))

    return Tally(counts(None)) if passed is None else Tally(counts(None), counts(True), counts(False))


def expected_distinct(counts: Sequence[int], n: int, m: int) -> float:
    """Give how many outputs of a kind are expected among m of the n samples.

    Args:
        counts: how often each output of the kind was written; their sum is at most n.
        n: samples.
        m: 0 to n.

    Raises:
        ValueError: m lies outside.
    """
    if not 0 <= m <= n:
        raise ValueError(f"{m} samples cannot be taken from {n}")
    return math.fsum(1 - _all_missed(count, n, m) for count in counts)


def _all_missed(count: int, n: int, m: int) -> float:
    """Give C(n − count, m) / C(n, m): the probability that none of `count` samples is among m."""
    return math.prod((n - m - i) / (n - i) for i in range(count)) if count <= n - m else 0.0


def samples_in_common(*models: Sequence[Tally]) -> int:
    """Give the m at which all problems of all models can be compared: the fewest samples of any."""
    return min(problem.n for problems in models for problem in problems)


def diversity_scores(name: str, problems: Sequence[Tally], m: int | None = None) -> list[Score]:
    """Score the mean over problems of the number of distinct outputs among m samples, with its error over problems.

    Args:
        name: of the task; scores are `<name>/distinct`, and with verdicts `<name>/distinct_passing`, `<name>/distinct_failing`.
            A model that passes more often has more passing outputs to differ in: read them beside pass@k.
        problems: at least one.
        m: None is the fewest samples of any problem.
    """
    m = samples_in_common(problems) if m is None else m
    unit = f"{OUTPUTS} of {m}"
    kinds = _kinds(problems)
    return [
        mean_score(f"{name}/{kind}", unit, _counted(problems, part, m), np.ones(len(problems))) for kind, part in kinds
    ]


def diversity_changes(base: Sequence[Tally], tuned: Sequence[Tally]) -> dict[str, PairedValues]:
    """Compare base and tuned model problem by problem, at the number of samples that all have.

    Returns:
        The change of each measure, by the last part of its name in `diversity_scores`.

    Raises:
        ValueError: the numbers of problems differ.
    """
    if len(base) != len(tuned):
        raise ValueError(f"{len(base)} problems of the base and {len(tuned)} of the tuned model do not pair")
    m = samples_in_common(base, tuned)
    both = _kinds([*base, *tuned])
    return {kind: paired_values(_counted(base, part, m), _counted(tuned, part, m)) for kind, part in both}


def _kinds(problems: Sequence[Tally]) -> list[tuple[str, str]]:
    """Name measures, and the parts of a tally that they count; verdicts only where there are some."""
    judged = any(problem.passing or problem.failing for problem in problems)
    parts = [field.name for field in fields(Tally)]
    return [("distinct" if part == "all" else f"distinct_{part}", part) for part in (parts if judged else parts[:1])]


def _counted(problems: Sequence[Tally], part: str, m: int) -> np.ndarray:
    return np.array([expected_distinct(getattr(problem, part), problem.n, m) for problem in problems])
