"""The run folder: the truth about one run, on disk. Every table and page can be rebuilt from it.

    <root>/<name>-<hash8>/
      spec.yaml  status.json  environment.json  metrics.jsonl  scores.jsonl  items.parquet  samples.jsonl  spectra.parquet
      intruders.parquet  delta/  links/  checkpoints/step-N/

Files are written whole (temporary file, fsync, rename) or appended a line at a time. One process writes a folder at a
time: its `.lock` names the owner, and the file's modification time is the owner's heartbeat.
"""

import os
import platform
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from itertools import zip_longest
from pathlib import Path
from typing import Any

from filelock import FileLock

from loralab.errors import FolderError
from loralab.run.files import (
    append_line,
    explain_failed_writes,
    keep_lines,
    read_json,
    read_lines,
    repair,
    write_atomic,
    write_json,
)

__all__ = [
    "Owner",
    "RunFolder",
    "append_line",
    "environment",
    "keep_lines",
    "read_json",
    "read_lines",
    "repair",
    "write_atomic",
    "write_json",
]

STATES = ("new", "running", "done", "diverged", "interrupted")
HEARTBEAT_S = 5.0
STALE_S = 60.0
"""A silent owner on another machine counts as dead after this long; on this machine its process is looked up."""
PACKAGES = (
    *("loralab", "torch", "transformers", "tokenizers", "safetensors", "datasets", "pydantic", "ruamel.yaml"),
    *(
        "lm_eval",
        "numpy",
        "scipy",
        "pandas",
        "pyarrow",
        "accelerate",
        "peft",
        "bitsandbytes",
        "tensorboard",
        "wandb",
        "trackio",
    ),
)


# The owner of a folder


@dataclass(frozen=True)
class Owner:
    """The process that writes a folder. `process` tells it from a later one with the same number, "" if unknown."""

    host: str
    pid: int
    process: str
    since: str


def _process_start(pid: int) -> str | None:
    """Name the start of a living process, None if there is none (a zombie is none)."""
    proc = Path("/proc")
    try:
        if (proc / "self/stat").exists():
            state, *rest = (proc / str(pid) / "stat").read_text().rpartition(")")[2].split()
            boot = (proc / "sys/kernel/random/boot_id").read_text().strip()
            return None if state in "ZX" else f"{boot}:{rest[18]}"
        found = subprocess.run(["ps", "-o", "lstart=", "-p", str(pid)], capture_output=True, text=True, check=False)
        return found.stdout.strip() or None
    except OSError:
        return None


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


class RunFolder:
    """Paths, status and lock of one run's folder."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.spec = self.path / "spec.yaml"
        self.status = self.path / "status.json"
        self.environment = self.path / "environment.json"
        self.metrics = self.path / "metrics.jsonl"
        self.scores = self.path / "scores.jsonl"
        self.samples = self.path / "samples.jsonl"
        self.spectra = self.path / "spectra.parquet"
        self.delta = self.path / "delta"
        self.links = self.path / "links"
        self.checkpoints = self.path / "checkpoints"
        self._lock_file = self.path / ".lock"
        self._held: Owner | None = None

    @classmethod
    def create_or_open(cls, root: str | Path, name: str, spec_text: str) -> "RunFolder":
        """Create `root/name` with its spec, or open it if it holds the same spec.

        Raises:
            FolderError: the folder holds another spec, or something that is no run.
            Interrupted: the disk is full.
        """
        folder = cls(Path(root) / name)
        with explain_failed_writes(folder.path):
            folder.path.mkdir(parents=True, exist_ok=True)
        other = "choose another name, or move the folder away"
        if folder.spec.exists():
            line = _first_difference(folder.spec.read_text("utf-8", "replace"), spec_text)
            if line is not None:
                raise FolderError("the folder holds a run of another spec", where=f"{folder.spec}:{line}", fix=other)
        elif any(not item.name.startswith(".") for item in folder.path.iterdir()):
            raise FolderError("the folder is not empty and holds no spec.yaml", where=str(folder.path), fix=other)
        else:
            write_atomic(folder.spec, spec_text)
            folder.write_status(state="new")
        return folder

    def read_status(self) -> dict[str, Any]:
        """Read the status: state, step, total_steps, started, updated, message and what the run's end adds.

        Raises FolderError if it is damaged.
        """
        return {"state": "new", **read_json(self.status)}

    def write_status(self, **fields: Any) -> None:
        """Change some fields of the status, whole on disk; `started` and `updated` are set here.

        Raises:
            FolderError: the state is unknown, or another run has taken over the folder meanwhile.
            Interrupted: the disk is full.
        """
        if self._held is not None and self._read_lock() != self._held:
            raise FolderError("another run took over the folder while this one slept", where=str(self.path))
        status = self.read_status() | fields | {"updated": _now()}
        if status["state"] not in STATES:
            raise FolderError(f"unknown state {status['state']!r}", where=str(self.status), fix=", ".join(STATES))
        if status["state"] != "new":
            status.setdefault("started", status["updated"])
        write_json(self.status, status)

    def remove_if_unused(self) -> None:
        """Remove a folder in which nothing but the spec was ever written: its run failed before it began."""
        used = {item.name for item in self.path.iterdir()} - {self.spec.name, self.status.name, ".lock.guard"}
        if not used and self.read_status()["state"] == "new":
            shutil.rmtree(self.path, ignore_errors=True)

    def owner(self) -> Owner | None:
        """Return the living process that writes this folder, if there is one."""
        owner = self._read_lock()
        if owner is None:
            return None
        if owner.host == socket.gethostname() and owner.process:
            return owner if _process_start(owner.pid) == owner.process else None
        return owner if self._heartbeat_age() < STALE_S else None

    @contextmanager
    def lock(self, heartbeat_s: float = HEARTBEAT_S) -> Iterator[None]:
        """Own the folder; take it over from a dead owner, and repair what the owner left torn.

        Raises:
            FolderError: a living run owns the folder.
            Interrupted: the disk is full.
        """
        self._held = self._take_lock()
        stop = threading.Event()
        heart = threading.Thread(target=self._beat, args=(self._held, heartbeat_s, stop), daemon=True)
        heart.start()
        try:
            for lines in (self.metrics, self.scores, self.samples):
                repair(lines)
            yield
        finally:
            stop.set()
            heart.join()
            with suppress(OSError), self._guard():  # a lock that stays is taken over: its owner is dead
                if self._read_lock() == self._held:
                    self._lock_file.unlink()
            self._held = None

    def _guard(self) -> FileLock:
        """Make reading and replacing the lock one step; held for milliseconds, freed by the system at death."""
        return FileLock(self._lock_file.with_name(".lock.guard"), timeout=STALE_S)

    def _take_lock(self) -> Owner:
        process = _process_start(os.getpid()) or ""
        mine = Owner(socket.gethostname(), os.getpid(), process, datetime.now(UTC).isoformat())
        with explain_failed_writes(self.path), self._guard():
            if (owner := self.owner()) is not None:
                beat = f"heartbeat {self._heartbeat_age():.0f} s ago"
                what = f"a run is writing this folder: process {owner.pid} on {owner.host}, {beat}"
                raise FolderError(what, where=str(self.path), fix="wait for it, or stop it and run the command again")
            for leftover in self.path.glob(".*.tmp"):
                leftover.unlink(missing_ok=True)
            write_json(self._lock_file, asdict(mine))
        return mine

    def _read_lock(self) -> Owner | None:
        try:
            return Owner(**read_json(self._lock_file))
        except (FolderError, TypeError):  # written whole, so a damaged lock has no living owner
            return None

    def _heartbeat_age(self) -> float:
        try:
            return max(0.0, time.time() - self._lock_file.stat().st_mtime)
        except FileNotFoundError:
            return 0.0

    def _beat(self, mine: Owner, heartbeat_s: float, stop: threading.Event) -> None:
        while not stop.wait(heartbeat_s) and self._read_lock() == mine:
            with suppress(OSError):
                os.utime(self._lock_file)


def _first_difference(old: str, new: str) -> int | None:
    """Return the number of the first line that differs, None if all are equal."""
    pairs = zip_longest(old.splitlines(), new.splitlines())
    return next((number for number, (before, after) in enumerate(pairs, start=1) if before != after), None)


# Where a run happened


def _git(*words: str) -> str | None:
    try:
        done = subprocess.run(["git", *words], capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def cores() -> int:
    """Count the cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def environment() -> dict[str, Any]:
    """Describe this machine, its packages and the state of the code, without importing any of the packages."""
    commit = _git("rev-parse", "HEAD")
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else None
    return {
        "date": _now(),
        "command": sys.argv,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "host": socket.gethostname(),
        "cores": cores(),
        "memory_bytes": memory,
        "git_commit": commit,
        "git_dirty": bool(_git("status", "--porcelain")) if commit else None,
        "packages": {name: found for name in PACKAGES if (found := _version(name)) is not None},
    }
