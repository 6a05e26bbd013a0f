"""What a model costs: parameters, and the multiply-adds of one inference as they are executed."""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from advmoe.attacks.pgd import evaluating


@dataclass(frozen=True, kw_only=True)
class Cost:
    """Cost of a model.

    `gflops` follows the paper's tables and most of the field: a multiplication with its addition counts as one
    operation (1 GFLOP here = 1e9 multiply-adds). Convolutions, linear layers and attention are counted,
    elementwise work is not.
    """

    parameters: int
    """All stored parameters, of every expert and router."""
    gflops: float
    """Executed per image."""


@torch.no_grad()
def measure_cost(model: nn.Module, image_size: int) -> Cost:
    """Count the operations that one inference really executes, routers included.

    Args:
        model: a module from images [B, 3, H, W] in [0, 1] to logits; a routed one computes one expert per image, and
            since all experts of a layer have the same size, any image gives the same count.
        image_size: height and width of the images.
    """
    parameter = next(model.parameters())
    image = torch.full((1, 3, image_size, image_size), 0.5, device=parameter.device, dtype=parameter.dtype)
    with evaluating(model), FlopCounterMode(display=False) as counter:
        model(image)
    return Cost(
        parameters=sum(p.numel() for p in model.parameters()),
        gflops=counter.get_total_flops() / 2e9,
    )


@torch.no_grad()
def measure_latency(model: nn.Module, image_size: int, *, batch_size: int = 1, repeats: int = 20) -> float:
    """Median milliseconds of one inference of a batch of random images, after three that are not counted.

    A routed model is given different images, so that their experts differ as in use.
    """
    parameter = next(model.parameters())
    shape = (batch_size, 3, image_size, image_size)
    images = torch.rand(shape, generator=torch.Generator().manual_seed(0)).to(parameter.device, parameter.dtype)

    def once() -> float:
        began = time.perf_counter()
        model(images)
        if parameter.is_cuda:
            torch.cuda.synchronize(parameter.device)
        return time.perf_counter() - began

    with evaluating(model):
        seconds = [once() for _ in range(repeats + 3)][3:]
    return 1e3 * statistics.median(seconds)
