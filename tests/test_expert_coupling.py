"""Coupled gradients: their effect on the mean of the experts and on their differences."""

import dataclasses
from collections.abc import Callable

import pytest
import torch
from grid import Cell
from torch import Tensor

from advmoe.config import TrainConfig
from advmoe.errors import ConfigError
from advmoe.models.experts import ExpertLayout
from advmoe.models.network import RoutedNetwork
from advmoe.training.coupling import Slots, couple, expert_banks, slot_of_row, start_equal
from advmoe.training.levels import make_levels

MakeNetwork = Callable[..., RoutedNetwork]


def step(model: RoutedNetwork, images: Tensor, specialization: float | None) -> None:
    """One SGD step of the experts on an arbitrary loss."""
    config = TrainConfig(dataset="digits", specialization=specialization)
    (level,) = make_levels(["experts"], model, config, fresh=False)
    with level.training():
        logits, _ = level.model.forward_with_routing(images)
        logits.square().sum().backward()
    level.optimizer.step()


def coupled(gradient: list[float], slots: list[int], specialization: float) -> list[float]:
    values = torch.tensor(gradient)
    couple(values, Slots.of(slots), specialization)
    return values.tolist()


def test_coupled_gradient_splits_into_common_and_specific_part() -> None:
    # G = 6, and G_e - G / 2 = (-2, 2): at half speed 6 - 1 and 6 + 1
    assert coupled([1.0, 5.0], [0, 0], 0.5) == [5.0, 7.0]


def test_only_filters_of_one_slot_are_coupled() -> None:
    # rows 1 and 3 as above; rows 0 and 2 are alone in their slots and keep what they have
    assert coupled([3.0, 1.0, 7.0, 5.0], [1, 0, 5, 0], 0.5) == [3.0, 5.0, 7.0, 7.0]


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_experts_that_lie_one_after_another_are_coupled_as_any_others(memory_format: torch.memory_format) -> None:
    gradient = torch.randn(6, 4, 3, 3, dtype=torch.float64).contiguous(memory_format=memory_format)
    slots = Slots.of([0, 1, 0, 1, 0, 1])
    assert slots.copies == 3
    by_view, by_index = gradient.clone(), gradient.clone()
    couple(by_view, slots, 0.25)
    couple(by_index, dataclasses.replace(slots, copies=None), 0.25)
    torch.testing.assert_close(by_view, by_index)
    total = gradient[1] + gradient[3] + gradient[5]
    torch.testing.assert_close(by_view[3], total + 0.25 * (gradient[3] - total / 3))


@pytest.mark.parametrize(
    ("num_channels", "num_experts", "model_scale", "slots"),
    [
        (4, 1, 0.5, [0, 1]),
        # Halves: channel c of one expert faces channel c + 2 of the other.
        (4, 2, 0.5, [0, 1, 0, 1]),
        # Windows 0 ... 5 and 4 ... 7, 0, 1: 0, 1, 4 and 5 are in both; 6 and 7 face 2 and 3.
        (8, 2, 0.75, [0, 1, 2, 3, 4, 5, 2, 3]),
        # r = 1: every channel in a slot of its own.
        (4, 3, 1.0, [0, 1, 2, 3]),
        # Windows 0 1 2 3, 2 3 4 5, 4 5 6 7, 6 7 0 1: pairs alternate between the first and the last
        # two slots.
        (8, 4, 0.5, [0, 1, 2, 3, 0, 1, 2, 3]),
        # Windows 0 1 2, 2 3 4, 4 5 0: 2 keeps slot 2, so 3 and 4 fill 0 and 1; 4 and 0 keep theirs,
        # 5 fills 2.
        (6, 3, 0.5, [0, 1, 2, 0, 1, 2]),
    ],
)
def test_a_channel_of_several_experts_keeps_its_slot(
    num_channels: int, num_experts: int, model_scale: float, slots: list[int]
) -> None:
    layout = ExpertLayout(num_channels=num_channels, num_experts=num_experts, model_scale=model_scale)
    assert list(slot_of_row(layout.rows)) == slots


def test_a_channel_that_has_to_change_slots_is_coupled_with_none() -> None:
    # Five windows of three of five channels, one apart: 0 1 2, 1 2 3, 2 3 4, 3 4 0, 4 0 1. Every
    # two channels meet, so three slots do not do: 0 1 2 and 3 (slot 0) are placed, 4 takes slot 1;
    # beside 3 and 4, 0 has to move to slot 2.
    layout = ExpertLayout(num_channels=5, num_experts=5, model_scale=0.6)
    slots = slot_of_row(layout.rows)
    assert slots[0] == 3 + 0
    assert slots.count(slots[0]) == 1


def test_experts_start_equal_and_any_pathway_gives_the_same_logits(tiny_vgg: MakeNetwork, images: Tensor) -> None:
    model = tiny_vgg().eval()
    layers = len(model.expert_layouts)
    first, second = (torch.full((len(images), layers), expert) for expert in (0, 1))
    assert not torch.allclose(model(images, first), model(images, second))
    start_equal(model)
    torch.testing.assert_close(model(images, first), model(images, second))


def test_without_specialization_the_network_learns_as_s_dense(tiny_vgg: MakeNetwork, images: Tensor) -> None:
    routed, reference = tiny_vgg(seed=0), tiny_vgg(seed=1, kind="s_dense")
    start_equal(routed)
    # an expert's filters are S-Dense's: copy those of expert 0, the first half of each bank
    own = routed.state_dict()
    reference.load_state_dict(
        {name: own[name][: len(value)] if value.ndim else own[name] for name, value in reference.state_dict().items()}
    )
    for model in (routed, reference):
        step(model, images, specialization=0.0)
    for (weight, _), other in zip(expert_banks(routed), list(reference.parameters())[3:-2:3], strict=True):
        for expert in weight.chunk(2):
            torch.testing.assert_close(expert, other)


def test_specialization_sets_how_fast_experts_part(tiny_vgg: MakeNetwork, images: Tensor) -> None:
    differences = []
    for specialization in (1.0, 2.0):
        model = tiny_vgg()
        start_equal(model)
        step(model, images, specialization)
        first, second = next(expert_banks(model))[0].chunk(2)
        differences.append(first - second)
    assert differences[0].abs().max() > 0
    torch.testing.assert_close(differences[1], 2 * differences[0])


def test_a_level_of_everything_couples_experts_as_their_own_level_does(tiny_vgg: MakeNetwork, images: Tensor) -> None:
    after = []
    for name in ("experts", "all"):
        model = tiny_vgg()
        (level,) = make_levels([name], model, TrainConfig(dataset="digits", specialization=0.5))
        model.eval()  # routers that do not learn, so that both levels have the same gradient
        model(images).square().sum().backward()
        for router in model.routers.parameters():
            router.grad = None
        level.optimizer.step()
        after.append(next(expert_banks(model))[0].detach())
    assert torch.equal(*after)


def test_independent_experts_are_left_alone(tiny_vgg: MakeNetwork, images: Tensor) -> None:
    """With every image at expert 0 the other expert of the last layer moves by weight decay alone, lr * wd * w."""
    model = tiny_vgg()
    with torch.no_grad():
        model.routers[-1].linear.weight.zero_()  # type: ignore[union-attr]  # equal logits: the first expert is taken
    *_, (weight, _) = expert_banks(model)
    before = weight.detach().clone().chunk(2)[1]
    step(model, images, specialization=None)
    torch.testing.assert_close(weight.chunk(2)[1], before * (1 - 0.1 * 5e-4))


def test_the_experts_of_a_fresh_model_start_equal_and_those_of_a_trained_one_as_they_are(
    tiny_vgg: MakeNetwork,
) -> None:
    config = TrainConfig(dataset="digits")
    for model, fresh, settings in (
        (tiny_vgg(), True, config),
        (tiny_vgg(), False, config),
        (tiny_vgg(), True, dataclasses.replace(config, specialization=None)),
    ):
        make_levels(["routers", "experts"], model, settings, fresh=fresh)
        equal = [torch.equal(*weight.chunk(2)) for weight, _ in expert_banks(model)]
        assert equal == [fresh and settings.specialization is not None] * 12


@pytest.mark.parametrize("arch", ["densenet", "resnet18", "vgg16", "vit", "wrn28_10"])
def test_every_moe_layer_of_every_backbone_is_coupled(arch: str) -> None:
    model = Cell(arch, "moe", 32).build()
    banks = 4 if arch == "vit" else 1  # two linear layers with bias, or a convolution
    assert len(list(expert_banks(model))) == banks * len(model.expert_layouts)


def test_a_network_with_nothing_to_couple_is_left_alone(tiny_vgg: MakeNetwork) -> None:
    assert not list(expert_banks(tiny_vgg(num_experts=1)))
    assert not list(expert_banks(tiny_vgg(num_experts=2, model_scale=1.0)))


def test_biases_are_coupled_like_the_filters_they_belong_to() -> None:
    model = Cell("vit", "moe", 32).build()
    assert {bank.ndim for bank, _ in expert_banks(model)} == {1, 2}


def test_negative_specialization_is_refused() -> None:
    with pytest.raises(ConfigError, match="specialization must be at least 0, got -1"):
        TrainConfig(dataset="digits", specialization=-1.0)


def test_routers_read_features_without_shaping_them(tiny_vgg: MakeNetwork, images: Tensor) -> None:
    """Along the pathway it takes, the network has the same gradient with and without routers, learning ones too."""
    model = tiny_vgg()
    images.requires_grad_()
    for learning in (False, True):
        model.eval().routers.train(learning)
        logits, routing = model.forward_with_routing(images)
        forced = model(images, routing.expert_index_BL)
        weights = [images, *model.expert_parameters()]
        own = torch.autograd.grad(logits.square().sum(), weights)
        given = torch.autograd.grad(forced.square().sum(), weights)
        for left, right in zip(own, given, strict=True):
            torch.testing.assert_close(left, right)
