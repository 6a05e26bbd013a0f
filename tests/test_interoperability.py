"""Other tools can use a loaded model: images in [0, 1] in, logits out, in eval mode."""

import importlib
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import Tensor, nn

import advmoe
from advmoe.models.network import RoutedNetwork
from advmoe.training.checkpoint import Checkpoint, save_checkpoint

pytestmark = pytest.mark.filterwarnings("ignore")  # of the other libraries
EPS = 8 / 255


@pytest.fixture
def subject(tiny_vgg: Callable[..., RoutedNetwork], tmp_path: Path) -> tuple[nn.Module, Tensor, Tensor]:
    """A model from a checkpoint, images, and as labels its own predictions."""
    model = tiny_vgg()
    names = tuple("0123456789")
    save_checkpoint(tmp_path / "best.pt", Checkpoint(model=model.config, weights=model.state_dict(), class_names=names))
    loaded = advmoe.load(tmp_path / "best.pt")
    images = torch.rand(6, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return loaded, images, loaded(images).argmax(dim=1)


def optional(name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        pytest.skip(f"{name} cannot be imported: {error}")


def check(model: nn.Module, images: Tensor, adversarial: Tensor) -> None:
    """Something was changed, within the ball, and the model is still as it was."""
    difference = (adversarial - images).abs()
    assert 0 < difference.max() <= EPS + 1e-6
    assert not model.training
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_torchattacks(subject: tuple[nn.Module, Tensor, Tensor]) -> None:
    torchattacks = optional("torchattacks")
    model, images, labels = subject
    check(model, images, torchattacks.PGD(model, eps=EPS, alpha=EPS / 4, steps=3)(images, labels))


def test_foolbox(subject: tuple[nn.Module, Tensor, Tensor]) -> None:
    foolbox = optional("foolbox")
    model, images, labels = subject
    wrapped = foolbox.PyTorchModel(model, bounds=(0, 1), device="cpu")
    attack = foolbox.attacks.LinfPGD(abs_stepsize=EPS / 4, steps=3)
    check(model, images, attack(wrapped, images, labels, epsilons=EPS)[1])


def test_the_adversarial_robustness_toolbox(subject: tuple[nn.Module, Tensor, Tensor]) -> None:
    classification, evasion = optional("art.estimators.classification"), optional("art.attacks.evasion")
    model, images, labels = subject
    wrapped = classification.PyTorchClassifier(
        model, nn.CrossEntropyLoss(), images.shape[1:], 10, clip_values=(0, 1), device_type="cpu"
    )
    attack = evasion.ProjectedGradientDescent(wrapped, eps=EPS, eps_step=EPS / 4, max_iter=3, verbose=False)
    check(model, images, torch.from_numpy(attack.generate(images.numpy(), labels.numpy())))


def test_the_autoattack_package_by_itself(subject: tuple[nn.Module, Tensor, Tensor]) -> None:
    package = optional("pyautoattack")
    model, images, labels = subject
    runner = package.AutoAttack(model, norm="Linf", eps=EPS, seed=0, version="standard")
    runner.attacks_to_run = ["apgd-ce", "square"]
    runner.square.n_queries = 3
    runner.apgd.n_iter = 5
    adversarial, predicted = runner.run_standard_evaluation(images, labels, batch_size=4)
    with torch.no_grad():
        assert torch.equal(model(adversarial).argmax(dim=1), predicted)
    assert (adversarial - images).abs().max() <= EPS + 1e-6


def test_robustbench(subject: tuple[nn.Module, Tensor, Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    evaluation = optional("robustbench.eval")
    model, images, labels = subject
    wrong = (labels + (torch.arange(len(labels)) > 2)) % 10  # no attack is needed for these

    class Nothing:
        def __init__(self, model: nn.Module, **_: object) -> None: ...

        def run_standard_evaluation(self, x: Tensor, y: Tensor, **_: object) -> Tensor:
            return x

    monkeypatch.setattr(evaluation, "AutoAttack", Nothing)  # the package is tested above
    monkeypatch.setattr(evaluation, "load_clean_dataset", lambda *_: (images, wrong))
    accuracies = evaluation.benchmark(model, n_examples=6, dataset="cifar10", threat_model="Linf", eps=EPS)
    assert accuracies == (0.5, 0.5)
