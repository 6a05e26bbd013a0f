"""The files of a run in its folder.

`config.json`, `metrics.jsonl`, TensorBoard events, `routes.npz`, `last.pt`, `best.pt`, and on
request the checkpoints of the last epochs, `epoch-NNNN.pt`. `skipped.jsonl`, if there were steps
that could not be taken.
"""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from advmoe.config import CHECKPOINT_MINUTES
from advmoe.errors import CheckpointError, ConfigError, DataError, TrainingError
from advmoe.files import FolderLock, remove_leftovers, write_atomically, write_text_atomically
from advmoe.run_paths import BEST, DATA, LAST, RUN_FILE
from advmoe.training.checkpoint import Checkpoint, load_checkpoint, save_checkpoint
from advmoe.training.events import EventLog
from advmoe.training.routing_history import RoutingHistory


class RunFolder:
    """Writer of one run's folder. Use as a context manager: one process at a time may hold a folder.

    Args:
        path: Folder of the run.
        keep: Number of last epochs whose checkpoints are kept beside `last.pt`.
        minutes: Minutes between checkpoints in mid-epoch.
    """

    def __init__(self, path: Path, *, keep: int = 0, minutes: float = CHECKPOINT_MINUTES) -> None:
        self.path = path
        self.minutes = minutes
        self._keep = keep
        self._lock = FolderLock(path)
        self._events = EventLog(path, first_step=1, settings={})

    @property
    def config(self) -> Path:
        """Settings of the model and its training."""
        return self.path / "config.json"

    @property
    def last(self) -> Path:
        """Checkpoint to resume from."""
        return self.path / LAST

    @property
    def best(self) -> Path:
        """Checkpoint of the best epoch."""
        return self.path / BEST

    @property
    def metrics(self) -> Path:
        """One JSON object per epoch."""
        return self.path / "metrics.jsonl"

    @property
    def skipped(self) -> Path:
        """One JSON object per update that was not made, because it was not finite: its step, level and images."""
        return self.path / "skipped.jsonl"

    @property
    def routes(self) -> Path:
        """Route log of the last two epochs of an MoE-CNN (see `advmoe.routing_log`)."""
        return self.path / "routes.npz"

    @property
    def begun(self) -> bool:
        """Whether the folder holds a run with at least one step, or a checkpoint that cannot be read."""
        if not self.last.exists():
            return self.best.exists()
        try:
            return bool(load_checkpoint(self.last).progress.get("step", 1))
        except CheckpointError:
            return True

    def start(self, config: dict[str, Any], checkpoint: Checkpoint) -> None:
        """Start a new run with a checkpoint of step 0, so that the run can be resumed from any point.

        A run that stopped before its first step is started again.

        Raises:
            ConfigError: The folder already holds a run, or another process writes to it.
        """
        if self.begun:
            raise ConfigError(f"{self.path} already holds a run; continue it or choose another folder", "resume", "out")
        if (other := self._file_of_others()) is not None:
            raise ConfigError(f"{other} is not of a run, which would replace it; choose another folder", "out")
        self.path.mkdir(parents=True, exist_ok=True)
        self._lock.acquire()
        self._remove_leftovers()
        for path in (self.metrics, self.skipped, self.routes):
            path.unlink(missing_ok=True)
        write_text_atomically(self.config, json.dumps(config, indent=2) + "\n")
        self._events = EventLog(self.path, first_step=1, settings=config)
        save_checkpoint(self.last, checkpoint)

    def _file_of_others(self) -> Path | None:
        """A file that a run would replace, in a folder that holds no run."""
        if self.last.exists() or _is_of_run(self.config):  # the config is written before the first checkpoint
            return None
        names = (self.config, self.metrics, self.skipped, self.routes, self.path / RUN_FILE, self.path / DATA)
        return next((path for path in names if path.exists()), None)

    def resume(self, config: dict[str, Any], epochs_done: int, steps_done: int) -> None:
        """Continue after this number of epochs and steps. Later records, which a crash left without
        a checkpoint, are dropped, and so are lines that a crash cut.
        """
        self._lock.acquire()
        self._remove_leftovers()
        self._events = EventLog(self.path, first_step=steps_done + 1, settings=config)
        lines = self.metrics.read_text(encoding="utf-8").splitlines(keepends=True) if self.metrics.exists() else []
        kept = [line for line in lines if line.endswith("\n")][:epochs_done]
        if kept != lines:
            write_text_atomically(self.metrics, "".join(kept))
        if self.skipped.exists():
            lines = self.skipped.read_text(encoding="utf-8").splitlines(keepends=True)
            kept = [line for line in lines if line.endswith("\n") and json.loads(line)["step"] <= steps_done]
            write_text_atomically(self.skipped, "".join(kept))

    def note_skipped(self, updates: Sequence[dict[str, Any]]) -> None:
        """Append skipped updates to `skipped.jsonl`.

        Raises:
            TrainingError: The disk is full, or the folder cannot be written to any more.
        """
        with self._writing(self.skipped):
            _append(self.skipped, updates)

    def log(self, record: dict[str, Any], pictures: Mapping[str, NDArray[np.uint8]]) -> None:
        """Append an epoch's record to the JSON lines, and its numbers and pictures to TensorBoard.

        Raises:
            TrainingError: The disk is full, or the folder cannot be written to any more.
        """
        with self._writing(self.metrics):
            _append(self.metrics, [record])
            self._events.add(record["step"], record, pictures)

    def save(
        self, checkpoint: Checkpoint, routing: RoutingHistory, *, best: bool = False, epoch: int | None = None
    ) -> None:
        """Write `routes.npz`, `last.pt`, and `best.pt` without the optimizers' state if these weights are the best.

        Args:
            checkpoint: The checkpoint to save.
            routing: The route log of the run.
            best: Whether this is the best epoch so far.
            epoch: The epoch that has just ended, or None in the middle of one.

        Raises:
            TrainingError: The disk is full, or the folder cannot be written to any more.
        """
        with self._writing(self.last):
            routing.save(self.routes)
            if best:
                save_checkpoint(
                    self.best, dataclasses.replace(checkpoint, progress={}, optimizers=[], training_weights=None)
                )
            save_checkpoint(self.last, checkpoint)
            if epoch is not None and self._keep:
                self._keep_epoch(epoch)

    def _keep_epoch(self, epoch: int) -> None:
        """Give `last.pt` a second name, which remains after the next checkpoint replaces `last.pt`."""
        kept = self.path / f"epoch-{epoch:04}.pt"
        kept.unlink(missing_ok=True)
        try:
            kept.hardlink_to(self.last)
        except OSError:  # a file system without links
            write_atomically(kept, lambda temporary: shutil.copyfile(self.last, temporary))
        number_of = {path: path.stem.removeprefix("epoch-") for path in self.path.glob("epoch-*.pt")}
        numbered = sorted((int(number), path) for path, number in number_of.items() if number.isdecimal())
        for _, old in numbered[: -self._keep]:
            old.unlink()

    @contextmanager
    def _writing(self, path: Path) -> Iterator[None]:
        try:
            yield
        except (OSError, DataError) as error:
            reason = str(error)
            if isinstance(error, OSError):
                reason = f"cannot write {error.filename or path}: {error.strerror}"
            raise TrainingError(
                f"{reason}; {self.last} holds the run up to its last checkpoint: make room, then resume it", "resume"
            ) from error

    def _remove_leftovers(self) -> None:
        remove_leftovers(
            self.path,
            (path.name for path in (self.config, self.metrics, self.skipped, self.routes, self.last, self.best)),
        )

    def __enter__(self) -> RunFolder:
        if self.path.is_dir():
            self._lock.acquire()
        return self

    def __exit__(self, *_: object) -> None:
        self._lock.release()


def _is_of_run(config: Path) -> bool:
    """Whether a file is the `config.json` of a run."""
    try:
        stored = json.loads(config.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(stored, dict) and set(stored) == {"model", "train"}


def _append(path: Path, records: Sequence[dict[str, Any]]) -> None:
    """Append records to a file of JSON lines, and wait until they are on the disk, as checkpoints are."""
    with path.open("a") as file:
        file.write("".join(json.dumps(record) + "\n" for record in records))
        file.flush()
        os.fsync(file.fileno())
