"""How many intruders there are at other k and ε: the verdict's two choices, varied over what was measured once. No torch here."""

from collections.abc import Sequence

import pandas as pd

from loralab.errors import DeltaError

COLUMNS = ("delta", "k", "epsilon", "low", "high")
EPSILONS = tuple(step / 10 for step in range(1, 10))


def counts(
    vectors: pd.DataFrame, ks: Sequence[int], epsilons: Sequence[float], deltas: Sequence[str] | None = None
) -> pd.DataFrame:
    """Count intruders among the first k vectors of every matrix, for each delta, k and ε; summed over matrices, as the paper does.

    A vector whose cosine interval straddles ε may be one or not: it counts in `high` alone.

    Args:
        vectors: a row per delta, matrix and position, with the columns delta, position (from 1), cosine_low and cosine_high.
        ks: numbers of leading vectors; a matrix that has fewer counts with all of them.
        epsilons: thresholds of the cosine, in (0, 1].
        deltas: names to count, in order, also where no matrix of theirs could be measured; None is those that have rows.

    Returns:
        Columns delta, k, epsilon, low, high: deltas in their order, then k, then ε, as they were given.

    Raises:
        DeltaError: more vectors are asked for than were measured, or an ε beyond (0, 1].
    """
    measured = int(vectors["position"].max()) if len(vectors) else 0
    for k in ks:
        if k < 1 or (measured and k > measured):
            fix = f"ask for 1 to {measured}, or measure again with a larger k"
            raise DeltaError(
                f"{k} vectors of each matrix cannot be counted: {measured} were measured", where="k", fix=fix
            )
    for epsilon in epsilons:
        if not 0 < epsilon <= 1:
            raise DeltaError(f"a cosine threshold lies in (0, 1], not at {epsilon:g}", where="epsilon", fix="use 0.5")
    rows = []
    for name in dict.fromkeys(vectors["delta"] if deltas is None else deltas):
        mine = vectors[vectors["delta"] == name]
        for k in ks:
            first = mine[mine["position"] <= k]
            for epsilon in epsilons:
                low, high = (int((first[side] < epsilon).sum()) for side in ("cosine_high", "cosine_low"))
                rows.append((name, k, epsilon, low, high))
    return pd.DataFrame(rows, columns=list(COLUMNS))
