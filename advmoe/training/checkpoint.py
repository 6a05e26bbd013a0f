"""Checkpoints: one file that rebuilds a model. `last.pt` also holds the state from which training continues."""

from __future__ import annotations

import hashlib
import warnings
import zipfile
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import IO, Annotated, Any, cast, get_type_hints

import torch

from advmoe.config import ModelConfig, TrainConfig
from advmoe.device import resolve_device
from advmoe.earlier import from_version_1
from advmoe.errors import CheckpointError, ConfigError
from advmoe.files import write_atomically
from advmoe.hub import fetch
from advmoe.models.masked import compact, masks_open
from advmoe.models.network import RoutedNetwork
from advmoe.models.registry import build_model
from advmoe.run_paths import checkpoint_of
from advmoe.safetensors_file import SUFFIX, read_safetensors, write_safetensors
from advmoe.schema import Setting, Settings, check, conform, from_dict, shown, to_dict

FORMAT = "advmoe-checkpoint"
VERSION = 2
Weights = dict[str, torch.Tensor]


@dataclass(frozen=True, kw_only=True)
class Progress(Settings):
    """Position in a run."""

    step: Annotated[int, Setting("Steps done.", at_least=0)]
    selection: Annotated[Weights, Setting("Outcomes on the validation images that later epochs are compared with.")]
    sums: Annotated[list[Weights], Setting("Sums of the epoch under way, one set per level.")]
    failed_in_a_row: Annotated[list[int], Setting("Each level's last updates that could not be made.", at_least=0)] = (
        field(default_factory=list)
    )
    skipped_in_a_row: Annotated[int, Setting("The same of all levels, in earlier checkpoints.", at_least=0)] = 0
    images: Annotated[str, Setting("Digest of the split of the images; empty in earlier checkpoints.")] = ""


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """The contents of a checkpoint file. A file is checked against the types of these fields."""

    model: ModelConfig
    weights: Weights
    """State dict of the validated model: the moving average of the weights if the run keeps one."""
    class_names: tuple[str, ...] = ()
    """Label of each output."""
    train: dict[str, Any] = field(default_factory=dict)
    """The training configuration as a plain dict; empty if the model was not trained here."""
    metrics: dict[str, Any] = field(default_factory=dict)
    """Figures of the epoch the weights are from."""
    progress: dict[str, Any] = field(default_factory=dict)
    """Position in the run, and sums of the unfinished epoch."""
    optimizers: list[dict[str, Any]] = field(default_factory=list)
    """State of each level's optimizer."""
    training_weights: Weights | None = None
    """State dict from which training continues, if `weights` is a moving average."""

    def build(self) -> RoutedNetwork:
        """The model in eval mode. A Sparse-CNN with learned masks is built without its dropped channels."""
        try:
            with torch.device("meta"):  # no memory is taken for a model that the file does not hold
                check_weights(build_model(self.model), self.weights)
            model = build_model(self.model)
            load_weights(model, self.weights)
        except ConfigError as error:
            raise CheckpointError(f"the checkpoint's weights do not fit its own model description: {error}") from error
        if self.model.kind == "sparse_cnn" and not masks_open(model):
            model = compact(model)
        model.class_names = self.class_names
        return model.eval()


def load_weights(model: RoutedNetwork, weights: Mapping[str, torch.Tensor]) -> None:
    """Load weights into a model. They must match its own in name, shape and type; none is filled in or converted.

    Raises:
        ConfigError: They differ; the message names the first difference.
    """
    check_weights(model, weights)
    model.load_state_dict(dict(weights))


def check_weights(model: RoutedNetwork, weights: Mapping[str, torch.Tensor]) -> None:
    """Compare weights with those of a model, whose tensors may be on the device `meta`.

    Raises:
        ConfigError: They differ in name, shape or type, several numbers are stored as one, or they
            are sparse or without values.
    """
    own = model.state_dict()
    for name in (*own, *weights):
        if name not in weights or name not in own:
            raise ConfigError(f"{shown(name)} is {'missing' if name in own else 'not part of this model'}")
        expected, found = own[name], weights[name]
        if found.is_nested or found.layout != torch.strided or found.is_meta:
            raise ConfigError(f"{name} must be a dense tensor with values")
        if expected.shape != found.shape or expected.dtype != found.dtype:
            raise ConfigError(
                f"{name} must be {expected.dtype} {list(expected.shape)}, got {found.dtype} {list(found.shape)}"
            )
        if found.untyped_storage().nbytes() < found.nbytes:
            raise ConfigError(f"{name} must be stored in full, got fewer bytes than its shape has")


DEVICE_SETTINGS = {"lr", "foreach", "fused", "capturable"}
"""Settings of an optimizer that depend on the device, or are set in each step."""


def optimizer_state(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """The state of an optimizer in a form that any device can load: rates are numbers."""
    state = optimizer.state_dict()
    for group in state["param_groups"]:
        group["lr"] = float(group["lr"])
    return state


def load_optimizer(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Load a stored state into an optimizer.

    Raises:
        CheckpointError: The state belongs to another optimizer or other parameters.
    """
    try:
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        own_groups = optimizer.state_dict()["param_groups"]
        settings, own = (
            [{name: type(value) for name, value in group.items() if name not in DEVICE_SETTINGS} for group in groups]
            for groups in (state["param_groups"], own_groups)
        )
        for index, entries in state["state"].items():
            for name, value in entries.items():
                if isinstance(value, torch.Tensor) and value.shape not in {parameters[index].shape, torch.Size()}:
                    raise ValueError(f"{name} of parameter {index} has another shape")
                conform(value, torch.Tensor | None, name)
        if settings != own:
            raise ValueError("its settings are of other types")
        groups = [
            stored | {name: value for name, value in group.items() if name in DEVICE_SETTINGS}
            for stored, group in zip(state["param_groups"], own_groups, strict=True)
        ]
        optimizer.load_state_dict(state | {"param_groups": groups})
    except (ConfigError, ValueError, KeyError, IndexError, TypeError, AttributeError, RuntimeError) as error:
        reason = " ".join(str(error).split())
        raise CheckpointError(f"the optimizer's state does not fit the model: {reason}") from error


def save_checkpoint(path: Path, checkpoint: Checkpoint) -> None:
    """Write a checkpoint so that `path` holds either the old file or the complete new one.

    A path that ends in `.safetensors` gets the model without the state of its training, as
    `write_safetensors` says.
    """
    contents = {
        "format": FORMAT,
        "version": VERSION,
        "model": to_dict(checkpoint.model),
        "weights": checkpoint.weights,
        "class_names": list(checkpoint.class_names),
        "train": checkpoint.train,
        "metrics": checkpoint.metrics,
        "progress": checkpoint.progress,
        "optimizers": checkpoint.optimizers,
        "training_weights": checkpoint.training_weights,
    }
    if path.suffix == SUFFIX:
        write_safetensors(path, contents)
    else:
        write_atomically(path, lambda temporary: _write(contents, temporary))


def _write(contents: dict[str, Any], path: Path) -> None:
    """`torch.save`, which raises the operating system's error instead of torch's RuntimeError."""
    with path.open("wb") as file:
        refusals: list[OSError] = []

        def write(data: bytes) -> int:
            try:
                return file.write(data)
            except OSError as error:
                refusals.append(error)
                raise

        try:
            torch.save(contents, cast(IO[bytes], SimpleNamespace(write=write, flush=file.flush)))
        except RuntimeError as error:
            raise (refusals[0] if refusals else error) from None


def _existing(place: Path | str) -> Path:
    """The file of a checkpoint, from its path, its run folder or its address on the hub."""
    path = checkpoint_of(fetch(place))
    if not path.is_file():
        raise CheckpointError(f"no checkpoint at {path}; expected a file such as runs/NAME/best.pt")
    return path


def file_digest(path: Path) -> str:
    """SHA-256 of a checkpoint file, in hexadecimal.

    Raises:
        CheckpointError: There is no such file.
    """
    path = _existing(path)
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def load_checkpoint(path: Path | str, *, map_location: str | torch.device = "cpu") -> Checkpoint:
    """Read a checkpoint without executing any code it may contain.

    Raises:
        CheckpointError: The file is missing, cannot be read, or is not a checkpoint of this
            project.
    """
    path = _existing(path)
    contents = read_safetensors(path) if path.suffix == SUFFIX else _read_archive(path, map_location)
    if not isinstance(contents, dict) or contents.get("format") != FORMAT:
        raise CheckpointError(f"{path} is not a checkpoint of advmoe; expected a file written by 'advmoe train'")
    version = contents.get("version")
    if version == 1:
        contents = from_version_1(contents)
    elif version != VERSION:
        raise CheckpointError(
            f"{path} has checkpoint version {version}, this program reads versions 1 to {VERSION}; "
            "install the version of advmoe that wrote it"
        )
    hints = get_type_hints(Checkpoint)
    try:
        missing = [name for name in hints if name not in contents]
        check(not missing, f"it lacks {', '.join(missing)}")
        checkpoint = Checkpoint(**{name: conform(contents[name], kind, name) for name, kind in hints.items()})
        names, classes = checkpoint.class_names, checkpoint.model.num_classes
        check(len(names) in {0, classes}, f"it has {len(names)} class names for {classes} classes")
        for name, value in checkpoint.metrics.items():  # NaN is a figure, too
            check(
                isinstance(value, int | float | list), f"metrics[{shown(name)}] must be a number or a list of numbers"
            )
        if checkpoint.train:
            from_dict(TrainConfig, checkpoint.train)
        if checkpoint.progress:
            from_dict(Progress, checkpoint.progress)
    except ConfigError as error:
        raise CheckpointError(f"{path} is not a complete checkpoint: {error}") from error
    return checkpoint


def _check_sums(path: Path) -> None:
    """Refuse an archive that grows when it is read, or whose checksums are wrong. `torch.load` looks at neither.

    Raises:
        CheckpointError: The file was compressed, or bytes have changed since it was written.
    """
    if not zipfile.is_zipfile(path):
        return  # reading the file reports that it is no archive
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
            if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries) or (
                sum(entry.file_size for entry in entries) > path.stat().st_size
            ):
                raise CheckpointError(
                    f"{path} is compressed or has parts that overlap, and torch writes neither; take the original file"
                )
            damaged = archive.testzip()
    except (zipfile.BadZipFile, zlib.error, EOFError, OSError, ValueError, RuntimeError) as error:
        raise CheckpointError(f"{path} is damaged: {error}; take another copy of the file") from error
    if damaged is not None:
        raise CheckpointError(f"{path} is damaged: the checksum of {damaged} is wrong; take another copy of the file")


def _read_archive(path: Path, map_location: str | torch.device) -> Any:
    """The content of a file of `torch.save`, if it is plain data."""
    _check_sums(path)
    try:
        with warnings.catch_warnings(action="ignore"):  # about pickles of other programs, which are refused anyway
            return torch.load(path, map_location=map_location, weights_only=True)
    except Exception as error:  # damaged bytes can make the unpickler fail in any way
        raise CheckpointError(
            f"{path} cannot be read as a checkpoint: it is truncated, corrupt, or holds more than plain data; "
            "expected a file written by 'advmoe train'"
        ) from error


def load(path: Path | str, *, device: str | torch.device = "cpu") -> RoutedNetwork:
    """The model of a checkpoint, in eval mode: a plain module from images [B, 3, H, W] in [0, 1] to logits.

    Args:
        path: A run folder, a file such as `runs/NAME/best.pt`, or `hf://owner/name` on the hub.
        device: Device of the model; `auto` is CUDA if there is one.

    Raises:
        CheckpointError: See `load_checkpoint`.
        ConfigError: There is no such device.
    """
    place = resolve_device(device)
    return load_checkpoint(path).build().to(place)
