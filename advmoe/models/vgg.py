"""VGG-16 with BatchNorm (Simonyan & Zisserman, 2015): 13 convolutions, one linear classifier (the CIFAR form)."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from advmoe.config import ModelConfig, check
from advmoe.models.layers import ConvNorm, LayerFactory
from advmoe.models.network import RoutedNetwork
from advmoe.models.routing import RoutingTape

STAGES = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))
"""Channels of the convolutions; each stage ends with a 2x2 max pool."""


class VGG16(RoutedNetwork):
    """VGG-16-BN. The first convolution reads the image and is not routed; the other 12 are."""

    def __init__(self, config: ModelConfig) -> None:
        check(
            config.image_size >= 32,
            f"vgg16 halves the image five times: it needs at least 32 pixels, got {config.image_size}",
        )
        layers = LayerFactory(config)
        super().__init__(config, layers)
        self.stages = nn.ModuleList()
        channels = 3
        for widths in STAGES:
            layers.begin("stage")
            stage = nn.ModuleList()
            for full in widths:
                layers.begin("block")
                make = layers.plain_conv if channels == 3 and not self.stages else layers.conv
                stage.append(ConvNorm(make(channels, full, 3, padding=1)))
                channels = layers.packed(full)
            self.stages.append(stage)
        self.classifier = nn.Linear(channels, config.num_classes)

    def run(self, x_BCHW: Tensor, tape: RoutingTape) -> Tensor:
        """Logits [B, classes] of normalised images."""
        for stage in self.stages:
            for layer in stage:  # type: ignore[attr-defined]
                x_BCHW = F.relu(layer(x_BCHW, tape))
            x_BCHW = F.max_pool2d(x_BCHW, 2)
        logits: Tensor = self.classifier(x_BCHW.mean(dim=(2, 3)))
        return logits
