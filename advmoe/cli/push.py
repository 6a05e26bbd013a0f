"""`advmoe push`."""

from __future__ import annotations

import json as jsonlib
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from advmoe.cli import console
from advmoe.cli.evaluate import CARD
from advmoe.cli.export import describe
from advmoe.cli.exporter import export_errors, exporter
from advmoe.cli.models import checkpoint_of
from advmoe.cli.options import Json
from advmoe.config import check, to_dict

if TYPE_CHECKING:
    from advmoe.training.checkpoint import Checkpoint


def push(
    run: Annotated[Path, typer.Argument(help="A run folder, or a checkpoint.")],
    repository: Annotated[str, typer.Argument(help="Where to, as owner/name.")],
    evaluation: Annotated[
        Path | None,
        typer.Option(
            help="Folder written by 'advmoe evaluate --out', whose figures the model card shows. "
            "Default: the only one in the run folder."
        ),
    ] = None,
    license: Annotated[str, typer.Option(help="License of the weights, as the hub names it.")] = "mit",
    onnx: Annotated[bool, typer.Option(help="Put an ONNX file beside the weights.")] = True,
    private: Annotated[bool, typer.Option("--private", help="Only you can see the repository.")] = False,
    json: Json = False,
) -> None:
    """Upload a model to the hub: weights as safetensors, configuration, ONNX file and a model card.

    Others load it with advmoe.load("hf://owner/name"). $HF_TOKEN or 'hf auth login' gives the right
    to upload.
    """
    from advmoe.hub import check_repository
    from advmoe.hub import push as upload
    from advmoe.training.checkpoint import load_checkpoint

    check_repository(repository)
    checkpoint = checkpoint_of(run)
    contents = load_checkpoint(checkpoint)
    card = find_card(run, evaluation)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        files = write_repository(contents, checkpoint, repository, folder, card=card, license=license, onnx=onnx)
        with console.err.status(f"uploading {len(files)} files"):
            address = upload(folder, repository, private=private, message=f"Upload {checkpoint.parent.name}")
    if card is None:
        console.note(
            "the model card says that the model was not evaluated; 'advmoe evaluate RUN --out FOLDER' does that"
        )
    if json:
        console.emit_json({"address": address, "files": files})
    else:
        console.show_facts(address, {"files": ", ".join(files), "load": f'advmoe.load("hf://{repository}")'})


def find_card(run: Path, evaluation: Path | None) -> dict[str, Any] | None:
    """The result card to show: the one asked for, or the only one in a run folder.

    Raises:
        ConfigError: The run folder has several cards.
    """
    from advmoe.evaluation.card import load_card

    if evaluation is not None:
        return load_card(evaluation / CARD)
    found = sorted(run.rglob(CARD)) if run.is_dir() else []
    check(len(found) <= 1, f"{run} holds {len(found)} evaluations; choose one", "evaluation")
    return load_card(found[0]) if found else None


def write_repository(
    contents: Checkpoint,
    checkpoint: Path,
    repository: str,
    folder: Path,
    *,
    card: dict[str, Any] | None,
    license: str,
    onnx: bool,
) -> list[str]:
    """Write the files of a repository, and return their names."""
    from advmoe.hub import WEIGHTS
    from advmoe.reports.model_card import model_card
    from advmoe.training.checkpoint import save_checkpoint

    save_checkpoint(folder / WEIGHTS, contents)
    config = {"model": to_dict(contents.model), "train": contents.train, "class_names": list(contents.class_names)}
    (folder / "config.json").write_text(jsonlib.dumps(config, indent=2) + "\n")
    if card is not None:
        (folder / CARD).write_text(jsonlib.dumps(card, indent=2) + "\n")
    if onnx:
        with console.err.status("exporting and verifying"), export_errors():
            from advmoe.data.sources import shorter_side

            exporter().export_model(
                contents.build(),
                folder / "model.onnx",
                image_size=contents.model.image_size,
                resize=shorter_side(contents.train.get("dataset"), contents.model.image_size),
                labels=contents.class_names or tuple(map(str, range(contents.model.num_classes))),
                metadata=describe(contents, checkpoint),
                allow_unrouted=contents.model.kind != "moe",
            )
    text = model_card(contents, repository, license=license, evaluation=card, onnx=onnx)
    (folder / "README.md").write_text(text)
    return sorted(path.name for path in folder.iterdir())
