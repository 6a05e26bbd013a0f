"""How commands name a trained model: by its run folder or by a checkpoint."""

from __future__ import annotations

import json
from pathlib import Path

from advmoe.errors import CheckpointError
from advmoe.files import write_text_atomically

BEST, DATA = "best.pt", "data.json"
"""Files of a run: the checkpoint that counts, and where its images lie."""


def checkpoint_of(path: Path) -> Path:
    """The checkpoint that a path means: itself, or the best one of a run folder.

    Raises:
        CheckpointError: a folder without one.
    """
    if not path.is_dir():
        return path
    if not (path / BEST).is_file():
        raise CheckpointError(f"{path} is a folder without {BEST}; give a run folder, or a checkpoint")
    return path / BEST


def remember_data(run: Path, dataset: str, data_dir: Path | None) -> None:
    """Note in a run's folder where its images lie, so that other commands find them."""
    text = json.dumps({"dataset": dataset, "data_dir": None if data_dir is None else str(data_dir.resolve())}) + "\n"
    write_text_atomically(run / DATA, text)


def data_dir_of(checkpoint: Path, dataset: str, given: Path | None) -> Path | None:
    """Where to look for a data set: the folder given, otherwise the one that the checkpoint's run remembers."""
    if given is not None:
        return given
    try:
        stored = json.loads((checkpoint.parent / DATA).read_text())
        remembered = stored["data_dir"] if stored["dataset"] == dataset else None
        return Path(remembered) if isinstance(remembered, str) and Path(remembered).exists() else None
    except (OSError, ValueError, KeyError, TypeError):
        return None
