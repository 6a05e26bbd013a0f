"""What a model costs: parameters, and the multiply-adds of one inference as they are executed."""

from __future__ import annotations

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
