"""The parts of a network that a training step may change: the routers (phi), the experts (psi), or both."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from advmoe.config import TrainConfig
from advmoe.models.network import RoutedNetwork
from advmoe.models.routing import Routing

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

    @contextmanager
    def training(self) -> Iterator[None]:
        """Record gradients of this level's parameters only, and leave the other level's BatchNorm statistics alone.

        The other level still normalises by batch statistics, as in any training step; it just does not remember them.
        """
        frozen = [] if self.name == "all" else list(self._other_parameters())
        routers = set(self.model.routers.modules())
        frozen_norms = [
            module
            for module in self.model.modules()
            if isinstance(module, _BatchNorm)
            and module.track_running_stats
            and (self.name != "all" and (module in routers) != (self.name == "routers"))
        ]
        self.model.train()
        for parameter in frozen:
            parameter.requires_grad_(False)
        for norm in frozen_norms:
            norm.track_running_stats = False
        try:
            yield
        finally:
            for parameter in frozen:
                parameter.requires_grad_(True)
            for norm in frozen_norms:
                norm.track_running_stats = True

    def _other_parameters(self) -> Iterator[nn.Parameter]:
        if self.name == "routers":
            return self.model.expert_parameters()
        return self.model.router_parameters()


def make_level(name: LevelName, model: RoutedNetwork, config: TrainConfig) -> Level:
    """A level with SGD on its parameters."""
    parameters = {
        "routers": model.router_parameters,
        "experts": model.expert_parameters,
        "all": model.parameters,
    }[name]
    optimizer = torch.optim.SGD(parameters(), lr=config.lr, momentum=config.momentum, weight_decay=config.weight_decay)
    return Level(name, model, model.forward_with_routing, optimizer)
