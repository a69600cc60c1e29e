"""The sandbox with programs that mean no harm, without protection, and when somebody else ends it. For harm see tests/faults."""

import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import pytest

from confinement import need_confinement
from loralab.errors import EvaluationError
from loralab.evals import sandbox, seccomp
from loralab.evals.sandbox import Limits, Protection, protection, run_programs

QUICK = Limits(cpu_s=1, wall_s=20, memory_bytes=256 << 20, output_bytes=4096)
IDLE = "import os, time\nfor _ in range(3): os.fork() or time.sleep(600)\ntime.sleep(600)"
HERE = 7
"""Processes of a worker that runs it: one outside that waits, nursery, process 1, program, its three children."""
PATIENCE_S = 30.0


@pytest.fixture
def confined() -> None:
    need_confinement()


@pytest.fixture(params=["confined", "unsafe"])
def unsafe(request: pytest.FixtureRequest) -> bool:
    if request.param == "confined":
        request.getfixturevalue("confined")
    return bool(request.param == "unsafe")


def of(parent: int) -> list[int]:
    """List the processes of the sandbox that a process started."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = path.read_bytes()
        except OSError:
            continue
        if f'"parent": {parent},'.encode() in words:
            found.append(int(path.parent.name))
    return sorted(found)


def wait_for(parent: int, least: int, most: int) -> list[int]:
    """Wait until a process has so many processes of the sandbox."""
    end = time.monotonic() + PATIENCE_S
    while not least <= len(found := of(parent)) <= most:
        assert time.monotonic() < end, found
        time.sleep(0.01)
    return found


def test_protection_is_complete_where_it_can_be(confined: None) -> None:
    assert protection() == Protection(True, None)


def test_protection_says_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "/nowhere/python")
    assert protection() == Protection(False, "Python cannot be started: No such file or directory")
    assert str(Protection(True, None)) == "programs are confined"
    assert str(Protection(False, "seccomp: none")) == "programs cannot be confined: seccomp: none"


REASONS = {
    "": "passed",
    "x = 1\nassert x == 1": "passed",
    "if __name__ == '__main__': 1 / 0": "failed: ZeroDivisionError: division by zero",
    "assert False, 'two\\nlines'": "failed: AssertionError: two",
    "raise KeyError": "failed: KeyError",
    "def f(:": "failed: SyntaxError: invalid syntax (<program>, line 1)",
    "x = '\ud800'": "failed: UnicodeEncodeError",
    "a\0b": "failed: SyntaxError: source code string cannot contain null bytes",
    "# coding: latin-1\nassert len('é') == 1": "passed",
    "input()": "failed: EOFError: EOF when reading a line",
    "raise SystemExit(3)": "failed: SystemExit: 3",
    "import os; os._exit(3)": "left before its last line with exit code 3",
    "import os; os.kill(os.getpid(), 15)": "killed by signal 15 (Terminated)",
    "x = [0] * 10**9": "out of memory",
    "print('y' * 5000)": "output limit",
    "while True: pass": "out of CPU time",
    "import torch": "failed: ModuleNotFoundError: No module named 'torch'",
    "raise type('Odd\\x1b[31m', (Exception,), {})('\\x1b[31mred')": "failed: Odd [31m:  [31mred",
}


def test_the_reason_tells_how_a_program_ended(unsafe: bool) -> None:
    outcomes = run_programs(list(REASONS), QUICK, unsafe=unsafe)
    for (text, reason), outcome in zip(REASONS.items(), outcomes, strict=True):
        assert outcome.reason.startswith(reason), (text, outcome)
        assert outcome.passed == (reason == "passed")
        assert 0 < outcome.seconds < QUICK.wall_s


def test_outcomes_come_in_the_order_of_the_programs(unsafe: bool) -> None:
    programs = [f"import time\ntime.sleep({0.2 * (i == 0)})\nprint({i})\nassert {i} % 3" for i in range(20)]
    for workers in (1, 3):
        outcomes = run_programs(programs, QUICK, workers=workers, unsafe=unsafe)
        assert [outcome.output.split("\n")[0] for outcome in outcomes] == [str(i) for i in range(20)]
        assert [outcome.passed for outcome in outcomes] == [i % 3 != 0 for i in range(20)]


def test_programs_do_not_see_each_other_or_us(unsafe: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECRET_OF_OURS", "1")
    look = """
        import os, sys, tempfile
        assert dict(os.environ) == {} and os.listdir() == [] and sys.argv == [""]
        assert not [name for name in sys.modules if name.startswith("loralab")]
        assert os.path.samefile(tempfile.gettempdir(), ".")
        open("left here", "w").close(); os.mkdir("folder"); open("folder/file", "w").close(); os.chmod("folder", 0)
        sys.modules["math"] = os.left = __builtins__
    """
    outcomes = run_programs([textwrap.dedent(look)] * 4, QUICK, workers=1, unsafe=unsafe)
    assert [outcome.reason for outcome in outcomes] == ["passed"] * 4


def test_a_scratch_folder_without_protection_is_deleted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    program = "import os\nos.mkdir('a'); open('a/b', 'w').close(); os.chmod('a', 0); print(os.getcwd())"
    (outcome,) = run_programs([program], QUICK, unsafe=True)
    assert outcome.passed and outcome.output.startswith(str(tmp_path))
    assert list(tmp_path.iterdir()) == []


def test_ordinary_programs_run(confined: None) -> None:
    programs = [
        "import threading\nx = []\nt = threading.Thread(target=x.append, args=(1,)); t.start(); t.join()\nassert x == [1]",
        "import asyncio\nasync def f():\n    await asyncio.sleep(0.01)\n    return 2\nassert asyncio.run(f()) == 2",
        "import tempfile\nwith tempfile.TemporaryFile() as f: f.write(b'x' * 10**6)",
        "import multiprocessing as m\nwith m.get_context('fork').Pool(2) as p: assert p.map(abs, [-1, -2]) == [1, 2]",
        "import hashlib, random, decimal, sqlite3, zlib, lzma, csv, ssl\nassert hashlib.md5(b'').hexdigest()[:4] == 'd41d'",
        "import dataclasses, pickle\n@dataclasses.dataclass\nclass A: x: int\nassert pickle.loads(pickle.dumps(A(1))) == A(1)",
        "import signal\ndef stop(*_): raise TimeoutError\nsignal.signal(signal.SIGALRM, stop)\n"
        "try:\n    signal.setitimer(0, 0.01)\n    while True: pass\nexcept TimeoutError: pass",
        "import io, contextlib, unittest\nclass T(unittest.TestCase):\n    def test(self): self.assertEqual(1, 1)\n"
        "with contextlib.redirect_stderr(io.StringIO()): assert unittest.main(exit=False).result.wasSuccessful()",
        "import os, socket\nassert os.getuid() != 0 or not open('/proc/self/status')",
    ]
    outcomes = run_programs(programs, Limits(wall_s=60))
    failed = [(text, outcome) for text, outcome in zip(programs[:-1], outcomes, strict=False) if not outcome.passed]
    assert failed == [], "\n".join(f"{text}\n{outcome.reason}\n{outcome.output}" for text, outcome in failed)


def test_the_output_is_kept_at_both_ends(unsafe: bool) -> None:
    loud = "import sys\nprint('begin', 'x' * 3000, flush=True)\nsys.stderr.write('end')"
    quiet = "print('ä')\nassert False"
    outcomes = run_programs([loud, quiet], QUICK, unsafe=unsafe)
    assert outcomes[0].output.startswith("begin xxx") and outcomes[0].output.endswith("xxx\nend")
    assert len(outcomes[0].output) == 2003 and "\n…\n" in outcomes[0].output
    assert outcomes[1].output.startswith("ä\nTraceback") and "    assert False\n" in outcomes[1].output


def test_hashes_are_the_same_in_every_run(unsafe: bool) -> None:
    first, second = (run_programs(["print(hash('text'), {*'abc'})"], QUICK, unsafe=unsafe) for _ in range(2))
    assert first[0].output == second[0].output


def test_limits_hold_without_protection() -> None:
    limits = Limits(cpu_s=5, wall_s=0.5, file_bytes=1000)
    programs = ["import time; time.sleep(600)", "with open('f', 'wb') as f: f.write(bytes(2000))", "assert True"]
    outcomes = run_programs(programs, limits, unsafe=True)
    assert [outcome.reason for outcome in outcomes] == [
        "timed out",
        "failed: OSError: [Errno 27] File too large",
        "passed",
    ]


def test_a_process_group_is_killed_without_protection() -> None:
    program = (
        "import os, time\nif os.fork() == 0:\n    print('child', flush=True)\n    time.sleep(600)\ntime.sleep(0.1)"
    )
    (outcome,) = run_programs([program], QUICK, unsafe=True)
    assert outcome.passed and outcome.output == "child\n"
    wait_for(os.getpid(), 0, 0)


@pytest.mark.parametrize(
    "field", ["cpu_s", "wall_s", "memory_bytes", "processes", "file_bytes", "scratch_bytes", "output_bytes"]
)
def test_a_limit_of_nothing_or_without_end_is_refused(field: str) -> None:
    with pytest.raises(EvaluationError, match="a limit of 0") as caught:
        Limits(**{field: 0})
    assert caught.value.where == field
    with pytest.raises(EvaluationError, match="a limit of inf"):
        Limits(cpu_s=float("inf"))


def test_no_workers_are_refused_and_no_programs_are_fine() -> None:
    with pytest.raises(EvaluationError, match="0 workers"):
        run_programs(["pass"], workers=0)
    assert run_programs([]) == []


def test_programs_are_refused_if_python_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "/nowhere/python")
    with pytest.raises(EvaluationError, match="No such file"):
        run_programs(["pass"])
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with pytest.raises(EvaluationError, match="ended at the start"):
        run_programs(["pass"], unsafe=True)


# Goes to a place where user namespaces are used up, as in a container that forbids them, and runs programs there.
WITHOUT_NAMESPACES = """
import ctypes, os, sys
from pathlib import Path
from loralab.errors import EvaluationError
from loralab.evals.sandbox import protection, run_programs
mine, group = os.getuid(), os.getgid()
assert ctypes.CDLL(None).unshare(0x10000000) == 0
Path("/proc/self/uid_map").write_text(f"0 {mine} 1")
Path("/proc/self/setgroups").write_text("deny")
Path("/proc/self/gid_map").write_text(f"0 {group} 1")
Path("/proc/sys/user/max_user_namespaces").write_text("0")
print(protection().complete)
try:
    run_programs(["print(1)"])
except EvaluationError as error:
    print(error)
print(run_programs(["print(1)"], unsafe=True)[0].reason)
"""
# As root under no other name the kernel does not count processes, so the trial program must find that out.
WITHOUT_A_SECOND_USER = WITHOUT_NAMESPACES.replace('Path("/proc/sys/user/max_user_namespaces").write_text("0")\n', "")


def test_without_namespaces_programs_are_refused_unless_unsafe(confined: None) -> None:
    done = subprocess.run([sys.executable, "-c", WITHOUT_NAMESPACES], capture_output=True, text=True, timeout=60)
    lines = done.stdout.splitlines()
    assert lines[0] == "False", done.stderr
    assert lines[1] == "programs cannot be confined on this machine: user namespaces: No space left on device"
    assert lines[2] == "  where: sandbox" and "--unsafe" in lines[3]
    assert lines[4] == "passed"


@pytest.mark.skipif(os.getuid() != 0, reason="only the processes of the machine's own root are not counted")
def test_where_processes_cannot_be_limited_programs_are_refused(confined: None) -> None:
    done = subprocess.run([sys.executable, "-c", WITHOUT_A_SECOND_USER], capture_output=True, text=True, timeout=60)
    assert "a trial program failed: SystemExit: " in done.stdout and "fork" in done.stdout, done


# In a user namespace, its root may name the host; without rights it may not.
WITHOUT_RIGHTS = """
import ctypes
from loralab.evals import confine
libc = ctypes.CDLL(None, use_errno=True)
assert libc.unshare(0x10000000 | 0x4000000) == 0 and libc.sethostname(b"before", 6) == 0
confine.give_up_rights(0)
assert libc.sethostname(b"after", 5) == -1 and ctypes.get_errno() == 1
"""


def test_rights_are_given_up_where_the_user_stays_the_same(confined: None) -> None:
    done = subprocess.run([sys.executable, "-c", WITHOUT_RIGHTS], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


RUNNING = f"from loralab.evals.sandbox import run_programs\nrun_programs([{IDLE!r}] * 4, workers=2)"


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_programs_end_with_the_one_who_started_them(how: signal.Signals, confined: None) -> None:
    parent = subprocess.Popen([sys.executable, "-c", RUNNING], stderr=subprocess.PIPE)
    wait_for(parent.pid, 2 * HERE, 2 * HERE)
    parent.send_signal(how)
    _, errors = parent.communicate(timeout=PATIENCE_S)
    assert (b"KeyboardInterrupt" in errors) == (how == signal.SIGINT)
    wait_for(parent.pid, 0, 0)


def test_if_a_nursery_is_killed_the_others_go_on(confined: None) -> None:
    def kill_nursery() -> None:
        outside, *_ = wait_for(os.getpid(), HERE, HERE)
        os.kill(outside, signal.SIGKILL)

    killer = threading.Thread(target=kill_nursery)
    killer.start()
    outcomes = run_programs([IDLE, "pass", "assert False"], Limits(wall_s=15), workers=1)
    killer.join()
    assert [outcome.reason for outcome in outcomes] == ["the sandbox ended with it", "passed", "failed: AssertionError"]
    assert of(os.getpid()) == []


def test_a_nursery_that_does_not_answer_is_given_up(confined: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sandbox, "PATIENCE_S", 2.0)
    monkeypatch.setattr(sandbox, "END_S", 0.2)

    def stop_nursery() -> None:
        _, nursery, *_ = wait_for(os.getpid(), HERE, HERE)
        os.kill(nursery, signal.SIGSTOP)

    stopper = threading.Thread(target=stop_nursery)
    stopper.start()
    outcomes = run_programs([IDLE, "pass"], Limits(wall_s=1), workers=1)
    stopper.join()
    assert [outcome.reason for outcome in outcomes] == ["the sandbox ended with it", "passed"]
    wait_for(os.getpid(), 0, 0)


def ruling(steps: list[seccomp.Instruction], machine: int, number: int, *values: int) -> int:
    """Run a filter as the kernel does: give what it says about a system call."""
    data = {0: number, 4: machine} | {16 + 8 * i: value for i, value in enumerate(values)}
    held, at = 0, 0
    while True:
        code, if_true, if_false, constant = steps[at]
        if code == 0x06:
            return constant
        if code == 0x20:
            held, at = data.get(constant, 0), at + 1
            continue
        holds = {0x15: held == constant, 0x35: held >= constant, 0x45: bool(held & constant)}[code]
        at += 1 + (if_true if holds else if_false)


@pytest.mark.parametrize(
    ("machine", "name", "read", "socket", "clone", "ioctl", "mount"),
    [(0xC000003E, "x86_64", 0, 41, 56, 16, 165), (0xC00000B7, "aarch64", 63, 198, 220, 29, 40)],
)
def test_the_filter_lets_through_what_is_listed(
    machine: int, name: str, read: int, socket: int, clone: int, ioctl: int, mount: int
) -> None:
    steps = seccomp.instructions(name)
    allow, refuse, kill = 0x7FFF0000, 0x50026, 0x80000000
    assert len(steps) <= 4096 and all(0 <= true < 256 and 0 <= false < 256 for _, true, false, _ in steps)
    assert ruling(steps, machine, read) == allow
    assert ruling(steps, machine, socket) == refuse
    assert ruling(steps, machine ^ 1, read) == kill
    assert ruling(steps, machine, read + 0x40000000) == refuse
    assert ruling(steps, machine, clone, 0x3D0F00) == allow  # a thread
    assert ruling(steps, machine, clone, 17) == allow  # fork
    assert all(ruling(steps, machine, clone, 17 | 1 << bit) == refuse for bit in (17, 25, 26, 27, 28, 29, 30))
    assert ruling(steps, machine, ioctl, 0, 0x5401) == allow
    assert ruling(steps, machine, ioctl, 0, 0x5412) == refuse  # typing into a terminal
    assert ruling(steps, machine, mount, 0, 0, 0, 0x1000) == refuse
    allowed = {number for number in range(600) if ruling(steps, machine, number, 0, 0, 0, 0) == allow}
    listed = seccomp.numbers(f"{seccomp.CALLS} {seccomp.OF_NURSERIES}", name)
    assert allowed <= set(listed.values()) and len(set(listed.values())) == len(listed)


def test_it_does_not_matter_what_we_do_with_signals_or_which_limits_we_have(confined: None) -> None:
    text = """
        import resource, signal
        from loralab.evals.sandbox import Limits, run_programs
        signal.signal(signal.SIGCHLD, signal.SIG_IGN)
        signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))
        print([outcome.reason for outcome in run_programs(["pass", "print(1)"], Limits(wall_s=60))])
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(text)], capture_output=True, text=True, timeout=60)
    assert done.stdout == "['passed', 'passed']\n", done


def test_a_very_small_limit_is_the_programs_not_the_sandboxs(confined: None) -> None:
    (outcome,) = run_programs(["import time; time.sleep(1)"], Limits(wall_s=1e-6))
    assert outcome.reason == "timed out"
    (outcome,) = run_programs(["x = 'y' * 10**6"], Limits(memory_bytes=1))
    assert not outcome.passed and outcome.reason in ("out of memory", "failed: could not be confined: MemoryError()")
    (outcome,) = run_programs(["pass"], Limits(wall_s=1e9, memory_bytes=1 << 60))
    assert outcome.passed
