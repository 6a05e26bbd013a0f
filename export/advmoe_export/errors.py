"""Errors that a user can cause. A message is one line: expected value, actual value, remedy."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class ExportError(Exception):
    """Base class of the errors of this package."""


class UnsupportedModelError(ExportError):
    """The module or an option cannot be exported as a conditional ONNX graph."""


class ModelFileError(ExportError):
    """A model file is missing, incomplete, damaged or of another origin, or cannot be written."""


class ProviderError(ExportError):
    """No requested execution provider of onnxruntime can be used."""


class InputError(ExportError):
    """Images have the wrong shape, type or range, or another argument is wrong."""


class TooManyPixelsError(InputError):
    """An image file has more pixels than the limit."""


class MissingPackageError(ExportError, ImportError):
    """A package that this part of `advmoe_export` needs is not installed."""


def closest(name: str, known: Iterable[str]) -> str:
    """The end of a message about an unknown name: the known name that is most like it, or nothing."""
    found = difflib.get_close_matches(name.lower(), known, n=1)
    return f"; did you mean '{found[0]}'?" if found else ""
