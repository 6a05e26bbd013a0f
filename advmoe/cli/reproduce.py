"""`advmoe reproduce`: one command per table and figure of the paper."""

from __future__ import annotations

import json as jsonlib
import shlex
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import typer

from advmoe.cli import console
from advmoe.cli.options import DataDir, Device, Json, LimitEval, Seed
from advmoe.cli.signals import INTERRUPTED, TERMINATED, Terminated, terminal_interrupts_children
from advmoe.config import one_of
from advmoe.errors import AdvMoEError, ConfigError
from advmoe.recipes import Recipe
from advmoe.recipes import recipes as all_recipes

ROUTING = "routing"
"""Under which key of a run's result the analysis of its route log stands."""
UNDER_PGD = f"{ROUTING}.conditions.pgd.dissection"
DISSECTION = {
    "1: router survives, right": f"{UNDER_PGD}.router_survives_right",
    "2: router fooled, right": f"{UNDER_PGD}.router_fooled_right",
    "3: router survives, wrong": f"{UNDER_PGD}.router_survives_wrong",
    "4: both fooled": f"{UNDER_PGD}.router_fooled_wrong",
}
IOU = {
    "IoU with mask, clean": f"{ROUTING}.mask.clean.mean",
    "IoU with mask, PGD": f"{ROUTING}.mask.pgd.mean",
    "IoU clean - PGD": f"{ROUTING}.similarity.overlap.pgd.mean",
    "IoU of pairs": f"{ROUTING}.similarity.diversity.clean.mean",
}
RADII = ",".join(f"{level}/255" for level in (2, 4, 6, 8, 10, 12))


@dataclass(frozen=True)
class Experiment:
    """A table or figure: what its runs say in `shown_in`, and what its evaluation needs beyond SA and RA."""

    shown_in: str
    evaluate: str = ""
    """Further options of `advmoe evaluate`."""
    columns: Mapping[str, str] = field(default_factory=dict)
    """What to show beside SA, RA and GFLOPs: title -> where it is in a run's result, as keys joined by dots."""
    mask: bool = False
    """Compare pathways with the mask pathway of AT (Sparse)."""

    @property
    def routing(self) -> bool:
        """Whether it shows something of the routing, so that the route logs have to be analysed."""
        return any(path.startswith(f"{ROUTING}.") for path in self.columns.values())


EXPERIMENTS: Mapping[str, Experiment] = {
    "table1": Experiment("Table 1"),
    "table2": Experiment("Table 2", "--autoattack", {"RA-AA": "ra_aa"}),
    "table3": Experiment("Table 3"),
    "fig2": Experiment("Fig. 2", f"--eps-sweep {RADII}", {"RA by eps": "ra_by_eps"}),
    "fig3": Experiment("Fig. 3"),
    "fig4": Experiment("Fig. 4", columns=DISSECTION),
    "fig5": Experiment("Fig. 5", columns=DISSECTION),
    "fig6": Experiment("Fig. 6", columns=IOU, mask=True),
    "fig7": Experiment("Fig. 7"),
    "fig8": Experiment("Fig. 8"),
    "appc": Experiment("App. C"),
}


def reproduce(
    name: Annotated[str, typer.Argument(help=f"One of {', '.join(EXPERIMENTS)}.")],
    only: Annotated[
        str | None, typer.Option(help="Only runs whose recipe has this in its name, e.g. cifar10-resnet18.")
    ] = None,
    train: Annotated[
        str, typer.Option(help="Options for all training runs, e.g. '--width 0.25 --epochs 10 --limit-train 10000'.")
    ] = "",
    evaluate: Annotated[str, typer.Option(help="Options for all evaluations, e.g. '--steps 20'.")] = "",
    runs: Annotated[Path, typer.Option(help="Folder of the runs, one per recipe.")] = Path("runs"),
    out: Annotated[Path, typer.Option(help="Folder for the table (JSON) and the report (HTML).")] = Path("results"),
    limit_eval: LimitEval = None,
    data_dir: DataDir = None,
    seed: Seed = 0,
    device: Device = "auto",
    json: Json = False,
) -> None:
    """Train, evaluate and show all runs of a table or figure of the paper.

    What is finished is not done again: after an interruption the same command goes on where it stopped. At the paper's
    settings most take GPU-days; --train and --evaluate make them smaller, and the result says so.
    """
    from advmoe.files import write_text_atomically

    experiment = EXPERIMENTS[one_of("table or figure", name, EXPERIMENTS)]
    chosen = [
        recipe
        for recipe in all_recipes().values()
        if experiment.shown_in in [part.strip() for part in recipe.shown_in.split(",")]
        and (only is None or only in recipe.name)
    ]
    if not chosen:
        raise ConfigError(f"no run of {name} has '{only}' in its name; 'advmoe recipes' lists them")
    common = ["--seed", str(seed), "--device", device, *([] if data_dir is None else ["--data-dir", str(data_dir)])]
    limit = [] if limit_eval is None else ["--limit-eval", str(limit_eval)]
    results: dict[str, dict[str, Any]] = {}
    train_words, evaluate_words = words(train, "--train"), words(evaluate, "--evaluate")
    for recipe in chosen:
        checkpoint = trained(recipe, runs, [*train_words, *common])
        options = [*shlex.split(experiment.evaluate), *evaluate_words, *limit, *common]
        results[recipe.name] = run("evaluate", str(checkpoint), "--out", str(evaluated(recipe, name, runs)), *options)
    mask = mask_option(experiment, chosen, runs)
    for recipe in chosen:
        if experiment.routing and recipe.model.get("kind") == "moe":
            results[recipe.name][ROUTING] = run("analyze", str(evaluated(recipe, name, runs)), *mask)
    out.mkdir(parents=True, exist_ok=True)
    table = {
        "experiment": experiment.shown_in,
        "train_options": train,
        "evaluate_options": " ".join([experiment.evaluate, evaluate, *limit]).strip(),
        "runs": results,
    }
    text = jsonlib.dumps(table, indent=2) + "\n"
    write_text_atomically(out / f"{name}.json", text)
    for dataset, title in reports(name, chosen).items():
        folders = [str(evaluated(recipe, name, runs)) for recipe in chosen if recipe.dataset == dataset]
        run("report", *folders, *mask, "--out", str(out / f"{title}.html"), json=False)
    if json:
        console.emit_json(table)
        return
    accuracies = ("sa", *sorted({key for result in results.values() for key in result if key.startswith("ra_pgd")}))
    columns = {key: key for key in accuracies} | dict(experiment.columns) | {"gflops": "gflops"}
    rows = [
        (recipe.name, recipe.summary, *(shown(results[recipe.name], path) for path in columns.values()))
        for recipe in chosen
    ]
    console.show_table(f"{experiment.shown_in} ({out / f'{name}.json'})", ("run", "method", *columns), rows)


def words(text: str, name: str) -> list[str]:
    """The options in a text, split as a shell does.

    Raises:
        ConfigError: a quotation that does not end.
    """
    try:
        return shlex.split(text)
    except ValueError as error:
        raise ConfigError(f"{name} cannot be read: {str(error).lower()}, got {text}") from None


def evaluated(recipe: Recipe, name: str, runs: Path) -> Path:
    """Folder of a run's evaluation for a table or figure."""
    return runs / recipe.name / f"evaluation-{name}"


def reports(name: str, chosen: Sequence[Recipe]) -> dict[str, str]:
    """Data set -> name of its report: models are compared on the same images only."""
    datasets = list(dict.fromkeys(recipe.dataset for recipe in chosen))
    return {dataset: name if len(datasets) == 1 else f"{name}-{dataset}" for dataset in datasets}


def mask_option(experiment: Experiment, chosen: Sequence[Recipe], runs: Path) -> list[str]:
    """The option that compares pathways with the mask of the Sparse-CNN among the runs."""
    masks = [recipe.name for recipe in chosen if recipe.model.get("kind") == "sparse_cnn"] if experiment.mask else []
    return ["--mask", str(runs / masks[0] / "best.pt")] if masks else []


def trained(recipe: Recipe, runs: Path, options: Sequence[str]) -> Path:
    """The best checkpoint of a recipe's run, which is trained, or trained to its end, if need be."""
    folder = runs / recipe.name
    initial: list[str] = []
    if recipe.starts_from is not None:
        initial = ["--init", str(trained(all_recipes()[recipe.starts_from], runs, options))]
    resume = ["--resume"] if (folder / "last.pt").exists() else []
    run("train", "--recipe", recipe.name, "--out", str(folder), *initial, *resume, *options)
    return folder / "best.pt"


def run(command: str, *arguments: str, json: bool = True) -> dict[str, Any]:
    """Run a command of ours in a process of its own; its progress shows, its result comes back.

    Raises:
        AdvMoEError: it failed; it has said why.
        KeyboardInterrupt: it was interrupted, or this process was.
        Terminated: the same by SIGTERM.
    """
    line = ["advmoe", command, *arguments]
    console.note(shlex.join(line))
    process = [sys.executable, "-m", "advmoe", command, *arguments, *(["--json"] if json else [])]
    status, output = run_to_its_end(process)
    if status == INTERRUPTED:
        raise KeyboardInterrupt
    if status == TERMINATED:
        raise Terminated
    if status != 0:
        raise AdvMoEError(f"'{shlex.join(line)}' failed (see above); mend it and give the same command again to go on")
    result: dict[str, Any] = jsonlib.loads(output) if json else {}
    return result


def run_to_its_end(process: Sequence[str]) -> tuple[int, str]:
    """Exit status and output of a process. A signal is passed on, and what it ends is waited for."""
    with subprocess.Popen(process, stdout=subprocess.PIPE, text=True) as child:
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


def shown(result: Mapping[str, Any], path: str) -> str:
    """One figure of a run's result, for the table."""
    value: Any = result
    for key in path.split("."):
        value = value.get(key, "-") if isinstance(value, Mapping) else "-"
    if isinstance(value, Mapping):
        return ", ".join(f"{name}: {figure:.2f}" for name, figure in value.items())
    return f"{value:.4g}" if isinstance(value, float) else str(value)
