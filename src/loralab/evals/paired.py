"""Paired outcomes: one delta against its base, or against another delta, on the same items.

Legend: F share of items lost (right on the base, wrong when tuned, 1→0); BT share won (0→1); their difference BT − F is the
change of accuracy. Losses and wins that cancel in the accuracy are seen here.

By guessing alone, items with k choices are lost and won too. If a model either knows an answer or guesses among the k, and
knowing before and after are independent, (1 − accuracy before)(1 − accuracy after)/(k − 1) of the items are lost by chance and
as many won. What was unknown before mostly stays unknown, so that is too little; (1 − higher accuracy)/k, reached when
everything unknown to the better model is unknown to both, is the most that guessing can do. Both suppose that guesses are made
anew: a delta that moved the model little guesses as the base did, and both then take off too much. So the raw counts stand
beside the corrected ones, always; where F is below what chance should do, the model has not been moved enough to guess anew.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from jaxtyping import Float, Int, Shaped
from numpy import ndarray

from loralab.evals.resampling import bootstrap_cells, bootstrap_ratio, flip_items, sign_flip
from loralab.evals.stats import matched, mcnemar, ratio_mean, t95

Interval = tuple[float, float]


@dataclass(frozen=True)
class Change:
    """Tuned minus base on the same items.

    Attributes:
        n: items.
        before, after: mean on base and tuned model.
        value: after − before.
        standard_error: with clusters, robust to dependence within them; None for a single item or cluster.
        interval: 95 %.
        bootstrap: 95 %, between percentiles of resampled items (or clusters).
        p_value: two-sided, of the hypothesis that base and tuned model do not differ.
    """

    n: int
    before: float
    after: float
    value: float
    standard_error: float | None
    interval: Interval | None
    bootstrap: Interval | None
    p_value: float | None

    @property
    def is_tie(self) -> bool:
        """Whether the interval holds 0, or there is none."""
        return self.interval is None or self.interval[0] <= 0 <= self.interval[1]

    def as_dict(self) -> dict[str, Any]:
        """Give plain values for JSON."""
        return {
            "n": self.n,
            "before": self.before,
            "after": self.after,
            "value": self.value,
            "standard_error": self.standard_error,
            "interval": None if self.interval is None else list(self.interval),
            "bootstrap": None if self.bootstrap is None else list(self.bootstrap),
            "p_value": self.p_value,
        }


@dataclass(frozen=True)
class _Items:
    """What a change was made of, an entry per item: values on both models, what a mean weighs them by, and clusters."""

    base: Float[ndarray, " items"]
    tuned: Float[ndarray, " items"]
    weights: Float[ndarray, " items"]
    cluster: Int[ndarray, " items"] | None

    def over_clusters(self) -> tuple[Float[ndarray, " clusters"], Float[ndarray, " clusters"]]:
        """Sum differences and weights over each cluster; an item without one is its own."""
        if self.cluster is None:
            return self.tuned - self.base, self.weights
        return np.bincount(self.cluster, self.tuned - self.base), np.bincount(self.cluster, self.weights)


@dataclass(frozen=True)
class Paired(Change):
    """The change of a share of items answered right, with its two parts.

    Attributes:
        lost, won: items that only the base, and that only the tuned model has right.
        mid_p: of McNemar's test, whose exact p-value is `p_value`; None with clusters.
        by_chance: expected share lost, and share won, by guessing alone (see above); None where answers cannot be guessed.
        most_by_chance: the most that guessing can do.
    """

    lost: int
    won: int
    mid_p: float | None
    by_chance: float | None
    most_by_chance: float | None
    items: _Items = field(repr=False, compare=False)
    guess: float | Float[ndarray, " items"] | None = field(repr=False, compare=False)

    def above_chance(self, count: int, *, least: bool = False) -> float | None:
        """Give the share of items lost or won beyond what guessing is expected to do, or (`least`) the most it can do."""
        chance = self.most_by_chance if least else self.by_chance
        return None if chance is None else max(0.0, count / self.n - chance)

    def as_dict(self) -> dict[str, Any]:
        """Give plain values for JSON: `lost` and `won` count items, what is called a share or `above_chance` is a share."""
        return super().as_dict() | {
            "lost": self.lost,
            "won": self.won,
            "lost_share": self.lost / self.n,
            "won_share": self.won / self.n,
            "mid_p": self.mid_p,
            "by_chance": self.by_chance,
            "most_by_chance": self.most_by_chance,
            "lost_above_chance": self.above_chance(self.lost),
            "won_above_chance": self.above_chance(self.won),
            "lost_above_chance_least": self.above_chance(self.lost, least=True),
            "won_above_chance_least": self.above_chance(self.won, least=True),
        }


@dataclass(frozen=True)
class PairedValues(Change):
    """The change of a mean of real values: losses, log-likelihoods, distinct outputs."""

    items: _Items = field(repr=False, compare=False)


def paired(
    base_right: Shaped[ndarray, " items"] | Sequence[Any],
    tuned_right: Shaped[ndarray, " items"] | Sequence[Any],
    *,
    chance: float | Float[ndarray, " items"] | Sequence[float] | None = None,
    clusters: Sequence[Any] | Shaped[ndarray, " items"] | None = None,
    seed: int = 0,
) -> Paired:
    """Compare right and wrong answers item by item.

    The standard error is McNemar's, √(F + BT − (F − BT)²) / √n, the p-value that of his exact test, the interval that of
    Agresti & Min 2005 (`stats.matched`), which keeps a width where all items agree. With clusters (questions on one text) all
    of them count clusters instead: a sandwich error, Student's t, and the exact test that swaps base and tuned model in whole
    clusters.

    Args:
        base_right: of each item, whether (or 1, 0) the base has it right.
        tuned_right: the same of the tuned model.
        chance: probability of guessing an item right, 1 / choices, one for all or one for each; None where none can.
        clusters: of each item, any label; items of one cluster are not independent.
        seed: of the bootstrap.

    Raises:
        ValueError: no items, lengths that differ, an outcome that is not 0 or 1, or a chance outside (0, 1).
    """
    items = _items(base_right, tuned_right, None, clusters)
    for outcomes in (items.base, items.tuned):
        if not np.isin(outcomes, (0, 1)).all():
            raise ValueError("an outcome is neither right (1) nor wrong (0): use paired_values")
    n = len(items.base)
    lost, won = (int((a > b).sum()) for a, b in ((items.base, items.tuned), (items.tuned, items.base)))
    rng = np.random.default_rng(seed)
    if items.cluster is None:
        p_value, mid_p = mcnemar(lost, won)
        error = math.sqrt(max(0.0, lost + won - (won - lost) ** 2 / n)) / n if n > 1 else None
        interval: Interval | None = matched(lost, won, n)
        bootstrap: Interval | None = bootstrap_cells(lost, won, n, rng)
    else:
        differences, sizes = items.over_clusters()
        p_value, mid_p = sign_flip(differences.astype(int)), None
        error = ratio_mean(differences, sizes)[1]
        interval = _clustered_interval((won - lost) / n, error, len(sizes))
        bootstrap = bootstrap_ratio(differences, sizes, rng)
    before, after = float(items.base.mean()), float(items.tuned.mean())
    guess = None if chance is None else np.asarray(chance, float) if np.ndim(chance) else float(chance)  # type: ignore[arg-type]
    expected, most = _by_chance(before, after, guess, n)
    common = (n, before, after, (won - lost) / n, error, interval, bootstrap, p_value)
    return Paired(*common, lost, won, mid_p, expected, most, items, guess)


def paired_values(
    base: Shaped[ndarray, " items"] | Sequence[Any],
    tuned: Shaped[ndarray, " items"] | Sequence[Any],
    *,
    weights: Shaped[ndarray, " items"] | Sequence[Any] | None = None,
    clusters: Sequence[Any] | Shaped[ndarray, " items"] | None = None,
    seed: int = 0,
) -> PairedValues:
    """Compare real values item by item: Σ(tuned − base) / Σ weights.

    The error is that of a ratio over items or clusters (`stats.ratio_mean`), interval and p-value are Student's t.

    Args:
        base: value of each item on the base; a sum (of a document's loss, in nats) where items have weights.
        tuned: the same on the tuned model.
        weights: of each item (its tokens); None is 1.
        clusters: of each item, any label; items of one cluster are not independent.
        seed: of the bootstrap.

    Raises:
        ValueError: no items, or lengths that differ.
    """
    items = _items(base, tuned, weights, clusters)
    sums, sizes = items.over_clusters()
    value, error = ratio_mean(sums, sizes)
    interval: Interval | None = None
    p_value: float | None = None
    if error is not None:
        half = t95(len(sums) - 1) * error
        interval = (value - half, value + half)
        p_value = _student_p(value, error, len(sums) - 1)
    before, after = (float(x.sum() / items.weights.sum()) for x in (items.base, items.tuned))
    bootstrap = bootstrap_ratio(sums, sizes, np.random.default_rng(seed))
    return PairedValues(len(items.base), before, after, value, error, interval, bootstrap, p_value, items)


def compare(a: Paired | PairedValues, b: Paired | PairedValues) -> Paired | PairedValues:
    """Give the change of a minus that of b, two deltas on the same items and base; a tie if the interval holds 0.

    As the base cancels item by item, this is a paired comparison in which b stands in the base's place: `lost` are items
    that b has right and a has wrong.

    Raises:
        ValueError: items, weights, clusters or what the base did differ, so the changes cannot be paired.
    """
    mine, other = a.items, b.items
    same = type(a) is type(b) and np.array_equal(mine.base, other.base) and np.array_equal(mine.weights, other.weights)
    if not same or not np.array_equal(mine.cluster, other.cluster):  # type: ignore[arg-type]
        raise ValueError("the two changes were not measured on the same items and base")
    if isinstance(a, Paired):
        return paired(other.tuned, mine.tuned, chance=a.guess, clusters=mine.cluster)
    return paired_values(other.tuned, mine.tuned, weights=mine.weights, clusters=mine.cluster)


def together(parts: Sequence[Change], *, seed: int = 0) -> Change:
    """Give the unweighted mean of changes on different items: a suite's tasks, a role's skills.

    Error √(Σ seₖ²) / K; the interval combines the parts' own by their distances from the point (Zou & Donner 2008, Statistics
    in Medicine 27:1693-1702), so it keeps their width where all items agree. The p-value, where all parts are right or wrong
    answers without clusters, is that of McNemar's hypothesis: every changed item is lost or won with probability 1/2.

    Raises:
        ValueError: there are no parts.
    """
    if not parts:
        raise ValueError("there is no change to take the mean of")
    K = len(parts)
    before, after, value = (math.fsum(getattr(p, name) for p in parts) / K for name in ("before", "after", "value"))
    errors = [part.standard_error for part in parts if part.standard_error is not None]
    error = math.hypot(*errors) / K if len(errors) == K else None
    interval = _combined([(p.value, p.interval) for p in parts], value)
    bootstrap = _combined([(p.value, p.bootstrap) for p in parts], value)
    plain = [p for p in parts if isinstance(p, Paired) and p.mid_p is not None]
    p_value: float | None = None
    if len(plain) == K:
        cells = [(p.lost, p.won, p.n) for p in plain]
        p_value = plain[0].p_value if K == 1 else flip_items(cells, np.random.default_rng(seed))
    return Change(sum(part.n for part in parts), before, after, value, error, interval, bootstrap, p_value)


def _items(base: Any, tuned: Any, weights: Any, clusters: Any) -> _Items:
    on_base, on_tuned = np.asarray(base, float), np.asarray(tuned, float)
    weight = np.ones(len(on_base)) if weights is None else np.asarray(weights, float)
    number = None if clusters is None else np.unique(np.asarray(clusters), return_inverse=True)[1]
    lengths = [len(x) for x in (on_base, on_tuned, weight, number) if x is not None]
    if len(set(lengths)) > 1 or lengths[0] == 0:
        raise ValueError(f"paired outcomes need the same items, at least one; their numbers are {lengths}")
    return _Items(on_base, on_tuned, weight, number)


def _by_chance(before: float, after: float, guess: Any, n: int) -> tuple[float | None, float | None]:
    """Give the expected and the largest share of items lost (or won) by guessing.

    Where items have different numbers of choices, knowing is taken to be as likely for all of them: a share u of unknown
    answers makes an accuracy of 1 − u (1 − c), c the mean chance, and of items unknown both times c (1 − c) are lost.
    """
    if guess is None:
        return None, None
    chance = np.broadcast_to(np.asarray(guess, float), (n,))
    if not ((chance > 0) & (chance < 1)).all():
        raise ValueError("the chance of guessing an item right lies between 0 and 1")
    unknown = [min(1.0, (1 - accuracy) / (1 - float(chance.mean()))) for accuracy in (before, after)]
    flipped = float((chance * (1 - chance)).mean())
    return unknown[0] * unknown[1] * flipped, min(unknown) * flipped


def _clustered_interval(value: float, error: float | None, clusters: int) -> Interval | None:
    if error is None:
        return None
    if error == 0:  # every cluster moved alike: no more is known than of so many items
        return matched(max(0.0, -value) * clusters, max(0.0, value) * clusters, clusters)
    half = t95(clusters - 1) * error
    return max(-1.0, value - half), min(1.0, value + half)


def _student_p(value: float, error: float, freedom: int) -> float | None:
    if error == 0:
        return 1.0 if value == 0 else None
    from scipy.special import stdtr  # slow to import

    return 2 * float(stdtr(freedom, -abs(value) / error))


def _combined(parts: Sequence[tuple[float, Interval | None]], value: float) -> Interval | None:
    known = [(point, interval) for point, interval in parts if interval is not None]
    if len(known) < len(parts):
        return None
    down, up = (math.hypot(*(point - interval[side] for point, interval in known)) for side in (0, 1))
    return value - down / len(parts), value + up / len(parts)
