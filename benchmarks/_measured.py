"""What the benchmarks of spectra share: clocks, memory of a child process, the facts behind a figure, the file of results."""

import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypeVar

import torch

from loralab.run.folder import append_line, environment

RESULTS = Path(__file__).parent / "results"
T = TypeVar("T")


def timed(work: Callable[[], T]) -> tuple[float, float, T]:
    """Give processor seconds (of this process, all threads), wall seconds and the result of one call."""
    wall, busy = time.perf_counter(), time.process_time()
    found = work()
    return time.process_time() - busy, time.perf_counter() - wall, found


def peak_mib() -> float:
    """Give the largest resident size of this process, in MiB."""
    try:  # getrusage would count what the parent held when it began this process
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:")) / 1024
    except (OSError, StopIteration):
        unit = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**20


def resident_mib() -> float:
    """Forget the largest resident size so far, where the system can (Linux), and give the size from which it grows now."""
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
    return peak_mib()


def child(script: str, *asked: str, **variables: str) -> dict[str, Any]:
    """Run a script anew, in a process of its own, and read the JSON on its last line."""
    told = os.environ | variables
    done = subprocess.run([sys.executable, script, *asked], capture_output=True, text=True, check=False, env=told)
    if done.returncode:
        raise SystemExit(f"{' '.join(done.args)} failed:\n{done.stderr[-2000:]}")
    found: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return found


def median(values: list[float]) -> float:
    """Give the median with four significant digits, enough for a time."""
    return float(f"{statistics.median(values):.4g}")


def calibration() -> dict[str, Any]:
    """Time one matrix product over and over, in processor seconds: if they spread, a neighbour takes the caches."""
    a = torch.randn(1024, 1024)
    taken = [timed(lambda: a @ a)[0] for _ in range(20)]
    best, middle = min(taken), statistics.median(taken)
    return {"gemm_gflops": round(2 * 1024**3 / best / 1e9, 1), "gemm_spread": round(middle / best - 1, 3)}


class Record:
    """Rows of one invocation: printed as they come, and appended to `results/NAME-DATE.jsonl` behind the facts."""

    def __init__(self, name: str, **asked: Any) -> None:
        RESULTS.mkdir(exist_ok=True)
        now = datetime.now(UTC)
        self.path = RESULTS / f"{name}-{now:%Y-%m-%d}.jsonl"
        facts = environment()
        kept = {key: facts[key] for key in ("date", "python", "platform", "cores", "packages")}
        machine = {"processor": platform.processor() or platform.machine(), "threads": torch.get_num_threads()}
        self.add(**kept, **machine, **calibration(), **asked)

    def add(self, **row: Any) -> None:
        """Print and append one row."""
        print(json.dumps(row, ensure_ascii=False), flush=True)
        append_line(self.path, row)
