"""Training steps to measure, on networks whose routers divide the images as they do in training.

Uniform noise is no such input, and a new network is no such network: one expert would get nearly
all images, and a step of an MoE-CNN would cost as much as one of S-Dense.

Shape suffixes: B batch, L MoE layers, N experts.
"""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from typing import Any

import torch
import torch.nn.functional as F
from torch.optim.swa_utils import update_bn

from advmoe.config import MethodName, ModelConfig, TrainConfig
from advmoe.data.loader import Batch
from advmoe.models.modes import evaluating
from advmoe.models.network import RoutedNetwork
from advmoe.models.registry import build_model
from advmoe.seeding import generator_for
from advmoe.training.levels import make_levels
from advmoe.training.methods import METHODS

Step = Callable[[int], None]
RATE = 1e-9
"""Learning rate. The routers hardly change, so the division of the images stays as it is."""


def images(count: int, number: int, size: int, seed: int) -> list[Batch]:
    """Batches of smooth random images, which differ as natural ones do: in color and large shapes."""
    generator = torch.Generator().manual_seed(seed)
    batches = []
    for _ in range(count):
        coarse = torch.rand(number, 3, 4, 4, generator=generator)
        fine = 0.1 * torch.rand(number, 3, size, size, generator=generator)
        pictures = (F.interpolate(coarse, size=size, mode="bilinear") * 0.9 + fine).clamp(0, 1)
        labels = torch.randint(10, (number,), generator=generator)
        batches.append(Batch(pictures, labels, torch.arange(number)))
    return batches


def subject(config: ModelConfig, batches: list[Batch]) -> RoutedNetwork:
    """A new network; BatchNorm and the routers' centering have the mean statistics of these batches.

    With BatchNorm's moving averages of a few batches, attacks would meet other features than the
    routers were centered on, and one expert would get all images.
    """
    torch.manual_seed(0)
    model = build_model(config)
    update_bn(batches, model)
    return model


@torch.no_grad()
def busiest(model: RoutedNetwork, batches: list[Batch]) -> float:
    """Share of images of the busiest expert, mean over layers, in the mode of attacks."""
    with evaluating(model):
        index_BL = torch.cat([model.forward_with_routing(batch.images)[1].expert_index_BL for batch in batches])
    counts_LN = F.one_hot(index_BL, model.config.num_experts).sum(dim=0)
    return float(counts_LN.amax(dim=1).float().mean()) / len(index_BL)


def step_of(model: RoutedNetwork, method: MethodName, batches: list[Batch], **settings: Any) -> Step:
    """A function that takes the i-th training step of a method, on a copy of the model.

    Each step starts from the model's statistics. Those of a few steps on a few batches would differ
    between attack and training, so that the share of the busiest expert would rise from step to step.
    """
    model = deepcopy(model)
    statistics = [(buffer, buffer.clone()) for buffer in model.buffers()]
    train = TrainConfig(dataset="benchmark", method=method, lr=RATE, **settings)
    levels = make_levels(METHODS[method].levels, model, train)

    def step(i: int) -> None:
        for buffer, value in statistics:
            buffer.copy_(value)
        chosen = [batches[(2 * i + level) % len(batches)] for level in range(len(levels))]
        noise = [generator_for(0, i, level) for level in range(len(levels))]
        METHODS[method].step(levels, chosen, train, noise, i)

    return step
