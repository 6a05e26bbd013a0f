"""The parts of a network that a training step may change: routers (phi), experts (psi), Sparse-CNN's masks, or all."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Literal

import torch
from torch import Tensor, nn

from advmoe.config import TrainConfig, check_together
from advmoe.models.modes import batch_statistics, set_training, submodules
from advmoe.models.network import RoutedNetwork
from advmoe.training.coupling import couple_gradients, expert_banks, start_equal

LevelName = Literal["routers", "experts", "masks", "all"]
IN_WORDS: dict[str, str] = {"routers": "routers", "experts": "experts", "masks": "masks", "all": "network"}
"""What a level updates, in messages."""


@dataclass(frozen=True)
class Level:
    """One level of the bi-level problem: the parameters that it may change, and their optimizer.

    The optimizer may hold more parameters than the level may change. The others are not updated.
    """

    name: LevelName
    model: RoutedNetwork
    optimizer: torch.optim.Optimizer
    by_the_batch: bool = False
    """Whether fixed experts normalize by the batch, because their stored statistics lag behind their weights."""

    @cached_property
    def parameters(self) -> list[nn.Parameter]:
        """Parameters that this level may change. The list is made once, because a network keeps its
        parameter objects.
        """
        fixed = {id(parameter) for parameter in self._fixed}
        known = (parameter for group in self.optimizer.param_groups for parameter in group["params"])
        return [parameter for parameter in known if id(parameter) not in fixed]

    def restricted(self, name: LevelName) -> Level:
        """This level, changing one part only, with the same optimizer."""
        return replace(self, name=name)

    @contextmanager
    def training(self) -> Iterator[None]:
        """Set this level to training mode and fix the others: they get no gradients and keep their statistics.

        Fixed experts use stored BatchNorm statistics, as at inference, unless `router_statistics`
        is `batch`. In a run's first steps the stored statistics lag behind the weights and the
        routers move far from their start; the experts' loss was lower even so (docs/log.md).
        Experts in training normalize by the batch. Fixed routers decide on such features, so their
        decisions may differ from those at inference. Using the decisions of inference instead made
        the experts learn worse (docs/log.md).
        """
        routers, others = self._modules
        for parameter in self._fixed:
            parameter.requires_grad_(False)
        set_training(others, self.name != "routers")
        set_training(routers, self.name != "experts")
        try:
            with batch_statistics(self.model) if self.by_the_batch else nullcontext():
                yield
        finally:
            set_training(others, True)
            set_training(routers, True)
            for parameter in self._fixed:
                parameter.requires_grad_(True)

    @cached_property
    def _fixed(self) -> list[nn.Parameter]:
        """Parameters that this level may not change, listed once: a network keeps its parameter objects."""
        return [
            parameter
            for name, parameters in parts(self.model).items()
            if self.name not in {name, "all"}
            for parameter in parameters
        ]

    @cached_property
    def _modules(self) -> tuple[list[nn.Module], list[nn.Module]]:
        """The modules of the routers, and all others."""
        routers = submodules(self.model.routers)
        known = set(map(id, routers))
        return routers, [module for module in submodules(self.model) if id(module) not in known]


def parts(model: RoutedNetwork) -> dict[LevelName, list[nn.Parameter]]:
    """The parameters of a network, by the level that may change them."""
    return {
        "routers": list(model.router_parameters()),
        "experts": list(model.expert_parameters()),
        "masks": list(model.mask_parameters()),
    }


def _sgd(groups: list[dict[str, Any]], config: TrainConfig, device: torch.device) -> torch.optim.Optimizer:
    """SGD with few passes over memory. On a CPU it equals torch's plain form bit for bit, in half the time.

    On a GPU the rate is a tensor, so that a new rate needs no new compilation.
    """
    optimizer = torch.optim.SGD(
        groups, lr=config.lr, momentum=config.momentum, weight_decay=config.weight_decay, fused=True
    )
    if device.type == "cuda":
        for group in optimizer.param_groups:
            group["lr"] = torch.tensor(group["lr"], device=device)
    return optimizer


def set_rates(optimizer: torch.optim.Optimizer, rate: Callable[[float | None], float]) -> None:
    """Set the learning rate of each group of parameters. A group with its own peak follows that peak."""
    for group in optimizer.param_groups:
        value = rate(group.get("peak"))
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(value)
        else:
            group["lr"] = value


def make_levels(
    names: Sequence[LevelName], model: RoutedNetwork, config: TrainConfig, *, fresh: bool = True
) -> list[Level]:
    """The levels of one training, each with its own SGD on its parameters.

    Experts are coupled unless the config says otherwise (`advmoe.training.coupling`). The experts
    of a `fresh` model then start equal, and every optimizer that moves experts couples them.

    Raises:
        ConfigError: The config has a setting for a part that the model lacks.
    """
    check_together(model.config, config)
    specialization = config.specialization
    if fresh and specialization is not None:
        start_equal(model)
    banks = list(expert_banks(model)) if specialization is not None else []
    batch = config.router_statistics == "batch"
    levels = []
    for name in names:
        parameters = list(model.parameters()) if name == "all" else parts(model)[name]
        groups: list[dict[str, Any]] = [{"params": parameters}]
        if config.router_lr is not None and name in {"routers", "all"}:
            of_routers = set(map(id, model.router_parameters()))
            others = [parameter for parameter in parameters if id(parameter) not in of_routers]
            groups = [{"params": others}] if others else []
            groups.append({"params": list(model.router_parameters()), "peak": config.router_lr})
        optimizer = _sgd(groups, config, model.mean.device)
        if name in {"experts", "all"} and specialization is not None:
            optimizer.register_step_pre_hook(lambda *_: couple_gradients(banks, specialization))
        levels.append(Level(name, model, optimizer, by_the_batch=batch and name == "routers"))
    return levels
