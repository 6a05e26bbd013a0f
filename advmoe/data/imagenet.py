"""ImageNet (ILSVRC 2012), from the hub's parquet files or from class folders as torchvision reads them."""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass, replace
from pathlib import Path

from torchvision.models import ResNet18_Weights

from advmoe.data.cache import packed
from advmoe.data.folders import FOLDER, class_folders, read_splits
from advmoe.data.locate import default_data_dir, search_roots
from advmoe.data.parquet import HubLayout, Shards, find_splits
from advmoe.data.sets import Dataset, DatasetInfo, Progress, complete_dataset
from advmoe.errors import DataError


@dataclass(frozen=True, kw_only=True)
class ImageNet:
    """The facts of the set and where it is."""

    info: DatasetInfo
    hub: HubLayout


def load_imagenet(
    imagenet: ImageNet, data_dir: Path, *, packs: Path | None = None, progress: Progress | None = None
) -> Dataset:
    """The hub's parquet files, or ``train/<wnid>/*`` and ``val/<wnid>/*``, under ``data_dir``; images stay encoded.

    Class folders are read where they are. Parquet files allow no random access, so their encoded
    images are copied once into a pack in the folder ``packs`` (by default `default_data_dir`). The
    pack is as large as the files (150 GB).

    Classes are numbered by their sorted WordNet ids, the usual order. The official validation
    images, whose labels are public, are the test set.

    Raises:
        DataError: There is neither layout (ImageNet is never downloaded), or the number of classes
            is not 1,000.
    """
    info, hub, incomplete = imagenet.info, imagenet.hub, list[str]()
    for root in search_roots(data_dir, info.name, hub.repository):
        if shards := find_splits(root, hub, incomplete):
            folder = packs if packs is not None else default_data_dir() / "packs"
            train, test = (
                packed(files, folder / _pack_name(info, files), hub, info, progress=progress) for files in shards
            )
            return complete_dataset(info, train, test, where=shards[0][0].parent)
        if not (root / "train").is_dir():
            continue
        wnids = class_folders(root / "train")
        if len(wnids) != info.num_classes or not all(re.fullmatch(r"n\d{8}", name) for name in wnids):
            raise DataError(
                f"{root / 'train'} has {len(wnids)} class folders ({', '.join(wnids[:3])}, ...), where {info.name} has"
                f" {info.num_classes} named by WordNet ids (n01440764, ...); use the data set 'folder' for other images"
            )
        train, test, _, gone = read_splits(root, wnids)
        train, test = (replace(split, class_names=info.class_names) for split in (train, test))
        return complete_dataset(replace(info, gone=gone), train, test, where=root)
    if incomplete:
        raise DataError(f"{info.name} is incomplete: {'; '.join(incomplete)}; add what is missing")
    raise DataError(
        f"{info.name} was not found in {data_dir} as {hub.folder}/*.parquet or as train/<wnid>/* and val/<wnid>/*;"
        f" it may not be downloaded without an account: get it from {hub.repository} on the hub, or from image-net.org"
        " and lay it out with torchvision.datasets.ImageNet"
    )


def _pack_name(info: DatasetInfo, files: Shards) -> str:
    """A name for the pack that is equal only for the same files in the same folder."""
    origin = hashlib.sha256(str(files[0].resolve()).encode()).hexdigest()[:12]
    return f"{info.name}-{files[0].name.split('-')[0]}-{origin}.pack"


IMAGENET = ImageNet(
    info=replace(
        FOLDER,
        name="imagenet",
        num_classes=1000,
        class_names=tuple(ResNet18_Weights.IMAGENET1K_V1.meta["categories"]),
        train_size=1_281_167,
        test_size=50_000,
    ),
    hub=HubLayout(
        repository="ILSVRC/imagenet-1k",
        folder="data",
        train="train",
        test="validation",
        image_column="image",
        label_column="label",
    ),
)
