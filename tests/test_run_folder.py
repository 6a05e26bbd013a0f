"""The folder of a run: no lost checkpoint, one writer, and a full disk."""

import dataclasses
import io
import json
import multiprocessing
import os
import resource
import shutil
import signal
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.synchronize import Event
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from runs import TRAIN, Observer, assert_identical, contents, resumed, train
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

from advmoe.cli.app import main
from advmoe.data.sources import Dataset
from advmoe.errors import ConfigError, TrainingError
from advmoe.files import FolderLock, write_text_atomically
from advmoe.training import run_folder
from advmoe.training.checkpoint import load_checkpoint, save_checkpoint
from advmoe.training.run_folder import RunFolder


def test_a_run_that_dies_in_its_first_step_can_go_on(digits: Dataset, whole_run: Path, tmp_path: Path) -> None:
    with pytest.raises(MemoryError):
        train(digits, tmp_path / "run", observer=Observer(fail_after=1))
    assert load_checkpoint(tmp_path / "run" / "last.pt").progress["step"] == 0
    assert resumed(digits, tmp_path / "run")
    assert_identical(contents(tmp_path / "run"), contents(whole_run))


def test_a_run_that_died_before_its_first_checkpoint_is_begun_anew(
    digits: Dataset, whole_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def die(*_: Any) -> None:
        raise MemoryError

    path = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(run_folder, "save_checkpoint", die)
        with pytest.raises(MemoryError):
            train(digits, path, dataclasses.replace(TRAIN, lr=0.5))
    assert (path / "config.json").exists()
    assert not (path / "last.pt").exists()
    (path / "metrics.jsonl").write_text('{"epoch": 1, "val_s')
    assert train(digits, path)
    assert_identical(contents(path), contents(whole_run))


def test_a_run_without_a_step_gives_way_to_another(digits: Dataset, whole_run: Path, tmp_path: Path) -> None:
    path = tmp_path / "run"
    other = dataclasses.replace(TRAIN, lr=0.5)
    with pytest.raises(MemoryError):
        train(digits, path, other, observer=Observer(fail_after=1))
    assert load_checkpoint(path / "last.pt").progress["step"] == 0
    assert train(digits, path)
    assert_identical(contents(path), contents(whole_run))


def test_leftovers_of_killed_writes_are_removed_when_a_run_goes_on(digits: Dataset, tmp_path: Path) -> None:
    path = tmp_path / "run"
    assert not train(digits, path, observer=Observer(stop_after=1))
    leftovers = [
        *(f".{name}.ab12_xyz" for name in ("last.pt", "best.pt", "config.json", "metrics.jsonl")),
        "routes.npz.4711-0.partial",
    ]
    others = [".last.txt", ".gitignore", "notes.partial"]
    for name in (*leftovers, *others):
        (path / name).write_text("half")
    assert resumed(digits, path)
    names = {found.name for found in path.iterdir()}
    assert not names & set(leftovers)
    assert names >= set(others), "a user's files are nobody's leftovers"


def test_a_line_that_a_crash_cut_is_not_joined_to_the_next_record(tmp_path: Path) -> None:
    for name in ("metrics.jsonl", "skipped.jsonl"):
        (tmp_path / name).write_text('{"step": 2}\n{"ste')
    with RunFolder(tmp_path) as folder:
        folder.resume({}, 2, 4)
        folder.log({"step": 6}, {})
        folder.note_skipped([{"step": 7}])
    for name, step in (("metrics.jsonl", 6), ("skipped.jsonl", 7)):
        assert [json.loads(line) for line in (tmp_path / name).read_text().splitlines()] == [
            {"step": 2},
            {"step": step},
        ]


def test_records_are_on_disk_before_the_run_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[str] = []

    def fsync(file: int) -> None:
        same = [path for path in tmp_path.glob("*.jsonl") if os.path.samestat(path.stat(), os.fstat(file))]
        synced.extend(path.read_text() for path in same)

    monkeypatch.setattr(os, "fsync", fsync)
    with RunFolder(tmp_path) as folder:
        folder.log({"step": 2}, {})
        folder.note_skipped([{"step": 3}, {"step": 4}])
    assert synced == ['{"step": 2}\n', '{"step": 3}\n{"step": 4}\n']


@contextmanager
def full_disk(allowed: int) -> Iterator[None]:
    """No file of this process may become larger than so many bytes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (allowed, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("allowed", [0, 300, 100_000], ids=["nothing", "some figures", "half a checkpoint"])
def test_a_full_disk_is_one_line_and_costs_no_checkpoint(
    digits: Dataset, whole_run: Path, tmp_path: Path, allowed: int
) -> None:
    path = tmp_path / "run"
    assert not train(digits, path, observer=Observer(stop_after=3))
    good = (path / "last.pt").read_bytes()
    assert len(good) > 2 * 100_000
    with full_disk(allowed), pytest.raises(TrainingError) as caught:
        resumed(digits, path)
    assert "\n" not in str(caught.value)
    assert "File too large" in str(caught.value), "what the system calls this kind of full"
    assert str(path / "last.pt") in str(caught.value)
    assert (path / "last.pt").read_bytes() == good
    assert not list(path.glob(".*")), "nothing half-written, and no lock"
    assert resumed(digits, path)
    assert_identical(contents(path), contents(whole_run))


def test_a_folder_has_one_writer(digits: Dataset, tmp_path: Path) -> None:
    path = tmp_path / "run"
    refused = rf"process {os.getpid()} on host {socket.gethostname()} is writing to .*run; wait until it has ended"

    class Intruder(Observer):
        def stepped(self, step: int, images: int, figures: dict[str, float]) -> None:
            super().stepped(step, images, figures)
            with pytest.raises(ConfigError, match=refused):
                resumed(digits, path)
            with pytest.raises(ConfigError, match=refused), RunFolder(path):
                pass
            assert json.loads((path / "config.json").read_text())["train"]["seed"] == 0

    observer = Intruder(stop_after=1)
    assert not train(digits, path, observer=observer)
    assert observer.steps == [1], "the intruders were refused"
    assert resumed(digits, path), "the lock is gone with its owner's work"
    assert not list(path.glob(".*"))


def test_two_new_runs_do_not_begin_in_one_folder(digits: Dataset, tmp_path: Path) -> None:
    path = tmp_path / "run"
    path.mkdir()
    with FolderLock(path), pytest.raises(ConfigError, match="is writing to"):
        train(digits, path)
    assert not list(path.iterdir())


def test_a_lock_is_refused_although_its_owners_name_cannot_be_read(tmp_path: Path) -> None:
    owner = tmp_path / ".owner"
    with FolderLock(tmp_path):
        owner.unlink()
        owner.mkdir()  # a file that vanishes after it was found gives an error of the system, too
        with pytest.raises(ConfigError, match="another process is writing to"):
            FolderLock(tmp_path).acquire()
        owner.rmdir()


def _hold(path: Path, held: Event) -> None:
    lock = FolderLock(path)
    lock.acquire()
    held.set()
    signal.pause()


def test_the_lock_of_a_killed_process_is_taken_over(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    held = context.Event()
    owner = context.Process(target=_hold, args=(tmp_path, held), daemon=True)
    owner.start()
    assert held.wait(60)
    with pytest.raises(ConfigError, match=f"process {owner.pid} on host"):
        FolderLock(tmp_path).acquire()
    owner.kill()
    owner.join()
    with FolderLock(tmp_path):
        assert (tmp_path / ".owner").read_text() == f"process {os.getpid()} on host {socket.gethostname()}\n"


def test_tensorboard_shows_each_epoch_once_after_a_run_went_back(
    digits: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "run"
    now = time.time()
    monkeypatch.setattr(time, "time", lambda: now)  # both trainings in one moment: their event files have one name

    def no_space(*_: Any) -> None:
        raise OSError(28, "No space left on device", "x")

    with monkeypatch.context() as patch:
        observer = Observer()
        observer.stepped = lambda step, *_: step == 4 and patch.setattr(run_folder, "save_checkpoint", no_space)  # type: ignore[method-assign]
        with pytest.raises(TrainingError, match="cannot write x: No space left on device"):
            train(digits, path, observer=observer)
    assert resumed(digits, path), "epoch 2 is logged again"
    events = EventAccumulator(str(path)).Reload()
    assert [event.step for event in events.Scalars("val/sa")] == [2, 4]  # of two steps an epoch
    assert [event.step for event in events.Images("examples/attacked")] == [2, 4]


def test_tensorboard_gets_groups_of_charts_settings_and_attacked_images(whole_run: Path) -> None:
    events = EventAccumulator(str(whole_run)).Reload()
    records = contents(whole_run)["records"]
    names = events.Tags()["scalars"]
    assert {name.split("/")[0] for name in names} == {"train", "val", "router"}
    for chart, figure in (
        ("train/loss", "train_loss"),
        ("train/lr", "lr"),
        ("val/sa", "val_sa"),
        ("router/sa", "routers_sa"),
    ):
        found = events.Scalars(chart)
        assert [event.step for event in found] == [2, 4]
        assert [event.value for event in found] == pytest.approx([record[figure] for record in records])
    loads = [events.Scalars(f"router/load/{layer:02}")[1].value for layer in range(12)]
    assert loads == pytest.approx(records[1]["router_load"])

    content = events.SummaryMetadata("_hparams_/session_start_info").plugin_data.content
    settings = HParamsPluginData.FromString(content).session_start_info.hparams
    assert settings["model.arch"].string_value == "vgg16"
    assert settings["train.attack.eps"].number_value == 8 / 255
    assert settings["train.flip"].bool_value is False

    def picture(name: str) -> NDArray[np.int64]:
        (_, last) = events.Images(f"examples/{name}")
        return np.asarray(Image.open(io.BytesIO(last.encoded_image_string)), np.int64)

    clean, attacked, difference = map(picture, ("clean", "attacked", "difference"))
    assert clean.shape == (96, 4 * 96, 3)  # four images of 32 pixels, each pixel three times as large
    assert 0 < abs(attacked - clean).max() <= 8
    moved = attacked - clean  # rounded to whole levels; the difference is shown 127.5 / 8 times as large
    assert abs(difference - (127.5 + 127.5 / 8 * moved)).max() <= 127.5 / 8 + 1


def test_the_last_epochs_are_kept_and_can_be_gone_back_to(digits: Dataset, whole_run: Path, tmp_path: Path) -> None:
    for keep, names in ((1, ["epoch-0002.pt"]), (2, ["epoch-0001.pt", "epoch-0002.pt"])):
        path = tmp_path / str(keep)
        assert train(digits, path, keep=keep)
        assert sorted(kept.name for kept in path.glob("epoch-*")) == names
        assert_identical(contents(path), contents(whole_run))
    assert [load_checkpoint(path / name).progress["step"] for name in names] == [2, 4]
    (path / "epoch-0001.pt").replace(path / "last.pt")
    observer = Observer()
    assert resumed(digits, path, observer=observer)
    assert observer.steps == [3, 4]
    assert_identical(contents(path), contents(whole_run))


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("routes.npz", "of an evaluation"),
        ("config.json", '{"my": "settings"}'),
        ("config.json", "no JSON"),
        ("metrics.jsonl", "{}"),
        ("run.toml", "# of --config"),
        ("data.json", "{}"),
    ],
)
def test_a_run_does_not_replace_the_files_of_others(digits: Dataset, tmp_path: Path, name: str, text: str) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(ConfigError, match=rf"{name} is not of a run, which would replace it") as caught:
        train(digits, tmp_path)
    assert caught.value.options == ("out",)
    assert [path.name for path in tmp_path.iterdir() if not path.name.startswith(".")] == [name]
    assert (tmp_path / name).read_text() == text


def test_kept_epochs_are_counted_as_numbers(tmp_path: Path, whole_run: Path) -> None:
    folder = RunFolder(tmp_path, keep=1)
    (tmp_path / "epoch-mine.pt").touch()
    for epoch in (9999, 10000):
        shutil.copyfile(whole_run / "last.pt", folder.last)
        folder._keep_epoch(epoch)
    assert {path.name for path in tmp_path.glob("epoch-*")} == {"epoch-10000.pt", "epoch-mine.pt"}


def test_an_error_of_torch_stays_what_it_is(tmp_path: Path, whole_run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise RuntimeError("no disk has to do with this")

    checkpoint = load_checkpoint(whole_run / "last.pt")
    monkeypatch.setattr(torch, "save", fail)
    with pytest.raises(RuntimeError, match="no disk has to do with this"):
        save_checkpoint(tmp_path / "new.pt", checkpoint)
    assert not list(tmp_path.iterdir())


def test_the_command_keeps_epochs(tmp_path: Path) -> None:
    small = ["--width", "0.0625", "--epochs", "2", "--batch-size", "8", "--limit-train", "8", "--val-limit", "4"]
    kind = ["--kind", "s_dense", "--method", "standard"]
    assert main(["train", "digits", *small, *kind, "--keep", "1", "--out", str(tmp_path / "run")]) == 0
    assert [path.name for path in (tmp_path / "run").glob("epoch-*")] == ["epoch-0002.pt"]


def test_a_file_that_cannot_be_written_leaves_no_empty_folders(tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    for folder in (tmp_path / "there", tmp_path / "new" / "inner"):
        with full_disk(allowed=100), pytest.raises(OSError, match="File too large"):
            write_text_atomically(folder / "card.json", "x" * 1000)
    assert list(tmp_path.iterdir()) == [tmp_path / "there"]
