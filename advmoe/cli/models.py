"""The data folder of a run, which the run folder notes."""

from __future__ import annotations

import json
from pathlib import Path

from advmoe.errors import DataError
from advmoe.files import write_text_atomically
from advmoe.run_paths import DATA


def remember_data(run: Path, dataset: str, data_dir: Path | None) -> None:
    """Record the data folder in a run's folder, so that other commands find the images."""
    text = json.dumps({"dataset": dataset, "data_dir": None if data_dir is None else str(data_dir.resolve())}) + "\n"
    write_text_atomically(run / DATA, text)


def data_dir_of(checkpoint: Path, dataset: str, given: Path | None) -> Path | None:
    """The data folder of a data set: the given one, otherwise the one recorded with the checkpoint's run.

    Raises:
        DataError: The recorded folder no longer exists.
    """
    from advmoe.data.sources import is_packaged

    if given is not None or is_packaged(dataset):  # earlier versions recorded a folder for any data set
        return given
    try:
        stored = json.loads((checkpoint.parent / DATA).read_text(encoding="utf-8"))
        remembered = stored["data_dir"] if stored["dataset"] == dataset else None
    except (OSError, ValueError, KeyError, TypeError):
        return None
    if not isinstance(remembered, str):
        return None
    if not Path(remembered).exists():
        raise DataError(f"the run's images were in {remembered}, which is gone; say where they are now", "data_dir")
    return Path(remembered)
