"""The paper's tables and figures as experiments: their runs, the size of the runs, and the results they show."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Literal, get_args

from advmoe.config import check
from advmoe.evaluation.vocabulary import FATES, RA, RA_AA, SA
from advmoe.recipes import Recipe, recipes, shown_in
from advmoe.schema import closest

Scale = Literal["smoke", "small", "paper"]
SCALES: tuple[Scale, ...] = get_args(Scale)
ROUTING = "routing"
"""Key of the analysis of the route log in a run's result."""
UNDER_PGD = f"{ROUTING}.conditions.pgd.dissection"
RADII = ",".join(f"{level}/255" for level in (2, 4, 6, 8, 10, 12))


@dataclass(frozen=True, kw_only=True)
class Size:
    """Size of the runs of an experiment, as options of `advmoe train` and `advmoe evaluate`."""

    train: str = ""
    evaluate: str = ""
    made_smaller: str = ""
    """Differences from the paper, in words."""
    dataset: str | None = None
    """Used in place of every recipe's data set."""
    only: Mapping[str, str] = field(default_factory=dict)
    """Experiment -> its runs, for experiments that use only some of them."""


CIFAR10_RESNET18 = "*cifar10-resnet18*"
SIZES: Mapping[Scale, Size] = {
    "smoke": Size(
        train="--width 0.0625 --epochs 1 --limit-train 64 --batch-size 16 --val-limit 16",
        evaluate="--limit-eval 16 --steps 2 --diagnose 16 --no-latency --batch-size 16",
        made_smaller="digits instead of the data set, 64 training and 16 test images, 1/16 of the width, one epoch, "
        "PGD-2 in the evaluation: it shows that the commands work, and nothing else",
        dataset="digits",
        only={"table1": CIFAR10_RESNET18, "table2": CIFAR10_RESNET18, "fig7": "fig7-n2-r0.[258],*-at-dense"},
    ),
    # the setting of docs/study.md: Dense is better than S-Dense there, so experts have something to gain
    "small": Size(
        train="--width 0.125 --epochs 16",
        evaluate="--limit-eval 2000 --steps 20",
        made_smaller="2,000 test images, an eighth of the width, 16 epochs, PGD-20",
        only={
            "table1": CIFAR10_RESNET18,
            "table2": CIFAR10_RESNET18,
            "fig7": "fig7-n[24]-r0.[258],*-at-dense",
            "fig8": "fig8-resnet18*",
        },
    ),
    "paper": Size(),
}


@dataclass(frozen=True, kw_only=True)
class Experiment:
    """A table or figure: the options of its evaluation beyond SA and RA, and the results that it shows."""

    title: str
    evaluate: str = ""
    """Further options of `advmoe evaluate`."""
    columns: Mapping[str, str]
    """Title of a column -> place of its value in a run's result, as keys joined by dots."""
    mask: bool = False
    """Compare pathways with the mask pathway of the Sparse-CNN among the runs."""
    also: tuple[str, ...] = ()
    """Other experiments whose runs are shown beside its own."""
    curves: bool = False
    """Show the accuracies epoch by epoch."""

    @property
    def routing(self) -> bool:
        """Whether it shows results on the routing, which need an analysis of the route logs."""
        return any(path.startswith(f"{ROUTING}.") for path in self.columns.values())


ACCURACIES = {SA.short: SA.key, RA.short: RA.key}
COST = {"GFLOPs": "gflops"}
DISSECTION = {fate.label.partition(":")[0]: f"{UNDER_PGD}.{fate.key}" for fate in FATES}
IOU = {
    "mask, clean": f"{ROUTING}.mask.clean.mean",
    "mask, PGD": f"{ROUTING}.mask.pgd.mean",
    "clean-PGD": f"{ROUTING}.similarity.overlap.pgd.mean",
    "pairs": f"{ROUTING}.similarity.diversity.clean.mean",
}
FAIR = "--routing"
"""A table attacks the routing of every routed model, and gives another as many further starts of PGD."""

EXPERIMENTS: Mapping[str, Experiment] = {
    "table1": Experiment(title="Table 1", evaluate=FAIR, columns=ACCURACIES | COST),
    "table2": Experiment(
        title="Table 2", evaluate=f"{FAIR} --autoattack", columns=ACCURACIES | {"RA-AA": RA_AA.key} | COST
    ),
    "table3": Experiment(title="Table 3", evaluate=FAIR, columns=ACCURACIES | COST),
    "fig2": Experiment(
        title="Fig. 2",
        evaluate=f"--eps-sweep {RADII}",
        columns={"SA": SA.key} | {eps.removesuffix("/255"): f"ra_by_eps.{eps}" for eps in RADII.split(",")},
    ),
    "fig3": Experiment(title="Fig. 3", evaluate=FAIR, columns=ACCURACIES | COST),
    "fig4": Experiment(title="Fig. 4", columns=DISSECTION),
    "fig5": Experiment(title="Figs. 4 and 5", columns=DISSECTION, also=("fig4",)),
    "fig6": Experiment(title="Fig. 6", columns=IOU, mask=True),
    "fig7": Experiment(title="Fig. 7", evaluate=FAIR, columns=ACCURACIES | COST),
    "fig8": Experiment(title="Fig. 8", evaluate=FAIR, columns=ACCURACIES | COST),
    "appc": Experiment(title="App. C", columns=ACCURACIES, curves=True),
}


def selected(name: str, scale: Scale, only: Sequence[str]) -> list[Recipe]:
    """The runs of an experiment.

    Args:
        name: Name of the experiment.
        scale: Size of the runs; it may also leave runs out.
        only: Patterns of recipe names as in a shell, or parts of them; all runs of the scale if
            empty.

    Raises:
        ConfigError: A pattern fits no run.
    """
    shown = {name, *EXPERIMENTS[name].also}
    known = [recipe for recipe in recipes().values() if shown & set(shown_in(recipe))]
    patterns = only or SIZES[scale].only.get(name, "*").split(",")
    for pattern in patterns:
        check(
            any(_fits(recipe, pattern) for recipe in known),
            f"no run of {name} has a name like '{pattern}'; 'advmoe recipes {name}' lists them"
            f"{closest(pattern, [recipe.name for recipe in known])}",
            "only",
        )
    return [recipe for recipe in known if any(_fits(recipe, pattern) for pattern in patterns)]


def _fits(recipe: Recipe, pattern: str) -> bool:
    part = not set("*?[") & set(pattern) and pattern not in recipes()
    return fnmatchcase(recipe.name, f"*{pattern}*" if part else pattern)


def independent(chosen: Iterable[Recipe]) -> list[list[Recipe]]:
    """The runs in independent groups. Runs that start from the same run are in one group."""
    known = recipes()
    groups: dict[str, list[Recipe]] = {}
    for recipe in chosen:
        first = recipe
        while first.starts_from is not None:
            first = known[first.starts_from]
        groups.setdefault(first.name, []).append(recipe)
    return list(groups.values())
