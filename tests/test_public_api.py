"""Names and forms that users of the library rely on."""

import ast
import inspect
from pathlib import Path

import pytest
import torch
from torch import nn

import advmoe
from advmoe.errors import AdvMoEError, CheckpointError, ConfigError, DataError, TrainingError


def test_the_public_names() -> None:
    assert set(advmoe.__all__) == {
        "AdvMoEError",
        "AttackConfig",
        "ModelConfig",
        "Routing",
        "TrainConfig",
        "__version__",
        "create_model",
        "load",
    }
    assert all(hasattr(advmoe, name) for name in advmoe.__all__)


def test_a_created_model_is_a_plain_module_from_images_to_logits() -> None:
    model = advmoe.create_model("vgg16", kind="moe", num_classes=7, num_experts=2, model_scale=0.5, width=0.0625)
    assert isinstance(model, nn.Module)
    assert model(torch.rand(2, 3, 32, 32)).shape == (2, 7)


def test_normalisation_is_inside_the_model(images: torch.Tensor) -> None:
    mean, std = (0.1, 0.2, 0.3), (0.4, 0.5, 0.6)
    torch.manual_seed(0)
    inside = advmoe.create_model("vgg16", kind="s_dense", width=0.0625, mean=mean, std=std).eval()
    torch.manual_seed(0)
    outside = advmoe.create_model("vgg16", kind="s_dense", width=0.0625).eval()
    normalised = (images - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)
    torch.testing.assert_close(inside(images), outside(normalised))


def test_loading_is_loading_of_checkpoints() -> None:
    assert list(inspect.signature(advmoe.load).parameters)[:1] == ["path"]


@pytest.mark.parametrize("error", [CheckpointError, ConfigError, DataError, TrainingError])
def test_errors_of_the_user_have_one_base(error: type[Exception]) -> None:
    assert issubclass(error, AdvMoEError)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"arch": "vgg-16"}, r"unknown architecture 'vgg-16', .*did you mean 'vgg16'\?"),
        ({"kind": "MoE"}, r"unknown model kind 'MoE', .*did you mean 'moe'\?"),
        ({"num_classes": 1}, "number of classes must be at least 2 .*, got 1"),
        ({"num_experts": 0}, "number of experts N must be at least 1 .*, got 0"),
        ({"num_experts": 300}, "at most 255, got 300"),
        ({"model_scale": 0.001}, "leaves no channel"),
        ({"width": float("nan")}, "width multiplier must be finite, above 0 .*, got nan"),
        ({"std": (1.0, 0.0, 1.0)}, r"standard deviation\[1\] must be above 0, got 0"),
        ({"image_size": 4}, "image size must be at least 8 .*, got 4"),
        ({"image_size": 16}, "needs at least 32 pixels, got 16"),
    ],
)
def test_impossible_models_are_refused(settings: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        advmoe.create_model(**{"arch": "vgg16", **settings})  # type: ignore[arg-type]


def test_library_code_never_prints_and_never_exits() -> None:
    package = Path(advmoe.__file__).parent
    for path in package.rglob("*.py"):
        if path.parent.name == "cli":
            continue
        calls = (node.func for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call))
        names = {call.id for call in calls if isinstance(call, ast.Name)}
        assert not names & {"print", "exit", "quit", "input"}, path
