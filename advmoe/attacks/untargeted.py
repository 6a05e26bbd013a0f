"""The untargeted attack with random restarts: the one behind every robust accuracy (RA) reported.

Starts depend on the image's own index, so neither the batch size nor the order of images changes a result.
"""

from __future__ import annotations

import torch
from torch import Tensor

from advmoe.attacks.pgd import Forward, GradientCount, Won, check_images, cross_entropy_objective, pgd, starting_point
from advmoe.config import AttackConfig
from advmoe.seeding import generator_for


def starts(images: Tensor, indices: Tensor, attack: AttackConfig, seed: int, restarts: list[int]) -> Tensor:
    """First candidates for every restart of every image, [len(restarts) * B, 3, H, W], restart by restart.

    Args:
        images: [B, 3, H, W] in [0, 1].
        indices: [B], the images' own numbers in their data set.
        attack: the kind of start.
        seed: of the evaluation.
        restarts: numbers of the restarts wanted.
    """
    drawn = [
        starting_point(image[None], attack, generator_for(seed, restart, index))
        for restart in restarts
        for image, index in zip(images.cpu(), indices.tolist(), strict=True)
    ]
    return torch.cat(drawn).to(images.device) if drawn else images


def untargeted(
    forward: Forward,
    images: Tensor,
    labels: Tensor,
    indices: Tensor,
    attack: AttackConfig,
    seed: int,
    *,
    pathways_BL: Tensor | None = None,
    count: GradientCount | None = None,
    first_restart: int = 0,
) -> tuple[Tensor, Tensor]:
    """Attack a batch of correctly classified images by cross-entropy, with all restarts of the config.

    The first restart sees the whole batch; the others see what is left of it, several at a time, as many as fit into a
    batch of the size given.

    Args:
        forward: the model, or a view of it (`advmoe.attacks.relaxations`), in eval mode.
        images: [B, 3, H, W] in [0, 1].
        labels: [B].
        indices: [B], the images' own numbers in their data set, the key of their random starts.
        attack: steps, radius, restarts, kind of start.
        seed: of the random starts.
        pathways_BL: if given, `forward` gets them: the experts are attacked with the routing frozen.
        count: if given, counts the gradients.
        first_restart: number of the first start tried; those before it are somebody else's work.

    Returns:
        Adversarial images (those of the first restart that broke the image, else of the last), and a mask [B] of the
        images that no restart broke.

    Raises:
        ConfigError: images outside [0, 1].
        AdvMoEError: see `pgd`.
    """
    check_images(images)
    adversarial = images.clone()
    alive = torch.arange(len(images), device=images.device)
    restart = first_restart
    while restart < attack.restarts and len(alive):
        together = 1 if restart == first_restart else min(attack.restarts - restart, max(1, len(images) // len(alive)))
        victims, truth, own = images[alive], labels[alive], indices[alive.to(indices.device)]
        pathways = None if pathways_BL is None else pathways_BL[alive].repeat(together, 1)
        repeated = truth.repeat(together)
        found = pgd(
            forward,
            victims.repeat(together, 1, 1, 1),
            cross_entropy_objective(repeated),
            attack,
            start=starts(victims, own, attack, seed, list(range(restart, restart + together))),
            won=_first_to_win(repeated, len(alive)),
            pathways_BL=pathways,
            count=count,
        )
        with torch.no_grad():
            logits = forward(found) if pathways is None else forward(found, pathways)
        broken_RB = (logits.argmax(dim=1) != repeated).view(together, -1)
        broken = broken_RB.any(dim=0)
        chosen = torch.where(broken, broken_RB.int().argmax(dim=0), together - 1)
        adversarial[alive] = found.view(together, len(alive), *images.shape[1:])[
            chosen, torch.arange(len(alive), device=images.device)
        ]
        alive = alive[~broken]
        restart += together
    robust = torch.zeros(len(images), dtype=torch.bool, device=images.device)
    robust[alive] = True
    return adversarial, robust


def _first_to_win(labels: Tensor, num_images: int) -> Won:
    """An image's restarts run side by side; one that wins ends those after it, so that the outcome is as one by one."""
    image_of = torch.arange(len(labels), device=labels.device) % num_images
    restart_of = torch.arange(len(labels), device=labels.device) // num_images
    winner = torch.full((num_images,), len(labels), device=labels.device)

    def won(logits: Tensor, rows: Tensor) -> Tensor:
        wrong = rows[logits.argmax(dim=1) != labels[rows]]
        winner.scatter_reduce_(0, image_of[wrong], restart_of[wrong], "amin")
        return restart_of[rows] >= winner[image_of[rows]]

    return won
