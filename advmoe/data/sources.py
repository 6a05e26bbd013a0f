"""The data sets by name: facts of each, and a loader that accepts every layout of its files."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from advmoe.data.cifar import CIFAR10, CIFAR100, Cifar, load_cifar
from advmoe.data.digits import DIGITS, load_digits
from advmoe.data.folders import FOLDER, folder_info, load_folder
from advmoe.data.imagenet import IMAGENET, load_imagenet
from advmoe.data.locate import default_data_dir
from advmoe.data.names import DATASETS, check_name
from advmoe.data.sets import Announce, Dataset, DatasetInfo, EncodedSet, Images, ImageSet, Progress
from advmoe.data.tiny_imagenet import TINY_IMAGENET, load_tiny_imagenet
from advmoe.data.views import evaluation_view
from advmoe.errors import ConfigError, DataError

__all__ = [
    "Dataset",
    "DatasetInfo",
    "EncodedSet",
    "ImageSet",
    "Images",
    "Progress",
    "dataset_info",
    "dataset_names",
    "is_packaged",
    "known_info",
    "load_dataset",
    "shorter_side",
]


@dataclass(frozen=True)
class _Source:
    info: DatasetInfo
    load: Callable[[Path, bool, Progress | None, Announce | None], Dataset]
    """``(data_dir, download, progress, announce)`` → the data set."""
    packaged: bool = False
    """Whether the images are part of this package, so that no folder has them."""


def _cifar(cifar: Cifar) -> _Source:
    return _Source(
        cifar.info,
        lambda data_dir, download, progress, announce: load_cifar(
            cifar, data_dir, download=download, progress=progress, announce=announce
        ),
    )


_SOURCES = {
    source.info.name: source
    for source in (
        _cifar(CIFAR10),
        _cifar(CIFAR100),
        _Source(
            TINY_IMAGENET.info,
            lambda data_dir, download, progress, announce: load_tiny_imagenet(
                TINY_IMAGENET, data_dir, download=download, progress=progress, announce=announce
            ),
        ),
        _Source(
            IMAGENET.info, lambda data_dir, download, progress, _: load_imagenet(IMAGENET, data_dir, progress=progress)
        ),
        _Source(FOLDER, lambda data_dir, *_: load_folder(data_dir)),
        _Source(DIGITS, lambda *_: load_digits(), packaged=True),
    )
}


def dataset_names() -> tuple[str, ...]:
    """Names that `dataset_info` and `load_dataset` know."""
    return DATASETS


def dataset_info(name: str, data_dir: Path | str | None = None) -> DatasetInfo:
    """Facts of a data set that are known before its images are read.

    For ``folder`` they include the names of the class folders in ``data_dir``.

    Raises:
        ConfigError: No data set has this name, or ``data_dir`` is given for one without files.
        DataError: ``data_dir`` is not an image folder.
    """
    info, place = _source(name).info, _place(name, data_dir)
    return folder_info(place) if info is FOLDER else info


def is_packaged(name: str) -> bool:
    """Whether the images of a data set come with this package and lie in no data folder."""
    return name in _SOURCES and _SOURCES[name].packaged


def known_info(name: str) -> DatasetInfo:
    """Facts of a data set that need none of its files. What only the files tell is left out: the class
    names of ``tinyimagenet``, and all about the classes of ``folder``.

    Raises:
        ConfigError: No data set has this name.
    """
    return _source(name).info


def shorter_side(name: str | None, size: int) -> int:
    """In an evaluation, images of different sizes are resized to this shorter side; then the
    middle, ``size`` pixels wide, is cut out.

    The result is ``size`` if all images of the set have one size, or if no set has this name.
    """
    return evaluation_view(size).resize if name in _SOURCES and _SOURCES[name].info.resized else size


def load_dataset(
    name: str,
    data_dir: Path | str | None = None,
    *,
    download: bool = True,
    progress: Progress | None = None,
    announce: Announce | None = None,
) -> Dataset:
    """Load a data set from any layout under `data_dir`, or download it. Existing files are never moved or changed.

    Args:
        name: One of `dataset_names`.
        data_dir: An existing folder; by default `$ADVMOE_DATA_DIR` or a folder in the user's cache,
            which is made when something is downloaded to it.
        download: Whether a set that is missing may be downloaded.
        progress: Called as `progress(what, done, total)` during slow work.
        announce: Called with one sentence before a download: what, how much, from where, to which
            folder.

    Returns:
        The images in memory (`ImageSet`); for `imagenet` and `folder`, their places in files
        (`EncodedSet`).

    Raises:
        ConfigError: No set has this name, or `data_dir` is given for one that comes with the package.
        DataError: The data are missing, incomplete or malformed.
    """
    return _source(name).load(_place(name, data_dir), download, progress, announce)


def _place(name: str, data_dir: Path | str | None) -> Path:
    if data_dir is None and name == FOLDER.name:
        raise DataError("data set 'folder' needs the folder of your images, with train/<class>/*", "data_dir")
    if data_dir is not None and is_packaged(name):
        raise ConfigError(
            f"the images of {name} come with advmoe, no folder is read for them; leave it out", "data_dir"
        )
    return default_data_dir() if data_dir is None else Path(data_dir)


def _source(name: str) -> _Source:
    check_name(name)
    return _SOURCES[name]
