"""Runs that looked inside their delta at every evaluation, for tests of the page: tables with a step, and scores beside them."""

from pathlib import Path

import numpy as np
import pandas as pd
from numpy.random import default_rng

from loralab.evals.stats import Score
from loralab.run.folder import RunFolder, append_line
from report_world import STEPS

EVALUATED = tuple(range(STEPS // 6, STEPS + 1, STEPS // 6))
K = 10


def grow(path: Path, count: int, *, scores: bool = True, seed: int = 0) -> Path:
    """Make a run's spectra grow over its evaluations, up to `count` intruders at the end.

    Args:
        path: of a run that `report_world` wrote.
        count: intruders at the last step; at step s a share s / STEPS of them, rounded.
        scores: write what the probe's scores say as well, k and ε in their units.
        seed: of the vectors.
    """
    run = RunFolder(path)
    last = pd.read_parquet(run.spectra)
    tables, vectors = [], []
    for step in EVALUATED:
        share = step / STEPS
        numbers = {"relative_norm": last["relative_norm"] * share, "effective_rank": last["effective_rank"] * share}
        table = last.assign(step=step, rank90=np.ceil(last["rank90"] * share), **numbers)
        tables.append(table)
        vectors.append(leading(table, round(count * share), share, seed).assign(step=step, delta=path.name))
        if scores:
            write_scores(run, step, table, vectors[-1])
    pd.concat(tables, ignore_index=True).to_parquet(run.spectra, index=False)
    pd.concat(vectors, ignore_index=True).to_parquet(path / "intruders.parquet", index=False)
    return path


def leading(matrices: pd.DataFrame, count: int, share: float, seed: int) -> pd.DataFrame:
    """Give K leading vectors of each matrix, the first `count` matrices with an intruder at a place that rises with `share`."""
    rng, rows = default_rng(seed), []
    place = max(1, round(K * (1 - share)))
    for number, row in enumerate(matrices.itertuples(index=False)):
        for position in range(1, K + 1):
            found = number < count and position == place
            cosine = rng.uniform(0.1, 0.4) if found else rng.uniform(0.6, 1.0)
            facts = {"layer": row.layer, "module": row.module, "depth": row.depth, "position": position}
            facts |= {"value": 5.0 / position, "relative_value": 1.0 / position, "cosine_low": cosine}
            rows.append(facts | {"cosine_high": cosine, "intruder": found, "route": "dense", "stable": True})
    return pd.DataFrame(rows)


def write_scores(run: RunFolder, step: int, matrices: pd.DataFrame, vectors: pd.DataFrame) -> None:
    """Write the scores of the training probe: medians over matrices, the number of intruders and their energy."""
    n, unit = len(matrices), f"singular vectors (k = {K}, ε = 0.5)"
    for column in ("rank90", "effective_rank", "relative_norm"):
        append_line(
            run.scores,
            Score(f"spectrum/{column}", float(matrices[column].median()), "x", n, None).as_line(step, "tuned"),
        )
    count = float(vectors["intruder"].sum())
    append_line(run.scores, Score("intruders/count", count, unit, n, None).as_line(step, "tuned"))
