"""One training step of each method, to be read beside the paper's Algorithm 1.

Shape suffixes: B batch, L MoE layers, N experts, R routers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from advmoe.attacks.pathways import disturbed_view, disturbing
from advmoe.attacks.pgd import cross_entropy_objective, kl_objective, pgd, plain, starting_point
from advmoe.attacks.relaxations import mixture_view
from advmoe.config import TrainConfig
from advmoe.data.loader import Batch
from advmoe.distributed import Place, placing
from advmoe.models.modes import evaluating, submodules
from advmoe.models.network import RoutedNetwork
from advmoe.models.routing import Routing
from advmoe.training.awp import perturbed_weights
from advmoe.training.guard import Kept, statistics, take_step
from advmoe.training.levels import Level
from advmoe.training.losses import load_balance, trades
from advmoe.training.union import micro_batches, part_of_union, size_of_union, sum_gradients


@dataclass(frozen=True)
class StepResult:
    """Sums over the batch of one update, on the batch's device."""

    loss: Tensor
    """Mean loss."""
    indices: Tensor
    """Rows of the images in the image set, int64 [images]."""
    clean_correct: Tensor
    adversarial_correct: Tensor | None
    """None if the method makes no adversarial images."""
    routing: Routing | None
    """None if there were too few images."""
    adversarial_routing: Routing | None
    finite: Tensor
    """Whether the update was made, bool []: its loss and its gradients were finite. The same on all ranks."""
    too_few: bool = False
    """Whether it was not made because there were too few images. The same on all ranks."""

    @property
    def images(self) -> int:
        """Number of images."""
        return len(self.indices)


class Attacked(NamedTuple):
    """The result of a training attack on a batch."""

    images: Tensor
    finite: Tensor
    """Whether all logits and gradients of the attack were finite, bool []. If not, the images are not adversarial."""


Passes = Callable[[Batch, slice], tuple[Tensor, StepResult]]
"""(a part of a batch, its rows in the batch) -> this rank's part of the loss of the union, and what was seen."""


def training_attack(
    model: RoutedNetwork,
    images: Tensor,
    labels: Tensor,
    config: TrainConfig,
    generator: torch.Generator,
    place: Place | None = None,
    *,
    sound: Tensor | None = None,
) -> Tensor:
    """K-step PGD on the loss's own inner objective, against the model as it is now, BatchNorm in eval mode.

    The attack increases KL(f(x) || f(x')) for TRADES and the cross-entropy for PGD-AT.
    `attack_routing` chooses the gradient of the routing that it sees. The outputs are always those
    of the model itself.
    """
    with evaluating(model), arithmetic(images, half=config.precision != "fp32"):
        start = starting_point(images, config.attack, generator, place)
        if config.accumulate == 1:
            return _attack(model, images, labels, start, config, sound)
        number = config.accumulate
        parts = zip(images.chunk(number), labels.chunk(number), start.chunk(number), strict=True)
        return torch.cat([_attack(model, *part, config=config, sound=sound) for part in parts])


def _attack(
    model: RoutedNetwork, images: Tensor, labels: Tensor, start: Tensor, config: TrainConfig, sound: Tensor | None
) -> Tensor:
    if config.loss == "trades":
        with torch.no_grad():
            objective = kl_objective(model(images))
    else:
        objective = cross_entropy_objective(labels)
    forward = plain(model)
    if config.attack_routing == "mixture":
        forward = mixture_view(model)
    elif config.attack_routing == "margin":
        with torch.no_grad():
            clean = model.forward_with_routing(images)[1]
        forward = disturbed_view(model, clean.expert_index_BL)
        objective = disturbing(objective, model.config.num_classes)
    return pgd(forward, images, objective, config.attack, start=start, sound=sound)


def arithmetic(images: Tensor, *, half: bool) -> AbstractContextManager[object]:
    """A context in which networks compute in bf16, or one that changes nothing."""
    return torch.autocast(images.device.type, torch.bfloat16) if half else nullcontext()


def robust_loss(level: Level, batch: Batch, adversarial: Tensor, config: TrainConfig) -> tuple[Tensor, StepResult]:
    """The robust objective on a batch and its adversarial images, and the outcomes of both passes.

    With several ranks it is this rank's part of the objective on the union of their batches.
    """
    with arithmetic(adversarial, half=config.precision == "bf16"):
        if config.loss == "pgd_at":
            clean_logits, routing = _seen(level.model, batch.images)
        adversarial_logits, adversarial_routing = level.model.forward_with_routing(adversarial)
        if config.loss == "trades":
            clean_logits, routing = level.model.forward_with_routing(batch.images)
    if config.loss == "trades":
        loss = trades(clean_logits, adversarial_logits, batch.labels, config.trades_beta)
    else:
        loss = F.cross_entropy(adversarial_logits, batch.labels)
    if config.balance and adversarial_routing.logits_BRN is not None:
        loss = loss + config.balance * load_balance(adversarial_routing, batch.place, level.model.rows_per_image)
    return part_of_union(loss, batch), StepResult(
        loss.detach(),
        batch.indices,
        (clean_logits.argmax(dim=1) == batch.labels).sum(),
        (adversarial_logits.argmax(dim=1) == batch.labels).sum(),
        routing,
        adversarial_routing,
        loss.isfinite(),
    )


@torch.no_grad()
def _seen(model: RoutedNetwork, images: Tensor) -> tuple[Tensor, Routing]:
    """Logits and routing of images that the loss does not see, in the modes of the training: in others an unchanged
    image would take other pathways. The statistics forget the pass.
    """
    unmoved = Kept(statistics(submodules(model)))
    logits, routing = model.forward_with_routing(images)
    unmoved.restore()
    return logits, routing


def adversarial_update(level: Level, batch: Batch, config: TrainConfig, generator: torch.Generator) -> StepResult:
    """Attack the current model on this batch, then one descent step of the level on the robust loss."""
    return robust_update(level, batch, attacked(level.model, batch, config, generator), config)


def too_few(batch: Batch, config: TrainConfig) -> bool:
    """Whether a batch has not the two images for each of its parts that BatchNorm needs. This happens only where
    images that cannot be decoded are left out.
    """
    return size_of_union(batch) < 2 * config.accumulate


def attacked(model: RoutedNetwork, batch: Batch, config: TrainConfig, generator: torch.Generator) -> Attacked:
    """The training attack on a batch. Too few images to learn from are not attacked."""
    sound = torch.ones((), dtype=torch.bool, device=batch.images.device)
    if too_few(batch, config):
        return Attacked(batch.images, sound)
    images = training_attack(model, batch.images, batch.labels, config, generator, batch.place, sound=sound)
    return Attacked(images, sound)


def robust_update(level: Level, batch: Batch, adversarial: Attacked, config: TrainConfig) -> StepResult:
    """One descent step of the level on the robust loss of a batch and its adversarial images."""
    return descend(
        level,
        batch,
        lambda part, rows: robust_loss(level, part, adversarial.images[rows], config),
        config,
        sound=adversarial.finite,
    )


def descend(
    level: Level, batch: Batch, passes: Passes, config: TrainConfig, *, sound: Tensor | None = None
) -> StepResult:
    """One descent step of the level on a loss of a batch, whose micro-batches are computed one after another.

    Args:
        level: what is updated.
        batch: this rank's.
        passes: computes the loss of a part of the batch.
        config: says how many micro-batches there are, and the size of weight perturbations.
        sound: bool []; false where the step must not be taken. None: nothing is known against it.
    """
    if too_few(batch, config):
        return _not_made(batch)
    before = Kept(statistics(submodules(level.model)))
    losses, results = [], []
    with level.training():
        level.optimizer.zero_grad(set_to_none=True)
        for part, rows in micro_batches(batch, config.accumulate):
            with placing(part.place, len(part.labels)), _perturbed(level, part, rows, passes, config.awp):
                loss, result = passes(part, rows)
                loss.backward()
            losses.append(loss.detach())
            results.append((rows, result))
        own = torch.stack(losses).sum()
        if sound is not None:
            own = torch.where(sound, own, torch.nan)
        total = sum_gradients((parameter.grad for parameter in level.parameters), own)
        finite = take_step(level, total, before)
    return replace(_whole(len(batch.labels), results), finite=finite)


def _not_made(batch: Batch) -> StepResult:
    """The result of an update for which a batch has too few images."""
    device = batch.images.device
    none, no_loss = torch.zeros((), dtype=torch.int64, device=device), torch.full((), torch.nan, device=device)
    return StepResult(no_loss, batch.indices, none, None, None, None, none.bool(), too_few=True)


def _perturbed(level: Level, part: Batch, rows: slice, passes: Passes, gamma: float) -> AbstractContextManager[None]:
    """Adversarial weight perturbation, if there is any."""
    if not gamma:
        return nullcontext()
    return perturbed_weights(level.model, level.parameters, lambda: passes(part, rows)[0], gamma)


def _whole(images: int, parts: Sequence[tuple[slice, StepResult]]) -> StepResult:
    """What the parts of a batch saw, together."""
    first = parts[0][1]
    if len(parts) == 1:
        return first

    def whole(values: Sequence[Tensor]) -> Tensor:
        together = torch.empty_like(values[0]).resize_(images, *values[0].shape[1:])
        for (rows, _), value in zip(parts, values, strict=True):
            together[rows] = value
        return together

    def joined(routings: Sequence[Routing]) -> Routing:
        return Routing(whole([routing.expert_index_BL for routing in routings]), None)

    seen = [result for _, result in parts]
    loss = torch.stack([result.loss * result.images for result in seen if result.images] or [first.loss]).sum()
    adversarial = [result.adversarial_routing for result in seen if result.adversarial_routing is not None]
    correct = [result.adversarial_correct for result in seen if result.adversarial_correct is not None]
    return StepResult(
        loss / max(images, 1),
        whole([result.indices for result in seen]),
        torch.stack([result.clean_correct for result in seen]).sum(),
        torch.stack(correct).sum() if correct else None,
        joined([result.routing for result in seen if result.routing is not None]),
        joined(adversarial) if adversarial else None,
        first.finite,
    )


def part_of(batch: Batch, share: float) -> tuple[Batch, Tensor | slice]:
    """A share of a batch, at least two images, with their rows in the batch.

    Batches are shuffled, so evenly spaced images are a random choice, and all ranks have equally
    many of them.
    """
    first, total, _ = batch.place or Place(0, len(batch.labels))
    number = max(2, round(share * total))
    if number >= total:
        return batch, slice(None)
    positions = [i * total // number for i in range(number)]
    before = sum(position < first for position in positions)
    own = range(before, before + sum(first <= position < first + len(batch.labels) for position in positions))
    place = batch.place and Place(before, number)
    # on the images' device, because the host would wait for a copy
    rows = _positions(own, total, number, batch.labels.device) - first
    indices = batch.indices[_positions(own, total, number, batch.indices.device) - first]
    return Batch(batch.images[rows], batch.labels[rows], indices, place), rows


def _positions(of: range, total: int, number: int, device: torch.device) -> Tensor:
    """Those numbered `of` among `number` positions that are spread evenly over a union of `total` images."""
    return torch.arange(of.start, of.stop, device=device) * total // number


def standard_update(level: Level, batch: Batch, config: TrainConfig) -> StepResult:
    """One descent step on the cross-entropy of clean images."""

    def passes(part: Batch, _: slice) -> tuple[Tensor, StepResult]:
        with arithmetic(part.images, half=config.precision == "bf16"):
            logits, routing = level.model.forward_with_routing(part.images)
        loss = F.cross_entropy(logits, part.labels)
        correct = (logits.argmax(dim=1) == part.labels).sum()
        result = StepResult(loss.detach(), part.indices, correct, None, routing, None, loss.isfinite())
        return part_of_union(loss, part), result

    return descend(level, batch, passes, config)
