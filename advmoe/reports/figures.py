"""Figures of an evaluation as SVG, with a white background, readable in gray print, and with real text.

Figures are narrow enough for a phone. Error bars are one standard error of a share of the images.

The inputs are plain values of result cards (`advmoe.evaluation.card`), analyses
(`advmoe.evaluation.analysis`), logs (`advmoe.reports.training`) and example images
(`advmoe.evaluation.examples`).

Shape suffixes: L MoE layers, N experts.
"""

from __future__ import annotations

import io
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from advmoe.errors import ConfigError
from advmoe.evaluation.card import standard_error
from advmoe.evaluation.vocabulary import FATES, Figure, pgd_key
from advmoe.reports.training import robust_accuracy

COLORS = ("#0072b2", "#e69f00", "#8c2d6b", "#56b4e9", "#d55e00", "#555555")
"""One per model. Neighbors differ in lightness, for gray print and for the color-blind (after Okabe & Ito)."""
MARKERS = ("o", "s", "^", "D", "v", "P")
MANY = len(COLORS)
"""With more models than this, a color for each would not help."""
WIDTH = 4.6
"""Inches."""
LONGEST_LINE = 32
"""Characters of a name in one line."""
FATE_STYLES = (("#1b6ca8", ""), ("#8fc1e3", "//"), ("#f0a6a0", ".."), ("#a4343a", "xx"))
"""Color and hatch of each of `FATES`."""

Card = Mapping[str, Any]
Analysis = Mapping[str, Any]


@contextmanager
def _axes(height: float) -> Iterator[tuple[Any, list[str]]]:
    """Axes to draw on; the list holds the finished SVG afterwards."""
    with _grid(height, 1, 1) as (grid, finished):
        yield grid[0][0], finished


@contextmanager
def _grid(height: float, rows: int, columns: int) -> Iterator[tuple[Any, list[str]]]:
    """Rows of axes to draw on; the list holds the finished SVG afterwards."""
    try:
        import matplotlib as mpl
        from matplotlib.figure import Figure
    except ImportError:
        raise ConfigError("figures need matplotlib; pip install 'advmoe[reports]'") from None
    style: Any = {
        "svg.fonttype": "none",
        "svg.hashsalt": "advmoe",
        "text.parse_math": False,  # a name may hold dollars
        "font.family": "sans-serif",
        "font.size": 9,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.titlesize": 9,
        "hatch.linewidth": 0.6,
        "legend.frameon": False,
    }
    finished: list[str] = []
    with mpl.rc_context(style):
        figure = Figure(figsize=(WIDTH, height), layout="constrained")
        yield figure.subplots(rows, columns, squeeze=False), finished
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    text = buffer.getvalue()
    finished.append(text[text.index("<svg") :])


def accuracies(cards: Sequence[Card], rows: Sequence[Figure]) -> str:
    """SA and RA as the rows say: bars for a few models, a line of marks for each of many."""
    values = [card["advmoe"] for card in cards]
    few = len(cards) <= MANY
    height = 0.3 * len(rows) * max(1.0, 0.6 * len(cards)) + 0.2 * len(cards) if few else 0.2 * (len(cards) + len(rows))
    with _axes(0.8 + height) as (axes, finished):
        if few:
            _bars(axes, cards, values, rows)
        else:
            _marks(axes, cards, values, rows)
        axes.invert_yaxis()
        axes.set_xlim(0, 100)
        axes.set_xlabel(f"per cent of {cards[0]['advmoe']['images']} test images")
        if len(cards) > 1:
            axes.figure.legend(loc="outside upper left", fontsize=8)
    return finished[0]


def _bars(axes: Any, cards: Sequence[Card], values: Sequence[Card], rows: Sequence[Figure]) -> None:
    """A row for each accuracy, in it a bar for each model."""
    thickness = 0.8 / len(cards)
    for model, (card, numbers) in enumerate(zip(cards, values, strict=True)):
        known = [(row, length) for row, of in enumerate(rows) if (length := of.of(numbers)) is not None]
        places = [row + (model - (len(cards) - 1) / 2) * thickness for row, _ in known]
        lengths = [length for _, length in known]
        bars = axes.barh(
            places,
            lengths,
            xerr=[standard_error(length, numbers["images"]) for length in lengths],
            error_kw={"elinewidth": 1.0, "ecolor": "#333333"},
            height=0.92 * thickness,
            color=COLORS[model % len(COLORS)],
            label=_labeled(card),
        )
        axes.bar_label(bars, fmt="%.1f", padding=3, fontsize=8)
    axes.set_yticks(range(len(rows)), [row.short for row in rows])


def _labeled(card: Card) -> str:
    """The name of a card for a legend, which leaves out what begins with an underscore."""
    name = _in_lines(card["name"])
    return f" {name}" if name.startswith("_") else name


def _in_lines(name: str) -> str:
    """A name, such as a long path, in lines that leave space for the axes beside it."""
    return "\n".join(textwrap.wrap(name, LONGEST_LINE)) or name


def _marks(axes: Any, cards: Sequence[Card], values: Sequence[Card], rows: Sequence[Figure]) -> None:
    """A row for each model, in it a mark for each accuracy."""
    for number, row in enumerate(rows):
        known = [(share, model) for model, numbers in enumerate(values) if (share := row.of(numbers)) is not None]
        axes.errorbar(
            *zip(*known, strict=True),
            xerr=[standard_error(accuracy, values[model]["images"]) for accuracy, model in known],
            linestyle="none",
            marker=MARKERS[number % len(MARKERS)],
            markersize=4.5,
            color=COLORS[number % len(COLORS)],
            label=row.short,
        )
    axes.set_yticks(range(len(cards)), [_in_lines(card["name"]) for card in cards], fontsize=7)
    axes.set_ylim(-0.7, len(cards) - 0.3)
    axes.grid(axis="y", alpha=0.3)


def scale_curves(cards: Sequence[Card]) -> str | None:
    """RA against the model scale r, a line for each method and number of experts (paper, Figs. 7 and 8).

    Dense has no r and is drawn as a horizontal line, at the mean if there are several. The result
    is None if no line has three points.
    """
    lines: dict[str, list[Card]] = {}
    for card in cards:
        model = card["advmoe"]["model"]
        experts = f", N = {model['num_experts']}" if model["kind"] == "moe" else ""
        label = f"{model['arch']}, {model['kind']}, {card['advmoe']['method'] or 'unknown training'}{experts}"
        lines.setdefault(label, []).append(card)
    curves = {label: sorted(own, key=scale_of) for label, own in lines.items()}
    if all(len({scale_of(card) for card in own}) < 3 for own in curves.values()):
        return None
    with _axes(3.0 + 0.2 * len(curves)) as (axes, finished):
        for number, (label, own) in enumerate(curves.items()):
            color = COLORS[number % len(COLORS)]
            ras = [pgd_accuracy(card) for card in own]
            if own[0]["advmoe"]["model"]["kind"] == "dense":
                several = f", mean of {len(own)}" if len(own) > 1 else ""
                axes.axhline(sum(ras) / len(ras), color=color, linestyle="--", label=label + several)
                continue
            axes.errorbar(
                [scale_of(card) for card in own],
                ras,
                yerr=[standard_error(ra, own[0]["advmoe"]["images"]) for ra in ras],
                marker=MARKERS[number % len(MARKERS)],
                markersize=5,
                capsize=2,
                color=color,
                linestyle=("-", ":")[number // len(COLORS) % 2],
                label=label,
            )
        axes.set_xlabel("model scale r")
        axes.set_ylabel(f"RA under PGD, per cent of {cards[0]['advmoe']['images']} images")
        axes.grid(alpha=0.3)
        axes.figure.legend(loc="outside upper left", fontsize=8)
    return finished[0]


def scale_of(card: Card) -> float:
    """r of a card's model."""
    scale: float = card["advmoe"]["model"]["model_scale"]
    return scale


def pgd_accuracy(card: Card) -> float:
    """RA under PGD in per cent."""
    accuracy: float = card["advmoe"][pgd_key(card["advmoe"])]
    return accuracy


def radius_curve(cards: Sequence[Card]) -> str | None:
    """RA against eps (paper, Fig. 2); None if no model was evaluated at several radii."""
    curves = []
    for card in cards:
        numbers = card["advmoe"]
        points = {float(eps.split("/")[0]): ra for eps, ra in numbers.get("ra_by_eps", {}).items()}
        points |= {0.0: numbers["sa"], 255 * numbers["attack"]["eps"]: pgd_accuracy(card)}
        curves.append(sorted(points.items()))
    if all(len(curve) < 3 for curve in curves):
        return None
    with _axes(3.0 + 0.2 * len(cards)) as (axes, finished):
        for model, (card, curve) in enumerate(zip(cards, curves, strict=True)):
            radii, ras = zip(*curve, strict=True)
            axes.errorbar(
                radii,
                ras,
                yerr=[standard_error(ra, card["advmoe"]["images"]) for ra in ras],
                marker=MARKERS[model % len(MARKERS)],
                markersize=5,
                capsize=2,
                color=COLORS[model % len(COLORS)],
                label=_labeled(card),
            )
        axes.set_xlabel("radius eps of the attack, in 1/255")
        axes.set_ylabel(f"RA under PGD, per cent of {cards[0]['advmoe']['images']} images")
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.3)
        if len(cards) > 1:
            axes.figure.legend(loc="outside upper left", fontsize=8)
    return finished[0]


def dissections(analyses: Mapping[str, Analysis]) -> str:
    """Stacked bars of the four fates, one bar for each attack of each model (paper, Figs. 4 and 5)."""
    bars = [
        (f"{model}, {name}" if len(analyses) > 1 else name, values["dissection"])
        for model, analysis in analyses.items()
        for name, values in analysis["conditions"].items()
        if values.get("dissection")
    ]
    with _axes(1.5 + 0.42 * len(bars)) as (axes, finished):
        left = [0.0] * len(bars)
        for (key, label), (color, hatch) in zip(FATES, FATE_STYLES, strict=True):
            lengths = [parts[key] for _, parts in bars]
            drawn = axes.barh(
                range(len(bars)),
                lengths,
                left=left,
                height=0.7,
                color=color,
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
        axes.set_yticks(range(len(bars)), [_in_lines(name) for name, _ in bars])
        axes.invert_yaxis()
        axes.set_xlim(0, 100)
        axes.set_xlabel(f"per cent of {next(iter(analyses.values()))['images']} attacked images")
        axes.figure.legend(loc="outside lower center", ncols=2, fontsize=8)
    return finished[0]


def iou_histogram(histograms: Mapping[str, Mapping[str, Any]], title: str, counted: str) -> str:
    """Shares of what is `counted` over IoU from 0 to 1, a line per condition (paper, Fig. 6)."""
    with _axes(2.8) as (axes, finished):
        for number, (name, values) in enumerate(histograms.items()):
            counts = values["counts"]
            total = max(sum(counts), 1)
            edges = [index / len(counts) for index in range(len(counts) + 1)]
            axes.stairs(
                [100 * count / total for count in counts],
                edges,
                color=COLORS[number % len(COLORS)],
                fill=number == 0,
                alpha=0.45 if number == 0 else 1.0,
                linewidth=1.6,
                linestyle=("-", "-", "--", ":")[number % 4],
                label=f"{name} (mean {values['mean']:.2f})",
            )
        axes.set_xlim(0, 1)
        axes.set_xlabel("IoU of the channels (1: the same pathway)")
        axes.set_ylabel(f"per cent of {counted}")
        axes.set_title(title, loc="left")
        axes.legend(fontsize=8)
    return finished[0]


def expert_load(load_LN: Sequence[Sequence[float]], title: str, counted: str = "images") -> str:
    """Share of the images, or of what else is `counted`, that each expert of each MoE layer gets, stacked."""
    experts = len(load_LN[0])
    with _axes(2.4) as (axes, finished):
        bottom = [0.0] * len(load_LN)
        for expert in range(experts):
            heights = [100 * shares[expert] for shares in load_LN]
            axes.bar(
                range(len(load_LN)),
                heights,
                bottom=bottom,
                color=COLORS[expert % len(COLORS)],
                alpha=1.0 if expert < len(COLORS) else 0.6,
                edgecolor="white",
                linewidth=0.5,
                label=f"expert {expert}",
            )
            bottom = [start + height for start, height in zip(bottom, heights, strict=True)]
        axes.axhline(100 / experts, color="black", linewidth=0.6, linestyle=":")
        axes.set_ylim(0, 100)
        axes.locator_params(axis="x", integer=True)
        axes.set_xlabel("MoE layer")
        axes.set_ylabel(f"per cent of {counted}")
        axes.set_title(title, loc="left")
        axes.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    return finished[0]


def pathways_flow(flow: Sequence[Sequence[Sequence[float]]], title: str) -> str:
    """Pathways as bands from layer to layer: the number of images that take an expert and, in the
    next layer, another one.
    """
    import numpy as np
    from matplotlib.patches import PathPatch
    from matplotlib.path import Path

    shares = np.array(flow)
    layers, experts, half = len(shares) + 1, shares.shape[1], 0.09
    load = np.concatenate([shares.sum(axis=2), shares[-1:].sum(axis=1)])
    gap = 0.04
    top = np.cumsum(load, axis=1) - load + gap * np.arange(experts)
    with _axes(2.6) as (axes, finished):
        for layer in range(layers):
            for expert in range(experts):
                color = COLORS[expert % len(COLORS)]
                axes.bar(layer, load[layer, expert], 2 * half, bottom=top[layer, expert], color=color, linewidth=0)
        for layer in range(layers - 1):
            leaving, arriving = top[layer].copy(), top[layer + 1].copy()
            for before in range(experts):
                for after in range(experts):
                    width = shares[layer, before, after]
                    if width == 0:
                        continue
                    left, right, middle = layer + half, layer + 1 - half, layer + 0.5
                    upper, lower = leaving[before], arriving[after]
                    points = [
                        *((left, upper), (middle, upper), (middle, lower), (right, lower)),
                        *((right, lower + width), (middle, lower + width), (middle, upper + width)),
                        *((left, upper + width), (left, upper)),
                    ]
                    codes = [Path.MOVETO, *[Path.CURVE4] * 3, Path.LINETO, *[Path.CURVE4] * 3, Path.CLOSEPOLY]
                    band = PathPatch(Path(points, codes), color=COLORS[before % len(COLORS)], alpha=0.35, linewidth=0)
                    axes.add_patch(band)
                    leaving[before] += width
                    arriving[after] += width
        for expert in range(experts):
            axes.text(
                -0.2, top[0, expert] + load[0, expert] / 2, f"expert {expert}", ha="right", va="center", fontsize=8
            )
        axes.set_xlim(-0.3, layers - 0.7)
        axes.set_ylim(1 + gap * (experts - 1) + 0.01, -0.01)
        axes.set_xticks(range(layers))
        axes.set_yticks([])
        axes.spines["left"].set_visible(False)
        axes.set_xlabel("MoE layer")
        axes.set_title(title, loc="left")
    return finished[0]


def training_curves(log: Sequence[Mapping[str, Any]]) -> str:
    """Loss, validation accuracies and evenness of the experts' load, epoch by epoch."""
    epochs = [record["epoch"] for record in log]
    routed = [record for record in log if record.get("router_entropy")]
    with _grid(5.4 if routed else 3.8, 3 if routed else 2, 1) as (grid, finished):
        loss, accuracy = grid[0][0], grid[1][0]
        loss.plot(epochs, [record["train_loss"] for record in log], color=COLORS[0], marker=MARKERS[0], markersize=3)
        loss.set_ylabel("training loss")
        curves = (("SA", [record["val_sa"] for record in log]), ("RA", [robust_accuracy(record) for record in log]))
        for number, (label, values) in enumerate(curves):
            accuracy.plot(epochs, values, color=COLORS[number], marker=MARKERS[number], markersize=3, label=label)
        accuracy.set_ylabel("validation, per cent")
        accuracy.set_ylim(bottom=0)
        accuracy.legend(fontsize=8)
        if routed:
            evenness, own = grid[2][0], [record["epoch"] for record in routed]
            ranges = [record["router_entropy"] for record in routed]
            evenness.fill_between(own, list(map(min, ranges)), list(map(max, ranges)), color=COLORS[3], alpha=0.4)
            means = [sum(values) / len(values) for values in ranges]
            evenness.plot(own, means, color=COLORS[0], marker=MARKERS[0], markersize=3)
            evenness.set_ylim(0, 1.03)
            evenness.set_ylabel("load entropy")
            evenness.set_title("mean over layers, and the range between them", loc="left", fontsize=8)
        for (axes,) in grid:
            axes.xaxis.get_major_locator().set_params(integer=True)
        grid[-1][0].set_xlabel("epoch")
    return finished[0]


def example_images(examples: Mapping[str, Any]) -> str:
    """Clean images, their attacked versions, and the difference amplified, in columns."""
    import numpy as np

    number = len(examples["clean"])
    names = [str(name) for name in examples["class_names"]]
    radius = max(float(np.abs(examples["difference"]).max()), 1e-9)
    amplified = (127.5 + 127.5 * examples["difference"] / radius).round().clip(0, 255).astype(np.uint8)
    rows = (
        ("clean", examples["clean"]),
        ("attacked", examples["attacked"]),
        (f"{127.5 / radius:.0f} x diff.", amplified),
    )
    with _grid(2.8, 3, number) as (grid, finished):
        for row, (label, images) in enumerate(rows):
            for column, image in enumerate(images):
                axes = grid[row][column]
                axes.imshow(image, interpolation="nearest")
                axes.set_xticks([])
                axes.set_yticks([])
                for spine in axes.spines.values():
                    spine.set_visible(False)
            grid[row][0].set_ylabel(label, fontsize=8)
        for column in range(number):
            before, after = names[int(examples["before"][column])], names[int(examples["after"][column])]
            grid[0][column].set_title(_short(before), fontsize=7)
            grid[1][column].set_title(_short(after), fontsize=7, color="#a4343a" if before != after else "black")
    return finished[0]


def _short(name: str) -> str:
    """A class name that fits above a small image."""
    return name if len(name) <= 10 else f"{name[:9]}\N{HORIZONTAL ELLIPSIS}"


def changed_layers(analysis: Analysis) -> str:
    """Share of images, or of their tokens, whose expert the attack changes, layer by layer."""
    counted = _routed(analysis)
    with _axes(2.4) as (axes, finished):
        for number, (name, values) in enumerate(analysis["conditions"].items()):
            if values.get("dissection"):
                changed = values["dissection"]["changed_by_layer"]
                axes.plot(
                    range(len(changed)),
                    changed,
                    marker=MARKERS[number % len(MARKERS)],
                    markersize=4,
                    color=COLORS[number % len(COLORS)],
                    label=name,
                )
        axes.set_ylim(bottom=0)
        axes.locator_params(axis="x", integer=True)
        axes.set_xlabel("MoE layer")
        axes.set_title(f"{counted.capitalize()} whose expert changes under attack", loc="left")
        of = f"{analysis['images']} images"
        axes.set_ylabel(f"per cent of {of}" if counted == "images" else f"per cent of the {counted} of {of}")
        axes.legend(fontsize=8)
    return finished[0]


def _routed(analysis: Analysis) -> str:
    """What the experts of a layer are chosen for."""
    return "images" if analysis.get("decisions_per_layer", 1) == 1 else "tokens"


def analysis_figures(analysis: Analysis) -> dict[str, str]:
    """All figures of one model's routing, by file name."""
    images = f"{analysis['images']} images"
    drawn = {
        "dissection": dissections({"": analysis}),
        "load": expert_load(
            analysis["conditions"]["clean"]["load"], f"Expert load, {images}, clean", _routed(analysis)
        ),
    }
    if analysis["conditions"]["clean"].get("flow"):
        drawn["pathways"] = pathways_flow(analysis["conditions"]["clean"]["flow"], f"Pathways, {images}, clean")
    drawn["changed_layers"] = changed_layers(analysis)
    if "similarity" in analysis:
        similarity = analysis["similarity"]
        drawn["overlap"] = iou_histogram(similarity["overlap"], "Clean and attacked pathway of the same image", images)
        if "diversity" in similarity:
            drawn["diversity"] = iou_histogram(
                similarity["diversity"], "Pathways of pairs of images", "pairs of images"
            )
    if "mask" in analysis:
        drawn["mask"] = iou_histogram(analysis["mask"], "Pathway and mask pathway of the Sparse-CNN", images)
    return drawn
