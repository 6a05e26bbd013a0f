"""Memory for batches that is used again once nobody sees the batch any more.

Fresh memory for every batch costs the system's page faults, about half the time of filling it.
"""

from __future__ import annotations

import sys

import numpy as np
import torch
from torch import Tensor

UNSEEN = 3
"""References to a buffer that only the pool has: its list, the loop's variable and the argument of `getrefcount`."""


class Buffers:
    """Lends tensors of up to `num_elements` elements.

    A tensor and everything that shares its memory hold a reference to the array it was made of, so an array that only
    the pool refers to is free. At most `num_kept` arrays wait to be used again.
    """

    def __init__(self, num_elements: int, dtype: torch.dtype, num_kept: int) -> None:
        self._num_elements = num_elements
        self._dtype = torch.empty(0, dtype=dtype).numpy().dtype
        self._num_kept = num_kept
        self._arrays: list[np.ndarray[tuple[int], np.dtype[np.float32 | np.uint8]]] = []

    def lend(self, shape: tuple[int, ...]) -> Tensor:
        """A tensor of that shape with any content, C-contiguous."""
        elements = int(np.prod(shape))
        for array in self._arrays:
            if sys.getrefcount(array) <= UNSEEN:
                return torch.from_numpy(array[:elements].reshape(shape))
        array = np.empty(self._num_elements, dtype=self._dtype)
        if len(self._arrays) < self._num_kept:
            self._arrays.append(array)
        return torch.from_numpy(array[:elements].reshape(shape))
