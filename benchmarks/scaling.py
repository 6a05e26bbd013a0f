"""Measure a training step with one and with two processes, and extrapolate it to more processes.

Each process has its own batch. The work of a process is therefore constant, and on an ideal machine
a step takes the same time with any number of processes. One and two processes are measured on this
machine, over gloo. The figures for 8 and 64 processes are not measured. They follow from this
model:

    seconds(W) = seconds(1) + exchanges * latency * log2(W) + 2 (W - 1) / W * bytes / bandwidth

`exchanges` and `bytes` are counted in a step. `latency` is the time of a small all-reduce of two
processes. `bandwidth` is measured by an all-reduce of 8 MB, where each process sends and receives
all its data. The measured seconds of communication include the time that one process waits for the
other.
"""

from __future__ import annotations

from advmoe.host import prepare_process

prepare_process()  # before torch is there

import argparse  # noqa: E402
import json  # noqa: E402
import math  # noqa: E402
import os  # noqa: E402
import socket  # noqa: E402
import statistics  # noqa: E402
import subprocess  # noqa: E402
import sys  # noqa: E402
import time  # noqa: E402
from collections.abc import Callable, Iterator  # noqa: E402
from contextlib import contextmanager  # noqa: E402
from dataclasses import dataclass  # noqa: E402
from pathlib import Path  # noqa: E402
from typing import Any  # noqa: E402

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402

from advmoe.config import Kind, MethodName, ModelConfig, TrainConfig  # noqa: E402
from advmoe.data.loader import Batch  # noqa: E402
from advmoe.distributed import Place, gather, joined, sum_up, world  # noqa: E402
from advmoe.evaluation.cost import hardware  # noqa: E402
from advmoe.models.registry import build_model  # noqa: E402
from advmoe.seeding import generator_for  # noqa: E402
from advmoe.training.levels import make_levels  # noqa: E402
from advmoe.training.methods import METHODS  # noqa: E402

CPU = torch.device("cpu")
SUBJECTS: dict[str, tuple[Kind, MethodName]] = {
    "at_s_dense": ("s_dense", "at"),
    "at_moe": ("moe", "at"),
    "advmoe": ("moe", "advmoe"),
}
EXTRAPOLATED = (8, 64)


@dataclass
class Traffic:
    """The exchanges of one step."""

    exchanges: int = 0
    bytes: int = 0
    seconds: float = 0.0


@contextmanager
def counted(traffic: Traffic) -> Iterator[None]:
    """Count every exchange of tensors."""
    originals = {name: getattr(dist, name) for name in ("all_reduce", "all_gather_into_tensor")}

    def counting(name: str) -> Callable[..., Any]:
        def exchange(*tensors: torch.Tensor) -> None:
            start = time.perf_counter()
            originals[name](*tensors)
            traffic.seconds += time.perf_counter() - start
            traffic.exchanges += 1
            traffic.bytes += tensors[-1].numel() * tensors[-1].element_size()

        return exchange

    for name in originals:
        setattr(dist, name, counting(name))
    try:
        yield
    finally:
        for name, original in originals.items():
            setattr(dist, name, original)


def median_seconds(action: Callable[[int], object], rounds: int) -> float:
    """Median seconds of a call that all processes start together, after one warm-up call."""
    taken = []
    for number in range(rounds + 1):
        gather(None)
        start = time.perf_counter()
        action(number)
        taken.append(time.perf_counter() - start)
    return statistics.median(taken[1:])


def measure(kind: Kind, method: MethodName, width: float, images: int, rounds: int) -> dict[str, float]:
    """Seconds of a step, seconds of its exchanges, and their number."""
    torch.manual_seed(0)
    model = build_model(ModelConfig(arch="resnet18", kind=kind, width=width))
    config = TrainConfig(dataset="benchmark", method=method, batch_size=images * world().size, lr=1e-9)
    levels = make_levels(METHODS[method].levels, model, config)
    place = Place(images * world().rank, images * world().size) if world().size > 1 else None
    generator = torch.Generator().manual_seed(world().rank)
    pictures = torch.rand(images, 3, 32, 32, generator=generator)
    batch = Batch(pictures, torch.arange(images) % 10, torch.arange(images), place)
    traffic = Traffic()

    def step(number: int) -> None:
        noise = [generator_for(0, number, level) for level in range(len(levels))]
        METHODS[method].step(levels, [batch] * len(levels), config, noise, number)

    with counted(traffic):
        seconds = median_seconds(step, rounds)
    steps = rounds + 1
    return {
        "seconds": seconds,
        "communication_seconds": traffic.seconds / steps,
        "exchanges": traffic.exchanges / steps,
        "megabytes": traffic.bytes / steps / 1e6,
    }


def wire(rounds: int) -> dict[str, float]:
    """Latency of a small all-reduce, and bandwidth of an all-reduce of 8 MB."""
    small, large = torch.zeros(64), torch.zeros(2 * 10**6)
    latency = median_seconds(lambda _: sum_up([small]), 10 * rounds)
    seconds = median_seconds(lambda _: sum_up([large]), rounds)
    return {"latency_ms": 1e3 * latency, "gigabytes_per_second": 4e-9 * large.numel() / seconds}


def work(width: float, images: int, rounds: int) -> dict[str, Any]:
    """All measurements of one process of a group."""
    found: dict[str, Any] = {name: measure(*subject, width, images, rounds) for name, subject in SUBJECTS.items()}
    return found | ({"wire": wire(10 * rounds)} if world().size > 1 else {})


def seconds_of(processes: int, alone: dict[str, float], traffic: dict[str, float], wire: dict[str, float]) -> float:
    """Seconds of a step by the model above."""
    steps = math.log2(processes)
    per_exchange = 1e-3 * wire["latency_ms"] * traffic["exchanges"]
    volume = 1e-3 * traffic["megabytes"] / wire["gigabytes_per_second"]
    return alone["seconds"] + per_exchange * steps + 2 * (processes - 1) / processes * volume


def as_pair(action: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """Run a function as the first of two processes. The second process runs this script again."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    described = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "LOCAL_WORLD_SIZE": "2"}
    second = os.environ | described | {"RANK": "1", "LOCAL_RANK": "1"}
    before = dict(os.environ)
    with subprocess.Popen([sys.executable, str(Path(__file__)), *sys.argv[1:]], env=second) as process:
        os.environ |= described | {"RANK": "0", "LOCAL_RANK": "0"}
        try:
            with joined(CPU):
                return action()
        finally:
            os.environ.clear()
            os.environ |= before
            if sys.exc_info()[0] is not None:
                process.kill()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--smoke", action="store_true", help="the smallest form: does it run?")
    parser.add_argument("--width", type=float, default=0.5)
    parser.add_argument("--batch-size", type=int, default=16, help="images of each process")
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    torch.set_num_threads(1)
    sizes = (0.0625, 4, 1) if options.smoke else (options.width, options.batch_size, options.rounds)
    if os.environ.get("RANK") == "1":
        with joined(CPU):
            work(*sizes)
        return
    one, two = work(*sizes), as_pair(lambda: work(*sizes))
    figures: dict[str, Any] = {
        "images_per_process": sizes[1],
        "width": sizes[0],
        "wire": {name: round(value, 4) for name, value in two["wire"].items()},
        "measured": {},
        "estimated_by_the_model": {},
        "hardware": hardware(CPU),
        "processors": os.cpu_count(),
        "load_average": round(os.getloadavg()[0], 1),
        "torch": torch.__version__,
    }
    for name in SUBJECTS:
        own = {
            str(size): {key: round(value, 4) for key, value in found[name].items()}
            for size, found in ((1, one), (2, two))
        }
        own["2"]["efficiency"] = round(one[name]["seconds"] / two[name]["seconds"], 3)
        figures["measured"][name] = own
        estimates = {}
        for size in (2, *EXTRAPOLATED):
            seconds = seconds_of(size, one[name], two[name], two["wire"])
            estimates[str(size)] = {
                "seconds": round(seconds, 4),
                "efficiency": round(one[name]["seconds"] / seconds, 3),
            }
        figures["estimated_by_the_model"][name] = estimates
    if options.json:
        print(json.dumps(figures))
        return
    wire_of = figures["wire"]
    print(f"all-reduce of 2: {wire_of['latency_ms']:.3f} ms, {wire_of['gigabytes_per_second']:.2f} GB/s")
    print(f"{'':12} {'processes':>9} {'s a step':>9} {'efficiency':>10}")
    for name in SUBJECTS:
        for size, found in figures["measured"][name].items():
            print(f"{name:12} {size:>9} {found['seconds']:9.3f} {found.get('efficiency', 1.0):10.2f}  measured")
        for size, found in figures["estimated_by_the_model"][name].items():
            print(f"{name:12} {size:>9} {found['seconds']:9.3f} {found['efficiency']:10.2f}  estimated by the model")


if __name__ == "__main__":
    main()
