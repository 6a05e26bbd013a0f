"""Groups of processes that train and evaluate together, and the results of each process.

The processes are forks of a process that has imported all modules, because importing takes longer
than the tests.
"""

from __future__ import annotations

import dataclasses
import multiprocessing
import os
import shutil
import socket
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from runs import TRAIN as OF_RUNS

from advmoe.cli import reproduce
from advmoe.config import AttackConfig, ModelConfig, TrainConfig
from advmoe.data.digits import load_digits
from advmoe.data.loader import Batch
from advmoe.data.sets import EncodedSet, ImageSet
from advmoe.data.sources import Dataset, load_dataset
from advmoe.distributed import Place, gather, joined, world
from advmoe.errors import AdvMoEError
from advmoe.evaluation.results import SuiteConfig, SuiteResult
from advmoe.evaluation.state import EvaluationState
from advmoe.evaluation.suite import identity, run_suite
from advmoe.models.registry import build_model
from advmoe.rust_router import epoch_order
from advmoe.training.checkpoint import load_checkpoint
from advmoe.training.levels import make_levels
from advmoe.training.loop import Trainer
from advmoe.training.observer import Unwatched
from advmoe.training.run_folder import RunFolder
from advmoe.training.split import split_dataset
from advmoe.training.steps import adversarial_update

CPU = torch.device("cpu")
# 2 steps of 8 images, which 3 ranks share as 2, 3 and 3; then 10 validation images.
TRAIN = dataclasses.replace(OF_RUNS, epochs=1)
CASES: dict[str, tuple[ModelConfig, TrainConfig]] = {
    "advmoe": (
        ModelConfig(arch="resnet18", kind="moe", width=0.0625),
        dataclasses.replace(TRAIN, balance=0.1, ema=0.9, router_share=0.6),
    ),
    "at": (
        ModelConfig(arch="vgg16", kind="moe", width=0.0625, granularity="image"),
        dataclasses.replace(TRAIN, method="at", loss="pgd_at", awp=0.01),
    ),
    # routers learn from two images, so one of three ranks has none
    "few": (
        ModelConfig(arch="resnet18", kind="moe", width=0.0625),
        dataclasses.replace(TRAIN, router_share=0.25),
    ),
    "vit": (
        ModelConfig(arch="vit", kind="moe", width=1 / 6, depth=2),
        dataclasses.replace(TRAIN, router_step="reuse", router_share=0.5),
    ),
    # A sampled gate compares each image with an expert that its position in the union decides.
    "parts": (
        ModelConfig(arch="vgg16", kind="moe", width=0.0625, num_experts=3, router_gradient="sampled"),
        dataclasses.replace(TRAIN, router_step="reuse", router_share=0.5, accumulate=2),
    ),
    "skipping": (
        ModelConfig(arch="vgg16", kind="s_dense", width=0.0625, num_classes=2),
        dataclasses.replace(TRAIN, dataset="folder", method="standard", skip_bad_images=True, val_fraction=0.2),
    ),
}
# images of 8 x 8 end as features of 1 x 1, of which a single image has no variance
TINY = ModelConfig(arch="resnet18", kind="moe", width=0.0625, num_classes=2, image_size=8)
CASES |= {name: (TINY, dataclasses.replace(CASES["skipping"][1], method="at")) for name in ("one left", "none left")}
"""Every way in which a step looks at its whole batch."""
DAMAGED = {"skipping": 3, "one left": 7, "none left": 8}
"""Number of images in the first batch of 8 that cannot be decoded."""


def pictures(path: Path, *, damaged: int) -> Dataset:
    """40 small pictures in two classes. The first training images of the first epoch cannot be decoded."""
    if world().leads:
        generator = np.random.default_rng(0)
        for number in range(40):
            file = path / "train" / "ab"[number % 2] / f"{number:02}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(generator.integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(file)
        shutil.copytree(path / "train", path / "val")
        whole = load_dataset("folder", path)
        assert isinstance(whole.train, EncodedSet)
        files = sorted((path / "train").glob("*/*.png"))
        rows = split_dataset(whole, CASES["skipping"][1]).train_indices
        for row in rows[epoch_order(0, 0, 0, len(rows))][:damaged]:
            files[row].write_bytes(files[row].read_bytes()[:100])
    gather(None)
    return load_dataset("folder", path)


def digits() -> Dataset:
    whole = load_digits()
    return Dataset(info=whole.info, train=whole.train.take(np.arange(200)), test=whole.test.take(np.arange(40)))


class Stopping(Unwatched):
    """Asks the trainer to stop after a step."""

    def __init__(self, after: int) -> None:
        self.after = after
        self.trainer: Trainer | None = None

    def stepped(self, step: int, images: int, figures: dict[str, float]) -> None:
        if step == self.after:
            assert self.trainer is not None
            self.trainer.request_stop()


def train(case: str, path: Path, *, stop_after: int = 0, resume: bool = False, **changes: Any) -> Trainer:
    """Train one of the cases in double precision, where rounding does not hide or fake a difference."""
    model, config = CASES[case]
    torch.set_default_dtype(torch.float64)
    try:
        observer = Stopping(stop_after)
        folder = RunFolder(path)
        with folder if world().leads else nullcontext():
            trainer = Trainer(
                model,
                dataclasses.replace(config, **changes),
                pictures(path.with_name(f"{path.name}-pictures"), damaged=DAMAGED[case])
                if case in DAMAGED
                else digits(),
                folder,
                device=CPU,
                observer=observer,
                resume=load_checkpoint(folder.last) if resume else None,
            )
            observer.trainer = trainer
            assert trainer.fit() == (not stop_after)
        return trainer
    finally:
        torch.set_default_dtype(torch.float32)


def bits(trainer: Trainer) -> bytes:
    """All weights and statistics of a model."""
    return b"".join(tensor.numpy().tobytes() for tensor in trainer.model.state_dict().values())


def suite(path: Path, *, batches_done: int = 0) -> SuiteResult:
    """Evaluate a network on 20 images in batches of 8, or go on with an evaluation of which some batches are done."""
    torch.manual_seed(0)
    model = build_model(ModelConfig(arch="vgg16", kind="moe", width=0.0625))
    images = digits().test.take(np.arange(20))
    assert isinstance(images, ImageSet)
    attack = AttackConfig(eps=8 / 255, steps=2, start="uniform")
    config = SuiteConfig(attack=attack, routing=True, diagnosed=4, square_queries=0)
    if batches_done and world().leads:
        whole = EvaluationState(path, identity(model, images, config, 0)).arrays
        path.unlink()
        state = EvaluationState(path, identity(model, images, config, 0))
        state.add({name: rows[: 8 * batches_done] for name, rows in whole.items()})
    return run_suite(model, images, config, batch_size=8, state_path=path)


def reproduced(path: Path) -> list[dict[str, Any]]:
    """A piece of work that only rank 0 has the result of, twice; the second time it is done already."""
    runs: list[str] = []

    def run(command: str, *arguments: str, group: str) -> dict[str, Any]:
        runs.append(group)
        path.mkdir(exist_ok=True)
        return {"ra": 12.5} if world().leads else {}

    reproduce.run = run  # type: ignore[assignment]
    results = [reproduce.once(path, "train", ["digits"]) for _ in range(2)]
    assert runs == [f"train {path}"]
    return results


def failure(action: Callable[[], object]) -> str:
    try:
        action()
    except AdvMoEError as error:
        return str(error)
    return "nothing went wrong"


def update_with_nan(where: str) -> tuple[bool, bool]:
    """One update, in which something on the last rank only is not finite: was it made, and are the weights the same?"""
    model = build_model(ModelConfig(arch="vit", kind="moe", width=1 / 6, depth=1))
    steps = 1 if where == "attack" else 0
    config = dataclasses.replace(TRAIN, attack=AttackConfig(eps=8 / 255, steps=steps, start="clean"))
    (level,) = make_levels(("all",), model, config)
    before = [parameter.detach().clone() for parameter in model.router_parameters()]
    if world().rank == world().size - 1:
        with torch.no_grad():
            next(iter(model.expert_parameters())).fill_(torch.nan)
    place = Place(2 * world().rank, 2 * world().size)
    batch = Batch(torch.rand(2, 3, 32, 32), torch.zeros(2, dtype=torch.int64), torch.arange(2), place)
    taken = bool(adversarial_update(level, batch, config, torch.Generator()).finite)
    after = list(model.router_parameters())
    return taken, all(torch.equal(old, new) for old, new in zip(before, after, strict=True))


def two(folder: Path) -> dict[str, Any]:
    """What two ranks do."""
    found: dict[str, Any] = {case: bits(train(case, folder / "two" / case)) for case in CASES}
    for where in ("attack", "loss"):
        found[f"nan in {where}"] = update_with_nan(where)
    found["damaged"] = failure(lambda: train("skipping", folder / "damaged", skip_bad_images=False))
    found["suite"] = suite(folder / "suite-two.npz")
    found["suite goes on"] = suite(folder / "suite-two.npz", batches_done=1)
    found["reproduce"] = reproduced(folder / "work")
    # Only rank 0 is watched; it asks for a stop, and both stop.
    train("advmoe", folder / "stopped", stop_after=1)
    return found


def three(folder: Path) -> dict[str, Any]:
    """What three ranks do: with shares that are not equal, and going on with what two began."""
    return {
        **{case: bits(train(case, folder / "three" / case)) for case in ("advmoe", "few")},
        "stopped": bits(train("advmoe", folder / "stopped", resume=True)),
    }


def alone(folder: Path) -> dict[str, Any]:
    """The same by one process."""
    found: dict[str, Any] = {case: bits(train(case, folder / "one" / case)) for case in CASES}
    return found | {"suite": suite(folder / "suite-one.npz")}


def _work(action: Callable[[Path], dict[str, Any]], rank: int, size: int, port: int, folder: Path) -> None:
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    torch.set_num_threads(1)
    with joined(CPU):
        found = action(folder)
        gather(None)  # nobody leaves while another one still needs an answer
    torch.save(found, folder / f"{action.__name__}-{rank}.pt")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def run(action: Callable[[Path], dict[str, Any]], size: int, folder: Path) -> list[dict[str, Any]]:
    """What each of `size` processes returns from `action(folder)`."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["ranks"])
    port = free_port()
    processes = [context.Process(target=_work, args=(action, rank, size, port, folder)) for rank in range(size)]
    for process in processes:
        process.start()
    end = time.monotonic() + 120
    for process in processes:
        process.join(max(0.0, end - time.monotonic()))
    for process in processes:
        if process.is_alive():
            process.kill()
    assert [process.exitcode for process in processes] == [0] * size
    return [torch.load(folder / f"{action.__name__}-{rank}.pt", weights_only=False) for rank in range(size)]
