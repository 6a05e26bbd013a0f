"""`advmoe export`."""

from __future__ import annotations

import json as jsonlib
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer

from advmoe.cli import console
from advmoe.cli.exporter import export_errors, exporter
from advmoe.cli.options import DataDir, Json, Seed
from advmoe.cli.progress import data_progress
from advmoe.config import check, to_dict
from advmoe.data.sources import load_dataset
from advmoe.training.checkpoint import Checkpoint, file_digest, load_checkpoint


def export(
    checkpoint: Annotated[Path, typer.Argument(help="A checkpoint, e.g. runs/NAME/best.pt.")],
    model: Annotated[Path, typer.Argument(help="The .onnx file to write; its weights go to MODEL.data beside it.")],
    profile: Annotated[
        str,
        typer.Option(help="hybrid (any batch), latency (one image), throughput (batches) or static (no control flow)."),
    ] = "hybrid",
    input_type: Annotated[
        str, typer.Option(help="float32: NCHW images in [0, 1]; uint8: NHWC images as decoded, preprocessing inside.")
    ] = "float32",
    opset: Annotated[int, typer.Option(help="Version of ONNX's standard operators.")] = 18,
    verify_images: Annotated[
        int,
        typer.Option(
            help="Test images to verify the file with and to record the experts' load from, besides synthetic ones."
        ),
    ] = 0,
    data_dir: DataDir = None,
    seed: Seed = 0,
    json: Json = False,
) -> None:
    """Write a checkpoint as an ONNX file in which every image computes its own expert, and no other.

    The file uses standard operators only and appears under its name after it gave the same results as PyTorch.
    """
    check(verify_images >= 0, f"--verify-images must not be negative, got {verify_images}")
    package = exporter()
    contents = load_checkpoint(checkpoint)
    images = test_images(contents, data_dir, verify_images, seed) if verify_images else None
    if images is not None and input_type == "float32":
        images = images.transpose(0, 3, 1, 2) / np.float32(255)
    with console.err.status("exporting and verifying"), export_errors():
        report = package.export_model(
            contents.build(),
            model,
            image_size=contents.model.image_size,
            labels=contents.class_names or tuple(map(str, range(contents.model.num_classes))),
            metadata=describe(contents, checkpoint),
            profile=profile,
            input_type=input_type,
            opset=opset,
            images=images,
            allow_unrouted=contents.model.kind != "moe",
        )
    figures: dict[str, Any] = jsonlib.loads(report.to_json())
    if json:
        console.emit_json(figures)
        return
    verification = report.verification
    console.show_facts(
        f"{checkpoint} -> {model}",
        {
            "graph": f"{report.path} ({report.graph_bytes / 1e6:.2f} MB)",
            "weights": f"{report.data_path} ({report.data_bytes / 1e6:.2f} MB)",
            "profile": profile,
            "compared with PyTorch": f"{len(verification.checks)} batches at every optimisation level",
            "largest relative difference": f"{verification.difference:.1e} of the largest logit, where decisions agree",
        },
    )


def describe(contents: Checkpoint, path: Path) -> dict[str, Any]:
    """What the file says about the model it came from."""
    described = to_dict(contents.model)
    described |= {"mean": list(contents.model.mean), "std": list(contents.model.std)}
    training = {name: contents.train[name] for name in ("dataset", "method") if name in contents.train}
    return described | training | {"checkpoint_sha256": file_digest(path)}


def test_images(contents: Checkpoint, data_dir: Path | None, number: int, seed: int) -> np.ndarray:
    """A seeded choice of test images of the data set the model was trained on, uint8 [n, H, W, 3]."""
    name = contents.train.get("dataset")
    check(
        name is not None, "the checkpoint does not say which data set it was trained on; export without --verify-images"
    )
    with data_progress() as progress:
        data = load_dataset(str(name), data_dir, progress=progress)
    chosen = np.random.default_rng(seed).choice(len(data.test), min(number, len(data.test)), replace=False)
    return data.test.take(np.sort(chosen)).images
