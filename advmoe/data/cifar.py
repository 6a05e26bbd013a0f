"""Reads CIFAR-10 and CIFAR-100 in every layout in which they are published.

Shape suffixes: C channels, H height, I images of a set, W width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from advmoe.data.archives import Archive, check_archive, fetch_archive, read_tar_members
from advmoe.data.batch_pickle import load_batch
from advmoe.data.locate import read_bytes, search_roots
from advmoe.data.parquet import HubLayout, find_splits, read_image_set
from advmoe.data.sets import Announce, Dataset, DatasetInfo, ImageSet, Progress, check_labels, complete_dataset
from advmoe.errors import DataError

PIXELS = 3 * 32 * 32
"""Bytes of one image: the red plane, the green plane, the blue plane, each row by row."""


@dataclass(frozen=True, kw_only=True)
class BatchFiles:
    """One official layout: a folder of batch files, published as one archive."""

    folder: str
    train: tuple[str, ...]
    test: tuple[str, ...]
    archive: Archive

    @property
    def names(self) -> tuple[str, ...]:
        """Paths of all batch files inside the archive."""
        return tuple(f"{self.folder}/{name}" for name in (*self.train, *self.test))


@dataclass(frozen=True, kw_only=True)
class Cifar:
    """The facts in which CIFAR-10 and CIFAR-100 differ."""

    info: DatasetInfo
    hub: HubLayout
    label_key: str
    """Key of the labels in the pickled batches."""
    label_bytes: int
    """Bytes before the pixels of a binary record; the last of them is the label."""
    python: BatchFiles
    binary: BatchFiles


def load_cifar(
    cifar: Cifar,
    data_dir: Path,
    *,
    download: bool = True,
    progress: Progress | None = None,
    announce: Announce | None = None,
) -> Dataset:
    """Load the first complete layout found under ``data_dir``, else download the official Python archive into it.

    The layouts are tried in this order: the hub's parquet files, the two folders of batches, the
    two archives. Archives are read without extracting them, after their checksum was verified.
    Existing files are never moved or changed.

    Raises:
        DataError: No layout is complete and nothing was downloaded, or a file is malformed.
    """
    incomplete: list[str] = []
    for root in search_roots(data_dir, cifar.info.name, cifar.hub.repository):
        if shards := find_splits(root, cifar.hub, incomplete):
            train, test = (read_image_set(split, cifar.hub, cifar.info, progress=progress) for split in shards)
            return complete_dataset(cifar.info, train, test, where=shards[0][0].parent)
        for files, decode in ((cifar.python, _decode_pickle), (cifar.binary, _decode_binary)):
            folder = root / files.folder
            missing = [name for name in (*files.train, *files.test) if not (folder / name).is_file()]
            if not missing:
                return _from_batches(cifar, files, decode, (root / name for name in files.names), folder)
            if folder.is_dir():
                incomplete.append(f"{folder} lacks {missing[0]}")
        for files, decode in ((cifar.python, _decode_pickle), (cifar.binary, _decode_binary)):
            path = root / files.archive.file_name
            if path.exists():
                return _from_archive(cifar, files, decode, path)
    if incomplete:
        raise DataError(
            f"{cifar.info.name} is incomplete: {'; '.join(incomplete)}; add what is missing or remove the rest"
        )
    not_found = (
        f"{cifar.info.name} was not found in {data_dir} as {cifar.hub.folder}/*.parquet, {cifar.python.folder},"
        f" {cifar.binary.folder}, {cifar.python.archive.file_name} or {cifar.binary.archive.file_name}"
    )
    archive = cifar.python.archive
    path = fetch_archive(
        archive, data_dir, not_found=not_found, download=download, progress=progress, announce=announce
    )
    return _from_archive(cifar, cifar.python, _decode_pickle, path)


Decode = Callable[[Cifar, bytes, str], tuple[NDArray[np.uint8], NDArray[np.int64]]]
"""``(cifar, content of one batch file, its name for messages)`` → pixels ``[n, 3072]`` and labels ``[n]``."""


def _decode_pickle(cifar: Cifar, raw: bytes, where: str) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    batch = load_batch(raw, where=where)
    try:
        pixels, labels = np.asarray(batch["data"]), np.asarray(batch[cifar.label_key])
    except (KeyError, ValueError) as error:
        raise DataError(
            f"{where}: expected the keys 'data' and {cifar.label_key!r}, found {', '.join(sorted(batch))};"
            f" is this really {cifar.info.name}?"
        ) from error
    if pixels.dtype != np.uint8 or pixels.ndim != 2 or pixels.shape[1] != PIXELS:
        raise DataError(f"{where}: expected pixels as uint8 [n, {PIXELS}], found {pixels.dtype} {list(pixels.shape)}")
    if labels.shape != pixels.shape[:1] or labels.dtype.kind not in "iu":
        raise DataError(f"{where}: {len(pixels)} images, but labels are {labels.dtype} {list(labels.shape)}")
    return pixels, labels.astype(np.int64)


def _decode_binary(cifar: Cifar, raw: bytes, where: str) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    record = cifar.label_bytes + PIXELS
    if len(raw) % record:
        raise DataError(f"{where} is truncated: {len(raw):,} bytes are no whole number of {record:,}-byte records")
    records = np.frombuffer(raw, np.uint8).reshape(-1, record)
    return records[:, cifar.label_bytes :], records[:, cifar.label_bytes - 1].astype(np.int64)


def _from_archive(cifar: Cifar, files: BatchFiles, decode: Decode, path: Path) -> Dataset:
    check_archive(path, files.archive)
    members = read_tar_members(path, files.names)
    contents = ((f"{path}:{name}", members[name]) for name in files.names)
    return _from_contents(cifar, files, decode, contents, path)


def _from_batches(cifar: Cifar, files: BatchFiles, decode: Decode, paths: Iterator[Path], folder: Path) -> Dataset:
    return _from_contents(cifar, files, decode, ((str(path), read_bytes(path)) for path in paths), folder)


def _from_contents(
    cifar: Cifar, files: BatchFiles, decode: Decode, contents: Iterator[tuple[str, bytes]], where: Path
) -> Dataset:
    batches = []
    for name, raw in contents:
        pixels, labels = decode(cifar, raw, name)
        if not len(labels):
            raise DataError(f"{name} holds no images")
        check_labels(labels, cifar.info.num_classes, where=name)
        batches.append((pixels, labels))
    train = batches[: len(files.train)]
    sizes = [len(labels) for _, labels in train]
    if len(set(sizes)) > 1:
        raise DataError(f"{where} is truncated: its training batches should be equally long, and hold {sizes} images")
    test = batches[len(files.train) :]
    return complete_dataset(cifar.info, _image_set(cifar, train), _image_set(cifar, test), where=where)


def _image_set(cifar: Cifar, batches: Sequence[tuple[NDArray[np.uint8], NDArray[np.int64]]]) -> ImageSet:
    planes_ICHW = np.concatenate([pixels for pixels, _ in batches]).reshape(-1, 3, 32, 32)
    return ImageSet(
        images=np.ascontiguousarray(planes_ICHW.transpose(0, 2, 3, 1)),
        labels=np.concatenate([labels for _, labels in batches]),
        class_names=cifar.info.class_names,
    )


_SITE = "https://www.cs.toronto.edu/~kriz/"


def _official(name: str, md5: str, num_bytes: int) -> Archive:
    return Archive(name, md5, _SITE + name, num_bytes)


CIFAR10 = Cifar(
    info=DatasetInfo(
        name="cifar10",
        num_classes=10,
        class_names=("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"),
        image_size=32,
        mean=(0.4914, 0.4822, 0.4465),
        std=(0.2470, 0.2435, 0.2616),
        eps=8 / 255,
        train_size=50_000,
        test_size=10_000,
    ),
    hub=HubLayout(
        repository="uoft-cs/cifar10",
        folder="plain_text",
        train="train",
        test="test",
        image_column="img",
        label_column="label",
    ),
    label_key="labels",
    label_bytes=1,
    python=BatchFiles(
        folder="cifar-10-batches-py",
        train=tuple(f"data_batch_{number}" for number in range(1, 6)),
        test=("test_batch",),
        archive=_official("cifar-10-python.tar.gz", "c58f30108f718f92721af3b95e74349a", 170_498_071),
    ),
    binary=BatchFiles(
        folder="cifar-10-batches-bin",
        train=tuple(f"data_batch_{number}.bin" for number in range(1, 6)),
        test=("test_batch.bin",),
        archive=_official("cifar-10-binary.tar.gz", "c32a1d4ab5d03f1284b67883e8d87530", 170_052_171),
    ),
)

_CIFAR100_CLASSES = """
apple aquarium_fish baby bear beaver bed bee beetle bicycle bottle bowl boy bridge bus butterfly camel can castle
caterpillar cattle chair chimpanzee clock cloud cockroach couch crab crocodile cup dinosaur dolphin elephant flatfish
forest fox girl hamster house kangaroo keyboard lamp lawn_mower leopard lion lizard lobster man maple_tree motorcycle
mountain mouse mushroom oak_tree orange orchid otter palm_tree pear pickup_truck pine_tree plain plate poppy porcupine
possum rabbit raccoon ray road rocket rose sea seal shark shrew skunk skyscraper snail snake spider squirrel streetcar
sunflower sweet_pepper table tank telephone television tiger tractor train trout tulip turtle wardrobe whale
willow_tree wolf woman worm
"""

CIFAR100 = Cifar(
    info=DatasetInfo(
        name="cifar100",
        num_classes=100,
        class_names=tuple(_CIFAR100_CLASSES.split()),
        image_size=32,
        mean=(0.5071, 0.4865, 0.4409),
        std=(0.2673, 0.2564, 0.2762),
        eps=8 / 255,
        train_size=50_000,
        test_size=10_000,
    ),
    hub=HubLayout(
        repository="uoft-cs/cifar100",
        folder="cifar100",
        train="train",
        test="test",
        image_column="img",
        label_column="fine_label",
    ),
    label_key="fine_labels",
    label_bytes=2,
    python=BatchFiles(
        folder="cifar-100-python",
        train=("train",),
        test=("test",),
        archive=_official("cifar-100-python.tar.gz", "eb9058c3a382ffc7106e4002c42a8d85", 169_001_437),
    ),
    binary=BatchFiles(
        folder="cifar-100-binary",
        train=("train.bin",),
        test=("test.bin",),
        archive=_official("cifar-100-binary.tar.gz", "03b5dce01913d631647c71ecec9e9cb8", 168_513_733),
    ),
)
