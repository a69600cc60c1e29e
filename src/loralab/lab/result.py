"""What a run leaves behind: its delta, the outcome of every document, its scores."""

import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd
from safetensors import SafetensorError

from loralab.delta.store import save_lowrank
from loralab.errors import FolderError, Interrupted
from loralab.evals.probe import Reading
from loralab.evals.stats import Score
from loralab.lab.items import ITEMS, JUDGED_ITEMS, write_table
from loralab.lab.prepare import Prepared
from loralab.run.folder import RunFolder, read_lines

MEASURED = ("loss_sum", "right")
CHANGES = {
    "loss": "loss_rise",
    "pseudo_loss": "pseudo_loss_rise",
    "accuracy": "accuracy_change",
    "choice": "choice_change",
}
CHANGES |= {"reward": "reward_change", "held_out": "held_out_change"}
"""Which score is the paired change of which, by the last part of their names."""
DISTANCES = ("drift", "spectrum", "intruders")
"""Roles of scores that are a change themselves."""


@dataclass(frozen=True)
class Result:
    """A finished run: its folder, its status, and its scores on the base, before and after training."""

    folder: RunFolder
    status: dict[str, Any]
    base: dict[str, Score] = field(default_factory=dict)
    before: dict[str, Score] = field(default_factory=dict)
    after: dict[str, Score] = field(default_factory=dict)

    def score(self, name: str, when: str = "after") -> Score:
        """Give one score of the base, before or after training. Raises KeyError for a name that was not measured."""
        found: dict[str, Score] = getattr(self, when)
        return found[name]

    def rows(self) -> list[tuple[Any, ...]]:
        """Give the end table: name, base, before, after, change with its 95 % interval (paired where possible), n.

        Where no change was measured, as of an area under the curve, the interval is that of the level after training.
        """
        rows: list[tuple[Any, ...]] = []
        for name, after in self.after.items():
            path, _, measure = name.rpartition("/")
            if measure in CHANGES.values():
                continue
            is_change = measure.endswith(("_change", "_rise")) or name.partition("/")[0] in DISTANCES or measure == "kl"
            change = (
                self.after.get(f"{path}/{CHANGES[measure]}") if measure in CHANGES else after if is_change else None
            )
            interval = (after if change is None else change).interval()
            signed = "+" if change is not None else ""
            text = "" if interval is None else f"[{interval[0]:{signed}.4g}, {interval[1]:{signed}.4g}]"
            base, before = self.base.get(name), self.before.get(name)
            moved = None if change is None else change.value
            rows.append((name, base and base.value, before and before.value, after.value, moved, text, after.n))
        return rows

    def samples(self) -> list[dict[str, Any]]:
        """Give what base and tuned model answered to the same prompts: step, model, role, skill, prompt, output."""
        return read_lines(self.folder.samples)

    def spectra(self, *, every_step: bool = False) -> pd.DataFrame:
        """Give the spectrum of the delta, a row per matrix; with `every_step` at every evaluation of the run.

        Columns: `step`, and those of `loralab.spectral.spectrum.table`.

        Raises:
            FolderError: the run has none: `probes.spectra` is false, or a warning in metrics.jsonl says why.
        """
        return self._table(self.folder.spectra, "spectra of its delta", "true", every_step)

    def intruders(self, *, every_step: bool = False) -> pd.DataFrame:
        """Give the leading left singular vectors of the tuned weights, a row each; with `every_step` at every evaluation.

        Columns: delta (the run), step, layer, module, depth, position (from 1), value, relative_value (of the largest),
        cosine_low and cosine_high (between them lies the largest |cos| with any left vector of the base), intruder, route,
        gap, stable, similarity (|cos| with the base's leading left vectors).

        Raises:
            FolderError: the run did not look for them.
        """
        return self._table(self.folder.path / "intruders.parquet", "table of intruders", "intruders", every_step)

    def _table(self, path: Path, what: str, choice: str, every_step: bool) -> pd.DataFrame:
        if not path.is_file():
            fix = f"train with probes.spectra={choice}; if that was so, look for a warning in metrics.jsonl"
            raise FolderError(f"this run has no {what}", where=str(path), fix=fix)
        found = pd.read_parquet(path)
        return found if every_step else found[found["step"] == found["step"].max()].reset_index(drop=True)

    def summary(self) -> dict[str, Any]:
        """Give everything as plain values."""
        return {
            "folder": str(self.folder.path),
            "status": self.status,
            "scores": [
                score.as_line(0, when) | {"interval": score.interval()}
                for when in ("base", "before", "after")
                for score in getattr(self, when).values()
            ],
        }


def result_of(folder: RunFolder) -> Result:
    """Read a finished run's result from its folder."""
    status = folder.read_status()
    found: dict[str, dict[str, Score]] = {"base": {}, "before": {}, "after": {}}
    for line in read_lines(folder.scores):
        score = Score(line["name"], line["value"], line["unit"], line["n"], line["standard_error"])
        if line["model"] == "base":
            found["base"][score.name] = score
        elif line["step"] <= status.get("delta_step", line["step"]):
            if line["step"] == 0:
                found["before"][score.name] = score
            found["after"][score.name] = score
    return Result(folder, status, **found)


def save_delta(folder: RunFolder, prepared: Prepared) -> None:
    """Save the delta whole: into a folder beside its place, then moved there. Raises Interrupted if it cannot be."""
    partial = folder.path / "delta.partial"
    shutil.rmtree(partial, ignore_errors=True)
    try:
        prepared.method.save(partial)
        if prepared.base.tokenizer is not None:
            prepared.base.tokenizer.save_pretrained(partial)
        for number, link in enumerate(prepared.method.links(), start=1):
            save_lowrank(folder.links / f"link-{number}", link, prepared.base.path, model=prepared.base.model)
    except (OSError, SafetensorError) as error:
        fix = "free space, or make the folder writable, and run the same command again"
        raise Interrupted(f"the delta could not be written: {error}", where=str(partial), fix=fix) from error
    shutil.rmtree(folder.delta, ignore_errors=True)
    partial.rename(folder.delta)


def write_items(folder: RunFolder, base: dict[str, Reading], after: dict[str, Reading]) -> None:
    """Write what was measured on each item, on base and tuned: what paired tests need.

    A row for each document of a text probe and each item of a task; columns that a probe does not have are null.
    """
    rows = [row for name, reading in after.items() for row in _paired(name, base[name], reading)]
    if rows:
        judged = any("label" in row or "reward" in row for row in rows)
        write_table(folder.path / "items.parquet", rows, JUDGED_ITEMS if judged else ITEMS)


def _paired(probe: str, base: Reading, tuned: Reading) -> Iterator[dict[str, Any]]:
    for number, (before, after) in enumerate(zip(base.items, tuned.items, strict=True)):
        facts = {name: value for name, value in after.items() if name not in MEASURED}
        outcomes = {
            f"{model}_{name}": row[name]
            for name in MEASURED
            if name in after
            for model, row in (("base", before), ("tuned", after))
        }
        yield {"probe": probe, "item": number, **facts, **outcomes}
