"""`advmoe train`."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated, Any

import typer

from advmoe.cli import console
from advmoe.cli.options import DataDir, Device, Json, Seed, resolve_device
from advmoe.cli.progress import TrainingProgress, data_progress
from advmoe.config import check, to_dict
from advmoe.errors import ConfigError
from advmoe.recipes import recipe as find_recipe
from advmoe.settings import resolve

if TYPE_CHECKING:
    from advmoe.training.loop import Trainer

MODEL, TRAINING, ATTACK, RUN = "Model", "Training", "Attack in training", "Run"


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


def given(**values: Any) -> dict[str, Any]:
    """The options that were given."""
    return {name: value for name, value in values.items() if value is not None}


def option(panel: str, text: str, *names: str) -> Any:
    """An option that is unset by default."""
    return typer.Option(*names, help=text, rich_help_panel=panel, show_default=False)


def train(
    dataset: Annotated[
        str | None, typer.Argument(help="Name of the data set, e.g. cifar10, or digits (needs no download).")
    ] = None,
    recipe: Annotated[
        str | None, option(RUN, "A run of the paper by name (see 'advmoe recipes'); other options override it.")
    ] = None,
    arch: Annotated[str | None, option(MODEL, "Backbone. Default: vgg16.")] = None,
    kind: Annotated[
        str | None, option(MODEL, "moe, dense, s_dense (every width times r), sparse_cnn. Default: moe.")
    ] = None,
    num_experts: Annotated[int | None, option(MODEL, "N, experts per layer. Default: 2.")] = None,
    model_scale: Annotated[
        float | None, option(MODEL, "r, share of a layer's channels in one expert. Default: 0.5.")
    ] = None,
    width: Annotated[float | None, option(MODEL, "Channel multiplier; below 1 for small runs. Default: 1.")] = None,
    depth: Annotated[
        int | None, option(MODEL, "Layers of densenet or blocks of vit. Default: 100 (121 for ImageNet); 12.")
    ] = None,
    growth: Annotated[
        int | None, option(MODEL, "Channels that each layer of densenet adds. Default: 12 (32 for ImageNet).")
    ] = None,
    image_size: Annotated[
        int | None, option(MODEL, "Pixels that images of folder and imagenet are cut to. Default: 224.")
    ] = None,
    granularity: Annotated[
        str | None,
        option(MODEL, "What a router decides for: layer, block, stage, image; token in vit. Default: layer."),
    ] = None,
    router_gradient: Annotated[
        str | None,
        option(MODEL, "How gradients pass the argmax: advantage, softmax, straight_through. Default: advantage."),
    ] = None,
    expert_filters: Annotated[
        str | None, option(MODEL, "Experts as windows of the backbone, or with separate filters. Default: windows.")
    ] = None,
    method: Annotated[
        str | None,
        option(TRAINING, "advmoe, at, at_sparse, mask_at, router_at, expert_at, standard. Default: advmoe for moe."),
    ] = None,
    epochs: Annotated[int | None, option(TRAINING, "Passes over the training images. Default: 100.")] = None,
    batch_size: Annotated[int | None, option(TRAINING, "Images per step. Default: 128.")] = None,
    lr: Annotated[float | None, option(TRAINING, "Peak learning rate (SGD, cosine to zero). Default: 0.1.")] = None,
    weight_decay: Annotated[float | None, option(TRAINING, "L2 penalty. Default: 0.0005.")] = None,
    loss: Annotated[str | None, option(TRAINING, "Robust objective: trades or pgd_at. Default: trades.")] = None,
    trades_beta: Annotated[
        float | None, option(TRAINING, "1/lambda, weight of the KL term of TRADES. Default: 6.")
    ] = None,
    specialisation: Annotated[
        float | None, option(TRAINING, "How fast experts grow apart from their common start. Default: 0.25.")
    ] = None,
    balance: Annotated[float | None, option(TRAINING, "Weight of a load-balance loss. Default: 0, off.")] = None,
    awp: Annotated[
        float | None, option(TRAINING, "Adversarial weight perturbation, gamma, e.g. 0.005. Default: 0, off.")
    ] = None,
    ema: Annotated[
        float | None, option(TRAINING, "Keep a moving average of the weights, decay, e.g. 0.999. Default: 0, off.")
    ] = None,
    init: Annotated[
        Path | None, option(TRAINING, "Checkpoint to start from: for router_at, expert_at, mask_at, or fine-tuning.")
    ] = None,
    eps: Annotated[
        str | None, option(ATTACK, "Radius in [0, 1], e.g. 8/255. Default: the data set's, 8/255 for CIFAR.")
    ] = None,
    steps: Annotated[int | None, option(ATTACK, "K, PGD steps. Default: 2.")] = None,
    step_size: Annotated[str | None, option(ATTACK, "Length of a step. Default: 5/8 of eps.")] = None,
    limit_train: Annotated[
        int | None, option(RUN, "Train on this many images only, a seeded choice. Default: all.")
    ] = None,
    val_limit: Annotated[
        int | None, option(RUN, "Validation images attacked after each epoch, at most. Default: 1000.")
    ] = None,
    skip_bad_images: Annotated[
        bool, typer.Option("--skip-bad-images", help="Leave out images that cannot be decoded.", rich_help_panel=RUN)
    ] = False,
    data_dir: DataDir = None,
    out: Annotated[
        Path | None, option(RUN, "Run folder. Default: runs/DATASET-ARCH-KIND-METHOD, or runs/RECIPE.")
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with the run in the run folder.", rich_help_panel=RUN)
    ] = False,
    seed: Seed = 0,
    device: Device = "auto",
    json: Json = False,
) -> None:
    """Train a model. The default is the paper's: an MoE-CNN with N = 2 experts at r = 0.5, trained by AdvMoE.

    Writes config.json, metrics.jsonl, TensorBoard events, routes.npz (who took which experts in the last two epochs),
    last.pt and best.pt (best validation RA) to the run folder.
    Ctrl-C saves; the same command with --resume goes on.
    """
    from advmoe.data.sources import dataset_info, load_dataset
    from advmoe.models.registry import build_model
    from advmoe.training.checkpoint import file_digest, load_checkpoint
    from advmoe.training.loop import Trainer
    from advmoe.training.methods import resolve_method
    from advmoe.training.run_folder import RunFolder

    named = None if recipe is None else find_recipe(recipe)
    chosen = dataset or (named.dataset if named else None)
    if chosen is None:
        raise ConfigError("train needs a data set or --recipe, e.g. 'advmoe train cifar10' or 'advmoe train digits'")
    if named is not None and named.starts_from is not None and init is None:
        raise ConfigError(
            f"recipe '{recipe}' goes on from '{named.starts_from}'; train that first, then give its checkpoint: "
            f"--init runs/{named.starts_from}/best.pt"
        )
    model, config = resolve(
        dataset_info(chosen, data_dir),
        {"arch": "vgg16"}
        | dict(named.model if named else {})
        | given(
            arch=arch,
            kind=kind,
            num_experts=num_experts,
            model_scale=model_scale,
            width=width,
            depth=depth,
            growth=growth,
            image_size=image_size,
            granularity=granularity,
            router_gradient=router_gradient,
            expert_filters=expert_filters,
        ),
        dict(named.train if named else {})
        | given(
            method=method,
            epochs=epochs,
            batch_size=batch_size,
            lr=lr,
            weight_decay=weight_decay,
            loss=loss,
            trades_beta=trades_beta,
            specialisation=specialisation,
            balance=balance,
            awp=awp,
            ema=ema,
            limit_train=limit_train,
            val_limit=val_limit,
            init=None if init is None else file_digest(init),
            skip_bad_images=skip_bad_images,
            seed=seed,
        ),
        **dict(named.attack if named else {})
        | given(
            eps=None if eps is None else console.number(eps, "--eps"),
            steps=steps,
            step_size=None if step_size is None else console.number(step_size, "--step-size"),
        ),
    )
    trained_by = resolve_method(config.method, model, has_init=init is not None)
    check(
        specialisation is None or (model.several_experts and trained_by.moves_experts),
        f"--specialisation {specialisation} needs experts that are trained, which method {config.method} on kind "
        f"{model.kind} with N = {model.num_experts} has not; leave it out",
    )
    if config.method == "standard" and not (steps is None and step_size is None):
        console.note("standard training does not attack: --steps and --step-size have no effect")
    build_model(model)  # refuses impossible settings before any image is read
    place = resolve_device(device)
    initial = None if init is None else load_checkpoint(init)
    path = out or Path("runs") / (recipe or f"{config.dataset}-{model.arch}-{model.kind}-{config.method}")
    with RunFolder(path) as folder:
        checkpoint = load_checkpoint(folder.last) if resume else None
        with data_progress() as progress:
            data = load_dataset(config.dataset, data_dir, progress=progress)
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
