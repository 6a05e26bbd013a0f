"""`advmoe predict`: whole folders, patterns, CSV, and images that cannot be read."""

from __future__ import annotations

import csv
import io
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from advmoe_export import Session
from PIL import Image

from advmoe.cli.app import main
from advmoe.cli.predict import pathway_text
from advmoe.data.pictures import find_pictures
from advmoe.errors import DataError
from advmoe.models.network import RoutedNetwork
from advmoe.training.checkpoint import Checkpoint, save_checkpoint

NAMES = tuple(f"class {number}" for number in range(10))


@pytest.fixture(scope="module")
def desk(tmp_path_factory: pytest.TempPathFactory, tiny_vgg: Callable[..., RoutedNetwork]) -> Path:
    """A folder with two exported models and, in `photos`, five images and a note."""
    folder = tmp_path_factory.mktemp("desk")
    model = tiny_vgg(warm=True)
    save_checkpoint(folder / "best.pt", Checkpoint(model=model.config, weights=model.state_dict(), class_names=NAMES))
    assert main(["export", str(folder / "best.pt"), str(folder / "model.onnx")]) == 0
    fixed = ["--profile", "static", "--batch-size", "4"]
    assert main(["export", str(folder / "best.pt"), str(folder / "four.onnx"), *fixed]) == 0
    (folder / "photos" / "trip 2").mkdir(parents=True)
    for seed, name in enumerate(("10.png", "9.png", "a.jpg", "trip 2/1.bmp", "trip 2/2.png")):
        size = (40 + 10 * seed, 50, 3)
        pixels = np.random.default_rng(seed).integers(0, 256, size, dtype=np.uint8)
        Image.fromarray(pixels).save(folder / "photos" / name)
    (folder / "photos" / "notes.txt").write_text("not an image")
    return folder


@pytest.fixture(autouse=True)
def here(desk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(desk)


ALL = ["photos/9.png", "photos/10.png", "photos/a.jpg", "photos/trip 2/1.bmp", "photos/trip 2/2.png"]


@pytest.mark.parametrize(
    ("named", "meant"),
    [
        (["photos"], ALL),
        (["photos/**"], ALL),
        (["photos/*"], ALL),
        (["photos/*.png"], ["photos/9.png", "photos/10.png"]),
        (["photos/**/*.png"], ["photos/9.png", "photos/10.png", "photos/trip 2/2.png"]),
        (["photos/[0-9].png", "photos/trip 2", "photos/9.png"], ["photos/9.png", *ALL[3:]]),
        (["photos/a.jpg", "photos/9.png", "photos/notes.txt"], ["photos/a.jpg", "photos/9.png", "photos/notes.txt"]),
    ],
)
def test_files_folders_and_patterns_mean_images_in_natural_order(named: list[str], meant: list[str]) -> None:
    assert find_pictures(named) == list(map(Path, meant))
    absolute = [str(Path(name).absolute()) for name in named]
    assert find_pictures(absolute) == [Path(name).absolute() for name in meant]


def test_a_file_whose_name_looks_like_a_pattern_is_that_file(tmp_path: Path) -> None:
    (tmp_path / "cat[1].png").touch()
    assert find_pictures([tmp_path / "cat[1].png"]) == [tmp_path / "cat[1].png"]


def test_names_without_images_are_refused(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for name, message in (
        ("gone.png", r"no image file or folder .*gone.png; expected a file, a folder or a pattern such as photos/"),
        ("empty", "empty holds no images; expected files that end in .jpg"),
        ("*.gif", r"no image file matches .*\*.gif"),
    ):
        with pytest.raises(DataError, match=message):
            find_pictures([tmp_path / name])


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["photos/9.png", "model.onnx"], "photos/9.png is not an ONNX file; give the model first, then the images"),
        (["photos", "model.onnx"], "photos is not an ONNX file; give the model first, then the images"),
        (
            ["best.pt", "photos"],
            "'best.pt' is no exported model; export it first, and give the ONNX file: advmoe export",
        ),
        (["model.onnx", "best.pt"], "best.pt is a model, not an image; give one model, then the images"),
        (["model.onnx", "photos", "four.onnx"], "four.onnx is a model, not an image; give one model"),
    ],
)
def test_what_is_no_model_is_named(given: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["predict", *given]) == 1
    assert message in " ".join(capsys.readouterr().err.split())


def test_a_folder_is_classified_in_batches_as_its_images_are_alone(capsys: pytest.CaptureFixture[str]) -> None:
    session = Session("model.onnx")
    for model, size in (("model.onnx", "2"), ("model.onnx", "32"), ("four.onnx", "32")):
        capsys.readouterr()
        assert main(["predict", model, "photos", "--json", "--batch-size", size]) == 0
        result = json.loads(capsys.readouterr().out)
        assert result["skipped"] == []
        assert [each["image"] for each in result["predictions"]] == ALL
        for name, each in zip(ALL, result["predictions"], strict=True):
            if name.endswith("jpg"):  # Pillow's decoder rounds otherwise than the one of data sets
                continue
            alone = session.run(name)
            best = float(alone.probabilities[0].max())
            assert (each["label"], each["probability"]) == (alone.labels[0], pytest.approx(best, abs=0.02))


def test_classes_of_equal_probability_are_ranked_by_their_logits(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    # In float32, exp(-1e-8) is 1 and exp(-200) is 0, so probabilities alone would name the class 0 first.
    logits = np.array([[0, 1e-8, -900, -800, -700, -600, -500, -400, -300, -200]], np.float32)
    execute = Session.execute
    monkeypatch.setattr(Session, "execute", lambda self, images: {**execute(self, images), "logits": logits})
    assert main(["predict", "model.onnx", "photos/9.png", "--json", "--top", "4"]) == 0
    (prediction,) = json.loads(capsys.readouterr().out)["predictions"]
    assert prediction["label"] == Session("model.onnx").run("photos/9.png").labels[0] == NAMES[1]
    assert [(entry["label"], entry["probability"]) for entry in prediction["top"]] == [
        (NAMES[1], 0.5),
        (NAMES[0], 0.5),
        (NAMES[9], 0.0),
        (NAMES[8], 0.0),
    ]


def test_a_table_in_a_pipe_has_a_line_per_image() -> None:
    command = [sys.executable, "-m", "advmoe", "predict", "model.onnx", "photos"]
    environment = {name: value for name, value in os.environ.items() if name != "COLUMNS"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    for name in ALL:
        (line,) = [line for line in done.stdout.splitlines() if f"│ {name} " in line]
        assert line.count("│") == 4, line


def test_csv_has_a_row_per_image_with_the_figures_of_json(capsys: pytest.CaptureFixture[str]) -> None:
    capsys.readouterr()
    assert main(["predict", "model.onnx", "photos", "--json", "--top", "2"]) == 0
    predictions = json.loads(capsys.readouterr().out)["predictions"]
    assert main(["predict", "model.onnx", "photos", "--csv", "--top", "2"]) == 0
    rows = list(csv.DictReader(io.StringIO(capsys.readouterr().out)))
    assert list(rows[0]) == ["image", "label", "probability", "label_2", "probability_2", "pathway"]
    for row, prediction in zip(rows, predictions, strict=True):
        first, second = prediction["top"]
        assert (row["image"], row["label"], row["label_2"]) == (prediction["image"], first["label"], second["label"])
        assert (float(row["probability"]), float(row["probability_2"])) == (first["probability"], second["probability"])
        assert list(map(int, row["pathway"].split())) == prediction["pathway"]


def test_images_that_cannot_be_read_are_skipped_counted_and_make_the_exit_code_1(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    (tmp_path / "1.png").write_bytes(Path("photos/9.png").read_bytes()[:60])
    (tmp_path / "2.png").write_bytes(Path("photos/9.png").read_bytes())
    (tmp_path / "3.gif").write_text("no picture")
    Image.fromarray(np.zeros((1, 100_000, 3), np.uint8)).save(tmp_path / "4.png")
    capsys.readouterr()
    assert main(["predict", "model.onnx", str(tmp_path), "--json"]) == 1
    out, err = capsys.readouterr()
    result = json.loads(out)
    assert [Path(each["image"]).name for each in result["predictions"]] == ["2.png"]
    assert [Path(each["image"]).name for each in result["skipped"]] == ["1.png", "3.gif", "4.png"]
    lines = err.splitlines()
    assert [line.split(":")[0] for line in lines] == ["warning", "warning", "warning", "error"]
    assert "1.png cannot be decoded" in lines[0]
    assert "3.gif cannot be decoded" in lines[1]
    # 32 * 3,200,000 pixels are more than 2^26
    assert re.search(r"4\.png cannot be resized .*: it would be resized to 32 x 3200000", lines[2])
    assert lines[3] == "error: 3 of 4 images could not be read and were skipped"
    assert main(["predict", "model.onnx", str(tmp_path), "--csv"]) == 1
    assert len(capsys.readouterr().out.splitlines()) == 2  # names, and the row of 2.png


def test_a_pathway_is_written_without_spaces_where_experts_have_one_digit() -> None:
    assert (pathway_text([0, 1, 9]), pathway_text([0, 10, 2]), pathway_text(None)) == ("019", "0 10 2", "-")


def test_two_forms_of_output_at_once_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["predict", "model.onnx", "photos", "--csv", "--json"]) == 1
    assert "--csv or --json, not both" in capsys.readouterr().err


def test_a_name_for_the_table_is_not_taken_for_an_image(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["predict", "model.onnx", "photos", "--csv", "p.csv"]) != 0
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "> p.csv" in captured.err
    assert not Path("p.csv").exists()


@pytest.mark.parametrize("name", ["photos/10.png", "photos/trip 2/1.bmp"])
def test_an_image_on_stdin_is_classified_like_its_file(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.stdin", SimpleNamespace(buffer=io.BytesIO(Path(name).read_bytes())))
    assert main(["predict", "model.onnx", name, "-", "--json"]) == 0
    of_file, of_stdin = json.loads(capsys.readouterr().out)["predictions"]
    assert of_stdin == of_file | {"image": "-"}


@pytest.mark.parametrize(("content", "reason"), [(b"", "it is empty"), (b"text", "it is in none of the formats")])
def test_no_image_on_stdin_is_one_line(
    content: bytes, reason: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.stdin", SimpleNamespace(buffer=io.BytesIO(content)))
    assert main(["predict", "model.onnx", "-"]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: stdin cannot be decoded as an image ({reason}); expected")


def test_streams_that_are_closed_are_empty() -> None:
    command = f"{sys.executable} -m advmoe predict model.onnx photos/9.png - <&- >&-"
    found = subprocess.run(command, shell=True, stderr=subprocess.PIPE, text=True, check=False)
    assert found.returncode == 1
    assert found.stderr.splitlines()[-1] == "error: 1 of 2 images could not be read and were skipped"
    assert "stdin cannot be decoded as an image (it is empty)" in found.stderr
