"""Broken defenses: the diagnostics find each of them by the check for it. A correct model passes all checks."""

import copy
from collections.abc import Callable

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from rooms import TwoRooms, room_images
from torch import Tensor, nn
from under_attack import victims_of

from advmoe.attacks.pgd import plain
from advmoe.attacks.relaxations import routing_views
from advmoe.attacks.untargeted import untargeted
from advmoe.config import AttackConfig
from advmoe.data.sources import Dataset
from advmoe.errors import ConfigError
from advmoe.evaluation.diagnostics import (
    Diagnostic,
    black_box,
    check_batch_invariant,
    check_routing,
    diagnose,
    routing_gap,
    routing_seen,
)
from advmoe.evaluation.vocabulary import verdict_of
from advmoe.models.network import RoutedNetwork

ATTACK = AttackConfig(eps=24 / 255, steps=20, step_size=6 / 255)
"""Digits are easy: at this radius the sound model keeps about a third of its images."""


class Digits(nn.Module):
    """A small convolutional net for digits, with a hook for what a defense does to images, and one for logits."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(3, 8, 5, stride=4, padding=2), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 64, 10)
        )

    def before(self, x: Tensor) -> Tensor:
        return x

    def after(self, logits: Tensor) -> Tensor:
        return logits

    def forward(self, x: Tensor) -> Tensor:
        return self.after(self.body(self.before(x)))


@pytest.fixture(scope="module")
def data(digits: Dataset) -> tuple[Tensor, Tensor]:
    images = torch.from_numpy(digits.train.images).permute(0, 3, 1, 2).float() / 255
    return images[:80], torch.from_numpy(digits.train.labels)[:80]


def trained(images: Tensor, labels: Tensor) -> Digits:
    """Fitted to its images, with some noise, by 60 steps of Adam."""
    torch.manual_seed(0)
    net = Digits()
    optimizer = torch.optim.Adam(net.parameters(), lr=0.01)
    for _ in range(60):
        optimizer.zero_grad()
        F.cross_entropy(net(images + 0.05 * torch.randn_like(images)), labels).backward()
        optimizer.step()
    return net.eval()


@pytest.fixture(scope="module")
def sound(data: tuple[Tensor, Tensor]) -> Digits:
    return trained(*data)


def checked(model: nn.Module, data: tuple[Tensor, Tensor], attack: AttackConfig = ATTACK) -> dict[str, Diagnostic]:
    images, labels = data[0][:40], data[1][:40]
    found = diagnose(victims_of(model, images, labels, attack), square_queries=100)
    return {diagnostic.name: diagnostic for diagnostic in found}


def defended(sound: Digits, defense: type[Digits]) -> Digits:
    model = copy.deepcopy(sound)
    model.__class__ = defense
    return model


def verdict(diagnostics: dict[str, Diagnostic]) -> str:
    return verdict_of({name: check.status for name, check in diagnostics.items()})


def failures(diagnostics: dict[str, Diagnostic]) -> set[str]:
    return {name for name, diagnostic in diagnostics.items() if diagnostic.status == "failed"}


def test_a_sound_model_passes_every_check(sound: Digits, data: tuple[Tensor, Tensor]) -> None:
    diagnostics = checked(sound, data)
    assert {diagnostic.status for diagnostic in diagnostics.values()} == {"passed"}, diagnostics
    assert verdict(diagnostics) == "trusted"
    assert list(diagnostics) == [
        "finite",
        "logits",
        "deterministic",
        "batch_invariant",
        "input_range",
        "label_blind",
        "zero_gradients",
        "large_eps",
        "one_step",
        "converged",
        "monotone_in_eps",
        "black_box",
    ]


class Quantized(Digits):
    """Rounds the images: the gradient is zero everywhere."""

    def before(self, x: Tensor) -> Tensor:
        return (16 * x).round() / 16


class Saturated(Digits):
    """Logits so large that the softmax's gradient underflows."""

    def after(self, logits: Tensor) -> Tensor:
        return 1000 * logits


class Shattered(Digits):
    """Adds a ripple too small to see, whose slope drowns the gradient."""

    def before(self, x: Tensor) -> Tensor:
        return x + 0.002 * torch.sin(1e5 * x)


class Noisy(Digits):
    """Answers at random to a degree."""

    def after(self, logits: Tensor) -> Tensor:
        return logits + torch.randn_like(logits)


class Softmax(Digits):
    """Gives probabilities for logits."""

    def after(self, logits: Tensor) -> Tensor:
        return logits.softmax(dim=1)


class BatchStatistics(Digits):
    """Normalizes each image by its neighbors."""

    def after(self, logits: Tensor) -> Tensor:
        return logits - logits.mean(dim=0)


class Leaking(Digits):
    """Knows the labels of the test set by their position."""

    labels: Tensor

    def after(self, logits: Tensor) -> Tensor:
        return logits + 1000.0 * F.one_hot(self.labels[: len(logits)], 10)


class NaN(Digits):
    """Diverged in training."""

    def after(self, logits: Tensor) -> Tensor:
        return logits * torch.nan


@pytest.mark.parametrize(
    ("defense", "caught_by"),
    [
        (Quantized, {"zero_gradients", "large_eps", "black_box"}),
        (Saturated, {"zero_gradients", "large_eps"}),
        (Shattered, {"large_eps"}),
        (Noisy, {"deterministic"}),
        (Softmax, {"logits"}),
        (BatchStatistics, {"batch_invariant"}),
        (Leaking, {"label_blind", "batch_invariant", "large_eps"}),
        (NaN, {"finite"}),
    ],
)
def test_a_broken_defense_is_caught(
    sound: Digits, data: tuple[Tensor, Tensor], defense: type[Digits], caught_by: set[str]
) -> None:
    model = defended(sound, defense)
    if isinstance(model, Leaking):
        model.labels = data[1][:40]
    diagnostics = checked(model, data)
    assert caught_by <= failures(diagnostics), diagnostics
    assert verdict(diagnostics) == "not to be trusted"


class Marked(nn.Module):
    """Counts the batch where an image's first value is 1."""

    def forward(self, x: Tensor) -> Tensor:
        marked = x[:, 0, 0, 0] == 1.0
        return x.flatten(1)[:, :10] + len(x) * marked[:, None]


@pytest.mark.parametrize(("marked", "status"), [(1, "passed"), (2, "failed")])
def test_one_image_of_a_small_sample_may_depend_on_its_batch(marked: int, status: str) -> None:
    images = torch.full((32, 3, 8, 8), 0.5)
    images[:marked, 0, 0, 0] = 1.0  # 3 % of the images, or 6 %
    sample = victims_of(Marked(), images, torch.zeros(32, dtype=torch.int64), ATTACK)
    assert check_batch_invariant(sample).status == status


ATTACKED = {"zero_gradients", "large_eps", "one_step", "converged", "monotone_in_eps", "black_box"}
"""Checks of the attack."""


@pytest.mark.parametrize("images", [0, 1, 4, 15])
def test_a_few_images_show_nothing_of_an_attack(sound: Digits, data: tuple[Tensor, Tensor], images: int) -> None:
    right = (sound(data[0]).argmax(dim=1) == data[1]).nonzero().squeeze(1)
    wrong = (data[1][:8] + 1) % 10  # a wrong label makes a wrong prediction
    shown = torch.cat((data[0][right[:images]], data[0][:8])), torch.cat((data[1][right[:images]], wrong))
    diagnostics = checked(sound, shown)
    assert all(diagnostics[name].status == "not run" for name in ATTACKED), diagnostics
    found = f"{images} image is" if images == 1 else f"{images} images are"
    assert diagnostics["large_eps"].value == f"{found} classified correctly, the check needs 16"
    assert verdict(diagnostics) == "not checked"
    # A mask may be seen on a few images, but is never called sound because of them.
    assert verdict(checked(defended(sound, Quantized), shown)) == ("not to be trusted" if images else "not checked")


def test_a_radius_of_zero_has_no_radii_around_it(sound: Digits, data: tuple[Tensor, Tensor]) -> None:
    diagnostics = checked(sound, data, AttackConfig(eps=0.0, steps=2, step_size=0.0))
    assert (diagnostics["monotone_in_eps"].status, diagnostics["monotone_in_eps"].value) == ("not run", "eps is 0")
    assert diagnostics["large_eps"].status == "passed"


def test_the_route_attack_sees_what_the_views_do_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("advmoe.evaluation.diagnostics.routing_views", lambda model: {"detached": plain(model)})
    for images, status in ((16, "failed"), (1, "not run")):
        sample = victims_of(TwoRooms(), room_images(*[0.49] * images), torch.tensor([0] * images), ATTACK)
        gap = check_routing(sample, torch.tensor([[0], [1]]))
        assert gap.status == status
        if status == "failed":
            assert gap.value.startswith("RA 100.0 % by the model's own gradient, 0.0 %")


def test_normalization_outside_the_model_is_caught(data: tuple[Tensor, Tensor]) -> None:
    images, labels = data
    normalized = (images - images.mean()) / images.std()
    model = trained(normalized, labels)
    diagnostics = checked(model, data)
    assert "input_range" in failures(diagnostics), diagnostics
    with pytest.raises(ConfigError, match=r"attacks need images in \[0, 1\], got values from -"):
        checked(model, (normalized, labels))


def test_a_nan_router_is_caught_though_its_logits_look_sound(tiny_vgg: Callable[..., RoutedNetwork]) -> None:
    model = tiny_vgg().eval()
    with torch.no_grad():
        model.routers[3].linear.weight.fill_(torch.nan)  # type: ignore[union-attr, operator]
    images = torch.rand(8, 3, 32, 32)
    assert model(images).isfinite().all()
    finite = diagnose(victims_of(model, images, torch.zeros(8, dtype=torch.int64), ATTACK))[0]
    assert finite.status == "failed"
    assert "router logits" in finite.value


def test_an_attack_too_weak_to_converge_is_caught(sound: Digits, data: tuple[Tensor, Tensor]) -> None:
    weak = AttackConfig(eps=24 / 255, steps=4, step_size=3 / 255, start="clean")
    assert {"converged", "one_step"} <= failures(checked(sound, data, weak))


def test_a_robustness_that_only_routing_hides_is_caught() -> None:
    victims = victims_of(TwoRooms(), room_images(0.49, 0.47), torch.tensor([0, 0]), ATTACK)
    broken = {name: ~untargeted(victims, forward)[1] for name, forward in routing_views(TwoRooms()).items()}
    own = 1.0 - float(broken["detached"].float().mean())
    union = 1.0 - float(torch.stack(list(broken.values())).any(dim=0).float().mean())
    assert (own, union) == (1.0, 0.0)
    assert routing_gap(own, union, 2).status == "failed"
    assert routing_gap(union, union, 2).status == "passed"
    # Of 200 images 2 % are 4; of 20, one is 5 %, and may be chance.
    assert routing_gap(0.5, 0.48, 200).status == "passed"
    assert routing_gap(0.5, 0.475, 200).status == "failed"
    assert routing_gap(0.5, 0.45, 20).status == "passed"


def test_square_is_compared_with_all_that_sees_a_gradient() -> None:
    """PGD stands still before the router of the first room; Square walks through, and so do the routing's views."""
    attack = AttackConfig(eps=24 / 255, steps=5, step_size=6 / 255)
    sample = victims_of(TwoRooms(), room_images(*[0.49, 0.47] * 8), torch.tensor([0] * 16), attack)

    def seen(withstood: Tensor | None) -> Diagnostic:
        found = diagnose(sample, withstood=withstood, square_queries=20)
        return {check.name: check for check in found}["black_box"]

    assert seen(None).status == "failed"
    assert seen(torch.tensor([True] * 16)).status == "failed"
    assert seen(torch.tensor([False] * 16)).status == "passed"
    # AutoAttack's authors warn from 0.2 points on: 20 of 10,000. One image is always allowed.
    assert [black_box(broken, 10_000, 5000).status for broken in (20, 21)] == ["passed", "failed"]
    assert [black_box(broken, 64, 500).status for broken in (1, 2)] == ["passed", "failed"]


def test_the_use_of_the_routers_is_told_without_a_verdict() -> None:
    clean = np.array([[0, 1], [0, 1], [0, 0], [0, 0]], dtype=np.uint8)
    attacked = np.array([[0, 1], [0, 0], [0, 0], [0, 0]], dtype=np.uint8)
    check = routing_seen(clean, attacked, 2)
    # Layer 0 always takes expert 0 (entropy 0), layer 1 both alike (1); 1 of 4 images and of 8
    # decisions changes.
    assert check.value == (
        "2 pathways in 4 images; entropy of the load 0.50, lowest layer 0.00; "
        "PGD changes the pathway of 25.0 % of images, 12.5 % of decisions"
    )
    assert verdict_of({check.name: check.status}) == "not checked"


def test_a_larger_radius_that_helps_the_model_is_caught() -> None:
    class Window(nn.Module):
        def forward(self, images: Tensor) -> Tensor:
            level_B = 255 * (images.mean(dim=(1, 2, 3)) - 0.5)
            score_B = (level_B + 2).abs() - 2
            return torch.stack((torch.zeros_like(score_B), score_B), dim=1)

    images, labels = torch.full((16, 3, 4, 4), 0.5 + 6 / 255), torch.ones(16, dtype=torch.int64)
    attack = AttackConfig(eps=8 / 255, steps=4, step_size=8 / 255, start="clean")
    found = {check.name: check for check in diagnose(victims_of(Window(), images, labels, attack), square_queries=0)}
    assert found["monotone_in_eps"].value == "RA 100.0 %, 0.0 %, 100.0 % at eps/2, eps, 2 eps"
    assert found["monotone_in_eps"].status == "failed"
