"""`advmoe analyze`."""

from __future__ import annotations

import json as json_text
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from advmoe.cli import console
from advmoe.cli.evaluate import ROUTES
from advmoe.cli.options import Json
from advmoe.config import ModelConfig, from_dict
from advmoe.errors import DataError
from advmoe.run_paths import CARD, checkpoint_of, closest_path, run_in

if TYPE_CHECKING:
    from advmoe.models.network import RoutedNetwork

ANALYSIS = "analysis.json"
"""File with the analysis that the command adds to the folder, beside the figures."""


def analyze(
    evaluation: Annotated[Path, typer.Argument(help="A folder written by 'advmoe evaluate --out'.")],
    mask: Annotated[
        Path | None,
        typer.Option(help="Run or checkpoint of a Sparse-CNN: compare pathways with its mask pathway (Fig. 6)."),
    ] = None,
    figures: Annotated[bool, typer.Option(help="Draw figures (SVG) into the folder.")] = True,
    json: Json = False,
) -> None:
    """Dissect an evaluated MoE-CNN: what fooled router and prediction, expert load, how pathways differ.

    Reads the route log of the evaluation; adds analysis.json and the figures to its folder.
    """
    from advmoe.evaluation.analysis import analyze
    from advmoe.evaluation.card import load_card
    from advmoe.evaluation.vocabulary import FATES, ROBUSTNESS
    from advmoe.files import write_text_atomically
    from advmoe.reports.figures import analysis_figures
    from advmoe.routing_log import RouteLog
    from advmoe.training.checkpoint import load_checkpoint

    card = load_card(evaluation_in(evaluation) / CARD)
    model = model_of(card["advmoe"]["model"])
    sparse = None if mask is None else load_checkpoint(checkpoint_of(mask)).build()
    found = analyze(RouteLog.load(evaluation / ROUTES), model, sparse=sparse)
    write_text_atomically(evaluation / ANALYSIS, json_text.dumps(found, indent=1) + "\n")
    if figures:
        for name, svg in analysis_figures(found).items():
            write_text_atomically(evaluation / f"{name}.svg", svg + "\n")
    if json:
        console.emit_json(found)
        return
    columns = ("", *found["conditions"])
    rows = [("distinct pathways", *(values["pathways"] for values in found["conditions"].values()))]
    for fate in (*FATES, *ROBUSTNESS):
        parts = [values.get("dissection", {}).get(fate.key) for values in found["conditions"].values()]
        rows.append((fate.label, *("" if part is None else f"{part:.2f} %" for part in parts)))
    similar = found.get("similarity", {"overlap": {}, "diversity": {}})
    for label, values in (
        ("IoU with the mask pathway", found.get("mask", {})),
        ("IoU with the clean pathway", similar["overlap"]),
        ("IoU over pairs of images", similar.get("diversity", {})),
    ):
        if values:
            cells = [values[name]["mean"] if name in values else None for name in found["conditions"]]
            rows.append((label, *("" if cell is None else f"{cell:.3f}" for cell in cells)))
    if "mask_reachable" in found:
        least, largest = found["mask_reachable"]
        rows.append(("IoU with the mask pathway, of any pathway", f"{least:.3f} to {largest:.3f}"))
    console.show_table(f"Routing of {card['name']}, {found['images']} images", columns, rows)
    console.note(f"written to {evaluation}")


def evaluation_in(path: Path) -> Path:
    """The folder of an evaluation that a path means, which is itself.

    Raises:
        DataError: It holds no evaluation.
    """
    if (path / CARD).is_file():
        return path
    expected = "expected a folder that 'advmoe evaluate --out' wrote"
    if path.is_file():
        folder = f", such as {path.parent}" if path.name == CARD else ""
        raise DataError(f"{path} is a file; {expected}{folder}")
    if not path.exists():
        raise DataError(f"there is no folder {path}; {expected}{closest_path(path)}")
    found = sorted(path.glob(f"*/{CARD}"))
    if found:
        raise DataError(f"there is no result card {path / CARD}; {expected}, such as {found[0].parent}")
    if run_in(path):
        raise DataError(f"{path} holds a training run; evaluate it first, with --out {path / 'evaluation'}")
    raise DataError(f"there is no result card {path / CARD}; {expected}")


def model_of(config: dict[str, object]) -> RoutedNetwork:
    """The network a card describes, without weights."""
    import torch

    from advmoe.models.registry import build_model

    with torch.device("meta"):
        return build_model(from_dict(ModelConfig, config))
