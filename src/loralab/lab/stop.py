"""How a person stops a run: the first signal after the current step, the second at once."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from loralab.errors import Interrupted


class Stop:
    """Whether a stop was requested."""

    requested = False


@contextmanager
def stop_on_signals() -> Iterator[Stop]:
    """Ask the loop to stop after the current step on the first SIGINT or SIGTERM; the second SIGINT stops at once."""
    stop = Stop()

    def ask(number: int, _frame: Any) -> None:
        if stop.requested and number == signal.SIGINT:
            raise KeyboardInterrupt
        stop.requested = True

    try:
        before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    except ValueError:  # not the main thread: signals stay with whoever owns them
        before = {}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def interrupts_explained() -> Iterator[None]:
    """Turn a KeyboardInterrupt inside the block into Interrupted."""
    try:
        yield
    except KeyboardInterrupt:
        fix = "run the same command again: it goes on from its last checkpoint"
        raise Interrupted("stopped in the middle of a step", fix=fix) from None


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
