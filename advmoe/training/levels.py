"""The parts of a network that a training step may change: the routers (phi), the experts (psi), or both."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from advmoe.config import TrainConfig
from advmoe.models.network import RoutedNetwork
from advmoe.models.routing import Routing
from advmoe.training.coupling import couple_gradients

LevelName = Literal["routers", "experts", "all"]


@dataclass(frozen=True)
class Level:
    """One level of the bi-level problem: what it may change, and the optimiser that does it.

    `forward` gives logits and routing; a distributed run puts a gradient-synchronising wrapper here.
    """

    name: LevelName
    model: RoutedNetwork
    forward: Callable[[Tensor], tuple[Tensor, Routing]]
    optimizer: torch.optim.Optimizer

    @property
    def parameters(self) -> list[nn.Parameter]:
        """What this level may change."""
        return [parameter for group in self.optimizer.param_groups for parameter in group["params"]]

    @contextmanager
    def training(self) -> Iterator[None]:
        """Put this level into training mode and hold the other one fixed: no gradients, no change of its statistics.

        The fixed level runs as it does at inference, its BatchNorm on stored statistics. So the experts learn on the
        pathways that the attack saw and that the finished model will take, not on those of a batch-dependent router.
        """
        fixed = list(self._fixed_parameters())
        for parameter in fixed:
            parameter.requires_grad_(False)
        self.model.train(self.name != "routers")
        self.model.routers.train(self.name != "experts")
        try:
            yield
        finally:
            self.model.train()
            for parameter in fixed:
                parameter.requires_grad_(True)

    def _fixed_parameters(self) -> Iterator[nn.Parameter]:
        if self.name == "routers":
            yield from self.model.expert_parameters()
        elif self.name == "experts":
            yield from self.model.router_parameters()


def make_level(name: LevelName, model: RoutedNetwork, config: TrainConfig) -> Level:
    """A level with SGD on its parameters; the experts' gradients are coupled unless the config says otherwise."""
    parameters = {
        "routers": model.router_parameters,
        "experts": model.expert_parameters,
        "all": model.parameters,
    }[name]
    optimizer = torch.optim.SGD(parameters(), lr=config.lr, momentum=config.momentum, weight_decay=config.weight_decay)
    specialisation = config.specialisation
    if name != "routers" and specialisation is not None:
        optimizer.register_step_pre_hook(lambda *_: couple_gradients(model, specialisation))
    return Level(name, model, model.forward_with_routing, optimizer)
