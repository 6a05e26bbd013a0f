"""Make the tables and figures of the study from the files `results/small/NETWORK/*.json`.

    python studies/tables.py

The script replaces the tables of each network in docs/study.md, between the two markers of the
network. It writes the figures `study-NETWORK.svg` (training loss) and `study-NETWORK-accuracy.svg`
(SA and RA) beside the page.
"""

from __future__ import annotations

import argparse
import base64
import json
import re
import statistics
import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from matplotlib.axes import Axes

TIME = ", AdvMoE's time"
TITLES = {
    "s_dense": "AT (S-Dense)",
    "s_dense_time": f"AT (S-Dense){TIME}",
    "dense": "AT (Dense)",
    "dense_long": "AT (Dense), 16 epochs",
    "sparse": "AT (Sparse)",
    "at_moe": "AT (MoE), gate advantage",
    "at_moe_long": "AT (MoE), gate advantage, 16 epochs",
    "at_moe_time": f"AT (MoE), gate advantage{TIME}",
    "advmoe": "AdvMoE, gate advantage",
    "advmoe_batch": "AdvMoE, gate dense, batch statistics",
    "advmoe_dense": "AdvMoE, gate dense",
    "advmoe_cheap": "AdvMoE, reused images",
    "advmoe_cheap_time": f"AdvMoE, reused images{TIME}",
    "at_image": "AT (MoE), a router per image",
    "image_mixture": "AT (MoE), a router per image, attack on the mixture",
    "shared": "AT (MoE), shared filters",
    "margin": "AdvMoE, attack on margins",
    "mixture": "AdvMoE, attack on the mixture",
    "last_stage": "AdvMoE, last stage",
    "upcycled": "AdvMoE from S-Dense",
    "mask_of_dense": "a mask of AT (Dense)",
    "at_moe_of_dense": "AT (MoE) from AT (Dense)",
    "advmoe_of_dense": "AdvMoE from AT (Dense)",
    "s_dense_bf16": "AT (S-Dense), attack in bf16",
    "at_moe_bf16": "AT (MoE), attack in bf16",
}
"""Settings in the order of the table."""
LONG = ("dense_long", "at_moe_long")
"""Settings with as many epochs as `s_dense_time`, with which they are compared."""
EQUAL_TIME = ("advmoe_dense", "advmoe_cheap_time", "at_moe_time", "s_dense_time")
"""Settings with the training time of the first one."""
ENOUGH_SEEDS = 3
"""Two differences say next to nothing about their spread."""


def load(folder: Path) -> dict[str, list[dict[str, Any]]]:
    """Finished cells by setting, in the order of the table and of their seeds."""
    cells = sorted((json.loads(path.read_text()) for path in folder.glob("*-*.json")), key=lambda cell: cell["seed"])
    return {name: own for name in TITLES if (own := [cell for cell in cells if cell["setting"] == name])}


def bits(cell: dict[str, Any], condition: str) -> np.ndarray:
    """Whether each image was classified correctly, 0 or 1, int [images]."""
    return unpacked(cell["test"]["correct"][condition], cell["test"]["images"])


def unpacked(text: str, images: int) -> np.ndarray:
    """The first `images` bits of base64, int [images]."""
    return np.unpackbits(np.frombuffer(base64.b64decode(text), np.uint8))[:images].astype(np.int64)


def control(cell: dict[str, Any], name: str) -> str:
    """SA and RA of a control.

    Several draws are shown by their mean, least and largest value; one by its value and, unless it
    is `unchanged` itself, the standard error of the paired difference from `unchanged`. A dash
    means that the control does not exist for the network.
    """
    controls, images = cell["test"]["controls"], cell["test"]["routing"]["images"]
    draws = controls.get(name, [])
    if not draws:
        return "-"
    shown = []
    for key, condition in (("sa", "clean"), ("ra_pgd", "pgd")):
        values = [draw[key] for draw in draws]
        spread = ""
        if len(values) > 1:
            spread = f" ({min(values):.1f} to {max(values):.1f})"
        elif name != "unchanged":
            ours, theirs = (found["correct"][condition] for found in (draws[0], controls["unchanged"][0]))
            difference = unpacked(ours, images) - unpacked(theirs, images)
            spread = f" ± {100 * difference.std() / images**0.5:.1f}"
        shown.append(f"{statistics.mean(values):.1f}{spread}")
    return " / ".join(shown)


def against(cells: Sequence[dict[str, Any]], reference: Sequence[dict[str, Any]], condition: str) -> str:
    """Mean difference in points over the seeds that both have, with its standard error over test
    images and, after a semicolon, over seeds if there are enough.
    """
    of_seed = {cell["seed"]: cell for cell in reference}
    pairs = [(cell, of_seed[cell["seed"]]) for cell in cells if cell["seed"] in of_seed]
    if not pairs:
        return "-"
    of_pairs = 100 * np.array([bits(cell, condition) - bits(other, condition) for cell, other in pairs])
    difference = of_pairs.mean(axis=0)
    text = f"{difference.mean():+.1f} ± {difference.std() / len(difference) ** 0.5:.1f}"
    if len(pairs) < ENOUGH_SEEDS:
        return text
    return f"{text}; ± {statistics.stdev(of_pairs.mean(axis=1)) / len(pairs) ** 0.5:.1f}"


def mean(values: Sequence[float]) -> str:
    """Mean, with the standard deviation over seeds if there are several."""
    spread = f" (± {statistics.stdev(values):.1f})" if len(values) > 1 else ""
    return f"{statistics.mean(values):.1f}{spread}"


def tables(cells: dict[str, list[dict[str, Any]]]) -> str:
    """The page's tables in Markdown. Long trainings are compared with S-Dense after as many epochs."""
    reference = cells.get("s_dense", [])
    short = {name: own for name, own in cells.items() if name not in (*LONG, *EQUAL_TIME[1:])}
    long = {name: own for name, own in cells.items() if name in LONG}
    routed = [(name, cell) for name, own in cells.items() for cell in own if "routing" in cell["test"]]
    lines = training_table(short, reference) + equal_time_table(cells)
    longest = cells.get("s_dense_time", [])
    if long:
        lines += ["", *training_table({"s_dense_time": longest, **long} if longest else long, longest)]
    return "\n".join(lines + attack_table(routed, reference, longest) + control_table(routed))


def training_table(cells: dict[str, list[dict[str, Any]]], reference: Sequence[dict[str, Any]]) -> list[str]:
    """The table of settings with their cost, SA and RA, and the differences from S-Dense."""
    lines = [
        "| training | seeds | epochs; minutes | parameters | MMAC | training loss | SA | RA | SA against S-Dense | "
        "RA against S-Dense |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for name, own in cells.items():
        loss = statistics.mean(cell["curve"][-1]["train_loss"] for cell in own)
        same = own is reference
        epochs = sorted({len(cell["curve"]) for cell in own})
        taken = [cell["train_cpu_seconds"] / 60 for cell in own if cell.get("train_cpu_seconds")]
        cost = f"{', '.join(map(str, epochs))}; {f'{statistics.mean(taken):.0f}' if taken else '-'}"
        lines.append(
            f"| {TITLES[name]} | {', '.join(str(cell['seed']) for cell in own)} | {cost} | "
            f"{own[0]['parameters']:,} | "
            f"{1000 * own[0]['gflops']:.2f} | {loss:.3f} | {mean([cell['test']['sa'] for cell in own])} | "
            f"{mean([cell['test']['ra_pgd'] for cell in own])} | "
            f"{'-' if same else against(own, reference, 'clean')} | {'-' if same else against(own, reference, 'pgd')} |"
        )
    return lines


def equal_time_table(cells: dict[str, list[dict[str, Any]]]) -> list[str]:
    """The table of settings with the training time of AdvMoE, compared with each other."""
    timed = {name: cells[name] for name in EQUAL_TIME if name in cells}
    if timed.keys() <= {EQUAL_TIME[0]}:
        return []
    lines = [
        "",
        "| AdvMoE's training time | seeds | epochs | SA | RA | SA against AdvMoE | RA against AdvMoE | "
        "RA against AT (MoE) | RA against AT (S-Dense) |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for name, own in timed.items():
        compared = [
            "-" if name == other else against(own, timed.get(other, []), condition)
            for other, condition in (
                ("advmoe_dense", "clean"),
                ("advmoe_dense", "pgd"),
                ("at_moe_time", "pgd"),
                ("s_dense_time", "pgd"),
            )
        ]
        lines.append(
            f"| {TITLES[name].removesuffix(TIME)} | {', '.join(str(cell['seed']) for cell in own)} | "
            f"{len(own[0]['curve'])} | {mean([cell['test']['sa'] for cell in own])} | "
            f"{mean([cell['test']['ra_pgd'] for cell in own])} | {' | '.join(compared)} |"
        )
    return lines


def pgd(cell: dict[str, Any], images: int) -> str:
    """RA on the first images, under PGD and under ten starts of it; a dash where a cell has one start only."""
    starts = cell["test"].get("starts")
    several = f"{starts['ra']:.1f}" if starts else "-"
    return f"{100 * bits(cell, 'pgd')[:images].mean():.1f}; {several}"


def attack_table(
    routed: Sequence[tuple[str, dict[str, Any]]],
    reference: Sequence[dict[str, Any]],
    longest: Sequence[dict[str, Any]],
) -> list[str]:
    """The table of attacks on the routing, beside S-Dense under PGD and under as many starts of PGD.

    Trainings of more epochs than the others stand beside the S-Dense that was trained longest.
    """
    if not routed:
        return []
    lines = [
        "",
        "| training | seed | SA | RA, PGD; ten starts | RA, union of views | RA, with route attack | "
        "S-Dense: RA, PGD; ten starts | decisions; images changed by PGD | by the attack on routers |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for name, cell in routed:
        routing = cell["test"]["routing"]
        images = routing["images"]
        others = longest if name in LONG or name.endswith("_time") else reference
        of_s_dense = next((pgd(other, images) for other in others if other["seed"] == cell["seed"]), "-")
        aimed = "-"
        if "images_flipped_by_aim" in routing:
            aimed = f"{routing['decisions_flipped_by_aim']:.1f}; {routing['images_flipped_by_aim']:.1f}"
        lines.append(
            f"| {TITLES[name]} | {cell['seed']} | {100 * bits(cell, 'clean')[:images].mean():.1f} | "
            f"{pgd(cell, images)} | {routing['ra_views']:.1f} | {routing['ra_worst']:.1f} | {of_s_dense} | "
            f"{routing['decisions_flipped']:.1f}; {routing['images_flipped']:.1f} | {aimed} |"
        )
    return lines


def control_table(routed: Sequence[tuple[str, dict[str, Any]]]) -> list[str]:
    """The table of controls. Older cells have controls without statistics of their own, which are left out."""
    own = [(name, cell) for name, cell in routed if "unchanged" in cell["test"]["controls"]]
    if not own:
        return []
    lines = [
        "",
        "| training | seed | unchanged | random routers (equal decisions) | averaged experts | inverted routing |",
        "|---|---|---|---|---|---|",
    ]
    for name, cell in own:
        equal = statistics.mean(draw["same_decisions"] for draw in cell["test"]["controls"]["random"])
        lines.append(
            f"| {TITLES[name]} | {cell['seed']} | {control(cell, 'unchanged')} | {control(cell, 'random')} "
            f"({equal:.0f} %) | {control(cell, 'averaged')} | {control(cell, 'inverted')} |"
        )
    return lines


def draw_loss(cells: dict[str, list[dict[str, Any]]], axes: Axes) -> None:
    """Training loss by epoch, one line per cell."""
    from matplotlib.ticker import MaxNLocator

    for number, (name, own) in enumerate(cells.items()):
        for cell in own:
            epochs = [epoch["epoch"] for epoch in cell["curve"]]
            losses = [epoch["train_loss"] for epoch in cell["curve"]]
            label = TITLES[name] if cell is own[0] else None
            axes.plot(epochs, losses, marker="o", markersize=3, linewidth=1, color=f"C{number}", label=label)
    axes.set_xlabel("epoch")
    axes.set_ylabel("TRADES loss in training")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.legend(fontsize=7, frameon=False)


def draw_accuracy(cells: dict[str, list[dict[str, Any]]], axes: Axes) -> None:
    """SA and RA, one point per cell, with the standard error over test images, and RA under attacks
    on the routing; one row per training.
    """
    names = [
        f"{textwrap.fill(TITLES[name], 34)}\n"
        f"{len(own[0]['curve'])} epochs, {1000 * own[0]['gflops']:.2f} million multiply-adds"
        for name, own in cells.items()
    ]
    for key, label, color in (("sa", "SA: clean images", "C0"), ("ra_pgd", "RA: PGD-20, 8/255", "C3")):
        points = [(cell["test"], row) for row, own in enumerate(cells.values()) for cell in own]
        values = [test[key] for test, _ in points]
        errors = [(test[key] * (100 - test[key]) / test["images"]) ** 0.5 for test, _ in points]
        axes.errorbar(values, [row for _, row in points], xerr=errors, fmt="o", markersize=4, color=color, label=label)
    worst = [
        (cell["test"]["routing"]["ra_worst"], row)
        for row, own in enumerate(cells.values())
        for cell in own
        if "routing" in cell["test"]
    ]
    if worst:
        images = next(
            cell["test"]["routing"]["images"] for own in cells.values() for cell in own if "routing" in cell["test"]
        )
        label = f"RA, the routing attacked too\n(first {images:,} images)"
        left, height = zip(*worst, strict=True)
        axes.scatter(left, height, marker="x", s=25, linewidth=1.2, color="black", label=label, zorder=3)
    axes.set_yticks(range(len(names)), names, fontsize=7)
    axes.set_ylim(len(names) - 0.5, -0.5)
    axes.set_xlim(left=0)
    axes.set_xlabel("per cent of test images")
    axes.grid(axis="x", linewidth=0.3)
    axes.legend(fontsize=7, frameon=False, ncols=3, loc="lower right", bbox_to_anchor=(1.0, 1.0))


def save(cells: dict[str, list[dict[str, Any]]], draw: Callable[..., None], path: Path, *, height: float = 3.0) -> None:
    """One figure as an SVG whose bytes depend on the results only; `height` in inches."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams |= {"svg.hashsalt": "study", "svg.fonttype": "none"}
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(5, height))
    draw(cells, axes)
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)


def main() -> None:
    root = Path(__file__).parent.parent
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--results", type=Path, default=root / "results" / "small")
    parser.add_argument("--page", type=Path, default=root / "docs" / "study.md")
    options = parser.parse_args()
    text = options.page.read_text()
    for network in re.findall("<!-- (.+): begin -->", text):
        begin, end = f"<!-- {network}: begin -->", f"<!-- {network}: end -->"
        cells = load(options.results / network)
        before, _, rest = text.partition(begin)
        text = f"{before}{begin}\n{tables(cells)}\n{end}{rest.partition(end)[2]}"
        save(cells, draw_loss, options.page.parent / f"study-{network}.svg")
        save(cells, draw_accuracy, options.page.parent / f"study-{network}-accuracy.svg", height=1 + 0.42 * len(cells))
    options.page.write_text(text)


if __name__ == "__main__":
    main()
