"""DenseNet-BC (Huang et al., 2017): bottleneck layers that each add `growth` channels to all earlier ones.

Shape suffixes: B batch, C channels, H height, W width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from advmoe.config import ModelConfig, check
from advmoe.models.channels import Channels
from advmoe.models.layers import IMAGENET_SIZE, LayerFactory, Linear, Norm, Stem
from advmoe.models.network import RoutedNetwork
from advmoe.models.routing import RoutingTape

IMAGENET_BLOCKS = {121: (6, 12, 24, 16), 169: (6, 12, 32, 32), 201: (6, 12, 48, 32), 264: (6, 12, 64, 48)}
"""Layers of the dense blocks in the ImageNet forms, by depth."""


def dense_blocks(config: ModelConfig) -> tuple[int, ...]:
    """Bottleneck layers in each dense block, for the depth asked for (default: 100 on small images, else 121).

    Raises:
        ConfigError: No DenseNet-BC has that depth; the message names the nearest that exists.
    """
    if config.image_size >= IMAGENET_SIZE:
        depth = config.depth or 121
        nearest = min(IMAGENET_BLOCKS, key=lambda known: abs(known - depth))
        check(
            depth in IMAGENET_BLOCKS,
            f"densenet at {config.image_size} pixels has a depth of {', '.join(map(str, IMAGENET_BLOCKS))}, "
            f"got {depth}; the nearest is {nearest}",
        )
        return IMAGENET_BLOCKS[depth]
    depth = config.depth or 100
    layers = max(1, round((depth - 4) / 6))
    check(
        depth == 6 * layers + 4,
        f"densenet at {config.image_size} pixels has a depth of 6n + 4, got {depth}; the nearest is {6 * layers + 4}",
    )
    return (layers,) * 3


class Bottleneck(nn.Module):
    """BatchNorm, ReLU, 1x1 convolution to 4 * growth channels; the same with 3x3 to `growth`. Both are routed."""

    def __init__(self, layers: LayerFactory, reads: Channels, growth: int) -> None:
        super().__init__()
        layers.begin("block")
        inner = layers.channels(4 * growth)
        self.writes = layers.channels(growth)
        self.norm1 = Norm(reads)
        self.conv1 = layers.conv(reads, inner, 1)
        self.norm2 = Norm(inner)
        self.conv2 = layers.conv(inner, self.writes, 3, padding=1)

    def forward(self, x_BCHW: Tensor, tape: RoutingTape) -> Tensor:
        """[B, C, H, W] -> [B, C + growth, H, W]."""
        y_BCHW = self.conv1(F.relu(self.norm1(x_BCHW)), tape)
        y_BCHW = self.conv2(F.relu(self.norm2(y_BCHW)), tape)
        return torch.cat((x_BCHW, y_BCHW), dim=1)


class Transition(nn.Module):
    """BatchNorm, ReLU, 1x1 convolution to half the channels (not routed), 2x2 average pool."""

    def __init__(self, layers: LayerFactory, reads: Channels, writes: Channels) -> None:
        super().__init__()
        self.norm = Norm(reads)
        self.conv = layers.plain_conv(reads, writes, 1)

    def forward(self, x_BCHW: Tensor, tape: RoutingTape) -> Tensor:
        """[B, C, H, W] -> [B, C / 2, H / 2, W / 2]."""
        return F.avg_pool2d(self.conv(F.relu(self.norm(x_BCHW)), tape), 2)


class DenseNet(RoutedNetwork):
    """DenseNet-BC-100 (growth 12) for small images, DenseNet-121 (growth 32) for ImageNet; both are options.

    Stem, transitions and classifier are not routed.
    """

    def __init__(self, config: ModelConfig) -> None:
        large = config.image_size >= IMAGENET_SIZE
        growth = config.growth or (32 if large else 12)
        blocks = dense_blocks(config)
        layers = LayerFactory(config, stages=len(blocks), blocks=sum(blocks))
        super().__init__(config, layers)
        full = 2 * growth
        stream = layers.channels(full)
        self.stem = Stem(layers, stream, norm=large)
        self.layers = nn.ModuleList()
        for block, length in enumerate(blocks):
            layers.begin("stage")
            if block > 0:
                full //= 2
                writes = layers.channels(full)
                self.layers.append(Transition(layers, stream, writes))
                stream = writes
            for _ in range(length):
                layer = Bottleneck(layers, stream, growth)
                self.layers.append(layer)
                stream, full = stream + layer.writes, full + growth
        self.norm = Norm(stream)
        self.classifier = Linear(stream, layers.classes)

    def run(self, x_BCHW: Tensor, tape: RoutingTape) -> Tensor:
        """Logits [B, classes] of normalized images."""
        x_BCHW = self.stem(x_BCHW, tape)
        for layer in self.layers:
            x_BCHW = layer(x_BCHW, tape)
        logits: Tensor = self.classifier(F.relu(self.norm(x_BCHW)).mean(dim=(2, 3)))
        return logits
