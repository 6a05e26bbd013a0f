"""The attacks of an evaluation, run one after another on one batch; `advmoe.evaluation.results` says what each is.

Shape suffixes: B batch, H height, L MoE layers, M pathways, V victims, W width.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn

from advmoe.attacks.autoattack import STANDARD, autoattack
from advmoe.attacks.pathways import attack_every_pathway, attack_routers, flip_radius, route_attack
from advmoe.attacks.pgd import cross_entropy_objective, forced, pgd, plain
from advmoe.attacks.relaxations import is_routed, routing_views
from advmoe.attacks.untargeted import through_view, untargeted
from advmoe.attacks.victims import Victims
from advmoe.evaluation.accuracy import check_finite
from advmoe.evaluation.results import (
    EVERY_PATHWAY,
    EVERY_PATHWAY_CLEAN,
    EXPERTS,
    FURTHER,
    PGD,
    ROUTE,
    ROUTERS,
    WORST,
    SuiteConfig,
    further_starts,
    planned,
)
from advmoe.evaluation.state import Arrays
from advmoe.evaluation.vocabulary import Attack
from advmoe.models.network import RoutedNetwork
from advmoe.models.routing import Routing

FLIP_SHARES = (1 / 16, 1 / 8, 1 / 4, 1 / 2, 1.0)
"""Radii at which flips of routers are tried, as shares of eps."""
OBSERVED = 32
"""Number of most frequent clean pathways from which the route attack chooses."""


@torch.no_grad()
def predict(model: nn.Module, images: Tensor) -> tuple[Tensor, Tensor]:
    """Logits and pathways [B, L] (no columns without routing). Refuses values that are not finite."""
    if isinstance(model, RoutedNetwork):
        logits, routing = model.forward_with_routing(images)
    else:
        logits = model(images)
        routing = Routing(torch.zeros((len(images), 0), dtype=torch.int64, device=images.device), None)
    check_finite(logits, routing)
    return logits, routing.expert_index_BL


UNDER_WAY = ("worst", "broken", "attacked")
"""Fields of `BatchRun` that are stored for an unfinished batch, in addition to its arrays."""


@dataclass
class BatchRun:
    """One batch during the suite, with the results for its images so far."""

    batch: Victims
    """All images, including those that are wrong when clean."""
    right: Tensor
    """[B], bool: classified correctly when clean."""
    config: SuiteConfig
    arrays: Arrays
    worst: Tensor
    """[B, 3, H, W]: the first adversarial version that the model gets wrong; `conclude` fills in the others."""
    broken: Tensor
    """[B], bool."""
    attacked: Tensor
    """[B, 3, H, W]: every image after all steps of plain PGD, whether or not it won or was wrong when clean."""

    @property
    def victims(self) -> Victims:
        """The images that are right when clean."""
        return self.batch.take(self.right)

    def record(
        self, attack: Attack, robust_V: Tensor, found: Tensor | None = None, wrong_V: Tensor | None = None
    ) -> None:
        """Record the victims that withstood an attack, and keep the versions that broke the model itself.

        Args:
            attack: The attack.
            robust_V: [V], bool.
            found: [V, 3, H, W], what it made of the victims, if it attacks at the full radius.
            wrong_V: [V], bool, the versions that the model itself gets wrong. Default: those that
                the attack broke.
        """
        robust = torch.zeros_like(self.right)
        robust[self.right] = robust_V
        self.arrays[attack.column] = robust.cpu().numpy()
        if found is None:
            return
        wrong_V = ~robust_V if wrong_V is None else wrong_V
        rows = self.right.nonzero().squeeze(1)[wrong_V]
        new = rows[~self.broken[rows]]
        self.worst[new] = found[wrong_V][~self.broken[rows]]
        self.broken[rows] = True

    def withstood(self, attack: Attack) -> Tensor:
        """The victims that an earlier attack did not break, [V] bool."""
        return torch.from_numpy(self.arrays[attack.column]).to(self.right.device)[self.right]

    def observe(self, condition: str, images: Tensor) -> None:
        """Record predictions and pathways under a condition."""
        logits, pathways = predict(self.batch.model, images)
        self.arrays[f"prediction/{condition}"] = logits.argmax(dim=1).cpu().numpy()
        self.arrays[f"pathway/{condition}"] = pathways.to(torch.uint8).cpu().numpy()

    def conclude(self) -> None:
        """Record the worst case: the images that withstood all attacks, and the decisive version of each image.

        Images that survived or were wrong when clean are replaced by their attacked version, if
        this does not change the verdict. Router statistics therefore cover attacked images only.
        """
        self.record(WORST, ~self.broken[self.right])
        still = predict(self.batch.model, self.attacked)[0].argmax(dim=1) == self.batch.labels
        shown = (still == self.right) & ~self.broken
        self.worst[shown] = self.attacked[shown]
        self.observe("worst", self.worst)

    def unfinished(self) -> Arrays:
        """All arrays from which this batch can be continued."""
        return self.arrays | {f"batch/{name}": getattr(self, name).cpu().numpy() for name in UNDER_WAY}

    def restore(self, kept: Arrays) -> None:
        """Go on from `unfinished`."""
        kept = dict(kept)
        for name in UNDER_WAY:
            setattr(self, name, torch.from_numpy(kept.pop(f"batch/{name}")).to(self.right.device))
        self.arrays = kept


def begin(batch: Victims, config: SuiteConfig) -> BatchRun:
    """Evaluate the clean images of a batch."""
    x = batch.images
    right = predict(batch.model, x)[0].argmax(dim=1) == batch.labels
    arrays: Arrays = {
        "index": batch.indices.numpy(),
        "label": batch.labels.cpu().numpy(),
        "right": right.cpu().numpy(),
    }
    run = BatchRun(batch, right, config, arrays, x.clone(), torch.zeros_like(right), x)
    run.observe("clean", x)
    return run


class Stage(NamedTuple):
    """One step of the evaluation of a batch."""

    title: str
    """For the person watching."""
    gives: str
    """An array that exists once the stage is done."""
    work: Callable[[], None]


def stages(run: BatchRun, common_ML: Tensor) -> list[Stage]:
    """The stages of a batch, in order."""
    chosen: list[Stage] = []
    radii = iter(run.config.eps_sweep)
    for attack in planned(run.config, run.batch.model):
        match attack.family:
            case "pgd":
                chosen.append(Stage("PGD", "pathway/pgd", partial(_pgd, run)))
            case "view":
                work = partial(_view, run, attack)
                chosen.append(Stage(f"PGD, routing seen as {attack.detail}", attack.column, work))
            case "route":
                chosen.append(Stage("route attack", attack.column, partial(_route, run, common_ML)))
            case "further":
                chosen.append(Stage("PGD, further starts", attack.column, partial(_further, run)))
            case "experts":
                chosen.append(Stage("experts alone", attack.column, partial(_experts, run)))
            case "routers":
                chosen.append(Stage("routers alone", "flip_radius", partial(_routers, run)))
            case "every_pathway" if attack == EVERY_PATHWAY:
                chosen.append(Stage("every pathway", attack.column, partial(_every_pathway, run, common_ML)))
            case "autoattack":
                work = partial(_autoattack, run, attack)
                chosen.append(Stage(f"AutoAttack: {attack.detail}", attack.column, work))
            case "eps":
                eps = next(radii)
                chosen.append(Stage(f"eps {255 * eps:.3g}/255", attack.column, partial(_radius, run, attack, eps)))
    return chosen


def _pgd(run: BatchRun) -> None:
    found, robust = untargeted(run.victims)
    run.record(PGD, robust, found)
    batch = run.batch
    if is_routed(batch.model):
        objective = cross_entropy_objective(batch.labels)
        run.attacked = pgd(plain(batch.model), batch.images, objective, batch.attack, start=batch.starts())
    else:  # without routers, the attack may stop at images that are done
        run.attacked = batch.images.clone()
        run.attacked[run.right] = found
    run.observe("pgd", run.attacked)


def _view(run: BatchRun, attack: Attack) -> None:
    """PGD through a view of the routing."""
    view = routing_views(run.batch.model, run.config.temperatures)[attack.detail]
    found, robust = through_view(run.victims, view)
    run.record(attack, robust, found)


def _route(run: BatchRun, common_ML: Tensor) -> None:
    def attack(victims: Victims, open_V: Tensor) -> tuple[Tensor, Tensor]:
        nearby = run.attacked[run.right][open_V]
        return route_attack(victims, observed_ML=common_ML[:OBSERVED], nearby=nearby, config=run.config.route)

    _against_unbroken(run, ROUTE, attack)


def _further(run: BatchRun) -> None:
    """PGD on the model itself, from starts that the first attack did not use."""
    usual = run.config.attack
    more = dataclasses.replace(usual, restarts=usual.restarts + further_starts(run.config))
    _against_unbroken(run, FURTHER, lambda victims, _: untargeted(victims.under(more), first_restart=usual.restarts))


def _against_unbroken(run: BatchRun, attack: Attack, work: Callable[[Victims, Tensor], tuple[Tensor, Tensor]]) -> None:
    """Attack the images that no attack has broken yet: `work(victims, which ones they are)`."""
    victims = run.victims
    open_V = ~run.broken[run.right]
    found, robust_V = victims.images.clone(), torch.zeros_like(open_V)
    if open_V.any():
        found[open_V], robust_V[open_V] = work(victims.take(open_V), open_V)
    run.record(attack, robust_V, found)


def _clean_pathways(run: BatchRun) -> Tensor:
    return torch.from_numpy(run.arrays["pathway/clean"]).to(run.right.device, torch.int64)


def _experts(run: BatchRun) -> None:
    found, robust = untargeted(run.victims, forced(run.batch.model, _clean_pathways(run)[run.right]))
    run.record(EXPERTS, robust, found, ~run.victims.right(found))


def _routers(run: BatchRun) -> None:
    pathways = _clean_pathways(run)
    found, robust = attack_routers(run.victims, pathways[run.right])
    run.record(ROUTERS, robust, found)
    eps = run.batch.attack.eps
    radii = [share * eps for share in FLIP_SHARES if eps]
    run.arrays["flip_radius"] = flip_radius(run.batch, pathways, radii).cpu().numpy()


def _every_pathway(run: BatchRun, common_ML: Tensor) -> None:
    clean, robust = attack_every_pathway(run.victims, common_ML[: run.config.pathways])
    run.record(EVERY_PATHWAY_CLEAN, clean)
    run.record(EVERY_PATHWAY, robust)


def _autoattack(run: BatchRun, attack: Attack) -> None:
    """One of the four attacks, on the images that the earlier ones left. Random numbers are a
    function of the image, so the result equals that of running all four at once.
    """
    number = STANDARD.index(attack.detail)
    victims = run.victims
    left = torch.ones_like(run.right[run.right])
    if number:
        left = run.withstood(Attack("autoattack", STANDARD[number - 1]))
    robust, found = left.clone(), victims.images.clone()
    if left.any():
        result = autoattack(victims.take(left), attacks=(attack.detail,))
        robust[left], found[left] = result.robust_after[attack.detail], result.adversarial
    run.record(attack, robust, found)


def _radius(run: BatchRun, attack: Attack, eps: float) -> None:
    usual = run.config.attack
    length = usual.step_size * eps / usual.eps if usual.eps else eps / 4
    scaled = dataclasses.replace(usual, eps=eps, step_size=length)
    run.record(attack, untargeted(run.victims.under(scaled))[1])
