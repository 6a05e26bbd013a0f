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
        kept, own = list(_tensors(self.network)), list(_tensors(model))
        averaged = [number for number, tensor in enumerate(kept) if tensor.is_floating_point()]
        copied = [number for number, tensor in enumerate(kept) if not tensor.is_floating_point()]
        self._averaged = [kept[number] for number in averaged], [own[number] for number in averaged]
        self._copied = [kept[number] for number in copied], [own[number] for number in copied]

    @torch.no_grad()
    def update(self) -> None:
        """Take the network's present weights in. The first ones are copied."""
        if self.updates == 0:
            torch._foreach_copy_(*self._averaged)
        else:
            torch._foreach_lerp_(*self._averaged, 1.0 - self._decay)
        if self._copied[0]:  # a transformer may have none
            torch._foreach_copy_(*self._copied)
        self.updates += 1


def _tensors(model: RoutedNetwork) -> Iterator[Tensor]:
    """Each parameter and buffer once."""
    return chain(model.parameters(), model.buffers())
