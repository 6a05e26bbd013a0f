"""Errors a user can cause; each message is one line: what was expected, what came, what to do."""

from __future__ import annotations


class ExportError(Exception):
    """Base of everything this package raises for bad input."""


class UnsupportedModelError(ExportError):
    """The module, or an option for it, cannot be expressed as a conditional ONNX graph."""


class ModelFileError(ExportError):
    """A model file that is missing, incomplete, damaged, not ours, or cannot be written."""


class ProviderError(ExportError):
    """An onnxruntime execution provider that was asked for and cannot be used."""


class InputError(ExportError):
    """Images of the wrong shape, type or range."""


class TooManyPixelsError(InputError):
    """An image file that unpacks to more pixels than are decoded."""


class MissingPackageError(ExportError, ImportError):
    """A package that this part of `advmoe_export` needs is not installed."""
