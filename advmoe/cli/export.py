"""`advmoe export`."""

from __future__ import annotations

import json as jsonlib
import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from advmoe.cli import console
from advmoe.cli.exporter import export_errors, exporter, one_of_its
from advmoe.cli.images import decoded
from advmoe.cli.models import compare_classes, data_dir_of
from advmoe.cli.options import DataDir, Json, Seed, SkipBadImages, flag, given
from advmoe.cli.progress import data_progress
from advmoe.config import check, to_dict
from advmoe.run_paths import checkpoint_of

if TYPE_CHECKING:
    import numpy as np
    from advmoe_export import ExportReport

    from advmoe.data.sets import Images, ImageSet
    from advmoe.training.checkpoint import Checkpoint


def export(
    checkpoint: Annotated[Path, typer.Argument(help="A run folder, e.g. runs/NAME, or a checkpoint.")],
    model: Annotated[
        Path,
        typer.Argument(
            help="The .onnx file to write, its weights go to MODEL.data beside it; or a .safetensors file: weights and "
            "configuration for advmoe.load, without pickle."
        ),
    ],
    context: typer.Context,
    profile: Annotated[
        str,
        typer.Option(
            help="hybrid (any batch), latency (one image), throughput (batches) or static (no control flow).",
            autocompletion=one_of_its("PROFILES"),
        ),
    ] = "hybrid",
    input_type: Annotated[
        str,
        typer.Option(
            help="float32: NCHW images in [0, 1]; uint8: NHWC images as decoded, preprocessing inside.",
            autocompletion=one_of_its("INPUT_TYPES"),
        ),
    ] = "float32",
    batch_size: Annotated[
        int | None, typer.Option(help="Batch size to fix; with --profile static only. Default: any.")
    ] = None,
    dtype: Annotated[
        str,
        typer.Option(
            help="fp32, fp16 or int8 (calibrated on training images); routers stay fp32.",
            autocompletion=one_of_its("DTYPES"),
        ),
    ] = "fp32",
    margins: Annotated[bool, typer.Option(help="Also output by how much each router preferred its expert.")] = False,
    opset: Annotated[int, typer.Option(help="Version of ONNX's standard operators.")] = 18,
    verify_images: Annotated[
        int,
        typer.Option(
            help="Test images to verify the file with and to record the experts' load from, besides synthetic ones."
        ),
    ] = 0,
    calibration_images: Annotated[int, typer.Option(min=1, help="Training images to calibrate int8 with.")] = 256,
    triton: Annotated[
        Path | None, typer.Option(help="Also write the model into this Triton model repository (a folder).")
    ] = None,
    data_dir: DataDir = None,
    skip_bad_images: SkipBadImages = False,
    seed: Seed = 0,
    json: Json = False,
) -> None:
    """Write a checkpoint as an ONNX file in which every image computes its own expert, and no other.

    The file uses standard operators only and appears under its name after it gave the same results
    as PyTorch.

    With a name that ends in .safetensors, write the model for PyTorch instead.
    """
    check(
        model.suffix in (".onnx", ".safetensors"),
        f"the file to write must end in .onnx or .safetensors, got '{model}'",
    )
    if model.suffix == ".safetensors":
        export_safetensors(checkpoint, model, context, json=json)
        return
    from advmoe.training.checkpoint import load_checkpoint

    checkpoint = checkpoint_of(checkpoint)
    asked: dict[str, Any] = {
        "profile": profile,
        "input_type": input_type,
        "batch_size": batch_size,
        "dtype": dtype,
        "opset": opset,
    }
    check(verify_images >= 0, f"--verify-images must not be negative, got {verify_images}")
    check(
        dtype == "int8" or not given(context, "calibration_images"),
        f"--calibration-images is for --dtype int8, this is {dtype}; leave it out",
    )
    for name in ("data_dir", "skip_bad_images", "seed"):
        check(
            bool(verify_images) or dtype == "int8" or not given(context, name),
            f"{flag(name)} is about real images, and none are used; leave it out or set --verify-images",
        )
    package = exporter()
    with export_errors():  # before anything that takes time
        package.check_options(model, **asked)
        if triton is not None:
            package.triton_folder(model, triton)
    contents = load_checkpoint(checkpoint)
    check(
        not margins or contents.model.kind == "moe",
        f"--margins is for an MoE-CNN, this is a {contents.model.kind}; leave it out",
    )
    calibrated = calibration_images if dtype == "int8" else 0
    images, targets, calibration = real_images(
        contents, checkpoint, data_dir, verify_images, calibrated, seed, skip_bad_images=skip_bad_images
    )
    if input_type == "float32":
        images, calibration = as_float(images), as_float(calibration)
    asked |= {"margins": margins, "images": images, "targets": targets, "calibration": calibration}
    report = export_onnx(contents, checkpoint, model, **asked)
    with export_errors():
        repository = None if triton is None else package.write_triton_repository(model, triton)
    figures: dict[str, Any] = jsonlib.loads(report.to_json())
    if json:
        console.emit_json(figures | {"triton": None if repository is None else str(repository)})
        return
    for warning in report.warnings:
        console.warn(warning)
    verification, agreement = report.verification, report.agreement
    facts: dict[str, Any] = {}
    if agreement is not None:
        facts["calibration images compared" if images is None else "test images compared"] = agreement.images
        facts["same label, same pathway"] = f"{agreement.same_label:.2%}, {agreement.same_pathway:.2%}"
        if agreement.module_accuracy is not None and agreement.file_accuracy is not None:
            facts["accuracy (PyTorch, file)"] = f"{agreement.module_accuracy:.2%}, {agreement.file_accuracy:.2%}"
    if repository is not None:
        facts["Triton"] = str(repository)
    console.show_facts(
        f"{checkpoint} -> {model}",
        {
            "graph": f"{report.path} ({report.graph_bytes / 1e6:.2f} MB)",
            "weights": f"{report.data_path} ({report.data_bytes / 1e6:.2f} MB)",
            "profile": profile,
            "compared with PyTorch": f"{verification.batches} batches at every optimization level",
            "largest relative difference": _difference(verification.difference),
            **facts,
        },
    )


def _difference(relative: float) -> str:
    if math.isnan(relative):
        return "not compared: no image takes the pathway that it takes in PyTorch"
    return f"{relative:.1e} of the largest logit, where decisions agree"


def export_onnx(contents: Checkpoint, checkpoint: Path, path: Path, **options: Any) -> ExportReport:
    """Write a checkpoint as a verified ONNX file. The options are those of `advmoe_export.export_model`."""
    from advmoe.data.sources import shorter_side

    with console.err.status("exporting and verifying"), export_errors():
        report: ExportReport = exporter().export_model(
            contents.build(),
            path,
            image_size=contents.model.image_size,
            resize=shorter_side(contents.train.get("dataset"), contents.model.image_size),
            labels=contents.class_names or tuple(map(str, range(contents.model.num_classes))),
            metadata=describe(contents, checkpoint),
            allow_unrouted=contents.model.kind != "moe",
            **options,
        )
    return report


def export_safetensors(checkpoint: Path, target: Path, context: typer.Context, *, json: bool) -> None:
    """Write weights and configuration of a checkpoint; options that shape an ONNX file are refused."""
    from advmoe.training.checkpoint import Checkpoint, load_checkpoint, save_checkpoint

    checkpoint = checkpoint_of(checkpoint)
    meaningless = [
        flag(name) for name in context.params if name not in ("checkpoint", "model", "json") and given(context, name)
    ]
    check(not meaningless, f"{', '.join(meaningless)} applies to ONNX files only, not to '{target}'; leave it out")
    contents = load_checkpoint(checkpoint)
    contents.build()
    console.existing_folder(target)
    kept = Checkpoint(
        model=contents.model,
        weights=contents.weights,
        class_names=contents.class_names,
        train=contents.train,
        metrics=contents.metrics,
    )
    save_checkpoint(target, kept)
    facts = {"path": str(target), "bytes": target.stat().st_size, "tensors": len(kept.weights)}
    if json:
        console.emit_json(facts)
    else:
        console.show_facts(f"{checkpoint} -> {target}", facts)


def describe(contents: Checkpoint, path: Path) -> dict[str, Any]:
    """Metadata of the file about the model."""
    from advmoe.training.checkpoint import file_digest

    described = to_dict(contents.model)
    described |= {"mean": list(contents.model.mean), "std": list(contents.model.std)}
    training = {name: contents.train[name] for name in ("dataset", "method") if name in contents.train}
    return described | training | {"checkpoint_sha256": file_digest(path)}


def real_images(
    contents: Checkpoint,
    checkpoint: Path,
    data_dir: Path | None,
    number: int,
    calibrated: int,
    seed: int,
    *,
    skip_bad_images: bool = False,
) -> tuple[np.ndarray | None, np.ndarray | None, np.ndarray | None]:
    """Seeded choices of images of the data set the model was trained on, from the folder that its run remembers.

    Returns:
        uint8 test images [number, H, W, 3] and their classes, and uint8 training images
            [calibrated, H, W, 3]; None for each one that was not requested. They are fewer if the set
            is smaller, or if images are skipped.
    """
    import numpy as np

    from advmoe.data.sources import load_dataset

    if not number and not calibrated:
        return None, None, None
    name = contents.train.get("dataset")
    check(name is not None, "the checkpoint does not say which data set it was trained on, so no images can be read")
    place = data_dir_of(checkpoint, str(name), data_dir)
    with data_progress() as progress:
        data = load_dataset(str(name), place, progress=progress, announce=console.note)
    compare_classes(contents, checkpoint, data.info)
    size = contents.model.image_size
    rng = np.random.default_rng(seed)

    def some(images: Images, number: int, what: str) -> ImageSet | None:
        chosen = np.sort(rng.choice(len(images), min(number, len(images)), replace=False))
        return decoded(images.take(chosen), size, what, skip_bad_images=skip_bad_images)[0] if number else None

    test, train = some(data.test, number, "test"), some(data.train, calibrated, "training")
    return (
        None if test is None else test.images,
        None if test is None else test.labels,
        None if train is None else train.images,
    )


def as_float(images: np.ndarray | None) -> np.ndarray | None:
    """Images as float files read them: float32 [B, 3, H, W] in [0, 1]."""
    import numpy as np

    return None if images is None else images.transpose(0, 3, 1, 2) / np.float32(255)
