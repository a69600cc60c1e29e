"""The index: all run folders of a root as one table, built anew from the folders each time it is asked for."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pandas as pd
from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from loralab.errors import FolderError
from loralab.run.folder import RunFolder, read_lines

COLUMNS = [
    "folder",
    "name",
    "method",
    "rank",
    "learning_rate",
    "model",
    "state",
    "step",
    "total_steps",
    "tokens",
    "target_loss_base",
    "target_loss_end",
    "general_loss_base",
    "general_loss_end",
    "learning",
    "learned_by",
    "forgetting",
    "trained_share",
    "wall_s",
    "peak_bytes",
    "reason",
]
_WORDS = ("folder", "name", "method", "model", "state", "learned_by", "reason")

LOSS = "loss, nats per token"
LEARNED_BY: dict[str, tuple[tuple[str, str, float | None], ...]] = {
    "text": (),
    "reward": (("target/auc", "AUC over chance", 0.5), ("target/majority_change", "accuracy over the baseline", 0.0)),
    "classify": (
        ("target/majority_change", "accuracy over the commonest label", 0.0),
        ("target/pearson", "Pearson correlation", 0.0),
    ),
    "policy": (("policy/held_out", "held-out reward", None), ("policy/reward", "reward", None)),
}
"""What tells that a run of an objective learned, the most telling first: a score at the end, what it is in words, and the
level it is held against, None for that of the base. A loss of rewards or of a policy is no loss of text.
"""


def index(root: str | Path = "runs") -> pd.DataFrame:
    """Read every run folder below `root` into one table, a row per folder, sorted by folder.

    Learning is the fall of the target's validation loss from the base to the end, in nats per token; of a reward model, a
    classifier or a policy what `learned_by` says. Forgetting is the rise of the general loss (of an encoder, its pseudo-loss),
    in nats per token. The end is the step of the weights that were kept. A state of `running` is shown only while a living
    process owns the folder, else it is `interrupted`. A folder that cannot be read has the state `damaged`, with the reason in
    the last column.

    Returns:
        A table with the columns `COLUMNS`; numbers that do not exist are NaN.
    """
    root = Path(root)
    found = sorted(path for path in root.iterdir() if is_run(path)) if root.is_dir() else []
    table = pd.DataFrame([_row(path) for path in found], columns=COLUMNS)
    numbers = [column for column in COLUMNS if column not in _WORDS]
    table[numbers] = table[numbers].apply(pd.to_numeric, errors="coerce").astype("float64")
    return table


def is_run(path: Path) -> bool:
    """Tell whether a folder is, or was meant to be, a run's."""
    return any(os.path.exists(path / file) for file in ("spec.yaml", "status.json", "metrics.jsonl"))


def read_spec(path: Path) -> tuple[str, dict[str, Any]]:
    """Read a spec as text and as plain values, so that runs of older versions stay readable.

    Raises:
        FolderError: the file is missing or damaged, or describes no run.
    """
    try:
        text = path.read_text(encoding="utf-8")
        spec = YAML(typ="safe", pure=True).load(text)
    except FileNotFoundError as error:
        raise FolderError("the file is missing", where=str(path)) from error
    except (OSError, ValueError, YAMLError) as error:
        reason = str(error).partition("\n")[0]
        raise FolderError(f"the file is damaged: {reason}", where=str(path)) from error
    if not isinstance(spec, dict) or not all(isinstance(spec.get(key), dict) for key in ("method", "model")):
        raise FolderError("the file describes no run", where=str(path))
    return text, spec


def _row(path: Path) -> dict[str, Any]:
    row: dict[str, Any] = {"folder": path.name}
    try:
        folder = RunFolder(path)
        for read in (_of_spec, _of_status):
            row |= read(folder)
        row |= _of_scores(folder, str(row.pop("objective")), row.pop("delta_step"))
    except FolderError as error:
        where = f" ({error.where})" if error.where else ""
        row |= {"state": "damaged", "reason": f"{error.what}{where}"}
    return row


def _of_spec(folder: RunFolder) -> dict[str, Any]:
    _, spec = read_spec(folder.spec)
    optimizer, objective = spec.get("optimizer"), spec.get("objective")
    return {
        "objective": (objective.get("name") if isinstance(objective, dict) else None) or "text",
        "name": spec.get("name"),
        "method": spec["method"].get("name"),
        "rank": spec["method"].get("rank"),
        "learning_rate": optimizer.get("learning_rate") if isinstance(optimizer, dict) else None,
        "model": spec["model"].get("path"),
    }


def _of_status(folder: RunFolder) -> dict[str, Any]:
    status = folder.read_status()
    if status["state"] == "running" and folder.owner() is None:
        status["state"] = "interrupted"
    plain = ("state", "step", "total_steps", "tokens", "wall_s", "peak_bytes")
    return {
        **{key: status.get(key) for key in plain},
        "trained_share": _share(status),
        "delta_step": status.get("delta_step"),
        "reason": status.get("end") or status.get("message"),
    }


def _share(status: Mapping[str, Any]) -> float | None:
    trained, total = status.get("trained_parameters"), status.get("all_parameters")
    if not isinstance(trained, int) or not isinstance(total, int) or total == 0:
        return None
    return trained / total


def _of_scores(folder: RunFolder, objective: str, delta_step: Any) -> dict[str, Any]:
    """Read levels at step 0 (the base) and at the end; what was not measured is None."""
    scores = read_lines(folder.scores)
    if isinstance(delta_step, int):  # the weights of an earlier checkpoint were put back
        scores = [score for score in scores if not isinstance(score.get("step"), int) or score["step"] <= delta_step]
    target_base, target_end = _ends(scores, "target/loss")
    general_base, general_end = _ends(scores, "general/loss")
    if general_base is None:  # of an encoder
        general_base, general_end = _ends(scores, "general/pseudo_loss")
    learning, learned_by = _difference(target_base, target_end), LOSS
    if objective in LEARNED_BY and objective != "text":
        learning, learned_by = _learned(scores, objective)
    return {
        "target_loss_base": target_base,
        "target_loss_end": target_end,
        "general_loss_base": general_base,
        "general_loss_end": general_end,
        "learning": learning,
        "learned_by": None if learning is None else learned_by,
        "forgetting": _difference(general_end, general_base),
    }


def _learned(scores: list[dict[str, Any]], objective: str) -> tuple[float | None, str]:
    """Give what a run that is not of text learned, by the first of its measures that was taken, and that measure."""
    for name, words, level in LEARNED_BY[objective]:
        base, end = _ends(scores, name)
        learned = _difference(end, base if level is None else level)
        if learned is not None:
            return learned, words
    return None, ""


def _ends(scores: list[dict[str, Any]], name: str) -> tuple[float | None, float | None]:
    values: dict[int, float] = {}
    for score in scores:
        step, value = score.get("step"), score.get("value")
        if score.get("name") == name and isinstance(step, int) and isinstance(value, int | float):
            values[step] = value
    base = values.pop(0, None)
    return base, values[max(values)] if values else None


def _difference(first: float | None, second: float | None) -> float | None:
    return None if first is None or second is None else first - second
