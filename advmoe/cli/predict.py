"""`advmoe predict`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from advmoe.cli import console
from advmoe.cli.exporter import export_errors, exporter, open_session
from advmoe.cli.options import Json
from advmoe.config import check
from advmoe.errors import DataError

if TYPE_CHECKING:
    import numpy as np
    from advmoe_export import ModelMetadata
    from numpy.typing import NDArray


def predict(
    model: Annotated[Path, typer.Argument(help="An exported model (.onnx).")],
    images: Annotated[list[Path], typer.Argument(help="Image files.")],
    top: Annotated[int, typer.Option(help="Classes to show per image.")] = 3,
    provider: Annotated[
        list[str] | None, typer.Option(help="onnxruntime provider, in order of preference: cpu, cuda. Default: cpu.")
    ] = None,
    json: Json = False,
) -> None:
    """Classify image files with an exported model: labels, probabilities and the pathway each image took.

    Images of any size are prepared as the images of the data set are in an evaluation: the shorter side is resized
    to a length that the file knows, then the middle is taken.
    """
    import numpy as np

    check(top >= 1, f"--top must be at least 1, got {top}")
    session = open_session(model, provider or ["cpu"])
    with export_errors():
        pixels = np.stack([read_image(path, session.metadata) for path in images])
        batches = [session.run(pixels[row : row + 1]) for row in range(len(pixels))]
    labels = session.metadata.labels
    predictions: list[dict[str, Any]] = []
    for path, result in zip(images, batches, strict=True):
        order = np.argsort(-result.probabilities[0], kind="stable")[:top]
        best = int(order[0])
        predictions.append(
            {
                "image": str(path),
                "label": labels[best],
                "probability": round(float(result.probabilities[0, best]), 6),
                "top": [
                    {"label": labels[k], "probability": round(float(result.probabilities[0, k]), 6)} for k in order
                ],
                "pathway": None if result.pathway is None else result.pathway[0].tolist(),
            }
        )
    if json:
        console.emit_json({"model": str(model), "predictions": predictions})
        return
    rows = [
        (
            prediction["image"],
            ", ".join(f"{entry['label']} {entry['probability']:.3f}" for entry in prediction["top"]),
            "-" if prediction["pathway"] is None else " ".join(map(str, prediction["pathway"])),
        )
        for prediction in predictions
    ]
    console.show_table(str(model), ("image", "prediction", "pathway (expert of each MoE layer)"), rows)


def read_image(path: Path, metadata: ModelMetadata) -> NDArray[np.uint8]:
    """An image file as `advmoe evaluate` shows one of the data set: uint8 RGB [height, width, 3] of the model's size.

    JPEG and PNG are decoded as those of data sets are, other formats by Pillow; all are resized in Rust.

    Raises:
        DataError: the file is missing or cannot be decoded.
    """
    import numpy as np

    from advmoe import rust_router
    from advmoe.data.transforms import ResizeCenterCrop
    from advmoe.data.views import shown

    if not path.is_file():
        raise DataError(f"no image file {path}")
    try:
        content = path.read_bytes()
        if content.startswith((b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n")):
            pixels = rust_router.decode_image(content)
        else:
            pixels = np.asarray(exporter().read_image(path))
    except (DataError, OSError) as error:
        raise DataError(f"{path} cannot be decoded as an image ({error}); expected a JPEG, PNG or the like") from error
    return shown(pixels, ResizeCenterCrop(size=metadata.image_size, resize=metadata.resize))
