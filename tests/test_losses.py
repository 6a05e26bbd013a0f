"""Training objectives: equality with numbers derived by hand and with a reference in double precision."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from advmoe.models.routing import Routing
from advmoe.training.losses import load_balance, trades


def test_trades_is_cross_entropy_plus_beta_times_the_divergence() -> None:
    # First image: p = (1/2, 1/2), q = (1/4, 3/4), label 0: CE = log 2, KL(p || q) = 1/2 log(4/3).
    # Second image: p = q = (1/5, 4/5), label 1: CE = log(5/4), KL = 0. Mean over the two, beta = 6.
    clean = torch.tensor([[0.0, 0.0], [0.0, math.log(4)]])
    adversarial = torch.tensor([[0.0, math.log(3)], [0.0, math.log(4)]])
    expected = (math.log(2) + math.log(5 / 4) + 6 * 0.5 * math.log(4 / 3)) / 2
    assert trades(clean, adversarial, torch.tensor([0, 1]), 6.0).item() == pytest.approx(expected, rel=1e-6)


def test_the_divergence_is_taken_from_clean_to_adversarial() -> None:
    # KL((9/10, 1/10) || (1/2, 1/2)) = log 2 - H = 0.3681; the other way round it is 1/2 log(25/9) =
    # 0.5108.
    clean, adversarial = torch.tensor([[math.log(9), 0.0]]), torch.zeros(1, 2)
    robust = trades(clean, adversarial, torch.tensor([0]), 1.0) - F.cross_entropy(clean, torch.tensor([0]))
    assert robust.item() == pytest.approx(math.log(2) + 0.9 * math.log(0.9) + 0.1 * math.log(0.1), rel=1e-5)


def test_without_beta_only_the_clean_images_count() -> None:
    clean, labels = torch.randn(4, 3, generator=torch.Generator().manual_seed(0)), torch.tensor([0, 1, 2, 0])
    assert torch.equal(trades(clean, -clean, labels, 0.0), F.cross_entropy(clean, labels))


def test_gradients_flow_through_both_arguments_of_the_divergence() -> None:
    generator = torch.Generator().manual_seed(0)
    clean, adversarial = (
        torch.randn(5, 4, dtype=torch.float64, generator=generator, requires_grad=True) for _ in range(2)
    )
    labels = torch.tensor([0, 1, 2, 3, 0])
    p, q = clean.softmax(dim=1), adversarial.softmax(dim=1)
    reference = F.cross_entropy(clean, labels) + 6 * (p * (p.log() - q.log())).sum(dim=1).mean()
    wanted = torch.autograd.grad(reference, (clean, adversarial))
    torch.testing.assert_close(
        torch.autograd.grad(trades(clean, adversarial, labels, 6.0), (clean, adversarial)), wanted
    )
    natural = torch.autograd.grad(F.cross_entropy(clean, labels), clean)[0]
    assert not torch.allclose(wanted[0], natural)


@pytest.mark.parametrize("size", [1e2, 1e4, 1e30])
def test_extreme_logits_give_finite_losses_and_gradients(size: float) -> None:
    # softmax underflows to 0 from about 104 on; a target of exactly 0 outside log space gives NaN
    # gradients.
    clean = torch.tensor([[size, 0.0, -size], [0.0, size, 0.0], [-size, 0.0, 0.0]], requires_grad=True)
    adversarial = torch.tensor([[-size, 0.0, size], [0.0, size, 0.0], [size, 0.0, 0.0]], requires_grad=True)
    loss = trades(clean, adversarial, torch.tensor([0, 1, 2]), 6.0)
    loss.backward()
    assert loss.isfinite()
    for logits in (clean, adversarial):
        assert logits.grad is not None
        assert logits.grad.isfinite().all()


def routing_of(logits_BRN: Tensor) -> Routing:
    return Routing(logits_BRN.argmax(dim=2), logits_BRN)


def test_load_balance_is_one_at_balance_and_n_at_collapse() -> None:
    # One router, N = 2, saturated logits. Balanced: f = p = (1/2, 1/2), so 2 (1/4 + 1/4) = 1.
    # Collapsed: 2 (1 * 1) = 2.
    balanced = torch.tensor([[[50.0, -50.0]], [[-50.0, 50.0]]])
    collapsed = torch.tensor([[[50.0, -50.0]], [[50.0, -50.0]]])
    assert load_balance(routing_of(balanced)).item() == pytest.approx(1.0)
    assert load_balance(routing_of(collapsed)).item() == pytest.approx(2.0)
    # Averaged over routers.
    assert load_balance(routing_of(torch.cat((balanced, collapsed), dim=1))).item() == pytest.approx(1.5)


def test_load_balance_counts_all_tokens_of_a_router_together() -> None:
    # Two positions that prefer different experts: balanced together, collapsed each for itself.
    preferred = torch.tensor([[[50.0, -50.0], [-50.0, 50.0]]] * 2)
    assert load_balance(routing_of(preferred), rows_per_image=2).item() == pytest.approx(1.0)
    assert load_balance(routing_of(preferred)).item() == pytest.approx(2.0)
    # Two routers of two tokens each, layer by layer: the second one collapsed.
    collapsed = torch.tensor([[[50.0, -50.0]] * 2] * 2)
    both = torch.cat((preferred, collapsed), dim=1)
    assert load_balance(routing_of(both), rows_per_image=2).item() == pytest.approx(1.5)


def test_load_balance_pushes_probability_away_from_the_busy_expert() -> None:
    logits_BRN = torch.tensor([[[1.0, 0.0]], [[2.0, 0.0]], [[-1.0, 0.0]]], requires_grad=True)
    load_balance(routing_of(logits_BRN)).backward()
    assert logits_BRN.grad is not None
    assert (logits_BRN.grad[..., 0] > 0).all(), (
        "descending lowers the logit of expert 0, which takes two of three images"
    )
