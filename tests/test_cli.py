"""The command line: names that scripts rely on, and one line per mistake."""

import contextlib
import json
import os
import re
import shutil
import subprocess
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image

from advmoe.cli.app import main
from advmoe.cli.progress import TrainingProgress
from advmoe.errors import DataError

SMALL = ["--width", "0.0625", "--epochs", "1", "--batch-size", "8", "--limit-train", "16", "--val-limit", "10"]
QUICK = [*SMALL, "--steps", "1"]


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("cli") / "run"
    assert main(["train", "digits", "--arch", "vgg16", *QUICK, "--out", str(path)]) == 0
    return path


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "160")
    monkeypatch.delenv("ADVMOE_TRACEBACK", raising=False)


def refused(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """The one line that a mistake gets: on stderr, with exit code 1, and nothing written."""
    before = sorted(Path.cwd().rglob("*"))
    assert main(arguments) == 1
    out, err = capsys.readouterr()
    assert out == ""
    lines = [line for line in err.splitlines() if line.strip()]
    assert len(lines) == 1, err
    assert lines[0].startswith("error: ")
    assert sorted(Path.cwd().rglob("*")) == before
    return lines[0]


OPTIONS = {
    "train": (
        "--data-dir --out --epochs --batch-size --width --limit-train --num-experts --model-scale --kind --method "
        "--steps --eps --seed --device --json --arch --resume --step-size --lr --trades-beta --val-limit"
    ),
    "evaluate": (
        "--data-dir --batch-size --limit-eval --steps --eps --seed --device --json --restarts --step-size "
        "--control --out"
    ),
    "compare": "--data-dir --batch-size --limit-eval --steps --eps --seed --device --json --autoattack",
    "reproduce": "--scale --only --seeds --list --jobs --gpus --train --evaluate --limit-eval --device --json",
    "export": "--profile --dtype --input-type --margins --triton --verify-images --json",
    "bench-onnx": "--batch --threads --seconds --provider --json",
    "predict": "--json --csv --top --batch-size --provider",
    "info": "--json",
}


@pytest.mark.parametrize("command", OPTIONS)
def test_options_that_scripts_rely_on(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([command, "--help"]) == 0
    help_text = capsys.readouterr().out
    assert set(OPTIONS[command].split()) <= set(re.findall(r"--[a-z-]+", help_text))


def test_the_commands(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    help_text = capsys.readouterr().out
    for command in OPTIONS:
        assert re.search(rf"\b{command}\b", help_text)


@pytest.mark.parametrize(
    ("arguments", "where"),
    [(["predict", "m.onnx"], "advmoe predict"), (["train", "--bogus"], "advmoe train"), (["--bogus"], "advmoe")],
)
def test_a_mistake_points_to_the_help_of_its_command(
    arguments: list[str], where: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 1
    assert capsys.readouterr().err.endswith(f"; see '{where} --help'\n")


def test_help_and_mistaken_options_do_not_wait_for_torch() -> None:
    script = f"""
import sys
from advmoe.cli.app import main
from advmoe.cli.progress import TrainingProgress
from advmoe.errors import DataError
for command in {list(OPTIONS)}:
    assert main([command, "--help"]) == 0
    assert main([command, "--bogus"]) == 1
assert main(["recipes", "fig5"]) == 0
for mistake in (
    ["tarin"], ["train", "digit"], ["train", "digits", "--arch", "vgg"], ["train", "digits", "--kind", "mo"],
    ["train", "digits", "--lr", "-1"], ["train", "--recipe", "fig5"], ["train", "--config", "nosuch.toml"],
    ["reproduce", "tabel1"], ["reproduce", "table1", "--scale", "tiny"],
):
    assert main(mistake) == 1
sys.exit(len({{"torch", "torchvision", "pyarrow", "onnxruntime"}} & set(sys.modules)))
"""
    assert subprocess.run([sys.executable, "-c", script], capture_output=True, check=False).returncode == 0


def test_a_shell_completes_values_without_waiting_for_torch() -> None:
    expected = {
        "train di": ["digits"],
        "train digits --arch v": ["vgg16", "vit"],
        "train digits --kind s": ["s_dense", "sparse_cnn"],
        "train digits --method a": ["advmoe", "at", "at_sparse"],
        "train --recipe fig5": ["fig5-expert-at"],
        "evaluate runs/NAME --dataset cifar1": ["cifar10", "cifar100"],
        "export runs/NAME m.onnx --profile la": ["latency"],
        "export runs/NAME m.onnx --dtype f": ["fp32", "fp16"],
        "reproduce app": ["appc"],
        "reproduce fig2 --scale s": ["smoke", "small"],
    }
    script = """
import contextlib, io, json, os, sys
from advmoe.cli.app import main
sys.argv, found = ["advmoe"], {}
for line in json.loads(sys.stdin.read()):
    os.environ |= {"_ADVMOE_COMPLETE": "complete_bash", "COMP_WORDS": f"advmoe {line}"}
    os.environ["COMP_CWORD"] = str(len(line.split()))
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.suppress(SystemExit):
        main([])
    found[line] = out.getvalue().split()
print(json.dumps([found, "torch" in sys.modules]))
"""
    done = subprocess.run(
        [sys.executable, "-c", script], input=json.dumps(list(expected)), capture_output=True, text=True, check=True
    )
    assert json.loads(done.stdout) == [expected, False]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "cifar11"], r"unknown data set 'cifar11'.*cifar10"),
        (["train", "digits", "--arch", "vgg17"], r"unknown architecture 'vgg17'.*did you mean 'vgg16'\?"),
        (["train", "digits", "--kind", "sdense"], r"unknown model kind 'sdense'.*did you mean 's_dense'\?"),
        (["train", "digits", "--method", "advmo"], r"unknown training method 'advmo'.*did you mean 'advmoe'\?"),
        (["train", "digits", "--kind", "dense", "--method", "advmoe"], r"'advmoe' trains .*moe, got 'dense'"),
        (["train", "digits", "--granularity", "pixel"], r"unknown router granularity 'pixel', expected one of"),
        (
            ["train", "digits", "--num-experts", "0"],
            r"experts N must be at least 1 and at most 255, got 0; .* \(--num-experts\)$",
        ),
        (
            ["train", "digits", "--model-scale", "0"],
            r"scale r must be above 0 and at most 1, got 0; .* \(--model-scale\)$",
        ),
        (["train", "digits", "--model-scale", "1.5"], r"scale r must be above 0 and at most 1, got 1.5"),
        (["train", "digits", "--model-scale", "0.001"], r"r = 0.001 leaves no channel of a layer with 64; use r >="),
        (["train", "digits", "--width", "0"], r"width multiplier must be above 0 and at most 16, got 0"),
        (["train", "digits", "--width", "inf"], r"width multiplier must be finite, above 0 .*, got inf"),
        (["train", "digits", "--eps", "8"], r"eps must be in \[0, 1\].*got 8; did you mean 8/255\?"),
        (["train", "digits", "--eps", "-0.1"], r"eps must be in \[0, 1\].*got -0.1"),
        (["train", "digits", "--eps", "eight"], r"'--eps': expected a number or a fraction such as 8/255, got 'eight'"),
        (["train", "digits", "--eps", "1/0"], r"'--eps': expected a number or a fraction"),
        (["train", "digits", "--eps", "nan"], r"eps must be finite, got nan"),
        (["train", "digits", "--step-size", "inf"], r"step size must be finite"),
        (["train", "digits", "--steps", "-1"], r"number of attack steps must be at least 0 .*, got -1 \(--steps\)$"),
        (["train", "digits", "--epochs", "0"], r"epochs must be at least 1 .*, got 0"),
        (["train", "digits", "--batch-size", "1"], r"batch size must be at least 2 .*, got 1; BatchNorm"),
        (["train", "digits", "--lr", "nan"], r"learning rate must be finite, above 0, got nan \(--lr\)$"),
        (["train", "digits", "--weight-decay", "-1"], r"weight decay must be at least 0, got -1 \(--weight-decay\)$"),
        (["train", "digits", "--seed", "-1"], r"the seed must be at least 0 .*, got -1 \(--seed\)$"),
        (
            ["train", "digits", "--limit-train", "5"],
            r"limit_train must be at least one batch \(128\), got 5 \(--limit-train\)$",
        ),
        (["train", "digits", "--val-limit", "0"], r"val_limit must be at least 1 .*, got 0"),
        (["train", "digits", "--device", "tpu"], r"unknown device 'tpu', expected auto, cpu, cuda or cuda:N"),
        (["train", "digits", "--device", "cuda:99"], r"device 'cuda:99'.*this machine has \d+ CUDA"),
        (
            ["train", "digits", "--kind", "dense", "--specialization", "1"],
            r"specialization 1.0 needs experts that are trained; ",
        ),
        (
            ["train", "digits", "--num-experts", "1", "--specialization", "1"],
            r"needs experts .* with N = 1 trains none",
        ),
        (["train", "digits", "--kind", "s_dense", "--balance", "1"], r"balance 1 needs routers that learn a choice"),
        (["train", "digits", "--method", "standard", "--awp", "0.01"], r"awp 0.01 has no effect on method standard"),
        (
            ["train", "digits", "--loss", "pgd_at", "--trades-beta", "3"],
            r"trades_beta 3.0 has no effect on .* pgd_at",
        ),
        (
            ["train", "digits", "--image-size", "64"],
            r"images of digits are 32 pixels wide and are not resized, got .* 64",
        ),
        (
            ["train", "digits", "--resume"],
            r"holds no run to go on with; give the run's folder, or leave out --resume to begin one \(--out\)",
        ),
        (["train", "digits", "--bogus", "1"], r"No such option: --bogus"),
        (["train", "digits", "--epochs", "many"], r"Invalid value for '--epochs'.*integer"),
        (["train", "cifar10", "--data-dir", "file"], r"file is a file; give the folder"),
        (
            ["train", "digits", "--data-dir", "gone"],
            r"images of digits come with advmoe, .* leave it out \(--data-dir\)$",
        ),
        (
            ["reproduce", "fig2", "--scale", "smoke", "--data-dir", "gone"],
            r"--scale smoke uses digits, .*, so --data-dir has no effect; leave it out$",
        ),
        (["evaluate", "missing.pt"], r"no checkpoint at missing\.pt"),
        (["evaluate", "file"], r"file cannot be read as a checkpoint"),
        (["export", "missing.pt", "model.onnx"], r"no checkpoint at missing\.pt"),
        (["export", "file", "model.onnx"], r"file cannot be read as a checkpoint"),
        (["predict", "missing.onnx", "file"], r"missing\.onnx"),
        (["predict", "file", "file"], r"file"),
        (["info", "missing.pt"], r"no checkpoint at missing\.pt"),
        (["info", "file"], r"file cannot be read as a checkpoint"),
        (["bogus"], r"No such command 'bogus'"),
        (["evaluate"], r"Missing argument"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_mistake_gets_one_clear_line(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("not what you think")
    assert re.search(message, refused(arguments, capsys))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--eps", "8"], r"eps must be in \[0, 1\].*did you mean 8/255\?"),
        (["--steps", "-2"], r"number of attack steps must be at least 0"),
        (["--restarts", "0"], r"restarts must be at least 1"),
        (["--batch-size", "0"], r"--batch-size must be at least 1, got 0"),
        (["--limit-eval", "0"], r"--limit-eval must be at least 1, got 0"),
        (["--seed", "-1"], r"Invalid value for '--seed'"),
        (["--dataset", "nope"], r"unknown data set 'nope'"),
        (["--device", "tpu"], r"unknown device"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_mistaken_evaluation_gets_one_clear_line(
    run_folder: Path, options: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    capsys.readouterr()
    assert re.search(message, refused(["evaluate", str(run_folder / "best.pt"), *options], capsys))


def test_a_run_folder_that_cannot_be_made_gets_one_clear_line(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("")
    message = refused(["train", "digits", *QUICK, "--out", "file"], capsys)
    assert re.search(r"error: cannot use file: .*exists; give another place", message)


def test_a_folder_that_holds_a_run_is_not_trained_over(run_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = (run_folder / "last.pt").read_bytes()
    capsys.readouterr()
    message = refused(["train", "digits", *QUICK, "--out", str(run_folder)], capsys)
    assert "already holds a run; continue it or choose another folder (--resume, --out)" in message
    assert (run_folder / "last.pt").read_bytes() == before


def test_a_truncated_checkpoint_gets_one_clear_line(
    run_folder: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    (tmp_path / "half.pt").write_bytes((run_folder / "best.pt").read_bytes()[:5000])
    capsys.readouterr()
    for command in (["evaluate", "half.pt"], ["export", "half.pt", "model.onnx"], ["info", "half.pt"]):
        assert "half.pt cannot be read as a checkpoint: it is truncated" in refused(command, capsys)


def test_training_again_with_resume_and_other_options_is_refused(
    run_folder: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    shutil.copytree(run_folder, tmp_path / "copy")
    capsys.readouterr()
    message = refused(["train", "digits", *QUICK, "--lr", "0.5", "--out", "copy", "--resume"], capsys)
    assert "started with lr = 0.1" in message
    message = refused(
        ["train", "digits", *QUICK, "--lr", "0.5", "--width", "0.125", "--seed", "1", "--out", "copy", "--resume"],
        capsys,
    )
    assert message.endswith(
        "cannot resume copy: it was started with width = 0.0625 (not 0.125), lr = 0.1 (not 0.5), seed = 0 (not 1); "
        "give its folder alone to go on with its own settings, repeat the original options, or begin a new run in "
        "another folder from copy/last.pt (--resume, --out, --init)"
    )
    message = refused(["train", "--kind", "s_dense", "--method", "at", "--out", "copy", "--resume"], capsys)
    assert "started with kind = moe (not s_dense)" in message
    message = refused(["train", "--method", "at", "--out", "copy", "--resume"], capsys)
    assert "started with method = advmoe (not at)" in message


def test_a_run_goes_on_by_its_folder_alone(
    run_folder: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    shutil.copytree(run_folder, tmp_path / "copy")
    capsys.readouterr()
    assert main(["train", "--out", "copy", "--resume"]) == 0
    assert "copy is finished, all 1 epochs; to train on, begin a new run from it" in capsys.readouterr().err
    earlier = tmp_path / "copy" / "run.toml"  # earlier versions noted a folder of digits, too
    earlier.write_text('data_dir = "gone"\n' + earlier.read_text())
    assert main(["train", "--config", "copy", "--out", "copy", "--resume"]) == 0
    capsys.readouterr()
    assert "holds no run to go on with" in refused(["train", "--config", "copy", "--resume"], capsys)
    assert "nosuch holds no run to go on with" in refused(["train", "--resume", "--out", "nosuch"], capsys)
    assert "which run is to go on? give its folder (--out)" in refused(["train", "--resume"], capsys)


def test_a_folder_in_place_of_a_data_set_is_told_apart(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "pets").mkdir()
    message = refused(["train", "pets"], capsys)
    assert "'pets' is a folder and no data set; for images of your own: advmoe train folder --data-dir pets" in message


def test_train_and_evaluate_print_one_json_object(
    run_folder: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    shutil.copytree(run_folder, tmp_path / "copy")
    capsys.readouterr()
    assert main(["train", "digits", *QUICK, "--out", "copy", "--resume", "--json"]) == 0
    trained = json.loads(capsys.readouterr().out)
    assert Path(trained["checkpoint"]).name == "best.pt"
    assert trained["config"]["limit_train"] == 16
    assert trained["metrics"]["epoch"] == 1

    assert main(["evaluate", trained["checkpoint"], "--steps", "2", "--limit-eval", "12", "--json"]) == 0
    evaluated = json.loads(capsys.readouterr().out)
    assert evaluated["images"] == 12
    assert 0 <= evaluated["ra_pgd2"] <= evaluated["sa"] <= 100
    assert evaluated["attack"]["eps"] == pytest.approx(8 / 255)
    assert evaluated["attack"]["steps"] == 2

    assert main(["info", trained["checkpoint"], "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["arch"] == "vgg16"
    assert facts["moe_layers"] == 12


def test_every_warning_begins_in_the_same_way(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    for place in ("train/a", "train/b", "val/a", "val/b"):
        (tmp_path / place).mkdir(parents=True)
        for number in range(9):
            Image.new("RGB", (32, 32)).save(tmp_path / place / f"{number}.png")
    line = ["train", "folder", "--data-dir", str(tmp_path), "--method", "standard", "--steps", "3", "--device", "tpu"]
    assert main(line) == 1
    *told, _ = capsys.readouterr().err.splitlines()
    about = {word: next(line for line in told if word in line) for word in ("classes", "hundreds", "error", "attack")}
    warnings = [word for word, line in about.items() if line.startswith("warning: ")]
    assert warnings == ["hundreds", "error", "attack"]  # the number of classes is a fact


def test_the_command_line_names_the_options_that_a_warning_advises(capsys: pytest.CaptureFixture[str]) -> None:
    progress = TrainingProgress()
    progress.warned("routers have collapsed; balance their load", balance=0.01, router_lr=None)
    progress.warned("[few] images")
    assert capsys.readouterr().err.splitlines() == [
        "warning: routers have collapsed; balance their load (--balance 0.01, --router-lr)",
        "warning: [few] images",
    ]


def test_results_go_to_stdout_and_progress_to_stderr(run_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    capsys.readouterr()
    assert main(["evaluate", str(run_folder / "best.pt"), "--steps", "1", "--limit-eval", "8"]) == 0
    out = capsys.readouterr().out
    assert "SA" in out
    assert re.search(r"RA under PGD-1, eps 8/255 +│ \d+\.\d\d (± \d+\.\d\d|\(< \d+\.\d\d\)) %", out)
    assert main(["info"]) == 0
    assert "vgg16" in capsys.readouterr().out


@pytest.fixture
def pets(tmp_path: Path) -> list[str]:
    """Options that train for an epoch of six batches on the folder `pets` of 24 and 6 images."""
    for number in range(30):
        folder = tmp_path / "pets" / ("train" if number < 24 else "val") / ("cat", "dog")[number % 2]
        folder.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (40 + number, 50), (8 * number, 100, 50)).save(folder / f"{number:02}.png")
    options = ["--width", "0.0625", "--epochs", "1", "--batch-size", "4", "--steps", "1", "--out", "run", "--json"]
    return ["train", "folder", "--data-dir", "pets", "--image-size", "32", *options]


def test_images_of_a_folder_are_cut_to_the_size_asked_for(pets: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(pets) == 0
    capsys.readouterr()
    assert main(["evaluate", "run/best.pt", "--data-dir", "pets", "--steps", "1", "--diagnose", "0", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["images"] == 6
    assert main(["info", "run/best.pt", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert (facts["image_size"], facts["num_classes"], facts["classes"]) == (32, 2, ["cat", "dog"])


def test_a_folder_keeps_its_image_size_where_another_machine_would_suggest_another(
    pets: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    chosen = [word for word in pets if word not in ("--image-size", "32")]
    monkeypatch.setattr("advmoe.data.folders.IMAGE_SIZES", (32,))
    assert main(chosen) == 0
    monkeypatch.setattr("advmoe.data.folders.IMAGE_SIZES", (48,))
    capsys.readouterr()
    assert main([*chosen, "--resume"]) == 0
    out, err = capsys.readouterr()
    assert json.loads(out)["metrics"]["epoch"] == 1
    assert "going on with the run's image size, 32" in err
    assert main([*chosen, "--resume", "--image-size", "48"]) == 1
    assert "it was started with image_size = 32 (not 48)" in capsys.readouterr().err


def test_a_run_whose_learning_rate_was_another_default_goes_on_by_its_folder_alone(
    pets: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    # Earlier versions trained a folder at 0.1 with any batch size. Now it is 0.1 x 4 / 64.
    assert main([*pets, "--lr", "0.1"]) == 0
    assert "lr = 0.1\n" in Path("run/run.toml").read_text()
    capsys.readouterr()
    assert main([*pets, "--resume"]) == 1
    message = "run: it was started with lr = 0.1 (not 0.00625); give its folder alone to go on with its own settings"
    assert message in capsys.readouterr().err
    assert main(["train", "--resume", "--out", "run", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["config"]["lr"] == 0.1


def test_the_file_of_a_run_is_good_for_a_folder_of_other_classes(
    pets: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*pets, "--eps", "0.02"]) == 0
    for split in ("train", "val"):
        shutil.copytree(f"pets/{split}", f"more/{split}")
        shutil.copytree(f"pets/{split}/cat", f"more/{split}/fox")
    capsys.readouterr()
    assert main(["train", "--config", "run", "--data-dir", "more", "--out", "other", "--json"]) == 0
    config = json.loads(Path("other/config.json").read_text())
    assert (config["model"]["num_classes"], config["train"]["attack"]["eps"]) == (3, 0.02)


@pytest.mark.slow
def test_an_export_is_verified_and_calibrated_with_images_of_the_folder_that_the_run_remembers(
    pets: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(pets) == 0
    real = ["--dtype", "int8", "--calibration-images", "8", "--verify-images", "5"]
    capsys.readouterr()
    assert main(["export", "run", "model.onnx", *real, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["agreement"]["images"] == 5
    for options, expected in ((real, "test images compared +│ 5 "), (real[:-2], "calibration images compared +│ 8 ")):
        assert main(["export", "run", "model.onnx", *options]) == 0
        out = capsys.readouterr().out
        assert re.search(expected, out)
        assert ("accuracy (PyTorch, file)" in out) == (options == real), "calibration images come without classes"


@pytest.mark.filterwarnings("default:.*not comparable")
def test_a_warning_is_one_line_too(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def found_less(*_: object) -> None:
        warnings.warn("digits holds 3 images: results are not comparable", stacklevel=1)
        raise DataError("no more")

    monkeypatch.setattr("advmoe.data.sources.dataset_info", found_less)
    assert main(["train", "digits"]) == 1
    assert capsys.readouterr().err.splitlines() == [
        "warning: digits holds 3 images: results are not comparable",
        "error: no more",
    ]


def test_a_run_does_not_begin_with_links_to_images_that_are_gone(
    pets: list[str], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    (tmp_path / "pets/train/dog/0.png").symlink_to("nowhere.png")
    (tmp_path / "pets/val/cat/0.png").symlink_to("nowhere.png")
    assert main(pets) == 1
    assert capsys.readouterr().err.splitlines()[-1] == (
        "error: pets/train/dog/0.png is a link to a file that does not exist (one of 2 such links); restore or remove "
        "it, or skip bad images (--skip-bad-images)"
    )
    assert not (tmp_path / "run").exists()
    assert main([*pets, "--skip-bad-images"]) == 0


def test_images_that_cannot_be_decoded_stop_a_run_or_are_counted(
    pets: list[str], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    for name in ("cat/02", "cat/04", "cat/06", "dog/03"):
        (tmp_path / "pets" / "train" / f"{name}.png").write_bytes(b"junk")
    assert main(pets) == 1
    err = capsys.readouterr().err.splitlines()[-1]
    assert re.search(
        r"error: image \d+ \(pets/train/\w+/\d+\.png .*bytes that begin with .*or skip bad images, then resume the run "
        r"\(--skip-bad-images, --resume\)",
        err,
    )

    assert main([*pets, "--out", "other", "--skip-bad-images"]) == 0
    out, err = capsys.readouterr()
    # A tenth of the 24, one of each class, is held out, and 22 images are five batches of 4 and two
    # that wait.
    skipped = json.loads(out)["metrics"]["train_skipped"]
    assert 4 - 2 - 2 < skipped <= 4
    figures = json.loads(out)["metrics"]
    assert f"skipped images: {skipped}; image" in " ".join(err.split())

    assert main([*pets, "--resume", "--skip-bad-images"]) == 0
    resumed = json.loads(capsys.readouterr().out)["metrics"]
    assert resumed | {"images_per_second": 0} == figures | {"images_per_second": 0}


def test_an_export_leaves_out_images_that_cannot_be_decoded_on_request(
    pets: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    pytest.importorskip("onnx_ir")
    given: dict[str, Any] = {}

    def stop(*_: object, **options: Any) -> None:
        given.update(options)
        raise DataError("enough is known")

    monkeypatch.setattr("advmoe.cli.export.export_onnx", stop)
    assert main(pets) == 0
    (tmp_path / "pets/val/cat/26.png").write_bytes(b"junk")
    (tmp_path / "pets/train/dog/03.png").write_bytes(b"junk")
    real = ["export", "run", "model.onnx", "--dtype", "int8", "--calibration-images", "24", "--verify-images", "6"]
    capsys.readouterr()
    assert "or skip bad images (--skip-bad-images)" in refused(real, capsys)
    assert main([*real, "--skip-bad-images"]) == 1
    assert re.search(r"skipped test images: 1; image 1 \(.*pets/val/cat/26\.png", capsys.readouterr().err)
    assert given["targets"].tolist() == [0, 0, 1, 1, 1]
    assert (len(given["images"]), len(given["calibration"])) == (5, 23)


def test_an_export_tells_the_number_of_batches_that_were_compared(
    run_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("onnx_ir")
    verification = SimpleNamespace(checks=[None] * 28, batches=7, difference=1e-6)
    sizes = {"graph_bytes": 1, "data_bytes": 1, "path": "model.onnx", "data_path": "model.onnx.data"}
    report = SimpleNamespace(**sizes, to_json=lambda: "{}", warnings=(), agreement=None, verification=verification)
    monkeypatch.setattr("advmoe.cli.export.export_onnx", lambda *_, **__: report)
    assert main(["export", str(run_folder), "model.onnx"]) == 0
    assert re.search(r"compared with PyTorch +│ 7 batches at every optimization level", capsys.readouterr().out)


def test_an_export_is_not_compared_on_images_of_other_classes(
    pets: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("onnx_ir")
    monkeypatch.setattr("advmoe.cli.export.export_onnx", None)
    assert main(pets) == 0
    for split in ("train", "val"):
        Path(f"wild/{split}").mkdir(parents=True)
        for theirs, ours in (("cat", "dog"), ("fox", "cat")):
            shutil.copytree(f"pets/{split}/{ours}", f"wild/{split}/{theirs}")
    capsys.readouterr()
    message = refused(["export", "run", "model.onnx", "--verify-images", "5", "--data-dir", "wild"], capsys)
    assert "run/best.pt tells 2 classes apart (cat, dog, ...), folder has 2 (cat, fox, ...); give" in message


@pytest.mark.slow
def test_a_checkpoint_becomes_a_served_model(
    run_folder: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    pytest.importorskip("advmoe_export")
    pytest.importorskip("onnxruntime")
    capsys.readouterr()
    assert main(["export", str(run_folder / "best.pt"), "model.onnx", "--triton", "models", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["triton"] == "models/model"
    assert Path("models/model/config.pbtxt").is_file()
    assert main(["bench-onnx", "model.onnx", "--batch", "2", "--seconds", "0.01", "--threads", "1", "--json"]) == 0
    (timing,) = json.loads(capsys.readouterr().out)["timings"]
    assert timing["batch"] == 2
    assert timing["median_ms"] > 0
    Image.new("RGB", (40, 30), (200, 10, 10)).save(tmp_path / "red.png")
    assert main(["predict", "model.onnx", "red.png", "--json"]) == 0
    (prediction,) = json.loads(capsys.readouterr().out)["predictions"]
    assert prediction["label"] in "0123456789"
    assert len(prediction["pathway"]) == 12

    (tmp_path / "broken.png").write_bytes((tmp_path / "red.png").read_bytes()[:40])
    assert "broken.png cannot be decoded as an image" in refused(["predict", "model.onnx", "broken.png"], capsys)
    assert "no image file or folder gone.png" in refused(["predict", "model.onnx", "gone.png"], capsys)


def test_an_export_that_cannot_be_is_refused_before_any_work(
    run_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("onnx_ir")
    monkeypatch.setattr("advmoe.training.checkpoint.load_checkpoint", None)
    (tmp_path / "models" / "model").mkdir(parents=True)
    for options, message in (
        (["--profile", "fast"], "unknown profile 'fast'"),
        (["--profile", "Hybird"], "expected one of: hybrid, latency, throughput, static; did you mean 'hybrid'?"),
        (["--calibration-images", "8"], "--calibration-images is for --dtype int8, this is fp32"),
        (["--data-dir", "data"], "--data-dir is about real images, and none are used"),
        (["--skip-bad-images"], "--skip-bad-images is about real images, and none are used"),
        (["--seed", "3"], "--seed is about real images, and none are used"),
        (["--triton", "models"], "'models/model' exists already"),
    ):
        assert message in refused(["export", str(run_folder), "model.onnx", *options], capsys)


def test_nan_weights_are_refused_by_evaluate(
    run_folder: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    contents = torch.load(run_folder / "best.pt", weights_only=True)
    name = next(name for name in contents["weights"] if name.startswith("routers.") and name.endswith("weight"))
    contents["weights"][name].fill_(float("nan"))
    torch.save(contents, tmp_path / "nan.pt")
    capsys.readouterr()
    assert "not finite" in refused(["evaluate", "nan.pt", "--steps", "1", "--limit-eval", "8"], capsys)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
def test_output_that_nobody_can_take_is_one_line_or_none() -> None:
    command = [sys.executable, "-m", "advmoe", "recipes", "--json"]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    with Path("/dev/full").open("w") as full:
        found = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, env=environment, check=False)
    assert (found.returncode, found.stderr) == (1, "error: No space left on device; the output is incomplete\n")
    reading, writing = os.pipe()
    os.close(reading)
    with os.fdopen(writing, "w") as closed:
        found = subprocess.run(command, stdout=closed, stderr=subprocess.PIPE, text=True, env=environment, check=False)
    assert (found.returncode, found.stderr) == (1, "")


@pytest.mark.parametrize("option", [["--out=~/none/x.html"], ["--out", "~/none/x.html"]])
def test_a_tilde_is_the_home_of_the_user(
    option: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert main(["report", "evaluation", *option]) == 1
    assert f"the folder {tmp_path / 'none'} does not exist" in capsys.readouterr().err.replace("\n", " ")


@pytest.mark.parametrize("command", [[], ["evaluate"], ["serve"]])
def test_the_short_option_for_help(command: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with contextlib.suppress(SystemExit):  # the server's parser exits
        assert main([*command, "-h"]) == 0
    assert "usage:" in capsys.readouterr().out.lower()


def test_a_finished_run_has_no_bar() -> None:
    for step, shown in ((1, True), (6, False)):
        progress = TrainingProgress()
        progress.started(2, 3, step)
        assert [task.visible for task in progress._progress.tasks] == [shown]
