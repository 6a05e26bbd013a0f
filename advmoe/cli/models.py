"""Trained models as arguments of commands: a run folder or a checkpoint."""

from __future__ import annotations

import json
from pathlib import Path

from advmoe.errors import CheckpointError, DataError
from advmoe.files import write_text_atomically

BEST, LAST, DATA = "best.pt", "last.pt", "data.json"
"""Files of a run: the checkpoint to use, the one to resume from, and the note of the data folder."""


def checkpoint_of(path: Path) -> Path:
    """The checkpoint that a path means: itself, or the best one of a run folder.

    Raises:
        CheckpointError: The folder has no checkpoint.
    """
    if not path.is_dir():
        return path
    if (path / BEST).is_file():
        return path / BEST
    if (path / LAST).is_file():
        raise CheckpointError(
            f"the run in {path} has no {BEST} yet, which the first epoch writes (with at_sparse, the first one of the "
            f"last phase); let it go on, or give {path / LAST} to take it as it is"
        )
    raise CheckpointError(
        f"{path} is a folder without {BEST}; expected a run folder such as runs/NAME, or a checkpoint"
    )


def remember_data(run: Path, dataset: str, data_dir: Path | None) -> None:
    """Record the data folder in a run's folder, so that other commands find the images."""
    text = json.dumps({"dataset": dataset, "data_dir": None if data_dir is None else str(data_dir.resolve())}) + "\n"
    write_text_atomically(run / DATA, text)


def data_dir_of(checkpoint: Path, dataset: str, given: Path | None) -> Path | None:
    """The data folder of a data set: the given one, otherwise the one recorded with the checkpoint's run.

    Raises:
        DataError: The recorded folder no longer exists.
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
