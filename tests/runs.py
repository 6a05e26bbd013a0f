"""Training runs of four steps on digits that several test files start, stop, resume and compare."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from advmoe.config import AttackConfig, ModelConfig, TrainConfig
from advmoe.data.sources import Dataset
from advmoe.evaluation.accuracy import Evaluation
from advmoe.training.checkpoint import Checkpoint, load_checkpoint
from advmoe.training.loop import Trainer
from advmoe.training.run_folder import RunFolder

MODEL = ModelConfig(arch="vgg16", kind="moe", width=0.0625)
# 16 images in batches of 8 are 2 steps an epoch, 4 in all; 10 validation images under a short
# attack.
TRAIN = TrainConfig(
    dataset="digits",
    epochs=2,
    batch_size=8,
    limit_train=16,
    val_limit=10,
    val_attack=AttackConfig(eps=8 / 255, steps=1),
    flip=False,
)
STANDARD = dataclasses.replace(TRAIN, method="standard")
"""The same without attacks in training, where they do not matter."""


class Observer:
    """Notes what it is told; asks the trainer to stop, or fails, after a step."""

    def __init__(self, *, stop_after: int | None = None, fail_after: int | None = None) -> None:
        self.stop_after, self.fail_after = stop_after, fail_after
        self.trainer: Trainer | None = None
        self.steps: list[int] = []
        self.records: list[dict[str, Any]] = []
        self.warnings: list[str] = []
        self.advice: list[dict[str, object]] = []

    def started(self, epochs: int, steps_per_epoch: int, step: int) -> None:
        assert (epochs, steps_per_epoch) == (2, 2)

    def stepped(self, step: int, images: int, figures: dict[str, float]) -> None:
        self.steps.append(step)
        if step == self.fail_after:
            raise MemoryError
        if step == self.stop_after:
            assert self.trainer is not None
            self.trainer.request_stop()

    def validated(self, record: dict[str, Any]) -> None:
        self.records.append(record)

    def warned(self, message: str, **advice: object) -> None:
        self.warnings.append(message)
        self.advice.append(advice)


def train(
    dataset: Dataset,
    path: Path,
    config: TrainConfig = TRAIN,
    *,
    model: ModelConfig = MODEL,
    observer: Any = None,
    resume: Checkpoint | None = None,
    before: Callable[[Trainer], None] = lambda trainer: None,
    keep: int = 0,
    minutes: float = 10.0,
) -> bool:
    observer = observer or Observer()
    with RunFolder(path, keep=keep, minutes=minutes) as folder:
        trainer = Trainer(model, config, dataset, folder, device=torch.device("cpu"), observer=observer, resume=resume)
        observer.trainer = trainer
        before(trainer)
        return trainer.fit()


def resumed(dataset: Dataset, path: Path, config: TrainConfig = TRAIN, **more: Any) -> bool:
    return train(dataset, path, config, resume=load_checkpoint(path / "last.pt"), **more)


def contents(path: Path) -> dict[str, Any]:
    """Everything a run left that does not depend on the clock."""
    records = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
    found: dict[str, Any] = {"records": [{**record, "images_per_second": 0} for record in records]}
    if (path / "routes.npz").exists():
        found["routes"] = (path / "routes.npz").read_bytes()
    for name in ("last", "best"):
        checkpoint = load_checkpoint(path / f"{name}.pt")
        metrics = {**checkpoint.metrics, "images_per_second": 0}
        found[name] = dataclasses.replace(checkpoint, metrics=metrics)
    return found


def assert_identical(left: Any, right: Any, where: str = "") -> None:
    """Equal to the last bit, whatever they are nested in."""
    assert type(left) is type(right), where
    if isinstance(left, Tensor):
        assert left.dtype == right.dtype, where
        assert torch.equal(left, right), where
    elif dataclasses.is_dataclass(left):
        for field in dataclasses.fields(left):
            assert_identical(getattr(left, field.name), getattr(right, field.name), f"{where}.{field.name}")
    elif isinstance(left, dict):
        assert left.keys() == right.keys(), where
        for name in left:
            assert_identical(left[name], right[name], f"{where}.{name}")
    elif isinstance(left, list | tuple):
        assert len(left) == len(right), where
        for position, pair in enumerate(zip(left, right, strict=True)):
            assert_identical(*pair, f"{where}[{position}]")
    else:
        assert left == right, where


def scripted(*shares: float) -> Callable[..., Evaluation]:
    """An evaluation of ten images that finds these RAs, one after the other."""
    left = list(shares)

    def evaluate(model: nn.Module, images: object, attack: AttackConfig, *, seed: int, **_: object) -> Evaluation:
        nothing, number = np.zeros((10, 12), np.int64), np.arange(10)
        return Evaluation(number < 9, number < 10 * left.pop(0), attack, seed, nothing, nothing)

    return evaluate
