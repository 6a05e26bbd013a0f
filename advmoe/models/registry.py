"""Backbones by name."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Unpack

from advmoe.config import Arch, ModelConfig, ModelSettings, model_config
from advmoe.models.densenet import DenseNet
from advmoe.models.network import RoutedNetwork
from advmoe.models.resnet import ResNet18
from advmoe.models.vgg import VGG16
from advmoe.models.vit import ViT
from advmoe.models.wide_resnet import WRN28x10
from advmoe.schema import fields_of

ARCHITECTURES: dict[Arch, Callable[[ModelConfig], RoutedNetwork]] = {
    "densenet": DenseNet,
    "resnet18": ResNet18,
    "vgg16": VGG16,
    "vit": ViT,
    "wrn28_10": WRN28x10,
}


def build_model(config: ModelConfig) -> RoutedNetwork:
    """The network a config describes, with fresh weights from torch's current random state.

    Raises:
        ConfigError: The architecture cannot be built with these settings.
    """
    return ARCHITECTURES[config.arch](config)


def list_models() -> list[str]:
    """Names of the backbones that `create_model` knows."""
    return sorted(ARCHITECTURES)


def create_model(arch: str, **settings: Unpack[ModelSettings]) -> RoutedNetwork:
    """A model by name: `create_model("vgg16", kind="moe", num_classes=10, num_experts=2, model_scale=0.5)`.

    Args:
        arch: Name of the backbone, one of `list_models()`.
        **settings: Fields of `advmoe.config.ModelConfig`.

    Returns:
        A module from images [B, 3, H, W] in [0, 1] to logits [B, num_classes], in training mode.

    Raises:
        ConfigError: An unknown setting, a value that cannot be, or settings that do not go
            together.
    """
    return build_model(model_config(arch=arch, **settings))


def _with_settings(function: Callable[..., RoutedNetwork]) -> inspect.Signature:
    """The signature of `create_model` with its settings one by one, for `help` and completion."""
    own = inspect.signature(function, eval_str=True)
    settings = [
        inspect.Parameter(field.name, inspect.Parameter.KEYWORD_ONLY, default=field.default, annotation=field.kind)
        for field in fields_of(ModelConfig)
        if field.name != "arch"
    ]
    return own.replace(parameters=[own.parameters["arch"], *settings])


create_model.__signature__ = _with_settings(create_model)  # type: ignore[attr-defined]
