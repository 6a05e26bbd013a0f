"""Types of the compiled module; `tests/test_stub.py` compares them with what it holds."""

from collections.abc import Sequence
from os import PathLike
from typing import final

import numpy as np
from numpy.typing import NDArray

def epoch_order(seed: int, stream: int, epoch: int, len: int) -> NDArray[np.int64]: ...
def decode_image(encoded: bytes) -> NDArray[np.uint8]: ...
def open_pack(
    path: str | PathLike[str],
) -> tuple[NDArray[np.uint64], NDArray[np.uint64], NDArray[np.int64], str]: ...

@final
class Transform:
    @staticmethod
    def as_they_are() -> Transform: ...
    @staticmethod
    def crop_flip(padding: int, flip: bool) -> Transform: ...
    @staticmethod
    def random_resized_crop(scale: tuple[float, float], ratio: tuple[float, float], flip: bool) -> Transform: ...
    @staticmethod
    def resize_center_crop(resize: int) -> Transform: ...

@final
class EncodedSource:
    def __new__(
        cls,
        files: Sequence[str | PathLike[str]],
        file_indices: NDArray[np.uint32],
        offsets: NDArray[np.uint64],
        lengths: NDArray[np.uint64],
    ) -> EncodedSource: ...
    def __len__(self) -> int: ...
    def size(self, row: int) -> tuple[int, int]: ...

@final
class PackWriter:
    def __new__(cls, path: str | PathLike[str]) -> PackWriter: ...
    def add(self, image: bytes, label: int) -> None: ...
    def finish(self, text: str) -> None: ...
    def close(self) -> None: ...

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
        transform: Transform,
        mean: tuple[float, float, float],
        std: tuple[float, float, float],
        channels_last: bool,
        num_threads: int,
        skip_bad: bool,
    ) -> BatchFiller: ...
    def fill(
        self,
        images: NDArray[np.uint8] | EncodedSource,
        rows: NDArray[np.int64],
        epoch: int,
        out: NDArray[np.uint8] | NDArray[np.float32],
        stop: Stop,
    ) -> list[tuple[int, str]]: ...

@final
class Channels:
    def __new__(cls, layers: Sequence[NDArray[np.bool_]]) -> Channels: ...
    @property
    def num_channels(self) -> int: ...

@final
class RouteLog:
    def __new__(cls, num_experts: Sequence[int]) -> RouteLog: ...
    @staticmethod
    def load(path: str | PathLike[str]) -> RouteLog: ...
    def save(self, path: str | PathLike[str]) -> None: ...
    @property
    def num_experts(self) -> list[int]: ...
    def keys(self) -> list[tuple[str, int]]: ...
    def append(
        self,
        condition: tuple[str, int],
        indices: NDArray[np.int64],
        experts: NDArray[np.uint8],
        labels: NDArray[np.int32],
        predictions: NDArray[np.int32],
    ) -> None: ...
    def merge(self, other: RouteLog) -> None: ...
    def forget_before(self, epoch: int) -> None: ...
    def rows(
        self, condition: tuple[str, int]
    ) -> tuple[NDArray[np.int64], NDArray[np.uint8], NDArray[np.int32], NDArray[np.int32]]: ...
    def expert_load(self, condition: tuple[str, int], num_classes: int) -> NDArray[np.uint64]: ...
    def unique(self, condition: tuple[str, int]) -> tuple[NDArray[np.uint8], NDArray[np.uint64]]: ...
    def compare(
        self, before: tuple[str, int], after: tuple[str, int]
    ) -> tuple[int, list[int], list[int], list[int]] | None: ...
    def mask_similarity(
        self, condition: tuple[str, int], channels: Channels, mask: NDArray[np.bool_]
    ) -> tuple[NDArray[np.float64], NDArray[np.float64]]: ...
    def overlap(
        self, before: tuple[str, int], after: tuple[str, int], channels: Channels
    ) -> tuple[NDArray[np.int64], NDArray[np.float64]]: ...
    def diversity(
        self,
        condition: tuple[str, int],
        channels: Channels,
        *,
        num_bins: int,
        max_exact: int,
        sampled: int,
        seed: int,
    ) -> tuple[NDArray[np.uint64], int, bool, float, float]: ...
