"""The result of an evaluation as one JSON object: RobustBench's vocabulary, and under `advmoe` what it lacks."""

from __future__ import annotations

import json
import math
import platform
from collections.abc import Mapping
from fractions import Fraction
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import torch

from advmoe.attacks.autoattack import STANDARD
from advmoe.config import ModelConfig, to_dict
from advmoe.errors import DataError
from advmoe.evaluation.cost import Cost
from advmoe.evaluation.diagnostics import trusted
from advmoe.evaluation.results import SuiteResult
from advmoe.files import write_text_atomically

PAPER = "https://arxiv.org/abs/2308.10110"
AUTOATTACK = f"autoattack/{STANDARD[-1]}"
"""Column of what is left after all of AutoAttack."""


def percent(share: float) -> float:
    """Per cent with two digits."""
    return round(100 * share, 2)


def standard_error(per_cent: float, images: int) -> float:
    """Of a share of so many independent images, in points; both in per cent."""
    share = per_cent / 100
    return 100 * math.sqrt(share * (1 - share) / images)


def pixels(eps: float) -> str:
    """A radius the way the field writes it: 8/255."""
    levels = Fraction(eps * 255).limit_denominator(100)
    return f"{levels}/255" if levels.denominator == 1 else f"{float(levels):g}/255"


def figures(result: SuiteResult) -> dict[str, Any]:
    """All figures in per cent; those of attacks that were not run are absent."""
    attacks = result.attacks
    ran: dict[str, Any] = {"sa": percent(result.sa)}
    ran[f"ra_pgd{result.config.attack.steps}"] = percent(result.ra("pgd"))
    if views := [name for name in attacks if name.startswith("view/")]:
        ran["ra_views"] = {"detached": percent(result.ra("pgd"))} | {
            name.removeprefix("view/"): percent(result.ra(name)) for name in views
        }
        ran["ra_union"] = percent(result.ra_union)
        ran["ra_route"] = percent(result.ra("route"))
        ran["routes_exact"] = result.exact_routes
        ran["ra_experts"] = percent(result.ra("experts"))
        ran["ra_routers"] = percent(result.ra("routers"))
        ran["every_pathway"] = percent(result.ra("every_pathway/clean"))
        ran["ra_every_pathway"] = percent(result.ra("every_pathway"))
        radius = result.arrays["flip_radius"]
        ran["routers_flipped_within"] = {
            pixels(eps): percent(float((radius <= eps).mean()))
            for eps in np.unique(radius[np.isfinite(radius)]).tolist()
        }
    if AUTOATTACK in attacks:
        ran["ra_aa"] = percent(result.ra(AUTOATTACK))
        ran["ra_aa_after"] = {attack: percent(result.ra(f"autoattack/{attack}")) for attack in STANDARD}
    ran["ra_worst"] = percent(result.ra("worst"))
    sweep = {name.removeprefix("eps/"): percent(result.ra(name)) for name in attacks if name.startswith("eps/")}
    if sweep:
        ran["ra_by_eps"] = {pixels(float(eps)): ra for eps, ra in sweep.items()}
    if result.arrays["pathway/clean"].shape[1]:
        changed = (result.arrays["pathway/clean"] != result.arrays["pathway/pgd"]).any(axis=1)
        ran["routers_fooled"] = percent(float(changed.mean()))
        ran["pathways"] = result.pathways_used
    ran["standard_error"] = round(standard_error(100 * result.ra("worst"), result.images), 2)
    return ran


def make_card(
    result: SuiteResult,
    *,
    name: str,
    dataset: str,
    model: ModelConfig,
    train: dict[str, Any],
    cost: Cost,
    device: str,
    latency: Mapping[int, float] | None = None,
) -> dict[str, Any]:
    """The card of an evaluated checkpoint.

    Args:
        result: its evaluation.
        name: what to call it.
        dataset: whose test images were used.
        model: what it is.
        train: how it was trained, as in the checkpoint.
        cost: what it costs.
        device: hardware the evaluation ran on.
        latency: milliseconds per image by batch size on that hardware, if measured.
    """
    numbers = figures(result)
    kind = {"moe": "MoE", "s_dense": "S-Dense", "sparse_cnn": "Sparse-CNN", "dense": "Dense"}[model.kind]
    card: dict[str, Any] = {
        "link": PAPER if model.kind == "moe" else "",
        "name": name,
        "authors": "",
        "additional_data": False,
        "number_forward_passes": 1,
        "dataset": dataset,
        "venue": "Unpublished",
        "architecture": f"{model.arch} ({kind})",
        "eps": pixels(result.config.attack.eps),
        "clean_acc": f"{numbers['sa']:.2f}",
        "reported": f"{numbers['ra_worst']:.2f}",
        "autoattack_acc": f"{numbers['ra_aa']:.2f}" if "ra_aa" in numbers else None,
        "unreliable": not trusted(result.diagnostics),
    }
    if "ra_aa" in numbers and numbers["ra_worst"] < numbers["ra_aa"]:
        card["external"] = card["reported"]
        card["footnote"] = "Attacks on the routing break images that AutoAttack does not."
    card["advmoe"] = numbers | {
        "images": result.images,
        "seed": result.seed,
        "attack": to_dict(result.config.attack),
        "trusted": trusted(result.diagnostics),
        "diagnostics": [to_dict(diagnostic) for diagnostic in result.diagnostics],
        "parameters": cost.parameters,
        "gflops": round(cost.gflops, 4),
        "latency_ms_per_image": {str(size): float(f"{ms:.4g}") for size, ms in (latency or {}).items()},
        "model": to_dict(model),
        "method": train.get("method", ""),
        "epochs": train.get("epochs"),
        "device": device,
        "versions": versions(),
    }
    return card


def latencies(numbers: Mapping[str, Any]) -> str:
    """The latency in words, empty if it was not measured."""
    measured = numbers.get("latency_ms_per_image", {})
    return ", ".join(f"{ms:.3g} ms an image (batch {size})" for size, ms in measured.items())


def versions() -> dict[str, str]:
    """What the numbers were computed with."""
    found = {"python": platform.python_version(), "torch": torch.__version__}
    for package in ("advmoe", "pyautoattack"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found


def save_card(path: Path, card: dict[str, Any]) -> None:
    """Write a card, whole or not at all."""
    text = json.dumps(card, indent=2) + "\n"
    write_text_atomically(path, text)


def load_card(path: Path) -> dict[str, Any]:
    """Read a card.

    Raises:
        DataError: the file is missing or no card of this project.
    """
    try:
        card = json.loads(path.read_text())
        card["advmoe"]["sa"], card["dataset"], card["advmoe"]["diagnostics"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path} is not a result card; expected the card of an evaluation") from error
    return dict(card)
