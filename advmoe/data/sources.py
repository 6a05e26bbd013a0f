"""The data sets by name: what is known of each, and its images from whatever layout the user has."""

from __future__ import annotations

import difflib
from functools import partial
from pathlib import Path
from typing import Protocol

from advmoe.data import digits
from advmoe.data.cifar import CIFAR10, CIFAR100, load_cifar
from advmoe.data.locate import default_data_dir
from advmoe.data.sets import Dataset, DatasetInfo, ImageSet, Progress
from advmoe.errors import ConfigError

__all__ = [
    "Dataset",
    "DatasetInfo",
    "ImageSet",
    "Progress",
    "dataset_info",
    "dataset_names",
    "load_dataset",
]


class _Load(Protocol):
    def __call__(self, data_dir: Path, *, download: bool, progress: Progress | None) -> Dataset: ...


_SOURCES: dict[str, tuple[DatasetInfo, _Load]] = {
    "cifar10": (CIFAR10.info, partial(load_cifar, CIFAR10)),
    "cifar100": (CIFAR100.info, partial(load_cifar, CIFAR100)),
    "digits": (digits.INFO, lambda data_dir, *, download, progress: digits.load_digits()),
}


def dataset_names() -> tuple[str, ...]:
    """Names that `dataset_info` and `load_dataset` know."""
    return tuple(_SOURCES)


def dataset_info(name: str) -> DatasetInfo:
    """What is known of the data set from its name alone. Raises `ConfigError` for an unknown name."""
    return _source(name)[0]


def load_dataset(
    name: str, data_dir: Path | None = None, *, download: bool = True, progress: Progress | None = None
) -> Dataset:
    """Load a data set from whatever layout lies under ``data_dir``, downloading it where it may be and must.

    ``data_dir`` is ``$ADVMOE_DATA_DIR`` or a folder in the user's cache when ``None``. Existing files are never moved
    or changed. ``progress(what, done, total)`` is called while something slow goes on.

    Raises `ConfigError` for an unknown name, `DataError` for data that is missing, incomplete or malformed.
    """
    _, load = _source(name)
    return load(data_dir if data_dir is not None else default_data_dir(), download=download, progress=progress)


def _source(name: str) -> tuple[DatasetInfo, _Load]:
    try:
        return _SOURCES[name]
    except KeyError:
        closest = difflib.get_close_matches(name.lower().replace("-", "").replace("_", ""), _SOURCES, n=1)
        hint = f"; did you mean {closest[0]!r}?" if closest else ""
        raise ConfigError(f"unknown data set {name!r}: known are {', '.join(_SOURCES)}{hint}") from None
