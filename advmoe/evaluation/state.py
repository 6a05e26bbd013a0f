"""Arrays that grow batch by batch, and attack by attack within a batch. They survive an interruption.

Shape suffixes: I images of a set, K classes.
"""

from __future__ import annotations

import json
import zipfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from advmoe.errors import CheckpointError
from advmoe.evaluation.machine import Machine, distinct
from advmoe.evaluation.vocabulary import pixels
from advmoe.files import write_atomically, write_text_atomically

IDENTITY, DONE, MACHINES = "identity", "images done", "machines"
"""Names of three arrays: the identity of the evaluation as JSON, the number of images done before a batch, and the
machines that did the work as JSON."""

NUMBER, IMAGES, LOGITS = "number of images", "images", "logits"
"""Parts of an identity: the number of images, which is only told, the hash of the images, which counts, and the
logits of some images, which need not be the same to the last digit."""
INDIFFERENT = {NUMBER, "batch size"}
"""Parts that need not be the same. Earlier versions stored the batch size."""
IN_WORDS = {
    "layout": "another version of this program wrote it",
    "model": "it is of other weights: another checkpoint, or a control of one",
    "form": "it is of another kind of network, or of one with other numbers as attributes",
    LOGITS: "it is of a model with these weights that computes something else",
    IMAGES: "it is of other images",
}
"""What it means that a part of an identity without a meaning of its own is another one."""
OPTIONS = {
    "layout": (),
    "model": (),
    "form": (),
    LOGITS: (),
    IMAGES: ("dataset", "limit_eval", "skip_bad_images"),
    "routing": ("routing", "suite"),
    "autoattack": ("autoattack", "suite"),
    "eps_sweep": ("eps_sweep", "suite"),
}
"""Settings from which a part of an identity follows, if these have other names."""
TOLERANCE = 1e-3
"""Difference of an image's logits, relative to the largest one, that is no difference: machines round differently."""
MOST = 7 / 8
"""Share of the images whose logits must be the same. An image on a router's boundary may go another way elsewhere."""
RADII = ("eps", "step_size", "eps_sweep")
SHOWN = 60
"""Characters of a value in a message, at most."""

Arrays = dict[str, NDArray[Any]]
"""One row per image in every array."""


class EvaluationState:
    """Results of the finished batches and of the unfinished one.

    Args:
        path: File of the finished batches, written whole after each one. The unfinished batch has a
            file beside it. None keeps both in memory only.
        identity: Model, images and settings of the results, as plain values.
        machines: The machines of this process and of the other ranks, which do the work from here.

    Raises:
        CheckpointError: The file holds results of another model, other images or other settings, or
            cannot be read.
    """

    def __init__(self, path: Path | None, identity: dict[str, Any], machines: Sequence[Machine] = ()) -> None:
        self._path = path
        self._identity: dict[str, Any] = json.loads(json.dumps(identity))
        self._present, self._machines = machines, list[Machine]()
        self._batches: list[Arrays] = []
        self._under_way: Arrays = {}
        if path is not None and path.exists():
            self._batches.append(self._read(path))
        if self._partial is not None and self._partial.exists():
            found = self._read(self._partial)
            if int(found.pop(DONE)) == self.images_done:
                self._under_way = found

    @property
    def machines(self) -> Sequence[Machine]:
        """The machines that did the stored work; those of this process only if they did a part."""
        return self._machines

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
        self._machines = distinct([*self._machines, *self._present])
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
        self._machines = distinct([*self._machines, *self._present])
        if self._path is not None and self._partial is not None:
            self._write(self._path, self.arrays)
            self._partial.unlink(missing_ok=True)

    @property
    def _partial(self) -> Path | None:
        return None if self._path is None else self._path.with_name(f"{self._path.stem}-batch.npz")

    def _write(self, path: Path, arrays: Arrays) -> None:
        contents = arrays | {
            IDENTITY: np.array(json.dumps(self._identity)),
            MACHINES: np.array(json.dumps(self._machines)),
        }

        def write(temporary: Path) -> None:
            with temporary.open("wb") as file:
                np.savez(file, **contents)  # type: ignore[arg-type]

        write_atomically(path, write)

    def _read(self, path: Path) -> Arrays:
        try:
            with np.load(path, allow_pickle=False) as file:
                arrays = dict(file)
            stored = json.loads(str(arrays.pop(IDENTITY)))
            listed = json.loads(str(arrays.pop(MACHINES, "[]")))
            machines = [Machine(device=str(each["device"]), versions=dict(each["versions"])) for each in listed]
            rows = {len(array) for name, array in arrays.items() if name != DONE}
            if len(rows) > 1 or any(array.dtype.kind not in "biuf" for array in arrays.values()):
                raise ValueError("columns of unequal length, or that are no numbers")
        except (OSError, ValueError, TypeError, KeyError, EOFError, zipfile.BadZipFile) as error:
            raise CheckpointError(
                f"{path} is not the state of an evaluation, or damaged; move it away to start anew"
            ) from error
        if different := _first_difference(stored, self._identity):
            reason, options = different
            remedy = "repeat the original options or choose another folder" if options else "move it away to start anew"
            raise CheckpointError(
                f"{path} belongs to another evaluation: {reason}; {remedy}",
                *options,
            )
        self._machines = distinct([*self._machines, *machines])
        return arrays


def read_note(path: Path, identity: dict[str, Any]) -> Any:
    """The note stored for this identity; None if there is none, or only for another identity."""
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
        same = _first_difference(stored[IDENTITY], json.loads(json.dumps(identity))) is None
        return stored["content"] if same else None
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def write_note(path: Path, identity: dict[str, Any], content: Any) -> None:
    """Store plain values together with the identity that they belong to."""
    write_text_atomically(path, json.dumps({IDENTITY: identity, "content": content}) + "\n")


def _first_difference(stored: dict[str, Any], now: dict[str, Any]) -> tuple[str, tuple[str, ...]] | None:
    """The first part of an identity that was another one, in words, and the settings that it follows from.

    None if everything is the same.
    """
    was, given = _flat(stored), _flat(now)
    for name in (name for name in given | was if name not in INDIFFERENT and not _same(name, was, given)):
        setting = name.rpartition(".")[2]
        options = OPTIONS.get(setting, (setting,))
        if name in IN_WORDS:
            numbers = was.get(NUMBER), given.get(NUMBER)
            told = name == IMAGES and None not in numbers and numbers[0] != numbers[1]
            return IN_WORDS[name] + (f" ({numbers[0]}, now {numbers[1]})" if told else ""), options
        before, after = _unlike(was.get(name), given.get(name), radius=setting in RADII)
        return f"{setting} was {before}, now it is {after}", options
    return None


def _same(name: str, was: dict[str, Any], given: dict[str, Any]) -> bool:
    """Whether a part of an identity is that of another one."""
    before, after = was.get(name), given.get(name)
    return alike(before, after) if name == LOGITS and before and after else before == after


def alike(before: ArrayLike, after: ArrayLike) -> bool:
    """Whether logits [I, K] are the same, up to rounding, on nearly all images."""
    was_IK, now_IK = np.asarray(before), np.asarray(after)
    if was_IK.shape != now_IK.shape:
        return False
    size_I1 = np.maximum(np.abs(was_IK), np.abs(now_IK)).max(axis=1, keepdims=True)
    return bool((np.abs(was_IK - now_IK) <= TOLERANCE * size_I1).all(axis=1).mean() >= MOST)


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Values by name; those inside a value have names such as `attack.eps`."""
    flat: dict[str, Any] = {}
    for name, value in values.items():
        flat |= _flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": value}
    return flat


def _unlike(was: Any, now: Any, *, radius: bool) -> tuple[str, str]:
    """Two values as texts of limited length that differ, as the values do."""
    texts = [json.dumps(value) for value in (was, now)]
    if radius:
        in_pixels = [_in_pixels(value, text) for value, text in zip((was, now), texts, strict=True)]
        texts = in_pixels if in_pixels[0] != in_pixels[1] else texts
    start = 0
    if max(map(len, texts)) > SHOWN:  # show the place where they part
        shorter = min(map(len, texts))
        alike = next((place for place in range(shorter) if texts[0][place] != texts[1][place]), shorter)
        start = max(0, alike - SHOWN // 2)

    def part(text: str) -> str:
        end = start + SHOWN
        return ("..." if start else "") + text[start:end] + ("..." if len(text) > end else "")

    return part(texts[0]), part(texts[1])


def _in_pixels(value: Any, otherwise: str) -> str:
    """A radius or several as the command line takes them."""
    radii = value if isinstance(value, list) else [value]
    if not all(isinstance(radius, int | float) for radius in radii):
        return otherwise
    return ",".join(map(pixels, radii)) or "none"
