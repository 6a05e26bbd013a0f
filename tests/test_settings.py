"""Settings: a field of a configuration is checked, stored, and offered as an option."""

import ast
import dataclasses
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import pytest
import torch

import advmoe
from advmoe.cli.app import main
from advmoe.cli.options import flag
from advmoe.config import ModelConfig, TrainConfig, TrainingAttack, check_together, to_dict
from advmoe.data.sources import dataset_info
from advmoe.errors import AdvMoEError, ConfigError
from advmoe.models.registry import ARCHITECTURES
from advmoe.schema import Setting, Settings, conform, fields_of, from_dict
from advmoe.settings import OWNERS, resolve, sort_settings
from advmoe.training.methods import METHODS

OFFERED = [field for owner in OWNERS for field in fields_of(owner) if field.setting.option]


@dataclass(frozen=True, kw_only=True)
class Cake(Settings):
    layers: Annotated[int, Setting("Layers.", at_least=1, at_most=9)] = 3
    sugar: Annotated[float, Setting("Grams.", above=0.0, below=500.0)] = 100
    icing: Annotated[Literal["lemon", "cocoa"], Setting("Flavor.")] = "lemon"
    candles: Annotated[int | None, Setting("Candles.", at_least=1)] = None
    sizes: Annotated[tuple[float, ...], Setting("Radii.", above=0.0)] = ()


@dataclass(frozen=True, kw_only=True)
class Party(Settings):
    cake: Annotated[Cake, Setting("The cake.")] = dataclasses.field(default_factory=Cake)


@pytest.fixture(scope="module")
def train_help() -> str:
    from typer.testing import CliRunner

    from advmoe.cli.app import app

    return CliRunner().invoke(app, ["train", "--help"], env={"COLUMNS": "300"}).output


@pytest.mark.parametrize("field", OFFERED, ids=lambda field: field.name)
def test_a_field_is_an_option_with_its_help_and_its_default(field: Any, train_help: str) -> None:
    line = next(line for line in train_help.splitlines() if re.search(rf"{flag(field.name)}\b", line))
    assert field.setting.help in line
    default = field.setting.default or field.default
    if default is not None:
        words = {True: "on", False: "off"} if isinstance(default, bool) else {}
        text = words.get(default, f"{default:g}" if isinstance(default, float) else str(default))
        assert f"Default: {text}." in line


def test_names_of_settings_are_unique() -> None:
    assert len({field.name for owner in OWNERS for field in fields_of(owner)}) == sum(map(len, map(fields_of, OWNERS)))


def test_every_architecture_is_named_in_the_help_and_every_method_is_a_choice() -> None:
    (arch,) = (field for field in OFFERED if field.name == "arch")
    assert set(arch.kind.__args__) == set(ARCHITECTURES)
    assert all(name in arch.setting.help for name in ARCHITECTURES)
    (method,) = (field for field in OFFERED if field.name == "method")
    assert set(method.kind.__args__) == set(METHODS)


def test_settings_find_their_owner() -> None:
    assert sort_settings({"width": 0.5, "lr": 0.2, "steps": 3}) == ({"width": 0.5}, {"lr": 0.2}, {"steps": 3})
    with pytest.raises(ConfigError, match="unknown setting 'epoch'; did you mean 'epochs'"):
        sort_settings({"epoch": 3})


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"layers": 0}, "layers must be at least 1 and at most 9, got 0"),
        ({"layers": 10}, "got 10"),
        ({"layers": 2.0}, r"layers must be a whole number, got 2.0 \(float\)"),
        ({"layers": "2"}, r"layers must be a whole number, got '2' \(str\)"),
        ({"layers": True}, r"layers must be a whole number, got True \(bool\)"),
        ({"layers": None}, r"layers must be a whole number, got None"),
        ({"sugar": 0}, "sugar must be above 0 and below 500, got 0"),
        ({"sugar": float("inf")}, "sugar must be finite, above 0 and below 500, got inf"),
        ({"sugar": float("nan")}, "sugar must be finite, above 0 and below 500, got nan"),
        ({"sugar": 10**400}, "sugar must be finite"),
        ({"sugar": torch.ones(1)}, r"sugar must be a number, got tensor"),
        ({"icing": "lemmon"}, "unknown icing 'lemmon', expected one of: cocoa, lemon; did you mean 'lemon'"),
        ({"icing": ["lemon"]}, "unknown icing"),
        ({"candles": 0}, "candles must be at least 1, got 0"),
        ({"sizes": 3}, r"sizes must be a list, got 3"),
        ({"sizes": [1, -2]}, r"sizes\[1\] must be above 0, got -2"),
        ({"sizes": "ab"}, r"sizes must be a list, got 'ab'"),
        ({"layer": 1}, "Cake has no field layer; did you mean 'layers'"),
        ({5: 1}, "Cake has no field 5; was this written by a newer version"),
    ],
    ids=str,
)
def test_a_wrong_value_is_refused_in_one_line(values: dict[Any, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        from_dict(Cake, values)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 200
    with pytest.raises(ConfigError, match=message):
        from_dict(Party, {"cake": values})


def test_equal_settings_are_equal_objects_whatever_they_were_written_in() -> None:
    assert from_dict(Cake, {"sugar": 100, "sizes": [1, 2]}) == Cake(sugar=100.0, sizes=(1.0, 2.0))
    assert isinstance(Cake(sugar=100).sugar, float)
    party = Party(cake=Cake(candles=5))
    assert from_dict(Party, to_dict(party)) == party


def test_an_error_names_the_setting_it_is_about() -> None:
    with pytest.raises(AdvMoEError) as caught:
        TrainConfig(dataset="digits", lr=-1.0)
    assert caught.value.options == ("lr",)


@pytest.mark.parametrize(
    ("value", "kind", "message"),
    [
        ({"a": "b"}, dict[str, int], r"it\[a\] must be a whole number"),
        ({5: 1}, dict[str, int], "a key of it must be a text, got 5"),
        ([1, None], list[int], r"it\[1\] must be a whole number"),
        ({"a": 1}, dict[str, torch.Tensor], r"it\[a\] must be a Tensor, got 1"),
        ((1.0, 2.0), tuple[float, float, float], "must be a list of 3"),
    ],
)
def test_values_of_files_are_checked_against_a_type(value: Any, kind: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        conform(value, kind, "it")


def test_the_attack_in_training_and_the_one_of_validation_follow_the_radius() -> None:
    chosen = TrainingAttack(eps=0.4, steps=3)
    assert dataclasses.astuple(chosen.in_training()) == (0.4, 3, 5 / 8 * 0.4, 1, "gaussian")
    assert dataclasses.astuple(chosen.in_validation()) == (0.4, 10, 0.1, 1, "uniform")
    assert TrainConfig(dataset="digits").attack == TrainingAttack().in_training()


@pytest.mark.parametrize(
    ("model", "train", "message"),
    [
        ({"kind": "moe"}, {"method": "expert_at", "balance": 0.5}, "balance 0.5 needs routers that learn a choice"),
        ({"kind": "dense"}, {"method": "at", "balance": 0.5}, "balance 0.5 needs routers that learn a choice"),
        ({"kind": "sparse_cnn"}, {"method": "mask_at", "awp": 0.05}, "awp 0.05 perturbs filters, and mask_at trains"),
        ({"arch": "vit"}, {"router_statistics": "batch"}, "router_statistics batch is about BatchNorm"),
    ],
)
def test_settings_that_would_change_nothing_are_refused(model: Any, train: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        check_together(ModelConfig(**{"arch": "vgg16", **model}), TrainConfig(dataset="digits", **train))


def test_only_the_command_line_names_options() -> None:
    package = Path(advmoe.__file__).parent
    for path in package.rglob("*.py"):
        if path.parent.name == "cli" or path.name in {"experiments.py", "model_card.py"}:  # commands, as data
            continue
        texts = (node.value for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Constant))
        named = [text for text in texts if isinstance(text, str) and re.search(r"(?<![\w-])--[a-z]", text)]
        assert not named, (path, named)


def test_the_command_line_adds_the_option_that_gives_a_setting(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["train", "digits", "--weight-decay", "-1"]) == 1
    assert capsys.readouterr().err.splitlines() == ["error: weight decay must be at least 0, got -1 (--weight-decay)"]
    with pytest.raises(ConfigError, match=r"got -1$"):
        TrainConfig(dataset="digits", weight_decay=-1.0)


def test_a_model_is_described_by_its_parts() -> None:
    assert {base.__name__ for base in ModelConfig.__mro__} >= {"BackboneConfig", "ExpertsConfig", "RoutersConfig"}


def test_digits_are_not_mirrored() -> None:
    flips = {name: resolve(dataset_info(name), {"arch": "vgg16"}, {})[1].flip for name in ("digits", "cifar10")}
    assert flips == {"digits": False, "cifar10": True}
