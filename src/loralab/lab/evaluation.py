"""The folder of an evaluation: what base and deltas scored, item by item, written whole and read back.

    <folder>/
      scores.jsonl      a line per model and task (or suite): the score and its paired change from the base
      items.parquet     a row per item and delta: right before and after, prompt, reference, what both wrote
      curves.jsonl      pass@k, where programs were sampled
      diversity.jsonl   distinct outputs among the samples, passing and failing apart
      evaluation.json   facts, and how many rows the other files hold; written last, so that it says the rest is whole

Facts are plain values. Known keys: `model`, `fingerprint`, `deltas` (by name: `path`, `fingerprint`), `suites` (by name: the
scores they are the mean of), `left_out` (scores beyond all numbers), `limit`, `seed`, `environment` (as `run.folder.environment`)
and `cost` (`forwards`, `tokens` computed, `plain_tokens` that a scorer of one request at a time would compute, `seconds`,
`truncated` contexts). Others are kept.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
from pyarrow import parquet

from loralab.errors import FolderError
from loralab.lab.index import is_run
from loralab.lab.items import EVALUATED_ITEMS as ITEMS
from loralab.lab.items import write_table
from loralab.lab.measured import AGAIN, LEVEL, Measured, Verdict, changes_of, finite, judged, plain
from loralab.run.files import explain_failed_writes, read_json, read_lines, write_atomic, write_json

__all__ = ["BASE", "FACTS", "ITEMS", "Evaluation", "Measured", "changes_of", "is_evaluation", "read_evaluation"]

BASE = "base"
FACTS = "evaluation.json"
FILES = {FACTS, "scores.jsonl", "items.parquet", "curves.jsonl", "diversity.jsonl", "report.html"}


@dataclass(frozen=True)
class Evaluation:
    """What an evaluation found.

    Attributes:
        models: `base`, then the deltas' names.
        measured: scores of all models.
        items: rows with the columns `ITEMS`, for each delta and score; those without a delta have the model `base`.
        facts: what was evaluated, where, and what it cost; see the top of this file.
        curves: pass@k: rows of model, task, k, pass_at_k, standard_error.
        diversity: rows of model, task, kind (`passing`, `failing` or `all`), samples, distinct, standard_error.
    """

    models: Sequence[str]
    measured: Sequence[Measured]
    items: Sequence[Mapping[str, Any]] = ()
    facts: Mapping[str, Any] = field(default_factory=dict)
    curves: Sequence[Mapping[str, Any]] = ()
    diversity: Sequence[Mapping[str, Any]] = ()

    @property
    def deltas(self) -> list[str]:
        return [model for model in self.models if model != BASE]

    def names(self) -> list[str]:
        """Give the scores' names, tasks first, suites behind them."""
        order = sorted(self.measured, key=lambda one: one.is_suite)
        return list(dict.fromkeys(one.name for one in order))

    def find(self, model: str, name: str) -> Measured | None:
        """Give a model's score by its name, None if it was not measured."""
        return next((one for one in self.measured if one.model == model and one.name == name), None)

    def summary(self) -> dict[str, Any]:
        """Give everything but the items as plain values."""
        said = self.verdicts()
        lines = [one.as_line() for one in self.measured]
        for line in lines:
            if verdict := said.get((line["model"], line["name"])):
                line["verdict"], line["p_adjusted"] = verdict.word, verdict.p_adjusted
        parts = {"facts": dict(self.facts), "curves": list(self.curves), "diversity": list(self.diversity)}
        found: dict[str, Any] = plain({"models": list(self.models), "scores": lines, **parts})
        return found

    def verdicts(self) -> dict[tuple[str, str], Verdict]:
        """Judge every change, by model and name."""
        return judged(self.measured)

    def rows(self) -> list[dict[str, Any]]:
        """Give the terminal's table: a row per score and delta (or per score, where there is no delta), under its heads.

        `p` is corrected for the number of tasks; lost and won count items.
        """
        said, several = self.verdicts(), len(self.deltas) > 1
        rows = []
        for name in self.names():
            base = self.find(BASE, name)
            for model in self.deltas or [BASE]:
                one = self.find(model, name)
                if one is None:
                    continue
                row: dict[str, Any] = {"task": self.title(one)}
                if model == BASE:
                    rows.append(row | {"base": one.score.value, "95 % interval": _between(one.score.interval())})
                else:
                    change, verdict = one.change or {}, said.get((model, name), Verdict("", None))
                    row |= {"delta": model} if several else {}
                    row |= {"base": base and base.score.value, "after": one.score.value, "change": change.get("value")}
                    row |= {"95 % interval": _between(one.change_interval(), signed=True)}
                    row |= {"lost": change.get("lost"), "won": change.get("won"), "p": verdict.p_adjusted}
                    rows.append(row | {"": verdict.word})
                rows[-1]["n"] = one.score.n
        return rows

    def title(self, one: Measured) -> str:
        """Name a score for a person: a suite says of how many tasks it is the mean."""
        if not one.is_suite:
            return one.name
        parts = self.facts.get("suites")
        tasks = parts.get(one.name) if isinstance(parts, Mapping) else None
        return (
            f"{one.name} (mean of {len(tasks)})" if isinstance(tasks, list | tuple) and tasks else f"{one.name} (mean)"
        )

    def how_judged(self) -> str:
        """Say when a change is called learned or forgotten, "" where nothing was compared."""
        said = self.verdicts()
        if not said:
            return ""
        tested = [self.find(*key) for key, verdict in said.items() if verdict.p_adjusted is not None]
        tasks = sum(one is not None and not one.is_suite for one in tested)
        if not tested:
            return "learned, forgotten: the 95 % interval of the change does not hold zero; everything else is a tie."
        corrected = f" after Holm's correction for {tasks} comparisons" if tasks > 1 else ""
        apart = ", suites corrected apart" if tasks > 1 and tasks < len(tested) else ""
        return f"learned, forgotten: the change has p below {LEVEL}{corrected}{apart}; everything else is a tie."

    def notes(self) -> list[str]:
        """Say in sentences what it cost and what limits it."""
        said = []
        cost = self.facts.get("cost")
        numbers = {key: finite(value) for key, value in cost.items()} if isinstance(cost, Mapping) else {}
        forwards, tokens, seconds = (numbers.get(key) for key in ("forwards", "tokens", "seconds"))
        if forwards is not None and tokens is not None:
            took = f" in {seconds:.1f} s" if seconds is not None else ""
            more = numbers.get("plain_tokens")
            alone = (
                f"; scored one request at a time they would be {more:,.0f}, {more / tokens:.1f} times as many"
                if more
                else ""
            )
            said.append(
                f"{forwards:,.0f} {'forward' if forwards == 1 else 'forwards'} over {tokens:,.0f} tokens{took}{alone}."
            )
        if cuts := numbers.get("truncated"):
            said.append(f"{cuts:,.0f} contexts were longer than the model reads, and were cut at their beginning.")
        if beyond := self.facts.get("left_out"):
            said.append(f"Left out, as too large for a number: {', '.join(map(str, beyond))}.")
        if limit := finite(self.facts.get("limit")):
            said.append(f"At most {limit:,.0f} items of each task: the others were left out.")
        return said

    def write(self, folder: str | Path) -> Path:
        """Write the evaluation, every file whole; an older evaluation in the folder is replaced.

        Raises:
            FolderError: the folder holds something else, or cannot be written.
            Interrupted: the disk is full.
        """
        path = Path(folder)
        refuse_folder(path)
        with explain_failed_writes(path):
            (path / FACTS).unlink(missing_ok=True)
        lines = {"scores": [one.as_line() for one in self.measured]}
        lines |= {"curves": [dict(row) for row in self.curves], "diversity": [dict(row) for row in self.diversity]}
        for name, rows in lines.items():
            file = path / f"{name}.jsonl"
            if rows or name == "scores":
                write_atomic(file, "".join(_line(row) for row in rows))
            else:
                file.unlink(missing_ok=True)
        write_table(path / "items.parquet", self.items, ITEMS)
        counts = {name: len(rows) for name, rows in lines.items()} | {"items": len(self.items)}
        write_json(path / FACTS, plain({"models": list(self.models), "counts": counts, "facts": dict(self.facts)}))
        return path


def _between(interval: tuple[float, float] | None, *, signed: bool = False) -> str:
    ends = [f"{end:+.4g}" if signed else f"{end:.4g}" for end in interval or ()]
    return f"[{', '.join(ends)}]" if ends else ""


def _line(row: Mapping[str, Any]) -> str:
    return json.dumps(plain(row), ensure_ascii=False) + "\n"


def refuse_folder(folder: str | Path) -> None:
    """Make the folder of an evaluation, and raise FolderError if it holds something else or cannot be written."""
    path = Path(folder)
    with explain_failed_writes(path):
        names = {file.name for file in path.iterdir() if not file.name.startswith(".")} if path.is_dir() else set()
        if (names - FILES and not is_evaluation(path)) or is_run(path):
            fix = "name a new folder, or one that holds an evaluation"
            raise FolderError("the folder holds something that is no evaluation", where=str(path), fix=fix)
        path.mkdir(parents=True, exist_ok=True)


def is_evaluation(path: str | Path) -> bool:
    """Tell whether a folder holds a whole evaluation."""
    return Path(path, FACTS).is_file()


def read_evaluation(folder: str | Path) -> Evaluation:
    """Read an evaluation's folder.

    Raises:
        FolderError: there is no evaluation, or one of its files is missing, damaged or shorter than it was.
    """
    path = Path(folder)
    if not is_evaluation(path):
        fix = "name the folder that loralab evaluate wrote"
        raise FolderError(f"there is no evaluation here: no {FACTS}", where=str(path), fix=fix)
    whole = read_json(path / FACTS)
    models, facts, counts = whole.get("models"), whole.get("facts"), whole.get("counts")
    if not (isinstance(models, list) and isinstance(facts, dict) and isinstance(counts, dict)):
        raise FolderError("the file does not say what was evaluated", where=str(path / FACTS), fix=AGAIN)
    lines = {name: read_lines(path / f"{name}.jsonl") for name in ("scores", "curves", "diversity")}
    items = _read_items(path / "items.parquet")
    for name, rows in {**lines, "items": items}.items():
        if len(rows) != counts.get(name):
            file = path / ("items.parquet" if name == "items" else f"{name}.jsonl")
            what = f"the file holds {len(rows)} rows, but {counts.get(name)} were written"
            raise FolderError(what, where=str(file), fix=AGAIN)
    measured = [
        Measured.of_line(line, f"{path / 'scores.jsonl'}:{i}") for i, line in enumerate(lines["scores"], start=1)
    ]
    return Evaluation([str(model) for model in models], measured, items, facts, lines["curves"], lines["diversity"])


def _read_items(path: Path) -> list[dict[str, Any]]:
    try:
        table = parquet.read_table(path)
    except (OSError, ValueError, pa.ArrowException) as error:
        what = "the file is damaged" if path.exists() else "the file is missing"
        raise FolderError(what, where=str(path), fix=AGAIN) from error
    if missing := [name for name in ITEMS.names if name not in table.column_names]:
        raise FolderError(f"the table has no column {', '.join(missing)}", where=str(path), fix=AGAIN)
    rows: list[dict[str, Any]] = table.to_pylist()
    return rows
