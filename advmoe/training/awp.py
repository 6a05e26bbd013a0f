"""Adversarial weight perturbation (Wu et al., 2020): descend at the worst nearby weights rather than at the weights."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from advmoe.models.modes import submodules
from advmoe.training.guard import Kept, statistics
from advmoe.training.union import sum_gradients


@contextmanager
def perturbed_weights(
    model: nn.Module, parameters: list[nn.Parameter], loss: Callable[[], Tensor], gamma: float
) -> Iterator[None]:
    """Inside the context, weights with two or more dimensions are moved up the loss by gamma times
    their norm. They are moved back at the end.

    Args:
        model: The network; its buffers (BatchNorm statistics) forget the pass that finds the
            direction.
        parameters: Parameters that may be perturbed.
        loss: Function that computes the loss at the present weights.
        gamma: Relative size of the perturbation.
    """
    weights = [parameter for parameter in parameters if parameter.dim() > 1 and parameter.requires_grad]
    if not weights:  # masks are trained alone
        yield
        return
    unmoved = Kept(statistics(submodules(model)))
    here = loss()
    gradients = torch.autograd.grad(here, weights, allow_unused=True)
    sum_gradients(gradients, here)
    before = [weight.detach().clone() for weight in weights]
    unmoved.restore()
    with torch.no_grad():
        for weight, gradient in zip(weights, gradients, strict=True):
            if gradient is not None:
                weight.add_(gradient * (gamma * weight.norm() / (gradient.norm() + 1e-12)))
    try:
        yield
    finally:
        with torch.no_grad():
            for weight, saved in zip(weights, before, strict=True):
                weight.copy_(saved)
