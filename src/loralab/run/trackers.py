"""Mirrors of the metrics: TensorBoard, Weights & Biases, Trackio.

The run folder's own files are the truth. A mirror may fail at any moment: it is then switched off with one line of
warning, and training goes on. Only a missing package is an error, at the start, when nothing is lost yet.
"""

import importlib
import importlib.util
import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

from loralab.errors import LoralabError, did_you_mean

PROJECT = "loralab"
_log = logging.getLogger(__name__)


class Mirror(Protocol):
    """A place that shows the metrics while a run goes on."""

    def log(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Show the numbers among `metrics` at `step`; everything else is left out."""

    def close(self) -> None:
        """Write what is still buffered and let go."""


class _TensorBoard:
    """Event files in the folder's `tensorboard/`, written by TensorBoard itself: neither torch nor TensorFlow."""

    def __init__(self, folder: Path, name: str, spec: Mapping[str, Any]) -> None:
        self._writer = importlib.import_module("tensorboard.summary").Writer(str(folder / "tensorboard"))

    def log(self, step: int, metrics: Mapping[str, Any]) -> None:
        for name, value in metrics.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


class _RunOf:
    """A run of a package with W&B's calls (`init`, `run.log`, `run.finish`); the same name resumes it."""

    def __init__(self, package: str, name: str, spec: Mapping[str, Any], **more: str) -> None:
        module = importlib.import_module(package)
        self._run = module.init(project=PROJECT, name=name, config=dict(spec), resume="allow", **more)

    def log(self, step: int, metrics: Mapping[str, Any]) -> None:
        self._run.log(dict(metrics), step=step)

    def close(self) -> None:
        self._run.finish()


def _wandb(folder: Path, name: str, spec: Mapping[str, Any]) -> Mirror:
    return _RunOf("wandb", name, spec, id=name, dir=str(folder))  # W&B resumes by id and keeps its files in `dir`


def _trackio(folder: Path, name: str, spec: Mapping[str, Any]) -> Mirror:
    return _RunOf("trackio", name, spec)


_KINDS: dict[str, Callable[[Path, str, Mapping[str, Any]], Mirror]] = {
    "tensorboard": _TensorBoard,
    "wandb": _wandb,
    "trackio": _trackio,
}


class _Guarded:
    """A mirror that cannot stop training: its first failure is told in one line and is its last call."""

    def __init__(self, kind: str, open_mirror: Callable[[], Mirror]) -> None:
        self._kind = kind
        self._mirror: Mirror | None = None
        self._attempt(lambda: setattr(self, "_mirror", open_mirror()))

    def log(self, step: int, metrics: Mapping[str, Any]) -> None:
        mirror = self._mirror
        numbers = {name: float(value) for name, value in metrics.items() if isinstance(value, int | float)}
        if mirror is not None and numbers:
            self._attempt(lambda: mirror.log(step, numbers))

    def close(self) -> None:
        mirror, self._mirror = self._mirror, None
        if mirror is not None:
            self._attempt(mirror.close)

    def _attempt(self, call: Callable[[], None]) -> None:
        try:
            call()
        except Exception as error:  # whatever a foreign service raises, the run matters more
            self._mirror = None
            reason = str(error).strip().partition("\n")[0]
            _log.warning("%s is switched off, training goes on: %s: %s", self._kind, type(error).__name__, reason)


def _installed(package: str) -> bool:
    """Whether a package is installed; a folder of that name, such as the `wandb/` W&B leaves behind, does not count."""
    found = importlib.util.find_spec(package)
    return found is not None and found.origin is not None


def mirrors(names: list[str], folder: str | Path, name: str, spec: Mapping[str, Any]) -> list[Mirror]:
    """Open the mirrors of a run.

    Args:
        names: of `tensorboard`, `wandb`, `trackio`.
        folder: the run folder, under which a mirror keeps its own files.
        name: name of the run; a mirror that knows it resumes it.
        spec: the run's spec as plain values, shown beside the metrics.

    Returns:
        One mirror per name; one that could not be opened stays silent.

    Raises:
        LoralabError: a name is unknown or its package is not installed.
    """
    for kind in names:
        if kind not in _KINDS:
            near = did_you_mean(kind, list(_KINDS))
            fix = f"did you mean {near}?" if near else f"known: {', '.join(_KINDS)}"
            raise LoralabError(f"unknown tracker {kind!r}", where="trackers", fix=fix)
        if not _installed(kind):
            fix = f'pip install "loralab[{kind}]", or take it out of the trackers'
            raise LoralabError(f"the package {kind} is not installed", where="trackers", fix=fix)
    return [_guarded(kind, Path(folder), name, spec) for kind in names]


def _guarded(kind: str, folder: Path, name: str, spec: Mapping[str, Any]) -> Mirror:
    return _Guarded(kind, lambda: _KINDS[kind](folder, name, spec))
