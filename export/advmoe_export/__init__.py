"""ONNX for mixture-of-experts networks: each image computes its own expert, and nothing else.

Exporting needs torch and onnxscript (`pip install advmoe-export[torch]`); running a file needs onnxruntime only.
Names are imported when they
are first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from advmoe_export.errors import (
        ExportError,
        InputError,
        ModelFileError,
        ProviderError,
        UnsupportedModelError,
        VerificationError,
    )
    from advmoe_export.exporter import ExportReport, export_model
    from advmoe_export.metadata import ModelMetadata
    from advmoe_export.profiles import PROFILES
    from advmoe_export.session import Prediction, Session
    from advmoe_export.verify import Tolerance, VerificationReport, verify

_HOME = {
    "ExportError": "errors",
    "ExportReport": "exporter",
    "InputError": "errors",
    "ModelFileError": "errors",
    "ModelMetadata": "metadata",
    "PROFILES": "profiles",
    "Prediction": "session",
    "ProviderError": "errors",
    "Session": "session",
    "Tolerance": "verify",
    "UnsupportedModelError": "errors",
    "VerificationError": "errors",
    "VerificationReport": "verify",
    "export_model": "exporter",
    "verify": "verify",
}

__all__ = [
    "PROFILES",
    "ExportError",
    "ExportReport",
    "InputError",
    "ModelFileError",
    "ModelMetadata",
    "Prediction",
    "ProviderError",
    "Session",
    "Tolerance",
    "UnsupportedModelError",
    "VerificationError",
    "VerificationReport",
    "export_model",
    "verify",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module '{__name__}' has no attribute '{name}'")
    return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
