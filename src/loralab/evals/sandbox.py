"""Run programs that nobody has read, such as those a model wrote, so that they can do no harm.

Each program is a process of its own without network, that may write to one scratch folder only, with limits on CPU time, wall
time, memory, processes, files and output; at its end it is killed with all that it started. On Linux the kernel sees to it: user,
mount, PID, network, IPC and UTS namespaces, a root folder with nothing in it but Python's library (read-only), a list of permitted
system calls (seccomp), no capabilities, an empty environment, resource limits. None of it needs root, a daemon or compiled code.

Where any of it cannot be had, programs are refused unless `unsafe` is said; then only limits of resources, wall time and the
killing of the process group remain.

A nursery per worker forks the programs (`nursery.py`, where it also stands what makes a program pass, and what could be forged).
"""

import json
import math
import os
import selectors
import struct
import subprocess
import sys
import tempfile
import time
from collections import deque
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from loralab.errors import EvaluationError
from loralab.run.folder import cores

MIB = 1 << 20
LENGTH = struct.Struct(">I")
PATIENCE_S = 30.0
"""How much longer than a program's wall time its nursery may take to answer."""
END_S = 2.0
"""How long it may take to end."""
BOOT = """
import json, sys
sys.path.append(sys.argv[1])
from loralab.evals.nursery import main
sys.path.pop()
main(**json.loads(sys.argv[2]))
"""


@dataclass(frozen=True)
class Limits:
    """What one program may use.

    Attributes:
        cpu_s: CPU time of each of its processes, in seconds, rounded up to whole ones.
        wall_s: time from start to end, in seconds.
        memory_bytes: address space of each of its processes; with all of them it may use `processes` times as much.
        processes: processes and threads at the same time.
        file_bytes: size of one file.
        scratch_bytes: all files in its scratch folder together; they lie in memory. Needs confinement.
        output_bytes: what it prints to both outputs together.
    """

    cpu_s: float = 5.0
    wall_s: float = 10.0
    memory_bytes: int = 1024 * MIB
    processes: int = 8
    file_bytes: int = 32 * MIB
    scratch_bytes: int = 64 * MIB
    output_bytes: int = MIB

    def __post_init__(self) -> None:
        for field in fields(self):
            if not 0 < getattr(self, field.name) < math.inf:
                fix = "give more than 0, and an end"
                raise EvaluationError(f"a limit of {getattr(self, field.name)}", where=field.name, fix=fix)


USUAL = Limits()
"""Ample for the problems of HumanEval, whose reference solutions take milliseconds."""


@dataclass(frozen=True)
class Outcome:
    """How a program ended.

    Attributes:
        passed: its last line has run.
        reason: `passed`, `failed: AssertionError: …`, `timed out`, `out of CPU time`, `out of memory`, `output limit`,
            `killed by signal …`, `left before its last line …`.
        seconds: wall time.
        output: what it printed; of a long one the first and the last thousand characters.
    """

    passed: bool
    reason: str
    seconds: float
    output: str


@dataclass(frozen=True)
class Protection:
    """Whether this machine can confine programs; if not, what is `missing`."""

    complete: bool
    missing: str | None

    def __str__(self) -> str:
        return "programs are confined" if self.complete else f"programs cannot be confined: {self.missing}"


def protection() -> Protection:
    """Find out whether this machine can confine programs, by running one that tries to do what is forbidden."""
    try:
        with _Nursery(USUAL, folder="", unsafe=False) as nursery:
            missing = nursery.refused()
    except EvaluationError as error:
        missing = error.what
    return Protection(missing is None, missing)


def run_programs(
    programs: Sequence[str], limits: Limits = USUAL, *, workers: int | None = None, unsafe: bool = False
) -> list[Outcome]:
    """Run Python programs, each confined in a process of its own, and say how each ended, in their order.

    A program passes if its last line has run. Its outcome does not depend on the others, nor on the hash seed, which is 0.

    Args:
        programs: source texts. They see Python's standard library and an empty folder, and no package installed beside it.
        limits: of each program.
        workers: programs at the same time; one per core if None.
        unsafe: run them even where they cannot be confined, and then with all rights of this process.

    Raises:
        EvaluationError: programs cannot be confined here and `unsafe` was not said, or there is no POSIX system at all.
    """
    if workers is not None and workers < 1:
        raise EvaluationError(f"{workers} workers", where="workers", fix="give 1 or more")
    if not programs:
        return []
    with ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="loralab-")) if unsafe else ""
        nurseries = [
            stack.enter_context(_Nursery(limits, folder, unsafe)) for _ in range(min(workers or cores(), len(programs)))
        ]
        for nursery in nurseries:
            nursery.check()
        return _share_out(programs, nurseries)


def _share_out(programs: Sequence[str], nurseries: Sequence["_Nursery"]) -> list[Outcome]:
    """Give every nursery that is free the next program, until all have ended."""
    waiting = deque(enumerate(programs))
    outcomes: dict[int, Outcome] = {}
    with selectors.DefaultSelector() as selector:
        for nursery in nurseries:
            selector.register(nursery.answers, selectors.EVENT_READ, nursery)
            nursery.give(*waiting.popleft())
        while len(outcomes) < len(programs):
            ready = [key.data for key, _ in selector.select(timeout=1.0)]
            for nursery in nurseries:
                if nursery not in ready and not nursery.is_overdue():
                    continue
                index, outcome = nursery.take(wait=nursery in ready)
                if outcome is None:  # a program took its nursery along, or the machine did
                    outcome = Outcome(False, "the sandbox ended with it", nursery.limits.wall_s, "")
                    selector.unregister(nursery.answers)
                    nursery.stop()
                    nursery.start()
                    nursery.check()
                    selector.register(nursery.answers, selectors.EVENT_READ, nursery)
                outcomes[index] = outcome
                if waiting:
                    nursery.give(*waiting.popleft())
    return [outcomes[index] for index in range(len(programs))]


class _Nursery:
    """A process of `nursery.py`, with at most one program in it. A context manager, at whose end nothing of it is left."""

    def __init__(self, limits: Limits, folder: str, unsafe: bool) -> None:
        self.limits, self.folder, self.unsafe = limits, folder, unsafe
        self.index, self.deadline = -1, math.inf

    def start(self) -> None:
        """Start the process, in a session of its own, so that Ctrl-C reaches it through us."""
        if os.name != "posix":
            raise EvaluationError("programs cannot be run on this system", where=os.name, fix="use Linux")
        root = str(Path(__file__).parents[2])
        said = {"limits": asdict(self.limits), "folder": self.folder, "parent": os.getpid(), "unsafe": self.unsafe}
        libraries = {name: value for name, value in os.environ.items() if name == "LD_LIBRARY_PATH"}
        self.errors = tempfile.TemporaryFile()  # noqa: SIM115 (closed in `stop`)
        try:
            self.process = subprocess.Popen(
                [sys.executable, "-P", "-s", "-S", "-c", BOOT, root, json.dumps(said)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self.errors,
                env={"PYTHONHASHSEED": "0", "PYTHONUTF8": "1", "LC_ALL": "C.UTF-8", **libraries},
                cwd="/",
                start_new_session=True,
            )
        except OSError as error:
            self.errors.close()
            fix = "repair the installation of Python, or free memory and processes"
            raise EvaluationError(
                f"Python cannot be started: {error.strerror}", where=sys.executable, fix=fix
            ) from error
        assert self.process.stdin and self.process.stdout
        self.jobs, self.answers = self.process.stdin, self.process.stdout

    def refused(self) -> str | None:
        """Read the first answer: what protection is missing, or None."""
        with selectors.DefaultSelector() as selector:
            selector.register(self.answers, selectors.EVENT_READ)
            if not selector.select(PATIENCE_S):
                return "its process does not answer"
        answer = self._receive()
        if answer is None:
            self.errors.seek(0)
            lines = self.errors.read().decode(errors="replace").split("\n")
            return f"its process ended at the start: {' '.join(lines[-2:]).strip() or 'no message'}"
        refused: str | None = answer["refused"]
        return refused

    def check(self) -> None:
        """Raise EvaluationError if programs would not be confined."""
        if (missing := self.refused()) is not None:
            raise EvaluationError(
                f"programs cannot be {'run' if self.unsafe else 'confined'} on this machine: {missing}",
                where="sandbox",
                fix="use Linux 5.14 or newer where user namespaces are allowed (in a container: allow them), or, "
                "if you trust the programs with all that you may do yourself, say --unsafe",
            )

    def give(self, index: int, text: str) -> None:
        """Send a program; if the process is gone, `take` will tell."""
        self.index, self.deadline = index, time.monotonic() + self.limits.wall_s + PATIENCE_S
        body = text.encode(errors="surrogatepass")
        with suppress(BrokenPipeError):
            self.jobs.write(LENGTH.pack(len(body)) + body)
            self.jobs.flush()

    def take(self, *, wait: bool) -> tuple[int, Outcome | None]:
        """Give the index of the program and how it ended; None if the process ended, or does not answer and is not waited for."""
        index, answer = self.index, self._receive() if wait else None
        self.index, self.deadline = -1, math.inf
        return index, None if answer is None else Outcome(**answer)

    def is_overdue(self) -> bool:
        return time.monotonic() > self.deadline

    def _receive(self) -> dict[str, Any] | None:
        head = self.answers.read(LENGTH.size)
        body = self.answers.read(*LENGTH.unpack(head)) if len(head) == LENGTH.size else b""
        return json.loads(body) if body else None

    def stop(self) -> None:
        """End the process and all programs: it does so itself when its jobs end, or else is killed."""
        with suppress(BrokenPipeError):
            self.jobs.close()
        try:
            self.process.wait(timeout=END_S)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self.answers.close()
        self.errors.close()

    def __enter__(self) -> "_Nursery":
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()
