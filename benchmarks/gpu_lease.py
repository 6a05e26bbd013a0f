"""What a short lease of a GPU should show, step by step. Each step's figures are a file; a step that has one is done.

Run it again after an interruption and it goes on. `gpu_lease.sh` runs each step under a limit of ten minutes.

    python benchmarks/gpu_lease.py --out results/gpu          # all steps but the long trainings
    python benchmarks/gpu_lease.py --out results/gpu --list   # their names
    python benchmarks/gpu_lease.py --out results/gpu --only speed-moe-advmoe-128-bf16
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from advmoe.config import ModelConfig, TrainConfig
from advmoe.data.loader import Batch
from advmoe.evaluation.cost import hardware
from advmoe.files import write_text_atomically
from advmoe.models.registry import build_model
from advmoe.seeding import generator_for
from advmoe.training.levels import make_levels
from advmoe.training.methods import METHODS

LeaseStep = Callable[[], dict[str, Any]]
TRAININGS = (("moe", "advmoe"), ("s_dense", "at"), ("dense", "at"), ("moe", "at"))
"""In the order of what a lease that ends early should have done."""


def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def wait() -> None:
    if device().type == "cuda":
        torch.cuda.synchronize()


def speed(kind: str, method: str, batch_size: int, precision: str, smoke: bool) -> dict[str, Any]:
    """Images per second and peak memory of a training step, median of several after warming up."""
    torch.manual_seed(0)
    place, width, size = device(), 0.0625 if smoke else 1.0, 16 if smoke else 32
    model = build_model(ModelConfig(arch="resnet18", kind=kind, width=width, image_size=size)).to(place)  # type: ignore[arg-type]
    config = TrainConfig(dataset="benchmark", method=method, precision=precision, batch_size=batch_size)  # type: ignore[arg-type]
    levels = make_levels(METHODS[method].levels, model, config)
    images = torch.rand(batch_size, 3, size, size, device=place)
    batch = Batch(images, torch.randint(10, (batch_size,), device=place), torch.arange(batch_size))
    if place.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    seconds = []
    for i in range(2 if smoke else 25):
        noise = [generator_for(0, i, level, device=place) for level in range(len(levels))]
        wait()
        began = time.perf_counter()
        METHODS[method].step(levels, [batch] * len(levels), config, noise, i)
        wait()
        seconds.append(time.perf_counter() - began)
    median = statistics.median(seconds[len(seconds) // 5 :])
    memory = torch.cuda.max_memory_allocated() / 2**20 if place.type == "cuda" else None
    return {"images_per_second": batch_size / median, "seconds": median, "peak_mib": memory}


def gpu_tests() -> dict[str, Any]:
    """The tests that need a GPU."""
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-m", "gpu"], capture_output=True, text=True, check=False
    )
    return {"returncode": done.returncode, "last_lines": done.stdout.splitlines()[-5:]}


def training(kind: str, method: str, out: Path, epochs: int) -> dict[str, Any]:
    """A run of the paper's setting on CIFAR-10; goes on where an earlier lease stopped."""
    folder = out / f"run-{kind}-{method}"
    command = [sys.executable, "-m", "advmoe", "train", "cifar10", "--arch", "resnet18", "--kind", kind]
    command += ["--method", method, "--epochs", str(epochs), "--precision", "bf16", "--out", str(folder)]
    began = time.perf_counter()
    done = subprocess.run(command + ["--resume"] * (folder / "last.pt").exists(), check=False)
    if done.returncode:
        raise SystemExit(f"{folder} is not complete (exit code {done.returncode}); run this step again")
    last = (folder / "metrics.jsonl").read_text().splitlines()[-1]
    return {"seconds_of_this_lease": time.perf_counter() - began, "metrics": json.loads(last)}


def steps(out: Path, *, smoke: bool, epochs: int) -> Iterator[tuple[str, LeaseStep]]:
    """The steps by name, in order."""
    if not smoke:
        yield "tests", gpu_tests
    for precision in ("fp32", "bf16"):
        for batch_size in (8,) if smoke else (128, 512):
            for kind, method in TRAININGS[:1] if smoke else TRAININGS:
                name = f"speed-{kind}-{method}-{batch_size}-{precision}"
                yield name, lambda k=kind, m=method, b=batch_size, p=precision: speed(k, m, b, p, smoke)  # type: ignore[misc]
    for kind, method in TRAININGS if epochs else ():
        yield f"train-{kind}-{method}", lambda k=kind, m=method: training(k, m, out, epochs)  # type: ignore[misc]


def versions() -> dict[str, Any]:
    return {"hardware": hardware(device()), "torch": torch.__version__, "cuda": torch.version.cuda}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=None, help="folder of the results; without one nothing is kept")
    parser.add_argument("--only", help="name of one step")
    parser.add_argument("--list", action="store_true", help="print the names of the steps that are not done")
    parser.add_argument("--epochs", type=int, default=0, help="train so many epochs of each kind at the end")
    parser.add_argument("--smoke", action="store_true", help="the smallest form: does it run?")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    options = parser.parse_args()
    out: Path | None = options.out
    figures: dict[str, Any] = versions()
    for name, step in steps(out or Path(), smoke=options.smoke, epochs=options.epochs):
        path = None if out is None else out / f"{name}.json"
        if path is not None and path.exists():
            figures[name] = json.loads(path.read_text())
            continue
        if options.list:
            print(name)
        elif options.only in {None, name}:
            figures[name] = versions() | step()
            if path is not None:
                path.parent.mkdir(parents=True, exist_ok=True)
                write_text_atomically(path, json.dumps(figures[name], indent=1) + "\n")
    if options.json:
        print(json.dumps(figures))
    elif not options.list:
        for name, value in figures.items():
            print(f"{name:36} {value}")


if __name__ == "__main__":
    main()
