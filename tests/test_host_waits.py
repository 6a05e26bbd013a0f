"""Waits of the host for the device in training: their number, and equal results with late reading."""

import dataclasses
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from runs import MODEL, assert_identical, contents, train
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from advmoe.config import TrainConfig
from advmoe.data.loader import Batch
from advmoe.data.sources import Dataset
from advmoe.device import read
from advmoe.models.registry import build_model
from advmoe.seeding import generator_for
from advmoe.training import loop
from advmoe.training.average import WeightAverage
from advmoe.training.levels import make_levels
from advmoe.training.methods import METHODS

ANSWERS = {
    "_local_scalar_dense",
    "nonzero",
    "bincount",
    "_unique2",
    "unique_consecutive",
    "unique_dim",
    "masked_select",
}
"""Operators whose result, or its shape, the host has to wait for."""
COPIES = {torch.Tensor.cpu, torch.Tensor.numpy}


class Operators(TorchDispatchMode):
    """Counts operators for whose result the host would wait."""

    def __init__(self, waits: Counter[str]) -> None:
        super().__init__()
        self.waits = waits

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        masks = name in {"index", "index_put", "index_put_", "_unsafe_index"} and any(
            index is not None and index.dtype in (torch.bool, torch.uint8) for index in args[1]
        )
        if name in ANSWERS or masks:
            self.waits[name] += 1
        return func(*args, **(kwargs or {}))


class OnGpu(TorchFunctionMode):
    """Tensors say that they are on a GPU; copies to the CPU, which would be none here, are counted."""

    def __init__(self, waits: Counter[str]) -> None:
        super().__init__()
        self.waits = waits

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func == torch.Tensor.is_cuda.__get__:  # type: ignore[attr-defined]
            return True
        if func == torch.Tensor.is_cpu.__get__:  # type: ignore[attr-defined]
            return False
        if func in COPIES:
            self.waits[func.__name__] += 1
        return func(*args, **(kwargs or {}))


@contextmanager
def counted() -> Iterator[Counter[str]]:
    waits: Counter[str] = Counter()
    with OnGpu(waits), Operators(waits):
        yield waits


def stepper(kind: str, settings: dict[str, Any], device: torch.device) -> Callable[[int], Any]:
    torch.manual_seed(0)
    model = build_model(dataclasses.replace(MODEL, kind=kind)).to(device)  # type: ignore[arg-type]
    config = TrainConfig(dataset="digits", batch_size=8, **settings)
    method = METHODS[config.method]
    levels = make_levels(method.levels, model, config)
    images = torch.rand(8, 3, 32, 32, generator=torch.Generator().manual_seed(1)).to(device)
    batch = Batch(images, torch.arange(8, device=device), torch.arange(8))

    def step(i: int) -> Any:
        noise = [generator_for(0, i, level, device=device) for level in range(len(levels))]
        return method.step(levels, [batch] * len(levels), config, noise, i)

    return step


SETTINGS: dict[str, tuple[str, dict[str, Any]]] = {
    "advmoe": ("moe", {"method": "advmoe"}),
    "a share of the batch": ("moe", {"method": "advmoe", "router_step": "reuse", "router_share": 0.5}),
    "bf16, perturbed weights": ("moe", {"method": "at", "precision": "bf16", "awp": 0.005}),
    "attack through the routers": ("moe", {"method": "at", "attack_routing": "mixture"}),
    "s_dense": ("s_dense", {"method": "at", "loss": "pgd_at"}),
}


@pytest.mark.parametrize("name", SETTINGS)
def test_a_step_never_waits_for_the_device(name: str) -> None:
    step = stepper(*SETTINGS[name], torch.device("cpu"))
    step(0)  # tables that are made once
    with counted() as waits:
        step(1)
    assert not waits, f"the host waited: {dict(waits)}"


def test_an_average_of_the_weights_never_waits() -> None:
    model = build_model(MODEL)
    average = WeightAverage(model, 0.9)
    with counted() as waits:
        average.update()
        average.update()
    assert not waits, f"the host waited: {dict(waits)}"


def test_the_count_sees_what_waits() -> None:
    x = torch.rand(4)
    with counted() as waits:
        assert x.is_cuda
        x[x > 2]
        x.max().item()
        if x.sum() > 9:
            x.nonzero()
        x.cpu()
        torch.tensor([1, 2]).bincount()
    assert waits == {"index": 1, "_local_scalar_dense": 2, "cpu": 1, "bincount": 1}


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("name", SETTINGS)
def test_a_step_never_waits_for_a_gpu(name: str) -> None:
    step = stepper(*SETTINGS[name], torch.device("cuda", 0))
    for i in range(2):
        step(i)
    try:
        with warnings.catch_warnings(action="ignore"):  # torch warns once that this is a prototype
            torch.cuda.set_sync_debug_mode("error")
        step(2)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_a_run_that_reads_late_is_the_same_to_the_bit(
    digits: Dataset, whole_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    readings: list[int] = []
    monkeypatch.setattr(loop, "_reads_at_once", lambda _: False)
    monkeypatch.setattr(loop, "read", lambda values: (readings.append(len(values)), read(values))[1])
    assert train(digits, tmp_path / "late")
    assert_identical(contents(tmp_path / "late"), contents(whole_run))
    # An epoch has 2 steps, fewer than 50: at its end come clean and attacked routes, with labels and
    # whether the step was taken, and the sums; saving finds the sums alone left to read.
    assert readings == [2 * 2 * 3 + 1, 1] * 2
