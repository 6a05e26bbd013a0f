"""The batches of a run: one stream of shuffled training images for each level, on the device."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch

from advmoe.config import ModelConfig, TrainConfig
from advmoe.data.loader import Batch, BatchLoader
from advmoe.data.views import training_transform
from advmoe.distributed import together, world
from advmoe.errors import ConfigError, DataError
from advmoe.training.split import Split
from advmoe.training.union import placed


class Streams:
    """The training images of a run in several orders. Step t takes the t-th batch of each order.

    Every rank gets its share of each batch.

    Args:
        split: The images.
        model_config: Its image size counts.
        config: Of the run.
        periods: For each order, the steps that need a batch: every k-th; 0 is none. Other batches
            are not made. The last order is needed in all steps.
        device: Device of the batches.

    Attributes:
        steps_per_epoch: Full batches in an epoch. The last, smaller one is left out.

    Raises:
        ConfigError: The training images do not fill a batch, or the ranks are more than its images.
    """

    def __init__(
        self,
        split: Split,
        model_config: ModelConfig,
        config: TrainConfig,
        *,
        periods: Sequence[int],
        device: torch.device,
    ) -> None:
        self._config = config
        self._device = device
        self._periods = periods
        self.loaders = [
            _loader(split, model_config.image_size, config, stream, device) for stream in range(len(periods))
        ]
        self.steps_per_epoch = len(self.loaders[-1])
        if self.steps_per_epoch == 0:
            raise ConfigError(
                f"{len(split.train_indices)} training images do not fill one batch of {config.batch_size}; "
                "use a smaller batch size",
                "batch_size",
            )

    def batches(self, step: int, epochs: int) -> Iterator[list[Batch | None]]:
        """The batches from step `step` to the end of the last of `epochs` epochs, those of one step at a
        time: one of each stream, or None where the step needs none.

        Raises:
            DataError: An image cannot be decoded, and the config does not say to skip such.
        """
        try:
            yield from self._batches(step, epochs)
        except DataError as error:
            if self._config.skip_bad_images:
                raise
            raise DataError(
                f"{error}; mend the file or skip bad images, then resume the run", "skip_bad_images", "resume"
            ) from error

    def _batches(self, step: int, epochs: int) -> Iterator[list[Batch | None]]:
        first, start = divmod(step, self.steps_per_epoch)
        for epoch in range(first, epochs):
            before = epoch * self.steps_per_epoch
            # of each order, the batches from the first one on that a step needs
            streams = [
                loader.epoch(epoch, min(start + -(before + start) % period, self.steps_per_epoch), every=period)
                if period
                else iter(())
                for loader, period in zip(self.loaders, self._periods, strict=True)
            ]
            for number in range(start, self.steps_per_epoch):
                due = [bool(period) and (before + number) % period == 0 for period in self._periods]
                yield self._step([stream for stream, is_due in zip(streams, due, strict=True) if is_due], due)
            start = 0

    def _step(self, streams: Sequence[Iterator[Batch]], due: Sequence[bool]) -> list[Batch | None]:
        """The next batches of some streams, at the places that are due."""
        own = together(lambda: [next(stream) for stream in streams])
        batches = iter(placed(own, self._config.batch_size, counted=self._config.skip_bad_images))
        return [on_device(next(batches), self._device) if is_due else None for is_due in due]

    def take_skipped(self) -> dict[int, str]:
        """The row of each image that this process has skipped since the last call, and why it could not be decoded.

        An image counts once, also if several orders had it.
        """
        found: dict[int, str] = {}
        for loader in self.loaders:
            found |= loader.skipped
            loader.skipped.clear()
        return found


def on_device(batch: Batch, device: torch.device) -> Batch:
    """The batch on a device, its images as float32 in [0, 1].

    Images may arrive as bytes, which take a quarter of the copy. The result is that of a loader of floats, bit for bit.
    """
    images = batch.images.to(device, non_blocking=True)
    if images.dtype == torch.uint8:
        # by a tensor: a GPU multiplies by 1 / 255 where a Python number divides, and rounds differently
        images = images.float().div_(torch.full((), 255.0, device=device))
    return batch._replace(images=images, labels=batch.labels.to(device, non_blocking=True))


def _loader(split: Split, image_size: int, config: TrainConfig, stream: int, device: torch.device) -> BatchLoader:
    ranks = world()
    if ranks.size > config.batch_size:
        raise ConfigError(
            f"{ranks.size} processes cannot share batches of {config.batch_size} images; "
            "start fewer, or use larger batches",
            "batch_size",
        )
    on_gpu = device.type == "cuda"
    return BatchLoader(
        split.train,
        indices=split.train_indices,
        batch_size=math.ceil(config.batch_size / ranks.size),
        step_size=config.batch_size,
        rank=ranks.rank,
        world_size=ranks.size,
        shuffle=True,
        augment=training_transform(split.train, image_size, flip=config.flip),
        seed=config.seed,
        stream=stream,
        drop_last=True,
        dtype=torch.uint8 if on_gpu else torch.float32,
        pin_memory=on_gpu,
        on_bad_image="skip" if config.skip_bad_images else "raise",
    )
