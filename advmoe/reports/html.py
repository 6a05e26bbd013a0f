"""One self-contained HTML file about one model, or comparing several: no script, no request, figures inline."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib.resources import files
from typing import Any

from advmoe.errors import ConfigError
from advmoe.evaluation.card import latencies, with_error
from advmoe.evaluation.paired import omissions, other_starts
from advmoe.evaluation.vocabulary import FOOLED, Figure, failed_readings, measured
from advmoe.reports import figures
from advmoe.reports.figures import Analysis, Card

CAPTIONS = {
    "load": "Share of the images that each expert gets, layer by layer; of the tokens, where these are routed.",
    "pathways": "Pathways through the layers. The height of a bar is the share of images that take the expert; a band "
    "shows which expert they take next.",
    "changed_layers": "Where an attack changes the expert.",
    "overlap": "How much of an image's pathway remains under attack.",
    "diversity": "How alike the pathways of different images are.",
    "mask": "How near pathways are to the mask of the Sparse-CNN.",
}
"""Explanations of the figures of one model's routing."""
NO_BREAK = "\N{NO-BREAK SPACE}"


def render(
    cards: Sequence[Card],
    analyses: Mapping[str, Analysis],
    *,
    logs: Mapping[str, Sequence[Mapping[str, Any]]] | None = None,
    examples: Mapping[str, Mapping[str, Any]] | None = None,
    left_out: Mapping[str, str] | None = None,
) -> str:
    """The report as one HTML text.

    Args:
        cards: Result cards, at least one, with different names.
        analyses: Name of a card -> analysis of its routing; absent for models without routing.
        logs: Name of a card -> the log of its training, epoch by epoch, if there is one.
        examples: Name of a card -> some of its images, clean and attacked, if there are any.
        left_out: Key of a figure that rests on unequal attacks -> the reason to leave it out
            (`advmoe.evaluation.paired.comparable`).

    Raises:
        ConfigError: jinja2 or matplotlib is not installed.
    """
    try:
        from jinja2 import Environment, StrictUndefined
        from markupsafe import Markup
    except ImportError:
        raise ConfigError("reports need jinja2; pip install 'advmoe[reports]'") from None
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True)
    template = environment.from_string(files("advmoe.reports").joinpath("report.html.j2").read_text(encoding="utf-8"))
    left_out = left_out or {}
    rows = [figure for figure in measured(card["advmoe"] for card in cards) if figure.key not in left_out]
    # matplotlib makes the SVG, and escapes the names in it.
    drawn = {
        "accuracies": figures.accuracies(cards, rows),
        "radius": figures.radius_curve(cards),
        "scale": figures.scale_curves(cards),
    }
    if analyses:
        drawn["dissections"] = figures.dissections(analyses)
    return template.render(
        title=cards[0]["name"] if len(cards) == 1 else f"{len(cards)} models compared",
        cards=cards,
        many=figures.MANY,
        rows=[
            *(_row(figure, cards) for figure in (*rows, *measured((card["advmoe"] for card in cards), [FOOLED]))),
            {
                "name": "verdict of the diagnostics",
                "verdict": True,
                "cells": [card["advmoe"]["verdict"] for card in cards],
            },
        ],
        left_out=omissions(left_out),
        chance=other_starts(cards),
        passed=_passed(cards),
        settings=_settings(cards),
        figures={name: None if svg is None else Markup(svg) for name, svg in drawn.items()},
        training=[(name, Markup(figures.training_curves(log))) for name, log in (logs or {}).items() if log],
        examples=[(name, Markup(figures.example_images(of))) for name, of in (examples or {}).items() if of],
        readings={card["name"]: list(failed_readings(card["advmoe"]["diagnostics"])) for card in cards},
        analyses=[_routing(name, analysis, Markup) for name, analysis in analyses.items()],
    )


def _row(figure: Figure, cards: Sequence[Card]) -> dict[str, Any]:
    def cell(numbers: Mapping[str, Any]) -> str:
        share = figure.of(numbers)
        if share is None:
            return "-"
        return with_error(share, numbers["images"], digits=1).replace(" ", NO_BREAK)

    label = figure.label(cards[0]["advmoe"])  # all models met the same PGD
    return {"name": label, "verdict": False, "cells": [cell(card["advmoe"]) for card in cards]}


def _passed(cards: Sequence[Card]) -> list[str]:
    """With many models, one line lists those that passed all checks. Few models are shown check by check."""
    if len(cards) <= figures.MANY:
        return []
    return [card["name"] for card in cards if card["advmoe"]["trusted"] and card["advmoe"]["diagnostics"]]


def _settings(cards: Sequence[Card]) -> list[dict[str, Any]]:
    """The facts that the numbers depend on."""

    def attack(numbers: Mapping[str, Any]) -> str:
        used = numbers["attack"]
        return (
            f"{used['steps']} steps of {255 * used['step_size']:.3g}/255, {used['restarts']} restart(s), "
            f"start {used['start']}"
        )

    described = {
        "images": lambda card: card["advmoe"]["images"],
        "PGD": lambda card: attack(card["advmoe"]),
        "route attack": lambda card: {True: "all pathways", False: "some pathways"}.get(
            card["advmoe"].get("routes_exact"), "-"
        ),
        "further starts of PGD": lambda card: card["advmoe"].get("further_starts", "-"),
        "seed": lambda card: card["advmoe"]["seed"],
        "architecture": lambda card: card["architecture"],
        "training": lambda card: f"{card['advmoe']['method'] or 'unknown'}, {card['advmoe']['epochs'] or '?'} epochs",
        "parameters": lambda card: f"{card['advmoe']['parameters']:,}",
        "GFLOPs per image": lambda card: card["advmoe"]["gflops"],
        "latency": lambda card: latencies(card["advmoe"]) or "-",
        "hardware": lambda card: card["advmoe"]["device"],
        "software": lambda card: ", ".join(f"{name} {number}" for name, number in card["advmoe"]["versions"].items()),
    }
    return [{"name": name, "verdict": False, "cells": [of(card) for card in cards]} for name, of in described.items()]


def _routing(name: str, analysis: Analysis, mark: Any) -> dict[str, Any]:
    """Values for the template about one model's routing. The dissection has its own figure."""
    conditions = [
        {
            "name": condition,
            "pathways": values["pathways"],
            "top": f"{values['frequent'][0]['pathway']} ({values['frequent'][0]['images']} images)",
            "entropy": f"{sum(values['entropy']) / max(len(values['entropy']), 1):.2f}",
        }
        for condition, values in analysis["conditions"].items()
    ]
    drawn = figures.analysis_figures(analysis)
    return {
        "name": name,
        "conditions": conditions,
        "figures": [(CAPTIONS[key], mark(svg)) for key, svg in drawn.items() if key != "dissection"],
    }
