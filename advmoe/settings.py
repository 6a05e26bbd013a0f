"""How a data set and a few settings become the full configuration of a run."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from advmoe.config import AttackConfig, ModelConfig, TrainConfig, check_eps, check_together, model_config

if TYPE_CHECKING:
    from advmoe.data.sources import DatasetInfo


TRAIN_STEP_SHARE = 5 / 8
"""Step size of the training attack relative to eps: 5/255 at 8/255."""


VALIDATION_STEP_SHARE = 1 / 4
"""The same for the attack that selects the best checkpoint: 2/255 at 8/255."""


DEFAULT_METHODS = {"moe": "advmoe", "sparse_cnn": "at_sparse", "dense": "at", "s_dense": "at"}
"""Training method of each model kind, where none is named."""


def resolve(
    info: DatasetInfo,
    model: Mapping[str, Any],
    train: Mapping[str, Any],
    *,
    eps: float | None = None,
    steps: int | None = None,
    step_size: float | None = None,
) -> tuple[ModelConfig, TrainConfig]:
    """Full configurations from a data set and the settings that differ from the defaults.

    Args:
        info: gives classes, image size, normalisation and the usual radius.
        model: fields of `ModelConfig`.
        train: fields of `TrainConfig`.
        eps: radius of the attacks; the data set's by default.
        steps: K of the training attack; 2 by default, as in the paper.
        step_size: of the training attack; 5/8 of eps by default.

    Raises:
        ConfigError: a value that cannot be carried out.
    """
    radius = info.eps if eps is None else eps
    check_eps(radius)
    attack = AttackConfig(
        eps=radius,
        steps=2 if steps is None else steps,
        step_size=TRAIN_STEP_SHARE * radius if step_size is None else step_size,
        start="gaussian",
    )
    described = model_config(
        **{"num_classes": info.num_classes, "image_size": info.image_size, "mean": info.mean, "std": info.std, **model}
    )
    info.check_image_size(described.image_size)
    train_config = TrainConfig(
        **{
            "dataset": info.name,
            "method": DEFAULT_METHODS[described.kind],
            "attack": attack,
            "val_attack": AttackConfig(eps=radius, steps=10, step_size=VALIDATION_STEP_SHARE * radius),
            "flip": info.flip,
            **train,
        }
    )
    check_together(described, train_config)
    return described, train_config
