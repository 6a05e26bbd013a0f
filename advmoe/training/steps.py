"""One training step of each method, to be read beside the paper's Algorithm 1."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from advmoe.attacks.pgd import evaluating, kl_objective, pgd, starting_point
from advmoe.config import TrainConfig
from advmoe.data.loader import Batch
from advmoe.errors import TrainingError
from advmoe.models.network import RoutedNetwork
from advmoe.models.routing import Routing
from advmoe.training.levels import Level
from advmoe.training.losses import trades


@dataclass(frozen=True)
class StepResult:
    """What one update saw: sums over its batch, on the batch's device."""

    loss: Tensor
    """Mean loss."""
    images: int
    clean_correct: Tensor
    adversarial_correct: Tensor | None
    """None where the method makes no adversarial images."""
    routing: Routing
    adversarial_routing: Routing | None


def training_attack(model: RoutedNetwork, images: Tensor, config: TrainConfig, generator: torch.Generator) -> Tensor:
    """K-step PGD on KL(f(x) || f(x')), against the model as it is now, BatchNorm in eval mode."""
    with evaluating(model):
        with torch.no_grad():
            clean_logits = model(images)
        start = starting_point(images, config.attack, generator)
        return pgd(model, images, kl_objective(clean_logits), config.attack, start=start)


def update(level: Level, loss: Tensor) -> None:
    """One step of the level's optimiser.

    Raises:
        TrainingError: the loss is not finite; nothing has been changed.
    """
    if not loss.isfinite():
        raise TrainingError(
            f"the loss of the {level.name} became {loss.item():g}; training stopped before this update: "
            "lower --lr, or resume from the last checkpoint with another seed"
        )
    level.optimizer.zero_grad(set_to_none=True)
    loss.backward()
    level.optimizer.step()


def trades_update(level: Level, batch: Batch, config: TrainConfig, generator: torch.Generator) -> StepResult:
    """Attack the current model on this batch, then one descent step of the level on the TRADES loss."""
    adversarial = training_attack(level.model, batch.images, config, generator)
    with level.training():
        clean_logits, routing = level.forward(batch.images)
        adversarial_logits, adversarial_routing = level.forward(adversarial)
        loss = trades(clean_logits, adversarial_logits, batch.labels, config.trades_beta)
        update(level, loss)
    return StepResult(
        loss.detach(),
        len(batch.labels),
        (clean_logits.argmax(dim=1) == batch.labels).sum(),
        (adversarial_logits.argmax(dim=1) == batch.labels).sum(),
        routing,
        adversarial_routing,
    )


def standard_update(level: Level, batch: Batch) -> StepResult:
    """One descent step on the cross-entropy of clean images."""
    with level.training():
        logits, routing = level.forward(batch.images)
        loss = F.cross_entropy(logits, batch.labels)
        update(level, loss)
    correct = (logits.argmax(dim=1) == batch.labels).sum()
    return StepResult(loss.detach(), len(batch.labels), correct, None, routing, None)
