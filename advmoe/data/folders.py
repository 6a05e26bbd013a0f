"""Image folders: one folder per class in ``train`` and in ``val``, read where they lie."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from advmoe.data.sets import Dataset, DatasetInfo, EncodedSet
from advmoe.errors import DataError

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png")
VALIDATION_NAMES = ("val", "validation", "valid", "test")

FOLDER = DatasetInfo(
    name="folder",
    num_classes=0,
    image_size=224,
    resized=True,
    mean=(0.485, 0.456, 0.406),
    std=(0.229, 0.224, 0.225),
    eps=2 / 255,
)
"""Any image folder; its classes are the names of the folders in ``train``."""


def folder_info(data_dir: Path) -> DatasetInfo:
    """What is known of the image folder at ``data_dir``: its class names, besides the defaults of `FOLDER`."""
    names = class_folders(find_split(data_dir, ("train",)))
    if len(names) < 2:
        raise DataError(f"{data_dir / 'train'} has the class folder {names[0]} only; expected at least 2 classes")
    return replace(FOLDER, num_classes=len(names), class_names=names)


def load_folder(data_dir: Path) -> Dataset:
    """``train/<class>/*`` and ``val/<class>/*`` (or ``validation``, ``valid``, ``test``) under ``data_dir``.

    Classes are numbered by their sorted names. Nothing is decoded here.

    Raises `DataError` for a missing split, a class without images, or images outside class folders.
    """
    info = folder_info(data_dir)
    train, test = read_splits(data_dir, info.class_names)
    return Dataset(info=info, train=train, test=test)


def read_splits(root: Path, class_names: tuple[str, ...]) -> tuple[EncodedSet, EncodedSet]:
    """The training and test images of the image folder at ``root``, labelled by the position of their class."""
    folder, test_folder = find_split(root, ("train",)), find_split(root, VALIDATION_NAMES)
    train = image_folder(folder, class_names)
    empty = np.flatnonzero(np.bincount(train.labels, minlength=len(class_names)) == 0)
    if empty.size:
        raise DataError(f"{folder / class_names[empty[0]]} holds no JPEG or PNG images, {empty.size} classes in all")
    return train, image_folder(test_folder, class_names)


def find_split(root: Path, names: Sequence[str]) -> Path:
    """The first of the folders ``names`` in ``root``. Raises `DataError` when there is none."""
    for name in names:
        if (root / name).is_dir():
            return root / name
    raise DataError(
        f"{root} has no folder {' or '.join(names)}; expected an image folder with train/<class>/* and val/<class>/*",
        "data_dir",
    )


def class_folders(split: Path) -> tuple[str, ...]:
    """Sorted names of the class folders in ``split``. Raises `DataError` when there are none."""
    try:
        names = sorted(entry.name for entry in os.scandir(split) if entry.is_dir() and not entry.name.startswith("."))
    except OSError as error:
        raise DataError(f"expected a folder of class folders, but {split} cannot be read: {error.strerror}") from error
    if not names:
        raise DataError(f"{split} has no class folders; expected {split}/<class>/*")
    return tuple(names)


def list_images(folder: Path) -> list[str]:
    """The JPEG and PNG files below ``folder``, relative to it with ``/``, in an order that is always the same."""
    names = []
    for place, folders, files in os.walk(folder, followlinks=True):
        folders.sort()
        below = Path(place).relative_to(folder).as_posix()
        prefix = "" if below == "." else f"{below}/"
        names += [prefix + file for file in sorted(files) if is_image(file)]
    return names


def is_image(name: str) -> bool:
    """Whether a file is taken for an image by its name (what it really holds is seen when it is decoded)."""
    return name.lower().endswith(IMAGE_SUFFIXES) and not name.startswith(".")


def label_by_folder(names: Sequence[str], class_names: Sequence[str], *, where: str) -> NDArray[np.int64]:
    """The label of each file by the first folder of its relative name. Raises `DataError` when that is no class."""
    label_of = {name: label for label, name in enumerate(class_names)}
    labels = np.empty(len(names), np.int64)
    for row, name in enumerate(names):
        class_name, slash, _ = name.partition("/")
        if not slash:
            raise DataError(f"{where}/{name} lies outside the class folders; move it to {where}/<class>/")
        if class_name not in label_of:
            raise DataError(f"{where}/{class_name} is a class that the training images do not have")
        labels[row] = label_of[class_name]
    return labels


def image_folder(folder: str | os.PathLike[str], class_names: tuple[str, ...] | None = None) -> EncodedSet:
    """The images ``<class>/*`` in ``folder``, labelled by the position of their class in ``class_names``.

    By default the classes are the sorted names of the folders in ``folder``.

    Raises `DataError` when there are no images, or some lie elsewhere than in the folders of the classes.
    """
    folder = Path(folder)
    class_names = class_names or class_folders(folder)
    names = list_images(folder)
    if not names:
        raise DataError(f"{folder} holds no JPEG or PNG images; expected {folder}/<class>/*")
    return EncodedSet(
        files=tuple(f"{folder}/{name}" for name in names),
        file_index=np.arange(len(names)),
        offsets=np.zeros(len(names), np.int64),
        lengths=np.zeros(len(names), np.int64),
        labels=label_by_folder(names, class_names, where=str(folder)),
        class_names=class_names,
    )
