"""Measure an exported model on this machine: latency per batch, and images per second."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from advmoe_export.errors import InputError
from advmoe_export.reference import probe_images
from advmoe_export.session import Session

MIN_RUNS = 5
MAX_IMAGES = 64
"""Largest number of different images; a larger batch repeats them."""


@dataclass(frozen=True, kw_only=True)
class Timing:
    """Wall-clock times of one batch size."""

    batch: int
    runs: int
    median_ms: float
    p95_ms: float
    images_per_second: float
    """Batch size divided by the median time."""


def time_session(session: Session, batches: Sequence[int], *, seconds: float = 1.0) -> list[Timing]:
    """Time batches of synthetic images, which take different pathways.

    Args:
        session: the model.
        batches: batch sizes.
        seconds: time for each batch size after a warm-up. At least five runs are measured.

    Raises:
        InputError: the file does not accept a batch size.
    """
    metadata = session.metadata
    fixed = metadata.batch_size
    for batch in batches:
        if batch < 1 or (fixed is not None and batch != fixed):
            expected = (
                "a batch size of at least 1" if fixed is None else f"batch size {fixed}, which this file is made for"
            )
            raise InputError(f"expected {expected}, got {batch}")
    timings = []
    for batch in batches:
        images = probe_images(metadata.image_size, metadata.input_type, count=min(4 * batch, MAX_IMAGES))
        pool = images[np.arange(max(len(images) // batch, 1) * batch) % len(images)]
        for start in range(0, len(pool), batch):
            session.run_raw(pool[start : start + batch])
        times: list[float] = []
        end = time.perf_counter() + seconds
        while len(times) < MIN_RUNS or time.perf_counter() < end:
            start = len(times) * batch % len(pool)
            begin = time.perf_counter()
            session.run_raw(pool[start : start + batch])
            times.append(time.perf_counter() - begin)
        median = float(np.median(times))
        timings.append(
            Timing(
                batch=batch,
                runs=len(times),
                median_ms=1e3 * median,
                p95_ms=1e3 * float(np.quantile(times, 0.95)),
                images_per_second=batch / median,
            )
        )
    return timings
