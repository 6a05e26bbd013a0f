"""WRN-28-10 (Zagoruyko & Komodakis, 2016): pre-activation residual blocks, ten times as wide as in ResNet.

Shape suffixes: B batch, C channels, H height, W width.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from advmoe.config import ModelConfig
from advmoe.models.channels import Channels
from advmoe.models.layers import IMAGENET_SIZE, LayerFactory, Linear, Norm, Stem
from advmoe.models.network import RoutedNetwork
from advmoe.models.routing import RoutingTape

STEM = 16
"""Channels of the stem, which no widening touches: the width multiplier belongs to the widening factor."""
STAGES = (160, 320, 640)
"""Channels of the stages; the second and third begin by halving height and width."""
BLOCKS_PER_STAGE = 4


class PreActivationBlock(nn.Module):
    """BatchNorm, ReLU and a 3x3 convolution (routed in MoE-CNN), twice; the shortcut is 1x1 where the shape changes."""

    def __init__(self, layers: LayerFactory, reads: Channels, writes: Channels, full: int, *, stride: int) -> None:
        super().__init__()
        layers.begin("block")
        inner = layers.channels(full)
        self.norm1 = Norm(reads)
        self.conv1 = layers.conv(reads, inner, 3, stride=stride, padding=1)
        self.norm2 = Norm(inner)
        self.conv2 = layers.conv(inner, writes, 3, padding=1)
        self.shortcut = None if reads is writes else layers.plain_conv(reads, writes, 1, stride=stride)

    def forward(self, x_BCHW: Tensor, tape: RoutingTape) -> Tensor:
        """[B, C, H, W] -> [B, C', H / stride, W / stride]."""
        active_BCHW = F.relu(self.norm1(x_BCHW))
        y_BCHW: Tensor = self.conv2(F.relu(self.norm2(self.conv1(active_BCHW, tape))), tape)
        return y_BCHW + (x_BCHW if self.shortcut is None else self.shortcut(active_BCHW, tape))


class WRN28x10(RoutedNetwork):
    """WRN-28-10 without dropout: 24 routed 3x3 convolutions; stem, shortcuts and classifier are not routed."""

    def __init__(self, config: ModelConfig) -> None:
        layers = LayerFactory(config, stages=len(STAGES), blocks=len(STAGES) * BLOCKS_PER_STAGE)
        super().__init__(config, layers)
        stream = layers.channels(STEM / config.width)
        self.stem = Stem(layers, stream, norm=config.image_size >= IMAGENET_SIZE)
        self.blocks = nn.ModuleList()
        for stage, full in enumerate(STAGES):
            layers.begin("stage")
            for block in range(BLOCKS_PER_STAGE):
                writes = layers.channels(full) if block == 0 else stream
                stride = 2 if stage > 0 and block == 0 else 1
                self.blocks.append(PreActivationBlock(layers, stream, writes, full, stride=stride))
                stream = writes
        self.norm = Norm(stream)
        self.classifier = Linear(stream, layers.classes)

    def run(self, x_BCHW: Tensor, tape: RoutingTape) -> Tensor:
        """Logits [B, classes] of normalized images."""
        x_BCHW = self.stem(x_BCHW, tape)
        for block in self.blocks:
            x_BCHW = block(x_BCHW, tape)
        logits: Tensor = self.classifier(F.relu(self.norm(x_BCHW)).mean(dim=(2, 3)))
        return logits
