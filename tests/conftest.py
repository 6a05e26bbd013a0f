"""Fixtures: small data sets and small networks that several test files share."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from runs import train
from torch import Tensor, nn

import advmoe
from advmoe.data.digits import load_digits
from advmoe.data.sources import Dataset
from advmoe.models.experts import ExpertLayout
from advmoe.models.moe_conv import MoEConv2d
from advmoe.models.network import RoutedNetwork
from advmoe.models.router import Router
from advmoe.models.routing import Decision

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def digits() -> Dataset:
    """The first 200 training and 40 test images of the digits, 32 x 32."""
    whole = load_digits()
    return Dataset(info=whole.info, train=whole.train.take(np.arange(200)), test=whole.test.take(np.arange(40)))


@pytest.fixture(scope="session")
def tiny_vgg() -> Callable[..., RoutedNetwork]:
    """Makes a VGG-16 of 4 to 32 channels with fixed weights, in training mode.

    `warm`: with the BatchNorm statistics of noise images, so that such images differ in predictions
    and pathways.
    """

    def make(seed: int = 0, *, warm: bool = False, **settings: Any) -> RoutedNetwork:
        torch.manual_seed(seed)
        model = advmoe.create_model("vgg16", **{"kind": "moe", "width": 0.0625, **settings})
        if warm:
            with torch.no_grad():
                for _ in range(20):
                    model(torch.rand(32, 3, 32, 32))
        return model

    return make


@pytest.fixture
def images() -> Tensor:
    """[8, 3, 32, 32] uniform in [0, 1], so images that differ more than natural ones."""
    return torch.rand(8, 3, 32, 32, generator=torch.Generator().manual_seed(1))


class SmallMoE(nn.Module):
    """Five convolutions, four of them routed: a residual block with a 1x1 shortcut between two plain MoE layers.

    `decisions` says which router each MoE layer obeys, for example (0, 1, 1, 2) for routers per
    block.
    """

    def __init__(
        self, *, num_experts: int = 2, model_scale: float = 0.5, decisions: tuple[int, ...] = (0, 1, 2, 3)
    ) -> None:
        super().__init__()
        layout = ExpertLayout(num_channels=16, num_experts=num_experts, model_scale=model_scale)
        width = layout.size
        self.decisions = decisions
        self.stem, self.stem_norm = nn.Conv2d(3, 12, 3, padding=1, bias=False), nn.BatchNorm2d(12)
        inputs, strides = (12, width, width, width), (1, 2, 1, 1)
        self.convs = nn.ModuleList(
            MoEConv2d(c, layout, 3, stride=s, padding=1) for c, s in zip(inputs, strides, strict=True)
        )
        self.norms = nn.ModuleList(nn.BatchNorm2d(width) for _ in inputs)
        self.shortcut = nn.Conv2d(width, width, 1, stride=2)
        self.routers = nn.ModuleList(Router(inputs[decisions.index(r)], num_experts) for r in sorted(set(decisions)))
        self.head = nn.Linear(width, 10)

    def forward_with_routing(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Logits [B, 10], experts [B, 4] and the margins [B, 4] of their routers."""
        taken: dict[int, Decision] = {}

        def layer(number: int, x: Tensor) -> Tensor:
            router = self.decisions[number]
            if router not in taken:
                taken[router] = self.routers[router].decide(x)
            return self.norms[number](self.convs[number](x, taken[router]))

        x = torch.relu(self.stem_norm(self.stem((images - 0.5) / 0.25)))
        x = torch.relu(layer(0, x))
        x = torch.relu(layer(2, torch.relu(layer(1, x))) + self.shortcut(x))
        x = F.max_pool2d(torch.relu(layer(3, x)), 2)
        logits = self.head(x.mean((2, 3)))
        order = [taken[router] for router in self.decisions]
        best = [decision.logits_BN.topk(min(2, decision.logits_BN.shape[1]), dim=1).values for decision in order]
        return (
            logits,
            torch.stack([decision.expert_index_B for decision in order], dim=1),
            torch.stack([values[:, 0] - values[:, -1] for values in best], dim=1),
        )

    def forward(self, images: Tensor) -> Tensor:
        return self.forward_with_routing(images)[0]


@pytest.fixture(scope="session")
def small_moe() -> Callable[..., SmallMoE]:
    """Makes a `SmallMoE` in evaluation mode, fixed weights; its routers use several experts for 16 x 16 images."""

    def make(**settings: Any) -> SmallMoE:
        torch.manual_seed(0)
        model = SmallMoE(**settings)
        colors = torch.rand(64, 3, 1, 1)
        with torch.no_grad():
            for router in model.routers:
                router.linear.weight.mul_(5)
            for _ in range(30):
                model((colors + 0.1 * torch.randn(64, 3, 16, 16)).clamp(0, 1))
        return model.eval()

    return make


@pytest.fixture(scope="session")
def whole_run(digits: Dataset, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a complete run; not to be changed."""
    path = tmp_path_factory.mktemp("whole") / "run"
    assert train(digits, path)
    return path
