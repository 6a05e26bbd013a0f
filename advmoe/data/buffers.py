"""A pool of memory for batches: the memory of a deleted batch is used for a later one.

Without the pool, page faults in fresh memory take about half the time of filling a batch.
"""

from __future__ import annotations

import math
import weakref
from collections import deque

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


class Buffers:
    """Lends tensors of up to `num_elements` elements. Several threads may call it at once.

    A tensor, its views and everything else that shares its memory keep one NumPy array alive. When
    that array is deleted, its memory returns to the pool, which keeps at most `num_kept` free
    buffers.
    """

    def __init__(self, num_elements: int, dtype: torch.dtype, num_kept: int) -> None:
        self._num_elements = num_elements
        self._dtype = torch.empty(0, dtype=dtype).numpy().dtype
        self._free: deque[NDArray[np.float32 | np.uint8]] = deque(maxlen=num_kept)

    def lend(self, shape: tuple[int, ...]) -> Tensor:
        """A C-contiguous tensor of this shape with undefined content."""
        try:
            buffer = self._free.popleft()
        except IndexError:
            buffer = np.empty(self._num_elements, dtype=self._dtype)
        lent = buffer[: math.prod(shape)].reshape(shape)
        weakref.finalize(lent, self._free.append, buffer).atexit = False
        return torch.from_numpy(lent)
