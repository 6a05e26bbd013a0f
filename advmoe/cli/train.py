"""`advmoe train`."""

from __future__ import annotations

import dataclasses
import shlex
import signal
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import typer

from advmoe.cli import console
from advmoe.cli.models import remember_data
from advmoe.cli.options import DataDir, Device, Json, one_of_these, option, takes_settings_of
from advmoe.cli.progress import TrainingProgress, data_progress
from advmoe.cli.seeds import Seeds, parse_seeds, seed_folder, summary
from advmoe.cli.signals import NAMES, resumable, stopping
from advmoe.config import CHECKPOINT_MINUTES, ModelConfig, TrainConfig, TrainingAttack, check, to_dict
from advmoe.data.names import DATASETS, check_name
from advmoe.errors import ConfigError, DataError
from advmoe.files import write_text_atomically
from advmoe.host import compute_deterministically
from advmoe.recipes import recipe as find_recipe
from advmoe.recipes import recipes as all_recipes
from advmoe.run_file import RunFile, read_run_file, run_file
from advmoe.run_paths import LAST, RUN_FILE, checkpoint_of
from advmoe.settings import USUAL_BATCH, defaults_of, resolve, sort_settings
from advmoe.world import restarts

if TYPE_CHECKING:
    import torch

    from advmoe.data.sets import Dataset, Progress
    from advmoe.training.checkpoint import Checkpoint
    from advmoe.training.run_folder import RunFolder

RUN = "Run"


@takes_settings_of(ModelConfig, TrainConfig, TrainingAttack)
def train(
    dataset: Annotated[
        str | None,
        typer.Argument(
            help="Name of the data set, e.g. cifar10, or digits (needs no download).",
            autocompletion=one_of_these(DATASETS),
        ),
    ] = None,
    recipe: Annotated[
        str | None,
        option(
            RUN, "A run of the paper by name (see 'advmoe recipes'); other options override it.", known=all_recipes()
        ),
    ] = None,
    config_file: Annotated[
        Path | None,
        option(
            RUN, "A run as a TOML file, such as the run.toml of another run; other options override it.", "--config"
        ),
    ] = None,
    init: Annotated[
        Path | None,
        option(
            RUN,
            "Run or checkpoint to start from: for router_at, expert_at, mask_at, fine-tuning, or to turn into experts.",
        ),
    ] = None,
    data_dir: DataDir = None,
    out: Annotated[
        Path | None, option(RUN, "Run folder. Default: runs/DATASET-ARCH-KIND-METHOD, or runs/RECIPE.")
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with the run in the run folder.", rich_help_panel=RUN)
    ] = False,
    seeds: Seeds = None,
    keep: Annotated[
        int,
        typer.Option(
            "--keep", min=0, max=10**6, help="Keep the checkpoints of the last so many epochs.", rich_help_panel=RUN
        ),
    ] = 0,
    checkpoint_minutes: Annotated[
        float,
        typer.Option(
            "--checkpoint-minutes",
            min=0.0,
            max=10**6,
            help="Write last.pt so often within an epoch, too; 0: after each step.",
            rich_help_panel=RUN,
        ),
    ] = CHECKPOINT_MINUTES,
    device: Device = "auto",
    deterministic: Annotated[
        bool,
        typer.Option(
            "--deterministic",
            help="On a GPU, the same bits in every run, for some of its speed (a CPU gives them anyway).",
            rich_help_panel=RUN,
        ),
    ] = False,
    json: Json = False,
    *,
    settings: dict[str, Any],
) -> None:
    """Train a model. The default is the paper's: an MoE-CNN with N = 2 experts at r = 0.5, trained by AdvMoE.

    Writes config.json, run.toml (for --config), metrics.jsonl, TensorBoard events, routes.npz (who
    took which experts in the last two epochs), last.pt and best.pt (the latest epoch whose
    validation RA is not clearly below the highest) to the run folder. Ctrl-C and SIGTERM save (exit
    code 130, 143); the same command with --resume goes on. On several GPUs or machines: torchrun -m
    advmoe train ...
    """
    check(recipe is None or config_file is None, "give --recipe or --config, not both")
    if config_file is not None and config_file.is_dir():
        config_file /= RUN_FILE
    alone = dataset is None and recipe is None and config_file is None
    if resume and alone and seeds is None:
        check(out is not None, "which run is to go on? give its folder", "out")
        assert out is not None
        check_run(out)
        if (out / RUN_FILE).is_file():
            config_file = out / RUN_FILE  # the run's own settings; given options must be the same
    check(seeds is None or "seed" not in settings, "give --seed or --seeds, not both")
    chosen_seeds = None if seeds is None else parse_seeds(seeds)
    plan = make_plan(dataset, recipe, config_file, init, data_dir, settings)

    from advmoe.device import resolve_device
    from advmoe.distributed import joined
    from advmoe.models.registry import build_model

    for sentence in plan.notes:
        console.note(sentence)
    for sentence in plan.warnings:
        console.warn(sentence)
    build_model(plan.model)  # refuses impossible settings before any image is read
    place = resolve_device(device)
    if deterministic:
        compute_deterministically()
    saving = Saving(keep, checkpoint_minutes)
    name = recipe or f"{plan.train.dataset}-{plan.model.arch}-{plan.model.kind}-{plan.train.method}"
    path = out or Path("runs") / name
    folders = {seed: seed_folder(path, seed) for seed in chosen_seeds or ()}

    def how() -> str:
        return how_to_go_on(path) if any((folder / LAST).exists() for folder in folders.values() or [path]) else ""

    with joined(place), resumable(how):
        if chosen_seeds is None:
            show(plan.train, train_run(plan, path, place, resume=resume, saving=saving), json=json)
            return
        runs = {}
        for seed, folder in folders.items():
            console.note(f"seed {seed}: {folder}")
            of_seed = dataclasses.replace(plan, train=dataclasses.replace(plan.train, seed=seed))
            there = resume and (folder / LAST).exists()
            runs[seed] = train_run(of_seed, folder, place, resume=there, saving=saving, out=path)
        show_seeds(path, runs, json=json)


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A planned run: the model, the images and the initial weights."""

    model: ModelConfig
    train: TrainConfig
    data_dir: Path | None
    init: Path | None
    initial: Checkpoint | None
    """Content of `init`."""
    size_chosen: bool
    """Whether the user chose the image size. Otherwise it was chosen to suit this machine."""
    notes: Sequence[str]
    """Remarks to print before the run begins."""
    warnings: Sequence[str]
    """Warnings to print before the run begins."""


def make_plan(
    dataset: str | None,
    recipe: str | None,
    config_file: Path | None,
    init: Path | None,
    data_dir: Path | None,
    settings: Mapping[str, Any],
) -> Plan:
    """The settings of a run. The command line overrides a recipe or file, which overrides the data set's defaults.

    Raises:
        ConfigError: A setting is invalid, or two settings contradict each other.
    """
    base = RunFile() if config_file is None else read_run_file(config_file)
    if recipe is not None:
        named = find_recipe(recipe)
        if named.starts_from is not None and init is None:
            raise ConfigError(
                f"recipe '{recipe}' goes on from '{named.starts_from}'; train that first, then give its checkpoint: "
                f"--init runs/{named.starts_from}/best.pt"
            )
        base = RunFile(model=named.model, train={"dataset": named.dataset, **named.train}, attack=named.attack)
    chosen = dataset or base.train.get("dataset")
    if chosen is None:
        raise ConfigError("train needs a data set or --recipe, e.g. 'advmoe train cifar10' or 'advmoe train digits'")
    check(
        not Path(chosen).is_dir() or chosen in DATASETS,
        f"'{chosen}' is a folder and no data set; for images of your own: advmoe train folder --data-dir "
        f"{shlex.quote(chosen)}",
    )
    check_name(chosen)
    given_model, given_train, given_attack = sort_settings(settings)

    # Only here, because torch takes seconds and a mistyped name or value should not wait for it.
    from advmoe.data.sources import dataset_info, is_packaged
    from advmoe.training.checkpoint import file_digest, load_checkpoint
    from advmoe.training.methods import resolve_method

    if config_file is not None and base.train.get("dataset") not in {None, chosen}:
        base = without_data(base)
    elif chosen == "folder" and data_dir is not None:  # another folder may have other classes
        kept = {name: value for name, value in base.model.items() if name != "num_classes"}
        base = dataclasses.replace(base, model=kept)
    if is_packaged(chosen):  # run files of earlier versions may name a folder
        base = dataclasses.replace(base, data_dir=None)
    data_dir = data_dir or (None if base.data_dir is None else Path(base.data_dir))
    init = init or (None if base.init is None else Path(base.init))
    init = None if init is None else checkpoint_of(init)
    info = dataset_info(chosen, data_dir)
    default_model, default_train = defaults_of(info)
    stored = dict(base.train)
    stored_digest = stored.pop("init", None)
    digest = None if init is None else file_digest(init)
    initial = None if init is None else load_checkpoint(init)
    expected = {} if initial is None else {"mean": initial.model.mean, "std": initial.model.std}
    check(stored_digest is None or digest is not None, f"the run in {config_file} starts from a checkpoint", "init")
    check(
        stored_digest is None or digest == stored_digest or str(init) != base.init,
        f"{init} is not the checkpoint any more that the run in {config_file} started from",
        "init",
    )
    chosen_train = stored | {"dataset": chosen} | given_train | {"init": digest}
    model, config = resolve(
        info,
        default_model | dict(base.model) | given_model | expected,
        default_train | chosen_train,
        **dict(base.attack) | given_attack,
    )
    trained_by = resolve_method(config.method, model, has_init=init is not None)
    check(
        settings.get("specialization") is None or (model.several_experts and trained_by.moves_experts),
        f"specialization {config.specialization} needs experts that are trained; method {config.method} on kind "
        f"{model.kind} with N = {model.num_experts} trains none; leave it out",
        "specialization",
    )
    notes, warnings = [*info.notes], [*info.warnings]
    if info.name == "folder" and config.batch_size < USUAL_BATCH and not {"batch_size", "lr"} <= set(chosen_train):
        why = "" if "batch_size" in chosen_train else ", so that few images make several batches an epoch"
        rate = "" if "lr" in chosen_train else f"; the learning rate is {config.lr:g}, smaller in the same proportion"
        notes.append(f"batches of {config.batch_size} images in place of {USUAL_BATCH}{why}{rate}")
    if (model.mean, model.std) != (info.mean, info.std):
        notes.append(f"the images are normalized as those of the checkpoint were, not as usual for {info.name}")
    if config.method == "standard" and {"steps", "step_size", "start"} & set(given_attack):
        warnings.append("standard training does not attack: --steps, --step-size and --start have no effect")
    return Plan(
        model=model,
        train=config,
        data_dir=data_dir,
        init=init,
        initial=initial,
        size_chosen=not info.resized or "image_size" in {**base.model, **given_model},
        notes=notes,
        warnings=warnings,
    )


OF_DATA = {"model": {"num_classes", "image_size", "mean", "std"}, "train": {"flip"}, "attack": {"eps", "step_size"}}
"""Settings of a run that follow from its data set, by section of a run file."""


def without_data(run: RunFile) -> RunFile:
    """A run without the settings that follow from its data set, for a run on another one."""
    kept: dict[str, Any] = {
        section: {name: value for name, value in getattr(run, section).items() if name not in names}
        for section, names in OF_DATA.items()
    }
    return dataclasses.replace(run, **kept, data_dir=None)


class Saving(NamedTuple):
    """Checkpoints that a run writes in addition to those at the end of an epoch."""

    keep: int = 0
    minutes: float = CHECKPOINT_MINUTES


@dataclass(frozen=True, kw_only=True)
class Trained:
    """A run that is complete."""

    path: Path
    checkpoint: Path
    metrics: Mapping[str, Any]
    """Figures of the best epoch."""
    last_metrics: Mapping[str, Any]


def train_run(
    plan: Plan, path: Path, place: torch.device, *, resume: bool, saving: Saving, out: Path | None = None
) -> Trained:
    """Train one model in one folder.

    Args:
        plan: What to train.
        path: Folder of the run.
        place: Device of the training.
        resume: Whether the run goes on.
        saving: Checkpoints to write besides those of epochs.
        out: What the command calls the output, if it is not `path`.

    Raises:
        typer.Exit: The run was interrupted, and its state is saved.
    """
    from advmoe.distributed import from_leader, gather, leader_first, world
    from advmoe.training.checkpoint import load_checkpoint
    from advmoe.training.loop import Trainer
    from advmoe.training.run_folder import RunFolder

    model, config = plan.model, plan.train
    folder = RunFolder(path, keep=saving.keep, minutes=saving.minutes)
    with folder if world().leads else nullcontext():
        checkpoint = from_leader(lambda: _to_go_on_from(folder, resume=resume))
        if checkpoint is not None and not plan.size_chosen and checkpoint.model.image_size != model.image_size:
            model = dataclasses.replace(model, image_size=checkpoint.model.image_size)  # another machine may suggest
            console.note(f"going on with the run's image size, {model.image_size}")
        text = run_file(model, config, data_dir=plan.data_dir, init=plan.init)
        with data_progress() as progress:
            data = leader_first(lambda: _load(plan, progress))
        with TrainingProgress() as observer:
            trainer = Trainer(
                model, config, data, folder, device=place, observer=observer, resume=checkpoint, initial=plan.initial
            )
            from_leader(lambda: remember_data(path, config.dataset, plan.data_dir))
            from_leader(lambda: write_text_atomically(path / RUN_FILE, text))
            if trainer.new_classifier and checkpoint is None:
                console.note(
                    f"the checkpoint has other classes: its features are kept, and a classifier of {model.num_classes} "
                    "classes starts anew"
                )
            if trainer.step == trainer.schedule.steps:
                console.note(
                    f"{path} is finished, all {trainer.schedule.epochs} epochs; to train on, begin a new run from it"
                )
            else:
                console.note(f"starting: {trainer.memory}")
                if plan.train.compile != "off":
                    console.note("the first step compiles the network's passes, which takes minutes")
            with stopping(trainer.request_stop) as signals:
                complete = trainer.fit()
    if not complete:
        signum = next(chain.from_iterable(gather(signals)), signal.SIGINT)  # any rank may have received it
        if world().leads:
            console.stopped(f"{NAMES[signum]}; {how_to_go_on(out or path)}")
        raise typer.Exit(128 + signum)
    best, last = from_leader(lambda: [load_checkpoint(file).metrics for file in (folder.best, folder.last)])
    return Trained(path=path, checkpoint=folder.best, metrics=best, last_metrics=last)


def _load(plan: Plan, progress: Progress) -> Dataset:
    """The images of a run.

    Raises:
        DataError: See `load_dataset`. Or an image is a link to nothing, and the run does not skip
            such; otherwise the run would stop where it reads the image, perhaps after hours.
    """
    from advmoe.data.sources import load_dataset

    data = load_dataset(plan.train.dataset, plan.data_dir, progress=progress, announce=console.note)
    gone = data.info.gone
    if gone and not plan.train.skip_bad_images:
        more = f" (one of {len(gone)} such links)" if len(gone) > 1 else ""
        raise DataError(
            f"{gone[0]} is a link to a file that does not exist{more}; restore or remove it, or skip bad images",
            "skip_bad_images",
        )
    return data


def how_to_go_on(out: Path) -> str:
    """The end of the last line of a run that was stopped."""
    return f"go on with the same command and --resume --out {shlex.quote(str(out))}"


def _to_go_on_from(folder: RunFolder, *, resume: bool) -> Checkpoint | None:
    """The last checkpoint of the folder's run, if the run is to be resumed.

    A run that torchrun restarted is resumed automatically, unless its first start had to refuse the
    folder.
    """
    from advmoe.distributed import keep_for_restarts, kept_before_restart
    from advmoe.training.checkpoint import load_checkpoint

    refused, there = f"not begun here: {folder.path}", folder.last.exists()
    if there and not resume and restarts() == 0 and folder.begun:
        keep_for_restarts(refused)
    if resume:
        check_run(folder.path)
    if resume or (there and restarts() > 0 and not kept_before_restart(refused)):
        return load_checkpoint(folder.last)
    return None


def check_run(path: Path) -> None:
    """Check that a folder holds a run that can go on.

    Raises:
        ConfigError: It does not.
    """
    check(
        (path / LAST).exists(),
        f"{path} holds no run to go on with; give the run's folder, or leave out --resume to begin one",
        "out",
    )


def show(config: TrainConfig, run: Trained, *, json: bool) -> None:
    """The figures of one run."""
    if json:
        found = {"run": str(run.path), "checkpoint": str(run.checkpoint)}
        figures = {"metrics": run.metrics, "last_metrics": run.last_metrics}
        console.emit_json(found | figures | {"config": to_dict(config)})
    else:
        shown = [name for name in run.metrics if name == "epoch" or name.startswith("val_")]
        rows = [(name, run.metrics[name], run.last_metrics[name]) for name in shown]
        console.show_table(f"Best checkpoint: {run.checkpoint}", ("", "best", "last"), rows)


def show_seeds(path: Path, runs: Mapping[int, Trained], *, json: bool) -> None:
    """The figures of runs that differ in their seed only, and their mean and standard deviation."""
    total = summary([run.metrics for run in runs.values()])
    if json:
        each = [{"seed": seed, "run": str(run.path), "metrics": run.metrics} for seed, run in runs.items()]
        console.emit_json({"run": str(path), "runs": each, "summary": total})
        return
    names = [name for name in total if name.startswith("val_")]
    rows = [(str(seed), *(f"{run.metrics[name]:.2f}" for name in names)) for seed, run in runs.items()]
    rows.append(("mean ± std", *(f"{total[name]['mean']:.2f} ± {total[name]['std']:.2f}" for name in names)))
    console.show_table(f"Best checkpoints in {path}", ("seed", *names), rows)
