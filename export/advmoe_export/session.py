"""Run an exported model with onnxruntime, without torch, onnx or the code of the model."""

from __future__ import annotations

import contextlib
import functools
import importlib
import io
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from advmoe_export.errors import InputError, MissingPackageError, ModelFileError, ProviderError, closest
from advmoe_export.model_file import check_data_file, read_metadata
from advmoe_export.preparation import prepare

if TYPE_CHECKING:
    from typing import TypeAlias

    from PIL import Image

    from advmoe_export.metadata import ModelMetadata

    Picture: TypeAlias = npt.NDArray[Any] | Image.Image | str | os.PathLike[str]
    """One image: an array in the input format of the file, a Pillow image, or a path."""

OPTIMIZATION_LEVELS = ("disable", "basic", "extended", "all")
PROVIDER_NAMES = {
    "cpu": "CPUExecutionProvider",
    "cuda": "CUDAExecutionProvider",
    "tensorrt": "TensorrtExecutionProvider",
}
PROVIDER_OPTIONS = {
    # Every new sub-batch size would start an exhaustive search among cuDNN's algorithms. TF32
    # rounds to ten bits, and a rounded router decides differently.
    "CUDAExecutionProvider": {"cudnn_conv_algo_search": "HEURISTIC", "use_tf32": "0"},
}
_ERROR, _FATAL, _WARNING = 3, 4, 2
"""Severities of onnxruntime's log; its default is to log warnings."""

FloatArray = npt.NDArray[np.float32]


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """The prediction of a model for B images."""

    logits: FloatArray
    """[B, classes]"""
    probabilities: FloatArray
    """[B, classes], softmax of the logits."""
    labels: tuple[str, ...]
    """Name of the most probable class of each image."""
    pathway: npt.NDArray[np.int64] | None
    """[B, L] expert of each image in each MoE layer; None if the file does not return it."""
    margin: FloatArray | None
    """[B, L] margin of each router: chosen logit minus the next; None if the file does not return it."""

    def best(self, image: int, count: int) -> npt.NDArray[np.int64]:
        """The most probable classes of one image in descending order.

        The logits decide, because rounding makes different probabilities equal.
        """
        return np.argsort(-self.logits[image], kind="stable")[:count]


class Session:
    """An exported model, ready to run.

    Several threads may use one session. A pickle of it holds the absolute path and the arguments
    only, so another process reads the file again.

    Args:
        path: the `.onnx` file. Its data file must be in the same folder.
        providers: one provider, or several in order of preference: `cpu`, `cuda`, `tensorrt`, or
            the full name of a provider of onnxruntime. The first one that starts is used.
        threads: number of threads of one operator; None leaves the choice to onnxruntime.
        optimization: level of graph optimization in onnxruntime, one of `OPTIMIZATION_LEVELS`.
        check_data: whether to compare the data file with the checksum in the metadata.

    Raises:
        ModelFileError: a file is missing, is damaged, or was not written by this package.
        ProviderError: no provider is installed and starts.
        MissingPackageError: onnxruntime is not installed.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        providers: str | Sequence[str] = ("cpu",),
        threads: int | None = None,
        optimization: str = "all",
        check_data: bool = True,
    ) -> None:
        if threads is not None and (not isinstance(threads, int | np.integer) or threads < 1):
            raise InputError(f"expected threads to be None or an integer of at least 1, got {threads!r}")
        self._ort = _onnxruntime()
        asked = (providers,) if isinstance(providers, str) else tuple(providers)
        self._again = functools.partial(
            type(self), providers=asked, threads=threads, optimization=optimization, check_data=check_data
        )
        """Opens a file as this session was opened."""
        self.path = Path(path)
        self.metadata = read_metadata(self.path)
        if check_data:
            check_data_file(self.path, self.metadata)
        options = self._ort.SessionOptions()
        options.log_severity_level = _ERROR
        options.graph_optimization_level = _level(self._ort, optimization)
        if threads is not None:
            options.intra_op_num_threads = int(threads)
        self._session = self._start(asked, options)
        _check_graph(self._session, self.metadata, self.path)
        self.provider: str = self._session.get_providers()[0]
        """Full name of the provider that runs the model."""
        self.outputs = tuple(output.name for output in self._session.get_outputs())

    def __reduce__(self) -> tuple[Any, ...]:
        return self._again, (self.path.absolute(),)

    def run(self, images: Picture | Sequence[Picture]) -> Prediction:
        """Classify images.

        Args:
            images: a batch, one image, or a sequence of images. A batch is an array uint8
                [B, H, W, 3], or float32 [B, 3, H, W] in [0, 1] if the file has this input type. One
                image is such an array without B, a Pillow image, or the path of an image file.
                What NumPy can view as an array, such as a tensor on the CPU, counts as an array.
                Pillow images and files may have any size, because `prepare` resizes them.

        Raises:
            InputError: wrong shape, type, size or range, or an image that cannot be read.
        """
        return self.interpret(self.run_raw(self.batch(images)))

    def run_raw(self, images: npt.NDArray[Any]) -> dict[str, npt.NDArray[Any]]:
        """All outputs of the file by name, for a batch as in `run`."""
        return self.execute(self.check(images))

    def execute(self, prepared: npt.NDArray[Any]) -> dict[str, npt.NDArray[Any]]:
        """All outputs of the file by name, for a batch that `check` returned.

        A batch below the fixed size of the file is filled up with its last image. The results of
        these copies are left out.
        """
        count, missing = len(prepared), (self.metadata.batch_size or 0) - len(prepared)
        if missing > 0:
            prepared = np.concatenate([prepared, np.repeat(prepared[-1:], missing, axis=0)])
        if self.provider == PROVIDER_NAMES["cpu"]:
            results = self._session.run(None, {"images": prepared})
        else:
            results = self._run_on_device(prepared)
        return {name: result[:count] for name, result in zip(self.outputs, results, strict=True)}

    def interpret(self, outputs: dict[str, npt.NDArray[Any]]) -> Prediction:
        """The outputs of the file with names and probabilities."""
        logits: FloatArray = outputs["logits"].astype(np.float32)
        shifted = np.exp(logits - logits.max(axis=1, keepdims=True))
        return Prediction(
            logits=logits,
            probabilities=shifted / shifted.sum(axis=1, keepdims=True),
            labels=tuple(self.metadata.labels[index] for index in logits.argmax(axis=1)),
            pathway=outputs.get("expert_index"),
            margin=outputs.get("router_margin"),
        )

    def batch(self, images: Picture | Sequence[Picture]) -> npt.NDArray[Any]:
        """Images as one array [B, ...]. The arguments are those of `run`.

        Raises:
            InputError: see `run`.
        """
        if _is_picture(images):
            return self._one(images)[None]
        if _is_array(images):
            array = as_array(images)
            return array[None] if array.ndim == 3 else array
        if not isinstance(images, Sequence):
            raise InputError(f"{self._expectation()}, got {type(images).__name__}")
        if not images:
            raise InputError(f"{self._expectation()}, got an empty sequence")
        arrays = [self._one(image) for image in images]
        kinds = {(array.dtype, array.shape): None for array in arrays}
        if len(kinds) > 1:
            given = " and ".join(f"{dtype} {list(shape)}" for dtype, shape in kinds)
            raise InputError(f"expected images of one type and size in a batch, got {given}; run them one by one")
        return np.stack(arrays)

    def _one(self, image: Any) -> npt.NDArray[Any]:
        """One image as an array without the batch dimension."""
        if _is_picture(image):
            return prepare(image, self.metadata)
        if not _is_array(image):
            raise InputError(f"{self._expectation()}, got a sequence with {type(image).__name__} in it")
        array = as_array(image)
        if array.ndim != 3:
            raise InputError(
                f"expected a sequence of single images, got an array {list(array.shape)} in it; "
                "pass a batch as one array"
            )
        return array

    def check(self, images: npt.NDArray[Any], *, any_size: bool = False) -> npt.NDArray[Any]:
        """A batch in the input format of the file.

        Args:
            images: a batch as in `run`.
            any_size: whether a file with a fixed batch size accepts smaller batches here, which
                `execute` fills up.

        Raises:
            InputError: wrong shape, type, size or range.
        """
        meta = self.metadata
        if not isinstance(images, np.ndarray):
            raise InputError(f"expected a batch as one array of NumPy, got {type(images).__name__}; see `batch`")
        given = f"got {images.dtype} {list(images.shape)}"
        if images.ndim != 4 or len(images) == 0:
            raise InputError(f"{self._expectation()}, {given}")
        fixed = meta.batch_size
        if fixed is not None and (len(images) > fixed or (len(images) < fixed and not any_size)):
            raise InputError(f"this file takes batches of {fixed}, {given}; export another profile for other batches")
        return check_images(images, meta.image_size, meta.input_type)

    def _expectation(self) -> str:
        height, width = self.metadata.image_size
        return (
            f"expected at least one image: float32 [B, 3, {height}, {width}], uint8 [B, {height}, {width}, 3], "
            "Pillow images, or paths of image files"
        )

    def _start(self, providers: Sequence[str], options: Any) -> Any:
        """An onnxruntime session on the first provider that starts."""
        installed = self._ort.get_available_providers()
        names = list(dict.fromkeys(PROVIDER_NAMES.get(name.lower(), name) for name in providers))
        if not names:
            raise ProviderError(f"expected at least one provider, got none; installed: {', '.join(installed)}")
        reasons = []
        for name in names:
            if name not in installed:
                reasons.append(
                    f"'{name}' is not part of this onnxruntime, which has {', '.join(installed)}{_advice(name)}"
                )
                continue
            with _silence(self._ort, quiet=name != PROVIDER_NAMES["cpu"]) as said:
                if name != PROVIDER_NAMES["cpu"] and hasattr(self._ort, "preload_dlls"):
                    self._ort.preload_dlls()  # finds the CUDA and cuDNN of pip's nvidia packages
                try:
                    started = self._ort.InferenceSession(
                        self.path, options, providers=_with_helper(name, installed), enable_fallback=0
                    )
                except Exception as error:
                    if name == PROVIDER_NAMES["cpu"]:
                        reason = " ".join(str(error).split())
                        raise ModelFileError(
                            f"onnxruntime {self._ort.__version__} could not load '{self.path}': {reason}"
                        ) from error
                    reasons.append(f"'{name}' did not start: {' '.join(str(error).split())}")
                    continue
            if name in started.get_providers():
                return started
            details = " ".join(said.getvalue().split())
            reasons.append(f"'{name}' did not start ({details or 'check driver, CUDA and cuDNN'})")
        raise ProviderError(f"{'; '.join(reasons)}; add 'cpu' to the providers to fall back to it")

    def _run_on_device(self, images: npt.NDArray[Any]) -> list[npt.NDArray[Any]]:
        """Run with bound inputs and outputs, so no other tensor is copied between host and device."""
        binding = self._session.io_binding()
        binding.bind_cpu_input("images", images)
        for name in self.outputs:
            binding.bind_output(name, "cpu")
        self._session.run_with_iobinding(binding)
        results: list[npt.NDArray[Any]] = binding.copy_outputs_to_cpu()
        return results


def _check_graph(session: Any, metadata: ModelMetadata, path: Path) -> None:
    """Check that a graph has the inputs and outputs that its metadata describe.

    Raises:
        ModelFileError: a name, a type or a size differs.
    """
    batch, columns = metadata.batch_size, len(metadata.layers)
    height, width = metadata.image_size
    nchw, nhwc = ("tensor(float)", [batch, 3, height, width]), ("tensor(uint8)", [batch, height, width, 3])
    described = {
        "images": nhwc if metadata.input_type == "uint8" else nchw,
        "logits": ("tensor(float)", [batch, len(metadata.labels)]),
        "expert_index": ("tensor(int64)", [batch, columns]),
        "router_margin": ("tensor(float)", [batch, columns]),
    }
    for does, names, values in (
        ("takes", ("images",), session.get_inputs()),
        ("returns", metadata.outputs, session.get_outputs()),
    ):
        found = [_signature(value.name, value.type, value.shape) for value in values]
        expected = [_signature(name, *described[name]) if name in described else name for name in names]
        if found != expected:
            raise ModelFileError(
                f"'{path}' {does} {', '.join(found) or 'nothing'}, expected {', '.join(expected)} by its metadata: "
                "another graph; export it again"
            )


def _signature(name: str, kind: str, shape: Sequence[int | str | None]) -> str:
    """An input or output in words. A dimension without a size is the batch."""
    return f"{name} {kind} [{', '.join(str(dim) if isinstance(dim, int) else 'B' for dim in shape)}]"


def _with_helper(name: str, installed: Sequence[str]) -> list[tuple[str, dict[str, str]]]:
    """A provider with its options, and CUDA for the nodes that TensorRT cannot take."""
    cuda = PROVIDER_NAMES["cuda"]
    names = [name, cuda] if name == PROVIDER_NAMES["tensorrt"] and cuda in installed else [name]
    return [(each, PROVIDER_OPTIONS.get(each, {})) for each in names]


def _advice(provider: str) -> str:
    """What to do about a provider that is not installed."""
    if provider == PROVIDER_NAMES["cuda"]:
        return "; CUDA needs advmoe-export[gpu] instead of [cpu]"
    return "" if provider in PROVIDER_NAMES.values() else f"; short names are {', '.join(PROVIDER_NAMES)}"


def _is_picture(image: object) -> bool:
    """Whether something is a Pillow image or a path."""
    if isinstance(image, str | os.PathLike):
        return True
    return any(base.__module__.partition(".")[0] == "PIL" for base in type(image).__mro__)


def _is_array(image: object) -> bool:
    """Whether something is an array, or a tensor that NumPy can view as one."""
    return hasattr(image, "__array__")


def as_array(image: Any) -> npt.NDArray[Any]:
    """What NumPy can view as an array, such as a tensor on the CPU.

    Raises:
        InputError: NumPy cannot.
    """
    try:
        return np.asarray(image)
    except (TypeError, RuntimeError, ValueError) as error:  # a tensor on another device, or with a gradient
        raise InputError(f"{type(image).__name__} is no array for NumPy: {' '.join(str(error).split())}") from error


def check_images(images: npt.NDArray[Any], image_size: tuple[int, int], input_type: str) -> npt.NDArray[Any]:
    """A batch in the input format of a file.

    Args:
        images: [B, ...]: float [B, 3, H, W] in [0, 1], or uint8 [B, H, W, 3].
        image_size: (H, W) of the file.
        input_type: `float32` or `uint8`. A file that reads uint8 does not take floats.

    Raises:
        InputError: wrong shape, type or range.
    """
    height, width = image_size
    nchw, nhwc = (3, height, width), (height, width, 3)
    given = f"got {images.dtype} {list(images.shape)}"
    expected = {"f": nchw, "u": nhwc}.get(images.dtype.kind)
    if expected is None or images.shape[1:] != expected or (images.dtype.kind == "u" and images.dtype != np.uint8):
        raise InputError(
            f"expected float32 [B, 3, {height}, {width}] in [0, 1] or uint8 [B, {height}, {width}, 3], {given}"
            f"{_remedy(images, nchw, nhwc)}"
        )
    if images.dtype.kind == "f":
        _check_range(images)
    if input_type == "uint8":
        if images.dtype != np.uint8:
            raise InputError(
                f"this file reads uint8 images [B, {height}, {width}, 3], {given}; pass the decoded pixels"
            )
        return np.ascontiguousarray(images)
    if images.dtype == np.uint8:
        images = images.transpose(0, 3, 1, 2) / np.float32(255)
    return np.ascontiguousarray(images, dtype=np.float32)


def _remedy(images: npt.NDArray[Any], nchw: tuple[int, ...], nhwc: tuple[int, ...]) -> str:
    """What to do about a batch of the wrong type or shape, as the end of a message."""
    kind, shape = images.dtype.kind, images.shape[1:]
    if kind == "f" and shape == nhwc:
        return "; put the channels first: images.transpose(0, 3, 1, 2)"
    if images.dtype == np.uint8 and shape == nchw:
        return "; put the channels last: images.transpose(0, 2, 3, 1)"
    if shape not in (nchw, nhwc):
        return "; convert the images to RGB of this size, or give their files, which are converted"
    return "; convert levels of 0 to 255 by images.astype('uint8')" if kind in "iu" else ""


def _check_range(images: npt.NDArray[Any]) -> None:
    low, high = float(images.min()), float(images.max())
    if np.isnan(low) or np.isnan(high):
        count = int(np.isnan(images.reshape(len(images), -1)).any(axis=1).sum())
        raise InputError(
            f"expected float images in [0, 1], got NaN in {count} of {len(images)}; "
            "look for a division by zero or a missing value in their preparation"
        )
    if not (low >= 0.0 and high <= 1.0):
        hint = "divide 8-bit images by 255" if low >= 0.0 and 1.0 < high <= 255.0 else "do not normalize them"
        raise InputError(f"expected float images in [0, 1], got values from {low:g} to {high:g}; {hint}")


def _onnxruntime() -> Any:
    try:
        return importlib.import_module("onnxruntime")
    except ImportError as error:
        raise MissingPackageError(
            f"running a model needs onnxruntime ({error}); install it with: pip install 'advmoe-export[cpu]', "
            "or 'advmoe-export[gpu]' on a machine with CUDA"
        ) from error


@contextlib.contextmanager
def _silence(ort: Any, *, quiet: bool) -> Iterator[io.StringIO]:
    """Collect the output of onnxruntime, and suppress its log, while a provider starts."""
    said = io.StringIO()
    if not quiet:
        yield said
        return
    ort.set_default_logger_severity(_FATAL)
    try:
        with contextlib.redirect_stdout(said):
            yield said
    finally:
        ort.set_default_logger_severity(_WARNING)


def _level(ort: Any, name: str) -> Any:
    if name not in OPTIMIZATION_LEVELS:
        levels = ", ".join(OPTIMIZATION_LEVELS)
        raise InputError(
            f"unknown optimization level '{name}', expected one of: {levels}{closest(name, OPTIMIZATION_LEVELS)}"
        )
    levels = ort.GraphOptimizationLevel
    return {
        "disable": levels.ORT_DISABLE_ALL,
        "basic": levels.ORT_ENABLE_BASIC,
        "extended": levels.ORT_ENABLE_EXTENDED,
        "all": levels.ORT_ENABLE_ALL,
    }[name]
