"""ResNet-18 (He et al., 2016): stem, four stages of two basic blocks, linear classifier.

Shape suffixes: B batch, C channels, H height, W width.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from advmoe.config import ModelConfig
from advmoe.models.channels import Channels
from advmoe.models.layers import ConvNorm, LayerFactory, Linear, Stem
from advmoe.models.network import RoutedNetwork
from advmoe.models.routing import RoutingTape

STAGES = (64, 128, 256, 512)
"""Channels of the stages; each but the first begins by halving height and width."""
BLOCKS_PER_STAGE = 2


class BasicBlock(nn.Module):
    """Two 3x3 convolutions (routed in MoE-CNN) and a shortcut, which is 1x1 and not routed where the shape changes."""

    def __init__(self, layers: LayerFactory, reads: Channels, writes: Channels, full: int, *, stride: int) -> None:
        super().__init__()
        layers.begin("block")
        inner = layers.channels(full)
        self.conv1 = ConvNorm(layers.conv(reads, inner, 3, stride=stride, padding=1), inner)
        self.conv2 = ConvNorm(layers.conv(inner, writes, 3, padding=1), writes)
        self.shortcut = (
            None if reads is writes else ConvNorm(layers.plain_conv(reads, writes, 1, stride=stride), writes)
        )

    def forward(self, x_BCHW: Tensor, tape: RoutingTape) -> Tensor:
        """[B, C, H, W] -> [B, C', H / stride, W / stride]."""
        y_BCHW = self.conv2(F.relu(self.conv1(x_BCHW, tape)), tape)
        return F.relu(y_BCHW + (x_BCHW if self.shortcut is None else self.shortcut(x_BCHW, tape)))


class ResNet18(RoutedNetwork):
    """ResNet-18: 16 routed 3x3 convolutions; stem, shortcuts and classifier are not routed."""

    def __init__(self, config: ModelConfig) -> None:
        layers = LayerFactory(config, stages=len(STAGES), blocks=len(STAGES) * BLOCKS_PER_STAGE)
        super().__init__(config, layers)
        stream = layers.channels(STAGES[0])
        self.stem = Stem(layers, stream)
        self.blocks = nn.ModuleList()
        for stage, full in enumerate(STAGES):
            layers.begin("stage")
            for block in range(BLOCKS_PER_STAGE):
                down = stage > 0 and block == 0
                writes = layers.channels(full) if down else stream
                self.blocks.append(BasicBlock(layers, stream, writes, full, stride=2 if down else 1))
                stream = writes
        self.classifier = Linear(stream, layers.classes)

    def run(self, x_BCHW: Tensor, tape: RoutingTape) -> Tensor:
        """Logits [B, classes] of normalized images."""
        x_BCHW = self.stem(x_BCHW, tape)
        for block in self.blocks:
            x_BCHW = block(x_BCHW, tape)
        logits: Tensor = self.classifier(x_BCHW.mean(dim=(2, 3)))
        return logits
