"""A nursery: a confined process that forks one process for each program, watches it, and says how it ended.

`sandbox.py` starts it, without site packages, and sends it programs; one runs at a time. Forking takes a fraction of the time
that a new interpreter takes, and each program is confined by itself: its own PID namespace, scratch folder and limits.

**What tells that a program passed.** Its process holds 16 random bytes and sends them when its last line has run; nothing else
counts, so a program that leaves early, prints, writes to every open file or changes builtins or `os` does not pass. The bytes are
kept where walks over frames, globals and objects do not come by (tried with CPython 3.11 to 3.13). A program that goes through the
memory of its own process (with `ctypes`, say) can find them: only tests in another process would close that. What fools a test
in plain Python, as an answer whose `__eq__` is always true, fools it here too.
"""

import gc
import json
import linecache
import os
import secrets
import select
import shutil
import signal
import stat
import struct
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field, replace
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any, BinaryIO, NoReturn

from loralab.evals import confine

OFTEN_IMPORTED = """
bisect cmath collections copy datetime decimal enum fractions functools hashlib heapq itertools json math operator random re
statistics string typing unittest
"""
"""Imported before the first program, once for all."""
NAME = "<program>"
VERDICT = 3
"""The open file through which a program's process says how it went."""
MOST_SAID = 64 * 1024
"""Bytes through it; more count as printing without end."""
LONGEST_REASON = 300
LONGEST_WAIT_S = 3600.0
MANY_FILES = 1 << 16
OUR_PROCESSES = 3
"""Count against the limit where all are the same user: the one waiting outside, the nursery, process 1 beside the program."""
KEPT = 2000
"""Characters of the output that are kept, half of them its end."""
LENGTH = struct.Struct(">I")
TRIAL = """
import colorsys, os, socket
open("scratch", "w").close()
for forbidden in (lambda: open("/outside", "w"), socket.socket, lambda: os.execv("/bin/true", ["true"]), os.fork):
    try:
        forbidden() and forbidden()  # of two processes that are allowed, it is one itself
    except OSError:
        pass
    else:
        raise SystemExit(f"{forbidden} was not refused")
"""
"""Runs before the first program, to see that Python's library is there, and that what lies outside is not."""


@dataclass(frozen=True)
class Setting:
    """`sandbox.Limits`, and who programs are (`confine.enter`), or None without confinement, when scratch lies in `folder`."""

    cpu_s: float
    wall_s: float
    memory_bytes: int
    processes: int
    file_bytes: int
    scratch_bytes: int
    output_bytes: int
    folder: str
    user: int | None = None


AT_TRIAL = {"cpu_s": 10.0, "wall_s": 20.0, "memory_bytes": 1 << 30, "processes": 2, "output_bytes": MOST_SAID}


@dataclass
class Program:
    """What a program's own process needs: the text and, to be taken out, what it must say to pass."""

    text: str
    secret: list[bytes]


@dataclass
class Watched:
    """A program's process as the nursery sees it: process 1 beside it, open files to read from, and what was read."""

    process: int
    first: int | None
    scratch: str
    output: int
    verdict: int
    secret: bytes
    began: float
    printed: bytearray = field(default_factory=bytearray)
    said: bytearray = field(default_factory=bytearray)
    stopped: str | None = None
    end: tuple[int, float] | None = None


def main(limits: dict[str, Any], folder: str, parent: int, unsafe: bool) -> None:
    """Serve until there are no more programs. The first answer, `{"refused": ...}`, says what protection is missing, or null."""
    confine.die_with_parent()
    if os.getppid() != parent:
        return
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # what the one who started us does with signals is inherited
    signal.pthread_sigmask(signal.SIG_SETMASK, ())
    jobs, answers = _claim(0, os.O_RDONLY, "rb"), _claim(1, os.O_WRONLY, "wb")
    with suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text("1000")  # if memory runs out, first a program's is taken
    for name in OFTEN_IMPORTED.split():
        import_module(name)
    setting = Setting(**limits, folder=folder)
    try:
        if not unsafe:
            setting = replace(setting, user=confine.enter())
    except confine.Refused as error:
        return _send(answers, {"refused": str(error)})
    if unsafe:
        _send(answers, {"refused": None})
    wake = _wake_at_ends()
    compile("", NAME, "exec")  # the first one makes a hundred types
    gc.collect()
    gc.freeze()  # no collector of a program looks at what is here, so pages stay shared
    for text in _texts(jobs, [] if unsafe else [TRIAL]):
        its = replace(setting, **AT_TRIAL) if text is TRIAL else setting  # type: ignore[arg-type]
        started = start(text, its)
        if isinstance(started, Program):
            run(started)
        answer = watch(started, its, jobs.fileno(), wake)
        if text is TRIAL:
            answer = {"refused": None if answer["passed"] else f"a trial program {answer['reason']}"}
        _send(answers, answer)


def start(text: str, setting: Setting) -> Watched | Program:
    """Fork a program's process; there it returns the program, confined and ready to run, here what is to be watched."""
    secret = secrets.token_bytes(16)
    scratch = _make_scratch(setting)
    (output, output_end), (verdict, verdict_end) = os.pipe(), os.pipe()
    first = None if setting.user is None else confine.new_pids()
    process = os.fork() if first is None else confine.fork_among(first)
    if process == 0:
        try:
            _settle(setting, scratch, output_end, verdict_end)
        except BaseException as error:
            os.write(verdict_end, f"could not be confined: {error!r}".encode())
            os._exit(1)
        return Program(text, [secret])
    for end in (output_end, verdict_end):
        os.close(end)
    for end in (output, verdict):
        os.set_blocking(end, False)
    return Watched(process, first, scratch, output, verdict, secret, time.monotonic())


def _settle(setting: Setting, scratch: str, output: int, verdict: int) -> None:
    """Make this process the program's: its files, folder, limits and rights, and nothing of the nursery's."""
    os.setsid()
    signal.set_wakeup_fd(-1)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    for mine, number in ((output, 1), (output, 2), (verdict, VERDICT)):
        os.dup2(mine, number)
    os.closerange(VERDICT + 1, MANY_FILES)
    os.chdir(scratch)
    os.environ.clear()
    sys.argv[:] = [""]
    tempfile.tempdir = scratch
    for name in [name for name in sys.modules if name.startswith("loralab")]:
        del sys.modules[name]
    own = OUR_PROCESSES if setting.user == 0 else 0
    limits = setting.cpu_s, setting.memory_bytes, setting.processes + own, setting.file_bytes
    if setting.user is None:
        confine.die_with_parent()
        confine.limit(*limits, strict=False)
    else:
        confine.limit(*limits)
        confine.give_up_rights(setting.user)


def run(program: Program) -> NoReturn:
    """Run a program in this process, say how it went, and end.

    While the program runs, the secret lies on the stack of this frame's evaluation alone: no name, list or closure holds it.
    """
    write, leave, me, who = os.write, os._exit, os.getpid(), os.getpid
    secret, flush = program.secret, (sys.stdout.flush, sys.stderr.flush)
    sys.modules["__main__"] = main_module = ModuleType("__main__")
    said = b""
    try:
        code = compile(program.text, NAME, "exec", dont_inherit=True)
        said = (secret.pop(), exec(code, main_module.__dict__), _quietly(flush))[0]  # type: ignore[func-returns-value]
    except MemoryError:
        said = b"MemoryError"
    except BaseException as error:
        _quietly(flush)
        said = _describe(error, program.text)
    finally:
        if who() == me:  # a copy of the process that comes to the end as well has nothing to say
            write(VERDICT, said)
        leave(0)


def _quietly(actions: Iterable[Callable[[], None]]) -> None:
    for action in actions:
        with suppress(Exception):
            action()


def _describe(error: BaseException, text: str) -> bytes:
    """Print an error as Python does, from the program's first frame on, and give its kind and first line."""
    try:
        linecache.cache[NAME] = (len(text), None, text.splitlines(keepends=True), NAME)
        steps = error.__traceback__.tb_next if error.__traceback__ else None
        shown = "".join(traceback.format_exception(type(error), error, steps, limit=-8))
        os.write(2, shown[-5 * KEPT :].encode(errors="replace"))
        first = str(error).strip().partition("\n")[0]
        return f"{type(error).__name__}: {first}".removesuffix(": ")[:LONGEST_REASON].encode(errors="replace")
    except BaseException:
        return b"an error that cannot be printed"


def watch(one: Watched, setting: Setting, jobs: int, wake: int) -> dict[str, Any]:
    """Wait for the end of a program, or bring it about, and give the fields of its `sandbox.Outcome`.

    If nobody is there any more to send programs, the program and the nursery end at once.
    """
    poll = select.poll()
    for handle in (one.output, one.verdict, wake):
        poll.register(handle, select.POLLIN)
    poll.register(jobs, 0)  # the far end closed is always told
    while one.stopped is None and not _has_ended(one, os.WNOHANG):
        left = one.began + setting.wall_s - time.monotonic()
        if left <= 0:
            one.stopped = "timed out"
        for handle, _ in poll.poll(1 + 1000 * min(max(0.0, left), LONGEST_WAIT_S)):
            if handle == jobs:
                _finish(one)
                raise SystemExit
            if handle == wake:
                os.read(wake, 4096)
            elif not _read(one, handle, setting):
                poll.unregister(handle)
    status, cpu_s = _finish(one)
    seconds = time.monotonic() - one.began
    for handle in (one.output, one.verdict):
        while one.stopped is None and _read(one, handle, setting):
            pass
        os.close(handle)
    passed, reason = _verdict(one, status, cpu_s >= setting.cpu_s)
    return {"passed": passed, "reason": reason, "seconds": seconds, "output": _shorten(one.printed)}


def _read(one: Watched, handle: int, setting: Setting) -> bool:
    """Take what a program printed or said; false if there is nothing, now or for good."""
    try:
        chunk = os.read(handle, MOST_SAID)
    except BlockingIOError:
        return False
    into, most = (one.printed, setting.output_bytes) if handle == one.output else (one.said, MOST_SAID)
    into += chunk
    if len(into) > most:
        one.stopped = "output limit"
    return bool(chunk)


def _has_ended(one: Watched, options: int) -> bool:
    if one.end is None:
        process, status, usage = os.wait4(one.process, options)
        one.end = (status, usage.ru_utime + usage.ru_stime) if process else None
    return one.end is not None


def _finish(one: Watched) -> tuple[int, float]:
    """Kill a program with all that it started, take its scratch folder away, and give its status and CPU time in s.

    With confinement, process 1 of its PID namespace is killed, and the wait lasts until the kernel has ended all others there.
    Without, it is the process group, which a program can leave.
    """
    if one.end is None:
        os.kill(one.process, signal.SIGKILL)
    if one.first is None:
        with suppress(ProcessLookupError, PermissionError):  # nobody is left, or it had not become a group yet
            os.killpg(one.process, signal.SIGKILL)
    else:
        os.kill(one.first, signal.SIGKILL)
    _has_ended(one, 0)
    if one.first is None:
        shutil.rmtree(one.scratch, onerror=_make_writable)
    else:
        os.waitpid(one.first, 0)
        confine.unmount_scratch()
    assert one.end is not None
    return one.end


def _verdict(one: Watched, status: int, used_up: bool) -> tuple[bool, str]:
    """Say whether a program passed, and what happened."""
    if one.stopped:
        return False, one.stopped
    if secrets.compare_digest(bytes(one.said), one.secret):
        return True, "passed"
    if os.WIFSIGNALED(status):
        number = os.WTERMSIG(status)
        if number == signal.SIGXCPU or (number == signal.SIGKILL and used_up):
            return False, "out of CPU time"
        return False, f"killed by signal {number} ({signal.strsignal(number)})"
    said = bytes(one.said[:LONGEST_REASON]).decode(errors="replace")
    if said == "MemoryError":
        return False, "out of memory"
    if said:
        return False, "failed: " + "".join(letter if letter.isprintable() else " " for letter in said)
    return False, f"left before its last line with exit code {os.waitstatus_to_exitcode(status)}"


def _shorten(printed: bytearray) -> str:
    text = printed.decode(errors="replace")
    return text if len(text) <= KEPT else f"{text[: KEPT // 2]}\n…\n{text[-KEPT // 2 :]}"


def _make_scratch(setting: Setting) -> str:
    if setting.user is None:
        return tempfile.mkdtemp(dir=setting.folder)
    confine.mount_scratch(setting.scratch_bytes, setting.user)
    return confine.SCRATCH


def _make_writable(again: Callable[..., Any], path: str, _: Any) -> None:
    """Remove what a program took the rights to remove away from."""
    with suppress(OSError):
        os.chmod(os.path.dirname(path), stat.S_IRWXU)
        os.chmod(path, stat.S_IRWXU, follow_symlinks=False)
        again(path)


def _wake_at_ends() -> int:
    """Give a file that can be read whenever a child has ended, for `poll`."""
    reader, writer = os.pipe()
    for end in (reader, writer):
        os.set_blocking(end, False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    return reader


def _claim(number: int, mode: int, kind: str) -> Any:
    """Move an open file out of a program's way: what it opens as standard input or output is nobody's."""
    mine = os.fdopen(os.dup(number), kind)
    nothing = os.open(os.devnull, mode)
    os.dup2(nothing, number)
    os.close(nothing)
    return mine


def _texts(jobs: BinaryIO, first: list[str]) -> Iterator[str]:
    """Yield the texts of programs until there are no more."""
    yield from first
    while len(head := jobs.read(LENGTH.size)) == LENGTH.size:
        yield jobs.read(*LENGTH.unpack(head)).decode(errors="surrogatepass")


def _send(answers: BinaryIO, answer: dict[str, Any]) -> None:
    body = json.dumps(answer).encode()
    answers.write(LENGTH.pack(len(body)) + body)
    answers.flush()
