"""Backbones by name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from advmoe.config import ModelConfig, model_config, one_of
from advmoe.models.densenet import DenseNet
from advmoe.models.network import RoutedNetwork
from advmoe.models.resnet import ResNet18
from advmoe.models.vgg import VGG16
from advmoe.models.vit import ViT
from advmoe.models.wide_resnet import WRN28x10

ARCHITECTURES: dict[str, Callable[[ModelConfig], RoutedNetwork]] = {
    "densenet": DenseNet,
    "resnet18": ResNet18,
    "vgg16": VGG16,
    "vit": ViT,
    "wrn28_10": WRN28x10,
}


def build_model(config: ModelConfig) -> RoutedNetwork:
    """The network a config describes, with fresh weights from torch's current random state.

    Its weights lie channels-last, as feature maps do: so convolutions, BatchNorm and dispatch run fastest on CPUs and
    GPUs alike.

    Raises:
        ConfigError: the architecture is unknown or cannot be built with these settings.
    """
    one_of("architecture", config.arch, ARCHITECTURES)
    return ARCHITECTURES[config.arch](config).to(memory_format=torch.channels_last)


def create_model(arch: str, **settings: Any) -> RoutedNetwork:
    """A model by name: `create_model("vgg16", kind="moe", num_classes=10, num_experts=2, model_scale=0.5)`.

    Args:
        arch: name of the backbone.
        **settings: fields of `advmoe.config.ModelConfig`.

    Returns:
        A module from images [B, 3, H, W] in [0, 1] to logits [B, num_classes], in training mode.
    """
    return build_model(model_config(arch=arch, **settings))
