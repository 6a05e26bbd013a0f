"""Expert layouts, routers, and the routing tape."""

import copy
import itertools
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from advmoe.errors import ConfigError
from advmoe.models.experts import ExpertLayout, scaled_channels
from advmoe.models.network import RoutedNetwork
from advmoe.models.router import Router
from advmoe.models.routing import gate


def layout(num_channels: int, num_experts: int, model_scale: float, *, separate: bool = False) -> ExpertLayout:
    return ExpertLayout(num_channels=num_channels, num_experts=num_experts, model_scale=model_scale, separate=separate)


@pytest.mark.parametrize(
    ("num_channels", "num_experts", "model_scale", "channels"),
    [
        # N r = 1: halves, no channel left over, none shared.
        (8, 2, 0.5, [(0, 1, 2, 3), (4, 5, 6, 7)]),
        # N r < 1: 2 of 8 channels each, starting at 0 and 4; channels 2, 3, 6 and 7 belong to no
        # expert.
        (8, 2, 0.25, [(0, 1), (4, 5)]),
        # N r > 1: windows 0 1 2, 2 3 4, 4 5 0. Channel 2 stays in slot 2, and 3 and 4 fill the
        # other two; then 4 stays in slot 1 and 0 in slot 0, and 5 gets what is left.
        (6, 3, 0.5, [(0, 1, 2), (3, 4, 2), (0, 4, 5)]),
        # 8 of 10 each, starting at 0, round(3.33) = 3, round(6.67) = 7: two of the three windows
        # wrap. 8 and 9 replace 1 and 2; in the third window, where all meet but 5 and 6, 1 and 2
        # have to go to the slots of those.
        (10, 3, 0.8, [(0, 1, 2, 3, 4, 5, 6, 7), (0, 8, 9, 3, 4, 5, 6, 7), (0, 8, 9, 3, 4, 1, 2, 7)]),
        # 3 of 10 each; 2.5 and 7.5 are rounded up, so the starts are 0, 3, 5, 8. 5 and 0 are in two
        # experts each.
        (10, 4, 0.3, [(0, 1, 2), (3, 4, 5), (6, 7, 5), (0, 8, 9)]),
        # 2.5 channels are rounded up to 3, so that even at N r = 1 two windows share channel 0.
        (5, 2, 0.5, [(0, 1, 2), (0, 3, 4)]),
        # r = 1: every expert is the whole layer.
        (4, 2, 1.0, [(0, 1, 2, 3), (0, 1, 2, 3)]),
        # More experts than channels: starts round(0, 0.4, 0.8, 1.2, 1.6) = 0, 0, 1, 1, 2 = 0 mod 2.
        (2, 5, 0.5, [(0,), (0,), (1,), (1,), (0,)]),
        (4, 1, 0.5, [(0, 1)]),
    ],
)
def test_experts_are_circular_windows_whose_common_channels_keep_their_slots(
    num_channels: int, num_experts: int, model_scale: float, channels: list[tuple[int, ...]]
) -> None:
    experts = layout(num_channels, num_experts, model_scale)
    assert [experts.channels(expert) for expert in range(num_experts)] == channels
    assert experts.size == len(channels[0])


def test_channels_of_no_expert_have_no_weights() -> None:
    # Experts (0, 1) and (4, 5) of 8 channels: four rows; the second expert has the last two of
    # them.
    assert layout(8, 2, 0.25).bank_channels == (0, 1, 4, 5)
    assert layout(8, 2, 0.25).rows == ((0, 1), (2, 3))


def test_separate_experts_have_filters_of_their_own() -> None:
    experts = layout(4, 3, 0.5, separate=True)
    assert [experts.channels(expert) for expert in range(3)] == [(0, 1), (2, 3), (4, 5)]
    assert experts.bank_channels == (0, 1, 2, 3, 4, 5)
    assert experts.rows == ((0, 1), (2, 3), (4, 5))


def test_windows_and_separate_filters_agree_at_two_halves() -> None:
    for num_channels in (2, 8, 64):
        windows, separate = layout(num_channels, 2, 0.5), layout(num_channels, 2, 0.5, separate=True)
        assert [windows.channels(expert) for expert in (0, 1)] == [separate.channels(expert) for expert in (0, 1)]


def test_every_expert_has_its_window_and_the_rows_behind_it() -> None:
    for num_channels, num_experts, tenths in itertools.product(range(1, 14), range(1, 9), range(1, 11)):
        if tenths * num_channels < 5:  # r C < 1/2 leaves no channel
            continue
        experts = layout(num_channels, num_experts, tenths / 10)
        bank = experts.bank_channels
        assert bank == tuple(sorted(set(bank)))
        for expert, rows in enumerate(experts.rows):
            start = int(expert * num_channels / num_experts + 0.5)
            window = {(start + step) % num_channels for step in range(experts.size)}
            assert tuple(bank[row] for row in rows) == experts.channels(expert)
            assert sorted(experts.channels(expert)) == sorted(window)


def test_common_channels_of_two_experts_keep_their_slots() -> None:
    for num_channels, tenths in itertools.product(range(1, 40), range(1, 11)):
        if tenths * num_channels < 5:
            continue
        first, second = (layout(num_channels, 2, tenths / 10).channels(expert) for expert in range(2))
        common = set(first) & set(second)
        assert all(first.index(channel) == second.index(channel) for channel in common)


@pytest.mark.parametrize("num_experts", [2, 3, 7])
def test_at_full_scale_every_pathway_is_the_backbone(
    tiny_vgg: Callable[..., RoutedNetwork], images: Tensor, num_experts: int
) -> None:
    # Paper, Sec. 5: "with r = 1 every pathway is the full backbone", whatever N.
    model = tiny_vgg(num_experts=num_experts, model_scale=1.0).eval()
    pathways = torch.randint(num_experts, (2, len(images), len(model.expert_layouts)))
    first, second = (model(images, pathway) for pathway in pathways)
    torch.testing.assert_close(first, second)
    dense = tiny_vgg(kind="dense", seed=1).eval()
    own = model.state_dict()
    dense.load_state_dict({name: own[name] for name in dense.state_dict()})
    torch.testing.assert_close(dense(images), first)


@pytest.mark.parametrize(
    ("num_channels", "model_scale", "size"),
    [(64, 0.5, 32), (64, 1.0, 64), (5, 0.5, 3), (10, 0.25, 3), (64, 0.2, 13), (1, 0.5, 1), (512, 0.001, 1)],
)
def test_scaled_channels_are_rounded_half_up(num_channels: int, model_scale: float, size: int) -> None:
    assert scaled_channels(num_channels, model_scale) == size


@pytest.mark.parametrize(
    ("model_scale", "message"),
    [
        (0.0, r"model scale r must be in \(0, 1\], got 0"),
        (-0.5, "got -0.5"),
        (1.01, "got 1.01"),
        (float("nan"), "got nan"),
        (0.05, r"r = 0.05 leaves no channel of a layer with 8; use r >= 0.0625 or a larger width"),
    ],
)
def test_impossible_scales_are_refused(model_scale: float, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        scaled_channels(8, model_scale)
    with pytest.raises(ConfigError, match=message):
        layout(8, 2, model_scale)


def test_the_least_scale_that_the_message_names_is_enough() -> None:
    assert scaled_channels(8, 0.0625) == 1


def test_no_experts_are_refused() -> None:
    with pytest.raises(ConfigError, match="number of experts N must be at least 1, got 0"):
        layout(8, 0, 0.5)


@pytest.mark.parametrize("router_gradient", ["advantage", "softmax", "straight_through"])
def test_a_gate_is_exactly_one_and_carries_the_routers_gradient(router_gradient: str) -> None:
    # d(p_e / stopgrad p_e) / d logit_j = [j = e] - p_j; straight-through: [j = e].
    logits_BN = torch.tensor([[1.0, 3.0, 0.5], [2.0, -1.0, 0.0]], requires_grad=True)
    chosen_B = torch.tensor([1, 0])
    gate_B = gate(logits_BN, chosen_B, router_gradient)
    assert gate_B.tolist() == [1.0, 1.0]
    gate_B.sum().backward()
    one_hot_BN = torch.tensor([[0.0, 1.0, 0.0], [1.0, 0.0, 0.0]])
    wanted_BN = one_hot_BN
    if router_gradient != "straight_through":
        wanted_BN = wanted_BN - logits_BN.detach().softmax(dim=1)
    torch.testing.assert_close(logits_BN.grad, wanted_BN)


@pytest.mark.parametrize("router_gradient", ["advantage", "softmax", "straight_through"])
def test_a_gate_survives_extreme_logits(router_gradient: str) -> None:
    logits_BN = torch.tensor([[1e4, -1e4], [-1e30, 1e30], [0.0, 3e38]], requires_grad=True)
    gate_B = gate(logits_BN, torch.tensor([0, 0, 1]), router_gradient)  # the second is a choice of probability 0
    gate_B.sum().backward()
    assert gate_B.tolist() == [1.0, 1.0, 1.0]
    assert logits_BN.grad is not None
    assert logits_BN.grad.isfinite().all()


def test_a_router_takes_the_first_of_equal_logits() -> None:
    router = Router(4, 3).eval()
    nn.init.zeros_(router.linear.weight)
    assert router.decide(torch.rand(5, 4, 2, 2)).expert_index_B.tolist() == [0] * 5


def test_a_router_makes_a_gate_only_where_it_is_being_trained() -> None:
    router = Router(4, 3)
    assert router.decide(torch.rand(2, 4, 2, 2)).gate is not None
    with torch.no_grad():
        assert router.decide(torch.rand(2, 4, 2, 2)).gate is None
    assert router.eval().decide(torch.rand(2, 4, 2, 2, requires_grad=True)).gate is None


def test_each_layer_has_its_own_router_and_the_pathway_is_their_choices(
    tiny_vgg: Callable[..., RoutedNetwork], images: Tensor
) -> None:
    model = tiny_vgg(num_experts=3).eval()
    _, routing = model.forward_with_routing(images)
    # VGG-16 has 13 convolutions, the first of which reads the image and is not routed.
    assert routing.expert_index_BL.shape == (8, 12)
    assert routing.expert_index_BL.dtype == torch.int64
    assert routing.logits_BRN is not None
    assert routing.logits_BRN.shape == (8, 12, 3)
    assert torch.equal(routing.expert_index_BL, routing.logits_BRN.argmax(dim=2))


@pytest.mark.parametrize(
    ("granularity", "router_of_layer"),
    [
        ("layer", list(range(12))),
        # Stages of 2, 2, 3, 3, 3 convolutions; the first convolution of the first stage is not
        # routed.
        ("stage", [0, 1, 1, 2, 2, 2, 3, 3, 3, 4, 4, 4]),
        ("image", [0] * 12),
    ],
)
def test_routers_are_shared_as_the_granularity_says(
    tiny_vgg: Callable[..., RoutedNetwork], images: Tensor, granularity: str, router_of_layer: list[int]
) -> None:
    model = tiny_vgg(granularity=granularity)
    _, routing = model.forward_with_routing(images)
    assert list(model.router_of_layer) == router_of_layer
    assert len(model.routers) == router_of_layer[-1] + 1
    assert routing.logits_BRN is not None
    chosen_BR = routing.logits_BRN.argmax(dim=2)
    assert torch.equal(routing.expert_index_BL, chosen_BR[:, torch.tensor(router_of_layer)])


def test_the_recorded_pathway_replayed_gives_the_same_logits(
    tiny_vgg: Callable[..., RoutedNetwork], images: Tensor
) -> None:
    model = tiny_vgg(num_experts=4, model_scale=0.5).eval()
    with torch.no_grad():
        logits, routing = model.forward_with_routing(images)
        replayed, forced = model.forward_with_routing(images, routing.expert_index_BL)
        detour = model(images, (routing.expert_index_BL + 1) % 4)
    assert torch.equal(replayed, logits)
    assert torch.equal(forced.expert_index_BL, routing.expert_index_BL)
    assert forced.logits_BRN is None
    assert not torch.allclose(detour, logits)


@pytest.mark.parametrize("router_gradient", ["dense", "value"])
def test_layers_with_one_router_can_be_given_different_experts(
    tiny_vgg: Callable[..., RoutedNetwork], images: Tensor, router_gradient: str
) -> None:
    model = tiny_vgg(warm=True, granularity="image", router_gradient=router_gradient).eval()
    with torch.no_grad():
        own = model(images, torch.zeros(8, 12, dtype=torch.int64))
        for layer in range(12):
            pathways = torch.zeros(8, 12, dtype=torch.int64)
            pathways[:, layer] = 1
            assert not torch.allclose(model(images, pathways), own, atol=1e-4), layer


@pytest.mark.parametrize("by", ["images", "weights"])
def test_second_derivatives_are_refused_and_not_partly_computed(
    tiny_vgg: Callable[..., RoutedNetwork], images: Tensor, by: str
) -> None:
    model = tiny_vgg(warm=True).eval()
    images.requires_grad_()
    inputs = images if by == "images" else list(model.expert_parameters())
    loss = model(images).log_softmax(dim=1)[:, 0].sum()
    with pytest.raises(RuntimeError, match=r"routed layers .* have first derivatives only; .* without create_graph"):
        torch.autograd.grad(loss, inputs, create_graph=True)


def test_a_pathway_is_an_images_own_business(tiny_vgg: Callable[..., RoutedNetwork], images: Tensor) -> None:
    model = tiny_vgg(warm=True, num_experts=3).eval()
    with torch.no_grad():
        logits, routing = model.forward_with_routing(images)
        assert len(routing.expert_index_BL.unique(dim=0)) > 1
        backwards, reversed_routing = model.forward_with_routing(images.flip(0))
        torch.testing.assert_close(backwards.flip(0), logits)
        assert torch.equal(reversed_routing.expert_index_BL.flip(0), routing.expert_index_BL)
        for row in range(len(images)):
            torch.testing.assert_close(model(images[row : row + 1]), logits[row : row + 1])


def test_routers_and_experts_share_out_all_parameters(tiny_vgg: Callable[..., RoutedNetwork]) -> None:
    model = tiny_vgg()
    routers = {id(parameter) for parameter in model.router_parameters()}
    experts = {id(parameter) for parameter in model.expert_parameters()}
    assert routers
    assert not routers & experts
    assert routers | experts == {id(parameter) for parameter in model.parameters()}


@pytest.mark.slow
@pytest.mark.parametrize("training", [False, True])
def test_a_whole_network_compiles_into_one_graph(tiny_vgg: Callable[..., RoutedNetwork], training: bool) -> None:
    """No part of it branches on data; so nothing in it waits for a GPU."""
    torch.compiler.reset()
    model, images = tiny_vgg(warm=True).train(training), torch.rand(4, 3, 32, 32)
    state = copy.deepcopy(model.state_dict())
    expected = model(images)
    model.load_state_dict(state)
    compiled = torch.compile(lambda x: model.forward_with_routing(x)[0], backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(images), expected)
