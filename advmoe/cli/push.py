"""`advmoe push`."""

from __future__ import annotations

import json as jsonlib
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from advmoe.cli import console
from advmoe.cli.export import export_onnx
from advmoe.cli.options import Json
from advmoe.config import ModelConfig, check, from_dict, to_dict
from advmoe.run_paths import CARD, checkpoint_of

if TYPE_CHECKING:
    from advmoe.training.checkpoint import Checkpoint

ONNX = "model.onnx"
OPTIONAL = (ONNX, f"{ONNX}.data", CARD)
"""Files of a repository that not every model has."""


def push(
    run: Annotated[Path, typer.Argument(help="A run folder, or a checkpoint.")],
    repository: Annotated[str, typer.Argument(help="Where to, as owner/name.")],
    evaluation: Annotated[
        Path | None,
        typer.Option(
            help="Folder written by 'advmoe evaluate --out', whose figures the model card shows. "
            "Default: the checkpoint's only one in the run folder."
        ),
    ] = None,
    license: Annotated[str, typer.Option(help="License of the weights, as the hub names it.")] = "mit",
    onnx: Annotated[bool, typer.Option(help="Put an ONNX file beside the weights.")] = True,
    private: Annotated[bool, typer.Option("--private", help="Only you can see the repository.")] = False,
    out: Annotated[
        Path | None,
        typer.Option(
            help="Dry run: write the files to this new or empty folder, to look at them. Upload nothing, and contact "
            "no hub."
        ),
    ] = None,
    json: Json = False,
) -> None:
    """Upload a model to the hub: weights as safetensors, configuration, ONNX file and a model card.

    Others load it with advmoe.load("hf://owner/name"). $HF_TOKEN or 'hf auth login' gives the right
    to upload.
    """
    from advmoe.hub import WEIGHTS, check_access, check_repository
    from advmoe.hub import push as upload
    from advmoe.training.checkpoint import load_checkpoint

    check_repository(repository)
    checkpoint = checkpoint_of(run)
    contents = load_checkpoint(checkpoint)
    card = find_card(run, evaluation, checkpoint, contents)
    if out is None:
        with console.err.status("contacting the hub"):
            check_access(repository, private=private)
    else:
        console.existing_folder(out)
        check(not out.exists() or (out.is_dir() and not any(out.iterdir())), f"{out} exists; give a new folder", "out")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        files = write_repository(contents, checkpoint, repository, folder, card=card, license=license, onnx=onnx)
        if out is None:
            with console.err.status(f"uploading {len(files)} files"):
                message = f"Upload {checkpoint.parent.name}"
                address = upload(folder, repository, replaces=OPTIONAL, private=private, message=message)
        else:
            shutil.copytree(folder, out, dirs_exist_ok=True)
            address = str(out)
    if card is None:
        console.note(
            "the model card says that the model was not evaluated; 'advmoe evaluate RUN --out FOLDER' does that"
        )
    if json:
        console.emit_json({"address": address, "files": files})
    else:
        place = f"hf://{repository}" if out is None else out / WEIGHTS
        console.show_facts(address, {"files": ", ".join(files), "load": f'advmoe.load("{place}")'})


def find_card(run: Path, evaluation: Path | None, checkpoint: Path, contents: Checkpoint) -> dict[str, Any] | None:
    """The result card to show: the one asked for, or the checkpoint's only one in a run folder.

    Raises:
        ConfigError: The card is of another model, or the run folder has several cards.
    """
    from advmoe.evaluation.card import load_card

    if evaluation is not None:
        cards = {evaluation: load_card(evaluation / CARD)}
    else:
        found = {path.parent: load_card(path) for path in sorted(run.rglob(CARD))} if run.is_dir() else {}
        cards = {folder: card for folder, card in found.items() if card["advmoe"].get("control") is None}
    reasons = {folder: other_model(card["advmoe"], checkpoint, contents) for folder, card in cards.items()}
    own = [folder for folder, reason in reasons.items() if reason is None]
    for folder, reason in reasons.items():
        check(bool(own), f"{folder} is no evaluation of {checkpoint}: {reason}; choose or make one", "evaluation")
    check(len(own) <= 1, f"{run} holds {len(own)} evaluations; choose one", "evaluation")
    return cards[own[0]] if own else None


def other_model(numbers: dict[str, Any], checkpoint: Path, contents: Checkpoint) -> str | None:
    """Why the figures of a card are not those of a checkpoint; None if they are.

    Cards of earlier versions name no file, so the description of the model has to do.
    """
    from advmoe.training.checkpoint import file_digest

    if (control := numbers.get("control")) is not None:
        return f"its model is the control '{control}'"
    if (evaluated := numbers.get("checkpoint_sha256")) is not None:
        digest = file_digest(checkpoint)
        return None if digest == evaluated else f"it is of a file with SHA-256 {evaluated[:12]}, this has {digest[:12]}"
    described = to_dict(contents.model)
    for name, value in to_dict(from_dict(ModelConfig, numbers["model"])).items():
        if value != described[name]:
            return f"it is of a model whose {name} is {value}, this has {described[name]}"
    return None


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
    (folder / "config.json").write_text(jsonlib.dumps(config, indent=2) + "\n", encoding="utf-8")
    if card is not None:
        (folder / CARD).write_text(jsonlib.dumps(card, indent=2) + "\n", encoding="utf-8")
    if onnx:
        export_onnx(contents, checkpoint, folder / ONNX)
    text = model_card(contents, repository, license=license, evaluation=card, onnx=onnx)
    (folder / "README.md").write_text(text, encoding="utf-8")
    return sorted(path.name for path in folder.iterdir())
