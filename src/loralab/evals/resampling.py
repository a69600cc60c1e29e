"""Intervals and p-values of paired differences from outcomes drawn or counted anew: the bootstrap, and tests by sign."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float, Int
from numpy import ndarray

DRAWS = 10_000
"""Resamples of a bootstrap or a test."""
AT_ONCE = 1 << 20
"""Numbers drawn at a time."""


def bootstrap_cells(lost: int, won: int, n: int, rng: np.random.Generator) -> tuple[float, float]:
    """Give the 95 % percentile bootstrap of (won − lost) / n.

    Resampling n items that were lost, won or neither is one draw of a multinomial, so no item is touched.
    """
    drawn = rng.multinomial(n, [lost / n, won / n, (n - lost - won) / n], size=DRAWS)
    return _middle((drawn[:, 1] - drawn[:, 0]) / n)


def bootstrap_ratio(
    sums: Float[ndarray, " clusters"], weights: Float[ndarray, " clusters"], rng: np.random.Generator
) -> tuple[float, float] | None:
    """Give the 95 % percentile bootstrap of Σ sums / Σ weights over resampled clusters; None for fewer than two."""
    n = len(sums)
    if n < 2:
        return None
    found: list[ndarray] = []
    rows = max(1, AT_ONCE // n)
    for first in range(0, DRAWS, rows):
        drawn = rng.integers(0, n, (min(rows, DRAWS - first), n))
        found.append(sums[drawn].sum(1) / weights[drawn].sum(1))
    return _middle(np.concatenate(found))


def _middle(values: Float[ndarray, " draws"]) -> tuple[float, float]:
    low, high = np.percentile(values, (2.5, 97.5)).tolist()
    return low, high


def sign_flip(differences: Int[ndarray, " clusters"]) -> float:
    """Give the exact two-sided p-value of Σ differences if the sign of each is a coin's.

    With differences of −1, 0 and 1 this is McNemar's exact test.
    """
    sizes = np.abs(differences[differences != 0])
    observed, reach = abs(int(differences.sum())), int(sizes.sum())
    chances = np.zeros(2 * reach + 1)  # of each sum from −reach to reach
    chances[reach] = 1.0
    for size in sizes:
        flipped = np.zeros_like(chances)
        flipped[size:] += 0.5 * chances[:-size]
        flipped[:-size] += 0.5 * chances[size:]
        chances = flipped
    beyond = np.abs(np.arange(-reach, reach + 1)) >= observed
    return min(1.0, float(chances[beyond].sum()))


def flip_items(cells: Sequence[tuple[int, int, int]], rng: np.random.Generator) -> float:
    """Give the two-sided p-value of the mean over tasks of (won − lost) / n if each changed item is lost or won by a coin.

    Args:
        cells: lost, won and n of each task.
        rng: draws `DRAWS` outcomes, so that no p-value is below 1 / (DRAWS + 1).
    """
    moved = np.zeros(DRAWS)
    for lost, won, n in cells:
        moved += (2 * rng.binomial(lost + won, 0.5, DRAWS) - (lost + won)) / n
    observed = abs(sum((won - lost) / n for lost, won, n in cells))
    # Sums of the same fractions in another order differ by rounding.
    return (1 + int((np.abs(moved) >= observed - 1e-12).sum())) / (DRAWS + 1)
