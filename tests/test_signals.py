"""Ctrl-C and SIGTERM: current work is saved, child processes end first, and the exit code names the signal."""

import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from runs import MODEL

from advmoe.cli import app, reproduce
from advmoe.cli.app import main
from advmoe.cli.called import CALLS
from advmoe.cli.progress import TrainingProgress
from advmoe.cli.signals import NAMES, Terminated, handling, terminate
from advmoe.evaluation import stages, suite
from advmoe.models.registry import build_model
from advmoe.training.checkpoint import Checkpoint, load_checkpoint, save_checkpoint

TRAIN = ["train", "digits", "--arch", "vgg16", "--width", "0.0625", "--kind", "s_dense", "--method", "standard"]
TRAIN += ["--epochs", "1", "--limit-train", "384", "--batch-size", "128", "--val-limit", "10"]


@pytest.fixture(autouse=True)
def _nothing_is_ignored() -> Iterator[None]:
    """Whoever starts the tests in the background may have them ignore interrupts; and no test may leave a handler."""
    with handling(signal.SIGINT, signal.default_int_handler):
        yield
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


@pytest.mark.parametrize(("signum", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_training_finishes_its_step_and_saves(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    signum: signal.Signals,
    code: int,
) -> None:
    stepped = TrainingProgress.stepped

    def signaled(self: TrainingProgress, step: int, *rest: Any) -> None:
        stepped(self, step, *rest)
        if step == 2:
            os.kill(os.getpid(), signum)
            if signum == signal.SIGTERM:  # a scheduler that asks twice gets no less
                os.kill(os.getpid(), signum)

    monkeypatch.setattr(TrainingProgress, "stepped", signaled)
    run = tmp_path / "run"
    assert main([*TRAIN, "--out", str(run)]) == code
    assert load_checkpoint(run / "last.pt").progress["step"] == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert said == f"{NAMES[signum]}; go on with the same command and --resume --out {run}"
    monkeypatch.undo()
    assert main([*TRAIN, "--out", str(run), "--resume"]) == 0
    assert load_checkpoint(run / "last.pt").progress["step"] == 3


@pytest.mark.parametrize(("signum", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_training_of_another_command_leaves_the_last_line_to_it(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    signum: signal.Signals,
    code: int,
) -> None:
    # its own advice, --resume, would not go on with the rest of what the other command does
    monkeypatch.setattr(TrainingProgress, "stepped", lambda *_: os.kill(os.getpid(), signum))
    for name, value in CALLS.items():
        monkeypatch.setenv(name, value)
    assert main([*TRAIN, "--out", str(tmp_path / "run")]) == code
    assert load_checkpoint(tmp_path / "run" / "last.pt").progress["step"] == 1
    said = capsys.readouterr().err
    assert "stopping after this step and saving" in said
    assert "go on" not in said
    assert f"{NAMES[signum]};" not in said


def test_a_command_that_is_stopped_before_it_begins_leaves_the_last_line_to_its_caller(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, value in CALLS.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("advmoe.data.sources.dataset_info", lambda *_: os.kill(os.getpid(), signal.SIGINT))
    assert main(TRAIN) == 130
    assert capsys.readouterr().err == ""


def test_a_second_interrupt_ends_training_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def signaled(self: TrainingProgress, step: int, *rest: Any) -> None:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(TrainingProgress, "stepped", signaled)
    assert main([*TRAIN, "--out", str(tmp_path / "my run")]) == 130
    said = capsys.readouterr().err.splitlines()[-1]
    assert said == f"interrupted; go on with the same command and --resume --out '{tmp_path / 'my run'}'"
    assert load_checkpoint(tmp_path / "my run" / "last.pt").progress["step"] == 0


@pytest.fixture
def evaluation(tmp_path: Path) -> list[str]:
    """An evaluation of a network on two batches of four digits, into the folder `card`."""
    torch.manual_seed(0)
    config = {"dataset": "digits", "attack": {"eps": 0.1}}
    names = tuple("0123456789")
    contents = Checkpoint(model=MODEL, weights=build_model(MODEL).state_dict(), class_names=names, train=config)
    save_checkpoint(tmp_path / "model.pt", contents)
    command = ["evaluate", str(tmp_path / "model.pt"), "--limit-eval", "8", "--batch-size", "4", "--steps", "1"]
    return [*command, "--diagnose", "0", "--no-latency", "--out", str(tmp_path / "card")]


@pytest.mark.parametrize(("signum", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_an_evaluation_ends_with_the_signals_code_and_goes_on(
    evaluation: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    signum: signal.Signals,
    code: int,
) -> None:
    begun: list[Any] = []
    begin = suite.begin

    def signaled(*arguments: Any) -> Any:
        begun.append(arguments)
        if len(begun) == 2:
            os.kill(os.getpid(), signum)
        return begin(*arguments)

    monkeypatch.setattr(suite, "begin", signaled)
    assert main(evaluation) == code
    said = capsys.readouterr().err.splitlines()[-1]
    assert said == f"{NAMES[signum]}; {tmp_path / 'card'} holds the finished attacks; the same command goes on"
    assert main(evaluation) == 0
    assert len(begun) == 3, "the first of two batches is not done again"


def test_an_evaluation_that_is_stopped_in_its_first_batch_tells_how_to_go_on(
    evaluation: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def stopped(*_: object) -> None:
        os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(stages, "_radius", stopped)  # after PGD on the first batch
    assert main([*evaluation, "--eps-sweep", "0.05"]) == 130
    assert sorted(path.name for path in (tmp_path / "card").iterdir()) == ["state-batch.npz"]
    said = capsys.readouterr().err.splitlines()[-1]
    assert said == f"interrupted; {tmp_path / 'card'} holds the finished attacks; the same command goes on"
    monkeypatch.setattr(stages, "_pgd", lambda _: pytest.fail("PGD on this batch is finished"))
    assert main([*evaluation, "--eps-sweep", "0.05"]) == 130


@pytest.mark.parametrize(("signum", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_an_evaluation_without_a_folder_tells_that_nothing_is_kept_and_how_to_keep_it(
    evaluation: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    signum: signal.Signals,
    code: int,
) -> None:
    at = evaluation.index("--out")
    monkeypatch.setattr(stages, "_pgd", lambda _: os.kill(os.getpid(), signum))
    assert main([*evaluation[:at], *evaluation[at + 2 :]]) == code
    said = capsys.readouterr().err.splitlines()[-1]
    kept = "with --out FOLDER, the same command goes on after an interruption"
    assert said == f"{NAMES[signum]}; nothing of this evaluation is kept; {kept}"
    assert not (tmp_path / "card").exists()


@pytest.mark.parametrize(("signum", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
@pytest.mark.parametrize("command", [TRAIN, ["evaluate", "model.pt"], ["export", "model.pt", "model.onnx"]])
def test_a_command_that_is_stopped_before_it_begins_says_so_once(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    command: list[str],
    signum: signal.Signals,
    code: int,
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("model.pt").touch()
    read = "advmoe.data.sources.dataset_info" if command is TRAIN else "advmoe.training.checkpoint.load_checkpoint"
    monkeypatch.setattr(read, lambda *_: os.kill(os.getpid(), signum))
    monkeypatch.setattr("advmoe.training.checkpoint.file_digest", lambda *_: "")
    assert main(command) == code
    assert capsys.readouterr().err == f"{NAMES[signum]}\n"


@pytest.mark.parametrize(
    ("options", "there", "kept"),
    [
        ([], "last.pt", True),
        ([], "other/last.pt", False),  # another run in a folder below
        (["--seeds", "0,1"], "seed-1/last.pt", True),
        (["--seeds", "0,1"], "last.pt", False),
    ],
)
def test_a_training_that_is_stopped_tells_how_to_go_on_if_a_run_of_its_own_is_there(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    options: list[str],
    there: str,
    kept: bool,
) -> None:
    (tmp_path / there).parent.mkdir(exist_ok=True)
    (tmp_path / there).touch()
    monkeypatch.setattr("advmoe.data.sources.load_dataset", lambda *_, **__: os.kill(os.getpid(), signal.SIGINT))
    assert main([*TRAIN, "--out", str(tmp_path), *options]) == 130
    said = f"interrupted; go on with the same command and --resume --out {tmp_path}" if kept else "interrupted"
    assert capsys.readouterr().err.splitlines()[-1] == said


@pytest.mark.parametrize(("signum", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_is_not_lost_in_an_import(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, signum: signal.Signals, code: int
) -> None:
    text = "import os\ntry:\n    os.kill(os.getpid(), %d)\nexcept BaseException:\n    pass  # as compiled modules do\n"
    (tmp_path / "swallows.py").write_text(text % signum)
    monkeypatch.syspath_prepend(tmp_path)

    def imports() -> None:
        import_module("swallows")
        time.sleep(10)

    monkeypatch.setattr("advmoe.cli.recipes.all_recipes", imports)
    try:
        assert main(["recipes"]) == code
    finally:
        sys.modules.pop("swallows", None)


def test_an_interrupted_server_that_does_not_run_yet_says_so(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from advmoe_export.serve import command

    def interrupted(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(command, "run", interrupted)
    assert command.main() == 130
    assert capsys.readouterr().err == "interrupted\n"


CHILD = """
import os, pathlib, signal, sys, time
def handle(signum, frame):
    time.sleep(0.5)  # longer than subprocess.run would wait before it kills
    pathlib.Path(sys.argv[1]).write_text("saved")
    sys.exit(128 + signum)
signal.signal(signal.SIGTERM, handle)
signal.signal(signal.SIGINT, handle)
pathlib.Path(sys.argv[1]).write_text(str(os.getpid()))
time.sleep(60)
"""


@pytest.mark.parametrize("terminal", [False, True])
@pytest.mark.parametrize(("signum", "error"), [(signal.SIGTERM, Terminated), (signal.SIGINT, KeyboardInterrupt)])
def test_a_child_saves_before_its_parent_ends(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    signum: signal.Signals,
    error: type[BaseException],
    terminal: bool,
) -> None:
    file = tmp_path / "file"
    monkeypatch.setattr(reproduce, "terminal_interrupts_children", lambda: terminal)

    def send() -> None:
        wait_for(file)
        if terminal and signum == signal.SIGINT:  # Ctrl-C: the terminal signals the child, too
            os.kill(int(file.read_text()), signum)
        os.kill(os.getpid(), signum)

    sender = threading.Thread(target=send)
    sender.start()
    with handling(signal.SIGTERM, terminate), pytest.raises(error):
        reproduce.run_to_its_end([sys.executable, "-c", CHILD, str(file)])
    sender.join()
    assert file.read_text() == "saved"


def wait_for(file: Path) -> None:
    for _ in range(2000):
        if file.exists() and file.read_text():
            return
        time.sleep(0.01)
    raise AssertionError(f"{file} did not appear")


@pytest.mark.parametrize(("status", "code"), [(143, 143), (130, 130), (1, 1)])
def test_reproduce_ends_as_its_command_did(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], status: int, code: int
) -> None:
    monkeypatch.setattr(reproduce, "run_to_its_end", lambda *_: (status, ""))
    assert main(["reproduce", "fig3", "--runs", str(tmp_path), "--out", str(tmp_path)]) == code
    assert not list(tmp_path.iterdir())
    assert ("the same command of 'advmoe reproduce' goes on" in capsys.readouterr().err) == (code != 1)


def test_a_command_line_in_another_thread_handles_no_signals(monkeypatch: pytest.MonkeyPatch) -> None:
    codes: list[int] = []
    call: Callable[[], None] = lambda: codes.append(app.main(["recipes"]))  # noqa: E731
    thread = threading.Thread(target=call)
    thread.start()
    thread.join()
    assert codes == [0]
