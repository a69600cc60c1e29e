"""Programs that mean harm: none gets out, none lasts, none is left, none passes, and those between them run as ever.

`hostile_programs.txt`, `forging_programs.txt` and `endless_programs.txt` list them. What they did is looked at from outside: a
folder and a file, listening sockets, a process, shared memory, mounts. Not among them, as it is Python that any test lets
through: an answer whose `__eq__` is always true.
"""

import os
import re
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from confinement import need_confinement
from loralab.evals.sandbox import Limits, Outcome, run_programs

MIB = 1 << 20
LIMITS = Limits(1, 20, 192 * MIB, 6, 2 * MIB, 8 * MIB, 64 * 1024)
BRIEF = Limits(1, 0.5, 192 * MIB, 6, 2 * MIB, 8 * MIB, 64 * 1024)
GOOD = "assert sorted([2, 1]) == [1, 2]"
SECRET = "canary-5d1f0c"
REPOSITORY = Path(__file__).parents[2]
ATTEMPT = """
succeeded = []
def attempt(name, action, *values):
    try: result = action(*values)
    except BaseException: return
    if result != -1: succeeded.append(name)
"""
CONCLUDE = "\nraise AssertionError(f'succeeded: {succeeded}')\n"


def sections(name: str) -> list[tuple[str, str]]:
    """Read the programs of a file, with their headings."""
    parts = Path(__file__).with_name(name).read_text().split("\n### ")[1:]
    return [(heading, text) for heading, _, text in (part.partition("\n") for part in parts)]


def ending() -> dict[str, tuple[str, str]]:
    """Read the programs that end, by name: text and expected reason."""
    found = {}
    for heading, text in [*sections("hostile_programs.txt"), *sections("forging_programs.txt")]:
        name, _, reason = heading.partition(" => ")
        found[name] = (f"{ATTEMPT}{text}{CONCLUDE}" if "attempt(" in text else text, reason)
    return found


ENDING, ENDLESS = ending(), dict(sections("endless_programs.txt"))


@dataclass
class Outside:
    """What lies outside of the sandbox, as it is before and must be after."""

    folder: Path
    somebody: subprocess.Popen[bytes]
    listening: list[socket.socket]

    def filled(self, program: str) -> str:
        """Put names of what lies outside in place of the words in capitals."""
        names = {
            "CANARY": str(self.folder / "canary"),
            "FOLDER": str(self.folder),
            "REPOSITORY": str(REPOSITORY),
            "PORT": str(self.listening[0].getsockname()[1]),
            "SOCKET": str(self.folder / "socket"),
            "ABSTRACT": SECRET,
            "PID": str(self.somebody.pid),
        }
        return re.sub(r"\b(" + "|".join(names) + r")\b|(?<=[.a-z])CANARY", lambda m: names[m[0]], program)

    def check(self) -> None:
        """Assert that nothing was touched or reached."""
        assert (self.folder / "canary").read_text() == SECRET
        assert sorted(path.name for path in self.folder.iterdir()) == ["canary", "socket"]
        assert self.somebody.poll() is None
        for one in self.listening:
            with pytest.raises(BlockingIOError):
                one.accept() if one.type == socket.SOCK_STREAM else one.recv(99)


def left_over() -> list[str]:
    """List the processes that our sandbox started: their command line names this process."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = path.read_bytes()
        except OSError:
            continue
        if f'"parent": {os.getpid()},'.encode() in words:
            found.append(path.parent.name)
    return found


def lasting() -> dict[str, object]:
    """Say what else could be left behind on a Linux machine."""
    sysv = {kind: Path("/proc/sysvipc", kind).read_text().count("\n") for kind in ("shm", "sem", "msg")}
    mounts = len(Path("/proc/self/mountinfo").read_text().splitlines())
    host = os.uname().nodename
    escaped = [
        str(p) for d in ("/", "/tmp", "/var/tmp", "/dev/shm", str(Path.home())) for p in Path(d).glob("*5d1f0c*")
    ]
    return {**sysv, "mounts": mounts, "host": host, "escaped": escaped}


@pytest.fixture
def outside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Outside]:
    need_confinement()
    monkeypatch.setenv("LORALAB_CANARY", SECRET)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "canary").write_text(SECRET)
    kinds = [
        (socket.AF_INET, socket.SOCK_STREAM, ("127.0.0.1", 0)),
        (socket.AF_UNIX, socket.SOCK_DGRAM, "socket"),
        (socket.AF_UNIX, socket.SOCK_DGRAM, "\0" + SECRET),
    ]
    listening = []
    for family, kind, where in kinds:
        one = socket.socket(family, kind)
        one.bind(where)
        one.setblocking(False)
        listening.append(one)
    listening[0].listen()
    before = lasting()
    somebody = subprocess.Popen([sys.executable, "-S", "-c", "import time; time.sleep(600)"])
    around = Outside(tmp_path, somebody, listening)
    try:
        yield around
        around.check()
        assert left_over() == []
        assert lasting() == before
    finally:
        somebody.kill()
        somebody.wait()
        for one in listening:
            one.close()


def with_good_between(programs: list[str], limits: Limits) -> list[Outcome]:
    """Run programs with a good one behind each, which must pass; give the outcomes of the others."""
    mixed = [text for program in programs for text in (program, GOOD)]
    outcomes = run_programs(mixed, limits, workers=2)
    assert {outcome.reason for outcome in outcomes[1::2]} == {"passed"}
    return outcomes[::2]


def test_enough_programs_mean_harm() -> None:
    assert len(ENDING) + len(ENDLESS) >= 60
    assert len({text for text, _ in ENDING.values()} | set(ENDLESS.values())) == len(ENDING) + len(ENDLESS)


def test_hostile_programs_fail_and_nothing_is_left(outside: Outside) -> None:
    outcomes = with_good_between([outside.filled(text) for text, _ in ENDING.values()], LIMITS)
    seen = {name: outcome.reason for name, outcome in zip(ENDING, outcomes, strict=True)}
    assert [name for name, outcome in zip(ENDING, outcomes, strict=True) if outcome.passed] == []
    unexpected = {name: seen[name] for name, (_, reason) in ENDING.items() if not re.search(reason, seen[name])}
    assert unexpected == {}
    assert not any(SECRET in outcome.output.replace("escaped-5d1f0c", "") for outcome in outcomes)


def test_endless_programs_are_ended(outside: Outside) -> None:
    began = time.monotonic()
    outcomes = with_good_between(list(ENDLESS.values()), BRIEF)
    took = {name: outcome.reason for name, outcome in zip(ENDLESS, outcomes, strict=True)}
    assert set(took.values()) <= {"timed out", "out of CPU time"}, took
    assert time.monotonic() - began < len(ENDLESS) * 20
