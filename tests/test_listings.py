"""`advmoe recipes` and `advmoe info`: short listings by default, all details on request, and valid JSON."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from advmoe.cli.app import main
from advmoe.cli.info import model_file_facts
from advmoe.models.network import RoutedNetwork
from advmoe.recipes import recipes
from advmoe.training.checkpoint import Checkpoint, save_checkpoint


def test_recipes_are_a_line_each_under_their_table_data_set_and_backbone(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["recipes"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len([line for line in lines if line.startswith("  ")]) == len(recipes())
    assert "Table 1: cifar10, resnet18" in lines


def test_recipes_know_the_names_that_reproduce_has(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["recipes", "fig2"]) == 0
    lines = [line.split()[0] for line in capsys.readouterr().out.splitlines() if line.startswith("  ")]
    assert lines == ["table1-cifar10-resnet18-at-s-dense", "table1-cifar10-resnet18-at-moe"]
    assert main(["recipes", "fig99"]) == 1
    assert "no recipe matches 'fig99'" in capsys.readouterr().err


@pytest.fixture
def run(tiny_vgg: Callable[..., RoutedNetwork], tmp_path: Path) -> Path:
    model = tiny_vgg()
    metrics = {"epoch": 1, "val_sa": float("nan"), "val_ra_pgd10": 50.0, "train_loss": float("inf"), "lr": [0.1, 1e400]}
    path = tmp_path / "run"
    classes = tuple(f"class {number}" for number in range(10))
    save_checkpoint(
        path / "best.pt",
        Checkpoint(model=model.config, weights=model.state_dict(), class_names=classes, metrics=metrics),
    )
    return path


def test_info_is_a_summary_and_all_shows_the_rest(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info", str(run)]) == 0
    short = capsys.readouterr().out
    assert "val_ra_pgd10" in short
    assert "router_gradient" not in short
    assert "train_loss" not in short
    assert main(["info", str(run), "--all"]) == 0
    everything = capsys.readouterr().out
    assert "router_gradient" in everything
    assert "train_loss" in everything


def test_names_are_lists_in_json_and_text_for_people(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["model kinds"] == ["dense", "s_dense", "sparse_cnn", "moe"]
    assert set(facts["training methods"]) >= {"advmoe", "at"}
    assert main(["info"]) == 0
    assert "dense, s_dense, sparse_cnn, moe" in capsys.readouterr().out


@pytest.mark.parametrize(("size", "shown"), [((32, 32), 32), ((32, 48), (32, 48))])
def test_the_image_size_of_a_file_is_that_of_its_checkpoint(size: tuple[int, int], shown: object) -> None:
    metadata = pytest.importorskip("advmoe_export").ModelMetadata(
        labels=("a", "b"),
        image_size=size,
        resize=48,
        input_type="float32",
        profile="hybrid",
        dtype="fp32",
        opset=18,
        batch_size=None,
        outputs=("logits",),
        num_experts=(),
        layers=(),
        expert_load=None,
        tool={},
        data_sha256="",
        data_bytes=0,
        model={},
    )
    assert model_file_facts(metadata)["image_size"] == shown


def test_json_has_null_where_a_number_is_not_finite(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def refuse(constant: str) -> None:
        raise AssertionError(constant)

    assert main(["info", str(run / "best.pt"), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out, parse_constant=refuse)
    assert facts["metrics.val_sa"] is facts["metrics.train_loss"] is None
    assert facts["metrics.lr"] == [0.1, None]
