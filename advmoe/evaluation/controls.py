"""Controls: an MoE-CNN whose routing or experts are replaced by something that learned nothing.

If a control is as good as the model, the replaced part does not cause the model's robustness.

Shape suffixes: N experts, S slots of an expert.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Literal, get_args

import torch
from torch import nn

from advmoe.attacks.relaxations import is_routed
from advmoe.config import check
from advmoe.models.moe_conv import MoEConv2d
from advmoe.models.moe_linear import MoELinear
from advmoe.models.network import RoutedNetwork
from advmoe.seeding import seeded

Control = Literal["random", "averaged", "inverted"]
CONTROLS: tuple[Control, ...] = get_args(Control)


def controlled(model: nn.Module, control: Control, seed: int) -> RoutedNetwork:
    """A copy of the model under a control.

    Args:
        model: An MoE-CNN with a choice of experts.
        control: `random` draws new weights for each router and keeps the statistics that center its
            features; `averaged` gives every output channel of an expert the mean filter of all
            experts there and sends every image to that expert; `inverted` negates the routers'
            logits.
        seed: Seed of the random routers.

    Raises:
        ConfigError: The model has no choice of experts, or its experts cannot be averaged, because
            the routers scale the outputs.
    """
    check(
        is_routed(model),
        f"the control '{control}' replaces routers or experts, and this model has no choice of experts; leave it out",
        "control",
    )
    assert isinstance(model, RoutedNetwork)
    check(
        control != "averaged" or not any(router.scales for router in model.routers),
        "the control 'averaged' takes the choice from the routers, but with router_gradient 'value' their "
        "probabilities also scale the outputs; take 'random' or 'inverted'",
        "control",
    )
    changed = copy.deepcopy(model)
    with torch.no_grad(), seeded(seed):
        _CHANGES[control](changed)
    return changed


def _routers(model: RoutedNetwork) -> list[nn.Linear]:
    return [router.linear for router in model.routers if isinstance(router.linear, nn.Linear)]


def _random(model: RoutedNetwork) -> None:
    for linear in _routers(model):
        linear.reset_parameters()


def _averaged(model: RoutedNetwork) -> None:
    for module in model.modules():
        if isinstance(module, MoEConv2d):
            module.fold_affine()
        if isinstance(module, MoEConv2d | MoELinear):
            for bank in module.parameters():
                rows_NS = torch.tensor(module.rows, device=bank.device)
                bank[rows_NS[0]] = bank[rows_NS].mean(dim=0)
    for linear in _routers(model):
        linear.weight.zero_()  # equal logits: every image takes expert 0


def _inverted(model: RoutedNetwork) -> None:
    for linear in _routers(model):
        linear.weight.neg_()


_CHANGES: dict[Control, Callable[[RoutedNetwork], None]] = {
    "random": _random,
    "averaged": _averaged,
    "inverted": _inverted,
}
