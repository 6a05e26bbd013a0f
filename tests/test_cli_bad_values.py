"""Bad values for every option of every command: one line, an exit code, and no file written."""

from pathlib import Path
from typing import Any

import pytest

from advmoe.cli.app import command_line, main
from advmoe.config import ModelConfig, TrainConfig, to_dict
from advmoe.models.registry import build_model
from advmoe.training.checkpoint import Checkpoint, save_checkpoint

COMMANDS: dict[str, Any] = command_line().commands
REQUIRED = {
    "train": ["digits"],
    "evaluate": ["model.pt"],
    "export": ["missing.pt", "model.onnx"],
    "predict": ["missing.onnx", "missing.png"],
    "bench-onnx": ["missing.onnx"],
    "analyze": ["missing"],
    "push": ["missing.pt", "owner/name"],
    "report": ["missing"],
    "reproduce": ["nosuch"],
}
"""Arguments with which a command is complete, so that only the option is wrong (or the file, for ONNX models)."""

HUGE = str(10**30)
BAD = {
    "int": ("x", "1.5", "-1", "nan", "", HUGE),
    "float": ("x", "nan", "inf", "-1", "1e400", "1/0", ""),
    "str": ("nosuch", "'", "a\nb", ""),
    "path": ("",),
}
"""By type of the option. No option takes any of its values."""
ALLOWED = {"--only", "--train", "--evaluate", "--threads"}
"""Options of `reproduce` that take any text, and numbers where fewer than none means as many as there are."""


def kind(parameter: Any) -> str:
    """The type of an option's value: int, float, str, path, or another."""
    if parameter.is_flag:
        return "flag"
    return str(parameter.type_descriptor.annotation.__name__).lower()


def cases() -> list[tuple[str, str, str]]:
    return [
        (command, parameter.opts[0], value)
        for command, definition in COMMANDS.items()
        for parameter in definition.params
        if parameter.opts[0].startswith("--")
        for value in BAD.get(kind(parameter), ())
        if value != HUGE or command == "train"  # elsewhere numbers of images and the like have no upper bound
    ]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("bad")
    config = ModelConfig(arch="vgg16", width=0.0625)
    train = to_dict(TrainConfig(dataset="digits"))
    save_checkpoint(path / "model.pt", Checkpoint(model=config, weights=build_model(config).state_dict(), train=train))
    return path


@pytest.mark.parametrize(("command", "option", "value"), cases())
def test_a_bad_value_gets_one_line_and_nothing_is_written(
    command: str, option: str, value: str, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.chdir(folder)
    before = sorted(folder.rglob("*"))
    code = main([command, *REQUIRED.get(command, []), option, value])
    out, err = capsys.readouterr()
    assert code in {1, 2}, out
    (line,) = err.splitlines()
    assert line.startswith("error: ")
    assert len(line) < 400
    assert out == ""
    assert sorted(folder.rglob("*")) == before


@pytest.mark.parametrize(
    "arguments", [["train", "digits", "--out="], ["info", ""], ["evaluate", "model.pt", "--out", ""]]
)
def test_an_empty_path_is_not_the_current_folder(
    arguments: list[str], folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.chdir(folder)
    before = sorted(folder.rglob("*"))
    assert main(arguments) == 1
    assert "is empty; expected a value" in capsys.readouterr().err
    assert sorted(folder.rglob("*")) == before
