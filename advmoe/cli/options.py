"""Options that several commands share: the same name, the same meaning, the same help."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from advmoe.errors import ConfigError

if TYPE_CHECKING:
    import torch

DataDir = Annotated[
    Path | None,
    typer.Option(
        "--data-dir",
        help=(
            "Folder with the data set, in any layout it is published in; what is missing is downloaded to it. "
            "Default: $ADVMOE_DATA_DIR, else a folder in the user's cache."
        ),
    ),
]
Seed = Annotated[int, typer.Option("--seed", min=0, help="Seed of everything random.")]
Device = Annotated[str, typer.Option("--device", help="auto, cpu, cuda or cuda:N.")]
Json = Annotated[bool, typer.Option("--json", help="Print the result as one JSON object on stdout.")]
LimitEval = Annotated[
    int | None, typer.Option("--limit-eval", help="Evaluate this many images only (a seeded choice). Default: all.")
]


def resolve_device(name: str) -> torch.device:
    """The device to compute on; `auto` is CUDA if there is one.

    Raises:
        ConfigError: the name is unknown, or the device is not there.
    """
    import torch

    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ConfigError(f"unknown device '{name}', expected auto, cpu, cuda or cuda:N") from None
    if device.type not in {"cpu", "cuda"}:
        raise ConfigError(f"unknown device '{name}', expected auto, cpu, cuda or cuda:N")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ConfigError(
            f"device '{name}' is not there: this machine has {torch.cuda.device_count()} CUDA devices; use --device cpu"
        )
    return device
