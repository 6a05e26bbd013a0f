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
from advmoe.attacks.pgd import cross_entropy_objective, pgd
from advmoe.attacks.relaxations import is_routed, routing_views
from advmoe.attacks.untargeted import starts, untargeted
from advmoe.data.loader import Batch
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

    model: nn.Module
    x: Tensor
    y: Tensor
    indices: Tensor
    right: Tensor
    """[B], bool."""
    config: SuiteConfig
    seed: int
    arrays: Arrays
    worst: Tensor
    """[B, 3, H, W]: the first adversarial version found that the model gets wrong; see `conclude` for the others."""
    broken: Tensor
    """[B], bool."""
    attacked: Tensor
    """[B, 3, H, W]: every image after all steps of plain PGD, whether it won or not, and if it was wrong when clean."""

    @property
    def victims(self) -> tuple[Tensor, Tensor, Tensor]:
        """Images, labels and numbers of those classified correctly."""
        return self.x[self.right], self.y[self.right], self.indices[self.right.cpu()]

    def record(self, name: str, robust_V: Tensor, found: Tensor | None = None) -> None:
        """Note which victims withstood an attack, and keep what broke the model itself."""
        robust = torch.zeros_like(self.right)
        robust[self.right] = robust_V
        self.arrays[f"robust/{name}"] = robust.cpu().numpy()
        if found is None:
            return
        with torch.no_grad():
            wrong_V = self.model(found).argmax(dim=1) != self.y[self.right]
        rows = self.right.nonzero().squeeze(1)[wrong_V]
        new = rows[~self.broken[rows]]
        self.worst[new] = found[wrong_V][~self.broken[rows]]
        self.broken[rows] = True

    def observe(self, condition: str, images: Tensor) -> None:
        """Note predictions and pathways under a condition."""
        logits, pathways = predict(self.model, images)
        self.arrays[f"prediction/{condition}"] = logits.argmax(dim=1).cpu().numpy()
        self.arrays[f"pathway/{condition}"] = pathways.to(torch.uint8).cpu().numpy()

    def conclude(self) -> None:
        """Note the worst case: who withstood everything, and each image's version that decided it.

        Images that no attack broke, and those wrong when clean, are shown attacked too, so that the routers are not
        judged by images that nobody touched; unless that would change the verdict.
        """
        self.record("worst", ~self.broken[self.right])
        still = predict(self.model, self.attacked)[0].argmax(dim=1) == self.y
        shown = (still == self.right) & ~self.broken
        self.worst[shown] = self.attacked[shown]
        self.observe("worst", self.worst)


def begin(model: nn.Module, batch: Batch, config: SuiteConfig, seed: int, device: torch.device) -> BatchRun:
    """Look at the clean images of a batch."""
    x, y = batch.images.to(device), batch.labels.to(device)
    right = predict(model, x)[0].argmax(dim=1) == y
    arrays: Arrays = {
        "index": batch.indices.numpy(),
        "label": batch.labels.numpy(),
        "right": right.cpu().numpy(),
    }
    run = BatchRun(model, x, y, batch.indices, right, config, seed, arrays, x.clone(), torch.zeros_like(right), x)
    run.observe("clean", x)
    return run


def stages(run: BatchRun, common_ML: Tensor) -> list[tuple[str, Callable[[], None]]]:
    """The attacks to run on a batch, in order, each with a name for the person watching."""
    config = run.config
    chosen: list[tuple[str, Callable[[], None]]] = [("PGD", lambda: _pgd(run))]
    if config.routing and is_routed(run.model):
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
    found, robust = untargeted(run.model, *run.victims, run.config.attack, run.seed)
    run.record("pgd", robust, found)
    if is_routed(run.model):
        attack = run.config.attack
        first = starts(run.x, run.indices, attack, run.seed, [0])
        run.attacked = pgd(run.model, run.x, cross_entropy_objective(run.y), attack, start=first)
    else:  # no router to dissect, so nothing is spent on images that are done
        run.attacked = run.x.clone()
        run.attacked[run.right] = found
    run.observe("pgd", run.attacked)


def _views(run: BatchRun) -> None:
    views = routing_views(run.model, run.config.temperatures)
    for name, forward in views.items():
        if forward is not run.model:
            found, robust = untargeted(forward, *run.victims, run.config.attack, run.seed)
            with torch.no_grad():  # a view rounds differently; the model itself decides
                robust |= run.model(found).argmax(dim=1) == run.y[run.right]
            run.record(f"view/{name}", robust, found)


def _route(run: BatchRun, common_ML: Tensor) -> None:
    assert is_routed(run.model)
    open_V = ~run.broken[run.right]
    x, y, indices = run.victims
    found, robust_V = x.clone(), torch.zeros_like(open_V)
    if open_V.any():
        found[open_V], robust_V[open_V] = route_attack(
            run.model,
            x[open_V],
            y[open_V],
            indices[open_V.cpu()],
            run.config.attack,
            run.seed,
            observed_ML=common_ML[:OBSERVED],
            nearby=run.attacked[run.right][open_V],
            config=run.config.route,
        )
    run.record("route", robust_V, found)


def _parts(run: BatchRun) -> None:
    assert is_routed(run.model)
    x, y, indices = run.victims
    pathways = torch.from_numpy(run.arrays["pathway/clean"]).to(x.device, torch.int64)
    attack = run.config.attack
    found, robust = untargeted(run.model, x, y, indices, attack, run.seed, pathways_BL=pathways[run.right])
    run.record("experts", robust, found)
    found, robust = attack_routers(run.model, x, y, indices, pathways[run.right], attack, run.seed)
    run.record("routers", robust, found)
    radii = [share * attack.eps for share in FLIP_SHARES if attack.eps]
    radius = flip_radius(run.model, run.x, run.indices, pathways, radii, run.seed)
    run.arrays["flip_radius"] = radius.cpu().numpy()


def _every_pathway(run: BatchRun, common_ML: Tensor) -> None:
    assert is_routed(run.model)
    clean, robust = attack_every_pathway(
        run.model, *run.victims, common_ML[: run.config.pathways], run.config.attack, run.seed
    )
    run.record("every_pathway/clean", clean)
    run.record("every_pathway", robust)


def _autoattack(run: BatchRun) -> None:
    x, y, _ = run.victims
    if not len(x):
        for attack in STANDARD:
            run.record(f"autoattack/{attack}", torch.zeros_like(y, dtype=torch.bool))
        return
    result = autoattack(run.model, x, y, eps=run.config.attack.eps, seed=run.seed)
    for attack, robust in result.robust_after.items():
        run.record(f"autoattack/{attack}", robust, result.adversarial if attack == STANDARD[-1] else None)


def _radius(run: BatchRun, eps: float) -> None:
    attack = run.config.attack
    length = attack.step_size * eps / attack.eps if attack.eps else eps / 4
    scaled = dataclasses.replace(attack, eps=eps, step_size=length)
    run.record(f"eps/{eps:.6g}", untargeted(run.model, *run.victims, scaled, run.seed)[1])
