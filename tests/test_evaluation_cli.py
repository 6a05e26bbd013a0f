"""`advmoe evaluate`, `analyze` and `report`: files, exit codes, and refused inputs."""

import hashlib
import itertools
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from advmoe.attacks.victims import Victims
from advmoe.cli.app import main
from advmoe.cli.evaluate import Measuring, _training_seconds, show
from advmoe.cli.models import remember_data
from advmoe.config import AttackConfig, to_dict
from advmoe.data import sources
from advmoe.data.digits import load_digits
from advmoe.data.sources import dataset_info
from advmoe.errors import ConfigError
from advmoe.evaluation import suite
from advmoe.evaluation.diagnostics import Diagnostic, diagnose
from advmoe.evaluation.vocabulary import RA, RA_WORST, SA
from advmoe.models.network import RoutedNetwork
from advmoe.training.checkpoint import Checkpoint, save_checkpoint


@pytest.fixture
def checkpoint(tiny_vgg: Callable[..., RoutedNetwork], tmp_path: Path) -> Path:
    """An untrained network that constantly says one class, which is not robustness but looks like it."""
    model = tiny_vgg()
    torch.nn.init.zeros_(model.classifier.weight)  # type: ignore[union-attr, arg-type]
    path = tmp_path / "run" / "best.pt"
    save_checkpoint(
        path,
        Checkpoint(
            model=model.config,
            weights=model.state_dict(),
            class_names=dataset_info("digits").class_names,
            train={"dataset": "digits", "attack": {"eps": 8 / 255}, "method": "advmoe", "epochs": 1},
        ),
    )
    return path


def evaluate(checkpoint: Path, *options: str) -> int:
    small = ["--limit-eval", "20", "--steps", "2", "--diagnose", "20", "--no-latency"]
    return main(["evaluate", str(checkpoint), *small, *options])


def test_an_untrusted_result_is_marked_everywhere_and_strict_ends_with_2(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "evaluation"
    assert evaluate(checkpoint, "--strict", "--routing", "--out", str(out)) == 2
    shown = capsys.readouterr().out
    assert "NOT TO BE TRUSTED" in shown
    card = json.loads((out / "card.json").read_text())
    assert card["unreliable"] is True
    assert card["advmoe"]["checkpoint_sha256"] == hashlib.sha256(checkpoint.read_bytes()).hexdigest()
    failed = {item["name"] for item in card["advmoe"]["diagnostics"] if item["status"] == "failed"}
    assert "zero_gradients" in failed
    assert sorted(path.name for path in out.iterdir()) == [
        "card.json",
        "examples.npz",
        "images.npz",
        "routes.npz",
        "state-diagnostics.json",
        "state.npz",
    ]

    assert main(["analyze", str(out), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert set(found["conditions"]) == {"clean", "pgd", "worst"}
    assert (out / "dissection.svg").read_text().startswith("<svg")

    page = tmp_path / "report.html"
    assert main(["report", str(out), "--out", str(page)]) == 0
    assert "not to be trusted" in page.read_text()


def test_latency_is_shown_with_its_hardware(
    checkpoint: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("advmoe.evaluation.cost.LATENCY_SECONDS", 0.0)
    assert evaluate(checkpoint, "--diagnose", "0", "--latency", "--json") == 0
    numbers = json.loads(capsys.readouterr().out)
    assert set(numbers["latency_ms_per_image"]) == {"1", "20"}
    assert min(numbers["latency_ms_per_image"].values()) > 0
    assert numbers["device"]
    assert evaluate(checkpoint, "--diagnose", "0", "--json") == 0
    assert json.loads(capsys.readouterr().out)["latency_ms_per_image"] == {}


def test_the_mask_of_a_sparse_cnn_is_compared_at_once(
    checkpoint: Path, tiny_vgg: Callable[..., RoutedNetwork], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sparse = tmp_path / "sparse.pt"
    model = tiny_vgg(kind="sparse_cnn")
    save_checkpoint(sparse, Checkpoint(model=model.config, weights=model.state_dict()))
    out = tmp_path / "evaluation"
    assert evaluate(checkpoint, "--diagnose", "0", "--mask", str(sparse), "--out", str(out), "--json") == 0
    found = json.loads(capsys.readouterr().out)["mask_iou"]
    assert main(["analyze", str(out), "--mask", str(sparse), "--no-figures", "--json"]) == 0
    analyzed = json.loads(capsys.readouterr().out)["mask"]
    assert found == {name: values["mean"] for name, values in analyzed.items()}
    assert set(found) == {"clean", "pgd", "worst"}
    assert main(["evaluate", str(sparse), "--mask", str(sparse)]) == 1
    assert "--mask is for an MoE-CNN, this is a sparse_cnn" in capsys.readouterr().err


def test_the_facts_about_a_model_are_shown_as_options_take_them(
    checkpoint: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("COLUMNS", raising=False)
    assert main(["info", str(checkpoint), "--all"]) == 0
    shown = capsys.readouterr().out
    for name, value in (
        ("depth", "none"),
        ("compact", "off"),
        ("mean", r"[\d.]+, [\d.]+, [\d.]+"),
        ("train.attack.eps", "8/255"),
        ("train.dataset", "digits"),
    ):
        assert re.search(rf"│ {name} +│ {value} +│", shown), name
    assert not re.search(r"None|True|False|[\[\]{}()]", shown)
    assert main(["info", str(checkpoint), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert (facts["depth"], facts["compact"], facts["train.attack"]) == (None, False, {"eps": 8 / 255})


def test_without_diagnostics_strict_makes_no_sense(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for images in ("0", "15"):
        assert evaluate(checkpoint, "--strict", "--diagnose", images) == 1
        assert f"correctly classified images; give --diagnose 16 or more, got {images}" in capsys.readouterr().err
    assert evaluate(checkpoint, "--strict", "--limit-eval", "15") == 1
    assert "correctly classified images; give --limit-eval 16 or more, got 15" in capsys.readouterr().err


def test_advice_about_too_few_diagnosed_images_can_be_followed(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert evaluate(checkpoint, "--limit-eval", "13", "--diagnose", "12", "--out", str(tmp_path / "card")) == 0
    card = json.loads((tmp_path / "card" / "card.json").read_text())
    card["advmoe"]["verdict"] = "not checked"
    for images, sa, diagnosed, advice in (
        (13, 50.0, 12, "too few of all 13 correctly: evaluate more, or train it"),
        (1000, 20.0, 64, "give --diagnose 160"),  # 32 of them are expected to be right
        (1000, 20.0, 200, "give --diagnose 400"),  # of these 200, fewer than 16 were right
        (100, 16.0, 64, "give --diagnose 100"),  # 16 are right
        (100, 15.0, 64, "too few of all 100 correctly: evaluate more, or train it"),
        (1000, 0.0, 64, "too few of all 1000 correctly: evaluate more, or train it"),
    ):
        card["advmoe"] |= {"images": images, "sa": sa}
        capsys.readouterr()
        show("a network", card, diagnosed=diagnosed)
        assert capsys.readouterr().err.rstrip().endswith(f"{advice}.")


def test_a_table_names_each_figure_as_the_card_and_shows_its_own_error(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("COLUMNS", raising=False)  # no cell is broken into lines
    # Of 100 images: sqrt(0.8 * 0.2 / 100) = 4.00 %, sqrt(0.5 * 0.5 / 100) = 5.00 %, sqrt(0.1 * 0.9 / 100) = 3.00 %
    numbers = {
        "sa": 80.0,
        "ra": 20.0,
        "ra_pgd20": 50.0,
        "ra_route": 20.0,
        "ra_worst": 10.0,
        "ra_by_eps": {"1/255": 50.0},
    }
    numbers |= {"attack": to_dict(AttackConfig(steps=20)), "images": 100, "seed": 0, "standard_error": 3.0}
    numbers |= {"controls": {"random": {"sa": 80.0, "ra": 50.0, "ra_worst": 10.0}}, "parameters": 5, "gflops": 0.1}
    numbers |= {"training_seconds": None, "verdict": "not checked", "diagnostics": []}
    show("a model", {"advmoe": numbers}, diagnosed=64)
    shown = capsys.readouterr().out
    for label, share in (
        (SA.long, "80.00 ± 4.00 %"),
        ("RA under PGD-20, eps 8/255", "50.00 ± 5.00 %"),
        (RA.long, "20.00 ± 4.00 %"),
        (RA_WORST.long, "10.00 ± 3.00 %"),
        ("RA under PGD, eps 1/255", "50.00 ± 5.00 %"),
        ("control: random", "SA 80.00 ± 4.00 %, RA 50.00 ± 5.00 %, RA, worst 10.00 ± 3.00 %"),
    ):
        assert re.search(rf"│ {re.escape(label)} +│ {re.escape(share)} +│", shown), label
    del numbers["ra_route"]  # RA is that under PGD
    show("a model", {"advmoe": numbers}, diagnosed=64)
    assert RA.long not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--eps", "8"], "did you mean 8/255?"),
        (["--eps-sweep", "2/255,3"], "got 3; did you mean 3/255? (--eps-sweep)"),
        (["--eps-sweep", "300/255"], "got 1.17647 (--eps-sweep)"),
        (["--steps", "0"], "expected an attack that moves the images, got 0 steps; take 1 or more (--steps)"),
        (["--step-size", "0"], "got steps of length 0; take a quarter of eps (--step-size)"),
        (["--dataset", "mnist"], "unknown data set"),
    ],
)
def test_bad_options_are_one_line(
    checkpoint: Path, options: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert evaluate(checkpoint, *options) == 1
    err = capsys.readouterr().err.strip()
    assert message in err
    assert len(err.splitlines()) == 1


@pytest.mark.parametrize(
    ("dataset", "classes"),
    [("cifar10", "10 (airplane, automobile, bird, ...)"), ("tinyimagenet", "200"), ("cifar100", "100 (apple, ")],
)
def test_a_data_set_of_other_classes_is_refused_before_it_is_read(
    checkpoint: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    dataset: str,
    classes: str,
) -> None:
    monkeypatch.setattr(sources, "load_dataset", None)  # which would download it
    assert evaluate(checkpoint, "--dataset", dataset) == 1
    err = " ".join(capsys.readouterr().err.split())
    assert f"tells 10 classes apart (0, 1, 2, ...), {dataset} has {classes}" in err
    assert err.endswith("give the data set it was trained on")


def test_folders_without_an_evaluation_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    evaluated, run, card = tmp_path / "evaluated", tmp_path / "run", tmp_path / "evaluated" / "card.json"
    for file in (card, run / "best.pt", tmp_path / "empty" / "notes.json"):
        file.parent.mkdir()
        file.touch()
    expected = "expected a folder that 'advmoe evaluate --out' wrote"
    for path, message in (
        (tmp_path / "empty", f"there is no result card {tmp_path}/empty/card.json; {expected}"),
        (tmp_path, f"there is no result card {tmp_path}/card.json; {expected}, such as {evaluated}"),
        (tmp_path / "evaluate", f"there is no folder {tmp_path}/evaluate; {expected}; did you mean '{evaluated}'?"),
        (card, f"{card} is a file; {expected}, such as {evaluated}"),
        (tmp_path / "empty" / "notes.json", f"{tmp_path}/empty/notes.json is a file; {expected}"),
        (run, f"{run} holds a training run; evaluate it first, with --out {run}/evaluation"),
    ):
        for command in ("analyze", "report"):
            assert main([command, str(path)]) == 1
            assert capsys.readouterr().err == f"error: {message}\n"


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("runs/cifar-moe", "did you mean 'runs/cifar10-moe'?"),
        ("run/cifar10-moe", "did you mean 'runs/cifar10-moe'?"),
        ("rnus/cifar-moe", "did you mean 'runs'?"),
        ("runs/cifar10-moe/bset.pt", "did you mean 'runs/cifar10-moe/best.pt'?"),
        ("elsewhere/a", "expected a file such as runs/NAME/best.pt"),
        ("evaluated", "evaluated holds an evaluation; expected the run or the checkpoint evaluated"),
        ("evaluated/card.json", "is the card of an evaluation; expected the run or the checkpoint evaluated"),
    ],
)
def test_a_run_that_is_not_there_is_refused_with_the_closest_name(
    path: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    for file in (Path("runs/cifar10-moe/best.pt"), Path("evaluated/card.json")):
        file.parent.mkdir(parents=True)
        file.touch()
    for command in (["evaluate", path], ["info", path]):
        assert main(command) == 1
        assert capsys.readouterr().err.endswith(f"{message}\n")


@pytest.mark.parametrize(
    ("out", "message"),
    [
        ("missing/r.html", "does not exist; create it first"),
        ("r.pdf", "so --out must end in .html or .htm, got r.pdf"),
        ("r", "so --out must end in .html or .htm, got r"),
    ],
)
def test_a_report_is_written_to_a_web_page_in_a_folder_that_exists(
    out: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["report", "evaluation", "--out", out]) == 1
    assert capsys.readouterr().err.endswith(f"{message}\n")


def test_without_diagnostics_the_numbers_are_not_checked_anywhere(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, page = tmp_path / "evaluation", tmp_path / "report.html"
    assert evaluate(checkpoint, "--diagnose", "0", "--out", str(out)) == 0
    assert "NOT CHECKED" in capsys.readouterr().err
    card = json.loads((out / "card.json").read_text())
    assert (card["unreliable"], card["advmoe"]["trusted"], card["advmoe"]["verdict"]) == (None, None, "not checked")
    assert main(["report", str(out), "--out", str(page)]) == 0
    assert '<span class="verdict not-checked">not checked</span>' in page.read_text()


def test_an_attack_without_radius_needs_no_step(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert evaluate(checkpoint, "--diagnose", "0", "--eps", "0", "--json") == 0
    numbers = json.loads(capsys.readouterr().out)
    assert numbers["ra"] == numbers["sa"]


def test_a_log_file_gets_a_line_for_each_attack_on_each_batch(
    checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert evaluate(checkpoint, "--diagnose", "0", "--batch-size", "10", "--control", "random") == 0
    assert capsys.readouterr().err.splitlines() == [
        "run/best: 0/20 images, PGD",
        "run/best: 10/20 images, PGD",
        "run/best, random control: 0/20 images, PGD",
        "run/best, random control: 10/20 images, PGD",
        "No diagnostics were run: these numbers are NOT CHECKED.",
    ]
    assert evaluate(checkpoint) == 0
    assert "run/best: 20/20 images, diagnostics" in capsys.readouterr().err.splitlines()


def test_an_evaluation_that_fails_leaves_no_folder(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    contents = torch.load(checkpoint, weights_only=True)
    contents["weights"]["classifier.bias"].fill_(torch.nan)
    torch.save(contents, tmp_path / "nan.pt")
    assert evaluate(tmp_path / "nan.pt", "--out", str(tmp_path / "evaluation")) == 1
    assert "not finite" in capsys.readouterr().err
    assert not (tmp_path / "evaluation").exists()


@pytest.mark.parametrize("name", ["last.pt", "best.pt"])
@pytest.mark.parametrize("of_control", [False, True])
def test_an_evaluation_does_not_replace_the_files_of_a_training_run(
    checkpoint: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    of_control: bool,
) -> None:
    out = tmp_path / "out"
    run = out / "control-random" if of_control else out
    run.mkdir(parents=True)
    (run / name).touch()
    (run / "routes.npz").write_bytes(b"of the training")
    monkeypatch.setattr("advmoe.training.checkpoint.load_checkpoint", None)  # refused before anything is read
    assert evaluate(checkpoint, "--control", "random", "--out", str(out)) == 1
    shown = " ".join(capsys.readouterr().err.split())
    assert f"--out needs a folder of its own, but {run} holds a training run ({name})" in shown
    assert shown.endswith(f"give e.g. --out {run}/evaluation")
    assert sorted(path.name for path in run.iterdir()) == sorted([name, "routes.npz"])
    assert (run / "routes.npz").read_bytes() == b"of the training"


def test_a_run_folder_is_evaluated_on_the_data_it_was_trained_on(
    three_classes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(tmp_path / "data", tmp_path / "other")
    asked: list[Path | None] = []
    load = sources.load_dataset

    def spy(name: str, data_dir: Path | None, **options: object) -> object:
        asked.append(data_dir)
        return load(name, data_dir, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(sources, "load_dataset", spy)
    assert evaluate(three_classes.parent, "--diagnose", "0", "--json") == 0
    assert json.loads(capsys.readouterr().out)["checkpoint"] == str(three_classes)
    assert evaluate(three_classes.parent, "--diagnose", "0", "--data-dir", str(tmp_path / "other")) == 0
    assert asked == [tmp_path / "data", tmp_path / "other"]
    assert evaluate(tmp_path) == 1
    assert "is a folder without best.pt; expected a run folder such as runs/NAME" in capsys.readouterr().err


def test_a_run_that_has_finished_no_epoch_is_named_as_such(
    checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    last = checkpoint.rename(checkpoint.with_name("last.pt"))
    assert evaluate(checkpoint.parent) == 1
    shown = " ".join(capsys.readouterr().err.split())
    assert "has no best.pt yet, which the first epoch writes" in shown
    assert f"let it go on, or give {last} to take it as it is" in shown
    assert evaluate(last, "--diagnose", "0") == 0


def test_the_images_of_a_run_that_are_gone_are_not_looked_for_elsewhere(
    three_classes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    remember_data(three_classes.parent, "folder", tmp_path / "gone")
    assert evaluate(three_classes.parent, "--diagnose", "0") == 1
    assert "gone, which is gone; say where they are now (--data-dir)" in capsys.readouterr().err


def test_a_folder_for_images_that_come_with_the_package_is_refused_unless_an_earlier_version_recorded_it(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert evaluate(checkpoint, "--diagnose", "0", "--data-dir", str(tmp_path)) == 1
    told = "the images of digits come with advmoe, no folder is read for them; leave it out (--data-dir)"
    assert told in capsys.readouterr().err
    remember_data(checkpoint.parent, "digits", tmp_path / "gone")
    assert evaluate(checkpoint, "--diagnose", "0") == 0


def test_a_repeated_evaluation_takes_the_diagnostics_it_has_kept(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []

    def spy(sample: Victims, **settings: Any) -> list[Diagnostic]:
        asked.append(len(sample))
        return diagnose(sample, **settings)

    monkeypatch.setattr(suite, "diagnose", spy)
    cards = []
    for sample in ("20", "20", "10"):  # 10 images are another check than 20
        assert evaluate(checkpoint, "--out", str(tmp_path / "out"), "--json", "--diagnose", sample) == 0
        cards.append(json.loads(capsys.readouterr().out))
    assert asked == [20, 10]
    assert cards[0]["diagnostics"] == cards[1]["diagnostics"]
    (tmp_path / "out" / "state-diagnostics.json").write_text("damaged")
    assert evaluate(checkpoint, "--out", str(tmp_path / "out"), "--diagnose", "10") == 0
    assert asked == [20, 10, 10]
    monkeypatch.setattr(suite, "installed", lambda: False)  # the package of Square: black_box may not have run
    assert evaluate(checkpoint, "--out", str(tmp_path / "out"), "--diagnose", "10") == 0
    assert asked == [20, 10, 10, 10]


def test_a_limit_chooses_the_same_images_for_every_seed(checkpoint: Path, tmp_path: Path) -> None:
    test, found = load_digits().test, []
    for seed in ("0", "1"):
        assert evaluate(checkpoint, "--diagnose", "0", "--seed", seed, "--out", str(tmp_path / seed)) == 0
        with np.load(tmp_path / seed / "images.npz") as arrays:
            found.append(dict(arrays))
    numbers = found[0]["index"]
    np.testing.assert_array_equal(numbers, found[1]["index"])
    assert len(np.unique(numbers)) == 20
    assert numbers.max() >= 20, "numbers in the data set, not rows of the choice"
    np.testing.assert_array_equal(found[0]["label"], test.labels[numbers])
    assert main(["compare", str(tmp_path / "0"), str(tmp_path / "1")]) == 0


def test_models_are_compared_on_the_same_images_with_paired_errors(
    checkpoint: Path,
    tiny_vgg: Callable[..., RoutedNetwork],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("COLUMNS", raising=False)  # no cell of a table is broken into lines
    out, other = tmp_path / "evaluation", tmp_path / "other" / "best.pt"
    model = tiny_vgg(seed=1, kind="s_dense")
    digits = {"class_names": dataset_info("digits").class_names, "train": {"dataset": "digits"}}
    save_checkpoint(other, Checkpoint(model=model.config, weights=model.state_dict(), **digits))  # type: ignore[arg-type]
    assert evaluate(checkpoint, "--diagnose", "0", "--routing", "--control", "averaged", "--out", str(out)) == 0
    of_control = json.loads((out / "control-averaged" / "card.json").read_text())["advmoe"]
    assert of_control["control"] == "averaged"
    assert of_control["checkpoint_sha256"] == json.loads((out / "card.json").read_text())["advmoe"]["checkpoint_sha256"]
    assert "control: averaged" in capsys.readouterr().out
    assert evaluate(other, "--diagnose", "0", "--eps", "8/255", "--out", str(tmp_path / "second")) == 0
    capsys.readouterr()
    assert main(["compare", str(out), str(tmp_path / "second"), "--json"]) == 0
    compared = json.loads(capsys.readouterr().out)
    assert (compared["attack"]["steps"], compared["attack"]["step_size"]) == (2, pytest.approx(2 / 255))
    first, second = compared["models"]
    assert (first["attacks"], second["attacks"]) == (["PGD", "routing"], ["PGD"])
    assert second["sa_difference"] == pytest.approx(second["sa"] - first["sa"])
    assert second["sa_difference_error"] > 0
    assert "sa_difference" not in first
    assert evaluate(checkpoint, "--diagnose", "0", "--out", str(tmp_path / "spared")) == 0
    capsys.readouterr()
    assert main(["compare", str(tmp_path / "spared"), str(tmp_path / "second")]) == 0
    shown = capsys.readouterr()
    assert "Left out: RA; RA, worst. Reason: the routing of run/best was not attacked" in shown.err
    assert "(advmoe evaluate --routing)." in shown.err
    assert "RA, PGD" in shown.out
    assert "per cent; PGD-2, eps 8/255, step 2/255, 1 restart(s), start uniform, seed 0" in shown.out
    assert evaluate(other, "--diagnose", "0", "--eps", "4/255", "--out", str(tmp_path / "third")) == 0
    capsys.readouterr()
    page = tmp_path / "report.html"
    assert main(["report", str(tmp_path / "second"), str(tmp_path / "third"), "--out", str(page)]) == 1
    assert "got attack" in capsys.readouterr().err
    assert not page.exists()
    assert main(["report", str(tmp_path / "spared"), str(tmp_path / "second"), "--out", str(page)]) == 0
    assert "Left out: RA; RA, worst. Reason: the routing of run/best was not attacked" in page.read_text()
    assert RA_WORST.long not in page.read_text()
    assert main(["report", str(out), "--out", str(page)]) == 0
    assert "Left out" not in page.read_text()
    assert RA_WORST.long in page.read_text()
    small = ["--limit-eval", "20", "--steps", "2", "--diagnose", "0"]
    assert main(["compare", str(checkpoint.parent), str(other.parent), *small]) == 0
    shown = capsys.readouterr()
    assert "points ± one paired standard error" in shown.out
    assert " PGD, routing │" in shown.out
    assert " PGD, 13 further starts │" in shown.out
    assert main(["compare", str(out), str(other), "--steps", "3", "--limit-eval", "20", "--diagnose", "0"]) == 1
    assert "got attack" in capsys.readouterr().err
    assert main(["compare", str(out), str(other), "--steps", "2", "--limit-eval", "10", "--diagnose", "0"]) == 1
    assert "got images 20 for run/best and 10 others for other/best" in capsys.readouterr().err


def test_pixels_are_digested_once_for_all_models_and_all_they_are_needed_for(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    digested, of_pixels = [], hashlib.blake2b
    monkeypatch.setattr(hashlib, "blake2b", lambda *data, **how: (digested.append(data), of_pixels(*data, **how))[1])
    out = ["--diagnose", "0", "--out", str(tmp_path / "evaluation")]
    assert evaluate(checkpoint, "--control", "unchanged", *out) == 0  # the identities and outcomes of two models
    assert len(digested) == 20
    small = ["--limit-eval", "20", "--steps", "2", "--diagnose", "0"]
    other = shutil.copy(checkpoint, checkpoint.with_name("other.pt"))
    assert main(["compare", str(checkpoint), str(other), *small]) == 0
    assert len(digested) == 40


def test_seeds_of_compared_evaluations_are_shown_and_may_differ(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for number, seed in enumerate((0, 1, 0)):
        out = str(tmp_path / str(number))
        assert evaluate(checkpoint, "--diagnose", "0", "--seed", str(seed), "--out", out) == 0
    folders = [str(tmp_path / str(number)) for number in range(3)]
    capsys.readouterr()
    assert main(["compare", *folders, "--json"]) == 0
    assert [row["seed"] for row in json.loads(capsys.readouterr().out)["models"]] == [0, 1, 0]
    assert main(["compare", *folders]) == 0
    shown = capsys.readouterr()
    expected = "The attacks began at other random points (seed 0: 0, 2; seed 1: 1)."
    assert expected.replace(" ", "") in re.sub(r"\s", "", shown.err)
    assert "start uniform, seed" not in shown.out
    page = tmp_path / "report.html"
    assert main(["report", *folders, "--out", str(page)]) == 0
    assert "20 digits test images, several seeds," in page.read_text()
    assert expected.replace(" ", "") in re.sub(r"\s", "", page.read_text())
    assert main(["compare", folders[0], folders[2]]) == 0
    shown = capsys.readouterr()
    assert "other random points" not in shown.err
    for command in ("compare", "report"):
        assert main([command, folders[0], folders[1], f"{folders[1]}/../0"]) == 1
        assert f"models are compared with others, got {folders[0]} twice; leave one out" in capsys.readouterr().err


def test_options_that_no_compared_model_would_obey_are_refused(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for folder in ("a", "b"):
        assert evaluate(checkpoint, "--diagnose", "0", "--out", str(tmp_path / folder)) == 0
    folders = [str(tmp_path / "a"), str(tmp_path / "b")]
    capsys.readouterr()
    assert main(["compare", *folders, "--json"]) == 0
    options = ["--steps", "50", "--eps", "8/255", "--autoattack", "--limit-eval", "20", "--seed", "0"]
    assert main(["compare", *folders, *options]) == 1
    shown = " ".join(capsys.readouterr().err.split())
    assert (
        "--steps, --eps, --autoattack, --limit-eval, --seed would change nothing, because all models are eva" in shown
    )
    assert main(["compare", folders[0], str(checkpoint), "--steps", "2", "--limit-eval", "20", "--diagnose", "0"]) == 0


def test_a_comparison_reads_everything_before_it_measures_anything(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert evaluate(checkpoint, "--diagnose", "0", "--eps", "4/255", "--out", str(tmp_path / "evaluated")) == 0

    def measured(*_: object, **__: object) -> None:
        pytest.fail("a model was measured")

    monkeypatch.setattr(Measuring, "card_of", measured)
    for last, message in (("gone", "gone"), ("evaluated", "got attack"), ("empty", "empty")):
        (tmp_path / "empty").mkdir(exist_ok=True)
        capsys.readouterr()
        assert main(["compare", str(checkpoint), str(tmp_path / last), "--limit-eval", "20"]) == 1
        assert message in " ".join(capsys.readouterr().err.split())


@pytest.fixture
def three_classes(tiny_vgg: Callable[..., RoutedNetwork], tmp_path: Path) -> Path:
    """A network for an image folder of three classes."""
    names = ("a", "b", "c")
    for part, name in itertools.product(("train", "val"), names):
        (tmp_path / "data" / part / name).mkdir(parents=True)
        for number in range(2):
            pixels = np.random.default_rng(number).integers(0, 256, (32, 32, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / "data" / part / name / f"{number}.png")
    model = tiny_vgg(num_classes=3, kind="s_dense")
    path = tmp_path / "three" / "best.pt"
    train = {"dataset": "folder", "attack": {"eps": 8 / 255}}
    save_checkpoint(path, Checkpoint(model=model.config, weights=model.state_dict(), class_names=names, train=train))
    remember_data(path.parent, "folder", tmp_path / "data")
    return path


def test_images_that_cannot_be_decoded_are_left_out_on_request_and_the_others_keep_their_numbers(
    three_classes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    small = ["evaluate", str(three_classes), "--steps", "1", "--diagnose", "0", "--no-latency"]
    assert main([*small, "--out", str(tmp_path / "whole")]) == 0
    picture = tmp_path / "data" / "val" / "b" / "0.png"
    sound = picture.read_bytes()
    picture.write_bytes(b"junk")
    capsys.readouterr()
    assert main([*small, "--out", str(tmp_path / "few")]) == 1
    refused = capsys.readouterr().err.strip()
    assert str(picture) in refused
    assert refused.endswith("mend or remove the file, or skip bad images (--skip-bad-images)")
    for limit, folder in ((["--limit-eval", "5"], "limited"), ([], "few")):
        assert main([*small, *limit, "--skip-bad-images", "--out", str(tmp_path / folder)]) == 0
        assert re.search(rf"skipped test images: 1; image \d \({picture}", capsys.readouterr().err)
    found = {}
    for folder in ("whole", "few", "limited"):
        with np.load(tmp_path / folder / "images.npz") as arrays:
            outcomes = zip(arrays["label"].tolist(), arrays["ra"].tolist(), strict=True)
            found[folder] = dict(zip(arrays["index"].tolist(), outcomes, strict=True))
    assert list(found["few"]) == [0, 1, 3, 4, 5]  # the third image of the folder is missing
    assert len(found["limited"]) == 4
    assert found["limited"].items() <= found["few"].items() <= found["whole"].items()
    assert main(["compare", str(tmp_path / "whole"), str(tmp_path / "few")]) == 1
    assert "got images 6 for whole and 5 others for few" in capsys.readouterr().err
    few = [str(three_classes), str(tmp_path / "few"), "--skip-bad-images", "--steps", "1", "--diagnose", "0"]
    assert main(["compare", *few]) == 0
    picture.write_bytes(sound)  # now there are six again
    capsys.readouterr()
    assert main([*small, "--skip-bad-images", "--out", str(tmp_path / "few")]) == 1
    err = capsys.readouterr().err.strip()
    assert "belongs to another evaluation: it is of other images (5, now 6); repeat the original options or" in err
    assert err.endswith("choose another folder (--dataset, --limit-eval, --skip-bad-images)")
    for picture in (tmp_path / "data" / "val").rglob("*.png"):
        picture.write_bytes(b"junk")
    assert main([*small, "--skip-bad-images"]) == 1
    assert "none of the 6 test images can be decoded" in capsys.readouterr().err


def test_autoattack_is_refused_at_once_for_too_few_classes_and_left_out_of_the_suite(
    three_classes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    small = ["--steps", "2", "--diagnose", "0"]
    out = tmp_path / "suite"
    assert main(["evaluate", str(three_classes), *small, "--no-latency", "--suite", "--out", str(out)]) == 0
    assert "AutoAttack is left out: it needs at least 4 classes, and the model has 3." in capsys.readouterr().err
    numbers = json.loads((out / "card.json").read_text())["advmoe"]
    assert "ra_by_eps" in numbers
    assert "ra_aa" not in numbers
    monkeypatch.setattr(Measuring, "card_of", None)  # nothing is measured
    for command in (["evaluate", str(three_classes), "--suite"], ["compare", str(three_classes), str(three_classes)]):
        assert main([*command, *small, "--autoattack"]) == 1
        assert "AutoAttack's targeted losses need at least 4 classes, got 3" in capsys.readouterr().err


def test_the_time_of_a_training(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"train": {"batch_size": 8}}))
    lines = [{"step": 2, "images_per_second": 4.0}, {"step": 6, "images_per_second": 2.0}]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert _training_seconds(tmp_path) == 2 * 8 / 4 + 4 * 8 / 2
    assert _training_seconds(tmp_path / "nothing") is None


def test_the_options_of_an_evaluation_reach_its_attacks(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    def stop(model: Any, images: Any, config: Any, *, seed: int, **_: Any) -> None:
        asked.append((config, seed))
        raise ConfigError("enough is known")

    monkeypatch.setattr("advmoe.evaluation.suite.run_suite", stop)
    assert evaluate(checkpoint, "--restarts", "3", "--seed", "5") == 1
    assert evaluate(checkpoint, "--suite") == 1
    assert evaluate(checkpoint, "--suite", "--eps", "0") == 1
    other = shutil.copy(checkpoint, checkpoint.with_name("other.pt"))
    assert main(["compare", str(checkpoint), str(other), "--steps", "7", "--limit-eval", "20"]) == 1
    (chosen, seed), (whole, _), (still, _), (compared, _) = asked
    # trained at 8/255; a step is a quarter of the radius
    assert (chosen.attack, seed) == (AttackConfig(eps=8 / 255, steps=2, step_size=2 / 255, restarts=3), 5)
    assert (chosen.routing, chosen.autoattack, chosen.eps_sweep) == (False, False, ())
    assert (whole.routing, whole.autoattack) == (True, True)
    assert whole.eps_sweep == pytest.approx([2 / 255, 4 / 255, 6 / 255, 12 / 255, 16 / 255])
    assert still.eps_sweep == (0.0,)  # five times the same
    assert compared.attack == AttackConfig(eps=8 / 255, steps=7, step_size=2 / 255)


def test_statistics_of_controls_are_of_training_images(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    def stop(model: Any, images: Any, *_: Any, **__: Any) -> None:
        asked.append(images)
        raise ConfigError("enough is known")

    monkeypatch.setattr("advmoe.evaluation.controls.calibration_batches", stop)
    assert evaluate(checkpoint, "--control", "unchanged") == 1
    known = {image.tobytes() for image in load_digits().train.images}
    assert len(asked[0]) == 1024
    assert all(image.tobytes() in known for image in asked[0].images)


@pytest.mark.parametrize(("verdict", "status"), [("trusted", 0), ("not to be trusted", 2), ("not checked", 2)])
def test_strict_accepts_trusted_numbers_only(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch, verdict: str, status: int
) -> None:
    card = {"advmoe": {"verdict": verdict, "controls": {}}}
    monkeypatch.setattr(Measuring, "card_of", lambda *_, **__: (card, None))
    assert evaluate(checkpoint, "--strict", "--json") == status
