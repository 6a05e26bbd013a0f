"""Context managers that change a network's mode and restore it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from torch import nn


@contextmanager
def batch_statistics(model: nn.Module) -> Iterator[None]:
    """BatchNorm in eval mode normalizes by the present batch. Its stored statistics do not change."""
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d) and not module.training]
    for norm in norms:
        norm.training, norm.track_running_stats = True, False
    try:
        yield
    finally:
        for norm in norms:
            norm.training, norm.track_running_stats = False, True


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Set every submodule to eval mode and exclude its parameters from autograd; restore both at the end."""
    modules = submodules(model)
    training = [module for module in modules if module.training]
    trainable = [parameter for parameter in own_parameters(modules) if parameter.requires_grad]
    set_training(training, False)
    for parameter in trainable:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        set_training(training, True)
        for parameter in trainable:
            parameter.requires_grad_(True)


def submodules(model: nn.Module) -> list[nn.Module]:
    """All modules of a network, each once. `model.modules()` also makes their names, which takes most of its time."""
    found: dict[int, nn.Module] = {}
    waiting = [model]
    while waiting:
        module = waiting.pop()
        if id(module) not in found:
            found[id(module)] = module
            waiting.extend(child for child in reversed(module._modules.values()) if child is not None)
    return list(found.values())


def own_parameters(modules: Iterable[nn.Module]) -> Iterator[nn.Parameter]:
    """The parameters of some modules, without those of their submodules."""
    for module in modules:
        for parameter in module._parameters.values():
            if parameter is not None:
                yield parameter


def set_training(modules: Iterable[nn.Module], mode: bool) -> None:
    """Like `module.train(mode)`, for modules that are already listed."""
    for module in modules:
        if module.training != mode:
            module.training = mode
