"""Attacks on the routing: they move images onto weak pathways, flip routers, or attack the experts alone.

With a fixed pathway P, a network is an ordinary CNN f_P. The model computes f_P(x) wherever all
routers along P choose P. The attack on the model therefore splits into one constrained problem per
pathway, and no problem needs a gradient through an argmax:

    maximize CE(f_P(x'), y)  subject to  margin_r(x'; P) > 0 for every router r.

With few routers, the route attack tries all pathways. Otherwise it tries some pathways of other
images, those whose objective is highest at the clean image, and then the pathways one flip away
from the pathway where another attack ended. The constraint is a penalty in the objective. Every
success is checked on the model itself.

Shape suffixes: B batch, L MoE layers (times tokens where those are routed), M pathways, N experts,
R routers (likewise).
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from advmoe.attacks.pgd import Forward, Objective, Won, forced, pgd
from advmoe.attacks.relaxations import SeeingTape, SteeredTape
from advmoe.attacks.untargeted import untargeted
from advmoe.attacks.victims import Victims
from advmoe.config import AttackConfig, check
from advmoe.models.network import RoutedNetwork

PENALTY = 5.0
"""Weight of a violated router margin against the cross-entropy, both in nats."""
SAFETY = 0.05
"""Margin up to which the penalty pushes a router. It is above 0, so that rounding does not undo the flip."""
FLIP_STEPS = 10
"""Steps of the attack that finds the smallest radius at which a router flips."""


@dataclass(frozen=True, kw_only=True)
class RouteAttackConfig:
    """Limits of the route attack's search."""

    exhaustive: int = 16
    """The attack tries all pathways if there are at most this many."""
    sampled: int = 4
    """Otherwise: number of other images' pathways that it tries on each image, those with the
    highest steering objective at the clean image first (see `closest_pathways`)."""
    greedy: int = 4
    """Otherwise: number of attempts then on pathways one flip away from the one where another attack
    ended (see `nearest_flips`)."""

    def __post_init__(self) -> None:
        for name in ("exhaustive", "sampled", "greedy"):
            number = getattr(self, name)
            check(number >= 0, f"{name} of the route attack must not be negative, got {number}")
        check(self.attempts >= 1, "the route attack needs an attempt or more, got sampled 0 and greedy 0")

    @property
    def attempts(self) -> int:
        """Attempts on each image. If the attack tries all pathways and there are more, one on each."""
        return self.sampled + self.greedy


def decisions(model: RoutedNetwork) -> list[int]:
    """Positions in a pathway [L] that are independent decisions, in the order of the routers.

    Layers that share a router repeat its decision. Where tokens are routed, each token is a
    decision.
    """
    layers, tokens = list(model.router_of_layer), model.rows_per_image
    return [layers.index(router) * tokens + token for router in range(len(model.routers)) for token in range(tokens)]


def decision_of_place(model: RoutedNetwork) -> list[int]:
    """The number of the decision at each position of a pathway [L]: the inverse of `decisions`."""
    tokens = model.rows_per_image
    return [router * tokens + token for router in model.router_of_layer for token in range(tokens)]


def router_margins(logits_BRN: Tensor, expert_BR: Tensor) -> Tensor:
    """Margin by which each router prefers a given expert to the best other one, [B, R]; negative if
    it prefers the other.
    """
    chosen_BR = logits_BRN.gather(2, expert_BR.unsqueeze(2)).squeeze(2)
    others_BRN = logits_BRN.scatter(2, expert_BR.unsqueeze(2), -torch.inf)
    return chosen_BR - others_BRN.amax(dim=2)


def steered_view(model: RoutedNetwork, pathways_BL: Tensor) -> Forward:
    """[logits of f_P, margin of each router along P], [b, classes + R], where P is the image's row of `pathways_BL`."""
    chosen_BR = pathways_BL[:, decisions(model)]  # not in each pass, where a GPU would wait for the list

    def forward(images: Tensor, rows: Tensor) -> Tensor:
        logits, routing = model.forward_with_routing(images, pathways_BL[rows], tape_type=SteeredTape)
        assert routing.logits_BRN is not None
        return torch.cat((logits, router_margins(routing.logits_BRN, chosen_BR[rows])), dim=1)

    return forward


def disturbed_view(model: RoutedNetwork, pathways_BL: Tensor) -> Forward:
    """[the model's logits, each router's margin for the image's clean choice], [b, classes + R]."""
    chosen_BR = pathways_BL[:, decisions(model)]

    def forward(images: Tensor, rows: Tensor) -> Tensor:
        logits, routing = model.forward_with_routing(images, tape_type=SeeingTape)
        assert routing.logits_BRN is not None
        return torch.cat((logits, router_margins(routing.logits_BRN, chosen_BR[rows])), dim=1)

    return forward


def disturbing(objective: Objective, num_classes: int) -> Objective:
    """An objective of the logits, minus the margins by which routers still prefer their clean choice."""

    def both(outputs: Tensor, rows: Tensor) -> Tensor:
        kept = F.relu(SAFETY + outputs[:, num_classes:]).sum(dim=1)
        return objective(outputs[:, :num_classes], rows) - kept

    return both


def steering_objective(labels_B: Tensor, num_classes: int) -> Objective:
    """CE on the target pathway, minus the margins by which routers still miss it."""

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


def steer(victims: Victims, pathways_BL: Tensor, start: Tensor) -> tuple[Tensor, Tensor]:
    """Attack each image along one target pathway.

    The attack stops where the steered pass is wrong and all routers agree with the pathway. The
    model itself then judges the image, because it may round differently. An image that it gets
    right after all was not broken, and is left to the next attempt.

    Returns:
        The images at the last step, or at the step where they won, and a mask [B] of images that
            the model still classifies correctly.
    """
    model, labels = victims.network, victims.labels
    classes = model.config.num_classes
    found = pgd(
        steered_view(model, pathways_BL),
        victims.images,
        steering_objective(labels, classes),
        victims.attack,
        start=start,
        won=steered_and_wrong(labels, classes),
    )
    return found, victims.right(found)


def route_attack(
    victims: Victims, *, observed_ML: Tensor, nearby: Tensor, config: RouteAttackConfig
) -> tuple[Tensor, Tensor]:
    """Search for a pathway on which the image can be broken.

    Args:
        victims: Images that an MoE-CNN classifies correctly. The attack's steps are spent on each
            pathway.
        observed_ML: Pathways of other images, clean or attacked.
        nearby: Adversarial versions that another attack left behind; the nearest flips are looked
            for from there.
        config: Limits of the search.

    Returns:
        Adversarial images, and a mask [B] of those that no pathway broke.
    """
    model, device = victims.network, victims.images.device
    adversarial = victims.images.clone()
    alive = torch.ones(len(victims), dtype=torch.bool, device=device)

    def attempt(pathways_BL: Tensor, start: Tensor) -> None:
        rows = alive.nonzero().squeeze(1)
        found, right = steer(victims.take(rows), pathways_BL, start)
        adversarial[rows[~right]] = found[~right]
        alive[rows[~right]] = False

    # The image's own pathway is one of all. It takes no other's place, and no other attack keeps the image on it.
    # Few pathways are tried again from other starts, so that every network gets at least as many attempts.
    everything = all_pathways(model, config.exhaustive)
    if everything is None:
        targets_BML = closest_pathways(victims, observed_ML, config.sampled)
    else:
        rounds = -(-config.attempts // len(everything))
        targets = everything.repeat(rounds, 1)[: max(config.attempts, len(everything))]
        targets_BML = targets.to(device).expand(len(victims), -1, -1)
    for number in range(targets_BML.shape[1]):
        if alive.any():
            attempt(targets_BML[alive, number], victims.take(alive).starts([number]))
    if everything is None and config.greedy and alive.any():
        left = alive.nonzero().squeeze(1)  # the attempts above broke the others
        targets_BML, again_BM = flips_to_try(victims.take(left), nearby[left], config.greedy)
        for number in range(config.greedy):
            still = alive[left]
            if still.any():
                rows, again = left[still], again_BM[still, number]  # the first time, the flip was tried from nearby
                start = nearby[rows]
                start[again] = victims.take(rows[again]).starts([config.sampled + number])
                attempt(targets_BML[still, number], start)
    return adversarial, alive


def all_pathways(model: RoutedNetwork, limit: int) -> Tensor | None:
    """Every pathway that the routers can choose, [N^R, L]; None if there are more than `limit`."""
    experts, choices = model.config.num_experts, len(decisions(model))
    if experts**choices > limit:
        return None
    choices_MR = torch.tensor(list(itertools.product(range(experts), repeat=choices)))
    return choices_MR[:, decision_of_place(model)]


@torch.no_grad()
def closest_pathways(victims: Victims, observed_ML: Tensor, number: int) -> Tensor:
    """For each image the `number` observed pathways on which the steering objective is highest, [B, number, L].

    The objective is that of the clean image. There the penalty of the margins is mostly far larger
    than the cross-entropy, so the first pathways are those that the routers nearly take, and not
    those on which the experts are weakest. The image's own pathway has no penalty, but PGD on the
    model attacks it already. It is a target only if there is no other. If fewer than `number` others
    were observed, they are targets again.
    """
    model, images = victims.network, victims.images
    objective = steering_objective(victims.labels, model.config.num_classes)
    rows = torch.arange(len(victims), device=images.device)
    score_MB = torch.stack(
        [
            objective(steered_view(model, pathway_L.expand(len(victims), -1))(images, rows), rows)
            for pathway_L in observed_ML
        ]
    )
    order_BM = score_MB.argsort(dim=0, descending=True).T
    own_BL = model.forward_with_routing(images)[1].expert_index_BL
    own_BM = (observed_ML == own_BL[:, None]).all(dim=2).gather(1, order_BM)
    return observed_ML[order_BM.gather(1, _others_in_turn(own_BM, number)[0])]


@torch.no_grad()
def flips_to_try(victims: Victims, nearby: Tensor, number: int) -> tuple[Tensor, Tensor]:
    """For each image `number` of the flips nearest to where another attack ended, but not its own pathway.

    A flip there may lead back to the clean image's own pathway. As in `closest_pathways`, it is a
    target only if there is no other.

    Returns:
        Pathways [B, number, L], and which of them come a second time because there are fewer, bool
        [B, number].
    """
    flips_BML = nearest_flips(victims.network, nearby, number + 1)
    own_BL = victims.network.forward_with_routing(victims.images)[1].expert_index_BL
    place_BM, again_BM = _others_in_turn((flips_BML == own_BL[:, None]).all(dim=2), number)
    return flips_BML[torch.arange(len(victims), device=place_BM.device)[:, None], place_BM], again_BM


def _others_in_turn(own_BM: Tensor, number: int) -> tuple[Tensor, Tensor]:
    """Places of the candidates that are not an image's own pathway, in order, then from the first again, [B, number].

    Returns:
        The places, and which of them come again, bool [B, number].
    """
    others_BM = own_BM.int().argsort(dim=1, stable=True)
    count_B = (~own_BM).sum(dim=1).clamp_min(1)
    turn = torch.arange(number, device=own_BM.device)
    return others_BM.gather(1, turn % count_B[:, None]), turn >= count_B[:, None]


@torch.no_grad()
def nearest_flips(model: RoutedNetwork, images: Tensor, number: int) -> Tensor:
    """The pathways that differ from an image's pathway in one router's decision, the nearest first, [B, number, L].

    First come the second choices of all routers, the smallest margin first, then their third
    choices, and so on. The layers after the router are routed anew. All R (N - 1) flips differ; if
    fewer than `number` exist, the result has them all.
    """
    places, decision_L = decisions(model), decision_of_place(model)
    routing = model.forward_with_routing(images)[1]
    assert routing.logits_BRN is not None
    pathway_BL, logits_BRN = routing.expert_index_BL, routing.logits_BRN
    chosen_BR1 = pathway_BL[:, places].unsqueeze(2)
    choice_BRN = logits_BRN.scatter(2, chosen_BR1, torch.inf).argsort(dim=2, descending=True)
    margin_BRN = logits_BRN.gather(2, chosen_BR1) - logits_BRN.gather(2, choice_BRN)
    rows = torch.arange(len(images), device=images.device)
    layer_L = torch.arange(pathway_BL.shape[1], device=images.device) // model.rows_per_image
    layer_R, of_place_L = layer_L[places], torch.tensor(decision_L, device=images.device)
    flips = []
    for rank in range(min(number, len(places) * (logits_BRN.shape[2] - 1))):
        choice, place = 1 + rank // len(places), rank % len(places)
        decision_B = margin_BRN[:, :, choice].argsort(dim=1)[:, place]
        expert_B = choice_BRN[rows, decision_B, choice]
        wanted_BL = torch.where(layer_L > layer_R[decision_B][:, None], -1, pathway_BL)
        wanted_BL = torch.where(of_place_L == decision_B[:, None], expert_B[:, None], wanted_BL)
        flips.append(model.forward_with_routing(images, wanted_BL, tape_type=SteeredTape)[1].expert_index_BL)
    return torch.stack(flips, dim=1)


def attack_routers(victims: Victims, pathways_BL: Tensor) -> tuple[Tensor, Tensor]:
    """Push every router away from its clean choice, without using the label (RA-R).

    Returns:
        The images at the last step, and a mask [B] of those that the model still classifies
        correctly.
    """
    classes = victims.network.config.num_classes
    found = pgd(
        disturbed_view(victims.network, pathways_BL),
        victims.images,
        lambda outputs, rows: -outputs[:, classes:].sum(dim=1),
        victims.attack,
        start=victims.starts(),
    )
    return found, victims.right(found)


def flip_radius(victims: Victims, pathways_BL: Tensor, radii: list[float]) -> Tensor:
    """The smallest of some ascending radii at which some router leaves its clean choice, [B]; inf if none does.

    Before the first flip an image stays on its clean pathway, so the attack uses the margins along
    that pathway.
    """
    model = victims.network
    classes = model.config.num_classes
    radius_B = torch.full((len(victims),), torch.inf, device=victims.images.device)
    for radius in radii:
        rows = radius_B.isinf().nonzero().squeeze(1)
        if not len(rows):
            break
        left = victims.take(rows).under(AttackConfig(eps=radius, steps=FLIP_STEPS, step_size=radius / 4))
        found = pgd(
            steered_view(model, pathways_BL[rows]),
            left.images,
            lambda outputs, _: -outputs[:, classes:].amin(dim=1),
            left.attack,
            start=left.starts(),
            won=lambda outputs, _: (outputs[:, classes:] < 0).any(dim=1),
        )
        with torch.no_grad():
            pathways = model.forward_with_routing(found)[1].expert_index_BL
        radius_B[rows[(pathways != pathways_BL[rows]).any(dim=1)]] = radius
    return radius_B


def attack_every_pathway(victims: Victims, pathways_ML: Tensor) -> tuple[Tensor, Tensor]:
    """The images that are right on every pathway, so that the choice of the routers does not matter.

    The second figure is empirical and optimistic as any robust accuracy: it counts the images on
    which PGD fails on each pathway.

    Returns:
        Two masks [B]: right on all of the pathways when clean, and right on all of them under an
        attack on each.
    """
    model = victims.network
    clean = torch.ones(len(victims), dtype=torch.bool, device=victims.images.device)
    with torch.no_grad():
        for pathway_L in pathways_ML:
            logits = model(victims.images, pathway_L.expand(len(victims), -1))
            clean &= logits.argmax(dim=1) == victims.labels
    robust = clean.clone()
    for pathway_L in pathways_ML:
        rows = robust.nonzero().squeeze(1)
        if len(rows):
            robust[rows] = untargeted(victims.take(rows), forced(model, pathway_L.expand(len(rows), -1)))[1]
    return clean, robust
