"""TinyImageNet: 200 classes of 64x64 images, from the official folder or zip, or the hub's parquet files.

The hub's files and the official files number their classes differently, and give some classes other
WordNet ids. The class names are therefore always read from the files. A model fits only the layout
it was trained on.
"""

from __future__ import annotations

import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from advmoe.data.archives import Archive, check_archive, fetch_archive
from advmoe.data.decode import decode_all
from advmoe.data.folders import class_folders, is_image, label_by_folder, list_splits
from advmoe.data.locate import read_bytes, search_roots
from advmoe.data.parquet import HubLayout, class_names, find_splits, read_image_set
from advmoe.data.sets import Announce, Dataset, DatasetInfo, ImageSet, Progress, complete_dataset
from advmoe.errors import DataError

ANNOTATIONS = "val/val_annotations.txt"


@dataclass(frozen=True, kw_only=True)
class TinyImageNet:
    """The facts of the set, and the places of its files."""

    info: DatasetInfo
    hub: HubLayout
    folder: str
    archive: Archive


def load_tiny_imagenet(
    tiny: TinyImageNet,
    data_dir: Path,
    *,
    download: bool = True,
    progress: Progress | None = None,
    announce: Announce | None = None,
) -> Dataset:
    """Load the first complete layout under ``data_dir``, else download the official zip into it; read in place.

    The official validation images, whose labels are public, are the test set. All images are
    decoded into memory (1.4 GB). ``val`` may be as published (``val/images`` with
    ``val_annotations.txt``) or sorted into class folders.

    Raises:
        DataError: No layout is complete and nothing was downloaded, or a file is malformed.
    """
    incomplete: list[str] = []
    for root in search_roots(data_dir, tiny.info.name, tiny.hub.repository):
        if shards := find_splits(root, tiny.hub, incomplete):
            names = class_names(shards[0][0], tiny.hub) or tuple(map(str, range(tiny.info.num_classes)))
            info = _with_classes(tiny.info, names, shards[0][0])
            train, test = (read_image_set(split, tiny.hub, info, progress=progress) for split in shards)
            return complete_dataset(info, train, test, where=shards[0][0].parent)
        for folder in (root / tiny.folder, root):
            if (folder / "wnids.txt").is_file() or (folder != root and folder.is_dir()):
                return _from_folder(tiny, folder, progress)
        if (root / tiny.archive.file_name).exists():
            return _from_zip(tiny, root / tiny.archive.file_name, progress)
    if incomplete:
        raise DataError(f"{tiny.info.name} is incomplete: {'; '.join(incomplete)}; add what is missing")
    not_found = (
        f"{tiny.info.name} was not found in {data_dir} as {tiny.hub.folder}/*.parquet, {tiny.folder}"
        f" or {tiny.archive.file_name}"
    )
    path = fetch_archive(
        tiny.archive, data_dir, not_found=not_found, download=download, progress=progress, announce=announce
    )
    return _from_zip(tiny, path, progress)


Read = Callable[[str], bytes]


def _from_folder(tiny: TinyImageNet, folder: Path, progress: Progress | None) -> Dataset:
    def read(name: str) -> bytes:
        return read_bytes(folder / name)

    if not ((folder / "train").is_dir() and (folder / "val").is_dir()):
        raise DataError(f"{folder} is incomplete: expected {folder}/train and {folder}/val")
    info = _with_classes(tiny.info, class_folders(folder / "train"), folder)
    listed = zip(("train", "val"), list_splits(folder / "train", folder / "val"), strict=True)
    train, val = ([f"{split}/{name}" for name in files.images] for split, files in listed)
    annotations = read(ANNOTATIONS) if (folder / ANNOTATIONS).is_file() else None
    return _from_files(info, train, val, annotations, read, folder, progress)


def _from_zip(tiny: TinyImageNet, path: Path, progress: Progress | None) -> Dataset:
    check_archive(path, tiny.archive)
    try:
        with zipfile.ZipFile(path) as archive:

            def read(name: str) -> bytes:
                return archive.read(f"{tiny.folder}/{name}")

            members = sorted(name.removeprefix(f"{tiny.folder}/") for name in archive.namelist())
            images = [name for name in members if is_image(name)]
            train, val = ([name for name in images if name.startswith(f"{split}/")] for split in ("train", "val"))
            info = _with_classes(tiny.info, tuple(sorted({name.split("/")[1] for name in train})), path)
            annotations = read(ANNOTATIONS) if ANNOTATIONS in members else None
            return _from_files(info, train, val, annotations, read, path, progress)
    except (zipfile.BadZipFile, OSError) as error:
        raise DataError(f"{path} cannot be read as a zip archive: {error}") from error


def _from_files(
    info: DatasetInfo,
    train: list[str],
    val: list[str],
    annotations: bytes | None,
    read: Read,
    where: Path,
    progress: Progress | None,
) -> Dataset:
    labels = _labels_by_folder("train", train, info, where)
    if annotations is not None and all(name.startswith("val/images/") for name in val):
        val_labels = _annotated_labels(val, annotations, info, f"{where}/{ANNOTATIONS}")
    else:
        val_labels = _labels_by_folder("val", val, info, where)

    def decoded(names: list[str], labels: NDArray[np.int64]) -> ImageSet:
        if not names:
            raise DataError(f"{where} lacks the training or the validation images")
        encoded: Iterator[tuple[str, bytes]] = ((f"{where}/{name}", read(name)) for name in names)
        images = decode_all(encoded, len(names), info, progress=progress)
        return ImageSet(images=images, labels=labels, class_names=info.class_names)

    return complete_dataset(info, decoded(train, labels), decoded(val, val_labels), where=where)


def _labels_by_folder(split: str, names: list[str], info: DatasetInfo, where: Path) -> NDArray[np.int64]:
    inside = [name.removeprefix(f"{split}/") for name in names]
    return label_by_folder(inside, info.class_names, where=f"{where}/{split}")


def _annotated_labels(names: list[str], annotations: bytes, info: DatasetInfo, where: str) -> NDArray[np.int64]:
    """Labels of ``val/images/*`` by lines ``file name, wnid, x, y, width, height``, separated by tabs."""
    label_of = {wnid: label for label, wnid in enumerate(info.class_names)}
    labels: dict[str, int] = {}
    for number, line in enumerate(annotations.decode("utf-8", "replace").splitlines(), start=1):
        file_name, _, rest = line.partition("\t")
        wnid = rest.split("\t")[0]
        if wnid not in label_of:
            raise DataError(f"{where}, line {number}: {wnid!r} is no class of the training images")
        labels[f"val/images/{file_name}"] = label_of[wnid]
    missing = [name for name in names if name not in labels]
    if missing:
        raise DataError(f"{where} does not tell the class of {missing[0]} ({len(missing)} images without)")
    return np.array([labels[name] for name in names], np.int64)


def _with_classes(info: DatasetInfo, names: tuple[str, ...], where: Path) -> DatasetInfo:
    if len(names) != info.num_classes:
        raise DataError(f"{where} has {len(names)} classes, where {info.name} has {info.num_classes}")
    return replace(info, class_names=names)


TINY_IMAGENET = TinyImageNet(
    info=DatasetInfo(
        name="tinyimagenet",
        num_classes=200,
        image_size=64,
        mean=(0.4802, 0.4481, 0.3975),
        std=(0.2770, 0.2691, 0.2821),
        eps=2 / 255,
        train_size=100_000,
        test_size=10_000,
    ),
    hub=HubLayout(
        repository="zh-plus/tiny-imagenet",
        folder="data",
        train="train",
        test="valid",
        image_column="image",
        label_column="label",
    ),
    folder="tiny-imagenet-200",
    archive=Archive(
        "tiny-imagenet-200.zip",
        "90528d7ca1a48142e341f4ef8d21d0de",
        "http://cs231n.stanford.edu/tiny-imagenet-200.zip",
        248_100_043,
    ),
)
