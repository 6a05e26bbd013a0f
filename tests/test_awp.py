"""Adversarial weight perturbation: the step increases the loss, its length is that of the weights, and it is undone."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from advmoe.models.network import RoutedNetwork
from advmoe.training.awp import perturbed_weights


def test_weights_go_up_the_loss_by_gamma_of_their_length_and_come_back(
    tiny_vgg: Callable[..., RoutedNetwork], images: Tensor
) -> None:
    model, gamma = tiny_vgg(kind="s_dense"), 0.01
    labels = torch.arange(len(images))

    def loss() -> Tensor:
        return torch.nn.functional.cross_entropy(model(images), labels)

    before = {name: value.clone() for name, value in model.state_dict().items()}
    with torch.no_grad():
        at_weights = loss()
    model.load_state_dict(before)
    with perturbed_weights(model, list(model.parameters()), loss, gamma):
        inside = {name: value.clone() for name, value in model.state_dict().items()}
        with torch.no_grad():
            assert loss() > at_weights
    for name, parameter in model.named_parameters():
        moved = (inside[name] - before[name]).norm()
        # |gamma * |w| * g / |g|| = gamma * |w|; biases and BatchNorm's weights, which have one dimension, stay
        expected = gamma * before[name].norm() if parameter.dim() > 1 else torch.zeros(())
        torch.testing.assert_close(moved, expected, rtol=1e-3, atol=0.0)
        assert torch.equal(parameter, before[name])
    # The pass that finds the direction leaves no trace in the running statistics.
    for name, _ in model.named_buffers():
        assert torch.equal(inside[name], before[name]), name


def test_only_what_a_level_may_change_is_perturbed(tiny_vgg: Callable[..., RoutedNetwork], images: Tensor) -> None:
    model = tiny_vgg()
    experts = [parameter.detach().clone() for parameter in model.expert_parameters()]
    routers = [parameter.detach().clone() for parameter in model.router_parameters()]
    with perturbed_weights(model, list(model.router_parameters()), lambda: model(images).square().sum(), 0.01):
        assert all(torch.equal(*pair) for pair in zip(model.expert_parameters(), experts, strict=True))
        assert not any(torch.equal(*pair) for pair in zip(model.router_parameters(), routers, strict=True))


def test_without_filters_there_is_nothing_to_perturb_and_nothing_to_compute() -> None:
    scores = torch.nn.Parameter(torch.ones(4))
    with perturbed_weights(torch.nn.Module(), [scores], lambda: pytest.fail("a pass without a use"), 0.01):
        assert torch.equal(scores, torch.ones(4))
