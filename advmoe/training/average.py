"""The exponential moving average of a network's weights and statistics."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from itertools import chain

import torch
from torch import Tensor

from advmoe.models.network import RoutedNetwork


class WeightAverage:
    """The average of a network, as torch's `AveragedModel` computes it with `use_buffers`, bit for bit.

    That class compares a number on the host with one on the device in each update, and averages the
    integers of BatchNorm one by one. Here a GPU never waits. Numbers of batches, which an average
    would round down, are copied.

    Args:
        model: The network in training.
        decay: Share of the average that an update keeps, in (0, 1).
    """

    def __init__(self, model: RoutedNetwork, decay: float) -> None:
        self.network = copy.deepcopy(model)
        """The average itself."""
        self.updates = 0
        self._decay = decay
        pairs = [
            (kept.detach(), own.detach()) for kept, own in zip(_tensors(self.network), _tensors(model), strict=True)
        ]
        self._averaged = [pair for pair in pairs if pair[0].is_floating_point()]
        self._copied = [pair for pair in pairs if not pair[0].is_floating_point()]

    @torch.no_grad()
    def update(self) -> None:
        """Take the network's present weights in. The first ones are copied."""
        kept, own = (list(values) for values in zip(*self._averaged, strict=True))
        if self.updates == 0:
            torch._foreach_copy_(kept, own)
        else:
            torch._foreach_lerp_(kept, own, 1.0 - self._decay)
        for number, other in self._copied:
            number.copy_(other)
        self.updates += 1


def _tensors(model: RoutedNetwork) -> Iterator[Tensor]:
    """Each parameter and buffer once."""
    return chain(model.parameters(), model.buffers())
