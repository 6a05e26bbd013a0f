"""Experts that grow apart from a common start: what coupled gradients do to their mean and their differences."""

import dataclasses
from collections.abc import Callable

import pytest
import torch
from grid import Cell
from torch import Tensor

from advmoe.config import TrainConfig
from advmoe.errors import ConfigError
from advmoe.models.network import RoutedNetwork
from advmoe.training.coupling import coupled, expert_banks, start_equal, uncoupled_layers
from advmoe.training.levels import make_levels

MakeNetwork = Callable[..., RoutedNetwork]


def step(model: RoutedNetwork, images: Tensor, specialisation: float | None) -> None:
    """One SGD step of the experts on an arbitrary loss."""
    config = TrainConfig(dataset="digits", specialisation=specialisation)
    (level,) = make_levels(["experts"], model, config, fresh=False)
    with level.training():
        logits, _ = level.forward(images)
        logits.square().sum().backward()
    level.optimizer.step()


def test_coupled_gradient_splits_into_common_and_specific_part() -> None:
    gradient = torch.tensor([[1.0], [5.0]])
    # G = 6, and G_e - G / 2 = (-2, 2): at half speed 6 - 1 and 6 + 1
    assert coupled(gradient, 0.5).tolist() == [[5.0], [7.0]]


def test_a_single_expert_keeps_its_gradient() -> None:
    gradient = torch.tensor([[3.0, -1.0]])
    assert torch.equal(coupled(gradient, 0.5), gradient)


def test_experts_start_equal_and_any_pathway_gives_the_same_logits(tiny_vgg: MakeNetwork, images: Tensor) -> None:
    model = tiny_vgg().eval()
    layers = len(model.expert_layouts)
    first, second = (torch.full((len(images), layers), expert) for expert in (0, 1))
    assert not torch.allclose(model(images, first), model(images, second))
    start_equal(model)
    torch.testing.assert_close(model(images, first), model(images, second))


def test_without_specialisation_the_network_learns_as_s_dense(tiny_vgg: MakeNetwork, images: Tensor) -> None:
    routed, reference = tiny_vgg(seed=0), tiny_vgg(seed=1, kind="s_dense")
    start_equal(routed)
    # an expert's filters are S-Dense's: copy those of expert 0, the first half of each bank
    own = routed.state_dict()
    reference.load_state_dict(
        {name: own[name][: len(value)] if value.ndim else own[name] for name, value in reference.state_dict().items()}
    )
    for model in (routed, reference):
        step(model, images, specialisation=0.0)
    for (weight, _), other in zip(expert_banks(routed), list(reference.parameters())[3:-2:3], strict=True):
        for expert in weight.chunk(2):
            torch.testing.assert_close(expert, other)


def test_specialisation_sets_how_fast_experts_part(tiny_vgg: MakeNetwork, images: Tensor) -> None:
    differences = []
    for specialisation in (1.0, 2.0):
        model = tiny_vgg()
        start_equal(model)
        step(model, images, specialisation)
        first, second = next(expert_banks(model))[0].chunk(2)
        differences.append(first - second)
    assert differences[0].abs().max() > 0
    torch.testing.assert_close(differences[1], 2 * differences[0])


def test_independent_experts_are_left_alone(tiny_vgg: MakeNetwork, images: Tensor) -> None:
    """With every image at expert 0 the other expert of the last layer moves by weight decay alone, lr * wd * w."""
    model = tiny_vgg()
    with torch.no_grad():
        model.routers[-1].linear.weight.zero_()  # type: ignore[union-attr]  # equal logits: the first expert is taken
    *_, (weight, _) = expert_banks(model)
    before = weight.detach().clone().chunk(2)[1]
    step(model, images, specialisation=None)
    torch.testing.assert_close(weight.chunk(2)[1], before * (1 - 0.1 * 5e-4))


def test_the_experts_of_a_fresh_model_start_equal_and_those_of_a_trained_one_as_they_are(
    tiny_vgg: MakeNetwork,
) -> None:
    config = TrainConfig(dataset="digits")
    for model, fresh, settings in (
        (tiny_vgg(), True, config),
        (tiny_vgg(), False, config),
        (tiny_vgg(), True, dataclasses.replace(config, specialisation=None)),
    ):
        make_levels(["routers", "experts"], model, settings, fresh=fresh)
        equal = [torch.equal(*weight.chunk(2)) for weight, _ in expert_banks(model)]
        assert equal == [fresh and settings.specialisation is not None] * 12


@pytest.mark.parametrize("arch", ["densenet", "resnet18", "vgg16", "vit", "wrn28_10"])
def test_every_moe_layer_of_every_backbone_is_coupled(arch: str) -> None:
    model = Cell(arch, "moe", 32).build()
    assert not uncoupled_layers(model)
    banks = 4 if arch == "vit" else 1  # two linear layers with bias, or a convolution
    assert len(list(expert_banks(model))) == banks * len(model.expert_layouts)


def test_layers_whose_experts_overlap_are_told(tiny_vgg: MakeNetwork) -> None:
    assert uncoupled_layers(tiny_vgg(model_scale=0.75)) == list(range(12))
    assert uncoupled_layers(tiny_vgg(num_experts=1)) == []
    # N r < 1, but r C is rounded: 2.64 to 3 of 8 and 10.56 to 11 of 32 channels, where three experts need 9 and 33;
    # 1.32 to 1 of 4 and 5.28 to 5 of 16 leave room
    widths = [layout.num_channels for layout in tiny_vgg().expert_layouts]
    overlapping = [layer for layer, width in enumerate(widths) if width in {8, 32}]
    assert uncoupled_layers(tiny_vgg(num_experts=3, model_scale=0.33)) == overlapping


def test_experts_that_share_filters_are_not_trained_as_if_they_were_coupled(tiny_vgg: MakeNetwork) -> None:
    model = tiny_vgg(model_scale=0.75)
    with pytest.raises(ConfigError, match=r"N r = 1.5 > 1 share filters"):
        make_levels(["all"], model, TrainConfig(dataset="digits"))
    make_levels(["all"], model, TrainConfig(dataset="digits", specialisation=None))


def test_overlapping_windows_are_not_coupled(tiny_vgg: MakeNetwork) -> None:
    assert not list(expert_banks(tiny_vgg(model_scale=0.75)))
    assert not list(expert_banks(tiny_vgg(num_experts=1)))
    assert len(list(expert_banks(tiny_vgg(model_scale=0.75, expert_filters="separate")))) == 12


def test_negative_specialisation_is_refused() -> None:
    with pytest.raises(ConfigError, match="specialisation must be finite and not negative, got -1"):
        TrainConfig(dataset="digits", specialisation=-1.0)


def test_routers_read_features_without_shaping_them(tiny_vgg: MakeNetwork, images: Tensor) -> None:
    """Along the pathway it takes, the network has the same gradient with and without routers."""
    model = tiny_vgg().eval()
    images.requires_grad_()
    logits, routing = model.forward_with_routing(images)
    forced = model(images, routing.expert_index_BL)
    (own,) = torch.autograd.grad(logits.square().sum(), images)
    (given,) = torch.autograd.grad(forced.square().sum(), images)
    assert torch.equal(own, given)
