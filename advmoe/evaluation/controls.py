"""Controls: an MoE-CNN whose routing or experts are replaced by something that learned nothing.

If a control is as good as the model, the replaced part does not cause the model's robustness.

Other routing gives the layers other features, and the stored statistics of BatchNorm do not fit
them. A control would be worse for this reason alone. Each control therefore gets statistics of its
own, and is compared with `unchanged`, which differs from the model in nothing but new statistics.

Shape suffixes: N experts, S slots of an expert.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from advmoe.attacks.pgd import cross_entropy_objective, pgd, plain
from advmoe.attacks.relaxations import is_routed
from advmoe.attacks.victims import Victims
from advmoe.config import AttackConfig, check
from advmoe.data.loader import BatchLoader
from advmoe.data.sets import ImageSet
from advmoe.distributed import alone
from advmoe.evaluation.precision import full_precision
from advmoe.models.modes import evaluating
from advmoe.models.moe_conv import MoEConv2d
from advmoe.models.moe_linear import MoELinear
from advmoe.models.network import RoutedNetwork
from advmoe.models.router import Centering
from advmoe.seeding import seeded

Control = Literal["unchanged", "random", "averaged", "inverted"]
CONTROLS: tuple[Control, ...] = get_args(Control)
CALIBRATION_IMAGES = 1024
"""Number of training images from which a control's statistics are computed."""
_PASSES = 2
"""In the first pass, routers decide by statistics of the model's own features; in the second, by their own."""


def calibration_batches(
    model: nn.Module, images: ImageSet, attack: AttackConfig, *, seed: int, batch_size: int = 128
) -> list[Tensor]:
    """Batches from which statistics are computed, in fp32: training images, each batch clean and then attacked.

    Args:
        model: The model that PGD attacks.
        images: Training images.
        attack: Settings of PGD.
        seed: Seed of the random starts.
        batch_size: Images of a batch.
    """
    batches = []
    with evaluating(model), full_precision(model):
        for batch in BatchLoader(images, batch_size=batch_size).epoch(0):
            victims = Victims.of(model, batch, attack, seed=seed)
            objective = cross_entropy_objective(victims.labels)
            attacked = pgd(plain(model), victims.images, objective, attack, start=victims.starts())
            batches += [victims.images, attacked]
    return batches


def controlled(model: nn.Module, control: Control, seed: int, *, calibration: Sequence[Tensor]) -> RoutedNetwork:
    """A copy of the model under a control.

    Args:
        model: An MoE-CNN with a choice of experts.
        control: `unchanged` changes nothing but the statistics; `random` draws new weights for each
            router, also for the convolutions of a router that decides for the whole network;
            `averaged` gives every output channel of an expert the mean filter of all experts there
            and sends every image to that expert; `inverted` negates the routers' logits.
        seed: Seed of the random routers.
        calibration: Images [B, 3, H, W] from which the statistics are computed, in batches
            (`calibration_batches`). Without any, the statistics stay as they are.

    Raises:
        ConfigError: As in `check_control`.
    """
    check_control(model, control)
    assert isinstance(model, RoutedNetwork)
    changed = copy.deepcopy(model)
    with torch.no_grad(), full_precision(changed), seeded(seed):
        _CHANGES[control](changed)
        if calibration:
            _calibrate(changed, calibration)
    return changed


def check_control(model: nn.Module, control: Control) -> None:
    """Check that a control can be applied.

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


def _calibrate(model: RoutedNetwork, batches: Sequence[Tensor]) -> None:
    """Replace all running statistics by those of these batches. BatchNorm gives each batch an equal weight.

    torch's `update_bn` would also reset the routers' centering, and send the first batch to one expert.
    """
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d)]
    in_training, momenta = model.training, [norm.momentum for norm in norms]
    model.train()
    with alone():  # all ranks have these batches, so their union would count each image several times
        for number in range(_PASSES):
            for norm in norms:
                if not isinstance(norm, Centering):
                    norm.reset_running_stats()
                    norm.momentum = None
                elif number == 0 and norm.num_batches_tracked is not None:
                    norm.num_batches_tracked.zero_()  # the first batch replaces the old statistics
            for images in batches:
                model(images)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
    model.train(in_training)


def _unchanged(model: RoutedNetwork) -> None:
    pass


def _routers(model: RoutedNetwork) -> list[nn.Linear]:
    return [router.linear for router in model.routers if isinstance(router.linear, nn.Linear)]


def _random(model: RoutedNetwork) -> None:
    for router in model.routers:
        for module in router.modules():
            if isinstance(module, nn.Linear | nn.Conv2d | nn.BatchNorm2d):
                module.reset_parameters()


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
    "unchanged": _unchanged,
    "random": _random,
    "averaged": _averaged,
    "inverted": _inverted,
}
