"""Count how many compared images each expert of each MoE layer computed.

Shape suffixes: B batch, L MoE layers.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import numpy as np
import numpy.typing as npt

from advmoe_export.metadata import ModelMetadata

NAMED_LAYERS = 5
"""Largest number of layers that a warning names."""

Counts = Mapping[str, tuple[int, ...]]
"""Number of images by layer and expert. A layer that routes tokens counts tokens."""


class Coverage:
    """The images that each expert computed. Repeated images count each time."""

    def __init__(self, metadata: ModelMetadata) -> None:
        # The tokens of a layer, which have a column each, share its experts.
        self._layers = [name.partition("[")[0] for name in metadata.layers]
        self._counts = {
            layer: np.zeros(count, np.int64) for layer, count in zip(self._layers, metadata.num_experts, strict=True)
        }

    def add(self, expert_index: npt.NDArray[np.int64]) -> None:
        """Count images with these decisions [B, L]."""
        for layer, column in zip(self._layers, expert_index.T, strict=True):
            self._counts[layer] += np.bincount(column, minlength=len(self._counts[layer]))

    @property
    def counts(self) -> Counts:
        """The number of images."""
        return {layer: tuple(counts.tolist()) for layer, counts in self._counts.items()}


def least(several: Iterable[Coverage]) -> Counts:
    """The smallest number of images in any of several runs over the same batches."""
    runs = [each.counts for each in several]
    return {layer: tuple(map(min, zip(*(run[layer] for run in runs), strict=True))) for layer in runs[0]}


def warn_of_gaps(counts: Counts) -> tuple[str, ...]:
    """One sentence that names the experts without an image, or none."""
    gaps = {layer: [expert for expert, count in enumerate(own) if not count] for layer, own in counts.items()}
    named = [f"{', '.join(map(str, experts))} of '{layer}'" for layer, experts in gaps.items() if experts]
    if not named:
        return ()
    further = f" and of {len(named) - NAMED_LAYERS} more layers" if len(named) > NAMED_LAYERS else ""
    return (
        f"no compared image reached these experts, so the file was not compared with the module there: "
        f"{'; '.join(named[:NAMED_LAYERS])}{further}; compare on more images",
    )
