"""Compare the experts that served traffic uses with the load recorded at export.

A shift means that the traffic differs from the images the model was verified with, or that somebody
steers it. It shows before any label is known.
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
"""Under which predictions are written to a route log."""
UNKNOWN_LABEL = -1


class RouteSink(Protocol):
    """Where pathways are kept image by image; `advmoe.rust_router.RouteLog` is one."""

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
    """One MoE layer's expert load, served against recorded."""

    layer: str
    recorded: tuple[float, ...]
    """Share of images per expert at export."""
    served: tuple[float, ...]
    """Share of the served images per expert."""
    distance: float
    """Half the sum of absolute differences: the share of images that would have to move, 0 ... 1.
    """
    noise: float
    """Distance to be expected from the number of served images alone if nothing had changed."""


class RouteMonitor:
    """Counts the experts that predictions used.

    Args:
        metadata: of the exported file; it must have been exported with images, which recorded its
            load.
        log: where to keep every pathway besides, for example an
            `advmoe.rust_router.RouteLog(metadata.num_experts)`.

        window: compare the last so many images, in whole batches; by default all since the monitor
            was made.

    Raises:
        InputError: the file has no recorded load.
    """

    def __init__(self, metadata: ModelMetadata, *, log: RouteSink | None = None, window: int | None = None) -> None:
        if metadata.expert_load is None:
            raise InputError("this file has no recorded expert load to compare with; export it again with images")
        self._layers = metadata.layers
        self._recorded = metadata.expert_load
        self._counts = [np.zeros(count, np.int64) for count in metadata.num_experts]
        self._log = log
        self._window = window
        self._recent: deque[tuple[int, list[npt.NDArray[np.int64]]]] = deque()
        self.images = 0
        """Images recorded so far."""
        self.compared = 0
        """Images that `drift` compares."""

    def record(self, prediction: Prediction) -> None:
        """Count a prediction.

        Raises:
            InputError: it has no pathway, or one of another model.
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
        """Take the oldest batches out of the counts while the others fill the window."""
        while self.compared - self._recent[0][0] >= window:
            images, batch = self._recent.popleft()
            self.compared -= images
            for counts, removed in zip(self._counts, batch, strict=True):
                counts -= removed

    def drift(self) -> list[LayerDrift]:
        """All layers, the one that moved most first."""
        found = []
        for layer, recorded, counts in zip(self._layers, self._recorded, self._counts, strict=True):
            expected, served = np.array(recorded), counts / max(self.compared, 1)
            # E|x - p| of a binomial share, by its normal approximation
            spread = np.sqrt(2 / np.pi * expected * (1 - expected) / max(self.compared, 1))
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
