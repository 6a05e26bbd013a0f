"""ImageNet (ILSVRC 2012) in class folders, as torchvision and most others lay it out."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from pathlib import Path

from torchvision.models import ResNet18_Weights

from advmoe.data.folders import FOLDER, class_folders, read_splits
from advmoe.data.locate import search_roots
from advmoe.data.sets import Dataset, DatasetInfo, complete_dataset
from advmoe.errors import DataError


@dataclass(frozen=True, kw_only=True)
class ImageNet:
    """The facts of the set and where it is."""

    info: DatasetInfo
    hub_repository: str


def load_imagenet(imagenet: ImageNet, data_dir: Path) -> Dataset:
    """``train/<wnid>/*`` and ``val/<wnid>/*`` under ``data_dir``; the images stay encoded where they lie.

    Classes are numbered by their sorted WordNet ids, which is everybody's order. The validation images, whose labels
    are public, are the test set.

    Raises `DataError` when that is not there (ImageNet is never downloaded) or does not have its 1,000 classes.
    """
    info = imagenet.info
    for root in search_roots(data_dir, info.name, imagenet.hub_repository):
        if not (root / "train").is_dir():
            continue
        wnids = class_folders(root / "train")
        if len(wnids) != info.num_classes or not all(re.fullmatch(r"n\d{8}", name) for name in wnids):
            raise DataError(
                f"{root / 'train'} has {len(wnids)} class folders ({', '.join(wnids[:3])}, ...), where {info.name} has"
                f" {info.num_classes} named by WordNet ids (n01440764, ...); use the data set 'folder' for other images"
            )
        train, test = (replace(split, class_names=info.class_names) for split in read_splits(root, wnids))
        return complete_dataset(info, train, test, where=root)
    raise DataError(
        f"{info.name} was not found in {data_dir} as train/<wnid>/* and val/<wnid>/*; it may not be downloaded without"
        " an account: get it from image-net.org and lay it out with torchvision.datasets.ImageNet"
    )


IMAGENET = ImageNet(
    info=replace(
        FOLDER,
        name="imagenet",
        num_classes=1000,
        class_names=tuple(ResNet18_Weights.IMAGENET1K_V1.meta["categories"]),
        train_size=1_281_167,
        test_size=50_000,
    ),
    hub_repository="ILSVRC/imagenet-1k",
)
