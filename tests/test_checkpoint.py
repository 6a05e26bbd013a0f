"""Checkpoints: complete or absent, plain data only, and refused with a reason if they are anything else."""

import contextlib
import dataclasses
import io
import os
import pickle
import random
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

import pytest
import torch
from torch import Tensor

import advmoe
from advmoe.config import ModelConfig, TrainConfig, to_dict
from advmoe.errors import CheckpointError, ConfigError
from advmoe.files import write_atomically
from advmoe.models.network import RoutedNetwork
from advmoe.models.registry import build_model
from advmoe.safetensors_file import write_safetensors
from advmoe.training.checkpoint import Checkpoint, file_digest, load_checkpoint, load_optimizer, save_checkpoint
from advmoe.training.start import start_from

MODEL = ModelConfig(arch="vgg16", width=0.0625, mean=(0.1, 0.2, 0.3), std=(0.4, 0.5, 0.6))


@pytest.fixture(scope="module")
def model(tiny_vgg: Callable[..., RoutedNetwork]) -> RoutedNetwork:
    return tiny_vgg(warm=True, mean=MODEL.mean, std=MODEL.std).eval()


@pytest.fixture
def saved(model: RoutedNetwork, tmp_path: Path) -> Path:
    path = tmp_path / "model.pt"
    train = to_dict(TrainConfig(dataset="digits"))
    names = tuple("0123456789")
    save_checkpoint(
        path, Checkpoint(model=MODEL, weights=model.state_dict(), class_names=names, train=train, metrics={"epoch": 3})
    )
    return path


def rewritten(path: Path, *, without: str = "", **changes: Any) -> Path:
    """The same file with other contents."""
    contents = torch.load(path, weights_only=True) | changes
    contents.pop(without, None)
    torch.save(contents, path)
    return path


def test_a_checkpoint_carries_everything_that_rebuilds_the_model(
    saved: Path, model: RoutedNetwork, images: torch.Tensor
) -> None:
    loaded = advmoe.load(saved)
    assert not loaded.training
    assert loaded.config == MODEL
    with torch.no_grad():
        assert torch.equal(loaded(images), model(images))
    contents = load_checkpoint(saved)
    assert contents.class_names == tuple("0123456789")
    assert contents.train == to_dict(TrainConfig(dataset="digits"))
    assert contents.metrics == {"epoch": 3}


def test_a_failed_write_leaves_the_old_file_and_nothing_else(saved: Path) -> None:
    before = saved.read_bytes()

    def fail(path: Path) -> None:
        path.write_bytes(b"half")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        write_atomically(saved, fail)
    assert saved.read_bytes() == before
    assert [path.name for path in saved.parent.iterdir()] == [saved.name]


def test_an_interrupted_write_leaves_the_old_file_and_nothing_else(
    saved: Path, model: RoutedNetwork, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = saved.read_bytes()

    def interrupt(contents: object, file: IO[bytes]) -> None:
        file.write(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(torch, "save", interrupt)
    with pytest.raises(KeyboardInterrupt):
        save_checkpoint(saved, Checkpoint(model=MODEL, weights=model.state_dict()))
    assert saved.read_bytes() == before
    assert [path.name for path in saved.parent.iterdir()] == [saved.name]


def test_a_file_is_on_disk_before_it_gets_its_name(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[str] = []
    fsync, replace = os.fsync, Path.replace

    def noted_fsync(descriptor: int) -> None:
        events.append("fsync")
        fsync(descriptor)

    def noted_replace(self: Path, target: Path) -> Path:
        events.append("replace")
        return replace(self, target)

    monkeypatch.setattr(os, "fsync", noted_fsync)
    monkeypatch.setattr(Path, "replace", noted_replace)
    write_atomically(saved, lambda path: path.write_bytes(b"new"))
    assert saved.read_bytes() == b"new"
    assert events[:2] == ["fsync", "replace"]


def test_files_get_the_permissions_of_the_users_mask(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        write_atomically(tmp_path / "file", lambda path: path.write_bytes(b""))
    finally:
        os.umask(before)
    assert (tmp_path / "file").stat().st_mode & 0o777 == 0o640


class Exploit:
    """Unpickles by creating the file `path`."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return (open, (str(self.path), "w"))


@pytest.mark.parametrize("container", ["pickle", "torch", "inside", "zip"])
def test_a_hostile_checkpoint_is_refused_and_not_executed(saved: Path, tmp_path: Path, container: str) -> None:
    trap = tmp_path / "executed"
    if container == "pickle":
        saved.write_bytes(pickle.dumps(Exploit(trap)))
    elif container == "torch":
        torch.save(Exploit(trap), saved)
    elif container == "inside":
        torch.save(torch.load(saved, weights_only=True) | {"metrics": Exploit(trap)}, saved)
    else:
        with zipfile.ZipFile(saved, "w") as archive:
            archive.writestr("archive/data.pkl", pickle.dumps(Exploit(trap)))
            archive.writestr("archive/version", "3")
    with pytest.raises(CheckpointError, match="cannot be read as a checkpoint"):
        load_checkpoint(saved)
    assert not trap.exists()


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no checkpoint at .*missing\.pt"):
        load_checkpoint(tmp_path / "missing.pt")
    with pytest.raises(CheckpointError, match=r"is a folder without best\.pt"):
        load_checkpoint(tmp_path)
    with pytest.raises(CheckpointError, match=r"model\.onnx is an exported model; expected the run or the checkpoint"):
        load_checkpoint(tmp_path / "model.onnx")


def test_a_run_folder_means_its_best_checkpoint(whole_run: Path) -> None:
    assert file_digest(whole_run) == file_digest(whole_run / "best.pt")
    model = advmoe.load(str(whole_run))
    for name, value in load_checkpoint(whole_run / "best.pt").weights.items():
        assert torch.equal(model.state_dict()[name], value), name


@pytest.mark.parametrize("share", [0.0, 0.01, 0.5, 0.9, 0.999])
def test_a_truncated_file_is_refused(saved: Path, share: float) -> None:
    whole = saved.read_bytes()
    saved.write_bytes(whole[: int(share * len(whole))])
    with pytest.raises(CheckpointError, match=r"cannot be read as a checkpoint: it is truncated, corrupt"):
        load_checkpoint(saved)


@pytest.mark.parametrize(
    "foreign", [b"", b"hello", b"\x80\x04.", b"PK\x03\x04garbage", b"\x89PNG\r\n\x1a\n" + bytes(100), b"cos\nsystem\n"]
)
def test_a_file_that_is_no_checkpoint_is_refused(tmp_path: Path, foreign: bytes) -> None:
    path = tmp_path / "foreign.pt"
    path.write_bytes(foreign)
    with pytest.raises(CheckpointError, match="cannot be read as a checkpoint"):
        load_checkpoint(path)


def test_damaged_bytes_never_give_another_error(saved: Path) -> None:
    whole, rng = saved.read_bytes(), random.Random(0)
    names = zipfile.ZipFile(io.BytesIO(whole)).namelist()
    pickled = whole.find(b"format")  # the pickled description, where damage is most interesting
    assert any(name.endswith("data.pkl") for name in names)
    for _ in range(150):
        damaged = bytearray(whole)
        for _ in range(rng.randint(1, 4)):
            place = rng.randrange(len(whole)) if rng.random() < 0.3 else pickled + rng.randrange(-60, 3000)
            damaged[place] = rng.randrange(256)
        saved.write_bytes(damaged)
        with contextlib.suppress(CheckpointError):
            advmoe.load(saved)


@pytest.mark.parametrize(
    "content", [{}, [], {"state_dict": {"weight": torch.ones(2)}}, torch.ones(3), {"format": "other"}, None, 5]
)
def test_another_programs_checkpoint_is_refused(tmp_path: Path, content: Any) -> None:
    torch.save(content, tmp_path / "other.pt")
    with pytest.raises(CheckpointError, match=r"is not a checkpoint of advmoe; .*'advmoe train'"):
        load_checkpoint(tmp_path / "other.pt")


def as_version_1(contents: dict[str, Any]) -> dict[str, Any]:
    """Entries by the names that version 1 gave them, which were British."""
    earlier = ".centre."  # codespell:ignore
    weights = {name.replace(".center.", earlier): tensor for name, tensor in contents["weights"].items()}
    train = dict(contents["train"])
    train["specialisation"] = train.pop("specialization")  # codespell:ignore
    assert weights.keys() != contents["weights"].keys()
    return {**contents, "version": 1, "weights": weights, "train": train}


def test_version_1_is_read_by_its_own_names(saved: Path) -> None:
    new = load_checkpoint(saved)
    contents = as_version_1(torch.load(saved, weights_only=True))
    torch.save({**contents, "training_weights": contents["weights"]}, saved)
    old = load_checkpoint(saved)
    assert old.train == new.train
    assert old.training_weights is not None
    assert list(old.weights) == list(old.training_weights) == list(new.weights)
    assert all(torch.equal(old.weights[name], new.weights[name]) for name in new.weights)
    old.build()


def test_safetensors_of_version_1_are_read_by_their_own_names(saved: Path, tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    write_safetensors(path, as_version_1(torch.load(saved, weights_only=True)))
    old, new = load_checkpoint(path), load_checkpoint(saved)
    assert old.train == new.train
    assert old.weights.keys() == new.weights.keys()
    old.build()


def test_only_version_1_has_names_of_version_1(saved: Path) -> None:
    contents = as_version_1(torch.load(saved, weights_only=True))
    with pytest.raises(CheckpointError, match="no field specialisation"):  # codespell:ignore
        load_checkpoint(rewritten(saved, train=contents["train"]))


def test_a_future_version_is_refused(saved: Path) -> None:
    with pytest.raises(
        CheckpointError, match=r"has checkpoint version 999, this program reads versions 1 to 2; install"
    ):
        load_checkpoint(rewritten(saved, version=999))


def test_fields_of_a_newer_program_are_refused(saved: Path) -> None:
    with pytest.raises(
        CheckpointError, match="ModelConfig has no field tentacles; was this written by a newer version"
    ):
        load_checkpoint(rewritten(saved, model={**to_dict(MODEL), "tentacles": 8}))


@pytest.mark.parametrize(
    "changes",
    [
        {"without": "weights"},
        {"weights": None},
        {"weights": [1, 2]},
        {"weights": {"classifier.weight": "heavy"}},
        {"weights": {5: torch.ones(1)}},
        {"without": "model"},
        {"model": [1]},
        {"model": {}},
        {"model": {"arch": 5}},
        {"model": {"arch": "vgg16", "num_experts": "two"}},
        {"model": {"arch": "vgg16", "width": "wide"}},
        {"model": {"arch": "vgg16", "num_experts": 0}},
        {"model": {"arch": "vgg16", "num_experts": 2.5}},
        {"model": {"arch": "vgg16", "mean": ["a", "b", "c"]}},
        {"model": {"arch": "vgg16", "image_size": 4}},
        {"model": {"arch": "vgg17"}},
        {"class_names": 5},
        {"train": [1]},
        {"train": None},
        {"metrics": "good"},
        {"metrics": {"val_ra": "good"}},
        {"metrics": {5: 1.0}},
        {"progress": 5},
        {"progress": {"step": "three"}},
        {"progress": {"step": 3, "selection": {}, "sums": [{"loss": 1}]}},
        {"optimizers": {}},
        {"optimizers": [5]},
        {"class_names": [1, 2]},
        {"class_names": ["cat", "dog"]},
        {"train": {"dataset": 5}},
        {"train": {"dataset": "digits", "attack": 5}},
        {"train": {"dataset": "digits", "attack": {"eps": "big"}}},
        {"training_weights": {"classifier.weight": 1}},
        {"model": {"arch": "vgg16", "image_size": "32"}},
        {"model": {"arch": "vgg16", "compact": "yes"}},
    ],
    ids=str,
)
def test_incomplete_or_inconsistent_contents_are_refused(saved: Path, changes: dict[str, Any]) -> None:
    with pytest.raises(CheckpointError) as caught:
        advmoe.load(rewritten(saved, **changes))
    assert "\n" not in str(caught.value)


def test_a_byte_that_flips_anywhere_in_the_weights_or_the_description_is_noticed(saved: Path) -> None:
    whole, rng = saved.read_bytes(), random.Random(1)
    with zipfile.ZipFile(saved) as archive:
        entries = sorted(archive.infolist(), key=lambda entry: entry.header_offset)
    for entry in (entries[0], *rng.sample(entries[1:], 10)):
        with zipfile.ZipFile(saved) as archive, archive.open(entry) as file:
            begin = file._orig_compress_start  # type: ignore[attr-defined]
        damaged = bytearray(whole)
        damaged[begin + rng.randrange(entry.file_size)] ^= 1 << rng.randrange(8)
        saved.write_bytes(damaged)
        with pytest.raises(CheckpointError, match=r"is damaged: the checksum of .* is wrong"):
            load_checkpoint(saved)
        saved.write_bytes(whole)


@pytest.mark.parametrize("name", ["foo", "cuda:99", "mps"])
def test_a_device_that_is_not_there_is_refused(saved: Path, name: str) -> None:
    with pytest.raises(ConfigError, match=f"device '{name}'"):
        advmoe.load(saved, device=name)


def test_weights_of_another_type_are_not_converted(saved: Path) -> None:
    weights = dict(load_checkpoint(saved).weights)
    weights["classifier.bias"] = weights["classifier.bias"].double()
    with pytest.raises(
        CheckpointError, match=r"classifier.bias must be torch.float32 \[10\], got torch.float64 \[10\]"
    ):
        advmoe.load(rewritten(saved, weights=weights))


@pytest.mark.parametrize("change", ["missing", "unexpected", "shape", "type"])
def test_a_run_starts_from_exactly_its_own_weights(saved: Path, model: RoutedNetwork, change: str) -> None:
    initial = load_checkpoint(saved)
    if change == "missing":
        del initial.weights["classifier.bias"]
    elif change == "unexpected":
        initial.weights["surplus"] = torch.ones(1)
    elif change == "shape":
        initial.weights["classifier.bias"] = torch.ones(1)  # would be broadcast
    else:
        initial.weights["classifier.bias"] = torch.ones(10, dtype=torch.float16)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(ConfigError, match="the checkpoint to start from has other weights"):
        start_from(model, initial)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_sparse_cnn_starts_from_the_weights_of_its_dense(tiny_vgg: Callable[..., RoutedNetwork]) -> None:
    dense, sparse = tiny_vgg(kind="dense"), tiny_vgg(seed=1, kind="sparse_cnn")
    start_from(sparse, Checkpoint(model=dense.config, weights=dense.state_dict()))
    assert all(torch.equal(value, sparse.state_dict()[name]) for name, value in dense.state_dict().items())
    weights = dict(dense.state_dict())
    del weights["classifier.bias"]
    with pytest.raises(ConfigError, match=r"classifier\.bias is missing"):
        start_from(sparse, Checkpoint(model=dense.config, weights=weights))


@pytest.mark.parametrize("change", ["groups", "names", "parameters", "shape", "type", "buffer"])
def test_the_state_of_another_optimizer_is_refused(change: str) -> None:
    def stepped() -> torch.optim.SGD:
        parameter = torch.nn.Parameter(torch.ones(3))
        optimizer = torch.optim.SGD([parameter], lr=0.1, momentum=0.9)
        parameter.square().sum().backward()
        optimizer.step()
        return optimizer

    state: Any = stepped().state_dict()
    load_optimizer(stepped(), state)
    if change == "groups":
        state["param_groups"] = 5
    elif change == "names":
        del state["param_groups"][0]["momentum"]
    elif change == "parameters":
        state["param_groups"][0]["params"] = [0, 1]
    elif change == "shape":
        state["state"][0]["momentum_buffer"] = torch.ones(2)
    elif change == "type":
        state["param_groups"][0]["momentum"] = "much"
    else:
        state["state"][0]["momentum_buffer"] = "much"
    with pytest.raises(CheckpointError, match="the optimizer's state does not fit the model"):
        load_optimizer(stepped(), state)


@pytest.mark.parametrize("change", ["missing", "unexpected", "shape"])
def test_weights_that_do_not_fit_are_refused(saved: Path, change: str) -> None:
    weights = dict(load_checkpoint(saved).weights)
    if change == "missing":
        del weights["classifier.weight"]
    elif change == "unexpected":
        weights["surplus"] = torch.ones(1)
    else:
        weights["classifier.weight"] = torch.ones(3, 3)
    with pytest.raises(CheckpointError, match="weights do not fit its own model description"):
        advmoe.load(rewritten(saved, weights=weights))


def test_a_description_takes_no_memory_for_weights_that_the_file_does_not_hold(
    saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """VGG-16 of width 16 has 16^2 times the weights of VGG-16, which are gigabytes."""
    made = []

    def recorded(config: ModelConfig) -> RoutedNetwork:
        made.append(build_model(config))
        return made[-1]

    monkeypatch.setattr("advmoe.training.checkpoint.build_model", recorded)
    description = to_dict(dataclasses.replace(MODEL, width=16.0))
    with pytest.raises(CheckpointError, match=r"must be .*\[.*\], got"):
        load_checkpoint(rewritten(saved, model=description)).build()
    assert made
    assert all(tensor.is_meta for model in made for tensor in model.state_dict().values())


def test_a_weight_that_is_one_number_repeated_is_refused(saved: Path) -> None:
    weights = load_checkpoint(saved).weights
    name = next(name for name, tensor in weights.items() if tensor.ndim == 4)
    weights[name] = torch.zeros(()).expand(weights[name].shape)
    with pytest.raises(CheckpointError, match=f"{name} must be stored in full"):
        load_checkpoint(rewritten(saved, weights=weights)).build()


@pytest.mark.parametrize("change", [Tensor.to_sparse, lambda weight: weight.to("meta")], ids=["sparse", "meta"])
def test_a_weight_without_a_number_for_each_place_is_refused(saved: Path, change: Callable[[Tensor], Tensor]) -> None:
    weights = load_checkpoint(saved).weights
    changed = rewritten(saved, weights=weights | {"classifier.weight": change(weights["classifier.weight"])})
    with pytest.raises(CheckpointError, match=r"classifier.weight must be a dense tensor with values"):
        load_checkpoint(changed).build()


@pytest.mark.parametrize("form", ["deflated", "overlapping"])
def test_an_archive_that_would_grow_is_refused_before_it_is_read(saved: Path, form: str) -> None:
    content = io.BytesIO(saved.read_bytes())
    with zipfile.ZipFile(content) as old, zipfile.ZipFile(saved, "w") as new:
        for entry in old.infolist():
            new.writestr(entry, old.read(entry), zipfile.ZIP_DEFLATED if form == "deflated" else zipfile.ZIP_STORED)
        if form == "overlapping":  # the directory names the largest part many times
            largest = max(new.filelist, key=lambda entry: entry.file_size)
            new.filelist += [largest] * 50
    with pytest.raises(CheckpointError, match="is compressed or has parts that overlap"):
        load_checkpoint(saved)


def test_a_stored_option_that_means_nothing_for_its_kind_does_not_spoil_a_checkpoint(tmp_path: Path) -> None:
    # defaults change: a stored S-Dense carries the router gradient that was the default of its day
    config = ModelConfig(arch="vgg16", kind="s_dense", width=0.0625, router_gradient="straight_through")
    path = tmp_path / "old.pt"
    save_checkpoint(path, Checkpoint(model=config, weights=build_model(config).state_dict()))
    assert load_checkpoint(path).build().config == config
