"""The weights a run starts from, where these are not fresh."""

from __future__ import annotations

import dataclasses

from advmoe.config import difference
from advmoe.errors import ConfigError
from advmoe.models.masked import close_masks
from advmoe.models.network import RoutedNetwork
from advmoe.training.checkpoint import Checkpoint, load_weights


def start_from(model: RoutedNetwork, initial: Checkpoint) -> None:
    """Give a fresh model the weights of a checkpoint of the same model; a Sparse-CNN may also start from its Dense.

    Raises:
        ConfigError: the checkpoint holds another model.
    """
    wanted, weights = model.config, initial.weights
    from_dense = wanted.kind == "sparse_cnn" and initial.model.kind == "dense"
    if from_dense:
        wanted = dataclasses.replace(wanted, kind="dense", model_scale=initial.model.model_scale)
    if initial.model != wanted:
        raise ConfigError(
            f"the checkpoint to start from holds another model: {difference(initial.model, wanted)}; "
            "repeat its options",
            "init",
        )
    if from_dense:
        masks = {name: value for name, value in model.state_dict().items() if name.startswith("masks.")}
        weights = masks | weights
    try:
        load_weights(model, weights)
    except ConfigError as error:
        raise ConfigError(f"the checkpoint to start from has other weights: {error}", "init") from error
    if from_dense:
        close_masks(model)
