"""What is inside the deltas of a base: `spectra` measures it; a folder of typed tables keeps it. No torch until it is called.

    <folder>/
      spectra.parquet    a row per delta and matrix
      intruders.parquet  a row per delta, matrix and leading singular vector of the tuned weight
      overlaps.parquet   a row per pair of deltas and layer
      spectra.json       facts, and how many rows the tables hold; written last, so that it says the rest is whole

Facts are plain values: `base`, its `fingerprint` (null where no delta names it), `deltas` (by name: `path`, `kind`, and of a run's
parts `step` or `link`), `k`, `epsilon`, `exact`, `notes`, `cost` (`seconds`, `matrices`, `routes` of the vectors, and `layers`: the
seconds of each), `environment`, `version`.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd
import pyarrow as pa
from pyarrow import parquet

from loralab.errors import FolderError
from loralab.lab.index import is_run
from loralab.lab.measured import plain
from loralab.run.files import explain_failed_writes, read_json, write_atomic, write_json
from loralab.spectral import maps

if TYPE_CHECKING:
    from loralab.base.model import Base
    from loralab.delta.lowrank import Delta

FACTS = "spectra.json"
VERSION = 1
AGAIN = "measure again: loralab spectra BASE DELTA"
NUMBERS = (
    *("out_features", "in_features", "rank", "rank90", "effective_rank", "stable_rank", "frobenius", "spectral"),
    *("base_frobenius", "relative_norm"),
)
SHARES = (
    "rank90_share",
    "intruders",
    "intruder_energy",
    "intruder_values",
    "overlap_left",
    "overlap_right",
    "overlap_both",
)
_TEXT, _WHOLE, _NUMBER, _FLAG, _LIST = pa.string(), pa.int64(), pa.float64(), pa.bool_(), pa.list_(pa.float64())
_PLACE = [("delta", _TEXT), ("layer", _TEXT), ("module", _TEXT), ("depth", _WHOLE)]
TABLES = {
    "spectra": pa.schema(
        [
            *_PLACE,
            *((name, _NUMBER) for name in NUMBERS),
            ("singular_values", _LIST),
            *((name, _NUMBER) for name in SHARES),
            *(("note", _TEXT), ("problem", _TEXT)),
        ]
    ),
    "intruders": pa.schema(
        [
            *_PLACE,
            ("position", _WHOLE),
            *((name, _NUMBER) for name in ("value", "relative_value", "cosine_low", "cosine_high")),
            *(("intruder", _FLAG), ("route", _TEXT), ("gap", _NUMBER), ("stable", _FLAG), ("similarity", _LIST)),
        ]
    ),
    "overlaps": pa.schema(
        [("delta_a", _TEXT), ("delta_b", _TEXT), ("layer", _TEXT), ("left", _NUMBER), ("right", _NUMBER)]
    ),
}
FILES = {FACTS, *(f"{name}.parquet" for name in TABLES), "report.html", "figures"}


@dataclass(frozen=True)
class Spectra:
    """What was found inside the deltas of one base.

    Attributes:
        matrices: a row per delta and matrix: delta, the columns of `spectral.spectrum.table`, rank90_share (rank90 / rank),
            intruders (their number among the k leading left vectors of the tuned weight), intruder_energy (their share of the
            energy of those k), intruder_values (the sum of their s_i/s_1), overlap_left, overlap_right, overlap_both (shares of
            ‖ΔW‖²_F inside the base's k leading left, right, and both directions), note, and problem: why the matrix could not be
            measured, "" where it was. Where there is a problem, numbers are NaN.
        vectors: a row per delta, matrix and position (from 1) among the k leading vectors of the tuned weight: value (s_j),
            relative_value (s_j/s_1), cosine_low, cosine_high (between them lies the largest |cos| with any left vector of the
            base), intruder, route (certified, dense or exact), gap (to the nearest other singular value, over s_1), stable, and
            similarity (|cos| with the base's leading left vectors, in order).
        overlaps: a row per pair of deltas and layer: delta_a, delta_b, layer, left, right, each ‖UaᵀUb‖²_F / min(ra, rb).
        facts: what was measured, how, and what it cost; see the top of this file.
    """

    matrices: pd.DataFrame
    vectors: pd.DataFrame
    overlaps: pd.DataFrame
    facts: Mapping[str, Any] = field(default_factory=dict)

    def counts(self, ks: Sequence[int] | None = None, epsilons: Sequence[float] = maps.EPSILONS) -> pd.DataFrame:
        """Count intruders at other k and ε: columns delta, k, epsilon, low, high, a row per choice; summed over matrices.

        Args:
            ks: numbers of leading vectors; None is each from 1 to the k that was measured.
            epsilons: thresholds of the cosine.

        Raises:
            DeltaError: more vectors are asked for than were measured, or an ε beyond (0, 1].
        """
        chosen = range(1, int(self.facts["k"]) + 1) if ks is None else ks
        return maps.counts(self.vectors, list(chosen), epsilons, list(self.facts["deltas"]))

    def summary(self) -> dict[str, Any]:
        """Give totals per delta and kind of module, and the facts, as plain values."""
        deltas = {}
        for name, told in self.facts["deltas"].items():
            mine = self.matrices[self.matrices["delta"] == name]
            kinds = {kind: _totals(rows) for kind, rows in mine.groupby("module", sort=False)}
            deltas[name] = dict(told) | _totals(mine) | {"modules": kinds}
        facts = {key: value for key, value in self.facts.items() if key != "deltas"}
        found: dict[str, Any] = plain(
            {"k": self.facts["k"], "epsilon": self.facts["epsilon"], "deltas": deltas, "facts": facts}
        )
        return found

    def write(self, folder: str | Path) -> Path:
        """Write the tables and facts, every file whole; older ones in the folder are replaced.

        Raises:
            FolderError: the folder holds something else, or cannot be written.
            Interrupted: the disk is full.
        """
        path = Path(folder)
        refuse_folder(path)
        with explain_failed_writes(path):
            (path / FACTS).unlink(missing_ok=True)
        tables = self._tables()
        for name, table in tables.items():
            written = BytesIO()
            parquet.write_table(pa.Table.from_pandas(table, TABLES[name], preserve_index=False), written)
            write_atomic(path / f"{name}.parquet", written.getvalue())
        rows = {name: len(table) for name, table in tables.items()}
        write_json(path / FACTS, plain(dict(self.facts) | {"rows": rows}))
        return path

    def _tables(self) -> dict[str, pd.DataFrame]:
        return dict(zip(TABLES, (self.matrices, self.vectors, self.overlaps), strict=True))


def _totals(rows: pd.DataFrame) -> dict[str, Any]:
    """Sum matrices up: counts and norms over all, means of what is a ratio; NaN where nothing was measured."""
    good = rows[rows["problem"] == ""]
    size, base = math.hypot(*good["frobenius"]), math.hypot(*good["base_frobenius"])
    weighted = {
        name: (good[name] * good["frobenius"] ** 2).sum() / size**2 if size else math.nan for name in SHARES[-3:]
    }
    means = {name: good[name].mean() for name in ("rank90_share", "effective_rank", "stable_rank", "intruder_energy")}
    return {
        "matrices": len(good),
        "problems": len(rows) - len(good),
        "intruders": int(good["intruders"].sum()),
        "matrices_with_intruders": int((good["intruders"] > 0).sum()),
        "intruder_values": float(good["intruder_values"].sum()),
        "frobenius": size,
        "relative_norm": size / base if base else math.nan,
        "rank90": good["rank90"].median(),
        **means,
        **weighted,
    }


def refuse_folder(folder: str | Path) -> None:
    """Make the folder of spectra, and raise FolderError if it holds something else or cannot be written."""
    path = Path(folder)
    with explain_failed_writes(path):
        names = {file.name for file in path.iterdir() if not file.name.startswith(".")} if path.is_dir() else set()
        if (names - FILES and not is_spectra(path)) or is_run(path):
            fix = "name a new folder, or one that holds spectra"
            raise FolderError("the folder holds something that is no spectra", where=str(path), fix=fix)
        path.mkdir(parents=True, exist_ok=True)


def _refuse_other(folder: Path, base: str, deltas: Sequence[Any]) -> None:
    """Refuse to write over the spectra of another base, or of other deltas."""
    if not is_spectra(folder):
        return
    facts = read_json(folder / FACTS)
    held = facts.get("deltas")
    known = {told.get("path") for told in held.values()} if isinstance(held, dict) else set()
    if facts.get("base") != base or not {str(delta) for delta in deltas if isinstance(delta, str | Path)} <= known:
        raise FolderError("the folder holds other spectra", where=str(folder), fix="name a new folder")


def is_spectra(path: str | Path) -> bool:
    """Tell whether a folder holds whole spectra."""
    return Path(path, FACTS).is_file()


def read_spectra(folder: str | Path) -> Spectra:
    """Read a folder of spectra.

    Raises:
        FolderError: there are none, or a file is missing, damaged, or shorter than it was.
    """
    path = Path(folder)
    if not is_spectra(path):
        fix = "name the folder that loralab spectra wrote"
        raise FolderError(f"there are no spectra here: no {FACTS}", where=str(path), fix=fix)
    facts = read_json(path / FACTS)
    rows = facts.pop("rows", None)
    if (
        not isinstance(rows, dict)
        or not isinstance(facts.get("deltas"), dict)
        or not isinstance(facts.get("k"), int)
        or not isinstance(facts.get("epsilon"), int | float)
    ):
        raise FolderError("the file does not say what was measured", where=str(path / FACTS), fix=AGAIN)
    tables = {name: _read_table(path / f"{name}.parquet", schema, rows.get(name)) for name, schema in TABLES.items()}
    return Spectra(tables["spectra"], tables["intruders"], tables["overlaps"], facts)


def _read_table(path: Path, schema: pa.Schema, rows: Any) -> pd.DataFrame:
    try:
        table = parquet.read_table(path)
    except (OSError, ValueError, pa.ArrowException) as error:
        what = "the file is damaged" if path.exists() else "the file is missing"
        raise FolderError(what, where=str(path), fix=AGAIN) from error
    if missing := [name for name in schema.names if name not in table.column_names]:
        raise FolderError(f"the table has no column {', '.join(missing)}", where=str(path), fix=AGAIN)
    if len(table) != rows:
        raise FolderError(f"the table holds {len(table)} rows, but {rows} were written", where=str(path), fix=AGAIN)
    return typed(table.to_pandas(), schema)


def typed(rows: pd.DataFrame | Sequence[Mapping[str, Any]], schema: pa.Schema) -> pd.DataFrame:
    """Make a table with a schema's columns and types: numbers that are missing are NaN, words "", lists are lists of floats."""
    table = pd.DataFrame(rows, columns=schema.names)
    for column in schema:
        name = column.name
        if column.type == _LIST:
            table[name] = pd.Series([_floats(values) for values in table[name]], index=table.index, dtype=object)
        elif column.type == _TEXT:
            table[name] = table[name].fillna("").astype(str)
        else:
            table[name] = table[name].astype({_WHOLE: "int64", _NUMBER: "float64", _FLAG: bool}[column.type])
    return table


def _floats(values: Any) -> list[float]:
    kept = values if isinstance(values, list | tuple) or hasattr(values, "tolist") else ()
    return [math.nan if value is None else float(value) for value in kept]


def spectra(
    base: "str | Path | Base",
    *deltas: "str | Path | Delta",
    k: int = 10,
    epsilon: float = 0.5,
    exact: bool = False,
    out: str | Path | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
    cache: str | Path | None = None,
    checkpoints: bool = False,
    links: bool = False,
    told: Callable[[int, int, str], None] | None = None,
) -> Spectra:
    """Look inside deltas of a base: spectrum, intruder dimensions and overlaps of every matrix, one matrix in memory at a time.

    Args:
        base: folder or hub id of the base, or the base as it is loaded.
        deltas: PEFT folders, run folders, fully fine-tuned checkpoints, or deltas in memory.
        k: leading left singular vectors of each tuned weight that are judged, and directions of the base that overlaps are with.
        epsilon: a vector is an intruder if its largest |cos| with any left vector of the base is below this, in (0, 1].
        exact: by two dense SVDs in float64 for each matrix, and large dense changes decomposed whole; the time grows with the
            cube of the sides.
        out: folder for the tables; None writes none.
        revision: of a hub base.
        trust_remote_code: run the model's own code.
        cache: folder for the base's leading vectors; None is the usual one.
        checkpoints: measure the checkpoints of run folders too.
        links: measure the links of chains too.
        told: called with the number of layers done, of all layers, and the name of the one that is done.

    Raises:
        DeltaError: no delta, one of another base, one of which nothing fits, or a k or epsilon that means nothing.
        LoralabError: something cannot be read or written.
    """
    from loralab.lab.dissect import Question, dissect

    question = Question(k, epsilon, exact)
    if out is not None:
        refuse_folder(out)
        _refuse_other(Path(out), str(base) if isinstance(base, str | Path) else base.path, deltas)
    chosen: dict[str, Any] = {"revision": revision, "trust_remote_code": trust_remote_code, "cache": cache}
    found = dissect(base, deltas, question, checkpoints=checkpoints, links=links, told=told, **chosen)
    if out is not None:
        found.write(out)
    return found
