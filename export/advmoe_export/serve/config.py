"""Settings of the server. The command line has one option for each field."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from advmoe_export.errors import InputError

MEBIBYTE = 2**20
MAX_BATCH = 4096
"""A batch is computed when the server starts. A larger one takes many gigabytes."""


def _option(default: Any, help_text: str) -> Any:
    return dataclasses.field(default=default, metadata={"help": help_text})


@dataclass(frozen=True, kw_only=True)
class ServeConfig:
    """Settings of a server.

    Raises:
        InputError: a number is out of range.
    """

    model: Path
    name: str = _option("", "Name of the model in URLs. Default: the name of the file.")
    host: str = _option("127.0.0.1", "Address to listen on; 0.0.0.0 for all.")
    port: int = _option(8000, "Port to listen on; 0 takes a free one.")
    provider: tuple[str, ...] = _option(
        ("cpu",), "onnxruntime provider: cpu, cuda or tensorrt. May be given several times, in order of preference."
    )
    threads: int = _option(0, "Threads of one operator; 0 leaves it to onnxruntime.")
    workers: int = _option(1, "Batches that run at the same time.")
    max_batch: int = _option(64, "Most images in one request and in one batch.")
    max_delay_ms: float = _option(
        0.0, "How long an image may wait for others to join its batch; 0 joins only those that wait anyway."
    )
    max_queue: int = _option(128, "Requests at a time, waiting or running; more are refused with 429.")
    max_connections: int = _option(512, "Open connections at a time; more are refused with 503.")
    timeout: float = _option(
        10.0,
        "Seconds until a request is given up: 408 while reading it, 504 afterwards. Headers may take as long.",
    )
    grace: float = _option(20.0, "Seconds that running requests get to finish after SIGTERM.")
    keep_alive: float = _option(
        75.0, "Seconds until an idle connection is closed; choose more than the proxy before the server waits."
    )
    max_upload_mb: float = _option(16.0, "Largest body of a request, in MiB; larger ones are refused with 413.")
    max_megapixels: float = _option(40.0, "Most megapixels of an uploaded image; its size is read before its pixels.")
    drift_window: int = _option(10_000, "Images over which the load of the experts is compared with that at export.")

    def __post_init__(self) -> None:
        """Check the numbers."""
        for name, lowest in (
            *dict.fromkeys(("workers", "max_batch", "max_queue", "max_connections", "drift_window"), 1).items(),
            *dict.fromkeys(("threads", "port", "max_delay_ms", "grace"), 0).items(),
        ):
            if not lowest <= getattr(self, name) < math.inf:
                raise InputError(f"{name} must be at least {lowest}, got {getattr(self, name)}")
        for name in ("timeout", "keep_alive", "max_upload_mb", "max_megapixels"):
            if not 0 < getattr(self, name) < math.inf:
                raise InputError(f"{name} must be positive and finite, got {getattr(self, name)}")
        for name, highest in (("port", 65535), ("max_batch", MAX_BATCH)):
            if getattr(self, name) > highest:
                raise InputError(f"{name} must be at most {highest}, got {getattr(self, name)}")
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
