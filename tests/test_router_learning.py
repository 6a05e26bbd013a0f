"""What keeps a router alive: centred features, no bias, the same decisions in training, attack and inference."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from advmoe.models.dispatch import select
from advmoe.models.modes import evaluating
from advmoe.models.network import RoutedNetwork
from advmoe.models.router import Centring, Router
from advmoe.models.routing import Decision, gate


def pooled_relu_features(number: int = 256) -> Tensor:
    """[number, 6, 1, 1]: positive, with one large direction that all images share and a small one of their own."""
    generator = torch.Generator().manual_seed(0)
    own = torch.rand(number, 6, generator=generator)
    return (10.0 + torch.arange(6.0) + own)[:, :, None, None]


def test_a_decision_in_training_is_the_decision_of_the_finished_router() -> None:
    """The features' mean is far from 0, so that batch statistics and running ones would decide differently."""
    router, x_BCHW = Router(6, 2), pooled_relu_features()
    for _ in range(20):
        router(x_BCHW[:128] + 3.0)
    finished = router.eval()(x_BCHW[128:])
    torch.testing.assert_close(router.train()(x_BCHW[128:]), finished)


def test_every_logit_has_mean_zero_so_no_expert_wins_everywhere() -> None:
    torch.manual_seed(0)
    router = Router(6, 2)
    router(pooled_relu_features())
    logits_BN = router(pooled_relu_features())
    torch.testing.assert_close(logits_BN.mean(dim=0), torch.zeros(2), atol=1e-4, rtol=0.0)
    assert 0.2 < logits_BN.argmax(dim=1).double().mean() < 0.8
    # the same weights without centring: the shared direction decides for all images alike
    raw_BN = router.linear(pooled_relu_features().flatten(1))
    assert len(raw_BN.argmax(dim=1).unique()) == 1


def test_centring_settles_at_once_and_follows_features_that_move() -> None:
    centring = Centring(1)
    assert centring.running_mean is not None
    for value in (2.0, 4.0):  # not 0.1 * 2 and so on from the 0 it starts with
        centring(torch.full((4, 1), value))
    assert centring.running_mean.item() == pytest.approx(3.0)
    for _ in range(8):
        centring(torch.full((4, 1), 3.0))
    centring(torch.full((4, 1), 13.0))
    assert centring.running_mean.item() == pytest.approx(4.0)  # batch 11: 3 + 0.1 * (13 - 3)


def test_an_attack_between_two_updates_sees_the_pathways_of_the_update(
    tiny_vgg: Callable[..., RoutedNetwork], images: Tensor
) -> None:
    model = tiny_vgg()
    for _ in range(3):
        model(images)
    with evaluating(model):
        attacked = model.forward_with_routing(images)[1].expert_index_BL
    model.train(False)
    model.routers.train()
    updated = model.forward_with_routing(images)[1].expert_index_BL
    assert torch.equal(attacked, updated)


def gradient_of_two_experts(router_gradient: str) -> list[float]:
    """Router gradient where expert 0 says 1 and is chosen, expert 1 would say 3, and the loss is (y - 4)^2 / 2."""
    logits_BN, index_B = torch.zeros(1, 2, requires_grad=True), torch.tensor([0])
    gate_B = gate(logits_BN, index_B, router_gradient)
    decision = Decision(index_B, logits_BN, gate_B, "mean" if router_gradient == "advantage" else "own")
    y = select([torch.tensor([[1.0]]), torch.tensor([[3.0]])], decision)
    assert y.item() == 1.0
    ((y - 4.0).square() / 2).sum().backward()
    assert logits_BN.grad is not None
    return logits_BN.grad.flatten().tolist()


def test_the_advantage_moves_a_router_to_the_better_expert() -> None:
    # d loss / dy = 1 - 4 = -3, the chosen expert differs from the mean by 1 - 2 = -1: d loss / d gate = 3, and
    # d gate / d logits = (1, 0) - (1/2, 1/2). A descent step raises the logit of expert 1, whose loss is 1/2, not 9/2.
    assert gradient_of_two_experts("advantage") == [1.5, -1.5]
    # a gate on the whole output only asks for a larger output, -3 * 1, and so for more of the worse expert
    assert gradient_of_two_experts("softmax") == [-1.5, 1.5]
