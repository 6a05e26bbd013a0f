"""Checkpoints: one file with everything needed to rebuild a model, and, for `last.pt`, to go on training it."""

from __future__ import annotations

import hashlib
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace, UnionType
from typing import IO, Any, cast

import torch

from advmoe.config import ModelConfig, from_dict, to_dict
from advmoe.errors import CheckpointError, ConfigError
from advmoe.files import write_atomically
from advmoe.models.masked import compact, masks_open
from advmoe.models.network import RoutedNetwork
from advmoe.models.registry import build_model
from advmoe.safetensors_file import SUFFIX, read_safetensors, write_safetensors

FORMAT = "advmoe-checkpoint"
VERSION = 1
CONTENTS: dict[str, type | UnionType] = {
    "model": dict,
    "weights": dict,
    "class_names": list,
    "train": dict,
    "metrics": dict,
    "progress": dict,
    "optimizers": list,
    "training_weights": dict | None,
}
"""What a checkpoint file holds."""


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """The contents of a checkpoint file."""

    model: ModelConfig
    weights: dict[str, torch.Tensor]
    """State dict of the model as it was validated: the moving average of the weights where the run keeps one."""
    class_names: tuple[str, ...] = ()
    """Label of each output."""
    train: dict[str, Any] = field(default_factory=dict)
    """The training configuration as a plain dict; empty if the model was not trained here."""
    metrics: dict[str, Any] = field(default_factory=dict)
    """Figures of the epoch the weights are from."""
    progress: dict[str, Any] = field(default_factory=dict)
    """Position in the run, and sums of the epoch under way."""
    optimizers: list[dict[str, Any]] = field(default_factory=list)
    """State of each level's optimiser."""
    training_weights: dict[str, torch.Tensor] | None = None
    """State dict that training goes on from, where `weights` is a moving average."""

    def build(self) -> RoutedNetwork:
        """The model, in eval mode; a Sparse-CNN whose masks are learned without the channels it dropped."""
        try:
            model = build_model(self.model)
            model.load_state_dict(self.weights)
        except (ConfigError, RuntimeError, TypeError, ValueError, AttributeError) as error:
            reason = str(error).splitlines()[0]
            raise CheckpointError(f"the checkpoint's weights do not fit its own model description: {reason}") from error
        if self.model.kind == "sparse_cnn" and not masks_open(model):
            model = compact(model)
        return model.eval()


def save_checkpoint(path: Path, checkpoint: Checkpoint) -> None:
    """Write a checkpoint so that `path` holds either the old file or the complete new one.

    A path that ends in `.safetensors` gets the model without the state of its training, as `write_safetensors` says.
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
    """`torch.save`, with the operating system's error where it raises a RuntimeError of its own."""
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


def file_digest(path: Path) -> str:
    """SHA-256 of a checkpoint file, in hexadecimal.

    Raises:
        CheckpointError: there is no such file.
    """
    if not path.is_file():
        raise CheckpointError(f"no checkpoint at {path}; expected a file such as runs/NAME/best.pt")
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def load_checkpoint(path: Path | str, *, map_location: str | torch.device = "cpu") -> Checkpoint:
    """Read a checkpoint without executing any code it may contain.

    Raises:
        CheckpointError: the file is missing, cannot be read, or is not a checkpoint of this project.
    """
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"no checkpoint at {path}; expected a file such as runs/NAME/best.pt")
    contents = read_safetensors(path) if path.suffix == SUFFIX else _read_archive(path, map_location)
    if not isinstance(contents, dict) or contents.get("format") != FORMAT:
        raise CheckpointError(f"{path} is not a checkpoint of advmoe; expected a file written by 'advmoe train'")
    if contents.get("version") != VERSION:
        raise CheckpointError(
            f"{path} has checkpoint version {contents.get('version')}, this program reads version {VERSION}; "
            "install the version of advmoe that wrote it"
        )
    wrong = [name for name, kind in CONTENTS.items() if not isinstance(contents.get(name), kind)]
    if wrong:
        raise CheckpointError(f"{path} is not a complete checkpoint: {', '.join(wrong)} missing or of the wrong kind")
    try:
        return Checkpoint(
            model=from_dict(ModelConfig, contents["model"]),
            weights=contents["weights"],
            class_names=tuple(contents["class_names"]),
            train=contents["train"],
            metrics=contents["metrics"],
            progress=contents["progress"],
            optimizers=contents["optimizers"],
            training_weights=contents["training_weights"],
        )
    except ConfigError as error:
        raise CheckpointError(f"{path} is not a complete checkpoint: {error}") from error


def _read_archive(path: Path, map_location: str | torch.device) -> Any:
    """What `torch.save` wrote, if it is plain data."""
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

    Raises:
        CheckpointError: see `load_checkpoint`.
    """
    return load_checkpoint(path).build().to(device)
