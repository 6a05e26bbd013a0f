"""Views of the routing, and attacks that search pathways."""

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from rooms import THRESHOLD, TwoRooms, room_images
from torch import Tensor
from under_attack import victims_of

from advmoe.attacks.pathways import (
    RouteAttackConfig,
    all_pathways,
    attack_every_pathway,
    attack_routers,
    closest_pathways,
    decisions,
    flip_radius,
    flips_to_try,
    nearest_flips,
    route_attack,
    router_margins,
    steer,
)
from advmoe.attacks.pgd import GradientCount, forced
from advmoe.attacks.relaxations import SteeredTape, routing_views
from advmoe.attacks.untargeted import untargeted
from advmoe.attacks.victims import Victims
from advmoe.config import AttackConfig
from advmoe.config.attack import AttackStart
from advmoe.errors import ConfigError
from advmoe.models.network import RoutedNetwork

EPS = 8 / 255
ATTACK = AttackConfig(eps=EPS, steps=10, step_size=2 / 255)
NEAR = THRESHOLD - 4 / 255
"""Red of an image that the router can be pushed over the threshold within EPS."""
FAR = THRESHOLD - 16 / 255
"""Red of an image that cannot."""


@pytest.fixture
def mixed(tiny_vgg: Callable[..., RoutedNetwork]) -> Callable[..., RoutedNetwork]:
    """Untrained networks with experts of their own and BatchNorm statistics that fit noise images, so that routers and
    predictions vary."""

    def make(**settings: object) -> RoutedNetwork:
        net = tiny_vgg(seed=3, **settings)
        for parameter in net.parameters():
            if parameter.ndim == 4:  # experts start out equal
                torch.nn.init.kaiming_normal_(parameter)
        for _ in range(20):
            net(torch.rand(32, 3, 32, 32))
        return net.eval()

    return make


@pytest.mark.parametrize("granularity", ["layer", "stage", "image"])
def test_every_view_has_the_outputs_of_the_model_and_a_gradient_of_its_own(
    mixed: Callable[..., RoutedNetwork], images: Tensor, granularity: str
) -> None:
    model = mixed(granularity=granularity)
    expected = model(images)
    gradients = []
    for forward in routing_views(model).values():
        x = images.clone().requires_grad_()
        logits = forward(x, torch.arange(len(x)))
        torch.testing.assert_close(logits, expected)  # the mixture convolves in other groups: rounding
        gradients.append(torch.autograd.grad(F.cross_entropy(logits, logits.argmax(dim=1)), x)[0])
    for number, gradient in enumerate(gradients):
        assert gradient.isfinite().all()
        assert not any(torch.equal(gradient, other) for other in gradients[:number])


def test_a_network_without_routers_has_one_view(tiny_vgg: Callable[..., RoutedNetwork], images: Tensor) -> None:
    model = tiny_vgg(kind="s_dense").eval()
    views = routing_views(model)
    assert list(views) == ["own"]
    assert torch.equal(views["own"](images, torch.arange(8)), model(images))


def test_the_mixtures_gradient_is_that_of_all_experts_weighted_by_the_softmax() -> None:
    # Class 0's logit of the mixture is p0 * 4 g, with p0 = 1 / (1 + exp(20 (red - 1/2) / T)). At
    # red = 1/2, T = 10: p0 = 1/2, d p0 / d red = -(1/4) * 20 / 10 = -1/2, so d logit / d red = -2
    # g, and d logit / d green = 4 p0 = 2.
    images = room_images(THRESHOLD, green=0.75).requires_grad_()
    logits = routing_views(TwoRooms())["mixture@10"](images, torch.arange(1))
    (gradient,) = torch.autograd.grad(logits[0, 0], images)
    red, green, blue = gradient.sum(dim=(0, 2, 3)).tolist()
    assert (red, green, blue) == pytest.approx((-1.5, 2.0, 0.0))


@pytest.mark.parametrize(
    ("name", "finds_the_trap"),
    [
        ("straight_through", False),
        ("detached", False),
        ("softmax", True),
        ("advantage", True),
        ("mixture@1", True),
        ("mixture@10", True),
    ],
)
def test_views_differ_in_what_they_can_break(name: str, finds_the_trap: bool) -> None:
    # The chosen router logit is the constant 0, so straight-through sees no way to the other
    # expert.
    model = TwoRooms()
    victims = victims_of(model, room_images(NEAR, FAR), torch.tensor([0, 0]), ATTACK)
    robust = untargeted(victims, routing_views(model)[name])[1]
    assert robust.tolist() == [not finds_the_trap, True]


def test_zero_gradients_are_counted() -> None:
    # Without weights expert 0's logits are constant, and the detached view sees no router: no
    # gradient in 10 steps.
    model, count = TwoRooms(), GradientCount()
    torch.nn.init.zeros_(model.conv.weight)
    untargeted(victims_of(model, room_images(FAR), torch.tensor([0]), ATTACK), count=count)
    assert (count.taken, count.zero, count.zero_share) == (10, 10, 1.0)


def route(
    model: RoutedNetwork, images: Tensor, labels: Tensor, attack: AttackConfig = ATTACK, **settings: int
) -> tuple[Tensor, Tensor]:
    with torch.no_grad():
        observed = model.forward_with_routing(images)[1].expert_index_BL.unique(dim=0)
    victims = victims_of(model, images, labels, attack)
    return route_attack(victims, observed_ML=observed, nearby=images, config=RouteAttackConfig(**settings))


def test_the_route_attack_finds_every_trap_in_reach_and_no_other() -> None:
    images = room_images(NEAR, FAR)
    found, robust = route(TwoRooms(), images, torch.tensor([0, 0]))
    assert robust.tolist() == [False, True]
    assert TwoRooms()(found).argmax(dim=1).tolist() == [1, 0]
    assert (found - images).abs().max() <= EPS + 1e-6
    assert found.min() >= 0.0
    assert found.max() <= 1.0


def test_successes_of_the_route_attack_hold_on_the_model_itself(mixed: Callable[..., RoutedNetwork]) -> None:
    model, images = mixed(), torch.rand(16, 3, 32, 32, generator=torch.Generator().manual_seed(5))
    labels = model(images).argmax(dim=1)
    attack = AttackConfig(eps=0.1 / 255, steps=4, step_size=0.04 / 255)
    found, robust = route(model, images, labels, attack, sampled=2, greedy=2)
    assert 0 < int(robust.sum()) < 16
    assert torch.equal(model(found).argmax(dim=1) == labels, robust)
    assert (found - images).abs().max() <= attack.eps + 1e-6


def test_all_pathways_are_the_routers_choices_or_too_many(mixed: Callable[..., RoutedNetwork]) -> None:
    pathways = all_pathways(mixed(granularity="image", num_experts=3, model_scale=0.25), limit=3)
    assert pathways is not None
    assert pathways.tolist() == [[0] * 12, [1] * 12, [2] * 12]
    assert all_pathways(mixed(), limit=2**12 - 1) is None


def test_a_steered_pass_is_the_model_where_all_routers_agree(
    mixed: Callable[..., RoutedNetwork], images: Tensor
) -> None:
    model = mixed()
    logits, routing = model.forward_with_routing(images)
    for wanted in (routing.expert_index_BL, torch.full_like(routing.expert_index_BL, -1)):
        steered, along = model.forward_with_routing(images, wanted, tape_type=SteeredTape)
        assert torch.equal(steered, logits)
        assert torch.equal(along.expert_index_BL, routing.expert_index_BL)
        assert (router_margins(along.logits_BRN, along.expert_index_BL[:, decisions(model)]) >= 0).all()


def test_margins_are_to_the_best_other_expert() -> None:
    logits = torch.tensor([[[1.0, 4.0, 2.0]]])
    margins = [router_margins(logits, torch.tensor([[expert]])).item() for expert in range(3)]
    assert margins == [-3.0, 2.0, -2.0]


@pytest.mark.parametrize("rank", [0, 1, 2])
def test_a_flip_changes_its_router_and_nothing_before_it_and_frees_what_follows(
    mixed: Callable[..., RoutedNetwork], images: Tensor, rank: int
) -> None:
    model = mixed(granularity="stage")
    routing = model.forward_with_routing(images)[1]
    places = decisions(model)
    margins = router_margins(routing.logits_BRN, routing.expert_index_BL[:, places])
    flipped = nearest_flips(model, images, rank + 1)[:, rank]
    along = model.forward_with_routing(images, flipped, tape_type=SteeredTape)[1]
    new = router_margins(along.logits_BRN, flipped[:, places])
    for image in range(len(images)):
        decision = int(margins[image].argsort()[rank])
        layer = places[decision]
        assert torch.equal(flipped[image, :layer], routing.expert_index_BL[image, :layer])
        assert flipped[image, layer] == 1 - routing.expert_index_BL[image, layer]
        assert (new[image, decision + 1 :] >= 0).all()


def test_flips_go_on_with_later_choices_and_none_comes_twice(
    mixed: Callable[..., RoutedNetwork], images: Tensor
) -> None:
    model = mixed(num_experts=5, routed="last-2-blocks", model_scale=0.25)
    logits_BRN = model.forward_with_routing(images)[1].logits_BRN
    assert logits_BRN is not None
    flips = nearest_flips(model, images, 99)
    assert flips.shape[1] == 2 * 4  # two routers, four other experts each
    for image, choices in enumerate(logits_BRN.argsort(dim=2, descending=True)):
        assert len(flips[image].unique(dim=0)) == 8
        for number, flip in enumerate(flips[image].tolist()):
            changed = int(flip[0] == choices[0, 0])  # the first router whose decision is another one
            assert flip[changed] == choices[changed, 1 + number // 2]


@pytest.mark.parametrize(
    ("settings", "distinct"),
    [
        ({"num_experts": 5, "routed": "last-2-blocks"}, 6),  # two routers have no four second choices
        ({"num_experts": 3, "granularity": "image"}, 2),  # one router has no four other choices
    ],
)
def test_attempts_on_flips_differ_in_pathway_or_start(
    mixed: Callable[..., RoutedNetwork], monkeypatch: pytest.MonkeyPatch, settings: dict[str, Any], distinct: int
) -> None:
    tried: dict[int, list[tuple[bytes, bytes]]] = {}

    def watched(victims: Victims, pathways_BL: Tensor, start: Tensor) -> tuple[Tensor, Tensor]:
        for number, pathway, first in zip(victims.indices.tolist(), pathways_BL, start, strict=True):
            tried.setdefault(number, []).append((pathway.numpy().tobytes(), first.numpy().tobytes()))
        return start, torch.ones(len(victims), dtype=torch.bool)

    monkeypatch.setattr("advmoe.attacks.pathways.steer", watched)
    model, images = mixed(model_scale=0.25, **settings), torch.rand(6, 3, 32, 32)
    route(model, images, torch.zeros(6, dtype=torch.int64), exhaustive=1, sampled=2, greedy=6)
    assert tried.keys() == set(range(6))
    for attempts in tried.values():
        assert len(set(attempts)) == len(attempts) == 8
        assert len({pathway for pathway, _ in attempts[2:]}) == distinct


def test_a_flip_that_leads_back_to_the_own_pathway_is_no_target(mixed: Callable[..., RoutedNetwork]) -> None:
    model, images = mixed(num_experts=3, granularity="image", model_scale=0.25), torch.rand(16, 3, 32, 32)
    victims = victims_of(model, images, torch.zeros(16, dtype=torch.int64), ATTACK)
    own, there = (model.forward_with_routing(each)[1].expert_index_BL[:, 0] for each in (images, images.flip(0)))
    pathways, again = flips_to_try(victims, images.flip(0), 2)
    assert (own != there).any()
    for image, (first, second) in enumerate(pathways[:, :, 0].tolist()):
        assert own[image] not in (first, second)
        assert there[image] not in (first, second)
        assert again[image].tolist() == [False, bool(own[image] != there[image])]  # then only one is left
        assert (first == second) == bool(own[image] != there[image])


def test_flips_are_computed_for_images_that_are_left_and_are_those_of_the_whole_batch(
    mixed: Callable[..., RoutedNetwork], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, images = mixed(), torch.rand(16, 3, 32, 32, generator=torch.Generator().manual_seed(5))
    labels = model(images).argmax(dim=1)
    attack = AttackConfig(eps=0.1 / 255, steps=4, step_size=0.04 / 255)
    everyone, computed = victims_of(model, images, labels, attack), []

    def of_all(victims: Victims, nearby: Tensor, number: int) -> tuple[Tensor, ...]:
        computed.append(victims.indices)
        return tuple(each[victims.indices] for each in flips_to_try(everyone, images, number))

    first = route(model, images, labels, attack, sampled=2, greedy=0)[1]
    found, robust = route(model, images, labels, attack, sampled=2, greedy=3)
    monkeypatch.setattr("advmoe.attacks.pathways.flips_to_try", of_all)
    assert torch.equal(found, route(model, images, labels, attack, sampled=2, greedy=3)[0])
    assert [rows.tolist() for rows in computed] == [first.nonzero().squeeze(1).tolist()]
    assert 0 < int(robust.sum()) < int(first.sum()) < 16


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"sampled": -1}, "sampled of the route attack must not be negative, got -1"),
        ({"exhaustive": -1}, "exhaustive of the route attack must not be negative, got -1"),
        ({"greedy": -2}, "greedy of the route attack must not be negative, got -2"),
        ({"sampled": 0, "greedy": 0}, "needs an attempt or more, got sampled 0 and greedy 0"),
    ],
)
def test_a_route_attack_without_attempts_is_refused(settings: dict[str, int], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        RouteAttackConfig(**settings)


def test_one_attempt_is_enough_to_try_all_pathways() -> None:
    assert route(TwoRooms(), room_images(NEAR), torch.tensor([0]), sampled=1, greedy=0)[1].tolist() == [False]


def test_the_own_pathway_is_no_target_while_there_is_another() -> None:
    # At these images the own pathway has the higher objective: 0.1 on expert 0, 1.3 - 6.5 on expert 1.
    observed = torch.tensor([[0], [1]])
    victims = victims_of(TwoRooms(), room_images(FAR, THRESHOLD + 16 / 255), torch.tensor([0, 1]), ATTACK)
    assert closest_pathways(victims, observed, 1).tolist() == [[[1]], [[0]]]
    assert closest_pathways(victims, observed, 3).tolist() == [[[1]] * 3, [[0]] * 3]
    assert closest_pathways(victims.take(torch.tensor([0])), observed[:1], 2).tolist() == [[[0]] * 2]


def test_the_closest_other_pathways_come_first(mixed: Callable[..., RoutedNetwork], images: Tensor) -> None:
    model = mixed()
    victims = victims_of(model, images, model(images).argmax(dim=1), ATTACK)
    own = model.forward_with_routing(images)[1].expert_index_BL[0]
    near, far = own.clone(), 1 - own
    near[-1] = 1 - near[-1]  # one decision away, and no later layer depends on it
    found = closest_pathways(victims, torch.stack([own, far, near]), 3)[0]
    assert torch.equal(found, torch.stack([near, far, near]))


def test_no_attempt_of_the_route_attack_is_spent_on_the_own_pathway(
    mixed: Callable[..., RoutedNetwork], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, images = mixed(), torch.rand(16, 3, 32, 32, generator=torch.Generator().manual_seed(5))
    own = model.forward_with_routing(images)[1].expert_index_BL
    tried = torch.zeros(16, dtype=torch.int64)

    def watched(victims: Victims, pathways_BL: Tensor, start: Tensor) -> tuple[Tensor, Tensor]:
        assert not (pathways_BL == own[victims.indices]).all(dim=1).any()
        tried[victims.indices] += 1
        return steer(victims, pathways_BL, start)

    monkeypatch.setattr("advmoe.attacks.pathways.steer", watched)
    attack = AttackConfig(eps=0.1 / 255, steps=2, step_size=0.04 / 255)
    _, robust = route(model, images, model(images).argmax(dim=1), attack, sampled=3, greedy=0)
    assert robust.any()
    assert (tried[robust] == 3).all()


def test_experts_alone_are_robust_where_only_the_router_is_weak() -> None:
    victims = victims_of(TwoRooms(), room_images(NEAR, FAR), torch.tensor([0, 0]), ATTACK)
    pathways = torch.zeros(2, 1, dtype=torch.int64)
    robust = untargeted(victims, forced(victims.model, pathways))[1]
    assert robust.tolist() == [True, True]
    _, right = attack_routers(victims, pathways)
    assert right.tolist() == [False, True]


def test_the_flip_radius_is_the_first_one_that_reaches_the_threshold() -> None:
    # 4/255 and 16/255 below the threshold: of 2, 6 and 12 (/255) the first to reach it are 6 and
    # none.
    victims = victims_of(TwoRooms(), room_images(NEAR, FAR), torch.tensor([0, 0]), ATTACK)
    radius = flip_radius(victims, torch.zeros(2, 1, dtype=torch.int64), [2 / 255, 6 / 255, 12 / 255])
    assert radius.tolist() == pytest.approx([6 / 255, float("inf")])


def test_an_image_is_right_on_every_pathway_only_if_the_trap_is_too() -> None:
    victims = victims_of(TwoRooms(), room_images(FAR, FAR), torch.tensor([0, 1]), ATTACK)
    both = torch.tensor([[0], [1]])
    clean, robust = attack_every_pathway(victims, both)
    assert (clean.tolist(), robust.tolist()) == ([False, False], [False, False])
    clean, robust = attack_every_pathway(victims, both[:1])
    assert (clean.tolist(), robust.tolist()) == ([True, False], [True, False])


def test_restarts_side_by_side_are_those_one_by_one(mixed: Callable[..., RoutedNetwork]) -> None:
    model, images = mixed(), torch.rand(12, 3, 32, 32, generator=torch.Generator().manual_seed(6))
    attack = AttackConfig(eps=1 / 255, steps=2, step_size=1 / 255, restarts=6)
    victims = victims_of(model, images, model(images).argmax(dim=1), attack)
    together, robust = untargeted(victims)
    assert 0 < int(robust.sum()) < 12
    for image in range(12):  # a batch of one leaves no room for two restarts at a time
        alone, survived = untargeted(victims.take(torch.tensor([image])))
        assert survived.item() == robust[image].item()
        differing = (
            alone - together[image]
        ).abs() > 1e-5  # rounding of the batch may turn the sign of a gradient near 0
        assert differing.float().mean() < 0.01


def test_a_later_restart_keeps_each_image_on_its_own_pathway() -> None:
    attack = dataclasses.replace(ATTACK, restarts=3)
    victims = victims_of(TwoRooms(), room_images(FAR, FAR), torch.tensor([0, 0]), attack)
    robust = untargeted(victims, forced(victims.model, torch.tensor([[1], [0]])))[1]
    assert robust.tolist() == [False, True]


@pytest.mark.parametrize("start", ["uniform", "clean"])
def test_each_attempt_of_the_route_attack_has_a_start_of_its_own(
    start: AttackStart, monkeypatch: pytest.MonkeyPatch
) -> None:
    starts: list[Tensor] = []

    def watched(victims: Victims, pathways_BL: Tensor, start: Tensor) -> tuple[Tensor, Tensor]:
        starts.append(start)
        return steer(victims, pathways_BL, start)

    monkeypatch.setattr("advmoe.attacks.pathways.steer", watched)
    attack = dataclasses.replace(ATTACK, start=start)
    victims = victims_of(TwoRooms(), room_images(FAR), torch.tensor([0]), attack)
    route_attack(victims, observed_ML=torch.tensor([[0]]), nearby=victims.images, config=RouteAttackConfig())
    assert len(starts) == len({first.numpy().tobytes() for first in starts}) == 8
    for number, first in enumerate(starts):
        assert torch.equal(first, victims.starts([number]))
    assert torch.equal(starts[0], victims.images) == (start == "clean")
