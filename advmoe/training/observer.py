"""The messages of a run to its observer."""

from __future__ import annotations

from typing import Any, Protocol


class Observer(Protocol):
    """An observer of a run. All methods are called from the training thread."""

    def started(self, epochs: int, steps_per_epoch: int, step: int) -> None:
        """Training starts or resumes at global step `step`."""

    def stepped(self, step: int, images: int, figures: dict[str, float]) -> None:
        """A step ended; it processed `images`.

        `figures` are the means of the epoch up to the last reading; empty before the first one (on
        a GPU).
        """

    def validated(self, record: dict[str, Any]) -> None:
        """An epoch ended; `record` is its entry in the log."""

    def warned(self, message: str, **advice: Any) -> None:
        """A problem occurred that does not stop the run.

        `advice` are settings that would help, by name, with the value to try, or None if there is no one value.
        """


class Unwatched:
    """An observer that does nothing, for all ranks but the first."""

    def started(self, epochs: int, steps_per_epoch: int, step: int) -> None:
        """See `Observer`."""

    def stepped(self, step: int, images: int, figures: dict[str, float]) -> None:
        """See `Observer`."""

    def validated(self, record: dict[str, Any]) -> None:
        """See `Observer`."""

    def warned(self, message: str, **advice: Any) -> None:
        """See `Observer`."""
