"""Run an exported model with onnxruntime; needs neither torch nor the code of the model."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from advmoe_export.errors import InputError, ModelFileError, ProviderError
from advmoe_export.metadata import ModelMetadata

OPTIMIZATION_LEVELS = ("disable", "basic", "extended", "all")
PROVIDER_NAMES = {
    "cpu": "CPUExecutionProvider",
    "cuda": "CUDAExecutionProvider",
    "tensorrt": "TensorrtExecutionProvider",
}

FloatArray = npt.NDArray[np.float32]


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """What a model says about B images."""

    logits: FloatArray
    """[B, classes]"""
    probabilities: FloatArray
    """[B, classes], softmax of the logits."""
    labels: tuple[str, ...]
    """Name of the most probable class of each image."""
    pathway: npt.NDArray[np.int64] | None
    """[B, L] expert of each image in each MoE layer; None where the file does not give it."""
    margin: FloatArray | None
    """[B, L] by how much each router preferred it; None where the file does not give it."""


class Session:
    """An exported model, ready to run.

    Args:
        path: the `.onnx` file; its data file must lie beside it.
        providers: what to run on, in order of preference: `cpu`, `cuda`, `tensorrt`, or an
            onnxruntime provider's full name.
        threads: threads of one operator; None leaves it to onnxruntime.
        optimization: how far onnxruntime may rewrite the graph, one of `OPTIMIZATION_LEVELS`.
        check_data: compare the data file with the checksum in the metadata.

    Raises:
        ModelFileError: a file is missing, damaged or not ours.
        ProviderError: a provider is not installed, or does not start.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        providers: Sequence[str] = ("cpu",),
        threads: int | None = None,
        optimization: str = "all",
        check_data: bool = True,
    ) -> None:
        import onnxruntime as ort

        self.path = Path(path)
        self.metadata = read_metadata(self.path)
        if check_data:
            check_data_file(self.path, self.metadata)
        names = _provider_names(providers, ort.get_available_providers())
        options = ort.SessionOptions()
        options.log_severity_level = 3
        options.graph_optimization_level = _level(ort, optimization)
        if threads is not None:
            options.intra_op_num_threads = threads
        try:
            self._session = ort.InferenceSession(
                self.path, options, providers=[(name, _options(name)) for name in names]
            )
        except Exception as error:
            reason = " ".join(str(error).split())[:300]
            raise ModelFileError(f"onnxruntime {ort.__version__} could not load '{self.path}': {reason}") from error
        started = self._session.get_providers()
        if names[0] not in started:
            raise ProviderError(
                f"'{names[0]}' was asked for but did not start, onnxruntime fell back to {', '.join(started)}; "
                "check driver, CUDA and cuDNN, or ask for 'cpu'"
            )
        self.outputs = tuple(output.name for output in self._session.get_outputs())

    def run(self, images: npt.NDArray[Any]) -> Prediction:
        """Classify images.

        Args:
            images: uint8 [B, H, W, 3], or float32 [B, 3, H, W] in [0, 1] if the file reads those.

        Raises:
            InputError: wrong shape, type, size or range.
        """
        outputs = self.run_raw(images)
        logits: FloatArray = outputs["logits"].astype(np.float32)
        shifted = np.exp(logits - logits.max(axis=1, keepdims=True))
        return Prediction(
            logits=logits,
            probabilities=shifted / shifted.sum(axis=1, keepdims=True),
            labels=tuple(self.metadata.labels[index] for index in logits.argmax(axis=1)),
            pathway=outputs.get("expert_index"),
            margin=outputs.get("router_margin"),
        )

    def run_raw(self, images: npt.NDArray[Any]) -> dict[str, npt.NDArray[Any]]:
        """All outputs of the file by name; images as in `run`."""
        results = self._session.run(None, {"images": self._prepare(images)})
        return dict(zip(self.outputs, results, strict=True))

    def _prepare(self, images: npt.NDArray[Any]) -> npt.NDArray[Any]:
        meta, (height, width) = self.metadata, self.metadata.image_size
        nchw, nhwc = (3, height, width), (height, width, 3)
        given = f"got {images.dtype} {list(images.shape)}"
        if images.ndim != 4 or len(images) == 0:
            raise InputError(
                f"expected at least one image, float32 [B, 3, {height}, {width}] or uint8 [B, {height}, {width}, 3], "
                f"{given}"
            )
        if meta.batch_size is not None and len(images) != meta.batch_size:
            raise InputError(
                f"this file takes batches of {meta.batch_size}, {given}; export another profile for other batches"
            )
        expected = {"f": nchw, "u": nhwc}.get(images.dtype.kind)
        if expected is None or images.shape[1:] != expected or (images.dtype.kind == "u" and images.dtype != np.uint8):
            raise InputError(
                f"expected float32 [B, 3, {height}, {width}] in [0, 1] or uint8 [B, {height}, {width}, 3], {given}"
            )
        if images.dtype.kind == "f":
            low, high = float(images.min()), float(images.max())
            if not (low >= 0.0 and high <= 1.0):
                raise InputError(
                    f"expected float images in [0, 1], got values from {low:g} to {high:g}; divide 8-bit images by 255"
                )
        if meta.input_type == "uint8":
            if images.dtype != np.uint8:
                raise InputError(
                    f"this file reads uint8 images [B, {height}, {width}, 3], {given}; pass the decoded pixels"
                )
            return images
        if images.dtype == np.uint8:
            images = images.transpose(0, 3, 1, 2) / np.float32(255)
        return np.ascontiguousarray(images, dtype=np.float32)


def data_file(path: Path) -> Path:
    """Where the weights of a model file lie."""
    return path.with_name(path.name + ".data")


def read_metadata(path: Path) -> ModelMetadata:
    """The metadata of a model file.

    Raises:
        ModelFileError: no such file, not ONNX, or not ours.
    """
    import onnx

    if not path.is_file():
        raise ModelFileError(f"no model file '{path}'; expected an ONNX file written by advmoe-export")
    try:
        model = onnx.load(path, load_external_data=False)
    except Exception as error:
        raise ModelFileError(f"'{path}' is not an ONNX file, or it is damaged; export it again") from error
    return ModelMetadata.from_properties({entry.key: entry.value for entry in model.metadata_props}, path)


def check_data_file(path: Path, metadata: ModelMetadata) -> None:
    """Check that the data file of a graph lies beside it and belongs to it.

    Raises:
        ModelFileError: it does not.
    """
    data = data_file(path)
    if metadata.data_bytes == 0:
        return
    if not data.is_file():
        raise ModelFileError(
            f"'{path}' keeps its weights in '{data.name}', which is not beside it; copy both files together"
        )
    size = data.stat().st_size
    if size != metadata.data_bytes:
        raise ModelFileError(
            f"'{data}' has {size} bytes, '{path.name}' expects {metadata.data_bytes}; "
            "copy both files of one export together"
        )
    with data.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest != metadata.data_sha256:
        raise ModelFileError(
            f"'{data}' is damaged or belongs to another export than '{path.name}'; copy both files together"
        )


def _level(ort: Any, name: str) -> Any:
    if name not in OPTIMIZATION_LEVELS:
        raise InputError(f"unknown optimization level '{name}', expected one of: {', '.join(OPTIMIZATION_LEVELS)}")
    levels = ort.GraphOptimizationLevel
    return {
        "disable": levels.ORT_DISABLE_ALL,
        "basic": levels.ORT_ENABLE_BASIC,
        "extended": levels.ORT_ENABLE_EXTENDED,
        "all": levels.ORT_ENABLE_ALL,
    }[name]


def _provider_names(wanted: Sequence[str], installed: Sequence[str]) -> list[str]:
    names = [PROVIDER_NAMES.get(name.lower(), name) for name in wanted]
    if not names:
        raise ProviderError(f"expected at least one provider, got none; installed: {', '.join(installed)}")
    for name in names:
        if name not in installed:
            raise ProviderError(
                f"provider '{name}' is not part of this onnxruntime, which has: {', '.join(installed)}; "
                "install onnxruntime-gpu for CUDA, or ask for 'cpu'"
            )
    return names


def _options(provider: str) -> dict[str, str]:
    """Options of a provider. Every new sub-batch size would start an exhaustive search among
    cuDNN's algorithms anew.
    """
    return {"cudnn_conv_algo_search": "HEURISTIC"} if provider == "CUDAExecutionProvider" else {}
