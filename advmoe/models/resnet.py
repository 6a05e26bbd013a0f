"""ResNet-18 (He et al., 2016): stem, four stages of two basic blocks, linear classifier."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from advmoe.config import ModelConfig
from advmoe.models.layers import ConvNorm, LayerFactory, Stem
from advmoe.models.network import RoutedNetwork
from advmoe.models.routing import RoutingTape

STAGES = (64, 128, 256, 512)
"""Channels of the stages; each but the first begins by halving height and width."""
BLOCKS_PER_STAGE = 2


class BasicBlock(nn.Module):
    """Two 3x3 convolutions (routed in MoE-CNN) and a shortcut, which is 1x1 and not routed where the shape changes."""

    def __init__(self, layers: LayerFactory, in_full: int, full: int, stride: int) -> None:
        super().__init__()
        layers.begin("block")
        self.conv1 = ConvNorm(layers.conv(layers.packed(in_full), full, 3, stride=stride, padding=1))
        self.conv2 = ConvNorm(layers.conv(layers.packed(full), full, 3, padding=1))
        self.shortcut = (
            ConvNorm(layers.plain_conv(layers.packed(in_full), full, 1, stride=stride))
            if stride != 1 or in_full != full
            else None
        )

    def forward(self, x_BCHW: Tensor, tape: RoutingTape) -> Tensor:
        """[B, C, H, W] -> [B, C', H / stride, W / stride]."""
        y_BCHW = self.conv2(F.relu(self.conv1(x_BCHW, tape)), tape)
        return F.relu(y_BCHW + (x_BCHW if self.shortcut is None else self.shortcut(x_BCHW, tape)))


class ResNet18(RoutedNetwork):
    """ResNet-18: 16 routed 3x3 convolutions; stem, shortcuts and classifier are not routed."""

    def __init__(self, config: ModelConfig) -> None:
        layers = LayerFactory(config)
        super().__init__(config, layers)
        self.stem = Stem(layers, STAGES[0])
        self.blocks = nn.ModuleList()
        in_full = STAGES[0]
        for stage, full in enumerate(STAGES):
            layers.begin("stage")
            for block in range(BLOCKS_PER_STAGE):
                stride = 2 if stage > 0 and block == 0 else 1
                self.blocks.append(BasicBlock(layers, in_full, full, stride))
                in_full = full
        self.classifier = nn.Linear(layers.packed(in_full), config.num_classes)

    def run(self, x_BCHW: Tensor, tape: RoutingTape) -> Tensor:
        """Logits [B, classes] of normalised images."""
        x_BCHW = self.stem(x_BCHW, tape)
        for block in self.blocks:
            x_BCHW = block(x_BCHW, tape)
        logits: Tensor = self.classifier(x_BCHW.mean(dim=(2, 3)))
        return logits
