"""Router learning: centered features, no bias, and equal decisions in training, attack and inference."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from advmoe.distributed import Place, placing
from advmoe.models.dispatch import select
from advmoe.models.modes import evaluating
from advmoe.models.network import RoutedNetwork
from advmoe.models.router import Centering, Router
from advmoe.models.routing import Decision, compared, gate
from advmoe.training.coupling import expert_banks


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
    # the same weights without centering: the shared direction decides for all images alike
    raw_BN = router.linear(pooled_relu_features().flatten(1))
    assert len(raw_BN.argmax(dim=1).unique()) == 1


def test_centering_settles_at_once_and_follows_features_that_move() -> None:
    centering = Centering(1)
    assert centering.running_mean is not None
    for value in (2.0, 4.0):  # not 0.1 * 2 and so on from the 0 it starts with
        centering(torch.full((4, 1), value))
    assert centering.running_mean.item() == pytest.approx(3.0)
    for _ in range(8):
        centering(torch.full((4, 1), 3.0))
    centering(torch.full((4, 1), 13.0))
    assert centering.running_mean.item() == pytest.approx(4.0)  # batch 11: 3 + 0.1 * (13 - 3)


def test_one_image_alone_says_nothing_about_the_features(tiny_vgg: Callable[..., RoutedNetwork]) -> None:
    model = tiny_vgg()
    before = {name: value.clone() for name, value in model.routers.state_dict().items()}
    model(torch.rand(1, 3, 32, 32))
    for name, value in model.routers.state_dict().items():
        assert torch.equal(value, before[name]), name


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
    # d loss / dy = 1 - 4 = -3, the chosen expert differs from the mean by 1 - 2 = -1: d loss / d
    # gate = 3, and d gate / d logits = (1, 0) - (1/2, 1/2). A descent step raises the logit of
    # expert 1, whose loss is 1/2, not 9/2.
    assert gradient_of_two_experts("advantage") == [1.5, -1.5]
    # a gate on the whole output only asks for a larger output, -3 * 1, and so for more of the worse
    # expert
    assert gradient_of_two_experts("softmax") == [-1.5, 1.5]


def gradient_of_four_experts(router_gradient: str) -> list[float]:
    """The same where experts say 2, 0, 0 and 3 and the first is chosen: better than the mean, but not the best."""
    outputs = [torch.tensor([[value]]) for value in (2.0, 0.0, 0.0, 3.0)]
    logits_BN, index_B = torch.zeros(1, 4, requires_grad=True), torch.tensor([0])
    if router_gradient == "dense":
        decision = compared(index_B, logits_BN, sampled=False)
    else:
        decision = Decision(index_B, logits_BN, gate(logits_BN, index_B, router_gradient), "mean")
    y = select(outputs, decision)
    assert y.item() == 2.0
    ((y - 4.0).square() / 2).sum().backward()
    assert logits_BN.grad is not None
    return logits_BN.grad.flatten().tolist()


def test_the_comparison_with_all_experts_is_the_gradient_of_the_expected_loss() -> None:
    # d loss / dy = -2, so v = -4, 0, 0, -6, with the mean -5/2 at equal odds of 1/4: a step raises the
    # logit of the best expert most, by 1/4 * 7/2, that of the one chosen by 1/4 * 3/2, and lowers the
    # others by 1/4 * 5/2.
    assert gradient_of_four_experts("dense") == [-0.375, 0.625, 0.625, -0.875]
    # The mean expert says 5/4, so the advantage is -2 * 3/4 = -3/2, times (1, 0, 0, 0) - 1/4: a
    # step raises the logit chosen, and lowers that of the best.
    assert gradient_of_four_experts("advantage") == [-1.125, 0.375, 0.375, 0.375]


@pytest.mark.parametrize("number", [2, 4])
def test_a_relative_comparison_does_not_depend_on_how_much_experts_differ(number: int) -> None:
    def gradient(size: float, *, relative: bool) -> Tensor:
        logits_BN = torch.zeros(3, number, requires_grad=True)
        decision = compared(torch.tensor([0, 1, 0]), logits_BN, sampled=False, relative=relative)
        outputs = [torch.full((3, 1), 1.0 + size * expert) for expert in range(number)]
        # the loss falls with the output of images 0 and 1, by 1 and 2, and rises with that of image
        # 2, by 3
        (select(outputs, decision) * torch.tensor([[-1.0], [-2.0], [3.0]])).sum().backward()
        assert logits_BN.grad is not None
        return logits_BN.grad

    torch.testing.assert_close(gradient(1e-4, relative=True), gradient(10.0, relative=True), rtol=1e-3, atol=1e-7)
    # the largest |v_e - v_c| of each image: experts differ by 1 from one to the next, and the chosen
    # ones are the first, the second and the first
    steps = torch.tensor([number - 1.0, max(1.0, number - 2.0), number - 1.0]) * torch.tensor([1.0, 2.0, 3.0])
    expected = gradient(1.0, relative=False) / steps.sum()
    torch.testing.assert_close(gradient(1.0, relative=True), expected)


def test_a_relative_comparison_of_a_batch_in_parts_is_as_long_as_that_of_the_whole() -> None:
    def gradient(values: Tensor, place: Place | None) -> Tensor:
        logits_BN = torch.zeros(len(values), 2, requires_grad=True)
        with placing(place, len(values)):
            chosen_B = torch.zeros(len(values), dtype=torch.int64)
            decision = compared(chosen_B, logits_BN, sampled=False, relative=True)
        (select([torch.zeros(len(values), 1), torch.ones(len(values), 1)], decision) * values[:, None]).sum().backward()
        assert logits_BN.grad is not None
        return logits_BN.grad[:, 1]

    # equal odds, so a half of a half of the difference, which is divided by the sum of the sizes
    values = torch.tensor([1.0, -3.0, 2.0, 2.0])
    torch.testing.assert_close(gradient(values, None), values / 8 / 4)
    parts = [gradient(values[part::2], Place(part, 4, 2)) for part in range(2)]
    torch.testing.assert_close(parts[0], values[::2] / 3 / 2 / 4)
    assert sum(float(part.abs().sum()) for part in parts) == pytest.approx(1 / 4)


def test_the_turn_takes_every_other_expert_once() -> None:
    logits_BN = torch.zeros(6, 4, requires_grad=True)
    decision = compared(torch.tensor([0, 0, 0, 2, 2, 2]), logits_BN, sampled=True)
    assert decision.other_B is not None
    assert decision.other_B.tolist() == [1, 2, 3, 3, 0, 1]


@pytest.mark.parametrize(("number", "sampled"), [(2, False), (2, True), (4, False)])
def test_the_comparison_is_the_gradient_of_the_mixture(number: int, sampled: bool) -> None:
    torch.manual_seed(0)
    logits_BN, outputs = torch.randn(5, number, requires_grad=True), [torch.randn(5, 3) for _ in range(number)]
    wanted_BD, chosen_B = torch.randn(5, 3), logits_BN.argmax(dim=1)
    y = select(outputs, compared(chosen_B, logits_BN, sampled=sampled))
    (ours,) = torch.autograd.grad((wanted_BD * y).sum(), logits_BN)
    mixture = (logits_BN.softmax(dim=1).T[:, :, None] * torch.stack(outputs)).sum(dim=0)
    (theirs,) = torch.autograd.grad((wanted_BD * mixture).sum(), logits_BN)
    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("router_gradient", ["dense", "sampled"])
def test_of_four_experts_the_logit_of_the_truly_better_one_rises(
    tiny_vgg: Callable[..., RoutedNetwork], router_gradient: str
) -> None:
    """Against the losses that the last layer's other experts really give; they differ little, as coupled ones do."""
    model = tiny_vgg(warm=True, num_experts=4, router_gradient=router_gradient).eval().double()
    with torch.no_grad():
        for weight, _ in expert_banks(model):
            experts = weight.unflatten(0, (4, -1))
            experts.copy_(experts.mean(dim=0) + 0.01 * (experts - experts.mean(dim=0)))
    x = torch.rand(32, 3, 32, 32, generator=torch.Generator().manual_seed(2)).double()
    labels = torch.arange(32) % 10
    pathway = model.forward_with_routing(x)[1].expert_index_BL
    losses = []
    for expert in range(4):
        pathway_of = pathway.clone()
        pathway_of[:, -1] = expert
        losses.append(F.cross_entropy(model(x, pathway_of), labels, reduction="none"))
    loss_BN, chosen_B1 = torch.stack(losses, dim=1).detach(), pathway[:, -1:]
    model.routers.train()
    found: list[Tensor] = []

    def watch(module: nn.Module, inputs: tuple[Tensor, ...], logits_BN: Tensor) -> None:
        found.append(logits_BN.detach().softmax(dim=1))
        logits_BN.register_hook(found.append)

    model.routers[-1].register_forward_hook(watch)
    F.cross_entropy(model(x), labels, reduction="sum").backward()
    probability_BN, gradient_BN = found
    if router_gradient == "dense":
        # the gradient of the expected loss, to first order
        expected_BN = probability_BN * (loss_BN - (probability_BN * loss_BN).sum(dim=1, keepdim=True))
        assert F.cosine_similarity(gradient_BN.flatten(), expected_BN.flatten(), dim=0) > 0.95
        assert (gradient_BN.argmin(dim=1) == expected_BN.argmin(dim=1)).double().mean() > 0.9
        return
    compared_BN = gradient_BN != 0  # the one chosen and another
    assert (compared_BN.sum(dim=1) == 2).all()
    other_B1 = (compared_BN & (torch.arange(4) != chosen_B1)).int().argmax(dim=1, keepdim=True)
    change_B = (loss_BN.gather(1, other_B1) - loss_BN.gather(1, chosen_B1)).squeeze(1)
    rises_B = gradient_BN.gather(1, other_B1).squeeze(1) < 0
    assert (rises_B == (change_B < 0)).double().mean() > 0.9
