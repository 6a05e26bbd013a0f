"""Helpers that build `Victims` for tests."""

import torch
from torch import Tensor, nn

from advmoe.attacks.victims import Victims
from advmoe.config import AttackConfig


def victims_of(model: nn.Module, images: Tensor, labels: Tensor, attack: AttackConfig, *, seed: int = 0) -> Victims:
    """A batch of images whose numbers are 0, 1, 2 and so on."""
    indices = torch.arange(len(images))
    return Victims(model=model, images=images, labels=labels, indices=indices, attack=attack, seed=seed)
