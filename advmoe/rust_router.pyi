"""Types of the compiled module; `tests/test_stub.py` compares them with what it holds."""

from typing import final

import numpy as np
from numpy.typing import NDArray

def epoch_order(seed: int, stream: int, epoch: int, len: int) -> NDArray[np.int64]: ...
@final
class CropFlip:
    def __new__(cls, padding: int, flip: bool) -> CropFlip: ...

@final
class Stop:
    def __new__(cls) -> Stop: ...
    def set(self) -> None: ...

@final
class BatchFiller:
    def __new__(
        cls,
        *,
        seed: int,
        stream: int,
        augment: CropFlip | None,
        mean: tuple[float, float, float],
        std: tuple[float, float, float],
        channels_last: bool,
        num_threads: int,
    ) -> BatchFiller: ...
    def fill(
        self,
        images: NDArray[np.uint8],
        rows: NDArray[np.int64],
        epoch: int,
        out: NDArray[np.uint8] | NDArray[np.float32],
        stop: Stop,
    ) -> None: ...
