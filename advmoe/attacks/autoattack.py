"""AutoAttack (Croce & Hein, 2020), run by the maintained package with its official settings.

Standard version: APGD-CE, targeted APGD-DLR and targeted FAB with 100 steps each on 9 target classes (or all other
classes, if there are fewer), then Square with 5,000 queries. Other libraries give weaker variants the same name.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import ModuleType

import torch
from torch import Tensor

from advmoe.attacks.pgd import Forward, check_images
from advmoe.errors import ConfigError
from advmoe.seeding import seeded

STANDARD = ("apgd-ce", "apgd-t", "fab-t", "square")
"""The attacks of the standard version, in their order: each sees what the ones before it left."""
LOGGER = "auto-attack"
"""The package reports through this logger."""


@dataclass(frozen=True)
class AutoAttackResult:
    """Outcome on one batch."""

    adversarial: Tensor
    """[B, 3, H, W]: the successful ones; clean images where nothing was found."""
    robust_after: dict[str, Tensor]
    """Attack -> [B]: not broken by it or any attack before it."""
    warnings: tuple[str, ...] = field(default=())
    """What the package's own checks found fault with."""


def package() -> ModuleType:
    """The pyautoattack package.

    Raises:
        ConfigError: it is not installed.
    """
    try:
        import pyautoattack
    except ImportError:
        raise ConfigError("AutoAttack needs the package pyautoattack; pip install 'advmoe[autoattack]'") from None
    return pyautoattack  # type: ignore[no-any-return]


def autoattack(
    forward: Forward,
    images: Tensor,
    labels: Tensor,
    *,
    eps: float,
    seed: int,
    attacks: tuple[str, ...] = STANDARD,
    square_queries: int = 5000,
    progress: Callable[[str], None] | None = None,
) -> AutoAttackResult:
    """Run AutoAttack on a batch of correctly classified images.

    Args:
        forward: the model or a view of it, in eval mode with its parameters frozen (`advmoe.attacks.pgd.evaluating`),
            so that FAB does not compute their gradients.
        images: [B, 3, H, W] in [0, 1], not empty.
        labels: [B].
        eps: radius.
        seed: of its random starts; the same for every batch, as in the package.
        attacks: all of the standard version, or some.
        square_queries: queries of Square; 5,000 in the standard version.
        progress: called with the name of each attack as it begins.

    Raises:
        ConfigError: the package is missing, there are too few classes for the targeted losses (at least 3 others), or
            images outside [0, 1].
    """
    check_images(images)
    adversarial = images.clone()
    robust = torch.ones(len(images), dtype=torch.bool, device=images.device)
    robust_after: dict[str, Tensor] = {}
    with torch.no_grad():
        num_classes = forward(images[:1]).shape[1]
    if num_classes < 4 and {"apgd-t", "fab-t"} & set(attacks):
        raise ConfigError(
            f"AutoAttack's targeted losses need at least 4 classes, got {num_classes}; use PGD and the route attack"
        )
    images = images.contiguous()

    def contiguous(x: Tensor) -> Tensor:
        """The package needs contiguous gradients, which not every model gives; this reshape makes them so."""
        return forward(x.flatten(1).unflatten(1, x.shape[1:]))

    runner = package().AutoAttack(contiguous, norm="Linf", eps=eps, seed=seed, version="standard", device=images.device)
    runner.apgd_targeted.n_target_classes = runner.fab.n_target_classes = min(9, num_classes - 1)
    runner.square.n_queries = square_queries
    with seeded(seed), _collected_warnings() as warnings:
        for attack in attacks:
            rows = robust.nonzero().squeeze(1)
            if len(rows):
                if progress is not None:
                    progress(attack)
                runner.attacks_to_run = [attack]
                found, _ = runner.run_standard_evaluation(images[rows], labels[rows], batch_size=len(rows))
                with torch.no_grad():
                    broken = forward(found).argmax(dim=1) != labels[rows]
                adversarial[rows[broken]] = found[broken]
                robust[rows[broken]] = False
            robust_after[attack] = robust.clone()
    return AutoAttackResult(adversarial, robust_after, tuple(dict.fromkeys(warnings)))


@contextmanager
def _collected_warnings() -> Iterator[list[str]]:
    """The package's warnings as a list instead of on the screen."""
    collected: list[str] = []

    class Collect(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            collected.append(record.getMessage())

    logger, handler = logging.getLogger(LOGGER), Collect(logging.WARNING)
    propagated = logger.propagate
    logger.propagate = False
    logger.addHandler(handler)
    try:
        yield collected
    finally:
        logger.removeHandler(handler)
        logger.propagate = propagated
