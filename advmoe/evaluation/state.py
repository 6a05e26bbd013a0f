"""Arrays that grow batch by batch and survive an interruption."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from advmoe.errors import CheckpointError
from advmoe.files import write_atomically

IDENTITY = "identity"
"""Name of the array that holds what the state belongs to, as JSON."""

Arrays = dict[str, NDArray[Any]]
"""One row per image in every array."""


class EvaluationState:
    """Results of the batches done so far.

    Args:
        path: file to keep them in, written whole after each batch; None to keep them in memory only.
        identity: what the results belong to: model, images, settings. Plain values.

    Raises:
        CheckpointError: the file holds results of another model, other images or other settings, or cannot be read.
    """

    def __init__(self, path: Path | None, identity: dict[str, Any]) -> None:
        self._path = path
        self._identity: dict[str, Any] = json.loads(json.dumps(identity))
        self._batches: list[Arrays] = []
        if path is not None and path.exists():
            self._batches.append(self._read(path))

    @property
    def images_done(self) -> int:
        """Rows collected."""
        return sum(len(next(iter(batch.values()))) for batch in self._batches)

    @property
    def arrays(self) -> Arrays:
        """Everything collected, one row per image."""
        if not self._batches:
            return {}
        return {name: np.concatenate([batch[name] for batch in self._batches]) for name in self._batches[0]}

    def add(self, batch: Arrays) -> None:
        """Append a batch and save."""
        self._batches.append(batch)
        if self._path is not None:
            arrays = self.arrays | {IDENTITY: np.array(json.dumps(self._identity))}
            self._batches = [{name: array for name, array in arrays.items() if name != IDENTITY}]

            def write(temporary: Path) -> None:
                with temporary.open("wb") as file:
                    np.savez_compressed(file, **arrays)  # type: ignore[arg-type]

            write_atomically(self._path, write)

    def _read(self, path: Path) -> Arrays:
        try:
            with np.load(path, allow_pickle=False) as file:
                arrays = dict(file)
            stored = json.loads(str(arrays.pop(IDENTITY)))
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
            raise CheckpointError(
                f"{path} is not the state of an evaluation, or damaged; move it away to start anew"
            ) from error
        for name in self._identity.keys() | stored.keys():
            if stored.get(name) != self._identity.get(name):
                raise CheckpointError(
                    f"{path} belongs to another evaluation: {name} was {_short(stored.get(name))}, "
                    f"now it is {_short(self._identity.get(name))}; "
                    "repeat the original options or choose another folder"
                )
        return arrays


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
