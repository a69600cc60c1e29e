"""The walk over the matrices of a base and its deltas: each base weight is read once, for all of them."""

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from loralab.base.model import Base
from loralab.base.targets import linears
from loralab.base.weights import LoadedWeights, Weights, open_weights
from loralab.delta.layers import own_parameters, unwrapped
from loralab.delta.lowrank import Delta, Dense, LayerDelta, LowRank
from loralab.delta.opened import OpenedDelta, fit_delta, open_delta
from loralab.errors import DeltaError, LoralabError
from loralab.lab.deltas import names_of
from loralab.lab.index import is_run
from loralab.lab.spectra import TABLES, VERSION, Spectra, typed
from loralab.run.folder import RunFolder, environment
from loralab.spectral.heads import HeadCache
from loralab.spectral.intruders import Intruders, intruders
from loralab.spectral.krylov import Triplets
from loralab.spectral.overlap import Directions, directions, shares, similarity
from loralab.spectral.spectrum import LEADING, frobenius, is_large, leading, place, row

Told = Callable[[int, int, str], None]


@dataclass(frozen=True)
class Question:
    """What is asked of every matrix; see `lab.spectra.spectra`. Raises DeltaError for a k or epsilon that means nothing."""

    k: int = 10
    epsilon: float = 0.5
    exact: bool = False

    def __post_init__(self) -> None:
        if self.k < 1:
            raise DeltaError(f"at least one vector must be looked at, not {self.k}", where="k", fix="use k = 10")
        if not 0 < self.epsilon <= 1:
            what = f"a cosine threshold lies in (0, 1], not at {self.epsilon:g}"
            raise DeltaError(what, where="epsilon", fix="use epsilon = 0.5")


def dissect(
    base: str | Path | Base,
    deltas: Sequence[str | Path | Delta],
    question: Question,
    *,
    revision: str | None = None,
    trust_remote_code: bool = False,
    cache: str | Path | None = None,
    checkpoints: bool = False,
    links: bool = False,
    told: Told | None = None,
) -> Spectra:
    """Measure every matrix of every delta; see `lab.spectra.spectra`."""
    begin = time.perf_counter()
    if not deltas:
        fix = "name a PEFT folder, a run folder, or a fully fine-tuned checkpoint"
        raise DeltaError("there is no delta to look into", where="spectra", fix=fix)
    if isinstance(base, Base):
        weights = view(base)
    else:
        weights = open_weights(str(base), revision=revision, trust_remote_code=trust_remote_code)
    parts = list(_parts(deltas, weights, trust_remote_code, checkpoints, links))
    for asked, way, what in ((checkpoints, "step", "checkpoints"), (links, "link", "links")):
        if asked and not any(way in part.at for part in parts):
            where, fix = ", ".join(part.path or part.name for part in parts), f"name a run folder that has {what}"
            raise DeltaError(f"none of these deltas has {what}", where=where, fix=fix)
    opened = {part.name: part.delta for part in parts}
    walk = Walk(weights, opened, question, HeadCache(None if cache is None else Path(cache)))
    for done, layer in enumerate(walk, start=1):
        if told is not None:
            told(done, len(walk), layer)
    found = walk.found()
    facts = {
        "base": weights.path,
        "fingerprint": next((mark for delta in opened.values() if (mark := delta.base_fingerprint)), None),
        "deltas": {part.name: part.facts for part in parts},
        "k": question.k,
        "epsilon": question.epsilon,
        "exact": question.exact,
        "notes": [*weights.notes, *(f"{name}: {note}" for name, delta in opened.items() for note in delta.notes)],
        "cost": walk.cost(time.perf_counter() - begin),
        "environment": environment(),
        "version": VERSION,
    }
    return Spectra(*found, facts)


def view(base: Base) -> Weights:
    """View a base in memory by the names that its layers have without pairs on them."""
    modules = unwrapped(base.model)
    inside = [name if name in modules else name.removesuffix(".base") for name in linears(base.model)]
    return LoadedWeights(base.path, modules, own_parameters(base.model), inside, base.fingerprint)


@dataclass(frozen=True, eq=False)
class Part:
    """A delta under its name, with the path that it came from ("" from memory) and, of a part of a run, its step or link."""

    name: str
    path: str
    delta: OpenedDelta
    at: dict[str, int]

    @property
    def facts(self) -> dict[str, Any]:
        return {"path": self.path, "kind": self.delta.kind, **self.at}


def _parts(
    deltas: Sequence[str | Path | Delta], weights: Weights, trust_remote_code: bool, checkpoints: bool, links: bool
) -> Iterator[Part]:
    """Open every delta; of a run its checkpoints and links stand before it, as far as they are asked for."""
    names = iter(names_of([str(delta) for delta in deltas if not isinstance(delta, Delta)]))
    for number, delta in enumerate(deltas, start=1):
        if isinstance(delta, Delta):
            name = f"delta {number}"
            yield Part(name, "", fit_delta(delta, weights, where=name), {})
            continue
        name, run = next(names), Path(delta).expanduser()
        last = RunFolder(run).read_status().get("step") if checkpoints and is_run(run) else None
        whole = (run / "delta").is_dir()
        parts = list(_checkpoints(name, run, weights, last if whole else None)) if checkpoints else []
        parts += list(_links(name, run, weights)) if links else []
        yield from parts
        if whole or not parts:  # a run that has not ended may have checkpoints alone
            at = {"step": last} if parts and isinstance(last, int) else {}
            yield Part(name, str(delta), open_delta(str(delta), weights, trust_remote_code=trust_remote_code), at)


def _checkpoints(name: str, run: Path, weights: Weights, last: int | None) -> Iterator[Part]:
    """Give the checkpoints of a run but the one of its last step, which is the run's delta itself."""
    from loralab.lab.trajectory import checkpoints_of, delta_at

    for step in checkpoints_of(run):
        if step != last:
            path = str(run / "checkpoints" / f"step-{step}")
            yield Part(
                f"{name} step {step}",
                path,
                fit_delta(delta_at(run, step, weights), weights, where=path),
                {"step": step},
            )


def _links(name: str, run: Path, weights: Weights) -> Iterator[Part]:
    from loralab.lab.trajectory import links_of

    for link, path in enumerate(links_of(run), start=1):
        yield Part(f"{name} link {link}", str(path), open_delta(str(path), weights), {"link": link})


class Walk:
    """Goes from layer to layer and gathers what it finds; iterating gives the name of each layer as it is done.

    Args:
        weights: of the base.
        deltas: by name.
        question: what is asked of every matrix.
        heads: where the leading vectors of base weights are kept.
    """

    def __init__(
        self, weights: Weights, deltas: Mapping[str, OpenedDelta], question: Question, heads: HeadCache
    ) -> None:
        self.weights, self.deltas, self.question, self.heads = weights, deltas, question, heads
        touched = {name for delta in deltas.values() for name in (*delta, *delta.problems)}
        known = [name for name in weights.layers() if name in touched]
        self.layers = known + sorted(touched - set(known))
        self.seconds: dict[str, float] = {}
        self._rows: dict[str, list[dict[str, Any]]] = {name: [] for name in deltas}
        self._vectors: dict[str, list[dict[str, Any]]] = {name: [] for name in deltas}
        self._overlaps: list[dict[str, Any]] = []
        self._unread: LoralabError | None = None

    def __len__(self) -> int:
        return len(self.layers)

    @torch.no_grad()
    def __iter__(self) -> Iterator[str]:
        for layer in self.layers:
            begin = time.perf_counter()
            self._look(layer)
            self.seconds[layer] = round(time.perf_counter() - begin, 3)
            yield layer

    def found(self) -> tuple[Any, Any, Any]:
        """Give the tables of matrices, vectors and overlaps; the first two delta by delta.

        Raises:
            LoralabError: nothing at all could be measured, since the base could not be read.
        """
        if self._unread is not None and not any(self._vectors.values()):
            raise self._unread
        matrices = [row for rows in self._rows.values() for row in rows]
        vectors = [row for rows in self._vectors.values() for row in rows]
        tables = zip(TABLES.values(), (matrices, vectors, self._overlaps), strict=True)
        first, second, third = (typed(rows, schema) for schema, rows in tables)
        return first, second, third

    def cost(self, seconds: float) -> dict[str, Any]:
        routes = [row["route"] for rows in self._vectors.values() for row in rows]
        return {
            "seconds": round(seconds, 3),
            "matrices": sum(len(rows) for rows in self._rows.values()),
            "routes": {route: routes.count(route) for route in sorted(set(routes))},
            "layers": self.seconds,
        }

    def _look(self, layer: str) -> None:
        """Measure one layer of every delta that changes it; what fails is said in the row of that matrix."""
        wanted = {name: delta for name, delta in self.deltas.items() if layer in delta or layer in delta.problems}
        fitting = [name for name, delta in wanted.items() if layer in delta]
        matrix: Matrix | None = None
        problem = ""
        if fitting:
            try:
                matrix = Matrix.of(layer, self.weights.weight(layer), self.heads)
            except LoralabError as error:
                problem, self._unread = _said(error), self._unread or error
        moved: dict[str, Directions] = {}
        for name, delta in wanted.items():
            told = delta.problems.get(layer, problem)
            if not told and matrix is not None:
                try:
                    change = delta[layer]
                    found, vectors, moved[name] = matrix.measured(change, self.question)
                except LoralabError as error:
                    told = _said(error)
                else:
                    self._rows[name].append({"delta": name, **found, "problem": ""})
                    self._vectors[name] += [{"delta": name, **place(layer), **vector} for vector in vectors]
            if told:
                self._rows[name].append({"delta": name, **place(layer), "note": "", "problem": told})
        for one, other in combinations(moved, 2):
            both = {
                side: similarity(getattr(moved[one], side), getattr(moved[other], side)) for side in ("left", "right")
            }
            self._overlaps.append({"delta_a": one, "delta_b": other, "layer": layer, **both})


@dataclass(frozen=True, eq=False)
class Matrix:
    """One weight of the base: in float32, with its norm and its leading vectors."""

    layer: str
    weight: Tensor
    frobenius: float
    head: Triplets

    @classmethod
    def of(cls, layer: str, stored: Tensor, heads: HeadCache) -> "Matrix":
        """Take a weight as it is stored. Raises DeltaError if it holds numbers that are not finite."""
        stored = stored.cpu()
        size = frobenius(stored)
        if not math.isfinite(size):
            raise DeltaError("the base's weight holds numbers that are not finite")
        return cls(layer, stored.float(), size, heads.of(stored))

    def measured(
        self, change: LayerDelta, question: Question
    ) -> tuple[dict[str, Any], list[dict[str, Any]], Directions]:
        """Measure one change of this weight: its row, the rows of its vectors, and its directions.

        Raises:
            DeltaError: the change holds numbers that are not finite, or has another shape.
        """
        k = min(question.k, *self.weight.shape)
        known = leading(change, max(k, LEADING)) if isinstance(change, Dense) and is_large(change) else None
        found, note = row(self.layer, change, self.frobenius, exact=question.exact, known=known)
        if not math.isfinite(found["frobenius"]):
            raise DeltaError("the change holds numbers that are not finite")
        judged = intruders(self.weight, change, k=k, epsilon=question.epsilon, head=self.head, exact=question.exact)
        inside = shares(change, self.head, k)
        values = judged.triplets.values.tolist()
        found |= {
            "rank90_share": found["rank90"] / found["rank"] if found["rank"] else math.nan,
            "intruders": len(judged.indices),
            "intruder_energy": judged.energy_share,
            "intruder_values": sum(values[i] for i in judged.indices) / values[0] if values[0] else 0.0,
            "overlap_left": inside.left,
            "overlap_right": inside.right,
            "overlap_both": inside.both,
            "note": "; ".join(filter(None, [note, *self._notes(change, found, question.k)])),
        }
        return found, vector_rows(judged), directions(change, change.rank if isinstance(change, LowRank) else k, known)

    def _notes(self, change: LayerDelta, found: dict[str, Any], k: int) -> Iterator[str]:
        shorter = min(self.weight.shape)
        if k > shorter:
            yield f"k is {shorter} here, all there are"
        if len(self.head) < min(k, shorter):
            yield f"overlaps with the base's {len(self.head)} leading directions: no more of them are certain"
        if not found["frobenius"]:
            yield "no change"
        elif (
            isinstance(change, LowRank) and (held := sum(value > 0 for value in found["singular_values"])) < change.rank
        ):
            yield f"of rank {held}, not {change.rank}"


def vector_rows(found: Intruders) -> list[dict[str, Any]]:
    """Give a row for each judged vector, in order: what `Spectra.vectors` holds of it beside its place."""
    values = found.triplets.values.tolist()
    return [
        {
            "position": i + 1,
            "value": value,
            "relative_value": value / values[0] if values[0] else 0.0,
            "cosine_low": float(found.lower[i]),
            "cosine_high": float(found.upper[i]),
            "intruder": found.verdicts[i],
            "route": found.routes[i],
            "gap": float(found.gaps[i]),
            "stable": found.stable[i],
            "similarity": found.similarity[:, i].tolist(),
        }
        for i, value in enumerate(values)
    ]


def _said(error: LoralabError) -> str:
    return f"{error.what} ({error.where})" if error.where else error.what
