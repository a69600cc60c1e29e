"""Take a finished pretraining run into the package: its weights, its tokenizer, and a log that shows the curve.

    loralab train pocket-base
    python -m loralab.pocket.shipping runs/pocket-base-XXXXXXXX

rebuild what `loralab/pocket/base` holds.
"""

import shutil
import sys
from pathlib import Path
from typing import Any

from loralab.pocket import BASE
from loralab.run.files import read_json, read_lines, write_json

MODEL = ("config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json")
EVERY = 100
"""Steps between two lines of the log; the probes are kept all."""


def ship(run: Path, folder: Path = BASE) -> None:
    """Copy the model of a run, its spec, and what its log says about the curve, the machine and the versions.

    Raises:
        FolderError: the run is not finished, or damaged.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for name in MODEL:
        if (run / "delta" / name).exists():
            shutil.copyfile(run / "delta" / name, folder / name)
    shutil.copyfile(run / "spec.yaml", folder / "spec.yaml")
    facts = read_json(run / "environment.json")
    status = read_json(run / "status.json")
    scores = {(line["step"], line["name"]): line["value"] for line in read_lines(run / "scores.jsonl")}
    steps = [line for line in read_lines(run / "metrics.jsonl") if "loss" in line]
    write_json(
        folder / "training.json",
        {
            "date": facts["date"],
            "platform": facts["platform"],
            "python": facts["python"],
            "packages": facts["packages"],
            "inputs": facts["inputs"],
            **{key: status[key] for key in ("total_steps", "tokens", "wall_s", "peak_bytes")},
            "curve": [_line(line, scores) for line in steps if line["step"] % EVERY == 0],
        },
    )


def _line(line: dict[str, Any], scores: dict[tuple[int, str], float]) -> dict[str, Any]:
    step = line["step"]
    made = {"step": step, "loss": round(line["loss"], 4), "wall_s": line["wall_s"]}
    if (step, "target/loss") in scores:
        made["validation_loss"] = round(scores[step, "target/loss"], 4)
    return made


if __name__ == "__main__":
    ship(Path(sys.argv[1]))
