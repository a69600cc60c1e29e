"""What stands inside the deltas of one base, as the figures and tables of its page take it: colours, kinds of layer, chains."""

import re
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import pandas as pd

from loralab.lab.spectra import Spectra
from loralab.report.changes import Model
from loralab.report.drawing import DELTA_COLOURS, RANK_SHAPES
from loralab.report.provenance import plain
from loralab.report.read import printable
from loralab.report.spectra import Subject

MOST_SHOWN = len(DELTA_COLOURS)
"""Deltas that figures tell apart; of more, the first ones. Tables and sentences have all."""
MOST_KINDS = 24
MARKER_SIZE = 8.5


@dataclass(frozen=True)
class Chain:
    """Deltas of one run in order: (step or link, name of the delta)."""

    label: str
    way: Literal["step", "link"]
    places: tuple[tuple[int, str], ...]


@dataclass(frozen=True, eq=False)
class Inside:
    """Spectra of several deltas, ready to be shown."""

    found: Spectra

    @property
    def facts(self) -> dict[str, Any]:
        return dict(self.found.facts)

    @cached_property
    def matrices(self) -> pd.DataFrame:
        """A row per delta and matrix, with `kind`: a name for its module that is unique within a block."""
        table = self.found.matrices.reset_index(drop=True)
        return table.assign(kind=kinds(table).map(printable))

    @cached_property
    def vectors(self) -> pd.DataFrame:
        """A row per leading vector of a tuned matrix, with the matrix's `kind`."""
        table = self.found.vectors.reset_index(drop=True)
        return table.assign(kind=named(table, self.matrices)["kind"])

    @property
    def overlaps(self) -> pd.DataFrame:
        return self.found.overlaps

    @property
    def deltas(self) -> list[str]:
        """Names in the order of the facts; those that only the table has stand behind."""
        return list(dict.fromkeys([*map(str, plain(self.facts.get("deltas"))), *self.matrices["delta"]]))

    @property
    def k(self) -> int:
        """Leading vectors of each tuned matrix that were looked at."""
        return int(self.facts["k"])

    @property
    def epsilon(self) -> float:
        return float(self.facts["epsilon"])

    @property
    def setting(self) -> str:
        """What every count of intruders is said with."""
        return f"k = {self.k}, ε = {self.epsilon:g}"

    @property
    def chains(self) -> list[Chain]:
        """Give the deltas that are checkpoints or links of one run, where there are at least two."""
        found: dict[tuple[str, str], list[tuple[int, str]]] = {}
        for name, told in plain(self.facts.get("deltas")).items():
            told = plain(told)
            way = "step" if isinstance(told.get("step"), int) else "link" if isinstance(told.get("link"), int) else ""
            if way:
                path = str(told.get("path") or "").replace("\\", "/").rstrip("/")
                run = re.sub(r"/(checkpoints/step-\d+|links/[^/]*)$", "", path)
                found.setdefault((run, way), []).append((int(told[way]), str(name)))
        kept = {key: sorted(places) for key, places in found.items() if len(places) > 1}
        labels = _apart([_stem([name for _, name in places]) for places in kept.values()])
        return [
            Chain(label, "step" if way == "step" else "link", tuple(places))
            for label, ((_, way), places) in zip(labels, kept.items(), strict=True)
        ]

    @cached_property
    def models(self) -> list[Model]:
        """Give the deltas that figures show, each with its colour and marker: of a run's checkpoints the last."""
        earlier = {name for chain in self.chains if chain.way == "step" for _, name in chain.places[:-1]}
        names = [name for name in self.deltas if name not in earlier][:MOST_SHOWN]
        return [Model(name, DELTA_COLOURS[i], RANK_SHAPES[i]) for i, name in enumerate(names)]

    @property
    def subjects(self) -> list[Subject]:
        """Give the deltas of `models` with their tables, as the figures of all pages take them."""
        made = []
        for model in self.models:
            table = self.matrices[self.matrices["delta"] == model.name]
            table = table[table["problem"] == ""].assign(module=lambda found: found["kind"])
            if not table.empty:
                facts = (model.folder, model.method, short(model.label), model.colour, model.marker, MARKER_SIZE)
                made.append(Subject(*facts, table))
        return made

    def vectors_of(self, delta: str) -> pd.DataFrame:
        return self.vectors[self.vectors["delta"] == delta]


def short(label: str, most: int = 22) -> str:
    """Cut the middle out of a label that is too long for a figure."""
    return label if len(label) <= most else f"{label[: most // 2]}…{label[most // 2 + 1 - most :]}"


def _stem(names: list[str]) -> str:
    """Give what names begin with alike, without the word for the step at its end."""
    same = names[0]
    for name in names[1:]:
        same = same[: next((i for i, (a, b) in enumerate(zip(same, name, strict=False)) if a != b), len(same))]
    same = re.sub(r"[\W_]*(step|link|checkpoint)?s?[\W_]*\d*$", "", same)
    return printable(same) or printable(names[-1])


def _apart(labels: list[str]) -> list[str]:
    """Number labels that stand more than once."""
    return [label if labels.count(label) == 1 else f"{label} #{i}" for i, label in enumerate(labels, start=1)]


def kinds(matrices: pd.DataFrame) -> pd.Series:
    """Name each row's kind of layer: as short as it can be while no block of a delta has two of a name.

    `q_proj` where that is enough; BERT has three `dense` in a block, so there it is `attention.output.dense`.
    """
    layer = matrices["layer"]
    for names in (matrices["module"], layer.str.replace(r"^.*?(^|\.)\d+\.", "", regex=True), _without_number(layer)):
        alone = pd.DataFrame({"delta": matrices["delta"], "depth": matrices["depth"], "kind": names})
        if not alone.duplicated().any() and names.nunique() <= MOST_KINDS:
            return names
    return matrices["module"]


def _without_number(layer: pd.Series) -> pd.Series:
    return layer.str.replace(r"(^|\.)\d+(?=\.|$)", r"\1#", n=1, regex=True)


def named(rows: pd.DataFrame, matrices: pd.DataFrame) -> pd.DataFrame:
    """Give the columns of `matrices` that say where a layer stands (kind, depth), a row for each of `rows`."""
    places = matrices.drop_duplicates("layer").set_index("layer")[["kind", "depth"]]
    return places.reindex(rows["layer"]).set_index(rows.index)
