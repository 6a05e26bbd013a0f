"""Write a Triton model repository for an exported file:

DIR/NAME/config.pbtxt
DIR/NAME/labels.txt
DIR/NAME/1/model.onnx
DIR/NAME/1/model.onnx.data
"""

from __future__ import annotations

import os
import re
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import onnx

from advmoe_export.errors import ModelFileError
from advmoe_export.metadata import ModelMetadata
from advmoe_export.model_file import check_data_file, data_file, read_metadata

TYPES = {
    onnx.TensorProto.FLOAT: "TYPE_FP32",
    onnx.TensorProto.UINT8: "TYPE_UINT8",
    onnx.TensorProto.INT64: "TYPE_INT64",
}
MODEL = "model.onnx"


def write_triton_repository(
    path: str | os.PathLike[str],
    folder: str | os.PathLike[str],
    *,
    name: str | None = None,
    max_batch_size: int = 64,
    queue_delay_us: int = 500,
) -> Path:
    """Write one model into a Triton model repository.

    A file with a dynamic batch size gets `max_batch_size` and dynamic batching. Its first dimension
    is -1, as Triton requires for batching. A file with a fixed batch size is served without
    batching.

    Args:
        path: an exported `.onnx` file.
        folder: the model repository. It is created if it does not exist.
        name: name of the model in Triton; the default is the name of the file.
        max_batch_size: highest number of images in one run.
        queue_delay_us: time in microseconds that a request may wait for further requests.

    Returns:
        The model's folder.

    Raises:
        ModelFileError: the file is not a complete export, Triton does not allow the name or a label,
            or the folder cannot be written.
    """
    source = Path(path)
    target = triton_folder(source, folder, name=name)
    name = target.name
    if max_batch_size < 1:
        raise ModelFileError(f"expected a batch size of at least 1, got {max_batch_size}")
    metadata = read_metadata(source)
    check_data_file(source, metadata)
    labels = _label_lines(metadata.labels)
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{name}.", dir=folder) as draft:
            model = onnx.load(source, load_external_data=False)
            version = Path(draft) / name / "1"
            version.mkdir(parents=True)
            if data_file(source).is_file():
                shutil.copyfile(data_file(source), data_file(version / MODEL))
            for tensor in _tensors(model.graph):
                for entry in tensor.external_data:
                    if entry.key == "location":
                        entry.value = data_file(Path(MODEL)).name
            (version / MODEL).write_bytes(model.SerializeToString())
            (version.parent / "labels.txt").write_bytes(labels)
            (version.parent / "config.pbtxt").write_text(
                config(model, metadata, name, max_batch_size, queue_delay_us), encoding="utf-8"
            )
            version.parent.replace(target)
    except OSError as error:
        raise ModelFileError(f"cannot write '{target}': {error.strerror or error}") from error
    return target


def triton_folder(path: str | os.PathLike[str], folder: str | os.PathLike[str], *, name: str | None = None) -> Path:
    """The folder that `write_triton_repository` writes. The arguments are the same.

    Raises:
        ModelFileError: Triton does not allow the name, or the folder exists already.
    """
    name = name or re.sub(r"[^A-Za-z0-9_.-]", "_", Path(path).stem)
    if not re.fullmatch(r"[A-Za-z0-9_.-]+", name):
        raise ModelFileError(f"expected a model name of letters, digits, '_', '-' and '.', got '{name}'")
    target = Path(folder) / name
    if target.exists():
        raise ModelFileError(f"'{target}' exists already; remove it, or give the model another name")
    if any(place.is_file() for place in (Path(folder), *Path(folder).parents)):
        raise ModelFileError(f"cannot write '{target}': there is a file where a folder is expected")
    return target


def _label_lines(labels: Sequence[str]) -> bytes:
    """The content of `labels.txt`, which Triton reads line by line.

    Raises:
        ModelFileError: a label has a line break, or bytes that were no text.
    """
    for label in labels:
        if "\n" in label or "\r" in label or any("\ud800" <= letter <= "\udfff" for letter in label):
            raise ModelFileError(
                f"Triton reads one label of UTF-8 a line, got {label!a}; rename the class and export again"
            )
    return "".join(f"{label}\n" for label in labels).encode()


def config(model: onnx.ModelProto, metadata: ModelMetadata, name: str, max_batch_size: int, queue_delay_us: int) -> str:
    """The text of `config.pbtxt`."""
    fixed = metadata.batch_size is not None
    lines = [f'name: "{name}"', 'platform: "onnxruntime_onnx"', f"max_batch_size: {0 if fixed else max_batch_size}"]
    for kind, values in (("input", model.graph.input), ("output", model.graph.output)):
        for value in values:
            dims = _dims(value) if fixed else _dims(value)[1:]
            parts = [f'name: "{value.name}"', f"data_type: {TYPES[value.type.tensor_type.elem_type]}", f"dims: {dims}"]
            if value.name == "logits":
                parts.append('label_filename: "labels.txt"')
            lines.append(f"{kind} [ {{ {', '.join(parts)} }} ]")
    if not fixed:
        lines.append(f"dynamic_batching {{ max_queue_delay_microseconds: {queue_delay_us} }}")
    (images,) = model.graph.input
    shape = _dims(images) if fixed else _dims(images)[1:]
    data_type = TYPES[images.type.tensor_type.elem_type]
    for size in (1,) if fixed else sorted({1, max_batch_size}):  # Triton skips a size of 0
        tensor = f'key: "{images.name}", value {{ data_type: {data_type}, dims: {shape}, zero_data: true }}'
        name = f"batch {shape[0] if fixed else size}"
        lines.append(f'model_warmup [ {{ name: "{name}", batch_size: {size}, inputs {{ {tensor} }} }} ]')
    # Sub-batches change their size with every request: an exhaustive search among cuDNN's
    # algorithms would never end.
    lines.append('parameters { key: "cudnn_conv_algo_search", value { string_value: "1" } }')
    # TF32 rounds to ten bits, and a rounded router decides differently.
    options = 'parameters { key: "use_tf32", value: "0" }'
    lines.append(
        f'optimization {{ execution_accelerators {{ gpu_execution_accelerator [ {{ name: "cuda", {options} }} ] }} }}'
    )
    return "\n".join(lines) + "\n"


def _dims(value: onnx.ValueInfoProto) -> list[int]:
    """Shape of an input or output, with -1 for dynamic dimensions."""
    return [dim.dim_value if dim.HasField("dim_value") else -1 for dim in value.type.tensor_type.shape.dim]


def _tensors(graph: onnx.GraphProto) -> Iterator[onnx.TensorProto]:
    """Initializers of a graph and of all its branches."""
    yield from graph.initializer
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.HasField("g"):
                yield from _tensors(attribute.g)
