"""Ctrl-C (SIGINT) and SIGTERM (from Slurm, Kubernetes and `kill`) end a command in the same way."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from advmoe.cli import console

INTERRUPTED, TERMINATED = 128 + signal.SIGINT, 128 + signal.SIGTERM
"""Exit codes, by the shell's convention: 130 and 143."""
NAMES: dict[int, str] = {signal.SIGINT: "interrupted", signal.SIGTERM: "terminated"}
"""What a signal does to a command."""
STARTS_COMMANDS = "advmoe.cli.app"
"""The module that calls the commands. What is imported on the way to it is the caller's."""
SECONDS_LATER = 0.05
"""Until a signal that came during an import is sent again."""
PATIENCE = 0.5
"""Seconds for which a signal waits for the end of imports."""
_since: dict[int, float] = {}
"""When each signal came that waits."""
Handler = Callable[[int, FrameType | None], None]


class Stopped(BaseException):
    """A command was asked to stop. Its argument, if any, tells how to go on."""

    @property
    def going_on(self) -> str:
        """How the user can go on; empty if nothing is kept."""
        return "; ".join(map(str, self.args))


class Interrupted(Stopped):
    """Raised in place of `KeyboardInterrupt`, which typer would turn into an exit code without a message."""


class Terminated(Stopped):
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
    if postponed(signum, frame):
        return
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    raise Terminated


def interrupt(signum: int, frame: FrameType | None) -> None:
    """Handler that raises `KeyboardInterrupt`."""
    if not postponed(signum, frame):
        raise KeyboardInterrupt


def postponed(signum: int, frame: FrameType | None) -> bool:
    """Whether the signal comes during an import of a command, and is sent again a little later.

    Compiled modules drop exceptions that arise in their imports, and go on with half a module. The
    signal would be lost, and the command would fail much later. Long imports are those at the start
    of a command, which has nothing to clean up yet; they end the process.
    """
    while frame is not None and frame.f_globals.get("__name__") != STARTS_COMMANDS:
        if frame.f_code.co_filename.startswith("<frozen importlib"):
            if time.monotonic() > _since.setdefault(signum, time.monotonic()) + PATIENCE:
                console.stopped(NAMES[signum])
                os._exit(128 + signum)
            again = threading.Timer(SECONDS_LATER, signal.raise_signal, [signum])
            again.daemon = True
            again.start()
            return True
        frame = frame.f_back
    _since.pop(signum, None)
    return False


@contextmanager
def resumable(how: Callable[[], str] = str) -> Iterator[None]:
    """If this work is interrupted or terminated, the command's last line tells how to go on.

    Args:
        how: Called at the end. An empty text means that nothing is kept.
    """
    try:
        yield
    except KeyboardInterrupt as stop:
        raise Interrupted(*filter(None, [how()])) from stop
    except Terminated as stop:
        raise Terminated(*(stop.args or filter(None, [how()]))) from stop


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
