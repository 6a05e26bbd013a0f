"""`advmoe evaluate`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import numpy as np
import typer

from advmoe.cli import console
from advmoe.cli.options import DataDir, Device, Json, LimitEval, Seed, resolve_device
from advmoe.cli.progress import data_progress, evaluation_progress
from advmoe.config import AttackConfig, check, check_eps
from advmoe.data.sources import load_dataset
from advmoe.errors import CheckpointError, ConfigError
from advmoe.evaluation.accuracy import evaluate as evaluate_model
from advmoe.training.checkpoint import load_checkpoint


def evaluate(
    checkpoint: Annotated[Path, typer.Argument(help="A checkpoint, e.g. runs/NAME/best.pt.")],
    dataset: Annotated[
        str | None, typer.Option(help="Data set to test on. Default: the one it was trained on.")
    ] = None,
    steps: Annotated[int, typer.Option(help="PGD steps.")] = 50,
    eps: Annotated[
        str | None, typer.Option(help="Radius of the attack in [0, 1], e.g. 8/255. Default: the training radius.")
    ] = None,
    step_size: Annotated[str | None, typer.Option(help="Length of a PGD step. Default: a quarter of eps.")] = None,
    restarts: Annotated[int, typer.Option(help="Random starts; an image is robust if it survives them all.")] = 1,
    limit_eval: LimitEval = None,
    batch_size: Annotated[int, typer.Option(help="Images attacked at a time; changes nothing but memory.")] = 256,
    data_dir: DataDir = None,
    seed: Seed = 0,
    device: Device = "auto",
    json: Json = False,
) -> None:
    """Measure standard accuracy (SA) and robust accuracy under PGD (RA) on the test images.

    The checkpoint carries everything needed: architecture, classes, normalisation, the radius it was trained for.
    """
    check(batch_size >= 1, f"--batch-size must be at least 1, got {batch_size}")
    check(limit_eval is None or limit_eval >= 1, f"--limit-eval must be at least 1, got {limit_eval}")
    contents = load_checkpoint(checkpoint)
    model = contents.build().to(resolve_device(device))
    if eps is None:
        trained = contents.train.get("attack", {}).get("eps")
        if trained is None:
            raise ConfigError("the checkpoint does not say which radius it was trained for; give --eps, e.g. 8/255")
        radius = float(trained)
    else:
        radius = console.number(eps, "--eps")
    check_eps(radius)
    length = radius / 4 if step_size is None else console.number(step_size, "--step-size")
    attack = AttackConfig(eps=radius, steps=steps, step_size=length, restarts=restarts)
    name = dataset or contents.train.get("dataset")
    if name is None:
        raise ConfigError("the checkpoint does not say which data set it was trained on; give --dataset")
    with data_progress() as reading:
        data = load_dataset(name, data_dir, progress=reading)
    if contents.class_names and contents.class_names != data.info.class_names:
        raise CheckpointError(
            f"{checkpoint} tells {len(contents.class_names)} classes apart ({', '.join(contents.class_names[:3])}, ...), "
            f"{name} has {data.info.num_classes} ({', '.join(data.info.class_names[:3])}, ...); "
            "evaluate it on the data set it was trained on"
        )
    images = data.test
    if limit_eval is not None and limit_eval < len(images):
        images = images.take(np.sort(np.random.default_rng(seed).choice(len(images), limit_eval, replace=False)))
    with evaluation_progress(len(images)) as progress:
        result = evaluate_model(model, images, attack, batch_size=batch_size, seed=seed, progress=progress)
    figures = {"checkpoint": str(checkpoint), "dataset": data.info.name} | result.as_dict()
    if json:
        console.emit_json(figures)
        return
    rows = {
        "SA": f"{100 * result.sa:.2f} %",
        f"RA (PGD-{steps}, eps {255 * radius:g}/255)": f"{100 * result.ra:.2f} %",
        "attack": f"step {255 * length:.3g}/255, {restarts} restart(s), start {attack.start}",
        "images": result.images,
        "seed": seed,
    }
    if model.expert_layouts:
        rows["pathways changed by the attack"] = f"{100 * result.routers_fooled:.2f} %"
        rows["distinct pathways, clean"] = len(np.unique(result.clean_pathways_NL, axis=0))
    console.show_facts(f"{checkpoint} on {data.info.name} (test)", rows)
