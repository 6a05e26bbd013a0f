"""How a data set and a few settings become the full configuration of a run."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from advmoe.config import Kind, MethodName, ModelConfig, TrainConfig, TrainingAttack, check_together, model_config
from advmoe.errors import ConfigError
from advmoe.schema import fields_of, from_dict

if TYPE_CHECKING:
    from advmoe.data.sources import DatasetInfo

DEFAULT_METHODS: dict[Kind, MethodName] = {
    "moe": "advmoe",
    "sparse_cnn": "at_sparse",
    "dense": "at",
    "s_dense": "at",
}
"""Training method of each model kind, where none is named."""

OWNERS = (ModelConfig, TrainConfig, TrainingAttack)
"""The classes whose fields together are the settings of a run."""


def sort_settings(settings: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    """Settings by name -> those of the model, of the training and of the attack in training.

    Raises:
        ConfigError: a name that no configuration has.
    """
    names = [{field.name for field in fields_of(owner)} for owner in OWNERS]
    known = set[str]().union(*names)
    for name in settings:
        if name not in known:
            close = difflib.get_close_matches(name, known, n=1)
            raise ConfigError(f"unknown setting '{name}'{f'; did you mean {close[0]}?' if close else ''}")
    model, train, attack = ({name: settings[name] for name in settings if name in own} for own in names)
    return model, train, attack


def resolve(
    info: DatasetInfo, model: Mapping[str, Any], train: Mapping[str, Any], **attack: Any
) -> tuple[ModelConfig, TrainConfig]:
    """Full configurations from a data set and the settings that differ from the defaults.

    Args:
        info: gives classes, image size, normalization and the usual radius.
        model: fields of `ModelConfig`.
        train: fields of `TrainConfig`.
        **attack: fields of `TrainingAttack`; the radius is the data set's by default.

    Raises:
        ConfigError: a value that cannot be carried out.
    """
    chosen = from_dict(TrainingAttack, {"eps": info.eps, **attack})
    described = model_config(
        **{"num_classes": info.num_classes, "image_size": info.image_size, "mean": info.mean, "std": info.std, **model}
    )
    info.check_image_size(described.image_size)
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
    check_together(described, config)
    return described, config
