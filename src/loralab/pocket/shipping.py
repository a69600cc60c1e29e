"""Take a finished pretraining into the package: weights, tokenizer, and a log that shows the curve of each stage.

    loralab train pocket-base
    loralab train pocket-base-more model.path=runs/pocket-base-XXXXXXXX/delta
    python -m loralab.pocket.shipping runs/pocket-base-XXXXXXXX runs/pocket-base-more-XXXXXXXX

rebuild what `loralab/pocket/base` holds.
"""

import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from loralab.errors import FolderError
from loralab.pocket import BASE
from loralab.run.files import read_json, read_lines, write_json

MODEL = ("config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json")
EVERY = 100
"""Steps between two lines of the log; the probes are kept all."""


def ship(runs: Sequence[Path], folder: Path = BASE) -> None:
    """Copy the model of the last run, and of every run what its log says about curve, machine and versions.

    Raises:
        FolderError: a run is not finished, or damaged.
    """
    stages = [_stage(run) for run in runs]
    folder.mkdir(parents=True, exist_ok=True)
    for name in MODEL:
        shutil.copyfile(runs[-1] / "delta" / name, folder / name)
    write_json(folder / "training.json", stages)


def _stage(run: Path) -> dict[str, Any]:
    status, facts = read_json(run / "status.json"), read_json(run / "environment.json")
    if status.get("state") != "done":
        raise FolderError("this run is not finished", where=str(run), fix="train it to its end")
    scores = {(line["step"], line["name"]): line["value"] for line in read_lines(run / "scores.jsonl")}
    steps = [line for line in read_lines(run / "metrics.jsonl") if "loss" in line]
    return {
        "spec": (run / "spec.yaml").read_text(encoding="utf-8"),
        **{key: facts[key] for key in ("date", "platform", "python", "packages", "inputs")},
        **{key: status[key] for key in ("total_steps", "tokens", "wall_s", "peak_bytes")},
        "curve": [_line(line, scores) for line in steps if line["step"] % EVERY == 0],
    }


def _line(line: dict[str, Any], scores: dict[tuple[int, str], float]) -> dict[str, Any]:
    step = line["step"]
    made = {"step": step, "loss": round(line["loss"], 4), "wall_s": line["wall_s"]}
    if (step, "target/loss") in scores:
        made["validation_loss"] = round(scores[step, "target/loss"], 4)
    return made


if __name__ == "__main__":
    ship([Path(word) for word in sys.argv[1:]])
