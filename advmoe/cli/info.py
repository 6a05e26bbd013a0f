"""`advmoe info`."""

from __future__ import annotations

import dataclasses
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

import advmoe
from advmoe.cli import console
from advmoe.cli.options import Json
from advmoe.config import KINDS, to_dict
from advmoe.run_file import NONE
from advmoe.run_paths import checkpoint_of

if TYPE_CHECKING:
    from advmoe_export import ModelMetadata

RADII = ("eps", "step_size")
"""Facts that are shown in units of 1/255."""
LONGEST = 50
"""Characters of a value in the summary; `--all` shows it in full."""
SUMMARY = (
    "arch",
    "kind",
    "num_experts",
    "model_scale",
    "width",
    "image_size",
    "parameters",
    "gflops",
    "moe_layers",
    "classes",
    "train.dataset",
    "train.method",
    "train.epochs",
    "metrics.epoch",
    "metrics.val_sa",
)
"""Facts of a checkpoint that are shown without `--all`, besides RA on the validation images."""


def info(
    file: Annotated[
        Path | None, typer.Argument(help="A run folder, a checkpoint (.pt) or an exported model (.onnx).")
    ] = None,
    everything: Annotated[bool, typer.Option("--all", help="Show every setting and figure.")] = False,
    json: Json = False,
) -> None:
    """Show what a checkpoint or an exported model is; without a file, what this installation can do."""
    if file is None:
        title, facts = "advmoe", installation_facts()
    elif file.suffix == ".onnx":
        from advmoe.cli.exporter import open_session

        session = open_session(file, ["cpu"])
        title, facts = str(file), model_file_facts(session.metadata)
    else:
        checkpoint = checkpoint_of(file)
        title, facts = str(checkpoint), checkpoint_facts(checkpoint)
    if json:
        console.emit_json(facts)
    elif everything or file is None:
        console.show_facts(title, texts_of(facts))
    else:
        console.show_facts(title, summary(facts))
        console.note("--all shows every setting and figure")


def summary(facts: Mapping[str, Any]) -> dict[str, str]:
    """The most important facts; long ones are cut."""
    chosen = {
        name: value
        for name, value in facts.items()
        if name in SUMMARY or name.startswith("metrics.val_ra") or not any(known in facts for known in SUMMARY[6:9])
    }
    texts = {name: " ".join(text.split()) for name, text in texts_of(chosen).items()}
    return {name: text if len(text) <= LONGEST else f"{text[:LONGEST]}..." for name, text in texts.items()}


def texts_of(facts: Mapping[str, Any]) -> dict[str, str]:
    """Facts for a person. The parts of a fact that has several are facts of their own: `train.attack.eps`."""
    texts: dict[str, str] = {}
    for name, value in facts.items():
        if isinstance(value, Mapping):
            texts |= texts_of({f"{name}.{part}": of for part, of in value.items()})
        else:
            texts[name] = text_of(value, radius=name.rpartition(".")[2] in RADII)
    return texts


def text_of(value: Any, *, radius: bool = False) -> str:
    """A value as options and run files have it: no value as `none`, lists without brackets, radii as 8/255."""
    from advmoe.evaluation.vocabulary import pixels

    if value is None:
        return NONE
    if isinstance(value, bool):
        return "on" if value else "off"
    if radius and isinstance(value, float):
        return pixels(value)
    if isinstance(value, list | tuple):
        nested = any(isinstance(part, list | tuple) for part in value)
        return ("; " if nested else ", ").join(map(text_of, value))
    return str(value)


def model_file_facts(metadata: ModelMetadata) -> dict[str, Any]:
    """Facts from the metadata of an exported model."""
    facts = dataclasses.asdict(metadata)
    if len(set(metadata.image_size)) == 1:
        facts["image_size"] = metadata.image_size[0]  # as the setting of a checkpoint, whose images are square
    return {name: value for name, value in facts.items() if name not in {"model", "tool"}} | {
        f"{part}.{name}": value for part in ("model", "tool") for name, value in facts[part].items()
    }


def installation_facts() -> dict[str, Any]:
    """Versions, devices, and the names that other commands accept."""
    import torch
    import torchvision

    from advmoe.data.sources import dataset_names
    from advmoe.models.registry import ARCHITECTURES
    from advmoe.training.methods import METHODS

    gpus = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    return {
        "version": advmoe.__version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torchvision": torchvision.__version__,
        "devices": ["cpu", *gpus],
        "data sets": list(dataset_names()),
        "architectures": sorted(ARCHITECTURES),
        "model kinds": list(KINDS),
        "training methods": {name: method.summary for name, method in METHODS.items()},
    }


def checkpoint_facts(path: Path) -> dict[str, Any]:
    """What a checkpoint holds."""
    from advmoe.evaluation.cost import measure_cost
    from advmoe.training.checkpoint import load_checkpoint

    contents = load_checkpoint(path)
    model = contents.build()
    facts: dict[str, Any] = dict(to_dict(contents.model))
    cost = measure_cost(model, contents.model.image_size)
    facts["parameters"] = cost.parameters
    facts["router_parameters"] = sum(parameter.numel() for parameter in model.router_parameters())
    facts["gflops"] = cost.gflops
    facts["moe_layers"] = len(model.expert_layouts)
    facts["classes"] = list(contents.class_names)
    facts |= {f"train.{name}": value for name, value in contents.train.items()}
    facts |= {f"metrics.{name}": value for name, value in contents.metrics.items()}
    return facts
