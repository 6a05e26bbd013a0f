"""Compare an exported MoE-CNN in onnxruntime with Dense, S-Dense (the size of one pathway) and all experts computed.

All forms run alternately in one process on one thread. A figure is the median over rounds of the
ratio of CPU times within a round, so slow phases of the machine and other processes have little
influence. Weights are random, and the routers are balanced.

    python benchmarks/export.py --json
    python benchmarks/export.py --quick --json          ResNet-18 and VGG-16 in less than a minute
    python benchmarks/export.py --arch resnet18 --granularity block
"""

from __future__ import annotations

import json
import os
import platform
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import harness
import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import torch
from advmoe_export.exporter import plan_graph
from advmoe_export.passes.storage import write_external
from advmoe_export.profiles import build
from advmoe_export.trace import trace

import advmoe
from advmoe.evaluation.cost import hardware

BATCHES = (1, 8, 64)
PROFILES = ("hybrid", "latency", "throughput")
IMAGE_SIZE = 32


def draft(name: str, model: torch.nn.Module, profiles: dict[str, str], folder: Path) -> dict[str, Path]:
    """Write a model in several profiles, without the verification of an export."""
    traced = trace(model, image_size=(IMAGE_SIZE, IMAGE_SIZE), opset=18)
    plan = plan_graph(traced.graph)
    paths = {}
    for label, profile in profiles.items():
        graph = build(plan, profile=profile, opset=18)
        path = folder / f"{name}-{label}.onnx"
        write_external(graph, path.with_name(path.name + ".data"))
        ir.save(graph, path)
        paths[label] = path
    return paths


def balance(model: torch.nn.Module, images: torch.Tensor) -> None:
    """Routers that send about half of the images each way: centered features, no bias."""
    torch.manual_seed(0)
    model.train()
    with torch.no_grad():
        for router in getattr(model, "routers", []):
            if router.linear.bias is not None:
                router.linear.bias.zero_()
        for _ in range(2):
            model(images)
    model.eval()


def session(path: Path) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.log_severity_level = 3
    return ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def measure(
    sessions: dict[str, ort.InferenceSession], images: np.ndarray, batch: int, rounds: int
) -> dict[str, list[float]]:
    """CPU seconds per round of every form."""
    runs = {1: 8, 8: 2}.get(batch, 1)
    times: dict[str, list[float]] = {name: [] for name in sessions}
    for turn in range(rounds + 1):
        starts = [(turn * runs + run) * batch % (len(images) - batch + 1) for run in range(runs)]
        for name, form in sessions.items():
            begin = time.process_time()
            for start in starts:
                form.run(None, {"images": images[start : start + batch]})
            if turn:  # the first round warms up
                times[name].append(time.process_time() - begin)
    return times


def ratio(times: dict[str, list[float]], form: str, reference: str) -> float:
    return round(statistics.median(a / b for a, b in zip(times[form], times[reference], strict=True)), 4)


def benchmark(
    arch: str, settings: dict[str, Any], rounds: dict[int, int], folder: Path
) -> tuple[dict[str, Any], float]:
    generator = torch.Generator().manual_seed(1)
    colors = torch.rand(128, 3, 1, 1, generator=generator)
    images = (colors + 0.25 * torch.randn(128, 3, IMAGE_SIZE, IMAGE_SIZE, generator=generator)).clamp(0, 1)
    paths: dict[str, Path] = {}
    for kind in ("dense", "s_dense"):
        torch.manual_seed(0)
        model = advmoe.create_model(arch, kind=kind, width=settings["width"])
        paths |= draft(f"{arch}-{kind}", model, {kind: "throughput"}, folder)
    torch.manual_seed(0)
    moe = advmoe.create_model(arch, kind="moe", **settings)
    balance(moe, images[:32])
    paths |= draft(arch, moe, {profile: profile for profile in PROFILES} | {"compute_all": "static"}, folder)
    parameters = sum(p.numel() * p.element_size() for p in moe.parameters())
    disk = sum(path.stat().st_size for path in folder.glob(f"{arch}-hybrid.onnx*")) / parameters
    sessions = {name: session(path) for name, path in paths.items()}
    figures: dict[str, Any] = {profile: {} for profile in (*PROFILES, "compute_all")}
    figures["milliseconds"] = {}
    for batch in BATCHES:
        active = {n: s for n, s in sessions.items() if not (n == "latency" and batch > 1)}
        times = measure(active, images.numpy(), batch, rounds[batch])
        figures["milliseconds"][str(batch)] = {
            name: round(1000 * statistics.median(values) / {1: 8, 8: 2}.get(batch, 1), 3)
            for name, values in times.items()
        }
        for form in active:
            if form in figures:
                figures[form][str(batch)] = {
                    f"vs_{reference}": ratio(times, form, reference)
                    for reference in ("dense", "s_dense", "compute_all")
                    if reference != form
                }
    return figures, disk


def networks(results: dict[str, Any]) -> list[str]:
    return [name for name in results if name not in ("disk_ratio", "settings", "machine")]


def table(results: dict[str, Any]) -> str:
    lines = [f"{'network':<12} {'form':<12} {'batch':>5} {'vs Dense':>9} {'vs S-Dense':>11} {'vs all':>7}"]
    for arch in networks(results):
        for form in (*PROFILES, "compute_all"):
            for batch, values in results[arch][form].items():
                columns = (values["vs_dense"], values["vs_s_dense"], values.get("vs_compute_all", 1.0))
                dense, s_dense, everything = (f"{value:.3f}" for value in columns)
                lines.append(f"{arch:<12} {form:<12} {batch:>5} {dense:>9} {s_dense:>11} {everything:>7}")
    return "\n".join(lines)


def main() -> None:
    parser = harness.parser(__doc__)
    parser.add_argument(
        "--arch", action="append", help="network, may be given several times; default resnet18 and vgg16"
    )
    parser.add_argument("--granularity", default="layer", help="what a router decides for: layer, block, stage, image")
    parser.add_argument("--num-experts", type=int, default=2)
    parser.add_argument("--model-scale", type=float, default=0.5)
    parser.add_argument("--width", type=float, default=1.0)
    parser.add_argument("--rounds", type=int, help="rounds at batch 64; four times as many at batch 1 and 8")
    parser.add_argument("--quick", action="store_true", help="fewer rounds")
    options = parser.parse_args()
    if options.smoke:
        options.arch, options.width, options.rounds = ["vgg16"], 0.0625, 1
    rounds = options.rounds or (3 if options.quick else 11)
    settings = {
        "num_experts": options.num_experts,
        "model_scale": options.model_scale,
        "granularity": options.granularity,
        "width": options.width,
    }
    results: dict[str, Any] = {}
    disk = 0.0
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        for arch in options.arch or ["resnet18", "vgg16"]:
            print(f"{arch} ...", file=sys.stderr)
            results[arch], ratio_ = benchmark(arch, settings, {1: 4 * rounds, 8: 4 * rounds, 64: rounds}, Path(folder))
            disk = max(disk, ratio_)
    results["disk_ratio"] = round(disk, 4)
    results["settings"] = settings
    results["machine"] = {
        "cpu": hardware(torch.device("cpu")),
        "cores": os.cpu_count(),
        "onnxruntime": ort.__version__,
        "threads": 1,
        "python": platform.python_version(),
    }
    print(json.dumps(results) if options.json else table(results))


if __name__ == "__main__":
    main()
