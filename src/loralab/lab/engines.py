"""Many runs side by side on this machine: as many processes as asked for, each with one thread.

Nothing is passed back but exit codes: what a run leaves is in its folder, and whoever looks on reads it there.
"""

import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from loralab.errors import Diverged, FolderError, Interrupted, LoralabError
from loralab.lab.stop import stopped_by_terminate
from loralab.run.folder import RunFolder, cores
from loralab.spec.spec import RunSpec

LOOK_S = 1.0
GUARD = 'in a script, call it below `if __name__ == "__main__":`'

Look = Callable[[Sequence[RunFolder]], None]


def train_all(
    specs: Sequence[RunSpec], root: str | Path = "runs", *, workers: int | None = None, look: Look | None = None
) -> list[RunFolder]:
    """Run every spec in its folder below `root`; what is finished there already is not run again.

    Args:
        specs: the runs; one that is given twice runs once.
        root: folder of the run folders.
        workers: processes; None takes one per core, or a single one if any run may use an accelerator.
        look: called about once a second, and at the end, with all folders; they need not exist yet.

    Returns:
        The folders, in the order of the specs.

    Raises:
        Interrupted: a stop was requested, or a process was killed; what ran saved a checkpoint and the same call goes on.
        LoralabError: some runs failed; the others were finished first. Diverged if one of them did.
    """
    if workers is not None and workers < 1:
        raise LoralabError(f"{workers} processes cannot run anything", where="workers", fix="give 1 or more")
    if getattr(multiprocessing.current_process(), "_inheriting", False):  # a process of ours reads the calling script
        raise LoralabError("a process of the runs would begin the runs anew", where="train_all", fix=GUARD)
    folders = [RunFolder(Path(root) / spec.folder_name) for spec in specs]
    waiting = {folder.path.name: spec for folder, spec in zip(folders, specs, strict=True) if not _is_done(folder)}
    failures = _train_in_processes(waiting, root, workers, lambda: look(folders) if look else None) if waiting else {}
    if look:
        look(folders)
    if failures:
        said = "".join(f"\n{name}: {message}" for name, (_, message) in failures.items())
        worst = max(code for code, _ in failures.values())
        kind = {end.exit_code: end for end in (LoralabError, Diverged, Interrupted)}[worst]
        raise kind(f"{len(failures)} of {len(waiting)} runs did not finish{said}", where=str(root))
    return folders


def _is_done(folder: RunFolder) -> bool:
    with suppress(FolderError):  # a damaged folder is the run's to complain about
        return bool(folder.read_status()["state"] == "done")
    return False


def _train_in_processes(
    specs: dict[str, RunSpec], root: str | Path, workers: int | None, look: Callable[[], None]
) -> dict[str, tuple[int, str]]:
    """Run specs by name and give exit code and message of those that failed."""
    on_cpu = all(spec.model.device == "cpu" for spec in specs.values())
    count = min(workers or (cores() if on_cpu else 1), len(specs))
    spawn = multiprocessing.get_context("spawn")
    # No process reads this line: something on it, or its end when this process dies, asks them all to stop.
    heard, asking = spawn.Pipe(duplex=False)
    with stopped_by_terminate(), heard, asking:
        pool = ProcessPoolExecutor(count, mp_context=spawn, initializer=_begin_worker, initargs=(heard,))
        try:
            futures = {
                name: pool.submit(_train, spec.model_dump(mode="json"), str(root)) for name, spec in specs.items()
            }
            _wait(list(futures.values()), look)
            ends = {name: future.result() for name, future in futures.items()}
        except BaseException as error:
            asking.send_bytes(b"stop")
            with suppress(KeyboardInterrupt):  # the processes heard it too, and are waited for in any case
                pool.shutdown(cancel_futures=True)
            if not isinstance(error, KeyboardInterrupt | BrokenProcessPool):
                raise
            fix = "run the same command again: it goes on"
            if isinstance(error, KeyboardInterrupt):
                raise Interrupted("stopped", where=str(root), fix=fix) from None
            what = "a process of the runs was killed, or could not begin"
            raise Interrupted(what, where=str(root), fix=f"{fix}; {GUARD}") from None
        pool.shutdown()
    return {name: end for name, end in ends.items() if end is not None}


def _wait(futures: Sequence[Future[Any]], look: Callable[[], None]) -> None:
    pending = set(futures)
    while pending:
        pending = wait(pending, timeout=LOOK_S).not_done
        look()


_stop_asked = threading.Event()
"""In a process of the runs: no further run is begun. The pool hands runs out ahead, so they cannot be called back."""


def _begin_worker(heard: Connection) -> None:
    """Give this process one thread: processes that share cores would wait for each other's descheduled threads."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # between runs; during one, Ctrl-C asks it to stop after its step
    threading.Thread(target=_stop_when_asked, args=(heard,), daemon=True).start()
    os.environ["OMP_NUM_THREADS"] = "1"
    import torch

    torch.set_num_threads(1)


def _stop_when_asked(heard: Connection) -> None:
    """Wait for word on the line, then end this process: at once between runs, else after the step, with a checkpoint."""
    heard.poll(None)
    _stop_asked.set()
    while True:
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(LOOK_S)


def _train(spec: dict[str, Any], root: str) -> tuple[int, str] | None:
    """Run one spec in this process; a failure comes back as its exit code and message."""
    from loralab.lab.experiment import train

    if _stop_asked.is_set():
        return Interrupted.exit_code, "not begun"
    try:
        train(RunSpec.model_validate(spec), root)
    except LoralabError as error:
        return error.exit_code, str(error)
    return None
