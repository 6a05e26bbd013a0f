"""The convolutions of a backbone, made for one model kind: the backbone says what it needs, the kind decides how.

Every layer here is called as `layer(x, tape)`; layers that are not routed ignore the tape.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from advmoe.config import ModelConfig
from advmoe.models.moe_conv import MoEConv2d
from advmoe.models.routing import ExpertLayout, Router, RoutingTape, scaled_channels


class Conv2d(nn.Conv2d):
    """An ordinary convolution in a routed network."""

    def forward(self, x_BCHW: Tensor, tape: RoutingTape) -> Tensor:  # type: ignore[override]
        """Convolve; the tape is not needed."""
        return super().forward(x_BCHW)


class RoutedConv2d(MoEConv2d):
    """An MoE convolution that asks the tape for its decision."""

    def __init__(
        self, layer: int, in_channels: int, layout: ExpertLayout, kernel_size: int, *, stride: int, padding: int
    ) -> None:
        super().__init__(in_channels, layout, kernel_size, stride=stride, padding=padding)
        self.layer = layer

    def forward(self, x_BCHW: Tensor, tape: RoutingTape) -> Tensor:  # type: ignore[override]
        """Route, then convolve each image with its expert."""
        return super().forward(x_BCHW, tape.decide(self.layer, x_BCHW))


class LayerFactory:
    """Makes the layers of one network of a given kind and keeps count of its MoE layers and routers.

    A backbone states full (Dense) channel numbers; the layers it gets tell the number they really have in `out_channels`.
    It announces where its parts begin (`begin("block")`, `begin("stage")`), so that routers can be shared within them.
    """

    def __init__(self, config: ModelConfig) -> None:
        self.config = config
        self.routers = nn.ModuleList()
        self.router_of_layer: list[int] = []
        self.layouts: list[ExpertLayout] = []
        self._open = False

    def channels(self, full: int) -> int:
        """Channels a layer of the backbone has after the width multiplier."""
        return max(1, int(full * self.config.width + 0.5))

    def packed(self, full: int) -> int:
        """Channels that are really computed: all of them in Dense, r of them in the other kinds."""
        channels = self.channels(full)
        return channels if self.config.kind == "dense" else scaled_channels(channels, self.config.model_scale)

    def begin(self, part: str) -> None:
        """A new block or stage of the backbone begins here."""
        if part == self.config.granularity:
            self._open = False

    def conv(self, in_channels: int, full: int, kernel_size: int, *, stride: int = 1, padding: int = 0) -> nn.Module:
        """A convolution without bias that is routed in MoE-CNN."""
        if self.config.kind != "moe":
            return self.plain_conv(in_channels, full, kernel_size, stride=stride, padding=padding)
        config = self.config
        layout = ExpertLayout(
            num_channels=self.channels(full),
            num_experts=config.num_experts,
            model_scale=config.model_scale,
            separate=config.expert_filters == "separate",
        )
        if not self._open:
            self.routers.append(Router(in_channels, config.num_experts, router_gradient=config.router_gradient))
            self._open = config.granularity != "layer"
        self.router_of_layer.append(len(self.routers) - 1)
        self.layouts.append(layout)
        layer = len(self.layouts) - 1
        return RoutedConv2d(layer, in_channels, layout, kernel_size, stride=stride, padding=padding)

    def plain_conv(
        self, in_channels: int, full: int, kernel_size: int, *, stride: int = 1, padding: int = 0
    ) -> nn.Module:
        """A convolution without bias that is never routed: stems, shortcuts, transitions."""
        conv = Conv2d(in_channels, self.packed(full), kernel_size, stride=stride, padding=padding, bias=False)
        nn.init.kaiming_normal_(conv.weight, nonlinearity="relu")
        return conv


class ConvNorm(nn.Module):
    """A convolution, routed or not, and BatchNorm over its packed output slots."""

    def __init__(self, conv: nn.Module) -> None:
        super().__init__()
        self.conv = conv
        self.norm = nn.BatchNorm2d(int(conv.out_channels))  # type: ignore[arg-type]

    def forward(self, x_BCHW: Tensor, tape: RoutingTape) -> Tensor:
        """[B, C, H, W] -> [B, out_channels, H', W'], without an activation."""
        y_BCHW: Tensor = self.norm(self.conv(x_BCHW, tape))
        return y_BCHW


IMAGENET_SIZE = 128
"""Images at least this wide get the ImageNet stem; smaller ones (CIFAR 32, TinyImageNet 64) keep their resolution."""


class Stem(nn.Module):
    """First layers of a residual network, not routed: image -> feature maps.

    Small images: one 3x3 convolution at full resolution. ImageNet: 7x7 with stride 2 and a 3x3 max pool with stride 2.
    `norm` adds BatchNorm and ReLU after the convolution.
    """

    def __init__(self, layers: LayerFactory, full: int, *, norm: bool = True) -> None:
        super().__init__()
        self.large = layers.config.image_size >= IMAGENET_SIZE
        if self.large:
            self.conv = layers.plain_conv(3, full, 7, stride=2, padding=3)
        else:
            self.conv = layers.plain_conv(3, full, 3, padding=1)
        self.norm = nn.BatchNorm2d(layers.packed(full)) if norm else None

    def forward(self, x_BCHW: Tensor, tape: RoutingTape) -> Tensor:
        """[B, 3, H, W] -> [B, C, H, W], or [B, C, H / 4, W / 4] for ImageNet."""
        x_BCHW = self.conv(x_BCHW, tape)
        if self.norm is not None:
            x_BCHW = F.relu(self.norm(x_BCHW))
        return F.max_pool2d(x_BCHW, 3, stride=2, padding=1) if self.large else x_BCHW
