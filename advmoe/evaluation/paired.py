"""Compares models on the same images: the difference of two shares and its standard error.

Two models often err on the same images, so the error of their difference is smaller than the errors
of both shares suggest. Let n be the number of images, `only_a` the number that only model A
classifies correctly, and `only_b` the number that only model B does. The difference is (only_a -
only_b) / n. Its standard error is that of the mean of n values in {-1, 0, 1} (as in McNemar's
test): sqrt(only_a + only_b - (only_a - only_b)^2 / n) / n.
"""

from __future__ import annotations

import math
import zipfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from advmoe.errors import DataError
from advmoe.evaluation.results import PGD, WORST, SuiteResult
from advmoe.evaluation.state import Arrays
from advmoe.evaluation.vocabulary import RA, RA_AA, RA_PGD, RA_WORST, SA
from advmoe.files import write_atomically

IMAGES = ("index", "label")
"""Arrays that identify the images."""
COMPARED = (SA, RA, RA_PGD, RA_AA, RA_WORST)
"""Figures that are stored image by image."""


@dataclass(frozen=True, kw_only=True)
class Difference:
    """The difference between two models, in points of per cent."""

    points: float
    error: float
    """One standard error."""


def paired_difference(ours: NDArray[np.bool_], theirs: NDArray[np.bool_]) -> Difference:
    """Our share minus theirs, over the same images [I] in the same order."""
    images = len(ours)
    only_ours, only_theirs = int((ours & ~theirs).sum()), int((theirs & ~ours).sum())
    net = only_ours - only_theirs
    error = math.sqrt(only_ours + only_theirs - net**2 / images) / images
    return Difference(points=100 * net / images, error=100 * error)


def outcomes(result: SuiteResult) -> Arrays:
    """The images that are right, and stay right under the attacks: `index`, `label`, and one bool
    [I] for each figure.
    """
    kept: Arrays = {name: result.arrays[name] for name in IMAGES}
    kept |= {SA.key: result.arrays["right"], RA.key: result.robust(result.table), RA_PGD.key: result.robust([PGD])}
    if after := result.ran("autoattack"):
        kept[RA_AA.key] = result.robust(after[-1:])
    return kept | {RA_WORST.key: result.robust([WORST])}


def save_outcomes(path: Path, result: SuiteResult) -> None:
    """Write the outcomes as `.npz`, whole or not at all."""

    def write(temporary: Path) -> None:
        with temporary.open("wb") as file:
            np.savez_compressed(file, **outcomes(result))  # type: ignore[arg-type]

    write_atomically(path, write)


def load_outcomes(path: Path) -> Arrays:
    """Read what `save_outcomes` wrote.

    Raises:
        DataError: The file is missing, or does not hold outcomes.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = dict(file)
        images = len(arrays["index"])
        sound = all(arrays[name].dtype == bool for name in (SA.key, RA.key)) and "label" in arrays
        if not sound or any(array.shape != (images,) for array in arrays.values()):
            raise ValueError("arrays of the wrong shape or type")
    except (OSError, ValueError, KeyError, EOFError, TypeError, zipfile.BadZipFile) as error:
        raise DataError(
            f"{path} does not hold the outcomes of an evaluation image by image; evaluate the model again"
        ) from error
    return arrays
