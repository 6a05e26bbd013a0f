"""Arrays that grow batch by batch, and attack by attack within a batch. They survive an interruption."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from advmoe.errors import CheckpointError
from advmoe.files import write_atomically, write_text_atomically

IDENTITY, DONE = "identity", "images done"
"""Names of two arrays: the identity of the evaluation as JSON, and the number of images done before a batch."""

Arrays = dict[str, NDArray[Any]]
"""One row per image in every array."""


class EvaluationState:
    """Results of the finished batches and of the unfinished one.

    Args:
        path: File of the finished batches, written whole after each one. The unfinished batch has a
            file beside it. None keeps both in memory only.
        identity: Model, images and settings of the results, as plain values.

    Raises:
        CheckpointError: The file holds results of another model, other images or other settings, or
            cannot be read.
    """

    def __init__(self, path: Path | None, identity: dict[str, Any]) -> None:
        self._path = path
        self._identity: dict[str, Any] = json.loads(json.dumps(identity))
        self._batches: list[Arrays] = []
        self._under_way: Arrays = {}
        if path is not None and path.exists():
            self._batches.append(self._read(path))
        if self._partial is not None and self._partial.exists():
            found = self._read(self._partial)
            if int(found.pop(DONE)) == self.images_done:
                self._under_way = found

    @property
    def images_done(self) -> int:
        """Rows of finished batches."""
        return sum(len(next(iter(batch.values()))) for batch in self._batches)

    @property
    def arrays(self) -> Arrays:
        """The finished batches, one row per image."""
        if not self._batches:
            return {}
        return {name: np.concatenate([batch[name] for batch in self._batches]) for name in self._batches[0]}

    @property
    def under_way(self) -> Arrays:
        """The stored arrays of the unfinished batch; empty if there are none."""
        return self._under_way

    def keep(self, batch: Arrays) -> None:
        """Save the unfinished batch in its present state."""
        self._under_way = batch
        if self._partial is not None:
            self._write(self._partial, batch | {DONE: np.array(self.images_done)})

    def add(self, batch: Arrays) -> None:
        """Append a finished batch and save."""
        self.add_all([batch])

    def add_all(self, batches: Iterable[Arrays]) -> None:
        """Append finished batches and save, once."""
        before = self.images_done
        self._batches = [*self._batches, *batches]
        if self.images_done == before:
            return
        self._batches, self._under_way = [self.arrays], {}
        if self._path is not None and self._partial is not None:
            self._write(self._path, self.arrays)
            self._partial.unlink(missing_ok=True)

    @property
    def _partial(self) -> Path | None:
        return None if self._path is None else self._path.with_name(f"{self._path.stem}-batch.npz")

    def _write(self, path: Path, arrays: Arrays) -> None:
        contents = arrays | {IDENTITY: np.array(json.dumps(self._identity))}

        def write(temporary: Path) -> None:
            with temporary.open("wb") as file:
                np.savez(file, **contents)  # type: ignore[arg-type]

        write_atomically(path, write)

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


def read_note(path: Path, identity: dict[str, Any]) -> Any:
    """The note stored for this identity; None if there is none, or only for another identity."""
    try:
        stored = json.loads(path.read_text())
        return stored["content"] if stored[IDENTITY] == json.loads(json.dumps(identity)) else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def write_note(path: Path, identity: dict[str, Any], content: Any) -> None:
    """Store plain values together with the identity that they belong to."""
    write_text_atomically(path, json.dumps({IDENTITY: identity, "content": content}) + "\n")


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
