"""AutoAttack (Croce & Hein, 2020), run by the maintained package with its official settings.

The standard version runs APGD-CE, targeted APGD-DLR and targeted FAB with 100 steps each on 9
target classes (or all other classes, if there are fewer), then Square with 5,000 queries. Other
libraries give weaker variants the same name.

The attacks are the package's own. Its checks are not run; `advmoe.evaluation.diagnostics` has them.
Only the random numbers come from this module. They are a function of the image, so an image's
result depends neither on its neighbors in the batch nor on their number, except for the rounding of
convolutions.
"""

from __future__ import annotations

import hashlib
import importlib.util
import itertools
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from advmoe.attacks.pgd import check_images
from advmoe.attacks.victims import Victims
from advmoe.config import check
from advmoe.errors import ConfigError
from advmoe.seeding import generator_for, seeded

STANDARD = ("apgd-ce", "apgd-t", "fab-t", "square")
"""The attacks of the standard version in their order. Each sees the images that the earlier ones did not break."""
SQUARE_QUERIES = 5000
"""Queries of Square in the standard version."""
CLASSES = 4
"""The fewest classes for which the targeted losses are defined."""
LOGGER = "auto-attack"
"""The package reports through this logger."""


@dataclass(frozen=True)
class AutoAttackResult:
    """Outcome on one batch."""

    adversarial: Tensor
    """[B, 3, H, W]: the successful adversarial images, and clean images where no attack succeeded."""
    robust_after: dict[str, Tensor]
    """Attack -> [B]: whether the image withstands this attack and all attacks before it."""


def installed() -> bool:
    """Whether the pyautoattack package, which is optional, is there."""
    return importlib.util.find_spec("pyautoattack") is not None


def package() -> ModuleType:
    """The pyautoattack package.

    Raises:
        ConfigError: The package is missing.
    """
    try:
        import pyautoattack
    except ImportError:
        raise ConfigError("AutoAttack needs the package pyautoattack; pip install 'advmoe[autoattack]'") from None
    return pyautoattack  # type: ignore[no-any-return]


def check_classes(num_classes: int) -> None:
    """Refuse a model with too few classes for the targeted losses of the standard version.

    Raises:
        ConfigError: There are fewer than `CLASSES` classes.
    """
    check(
        num_classes >= CLASSES,
        f"AutoAttack's targeted losses need at least {CLASSES} classes, got {num_classes}; "
        "use PGD and the route attack",
    )


def autoattack(
    victims: Victims,
    *,
    attacks: tuple[str, ...] = STANDARD,
    square_queries: int = SQUARE_QUERIES,
    progress: Callable[[str], None] | None = None,
) -> AutoAttackResult:
    """Run AutoAttack on a batch of correctly classified images.

    Args:
        victims: The images, at least one. Of their attack only the radius counts. The model's
            parameters must be frozen (`advmoe.models.modes.evaluating`), so that FAB does not
            compute their gradients.
        attacks: All of the standard version, or some.
        square_queries: Queries of Square.
        progress: Called with the name of each attack as it begins.

    Raises:
        ConfigError: The package is missing, there are too few classes for the targeted losses (at
            least 3 others), or images outside [0, 1].
    """
    images, labels, model, seed = victims.images, victims.labels, victims.model, victims.seed
    check_images(images)
    adversarial = images.clone()
    robust = torch.ones(len(images), dtype=torch.bool, device=images.device)
    robust_after: dict[str, Tensor] = {}
    with torch.no_grad():
        num_classes = model(images[:1]).shape[1]
    if {"apgd-t", "fab-t"} & set(attacks):
        check_classes(num_classes)
    images = images.contiguous()

    def contiguous(x: Tensor) -> Tensor:
        """The package needs contiguous gradients, which not every model gives; this reshape makes them so."""
        logits: Tensor = model(x.flatten(1).unflatten(1, x.shape[1:]))
        return logits

    eps, device = victims.attack.eps, images.device
    runner = package().AutoAttack(contiguous, norm="Linf", eps=eps, seed=seed, version="standard", device=device)
    runner.apgd_targeted.n_target_classes = runner.fab.n_target_classes = min(9, num_classes - 1)
    runner.square.n_queries = square_queries
    runner.apgd.loss, runner.fab.targeted = "ce", True
    _start_each_image_by_itself(runner.apgd, seed)
    _start_each_image_by_itself(runner.apgd_targeted, seed)
    _stripe_each_image_by_itself(runner.square, seed)
    perturb = {
        "apgd-ce": runner.apgd.perturb,
        "apgd-t": runner.apgd_targeted.perturb,
        "fab-t": runner.fab.perturb,  # draws no random number: its only restart begins at the image
        "square": runner.square.perturb,
    }
    with seeded(seed), _silenced():
        for attack in attacks:
            rows = robust.nonzero().squeeze(1)
            if len(rows):
                if progress is not None:
                    progress(attack)
                with torch.no_grad():
                    found = perturb[attack](images[rows], labels[rows])
                    broken = model(found).argmax(dim=1) != labels[rows]
                adversarial[rows[broken]] = found[broken]
                robust[rows[broken]] = False
            robust_after[attack] = robust.clone()
    return AutoAttackResult(adversarial, robust_after)


def _uniform(images: Tensor, shape: tuple[int, ...], seed: int, number: int) -> Tensor:
    """Numbers uniform in [-1, 1] for each image, [B, *shape], as a function of the image, seed and number alone."""
    drawn = []
    for image in images.cpu():
        key = hashlib.blake2b(image.numpy().tobytes(), digest_size=8).digest()
        generator = generator_for(seed, number, int.from_bytes(key, "little"))
        drawn.append(torch.rand(shape, generator=generator))
    return 2.0 * torch.stack(drawn).to(images.device) - 1.0


def _start_each_image_by_itself(apgd: Any, seed: int) -> None:
    """Give APGD its usual starts, a random direction scaled to the ball's surface, but from random
    numbers of each image.
    """
    run, numbers = apgd.attack_single_run, itertools.count()

    def attack_single_run(x: Tensor, y: Tensor) -> Any:
        start = x + apgd.eps * apgd.normalize(_uniform(x, tuple(x.shape[1:]), seed, next(numbers)))
        return run(x, y, x_init=start)

    apgd.attack_single_run = attack_single_run


def _stripe_each_image_by_itself(square: Any, seed: int) -> None:
    """Give each image its own stripes as start of Square. The squares that follow are the same for
    all images, as in the package.
    """
    run, choose = square.attack_single_run, square.random_choice

    def attack_single_run(x: Tensor, y: Tensor) -> Any:
        def random_choice(shape: list[int]) -> Tensor:
            if len(shape) < x.ndim:
                return choose(shape)  # type: ignore[no-any-return]
            torch.manual_seed(seed)  # the squares must not depend on the number of images
            return _uniform(x, tuple(shape[1:]), seed, 0).sign()

        square.random_choice = random_choice
        return run(x, y)

    square.attack_single_run = attack_single_run


@contextmanager
def _silenced() -> Iterator[None]:
    """Suppress the package's warnings, because the diagnostics check the same things."""
    logger = logging.getLogger(LOGGER)
    disabled, logger.disabled = logger.disabled, True
    try:
        yield
    finally:
        logger.disabled = disabled
