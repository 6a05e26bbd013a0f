"""`advmoe predict`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from advmoe.cli import console
from advmoe.cli.exporter import export_errors, open_session
from advmoe.cli.options import Json
from advmoe.config import check
from advmoe.errors import DataError

if TYPE_CHECKING:
    import numpy as np
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

    Images of another size are scaled so that the shorter side fits, then cropped at the centre.
    """
    import numpy as np

    check(top >= 1, f"--top must be at least 1, got {top}")
    session = open_session(model, provider or ["cpu"])
    height, width = session.metadata.image_size
    pixels = np.stack([read_image(path, width, height) for path in images])
    with export_errors():
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


def read_image(path: Path, width: int, height: int) -> NDArray[np.uint8]:
    """An image file as uint8 RGB [height, width, 3].

    Raises:
        DataError: the file is missing or cannot be decoded.
    """
    import numpy as np
    from PIL import Image, ImageOps, UnidentifiedImageError

    if not path.is_file():
        raise DataError(f"no image file {path}")
    try:
        with Image.open(path) as image:
            fitted = ImageOps.fit(image.convert("RGB"), (width, height), Image.Resampling.BILINEAR)
    except (UnidentifiedImageError, OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise DataError(f"{path} cannot be decoded as an image ({error}); expected a JPEG, PNG or the like") from error
    return np.asarray(fitted)
