"""Attacks that know about routing: steering images onto weak pathways, flipping routers, attacking experts alone.

With the pathway P fixed, a network is an ordinary CNN f_P, and the model computes f_P(x) wherever all routers along P
agree with it. So the attack on the model splits into one constrained problem per pathway,

    maximise CE(f_P(x'), y)  subject to  margin_r(x'; P) > 0 for every router r,

without any gradient through an argmax. With few routers all pathways are tried and the split is exact; else the weakest
pathways seen on other images are, and then those one flip away from where the image is now. The constraint enters as a
penalty, and each success is replayed on the model itself.

Shape suffixes: B batch, M pathways, N experts, L MoE layers, R routers; both times tokens where those are routed.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from advmoe.attacks.pgd import Forward, Objective, Won, pgd
from advmoe.attacks.relaxations import SeeingTape, SteeredTape
from advmoe.attacks.untargeted import starts, untargeted
from advmoe.config import AttackConfig
from advmoe.models.network import RoutedNetwork

PENALTY = 5.0
"""Weight of a violated router margin against the cross-entropy, both in nats."""
SAFETY = 0.05
"""Margin from which a router counts as won over; above 0, so that rounding does not undo it."""
FLIP_STEPS = 10
"""Steps of the attack that looks for the smallest radius at which a router flips."""


@dataclass(frozen=True, kw_only=True)
class RouteAttackConfig:
    """How far the route attack searches."""

    exhaustive: int = 16
    """All pathways are tried if there are at most this many."""
    sampled: int = 4
    """Else: pathways seen on other images that are tried per image, those on which it looks weakest first."""
    greedy: int = 4
    """Else: after that, pathways one flip away from the image's own that are tried, nearest flip first."""


def decisions(model: RoutedNetwork) -> list[int]:
    """Places in a pathway [L] that are decisions of their own, in the order of the routers: layers that share a router
    repeat its decision. Where tokens are routed, each of them is a decision."""
    layers, tokens = list(model.router_of_layer), model.rows_per_image
    return [layers.index(router) * tokens + token for router in range(len(model.routers)) for token in range(tokens)]


def decision_of_place(model: RoutedNetwork) -> list[int]:
    """For each place in a pathway [L] the number of its decision: the inverse of `decisions`."""
    tokens = model.rows_per_image
    return [router * tokens + token for router in model.router_of_layer for token in range(tokens)]


def router_margins(logits_BRN: Tensor, expert_BR: Tensor) -> Tensor:
    """How far each router prefers a given expert over the best other one, [B, R]; negative if it does not."""
    chosen_BR = logits_BRN.gather(2, expert_BR.unsqueeze(2)).squeeze(2)
    others_BRN = logits_BRN.scatter(2, expert_BR.unsqueeze(2), -torch.inf)
    return chosen_BR - others_BRN.amax(dim=2)


def steered_view(model: RoutedNetwork) -> Forward:
    """(images, pathways [B, L]) -> [logits of f_P, margin of each router along P], [B, classes + R]."""
    places = decisions(model)

    def forward(images: Tensor, pathways_BL: Tensor) -> Tensor:
        logits, routing = model.forward_with_routing(images, pathways_BL, tape_type=SteeredTape)
        assert routing.logits_BRN is not None
        return torch.cat((logits, router_margins(routing.logits_BRN, pathways_BL[:, places])), dim=1)

    return forward


def disturbed_view(model: RoutedNetwork) -> Forward:
    """(images, clean pathways [B, L]) -> [the model's logits, each router's margin for its clean choice]."""
    places = decisions(model)

    def forward(images: Tensor, pathways_BL: Tensor) -> Tensor:
        logits, routing = model.forward_with_routing(images, tape_type=SeeingTape)
        assert routing.logits_BRN is not None
        return torch.cat((logits, router_margins(routing.logits_BRN, pathways_BL[:, places])), dim=1)

    return forward


def steering_objective(labels_B: Tensor, num_classes: int) -> Objective:
    """CE on the target pathway, less the margins that routers still lack for it."""

    def objective(outputs: Tensor, rows: Tensor) -> Tensor:
        logits, margins = outputs[:, :num_classes], outputs[:, num_classes:]
        lacking = F.relu(SAFETY - margins).sum(dim=1)
        return F.cross_entropy(logits, labels_B[rows], reduction="none") - PENALTY * lacking

    return objective


def steered_and_wrong(labels_B: Tensor, num_classes: int) -> Won:
    """The image is on the target pathway and misclassified there."""

    def won(outputs: Tensor, rows: Tensor) -> Tensor:
        wrong = outputs[:, :num_classes].argmax(dim=1) != labels_B[rows]
        return wrong & (outputs[:, num_classes:] > 0).all(dim=1)

    return won


@dataclass
class _Victims:
    """Images not broken yet, each with its most promising adversarial version."""

    model: RoutedNetwork
    images: Tensor
    labels: Tensor
    adversarial: Tensor
    alive: Tensor
    """[B], bool."""

    def steer(self, pathways_BL: Tensor, attack: AttackConfig, start: Tensor) -> None:
        """Attack the images still alive along one target pathway each; successes are replayed on the model."""
        rows = self.alive.nonzero().squeeze(1)
        labels, classes = self.labels[rows], self.model.config.num_classes
        found = pgd(
            steered_view(self.model),
            self.images[rows],
            steering_objective(labels, classes),
            attack,
            start=start,
            won=steered_and_wrong(labels, classes),
            pathways_BL=pathways_BL,
        )
        with torch.no_grad():
            broken = self.model(found).argmax(dim=1) != labels
        self.adversarial[rows[broken]] = found[broken]
        self.alive[rows[broken]] = False


def route_attack(
    model: RoutedNetwork,
    images: Tensor,
    labels: Tensor,
    indices: Tensor,
    attack: AttackConfig,
    seed: int,
    *,
    observed_ML: Tensor,
    nearby: Tensor,
    config: RouteAttackConfig,
) -> tuple[Tensor, Tensor]:
    """Search the pathways for one on which the image can be broken.

    Args:
        model: an MoE-CNN in eval mode.
        images: [B, 3, H, W], classified correctly.
        labels: [B].
        indices: [B], the images' own numbers.
        attack: radius and steps for each pathway.
        seed: of the starts.
        observed_ML: pathways known from other images, clean or attacked.
        nearby: adversarial versions that another attack left behind, from which flips are looked for.
        config: how far to search.

    Returns:
        Adversarial images, and a mask [B] of those that no pathway broke.
    """
    victims = _Victims(
        model, images, labels, images.clone(), torch.ones(len(images), dtype=torch.bool, device=images.device)
    )
    everything = all_pathways(model, config.exhaustive)
    if everything is not None:
        for number, pathway_L in enumerate(everything.to(images.device)):
            _steer_from_random(victims, pathway_L.expand(int(victims.alive.sum()), -1), attack, indices, seed, number)
        return victims.adversarial, victims.alive
    ranked_BML = weakest_pathways(model, images, labels, observed_ML, config.sampled)
    for number in range(ranked_BML.shape[1]):
        _steer_from_random(victims, ranked_BML[victims.alive, number], attack, indices, seed, number)
    for number in range(config.greedy):
        if not victims.alive.any():
            break
        point = nearby[victims.alive]
        victims.steer(nearest_flips(model, point, number), attack, point)
    return victims.adversarial, victims.alive


def _steer_from_random(
    victims: _Victims, pathways_BL: Tensor, attack: AttackConfig, indices: Tensor, seed: int, number: int
) -> None:
    if len(pathways_BL):
        start = starts(victims.images[victims.alive], indices[victims.alive.cpu()], attack, seed, [number])
        victims.steer(pathways_BL, attack, start)


def all_pathways(model: RoutedNetwork, limit: int) -> Tensor | None:
    """Every pathway the routers could decide for, [N^R, L]; None if there are more than `limit`."""
    experts, choices = model.config.num_experts, len(decisions(model))
    if experts**choices > limit:
        return None
    choices_MR = torch.tensor(list(itertools.product(range(experts), repeat=choices)))
    return choices_MR[:, decision_of_place(model)]


@torch.no_grad()
def weakest_pathways(model: RoutedNetwork, images: Tensor, labels: Tensor, observed_ML: Tensor, number: int) -> Tensor:
    """For each image the `number` observed pathways on which the steering objective is highest, [B, number, L]."""
    objective, forward = steering_objective(labels, model.config.num_classes), steered_view(model)
    rows = torch.arange(len(images), device=images.device)
    score_MB = torch.stack(
        [objective(forward(images, pathway_L.expand(len(images), -1)), rows) for pathway_L in observed_ML]
    )
    best_BM = score_MB.topk(min(number, len(observed_ML)), dim=0).indices.T
    return observed_ML[best_BM]


@torch.no_grad()
def nearest_flips(model: RoutedNetwork, images: Tensor, rank: int) -> Tensor:
    """The pathway each image would take if the router with the (rank + 1)-th smallest margin took its second choice.

    Layers after that one are routed anew, [B, L].
    """
    places = decisions(model)
    routing = model.forward_with_routing(images)[1]
    assert routing.logits_BRN is not None
    pathway_BL, logits_BRN = routing.expert_index_BL, routing.logits_BRN
    margins_BR = router_margins(logits_BRN, pathway_BL[:, places])
    decision_B = margins_BR.argsort(dim=1)[:, min(rank, margins_BR.shape[1] - 1)]
    rows = torch.arange(len(images), device=images.device)
    second_B = logits_BRN[rows, decision_B].topk(2, dim=1).indices[:, 1]
    layer_L = torch.arange(pathway_BL.shape[1], device=images.device) // model.rows_per_image
    layer_B = layer_L[torch.tensor(places, device=images.device)[decision_B]]
    flipped_BL = torch.tensor(decision_of_place(model), device=images.device) == decision_B[:, None]
    wanted_BL = torch.where(layer_L > layer_B[:, None], -1, pathway_BL)
    wanted_BL = torch.where(flipped_BL, second_B[:, None], wanted_BL)
    return model.forward_with_routing(images, wanted_BL, tape_type=SteeredTape)[1].expert_index_BL


def attack_routers(
    model: RoutedNetwork,
    images: Tensor,
    labels: Tensor,
    indices: Tensor,
    pathways_BL: Tensor,
    attack: AttackConfig,
    seed: int,
) -> tuple[Tensor, Tensor]:
    """Push every router away from its clean choice, without a look at the label (RA-R).

    Returns:
        The images at the last step, and a mask [B] of those the model still classifies correctly.
    """
    classes = model.config.num_classes
    found = pgd(
        disturbed_view(model),
        images,
        lambda outputs, rows: -outputs[:, classes:].sum(dim=1),
        attack,
        start=starts(images, indices, attack, seed, [0]),
        pathways_BL=pathways_BL,
    )
    with torch.no_grad():
        return found, model(found).argmax(dim=1) == labels


def flip_radius(
    model: RoutedNetwork, images: Tensor, indices: Tensor, pathways_BL: Tensor, radii: list[float], seed: int
) -> Tensor:
    """The smallest of some ascending radii at which a router can be made to leave its clean choice, [B]; inf if none.

    Up to the first flip an image stays on its clean pathway, so the margins are attacked along that.
    """
    classes = model.config.num_classes
    radius_B = torch.full((len(images),), torch.inf, device=images.device)
    for radius in radii:
        rows = radius_B.isinf().nonzero().squeeze(1)
        if not len(rows):
            break
        attack = AttackConfig(eps=radius, steps=FLIP_STEPS, step_size=radius / 4)
        found = pgd(
            steered_view(model),
            images[rows],
            lambda outputs, _: -outputs[:, classes:].amin(dim=1),
            attack,
            start=starts(images[rows], indices[rows.cpu()], attack, seed, [0]),
            won=lambda outputs, _: (outputs[:, classes:] < 0).any(dim=1),
            pathways_BL=pathways_BL[rows],
        )
        with torch.no_grad():
            pathways = model.forward_with_routing(found)[1].expert_index_BL
        radius_B[rows[(pathways != pathways_BL[rows]).any(dim=1)]] = radius
    return radius_B


def attack_every_pathway(
    model: RoutedNetwork,
    images: Tensor,
    labels: Tensor,
    indices: Tensor,
    pathways_ML: Tensor,
    attack: AttackConfig,
    seed: int,
) -> tuple[Tensor, Tensor]:
    """A bound that no routing trick hides behind: which images are right whatever pathway they were given.

    Returns:
        Two masks [B]: right on all of the pathways when clean; and so under an attack on each of them too.
    """
    clean = torch.ones(len(images), dtype=torch.bool, device=images.device)
    with torch.no_grad():
        for pathway_L in pathways_ML:
            clean &= model(images, pathway_L.expand(len(images), -1)).argmax(dim=1) == labels
    robust = clean.clone()
    for pathway_L in pathways_ML:
        rows = robust.nonzero().squeeze(1)
        if len(rows):
            forced_BL = pathway_L.expand(len(rows), -1)
            survived = untargeted(
                model, images[rows], labels[rows], indices[rows.cpu()], attack, seed, pathways_BL=forced_BL
            )[1]
            robust[rows] = survived
    return clean, robust
