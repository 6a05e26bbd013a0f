"""Image folders with one subfolder per class in ``train`` and in ``val``. Files are read where they are."""

from __future__ import annotations

import contextlib
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from advmoe.data.locate import check_data_dir
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
"""An image folder. Its classes are the names of the folders in ``train``."""


IMAGE_SIZES = (32, 64, 96, 128, 160, 224)
"""Candidates for the default image size of a folder."""
CPU_SIZE = 64
"""Largest default size without a GPU. The time of a step grows with the square of the size."""
SAMPLED = 200
"""Number of image headers that are read to choose a size."""
FEW_PER_CLASS = 100
UNEQUAL = 10
"""A class that has so many times the images of another makes the other one small."""
FEW_TESTED = 200
LISTED = 5
"""Classes or endings of files that a message lists."""


def folder_info(data_dir: Path) -> DatasetInfo:
    """The class names of the image folder at `data_dir`, a size that suits its images, and warnings.

    Raises:
        DataError: `data_dir` is not an image folder.
    """
    return load_folder(data_dir).info


def load_folder(data_dir: Path) -> Dataset:
    """The images `train/<class>/*` and `val/<class>/*` (or `validation`, `valid`, `test`) under `data_dir`.

    Classes are numbered by their sorted names. Only the headers of some images are read.

    Raises:
        DataError: A split is missing, a class has no images, images lie outside class folders, or a
            folder is linked into itself.
    """
    check_data_dir(data_dir)
    train_folder = find_split(data_dir, ("train",))
    names = class_folders(train_folder)
    if len(names) < 2:
        raise DataError(f"{train_folder} has the class folder {names[0]} only; expected at least 2 classes")
    train, test, others, gone = read_splits(data_dir, names)
    size, reason = suggest_size(train)
    info = replace(
        FOLDER,
        num_classes=len(names),
        class_names=names,
        train_size=len(train),
        test_size=len(test),
        image_size=size,
        notes=(reason, what_is_there(data_dir, train, test, others)),
        warnings=warnings_of(train, test),
        gone=gone,
    )
    return Dataset(info=info, train=train, test=test)


def suggest_size(images: EncodedSet) -> tuple[int, str]:
    """The default size for these images, and the reason for it: the largest of `IMAGE_SIZES` that
    does not enlarge the median image.

    Unreadable images are ignored here. The decoder reports them later.
    """
    sides = []
    for row in np.unique(np.linspace(0, len(images) - 1, SAMPLED).astype(int)).tolist():
        with contextlib.suppress(DataError):
            sides.append(min(images.source.size(row)))
    if not sides:
        return IMAGE_SIZES[0], "no image could be read to choose a size from"
    median = round(float(np.median(sides)))
    fitting = max((size for size in IMAGE_SIZES if size <= median), default=IMAGE_SIZES[0])
    size = fitting if torch.cuda.is_available() else min(fitting, CPU_SIZE)
    capped = f"; {fitting} would fit, but is slow without a GPU" if size < fitting else ""
    return (
        size,
        f"the shorter side of the images has {median} pixels (median): the default image size is {size}{capped}",
    )


def what_is_there(root: Path, train: EncodedSet, test: EncodedSet, others: Counter[str]) -> str:
    """The numbers of images and classes of a folder, and of files that are not read, by their ending."""
    told = f"{len(train)} training and {len(test)} test images of {len(train.class_names)} classes"
    if others:
        told = f"{told}; not read, since they are not JPEG or PNG: {listed(others)}"
    test_folder = find_split(root, VALIDATION_NAMES)
    used, unused = (
        test_folder.name,
        [name for name in VALIDATION_NAMES if (root / name).is_dir() and not (root / name).samefile(test_folder)],
    )
    if unused:
        told = f"{told}; the test images are those of {used}, and {' and '.join(unused)} is not read"
    return told


def listed(endings: Counter[str]) -> str:
    """E.g. `6 .webp, 1 .gif`, the most frequent first, and the number of files with endings that are not listed."""
    shown = [f"{number} {ending}" for ending, number in endings.most_common(LISTED)]
    if len(endings) > LISTED:
        others = [number for _, number in endings.most_common()[LISTED:]]
        shown.append(f"{sum(others)} with {len(others)} other ending{'s' * (len(others) > 1)}")
    return ", ".join(shown)


def enumerated(names: Sequence[str]) -> str:
    """E.g. `a, b and 7 more`."""
    shown, more = names[:LISTED], len(names) - LISTED
    return ", ".join(shown) + (f" and {more} more" if more > 0 else "")


def warnings_of(train: EncodedSet, test: EncodedSet) -> tuple[str, ...]:
    """Warnings about few images, or about classes of very different sizes."""
    found = []
    counts = np.bincount(train.labels, minlength=len(train.class_names))
    sizes = {train.class_names[label]: int(counts[label]) for label in np.argsort(counts, kind="stable").tolist()}
    few = [f"{name} ({size})" for name, size in sizes.items() if size < FEW_PER_CLASS]
    if few:
        found.append(
            f"fewer than {FEW_PER_CLASS} training images of {enumerated(few)}; adversarial training usually needs "
            "hundreds per class, so expect low robust accuracy"
        )
    largest, most = list(sizes.items())[-1]
    small = [f"{name} ({size})" for name, size in sizes.items() if most >= UNEQUAL * size]
    if small:
        found.append(
            f"class {largest} has {most} training images, {UNEQUAL} times as many as {enumerated(small)} or more; "
            f"accuracy over all images says little about the small class{'es' * (len(small) > 1)}"
        )
    tested = np.bincount(test.labels, minlength=len(train.class_names))
    missing = [name for name, number in zip(train.class_names, tested.tolist(), strict=True) if not number]
    if missing:
        which = "these classes" if len(missing) > 1 else "this class"
        found.append(f"no test images of {enumerated(missing)}: accuracies leave {which} out")
    if len(test) < FEW_TESTED:
        error = 50 / len(test) ** 0.5  # the standard error is largest for a share of one half
        found.append(f"accuracy on {len(test)} test images has a standard error of up to {error:.1f} points")
    return tuple(found)


def read_splits(
    root: Path, class_names: tuple[str, ...]
) -> tuple[EncodedSet, EncodedSet, Counter[str], tuple[str, ...]]:
    """The training and test images of the image folder at ``root``, labeled by the position of their class, the
    number of other files by ending, and the images that are links to nothing.

    Raises:
        DataError: A split is missing or empty, a class has no training images, images lie outside
            the class folders, or links lead to one folder twice.
    """
    folder, test_folder = find_split(root, ("train",)), find_split(root, VALIDATION_NAMES)
    listed, listed_test = list_splits(folder, test_folder)
    train = image_folder(folder, listed.images, class_names)
    empty = np.flatnonzero(np.bincount(train.labels, minlength=len(class_names)) == 0)
    if empty.size:
        others = f" (as do {empty.size - 1} other class folders)" if empty.size > 1 else ""
        raise DataError(
            f"{folder / class_names[empty[0]]} holds no JPEG or PNG images{others}; add some, or delete the folder"
            f"{there(folder / class_names[empty[0]])}"
        )
    test = image_folder(test_folder, listed_test.images, class_names)
    return train, test, listed.others + listed_test.others, (*listed.gone, *listed_test.gone)


def there(folder: Path) -> str:
    """What lies in a folder without images, as the end of a message."""
    others = _list(folder, IMAGE_SUFFIXES, reached={}).others
    return f"; the files there are {listed(others)}, and only JPEG and PNG are read" if others else ""


def find_split(root: Path, names: Sequence[str]) -> Path:
    """The first existing folder of ``names`` in ``root``, or the only one that has such a name but for its case.

    Raises:
        DataError: None of them exists, or several that differ in case.
    """
    for name in names:
        if (root / name).is_dir():
            return root / name
    there = sorted(entry.name for entry in os.scandir(root) if entry.is_dir() and not entry.name.startswith("."))
    alike = [name for name in there if name.lower() in names]
    if len(alike) == 1:
        return root / alike[0]
    wanted = f"{names[0]} ({' or '.join(names[1:])})" if names[1:] else names[0]
    found = f"several may be meant: {', '.join(alike)}" if alike else f"there are {enumerated(there) or 'no folders'}"
    raise DataError(
        f"{root} has no folder {wanted}; {found}; expected train/<class>/*.jpg and val/<class>/*.jpg, with one "
        "folder for each class (docs/tutorial.md divides one folder per class)",
        "data_dir",
    )


def class_folders(split: Path) -> tuple[str, ...]:
    """Sorted names of the class folders in ``split``.

    Raises:
        DataError: There are no class folders.
    """
    try:
        names = sorted(entry.name for entry in os.scandir(split) if entry.is_dir() and not entry.name.startswith("."))
    except OSError as error:
        raise DataError(f"expected a folder of class folders, but {split} cannot be read: {error.strerror}") from error
    if not names:
        raise DataError(f"{split} has no class folders; expected {split}/<class>/*")
    return tuple(names)


class Listing(NamedTuple):
    """The files below a folder, without hidden ones."""

    images: list[str]
    """Paths of image files, by their names, relative to the folder."""
    others: Counter[str]
    """Number of other files by ending."""
    gone: list[str]
    """Paths of links to images that do not exist. They are among the images."""


def list_images(folder: Path, suffixes: tuple[str, ...] = IMAGE_SUFFIXES) -> list[str]:
    """Paths of the image files below `folder`, relative to it and with `/`, in a fixed order.

    Links to folders are followed. Files and folders are skipped if their names begin with a dot.

    Raises:
        DataError: Links lead to one folder on two ways, so its images would count twice or belong
            to two classes.
    """
    return _list(folder, suffixes, reached={}).images


def list_splits(train: Path, test: Path) -> tuple[Listing, Listing]:
    """The files below each of two folders, as `list_images` lists them.

    Raises:
        DataError: Links lead to one folder on two ways, within a split or from one to the other.
    """
    reached: dict[tuple[int, int], str] = {}
    return _list(train, IMAGE_SUFFIXES, reached), _list(test, IMAGE_SUFFIXES, reached)


def _list(folder: Path, suffixes: tuple[str, ...], reached: dict[tuple[int, int], str]) -> Listing:
    """`list_images`, with the device, inode and path of all folders that were `reached` so far."""
    found, waiting = Listing([], Counter(), []), [(str(folder), "")]
    while waiting:
        place, prefix = waiting.pop()
        try:
            state = Path(place).stat()
            with os.scandir(place) as opened:
                entries = sorted((each for each in opened if not each.name.startswith(".")), key=lambda each: each.name)
            folders = [entry for entry in entries if entry.is_dir()]
        except OSError as error:
            raise DataError(f"the folder {place} cannot be read: {error.strerror}") from error
        other = reached.setdefault((state.st_dev, state.st_ino), place)
        if other != place:
            raise DataError(
                f"{place} and {other} are one folder, by a link; remove the link, so that images count once"
            )
        waiting += [(entry.path, f"{prefix}{entry.name}/") for entry in reversed(folders)]
        for file in entries:
            if file.is_dir():
                continue
            if is_image(file.name, suffixes):
                found.images.append(prefix + file.name)
                if file.is_symlink() and not Path(file.path).exists():  # of other files, this would ask the disk
                    found.gone.append(file.path)
            else:
                found.others[Path(file.name).suffix.lower() or "without ending"] += 1
    return found


def is_image(name: str, suffixes: tuple[str, ...] = IMAGE_SUFFIXES) -> bool:
    """Whether a file's name ends like that of an image. The content is checked when the file is decoded."""
    return name.lower().endswith(suffixes) and not name.startswith(".")


def label_by_folder(names: Sequence[str], class_names: Sequence[str], *, where: str) -> NDArray[np.int64]:
    """The label of each file, from the first folder of its relative name.

    Raises:
        DataError: This folder is not a class.
    """
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


def image_folder(
    folder: str | os.PathLike[str], names: Sequence[str] | None = None, class_names: tuple[str, ...] | None = None
) -> EncodedSet:
    """The images ``<class>/*`` in ``folder``, labeled by the position of their class in ``class_names``.

    Args:
        folder: Holds one folder for each class.
        names: Paths of the images, relative to ``folder``. By default all images there.
        class_names: By default the sorted names of the subfolders of ``folder``.

    Raises:
        DataError: There are no images, or some images are outside the class folders.
    """
    folder = Path(folder)
    class_names = class_names or class_folders(folder)
    names = list_images(folder) if names is None else names
    if not names:
        raise DataError(f"{folder} holds no JPEG or PNG images; expected {folder}/<class>/*{there(folder)}")
    return EncodedSet(
        files=tuple(f"{folder}/{name}" for name in names),
        file_index=np.arange(len(names)),
        offsets=np.zeros(len(names), np.int64),
        lengths=np.zeros(len(names), np.int64),
        labels=label_by_folder(names, class_names, where=str(folder)),
        class_names=class_names,
    )
