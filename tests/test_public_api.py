"""Public names and signatures of the library."""

import ast
import inspect
import json
import pydoc
import subprocess
import sys
from pathlib import Path
from typing import get_type_hints

import pytest
import torch
from torch import nn

import advmoe
from advmoe.config import ModelConfig, ModelSettings
from advmoe.errors import AdvMoEError, CheckpointError, ConfigError, DataError, TrainingError
from advmoe.schema import fields_of
from advmoe.training.checkpoint import Checkpoint, save_checkpoint


def test_the_public_names() -> None:
    assert set(advmoe.__all__) == {
        "AdvMoEError",
        "AttackConfig",
        "ModelConfig",
        "Routing",
        "TrainConfig",
        "__version__",
        "create_model",
        "list_models",
        "load",
    }
    assert all(hasattr(advmoe, name) for name in advmoe.__all__)


def test_a_created_model_is_a_plain_module_from_images_to_logits() -> None:
    model = advmoe.create_model("vgg16", kind="moe", num_classes=7, num_experts=2, model_scale=0.5, width=0.0625)
    assert isinstance(model, nn.Module)
    assert model(torch.rand(2, 3, 32, 32)).shape == (2, 7)


def test_normalization_is_inside_the_model(images: torch.Tensor) -> None:
    mean, std = (0.1, 0.2, 0.3), (0.4, 0.5, 0.6)
    torch.manual_seed(0)
    inside = advmoe.create_model("vgg16", kind="s_dense", width=0.0625, mean=mean, std=std).eval()
    torch.manual_seed(0)
    outside = advmoe.create_model("vgg16", kind="s_dense", width=0.0625).eval()
    normalized = (images - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)
    torch.testing.assert_close(inside(images), outside(normalized))


def test_completion_and_help_show_the_names_before_anything_is_imported() -> None:
    script = "import sys, advmoe; assert set(advmoe.__all__) <= set(dir(advmoe)); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", script], check=True)
    shown = pydoc.render_doc(advmoe, renderer=pydoc.plaintext)
    assert "create_model(arch: str, *, kind:" in shown
    assert "list_models()" in shown


def test_the_settings_of_a_model_are_known_to_editors_and_type_checkers() -> None:
    fields = {field.name: field for field in fields_of(ModelConfig) if field.name != "arch"}
    assert get_type_hints(ModelSettings) == {name: field.kind for name, field in fields.items()}
    parameters = inspect.signature(advmoe.create_model).parameters
    assert {name: parameter.default for name, parameter in parameters.items() if name != "arch"} == {
        name: field.default for name, field in fields.items()
    }


def test_models_are_listed() -> None:
    assert advmoe.list_models() == ["densenet", "resnet18", "vgg16", "vit", "wrn28_10"]


def test_a_loaded_model_tells_its_classes(tmp_path: Path) -> None:
    model = advmoe.create_model("vgg16", kind="s_dense", width=0.0625, num_classes=2)
    assert model.class_names == ()
    path = tmp_path / "model.pt"
    save_checkpoint(path, Checkpoint(model=model.config, weights=model.state_dict(), class_names=("cat", "dog")))
    assert advmoe.load(path).class_names == ("cat", "dog")


@pytest.mark.parametrize("settings", [{"num_classes": "10"}, {"num_experts": 2.0}, {"width": 1e300}, {"nosuch": 1}])
def test_settings_of_the_wrong_kind_are_refused(settings: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match=f"{next(iter(settings))[:5]}|number of"):
        advmoe.create_model("vgg16", **settings)  # type: ignore[arg-type]


def test_the_notebook_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    monkeypatch.chdir(tmp_path)
    notebook = json.loads((Path(advmoe.__file__).parent.parent / "examples" / "quickstart.ipynb").read_text())
    names: dict[str, object] = {}
    for cell in notebook["cells"]:
        if cell["cell_type"] == "code":
            assert not cell["outputs"]
            exec("".join(cell["source"]), names)
    capsys.readouterr()
    assert (tmp_path / "quickstart" / "best.pt").is_file()


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
