"""`advmoe reproduce`: one command per table and figure of the paper."""

from __future__ import annotations

import json as jsonlib
import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from advmoe.cli import console
from advmoe.cli.options import DataDir, Device, Json, LimitEval, Seed
from advmoe.config import one_of
from advmoe.errors import AdvMoEError, ConfigError
from advmoe.recipes import Recipe
from advmoe.recipes import recipes as all_recipes

RADII = ",".join(f"{level}/255" for level in (2, 4, 6, 8, 10, 12))


@dataclass(frozen=True)
class Experiment:
    """A table or figure: what its runs say in `shown_in`, and what its evaluation needs beyond SA and RA."""

    shown_in: str
    evaluate: str = ""
    """Further options of `advmoe evaluate`."""
    columns: tuple[str, ...] = ()
    """Figures of the result cards to show beside SA, RA and GFLOPs."""
    mask: bool = False
    """Compare pathways with the mask pathway of AT (Sparse)."""


EXPERIMENTS: Mapping[str, Experiment] = {
    "table1": Experiment("Table 1"),
    "table2": Experiment("Table 2", "--autoattack", ("ra_aa",)),
    "table3": Experiment("Table 3"),
    "fig2": Experiment("Fig. 2", f"--eps-sweep {RADII}", ("ra_by_eps",)),
    "fig3": Experiment("Fig. 3"),
    "fig4": Experiment("Fig. 4", columns=("routers_fooled",)),
    "fig5": Experiment("Fig. 5", columns=("routers_fooled",)),
    "fig6": Experiment("Fig. 6", mask=True),
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
    cards: dict[str, dict[str, Any]] = {}
    for recipe in chosen:
        checkpoint = trained(recipe, runs, [*shlex.split(train), *common])
        folder = checkpoint.parent / f"evaluation-{name}"
        options = [*shlex.split(experiment.evaluate), *shlex.split(evaluate), *limit, *common]
        cards[recipe.name] = run("evaluate", str(checkpoint), "--out", str(folder), *options)
    out.mkdir(parents=True, exist_ok=True)
    table = {
        "experiment": experiment.shown_in,
        "train_options": train,
        "evaluate_options": " ".join([experiment.evaluate, evaluate, *limit]).strip(),
        "runs": cards,
    }
    (out / f"{name}.json").write_text(jsonlib.dumps(table, indent=2) + "\n")
    write_report(name, experiment, chosen, runs, out)
    if json:
        console.emit_json(table)
        return
    columns = ("sa", *sorted({key for card in cards.values() for key in card if key.startswith("ra_pgd")}))
    columns += (*experiment.columns, "gflops")
    rows = [
        (recipe.name, recipe.summary, *(card_value(cards[recipe.name], key) for key in columns)) for recipe in chosen
    ]
    console.show_table(f"{experiment.shown_in} ({out / f'{name}.json'})", ("run", "method", *columns), rows)


def trained(recipe: Recipe, runs: Path, options: Sequence[str]) -> Path:
    """The best checkpoint of a recipe's run, which is trained, or trained to its end, if need be."""
    folder = runs / recipe.name
    initial: list[str] = []
    if recipe.starts_from is not None:
        initial = ["--init", str(trained(all_recipes()[recipe.starts_from], runs, options))]
    resume = ["--resume"] if (folder / "last.pt").exists() else []
    run("train", "--recipe", recipe.name, "--out", str(folder), *initial, *resume, *options)
    return folder / "best.pt"


def write_report(name: str, experiment: Experiment, chosen: Sequence[Recipe], runs: Path, out: Path) -> None:
    """The HTML report that compares the runs."""
    masks = [recipe.name for recipe in chosen if recipe.model.get("kind") == "sparse_cnn"] if experiment.mask else []
    mask = ["--mask", str(runs / masks[0] / "best.pt")] if masks else []
    folders = [str(runs / recipe.name / f"evaluation-{name}") for recipe in chosen]
    run("report", *folders, *mask, "--out", str(out / f"{name}.html"), json=False)


def run(command: str, *arguments: str, json: bool = True) -> dict[str, Any]:
    """Run a command of ours in a process of its own; its progress shows, its result comes back.

    Raises:
        AdvMoEError: it failed; it has said why.
        KeyboardInterrupt: it was interrupted.
    """
    line = ["advmoe", command, *arguments]
    console.note(shlex.join(line))
    process = [sys.executable, "-m", "advmoe.cli.app", command, *arguments, *(["--json"] if json else [])]
    done = subprocess.run(process, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode == 130:
        raise KeyboardInterrupt
    if done.returncode != 0:
        raise AdvMoEError(f"'{shlex.join(line)}' failed (see above); mend it and give the same command again to go on")
    result: dict[str, Any] = jsonlib.loads(done.stdout) if json else {}
    return result


def card_value(card: Mapping[str, Any], key: str) -> str:
    """One figure of a result card, for the table."""
    value = card.get(key, "-")
    if isinstance(value, Mapping):
        return ", ".join(f"{name}: {figure:.2f}" for name, figure in value.items())
    return f"{value:.4g}" if isinstance(value, float) else str(value)
