"""PGD: the ball, the objectives, and a model that stays unchanged."""

import copy
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from advmoe.attacks.pgd import (
    cross_entropy_objective,
    kl_objective,
    misclassified,
    pgd,
    plain,
    project,
    starting_point,
)
from advmoe.config import AttackConfig
from advmoe.errors import AdvMoEError, ConfigError, NotFiniteError
from advmoe.models.modes import evaluating
from advmoe.models.network import RoutedNetwork

ULP = 2**-23
"""Spacing of float32 just above 1: x + eps - x is eps up to this."""


class OneWeight(nn.Module):
    """Two logits (0, w * sum of the image): every gradient has the sign of w."""

    def __init__(self, weight: float = 1.0) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(weight))

    def forward(self, images: Tensor) -> Tensor:
        score_B = self.weight * images.sum(dim=(1, 2, 3))
        return torch.stack((torch.zeros_like(score_B), score_B), dim=1)


@pytest.mark.parametrize("eps", [0.0, 8 / 255, 0.5, 1.0])
@pytest.mark.parametrize("steps", [0, 1, 5])
@pytest.mark.parametrize("start", ["uniform", "gaussian", "clean"])
def test_adversarial_images_stay_in_the_ball_and_in_the_pixel_range(eps: float, steps: int, start: str) -> None:
    model = OneWeight()
    images = torch.rand(4, 3, 5, 5, generator=torch.Generator().manual_seed(0))
    images[0, 0, 0, :2] = torch.tensor([0.0, 1.0])  # both ends of the pixel range
    attack = AttackConfig(eps=eps, steps=steps, step_size=0.3, start=start)
    first = starting_point(images, attack, torch.Generator().manual_seed(1))
    adversarial = pgd(
        plain(model), images, cross_entropy_objective(torch.zeros(4, dtype=torch.int64)), attack, start=first
    )
    for found in (first, adversarial):
        assert found.min() >= 0.0
        assert found.max() <= 1.0
        assert (found - images).abs().max() <= eps + ULP
    assert not adversarial.requires_grad


def test_steps_follow_the_sign_of_the_gradient() -> None:
    # Label 0 of logits (0, w s) with w > 0: the loss log(1 + exp(w s)) grows with every pixel, so
    # one step of 0.01 from the clean image adds 0.01 everywhere, three add 0.03, and ten are cut at
    # eps = 0.05.
    images = torch.full((2, 3, 4, 4), 0.5)
    objective = cross_entropy_objective(torch.zeros(2, dtype=torch.int64))
    for steps, moved in ((1, 0.01), (3, 0.03), (10, 0.05)):
        attack = AttackConfig(eps=0.05, steps=steps, step_size=0.01, start="clean")
        torch.testing.assert_close(pgd(plain(OneWeight(0.1)), images, objective, attack, start=images), images + moved)


def test_projection_is_the_nearest_point_of_the_ball_within_the_pixel_range() -> None:
    # eps = 0.1: 0.9 is cut to 0.5 + 0.1; 0.45 is inside; -0.3 lies below 0.05 - 0.1 < 0, so 0; 1.3
    # likewise 1.
    images = torch.tensor([0.5, 0.5, 0.05, 0.95])
    candidates = torch.tensor([0.9, 0.45, -0.3, 1.3])
    torch.testing.assert_close(project(candidates, images, 0.1), torch.tensor([0.6, 0.45, 0.0, 1.0]))


def test_an_image_that_is_wrong_already_is_left_alone_and_costs_nothing() -> None:
    # Score 0.1 * sum: images of 0.5 get logit 2.4 > 0, class 1. The first image's label is 0 (wrong
    # at the start), so it comes back as it is; the second, label 1, is pushed down by eps without
    # changing its class.
    seen: list[int] = []

    def forward(images: Tensor, _: Tensor) -> Tensor:
        seen.append(len(images))
        logits: Tensor = OneWeight(0.1)(images)
        return logits

    images = torch.full((2, 3, 4, 4), 0.5)
    labels = torch.tensor([0, 1])
    attack = AttackConfig(eps=0.1, steps=3, step_size=0.1, start="clean")
    found = pgd(forward, images, cross_entropy_objective(labels), attack, start=images, won=misclassified(labels))
    assert torch.equal(found[0], images[0])
    torch.testing.assert_close(found[1], images[1] - 0.1)
    assert seen == [2, 1, 1]


def test_an_attack_returns_the_iterate_that_won() -> None:
    # Score sum(x) - 24 with 48 pixels of 0.51: margin 0.48; a step of 0.02 takes 0.96 off, so the
    # first step wins.
    class Threshold(nn.Module):
        def forward(self, images: Tensor) -> Tensor:
            score_B = images.sum(dim=(1, 2, 3)) - 24
            return torch.stack((torch.zeros_like(score_B), score_B), dim=1)

    images, labels = torch.full((1, 3, 4, 4), 0.51), torch.tensor([1])
    attack = AttackConfig(eps=0.2, steps=50, step_size=0.02, start="clean")
    found = pgd(
        plain(Threshold()), images, cross_entropy_objective(labels), attack, start=images, won=misclassified(labels)
    )
    torch.testing.assert_close(found, torch.full_like(images, 0.49))


def test_more_steps_and_a_larger_ball_raise_the_loss(tiny_vgg: Callable[..., RoutedNetwork], images: Tensor) -> None:
    model, labels = tiny_vgg(), torch.arange(8)

    def loss_after(eps: float, steps: int) -> float:
        attack = AttackConfig(eps=eps, steps=steps, step_size=eps / 2, start="clean")
        found = pgd(plain(model), images, cross_entropy_objective(labels), attack, start=images)
        return F.cross_entropy(model(found), labels).item()

    with evaluating(model):
        clean, one, ten, wide = (
            loss_after(0, 1),
            loss_after(4 / 255, 1),
            loss_after(4 / 255, 10),
            loss_after(64 / 255, 10),
        )
    assert clean < one < ten < wide


def test_an_attack_leaves_parameters_buffers_and_modes_untouched(
    tiny_vgg: Callable[..., RoutedNetwork], images: Tensor
) -> None:
    model = tiny_vgg()
    model.routers.eval()  # mixed modes come back as they were
    before = copy.deepcopy(model.state_dict())
    modes = [module.training for module in model.modules()]
    attack = AttackConfig(steps=2)
    with evaluating(model):
        assert not any(module.training for module in model.modules())
        found = pgd(plain(model), images, cross_entropy_objective(torch.arange(8)), attack, start=images)
    assert not torch.equal(found, images)
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_the_modes_come_back_after_an_error() -> None:
    model = nn.BatchNorm2d(3)
    with pytest.raises(KeyError), evaluating(model):
        raise KeyError
    assert model.training


def test_the_kl_objective_is_the_divergence_from_the_clean_prediction() -> None:
    # p = (1/2, 1/2), q = (1/4, 3/4): KL(p || q) = 1/2 log 2 + 1/2 log(2/3) = 1/2 log(4/3). The
    # second rows are equal.
    clean = torch.tensor([[0.0, 0.0], [1.0, 2.0]])
    adversarial = torch.tensor([[0.0, torch.tensor(3.0).log()], [1.0, 2.0]])
    loss = kl_objective(clean)(adversarial, torch.arange(2))
    torch.testing.assert_close(loss, torch.tensor([0.5 * torch.tensor(4 / 3).log(), 0.0]))
    # Positions say which images the logits are of.
    torch.testing.assert_close(kl_objective(clean)(adversarial[:1], torch.tensor([0])), loss[:1])


def test_the_clean_prediction_is_a_constant_of_the_kl_objective() -> None:
    clean = torch.zeros(1, 2, requires_grad=True)
    assert not kl_objective(clean)(torch.ones(1, 2), torch.arange(1)).requires_grad


@pytest.mark.parametrize("broken", ["nan", "inf"])
@pytest.mark.parametrize("label", [0, 1])
@pytest.mark.parametrize("stop_early", [True, False])
def test_logits_that_are_not_finite_are_refused_whatever_the_label(broken: str, label: int, stop_early: bool) -> None:
    # argmax of NaNs is class 0: an early stop that trusts it would take every other class for
    # beaten, or for robust.
    images, labels = torch.full((2, 3, 4, 4), 0.5), torch.full((2,), label)
    attack = AttackConfig(steps=2)
    with pytest.raises(AdvMoEError, match=r"not finite.*flatter"):
        pgd(
            plain(OneWeight(float(broken))),
            images,
            cross_entropy_objective(labels),
            attack,
            start=images,
            won=misclassified(labels) if stop_early else None,
        )


def test_an_empty_batch_is_no_error(tiny_vgg: Callable[..., RoutedNetwork]) -> None:
    nothing, labels = torch.empty(0, 3, 32, 32), torch.empty(0, dtype=torch.int64)
    model = tiny_vgg().eval()
    found = pgd(
        plain(model),
        nothing,
        cross_entropy_objective(labels),
        AttackConfig(steps=2),
        start=nothing,
        won=misclassified(labels),
    )
    assert found.shape == nothing.shape


def test_starts_are_what_they_are_named_after() -> None:
    images = torch.full((4, 3, 32, 32), 0.5)

    def start(name: str) -> Tensor:
        return starting_point(images, AttackConfig(eps=0.25, start=name), torch.Generator().manual_seed(0)) - images

    assert not start("clean").any()
    # The deviation of U(-e, e) is e / sqrt 3 = 0.1443, of TRADES' start 0.001; 12,288 draws tell it
    # to better than 2 %.
    assert start("uniform").std().item() == pytest.approx(0.25 / 3**0.5, rel=0.02)
    assert start("gaussian").std().item() == pytest.approx(0.001, rel=0.02)
    assert torch.equal(start("uniform"), start("uniform"))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"eps": 8.0}, r"eps must be in \[0, 1\], .* got 8; did you mean 8/255\?"),
        ({"eps": -0.1}, r"eps must be in \[0, 1\], .* got -0.1$"),
        ({"eps": float("nan")}, "got nan"),
        ({"steps": -1}, "steps must be at least 0 .*, got -1"),
        ({"restarts": 0}, "restarts must be at least 1 .*, got 0"),
        ({"step_size": -0.1}, "step size must .* got -0.1"),
        ({"step_size": float("inf")}, "step size must .* got inf"),
        ({"start": "gausian"}, "unknown attack start 'gausian', .* did you mean 'gaussian'"),
    ],
)
def test_impossible_attacks_are_refused(settings: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        AttackConfig(**settings)  # type: ignore[arg-type]


@pytest.mark.parametrize("stop_early", [True, False])
def test_a_gradient_that_is_not_finite_is_refused(stop_early: bool) -> None:
    class Root(nn.Module):
        def forward(self, images: Tensor) -> Tensor:
            score_B = (images - images.detach()).square().sum(dim=(1, 2, 3)).sqrt()
            return torch.stack((torch.zeros_like(score_B), score_B), dim=1)

    images, labels = torch.full((2, 3, 4, 4), 0.5), torch.tensor([0, 0])
    with pytest.raises(NotFiniteError, match=r"not finite.*flatter"):
        pgd(
            plain(Root()),
            images,
            cross_entropy_objective(labels),
            AttackConfig(steps=2),
            start=images,
            won=misclassified(labels) if stop_early else None,
        )
