"""Many runs side by side on this machine: as many processes as asked for, each with one thread.

Nothing is passed back but exit codes: what a run leaves is in its folder, and whoever looks on reads it there.
"""

import multiprocessing
import os
import signal
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from loralab.errors import Interrupted, LoralabError
from loralab.run.folder import RunFolder
from loralab.spec.spec import RunSpec

LOOK_S = 1.0

Look = Callable[[Sequence[RunFolder]], None]


def train_all(
    specs: Sequence[RunSpec], root: str | Path = "runs", *, workers: int | None = None, look: Look | None = None
) -> list[RunFolder]:
    """Run every spec in its folder below `root`; what is finished there already is not run again.

    Args:
        specs: the runs.
        root: folder of the run folders.
        workers: processes; None takes one per core, or a single one if any run may use an accelerator.
        look: called about once a second, and at the end, with all folders; they need not exist yet.

    Returns:
        The folders, in the order of the specs.

    Raises:
        Interrupted: a stop was requested; every run saved a checkpoint and the same call goes on.
        LoralabError: some runs failed; the others were finished first.
    """
    folders = [RunFolder(Path(root) / spec.folder_name) for spec in specs]
    on_cpu = all(spec.model.device == "cpu" for spec in specs)
    count = workers or (_cores() if on_cpu else 1)
    spawn = multiprocessing.get_context("spawn")
    with (
        stopped_by_terminate(),
        ProcessPoolExecutor(min(count, len(specs)), mp_context=spawn, initializer=_begin_worker) as pool,
    ):
        try:
            futures = [pool.submit(_train, spec.model_dump(mode="json"), str(root)) for spec in specs]
            _wait(futures, lambda: look(folders) if look else None)
            failures = [failure for future in futures if (failure := future.result()) is not None]
        except (KeyboardInterrupt, BrokenProcessPool) as error:
            for process in multiprocessing.active_children():
                process.terminate()  # asks the run to stop after its step, and to save a checkpoint
            pool.shutdown(cancel_futures=True)
            what = "stopped" if isinstance(error, KeyboardInterrupt) else "a process of the runs was killed"
            raise Interrupted(what, where=str(root), fix="run the same command again: it goes on") from None
    if look:
        look(folders)
    if failures:
        code, message = max(failures)
        what = f"{len(failures)} of {len(specs)} runs did not finish; the first said: {message}"
        raise (Interrupted if code == Interrupted.exit_code else LoralabError)(what, where=str(root))
    return folders


def _wait(futures: Sequence[Future[Any]], look: Callable[[], None]) -> None:
    pending = set(futures)
    while pending:
        pending = wait(pending, timeout=LOOK_S).not_done
        look()


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _begin_worker() -> None:
    """Give this process one thread: processes that share cores would wait for each other's descheduled threads."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # between runs; during one, Ctrl-C asks it to stop after its step
    os.environ["OMP_NUM_THREADS"] = "1"
    import torch

    torch.set_num_threads(1)


def _train(spec: dict[str, Any], root: str) -> tuple[int, str] | None:
    """Run one spec in this process; a failure comes back as its exit code and message."""
    from loralab.lab.experiment import train

    try:
        train(RunSpec.model_validate(spec), root)
    except LoralabError as error:
        return error.exit_code, str(error)
    return None


@contextmanager
def stopped_by_terminate() -> Iterator[None]:
    """Let SIGTERM stop the block as Ctrl-C does, so that no process of the runs is left alone."""

    def stop(_number: int, _frame: Any) -> None:
        raise KeyboardInterrupt

    try:
        before = signal.signal(signal.SIGTERM, stop)
    except ValueError:  # not the main thread: signals stay with whoever owns them
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
