"""Join the images of concurrent requests to batches, with limits on waiting requests and times.

A batch starts as soon as a worker is free. Requests that arrive while all workers are busy wait and
are joined, so batches grow with the load. `max_delay` lets a request wait for further requests even
if a worker is free.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

logger = logging.getLogger("advmoe_export.serve")
Outputs = Mapping[str, npt.NDArray[Any]]
Run = Callable[[npt.NDArray[Any]], Outputs]


class OverloadedError(Exception):
    """The highest number of requests is waiting or running."""


class StoppingError(Exception):
    """The server is stopping and accepts no new requests."""


@dataclass(eq=False)
class _Waiting:
    images: npt.NDArray[Any]
    result: asyncio.Future[Outputs]


class Batcher:
    """Runs batches of images of concurrent requests.

    Args:
        run: computes all outputs of a batch. It is called in threads.
        max_batch: highest number of images in a batch.
        max_delay: seconds that images may wait for further images.
        max_requests: highest number of requests between `admit` and its end.
        workers: number of batches that run at the same time.
        observe: called with the number of images, the seconds and the outputs of each batch.
    """

    def __init__(
        self,
        run: Run,
        *,
        max_batch: int,
        max_delay: float = 0.0,
        max_requests: int = 128,
        workers: int = 1,
        observe: Callable[[int, float, Outputs], None] = lambda images, seconds, outputs: None,
    ) -> None:
        self._run = run
        self.max_batch = max_batch
        self._max_delay = max_delay
        self._max_requests = max_requests
        self._observe = observe
        self._workers = workers
        self._waiting: deque[_Waiting] = deque()
        self._arrived = asyncio.Condition()
        self._stopping = False
        self._ending = False
        self._tasks: list[asyncio.Task[None]] = []
        self.requests = 0
        """Number of requests between `admit` and its end, and of those in `hold`."""

    @property
    def waiting(self) -> int:
        """Number of images that wait for a worker."""
        return sum(len(entry.images) for entry in self._waiting)

    @property
    def stopping(self) -> bool:
        """Whether new requests are refused."""
        return self._stopping

    @property
    def working(self) -> bool:
        """Whether batches are computed: no worker has ended."""
        return not any(task.done() for task in self._tasks)

    @contextlib.contextmanager
    def admit(self) -> Iterator[None]:
        """Count a request, from before the reading of its body until its response is ready or given up.

        Raises:
            OverloadedError: the limit is reached.
            StoppingError: the server is stopping.
        """
        if self._stopping:
            raise StoppingError
        if self.requests >= self._max_requests:
            raise OverloadedError
        self.requests += 1
        try:
            yield
        finally:
            self._release()

    def hold(self, work: Future[Any]) -> None:
        """Count a request until its work in a thread ends, although nobody waits for it."""
        loop = asyncio.get_running_loop()
        self.requests += 1

        def ended(_: Future[Any]) -> None:
            with contextlib.suppress(RuntimeError):  # the loop is closed
                loop.call_soon_threadsafe(self._release)

        work.add_done_callback(ended)

    def _release(self) -> None:
        self.requests -= 1

    async def submit(self, images: npt.NDArray[Any]) -> Outputs:
        """All outputs for images [n, ...], where n is at most `max_batch`.

        If the caller is cancelled while the images wait, the images are not computed.
        """
        assert 0 < len(images) <= self.max_batch
        entry = _Waiting(images, asyncio.get_running_loop().create_future())
        async with self._arrived:
            self._waiting.append(entry)
            self._arrived.notify()
        try:
            return await entry.result
        finally:  # images that were given up do not wait, and need no memory
            with contextlib.suppress(ValueError):
                self._waiting.remove(entry)

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Compute submitted images. At the end, waiting images are still computed."""
        with ThreadPoolExecutor(self._workers, thread_name_prefix="model") as pool:
            self._tasks = [asyncio.create_task(self._work(pool)) for _ in range(self._workers)]
            for task in self._tasks:
                task.add_done_callback(_report)
            try:
                yield
            finally:
                self._stopping = self._ending = True
                async with self._arrived:
                    self._arrived.notify_all()
                await asyncio.gather(*self._tasks, return_exceptions=True)

    def stop(self) -> None:
        """Refuse new requests. Admitted requests are still computed, also those that submit later."""
        self._stopping = True

    async def _work(self, pool: ThreadPoolExecutor) -> None:
        loop = asyncio.get_running_loop()
        while entries := await self._next_batch():
            begin, parts = loop.time(), [entry.images for entry in entries]
            try:
                outputs = await loop.run_in_executor(pool, self._run_joined, parts)
                self._observe(sum(map(len, parts)), loop.time() - begin, outputs)
                results = _split(outputs, parts)
            except Exception as error:
                for entry in entries:
                    if not entry.result.done():
                        entry.result.set_exception(error)
                continue
            for entry, result in zip(entries, results, strict=True):
                if not entry.result.done():
                    entry.result.set_result(result)

    async def _next_batch(self) -> list[_Waiting]:
        """The next batch; empty if `running` ends and no image waits."""
        async with self._arrived:
            entries: list[_Waiting] = []
            while True:
                while not self._drop_cancelled():
                    if self._ending:
                        return []
                    await self._arrived.wait()
                await self._wait_for_others()
                if self._drop_cancelled():
                    break
            count = 0
            while self._waiting and count + len(self._waiting[0].images) <= self.max_batch:
                entry = self._waiting.popleft()
                count += len(entry.images)
                entries.append(entry)
            if self._waiting:
                self._arrived.notify()
            return entries

    async def _wait_for_others(self) -> None:
        """Let images wait until their batch is full or `max_delay` is over."""
        if not self._max_delay:
            return
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self._max_delay):
                while self.waiting < self.max_batch and not self._stopping:
                    await self._arrived.wait()

    def _drop_cancelled(self) -> bool:
        """Remove cancelled requests. Returns whether a request is left."""
        if any(entry.result.done() for entry in self._waiting):
            self._waiting = deque(entry for entry in self._waiting if not entry.result.done())
        return bool(self._waiting)

    def _run_joined(self, parts: Sequence[npt.NDArray[Any]]) -> Outputs:
        return self._run(np.concatenate(parts))


def _split(outputs: Outputs, parts: Sequence[npt.NDArray[Any]]) -> list[Outputs]:
    """The outputs of each part of a batch."""
    ends = np.cumsum([len(part) for part in parts])[:-1]
    named = {name: np.split(values, ends) for name, values in outputs.items()}
    return [{name: values[i] for name, values in named.items()} for i in range(len(parts))]


def _report(task: asyncio.Task[None]) -> None:
    """Log the error that ended a worker."""
    if not task.cancelled() and (error := task.exception()):
        logger.critical("a worker of the batches has ended; the server is not ready any more", exc_info=error)
