"""VGG-16 with BatchNorm (Simonyan & Zisserman, 2015): 13 convolutions and a classifier, CIFAR and ImageNet forms.

Shape suffixes: B batch, C channels, D features, H height, W width.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from advmoe.config import ModelConfig, check
from advmoe.models.layers import IMAGENET_SIZE, ConvNorm, LayerFactory, Linear
from advmoe.models.network import RoutedNetwork
from advmoe.models.routing import RoutingTape

STAGES = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))
"""Channels of the convolutions; each stage ends with a 2x2 max pool."""
HIDDEN = 4096
"""Units of the two hidden layers in the ImageNet form's classifier."""


class VGG16(RoutedNetwork):
    """VGG-16-BN. The first convolution reads the image and is not routed; the other 12 are.

    For small images, the classifier is global average pooling and one linear layer, as usual on
    CIFAR. For ImageNet, it is the original three linear layers on all places of the last feature
    maps, but without dropout: TRADES compares two passes of one network.
    """

    def __init__(self, config: ModelConfig) -> None:
        size = config.image_size
        check(size >= 32, f"vgg16 halves the image five times: it needs at least 32 pixels, got {size}")
        layers = LayerFactory(config, stages=len(STAGES), blocks=sum(map(len, STAGES)))
        super().__init__(config, layers)
        self.stages = nn.ModuleList()
        reads = layers.image
        for widths in STAGES:
            layers.begin("stage")
            stage = nn.ModuleList()
            for full in widths:
                layers.begin("block")
                writes = layers.channels(full)
                make = layers.conv if self.stages or stage else layers.plain_conv
                stage.append(ConvNorm(make(reads, writes, 3, padding=1), writes))
                reads = writes
            self.stages.append(stage)
        self.hidden = nn.ModuleList()
        places = (size // 32) ** 2
        if size >= IMAGENET_SIZE:
            for _ in range(2):
                writes = layers.channels(HIDDEN)
                self.hidden.append(Linear(reads, writes, places=places))
                reads, places = writes, 1
        self.classifier = Linear(reads, layers.classes)

    def run(self, x_BCHW: Tensor, tape: RoutingTape) -> Tensor:
        """Logits [B, classes] of normalized images."""
        for stage in self.stages:
            for layer in stage:  # type: ignore[attr-defined]
                x_BCHW = F.relu(layer(x_BCHW, tape))
            x_BCHW = F.max_pool2d(x_BCHW, 2)
        x_BD = x_BCHW.flatten(1) if self.hidden else x_BCHW.mean(dim=(2, 3))
        for hidden in self.hidden:
            x_BD = F.relu(hidden(x_BD))
        logits: Tensor = self.classifier(x_BD)
        return logits
