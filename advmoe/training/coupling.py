"""Experts that grow apart from one common filter bank.

N experts of a layer each see a share of the images, and the next layer reads the same slots whichever of them wrote.
Left to themselves they agree on nothing: a slot means something else after every decision, and all learn slowly
(docs/log.md). So they start equal, and the gradient G_e of expert e becomes

    G + specialisation * (G_e - G / N),    G = sum over experts.

What the experts have in common, their mean, moves by G: it learns from every image, exactly as S-Dense's filters do.
What tells them apart moves `specialisation` times as fast as under plain SGD. At 0 the network stays S-Dense; with
N = 1 it is S-Dense at any value. Under SGD with momentum and weight decay this equals the training of shared plus
specific filters, but the filters stay one plain bank: nothing has to be merged, saved or exported differently.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from advmoe.models.moe_conv import MoEConv2d
from advmoe.models.moe_linear import MoELinear
from advmoe.models.network import RoutedNetwork


def expert_banks(model: nn.Module) -> Iterator[tuple[nn.Parameter, int]]:
    """Weight banks that split evenly into N > 1 experts, and N.

    Banks of overlapping windows are left out: a filter of two experts has two counterparts in a third.
    """
    for module in model.modules():
        if isinstance(module, MoEConv2d) and module.layout.num_experts > 1 and module.layout.disjoint:
            yield module.weight, module.layout.num_experts
        elif isinstance(module, MoELinear) and module.disjoint and module.num_experts > 1:
            yield module.weight, module.num_experts
            yield module.bias, module.num_experts


def uncoupled_layers(model: RoutedNetwork) -> list[int]:
    """MoE layers whose experts share filters: windows with N * r > 1, or made to overlap by the rounding of r * C."""
    layouts = enumerate(model.expert_layouts)
    return [layer for layer, layout in layouts if layout.num_experts > 1 and not layout.disjoint]


@torch.no_grad()
def start_equal(model: nn.Module) -> None:
    """Give all experts of a layer the filters of its first one."""
    for weight, num_experts in expert_banks(model):
        experts = weight.unflatten(0, (num_experts, -1))
        experts[1:] = experts[0]


@torch.no_grad()
def couple_gradients(model: nn.Module, specialisation: float) -> None:
    """Replace the experts' gradients by the coupled ones, in place; banks without a gradient are left alone."""
    for weight, num_experts in expert_banks(model):
        if weight.grad is not None:
            gradient = weight.grad.unflatten(0, (num_experts, -1))
            gradient.copy_(coupled(gradient, specialisation))


def coupled(gradient: Tensor, specialisation: float) -> Tensor:
    """The formula above for gradients [N, ...]."""
    total = gradient.sum(dim=0)
    return total + specialisation * (gradient - total / len(gradient))
