"""Progress bars on stderr for long work."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, TextColumn, TimeRemainingColumn
from rich.progress import Task as ProgressTask
from rich.text import Text

from advmoe.cli import console
from advmoe.cli.options import flag
from advmoe.reports.training import robust_accuracy


class ImagesPerSecond(ProgressColumn):
    """Speed in images, from the task's speed in steps."""

    def render(self, task: ProgressTask) -> Text:
        """E.g. `1234 images/s`."""
        speed = (task.speed or 0.0) * task.fields.get("images", 1)
        return Text(f"{speed:.0f} images/s")


SECONDS_BETWEEN_LINES = 30.0
"""Without a terminal, training prints its progress at this interval, in seconds."""


class TrainingProgress:
    """Shows a training run: one bar over all its steps, one line per epoch; in a log file, lines instead of the bar."""

    def __init__(self) -> None:
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[figures]}"),
            ImagesPerSecond(),
            TimeRemainingColumn(),
            console=console.err,
        )
        self._steps_per_epoch = 1
        self._epochs = 1
        self._next_line = 0.0

    def __enter__(self) -> TrainingProgress:
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def started(self, epochs: int, steps_per_epoch: int, step: int) -> None:
        """See `advmoe.training.loop.Observer`."""
        self._epochs, self._steps_per_epoch = epochs, steps_per_epoch
        self._task = self._progress.add_task(
            "training",
            total=epochs * steps_per_epoch,
            completed=step,
            figures="",
            images=0,
            visible=step < epochs * steps_per_epoch,
        )

    def stepped(self, step: int, images: int, figures: dict[str, float]) -> None:
        """Advance the bar."""
        shown = f"train loss {figures['loss']:.3f} SA {figures['sa']:.1f}" if figures else "no step taken yet"
        if "ra" in figures:
            shown += f" RA {figures['ra']:.1f}"
        epoch = (step - 1) // self._steps_per_epoch + 1
        self._progress.update(
            self._task,
            completed=step,
            figures=shown,
            images=images,
            description=f"epoch {epoch}/{self._epochs}",
        )
        now = time.monotonic()
        if not console.err.is_terminal and now >= self._next_line:
            self._next_line = now + SECONDS_BETWEEN_LINES
            left = self._progress.tasks[0].time_remaining
            eta = "" if left is None else f", {timedelta(seconds=round(left))} left"
            of = self._epochs * self._steps_per_epoch
            self._progress.console.print(
                f"epoch {epoch}/{self._epochs}, step {step}/{of}: {shown}{eta}", highlight=False
            )

    def validated(self, record: dict[str, Any]) -> None:
        """Print the epoch's line."""
        line = (
            f"epoch {record['epoch']}/{self._epochs}: training loss {record['train_loss']:.3f}, "
            f"validation SA {record['val_sa']:.2f} RA {robust_accuracy(record):.2f}, "
            f"{record['images_per_second']:.0f} images/s"
        )
        if record.get("router_entropy"):
            entropies = record["router_entropy"]
            line += f", router entropy {min(entropies):.2f}..{max(entropies):.2f}"
        self._progress.console.print(line, highlight=False)

    def warned(self, message: str, **advice: Any) -> None:
        """Print a warning, and the options that give the settings it advises."""
        options = ", ".join(flag(name) if value is None else f"{flag(name)} {value}" for name, value in advice.items())
        console.warn(f"{message} ({options})" if options else message)


@contextmanager
def suite_progress(model: str, total: int) -> Iterator[Callable[[float, int, str], None]]:
    """A progress bar over images, with the model, the current attack and the remaining time. In a
    log file, one line for each stage.
    """
    with Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[what]}"),
        TimeRemainingColumn(),
        console=console.err,
        transient=True,
        disable=not console.err.is_terminal,
    ) as progress:
        task = progress.add_task(f"evaluating {escape(model)}", total=total, what="")

        def update(done: float, total: int, what: str) -> None:
            progress.update(task, completed=done, what=what)
            if what and not console.err.is_terminal:
                console.note(f"{model}: {done:.0f}/{total} images, {what}")

        yield update


@contextmanager
def data_progress() -> Iterator[Callable[[str, int, int], None]]:
    """A bar for reading or fetching a data set."""
    with Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        console=console.err,
        transient=True,
        disable=not console.err.is_terminal,
    ) as progress:
        tasks: dict[str, Any] = {}

        def update(what: str, done: int, total: int) -> None:
            if what not in tasks:
                tasks[what] = progress.add_task(escape(what), total=total)
            progress.update(tasks[what], completed=done, total=total)

        yield update
