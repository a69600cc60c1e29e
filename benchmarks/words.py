"""What words alone tell of Taskmaster's thumbs: logistic regression on words and word pairs, which a reward model must beat.

    python benchmarks/words.py [--years 3 4] [--seeds 0 1 2]

A random fifth of the rows is held out for each seed. Read are the rated action alone, with the end of the conversation, or the
whole conversation without the action. Needs LORALAB_ASSETS. Rows go to results/words-DATE.jsonl.
"""

import argparse
import json
import os
import re
import zlib
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from _measured import Record
from numpy.typing import NDArray
from scipy.optimize import minimize
from scipy.sparse import csr_matrix

from loralab.evals.judgement import area_under_curve
from loralab.evals.stats import noise_floor

PLACES = 1 << 15
PENALTY = 3e-3
"""Of the squared weights."""
READ: dict[str, Callable[[dict[str, Any]], list[tuple[str, str]]]] = {
    "action": lambda row: [("a", row["generation"])],
    "action and last 200 characters": lambda row: [("a", row["generation"]), ("c", row["context"][-200:])],
    "action and last 600 characters": lambda row: [("a", row["generation"]), ("c", row["context"][-600:])],
    "conversation without the action": lambda row: [("c", row["context"])],
}


def features(texts: Sequence[list[tuple[str, str]]]) -> csr_matrix:
    """Mark which words and pairs of words stand in each text, hashed to `PLACES` columns."""
    cells = set()
    for row, parts in enumerate(texts):
        for part, text in parts:
            words = re.findall(r"\w+|[^\w\s]", text.lower())
            found = {*words, *(f"{one} {two}" for one, two in pairwise(words))}
            cells |= {(row, zlib.crc32(f"{part}{word}".encode()) % PLACES) for word in found}
    rows, columns = zip(*sorted(cells), strict=True)
    return csr_matrix((np.ones(len(rows)), (rows, columns)), shape=(len(texts), PLACES))


def fitted(x: csr_matrix, up: NDArray[np.bool_]) -> NDArray[np.float64]:
    """Fit the weights of the columns; the last is the intercept."""
    sign = np.where(up, 1.0, -1.0)

    def loss(w: NDArray[np.float64]) -> tuple[float, NDArray[np.float64]]:
        margin = sign * (x @ w[:-1] + w[-1])
        slope = -sign / (1 + np.exp(margin)) / len(sign)
        value = np.logaddexp(0, -margin).mean() + PENALTY * w[:-1] @ w[:-1]
        return float(value), np.r_[x.T @ slope + 2 * PENALTY * w[:-1], slope.sum()]

    return minimize(loss, np.zeros(PLACES + 1), jac=True, method="L-BFGS-B", options={"maxiter": 100}).x


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--years", nargs="+", default=["3", "4"], choices=["3", "4"])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    asked = parser.parse_args()
    record = Record("words", seeds=asked.seeds)
    for year in asked.years:
        folder = Path(os.environ["LORALAB_ASSETS"]) / "data" / f"taskmaster_tm{year}_reward"
        rows = [row for file in sorted(folder.glob("*.json")) for row in json.loads(file.read_text(encoding="utf-8"))]
        up = np.array([row["reward"] > 0 for row in rows])
        for name, read in READ.items():
            x, found = features([read(row) for row in rows]), []
            for seed in asked.seeds:
                order = np.random.default_rng(seed).permutation(len(rows))
                train, held = np.split(order, [4 * len(rows) // 5])
                w = fitted(x[train], up[train])
                area = area_under_curve(x[held] @ w[:-1], up[held])
                found.append(area[0] if area else float("nan"))
            floor = noise_floor(found)
            record.add(
                year=year, rows=len(rows), up=float(up.mean()), reads=name, auc=floor.mean, interval=floor.interval
            )


if __name__ == "__main__":
    main()
