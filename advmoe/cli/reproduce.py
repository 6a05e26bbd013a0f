"""`advmoe reproduce`: one command per table and figure of the paper."""

from __future__ import annotations

import json as jsonlib
import os
import shlex
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, TypeVar

import typer

from advmoe.cli import console
from advmoe.cli.called import CALLS
from advmoe.cli.options import DataDir, Device, Json, LimitEval, one_of_these
from advmoe.cli.seeds import parse_seeds
from advmoe.cli.signals import INTERRUPTED, NAMES, TERMINATED, Terminated, resumable, terminal_interrupts_children
from advmoe.config import check, one_of
from advmoe.errors import AdvMoEError
from advmoe.experiments import EXPERIMENTS, ROUTING, SCALES, SIZES, Experiment, independent, selected
from advmoe.recipes import Recipe
from advmoe.recipes import recipes as all_recipes
from advmoe.run_paths import BEST, LAST
from advmoe.world import GROUP, launched

T = TypeVar("T")

DONE = "done.json"
"""File in the folder of a finished run or evaluation with its options and its result."""


def reproduce(
    name: Annotated[
        str | None,
        typer.Argument(
            help=f"One of {', '.join(EXPERIMENTS)}.", show_default=False, autocompletion=one_of_these(EXPERIMENTS)
        ),
    ] = None,
    scale: Annotated[
        str,
        typer.Option(
            help="paper; small (two cores, hours, a figure with meaning); smoke (digits, minutes, a try).",
            autocompletion=one_of_these(SCALES),
        ),
    ] = "paper",
    only: Annotated[
        str | None,
        typer.Option(
            help="Only these runs: names of recipes, parts or patterns of them, separated by commas, e.g. "
            "cifar10-resnet18 or 'table1-*-advmoe'.",
            show_default=False,
        ),
    ] = None,
    seeds: Annotated[str, typer.Option(help="Seeds, separated by commas; several give mean and deviation.")] = "0",
    list_only: Annotated[
        bool,
        typer.Option(
            "--list",
            help="Print independent commands that do the work, one a line, for a scheduler; without a name, the tables "
            "and figures there are.",
        ),
    ] = False,
    prepare: Annotated[
        bool, typer.Option("--prepare", help="Train and evaluate only; the table is for a later call.")
    ] = False,
    jobs: Annotated[int, typer.Option(help="Independent runs to do side by side.")] = 1,
    gpus: Annotated[
        str | None,
        typer.Option(help="GPUs for runs side by side, one run on each, e.g. 0,1,2,3.", show_default=False),
    ] = None,
    train: Annotated[
        str, typer.Option(help="Further options for all training runs, e.g. '--width 0.25 --epochs 10'.")
    ] = "",
    evaluate: Annotated[str, typer.Option(help="Further options for all evaluations, e.g. '--steps 20'.")] = "",
    runs: Annotated[
        Path | None, typer.Option(help="Folder of the runs. Default: runs, or runs-SCALE.", show_default=False)
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder for the table (JSON) and the report (HTML).")] = Path("results"),
    limit_eval: LimitEval = None,
    data_dir: DataDir = None,
    device: Device = "auto",
    json: Json = False,
) -> None:
    """Train, evaluate and show all runs of a table or figure of the paper.

    Finished work is not repeated: after an interruption the same command goes on where it stopped.
    At the paper's scale most tables take GPU-days; a smaller scale says what it made smaller. With
    each run on all of several GPUs or machines: torchrun -m advmoe reproduce ...
    """
    chosen_scale = one_of("scale", scale, SCALES, "scale")
    if name is None:
        check(list_only, f"expected a table or figure, one of: {', '.join(EXPERIMENTS)}; --list shows what they are")
        for each, experiment in EXPERIMENTS.items():
            count = len(selected(each, chosen_scale, []))  # type: ignore[arg-type]
            runs_of = "1 run" if count == 1 else f"{count} runs"
            console.out.print(f"{each:<8}{experiment.title}, {runs_of}", highlight=False, markup=False)
        return
    one_of("table or figure", name, EXPERIMENTS)
    plan = Plan(
        name=name,
        scale=chosen_scale,
        chosen=tuple(selected(name, chosen_scale, only.split(",") if only else [])),  # type: ignore[arg-type]
        seeds=parse_seeds(seeds),
        runs=runs or Path("runs" if scale == "paper" else f"runs-{scale}"),
        train=train,
        evaluate=" ".join([evaluate, *([] if limit_eval is None else ["--limit-eval", str(limit_eval)])]).strip(),
        common=("--device", device, *([] if data_dir is None else ["--data-dir", str(data_dir)])),
    )
    check(
        data_dir is None or plan.size.dataset is None,
        f"--scale {scale} uses {plan.size.dataset}, which comes with advmoe, so --data-dir has no effect; leave it out",
    )
    check(jobs >= 1, f"--jobs must be at least 1, got {jobs}")
    if list_only:
        for line in plan.commands(out):
            console.out.print(shlex.join(["advmoe", *line]), highlight=False, markup=False)
        return
    workers = [None] * jobs if gpus is None else [gpu.strip() for gpu in gpus.split(",")]
    ranks = launched().size
    check(
        ranks == 1 or len(workers) == 1,
        f"torchrun's {ranks} processes do each run together; --jobs and --gpus would do several side by side: leave "
        "them out, or start this in one process",
    )
    with resumable(lambda: "the same command of 'advmoe reproduce' goes on"):
        if len(workers) > 1 and len(plan.commands(out)) > 1:
            side_by_side(plan.commands(out), workers)
        if ranks == 1:
            carry_out(plan, out, prepare=prepare, json=json)
            return
        import torch

        from advmoe.distributed import PATIENT_SECONDS, joined

        with joined(torch.device("cpu"), patience=PATIENT_SECONDS):
            carry_out(plan, out, prepare=prepare, json=json)


def carry_out(plan: Plan, out: Path, *, prepare: bool, json: bool) -> None:
    """Train and evaluate what is not done yet, then write and show the table and the reports."""
    results = {
        recipe.name: [plan.result(recipe, seed) for seed in plan.seeds] for recipe in plan.chosen
    }  # parallel work is finished; its results are only read here
    if not prepare:
        led(lambda: conclude(plan, results, out, json=json))


def conclude(plan: Plan, results: dict[str, list[dict[str, Any]]], out: Path, *, json: bool) -> None:
    """Write and show the table and the reports."""
    from advmoe.files import write_text_atomically

    for recipe in plan.chosen if plan.experiment.routing else ():
        if recipe.model.get("kind") == "moe":
            for seed, result in zip(plan.seeds, results[recipe.name], strict=True):
                result[ROUTING] = run("analyze", str(plan.evaluation(recipe, seed)), *plan.mask_option(seed))
    table = {
        "experiment": plan.experiment.title,
        "scale": plan.scale,
        "made_smaller": plan.made_smaller,
        "seeds": list(plan.seeds),
        "train_options": plan.train_options,
        "evaluate_options": plan.evaluate_options,
        "runs": results,
    }
    out.mkdir(parents=True, exist_ok=True)
    write_text_atomically(out / f"{plan.name}.json", jsonlib.dumps(table, indent=2) + "\n")
    for dataset, title in reports(plan.name, plan.chosen, one=plan.size.dataset is not None).items():
        folders = [
            str(plan.evaluation(recipe, plan.seeds[0]))
            for recipe in plan.chosen
            if plan.size.dataset is not None or recipe.dataset == dataset
        ]
        run("report", *folders, *plan.mask_option(plan.seeds[0]), "--out", str(out / f"{title}.html"), json=False)
    if json:
        console.emit_json(table)
    else:
        show(plan, results)
        console.note(f"written to {out / plan.name}.json and {out / plan.name}*.html")


@dataclass(frozen=True, kw_only=True)
class Plan:
    """The work behind a table or figure: runs, seeds, sizes and folders."""

    name: str
    scale: str
    chosen: tuple[Recipe, ...]
    seeds: tuple[int, ...]
    runs: Path
    train: str
    evaluate: str
    common: tuple[str, ...]

    @property
    def experiment(self) -> Experiment:
        """What is reproduced."""
        return EXPERIMENTS[self.name]

    @property
    def size(self) -> Any:
        """How large the runs are."""
        return SIZES[self.scale]  # type: ignore[index]

    @property
    def train_options(self) -> str:
        """Options of all trainings."""
        return " ".join(part for part in (self.size.train, self.train) if part)

    @property
    def evaluate_options(self) -> str:
        """Options of all evaluations; the last of two equal ones counts."""
        return " ".join(part for part in (self.size.evaluate, self.experiment.evaluate, self.evaluate) if part)

    @property
    def made_smaller(self) -> str:
        """Differences from the paper, in words."""
        own = [f"options {text}" for text in (self.train, self.evaluate) if text]
        return "; ".join(([self.size.made_smaller] if self.size.made_smaller else []) + own)

    def folder(self, recipe: Recipe, seed: int) -> Path:
        """Where a run lies."""
        return self.runs / (recipe.name if seed == 0 else f"{recipe.name}-seed{seed}")

    def evaluation(self, recipe: Recipe, seed: int) -> Path:
        """Folder of a run's evaluation for this table or figure."""
        return self.folder(recipe, seed) / f"evaluation-{self.name}"

    def mask_option(self, seed: int) -> list[str]:
        """The option that compares pathways with the mask of the Sparse-CNN among the runs of a seed.

        Mask and MoE-CNN start from the AT (Dense) of that seed. Channels of another seed's mask
        have no common order with theirs.
        """
        if not self.experiment.mask:
            return []
        masks = [recipe for recipe in self.chosen if recipe.model.get("kind") == "sparse_cnn"]
        return ["--mask", str(self.folder(masks[0], seed) / BEST)] if masks else []

    def commands(self, out: Path) -> list[list[str]]:
        """Independent commands that train and evaluate everything."""
        shared = ["--prepare", "--scale", self.scale, "--runs", str(self.runs), "--out", str(out), *self.common]
        further = {"--train": self.train, "--evaluate": self.evaluate}
        shared += [part for option, text in further.items() if text for part in (option, text)]
        return [
            ["reproduce", self.name, "--only", ",".join(r.name for r in group), "--seeds", str(seed), *shared]
            for group in independent(self.chosen)
            for seed in self.seeds
        ]

    def trained(self, recipe: Recipe, seed: int) -> Path:
        """The best checkpoint of a run. An unfinished run is trained to its end first."""
        folder = self.folder(recipe, seed)
        initial: list[str] = []
        if recipe.starts_from is not None:
            initial = ["--init", str(self.trained(all_recipes()[recipe.starts_from], seed))]
        dataset = [self.size.dataset] if self.size.dataset else []
        options = [*shlex.split(self.train_options), "--seed", str(seed), *self.common]
        resume = ["--resume"] if (folder / LAST).exists() else []
        arguments = [*dataset, "--recipe", recipe.name, "--out", str(folder), *initial, *options]
        once(folder, "train", arguments, further=resume)
        return folder / BEST

    def result(self, recipe: Recipe, seed: int) -> dict[str, Any]:
        """Figures of a run. It is trained and evaluated first if necessary."""
        checkpoint, folder = self.trained(recipe, seed), self.evaluation(recipe, seed)
        options = [*shlex.split(self.evaluate_options), "--seed", str(seed), *self.common]
        return once(folder, "evaluate", [str(checkpoint), "--out", str(folder), *options], evaluated=checkpoint)


def once(
    folder: Path,
    command: str,
    arguments: Sequence[str],
    *,
    further: Sequence[str] = (),
    evaluated: Path | None = None,
) -> dict[str, Any]:
    """The result of a command that writes a folder. A command that finished with the same arguments
    is not run again.

    Args:
        folder: The folder.
        command: Name of the command.
        arguments: Arguments that decide the result.
        further: Other arguments.
        evaluated: Checkpoint whose evaluation the result is. Another one of this name, as after a
            new training, is evaluated again.
    """
    from advmoe.files import write_text_atomically

    def before() -> dict[str, Any] | None:
        try:
            done = jsonlib.loads((folder / DONE).read_text(encoding="utf-8"))
            result = dict(done["result"]) if done["arguments"] == [command, *arguments] else None
            return None if result is None or _of_another(evaluated, result) else result
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def note(result: dict[str, Any]) -> dict[str, Any]:
        if folder.is_dir():
            text = jsonlib.dumps({"arguments": [command, *arguments], "result": result}) + "\n"
            write_text_atomically(folder / DONE, text)
        return result

    found = led(before)
    if found is not None:
        return found
    result = run(command, *arguments, *further, group=f"{command} {folder}")
    return led(lambda: note(result))


def _of_another(checkpoint: Path | None, result: Mapping[str, Any]) -> bool:
    """Whether an evaluation is of another checkpoint than this one."""
    if checkpoint is None:
        return False
    from advmoe.training.checkpoint import file_digest

    return bool(result["checkpoint_sha256"] != file_digest(checkpoint))


def led(action: Callable[[], T]) -> T:
    """Let one process do something that all of torchrun's need the result of."""
    if launched().size == 1:  # without torch, which takes seconds to load
        return action()
    from advmoe.distributed import from_leader

    return from_leader(action)


def reports(name: str, chosen: Sequence[Recipe], *, one: bool = False) -> dict[str, str]:
    """Data set -> name of its report: models are compared on the same images only."""
    datasets = list(dict.fromkeys(recipe.dataset for recipe in chosen))
    if one or len(datasets) == 1:
        return {datasets[0]: name}
    return {dataset: f"{name}-{dataset}" for dataset in datasets}


def side_by_side(commands: Sequence[Sequence[str]], workers: Sequence[str | None]) -> None:
    """Run commands of ours at the same time, one on each worker; a worker is a GPU, or None for any device.

    Raises:
        AdvMoEError: One command failed; the others have finished.
        KeyboardInterrupt, Terminated: The processes were asked to stop, and have ended.
    """
    waiting, failed = list(commands), 0
    running: dict[int, tuple[str, subprocess.Popen[bytes]]] = {}
    try:
        while waiting or running:
            for slot, worker in enumerate(workers):
                if slot in running and (status := running[slot][1].poll()) is not None:
                    line, _ = running.pop(slot)
                    failed += status != 0
                    if status in (INTERRUPTED, TERMINATED):  # it alone was stopped, and leaves it to us to say so
                        console.warn(f"{NAMES[status - 128]}: {line}")
                if slot not in running and waiting:
                    arguments = waiting.pop(0)
                    line = shlex.join(["advmoe", *arguments])
                    console.note(line + ("" if worker is None else f"  (GPU {worker})"))
                    environment = os.environ | CALLS | ({} if worker is None else {"CUDA_VISIBLE_DEVICES": worker})
                    started = subprocess.Popen([sys.executable, "-m", "advmoe", *arguments], env=environment)
                    running[slot] = line, started
            time.sleep(0.2)
    finally:
        for _, process in running.values():
            process.send_signal(signal.SIGTERM)
        for _, process in running.values():
            process.wait()
    if failed:
        raise AdvMoEError(f"{failed} of {len(commands)} commands failed (see above); mend them and give the same again")


def run(command: str, *arguments: str, json: bool = True, group: str | None = None) -> dict[str, Any]:
    """Run a command of this package in its own process. Its progress is shown, and its result is returned.

    Args:
        command: its name.
        *arguments: of the command.
        json: whether it gives its result as JSON.
        group: where torchrun started several processes, the name under which the commands that they
            all run meet; the result is the leader's. Without a name the command runs in one
            process.

    Raises:
        AdvMoEError: The command failed; it has printed the reason.
        KeyboardInterrupt: The command or this process was interrupted.
        Terminated: The command or this process received SIGTERM.
    """
    line = ["advmoe", command, *arguments]
    console.note(shlex.join(line))
    process = [sys.executable, "-m", "advmoe", command, *arguments, *(["--json"] if json else [])]
    environment = os.environ | CALLS
    if launched().size > 1:
        environment |= {GROUP: f"{environment.get(GROUP, '')}/{group}"} if group else {"WORLD_SIZE": "1"}
    status, output = run_to_its_end(process, environment)
    if status == INTERRUPTED:
        raise KeyboardInterrupt
    if status == TERMINATED:
        raise Terminated
    if status != 0:
        raise AdvMoEError(f"'{shlex.join(line)}' failed (see above); mend it and give the same command again to go on")
    result: dict[str, Any] = jsonlib.loads(output) if json and launched().leads else {}
    return result


def run_to_its_end(process: Sequence[str], environment: Mapping[str, str] | None = None) -> tuple[int, str]:
    """Exit status and output of a process. Signals are passed on to it, and the process is waited for."""
    with subprocess.Popen(process, stdout=subprocess.PIPE, text=True, env=environment) as child:
        ended_by: BaseException | None = None
        while True:
            try:
                output = "" if ended_by else child.communicate()[0]
                status = child.wait()
            except Terminated as error:
                ended_by = error
                child.send_signal(signal.SIGTERM)
            except KeyboardInterrupt as error:
                ended_by = error
                if not terminal_interrupts_children():
                    child.send_signal(signal.SIGINT)
            else:
                if ended_by is not None:
                    raise ended_by
                return status, output


def value_at(result: Mapping[str, Any], path: str) -> float | None:
    """One figure of a run's result; None if it was not measured."""
    value: Any = result
    for key in path.split("."):
        value = value.get(key) if isinstance(value, Mapping) else None
    return float(value) if isinstance(value, int | float) else None


def cell(results: Sequence[Mapping[str, Any]], path: str) -> str:
    """A figure for the table: of one seed, or mean and standard deviation over several."""
    values = [value for result in results if (value := value_at(result, path)) is not None]
    if not values:
        return "-"
    fraction, cost = path.endswith(".mean"), path == "gflops"
    if cost:
        return f"{values[0]:.4g}"
    if len(values) == 1:
        return f"{values[0]:.{3 if fraction else 2}f}"
    digits = 2 if fraction else 1
    return f"{statistics.fmean(values):.{digits}f}±{statistics.stdev(values):.{digits}f}"


def show(plan: Plan, results: Mapping[str, Sequence[Mapping[str, Any]]]) -> None:
    """The table, in groups of data set and backbone, with a note of everything that was made smaller."""
    experiment = plan.experiment
    groups: dict[str, list[Recipe]] = {}
    for recipe in plan.chosen:
        dataset = plan.size.dataset or recipe.dataset
        groups.setdefault(f"{dataset}, {recipe.model['arch']}", []).append(recipe)
    for group, members in groups.items():
        rows = [
            (recipe.summary, *(cell(results[recipe.name], path) for path in experiment.columns.values()))
            for recipe in members
        ]
        console.show_table(f"{experiment.title}: {group}", ("", *experiment.columns), rows)
    if experiment.curves:
        show_curves(plan)
    seeds = f"{len(plan.seeds)} seeds, mean ± standard deviation" if len(plan.seeds) > 1 else f"seed {plan.seeds[0]}"
    smaller = f" Smaller than in the paper: {plan.made_smaller}." if plan.made_smaller else ""
    console.out.print(f"{seeds}, scale {plan.scale}.{smaller}", highlight=False, markup=False)


def show_curves(plan: Plan) -> None:
    """Validation SA and RA of the runs at some epochs (App. C: convergence)."""
    from advmoe.reports.training import read_log, robust_accuracy

    logs = {recipe.summary: read_log(plan.folder(recipe, plan.seeds[0])) for recipe in plan.chosen}
    longest = max(map(len, logs.values()), default=0)
    epochs = sorted({round(longest * share / 5) for share in range(1, 6)} - {0})
    rows = []
    for summary, log in logs.items():
        by_epoch = {record["epoch"]: record for record in log}
        known = (by_epoch.get(epoch) for epoch in epochs)
        rows.append((summary, *("-" if r is None else f"{r['val_sa']:.1f}/{robust_accuracy(r):.1f}" for r in known)))
    console.show_table("Validation SA/RA by epoch", ("", *(str(epoch) for epoch in epochs)), rows)
