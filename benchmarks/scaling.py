"""Measure a training step with one and with two processes, and extrapolate it to more processes.

Each process has its own batch. The work of a process is therefore constant, and on an ideal machine
a step takes the same time with any number of processes. One and two processes are measured on this
machine, over gloo. The figures for 8 and 64 processes are not measured. They follow from this
model:

    seconds(W) = seconds(1) + exchanges * latency * log2(W) + 2 (W - 1) / W * bytes / bandwidth

`seconds(1)` is the CPU time of a step of one process on one thread, which other work on the machine
distorts less than wall time. `exchanges` and `bytes` are counted in a step. `latency` is the time of
a small all-reduce of two processes. `bandwidth` is measured by an all-reduce of 8 MB, where each
process sends and receives all its data. The measured seconds of communication include the time that
one process waits for the other.

The steps of the methods alternate, on networks and images as in `train_step.py`. Each step is taken
twice, and the second is timed. `busiest_expert` is the busiest expert's share of the images, the
larger one of both measurements. At 1 the routing has collapsed, and a step of the MoE-CNN costs
hardly more than one of S-Dense.
"""

from __future__ import annotations

from advmoe.host import prepare_process

prepare_process()  # before torch is there

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

import harness  # noqa: E402
import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
from harness.subjects import busiest, images, step_of, subject  # noqa: E402

from advmoe.config import Kind, MethodName, ModelConfig  # noqa: E402
from advmoe.data.loader import Batch  # noqa: E402
from advmoe.distributed import Place, gather, joined, sum_up, world  # noqa: E402
from advmoe.models.network import RoutedNetwork  # noqa: E402

CPU = torch.device("cpu")
SUBJECTS: dict[str, tuple[Kind, MethodName]] = {
    "at_s_dense": ("s_dense", "at"),
    "at_moe": ("moe", "at"),
    "advmoe": ("moe", "advmoe"),
}
EXTRAPOLATED = (8, 64)
UNITS = {"at_s_dense": 11, "at_moe": 13, "advmoe": 22}
"""Passes of one pathway in a step, by docs/scaling.md."""


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


@dataclass
class Share:
    """What one process needs for its steps."""

    models: dict[str, RoutedNetwork]
    batches: list[Batch]


def share_of(rank: int, processes: int, width: float, number: int) -> Share:
    """Calibrated networks, and batches of one process.

    This is done before the processes meet. Each of them calibrates on the batches of all.
    """
    drawn = images(4 * processes, number, 32, seed=1)
    place = Place(number * rank, number * processes) if processes > 1 else None
    models = {
        name: subject(ModelConfig(arch="resnet18", kind=kind, width=width), drawn)
        for name, (kind, _) in SUBJECTS.items()
    }
    return Share(models, [batch._replace(place=place) for batch in drawn[rank::processes]])


def measure(share: Share, rounds: int) -> dict[str, dict[str, float]]:
    """Seconds of a step of each method, seconds of its exchanges, and their number."""
    number = len(share.batches[0].images) * world().size
    steps = {
        name: step_of(share.models[name], method, share.batches, batch_size=number)
        for name, (_, method) in SUBJECTS.items()
    }
    traffic = {name: Traffic() for name in steps}
    wall: dict[str, list[float]] = {name: [] for name in steps}
    cpu: dict[str, list[float]] = {name: [] for name in steps}
    for i in range(rounds):
        for name, step in steps.items():
            with counted(traffic[name]):
                step(i)
                gather(None)
                start, start_cpu = time.perf_counter(), time.thread_time()
                step(i)
                cpu[name].append(time.thread_time() - start_cpu)
                wall[name].append(time.perf_counter() - start)
    return {
        name: {
            "seconds": statistics.median(wall[name]),
            "cpu_seconds": statistics.median(cpu[name]),
            "communication_seconds": traffic[name].seconds / (2 * rounds),
            "exchanges": traffic[name].exchanges / (2 * rounds),
            "megabytes": traffic[name].bytes / (2 * rounds) / 1e6,
        }
        for name in steps
    }


def wire(rounds: int) -> dict[str, float]:
    """Latency of a small all-reduce, and bandwidth of an all-reduce of 8 MB."""
    small, large = torch.zeros(64), torch.zeros(2 * 10**6)
    latency = median_seconds(lambda _: sum_up([small]), 10 * rounds)
    seconds = median_seconds(lambda _: sum_up([large]), rounds)
    return {"latency_ms": 1e3 * latency, "gigabytes_per_second": 4e-9 * large.numel() / seconds}


def work(share: Share, rounds: int) -> dict[str, Any]:
    """All measurements of one process of a group."""
    found: dict[str, Any] = {"busiest_expert": busiest(share.models["advmoe"], share.batches)}
    found |= measure(share, rounds)
    return found | ({"wire": wire(10 * rounds)} if world().size > 1 else {})


def seconds_of(processes: int, alone: dict[str, float], traffic: dict[str, float], wire: dict[str, float]) -> float:
    """Seconds of a step by the model above."""
    steps = math.log2(processes)
    per_exchange = 1e-3 * wire["latency_ms"] * traffic["exchanges"]
    volume = 1e-3 * traffic["megabytes"] / wire["gigabytes_per_second"]
    return alone["cpu_seconds"] + per_exchange * steps + 2 * (processes - 1) / processes * volume


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
    parser = harness.parser(__doc__)
    parser.add_argument("--width", type=float, default=0.5)
    parser.add_argument("--batch-size", type=int, default=16, help="images of each process")
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    torch.set_num_threads(1)
    width, number, rounds = (0.0625, 4, 1) if options.smoke else (options.width, options.batch_size, options.rounds)
    if os.environ.get("RANK") == "1":
        share = share_of(1, 2, width, number)
        with joined(CPU):
            work(share, rounds)
        return
    one = work(share_of(0, 1, width, number), rounds)
    share = share_of(0, 2, width, number)
    two = as_pair(lambda: work(share, rounds))
    figures: dict[str, Any] = {
        "images_per_process": number,
        "width": width,
        "rounds": rounds,
        "busiest_expert": round(max(one["busiest_expert"], two["busiest_expert"]), 3),
        "cost_vs_at_s_dense": {
            name: {
                "measured": round(one[name]["cpu_seconds"] / one["at_s_dense"]["cpu_seconds"], 3),
                "by_units": round(UNITS[name] / UNITS["at_s_dense"], 3),
            }
            for name in SUBJECTS
        },
        "wire": {name: round(value, 4) for name, value in two["wire"].items()},
        "measured": {},
        "estimated_by_the_model": {},
        **harness.machine(),
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
                "efficiency": round(one[name]["cpu_seconds"] / seconds, 3),
            }
        figures["estimated_by_the_model"][name] = estimates
    if options.json:
        harness.emit(figures, as_json=True)
        return
    wire_of = figures["wire"]
    print(f"busiest expert: {figures['busiest_expert']:.0%} of the images")
    print(f"all-reduce of 2: {wire_of['latency_ms']:.3f} ms, {wire_of['gigabytes_per_second']:.2f} GB/s")
    for name, cost in figures["cost_vs_at_s_dense"].items():
        print(f"{name:12} {cost['measured']:.2f} times at_s_dense in CPU time, {cost['by_units']:.2f} by units")
    print(f"{'':12} {'processes':>9} {'s a step':>9} {'CPU s':>9} {'efficiency':>10}")
    for name in SUBJECTS:
        for size, found in figures["measured"][name].items():
            taken = f"{found['seconds']:9.3f} {found['cpu_seconds']:9.3f}"
            print(f"{name:12} {size:>9} {taken} {found.get('efficiency', 1.0):10.2f}  measured")
        for size, found in figures["estimated_by_the_model"][name].items():
            taken = f"{found['seconds']:9.3f} {'':9}"
            print(f"{name:12} {size:>9} {taken} {found['efficiency']:10.2f}  estimated by the model")


if __name__ == "__main__":
    main()
