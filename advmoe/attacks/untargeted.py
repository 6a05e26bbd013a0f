"""The untargeted attack with random restarts, on which every reported robust accuracy (RA) is based.

Shape suffixes: A attempts, B batch.
"""

from __future__ import annotations

import torch
from torch import Tensor

from advmoe.attacks.pgd import Forward, GradientCount, Won, check_images, cross_entropy_objective, pgd, plain
from advmoe.attacks.victims import Victims


def untargeted(
    victims: Victims,
    forward: Forward | None = None,
    *,
    count: GradientCount | None = None,
    first_restart: int = 0,
) -> tuple[Tensor, Tensor]:
    """Attack correctly classified images by cross-entropy, with all restarts of the attack.

    The first restart attacks the whole batch. Later ones attack the remaining images, several
    restarts at a time: as many as fit into a batch of the given size.

    An image that is misclassified at any point is broken. It is not judged again in another batch,
    in which rounding might decide otherwise: the attack has stopped there, with steps left.

    Args:
        victims: The images to attack.
        forward: What the attack follows instead of the model, for example the model on fixed
            pathways (`advmoe.attacks.pgd.forced`). Default: the model itself.
        count: If given, counts the gradients.
        first_restart: Number of the first start to try; the caller has tried those before it.

    Returns:
        Adversarial images (those of the first restart that broke the image, else of the last), and
        a mask [B] of the images that no restart broke, by the outputs of `forward`.

    Raises:
        ConfigError: Images are outside [0, 1].
        AdvMoEError: See `pgd`.
    """
    images, attack = victims.images, victims.attack
    forward = forward or plain(victims.model)
    check_images(images)
    adversarial = images.clone()
    alive = torch.arange(len(images), device=images.device)
    restart = first_restart
    while restart < attack.restarts and len(alive):
        together = 1 if restart == first_restart else min(attack.restarts - restart, max(1, len(images) // len(alive)))
        left = victims.take(alive)
        labels = left.labels.repeat(together)
        seen = _repeated(forward, alive.repeat(together))
        winner = torch.full((len(alive),), together, device=images.device)
        found = pgd(
            seen,
            left.images.repeat(together, 1, 1, 1),
            cross_entropy_objective(labels),
            attack,
            start=left.starts(range(restart, restart + together)),
            won=_first_to_win(labels, winner),
            count=count,
        )
        with torch.no_grad():
            logits = seen(found, torch.arange(len(found), device=images.device))
        attempt_A = torch.arange(together, device=images.device)
        broken_AB = (logits.argmax(dim=1) != labels).view(together, -1) | (attempt_A[:, None] == winner)
        broken = broken_AB.any(dim=0)
        chosen = torch.where(broken, broken_AB.int().argmax(dim=0), together - 1)
        adversarial[alive] = found.view(together, len(alive), *images.shape[1:])[
            chosen, torch.arange(len(alive), device=images.device)
        ]
        alive = alive[~broken]
        restart += together
    robust = torch.zeros(len(images), dtype=torch.bool, device=images.device)
    robust[alive] = True
    return adversarial, robust


def through_view(victims: Victims, view: Forward) -> tuple[Tensor, Tensor]:
    """The attack through a view of the model (`advmoe.attacks.relaxations`), judged by the model itself.

    A view computes the same decisions in another way, so rounding may let it disagree with the
    model. Where the view is wrong and the model is right, the attack goes on. The images that it
    ends with are broken if the model is wrong, whatever the view says.

    Returns:
        As `untargeted`, by the outputs of the model.
    """
    found, robust = untargeted(victims, _confirmed(view, victims))
    return found, robust & victims.right(found)


def _confirmed(view: Forward, victims: Victims) -> Forward:
    """A view with the outputs of the model, but its own gradient, at images that it misclassifies."""

    def outputs(images: Tensor, rows: Tensor) -> Tensor:
        logits = view(images, rows)
        wrong = logits.detach().argmax(dim=1) != victims.labels[rows]
        if not wrong.any():
            return logits
        values = logits.detach().clone()
        with torch.no_grad():
            values[wrong] = victims.model(images[wrong])
        return values + (logits - logits.detach())

    return outputs


def _repeated(forward: Forward, repeats: Tensor) -> Forward:
    """A view in which each image stands as often as `repeats` contains its position."""
    return lambda images, rows: forward(images, repeats[rows])


def _first_to_win(labels: Tensor, winner: Tensor) -> Won:
    """The restarts of an image run side by side. A restart that wins ends the later ones, so the
    outcome equals that of running them one by one.

    Args:
        labels: [A * B], attempt by attempt.
        winner: [B], the number of the first attempt that has won; it is kept up to date.
    """
    image_of = torch.arange(len(labels), device=labels.device) % len(winner)
    restart_of = torch.arange(len(labels), device=labels.device) // len(winner)

    def won(logits: Tensor, rows: Tensor) -> Tensor:
        wrong = rows[logits.argmax(dim=1) != labels[rows]]
        winner.scatter_reduce_(0, image_of[wrong], restart_of[wrong], "amin")
        return restart_of[rows] >= winner[image_of[rows]]

    return won
