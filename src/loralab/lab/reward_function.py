"""Reward functions of the user's own: run in a process of their own, so that one that hangs can be ended.

A function is named `FILE.py:FUNCTION` or `MODULE:FUNCTION` and called as `FUNCTION(prompts, answers, rows)` with lists of equal
length: texts, texts, and the rows that the prompts came from. It returns a number for each answer. Its process lives as long as the
run, so what it loads once stays loaded; what it prints goes to standard error.
"""

import hashlib
import importlib
import importlib.util
import inspect
import json
import math
import os
import pickle
import selectors
import struct
import subprocess
import sys
import time
import traceback
import weakref
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from types import ModuleType
from typing import IO, Any, BinaryIO

from loralab.errors import EvaluationError, did_you_mean

REWARD_FUNCTION = "function"
"""What the content of a function is called among the inputs of a run, with its name behind."""
LENGTH = struct.Struct(">Q")
IMPORT_S = 300.0
"""Seconds that importing a function may take, whatever it loads."""
END_S = 2.0
BOOT = "import sys; sys.path[:] = {path!r}; from loralab.lab.reward_function import serve; serve({name!r})"


class RewardFunction:
    """A function in a process of its own.

    Args:
        name: `FILE.py:FUNCTION` or `MODULE:FUNCTION`.
        timeout: seconds that one call may take.

    Attributes:
        source: SHA-256 of the file that it was imported from, and of the one it is written in where that is another; what these
            import in turn is not looked at.

    Raises:
        EvaluationError: there is no such file, module or function, or it cannot be imported.
    """

    def __init__(self, name: str, timeout: float) -> None:
        self.name, self.timeout = name, timeout
        refuse_missing(name)
        self._begin()

    def _begin(self) -> None:
        # The process sees the modules that this one sees, and those of the current directory.
        boot = BOOT.format(path=[str(Path.cwd()), *sys.path], name=self.name)
        # A session of its own: Ctrl-C lets the step end, which needs the rewards.
        self._process = subprocess.Popen(
            [sys.executable, "-c", boot], stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True
        )
        self._end = weakref.finalize(self, _end, self._process)
        self.source: str = self._answer(IMPORT_S)["source"]

    def __call__(self, prompts: Sequence[str], answers: Sequence[str], rows: Sequence[dict[str, Any]]) -> list[float]:
        """Reward answers.

        Raises:
            EvaluationError: the function raised, took too long, or did not give one finite number for each answer.
        """
        if not self._end.alive:  # it was ended for taking too long; a new attempt gets a new process
            self._begin()
        assert self._process.stdin is not None
        with suppress(BrokenPipeError):  # then there is no answer either
            _send(self._process.stdin, pickle.dumps((list(prompts), list(answers), list(rows))))
        found = self._answer(self.timeout)["values"]
        if not isinstance(found, list) or len(found) != len(answers):
            size = f"{len(found)} values" if isinstance(found, list) else f"a {found}"
            raise self._error(
                f"gave {size} for {len(answers)} answers", "return a list with one number for each answer"
            )
        for place, value in enumerate(found):
            if value is None or not math.isfinite(value):
                what = f"gave {'no number' if value is None else value} for the answer {answers[place][:60]!r}"
                raise self._error(what, "return a finite number for every answer, whatever a model wrote")
        return [float(value) for value in found]

    def _answer(self, seconds: float) -> dict[str, Any]:
        assert self._process.stdout is not None
        body = _receive(self._process.stdout, seconds)
        if body is None:
            self._end()
            fix = "make it faster, or give it more time: objective.reward.N.timeout"
            raise self._error(f"did not answer within {seconds:g} s", fix)
        if not body:
            self._end()
            raise self._error(f"ended its process (exit status {self._process.returncode})", "do not leave the process")
        found: dict[str, Any] = json.loads(body)
        if "error" in found:
            raise self._error(found["error"], found["fix"])
        return found

    def _error(self, what: str, fix: str) -> EvaluationError:
        return EvaluationError(f"the reward function {what}", where=self.name, fix=fix)


def _end(process: "subprocess.Popen[bytes]") -> None:
    process.kill()
    process.wait()
    for stream in (process.stdin, process.stdout):
        if stream is not None:
            with suppress(BrokenPipeError):
                stream.close()


def is_function(path: str) -> bool:
    """Tell whether a reward's path names a function: words of Python behind its last colon, and a module or file before."""
    before, colon, function = path.rpartition(":")
    module = all(part.isidentifier() for part in before.split("."))
    return bool(colon) and function.isidentifier() and (before.endswith(".py") or module)


def refuse_missing(path: str) -> None:
    """Look for the file of a function. Raises EvaluationError if there is none; a module is looked for when it is imported."""
    before, _, function = path.rpartition(":")
    file = Path(before).expanduser()
    if not before.endswith(".py") or file.is_file():
        return
    near = did_you_mean(file.name, [one.name for one in file.parent.glob("*.py")] if file.parent.is_dir() else [])
    fix = f"did you mean {file.parent / near}:{function}?" if near else "write FILE.py:FUNCTION"
    raise EvaluationError("the file of this reward function does not exist", where=path, fix=fix)


def _send(pipe: IO[bytes], body: bytes) -> None:
    pipe.write(LENGTH.pack(len(body)) + body)
    pipe.flush()


def _receive(pipe: IO[bytes], seconds: float) -> bytes | None:
    """Read one message; None if it does not come in time, empty if the other side is gone."""
    deadline, found, size = time.monotonic() + seconds, b"", LENGTH.size
    with selectors.DefaultSelector() as selector:
        selector.register(pipe, selectors.EVENT_READ)
        while len(found) < size:
            if not selector.select(max(0.0, deadline - time.monotonic())):
                return None
            part = os.read(pipe.fileno(), 1 << 16)
            if not part:
                return b""
            found += part
            if size == LENGTH.size and len(found) >= size:
                size += LENGTH.unpack(found[: LENGTH.size])[0]
    return found[LENGTH.size :]


# What follows runs in the process of the function.


def serve(name: str) -> None:
    """Answer calls until there are no more."""
    calls, answers = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what the function prints is no answer
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    try:
        function, source = _found(name)
    except Exception as error:  # of any type: it is the user's code
        known = error.what if isinstance(error, EvaluationError) else _said(error, "when it was imported")
        fix = error.fix if isinstance(error, EvaluationError) else "correct it, and run the same command again"
        return _send(answers, json.dumps({"error": known, "fix": fix}).encode())
    _send(answers, json.dumps({"source": source}).encode())
    while (body := _next(calls)) is not None:
        _send(answers, json.dumps(_called(function, body)).encode())


def _next(calls: BinaryIO) -> bytes | None:
    head = calls.read(LENGTH.size)
    return calls.read(LENGTH.unpack(head)[0]) if len(head) == LENGTH.size else None


def _called(function: Callable[..., Any], body: bytes) -> dict[str, Any]:
    try:
        found = function(*pickle.loads(body))
        if hasattr(found, "tolist"):  # arrays and tensors
            found = found.tolist()
        if isinstance(found, str | bytes) or not hasattr(found, "__iter__"):
            return {"values": type(found).__name__}
        return {"values": [_number(value) for value in found]}
    except Exception as error:  # of any type: it is the user's code
        return {"error": _said(error, ""), "fix": "correct it; the same command goes on from the last checkpoint"}


def _number(value: Any) -> float | None:
    try:
        return None if isinstance(value, str) else float(value)
    except (TypeError, ValueError):
        return None


def _said(error: Exception, when: str) -> str:
    place = next((f for f in reversed(traceback.extract_tb(error.__traceback__)) if f.filename != __file__), None)
    line = "" if place is None else f" (line {place.lineno} of {Path(place.filename).name})"
    return f"raised {type(error).__name__}{f' {when}' if when else ''}: {' '.join(str(error).split())}{line}"


def _found(name: str) -> tuple[Callable[..., Any], str]:
    before, _, attribute = name.rpartition(":")
    module = _from_file(Path(before).expanduser()) if before.endswith(".py") else importlib.import_module(before)
    function = getattr(module, attribute, None)
    if not callable(function):
        near = did_you_mean(attribute, [one for one, value in vars(module).items() if callable(value)])
        fix = f"did you mean {before}:{near}?" if near else f"define it in {before}"
        raise EvaluationError(f"is not there: {before} has no function {attribute}", fix=fix)
    return function, _source(function, module)


def _source(function: Callable[..., Any], module: ModuleType) -> str:
    """Hash the files of a function: its module's, and that of its code."""
    files = [getattr(module, "__file__", None)]
    with suppress(TypeError):  # it is no function written in Python
        files.append(inspect.getsourcefile(inspect.unwrap(function)))
    different = dict.fromkeys(path for file in files if file and (path := Path(file).resolve()).is_file())
    return hashlib.sha256(b"".join(hashlib.sha256(file.read_bytes()).digest() for file in different)).hexdigest()


def _from_file(file: Path) -> ModuleType:
    sys.path.insert(0, str(file.parent.resolve()))
    spec = importlib.util.spec_from_file_location(file.stem, file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[file.stem] = module
    spec.loader.exec_module(module)
    return module
