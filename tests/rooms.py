"""A network that can be computed by hand: one router and two experts, one of which is a trap for an attack."""

import torch
from torch import Tensor

from advmoe.config import ModelConfig
from advmoe.models.layers import LayerFactory
from advmoe.models.network import RoutedNetwork
from advmoe.models.routing import RoutingTape

THRESHOLD = 0.5
"""Mean of the red channel from which the router sends an image to expert 1."""


class TwoRooms(RoutedNetwork):
    """Logits are means over the image of a routed 1x1 convolution.

    Expert 0 reads green: logits (4 g, 1), so class 0 for g > 1/4. Expert 1 always says class 1:
    logits (0, 1). The router's logits are (0, 20 (red - 1/2)): only that of expert 1 depends on the
    image, and no expert looks at red.
    """

    def __init__(self) -> None:
        config = ModelConfig(arch="vgg16", num_classes=2, image_size=8)
        layers = LayerFactory(config, stages=1, blocks=1)
        super().__init__(config, layers)
        self.conv = layers.conv(layers.image, layers.channels(4), 1)
        with torch.no_grad():
            weight_RC = torch.zeros(4, 3)
            weight_RC[0, 1] = 4.0
            weight_RC[1, 2] = weight_RC[3, 2] = 1.0  # blue is 1 in all images here, and carries the constants
            self.conv.weight.copy_(weight_RC[:, :, None, None])
            router = self.routers[0]
            router.linear.weight.zero_()
            router.linear.weight[1, 0] = 20.0
            router.center.running_mean[0] = THRESHOLD
            router.center.eps = 0.0
        self.eval()

    def run(self, x_BCHW: Tensor, tape: RoutingTape) -> Tensor:
        logits: Tensor = self.conv(x_BCHW, tape).mean(dim=(2, 3))
        return logits


def room_images(*reds: float, green: float = 0.75) -> Tensor:
    """One uniform image per red value, [B, 3, 8, 8]."""
    return torch.stack([torch.tensor([red, green, 1.0])[:, None, None].expand(3, 8, 8) for red in reds]).clone()
