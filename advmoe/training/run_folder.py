"""What a run leaves in its folder.

`config.json`, `metrics.jsonl`, TensorBoard events, `routes.npz`, `last.pt` and `best.pt`.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from torch.utils.tensorboard import SummaryWriter

from advmoe.errors import ConfigError
from advmoe.files import write_atomically
from advmoe.training.checkpoint import Checkpoint, save_checkpoint


class RunFolder:
    """Writer of one run's folder. Use as a context manager, so that the TensorBoard file is closed."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._writer: SummaryWriter | None = None

    @property
    def last(self) -> Path:
        """Checkpoint to resume from."""
        return self.path / "last.pt"

    @property
    def best(self) -> Path:
        """Checkpoint with the best validation RA."""
        return self.path / "best.pt"

    @property
    def metrics(self) -> Path:
        """One JSON object per epoch."""
        return self.path / "metrics.jsonl"

    @property
    def routes(self) -> Path:
        """Route log of the last two epochs of an MoE-CNN (see `advmoe.routing_log`)."""
        return self.path / "routes.npz"

    def start(self, config: dict[str, Any]) -> None:
        """Begin a new run.

        Raises:
            ConfigError: the folder already holds a run.
        """
        if self.last.exists() or self.metrics.exists():
            raise ConfigError(f"{self.path} already holds a run; continue it or choose another folder", "resume", "out")
        self.path.mkdir(parents=True, exist_ok=True)
        text = json.dumps(config, indent=2) + "\n"
        write_atomically(self.path / "config.json", lambda temporary: temporary.write_text(text))

    def resume(self, epochs_done: int) -> None:
        """Go on after `epochs_done` epochs: what a crash left of later epochs, which no checkpoint has, is dropped."""
        if self.metrics.exists():
            text = "".join(self.metrics.read_text().splitlines(keepends=True)[:epochs_done])
            write_atomically(self.metrics, lambda temporary: temporary.write_text(text))

    def log(self, record: dict[str, Any]) -> None:
        """Append an epoch's record to the JSON lines and its scalars to TensorBoard."""
        with self.metrics.open("a") as file:
            file.write(json.dumps(record) + "\n")
        if self._writer is None:
            self._writer = SummaryWriter(str(self.path))
        for name, value in record.items():
            if isinstance(value, int | float):
                self._writer.add_scalar(name, value, record["epoch"])
            elif isinstance(value, list):
                for index, element in enumerate(value):
                    self._writer.add_scalar(f"{name}/{index}", element, record["epoch"])
        self._writer.flush()

    def save(self, checkpoint: Checkpoint, *, best: bool) -> None:
        """Write `last.pt`, and `best.pt` without the optimisers' state if these weights are the best so far."""
        if best:
            save_checkpoint(
                self.best,
                Checkpoint(
                    model=checkpoint.model,
                    weights=checkpoint.weights,
                    class_names=checkpoint.class_names,
                    train=checkpoint.train,
                    metrics=checkpoint.metrics,
                ),
            )
        save_checkpoint(self.last, checkpoint)

    def __enter__(self) -> RunFolder:
        return self

    def __exit__(self, *_: object) -> None:
        if self._writer is not None:
            self._writer.close()
