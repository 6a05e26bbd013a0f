"""Ctrl-C (SIGINT) and SIGTERM (from Slurm, Kubernetes and `kill`) end a command in the same way."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from advmoe.cli import console

INTERRUPTED, TERMINATED = 128 + signal.SIGINT, 128 + signal.SIGTERM
"""Exit codes, by the shell's convention: 130 and 143."""
Handler = Callable[[int, FrameType | None], None]


class Terminated(BaseException):
    """Raised at SIGTERM, as `KeyboardInterrupt` is at Ctrl-C."""


@contextmanager
def handling(signum: int, handler: Handler) -> Iterator[None]:
    """Handle a signal. In a thread other than the main one, where this is impossible, do nothing."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signum, handler)
    try:
        yield
    finally:
        signal.signal(signum, before)


def terminate(signum: int, frame: FrameType | None) -> None:
    """Handler that raises `Terminated` once. Later SIGTERMs do not disturb the cleanup."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    raise Terminated


@contextmanager
def stopping(stop: Callable[[], None]) -> Iterator[list[int]]:
    """The first Ctrl-C or SIGTERM calls `stop`; a second Ctrl-C interrupts at once, a second SIGTERM is ignored.

    Yields:
        The signals received so far.
    """
    came: list[int] = []

    def handle(signum: int, frame: FrameType | None) -> None:
        came.append(signum)
        if came.count(signal.SIGINT) > 1:
            raise KeyboardInterrupt
        if len(came) == 1:
            console.note("stopping after this step and saving (press Ctrl-C again to stop at once)")
            stop()

    with handling(signal.SIGINT, handle), handling(signal.SIGTERM, handle):
        yield came


def terminal_interrupts_children() -> bool:
    """Whether a terminal sends Ctrl-C both to this process and to its children."""
    try:
        with Path("/dev/tty").open() as terminal:
            return os.tcgetpgrp(terminal.fileno()) == os.getpgrp()
    except OSError:
        return False
