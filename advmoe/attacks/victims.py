"""The input of an attack: a model, images with labels and numbers, the attack's settings and a seed."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from advmoe.attacks.pgd import starting_point
from advmoe.config import AttackConfig
from advmoe.data.loader import Batch
from advmoe.models.network import RoutedNetwork
from advmoe.seeding import generator_for


@dataclass(frozen=True, kw_only=True)
class Victims:
    """A batch of images under attack. Every attack of the evaluation takes one of these."""

    model: nn.Module
    """In eval mode with its parameters frozen (`advmoe.models.modes.evaluating`)."""
    images: Tensor
    """[B, 3, H, W] in [0, 1]."""
    labels: Tensor
    """[B]."""
    indices: Tensor
    """[B], on the CPU: the images' numbers in their data set, the keys of the random starts. A
    result therefore depends neither on the batch size, nor on the order of the images, nor on which
    other images were chosen."""
    attack: AttackConfig
    """Radius, steps, restarts and kind of start."""
    seed: int
    """Seed of everything random in the attack."""

    @classmethod
    def of(
        cls,
        model: nn.Module,
        batch: Batch,
        attack: AttackConfig,
        *,
        seed: int,
        numbers: NDArray[np.int64] | None = None,
    ) -> Victims:
        """The images of a loader's batch, on the model's device (the CPU for a model without parameters).

        Args:
            model: The model to attack.
            batch: The images. Its indices are rows of the loader's image set.
            attack: Settings of the attack.
            seed: Seed of the attack.
            numbers: The number in its data set of each image of that image set, [I], if the set is
                a choice. Default: the rows.
        """
        parameter = next(model.parameters(), None)
        device = torch.device("cpu") if parameter is None else parameter.device
        return cls(
            model=model,
            images=batch.images.to(device),
            labels=batch.labels.to(device),
            indices=batch.indices if numbers is None else torch.from_numpy(numbers[batch.indices.numpy()]),
            attack=attack,
            seed=seed,
        )

    def __len__(self) -> int:
        return len(self.images)

    @property
    def network(self) -> RoutedNetwork:
        """The model, where the attack needs one that routes."""
        assert isinstance(self.model, RoutedNetwork)
        return self.model

    def take(self, rows: Tensor) -> Victims:
        """Some of the images: a mask [B] or positions in the batch."""
        return dataclasses.replace(
            self,
            images=self.images[rows],
            labels=self.labels[rows],
            indices=self.indices[rows.to(self.indices.device)],
        )

    def under(self, attack: AttackConfig) -> Victims:
        """The same images under another attack."""
        return dataclasses.replace(self, attack=attack)

    def starts(self, restarts: Sequence[int] = (0,)) -> Tensor:
        """First candidates for every restart of every image, [len(restarts) * B, 3, H, W], restart by restart.

        Args:
            restarts: Numbers of the restarts. The same number gives an image the same start. Where
                restart 0 starts at the clean image, the others are uniform: a second attack from
                the same start would be the first.
        """
        later = dataclasses.replace(self.attack, start="uniform") if self.attack.start == "clean" else self.attack
        drawn = [
            starting_point(image[None], later if restart else self.attack, generator_for(self.seed, restart, index))
            for restart in restarts
            for image, index in zip(self.images.cpu(), self.indices.tolist(), strict=True)
        ]
        return torch.cat(drawn).to(self.images.device) if drawn else self.images

    @torch.no_grad()
    def right(self, images: Tensor | None = None) -> Tensor:
        """Whether the model classifies each image, or the given version of it, correctly, [B] bool."""
        if not len(self):  # not every module takes an empty batch
            return torch.zeros_like(self.labels, dtype=torch.bool)
        logits: Tensor = self.model(self.images if images is None else images)
        return logits.argmax(dim=1) == self.labels
