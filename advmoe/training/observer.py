"""What a run tells whoever watches it."""

from __future__ import annotations

from typing import Any, Protocol


class Observer(Protocol):
    """Whoever wants to watch a run. All methods are called from the training thread."""

    def started(self, epochs: int, steps_per_epoch: int, step: int) -> None:
        """Training begins, or goes on, at global step `step`."""

    def stepped(self, step: int, images: int, figures: dict[str, float]) -> None:
        """A step is done; `images` were processed in it.

        `figures` are the means of the epoch up to the last reading; empty before the first one (on a GPU).
        """

    def validated(self, record: dict[str, Any]) -> None:
        """An epoch is done; `record` is what went into the log."""

    def warned(self, message: str) -> None:
        """Something is wrong that does not stop the run."""


class Unwatched:
    """Nobody watches: all ranks but the first."""

    def started(self, epochs: int, steps_per_epoch: int, step: int) -> None:
        """See `Observer`."""

    def stepped(self, step: int, images: int, figures: dict[str, float]) -> None:
        """See `Observer`."""

    def validated(self, record: dict[str, Any]) -> None:
        """See `Observer`."""

    def warned(self, message: str) -> None:
        """See `Observer`."""
