"""Splits a validation set off a training set: stratified, and equal for equal seeds on any machine."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from advmoe.errors import ConfigError


def split_validation(
    labels: NDArray[np.integer], *, fraction: float | None = None, size: int | None = None, seed: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Split row numbers into ``(train, validation)``. Both are sorted; every row is in exactly one of them.

    Give either ``fraction`` (in (0, 1), of all rows) or ``size`` (rows). Each class contributes in
    proportion to its size and keeps at least one training image; the classes with the largest
    remainders get the rows that rounding leaves. The choice of rows depends on ``seed`` and the
    labels only. It uses the bit stream of Philox, which is fixed; NumPy's shuffles may change
    between versions.

    Raises:
        ConfigError: A class would lose its last training image, or no image would be held out.
    """
    total = len(labels)
    if (fraction is None) == (size is None):
        raise ConfigError("a validation split needs either fraction= or size=, and not both")
    if fraction is not None:
        if not 0 < fraction < 1:
            raise ConfigError(f"the validation fraction must lie between 0 and 1, not {fraction}")
        size = round(fraction * total)
    assert size is not None
    if seed < 0:
        raise ConfigError(f"the seed of a validation split must be 0 or more, not {seed}")
    _, class_of_row, class_sizes = np.unique(labels, return_inverse=True, return_counts=True)
    most = total - len(class_sizes)
    if most < 1:
        raise ConfigError(
            f"cannot hold images out for validation: {total} images are one for each of the {len(class_sizes)} "
            "classes, and each class keeps a training image; add images"
        )
    if not 1 <= size <= most:
        raise ConfigError(
            f"cannot hold {size} of {total} images out for validation: the size must be 1..{most},"
            f" so that each of the {len(class_sizes)} classes keeps a training image",
            *(() if fraction is None else ("val_fraction",)),
        )

    # The smallest draws of each class are held out, so rows sorted by (class, draw) hold them at
    # each class's start.
    draws = np.random.Philox(key=seed).random_raw(total)
    order = np.lexsort((draws, class_of_row))
    rank_in_class = np.arange(total) - np.repeat(np.cumsum(class_sizes) - class_sizes, class_sizes)
    held_out = rank_in_class < np.repeat(_quotas(class_sizes, size), class_sizes)
    return np.sort(order[~held_out]), np.sort(order[held_out])


def _quotas(class_sizes: NDArray[np.int64], size: int) -> NDArray[np.int64]:
    """Number of validation images of each class: proportional to its size, with sum ``size``, and
    never the whole class.
    """
    exact = class_sizes * size / class_sizes.sum()
    quotas: NDArray[np.int64] = np.floor(exact).astype(np.int64)  # below the class size, as size < all images
    by_remainder = np.argsort(-(exact - quotas), kind="stable")
    while (missing := size - int(quotas.sum())) > 0:
        open_classes = by_remainder[quotas[by_remainder] < class_sizes[by_remainder] - 1]
        quotas[open_classes[:missing]] += 1
    return quotas
