"""The attacks of an evaluation, run one after another on one batch; `advmoe.evaluation.results` says what each is."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from advmoe.attacks.autoattack import STANDARD, autoattack
from advmoe.attacks.pathways import attack_every_pathway, attack_routers, flip_radius, route_attack
from advmoe.attacks.pgd import cross_entropy_objective, forced, pgd, plain
from advmoe.attacks.relaxations import DETACHED, is_routed, routing_views
from advmoe.attacks.untargeted import untargeted
from advmoe.attacks.victims import Victims
from advmoe.evaluation.accuracy import check_finite
from advmoe.evaluation.results import SuiteConfig
from advmoe.evaluation.state import Arrays
from advmoe.models.network import RoutedNetwork
from advmoe.models.routing import Routing

FLIP_SHARES = (1 / 16, 1 / 8, 1 / 4, 1 / 2, 1.0)
"""Radii at which routers are tried for a flip, as shares of eps."""
OBSERVED = 32
"""Most frequent clean pathways that the route attack chooses from."""


@torch.no_grad()
def predict(model: nn.Module, images: Tensor) -> tuple[Tensor, Tensor]:
    """Logits and pathways [B, L] (no columns for a model without routing); refuses those that are not finite."""
    if isinstance(model, RoutedNetwork):
        logits, routing = model.forward_with_routing(images)
    else:
        logits = model(images)
        routing = Routing(torch.zeros((len(images), 0), dtype=torch.int64, device=images.device), None)
    check_finite(logits, routing)
    return logits, routing.expert_index_BL


@dataclass
class BatchRun:
    """One batch on its way through the suite: what is known of its images so far."""

    batch: Victims
    """All images, also those that are wrong when clean."""
    right: Tensor
    """[B], bool: classified correctly when clean."""
    config: SuiteConfig
    arrays: Arrays
    worst: Tensor
    """[B, 3, H, W]: the first adversarial version found that the model gets wrong; see `conclude` for the others."""
    broken: Tensor
    """[B], bool."""
    attacked: Tensor
    """[B, 3, H, W]: every image after all steps of plain PGD, whether it won or not, and if it was wrong when clean."""

    @property
    def victims(self) -> Victims:
        """The images that are right when clean."""
        return self.batch.take(self.right)

    def record(self, name: str, robust_V: Tensor, found: Tensor | None = None) -> None:
        """Note which victims withstood an attack, and keep the versions that broke the model itself."""
        robust = torch.zeros_like(self.right)
        robust[self.right] = robust_V
        self.arrays[f"robust/{name}"] = robust.cpu().numpy()
        if found is None:
            return
        wrong_V = ~self.victims.right(found)
        rows = self.right.nonzero().squeeze(1)[wrong_V]
        new = rows[~self.broken[rows]]
        self.worst[new] = found[wrong_V][~self.broken[rows]]
        self.broken[rows] = True

    def observe(self, condition: str, images: Tensor) -> None:
        """Note predictions and pathways under a condition."""
        logits, pathways = predict(self.batch.model, images)
        self.arrays[f"prediction/{condition}"] = logits.argmax(dim=1).cpu().numpy()
        self.arrays[f"pathway/{condition}"] = pathways.to(torch.uint8).cpu().numpy()

    def conclude(self) -> None:
        """Note the worst case: who withstood everything, and the version of each image that decided it.

        Images that survived, or were wrong when clean, are replaced by their attacked version where that does not
        change the verdict. So the router statistics cover attacked images only.
        """
        self.record("worst", ~self.broken[self.right])
        still = predict(self.batch.model, self.attacked)[0].argmax(dim=1) == self.batch.labels
        shown = (still == self.right) & ~self.broken
        self.worst[shown] = self.attacked[shown]
        self.observe("worst", self.worst)


def begin(batch: Victims, config: SuiteConfig) -> BatchRun:
    """Look at the clean images of a batch."""
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


def stages(run: BatchRun, common_ML: Tensor) -> list[tuple[str, Callable[[], None]]]:
    """The attacks to run on a batch, in order, each with a name for the person watching."""
    config = run.config
    chosen: list[tuple[str, Callable[[], None]]] = [("PGD", lambda: _pgd(run))]
    if config.routing and is_routed(run.batch.model):
        chosen += [
            ("routing views", lambda: _views(run)),
            ("route attack", lambda: _route(run, common_ML)),
            ("experts and routers alone", lambda: _parts(run)),
            ("every pathway", lambda: _every_pathway(run, common_ML)),
        ]
    if config.autoattack:
        chosen.append(("AutoAttack", lambda: _autoattack(run)))
    chosen += [(f"eps {255 * eps:.3g}/255", partial(_radius, run, eps)) for eps in config.eps_sweep]
    return chosen


def _pgd(run: BatchRun) -> None:
    found, robust = untargeted(run.victims)
    run.record("pgd", robust, found)
    batch = run.batch
    if is_routed(batch.model):
        objective = cross_entropy_objective(batch.labels)
        run.attacked = pgd(plain(batch.model), batch.images, objective, batch.attack, start=batch.starts())
    else:  # no router to dissect, so nothing is spent on images that are done
        run.attacked = batch.images.clone()
        run.attacked[run.right] = found
    run.observe("pgd", run.attacked)


def _views(run: BatchRun) -> None:
    views = routing_views(run.batch.model, run.config.temperatures)
    for name, forward in views.items():
        if name != DETACHED:
            found, robust = untargeted(run.victims, forward)
            robust |= run.victims.right(found)  # a view rounds differently; the model itself decides
            run.record(f"view/{name}", robust, found)


def _route(run: BatchRun, common_ML: Tensor) -> None:
    victims = run.victims
    open_V = ~run.broken[run.right]
    found, robust_V = victims.images.clone(), torch.zeros_like(open_V)
    if open_V.any():
        found[open_V], robust_V[open_V] = route_attack(
            victims.take(open_V),
            observed_ML=common_ML[:OBSERVED],
            nearby=run.attacked[run.right][open_V],
            config=run.config.route,
        )
    run.record("route", robust_V, found)


def _parts(run: BatchRun) -> None:
    victims = run.victims
    pathways = torch.from_numpy(run.arrays["pathway/clean"]).to(victims.images.device, torch.int64)
    found, robust = untargeted(victims, forced(victims.model, pathways[run.right]))
    run.record("experts", robust, found)
    found, robust = attack_routers(victims, pathways[run.right])
    run.record("routers", robust, found)
    eps = victims.attack.eps
    radii = [share * eps for share in FLIP_SHARES if eps]
    run.arrays["flip_radius"] = flip_radius(run.batch, pathways, radii).cpu().numpy()


def _every_pathway(run: BatchRun, common_ML: Tensor) -> None:
    clean, robust = attack_every_pathway(run.victims, common_ML[: run.config.pathways])
    run.record("every_pathway/clean", clean)
    run.record("every_pathway", robust)


def _autoattack(run: BatchRun) -> None:
    victims = run.victims
    if not len(victims):
        for attack in STANDARD:
            run.record(f"autoattack/{attack}", torch.zeros(0, dtype=torch.bool, device=run.right.device))
        return
    result = autoattack(victims)
    for attack, robust in result.robust_after.items():
        run.record(f"autoattack/{attack}", robust, result.adversarial if attack == STANDARD[-1] else None)


def _radius(run: BatchRun, eps: float) -> None:
    attack = run.config.attack
    length = attack.step_size * eps / attack.eps if attack.eps else eps / 4
    scaled = dataclasses.replace(attack, eps=eps, step_size=length)
    run.record(f"eps/{eps:.6g}", untargeted(run.victims.under(scaled))[1])
