"""How commands name a trained model: by its run folder or by a checkpoint."""

from __future__ import annotations

import json
from pathlib import Path

from advmoe.errors import CheckpointError, DataError
from advmoe.files import write_text_atomically

BEST, LAST, DATA = "best.pt", "last.pt", "data.json"
"""Files of a run: the checkpoint that counts, the one to go on from, and where its images lie."""


def checkpoint_of(path: Path) -> Path:
    """The checkpoint that a path means: itself, or the best one of a run folder.

    Raises:
        CheckpointError: a folder without one.
    """
    if not path.is_dir():
        return path
    if (path / BEST).is_file():
        return path / BEST
    if (path / LAST).is_file():
        raise CheckpointError(
            f"the run in {path} has not finished an epoch, so it has no {BEST} yet; let it go on, "
            f"or give {path / LAST} to take it as it is"
        )
    raise CheckpointError(
        f"{path} is a folder without {BEST}; expected a run folder such as runs/NAME, or a checkpoint"
    )


def remember_data(run: Path, dataset: str, data_dir: Path | None) -> None:
    """Note in a run's folder where its images lie, so that other commands find them."""
    text = json.dumps({"dataset": dataset, "data_dir": None if data_dir is None else str(data_dir.resolve())}) + "\n"
    write_text_atomically(run / DATA, text)


def data_dir_of(checkpoint: Path, dataset: str, given: Path | None) -> Path | None:
    """Where to look for a data set: the folder given, otherwise the one that the checkpoint's run remembers.

    Raises:
        DataError: that folder is gone.
    """
    if given is not None:
        return given
    try:
        stored = json.loads((checkpoint.parent / DATA).read_text())
        remembered = stored["data_dir"] if stored["dataset"] == dataset else None
    except (OSError, ValueError, KeyError, TypeError):
        return None
    if not isinstance(remembered, str):
        return None
    if not Path(remembered).exists():
        raise DataError(f"the run's images were in {remembered}, which is gone; say where they are now", "data_dir")
    return Path(remembered)
