"""`advmoe evaluate`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from advmoe.cli import console
from advmoe.cli.options import DataDir, Device, Json, LimitEval, Seed
from advmoe.cli.progress import data_progress, suite_progress
from advmoe.config import AttackConfig, check, check_eps
from advmoe.errors import CheckpointError, ConfigError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from torch import nn

    from advmoe.data.sets import Dataset, Images, ImageSet
    from advmoe.models.network import RoutedNetwork
    from advmoe.routing_log import PathwayChannels
    from advmoe.training.checkpoint import Checkpoint

CARD, STATE, ROUTES = "card.json", "state.npz", "routes.npz"
"""What `--out` holds."""
SWEEP_SHARES = (0.25, 0.5, 0.75, 1.5, 2.0)
"""Radii of the whole suite's sweep, relative to eps."""
UNTRUSTED = 2
"""Exit status of --strict if a diagnostic failed."""


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
    routing: Annotated[
        bool, typer.Option("--routing", help="Attack the routing of an MoE-CNN too: gradient views, route attack.")
    ] = False,
    autoattack: Annotated[bool, typer.Option("--autoattack", help="Run AutoAttack (standard version).")] = False,
    eps_sweep: Annotated[
        str | None, typer.Option(help="Further radii for PGD, e.g. 2/255,4/255.", metavar="EPS,EPS,...")
    ] = None,
    suite: Annotated[
        bool, typer.Option("--suite", help="Everything: --routing, --autoattack and a sweep from eps/4 to 2 eps.")
    ] = False,
    diagnose: Annotated[int, typer.Option(help="Images that the diagnostics look at; 0 leaves them out.")] = 64,
    mask: Annotated[
        Path | None, typer.Option(help="Checkpoint of a Sparse-CNN: compare pathways with its mask pathway (Fig. 6).")
    ] = None,
    latency: Annotated[bool, typer.Option(help="Time single images and whole batches, for a few seconds.")] = True,
    strict: Annotated[
        bool, typer.Option("--strict", help="Exit with 2 if a diagnostic fails: the numbers are not to be trusted.")
    ] = False,
    out: Annotated[
        Path | None,
        typer.Option(help="Folder for the result card, the route log and the state from which to go on."),
    ] = None,
    limit_eval: LimitEval = None,
    batch_size: Annotated[int, typer.Option(help="Images attacked at a time; changes nothing but memory.")] = 256,
    data_dir: DataDir = None,
    seed: Seed = 0,
    device: Device = "auto",
    json: Json = False,
) -> None:
    """Measure standard accuracy (SA) and robust accuracy (RA) on the test images, and whether RA can be trusted.

    The checkpoint carries everything needed: architecture, classes, normalisation, the radius it was trained for.
    With --out, an interrupted evaluation goes on where it stopped when the same command is given again.
    """
    from advmoe.attacks.autoattack import package
    from advmoe.data.views import in_memory
    from advmoe.device import resolve_device
    from advmoe.evaluation.card import make_card, save_card
    from advmoe.evaluation.cost import hardware, measure_cost
    from advmoe.evaluation.dissection import route_log
    from advmoe.evaluation.pathways import mask_similarity
    from advmoe.evaluation.results import SuiteConfig
    from advmoe.evaluation.suite import run_suite
    from advmoe.training.checkpoint import load_checkpoint

    check(batch_size >= 1, f"--batch-size must be at least 1, got {batch_size}")
    check(limit_eval is None or limit_eval >= 1, f"--limit-eval must be at least 1, got {limit_eval}")
    check(diagnose > 0 or not strict, "--strict judges by the diagnostics; give --diagnose 1 or more")
    contents = load_checkpoint(checkpoint)
    model = contents.build().to(resolve_device(device))
    channels, masked = (None, None) if mask is None else _comparable(model, mask)
    radius = _radius(contents, eps)
    length = radius / 4 if step_size is None else console.number(step_size, "--step-size")
    sweep = tuple(console.number(text, "--eps-sweep") for text in eps_sweep.split(",")) if eps_sweep else ()
    if suite and not sweep:
        sweep = tuple(min(share * radius, 1.0) for share in SWEEP_SHARES)
    config = SuiteConfig(
        attack=AttackConfig(eps=radius, steps=steps, step_size=length, restarts=restarts),
        routing=routing or suite,
        autoattack=autoattack or suite,
        eps_sweep=sweep,
        diagnosed=diagnose,
    )
    if config.autoattack:
        package()
    data = _load(contents, checkpoint, dataset, data_dir)
    images = in_memory(_chosen(data.test, limit_eval, seed), contents.model.image_size)
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
    with suite_progress(len(images)) as progress:
        result = run_suite(
            model,
            images,
            config,
            batch_size=batch_size,
            seed=seed,
            state_path=None if out is None else out / STATE,
            progress=progress,
        )
    card = make_card(
        result,
        name=f"{checkpoint.parent.name}/{checkpoint.stem}",
        dataset=data.info.name,
        model=contents.model,
        train=contents.train,
        cost=measure_cost(model, contents.model.image_size),
        device=hardware(next(model.parameters()).device),
        latency=_latency(model, images, batch_size) if latency else None,
    )
    log = route_log(result, model)
    if channels is not None and masked is not None:
        similar = mask_similarity(log, [name for name, _ in log.conditions], channels, masked)
        card["advmoe"]["mask_iou"] = {each.condition: round(float(each.iou.mean()), 4) for each in similar}
    if out is not None:
        save_card(out / CARD, card)
        log.save(out / ROUTES)
    if json:
        console.emit_json({"checkpoint": str(checkpoint), "dataset": data.info.name} | card["advmoe"])
    else:
        show(f"{checkpoint} on {data.info.name} (test)", card)
    if strict and not card["advmoe"]["trusted"]:
        raise typer.Exit(UNTRUSTED)


def _comparable(model: RoutedNetwork, mask: Path) -> tuple[PathwayChannels, NDArray[np.bool_]]:
    """The channels of an MoE-CNN's experts, and a Sparse-CNN's mask over them.

    Raises:
        ConfigError: the model is no MoE-CNN, or they are on different backbones.
    """
    from advmoe.evaluation.pathways import mask_of, pathway_channels
    from advmoe.training.checkpoint import load_checkpoint

    check(bool(model.expert_layouts), f"--mask is for an MoE-CNN, this is a {model.config.kind}; leave it out")
    channels = pathway_channels(model)
    return channels, mask_of(load_checkpoint(mask).build(), channels)


def _radius(contents: Checkpoint, eps: str | None) -> float:
    if eps is not None:
        radius = console.number(eps, "--eps")
    else:
        trained = contents.train.get("attack", {}).get("eps")
        if trained is None:
            raise ConfigError("the checkpoint does not say which radius it was trained for; give --eps, e.g. 8/255")
        radius = float(trained)
    check_eps(radius)
    return radius


def _load(contents: Checkpoint, checkpoint: Path, dataset: str | None, data_dir: Path | None) -> Dataset:
    from advmoe.data.sources import load_dataset

    name = dataset or contents.train.get("dataset")
    if name is None:
        raise ConfigError("the checkpoint does not say which data set it was trained on; give --dataset")
    with data_progress() as reading:
        data = load_dataset(name, data_dir, progress=reading, announce=console.note)
    if contents.class_names and contents.class_names != data.info.class_names:
        raise CheckpointError(
            f"{checkpoint} tells {len(contents.class_names)} classes apart "
            f"({', '.join(contents.class_names[:3])}, ...), "
            f"{name} has {data.info.num_classes} ({', '.join(data.info.class_names[:3])}, ...); "
            "evaluate it on the data set it was trained on"
        )
    return data


def _chosen(images: Images, limit: int | None, seed: int) -> Images:
    """All the images, or a seeded choice of them in their order."""
    import numpy as np

    if limit is None or limit >= len(images):
        return images
    return images.take(np.sort(np.random.default_rng(seed).choice(len(images), limit, replace=False)))


def _latency(model: nn.Module, images: ImageSet, batch_size: int) -> dict[int, float]:
    """Of single images and of batches as they were evaluated, in fp32 as everything else."""
    from advmoe.data.loader import BatchLoader
    from advmoe.evaluation.cost import measure_latency
    from advmoe.evaluation.precision import full_precision

    batch = next(iter(BatchLoader(images, batch_size=batch_size).epoch(0)))
    with full_precision(model):
        return measure_latency(model, batch.images, (1, len(batch.images)))


def show(title: str, card: dict[str, Any]) -> None:
    """Figures and diagnostics as tables."""
    from advmoe.evaluation.card import latencies, pixels

    numbers = card["advmoe"]
    attack = numbers["attack"]
    pgd = f"ra_pgd{attack['steps']}"
    rows: dict[str, Any] = {
        "SA": f"{numbers['sa']:.2f} %",
        f"RA (PGD-{attack['steps']}, eps {pixels(attack['eps'])})": f"{numbers[pgd]:.2f} %",
    }
    for view, ra in numbers.get("ra_views", {}).items():
        rows[f"  routing seen as {view}"] = f"{ra:.2f} %"
    names = {
        "ra_union": "RA, union of all views of the routing",
        "ra_route": f"RA, and the route attack ({'exact' if numbers.get('routes_exact') else 'sampled, greedy'})",
        "ra_aa": "RA (AutoAttack, standard)",
        "ra_worst": "RA, worst of everything run",
        "ra_experts": "RA-E, experts attacked with the routing frozen",
        "ra_routers": "RA-R, only routers attacked",
        "every_pathway": "right on every pathway in use",
        "ra_every_pathway": "the same under attack",
    }
    rows |= {text: f"{numbers[name]:.2f} %" for name, text in names.items() if name in numbers}
    rows |= {f"RA at eps {eps}": f"{ra:.2f} %" for eps, ra in numbers.get("ra_by_eps", {}).items()}
    if "routers_fooled" in numbers:
        rows["pathways changed by PGD"] = f"{numbers['routers_fooled']:.2f} %"
        rows["distinct pathways, clean"] = numbers["pathways"]
    if "mask_iou" in numbers:
        rows["IoU with the mask pathway"] = ", ".join(f"{iou:.3f} {name}" for name, iou in numbers["mask_iou"].items())
    rows |= {
        "attack": f"step {255 * attack['step_size']:.3g}/255, {attack['restarts']} restart(s), start {attack['start']}",
        "images": f"{numbers['images']} (standard error of RA {numbers['standard_error']:.2f} points), "
        f"seed {numbers['seed']}",
        "parameters, GFLOPs per image": f"{numbers['parameters']:,}, {numbers['gflops']:.4g}",
    }
    if latency := latencies(numbers):
        rows["latency"] = f"{latency} on {numbers['device']}"
    console.show_facts(title, rows)
    if numbers["diagnostics"]:
        verdict = "trusted" if numbers["trusted"] else "NOT TO BE TRUSTED"
        console.show_table(
            f"Diagnostics: these numbers are {verdict}",
            ("check", "status", "seen"),
            [(item["name"], item["status"], item["value"]) for item in numbers["diagnostics"]],
        )
