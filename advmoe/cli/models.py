"""The data set of a checkpoint: its folder, which the run folder notes, and its classes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

from advmoe.errors import CheckpointError, DataError
from advmoe.files import write_text_atomically
from advmoe.run_paths import DATA

if TYPE_CHECKING:
    from advmoe.data.sets import DatasetInfo
    from advmoe.training.checkpoint import Checkpoint


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


def compare_classes(contents: Checkpoint, path: Path, info: DatasetInfo) -> None:
    """Compare a model's classes with those of a data set, as far as both are known.

    Raises:
        CheckpointError: They differ.
    """
    known = contents.class_names
    if not known or known == info.class_names or not info.num_classes:
        return
    if info.class_names or len(known) != info.num_classes:
        theirs = f" ({', '.join(info.class_names[:3])}, ...)" if info.class_names else ""
        raise CheckpointError(
            f"{path} tells {len(known)} classes apart ({', '.join(known[:3])}, ...), "
            f"{info.name} has {info.num_classes}{theirs}; give the data set it was trained on"
        )
