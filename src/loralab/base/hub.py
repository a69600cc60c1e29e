"""Where a model's files are: a folder on disk, or a hub id whose files are fetched into the hub's cache."""

import json
import re
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import huggingface_hub
from huggingface_hub.errors import (
    GatedRepoError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from safetensors import SafetensorError, safe_open
from torch import Tensor

from loralab.errors import ModelError, did_you_mean
from loralab.pocket import BASE

HUB_ID = re.compile(r"[\w][\w.-]*(/[\w][\w.-]*)?")
POCKET = "pocket"
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
FETCHED = ["*.json", "*.safetensors", "*.model", "*.tiktoken", "*.txt", "*.jinja"]
# Copies of the same weights in the authors' own layout, and onnx and other exports in sub-folders.
NOT_FETCHED = ["*/*", "consolidated*"]


def find(
    path: str, revision: str | None = None, *, weights: bool = True, code: bool = False
) -> tuple[Path, str | None]:
    """Find the folder that holds a model's files, and the revision they are of.

    Args:
        path: folder, hub id, or `pocket` for the small base that comes with the package.
        revision: commit, tag or branch; of a hub id only.
        weights: whether weights are needed.
        code: whether the model's own Python files are needed too.

    Raises:
        ModelError: there is no such folder or hub model, it cannot be reached, or it holds no model or no weights.
    """
    folder, commit = BASE if path == POCKET else Path(path).expanduser(), revision
    if not folder.is_dir():
        if not HUB_ID.fullmatch(path) or _looks_local(folder):
            raise _missing_folder(path, folder)
        patterns = [p for p in FETCHED if weights or p != "*.safetensors"] + (["*.py"] if code else [])
        folder = _fetch(path, revision, patterns)
        commit = revision or folder.name
    if not (folder / "config.json").is_file():
        raise ModelError(
            "this folder holds no config.json, so it is no Hugging Face model",
            where=str(folder),
            fix="name the folder that holds config.json and model.safetensors",
        )
    if weights:
        weight_files(folder)
    return folder, commit


def weight_files(folder: Path) -> list[Path]:
    """List the safetensors files of a model folder.

    Raises:
        ModelError: it has none, only pickles, or lacks one that its index names.
    """
    index = folder / INDEX
    if not index.is_file():
        if (folder / WEIGHTS).is_file():
            return [folder / WEIGHTS]
        pickles = any(folder.glob("*.bin"))
        raise ModelError(
            "this folder holds weights only as pickles, which can run code"
            if pickles
            else "this folder holds no weights",
            where=str(folder / WEIGHTS),
            fix="convert them with Transformers' save_pretrained" if pickles else "copy or download the model again",
        )
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (ValueError, KeyError, AttributeError):
        raise ModelError("the index of the weights cannot be read", where=str(index), fix="download it again") from None
    lacking = [name for name in names if not (folder / name).is_file()]
    if lacking:
        raise ModelError(
            f"{len(lacking)} of {len(names)} weight files are missing, {lacking[0]} for one",
            where=str(folder),
            fix="copy or download the model again",
        )
    return [folder / name for name in names]


def read_facts(folder: Path) -> dict[str, Any]:
    """Read a model folder's config.json. Raises ModelError if it is not a JSON object."""
    file = folder / "config.json"
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ModelError(f"config.json is not valid JSON: {error}", where=str(file), fix="download it again") from None
    if not isinstance(found, dict):
        raise ModelError("config.json is not a JSON object", where=str(file), fix="download it again")
    return found


def _looks_local(folder: Path) -> bool:
    """Tell a mistyped folder from a hub id: what it would lie in exists here."""
    return len(folder.parts) > 1 and folder.parent.is_dir()


def _missing_folder(path: str, folder: Path) -> ModelError:
    beside = [item.name for item in folder.parent.iterdir() if item.is_dir()] if folder.parent.is_dir() else []
    near = did_you_mean(folder.name, beside)
    fix = f"did you mean {folder.parent / near}?" if near else "name an existing folder, or a hub id such as gpt2"
    return ModelError("there is no such folder", where=path, fix=fix)


def _fetch(hub_id: str, revision: str | None, patterns: list[str]) -> Path:
    where = hub_id if revision is None else f"{hub_id} at {revision}"
    try:
        return Path(
            huggingface_hub.snapshot_download(
                hub_id, revision=revision, allow_patterns=patterns, ignore_patterns=NOT_FETCHED
            )
        )
    except GatedRepoError:
        what, fix = "this model is gated", "accept its terms on the hub, then log in with `hf auth login`"
    except RevisionNotFoundError:
        what, fix = "the hub has no such revision of this model", "correct model.revision"
    except (RepositoryNotFoundError, HFValidationError):
        what = "there is no such folder here and no such model on the hub"
        fix = "correct model.path; for a private model log in with `hf auth login`"
    except LocalEntryNotFoundError:
        what = "there is no such folder here, the hub cannot be reached, and its cache does not hold this model"
        fix = "go online and run the same command again, or name a folder"
    except OSError as error:  # connections lost, time-outs, HTTP errors, a full disk
        what, fix = f"the download was interrupted: {error}", "run the same command again: it resumes"
    raise ModelError(what, where=where, fix=fix) from None


def stored_tensors(folder: Path) -> Iterator[tuple[str, Tensor]]:
    """Read the stored tensors one at a time, sorted by name; raises ModelError for a damaged file."""
    with ExitStack() as stack:
        where: dict[str, Any] = {}
        for file in weight_files(folder):
            try:
                opened = stack.enter_context(safe_open(file, "pt"))
            except (SafetensorError, OSError) as error:
                raise ModelError(
                    f"the weights cannot be read: {error}",
                    where=str(file),
                    fix="the file is damaged or was cut short: copy or download it again",
                ) from None
            where |= dict.fromkeys(opened.keys(), opened)
        for name, opened in sorted(where.items(), key=lambda item: item[0]):
            yield name, opened.get_tensor(name)
