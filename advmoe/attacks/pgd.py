"""Projected gradient descent (Madry et al., 2018): the project's only loop that climbs a loss over images.

Training and evaluation use `pgd` for every kind of model and every treatment of the routing. They
differ in objective, start and forward function only. No gradient of a parameter is computed, and
BatchNorm uses its stored statistics.

Shape suffixes: B batch, H height, K classes, L MoE layers, W width.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from advmoe.config import AttackConfig
from advmoe.distributed import Place
from advmoe.errors import ConfigError, NotFiniteError

Forward = Callable[[Tensor, Tensor], Tensor]
"""(images [b, 3, H, W] in [0, 1], their positions in the batch [b]) -> outputs [b, K]; see `plain` and `forced`."""
Objective = Callable[[Tensor, Tensor], Tensor]
"""(outputs [b, K], positions of these images in the batch [b]) -> loss [b] that the attack increases."""
Won = Callable[[Tensor, Tensor], Tensor]
"""(outputs [b, K], positions [b]) -> bool [b]: the attack on these images may end."""
Watch = Callable[[Tensor], None]
"""Called with the outputs [B, K] of every iterate."""


@dataclass
class GradientCount:
    """Number of gradients of an attack, and of gradients that were zero everywhere. An image with
    such a gradient does not move.
    """

    taken: int = 0
    zero: int = 0

    @property
    def zero_share(self) -> float:
        """Share of gradients that were zero."""
        return self.zero / max(self.taken, 1)


def plain(model: Callable[[Tensor], Tensor]) -> Forward:
    """The model's own logits; the position of an image does not matter."""
    return lambda images, _: model(images)


def forced(model: Callable[[Tensor, Tensor], Tensor], pathways_BL: Tensor) -> Forward:
    """The model's logits with the routing frozen: each image takes its row of `pathways_BL`."""
    return lambda images, rows: model(images, pathways_BL[rows])


def check_images(images: Tensor) -> None:
    """Refuse images outside [0, 1], the range in which the attack's radius is given and to which it clamps.

    Raises:
        ConfigError: A pixel is outside [0, 1].
    """
    if images.numel() and not (images.min() >= 0 and images.max() <= 1):
        raise ConfigError(
            f"attacks need images in [0, 1], got values from {images.min().item():.3g} to {images.max().item():.3g}; "
            "give them as they are and let the model normalize them"
        )


def cross_entropy_objective(labels_B: Tensor) -> Objective:
    """CE(f(x'), y), the untargeted attack of the evaluation (RA)."""
    return lambda logits, rows: F.cross_entropy(logits, labels_B[rows], reduction="none")


def misclassified(labels_B: Tensor) -> Won:
    """Predictions other than the label."""
    return lambda logits, rows: logits.argmax(dim=1) != labels_B[rows]


def kl_objective(clean_logits_BK: Tensor) -> Objective:
    """KL(f(x) || f(x')), the inner maximization of TRADES. The clean prediction is a constant."""
    clean_log_p_BK = clean_logits_BK.detach().log_softmax(dim=1)
    return lambda logits, rows: F.kl_div(
        logits.log_softmax(dim=1), clean_log_p_BK[rows], reduction="none", log_target=True
    ).sum(dim=1)


def starting_point(
    images: Tensor, config: AttackConfig, generator: torch.Generator | None, place: Place | None = None
) -> Tensor:
    """First adversarial candidates, inside the ball and inside [0, 1].

    Args:
        images: [B, 3, H, W].
        config: Kind of start and radius.
        generator: Generator of the noise.
        place: Place of the images in a union of batches. The noise of the whole union is drawn, and
            each image gets its part.
    """
    if config.start == "clean" or config.eps == 0:
        return images.clone()
    noise = torch.empty_like(images) if place is None else _empty_union(images, place)
    if config.start == "uniform":
        noise.uniform_(-config.eps, config.eps, generator=generator)
    else:
        noise.normal_(0.0, 0.001, generator=generator).clamp_(-config.eps, config.eps)
    if place is not None:
        noise = noise[place.first : place.first + len(images)]
    return (images + noise).clamp_(0.0, 1.0)


def _empty_union(images: Tensor, place: Place) -> Tensor:
    """Memory for the whole union in the memory format of the images, because random numbers are
    drawn in memory order.
    """
    last = images.is_contiguous(memory_format=torch.channels_last) and not images.is_contiguous()
    return torch.empty(
        (place.total, *images.shape[1:]),
        dtype=images.dtype,
        device=images.device,
        memory_format=torch.channels_last if last else torch.contiguous_format,
    )


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
    won: Won | None = None,
    watch: Watch | None = None,
    count: GradientCount | None = None,
    sound: Tensor | None = None,
) -> Tensor:
    """Adversarial images within eps of `images` and within [0, 1].

    Args:
        forward: The model under attack, or a view of it, in eval mode (see `evaluating`).
        images: [B, 3, H, W] in [0, 1].
        objective: The loss that the attack increases.
        config: Radius, steps and step size. Restarts are the caller's business.
        start: First candidates, [B, 3, H, W] (see `starting_point`).
        won: If given (for example `misclassified`), an image that has won at any iterate is done:
            the attack returns that iterate and spends no further work on it. An adversary may stop
            whenever it has won.
        watch: If given, sees the outputs of all images at every iterate; not together with `won`.
        count: If given, counts the gradients.
        sound: If given, bool [], it becomes false where an output or a gradient is not finite,
            instead of an error that the host would have to wait for.

    Raises:
        NotFiniteError: An output or a gradient is not finite, and there is no `sound`. sign(NaN) would
            leave the image where it is, and argmax of NaNs is class 0: either would pass for
            robustness.
    """
    adversarial = start.detach().clone()
    rows = torch.arange(len(images), device=images.device)
    finite = torch.ones((), dtype=torch.bool, device=images.device) if sound is None else sound
    for _ in range(config.steps):
        candidate = (adversarial if won is None else adversarial[rows]).requires_grad_()
        with torch.enable_grad():
            outputs = forward(candidate, rows)
            finite &= outputs.isfinite().all()
            if watch is not None:
                watch(outputs.detach())
            if won is not None:
                alive = ~won(outputs.detach(), rows)
                outputs, rows = outputs[alive], rows[alive]
                if len(rows) == 0:
                    break
            gradient = gradient_of(objective(outputs, rows).sum(), candidate)
        if won is not None:
            gradient, candidate = gradient[alive], candidate[alive]
        finite &= gradient.isfinite().all()
        if count is not None:
            count.taken += len(rows)
            count.zero += int((gradient.flatten(1) == 0).all(dim=1).sum())
        stepped = candidate.detach() + config.step_size * gradient.sign()
        if won is None:
            adversarial = project(stepped, images, config.eps)
        else:
            adversarial[rows] = project(stepped, images[rows], config.eps)
    if sound is None and not finite:
        raise NotFiniteError(
            "the attack met logits or gradients that are not finite, so its result would flatter the model; "
            "expected finite logits: check the checkpoint (diverged training?) and the input images"
        )
    return adversarial.detach()


def gradient_of(loss: Tensor, images: Tensor) -> Tensor:
    """d loss / d images; zero if the loss does not depend on the images, as for a model that hides its gradient."""
    if not loss.requires_grad:
        return torch.zeros_like(images)
    (gradient,) = torch.autograd.grad(loss, images, allow_unused=True, materialize_grads=True)
    return gradient
