"""What a model file says about itself: one JSON document in the metadata of the ONNX file."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from advmoe_export.errors import ModelFileError

KEY = "advmoe_export"
FORMAT_VERSION = 2


@dataclass(frozen=True, kw_only=True)
class ModelMetadata:
    """Everything a server or a user of the file needs to know."""

    labels: tuple[str, ...]
    """Class names, in the order of the logits."""
    image_size: tuple[int, int]
    """(height, width) in pixels."""
    resize: int
    """Length of an image's shorter side before the middle `image_size` of it is taken: see `prepare`."""
    input_type: str
    """`float32`: NCHW in [0, 1]; `uint8`: NHWC in 0 ... 255. Preprocessing beyond that is inside
    the graph.
    """
    profile: str
    """One of `advmoe_export.PROFILES`."""
    dtype: str
    """Of weights and activations: `fp32`, `fp16` or `int8`."""
    opset: int
    """Version of the standard operators."""
    batch_size: int | None
    """Fixed batch size; None if any."""
    outputs: tuple[str, ...]
    """Names of the outputs."""
    num_experts: tuple[int, ...]
    """N of each column of `expert_index`."""
    layers: tuple[str, ...]
    """Name of the MoE layer behind each column of `expert_index`."""
    expert_load: tuple[tuple[float, ...], ...] | None
    """Share of images per column and expert, measured at export; None if no images were given."""
    tool: Mapping[str, str]
    """Name and versions of what wrote the file."""
    data_sha256: str
    """SHA-256 of the data file beside the graph."""
    data_bytes: int
    """Size of the data file."""
    model: Mapping[str, Any]
    """What the caller says about the model: architecture, kind, N, r, granularity, normalization,
    hash of the checkpoint.
    """

    def to_json(self) -> str:
        """As stored in the file."""
        return json.dumps(
            {"format_version": FORMAT_VERSION, **dataclasses.asdict(self)}, sort_keys=True, allow_nan=False
        )

    @classmethod
    def from_properties(cls, properties: Mapping[str, str], path: object) -> ModelMetadata:
        """Read the metadata of an ONNX file.

        Args:
            properties: metadata of the file.
            path: its name, for messages.

        Raises:
            ModelFileError: the file was not written by this package, or by another version of it.
        """
        if KEY not in properties:
            raise ModelFileError(
                f"'{path}' was not written by advmoe-export: it lacks the metadata '{KEY}'; export it again"
            )
        try:
            document = json.loads(properties[KEY])
            version = document.pop("format_version")
        except (ValueError, KeyError, AttributeError) as error:
            raise ModelFileError(f"the metadata of '{path}' is damaged; export it again") from error
        if version != FORMAT_VERSION:
            remedy = "export it again" if version in range(1, FORMAT_VERSION) else "update the package"
            raise ModelFileError(
                f"'{path}' has metadata of version {version}, this advmoe-export reads version {FORMAT_VERSION}; "
                f"{remedy}"
            )
        try:
            load = document.pop("expert_load")
            fields: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in document.items()}
            return cls(**fields, expert_load=None if load is None else tuple(tuple(row) for row in load))
        except (TypeError, KeyError) as error:
            raise ModelFileError(f"the metadata of '{path}' is incomplete; export it again") from error
