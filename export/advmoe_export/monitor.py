"""Compare the load of the experts for served images with the load at export.

A shift means that the served images differ from the images of the export, or that somebody
influences the routing on purpose. A shift is visible without labels.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from advmoe_export.errors import InputError
from advmoe_export.metadata import ModelMetadata
from advmoe_export.session import Prediction

CONDITION = ("served", 0)
"""Condition of predictions in a route log."""
UNKNOWN_LABEL = -1


class RouteSink(Protocol):
    """A store of pathways by image, such as `advmoe.rust_router.RouteLog`."""

    def append(
        self,
        condition: tuple[str, int],
        indices: npt.NDArray[np.int64],
        experts: npt.NDArray[np.uint8],
        labels: npt.NDArray[np.int32],
        predictions: npt.NDArray[np.int32],
    ) -> Any:
        """Add a batch of pathways [B, L]."""


@dataclass(frozen=True, kw_only=True)
class LayerDrift:
    """The expert load of one MoE layer at export and for served images."""

    layer: str
    recorded: tuple[float, ...]
    """Share of images per expert at export."""
    served: tuple[float, ...]
    """Share of the served images per expert."""
    distance: float
    """Half the sum of absolute differences: the share of images that changed the expert, 0 ... 1."""
    noise: float
    """Expected distance if nothing has changed, because the numbers of images, at export and served, are finite."""


class RouteMonitor:
    """Counts the experts that predictions used.

    Args:
        metadata: metadata of a file that was exported with images and therefore has an expert load.
        log: optional store of every pathway, for example
            `advmoe.rust_router.RouteLog(metadata.num_experts)`.
        window: number of most recent images to compare, in whole batches. The default is all images
            since the creation of the monitor.

    Raises:
        InputError: the metadata have no expert load, or the window is below 1.
    """

    def __init__(self, metadata: ModelMetadata, *, log: RouteSink | None = None, window: int | None = None) -> None:
        if metadata.expert_load is None:
            raise InputError("this file has no recorded expert load to compare with; export it again with images")
        if window is not None and window < 1:
            raise InputError(f"expected a window of at least 1 image, got {window}; leave it out to compare all images")
        self._layers = metadata.layers
        self._recorded = metadata.expert_load
        self._recorded_images = metadata.expert_load_images
        self._counts = [np.zeros(count, np.int64) for count in metadata.num_experts]
        self._log = log
        self._window = window
        self._recent: deque[tuple[int, list[npt.NDArray[np.int64]]]] = deque()
        self.images = 0
        """Number of images recorded so far."""
        self.compared = 0
        """Number of images that `drift` compares."""

    def record(self, prediction: Prediction) -> None:
        """Count a prediction.

        Raises:
            InputError: the prediction has no pathway, or it belongs to another model.
        """
        pathway = prediction.pathway
        if pathway is None or pathway.shape[1] != len(self._counts):
            given = "none" if pathway is None else f"{pathway.shape[1]}"
            raise InputError(
                f"expected a pathway of {len(self._counts)} layers, got {given}; use predictions of this model"
            )
        batch = [
            np.bincount(column, minlength=len(counts)) for column, counts in zip(pathway.T, self._counts, strict=True)
        ]
        for layer, counts, added in zip(self._layers, self._counts, batch, strict=True):
            if len(added) > len(counts):
                raise InputError(
                    f"expected experts 0 to {len(counts) - 1} in layer '{layer}', got expert {len(added) - 1}; "
                    "use predictions of this model"
                )
        for counts, added in zip(self._counts, batch, strict=True):
            counts += added
        self.compared += len(pathway)
        if self._window is not None:
            self._recent.append((len(pathway), batch))
            self._forget(self._window)
        if self._log is not None:
            self._log.append(
                CONDITION,
                np.arange(self.images, self.images + len(pathway)),
                pathway.astype(np.uint8),
                np.full(len(pathway), UNKNOWN_LABEL, np.int32),
                prediction.logits.argmax(axis=1).astype(np.int32),
            )
        self.images += len(pathway)

    def _forget(self, window: int) -> None:
        """Remove the oldest batches from the counts while the others fill the window."""
        while self.compared - self._recent[0][0] >= window:
            images, batch = self._recent.popleft()
            self.compared -= images
            for counts, removed in zip(self._counts, batch, strict=True):
                counts -= removed

    def drift(self) -> list[LayerDrift]:
        """The drift of all layers, in descending order of distance; nothing before the first image."""
        if not self.compared:
            return []
        # The variance of a difference of shares, over p (1 - p). Earlier files do not give the images of the export.
        variance = 1 / self.compared + (1 / self._recorded_images if self._recorded_images else 0)
        found = []
        for layer, recorded, counts in zip(self._layers, self._recorded, self._counts, strict=True):
            expected, served = np.array(recorded), counts / self.compared
            # E|x - y| of two binomial shares, by their normal approximation
            spread = np.sqrt(2 / np.pi * expected * (1 - expected) * variance)
            found.append(
                LayerDrift(
                    layer=layer,
                    recorded=tuple(recorded),
                    served=tuple(float(share) for share in served),
                    distance=float(np.abs(served - expected).sum() / 2),
                    noise=float(spread.sum() / 2),
                )
            )
        return sorted(found, key=lambda drift: -drift.distance)
