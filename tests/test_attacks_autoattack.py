"""AutoAttack: official settings, agreement with a second implementation, and limits."""

import importlib
import itertools
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from under_attack import victims_of

from advmoe.attacks import autoattack as wrapper
from advmoe.attacks.autoattack import STANDARD, autoattack
from advmoe.attacks.untargeted import untargeted
from advmoe.config import AttackConfig
from advmoe.data.sources import Dataset
from advmoe.errors import ConfigError
from advmoe.models.modes import evaluating

pytest.importorskip("pyautoattack", reason="AutoAttack is an optional dependency")
EPS = 24 / 255
PGD = AttackConfig(eps=EPS, steps=50, step_size=EPS / 4)


@pytest.fixture(scope="module")
def trained(digits: Dataset) -> tuple[nn.Module, Tensor, Tensor]:
    """A small net for digits and 10 of its training images, all classified correctly."""
    images = torch.from_numpy(digits.train.images[:80]).permute(0, 3, 1, 2).float() / 255
    labels = torch.from_numpy(digits.train.labels[:80])
    torch.manual_seed(0)
    net = nn.Sequential(nn.AvgPool2d(4), nn.Flatten(), nn.Linear(192, 16), nn.ReLU(), nn.Linear(16, 10))
    optimizer = torch.optim.Adam(net.parameters(), lr=0.03)
    for _ in range(60):
        optimizer.zero_grad()
        F.cross_entropy(net(images), labels).backward()
        optimizer.step()
    right = (net(images).argmax(dim=1) == labels).nonzero().squeeze(1)[:10]
    return net.eval(), images[right].contiguous(), labels[right]


def test_the_standard_version_has_the_official_settings(
    trained: tuple[nn.Module, Tensor, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    # Croce & Hein: APGD-CE and targeted APGD-DLR (9 targets) and FAB (9 targets) with 100 steps,
    # one restart each, and Square with 5,000 queries.
    net, images, labels = trained
    package, made, ran = wrapper.package(), [], []

    class Spy(package.AutoAttack):  # type: ignore[name-defined, misc]
        def __init__(self, *args: object, **options: object) -> None:
            super().__init__(*args, **options)
            made.append(self)
            for name in ("apgd", "apgd_targeted", "fab", "square"):
                attack = getattr(self, name)
                attack.perturb = lambda x, y, name=name, attack=attack: (ran.append((name, attack)), x)[1]

    monkeypatch.setattr(package, "AutoAttack", Spy)
    autoattack(victims_of(net, images, labels, PGD))
    (runner,) = made
    assert [name for name, _ in ran] == ["apgd", "apgd_targeted", "fab", "square"]
    assert (runner.apgd.loss, runner.apgd_targeted.loss, runner.fab.targeted) == ("ce", "dlr-targeted", True)
    assert [runner.apgd.n_iter, runner.apgd_targeted.n_iter, runner.fab.n_iter] == [100, 100, 100]
    assert [runner.apgd.n_restarts, runner.apgd_targeted.n_restarts, runner.fab.n_restarts] == [1, 1, 1]
    assert (runner.apgd_targeted.n_target_classes, runner.fab.n_target_classes) == (9, 9)
    assert (runner.square.n_queries, runner.square.n_restarts) == (5000, 1)
    assert {attack.eps for _, attack in ran} == {EPS}
    assert len(ran) == len(STANDARD)


def test_an_image_gets_the_same_random_numbers_in_any_batch(trained: tuple[nn.Module, Tensor, Tensor]) -> None:
    net, images, labels = trained
    forward_passes: list[Tensor] = []

    class Seen(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            forward_passes.append(x.detach().clone())
            logits: Tensor = net(x)
            return logits

    def tried(rows: list[int], attack: str) -> list[Tensor]:
        """What the attack gives to the model: the images, then its starts, then what follows from them."""
        forward_passes.clear()
        with evaluating(net):
            victims = victims_of(Seen(), images, labels, AttackConfig(eps=1 / 255), seed=3).take(torch.tensor(rows))
            autoattack(victims, attacks=(attack,), square_queries=3)
        return forward_passes[2:6]  # after the one that counts the classes, and the attack's own look at the images

    for attack in ("apgd-ce", "square"):
        alone, among = tried([4], attack), tried([0, 4, 7], attack)
        assert not torch.equal(alone[0], images[[4]])
        for own, others in zip(alone, among, strict=True):
            torch.testing.assert_close(own[0], others[1], rtol=0, atol=1e-6)
        assert not torch.equal(among[0][0] - images[0], among[0][1] - images[4])


@pytest.mark.slow
def test_it_agrees_with_a_second_implementation(trained: tuple[nn.Module, Tensor, Tensor]) -> None:
    torchattacks = pytest.importorskip("torchattacks", reason="the second implementation is not installed")
    net, images, labels = trained
    with evaluating(net):
        ours = autoattack(victims_of(net, images, labels, PGD), attacks=("apgd-ce", "apgd-t", "fab-t"))
        left = torch.ones(len(images), dtype=torch.bool)
        for attack in (
            torchattacks.APGD(net, eps=EPS, steps=100),
            torchattacks.APGDT(net, eps=EPS, steps=100),
            torchattacks.FAB(net, eps=EPS, steps=100, multi_targeted=True),
        ):
            left &= net(attack(images, labels)).argmax(dim=1) == labels
    assert 0 < int(left.sum()) < len(images)
    assert torch.equal(ours.robust_after["fab-t"], left)


def test_it_breaks_what_pgd_breaks_within_the_ball(trained: tuple[nn.Module, Tensor, Tensor]) -> None:
    net, images, labels = trained
    with evaluating(net):
        channels_last = images.to(memory_format=torch.channels_last)  # not contiguous, as a loader may give them
        victims = victims_of(net, channels_last, labels, PGD)
        result = autoattack(victims, attacks=("apgd-ce", "square"), square_queries=50)
        robust = untargeted(victims_of(net, images, labels, PGD))[1]
    assert list(result.robust_after) == ["apgd-ce", "square"]
    masks = list(result.robust_after.values())
    assert all((later <= earlier).all() for earlier, later in itertools.pairwise(masks))
    assert (masks[-1] <= robust).all()
    assert torch.equal(net(result.adversarial).argmax(dim=1) == labels, masks[-1])
    assert (result.adversarial - images).abs().max() <= EPS + 1e-6
    assert result.adversarial.min() >= 0.0
    assert result.adversarial.max() <= 1.0


def test_the_package_says_nothing(
    trained: tuple[nn.Module, Tensor, Tensor], capsys: pytest.CaptureFixture[str]
) -> None:
    net, images, _ = trained
    flat = nn.Sequential(net, nn.Softmax(dim=1), nn.Threshold(2.0, 0.0))  # no gradient anywhere, of which it warns
    victims = victims_of(flat, images[:4], flat(images[:4]).argmax(dim=1), AttackConfig(eps=1 / 255))
    autoattack(victims, attacks=("apgd-t",))
    assert capsys.readouterr() == ("", "")


def test_it_leaves_the_random_state_alone(trained: tuple[nn.Module, Tensor, Tensor]) -> None:
    net, images, labels = trained
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    autoattack(victims_of(net, images[:2], labels[:2], PGD), attacks=("apgd-ce",))
    assert torch.equal(torch.rand(3), expected)


def test_too_few_classes_and_a_missing_package_are_refused(
    trained: tuple[nn.Module, Tensor, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    net, images, labels = trained
    three = nn.Sequential(net, nn.Linear(10, 3))
    with pytest.raises(ConfigError, match="at least 4 classes, got 3"):
        autoattack(victims_of(three, images, labels, PGD))
    monkeypatch.setitem(sys.modules, "pyautoattack", None)
    with pytest.raises(ConfigError, match=r"pip install 'advmoe\[autoattack\]'"):
        importlib.import_module("advmoe.attacks.autoattack").package()
