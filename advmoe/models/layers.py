"""The layers of a backbone for one model kind. The backbone names the layers that it needs; the
kind decides how they compute.

Every convolution is called as `layer(x, tape)`. Layers that are not routed ignore the tape.

Shape suffixes: B batch, C channels, D features, H height, W width.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from advmoe.config import Granularity, ModelConfig, check, routed_part
from advmoe.models.batch_norm import BatchNorm2d
from advmoe.models.channels import ChannelMask, Channels, KeptChannels
from advmoe.models.convolution import conv2d
from advmoe.models.dispatch import exporting
from advmoe.models.experts import ExpertLayout, scaled_channels
from advmoe.models.moe_conv import MoEConv2d
from advmoe.models.router import ImageRouter, Router
from advmoe.models.routing import Decision, RoutingTape, scaled

IMAGENET_SIZE = 128
"""Images of at least this width get the ImageNet form of a backbone. Smaller images (CIFAR 32,
TinyImageNet 64) get the CIFAR form."""


class Conv2d(nn.Conv2d):
    """An ordinary convolution without bias; it reads only the channels that Sparse-CNN keeps."""

    def __init__(self, reads: Channels, writes: Channels, kernel_size: int, *, stride: int, padding: int) -> None:
        super().__init__(reads.size, writes.size, kernel_size, stride=stride, padding=padding, bias=False)
        self.reads = reads
        self.writes = writes
        nn.init.kaiming_normal_(self.weight, nonlinearity="relu")

    def forward(self, x_BCHW: Tensor, tape: RoutingTape) -> Tensor:  # type: ignore[override]
        """Convolve; the tape is not needed."""
        weight = self.weight
        if self.reads.masked:
            weight = weight * self.reads.mask()[:, None, None]
        stride = self.stride
        if self.kernel_size == (1, 1) and not exporting():
            # For a strided 1x1 convolution of few channels in channels-last format, oneDNN writes
            # beyond the end of the weight gradient and corrupts the heap (torch 2.15, AVX-512).
            # Selecting the pixels first gives the same result.
            x_BCHW, stride = x_BCHW[:, :, :: stride[0], :: stride[1]], (1, 1)
        return conv2d(x_BCHW, weight, stride, self.padding)


class Linear(nn.Linear):
    """A linear layer; it reads only the channels that Sparse-CNN keeps.

    Args:
        reads: Channels of its input.
        writes: Channels of its output.
        places: Neighboring inputs that belong to one channel (H * W of flattened feature maps).
    """

    def __init__(self, reads: Channels, writes: Channels, *, places: int = 1) -> None:
        super().__init__(reads.size * places, writes.size)
        self.reads = reads
        self.writes = writes
        self.places = places

    def forward(self, x_BD: Tensor) -> Tensor:
        """[B, in] -> [B, out]."""
        if not self.reads.masked:
            return super().forward(x_BD)
        return F.linear(x_BD, self.weight * self.reads.mask().repeat_interleave(self.places), self.bias)


class Norm(BatchNorm2d):
    """BatchNorm of some channels."""

    def __init__(self, channels: Channels) -> None:
        super().__init__(channels.size)
        self.writes = channels


class RoutedConv2d(MoEConv2d):
    """An MoE convolution that asks the tape for its decision."""

    def __init__(
        self,
        layer: int,
        in_channels: int,
        layout: ExpertLayout,
        kernel_size: int,
        *,
        stride: int,
        padding: int,
        affine: bool = False,
    ) -> None:
        super().__init__(in_channels, layout, kernel_size, stride=stride, padding=padding, affine=affine)
        self.layer = layer

    def forward(self, x_BCHW: Tensor, tape: RoutingTape, norm: nn.Module | None = None) -> Tensor:  # type: ignore[override]
        """Route, convolve each image with its expert, and normalize. A router that scales the output does so last."""

        def compute(x_BCHW: Tensor, decision: Decision) -> Tensor:
            y_BCHW = super(RoutedConv2d, self).forward(x_BCHW, decision)
            return scaled(y_BCHW if norm is None else norm(y_BCHW), decision)

        return tape.apply(self.layer, x_BCHW, compute)


class LayerFactory:
    """Makes the layers of one network of a given kind and keeps count of its MoE layers, routers and masks.

    The backbone states full (Dense) channel numbers. It announces where its parts begin
    (`begin("block")`, `begin("stage")`), so that routers can be shared within them.
    """

    def __init__(self, config: ModelConfig, *, stages: int, blocks: int) -> None:
        self.config = config
        self.routers = nn.ModuleList()
        self.router_of_layer: list[int] = []
        self.layouts: list[ExpertLayout] = []
        self.masks = nn.ModuleList()
        self.routable: list[Channels] = []
        self.routed_places: list[int] = []
        self._open = False
        self._begun = {"stage": 0, "block": 0}
        self._unrouted = self._count_unrouted({"stage": stages, "block": blocks})

    def _count_unrouted(self, parts: dict[str, int]) -> tuple[str, int]:
        """Kind of part, and number of its parts before the first routed one."""
        wanted = routed_part(self.config.routed)
        if wanted is None:
            return "stage", -1
        part, number = wanted
        check(
            number <= parts[part],
            f"{self.config.arch} has {parts[part]} {part}s here, so its last {number} cannot be routed",
            "routed",
        )
        return part, parts[part] - number

    @property
    def routes(self) -> bool:
        """Whether layers made now are routed in an MoE network."""
        part, before = self._unrouted
        return self.config.kind == "moe" and self._begun[part] > before

    @property
    def image(self) -> Channels:
        """The color channels."""
        return Channels(3, 3)

    @property
    def classes(self) -> Channels:
        """The logits."""
        return Channels(self.config.num_classes, self.config.num_classes)

    def channels(self, full: float) -> Channels:
        """New channels: `full` times the width multiplier; r of them in all kinds but Dense."""
        config = self.config
        number = max(1, int(full * config.width + 0.5))
        if config.kind == "dense":
            return Channels(number, number)
        kept = scaled_channels(number, config.model_scale)
        if config.kind != "sparse_cnn":
            return Channels(number, kept)
        mask = KeptChannels(kept) if config.compact else ChannelMask(number, kept)
        self.masks.append(mask)
        return Channels(number, kept if config.compact else number, (mask,))

    def begin(self, part: Granularity) -> None:
        """A new block or stage of the backbone begins here."""
        self._begun[part] += 1
        if part == self.config.granularity:
            self._open = False

    def conv(
        self, reads: Channels, writes: Channels, kernel_size: int, *, stride: int = 1, padding: int = 0
    ) -> nn.Module:
        """A convolution without bias that is routed in MoE-CNN."""
        self.routable.append(writes)
        if not self.routes:
            return self.plain_conv(reads, writes, kernel_size, stride=stride, padding=padding)
        self.routed_places.append(len(self.routable) - 1)
        layer = self.routed(reads.size, writes.full)
        return RoutedConv2d(
            layer,
            reads.size,
            self.layouts[layer],
            kernel_size,
            stride=stride,
            padding=padding,
            affine=self.config.expert_affine,
        )

    def routed(self, in_channels: int, full: int) -> int:
        """Number of a new MoE layer whose `full` channels are shared out among the experts.

        The layer gets a new router, unless the current part of the network already has one.
        """
        config = self.config
        self.layouts.append(
            ExpertLayout(
                num_channels=full,
                num_experts=config.num_experts,
                model_scale=config.model_scale,
                separate=config.expert_filters == "separate",
                shared=config.shared,
            )
        )
        if not self._open:
            if config.granularity == "image":
                router: Router = ImageRouter(config.num_experts, router_gradient=config.router_gradient)
            else:
                router = Router(in_channels, config.num_experts, router_gradient=config.router_gradient)
            self.routers.append(router)
            self._open = config.granularity not in {"layer", "token"}
        self.router_of_layer.append(len(self.routers) - 1)
        return len(self.layouts) - 1

    def plain_conv(
        self, reads: Channels, writes: Channels, kernel_size: int, *, stride: int = 1, padding: int = 0
    ) -> nn.Module:
        """A convolution without bias that is never routed: stems, shortcuts, transitions."""
        return Conv2d(reads, writes, kernel_size, stride=stride, padding=padding)


class ConvNorm(nn.Module):
    """A convolution, routed or not, and BatchNorm of the channels it writes."""

    def __init__(self, conv: nn.Module, writes: Channels) -> None:
        super().__init__()
        self.conv = conv
        self.norm = Norm(writes)

    def forward(self, x_BCHW: Tensor, tape: RoutingTape) -> Tensor:
        """[B, C, H, W] -> [B, C', H', W'], without an activation."""
        if isinstance(self.conv, RoutedConv2d):
            return self.conv(x_BCHW, tape, self.norm)  # type: ignore[no-any-return]
        y_BCHW: Tensor = self.norm(self.conv(x_BCHW, tape))
        return y_BCHW


class Stem(nn.Module):
    """First layers of a residual network, not routed: image -> feature maps.

    Small images: one 3x3 convolution at full resolution. ImageNet: 7x7 with stride 2 and a 3x3 max
    pool with stride 2. `norm` adds BatchNorm and ReLU after the convolution.
    """

    def __init__(self, layers: LayerFactory, writes: Channels, *, norm: bool = True) -> None:
        super().__init__()
        self.large = layers.config.image_size >= IMAGENET_SIZE
        if self.large:
            self.conv = layers.plain_conv(layers.image, writes, 7, stride=2, padding=3)
        else:
            self.conv = layers.plain_conv(layers.image, writes, 3, padding=1)
        self.norm = Norm(writes) if norm else None

    def forward(self, x_BCHW: Tensor, tape: RoutingTape) -> Tensor:
        """[B, 3, H, W] -> [B, C, H, W], or [B, C, H / 4, W / 4] for ImageNet."""
        x_BCHW = self.conv(x_BCHW, tape)
        if self.norm is not None:
            x_BCHW = F.relu(self.norm(x_BCHW))
        return F.max_pool2d(x_BCHW, 3, stride=2, padding=1) if self.large else x_BCHW
