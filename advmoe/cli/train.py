"""`advmoe train`."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Annotated

import typer

from advmoe.cli import console
from advmoe.cli.options import DataDir, Device, Json, Seed, resolve_device
from advmoe.cli.progress import TrainingProgress, data_progress
from advmoe.config import AttackConfig, ModelConfig, TrainConfig, check_eps, to_dict
from advmoe.data.sources import dataset_info, load_dataset
from advmoe.models.registry import build_model
from advmoe.training.checkpoint import file_digest, load_checkpoint
from advmoe.training.loop import Trainer
from advmoe.training.methods import resolve_method
from advmoe.training.run_folder import RunFolder

TRAIN_STEP_SHARE = 5 / 8
"""Step size of the training attack relative to eps: 5/255 at 8/255."""
VALIDATION_STEP_SHARE = 1 / 4
"""The same for the attack that selects the best checkpoint: 2/255 at 8/255."""


@contextmanager
def stopping_on_interrupt(trainer: Trainer) -> Iterator[None]:
    """The first Ctrl-C lets the step under way finish and saves; the second one interrupts at once."""

    def handle(signum: int, frame: FrameType | None) -> None:
        console.note("stopping after this step and saving (press Ctrl-C again to stop at once)")
        signal.signal(signal.SIGINT, signal.default_int_handler)
        trainer.request_stop()

    before = signal.signal(signal.SIGINT, handle)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def train(
    dataset: Annotated[str, typer.Argument(help="Name of the data set, e.g. cifar10, or digits (needs no download).")],
    arch: Annotated[str, typer.Option(help="Backbone.")] = "vgg16",
    kind: Annotated[str, typer.Option(help="moe, dense, s_dense (every width times r) or sparse_cnn.")] = "moe",
    method: Annotated[
        str | None,
        typer.Option(
            help="advmoe, at (everything jointly), router_at, expert_at, standard. Default: advmoe for moe, else at."
        ),
    ] = None,
    num_experts: Annotated[int, typer.Option(help="N, experts per layer.")] = 2,
    model_scale: Annotated[float, typer.Option(help="r, share of a layer's channels in one expert.")] = 0.5,
    width: Annotated[float, typer.Option(help="Channel multiplier of the backbone; below 1 for small runs.")] = 1.0,
    granularity: Annotated[str, typer.Option(help="What one router decides for.")] = "layer",
    router_gradient: Annotated[
        str, typer.Option(help="How gradients pass the argmax: softmax or straight_through.")
    ] = ("softmax"),
    expert_filters: Annotated[
        str,
        typer.Option(help="windows: experts are channel windows of the backbone; separate: each has its own filters."),
    ] = "windows",
    epochs: Annotated[int, typer.Option(help="Passes over the training images.")] = 100,
    batch_size: Annotated[int, typer.Option(help="Images per step.")] = 128,
    lr: Annotated[float, typer.Option(help="Peak learning rate (SGD, cosine to zero).")] = 0.1,
    weight_decay: Annotated[float, typer.Option(help="L2 penalty.")] = 5e-4,
    loss: Annotated[str, typer.Option(help="Robust objective: trades or pgd_at.")] = "trades",
    trades_beta: Annotated[float, typer.Option(help="1/lambda, weight of the KL term of TRADES.")] = 6.0,
    eps: Annotated[
        str | None,
        typer.Option(help="Radius of the attack in [0, 1], e.g. 8/255. Default: the data set's (8/255 for CIFAR)."),
    ] = None,
    steps: Annotated[int, typer.Option(help="K, PGD steps of the training attack.")] = 2,
    step_size: Annotated[str | None, typer.Option(help="Step of the training attack. Default: 5/8 of eps.")] = None,
    balance: Annotated[float, typer.Option(help="Weight of a load-balance loss on the routers; 0 is off.")] = 0.0,
    awp: Annotated[float, typer.Option(help="Adversarial weight perturbation, gamma (usually 0.005); 0 is off.")] = 0.0,
    ema: Annotated[
        float, typer.Option(help="Validate and keep a moving average of the weights, decay (usually 0.999); 0 is off.")
    ] = 0.0,
    init: Annotated[
        Path | None, typer.Option(help="Checkpoint to start from, for --method router_at, expert_at or fine-tuning.")
    ] = None,
    val_limit: Annotated[int, typer.Option(help="Validation images attacked after each epoch, at most.")] = 1000,
    limit_train: Annotated[int | None, typer.Option(help="Train on this many images only (a seeded choice).")] = None,
    data_dir: DataDir = None,
    out: Annotated[Path | None, typer.Option(help="Run folder. Default: runs/DATASET-ARCH-KIND-METHOD.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the run in the run folder.")] = False,
    seed: Seed = 0,
    device: Device = "auto",
    json: Json = False,
) -> None:
    """Train a model. The default is the paper's: an MoE-CNN with N = 2 experts at r = 0.5, trained by AdvMoE.

    Writes config.json, metrics.jsonl, TensorBoard events, last.pt and best.pt (best validation RA) to the run folder.
    Ctrl-C saves; the same command with --resume goes on.
    """
    info = dataset_info(dataset)
    radius = info.eps if eps is None else console.number(eps, "--eps")
    check_eps(radius)
    attack = AttackConfig(
        eps=radius,
        steps=steps,
        step_size=TRAIN_STEP_SHARE * radius if step_size is None else console.number(step_size, "--step-size"),
        start="gaussian",
    )
    config = TrainConfig(
        dataset=info.name,
        method=method or ("advmoe" if kind == "moe" else "at"),
        epochs=epochs,
        batch_size=batch_size,
        lr=lr,
        weight_decay=weight_decay,
        loss=loss,
        trades_beta=trades_beta,
        balance=balance,
        awp=awp,
        ema=ema,
        init=None if init is None else file_digest(init),
        attack=attack,
        val_attack=AttackConfig(eps=radius, steps=10, step_size=VALIDATION_STEP_SHARE * radius),
        val_limit=val_limit,
        flip=info.flip,
        limit_train=limit_train,
        seed=seed,
    )
    model = ModelConfig(
        arch=arch,
        kind=kind,
        num_classes=info.num_classes,
        image_size=info.image_size,
        width=width,
        num_experts=num_experts,
        model_scale=model_scale,
        expert_filters=expert_filters,
        granularity=granularity,
        router_gradient=router_gradient,
        mean=info.mean,
        std=info.std,
    )
    resolve_method(config.method, model, has_init=init is not None)
    build_model(model)  # refuses impossible settings before any image is read
    place = resolve_device(device)
    initial = None if init is None else load_checkpoint(init)
    path = out or Path("runs") / f"{info.name}-{arch}-{kind}-{config.method}"
    with RunFolder(path) as folder:
        checkpoint = load_checkpoint(folder.last) if resume else None
        with data_progress() as progress:
            data = load_dataset(info.name, data_dir, progress=progress)
        with TrainingProgress() as observer:
            trainer = Trainer(
                model, config, data, folder, device=place, observer=observer, resume=checkpoint, initial=initial
            )
            with stopping_on_interrupt(trainer):
                complete = trainer.fit()
    if not complete:
        console.note(f"interrupted; go on with the same command and --resume --out {path}")
        raise typer.Exit(130)
    best = load_checkpoint(folder.best)
    if json:
        console.emit_json(
            {"run": str(path), "checkpoint": str(folder.best), "metrics": best.metrics, "config": to_dict(config)}
        )
    else:
        shown = {name: value for name, value in best.metrics.items() if name.startswith("val_") or name == "epoch"}
        console.show_facts(f"Best checkpoint: {folder.best}", shown)
