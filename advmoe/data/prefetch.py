"""Making things in order on other threads, some of them before they are asked for."""

from __future__ import annotations

import atexit
import os
import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Generic, TypeVar
from weakref import WeakSet

T = TypeVar("T")


class Ahead(Generic[T]):
    """Makes one thing for each number of a range, up to `depth` of them before they are asked for.

    Its threads never wait for the consumer, so one that goes away half-way leaves nothing that hangs; nor does a
    program that ends half-way, which would wait for all that was begun. A forked child starts threads of its own and
    goes on where its parent was.

    Args:
        make: makes one thing; called on any thread.
        numbers: what it is called with, in order.
        depth: things that are made before they are asked for.
        at_once: threads; with none, each thing is made by the thread that asks for it.
        stop: makes `make` end soon, wherever it is.
    """

    def __init__(
        self, make: Callable[[int], T], numbers: range, depth: int, *, at_once: int, stop: Callable[[], None]
    ) -> None:
        self._make = make
        self._stop = stop
        self._numbers = numbers
        self._depth = depth
        self._at_once = at_once
        self._made: deque[Future[T]] = deque()
        self._executor: ThreadPoolExecutor | None = None
        self._process = os.getpid()

    def next(self) -> T:
        """The next thing; waits for it if it is not there yet. What went wrong making it is raised here."""
        if self._at_once == 0:
            number, self._numbers = self._numbers[0], self._numbers[1:]
            return self._make(number)
        if self._executor is None or self._process != os.getpid():
            # A forked child has this object, but neither its threads nor what was being made.
            self._numbers = range(self._numbers.start - len(self._made), self._numbers.stop)
            self._made.clear()
            self._process = os.getpid()
            self._executor = ThreadPoolExecutor(self._at_once, thread_name_prefix="batches-ahead")
            _open.add(self)
        while self._numbers and len(self._made) <= self._depth:
            self._made.append(self._executor.submit(self._make, self._numbers[0]))
            self._numbers = self._numbers[1:]
        return self._made.popleft().result()

    def close(self) -> None:
        """Forgets what nobody will ask for, and ends the making of it."""
        self._stop()
        if self._executor is not None and self._process == os.getpid():
            self._executor.shutdown(wait=False, cancel_futures=True)


_open: WeakSet[Ahead[Any]] = WeakSet()


def _close_all() -> None:
    for ahead in list(_open):
        ahead.close()


# Python joins executors' threads, after all the work they have, before it calls what `atexit` knows; what is registered
# here is called earlier, the last first. Without this, the end of a program waits for its batches.
getattr(threading, "_register_atexit", atexit.register)(_close_all)
