"""Runs as files, several seeds in one command, and the messages of the command."""

import json
import tomllib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import advmoe
from advmoe.cli.app import main
from advmoe.cli.seeds import mean_and_deviation, parse_seeds, summary
from advmoe.cli.train import Plan, make_plan
from advmoe.config import ModelConfig, TrainConfig, TrainingAttack
from advmoe.data.sources import dataset_info
from advmoe.errors import ConfigError
from advmoe.run_file import read_run_file, run_file
from advmoe.schema import fields_of
from advmoe.settings import defaults_of, resolve

TINY = ["--width", "0.0625", "--epochs", "1", "--batch-size", "8", "--limit-train", "16", "--val-limit", "10"]


@pytest.fixture(scope="module")
def repeated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs with two seeds."""
    path = tmp_path_factory.mktemp("seeds") / "run"
    assert main(["train", "digits", *TINY, "--steps", "1", "--seeds", "3,4", "--out", str(path), "--json"]) == 0
    return path


def test_a_file_gives_every_setting_back(tmp_path: Path) -> None:
    attack = TrainingAttack(eps=0.1, steps=3, start="clean")
    model = ModelConfig(arch="densenet", depth=22, num_classes=7, mean=(0.1, 0.2, 0.3))
    train = TrainConfig(
        dataset="folder", specialization=None, attack=attack.in_training(), val_attack=attack.in_validation(), seed=5
    )
    path = tmp_path / "run.toml"
    path.write_text(run_file(model, train, data_dir=tmp_path, init=None))
    found = read_run_file(path)
    assert ModelConfig(**found.model) == model
    of_file = TrainingAttack(**found.attack)
    both = {"attack": of_file.in_training(), "val_attack": of_file.in_validation()}
    assert TrainConfig(**found.train, **both) == train
    assert found.data_dir == str(tmp_path)
    stored = tomllib.loads(path.read_text())
    assert set(stored["model"]) == {field.name for field in fields_of(ModelConfig)}
    assert set(stored["train"]) == {field.name for field in fields_of(TrainConfig)} - {"attack", "val_attack"}


def test_a_file_leaves_what_follows_from_radius_and_data_set_to_them(tmp_path: Path) -> None:
    digits = dataset_info("digits")
    model, train = resolve(digits, *defaults_of(digits))
    path = tmp_path / "run.toml"
    path.write_text(run_file(model, train, data_dir=None, init=None))

    def planned(dataset: str, config_file: Path | None) -> Plan:
        return make_plan(dataset, None, config_file, None, None, {"eps": 4 / 255})

    assert planned("digits", path).train.attack.step_size == 5 / 8 * 4 / 255
    for dataset in ("digits", "cifar10"):
        ours, theirs = planned(dataset, path), planned(dataset, None)
        assert (ours.model, ours.train) == (theirs.model, theirs.train), dataset


def test_settings_of_earlier_files_keep_their_names(tmp_path: Path) -> None:
    path = tmp_path / "run.toml"
    path.write_text("[train]\nspecialisation = 'none'\nepochs = 2\n")
    assert read_run_file(path).train == {"specialization": None, "epochs": 2}
    path.write_text("[train]\nspecialisation = 1\nspecialization = 2\n")
    with pytest.raises(ConfigError, match=r"\[train\] has no setting specialisation"):  # codespell:ignore
        read_run_file(path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[model", "run.toml is not a TOML file"),
        ("model = " + 10_000 * "[", "run.toml is not a TOML file"),
        ('{"model": {}}', r"not a TOML file: .*; it looks like JSON, expected a file such as run\.toml"),
        (r'data_dir = "C:\Users\me"', "not a TOML file: .*; a backslash in double quotes .* in single quotes"),
        (r'init = "D:\runs\cat"', "not a TOML file: .*; a backslash in double quotes .* in single quotes"),
        ("seed = 1", "unknown entry seed; expected model, train, attack, data_dir, init"),
        ("model = 5", r"\[model\] must be a mapping"),
        ("[model]\ndepht = 5", r"run.toml: \[model\] has no setting depht"),
        ("[train]\nattack = 5", r"\[train\] has no setting attack"),
        ("[train]\nlr = 'fast'", "run.toml: the learning rate must be a number, got 'fast'"),
        ("[train]\nepochs = 0", "epochs must be at least 1 .*, got 0"),
        ("[attack]\nsteps = true", "number of attack steps must be a whole number, got True"),
        ("data_dir = 5", "data_dir must be a text"),
    ],
)
def test_a_file_that_is_no_run_is_refused(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "run.toml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=message) as caught:
        read_run_file(path)
    assert "\n" not in str(caught.value)


def test_the_file_of_a_run_repeats_it_and_options_override_it(
    repeated: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first = repeated / "seed-3"
    again = ["train", "--config", str(first / "run.toml"), "--json"]
    assert main([*again, "--out", str(tmp_path / "same")]) == 0
    assert (tmp_path / "same" / "config.json").read_text() == (first / "config.json").read_text()
    assert (tmp_path / "same" / "run.toml").read_text() == (first / "run.toml").read_text()
    left, right = (json.loads((path / "metrics.jsonl").read_text()) for path in (tmp_path / "same", first))
    assert left | {"images_per_second": 0} == right | {"images_per_second": 0}

    assert main([*again, "--out", str(tmp_path / "other"), "--lr", "1/100", "--eps", "0"]) == 0
    config = json.loads((tmp_path / "other" / "config.json").read_text())["train"]
    assert (config["lr"], config["attack"]["eps"], config["seed"]) == (0.01, 0.0, 3)
    capsys.readouterr()


def test_a_path_that_no_run_file_can_hold_is_refused_before_anything_is_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = tmp_path / "photos-\udcff"  # a byte that is not UTF-8, as Python reads it from a file system
    for folder in (root / split / name for split in ("train", "val") for name in "ab"):
        folder.mkdir(parents=True)
        for number in range(10):
            Image.new("RGB", (32, 32)).save(folder / f"{number}.png")
    assert main(["train", "folder", "--data-dir", str(root), *TINY, "--out", str(tmp_path / "run")]) == 1
    message = capsys.readouterr().err.strip().splitlines()[-1]
    assert "expected a path in UTF-8, got '/" in message
    assert "photos-\\udcff'; rename it (--data-dir)" in message
    assert not (tmp_path / "run").exists()


def test_a_run_from_a_checkpoint_normalizes_images_as_the_checkpoint_does(repeated: Path, tmp_path: Path) -> None:
    for folder in (tmp_path / split / name for split in ("train", "val") for name in "ab"):
        folder.mkdir(parents=True)
        for number in range(10):
            Image.new("RGB", (32, 32)).save(folder / f"{number}.png")
    digits = dataset_info("digits")

    def planned(init: Path | None, config_file: Path | None = None) -> Plan:
        settings = {} if config_file else {"arch": "vgg16", "width": 0.0625}
        return make_plan("folder", None, config_file, init, tmp_path, settings)

    said = "the images are normalized as those of the checkpoint were, not as usual for folder"
    fresh, fine = planned(None), planned(repeated / "seed-3")
    assert (fine.model.mean, fine.model.std) == (digits.mean, digits.std) != (fresh.model.mean, fresh.model.std)
    assert fine.model.num_classes == 2
    assert said in fine.notes
    assert said not in fresh.notes
    stored = tmp_path / "run.toml"
    stored.write_text(run_file(fine.model, fine.train, data_dir=tmp_path, init=fine.init))
    assert planned(None, stored).model == fine.model


def test_several_seeds_are_runs_of_their_own(repeated: Path) -> None:
    seeds = {path.name: json.loads((path / "config.json").read_text())["train"]["seed"] for path in repeated.iterdir()}
    assert seeds == {"seed-3": 3, "seed-4": 4}


def test_runs_with_several_seeds_go_on_and_are_summed_up(repeated: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = ["train", "digits", *TINY, "--steps", "1", "--seeds", "3,4", "--out", str(repeated), "--resume", "--json"]
    capsys.readouterr()
    assert main(line) == 0
    found = json.loads(capsys.readouterr().out)
    sa = [run["metrics"]["val_sa"] for run in found["runs"]]
    assert found["summary"]["val_sa"]["mean"] == pytest.approx(np.mean(sa))
    assert found["summary"]["val_sa"]["std"] == pytest.approx(np.std(sa, ddof=1))
    assert [run["seed"] for run in found["runs"]] == [3, 4]


def test_means_and_deviations() -> None:
    assert parse_seeds("0, 10,2") == (0, 10, 2)
    assert mean_and_deviation([1.0, 3.0]) == (2.0, pytest.approx(2**0.5))
    assert mean_and_deviation([5.0]) == (5.0, 0.0)
    assert summary([{"a": 1, "b": [1], "c": 2}, {"a": 3, "b": [2]}]) == {
        "a": {"mean": 2.0, "std": pytest.approx(2**0.5)}
    }


@pytest.mark.parametrize("text", ["", "1,", "a", "-1", "1.5", "1,1", "1;2", "9" * 30])
def test_what_is_no_list_of_seeds_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="--seeds"):
        parse_seeds(text)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "digits", "--seed", "1", "--seeds", "1,2"], "give --seed or --seeds, not both"),
        (["train", "--recipe", "fig5-expert-at", "--config", "x"], "give --recipe or --config, not both"),
        (["train", "--config", "nosuch.toml"], "cannot read nosuch.toml: No such file or directory (--config)"),
    ],
)
def test_options_that_contradict_each_other_are_refused(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 1
    assert message in capsys.readouterr().err


def test_the_version_is_shown(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"advmoe {advmoe.__version__}\n"


def test_a_folder_gets_defaults_for_few_images(tmp_path: Path) -> None:
    for split, count in (("train", 150), ("val", 4)):
        for number in range(count):
            path = tmp_path / split / ("cat", "dog")[number % 2] / f"{number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (40, 40)).save(path)
    info = dataset_info("folder", tmp_path)
    model, train = defaults_of(info)
    # nine tenths of 150 images are 135: eight batches of 16, but not of 32
    assert (model, train) == ({"arch": "resnet18", "width": 0.25}, {"batch_size": 16})
    described, config = resolve(info, model, train)
    assert (described.image_size, described.num_classes, config.batch_size) == (32, 2, 16)
    assert config.lr == 0.1 * 16 / 64

    def planned(config_file: Path | None = None, **settings: Any) -> Plan:
        return make_plan("folder", None, config_file, None, tmp_path, settings)

    def told(plan: Plan) -> list[str]:
        return [note for note in plan.notes if note.startswith("batches of")]

    few = "batches of 16 images in place of 64, so that few images make several batches an epoch"
    slower = "; the learning rate is 0.025, smaller in the same proportion"
    assert told(planned()) == [few + slower]
    assert (told(planned(lr=0.1)), planned(lr=0.1).train.lr) == ([few], 0.1)
    assert told(planned(batch_size=8)) == ["batches of 8 images in place of 64" + slower.replace("0.025", "0.0125")]
    assert (told(planned(batch_size=128)), planned(batch_size=128).train.lr) == ([], 0.1)
    stored = tmp_path / "run.toml"
    stored.write_text(run_file(planned().model, planned().train, data_dir=tmp_path, init=None))
    assert (planned(stored).train.lr, told(planned(stored))) == (0.025, [])
    assert planned(stored, batch_size=64).train.lr == 0.025
    assert defaults_of(dataset_info("digits")) == ({"arch": "vgg16"}, {})
    with pytest.raises(ConfigError, match="the model tells 10 classes apart, but folder has 2"):
        resolve(info, model | {"num_classes": 10}, train)
