"""Makes the full configuration of a run from a data set and a few settings."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from advmoe.config import Kind, MethodName, ModelConfig, TrainConfig, TrainingAttack, check_together, model_config
from advmoe.errors import ConfigError
from advmoe.schema import check, closest, fields_of, from_dict, value_of

if TYPE_CHECKING:
    from advmoe.data.sources import DatasetInfo

DEFAULT_METHODS: dict[Kind, MethodName] = {
    "moe": "advmoe",
    "sparse_cnn": "at_sparse",
    "dense": "at",
    "s_dense": "at",
}
"""Default training method of each model kind."""

OWNERS = (ModelConfig, TrainConfig, TrainingAttack)
"""The classes whose fields together are the settings of a run."""


def sort_settings(settings: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    """Split settings by name into those of the model, of the training and of the attack in training.

    Raises:
        ConfigError: No configuration has a setting of this name, or a value is of another type or out of bounds.
    """
    owned = [{field.name: field for field in fields_of(owner)} for owner in OWNERS]
    known = {name: field for fields in owned for name, field in fields.items()}
    for name in settings:
        if name not in known:
            raise ConfigError(f"unknown setting '{name}'{closest(name, known)}")
    model, train, attack = (
        {name: value_of(known[name], value) for name, value in settings.items() if name in fields} for fields in owned
    )
    return model, train, attack


DEFAULT_ARCH = "vgg16"
"""The default backbone, as in the paper's first table."""


USUAL_BATCH = 64
"""Batch size for a folder with many images. The default learning rate belongs to it."""


def defaults_of(info: DatasetInfo) -> tuple[dict[str, Any], dict[str, Any]]:
    """Settings of the model and of the training that suit a data set.

    Known sets get the paper's settings. A folder is usually small and trained on a small machine.
    It gets a quarter of ResNet-18's width, which takes images of every size, and a batch size with
    at least eight batches per epoch.
    """
    if info.name != "folder":
        return {"arch": DEFAULT_ARCH}, {}
    held_in = round(0.9 * (info.train_size or 0))
    fitting = [size for size in (4, 8, 16, 32, USUAL_BATCH) if 8 * size <= held_in]
    return {"arch": "resnet18", "width": 0.25}, {"batch_size": max(fitting, default=4)}


def resolve(
    info: DatasetInfo, model: Mapping[str, Any], train: Mapping[str, Any], **attack: Any
) -> tuple[ModelConfig, TrainConfig]:
    """Full configurations from a data set and the settings that differ from the defaults.

    Args:
        info: Gives classes, image size, normalization and the usual radius.
        model: Fields of `ModelConfig`.
        train: Fields of `TrainConfig`. For a folder, the learning rate is by default smaller in
            proportion to a batch size below `USUAL_BATCH` (Goyal et al., 2017).
        **attack: Fields of `TrainingAttack`; the radius is the data set's by default.

    Raises:
        ConfigError: A value is invalid, or two values contradict each other.
    """
    chosen = from_dict(TrainingAttack, {"eps": info.eps, **attack})
    described = model_config(
        **{"num_classes": info.num_classes, "image_size": info.image_size, "mean": info.mean, "std": info.std, **model}
    )
    info.check_image_size(described.image_size)
    check(
        described.num_classes == info.num_classes,
        f"the model tells {described.num_classes} classes apart, but {info.name} has {info.num_classes}",
    )
    config = from_dict(
        TrainConfig,
        {
            "dataset": info.name,
            "method": DEFAULT_METHODS[described.kind],
            "attack": chosen.in_training(),
            "val_attack": chosen.in_validation(),
            "flip": info.flip,
            **train,
        },
    )
    if info.name == "folder" and "lr" not in train:
        config = replace(config, lr=config.lr * min(1.0, config.batch_size / USUAL_BATCH))
    check_together(described, config)
    return described, config
