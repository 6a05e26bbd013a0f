"""A few test images and their attacked versions, to look at."""

from __future__ import annotations

import zipfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from advmoe.attacks.untargeted import untargeted
from advmoe.attacks.victims import Victims
from advmoe.config import AttackConfig
from advmoe.data.loader import BatchLoader
from advmoe.data.sets import ImageSet
from advmoe.evaluation.precision import full_precision
from advmoe.evaluation.results import PGD, SuiteResult
from advmoe.evaluation.state import Arrays
from advmoe.files import write_atomically
from advmoe.models.modes import evaluating

SHOWN = 6
"""Number of images: half of them broken by PGD, half not, as far as such images exist."""


def examples(model: nn.Module, images: ImageSet, result: SuiteResult) -> Arrays:
    """Clean images that the model classifies correctly, and their versions after PGD.

    Returns:
        `clean` and `attacked` [n, H, W, 3] uint8, `difference` [n, H, W, 3] in levels of 255,
        `label`, and `before` and `after`, the predictions.
    """
    right, robust = result.arrays["right"], result.robust([PGD])
    broken, kept = (right & ~robust).nonzero()[0], (right & robust).nonzero()[0]
    rows = np.sort(np.concatenate([broken[: SHOWN - min(len(kept), SHOWN // 2)], kept])[:SHOWN])
    if not len(rows):
        return {}
    shown = attack_some(model, images, rows, result.config.attack, seed=result.seed, numbers=result.arrays["index"])
    return {
        "clean": shown.clean,
        "attacked": shown.attacked,
        "difference": shown.difference,
        "label": images.labels[rows],
        "before": result.arrays["prediction/clean"][rows],
        "after": shown.predicted,
        "class_names": np.array(images.class_names),
    }


@dataclass(frozen=True, kw_only=True)
class Attacked:
    """Images before and after an attack."""

    clean: NDArray[np.uint8]
    """[n, H, W, 3]"""
    attacked: NDArray[np.uint8]
    """[n, H, W, 3]"""
    difference: NDArray[np.float32]
    """[n, H, W, 3], in levels of 255."""
    predicted: NDArray[np.int64]
    """[n], the classes that the model finds after the attack."""


def attack_some(
    model: nn.Module,
    images: ImageSet,
    rows: NDArray[np.int64],
    attack: AttackConfig,
    *,
    seed: int,
    numbers: NDArray[np.int64] | None = None,
) -> Attacked:
    """Attack a few images, as the evaluation of all images with that seed and these numbers attacks them."""
    (batch,) = BatchLoader(images, batch_size=len(rows), indices=rows).epoch(0)
    with evaluating(model), full_precision(model):
        victims = Victims.of(model, batch, attack, seed=seed, numbers=numbers)
        found, _ = untargeted(victims)
        with torch.no_grad():
            after = model(found).argmax(dim=1)
    clean = (255 * victims.images).permute(0, 2, 3, 1).cpu()
    attacked = (255 * found).permute(0, 2, 3, 1).cpu()
    return Attacked(
        clean=clean.round().byte().numpy(),
        attacked=attacked.round().byte().numpy(),
        difference=(attacked - clean).numpy().astype(np.float32),
        predicted=after.cpu().numpy(),
    )


def load_examples(path: Path) -> Arrays:
    """Read the file of `save_examples`; the result is empty if it cannot be read, or holds something else."""
    try:
        with np.load(path, allow_pickle=False) as file:
            found = dict(file)
    except (OSError, ValueError, EOFError, zipfile.BadZipFile):
        return {}
    return found if _are_examples(found) else {}


def _are_examples(found: Arrays) -> bool:
    """Whether arrays have the form that `examples` gives them."""
    kinds = {"clean": "u", "attacked": "u", "difference": "f", "label": "iu", "before": "iu", "after": "iu"}
    if set(found) != {*kinds, "class_names"} or found["class_names"].dtype.kind != "U":
        return False
    if any(found[name].dtype.kind not in kind for name, kind in kinds.items()):
        return False
    images, classes = [found[name] for name in kinds][:3], [found[name] for name in kinds][3:]
    shape, known = images[0].shape, len(found["class_names"])
    return (
        len(shape) == 4
        and shape[3] == 3
        and all(image.shape == shape for image in images)
        and all(numbers.shape == shape[:1] and ((numbers >= 0) & (numbers < known)).all() for numbers in classes)
    )


def save_examples(path: Path, model: nn.Module, images: ImageSet, result: SuiteResult) -> None:
    """Write the examples as `.npz`, whole or not at all."""
    arrays = examples(model, images, result)

    def write(temporary: Path) -> None:
        with temporary.open("wb") as file:
            np.savez_compressed(file, **arrays)  # type: ignore[arg-type]

    write_atomically(path, write)
