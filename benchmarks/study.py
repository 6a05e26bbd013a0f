"""Does routing pay at small scale? Trains and tests every cell (setting x seed) that has no result yet.

    python benchmarks/study.py --data-dir DATA --runs runs/study            # all cells, in order of what they tell
    python benchmarks/study.py --only s_dense dense --seeds 0              # some of them
    python benchmarks/study.py --smoke                                     # embedded digits, seconds

A cell that is done is one file, `results/small/study/SETTING-SEED.json`, and is skipped; one that was interrupted goes
on from its last checkpoint. So the same command can run in the background, be stopped at any time, and be repeated.

Every network has the same images, epochs, schedule and attack in training. Its last weights count: nothing is chosen on
any image. Test images are used once: SA, RA by PGD, and for routed networks the worst over all views of the routing and
the route attack. `correct` holds who was classified correctly, image by image, for paired comparisons.
"""

from __future__ import annotations

import argparse
import base64
import dataclasses
import json
import os
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import torch
from torch import Tensor

import advmoe
from advmoe.attacks.pathways import RouteAttackConfig, route_attack
from advmoe.attacks.pgd import cross_entropy_objective, pgd
from advmoe.attacks.relaxations import is_routed, routing_views
from advmoe.attacks.untargeted import starts, untargeted
from advmoe.config import AttackConfig, to_dict
from advmoe.data.loader import BatchLoader
from advmoe.data.sets import ImageSet
from advmoe.data.sources import dataset_info, load_dataset
from advmoe.evaluation.cost import hardware, measure_cost
from advmoe.evaluation.suite import common_pathways
from advmoe.files import write_atomically
from advmoe.models.modes import evaluating
from advmoe.models.network import RoutedNetwork
from advmoe.settings import resolve
from advmoe.training.checkpoint import load_checkpoint
from advmoe.training.loop import Trainer
from advmoe.training.run_folder import RunFolder

BACKBONE = {"arch": "vgg16", "width": 0.125}
"""A width at which Dense is clearly better than S-Dense, so that there is something for experts to gain."""
EPOCHS = 3
MOE = {"kind": "moe", "num_experts": 2, "model_scale": 0.5, "granularity": "layer", "router_gradient": "advantage"}
SETTINGS: Mapping[str, tuple[Mapping[str, Any], Mapping[str, Any]]] = {
    "s_dense": ({"kind": "s_dense"}, {"method": "at"}),
    "dense": ({"kind": "dense"}, {"method": "at"}),
    "at_moe": (MOE, {"method": "at", "specialisation": 0.25}),
    "advmoe": (MOE, {"method": "advmoe", "specialisation": 0.25}),
}
"""Fields of `ModelConfig` and of `TrainConfig`, by the name of the setting."""
PLAN = [(name, seed) for seed in (0, 1, 2) for name in SETTINGS]
"""Cells, those that tell most first."""
ATTACK = AttackConfig(steps=20)
FLIPS = 2048
"""Test images whose changes of routing are counted."""
ROUTE = RouteAttackConfig(sampled=2, greedy=2)


class Watch:
    """Prints an epoch's figures, and stops the run when the script is told to stop."""

    def started(self, epochs: int, steps_per_epoch: int, step: int) -> None:
        tell(f"  {epochs} epochs of {steps_per_epoch} steps, from step {step}")

    def stepped(self, step: int, images: int, figures: dict[str, float]) -> None:
        pass

    def validated(self, record: dict[str, Any]) -> None:
        shown = ("epoch", "train_loss", "val_sa", "val_ra_pgd10", "images_per_second")
        tell("  " + ", ".join(f"{name} {record[name]}" for name in shown))

    def warned(self, message: str) -> None:
        tell(f"  {message}")


def tell(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def packed(correct: Tensor) -> str:
    """One bit per image, in base64: `numpy.unpackbits(numpy.frombuffer(base64.b64decode(s), "u1"))[:images]`."""
    return base64.b64encode(np.packbits(correct.numpy()).tobytes()).decode()


def test(model: RoutedNetwork, images: ImageSet, seed: int) -> dict[str, Any]:
    """SA, RA and what routing adds to the attack, on all the images given."""
    found: dict[str, list[Tensor]] = {"clean": [], "pgd": [], "views": [], "worst": []}
    flips: list[Tensor] = []
    device = torch.device("cpu")
    common_ML, counts = common_pathways(model, images, 256, device)
    with evaluating(model):
        for batch in BatchLoader(images, batch_size=256).epoch(0):
            x, y = batch.images, batch.labels
            with torch.no_grad():
                logits, routing = model.forward_with_routing(x)
            alive = logits.argmax(dim=1) == y
            found["clean"].append(alive.clone())
            adversarial, survived = untargeted(model, x, y, batch.indices, ATTACK, seed)
            robust = alive & survived
            found["pgd"].append(robust.clone())
            if is_routed(model):
                if len(flips) * len(y) < FLIPS:  # whoever has lost is attacked to the end too
                    to_the_end = pgd(
                        model, x, cross_entropy_objective(y), ATTACK, start=starts(x, batch.indices, ATTACK, seed, [0])
                    )
                    with torch.no_grad():
                        attacked = model.forward_with_routing(to_the_end)[1].expert_index_BL
                    flips.append(attacked != routing.expert_index_BL)
                for name, forward in routing_views(model).items():
                    rows = robust.nonzero().squeeze(1)
                    if name != "detached" and len(rows):
                        candidates, _ = untargeted(forward, x[rows], y[rows], batch.indices[rows], ATTACK, seed)
                        with torch.no_grad():
                            robust[rows] = model(candidates).argmax(dim=1) == y[rows]
                found["views"].append(robust.clone())
                rows = robust.nonzero().squeeze(1)
                if len(rows):
                    robust[rows] = route_attack(
                        model,
                        x[rows],
                        y[rows],
                        batch.indices[rows],
                        ATTACK,
                        seed,
                        observed_ML=common_ML[:16],
                        nearby=adversarial[rows],
                        config=ROUTE,
                    )[1]
            found["worst"].append(robust)
    outcomes = {name: torch.cat(parts) for name, parts in found.items() if parts}
    figures: dict[str, Any] = {
        "images": len(images),
        "attack": to_dict(ATTACK),
        "sa": per_cent(outcomes["clean"]),
        **{f"ra_{name}": per_cent(outcomes[name]) for name in ("pgd", "views", "worst") if name in outcomes},
    }
    if is_routed(model):
        figures |= {
            "route_attack": dataclasses.asdict(ROUTE),
            "pathways": len(counts),
            "decisions_flipped": per_cent(torch.cat(flips)),
            "images_flipped": per_cent(torch.cat(flips).any(dim=1)),
        }
    return figures | {"correct": {name: packed(outcome) for name, outcome in outcomes.items()}}


def per_cent(values: Tensor) -> float:
    return round(100 * float(values.double().mean()), 2)


def run_cell(name: str, seed: int, options: argparse.Namespace) -> None:
    """Train, test, write the result."""
    model_settings, train_settings = SETTINGS[name]
    result = options.out / f"{name}-{seed}.json"
    tell(f"{name}, seed {seed}")
    small = {"limit_train": 256, "batch_size": 64, "epochs": 1, "val_limit": 32} if options.smoke else {}
    name_of_data = "digits" if options.smoke else "cifar10"
    config, train = resolve(
        dataset_info(name_of_data, options.data_dir),
        {**BACKBONE, **model_settings},
        {"epochs": EPOCHS, "seed": seed, "val_limit": 1000, **train_settings, **small},
    )
    data = load_dataset(name_of_data, options.data_dir)
    began = time.monotonic(), time.process_time()
    with RunFolder(options.runs / f"{name}-{seed}") as folder:
        resume = load_checkpoint(folder.last) if folder.last.exists() else None
        trainer = Trainer(config, train, data, folder, device=torch.device("cpu"), observer=Watch(), resume=resume)
        first_step = trainer.step
        trainer.fit()
        model = load_checkpoint(folder.last).build()
        curve = [json.loads(line) for line in folder.metrics.read_text().splitlines()]
    trained = time.monotonic(), time.process_time()
    images = data.test.take(np.arange(40)) if options.smoke else data.test
    assert isinstance(images, ImageSet)
    figures = test(model, images, seed)
    cost = measure_cost(model, config.image_size)
    record = {
        "setting": name,
        "seed": seed,
        "data": options.data_name,
        "model": to_dict(config),
        "train": to_dict(train),
        "parameters": cost.parameters,
        "gflops": cost.gflops,
        "curve": [{key: value for key, value in epoch.items() if not isinstance(value, list)} for epoch in curve],
        "train_cpu_seconds": round(trained[1] - began[1]) if first_step == 0 else None,
        "train_seconds": round(trained[0] - began[0]) if first_step == 0 else None,
        "test": figures,
        "hardware": hardware(torch.device("cpu")),
        "versions": {"advmoe": advmoe.__version__, "torch": torch.__version__},
    }
    write_atomically(result, lambda temporary: temporary.write_text(json.dumps(record, indent=1) + "\n"))
    tell(f"  test: { ({key: value for key, value in figures.items() if isinstance(value, float)}) } -> {result}")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data-dir", type=Path, help="as for advmoe train")
    parser.add_argument("--data-name", default="CIFAR-10", help="name of the data in the results")
    parser.add_argument("--runs", type=Path, default=Path("runs/study"), help="folder of the checkpoints")
    parser.add_argument("--out", type=Path, default=Path("results/small/study"), help="folder of the results")
    parser.add_argument("--only", nargs="+", choices=list(SETTINGS), help="these settings")
    parser.add_argument("--seeds", nargs="+", type=int, help="these seeds")
    parser.add_argument("--smoke", action="store_true", help="a run of seconds on the embedded digits")
    options = parser.parse_args()
    torch.set_num_threads(1)
    for name, seed in PLAN:
        if (options.only and name not in options.only) or (options.seeds and seed not in options.seeds):
            continue
        if (options.out / f"{name}-{seed}.json").exists():
            tell(f"{name}, seed {seed}: done")
        else:
            run_cell(name, seed, options)


if __name__ == "__main__":
    main()
