"""Memory for batches that is used again once nobody sees the batch any more.

Fresh memory for every batch costs the system's page faults, about half the time of filling it.
"""

from __future__ import annotations

import math
import sys
from collections import deque

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

UNSEEN = 2
"""References to an array that nobody else has: a local variable and the argument of `getrefcount`."""


class Buffers:
    """Lends tensors of up to `num_elements` elements, to several threads at once.

    A tensor and everything that shares its memory hold a reference to the array it was made of, so an array that only
    the pool refers to is free. At most `num_kept` arrays are kept to be used again.
    """

    def __init__(self, num_elements: int, dtype: torch.dtype, num_kept: int) -> None:
        self._num_elements = num_elements
        self._dtype = torch.empty(0, dtype=dtype).numpy().dtype
        self._arrays: deque[NDArray[np.float32 | np.uint8]] = deque(maxlen=num_kept)

    def lend(self, shape: tuple[int, ...]) -> Tensor:
        """A tensor of that shape with any content, C-contiguous."""
        array = self._take()
        tensor = torch.from_numpy(array[: math.prod(shape)].reshape(shape))
        self._arrays.append(array)
        return tensor

    def _take(self) -> NDArray[np.float32 | np.uint8]:
        """An array that is free; taken out of the pool, no other thread can find it so."""
        for _ in range(len(self._arrays)):
            try:
                array = self._arrays.popleft()
            except IndexError:  # other threads have all of them in their hands
                break
            if sys.getrefcount(array) <= UNSEEN:
                return array
            self._arrays.append(array)
        return np.empty(self._num_elements, dtype=self._dtype)
