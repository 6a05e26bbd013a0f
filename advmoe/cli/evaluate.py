"""`advmoe evaluate`."""

from __future__ import annotations

import dataclasses
import itertools
import json as json_text
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from advmoe.cli import console
from advmoe.cli.images import decoded
from advmoe.cli.models import compare_classes, data_dir_of
from advmoe.cli.options import BatchSize, DataDir, Device, Json, LimitEval, Seed, SkipBadImages, one_of_these
from advmoe.cli.progress import data_progress, suite_progress
from advmoe.cli.signals import resumable
from advmoe.config import AttackConfig, check, check_eps, one_of
from advmoe.data.names import DATASETS
from advmoe.errors import ConfigError
from advmoe.hub import is_address
from advmoe.run_paths import CARD, checkpoint_of, run_in

if TYPE_CHECKING:
    import numpy as np
    import torch
    from numpy.typing import NDArray

    from advmoe.data.sets import Images, ImageSet
    from advmoe.evaluation.results import SuiteConfig, SuiteResult
    from advmoe.models.network import RoutedNetwork
    from advmoe.routing_log import PathwayChannels
    from advmoe.training.checkpoint import Checkpoint

STATE, ROUTES, OUTCOMES, EXAMPLES = "state.npz", "routes.npz", "images.npz", "examples.npz"
"""What `--out` holds besides the card."""
STATES = f"{Path(STATE).stem}*{Path(STATE).suffix}"
"""Pattern of the files from which an evaluation goes on: the finished batches, and the batch under way."""
NOTHING_KEPT = "nothing of this evaluation is kept; with --out FOLDER, the same command goes on after an interruption"
SWEEP_SHARES = (0.25, 0.5, 0.75, 1.5, 2.0)
"""Radii of the whole suite's sweep, relative to eps."""
CHOICE_SEED = 0
"""Seed of the choice of test images under a limit."""
UNTRUSTED = 2
"""Exit status of --strict if the numbers are not trusted."""


def evaluate(
    model: Annotated[Path, typer.Argument(help="A run folder, e.g. runs/NAME, or a checkpoint.")],
    dataset: Annotated[
        str | None,
        typer.Option(
            help="Data set to test on. Default: the one it was trained on.", autocompletion=one_of_these(DATASETS)
        ),
    ] = None,
    steps: Annotated[int, typer.Option(help="PGD steps.")] = 50,
    eps: Annotated[
        str | None, typer.Option(help="Radius of the attack in [0, 1], e.g. 8/255. Default: the training radius.")
    ] = None,
    step_size: Annotated[str | None, typer.Option(help="Length of a PGD step. Default: a quarter of eps.")] = None,
    restarts: Annotated[int, typer.Option(help="Random starts; an image is robust if it survives them all.")] = 1,
    routing: Annotated[
        bool,
        typer.Option(
            "--routing",
            help="Attack the routing of an MoE-CNN too: gradient views, route attack. A network without routers gets "
            "as many further starts of PGD.",
        ),
    ] = False,
    autoattack: Annotated[
        bool, typer.Option("--autoattack", help="Run AutoAttack (standard version), for 4 classes or more.")
    ] = False,
    eps_sweep: Annotated[
        str | None, typer.Option(help="Further radii for PGD, e.g. 2/255,4/255.", metavar="EPS,EPS,...")
    ] = None,
    suite: Annotated[
        bool, typer.Option("--suite", help="Everything: --routing, --autoattack and a sweep from eps/4 to 2 eps.")
    ] = False,
    control: Annotated[
        list[str] | None,
        typer.Option(
            help="Evaluate the MoE-CNN with parts replaced, too: random (routers at random weights), averaged (experts "
            "averaged into one), inverted (routers take their last choice). All of them get new statistics of "
            "BatchNorm; compare them with unchanged (only new statistics). Repeatable.",
            show_default=False,
        ),
    ] = None,
    diagnose: Annotated[
        int,
        typer.Option(
            help="Images that the diagnostics look at; 0: no diagnostics. With fewer than 16 that are classified "
            "correctly the numbers count as not checked."
        ),
    ] = 64,
    mask: Annotated[
        Path | None,
        typer.Option(help="Run or checkpoint of a Sparse-CNN: compare pathways with its mask pathway (Fig. 6)."),
    ] = None,
    latency: Annotated[bool, typer.Option(help="Time single images and whole batches, for a few seconds.")] = True,
    strict: Annotated[
        bool,
        typer.Option(
            "--strict", help="Exit with 2 unless the diagnostics ran and passed, so that the numbers are trusted."
        ),
    ] = False,
    out: Annotated[
        Path | None,
        typer.Option(help="Folder for the card, the results image by image and the state from which to go on."),
    ] = None,
    limit_eval: LimitEval = None,
    skip_bad_images: SkipBadImages = False,
    batch_size: BatchSize = 256,
    data_dir: DataDir = None,
    seed: Seed = 0,
    device: Device = "auto",
    json: Json = False,
) -> None:
    """Measure standard accuracy (SA) and robust accuracy (RA) on the test images, and whether RA can be trusted.

    The run holds everything needed: architecture, classes, normalization, data folder, radius of
    the attack. With --out, every finished attack on a batch is kept: after an interruption the same
    command goes on from there. On several GPUs or machines: torchrun -m advmoe evaluate ...
    """
    from advmoe.attacks.autoattack import CLASSES, check_classes
    from advmoe.device import resolve_device
    from advmoe.distributed import PATIENT_SECONDS, from_leader, joined, leader_first
    from advmoe.evaluation.controls import CALIBRATION_IMAGES, CONTROLS, calibration_batches, check_control, controlled
    from advmoe.evaluation.diagnostics import NEEDED
    from advmoe.evaluation.results import SuiteConfig

    check(batch_size >= 1, f"--batch-size must be at least 1, got {batch_size}")
    check(limit_eval is None or limit_eval >= 1, f"--limit-eval must be at least 1, got {limit_eval}")
    check(
        diagnose >= NEEDED or not strict,
        f"--strict judges by the diagnostics, which need {NEEDED} correctly classified images; give --diagnose "
        f"{NEEDED} or more, got {diagnose}",
    )
    check(
        limit_eval is None or limit_eval >= NEEDED or not strict,
        f"--strict judges by the diagnostics, which need {NEEDED} correctly classified images; give --limit-eval "
        f"{NEEDED} or more, got {limit_eval}",
    )
    controls = list(dict.fromkeys(one_of("control", name, CONTROLS, "control") for name in control or []))
    if out is not None:
        check(not out.is_file(), f"{out} is a file; give --out a folder")
        for written in (out, *(_folder_of_control(out, name) for name in controls)):
            refuse_a_run(written)
    place = resolve_device(device)

    begun = False

    def how_to_go_on() -> str:
        if out is None:
            return NOTHING_KEPT if begun else ""
        kept = any(out.rglob(STATES))
        return f"{out} holds the finished attacks; the same command goes on" if kept else ""

    with joined(place, patience=PATIENT_SECONDS), resumable(how_to_go_on):
        subject = leader_first(lambda: Subject.load(checkpoint_of(model), device=place))
        for name in CONTROLS:
            if name in controls:
                check_control(subject.model, name)
        masked = None if mask is None else _comparable(subject.model, checkpoint_of(mask))
        radius = training_radius(subject.contents) if eps is None else console.number(eps, "--eps")
        check_eps(radius)
        length = radius / 4 if step_size is None else console.number(step_size, "--step-size")
        sweep = tuple(console.number(text, "--eps-sweep") for text in eps_sweep.split(",")) if eps_sweep else ()
        if suite and not sweep:
            sweep = tuple(dict.fromkeys(min(share * radius, 1.0) for share in SWEEP_SHARES))
        classes = subject.contents.model.num_classes
        if autoattack:
            check_classes(classes)
        elif suite and classes < CLASSES:
            console.note(f"AutoAttack is left out: it needs at least {CLASSES} classes, and the model has {classes}.")
        config = SuiteConfig(
            attack=AttackConfig(eps=radius, steps=steps, step_size=length, restarts=restarts),
            routing=routing or suite,
            autoattack=autoattack or (suite and classes >= CLASSES),
            eps_sweep=sweep,
            diagnosed=diagnose,
        )
        calibrated = CALIBRATION_IMAGES if controls else 0
        tested = leader_first(
            lambda: subject.images(dataset, data_dir, limit_eval, calibrated, skip_bad_images=skip_bad_images)
        )
        changed = {}
        if tested.calibration is not None:
            of_training = calibration_batches(subject.model, tested.calibration, config.attack, seed=seed)
            changed = {
                name: controlled(subject.model, name, seed, calibration=of_training)
                for name in CONTROLS
                if name in controls
            }
        measuring = Measuring(config, tested, batch_size, seed, latency)
        begun = True
        card, result = measuring.card_of(subject, out, masked=masked)
        for name, other in changed.items():
            variant = dataclasses.replace(subject, model=other, control=name)
            folder = None if out is None else _folder_of_control(out, name)
            of_control, _ = dataclasses.replace(measuring, latency=False).card_of(variant, folder)
            shared = ("sa", "ra", "ra_worst", "verdict")
            card["advmoe"]["controls"][name] = {key: of_control["advmoe"][key] for key in shared}
        if out is not None:
            from_leader(lambda: _save(out, card, result, subject, tested.images))
        if json:
            console.emit_json({"checkpoint": str(subject.path), "dataset": tested.dataset} | card["advmoe"])
        else:
            show(f"{subject.path} on {tested.dataset} (test)", card, diagnosed=diagnose)
        if strict and card["advmoe"]["verdict"] != "trusted":
            raise typer.Exit(UNTRUSTED)


def refuse_a_run(folder: Path) -> None:
    """Refuse a folder for the results of an evaluation if it holds a training run.

    The results would replace the run's route log and metrics, from which a resumed run goes on.

    Raises:
        ConfigError: The folder holds a run.
    """
    found = run_in(folder)
    check(
        found is None,
        f"--out needs a folder of its own, but {folder} holds a training run ({found and found.name}), whose files "
        f"would be replaced; give e.g. --out {folder / 'evaluation'}",
    )


def _folder_of_control(out: Path, control: str) -> Path:
    """Where the evaluation of a control lies in the folder `out` of the whole evaluation."""
    return out / f"control-{control}"


@dataclass(frozen=True)
class Tested:
    """The images of an evaluation, decoded."""

    dataset: str
    """Name of the data set."""
    images: ImageSet
    numbers: NDArray[np.int64] | None
    """The images' numbers in the data set; None if the images are all there are."""
    calibration: ImageSet | None
    """Training images for the statistics of controls."""


@dataclass(frozen=True)
class Subject:
    """A checkpoint and the model that is evaluated: its own, or that under a control."""

    path: Path
    contents: Checkpoint
    model: RoutedNetwork
    digest: str
    """SHA-256 of the file."""
    control: str | None = None

    @classmethod
    def load(cls, path: Path, *, device: str | torch.device) -> Subject:
        """Read a checkpoint."""
        from advmoe.device import resolve_device
        from advmoe.training.checkpoint import file_digest, load_checkpoint

        digest, contents = file_digest(path), load_checkpoint(path)
        return cls(path, contents, contents.build().to(resolve_device(device)), digest)

    @property
    def name(self) -> str:
        """The model's name in a card."""
        ending = "" if self.control is None else f", {self.control} control"
        file = self.path.name if is_address(self.path) else self.path.stem
        return f"{self.path.resolve().parent.name}/{file}{ending}"

    def images(
        self,
        dataset: str | None,
        data_dir: Path | None,
        limit: int | None,
        calibrated: int = 0,
        *,
        skip_bad_images: bool = False,
    ) -> Tested:
        """The test images of a data set, all or as many as the limit says, and a number of training images.

        Images that are skipped leave gaps in the numbers. The others keep theirs, also under a limit.

        Raises:
            ConfigError: The checkpoint names no data set, and none was given.
            CheckpointError: The checkpoint was trained for other classes.
            DataError: The images cannot be read or decoded.
        """
        from advmoe.data.sources import known_info, load_dataset

        name = dataset or self.contents.train.get("dataset")
        if name is None:
            raise ConfigError("the checkpoint does not say which data set it was trained on; give --dataset")
        compare_classes(self.contents, self.path, known_info(name))  # before a download
        with data_progress() as reading:
            data = load_dataset(name, data_dir_of(self.path, name, data_dir), progress=reading, announce=console.note)
        compare_classes(self.contents, self.path, data.info)
        size = self.contents.model.image_size

        def some(images: Images, number: int | None, what: str) -> tuple[ImageSet, NDArray[np.int64] | None]:
            chosen = _chosen(len(images), number)
            taken = images if chosen is None else images.take(chosen)
            found, rows = decoded(taken, size, what, skip_bad_images=skip_bad_images)
            if len(found) == len(images):
                return found, None
            return found, rows if chosen is None else chosen[rows]

        tested, numbers = some(data.test, limit, "test")
        calibration = some(data.train, calibrated, "training")[0] if calibrated else None
        return Tested(data.info.name, tested, numbers, calibration)


@dataclass(frozen=True)
class Measuring:
    """The settings of an evaluation and its images."""

    config: SuiteConfig
    tested: Tested
    batch_size: int
    seed: int
    latency: bool

    def card_of(
        self, subject: Subject, out: Path | None, *, masked: tuple[PathwayChannels, NDArray[np.bool_]] | None = None
    ) -> tuple[dict[str, Any], SuiteResult]:
        """Evaluate a model. Results of an earlier attempt in `out` are not computed again."""
        from advmoe.attacks.autoattack import package
        from advmoe.distributed import from_leader, world
        from advmoe.evaluation.card import make_card
        from advmoe.evaluation.cost import hardware, measure_cost
        from advmoe.evaluation.dissection import route_log
        from advmoe.evaluation.pathways import mask_similarity
        from advmoe.evaluation.suite import run_suite

        if self.config.autoattack:
            package()
        with suite_progress(subject.name, len(self.tested.images)) as progress:
            result = run_suite(
                subject.model,
                self.tested.images,
                self.config,
                numbers=self.tested.numbers,
                batch_size=self.batch_size,
                seed=self.seed,
                state_path=None if out is None else out / STATE,
                progress=progress,
            )
        card = make_card(
            result,
            name=subject.name,
            dataset=self.tested.dataset,
            model=subject.contents.model,
            train=subject.contents.train,
            cost=measure_cost(subject.model, subject.contents.model.image_size),
            device=hardware(next(subject.model.parameters()).device),
            latency=self._latency(subject.model) if self.latency and world().leads else None,
            checkpoint_sha256=subject.digest,
            training_seconds=_training_seconds(subject.path.parent),
            recipe=_recipe_of(subject.path.resolve().parent.name),
            control=subject.control,
        )
        if masked is not None:
            channels, mask = masked
            log = route_log(result, subject.model)
            similar = mask_similarity(log, [name for name, _ in log.conditions], channels, mask)
            card["advmoe"]["mask_iou"] = {each.condition: round(float(each.iou.mean()), 4) for each in similar}
        if subject.control is not None and out is not None:
            from_leader(lambda: _save(out, card, result, subject, self.tested.images))
        return card, result

    def _latency(self, model: RoutedNetwork) -> dict[int, float]:
        """Milliseconds per image, for single images and for the batches of the evaluation, in fp32."""
        from advmoe.data.loader import BatchLoader
        from advmoe.evaluation.cost import measure_latency
        from advmoe.evaluation.precision import full_precision

        batch = next(iter(BatchLoader(self.tested.images, batch_size=self.batch_size).epoch(0)))
        with full_precision(model):
            return measure_latency(model, batch.images, (1, len(batch.images)))


def _save(out: Path, card: dict[str, Any], result: SuiteResult, subject: Subject, images: ImageSet) -> None:
    from advmoe.evaluation.card import save_card
    from advmoe.evaluation.dissection import route_log
    from advmoe.evaluation.examples import save_examples
    from advmoe.evaluation.paired import save_outcomes
    from advmoe.files import write_text_atomically
    from advmoe.reports.training import LOG

    log = subject.path.parent / LOG
    if log.is_file():
        write_text_atomically(out / LOG, log.read_text(encoding="utf-8"))
    save_examples(out / EXAMPLES, subject.model, images, result)
    save_outcomes(out / OUTCOMES, result)
    route_log(result, subject.model).save(out / ROUTES)
    save_card(out / CARD, card)


def _comparable(model: RoutedNetwork, mask: Path) -> tuple[PathwayChannels, NDArray[np.bool_]]:
    """The channels of an MoE-CNN's experts, and a Sparse-CNN's mask over them.

    Raises:
        ConfigError: The model is no MoE-CNN, or the two networks have different backbones.
    """
    from advmoe.evaluation.pathways import mask_of, pathway_channels
    from advmoe.training.checkpoint import load_checkpoint

    check(bool(model.expert_layouts), f"--mask is for an MoE-CNN, this is a {model.config.kind}; leave it out")
    return pathway_channels(model), mask_of(load_checkpoint(mask).build(), model)


def training_radius(contents: Checkpoint) -> float:
    """The radius that a model was trained for.

    Raises:
        ConfigError: The checkpoint does not store a radius.
    """
    trained = contents.train.get("attack", {}).get("eps")
    if trained is None:
        raise ConfigError("the checkpoint does not say which radius it was trained for; give --eps, e.g. 8/255")
    return float(trained)


def _chosen(images: int, limit: int | None) -> NDArray[np.int64] | None:
    """Ascending numbers of the images to evaluate; None if they are all `images` images.

    The choice is random, but it is the same for every evaluation with this limit, whatever its
    seed, so that models can be compared on the same images.
    """
    import numpy as np

    if limit is None or limit >= images:
        return None
    return np.sort(np.random.default_rng(CHOICE_SEED).choice(images, limit, replace=False))


def _recipe_of(run: str) -> str | None:
    """The recipe that a run folder is named after."""
    from advmoe.recipes import recipes

    return run if run in recipes() else None


def _training_seconds(run: Path) -> float | None:
    """Seconds of a run's training steps, computed from the speed of each epoch in the log; None without a log."""
    try:
        config = json_text.loads((run / "config.json").read_text(encoding="utf-8"))["train"]
        records = [json_text.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
        steps = [0, *(record["step"] for record in records)]
        images = [config["batch_size"] * (after - before) for before, after in itertools.pairwise(steps)]
        speeds = [record["images_per_second"] for record in records]
        return round(float(sum(count / speed for count, speed in zip(images, speeds, strict=True))), 1)
    except (OSError, ValueError, KeyError, TypeError, ZeroDivisionError):
        return None


def enough_to_diagnose(images: int, sa: float, diagnosed: int) -> int | None:
    """A number of images among which the diagnostics find enough that are classified correctly.

    Args:
        images: Images evaluated.
        sa: Share of them that is classified correctly, in per cent.
        diagnosed: Images among which they did not find enough.

    Returns:
        Images among which twice as many as needed are expected, because a sample may have fewer than
        its share; at most all. None if not even all of them are enough.
    """
    from advmoe.evaluation.diagnostics import NEEDED

    right = round(sa * images / 100)
    if right < NEEDED or diagnosed >= images:
        return None
    return min(images, max(math.ceil(2 * NEEDED * images / right), 2 * diagnosed))


def show(title: str, card: Mapping[str, Any], *, diagnosed: int) -> None:
    """Figures and diagnostics as tables; `diagnosed` images could be looked at by the diagnostics.

    Each share stands beside its own standard error.
    """
    from advmoe.evaluation.card import latencies, with_error
    from advmoe.evaluation.diagnostics import NEEDED
    from advmoe.evaluation.vocabulary import FOOLED, RA, RA_PGD, RA_WORST, SA, failed_readings, measured

    numbers = card["advmoe"]
    attack = numbers["attack"]

    def share(per_cent: float) -> str:
        return f"{with_error(per_cent, numbers['images'])} %"

    rows: dict[str, Any] = {}
    for figure in measured([numbers]):
        rows[figure.label(numbers)] = share(figure.of(numbers) or 0.0)
        if figure is RA_PGD:
            views = numbers.get("ra_views", {})
            rows |= {f"  routing seen as {view}": share(ra) for view, ra in views.items()}
    if "routes_exact" in numbers:
        rows["pathways of the route attack"] = "all" if numbers["routes_exact"] else "sampled, then the nearest flips"
    if "further_starts" in numbers:
        rows["further starts of PGD"] = numbers["further_starts"]
    rows |= {f"{RA_PGD.long}, eps {eps}": share(ra) for eps, ra in numbers.get("ra_by_eps", {}).items()}
    if (fooled := FOOLED.of(numbers)) is not None:
        rows[FOOLED.long] = share(fooled)
        rows["distinct pathways, clean"] = numbers["pathways"]
    if "mask_iou" in numbers:
        rows["IoU with the mask pathway"] = ", ".join(f"{iou:.3f} {name}" for name, iou in numbers["mask_iou"].items())
    for name, values in numbers["controls"].items():
        rows[f"control: {name}"] = ", ".join(f"{each.short} {share(values[each.key])}" for each in (SA, RA, RA_WORST))
    rows |= {
        "attack": f"step {255 * attack['step_size']:.3g}/255, {attack['restarts']} restart(s), start {attack['start']}",
        "images": f"{numbers['images']}, seed {numbers['seed']}; ± is one standard error from the number of images",
        "parameters, GFLOPs per image": f"{numbers['parameters']:,}, {numbers['gflops']:.4g}",
    }
    if numbers["training_seconds"] is not None:
        rows["time of training"] = f"{numbers['training_seconds'] / 60:.1f} minutes"
    if latency := latencies(numbers):
        rows["latency"] = latency
    console.show_facts(title, rows)
    verdict = numbers["verdict"]
    if numbers["diagnostics"]:
        console.show_table(
            f"Diagnostics: these numbers are {verdict.upper() if verdict != 'trusted' else verdict}",
            ("check", "status", "seen"),
            [(item["name"], item["status"], item["value"]) for item in numbers["diagnostics"]],
        )
        for name, reading in failed_readings(numbers["diagnostics"]):
            console.note(f"{name}: {reading.meaning} {reading.next_step}")
        if verdict == "not checked":
            more = f"the model classifies too few of all {numbers['images']} correctly: evaluate more, or train it"
            if enough := enough_to_diagnose(numbers["images"], numbers["sa"], diagnosed):
                more = f"give --diagnose {enough}"
            console.note(f"The checks need {NEEDED} images that are classified correctly; {more}.")
    else:
        console.note("No diagnostics were run: these numbers are NOT CHECKED.")
