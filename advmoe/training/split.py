"""The training and validation images of a run."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import numpy as np

from advmoe.config import TrainConfig
from advmoe.data.sets import Dataset, Images, ImageSet
from advmoe.data.splits import split_validation
from advmoe.data.views import in_memory
from advmoe.errors import DataError


@dataclass(frozen=True)
class Split:
    """The images of a run. All are a seeded choice from the training set; the test set is not used."""

    train: Images
    train_indices: np.ndarray
    validation: ImageSet
    skipped: tuple[str, ...]
    """Why images that are held out for validation cannot be decoded, one reason for each."""
    digest: str
    """SHA-256 of the labels and of the rows that are trained on and held out, in hexadecimal."""


def split_dataset(dataset: Dataset, config: TrainConfig, *, image_size: int | None = None) -> Split:
    """Hold out the validation images, in the size the networks see, then keep `limit_train` of the rest."""
    train, validation = split_validation(dataset.train.labels, fraction=config.val_fraction, seed=config.seed)
    train_random, validation_random = np.random.default_rng(config.seed).spawn(2)
    if config.limit_train is not None and config.limit_train < len(train):
        train = np.sort(train_random.choice(train, config.limit_train, replace=False))
    if config.val_limit < len(validation):
        validation = np.sort(validation_random.choice(validation, config.val_limit, replace=False))
    size = image_size or dataset.info.image_size
    skipped: dict[int, str] = {}
    validated = in_memory(dataset.train.take(validation), size, skip_bad_images=config.skip_bad_images, skipped=skipped)
    if not len(validated):
        raise DataError(f"none of the {len(validation)} validation images can be decoded; mend them, or hold out more")
    digest = hashlib.sha256()
    for part in (dataset.train.labels, train, validation, np.array([len(validated)])):
        digest.update(f"{len(part)}:".encode() + part.astype("<i8").tobytes())
    return Split(dataset.train, train, validated, skipped=tuple(skipped.values()), digest=digest.hexdigest())
