"""The device to compute on, by name."""

from __future__ import annotations

import os

import torch

from advmoe.errors import ConfigError


def resolve_device(name: str | torch.device) -> torch.device:
    """The device to compute on; `auto` is CUDA if there is one. A GPU becomes the one this process uses.

    Under torchrun, `cuda` without a number is the GPU of the process's local rank.

    Raises:
        ConfigError: the name is unknown, or the device is not there.
    """
    if str(name) == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ConfigError(f"unknown device '{name}', expected auto, cpu, cuda or cuda:N", "device") from None
    if device.type not in {"cpu", "cuda"}:
        raise ConfigError(f"unknown device '{name}', expected auto, cpu, cuda or cuda:N", "device")
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
