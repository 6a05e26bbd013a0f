"""Compare serving an MoE-CNN with serving S-Dense (the size of one pathway).

Each model has a server process with one thread. Clients send single images as raw tensors. First
both servers are saturated, which gives the throughput. Then requests arrive as a Poisson process,
at the same rates for both models, whether or not earlier requests have been answered. A latency
counts from the moment a request was due. Rounds of the two models alternate. The last rate is twice
the capacity: the server must refuse requests with 429, and answer those it accepts in time.

    python benchmarks/serving.py --json
    python benchmarks/serving.py --smoke --json      a small network, a few seconds
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import platform
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import harness
import numpy as np
import onnxruntime as ort
import torch
from advmoe_export import export_model

import advmoe
from advmoe.config import Kind
from advmoe.evaluation.cost import hardware

KINDS: tuple[Kind, ...] = ("moe", "s_dense")
SHARES = (0.25, 0.5, 0.75, 2.0)
"""Rates of the requests, relative to the throughput of S-Dense."""
CONNECTIONS = 32
IMAGE_SIZE = 32


def export(kind: Kind, arch: str, width: float, folder: Path) -> Path:
    torch.manual_seed(0)
    model = advmoe.create_model(arch, kind=kind, width=width)
    generator = torch.Generator().manual_seed(1)
    colors = torch.rand(64, 3, 1, 1, generator=generator)
    images = (colors + 0.25 * torch.randn(64, 3, IMAGE_SIZE, IMAGE_SIZE, generator=generator)).clamp(0, 1)
    with torch.no_grad():  # routers that send about half of the images each way
        for router in getattr(model, "routers", []):
            if router.linear.bias is not None:
                router.linear.bias.zero_()
        for _ in range(2):
            model.train()(images)
    path = folder / f"{kind}.onnx"
    labels = [str(label) for label in range(10)]
    export_model(model.eval(), path, image_size=IMAGE_SIZE, labels=labels, images=images.numpy(), allow_unrouted=True)
    return path


@contextlib.contextmanager
def server(path: Path, core: int | None) -> Iterator[int]:
    """A server of a model; gives its port."""
    command = [sys.executable, "-m", "advmoe_export.serve", str(path), "--port", "0", "--threads", "1"]
    command += ["--max-connections", "16384"]  # every request in flight has its own
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    try:
        line = process.stderr.readline()
        if not line.startswith("serving"):
            raise SystemExit(f"the server did not start: {line}{process.stderr.read()}")
        if core is not None:
            os.sched_setaffinity(process.pid, {core})
        yield int(line.rsplit(":", 1)[1])
    finally:
        process.terminate()
        process.wait()
        process.stderr.close()


def request_bytes(kind: str, image: np.ndarray) -> bytes:
    tensor: dict[str, Any] = {"name": "images", "shape": [1, *image.shape], "datatype": "FP32"}
    tensor |= {"parameters": {"binary_data_size": image.nbytes}}
    text = json.dumps({"inputs": [tensor], "outputs": [{"name": "logits"}]}).encode()
    head = (
        f"POST /v2/models/{kind}/infer HTTP/1.1\r\nHost: bench\r\nContent-Length: {len(text) + image.nbytes}\r\n"
        f"Inference-Header-Content-Length: {len(text)}\r\n\r\n"
    )
    return head.encode() + text + image.tobytes()


class Client:
    """A client that keeps connections open, and sends one request at a time on each."""

    def __init__(self, port: int, requests: list[bytes]) -> None:
        self._port, self._requests = port, requests
        self._idle: list[tuple[asyncio.StreamReader, asyncio.StreamWriter]] = []

    async def send(self, number: int) -> int:
        """The HTTP status of a request."""
        while self._idle and self._idle[-1][0].at_eof():  # closed by the server
            self._idle.pop()[1].close()
        reader, writer = self._idle.pop() if self._idle else await asyncio.open_connection("127.0.0.1", self._port)
        writer.write(self._requests[number % len(self._requests)])
        head = await reader.readuntil(b"\r\n\r\n")
        (length,) = (line for line in head.lower().split(b"\r\n") if line.startswith(b"content-length:"))
        await reader.readexactly(int(length.split(b":")[1]))
        self._idle.append((reader, writer))
        return int(head.split(None, 2)[1])

    def close(self) -> None:
        """Close all connections; the server closes those that are idle for some seconds anyway."""
        for _, writer in self._idle:
            writer.close()
        self._idle.clear()


@dataclass
class Answers:
    """The answers to the requests for one model at one rate."""

    latencies: list[float] = field(default_factory=list)
    refused: int = 0
    timed_out: int = 0
    seconds: float = 0.0

    def figures(self) -> dict[str, float | None]:
        served = np.array(self.latencies) * 1000
        half, most = np.quantile(served, (0.5, 0.99)) if len(served) else (None, None)
        return {
            "requests": len(served) + self.refused + self.timed_out,
            "p50_ms": None if half is None else round(float(half), 2),
            "p99_ms": None if most is None else round(float(most), 2),
            "images_per_second": round(len(served) / self.seconds, 1),
            "refused": self.refused,
            "timed_out": self.timed_out,
        }


async def saturate(client: Client, seconds: float) -> Answers:
    """Keep `CONNECTIONS` requests running at the same time."""
    client.close()
    answers, loop = Answers(), asyncio.get_running_loop()
    begin = loop.time()

    async def work(first: int) -> None:
        number = first
        while loop.time() < begin + seconds:
            start = loop.time()
            status = await client.send(number)
            assert status == 200, status
            answers.latencies.append(loop.time() - start)
            number += CONNECTIONS

    await asyncio.gather(*(work(first) for first in range(CONNECTIONS)))
    answers.seconds = loop.time() - begin
    return answers


async def poisson(client: Client, rate: float, seconds: float, seed: int, answers: Answers) -> None:
    """Send requests at a rate, due at random times that do not depend on the answers."""
    client.close()
    loop = asyncio.get_running_loop()
    rng = np.random.default_rng(seed)
    due = np.cumsum(rng.exponential(1 / rate, size=int(2 * rate * seconds) + 10))
    begin = loop.time()

    async def one(number: int, at: float) -> None:
        status = await client.send(number)
        if status == 200:
            answers.latencies.append(loop.time() - begin - at)
        else:
            assert status in (429, 504), status
            answers.refused += status == 429
            answers.timed_out += status == 504

    tasks = []
    for number, at in enumerate(due[due < seconds]):
        await asyncio.sleep(max(0.0, begin + at - loop.time()))
        tasks.append(asyncio.create_task(one(number, at)))
    await asyncio.gather(*tasks)
    answers.seconds += loop.time() - begin


async def measure(ports: dict[Kind, int], seconds: float, rounds: int) -> dict[str, Any]:
    images = np.random.default_rng(0).random((64, 3, 1, 1)) * np.ones((64, 3, IMAGE_SIZE, IMAGE_SIZE))
    clients = {
        kind: Client(port, [request_bytes(kind, image) for image in images.astype("<f4")])
        for kind, port in ports.items()
    }
    saturated: dict[str, list[float]] = {kind: [] for kind in KINDS}
    for _ in range(rounds):
        for kind in KINDS:
            answers = await saturate(clients[kind], seconds)
            saturated[kind].append(len(answers.latencies) / answers.seconds)
    capacity = {kind: float(np.median(values)) for kind, values in saturated.items()}
    ratios = [a / b for a, b in zip(saturated["moe"], saturated["s_dense"], strict=True)]
    results: dict[str, Any] = {
        "throughput": {kind: round(value, 1) for kind, value in capacity.items()}
        | {"moe_vs_s_dense": round(float(np.median(ratios)), 3)},
        "poisson": [],
    }
    for share in SHARES:
        rate = share * capacity["s_dense"]
        answers_of = {kind: Answers() for kind in KINDS}
        for turn in range(rounds):
            for kind in KINDS:
                await poisson(clients[kind], rate, seconds, turn, answers_of[kind])
        figures: dict[str, Any] = {kind: answers.figures() for kind, answers in answers_of.items()}
        results["poisson"].append({"rate": round(rate, 1), "of_s_dense_throughput": share, **figures})
    for client in clients.values():
        client.close()
    return results


def table(results: dict[str, Any]) -> str:
    lines = ["throughput, images/s: " + ", ".join(f"{k} {v}" for k, v in results["throughput"].items())]
    lines.append(f"{'rate':>8} {'model':<8} {'p50 ms':>8} {'p99 ms':>8} {'images/s':>9} {'refused':>8}")
    for entry in results["poisson"]:
        for kind in KINDS:
            row = entry[kind]
            lines.append(
                f"{entry['rate']:>8} {kind:<8} {row['p50_ms']:>8} {row['p99_ms']:>8} {row['images_per_second']:>9} "
                f"{row['refused']:>8}"
            )
    return "\n".join(lines)


def main() -> None:
    parser = harness.parser(__doc__)
    parser.add_argument("--arch", default="resnet18")
    parser.add_argument("--width", type=float, default=0.25)
    parser.add_argument("--seconds", type=float, default=8.0, help="of each round")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    if options.smoke:
        options.arch, options.width, options.seconds, options.rounds = "vgg16", 0.0625, 0.5, 1
    torch.set_num_threads(1)
    pinned = hasattr(os, "sched_setaffinity") and len(os.sched_getaffinity(0)) >= 2
    server_core, client_core = (sorted(os.sched_getaffinity(0))[:2]) if pinned else (None, None)
    with tempfile.TemporaryDirectory() as name, contextlib.ExitStack() as stack:
        ports: dict[Kind, int] = {}
        for kind in KINDS:
            print(f"{options.arch} {kind} ...", file=sys.stderr)
            path = export(kind, options.arch, options.width, Path(name))
            ports[kind] = stack.enter_context(server(path, server_core))
        if client_core is not None:
            stack.callback(os.sched_setaffinity, 0, os.sched_getaffinity(0))
            os.sched_setaffinity(0, {client_core})
        results = asyncio.run(measure(ports, options.seconds, options.rounds))
    results["settings"] = {name: getattr(options, name) for name in ("arch", "width", "seconds", "rounds")}
    results["machine"] = {
        "cpu": hardware(torch.device("cpu")),
        "cores": os.cpu_count(),
        "onnxruntime": ort.__version__,
        "python": platform.python_version(),
        "server and clients on cores of their own": pinned,
    }
    print(json.dumps(results) if options.json else table(results))


if __name__ == "__main__":
    main()
