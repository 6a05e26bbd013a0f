"""What a model file says about itself: one JSON document in the metadata of the ONNX file."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal, get_args

import msgspec

from advmoe_export.errors import ModelFileError, UnsupportedModelError

KEY = "advmoe_export"
FORMAT_VERSION = 2

Profile = Literal["hybrid", "latency", "throughput", "static"]
InputType = Literal["float32", "uint8"]
Dtype = Literal["fp32", "fp16", "int8"]
PROFILES: tuple[str, ...] = get_args(Profile)
INPUT_TYPES: tuple[str, ...] = get_args(InputType)
DTYPES: tuple[str, ...] = get_args(Dtype)
Positive = Annotated[int, msgspec.Meta(ge=1, lt=2**31)]
Share = Annotated[float, msgspec.Meta(ge=0, le=1)]


@dataclass(frozen=True, kw_only=True)
class ModelMetadata:
    """Everything that a server or a user of the file needs to know.

    The types of the fields describe the metadata. They are checked when a file is read.
    """

    labels: Annotated[tuple[str, ...], msgspec.Meta(min_length=1)]
    """Class names, in the order of the logits."""
    image_size: tuple[Positive, Positive]
    """(height, width) in pixels."""
    resize: Positive
    """Length in pixels of the shorter side before the center crop; see `prepare`."""
    input_type: InputType
    """`float32`: NCHW in [0, 1]; `uint8`: NHWC in 0 ... 255. The graph contains the normalization."""
    profile: Profile
    """One of `advmoe_export.PROFILES`."""
    dtype: Dtype
    """Type of weights and activations: `fp32`, `fp16` or `int8`."""
    opset: Positive
    """Version of the standard operators."""
    batch_size: Positive | None
    """Fixed batch size; None if the batch size is dynamic."""
    outputs: tuple[str, ...]
    """Names of the outputs."""
    num_experts: tuple[Positive, ...]
    """Number of experts for each column of `expert_index`."""
    layers: tuple[str, ...]
    """Name of the MoE layer for each column of `expert_index`."""
    expert_load: tuple[tuple[Share, ...], ...] | None
    """Share of images per column and expert, measured with the file at export; None if no images were given."""
    expert_load_images: Positive | None = None
    """Number of images of `expert_load`; None without it, and in files of earlier versions."""
    tool: Mapping[str, str]
    """Name and versions of the packages that wrote the file."""
    data_sha256: str
    """SHA-256 of the data file beside the graph."""
    data_bytes: Annotated[int, msgspec.Meta(ge=0)]
    """Size of the data file."""
    model: Mapping[str, Any]
    """Facts about the model from the caller: architecture, kind, N, r, normalization, checkpoint."""

    def __post_init__(self) -> None:
        """Check relations between fields."""
        if self.resize < max(self.image_size):
            raise ValueError(f"resize must be at least {max(self.image_size)}, got {self.resize}")
        if len(self.layers) != len(self.num_experts):
            raise ValueError(f"{len(self.layers)} layers but {len(self.num_experts)} numbers of experts")
        if self.expert_load is not None and tuple(map(len, self.expert_load)) != self.num_experts:
            raise ValueError("the expert load must have one share per layer and expert")
        if "logits" not in self.outputs:
            raise ValueError("the outputs must include 'logits'")

    def to_json(self) -> str:
        """The metadata as the JSON text in the file."""
        return json.dumps(
            {"format_version": FORMAT_VERSION, **dataclasses.asdict(self)}, sort_keys=True, allow_nan=False
        )

    @classmethod
    def of(cls, **fields: Any) -> ModelMetadata:
        """Make metadata from fields, and check that a file can hold them.

        Raises:
            UnsupportedModelError: a field has the wrong type or value, or is no JSON data.
        """
        try:
            metadata = msgspec.convert(fields, cls)
            metadata.to_json()
        except (TypeError, ValueError, RecursionError) as error:
            raise UnsupportedModelError(f"the file cannot hold its metadata: {error}") from error
        return metadata

    @classmethod
    def from_properties(cls, properties: Mapping[str, str], path: object) -> ModelMetadata:
        """Read the metadata of an ONNX file.

        Args:
            properties: metadata of the file.
            path: name of the file, for messages.

        Raises:
            ModelFileError: the file was not written by this package, or by another version of it.
        """
        if KEY not in properties:
            raise ModelFileError(
                f"'{path}' was not written by advmoe-export: it lacks the metadata '{KEY}'; export it again"
            )
        try:
            document = json.loads(properties[KEY])
        except (ValueError, RecursionError) as error:
            raise ModelFileError(f"the metadata of '{path}' is damaged: it is not JSON; export it again") from error
        version = document.get("format_version") if isinstance(document, dict) else None
        if type(version) is not int:
            raise ModelFileError(f"the metadata of '{path}' is damaged: it has no version; export it again")
        if version != FORMAT_VERSION:
            remedy = "export it again" if version in range(1, FORMAT_VERSION) else "update the package"
            raise ModelFileError(
                f"'{path}' has metadata of version {version}, this advmoe-export reads version {FORMAT_VERSION}; "
                f"{remedy}"
            )
        try:
            return msgspec.convert(document, cls)
        except msgspec.ValidationError as error:
            raise ModelFileError(f"the metadata of '{path}' is damaged: {error}; export it again") from error
