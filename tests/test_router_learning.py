"""What keeps a router alive: centred features, no bias, the same decisions in training, attack and inference."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from advmoe.attacks.pgd import evaluating
from advmoe.models.network import RoutedNetwork
from advmoe.models.routing import Centring, Router


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
    for _ in range(200):
        logits_BN = router(pooled_relu_features())
    torch.testing.assert_close(logits_BN.mean(dim=0), torch.zeros(2), atol=1e-4, rtol=0.0)
    assert 0.2 < logits_BN.argmax(dim=1).double().mean() < 0.8
    # the same weights without centring: the shared direction decides for all images alike
    raw_BN = router.linear(pooled_relu_features().flatten(1))
    assert len(raw_BN.argmax(dim=1).unique()) == 1


def test_centring_follows_features_that_move() -> None:
    centring = Centring(1)
    for _ in range(100):  # 0.9 ** 100 = 3e-5 of the start is left
        centring(torch.full((4, 1), 3.0))
    assert centring.running_mean is not None
    assert centring.running_mean.item() == pytest.approx(3.0, rel=1e-4)
    centring(torch.full((4, 1), 13.0))
    assert centring.running_mean.item() == pytest.approx(4.0, rel=1e-4)  # 3 + 0.1 * (13 - 3)


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
