"""Batches of images as tensors, filled by Rust. Their bytes do not depend on the number of threads,
on resumption or on the world size.

Shapes: B batch, H height, W width.

The order of an epoch, the crops and the mirrors are pure functions of (seed, stream, epoch, index),
drawn from counter-based Philox numbers. A batch therefore needs no earlier batch. Two loaders that
differ only in `stream` are independent; AdvMoE draws its two batches from two such loaders.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Literal, NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from advmoe import rust_router
from advmoe.data.buffers import Buffers
from advmoe.data.prefetch import Ahead
from advmoe.data.sets import EncodedSet
from advmoe.data.transforms import CropFlip, Transform, compiled, output_size
from advmoe.distributed import Place
from advmoe.errors import ConfigError, DataError
from advmoe.world import processes_here

__all__ = ["Batch", "BatchLoader", "CropFlip", "LabeledImages"]


FAST_THREADS = 2
"""Threads for images in memory. Each fills 500,000 images of 32 x 32 per second."""

MAX_THREADS = 1024
"""Highest number of threads. It is that of the compiled module."""


def default_threads(images: object) -> int:
    """Default number of threads: at most two for images in memory, otherwise one for each processor of this process.

    `taskset`, Slurm and containers limit the processors of a process. Processes that torchrun
    started on one machine divide them. `RAYON_NUM_THREADS` overrides this number, as in other
    programs that use Rust's rayon.
    """
    if chosen := os.environ.get("RAYON_NUM_THREADS"):
        if not (chosen.isdecimal() and 1 <= int(chosen) <= MAX_THREADS):
            raise ConfigError(f"expected RAYON_NUM_THREADS from 1 to {MAX_THREADS}, got {chosen!r}")
        return int(chosen)
    processors = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    share = max(1, processors // processes_here())
    return min(MAX_THREADS if isinstance(images, EncodedSet) else FAST_THREADS, share)


class Batch(NamedTuple):
    """One batch: images, their labels, and their row numbers in the image set."""

    images: Tensor
    """[B, 3, H, W], float32 (level / 255, normalized if asked) or uint8."""
    labels: Tensor
    """[B], int64."""
    indices: Tensor
    """[B], int64: the image's row in the image set. Augmentation and route log use it as key."""
    place: Place | None = None
    """Position of this batch in the union of all ranks' batches, if there are several ranks."""


class LabeledImages(Protocol):
    """Images in memory, as `advmoe.data.sets.ImageSet` holds them."""

    @property
    def images(self) -> NDArray[np.uint8]:
        """[n, H, W, 3], C-contiguous."""

    @property
    def labels(self) -> NDArray[np.int64]:
        """[n]."""


class BatchLoader:
    """The batches of an image set, or of some of its images, epoch by epoch.

    Every rank of a distributed run makes the same loader with its own `rank`. Step t of an epoch
    takes the next `world_size * batch_size` images, and each rank gets its share, so the union over
    ranks is the same for every world size. The last, smaller step is shared as evenly as possible:
    no image is dropped or repeated, and the ranks' numbers of batches differ by at most one.
    Distributed training leaves the last step out by `drop_last`.

    Args:
        images: The image set, in memory (its arrays are read, not copied) or encoded in files.
        indices: Rows to use, in this order; all by default.
        batch_size: Images per batch and rank, at most.
        shuffle: Whether every epoch has a new order.
        augment: Transform of each image; random choices are new in every epoch. Without it, and
            with `CropFlip`, all images must have one size.
        seed: Chooses the experiment, 0 to 2^64 - 1.
        stream: Chooses one of the experiment's independent sequences.
        num_threads: Threads that make batches; `default_threads` by default. With as many batches
            ahead as threads, each thread makes a batch of its own; with fewer, the threads share a
            batch.
        drop_last: Leave out a last step that is not full.
        rank: This process's share of every step.
        world_size: Number of shares.
        step_size: Images of all ranks in a full step, by default `world_size * batch_size`; a
            smaller number need not be a multiple of the world size.
        prefetch: Batches made ahead of the one in use; 0 makes each when it is asked for.
        dtype: `torch.float32` or `torch.uint8`.
        mean: Subtracted from level / 255, per channel; with float32 only. Models normalize
            themselves.
        std: Divisor of the difference, per channel.
        channels_last: Images in torch.channels_last memory format.
        pin_memory: Page-locked images, for asynchronous copies to a GPU; as are the labels.
        on_bad_image: "raise" an error that names the file and row, or "skip" the image and note it
            in `skipped`. A batch without any image left is empty, so that batches keep their numbers,
            and ranks stay in step.

    Raises:
        ConfigError: An argument is out of its range.
        DataError: While iterating, an image that cannot be read or decoded.
    """

    def __init__(
        self,
        images: LabeledImages | EncodedSet,
        *,
        batch_size: int,
        indices: NDArray[np.integer] | None = None,
        shuffle: bool = False,
        augment: Transform | None = None,
        seed: int = 0,
        stream: int = 0,
        num_threads: int | None = None,
        drop_last: bool = False,
        rank: int = 0,
        world_size: int = 1,
        step_size: int | None = None,
        prefetch: int = 2,
        dtype: torch.dtype = torch.float32,
        mean: tuple[float, float, float] = (0.0, 0.0, 0.0),
        std: tuple[float, float, float] = (1.0, 1.0, 1.0),
        channels_last: bool = False,
        pin_memory: bool = False,
        on_bad_image: Literal["raise", "skip"] = "raise",
    ) -> None:
        pixels = images.source if isinstance(images, EncodedSet) else images.images
        if isinstance(pixels, np.ndarray) and not _is_rgb(pixels):
            raise ConfigError(
                f"expected C-contiguous uint8 images [n, H, W, 3], got {pixels.dtype} {list(pixels.shape)}; "
                "convert them with numpy.ascontiguousarray"
            )
        if len(images.labels) != len(pixels):
            raise ConfigError(f"expected a label for each of {len(pixels)} images, got {len(images.labels)} labels")
        rows = np.arange(len(pixels)) if indices is None else np.asarray(indices)
        if rows.ndim != 1 or not np.issubdtype(rows.dtype, np.integer):
            raise ConfigError(f"expected indices as a list of row numbers, got {rows.dtype} {list(rows.shape)}")
        if len(rows) and not (rows.min() >= 0 and rows.max() < len(pixels)):
            raise ConfigError(f"expected indices from 0 to {len(pixels) - 1}, got {rows.min()} to {rows.max()}")
        for name, value, least in (
            ("batch_size", batch_size, 1),
            ("prefetch", prefetch, 0),
            ("world_size", world_size, 1),
        ):
            if value < least:
                raise ConfigError(f"expected {name} >= {least}, got {value}")
        if not 0 <= rank < world_size:
            raise ConfigError(f"expected a rank from 0 to {world_size - 1}, got {rank}")
        most = batch_size * world_size
        if step_size is not None and not world_size <= step_size <= most:
            raise ConfigError(f"expected a step_size from {world_size} to {most}, got {step_size}")
        if not (0 <= seed < 2**64 and 0 <= stream < 2**64):
            raise ConfigError(f"expected seed and stream from 0 to 2^64 - 1, got {seed} and {stream}")
        if dtype not in (torch.float32, torch.uint8):
            raise ConfigError(f"expected dtype torch.float32 or torch.uint8, got {dtype}")
        if len(mean) != 3 or len(std) != 3 or not all(s > 0 for s in std):
            raise ConfigError(f"expected 3 means and 3 positive standard deviations, got {mean} and {std}")
        if num_threads is not None and not 1 <= num_threads <= MAX_THREADS:
            raise ConfigError(f"expected num_threads from 1 to {MAX_THREADS}, got {num_threads}")
        if on_bad_image not in ("raise", "skip"):
            raise ConfigError(f'expected on_bad_image "raise" or "skip", got {on_bad_image!r}')
        self.skipped: dict[int, str] = {}
        """Row and error of every image that was skipped so far."""
        self._pixels = pixels
        self._labels = images.labels
        self._rows = rows.astype(np.int64)
        self._batch_size = batch_size
        self._step_size = step_size or batch_size * world_size
        self._shuffle = shuffle
        self._transform = augment
        self._size = output_size(augment)
        self._seed = seed
        self._stream = stream
        self._num_threads = num_threads or default_threads(images)
        self._drop_last = drop_last
        self._rank = rank
        self._world_size = world_size
        self._prefetch = prefetch
        self._dtype = dtype
        self._mean = mean
        self._std = std
        self._channels_last = channels_last
        self._pin_memory = pin_memory
        self._skip_bad = on_bad_image == "skip"
        self._tools: _Tools | None = None

    def __len__(self) -> int:
        """Batches of this rank in one epoch."""
        full, rest = divmod(len(self._rows), self._step_size)
        has_part = not self._drop_last and len(self._share(rest)) > 0
        return full + has_part

    def epoch(self, epoch: int, start_batch: int = 0, every: int = 1) -> Iterator[Batch]:
        """The batches of an epoch: number `start_batch`, and every `every`-th one after it. Others are not made."""
        if epoch < 0 or not 0 <= start_batch <= len(self):
            raise ConfigError(
                f"expected an epoch >= 0 and a batch from 0 to {len(self)}, got {epoch} and {start_batch}"
            )
        if every < 1:
            raise ConfigError(f"expected every >= 1, got {every}")
        return self._batches(epoch, range(start_batch, len(self), every))

    def _share(self, step: int) -> range:
        """This rank's part of a step of that many images."""
        return range(step * self._rank // self._world_size, step * (self._rank + 1) // self._world_size)

    def _batches(self, epoch: int, batches: range) -> Iterator[Batch]:
        order = self._rows
        if self._shuffle:
            order = order[rust_router.epoch_order(self._seed, self._stream, epoch, len(order))]
        step = self._step_size

        def rows_of(batch: int) -> NDArray[np.int64]:
            rows = order[batch * step : (batch + 1) * step]
            share = self._share(len(rows))
            return rows[share.start : share.stop]

        stop = rust_router.Stop()
        ahead = Ahead(
            lambda batch: self._fill(rows_of(batch), epoch, stop),
            batches,
            self._prefetch,
            at_once=self._at_once if self._prefetch or self._num_threads > 1 else 0,
            stop=stop.set,
        )
        try:
            for _ in batches:
                yield ahead.next()
        finally:
            ahead.close()

    def _fill(self, rows: NDArray[np.int64], epoch: int, stop: rust_router.Stop) -> Batch:
        height, width = self._image_size()
        shape = (height, width, 3) if self._channels_last else (3, height, width)
        tools = self._own_tools()
        if self._pin_memory:  # torch keeps page-locked memory for the next batch by itself
            images = torch.empty((len(rows), *shape), dtype=self._dtype, pin_memory=True)
        else:
            images = tools.buffers.lend((len(rows), *shape))
        skipped = tools.filler.fill(self._pixels, rows, epoch, images.numpy(), stop)
        if skipped:
            self.skipped.update((int(rows[place]), message) for place, message in skipped)
            kept = np.delete(np.arange(len(rows)), [place for place, _ in skipped])
            rows, images = rows[kept], images[torch.from_numpy(kept)]
        if self._channels_last:
            images = images.permute(0, 3, 1, 2)
        labels = torch.from_numpy(self._labels[rows])
        return Batch(images, labels.pin_memory() if self._pin_memory else labels, torch.from_numpy(rows.copy()))

    def _image_size(self) -> tuple[int, int]:
        """Height and width of every batch: those of the transform, or of the first readable image."""
        if self._size is None:
            pixels = self._pixels
            self._size = pixels.shape[1:3] if isinstance(pixels, np.ndarray) else self._first_size(pixels)
        return self._size

    def _first_size(self, source: rust_router.EncodedSource) -> tuple[int, int]:
        for row in self._rows.tolist():
            try:
                return source.size(row)
            except DataError:
                if not self._skip_bad:
                    raise
        raise DataError(f"none of the {len(self._rows)} images can be read")

    @property
    def _at_once(self) -> int:
        """Number of batches that are filled at the same time."""
        return min(self._num_threads, self._prefetch + 1)

    def _own_tools(self) -> _Tools:
        """This process's threads and memory. They are made after a fork, because a child does not inherit threads."""
        if self._tools is None or self._tools.process != os.getpid():
            height, width = self._image_size()
            filler = rust_router.BatchFiller(
                seed=self._seed,
                stream=self._stream,
                transform=compiled(self._transform),
                mean=self._mean,
                std=self._std,
                channels_last=self._channels_last,
                num_threads=1 if self._at_once == self._num_threads else self._num_threads,
                skip_bad=self._skip_bad,
            )
            buffers = Buffers(self._batch_size * height * width * 3, self._dtype, self._prefetch + 3)
            self._tools = _Tools(os.getpid(), filler, buffers)
        return self._tools


def _is_rgb(pixels: NDArray[np.uint8]) -> bool:
    has_form = pixels.dtype == np.uint8 and pixels.ndim == 4 and pixels.shape[3] == 3
    return has_form and pixels.flags.c_contiguous


class _Tools(NamedTuple):
    """What batches are made with."""

    process: int
    filler: rust_router.BatchFiller
    buffers: Buffers
