"""Makes things in order on other threads, some of them before the consumer asks for them."""

from __future__ import annotations

import atexit
import os
import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from queue import SimpleQueue
from typing import Any, Generic, TypeVar
from weakref import WeakSet

T = TypeVar("T")
Tasks = SimpleQueue[tuple[int, "Future[T]"] | None]
"""Queue of the numbers to process, each with the place for its result. ``None`` ends one thread."""


class Ahead(Generic[T]):
    """Makes one thing for each number of a range, up to `depth` of them before the consumer asks.

    The threads never wait for the consumer, so abandoning the object, or exiting, cannot deadlock.
    A forked child starts its own threads and continues at its parent's position.

    Args:
        make: Makes one thing; called on any thread.
        numbers: The arguments of `make`, in order.
        depth: Things that are made before they are asked for.
        at_once: Number of threads; with 0, the thread that asks for a thing makes it.
        stop: Makes every running `make` end soon.
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
        self._tasks: Tasks[T] = SimpleQueue()
        self._threads: list[threading.Thread] = []
        self._process = os.getpid()

    def next(self) -> T:
        """The next thing. Waits until it is ready, and raises an exception of `make` here."""
        if self._at_once == 0:
            number, self._numbers = self._numbers[0], self._numbers[1:]
            return self._make(number)
        if not self._threads or self._process != os.getpid():
            # A forked child inherits this object, but not its threads and their unfinished things.
            numbers = self._numbers
            self._numbers = range(numbers.start - numbers.step * len(self._made), numbers.stop, numbers.step)
            self._made.clear()
            self._process = os.getpid()
            self._start()
        while self._numbers and len(self._made) <= self._depth:
            place: Future[T] = Future()
            self._tasks.put((self._numbers[0], place))
            self._made.append(place)
            self._numbers = self._numbers[1:]
        return self._made.popleft().result()

    def close(self, *, wait: bool = False) -> None:
        """Ends the threads. With `wait`, returns after they have ended."""
        self._stop()
        if self._process != os.getpid():
            return
        for place in self._made:
            place.cancel()
        for _ in self._threads:
            self._tasks.put(None)
        if wait:
            for thread in self._threads:
                thread.join()

    def _start(self) -> None:
        self._tasks = SimpleQueue()
        # At exit, Python joins threads that are not daemons before it calls `_close_all`. The
        # threads therefore have to be daemons.
        self._threads = [
            threading.Thread(target=_work, args=(self._tasks, self._make), name=f"batches-ahead-{number}", daemon=True)
            for number in range(self._at_once)
        ]
        for thread in self._threads:
            thread.start()
        _open.add(self)


def _work(tasks: Tasks[T], make: Callable[[int], T]) -> None:
    while (task := tasks.get()) is not None:
        number, place = task
        if place.set_running_or_notify_cancel():
            try:
                place.set_result(make(number))
            except BaseException as error:
                place.set_exception(error)
        del task, place  # a reference here would keep the memory of the last batch


_open: WeakSet[Ahead[Any]] = WeakSet()


@atexit.register
def _close_all() -> None:
    """End all threads before the interpreter shuts down, because they would return to it."""
    for ahead in list(_open):
        ahead.close(wait=True)
