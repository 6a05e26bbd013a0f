"""Devices by name, their arithmetic, and reads of tensors from them."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from advmoe.errors import ConfigError
from advmoe.world import ranks_here


def resolve_device(name: str | torch.device) -> torch.device:
    """The device to compute on; `auto` is CUDA if there is one. A GPU becomes the one this process uses.

    Under torchrun, `cuda` without a number is the GPU of the process's local rank.

    Raises:
        ConfigError: The name is unknown, the device is not there, or several processes of this
            machine would share one GPU.
    """
    if str(name) == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ConfigError(f"unknown device '{name}', expected auto, cpu, cuda or cuda:N", "device") from None
    if device.type not in {"cpu", "cuda"}:
        raise ConfigError(f"unknown device '{name}', expected auto, cpu, cuda or cuda:N", "device")
    if device.type == "cuda" and device.index is not None and ranks_here() > 1:
        raise ConfigError(
            f"device '{name}' would be that of all {ranks_here()} processes of this machine; use cuda, which "
            "gives each its own",
            "device",
        )
    if str(device) == "cuda":
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ConfigError(
            f"device '{name}' is not there: this machine has {torch.cuda.device_count()} CUDA devices; use cpu",
            "device",
        )
    if device.type == "cuda":
        torch.cuda.set_device(device)
    return device


def convolves_in_tf32() -> bool:
    """Whether a GPU convolves fp32 numbers in TF32 now, which is torch's default."""
    backends: Any = torch.backends
    if hasattr(backends.cudnn, "conv"):
        return bool(backends.cudnn.conv.fp32_precision == "tf32")
    return bool(backends.cudnn.allow_tf32)


def read(values: Sequence[Tensor]) -> list[Tensor]:
    """Copies of the tensors on the CPU, after a single wait for all of them."""
    if not any(value.is_cuda for value in values):
        return [value.cpu() for value in values]
    copies = [torch.empty(value.shape, dtype=value.dtype, pin_memory=True) for value in values]
    for copy, value in zip(copies, values, strict=True):
        copy.copy_(value, non_blocking=True)
    torch.cuda.current_stream(next(value.device for value in values if value.is_cuda)).synchronize()
    return copies
