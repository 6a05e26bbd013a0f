"""Options of an export, checked before any work is done."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from advmoe_export.errors import ModelFileError, UnsupportedModelError, closest
from advmoe_export.metadata import DTYPES, INPUT_TYPES, PROFILES
from advmoe_export.model_file import data_file

OPSETS = range(18, 26)


def check_options(
    path: str | os.PathLike[str],
    *,
    profile: str = "hybrid",
    batch_size: int | None = None,
    opset: int = 18,
    dtype: str = "fp32",
    input_type: str = "float32",
) -> Path:
    """Check the options of `export_model` that do not depend on the model.

    Returns:
        The `.onnx` file to write.

    Raises:
        UnsupportedModelError: a value is unknown, or two do not go together.
        ModelFileError: the file cannot be written there.
    """
    _one_of("profile", profile, PROFILES)
    _one_of("dtype", dtype, DTYPES)
    _one_of("input type", input_type, INPUT_TYPES)
    if batch_size is not None and (profile != "static" or batch_size < 1):
        raise UnsupportedModelError(
            f"batch_size {batch_size} does not go with profile '{profile}': only 'static' fixes one, of at least 1"
        )
    if opset not in OPSETS:
        raise UnsupportedModelError(f"opset must be in {OPSETS.start} ... {OPSETS.stop - 1}, got {opset}")
    if dtype == "int8" and profile == "static":
        raise UnsupportedModelError(
            "int8 puts each expert's scales in a branch or a sub-batch; give another profile than 'static'"
        )
    target = Path(path)
    if not target.parent.is_dir():
        raise ModelFileError(f"cannot write '{target}': the folder '{target.parent}' does not exist; make it first")
    if target.is_dir():
        raise ModelFileError(f"cannot write '{target}': it is a folder; expected a file name such as model.onnx")
    if target.suffix != ".onnx":
        raise ModelFileError(f"cannot write '{target}': expected a file name that ends in .onnx, such as model.onnx")
    if data_file(target).is_dir():
        raise ModelFileError(
            f"cannot write '{target}': its weights go to '{data_file(target)}', which is a folder; remove it, or give "
            "another name"
        )
    if not os.access(target.parent, os.W_OK | os.X_OK):
        raise ModelFileError(f"cannot write '{target}': no permission to write in the folder '{target.parent}'")
    return target


def _one_of(what: str, value: str, choices: Sequence[str]) -> None:
    if value not in choices:
        raise UnsupportedModelError(
            f"unknown {what} '{value}', expected one of: {', '.join(choices)}{closest(value, choices)}"
        )
