"""Standard accuracy (SA), robust accuracy under PGD (RA), and the checks that make these numbers meaningful.

Shape suffixes: B batch, I images of a set, L MoE layers, N experts, R routers.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy as np
import torch
from torch import Tensor

from advmoe.attacks.pgd import cross_entropy_objective, pgd, plain
from advmoe.attacks.untargeted import untargeted
from advmoe.attacks.victims import Victims
from advmoe.config import AttackConfig, to_dict
from advmoe.data.loader import Batch, BatchLoader
from advmoe.data.sources import ImageSet
from advmoe.distributed import gather, own_rows, together
from advmoe.errors import NotFiniteError
from advmoe.evaluation.precision import full_precision
from advmoe.models.modes import evaluating
from advmoe.models.network import RoutedNetwork
from advmoe.models.routing import Routing

Progress = Callable[[int, float, float], None]
"""(images done, SA so far, RA so far)."""


@dataclass(frozen=True)
class Evaluation:
    """Outcome on a set of images. Shares are in [0, 1]."""

    right_I: np.ndarray
    """Whether each clean image is classified correctly, bool [images]."""
    robust_I: np.ndarray
    """Images that are right when clean and at every point that the attack tried, bool [images]."""
    attack: AttackConfig
    seed: int
    clean_pathways_IL: np.ndarray
    """Expert of each clean image in each MoE layer, int64 [images, L]."""
    adversarial_pathways_IL: np.ndarray
    """Likewise after all steps of the attack's first start, for every image, including images that
    were wrong when clean."""

    @property
    def images(self) -> int:
        """Images evaluated."""
        return len(self.right_I)

    @property
    def sa(self) -> float:
        """Share of clean images classified correctly."""
        return float(self.right_I.mean()) if self.images else 0.0

    @property
    def ra(self) -> float:
        """Share classified correctly at every point the attack tried."""
        return float(self.robust_I.mean()) if self.images else 0.0

    @property
    def routers_fooled(self) -> float:
        """Share of all images whose pathway the attack changed in at least one layer."""
        return (
            float((self.clean_pathways_IL != self.adversarial_pathways_IL).any(axis=1).mean()) if self.images else 0.0
        )

    def as_dict(self) -> dict[str, Any]:
        """Figures for a JSON file: SA and RA in per cent, the attack, and its effect on the routers."""
        figures = {
            "images": self.images,
            "sa": round(100 * self.sa, 2),
            f"ra_pgd{self.attack.steps}": round(100 * self.ra, 2),
            "attack": to_dict(self.attack),
            "seed": self.seed,
        }
        routed = self.clean_pathways_IL.shape[1] > 0
        return figures | ({"routers_fooled": round(100 * self.routers_fooled, 2)} if routed else {})


def check_finite(logits: Tensor, routing: Routing) -> None:
    """Refuse a model with logits that are not finite, whose figures would be meaningless.

    The argmax of NaNs is expert 0. With NaN routers, clean predictions look sound while attacks get
    no gradient.

    Raises:
        NotFiniteError: A logit of the classifier or of a router is not finite.
    """
    for whose, values in (("the classifier", logits), ("the routers", routing.logits_BRN)):
        if values is not None and not values.isfinite().all():
            raise NotFiniteError(
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
    one_shape: bool | None = None,
) -> Evaluation:
    """SA and RA of a model on all given images, in fp32. The model keeps its mode.

    Several ranks divide the batches, and each gets the whole result. `progress` counts this rank's
    images only.

    Args:
        model: A model of any kind.
        images: Images to attack.
        attack: The attack of RA.
        batch_size: Images attacked at a time.
        seed: Seed of the attack's starts.
        progress: Called after each batch.
        one_shape: Whether all passes get batches of one shape, for which a GPU has already chosen
            its kernels. The last batch is filled up, and broken images stay in the batch. The
            figures are the same. By default on a GPU.

    Raises:
        NotFiniteError: Logits, or a gradient of the attack, are not finite.
    """
    mine = together(lambda: _attack_batches(model, images, attack, batch_size, seed, progress, one_shape))
    batches = sorted(chain.from_iterable(gather(mine)), key=lambda arrays: int(arrays[0][0]))
    _, right, robust, clean_IL, adversarial_IL = (np.concatenate(arrays) for arrays in zip(*batches, strict=True))
    return Evaluation(right, robust, attack, seed, clean_IL, adversarial_IL)


def _attack_batches(
    model: RoutedNetwork,
    images: ImageSet,
    attack: AttackConfig,
    batch_size: int,
    seed: int,
    progress: Progress | None,
    one_shape: bool | None,
) -> list[tuple[np.ndarray, ...]]:
    """For each batch of this rank: rows of the images, right, robust, clean and adversarial pathways."""
    device = model.mean.device
    rows = own_rows(len(images), batch_size)
    loader = BatchLoader(images, batch_size=batch_size, indices=rows, pin_memory=device.type == "cuda")
    one_shape = not model.mean.is_cpu if one_shape is None else one_shape
    size = min(batch_size, len(rows)) if one_shape else 0
    found: list[tuple[np.ndarray, ...]] = []
    done = correct = robust = 0
    with evaluating(model), full_precision(model):
        for batch in loader.epoch(0):
            number = len(batch.labels)
            if number < size:
                batch = _filled(batch, size)
            x, y = batch.images.to(device), batch.labels.to(device)
            with torch.no_grad():
                logits, routing = model.forward_with_routing(x)
            check_finite(logits, routing)
            right = logits.argmax(dim=1) == y
            victims = Victims(model=model, images=x, labels=y, indices=batch.indices, attack=attack, seed=seed)
            if model.expert_layouts or (one_shape and attack.restarts == 1):
                survived, adversarial_routing = _attack_all(victims, right)
            else:  # without routers, the attack may stop at images that are done
                survived, adversarial_routing = right.clone(), routing
                survived[right] = untargeted(victims.take(right))[1]
            pathways = (routing.expert_index_BL, adversarial_routing.expert_index_BL)
            found.append(tuple(each[:number].cpu().numpy() for each in (batch.indices, right, survived, *pathways)))
            if progress is not None:
                done += number
                correct += int(right[:number].sum())
                robust += int(survived[:number].sum())
                progress(done, correct / done, robust / done)
    return found


def _filled(batch: Batch, size: int) -> Batch:
    """A batch, filled up with copies of its last image to a given size."""
    places = torch.arange(size).clamp(max=len(batch.labels) - 1)
    return Batch(batch.images[places], batch.labels[places], batch.indices[places])


def _attack_all(victims: Victims, right: Tensor) -> tuple[Tensor, Routing]:
    """Attack every image for all steps, so that router statistics include images that were wrong when clean.

    Returns:
        Which images are right and stay right at every point of every start [B], and the routing
        after the last step of the first start.
    """
    survived = right.clone()

    def note(logits: Tensor) -> None:
        survived.logical_and_(logits.argmax(dim=1) == victims.labels)

    objective = cross_entropy_objective(victims.labels)
    start, attack = victims.starts(), victims.attack
    attacked = pgd(plain(victims.model), victims.images, objective, attack, start=start, watch=note)
    with torch.no_grad():
        logits, routing = victims.network.forward_with_routing(attacked)
    survived &= logits.argmax(dim=1) == victims.labels
    if attack.restarts > 1:
        left = survived.nonzero().squeeze(1)
        survived[left] = untargeted(victims.take(left), first_restart=1)[1]
    return survived, routing
