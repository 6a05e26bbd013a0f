"""Settings of the server. The command line has one option for each field."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import KW_ONLY, dataclass
from pathlib import Path
from typing import Any

from advmoe_export.errors import InputError

MEBIBYTE = 2**20
MAX_BATCH = 4096
"""A batch is computed when the server starts. A larger one takes many gigabytes."""


@dataclass(frozen=True)
class Option:
    """Facts about a setting besides its name, type and default."""

    help: str
    """One or two sentences."""
    unit: str = ""
    """Unit of a number, if it has one."""
    _: KW_ONLY
    at_least: float = -math.inf
    above: float = -math.inf
    at_most: float = math.inf

    @property
    def bounds(self) -> str:
        """The bounds in words; nothing if there are none."""
        if self.above > -math.inf:
            return f"above {self.above:g}"
        if self.at_least == -math.inf:
            return ""
        return f"at least {self.at_least:g}" if self.at_most == math.inf else f"{self.at_least:g} to {self.at_most:g}"

    def allows(self, value: float) -> bool:
        """Whether a number is finite and within the bounds."""
        return math.isfinite(value) and self.at_least <= value <= self.at_most and value > self.above


def _option(default: Any, help_text: str, unit: str = "", **bounds: float) -> Any:
    return dataclasses.field(default=default, metadata={"option": Option(help_text, unit, **bounds)})


def option_of(field: dataclasses.Field[Any]) -> Option:
    """The facts about a setting."""
    option: Option = field.metadata["option"]
    return option


@dataclass(frozen=True, kw_only=True)
class ServeConfig:
    """Settings of a server.

    Raises:
        InputError: a number is out of range.
    """

    model: Path
    name: str = _option("", "Name of the model in URLs. Default: the name of the file without .onnx.")
    host: str = _option(
        "127.0.0.1", "Address to listen on. 0.0.0.0 is all addresses of this machine; there is no password and no TLS."
    )
    port: int = _option(8000, "Port to listen on; 0 takes a free one.", at_least=0, at_most=65535)
    provider: tuple[str, ...] = _option(
        ("cpu",), "onnxruntime provider: cpu, cuda or tensorrt. May be given several times, in order of preference."
    )
    threads: int = _option(0, "Threads of one operator; 0 lets onnxruntime choose.", at_least=0)
    workers: int = _option(1, "Batches that are computed at the same time.", at_least=1)
    max_batch: int = _option(64, "Most images in one request and in one batch.", at_least=1, at_most=MAX_BATCH)
    max_delay_ms: float = _option(
        0.0,
        "Milliseconds for which an image waits for others to join its batch; with 0, only images join that wait "
        "for a worker anyway.",
        "ms",
        at_least=0,
    )
    max_queue: int = _option(
        128, "Most requests that are read, wait or are computed; more are refused with 429.", at_least=1
    )
    max_connections: int = _option(512, "Most open connections; more are refused with 503.", at_least=1)
    timeout: float = _option(
        10.0,
        "Seconds until a request is given up: 408 while its body is read, 504 afterwards. Its headers may take as long "
        "before.",
        "seconds",
        above=0,
    )
    grace: float = _option(
        20.0, "Seconds that running requests get to finish after SIGTERM or Ctrl-C.", "seconds", at_least=0
    )
    keep_alive: float = _option(
        75.0,
        "Seconds until an idle connection is closed. Choose more than a reverse proxy in front keeps its connections.",
        "seconds",
        above=0,
    )
    max_upload_mb: float = _option(
        16.0, "Largest body of a request, in MiB (2^20 bytes); larger ones are refused with 413.", "MiB", above=0
    )
    max_megapixels: float = _option(
        40.0,
        "Largest image file for /classify, in millions of pixels; larger ones are refused with 413 before they are "
        "decoded.",
        "megapixels",
        above=0,
    )
    drift_window: int = _option(
        10_000,
        "Most recent images, whose load of the experts is compared with that at export (/load, /metrics).",
        at_least=1,
    )

    def __post_init__(self) -> None:
        """Check the numbers."""
        for field in dataclasses.fields(self)[1:]:
            value, option = getattr(self, field.name), option_of(field)
            if option.bounds and not option.allows(value):
                raise InputError(f"{field.name} must be {option.bounds}, got {value}")
        if not self.provider:
            raise InputError("provider must name at least one onnxruntime provider")
        if "/" in self.model_name:
            raise InputError(f"name must not contain '/', got '{self.model_name}'")

    @property
    def model_name(self) -> str:
        """Name of the model in URLs."""
        return self.name or self.model.stem

    @property
    def max_body(self) -> int:
        """Highest number of bytes in the body of a request."""
        return int(self.max_upload_mb * MEBIBYTE)

    @property
    def max_pixels(self) -> int:
        """Highest number of pixels of an uploaded image."""
        return int(self.max_megapixels * 1e6)
