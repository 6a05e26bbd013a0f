"""Measurements for a GPU that is available for a short time, divided into steps. Each step writes one file.

A step whose file exists is skipped, so the script can be run again after an interruption. A step
that fails does not stop the others. `gpu_lease.sh` runs one process for each line of `--list` and
limits it to ten minutes. Quick steps share a process, because its start takes longer than they do.

    python benchmarks/gpu_lease.py --out results/gpu          # all steps but the long trainings
    python benchmarks/gpu_lease.py --out results/gpu --list   # their names, a line for each process
    python benchmarks/gpu_lease.py --out results/gpu --only speed-moe-advmoe-128-bf16 exported

Shape suffixes: B batch, L MoE layers.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor

from advmoe.attacks.autoattack import SQUARE_QUERIES, STANDARD, autoattack
from advmoe.attacks.victims import Victims
from advmoe.config import AttackConfig, ModelConfig, TrainConfig
from advmoe.data.loader import Batch
from advmoe.evaluation.cost import hardware
from advmoe.evaluation.precision import full_precision
from advmoe.files import write_text_atomically
from advmoe.models.compiled import CompiledNetwork
from advmoe.models.dispatch import computing
from advmoe.models.modes import evaluating
from advmoe.models.network import RoutedNetwork
from advmoe.models.registry import build_model
from advmoe.seeding import generator_for
from advmoe.training.levels import make_levels
from advmoe.training.methods import METHODS

LeaseStep = Callable[[], dict[str, Any]]
TRAININGS = (("moe", "advmoe"), ("s_dense", "at"), ("dense", "at"), ("moe", "at"))
"""In descending order of importance, because the time on a GPU may end early."""


def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def wait() -> None:
    if device().type == "cuda":
        torch.cuda.synchronize()


@dataclass(frozen=True, kw_only=True)
class Form:
    """The network and the training of a step."""

    kind: str = "moe"
    method: str = "advmoe"
    batch_size: int = 128
    num_experts: int = 2
    precision: str = "fp32"
    compile: str = "off"
    dispatch: str = "auto"
    layout: str = "channels-first"
    smoke: bool = False

    @property
    def name(self) -> str:
        """The differences from the default form."""
        experts = "" if self.num_experts == 2 else str(self.num_experts)
        ways = [
            way for way in (self.compile, self.dispatch, self.layout) if way not in ("off", "auto", "channels-first")
        ]
        return "-".join((self.kind + experts, self.method, str(self.batch_size), self.precision, *ways))

    def model(self) -> RoutedNetwork:
        """ResNet-18 for CIFAR, or a tiny one."""
        torch.manual_seed(0)
        width, size = (0.0625, 16) if self.smoke else (1.0, 32)
        experts: dict[str, Any] = {"num_experts": self.num_experts} if self.kind == "moe" else {}
        config = ModelConfig(arch="resnet18", kind=self.kind, width=width, image_size=size, **experts)  # type: ignore[arg-type]
        return build_model(config).to(device()).to(memory_format=self.memory_format)

    def images(self) -> Tensor:
        """A batch of noise."""
        size = 16 if self.smoke else 32
        images = torch.rand(self.batch_size, 3, size, size, device=device())
        return images.contiguous(memory_format=self.memory_format)

    @property
    def memory_format(self) -> torch.memory_format:
        """The order of an image's numbers in memory. `advmoe train` does not use channels-last yet."""
        return torch.channels_last if self.layout == "channels-last" else torch.contiguous_format

    def step(self) -> Callable[[int], None]:
        """A function that runs the i-th training step, as `advmoe train` does."""
        model = self.model()
        config = TrainConfig(
            dataset="benchmark",
            method=self.method,  # type: ignore[arg-type]
            precision=self.precision,  # type: ignore[arg-type]
            batch_size=self.batch_size,
            compile=self.compile,  # type: ignore[arg-type]
            dispatch=self.dispatch,  # type: ignore[arg-type]
        )
        levels = make_levels(METHODS[config.method].levels, model, config)
        labels = torch.arange(self.batch_size, device=device()) % 10
        batch = Batch(self.images(), labels, torch.arange(self.batch_size))
        compiled = None if self.compile == "off" else CompiledNetwork(model, graphs=self.compile == "graphs")

        def step(i: int) -> None:
            noise = [generator_for(0, i, level, device=device()) for level in range(len(levels))]
            with computing(config.dispatch), nullcontext() if compiled is None else compiled.running():
                METHODS[config.method].step(levels, [batch] * len(levels), config, noise, i)

        return step


WARM_UP, BLOCKS, BLOCK = 20, 3, 10
"""Steps before the measurement, blocks of steps, and steps of a block. A GPU library chooses an algorithm for each new
size of an expert's sub-batch, which takes time in the first steps and not in a training of thousands."""


def speed(form: Form) -> dict[str, Any]:
    """Images per second and peak memory of a training step: the median over blocks of steps.

    The process waits for the GPU at the end of a block only, as a training does.
    """
    step = form.step()
    began = time.perf_counter()
    step(0)
    wait()
    first = time.perf_counter() - began
    warm_up, length = (0, 1) if form.smoke else (WARM_UP, BLOCK)
    for i in range(1, 1 + warm_up):
        step(i)
    wait()
    if device().type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    seconds = []
    for block in range(BLOCKS):
        began = time.perf_counter()
        for i in range(length):
            step(1 + warm_up + block * length + i)
        wait()
        seconds.append((time.perf_counter() - began) / length)
    median = statistics.median(seconds)
    memory = torch.cuda.max_memory_allocated() / 2**20 if device().type == "cuda" else None
    return {
        "images_per_second": form.batch_size / median,
        "seconds": median,
        "seconds_of_first": first,
        "peak_mib": memory,
    }


def waits(form: Form) -> dict[str, Any]:
    """Number and places of waits for the GPU in one training step. A CPU has no waits."""
    step = form.step()
    step(0)
    step(1)
    if device().type != "cuda":
        return {"waits": None}
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            step(2)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    places = [f"{Path(each.filename).name}:{each.lineno}" for each in caught if "synchroniz" in str(each.message)]
    return {"waits": len(places), "places": sorted(set(places))}


@torch.no_grad()
def routes_of_bf16(form: Form) -> dict[str, Any]:
    """Share of routing decisions that bf16 convolutions change, for noise and untrained routers."""
    model, images = form.model(), form.images()
    for _ in range(10):
        model.train()(images)
    exact = model.eval().forward_with_routing(images)[1].expert_index_BL
    with torch.autocast(device().type, torch.bfloat16):
        half = model.forward_with_routing(images)[1].expert_index_BL
    return {"changed_decisions": (exact != half).float().mean().item()}


def exported(form: Form) -> dict[str, Any]:
    """Images per second of the exported file in onnxruntime, on the GPU if onnxruntime can use it."""
    import onnxruntime
    from advmoe_export.exporter import export_model
    from advmoe_export.session import Session

    providers = ("cuda", "cpu") if "CUDAExecutionProvider" in onnxruntime.get_available_providers() else ("cpu",)
    model, images = form.model().cpu().eval(), form.images().cpu()
    with TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        export_model(model, path, image_size=images.shape[-1], labels=[str(label) for label in range(10)])
        session = Session(path, providers=providers)
        seconds = []
        for _ in range(3 if form.smoke else 50):
            began = time.perf_counter()
            session.run_raw(images.numpy())
            seconds.append(time.perf_counter() - began)
    return {"provider": session.provider, "images_per_second": form.batch_size / statistics.median(seconds)}


def autoattack_speed(form: Form) -> dict[str, Any]:
    """Images per second of standard AutoAttack on correctly classified images."""
    model, images = form.model(), form.images()
    with torch.no_grad():
        for _ in range(10):
            model.train()(images)
    with evaluating(model.eval()), full_precision(model):
        labels = model(images).argmax(dim=1)
        attack = AttackConfig(eps=1 / 2550)  # so small that few images are broken early, and all attacks have work
        victims = Victims(
            model=model, images=images, labels=labels, indices=torch.arange(len(images)), attack=attack, seed=0
        )
        began = time.perf_counter()
        robust = autoattack(
            victims,
            attacks=("apgd-ce", "square") if form.smoke else STANDARD,
            square_queries=2 if form.smoke else SQUARE_QUERIES,
        ).robust_after
        wait()
    seconds = time.perf_counter() - began
    left = {attack: mask.float().mean().item() for attack, mask in robust.items()}
    return {"images_per_second": len(images) / seconds, "robust_after": left}


GPU_TESTS = ("test_compiled.py", "test_host_waits.py", "test_loader.py", "test_tiles.py")
"""The files of tests that need a GPU. Others may need packages that a rented machine lacks."""


def gpu_tests() -> dict[str, Any]:
    """The outcome of the tests that need a GPU. Warnings of other versions of torch are no failures."""
    files = [str(Path(__file__).parents[1] / "tests" / name) for name in GPU_TESTS]
    command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-W", "default", "-p", "no:cacheprovider", *files]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    lines = done.stdout.splitlines()
    if done.returncode:
        print(done.stdout[-4000:], done.stderr[-4000:], file=sys.stderr)
    failed = [line for line in lines if line.startswith(("FAILED", "ERROR"))]
    return {"returncode": done.returncode, "failed": failed, "last_line": lines[-1] if lines else ""}


def training(kind: str, method: str, out: Path, epochs: int) -> dict[str, Any]:
    """A run with the paper's setting on CIFAR-10. It continues from its last checkpoint."""
    folder = out / f"run-{kind}-{method}"
    command = [sys.executable, "-m", "advmoe", "train", "cifar10", "--arch", "resnet18", "--kind", kind]
    command += ["--method", method, "--epochs", str(epochs), "--precision", "bf16", "--out", str(folder)]
    command += ["--checkpoint-minutes", "2"]
    began = time.perf_counter()
    with subprocess.Popen(command + ["--resume"] * (folder / "last.pt").exists()) as process:
        try:
            returncode = process.wait()
        except KeyboardInterrupt:  # the training got it too, and saves before it ends
            returncode = process.wait()
    if returncode:
        raise RuntimeError(f"{folder} is not complete (exit code {returncode}); run this step again")
    last = (folder / "metrics.jsonl").read_text().splitlines()[-1]
    return {"seconds_of_this_lease": time.perf_counter() - began, "metrics": json.loads(last)}


def forms(plain: Form) -> Iterator[Form]:
    """The timed steps: kinds, sizes and precisions, ways to dispatch, and compiled ones, which take longest."""
    if plain.smoke:
        yield from (plain, replace(plain, precision="bf16"))
        return
    for batch_size, precision, (kind, method) in product((128, 512), ("bf16", "fp32"), TRAININGS):
        yield replace(plain, kind=kind, method=method, batch_size=batch_size, precision=precision)
    for kind, method in TRAININGS:
        yield replace(plain, kind=kind, method=method, precision="bf16", layout="channels-last")
    for number, precision in product((2, 8), ("bf16", "fp32")):
        yield replace(plain, num_experts=number, precision=precision, dispatch="tiles")
    for precision in ("bf16", "fp32"):
        yield replace(plain, num_experts=8, precision=precision)
    for way, (kind, method) in product(("graphs", "kernels"), TRAININGS):
        yield replace(plain, kind=kind, method=method, precision="bf16", compile=way)
    yield replace(plain, num_experts=8, precision="bf16", compile="kernels")


Process = list[tuple[str, LeaseStep]]
"""The named steps of one process."""


def processes(out: Path, *, smoke: bool, epochs: int) -> Iterator[Process]:
    """The steps, in order of importance, by the process that takes them."""
    if not smoke:
        yield [("tests", gpu_tests)]
    plain = Form(batch_size=8, smoke=True) if smoke else Form()
    quick: Process = []
    for kind, method in TRAININGS:
        form = replace(plain, kind=kind, method=method)
        quick.append((f"waits-{form.name}", partial(waits, form)))
    timed = {form.name: form for form in forms(plain)}
    quick += [(f"speed-{name}", partial(speed, form)) for name, form in timed.items() if form.compile == "off"]
    yield [*quick, ("routes-bf16", partial(routes_of_bf16, plain)), ("exported", partial(exported, plain))]
    for name, form in timed.items():
        if form.compile != "off":
            yield [(f"speed-{name}", partial(speed, form))]
    yield [("autoattack", partial(autoattack_speed, replace(plain, batch_size=2 if smoke else 64)))]
    for kind, method in TRAININGS if epochs else ():
        yield [(f"train-{kind}-{method}", partial(training, kind, method, out, epochs))]


def versions() -> dict[str, Any]:
    return {"hardware": hardware(device()), "torch": torch.__version__, "cuda": torch.version.cuda}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=None, help="folder of the results; without one nothing is kept")
    parser.add_argument("--only", nargs="+", metavar="STEP", help="names of steps")
    parser.add_argument("--list", action="store_true", help="print the names of the steps that are not done")
    parser.add_argument("--epochs", type=int, default=0, help="train so many epochs of each kind at the end")
    parser.add_argument("--smoke", action="store_true", help="the smallest form: does it run?")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    options = parser.parse_args()
    out: Path | None = options.out
    figures: dict[str, Any] = versions()
    failed = []
    groups = list(processes(out or Path(), smoke=options.smoke, epochs=options.epochs))
    names = [name for process in groups for name, _ in process]
    if unknown := [name for name in options.only or () if name not in names]:
        parser.error(f"there is no step {', '.join(unknown)}; the steps are {', '.join(names)}")
    for process in groups:
        left = []
        for name, step in process:
            path = None if out is None else out / f"{name}.json"
            if path is not None and path.exists():
                figures[name] = json.loads(path.read_text())
            elif options.list:
                left.append(name)
            elif options.only is None or name in options.only:
                try:
                    figures[name] = versions() | step()
                except Exception:
                    traceback.print_exc()
                    failed.append(name)
                    continue
                if path is not None:
                    path.parent.mkdir(parents=True, exist_ok=True)
                    write_text_atomically(path, json.dumps(figures[name], indent=1) + "\n")
        if left:
            print(*left)
    if options.json:
        print(json.dumps(figures))
    elif not options.list:
        for name, value in figures.items():
            print(f"{name:36} {value}")
    if failed:
        sys.exit(f"failed, and not done: {', '.join(failed)}")


if __name__ == "__main__":
    main()
