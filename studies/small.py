"""Train and test all cells of the study of small networks that have no result yet.

    python studies/small.py --data-dir DATA --runs runs/study              # all cells, the most important ones first
    python studies/small.py --only s_dense dense --seeds 0              # some of them
    python studies/small.py --network vgg16                             # the first, shorter setting
    python studies/small.py --smoke                                     # embedded digits, seconds

The result of a cell is one file, `results/small/NETWORK/SETTING-SEED.json`. A cell with a file is
skipped. An interrupted cell continues from its last checkpoint. The same command can therefore be
stopped and repeated.

All networks have the same images, epochs, schedule and attack in training. The last weights are
tested, so no image influences the choice of weights. On all test images, SA and RA under PGD are
measured. On the first of them, routed networks also meet the views of the routing, the route attack
and the attack on the routers alone, and are compared with controls. All networks meet as many
starts of PGD there. `correct` stores whether each image was classified correctly.

Shape suffixes: B batch, L MoE layers, M pathways.
"""

from __future__ import annotations

import argparse
import base64
import dataclasses
import json
import os
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import torch
from torch import Tensor

import advmoe
from advmoe.attacks.pathways import RouteAttackConfig, attack_routers, route_attack
from advmoe.attacks.pgd import cross_entropy_objective, pgd, plain
from advmoe.attacks.relaxations import is_routed, routing_views
from advmoe.attacks.untargeted import untargeted
from advmoe.attacks.victims import Victims
from advmoe.cli.signals import stopping
from advmoe.config import AttackConfig, to_dict
from advmoe.data.loader import BatchLoader
from advmoe.data.sets import ImageSet
from advmoe.data.sources import dataset_info, load_dataset
from advmoe.evaluation.controls import CALIBRATION_IMAGES, CONTROLS, calibration_batches, controlled
from advmoe.evaluation.cost import hardware, measure_cost
from advmoe.evaluation.suite import common_pathways
from advmoe.files import write_atomically
from advmoe.models.modes import evaluating
from advmoe.models.network import RoutedNetwork
from advmoe.settings import resolve
from advmoe.training.checkpoint import file_digest, load_checkpoint
from advmoe.training.loop import Trainer
from advmoe.training.run_folder import RunFolder


class Network(NamedTuple):
    """A backbone of the study, and what its pathways are."""

    backbone: Mapping[str, Any]
    """Fields of `ModelConfig`."""
    epochs: int
    num_experts: int = 2
    model_scale: float = 0.5

    def model(self, settings: Mapping[str, Any]) -> dict[str, Any]:
        """Fields of `ModelConfig` of a setting on this backbone."""
        scale = {"s_dense": {"model_scale": self.model_scale}, "moe": self._experts}.get(settings["kind"], {})
        return {**self.backbone, **settings, **scale}

    @property
    def _experts(self) -> dict[str, Any]:
        return {"model_scale": self.model_scale, "num_experts": self.num_experts}


NETWORKS: Mapping[str, Network] = {
    "resnet18": Network({"arch": "resnet18", "width": 0.125}, 6),
    "resnet18-n4": Network({"arch": "resnet18", "width": 0.125}, 6, num_experts=4, model_scale=0.25),
    "vgg16": Network({"arch": "vgg16", "width": 0.125}, 3),
}
"""Experts can only gain if Dense is clearly better than S-Dense."""
MOE = {"kind": "moe", "granularity": "layer"}
LEARNED = {"specialization": 0.25}
CHEAP = {"router_step": "reuse", "router_share": 0.5}
BF16 = ("s_dense", "at_moe")
"""Settings that are also trained with attacks in bf16."""
SETTINGS: dict[str, tuple[Mapping[str, Any], Mapping[str, Any]]] = {
    "s_dense": ({"kind": "s_dense"}, {"method": "at"}),
    "dense": ({"kind": "dense"}, {"method": "at"}),
    "sparse": ({"kind": "sparse_cnn"}, {"method": "at_sparse"}),
    "at_moe": (MOE | {"router_gradient": "advantage"}, {"method": "at"} | LEARNED),
    "advmoe": (MOE | {"router_gradient": "advantage"}, {"method": "advmoe"} | LEARNED),
    "advmoe_batch": (
        MOE | {"router_gradient": "dense"},
        {"method": "advmoe", "router_statistics": "batch"} | LEARNED,
    ),
    "advmoe_dense": (MOE | {"router_gradient": "dense"}, {"method": "advmoe"} | LEARNED),
    "at_image": (MOE | {"router_gradient": "dense", "granularity": "image"}, {"method": "at"} | LEARNED),
    "image_mixture": (
        MOE | {"router_gradient": "dense", "granularity": "image"},
        {"method": "at", "attack_routing": "mixture"} | LEARNED,
    ),
    "shared": (
        MOE | {"granularity": "block", "router_gradient": "value", "shared": 1.0, "expert_affine": True},
        {"method": "at"},
    ),
    "advmoe_cheap": (MOE | {"router_gradient": "dense"}, {"method": "advmoe"} | LEARNED | CHEAP),
    "margin": (MOE | {"router_gradient": "dense"}, {"method": "advmoe", "attack_routing": "margin"} | LEARNED),
    "mixture": (MOE | {"router_gradient": "dense"}, {"method": "advmoe", "attack_routing": "mixture"} | LEARNED),
    "last_stage": (MOE | {"router_gradient": "dense", "routed": "last-1-stages"}, {"method": "advmoe"} | LEARNED),
    "upcycled": (MOE | {"router_gradient": "dense"}, {"method": "advmoe", "reinitialize": 0.5} | LEARNED),
    "mask_of_dense": ({"kind": "sparse_cnn"}, {"method": "mask_at"}),
    "at_moe_of_dense": (MOE | {"router_gradient": "advantage"}, {"method": "at", "upcycling": "windows"} | LEARNED),
    "advmoe_of_dense": (MOE | {"router_gradient": "dense"}, {"method": "advmoe", "upcycling": "windows"} | LEARNED),
}
"""Fields of `ModelConfig` and of `TrainConfig`, by the name of the setting."""
STARTS_FROM = {
    "upcycled": "s_dense",
    "mask_of_dense": "dense",
    "at_moe_of_dense": "dense",
    "advmoe_of_dense": "dense",
}
"""Settings that start from the last checkpoint of another setting."""
SETTINGS |= {f"{name}_bf16": (SETTINGS[name][0], {**SETTINGS[name][1], "precision": "bf16_attack"}) for name in BF16}
EQUAL_TIME = {
    "s_dense_time": ("s_dense", 2.64),
    "at_moe_time": ("at_moe", 1.66),
    "advmoe_cheap_time": ("advmoe_cheap", 1.52),
}
"""Settings with AdvMoE's training time: the trained setting, and how many epochs of it take as long as one of AdvMoE.

The ratios are those of the images per second in benchmarks/train_step.py at width 1/8 (docs/log.md, 2026-11-29), in
which all settings take turns. Times of whole runs depend on what else a machine does."""
LONG = {
    "dense_long": ("dense", EQUAL_TIME["s_dense_time"][1]),
    "at_moe_long": ("at_moe", EQUAL_TIME["s_dense_time"][1]),
}
"""Settings with as many epochs as `s_dense_time`, closer to convergence, at equal epochs."""
LONGER = EQUAL_TIME | LONG
OF_DENSE = ("mask_of_dense", "at_moe_of_dense", "advmoe_of_dense")
"""Settings for Fig. 6. They start from a trained network, and have half of the epochs."""
SETTINGS |= {name: SETTINGS[of] for name, (of, _) in LONGER.items()}
MAIN = ("s_dense", "dense", "at_moe", "advmoe_dense")
PLAN = [
    *((name, seed) for seed in range(3) for name in MAIN),
    *((name, seed) for seed in range(3) for name in LONGER),
    *((name, seed) for seed in range(3) for name in ("at_image", "image_mixture")),
    *((name, 0) for name in ("advmoe", "sparse", "shared", "last_stage", "advmoe_batch", "advmoe_cheap", "upcycled")),
    *((name, 0) for name in ("margin", "mixture")),
    *((name, 0) for name in OF_DENSE),
    *((name, seed) for seed in range(3) for name in ("s_dense_bf16", "at_moe_bf16")),
    *((name, seed) for seed in (1, 2) for name in ("advmoe", "sparse", "shared")),
]
"""All cells, the most important ones first."""
ATTACK = AttackConfig(steps=20)
ROUTED_IMAGES = 2000
"""Number of first test images on which the routing is attacked and controls are tested."""
ROUTE = RouteAttackConfig(sampled=2, greedy=2)
STARTS = 10
"""Attacks on these images: PGD, five views of the routing, four pathways; and, to compare with, so many starts."""
DRAWS = 5
"""Number of draws of random routers."""


class Watch:
    """Prints an epoch's figures."""

    def started(self, epochs: int, steps_per_epoch: int, step: int) -> None:
        tell(f"  {epochs} epochs of {steps_per_epoch} steps, from step {step}")

    def stepped(self, step: int, images: int, figures: dict[str, float]) -> None:
        pass

    def validated(self, record: dict[str, Any]) -> None:
        shown = ("epoch", "train_loss", "val_sa", "val_ra_pgd10", "images_per_second")
        tell("  " + ", ".join(f"{name} {record[name]}" for name in shown))

    def warned(self, message: str, **advice: Any) -> None:
        tell(f"  {message}")


def tell(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def packed(correct: Tensor) -> str:
    """One bit per image, in base64: `numpy.unpackbits(numpy.frombuffer(base64.b64decode(s), "u1"))[:images]`."""
    return base64.b64encode(np.packbits(correct.numpy()).tobytes()).decode()


def test(
    model: RoutedNetwork, images: ImageSet, seed: int, routed_images: int, calibration: ImageSet
) -> dict[str, Any]:
    """SA and RA on all images. On the first images: further starts of PGD, attacks on the routing, and controls.

    The statistics of controls are computed from the images `calibration`.
    """
    with evaluating(model):
        clean, pgd_robust = attacked(model, images, seed)
    figures: dict[str, Any] = {
        "images": len(images),
        "attack": to_dict(ATTACK),
        "sa": per_cent(clean),
        "ra_pgd": per_cent(pgd_robust),
        "correct": {"clean": packed(clean), "pgd": packed(pgd_robust)},
    }
    few = images.take(np.arange(min(routed_images, len(images))))
    with evaluating(model):
        survived = attacked(model, few, seed, starts=STARTS)[1]
    figures["starts"] = {"images": len(few), "starts": STARTS, "ra": per_cent(survived), "correct": packed(survived)}
    if not is_routed(model):
        return figures
    with evaluating(model):
        figures["routing"] = routing_figures(model, few, seed, pgd_robust[: len(few)])
    batches = calibration_batches(model, calibration, ATTACK, seed=seed)
    figures["controls"] = {}
    for control in CONTROLS:
        if control == "averaged" and model.config.router_gradient == "value":
            continue  # equal scores would scale the outputs too
        draws = []
        for draw in range(DRAWS if control == "random" else 1):
            other = controlled(model, control, seed + draw, calibration=batches)
            with evaluating(other):
                right, robust = attacked(other, few, seed)
            draws.append(
                {
                    "sa": per_cent(right),
                    "ra_pgd": per_cent(robust),
                    "same_decisions": round(100 * agreement(model, other, few), 2),
                    "correct": {"clean": packed(right), "pgd": packed(robust)},
                }
            )
        figures["controls"][control] = draws
    return figures


@torch.no_grad()
def agreement(model: RoutedNetwork, other: RoutedNetwork, images: ImageSet) -> float:
    """Share of decisions on clean images that a model and its control have in common."""
    equal = []
    with evaluating(model), evaluating(other):
        for batch in BatchLoader(images, batch_size=256).epoch(0):
            taken = [network.forward_with_routing(batch.images)[1].expert_index_BL for network in (model, other)]
            equal.append(taken[0] == taken[1])
    return float(torch.cat(equal).double().mean())


def victims_of(model: RoutedNetwork, images: ImageSet, seed: int) -> Iterator[Victims]:
    for batch in BatchLoader(images, batch_size=256).epoch(0):
        yield Victims.of(model, batch, ATTACK, seed=seed)


def attacked(model: RoutedNetwork, images: ImageSet, seed: int, starts: int = 1) -> tuple[Tensor, Tensor]:
    """Whether each image is classified correctly, clean and under PGD of so many starts, bool [n] each."""
    clean, robust = [], []
    attack = dataclasses.replace(ATTACK, restarts=starts)
    for victims in (victims.under(attack) for victims in victims_of(model, images, seed)):
        right = victims.right()
        survived = torch.zeros_like(right)
        if right.any():
            survived[right] = untargeted(victims.take(right))[1]
        clean.append(right)
        robust.append(survived)
    return torch.cat(clean), torch.cat(robust)


def routing_figures(model: RoutedNetwork, images: ImageSet, seed: int, pgd_robust: Tensor) -> dict[str, Any]:
    """RA under PGD, all views of the routing and the route attack, and the changes of the routing.

    They are counted under PGD, which does not aim at them, and under an attack that aims at nothing
    else (RA-R).
    """
    assert len(routing_views(model)) + ROUTE.sampled + ROUTE.greedy == STARTS  # PGD is one of the views
    common_ML, counts = common_pathways(model, images, 256, torch.device("cpu"))
    views, worst, flips, aimed_flips = [], [], [], []
    for number, victims in enumerate(victims_of(model, images, seed)):
        robust = pgd_robust[256 * number :][: len(victims)].clone()
        with torch.no_grad():
            own = model.forward_with_routing(victims.images)[1].expert_index_BL
        # broken images and images that are misclassified when clean are attacked to the end too
        found = pgd(
            plain(model), victims.images, cross_entropy_objective(victims.labels), ATTACK, start=victims.starts()
        )
        with torch.no_grad():
            flips.append(model.forward_with_routing(found)[1].expert_index_BL != own)
        aimed = attack_routers(victims, own)[0]
        with torch.no_grad():
            aimed_flips.append(model.forward_with_routing(aimed)[1].expert_index_BL != own)
        for name, forward in routing_views(model).items():
            rows = robust.nonzero().squeeze(1)
            if name != "detached" and len(rows):
                robust[rows] = victims.take(rows).right(untargeted(victims.take(rows), forward)[0])
        views.append(robust.clone())
        rows = robust.nonzero().squeeze(1)
        if len(rows):
            robust[rows] = route_attack(
                victims.take(rows), observed_ML=common_ML[:16], nearby=found[rows], config=ROUTE
            )[1]
        worst.append(robust)
    return {
        "images": len(images),
        "ra_pgd": per_cent(pgd_robust),
        "ra_views": per_cent(torch.cat(views)),
        "ra_worst": per_cent(torch.cat(worst)),
        "correct": packed(torch.cat(worst)),
        "route_attack": dataclasses.asdict(ROUTE),
        "pathways": len(counts),
        "decisions_flipped": per_cent(torch.cat(flips)),
        "images_flipped": per_cent(torch.cat(flips).any(dim=1)),
        "decisions_flipped_by_aim": per_cent(torch.cat(aimed_flips)),
        "images_flipped_by_aim": per_cent(torch.cat(aimed_flips).any(dim=1)),
    }


def per_cent(values: Tensor) -> float:
    return round(100 * float(values.double().mean()), 2)


def epochs_of(name: str, network: str) -> int:
    """Number of epochs of a setting."""
    share = LONGER[name][1] if name in LONGER else 0.5 if name in OF_DENSE else 1.0
    return round(NETWORKS[network].epochs * share)


def run_cell(name: str, seed: int, epochs: int, options: argparse.Namespace) -> None:
    """Train, test, write the result."""
    model_settings, train_settings = SETTINGS[name]
    result = options.out / f"{name}-{seed}.json"
    tell(f"{name}, seed {seed}")
    small = {"limit_train": 256, "batch_size": 64, "val_limit": 32} if options.smoke else {}
    initial = None
    if name in STARTS_FROM:
        start = options.runs / f"{STARTS_FROM[name]}-{seed}" / "last.pt"
        if not start.exists():
            sys.exit(
                f"{name} starts from {start}, which is not there; train {STARTS_FROM[name]} with seed {seed} first"
            )
        initial = load_checkpoint(start)
        train_settings = {**train_settings, "init": file_digest(start)}
    name_of_data = "digits" if options.smoke else "cifar10"
    config, train = resolve(
        dataset_info(name_of_data, options.data_dir),
        NETWORKS[options.network].model(model_settings),
        {"epochs": epochs, "seed": seed, "val_limit": 1000, **train_settings, **small},
    )
    data = load_dataset(name_of_data, options.data_dir)
    began = time.monotonic(), time.process_time()
    with RunFolder(options.runs / f"{name}-{seed}") as folder:
        resume = load_checkpoint(folder.last) if folder.last.exists() else None
        trainer = Trainer(
            config, train, data, folder, device=torch.device("cpu"), observer=Watch(), resume=resume, initial=initial
        )
        first_step = trainer.step
        with stopping(trainer.request_stop):
            complete = trainer.fit()
        if not complete:
            sys.exit(f"stopped and saved in {folder.path}; the same command goes on")
        model = load_checkpoint(folder.last).build()
        curve = [json.loads(line) for line in folder.metrics.read_text().splitlines()]
    trained = time.monotonic(), time.process_time()
    images = data.test.take(np.arange(40)) if options.smoke else data.test
    calibration = data.train.take(np.arange(64 if options.smoke else CALIBRATION_IMAGES))
    assert isinstance(images, ImageSet)
    assert isinstance(calibration, ImageSet)
    figures = test(model, images, seed, 40 if options.smoke else ROUTED_IMAGES, calibration)
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
    parser.add_argument("--network", choices=list(NETWORKS), default="resnet18", help="backbone and epochs")
    parser.add_argument("--runs", type=Path, default=Path("runs/study"), help="folder of the checkpoints")
    parser.add_argument("--out", type=Path, default=Path("results/small"), help="folder of the results")
    parser.add_argument("--only", nargs="+", choices=list(SETTINGS), help="these settings")
    parser.add_argument("--seeds", nargs="+", type=int, help="these seeds")
    parser.add_argument("--smoke", action="store_true", help="a run of seconds on the embedded digits")
    options = parser.parse_args()
    options.runs, options.out = options.runs / options.network, options.out / options.network
    torch.set_num_threads(1)
    for name, seed in PLAN:
        if (options.only and name not in options.only) or (options.seeds and seed not in options.seeds):
            continue
        if (options.out / f"{name}-{seed}.json").exists():
            tell(f"{name}, seed {seed}: done")
        else:
            run_cell(name, seed, 1 if options.smoke else epochs_of(name, options.network), options)


if __name__ == "__main__":
    main()
