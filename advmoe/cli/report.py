"""`advmoe report`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from advmoe.cli import console
from advmoe.cli.analyze import evaluation_in, model_of
from advmoe.cli.evaluate import EXAMPLES, OUTCOMES, ROUTES
from advmoe.config import check
from advmoe.run_paths import CARD, checkpoint_of

ENDINGS = (".html", ".htm")
"""Of the file to write."""


def report(
    evaluations: Annotated[list[Path], typer.Argument(help="Folders written by 'advmoe evaluate --out'.")],
    out: Annotated[Path, typer.Option(help="The HTML file to write.")] = Path("report.html"),
    mask: Annotated[
        Path | None,
        typer.Option(help="Run or checkpoint of a Sparse-CNN: compare pathways with its mask pathway (Fig. 6)."),
    ] = None,
) -> None:
    """Write one self-contained HTML file about one evaluated model, or comparing several.

    It holds tables and figures and needs no network; it reads well on a phone and in print.
    """
    from advmoe.evaluation.analysis import analyze
    from advmoe.evaluation.card import load_card
    from advmoe.evaluation.examples import load_examples
    from advmoe.evaluation.paired import check_same_images, comparable, load_outcomes, told_apart
    from advmoe.files import write_text_atomically
    from advmoe.reports.html import render
    from advmoe.reports.training import read_log
    from advmoe.routing_log import RouteLog
    from advmoe.training.checkpoint import load_checkpoint

    check(
        out.suffix.lower() in ENDINGS,
        f"a report is a web page, so --out must end in {' or '.join(ENDINGS)}, got {out}",
    )
    console.existing_folder(out)
    sparse = None if mask is None else load_checkpoint(checkpoint_of(mask)).build()
    analyses: dict[str, Any] = {}
    logs: dict[str, Any] = {}
    examples: dict[str, Any] = {}
    cards = [load_card(evaluation_in(folder) / CARD) for folder in evaluations]
    names = told_apart([card["name"] for card in cards], evaluations)
    for card, name, folder in zip(cards, names, evaluations, strict=True):
        card["name"] = name
        logs[card["name"]] = read_log(folder)
        examples[card["name"]] = load_examples(folder / EXAMPLES)
        model = model_of(card["advmoe"]["model"])
        if model.expert_layouts:
            analyses[card["name"]] = analyze(RouteLog.load(folder / ROUTES), model, sparse=sparse)
    left_out: dict[str, str] = {}
    if len(cards) > 1:
        found = [load_outcomes(folder / OUTCOMES) for folder in evaluations]
        check_same_images(cards, found)
        left_out = comparable(cards, found)[1]
    html = render(cards, analyses, logs=logs, examples=examples, left_out=left_out)
    write_text_atomically(out, html)
    console.note(f"written to {out}")
