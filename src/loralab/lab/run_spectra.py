"""What a run's delta looks like inside: measured at every evaluation while it trains, and kept in the run's folder.

Until the run ends each reading is a file of its own, `spectra/step-N.parquet`, written whole: a kill loses none that a checkpoint
stands behind, and one that is taken again replaces the old. At the end they become one table, `spectra.parquet`, a row per
matrix per step; in the same way what stands in `intruders/` becomes `intruders.parquet`, a row per singular vector.
"""

import math
import re
import shutil
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cached_property
from io import BytesIO
from pathlib import Path
from typing import Any

import pandas as pd
from torch import Tensor, nn

from loralab.base.targets import weight_of
from loralab.delta.linear import LowRankModule
from loralab.delta.lowrank import LayerDelta
from loralab.errors import Interrupted, LoralabError
from loralab.evals.probe import Reading, measuring
from loralab.evals.stats import Score
from loralab.lab.dissect import vector_rows
from loralab.methods import Method
from loralab.run.folder import RunFolder, write_atomic
from loralab.spectral.heads import HeadCache
from loralab.spectral.intruders import EPSILON, VECTORS, intruders
from loralab.spectral.krylov import Triplets
from loralab.spectral.spectrum import COLUMNS, LIMIT, frobenius, place, row

SMALL = 2**28
"""Dense changes are small if their sizes (elements to the power 3/2) add up to this: a tenth of a second on one core."""

SUMMARIES = {
    "rank90": "directions (median over matrices)",
    "effective_rank": "directions (median over matrices)",
    "relative_norm": "‖ΔW‖/‖W‖ (median over matrices)",
}
"""Columns of the spectra that become a score, and its unit."""

VECTOR_COLUMNS = (
    *("delta", "step", "layer", "module", "depth", "position", "value", "relative_value", "cosine_low", "cosine_high"),
    *("intruder", "route", "gap", "stable", "similarity"),
)


class Parts:
    """A table that grows step by step: a file for each step in a folder of its name, one file when it is finished."""

    def __init__(self, path: Path) -> None:
        self.path, self.folder = path, path.with_suffix("")

    def steps(self) -> dict[int, Path]:
        """Give the steps that have a part, in order."""
        found = [(re.fullmatch(r"step-(\d+)", path.stem), path) for path in self.folder.glob("step-*.parquet")]
        return dict(sorted((int(match[1]), path) for match, path in found if match))

    def write(self, step: int, rows: pd.DataFrame) -> None:
        """Write the part of a step, whole. Raises Interrupted if the disk is full."""
        self.folder.mkdir(exist_ok=True)
        _write(self.folder / f"step-{step}.parquet", rows)

    def keep(self, last: int) -> None:
        """Forget every step behind `last`, also of a finished table: it becomes parts again."""
        if self.path.exists():
            finished = pd.read_parquet(self.path)
            for step in set(finished["step"]) - set(self.steps()):
                self.write(int(step), finished[finished["step"] == step])
            self.path.unlink()
        for step, path in self.steps().items():
            if step > last:
                path.unlink()

    def finish(self) -> None:
        """Make one table of all parts, if there are any."""
        parts = [pd.read_parquet(path) for path in self.steps().values()]
        if parts:
            filled = [part for part in parts if len(part)] or parts[:1]
            _write(self.path, pd.concat(filled, ignore_index=True))
            shutil.rmtree(self.folder)


def _write(path: Path, rows: pd.DataFrame) -> None:
    written = BytesIO()
    rows.to_parquet(written, index=False)
    write_atomic(path, written.getvalue())


class SpectraProbe:
    """Looks inside the delta of a run at every evaluation: its singular values, and intruder dimensions if they are asked for.

    It is a probe of weights, not of texts: the base has no delta, so nothing is read before the first step, and there are no
    items. Whatever fails is warned of, and the run goes on.

    Args:
        folder: of the run.
        model: with the method on it.
        method: gives the delta.
        look_for_intruders: decide for the leading left singular vectors of each tuned matrix whether they are intruders.
        warn: told, with the step, why a reading failed; the same reason once.
    """

    name = "spectra"

    def __init__(
        self,
        folder: RunFolder,
        model: nn.Module,
        method: Method,
        *,
        look_for_intruders: bool,
        warn: Callable[[str, int], None],
    ) -> None:
        self.model, self.method, self.look_for_intruders = model, method, look_for_intruders
        self.spectra, self.vectors = Parts(folder.spectra), Parts(folder.path / "intruders.parquet")
        self._run, self._warn = folder.path.name, warn
        self._warned: set[str] = set()
        self._cache = HeadCache()
        self._norms: dict[str, float] = {}
        self._heads: dict[str, Triplets] = {}

    def read_base(self, without: AbstractContextManager[None] | None = None) -> Reading:
        """Give an empty reading."""
        return Reading([], [])

    def read(self, step: int | None = None) -> Reading:
        """Measure the delta as it is now, where that is cheap; an empty reading where it is not, or before the first step."""
        scores: list[Score] = []
        if step and step not in self.spectra.steps():
            with self._warned_of(step):
                if self._is_cheap:
                    scores = self._measure(step)
        return Reading(scores, [])

    def keep(self, last: int) -> None:
        """Forget what was measured behind the step from which a run goes on."""
        for parts in (self.spectra, self.vectors):
            parts.keep(last)

    def finish(self, step: int) -> list[str]:
        """Measure what was too expensive during training, write the tables, and name the matrices left out for their cost.

        Large dense changes are not even formed: together they take more memory than the model.

        Raises:
            Interrupted: the disk is full.
        """
        left_out: list[str] = []
        with self._warned_of(step):
            if step not in self.spectra.steps():
                self._measure(step)
            left_out = [name for name, size in self._sizes.items() if size > LIMIT]
        self.gather(step)
        return left_out

    def gather(self, step: int) -> None:
        """Make tables of what was measured so far; a run that goes on takes them apart again. Raises Interrupted as `finish`."""
        with self._warned_of(step):
            for parts in (self.vectors, self.spectra):
                parts.finish()

    @contextmanager
    def _warned_of(self, step: int) -> Iterator[None]:
        """Warn of whatever goes wrong inside, each reason once; a full disk ends the run, which goes on when there is room."""
        try:
            yield
        except Interrupted:
            raise
        except Exception as error:  # of any type: memory, a decomposition that fails, a tuner of the peft library
            reason = error.what if isinstance(error, LoralabError) else f"{type(error).__name__}: {error}"
            if reason not in self._warned:
                self._warned.add(reason)
                self._warn(f"the spectra of the delta could not be taken: {reason}", step)

    @cached_property
    def _sizes(self) -> dict[str, int]:
        """Say of every dense change how many elements it has; none is formed."""
        sizes: dict[str, int] = {}

        def only_noted(name: str, size: int) -> bool:
            sizes[name] = size
            return False

        self.method.delta(only_noted)
        return sizes

    @cached_property
    def _is_cheap(self) -> bool:
        return self.look_for_intruders or sum(size**1.5 for size in self._sizes.values()) <= SMALL

    def _measure(self, step: int) -> list[Score]:
        """Measure the delta, write the parts of a step, and sum them up."""
        with measuring(self.model):  # peft's layers may draw random numbers when they are merged
            delta = self.method.delta(lambda _, size: size <= LIMIT)
            changes = {name: change for name, change in delta.items() if len(change.shape) == 2}
            reads_base = self.look_for_intruders or not changes.keys() <= self._norms.keys()
            with self.method.without() if reads_base else nullcontext():
                rows = [{"step": step, **self._row(name, change)} for name, change in changes.items()]
                scores = _summary(rows)
                if self.look_for_intruders:
                    with self._warned_of(step):
                        scores += self._look(step, changes)
        # Written last: a step that has this part has all that it can have.
        self.spectra.write(step, pd.DataFrame(rows, columns=["step", *COLUMNS]))
        return scores

    def _row(self, name: str, change: LayerDelta) -> dict[str, Any]:
        if name not in self._norms:
            self._norms[name] = frobenius(_base_weight(self.model, name))
        found, _ = row(name, change, self._norms[name])
        return found

    def _look(self, step: int, changes: Mapping[str, LayerDelta]) -> list[Score]:
        """Judge the leading left singular vectors of every tuned matrix, write the part of a step, and sum it up."""
        rows = []
        for name, change in changes.items():
            weight = _base_weight(self.model, name)
            if name not in self._heads:
                self._heads[name] = self._cache.of(weight)
            found = intruders(weight, change, head=self._heads[name])
            rows += [{"delta": self._run, "step": step, **place(name), **vector} for vector in vector_rows(found)]
        self.vectors.write(step, pd.DataFrame(rows, columns=list(VECTOR_COLUMNS)))
        return _count(rows)


def _summary(rows: Sequence[Mapping[str, Any]]) -> list[Score]:
    """Sum spectra up: the median over matrices of what each of them shows. Matrices are no sample, so there is no error."""
    scores = []
    for column, unit in SUMMARIES.items():
        known = [row[column] for row in rows if not math.isnan(row[column])]
        if known:
            scores.append(Score(f"spectrum/{column}", statistics.median(known), unit, len(known), None))
    return scores


def _count(vectors: Sequence[Mapping[str, Any]]) -> list[Score]:
    """Count intruders over all matrices, as the paper does, and give their mean share of the energy of the vectors judged."""
    energies: dict[str, list[tuple[float, bool]]] = {}
    for vector in vectors:
        energies.setdefault(vector["layer"], []).append((vector["value"] ** 2, vector["intruder"]))
    if not energies:
        return []
    shares = [_share(sum(s2 for s2, intrudes in of if intrudes), sum(s2 for s2, _ in of)) for of in energies.values()]
    settings, number = f"k = {VECTORS}, ε = {EPSILON}", float(sum(vector["intruder"] for vector in vectors))
    return [
        Score("intruders/count", number, f"singular vectors ({settings})", len(energies), None),
        Score("intruders/energy", statistics.mean(shares), f"share of the energy ({settings})", len(energies), None),
    ]


def _share(part: float, whole: float) -> float:
    return part / whole if whole else 0.0


def _base_weight(model: nn.Module, name: str) -> Tensor:
    """View the base's weight (out, in) of a layer that may carry a delta."""
    module: Any = model.get_submodule(name)
    if isinstance(module, LowRankModule):
        module = module.base
    elif hasattr(module, "get_base_layer"):  # of the peft library
        module = module.get_base_layer()
    return weight_of(module)
