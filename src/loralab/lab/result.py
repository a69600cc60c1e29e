"""What a run leaves behind: its delta, the outcome of every document, its scores."""

import shutil
from dataclasses import dataclass, field
from io import BytesIO
from typing import Any

import pandas as pd
from safetensors import SafetensorError

from loralab.delta.store import save_lowrank
from loralab.errors import Interrupted
from loralab.evals.drift import Reading
from loralab.evals.stats import Score
from loralab.lab.prepare import Prepared
from loralab.run.folder import RunFolder, read_lines, write_atomic


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
        """Give the end table: name, base, before, after, change with its 95 % interval (paired where possible), n."""
        rows: list[tuple[Any, ...]] = []
        for name, after in self.after.items():
            if name.endswith("/loss_rise"):
                continue
            rise = self.after.get(name.removesuffix("/loss") + "/loss_rise") if name.endswith("/loss") else after
            base = self.base.get(name)
            change, interval = (None, None) if rise is None else (rise.value, rise.interval())
            text = "" if interval is None else f"[{interval[0]:+.4g}, {interval[1]:+.4g}]"
            before = self.before.get(name)
            rows.append((name, base and base.value, before and before.value, after.value, change, text, after.n))
        return rows

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
        else:
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
    """Write per document and probe the summed loss of base and tuned: what paired tests need."""
    parts = []
    for name, reading in after.items():
        parts.append(
            pd.DataFrame(
                {
                    "probe": name,
                    "item": range(len(reading.loss_sums)),
                    "num_tokens": reading.num_tokens,
                    "base_loss_sum": base[name].loss_sums,
                    "tuned_loss_sum": reading.loss_sums,
                }
            )
        )
    if parts:
        table = BytesIO()
        pd.concat(parts, ignore_index=True).to_parquet(table, index=False)
        write_atomic(folder.path / "items.parquet", table.getvalue())
