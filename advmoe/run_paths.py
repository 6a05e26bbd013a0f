"""The files of a run folder by name, the checkpoint that a path means, and the folders that hold a run."""

from __future__ import annotations

from pathlib import Path

from advmoe.errors import CheckpointError

BEST, LAST, DATA = "best.pt", "last.pt", "data.json"
"""The checkpoint to use, the one to resume from, and the note of the data folder."""
RUN_FILE = "run.toml"
"""The settings of a run in the form of a run file."""


def run_in(path: Path) -> Path | None:
    """A file that shows that a folder holds a training run; None if it holds none.

    `metrics.jsonl` and `routes.npz` show nothing, because an evaluation writes files of these names too.
    """
    return next((path / name for name in (LAST, BEST) if (path / name).exists()), None)


def checkpoint_of(path: Path) -> Path:
    """The checkpoint that a path means: itself, or the best one of a run folder.

    Raises:
        CheckpointError: The folder has no checkpoint, or the file is an exported model.
    """
    if path.suffix == ".onnx":
        raise CheckpointError(f"{path} is an exported model; expected the run or the checkpoint that it was made from")
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
