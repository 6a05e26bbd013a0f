"""`advmoe train`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from advmoe.cli import console
from advmoe.cli.models import remember_data
from advmoe.cli.options import DataDir, Device, Json, option, takes_settings_of
from advmoe.cli.progress import TrainingProgress, data_progress
from advmoe.cli.signals import stopping
from advmoe.config import ModelConfig, TrainConfig, TrainingAttack, check, to_dict
from advmoe.errors import ConfigError
from advmoe.recipes import recipe as find_recipe
from advmoe.settings import resolve, sort_settings

RUN = "Run"


@takes_settings_of(ModelConfig, TrainConfig, TrainingAttack)
def train(
    dataset: Annotated[
        str | None, typer.Argument(help="Name of the data set, e.g. cifar10, or digits (needs no download).")
    ] = None,
    recipe: Annotated[
        str | None, option(RUN, "A run of the paper by name (see 'advmoe recipes'); other options override it.")
    ] = None,
    init: Annotated[
        Path | None,
        option(
            RUN, "Checkpoint to start from: for router_at, expert_at, mask_at, fine-tuning, or to turn into experts."
        ),
    ] = None,
    data_dir: DataDir = None,
    out: Annotated[
        Path | None, option(RUN, "Run folder. Default: runs/DATASET-ARCH-KIND-METHOD, or runs/RECIPE.")
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with the run in the run folder.", rich_help_panel=RUN)
    ] = False,
    device: Device = "auto",
    json: Json = False,
    *,
    settings: dict[str, Any],
) -> None:
    """Train a model. The default is the paper's: an MoE-CNN with N = 2 experts at r = 0.5, trained by AdvMoE.

    Writes config.json, metrics.jsonl, TensorBoard events, routes.npz (who took which experts in the last two epochs),
    last.pt and best.pt (the latest epoch whose validation RA is not clearly below the highest) to the run folder.
    Ctrl-C and SIGTERM save (exit code 130, 143); the same command with --resume goes on.
    """
    from advmoe.data.sources import dataset_info, load_dataset
    from advmoe.device import resolve_device
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
    model_settings, train_settings, attack_settings = sort_settings(settings)
    info = dataset_info(chosen, data_dir)
    model, config = resolve(
        info,
        {"arch": "vgg16"} | dict(named.model if named else {}) | model_settings,
        dict(named.train if named else {}) | train_settings | ({} if init is None else {"init": file_digest(init)}),
        **dict(named.attack if named else {}) | attack_settings,
    )
    trained_by = resolve_method(config.method, model, has_init=init is not None)
    check(
        settings.get("specialisation") is None or (model.several_experts and trained_by.moves_experts),
        f"specialisation {config.specialisation} needs experts that are trained; method {config.method} on kind "
        f"{model.kind} with N = {model.num_experts} trains none; leave it out",
        "specialisation",
    )
    if config.method == "standard" and {"steps", "step_size", "start"} & set(attack_settings):
        console.note("standard training does not attack: --steps, --step-size and --start have no effect")
    for sentence in info.notes:
        console.note(sentence)
    build_model(model)  # refuses impossible settings before any image is read
    place = resolve_device(device)
    initial = None if init is None else load_checkpoint(init)
    path = out or Path("runs") / (recipe or f"{config.dataset}-{model.arch}-{model.kind}-{config.method}")
    with RunFolder(path) as folder:
        check(not resume or folder.last.exists(), f"{path} holds no run to go on with; leave out --resume to begin one")
        checkpoint = load_checkpoint(folder.last) if resume else None
        with data_progress() as progress:
            data = load_dataset(config.dataset, data_dir, progress=progress, announce=console.note)
        with TrainingProgress() as observer:
            trainer = Trainer(
                model, config, data, folder, device=place, observer=observer, resume=checkpoint, initial=initial
            )
            remember_data(path, config.dataset, data_dir)
            with stopping(trainer.request_stop) as signals:
                complete = trainer.fit()
    if not complete:
        console.note(f"interrupted; go on with the same command and --resume --out {path}")
        raise typer.Exit(128 + signals[0])
    best, last = load_checkpoint(folder.best), load_checkpoint(folder.last)
    if json:
        figures = {"metrics": best.metrics, "last_metrics": last.metrics}
        console.emit_json({"run": str(path), "checkpoint": str(folder.best)} | figures | {"config": to_dict(config)})
    else:
        shown = [name for name in best.metrics if name == "epoch" or name.startswith("val_")]
        rows = [(name, best.metrics[name], last.metrics[name]) for name in shown]
        console.show_table(f"Best checkpoint: {folder.best}", ("", "best", "last"), rows)
