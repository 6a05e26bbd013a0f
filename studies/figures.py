"""Draw Figs. 4 to 6 of the paper for the runs of the study: attacked routers, and pathways compared with a mask.

    python studies/figures.py --data-dir DATA --runs runs/study        # draws existing results, and names missing ones

The script attacks every finished routed run by PGD on the first test images. It stores the result
in `results/small/NETWORK/routing/SETTING-SEED.json`. A run with such a file is not attacked again.
The figures use these files only.

Fig. 6 needs a mask and MoE networks with a common order of channels: `mask_of_dense`,
`at_moe_of_dense` and `advmoe_of_dense`, which start from one `dense`. Without them, it compares MoE
networks that were trained from scratch with the mask of `sparse` or, without this run either, with
the channels of `dense` that have the largest weights. They share no order of channels, so an IoU of
1/3 is chance at r = 0.5. In the network `upcycled` all experts have the same channels.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import torch
from small import NETWORKS, PLAN, SETTINGS, tell
from tables import TITLES

from advmoe.config import AttackConfig, to_dict
from advmoe.data.sets import ImageSet
from advmoe.data.sources import load_dataset
from advmoe.evaluation.analysis import analyze
from advmoe.evaluation.dissection import route_log
from advmoe.evaluation.results import SuiteConfig
from advmoe.evaluation.suite import run_suite
from advmoe.files import write_text_atomically
from advmoe.models.network import RoutedNetwork
from advmoe.models.registry import build_model
from advmoe.reports.figures import dissections, iou_histogram
from advmoe.training.checkpoint import Checkpoint, load_checkpoint
from advmoe.training.methods import METHODS
from advmoe.training.schedule import Schedule
from advmoe.training.start import start_from

SHOWN = ("at_moe", "advmoe_dense", "advmoe_batch")
"""Settings in the figures: AT (MoE), and the first existing AdvMoE of this list."""
COMMON = ("at_moe_of_dense", "advmoe_of_dense")
"""Settings that have an order of channels in common with the mask `mask_of_dense`."""


def finished(runs: Path, name: str, seed: int) -> Checkpoint | None:
    """The last checkpoint of a run; None if the run is missing or not finished."""
    path = runs / f"{name}-{seed}" / "last.pt"
    if not path.exists():
        return None
    checkpoint = load_checkpoint(path)
    epochs = Schedule(METHODS[checkpoint.train["method"]].phases, checkpoint.train["epochs"], 1).epochs
    return checkpoint if checkpoint.metrics.get("epoch", 0) == epochs else None


def mask(runs: Path, setting: str, seed: int) -> tuple[RoutedNetwork, str] | None:
    """A Sparse-CNN with the mask of Fig. 6 for a setting, and the origin of the mask."""
    if setting in COMMON:
        learned = finished(runs, "mask_of_dense", seed)
        return None if learned is None else (learned.build(), "a mask of the same AT (Dense)")
    sparse, dense = (finished(runs, name, seed) for name in ("sparse", "dense"))
    if sparse is not None:
        return sparse.build(), "AT (Sparse)"
    if dense is None:
        return None
    model = build_model(dataclasses.replace(dense.model, kind="sparse_cnn", model_scale=0.5))
    start_from(model, dense)
    return model, "largest channels of AT (Dense)"


def routing(
    checkpoint: Checkpoint, images: ImageSet, attack: AttackConfig, setting: str, seed: int, runs: Path
) -> dict[str, Any]:
    """The routing of a run, clean and under PGD, and its statistics."""
    model = checkpoint.build()
    suite = SuiteConfig(attack=attack, routing=False, diagnosed=0)
    log = route_log(run_suite(model, images, suite, seed=seed), model)
    against = mask(runs, setting, seed)
    found = analyze(log, model, sparse=None if against is None else against[0])
    for values in found["conditions"].values():
        for long in ("load_by_class", "flow", "frequent"):
            del values[long]
    found["conditions"].pop("worst", None)  # routing is not attacked here
    return found | {"attack": to_dict(attack), "mask_from": None if against is None else against[1]}


def draw(results: Path, name: str) -> dict[str, str]:
    """The figures of a network, by file name, from the stored routings of the seed with most settings."""
    of_seed: dict[int, dict[str, Any]] = {}
    for path in sorted((results / "routing").glob("*-*.json")):
        found = json.loads(path.read_text())
        of_seed.setdefault(found["seed"], {})[found["setting"]] = found
    stored = max(of_seed.values(), key=lambda found: len(found.keys() & set(SHOWN)), default={})
    adv = next((setting for setting in SHOWN[1:] if setting in stored), None)
    chosen = {TITLES[setting]: stored[setting] for setting in ("at_moe", adv) if setting in stored}
    if not chosen:
        return {}
    drawn = {f"study-{name}-fig4-5.svg": dissections(chosen)}
    common = next((found for found in of_seed.values() if found.keys() >= set(COMMON)), None)
    compared = chosen if common is None else {TITLES[setting]: common[setting] for setting in COMMON}
    histograms = {
        f"{title}, {'clean' if condition == 'clean' else 'attacked'}": found["mask"][condition]
        for title, found in compared.items()
        if "mask" in found
        for condition in ("clean", "pgd")
    }
    if histograms:
        images = next(iter(compared.values()))["images"]
        drawn[f"study-{name}-fig6.svg"] = iou_histogram(histograms, "Pathway and mask", f"{images} images")
    return drawn


def main() -> None:
    root = Path(__file__).parent.parent
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data-dir", type=Path, help="as for advmoe train")
    parser.add_argument("--dataset", default="cifar10")
    parser.add_argument("--network", choices=list(NETWORKS), default="resnet18")
    parser.add_argument("--runs", type=Path, default=Path("runs/study"), help="folder of the checkpoints")
    parser.add_argument("--results", type=Path, default=root / "results" / "small")
    parser.add_argument("--docs", type=Path, default=root / "docs", help="folder of the figures")
    parser.add_argument("--images", type=int, default=1000, help="test images attacked")
    parser.add_argument("--steps", type=int, default=20, help="of PGD")
    options = parser.parse_args()
    torch.set_num_threads(1)
    runs, results = options.runs / options.network, options.results / options.network
    data = load_dataset(options.dataset, options.data_dir)
    images = data.test.take(np.arange(min(options.images, len(data.test))))
    assert isinstance(images, ImageSet)
    for name, seed in dict.fromkeys(PLAN):
        path = results / "routing" / f"{name}-{seed}.json"
        if SETTINGS[name][0]["kind"] != "moe" or path.exists():
            continue
        checkpoint = finished(runs, name, seed)
        if checkpoint is None:
            tell(f"{name}, seed {seed}: not there, left out")
            continue
        tell(f"{name}, seed {seed}")
        found = routing(checkpoint, images, AttackConfig(steps=options.steps), name, seed, runs)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text_atomically(path, json.dumps({"setting": name, "seed": seed, **found}) + "\n")
    for name, svg in draw(results, options.network).items():
        write_text_atomically(options.docs / name, svg + "\n")
        tell(f"drawn: {options.docs / name}")


if __name__ == "__main__":
    main()
