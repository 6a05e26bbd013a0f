"""Models in safetensors files: loading returns the saved model, and other files are refused."""

import json
import resource
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

import advmoe
from advmoe.cli.app import main
from advmoe.errors import CheckpointError
from advmoe.models.network import RoutedNetwork
from advmoe.safetensors_file import KEY
from advmoe.training.checkpoint import Checkpoint, load_checkpoint, save_checkpoint

NAMES = tuple("0123456789")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, tiny_vgg: Callable[..., RoutedNetwork]) -> Path:
    """The checkpoint of a run, with the state of its training."""
    model = tiny_vgg(warm=True)
    path = tmp_path_factory.mktemp("run") / "best.pt"
    save_checkpoint(
        path,
        Checkpoint(
            model=model.config,
            weights=model.state_dict(),
            class_names=NAMES,
            train={"dataset": "digits", "method": "advmoe"},
            metrics={"val_sa": 0.5, "val_loss": float("nan"), "lr": [0.1, 0.2], "pgd": [0.5, float("inf")]},
            optimizers=[{"state": {0: torch.zeros(3)}}],
        ),
    )
    return path


@pytest.fixture(scope="module")
def exported(run: Path) -> Path:
    target = run.with_name("model.safetensors")
    assert main(["export", str(run), str(target)]) == 0
    return target


def test_the_exported_model_computes_what_the_checkpoint_computes(run: Path, exported: Path) -> None:
    images = torch.rand(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    assert torch.equal(advmoe.load(exported)(images), advmoe.load(run)(images))
    contents = load_checkpoint(exported)
    assert contents.class_names == NAMES
    assert contents.train == {"dataset": "digits", "method": "advmoe"}
    assert contents.metrics == {"val_sa": 0.5, "lr": [0.1, 0.2]}  # JSON has neither NaN nor infinity
    assert contents.optimizers == []


def test_other_programs_read_tensors_and_configuration_without_this_one(run: Path, exported: Path) -> None:
    with safe_open(exported, framework="pt") as file:
        described = json.loads(file.metadata()[KEY])
        assert set(file.keys()) == load_checkpoint(run).weights.keys()
    assert described["model"]["arch"] == "vgg16"
    assert described["class_names"] == list(NAMES)


def test_a_file_can_be_exported_again(exported: Path, tmp_path: Path) -> None:
    assert main(["export", str(exported), str(tmp_path / "again.safetensors")]) == 0
    assert (tmp_path / "again.safetensors").read_bytes() == exported.read_bytes()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda content: content[:-1], "cannot be read as a safetensors file"),
        (lambda content: b"", "cannot be read as a safetensors file"),
        (lambda content: content[:-9] + bytes([content[-9] ^ 1]) + content[-8:], "checksum differs"),
        (lambda content: content.replace(b"vgg16", b"vgg99"), "unknown architecture 'vgg99'"),
    ],
)
def test_a_damaged_file_is_refused(
    change: Callable[[bytes], bytes], message: str, exported: Path, tmp_path: Path
) -> None:
    damaged = tmp_path / "damaged.safetensors"
    damaged.write_bytes(change(exported.read_bytes()))
    with pytest.raises(CheckpointError, match=message):
        advmoe.load(damaged)


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        (None, "has no entry 'advmoe'"),
        ({KEY: "{"}, "is not JSON"),
        ({KEY: "[]"}, "is no JSON object"),
        ({KEY: "{}"}, "checksum differs"),
    ],
)
def test_a_file_of_another_program_is_refused(metadata: dict[str, str] | None, message: str, tmp_path: Path) -> None:
    save_file({"weight": torch.zeros(2)}, tmp_path / "other.safetensors", metadata)
    with pytest.raises(CheckpointError, match=message):
        advmoe.load(tmp_path / "other.safetensors")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["m.txt"], "must end in .onnx or .safetensors, got 'm.txt'"),
        (["m"], "must end in .onnx or .safetensors, got 'm'"),
        (["m.safetensors", "--profile", "static", "--margins"], "--profile, --margins applies to ONNX files only"),
        (["missing/m.safetensors"], "the folder missing does not exist"),
    ],
)
def test_what_cannot_be_written_is_refused_before_anything_is(
    arguments: list[str],
    message: str,
    run: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["export", str(run), *arguments]) == 1
    assert message in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_gives_one_line_and_no_half_written_file(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    target = tmp_path / "model.safetensors"
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
    try:
        assert main(["export", str(run), str(target)]) == 1
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert capsys.readouterr().err == f"error: cannot use {target}: File too large; give another place\n"
    assert not list(tmp_path.iterdir())
