"""Figures of an evaluation as SVG text: white background, readable when printed in grey, text stays text.

Input are the plain values of result cards (`advmoe.evaluation.card`) and analyses (`advmoe.evaluation.analysis`).
"""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from advmoe.errors import ConfigError

COLOURS = ("#1b6ca8", "#d1495b", "#3f7d3f", "#c98a00", "#6a4c93", "#555555")
"""One per model; of different lightness, so that they differ in grey too."""
CLASSES = (
    ("router_survives_right", "1: router survives, right", "#1b6ca8", ""),
    ("router_fooled_right", "2: router fooled, right", "#8fc1e3", "//"),
    ("router_survives_wrong", "3: router survives, wrong", "#f0a6a0", ".."),
    ("router_fooled_wrong", "4: both fooled", "#a4343a", "xx"),
)
"""The four fates of an adversarial example (paper, Figs. 4 and 5), with colours and hatches."""

Card = Mapping[str, Any]
Analysis = Mapping[str, Any]


@contextmanager
def _axes(width: float, height: float) -> Iterator[tuple[Any, list[str]]]:
    """Axes to draw on; the list holds the finished SVG afterwards."""
    try:
        import matplotlib as mpl
        from matplotlib.figure import Figure
    except ImportError:
        raise ConfigError("figures need matplotlib; pip install 'advmoe[reports]'") from None
    style: Any = {
        "svg.fonttype": "none",
        "svg.hashsalt": "advmoe",
        "font.family": "sans-serif",
        "font.size": 9,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.titlesize": 10,
        "hatch.linewidth": 0.6,
        "legend.frameon": False,
    }
    finished: list[str] = []
    with mpl.rc_context(style):
        figure = Figure(figsize=(width, height), layout="constrained")
        yield figure.add_subplot(), finished
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    text = buffer.getvalue()
    finished.append(text[text.index("<svg") :])


def accuracies(cards: Sequence[Card]) -> str:
    """SA, RA under each attack that was run, of one or several models."""
    names = {
        "sa": "SA",
        "pgd": "RA, PGD",
        "ra_union": "RA, union of routing views",
        "ra_route": "RA, and route attack",
        "ra_aa": "RA, AutoAttack",
        "ra_worst": "RA, worst of all",
        "ra_experts": "RA-E, experts only",
        "ra_routers": "RA-R, routers only",
        "ra_every_pathway": "RA, on every pathway",
    }
    values = [dict(card["advmoe"], pgd=card["advmoe"][f"ra_pgd{card['advmoe']['attack']['steps']}"]) for card in cards]
    rows = [name for name in names if any(name in numbers for numbers in values)]
    thickness = 0.8 / len(cards)
    with _axes(6.4, 0.8 + 0.3 * len(rows) * max(1.0, 0.6 * len(cards))) as (axes, finished):
        for model, (card, numbers) in enumerate(zip(cards, values, strict=True)):
            places = [
                row + (model - (len(cards) - 1) / 2) * thickness for row, name in enumerate(rows) if name in numbers
            ]
            lengths = [numbers[name] for name in rows if name in numbers]
            bars = axes.barh(
                places, lengths, height=0.92 * thickness, color=COLOURS[model % len(COLOURS)], label=card["name"]
            )
            axes.bar_label(bars, fmt="%.1f", padding=2, fontsize=8)
        axes.set_yticks(range(len(rows)), [names[name] for name in rows])
        axes.invert_yaxis()
        axes.set_xlim(0, 100)
        axes.set_xlabel("per cent of the test images")
        if len(cards) > 1:
            axes.legend(loc="lower right", fontsize=8)
    return finished[0]


def radius_curve(cards: Sequence[Card]) -> str | None:
    """RA against eps (paper, Fig. 2); None if no model was evaluated at several radii."""
    curves = []
    for card in cards:
        numbers = card["advmoe"]
        points = {float(eps.split("/")[0]): ra for eps, ra in numbers.get("ra_by_eps", {}).items()}
        points |= {0.0: numbers["sa"], 255 * numbers["attack"]["eps"]: numbers[f"ra_pgd{numbers['attack']['steps']}"]}
        curves.append(sorted(points.items()))
    if all(len(curve) < 3 for curve in curves):
        return None
    with _axes(5.2, 3.2) as (axes, finished):
        for model, (card, curve) in enumerate(zip(cards, curves, strict=True)):
            axes.plot(*zip(*curve, strict=True), marker="o", color=COLOURS[model % len(COLOURS)], label=card["name"])
        axes.set_xlabel("eps (of 255)")
        axes.set_ylabel("RA under PGD, per cent")
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.3)
        if len(cards) > 1:
            axes.legend(fontsize=8)
    return finished[0]


def dissections(analyses: Mapping[str, Analysis]) -> str:
    """Stacked bars of the four fates, one bar for each attack of each model (paper, Figs. 4 and 5)."""
    bars = [
        (f"{model}, {name}" if len(analyses) > 1 else name, values["dissection"])
        for model, analysis in analyses.items()
        for name, values in analysis["conditions"].items()
        if values.get("dissection")
    ]
    with _axes(6.4, 1.5 + 0.42 * len(bars)) as (axes, finished):
        left = [0.0] * len(bars)
        for key, label, colour, hatch in CLASSES:
            lengths = [parts[key] for _, parts in bars]
            drawn = axes.barh(
                range(len(bars)),
                lengths,
                left=left,
                height=0.7,
                color=colour,
                hatch=hatch,
                edgecolor="white",
                label=label,
            )
            axes.bar_label(
                drawn,
                labels=[f"{length:.1f}" if length >= 6 else "" for length in lengths],
                label_type="center",
                fontsize=8,
                bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 1},
            )
            left = [start + length for start, length in zip(left, lengths, strict=True)]
        axes.set_yticks(range(len(bars)), [name for name, _ in bars])
        axes.invert_yaxis()
        axes.set_xlim(0, 100)
        axes.set_xlabel("per cent of the adversarial examples")
        axes.figure.legend(loc="outside lower center", ncols=2, fontsize=8)
    return finished[0]


def iou_histogram(histograms: Mapping[str, Mapping[str, Any]], title: str) -> str:
    """Counts over IoU from 0 to 1, a line per condition (paper, Fig. 6)."""
    with _axes(5.2, 2.8) as (axes, finished):
        for number, (name, values) in enumerate(histograms.items()):
            counts = values["counts"]
            total = max(sum(counts), 1)
            edges = [index / len(counts) for index in range(len(counts) + 1)]
            axes.stairs(
                [100 * count / total for count in counts],
                edges,
                color=COLOURS[number % len(COLOURS)],
                fill=number == 0,
                alpha=0.45 if number == 0 else 1.0,
                linewidth=1.6,
                linestyle=("-", "-", "--", ":")[number % 4],
                label=f"{name} (mean {values['mean']:.2f})",
            )
        axes.set_xlim(0, 1)
        axes.set_xlabel("IoU")
        axes.set_ylabel("per cent")
        axes.set_title(title, loc="left")
        axes.legend(fontsize=8)
    return finished[0]


def expert_load(load_LN: Sequence[Sequence[float]], title: str) -> str:
    """Share of the images that each expert of each MoE layer gets, stacked."""
    experts = len(load_LN[0])
    with _axes(5.2, 2.4) as (axes, finished):
        bottom = [0.0] * len(load_LN)
        for expert in range(experts):
            heights = [100 * shares[expert] for shares in load_LN]
            axes.bar(
                range(len(load_LN)),
                heights,
                bottom=bottom,
                color=COLOURS[expert % len(COLOURS)],
                alpha=1.0 if expert < len(COLOURS) else 0.6,
                edgecolor="white",
                linewidth=0.5,
                label=f"expert {expert}",
            )
            bottom = [start + height for start, height in zip(bottom, heights, strict=True)]
        axes.axhline(100 / experts, color="black", linewidth=0.6, linestyle=":")
        axes.set_ylim(0, 100)
        axes.set_xlabel("MoE layer")
        axes.set_ylabel("per cent of images")
        axes.set_title(title, loc="left")
        axes.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    return finished[0]


def changed_layers(analysis: Analysis) -> str:
    """Share of images whose expert the attack changes, layer by layer."""
    with _axes(5.2, 2.4) as (axes, finished):
        for number, (name, values) in enumerate(analysis["conditions"].items()):
            if values.get("dissection"):
                changed = values["dissection"]["changed_by_layer"]
                axes.plot(range(len(changed)), changed, marker="o", color=COLOURS[number % len(COLOURS)], label=name)
        axes.set_ylim(bottom=0)
        axes.set_xlabel("MoE layer")
        axes.set_ylabel("per cent of images\nwhose expert changes")
        axes.legend(fontsize=8)
    return finished[0]


def analysis_figures(analysis: Analysis) -> dict[str, str]:
    """All figures of one model's routing, by file name."""
    drawn = {
        "dissection": dissections({"": analysis}),
        "load": expert_load(analysis["conditions"]["clean"]["load"], "Expert load, clean images"),
        "changed_layers": changed_layers(analysis),
    }
    if "similarity" in analysis:
        similarity = analysis["similarity"]
        drawn["overlap"] = iou_histogram(similarity["overlap"], "Clean and attacked pathway of the same image")
        drawn["diversity"] = iou_histogram(similarity["diversity"], "Pathways of pairs of images")
    if "mask" in analysis:
        drawn["mask"] = iou_histogram(analysis["mask"], "Pathway and mask pathway of the Sparse-CNN")
    return drawn
