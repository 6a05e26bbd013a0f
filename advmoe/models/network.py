"""The base class of all networks: logits of images, pathways on request, and parameters split into phi and psi.

Shape suffixes: B batch, C channels, H height, L MoE layers, T tokens, W width.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor, nn

from advmoe.config import ModelConfig
from advmoe.errors import DataError
from advmoe.models.layers import LayerFactory
from advmoe.models.moe_conv import MoEConv2d
from advmoe.models.routing import Routing, RoutingTape

TapeType = Callable[[nn.ModuleList, Sequence[int], Tensor | None], RoutingTape]
"""(routers, router of each layer, forced pathways) -> tape; `RoutingTape` itself is the ordinary one."""


def check_images(images: Tensor, size: int, *, in_training: bool) -> None:
    """Refuse tensors that are no images, although the arithmetic would accept them.

    Shape and type are always checked; this reads no pixel. In eval mode on the CPU, values that are
    not finite or in 0..255 are refused too. This costs a thousandth of a forward pass. On a GPU the
    check would wait for the device in every call, and a compiled or exported graph cannot branch on
    values. Other values outside [0, 1] are accepted, because a diagnostic feeds normalized images
    on purpose.

    Raises:
        DataError: A wrong shape or type, values that are not finite, or pixels of 0..255.
    """
    if not isinstance(images, Tensor):
        raise DataError(f"expected images as a tensor [B, 3, {size}, {size}], got {type(images).__name__}")
    if images.ndim != 4 or images.shape[1:] != (3, size, size):
        raise DataError(f"expected images [B, 3, {size}, {size}], got {list(images.shape)}")
    if not images.is_floating_point():
        raise DataError(f"expected images of floating-point numbers in [0, 1], got {images.dtype}")
    if in_training or torch.compiler.is_compiling() or type(images) is not Tensor or not images.is_cpu:
        return
    if len(images):
        low, high = (value.item() for value in images.detach().aminmax())
        if not math.isfinite(high - low):
            raise DataError("expected images in [0, 1], got values that are not finite (NaN or infinity)")
        if low >= 0.0 and high > 2.0:
            raise DataError(f"expected images in [0, 1], got values up to {high:g}; divide by 255?")


class RoutedNetwork(nn.Module):
    """Base of all backbones: a plain module from images [B, 3, H, W] in [0, 1] to logits [B, classes].

    Subclasses build their layers with the factory and implement `run`. `self.routers` holds phi
    (the routers), `self.masks` the scores of Sparse-CNN's channel masks. All other parameters are
    psi.
    """

    mean: Tensor
    std: Tensor
    rows_per_image: int = 1
    """Routed units per image: 1 for the image, or its number of tokens."""
    compiled: Callable[[Tensor, Tensor | None], tuple[Tensor, Routing]] | None = None
    """Takes the place of `compute` for a while (`advmoe.models.compiled`)."""
    class_names: tuple[str, ...] = ()
    """Name of each logit, if the checkpoint stores names."""

    def __init__(self, config: ModelConfig, layers: LayerFactory) -> None:
        super().__init__()
        self.config = config
        self.routers = layers.routers
        self.router_of_layer = layers.router_of_layer
        self.expert_layouts = layers.layouts
        self.masks = layers.masks
        self.routable = layers.routable
        self.routed_places = layers.routed_places
        self.register_buffer("mean", torch.tensor(config.mean).view(1, 3, 1, 1))
        self.register_buffer("std", torch.tensor(config.std).view(1, 3, 1, 1))

    def run(self, x_BCHW: Tensor, tape: RoutingTape) -> Tensor:
        """Logits of normalized images; each MoE layer asks the tape for its decision."""
        raise TypeError(f"{type(self).__name__} does not say how it runs")

    def forward(self, images: Tensor, pathways: Tensor | Routing | None = None) -> Tensor:
        """Logits [B, classes] of images [B, 3, H, W] in [0, 1]; see `forward_with_routing`."""
        return self.forward_with_routing(images, pathways)[0]

    def forward_with_routing(
        self, images: Tensor, pathways: Tensor | Routing | None = None, *, tape_type: TapeType = RoutingTape
    ) -> tuple[Tensor, Routing]:
        """Logits and the pathways taken.

        Args:
            images: [B, 3, H, W] in [0, 1].
            pathways: int64 [B, L] in [0, N), experts to use instead of the routers' choice (frozen
                routing). Where tokens are routed, L counts the decisions of all MoE layers and
                tokens, layer by layer. A `Routing` that this method returned stands for its
                `expert_index_BL`.
            tape_type: Makes the pass's tape; attacks pass one that relaxes the routing
                (`advmoe.attacks.relaxations`).

        Returns:
            Logits [B, classes], and the `Routing` of the images.

        Raises:
            DataError: `check_images` refuses the images, or the pathways are not those of these
                images and this network.
        """
        if isinstance(pathways, Routing):
            pathways = pathways.expert_index_BL
        check_images(images, self.config.image_size, in_training=self.training)
        if pathways is not None:
            self._check_pathways(pathways, len(images), lowest=0 if tape_type is RoutingTape else -1)
        if self.compiled is not None and tape_type is RoutingTape:
            return self.compiled(images, pathways)
        return self.compute(images, pathways, tape_type)

    def compute(
        self, images: Tensor, pathways: Tensor | None = None, tape_type: TapeType = RoutingTape
    ) -> tuple[Tensor, Routing]:
        """The computation of `forward_with_routing` on checked images, as one graph without a break."""
        if not self.expert_layouts:
            tape = RoutingTape(self.routers, (), images.new_zeros((images.shape[0], 0), dtype=torch.int64))
        else:
            tape = tape_type(self.routers, self.router_of_layer, None if pathways is None else self._as_rows(pathways))
        x_BCHW = (images - self.mean) / self.std
        # Channels-last would be faster, but corrupts the heap with torch 2.15 (oneDNN, AVX-512;
        # docs/log.md).
        if self.expert_layouts and self.config.granularity == "image":
            tape.decide(0, x_BCHW)
        # losses are computed in fp32 for every precision of the convolutions
        logits = self.run(x_BCHW, tape).to(x_BCHW.dtype)
        return logits, self._by_image(tape.read())

    def _check_pathways(self, pathways_BL: Tensor, images: int, *, lowest: int) -> None:
        """Refuse pathways of other images or another network. On a GPU, reading them would be a wait."""
        shape = (images, len(self.expert_layouts) * self.rows_per_image)
        if not isinstance(pathways_BL, Tensor):
            raise DataError(
                f"expected pathways int64 {list(shape)} as a tensor or a Routing, got {type(pathways_BL).__name__}"
            )
        if pathways_BL.shape != shape or pathways_BL.dtype != torch.int64:
            raise DataError(
                f"expected pathways int64 {list(shape)}, one expert for each image and decision, got "
                f"{str(pathways_BL.dtype).removeprefix('torch.')} {list(pathways_BL.shape)}"
            )
        if not pathways_BL.is_cpu or torch.compiler.is_compiling() or not pathways_BL.numel():
            return
        low, high = (int(value) for value in pathways_BL.aminmax())
        if low < lowest or high >= self.config.num_experts:
            raise DataError(
                f"expected pathways of experts 0 to {self.config.num_experts - 1}, got experts {low} to {high}"
            )

    def _as_rows(self, pathways_BL: Tensor) -> Tensor:
        """From pathways of images to pathways of routed units, [B * rows_per_image, MoE layers]."""
        pathways_BLT: Tensor = pathways_BL.unflatten(1, (-1, self.rows_per_image))
        return pathways_BLT.transpose(1, 2).flatten(0, 1)

    def _by_image(self, routing: Routing) -> Routing:
        """From a routing of units to a routing of images, with the decisions of each layer side by side."""
        if self.rows_per_image == 1:
            return routing
        by_image = [
            None if of_rows is None else of_rows.unflatten(0, (-1, self.rows_per_image)).transpose(1, 2).flatten(1, 2)
            for of_rows in routing
        ]
        return Routing(*by_image)  # type: ignore[arg-type]

    def folded(self) -> RoutedNetwork:
        """This network, or an equal one whose training-only parameters are folded into the experts' filters."""
        if not self.config.expert_affine:
            return self
        network = copy.deepcopy(self)
        for module in network.modules():
            if isinstance(module, MoEConv2d):
                module.fold_affine()
        return network

    def router_parameters(self) -> Iterator[nn.Parameter]:
        """phi."""
        return self.routers.parameters()

    def expert_parameters(self) -> Iterator[nn.Parameter]:
        """psi: all parameters except those of routers and masks."""
        others = {id(parameter) for parameter in (*self.router_parameters(), *self.mask_parameters())}
        return (parameter for parameter in self.parameters() if id(parameter) not in others)

    def mask_parameters(self) -> Iterator[nn.Parameter]:
        """The scores of Sparse-CNN's channel masks."""
        return self.masks.parameters()
