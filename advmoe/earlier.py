"""Names that settings and weights had in earlier versions, and the names they have now.

Version 2 of the checkpoint format has American names. Run files have no version; their old names
are accepted.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

SETTINGS = {"specialisation": "specialization"}  # codespell:ignore
"""Earlier names of settings."""

MODULES = {"centre": "center"}  # codespell:ignore
"""Earlier names of modules; a name in a state dict lists modules from the outermost to the innermost."""


def renamed_settings(values: Mapping[str, Any]) -> dict[str, Any]:
    """Settings by their present names. An earlier name stays where the present one is given, too."""
    return {name if SETTINGS.get(name, name) in values else SETTINGS.get(name, name): values[name] for name in values}


def renamed_weights(weights: Mapping[str, Any]) -> dict[str, Any]:
    """A state dict by the present names of its modules."""
    return {".".join(MODULES.get(part, part) for part in str(name).split(".")): weights[name] for name in weights}


def from_version_1(contents: Mapping[str, Any]) -> dict[str, Any]:
    """Entries of a checkpoint of version 2 from those of version 1. Entries of a wrong type stay as they are."""
    renames = {"weights": renamed_weights, "training_weights": renamed_weights, "train": renamed_settings}
    return {
        name: renames[name](entry) if name in renames and isinstance(entry, Mapping) else entry
        for name, entry in contents.items()
    }
