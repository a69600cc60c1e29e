"""Run folders read into plain values. What is missing or damaged is noted, never raised: a report shows what there is."""

import math
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd
from pyarrow.lib import ArrowException

from loralab.errors import FolderError
from loralab.evals.stats import Score
from loralab.lab.index import is_run, read_spec
from loralab.run.folder import RunFolder, read_json, read_lines

SPECTRA_COLUMNS = {"step", "layer", "module", "depth", "rank", "rank90", "singular_values"}
INTRUDER_COLUMNS = {"step", "layer", "position", "value", "relative_value", "intruder"}
ITEM_COLUMNS = {"probe", "item", "num_tokens", "base_loss_sum", "tuned_loss_sum"}
SAMPLE_KEYS = ("model", "role", "skill", "prompt", "reference", "output")


@dataclass(frozen=True)
class Run:
    """One run folder.

    Attributes:
        folder: path below the report's root, with forward slashes; "." is the root itself.
        state: `done`, `new`, `running`, `interrupted`, `diverged`, or `damaged` if spec or status cannot be read.
        spec, spec_text: of spec.yaml, as plain values and as written.
        status, environment: of the JSON files of these names.
        base, after: scores of the base, and of the tuned model at the last measured step above 0, by name; where the weights
            of an earlier checkpoint were put back at the end, those at its step.
        history: the tuned model's scores by name, in order of steps.
        metrics: training lines (step, loss, tokens, …), in order of steps.
        samples: lines of samples.jsonl.
        items, spectra: the tables of these names, None where there is none; of the spectra the last step.
        spectra_steps: the spectra of all steps, None where only one was measured.
        intruders: the leading vectors of the tuned matrices at the steps where they were measured.
        problems: what could not be read, in words.
    """

    folder: str
    state: str = "new"
    spec: dict[str, Any] = field(default_factory=dict)
    spec_text: str = ""
    status: dict[str, Any] = field(default_factory=dict)
    environment: dict[str, Any] = field(default_factory=dict)
    base: dict[str, Score] = field(default_factory=dict)
    after: dict[str, Score] = field(default_factory=dict)
    history: dict[str, list[tuple[int, Score]]] = field(default_factory=dict)
    metrics: list[dict[str, Any]] = field(default_factory=list)
    samples: list[dict[str, Any]] = field(default_factory=list)
    items: pd.DataFrame | None = None
    spectra: pd.DataFrame | None = None
    spectra_steps: pd.DataFrame | None = None
    intruders: pd.DataFrame | None = None
    problems: tuple[str, ...] = ()

    def at(self, key: str) -> Any:
        """Give the spec's value at a dotted key, None where there is none."""
        value: Any = self.spec
        for part in key.split("."):
            value = value.get(part) if isinstance(value, dict) else None
        return value

    @property
    def method(self) -> str:
        return printable(str(self.at("method.name") or "unknown"))

    @property
    def objective(self) -> str:
        """What was optimised: `text` where nothing else is said."""
        return printable(str(self.at("objective.name") or "text"))

    @property
    def rank(self) -> int | None:
        """Rank of one pair; of a chain with falling ranks, of its first link."""
        if self.method not in ("lora", "lora_plus", "cola", "peft"):
            return None
        ranks = self.at("method.ranks")
        found = ranks[0] if isinstance(ranks, list) and ranks else self.at("method.rank") or self.at("method.keys.r")
        return found if isinstance(found, int) and found > 0 else None

    @property
    def target_data(self) -> str:
        """Name of what was taught: the training sources without folders and endings."""
        sources = self.at("data.train")
        paths = (
            [s.get("path") if isinstance(s, dict) else s for s in sources] if isinstance(sources, list) else [sources]
        )
        return printable(" + ".join(source_name(path) for path in paths if isinstance(path, str))) or "unknown data"

    @property
    def inputs(self) -> dict[str, Any]:
        """SHA-256 of the base and of the data, as recorded when the run began."""
        found = self.environment.get("inputs")
        return found if isinstance(found, dict) else {}

    @property
    def base_mark(self) -> str | None:
        found = self.inputs.get("base")
        return found if isinstance(found, str) else None

    @property
    def data_marks(self) -> dict[str, str]:
        found = self.inputs.get("data")
        return {str(k): str(v) for k, v in found.items()} if isinstance(found, dict) else {}

    def fact(self, key: str) -> float | None:
        """Give a finite number of the status, None where there is none."""
        return finite(self.status.get(key))

    @property
    def trained_share(self) -> float | None:
        trained, total = self.fact("trained_parameters"), self.fact("all_parameters")
        return trained / total if trained is not None and total else None


ENDINGS = (".json", ".jsonl", ".parquet", ".csv", ".tsv", ".txt", ".gz", ".zst")
SAYS_NOTHING = ("train", "training", "data", "delta")


def source_name(path: str) -> str:
    """Name a source for a person: `pocket:calc/train?items=9`, `calc/train.jsonl` and `data/calc.jsonl` are all `calc`."""
    if path.startswith("pocket:"):
        return re.split(r"[/?]", path.removeprefix("pocket:"))[0]
    parts = [part for part in path.replace("\\", "/").split("/") if part not in ("", ".", "..")]
    if not parts:
        return path
    while parts[-1].lower().endswith(ENDINGS):
        parts[-1] = parts[-1].rpartition(".")[0]
    return parts[-2] if parts[-1] in SAYS_NOTHING and len(parts) > 1 else parts[-1] or path


def printable(text: str) -> str:
    """Leave out control characters: no figure can hold them."""
    return "".join(character for character in text if character.isprintable())


def finite(value: Any) -> float | None:
    """Give a finite number as a float, None for everything else."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return float(value)


def runs_below(path: str | Path) -> list[Run]:
    """Read a run folder, or all run folders among the children and grandchildren of a folder, sorted by path.

    Raises:
        FolderError: there is no such folder, or no run in it.
    """
    root = Path(path)
    if not root.is_dir():
        what = "this is no folder" if root.exists() else "there is no such folder"
        raise FolderError(
            what, where=str(root), fix="name a run folder, or a folder of run folders: loralab runs lists them"
        )
    found = [root] if is_run(root) else list(_children(root))
    if not found:
        fix = "name a run folder (it holds spec.yaml), or a folder whose folders are runs"
        raise FolderError("there is no run in this folder", where=str(root), fix=fix)
    return [read_run(folder, root) for folder in found]


def _children(root: Path, depth: int = 2) -> Iterator[Path]:
    for child in sorted(root.iterdir()):
        if not child.is_dir() or child.name.startswith("."):
            continue
        if is_run(child):
            yield child
        elif depth > 1:
            yield from _children(child, depth - 1)


def read_run(path: Path, root: Path) -> Run:
    """Read one run folder."""
    folder, problems = RunFolder(path), list[str]()

    def tried(read: Callable[[], Any], otherwise: Any) -> Any:
        try:
            return read()
        except FolderError as error:
            place = Path(error.where).name if error.where else path.name
            problems.append(f"{place}: {error.what}")
            return otherwise

    text, spec = tried(lambda: read_spec(folder.spec), ("", {}))
    status = tried(folder.read_status, {"state": "damaged"})
    state = str(status["state"]) if spec else "damaged"
    if state == "running" and folder.owner() is None:
        state = "interrupted"
    scores = tried(lambda: read_lines(folder.scores), [])
    base, history = _scores(scores)
    metrics = [line for line in tried(lambda: read_lines(folder.metrics), []) if _is_step(line)]
    spectra = _filled(tried(lambda: _table(path / "spectra.parquet", SPECTRA_COLUMNS), None))
    samples = [line for line in tried(lambda: read_lines(folder.samples), []) if _is_sample(line)]
    return Run(
        folder=path.relative_to(root).as_posix(),
        state=state,
        spec=spec,
        spec_text=text,
        status=status,
        environment=tried(lambda: read_json(folder.environment), {}),
        base=base,
        after=_at_the_end(history, status.get("delta_step")),
        history=history,
        metrics=metrics,
        samples=samples,
        items=tried(lambda: _table(path / "items.parquet", ITEM_COLUMNS), None),
        spectra=_last_step(spectra),
        spectra_steps=spectra if spectra is not None and spectra["step"].nunique() > 1 else None,
        intruders=_flagged(tried(lambda: _table(path / "intruders.parquet", INTRUDER_COLUMNS), None)),
        problems=tuple(problems),
    )


def _scores(lines: list[dict[str, Any]]) -> tuple[dict[str, Score], dict[str, list[tuple[int, Score]]]]:
    """Sort score lines into the base's and, per name, the tuned model's by step; odd lines are passed over."""
    base: dict[str, Score] = {}
    tuned: dict[str, dict[int, Score]] = {}
    for line in lines:
        name, step, value, n = line.get("name"), line.get("step"), finite(line.get("value")), line.get("n")
        if not isinstance(name, str) or not isinstance(step, int) or value is None:
            continue
        n = n if isinstance(n, int) else 0
        error = finite(line.get("standard_error")) if n > 1 else None
        score = Score(name, value, str(line.get("unit") or ""), n, error)
        if line.get("model") == "base":
            base[name] = score
        else:
            tuned.setdefault(name, {})[step] = score
    return base, {name: sorted(steps.items()) for name, steps in tuned.items()}


def _at_the_end(history: dict[str, list[tuple[int, Score]]], delta_step: Any) -> dict[str, Score]:
    """Give the scores of the weights that were kept: the last above step 0, none of a step behind that of the delta."""
    last = delta_step if isinstance(delta_step, int) and not isinstance(delta_step, bool) else math.inf
    kept = {name: [score for step, score in steps if 0 < step <= last] for name, steps in history.items()}
    return {name: scores[-1] for name, scores in kept.items() if scores}


def _is_step(line: dict[str, Any]) -> bool:
    return isinstance(line.get("step"), int) and finite(line.get("loss")) is not None


def _is_sample(line: dict[str, Any]) -> bool:
    return all(isinstance(line.get(key), str) for key in SAMPLE_KEYS) and isinstance(line.get("step"), int)


def _table(path: Path, columns: set[str]) -> pd.DataFrame | None:
    if not path.exists():
        return None
    try:
        table = pd.read_parquet(path)
    except (OSError, ValueError, ArrowException) as error:
        raise FolderError("the table is damaged", where=str(path)) from error
    if missing := columns - set(table.columns):
        raise FolderError(f"the table has no column {', '.join(sorted(missing))}", where=str(path))
    return table


def _filled(table: pd.DataFrame | None) -> pd.DataFrame | None:
    """Give a table that has rows of known steps, None for any other."""
    if table is None:
        return None
    table = table[pd.to_numeric(table["step"], errors="coerce").notna()].reset_index(drop=True)
    return None if table.empty else table


def _flagged(table: pd.DataFrame | None) -> pd.DataFrame | None:
    """Make the verdicts of a table of leading vectors true or false: what has none is no intruder."""
    table = _filled(table)
    return (
        None if table is None else table.assign(intruder=table["intruder"].map(lambda value: value == 1).astype(bool))
    )


def _last_step(spectra: pd.DataFrame | None) -> pd.DataFrame | None:
    if spectra is None:
        return None
    return spectra[spectra["step"] == spectra["step"].max()].reset_index(drop=True)
