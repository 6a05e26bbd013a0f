"""Projected gradient descent (Madry et al., 2018): the project's only loop that climbs a loss over images.

Training and evaluation, every model kind and every routing variant go through `pgd`; they differ in the objective, the
start and the forward function only. No parameter gradient is ever computed here, and BatchNorm runs on its stored
statistics.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from advmoe.config import AttackConfig
from advmoe.errors import AdvMoEError

Forward = Callable[[Tensor], Tensor]
"""Images [B, 3, H, W] in [0, 1] -> logits [B, classes]."""
Objective = Callable[[Tensor, Tensor], Tensor]
"""(logits [b, classes], positions of these images in the batch [b]) -> loss [b] that the attack increases."""


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put every submodule into eval mode; afterwards each is back in the mode it was in."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


def cross_entropy_objective(labels_B: Tensor) -> Objective:
    """CE(f(x'), y), the untargeted attack of the evaluation (RA)."""
    return lambda logits, rows: F.cross_entropy(logits, labels_B[rows], reduction="none")


def kl_objective(clean_logits_BK: Tensor) -> Objective:
    """KL(f(x) || f(x')), the inner maximisation of TRADES; the clean prediction is a constant."""
    clean_log_p_BK = clean_logits_BK.detach().log_softmax(dim=1)
    return lambda logits, rows: F.kl_div(
        logits.log_softmax(dim=1), clean_log_p_BK[rows], reduction="none", log_target=True
    ).sum(dim=1)


def starting_point(images: Tensor, config: AttackConfig, generator: torch.Generator | None) -> Tensor:
    """First adversarial candidates, inside the ball and inside [0, 1]."""
    if config.start == "clean" or config.eps == 0:
        return images.clone()
    noise = torch.empty_like(images)
    if config.start == "uniform":
        noise.uniform_(-config.eps, config.eps, generator=generator)
    else:
        noise.normal_(0.0, 0.001, generator=generator).clamp_(-config.eps, config.eps)
    return (images + noise).clamp_(0.0, 1.0)


def project(candidate: Tensor, images: Tensor, eps: float) -> Tensor:
    """The point of the l-infinity ball around `images`, intersected with [0, 1], that is nearest to `candidate`."""
    return torch.minimum(torch.maximum(candidate, images - eps), images + eps).clamp_(0.0, 1.0)


def pgd(
    forward: Forward,
    images: Tensor,
    objective: Objective,
    config: AttackConfig,
    *,
    start: Tensor,
    labels_B: Tensor | None = None,
) -> Tensor:
    """Adversarial images within eps of `images` and within [0, 1].

    Args:
        forward: the model under attack, in eval mode (see `evaluating`).
        images: [B, 3, H, W] in [0, 1].
        objective: what to increase.
        config: radius, steps and step size. Restarts are the caller's business.
        start: first candidates, [B, 3, H, W] (see `starting_point`).
        labels_B: if given, an image whose prediction differs from its label at any iterate is done: that iterate is
            returned for it and no further work is spent on it. An adversary may stop whenever it has won.

    Raises:
        AdvMoEError: a logit or a gradient is not finite. sign(NaN) would leave the image where it is, and the argmax of
            NaNs is class 0: either would pass for robustness.
    """
    adversarial = start.detach().clone()
    rows = torch.arange(len(images), device=images.device)
    finite = torch.ones((), dtype=torch.bool, device=images.device)
    for _ in range(config.steps):
        candidate = adversarial[rows].requires_grad_()
        with torch.enable_grad():
            logits = forward(candidate)
            finite &= logits.isfinite().all()
            if labels_B is not None:
                alive = logits.argmax(dim=1) == labels_B[rows]
                logits, rows = logits[alive], rows[alive]
                if len(rows) == 0:
                    break
            (gradient,) = torch.autograd.grad(objective(logits, rows).sum(), candidate)
        if labels_B is not None:
            gradient, candidate = gradient[alive], candidate[alive]
        finite &= gradient.isfinite().all()
        stepped = candidate.detach() + config.step_size * gradient.sign()
        adversarial[rows] = project(stepped, images[rows], config.eps)
    if not finite:
        raise AdvMoEError(
            "the attack met logits or gradients that are not finite, so its result would flatter the model; "
            "expected finite logits: check the checkpoint (diverged training?) and the input images"
        )
    return adversarial.detach()
