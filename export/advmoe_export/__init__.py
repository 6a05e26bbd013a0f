"""Export mixture-of-experts networks to ONNX. For each image, a file computes the chosen experts only.

Exporting needs torch, onnx and onnxscript (`pip install 'advmoe-export[export]'`). Running a file
needs onnxruntime only (`[cpu]` or `[gpu]`). Names are imported at their first use.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from advmoe_export.bench import Timing, time_session
    from advmoe_export.errors import (
        ExportError,
        InputError,
        MissingPackageError,
        ModelFileError,
        ProviderError,
        UnsupportedModelError,
    )
    from advmoe_export.exporter import ExportReport, export_model
    from advmoe_export.metadata import PROFILES, ModelMetadata
    from advmoe_export.monitor import LayerDrift, RouteMonitor
    from advmoe_export.options import check_options
    from advmoe_export.preparation import prepare, read_image
    from advmoe_export.report import Agreement, Tolerance, VerificationError, VerificationReport
    from advmoe_export.session import Prediction, Session
    from advmoe_export.triton import triton_folder, write_triton_repository
    from advmoe_export.verify import verify

_HOME = {
    "Agreement": "report",
    "ExportError": "errors",
    "ExportReport": "exporter",
    "InputError": "errors",
    "LayerDrift": "monitor",
    "MissingPackageError": "errors",
    "ModelFileError": "errors",
    "ModelMetadata": "metadata",
    "PROFILES": "metadata",
    "Prediction": "session",
    "ProviderError": "errors",
    "RouteMonitor": "monitor",
    "Session": "session",
    "Timing": "bench",
    "Tolerance": "report",
    "UnsupportedModelError": "errors",
    "VerificationError": "report",
    "VerificationReport": "report",
    "check_options": "options",
    "export_model": "exporter",
    "prepare": "preparation",
    "read_image": "preparation",
    "time_session": "bench",
    "triton_folder": "triton",
    "verify": "verify",
    "write_triton_repository": "triton",
}

__all__ = [
    "PROFILES",
    "Agreement",
    "ExportError",
    "ExportReport",
    "InputError",
    "LayerDrift",
    "MissingPackageError",
    "ModelFileError",
    "ModelMetadata",
    "Prediction",
    "ProviderError",
    "RouteMonitor",
    "Session",
    "Timing",
    "Tolerance",
    "UnsupportedModelError",
    "VerificationError",
    "VerificationReport",
    "check_options",
    "export_model",
    "prepare",
    "read_image",
    "time_session",
    "triton_folder",
    "verify",
    "write_triton_repository",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module '{__name__}' has no attribute '{name}'")
    try:
        module = importlib.import_module(f"{__name__}.{_HOME[name]}")
    except ModuleNotFoundError as error:
        from advmoe_export.errors import MissingPackageError

        extras = "cpu,export" if error.name == "onnxruntime" else "export"
        raise MissingPackageError(
            f"'{name}' needs the package '{error.name}', which is not installed; "
            f"install what exporting needs with: pip install 'advmoe-export[{extras}]'"
        ) from error
    return getattr(module, name)
