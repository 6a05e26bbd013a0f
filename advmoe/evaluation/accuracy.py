"""Standard accuracy (SA) and robust accuracy under PGD (RA), together with what such numbers mean nothing without."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from advmoe.attacks.untargeted import untargeted
from advmoe.config import AttackConfig, to_dict
from advmoe.data.loader import BatchLoader
from advmoe.data.sources import ImageSet
from advmoe.errors import AdvMoEError
from advmoe.models.modes import evaluating
from advmoe.models.network import RoutedNetwork
from advmoe.models.routing import Routing

Progress = Callable[[int, float, float], None]
"""(images done, SA so far, RA so far)."""


@dataclass(frozen=True)
class Evaluation:
    """Outcome on a set of images. Shares are in [0, 1]."""

    images: int
    sa: float
    """Share of clean images classified correctly."""
    ra: float
    """Share classified correctly at every point the attack tried."""
    attack: AttackConfig
    seed: int
    clean_pathways_NL: np.ndarray
    """Expert of each clean image in each MoE layer, int64 [images, L]."""
    adversarial_pathways_NL: np.ndarray
    """The same for the last adversarial version of each image (the clean one where it was wrong already)."""

    @property
    def routers_fooled(self) -> float:
        """Share of images whose pathway the attack changed in at least one layer."""
        return (
            float((self.clean_pathways_NL != self.adversarial_pathways_NL).any(axis=1).mean()) if self.images else 0.0
        )

    def as_dict(self) -> dict[str, Any]:
        """Figures for a JSON file: SA and RA in per cent, the attack that they hold for, and what it did to routers."""
        figures = {
            "images": self.images,
            "sa": round(100 * self.sa, 2),
            f"ra_pgd{self.attack.steps}": round(100 * self.ra, 2),
            "attack": to_dict(self.attack),
            "seed": self.seed,
        }
        routed = self.clean_pathways_NL.shape[1] > 0
        return figures | ({"routers_fooled": round(100 * self.routers_fooled, 2)} if routed else {})


def check_finite(logits: Tensor, routing: Routing) -> None:
    """Refuse a model whose figures would mean nothing.

    The argmax of NaNs is expert 0: with NaN routers the clean predictions look sound, while attacks get no gradient.

    Raises:
        AdvMoEError: a logit of the classifier or of a router is not finite.
    """
    for whose, values in (("the classifier", logits), ("the routers", routing.logits_BRN)):
        if values is not None and not values.isfinite().all():
            raise AdvMoEError(
                f"the logits of {whose} are not finite, so accuracies would mean nothing; expected finite logits: "
                "check the checkpoint (diverged training?) and the input images"
            )


def evaluate(
    model: RoutedNetwork,
    images: ImageSet,
    attack: AttackConfig,
    *,
    batch_size: int = 256,
    seed: int = 0,
    progress: Progress | None = None,
) -> Evaluation:
    """SA and RA of a model on all the images given, in fp32; the model is left in the mode it was in.

    Raises:
        AdvMoEError: logits, or a gradient of the attack, are not finite.
    """
    device = model.mean.device
    loader = BatchLoader(images, batch_size=batch_size)
    done = correct = robust = 0
    clean_pathways: list[Tensor] = []
    adversarial_pathways: list[Tensor] = []
    with evaluating(model):
        for batch in loader.epoch(0):
            x, y = batch.images.to(device), batch.labels.to(device)
            with torch.no_grad():
                logits, routing = model.forward_with_routing(x)
            check_finite(logits, routing)
            right = logits.argmax(dim=1) == y
            adversarial = x.clone()
            adversarial[right], survived = untargeted(
                model, x[right], y[right], batch.indices[right.cpu()], attack, seed
            )
            with torch.no_grad():
                adversarial_routing: Routing = model.forward_with_routing(adversarial)[1]
            done += len(y)
            correct += int(right.sum())
            robust += int(survived.sum())
            clean_pathways.append(routing.expert_index_BL.cpu())
            adversarial_pathways.append(adversarial_routing.expert_index_BL.cpu())
            if progress is not None:
                progress(done, correct / done, robust / done)
    return Evaluation(
        done,
        correct / max(done, 1),
        robust / max(done, 1),
        attack,
        seed,
        torch.cat(clean_pathways).numpy(),
        torch.cat(adversarial_pathways).numpy(),
    )
