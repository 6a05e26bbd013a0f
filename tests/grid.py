"""Small networks for every combination of architecture, kind and image size."""

from dataclasses import dataclass

import torch

from advmoe.config import KINDS, ModelConfig
from advmoe.models.network import RoutedNetwork
from advmoe.models.registry import build_model

WIDTHS = {"densenet": 0.5, "resnet18": 0.125, "vgg16": 0.125, "vit": 0.125, "wrn28_10": 0.05}
"""Width multipliers that leave 8 to 64 channels."""
OPTIONS = {
    "densenet": {32: {"depth": 22}, 64: {"depth": 10, "growth": 8}, 224: {"growth": 8}},
    "vit": {32: {"depth": 2}, 64: {"depth": 2, "granularity": "token"}, 224: {"depth": 3}},
}
"""Settings per image size that are tried along the way."""
SIZES = (32, 64, 224)
REFUSED = {("vit", "sparse_cnn")}
"""There are no channels to prune in a ViT."""


@dataclass(frozen=True)
class Cell:
    """One place of the grid."""

    arch: str
    kind: str
    image_size: int

    def __str__(self) -> str:
        return f"{self.arch}-{self.kind}-{self.image_size}"

    def config(self, **settings: object) -> ModelConfig:
        options = dict(OPTIONS.get(self.arch, {}).get(self.image_size, {}))
        if self.kind != "moe":
            options.pop("granularity", None)
        fixed = {"num_classes": 5, "width": WIDTHS[self.arch], "model_scale": 0.5, "num_experts": 2}
        return ModelConfig(
            arch=self.arch, kind=self.kind, image_size=self.image_size, **{**fixed, **options, **settings}
        )

    def build(self, **settings: object) -> RoutedNetwork:
        """The network with weights from seed 0, in training mode."""
        torch.manual_seed(0)
        return build_model(self.config(**settings))

    def images(self, number: int = 2) -> torch.Tensor:
        """Uniform noise in [0, 1], from seed 0."""
        generator = torch.Generator().manual_seed(0)
        return torch.rand(number, 3, self.image_size, self.image_size, generator=generator)


GRID = [Cell(arch, kind, size) for arch in WIDTHS for kind in KINDS for size in SIZES if (arch, kind) not in REFUSED]
