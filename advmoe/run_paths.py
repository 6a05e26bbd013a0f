"""The files of a run folder by name, the checkpoint that a path means, and the folders that hold a run."""

from __future__ import annotations

from pathlib import Path

from advmoe.errors import CheckpointError
from advmoe.hub import is_address
from advmoe.schema import nearest

BEST, LAST, DATA = "best.pt", "last.pt", "data.json"
"""The checkpoint to use, the one to resume from, and the note of the data folder."""
RUN_FILE = "run.toml"
"""The settings of a run in the form of a run file."""
CARD = "card.json"
"""The result card in the folder of an evaluation."""


def run_in(path: Path) -> Path | None:
    """A file that shows that a folder holds a training run; None if it holds none.

    `metrics.jsonl` and `routes.npz` show nothing, because an evaluation writes files of these names too.
    """
    return next((path / name for name in (LAST, BEST) if (path / name).exists()), None)


def checkpoint_of(path: Path) -> Path:
    """The checkpoint that a path means: itself, or the best one of a run folder. An address on the hub is itself.

    Raises:
        CheckpointError: There is no such file, the folder has no checkpoint, or the file is an
            exported model or the card of an evaluation.
    """
    if path.suffix == ".onnx":
        raise CheckpointError(f"{path} is an exported model; expected the run or the checkpoint that it was made from")
    if is_address(path):
        return path
    if not path.exists():
        raise CheckpointError(f"no checkpoint at {path}; expected a file such as runs/NAME/best.pt{closest_path(path)}")
    if path.name == CARD:
        raise CheckpointError(f"{path} is the card of an evaluation; expected the run or the checkpoint evaluated")
    if not path.is_dir():
        return path
    if (path / BEST).is_file():
        return path / BEST
    if (path / LAST).is_file():
        raise CheckpointError(
            f"the run in {path} has no {BEST} yet, which the first epoch writes (with at_sparse, the first one of the "
            f"last phase); let it go on, or give {path / LAST} to take it as it is"
        )
    if (path / CARD).is_file():
        raise CheckpointError(f"{path} holds an evaluation; expected the run or the checkpoint evaluated")
    raise CheckpointError(
        f"{path} is a folder without {BEST}; expected a run folder such as runs/NAME, or a checkpoint"
    )


def closest_path(path: Path) -> str:
    """The end of a message about a path that does not exist: the one that is most like it, or nothing."""
    missing = next(each for each in (*reversed(path.parents), path) if not each.exists())
    try:
        near = nearest(missing.name, [each.name for each in missing.parent.iterdir()])
    except OSError:
        return ""
    if near is None:
        return ""
    found = missing.with_name(near)
    whole = found / path.relative_to(missing)
    return f"; did you mean '{whole if whole.exists() else found}'?"
