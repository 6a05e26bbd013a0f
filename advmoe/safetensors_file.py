"""Models as safetensors files: weights and configuration without pickle, so reading one cannot run code.

The tensors are the state dict. The metadata has one entry, `advmoe`: a JSON object with the model
configuration, the class names, facts about the training, and a checksum of the tensors.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from advmoe.errors import CheckpointError
from advmoe.files import write_atomically

SUFFIX = ".safetensors"
KEY = "advmoe"
PARTS = ("format", "version", "model", "class_names", "train", "metrics")
"""Entries of a checkpoint that go into the metadata; optimizers and the position in a run do not."""


def write_safetensors(path: Path, contents: Mapping[str, Any]) -> None:
    """Write a checkpoint without the entries that only a continued training needs.

    Args:
        path: The file to write; it holds either its old content or the complete new one.
        contents: Entries of a checkpoint file by name; `weights` is the state dict.
    """
    from safetensors.torch import save

    weights = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in contents["weights"].items()}
    described = {name: contents[name] for name in PARTS}
    described["metrics"] = {name: value for name, value in described["metrics"].items() if _is_json(value)}
    described["weights_sha256"] = digest(weights)
    # One entry only: safetensors writes several in random order, and the same model should give the
    # same bytes.
    metadata = {KEY: json.dumps(described, sort_keys=True, allow_nan=False)}
    # Python writes the bytes: safetensors gives a full disk an error of its own, which is no OSError.
    content = save(weights, metadata)
    write_atomically(path, lambda temporary: temporary.write_bytes(content))


def read_safetensors(path: Path) -> dict[str, Any]:
    """The contents of a checkpoint file, as `torch.load` would give them.

    Raises:
        CheckpointError: The file is no safetensors file, damaged, or not written by this project.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            text = (file.metadata() or {}).get(KEY)
            weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            f"{path} cannot be read as a safetensors file ({' '.join(str(error).split())}); "
            "expected a file written by 'advmoe export'"
        ) from error
    if text is None:
        raise CheckpointError(
            f"{path} has no entry '{KEY}' in its metadata, so its architecture is unknown; "
            "expected a file written by 'advmoe export'"
        )
    try:
        described = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"the metadata of {path} is damaged: it is not JSON; export it again") from error
    if not isinstance(described, dict):
        raise CheckpointError(f"the metadata of {path} is damaged: it is no JSON object; export it again")
    if described.pop("weights_sha256", None) != digest(weights):
        raise CheckpointError(f"the weights in {path} are damaged: their checksum differs; export it again")
    return {**described, "weights": weights, "progress": {}, "optimizers": [], "training_weights": None}


def digest(weights: Mapping[str, torch.Tensor]) -> str:
    """SHA-256 over names, types, shapes and bytes of tensors, in the order of their names."""
    total = hashlib.sha256()
    for name, tensor in sorted(weights.items()):
        total.update(json.dumps([name, str(tensor.dtype), list(tensor.shape)]).encode())
        total.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return total.hexdigest()


def _is_json(value: object) -> bool:
    """Whether a number, or every number of a list, is finite. JSON has no others."""
    if isinstance(value, list | tuple):
        return all(map(_is_json, value))
    return not isinstance(value, float) or math.isfinite(value)
