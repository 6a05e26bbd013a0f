"""`advmoe predict`."""

from __future__ import annotations

import csv as csv_text
import io
import itertools
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from advmoe.cli import console
from advmoe.cli.exporter import export_errors, exporter, open_session
from advmoe.cli.options import Json
from advmoe.cli.progress import data_progress
from advmoe.config import check
from advmoe.errors import ConfigError, DataError

if TYPE_CHECKING:
    import numpy as np
    from advmoe_export import ModelMetadata, Session
    from numpy.typing import NDArray

    from advmoe.data.sets import Progress


STDIN = Path("-")
"""The image on stdin, in place of a file."""
CHECKPOINTS = {".pt", ".safetensors"}
"""Endings of files for PyTorch, which are not exported yet."""


def predict(
    model: Annotated[Path, typer.Argument(help="An exported model (.onnx).")],
    images: Annotated[
        list[str],
        typer.Argument(
            help="Image files, folders (searched through all levels), or patterns such as 'photos/*.jpg'; - is an "
            "image on stdin."
        ),
    ],
    top: Annotated[int, typer.Option(help="Classes to show per image.")] = 3,
    csv: Annotated[
        bool, typer.Option("--csv", help="Print the result as CSV on stdout, a row per image and a line of names.")
    ] = False,
    json: Json = False,
    batch_size: Annotated[
        int, typer.Option(help="Images to run at a time, unless the file has a fixed batch size.")
    ] = 32,
    provider: Annotated[
        list[str] | None,
        typer.Option(
            help="onnxruntime provider: cpu, cuda or tensorrt. May be given several times, in order of preference. "
            "Default: cpu."
        ),
    ] = None,
) -> None:
    """Classify images with an exported model: labels, probabilities and the pathway each image took.

    Images of any size are prepared as the images of the data set are in an evaluation: the shorter
    side is resized to a length that the file knows, then the middle is taken.

    An image that cannot be read is skipped with a line on stderr; the exit code is 1 in the end.
    """
    from advmoe.data.pictures import find_pictures

    check(top >= 1, f"--top must be at least 1, got {top}")
    check(batch_size >= 1, f"--batch-size must be at least 1, got {batch_size}")
    check(not (csv and json), "give --csv or --json, not both")
    table = next((name for name in images if Path(name).suffix in {".csv", ".json"} and not Path(name).exists()), None)
    check(
        table is None or not (csv or json),
        f"{table} would be an image to classify; --csv and --json print to stdout, so write the result by > {table}",
    )
    trained = model.is_dir() or model.suffix in CHECKPOINTS  # the session says how to export these
    check(
        model.suffix == ".onnx" or (trained and not any(name.endswith(".onnx") for name in images)),
        f"{model} is not an ONNX file; give the model first, then the images",
    )
    other = next((name for name in images if Path(name).suffix in {".onnx", *CHECKPOINTS}), None)
    check(other is None, f"{other} is a model, not an image; give one model, then the images")
    session = open_session(model, provider or ["cpu"])
    paths = [path for name in images for path in ([STDIN] if name == str(STDIN) else find_pictures([name]))]
    paths = list(dict.fromkeys(paths))
    predicting = Predicting(session, min(top, len(session.metadata.labels)), batch_size)
    if csv:
        show_csv(predicting, paths)
    else:
        with data_progress() as progress:
            predictions = list(predicting.of(paths, progress))
        skipped = [{"image": str(path), "reason": reason} for path, reason in predicting.skipped.items()]
        if json:
            console.emit_json({"model": str(model), "predictions": predictions, "skipped": skipped})
        elif predictions:
            show(str(model), predictions)
    if predicting.skipped:
        raise DataError(refusal(predicting.skipped, len(paths)))


@dataclass
class Predicting:
    """Classifies files with a model. Unreadable files are recorded in `skipped` and left out."""

    session: Session
    top: int
    batch_size: int
    skipped: dict[Path, str] = field(default_factory=dict)

    def of(self, paths: Sequence[Path], progress: Progress | None = None) -> Iterator[dict[str, Any]]:
        """The predictions, in the order of the paths. At most one batch of images is in memory."""
        size = self.session.metadata.batch_size or self.batch_size
        readable = self._readable(paths, progress)
        while batch := list(itertools.islice(readable, size)):
            yield from self._of_batch([path for path, _ in batch], [pixels for _, pixels in batch])

    def _readable(self, paths: Sequence[Path], progress: Progress | None) -> Iterator[tuple[Path, NDArray[np.uint8]]]:
        for done, path in enumerate(paths):
            try:
                pixels = read_image(path, self.session.metadata)
            except DataError as error:
                self.skipped[path] = str(error)
                if len(paths) > 1:
                    console.warn(f"skipped: {error}")
            else:
                yield path, pixels
            if progress is not None:
                progress("classifying images", done + 1, len(paths))

    def _of_batch(self, paths: list[Path], images: list[NDArray[np.uint8]]) -> Iterator[dict[str, Any]]:
        import numpy as np

        session = self.session
        with export_errors():
            result = session.interpret(session.execute(session.check(np.stack(images), any_size=True)))
        labels = session.metadata.labels
        for row, path in enumerate(paths):
            best = result.best(row, self.top)
            ranked = [{"label": labels[k], "probability": round(float(result.probabilities[row, k]), 6)} for k in best]
            yield {
                "image": str(path),
                **ranked[0],
                "top": ranked,
                "pathway": None if result.pathway is None else result.pathway[row].tolist(),
            }


def show(title: str, predictions: Sequence[Mapping[str, Any]]) -> None:
    """A table, a row per image."""
    rows = [
        (
            prediction["image"],
            ", ".join(f"{entry['label']} {entry['probability']:.3f}" for entry in prediction["top"]),
            pathway_text(prediction["pathway"]),
        )
        for prediction in predictions
    ]
    console.show_table(title, ("image", "prediction", "pathway (expert of each MoE layer)"), rows)


def pathway_text(pathway: Sequence[int] | None) -> str:
    """The experts of all layers, without spaces where each has one digit."""
    if pathway is None:
        return "-"
    return ("" if max(pathway, default=0) < 10 else " ").join(map(str, pathway))


def show_csv(predicting: Predicting, paths: Sequence[Path]) -> None:
    """Print a header and one row per image as they come. label_2 is the second most probable class."""
    writer = csv_text.writer(sys.stdout, lineterminator="\n")  # before a bar on stderr takes stdout in
    endings = ["", *(f"_{rank}" for rank in range(2, predicting.top + 1))]
    writer.writerow(["image", *(name + ending for ending in endings for name in ("label", "probability")), "pathway"])
    with nullcontext() if sys.stdout.isatty() else data_progress() as progress:
        for prediction in predicting.of(paths, progress):
            ranked = (entry[name] for entry in prediction["top"] for name in ("label", "probability"))
            writer.writerow([prediction["image"], *ranked, " ".join(map(str, prediction["pathway"] or ()))])


def refusal(skipped: Mapping[Path, str], total: int) -> str:
    """The final line about images that could not be read."""
    if total == 1:
        return next(iter(skipped.values()))
    return f"{len(skipped)} of {total} images could not be read and were skipped"


def read_image(path: Path, metadata: ModelMetadata) -> NDArray[np.uint8]:
    """An image, from a file or from stdin, prepared like an image in an evaluation.

    JPEG and PNG are decoded as in data sets, other formats by Pillow. Rust resizes all of them to
    uint8 RGB [height, width, 3] of the model's size.

    Raises:
        DataError: The file is missing, cannot be decoded, or is too long and thin to be resized.
    """
    import numpy as np

    from advmoe import rust_router
    from advmoe.data.transforms import ResizeCenterCrop
    from advmoe.data.views import shown

    if path != STDIN and not path.is_file():
        raise DataError(f"no image file {path}")
    package, name = exporter(), "stdin" if path == STDIN else str(path)
    try:
        content = sys.stdin.buffer.read() if path == STDIN else path.read_bytes()
        if not content:
            raise DataError("it is empty")
        if content.startswith((b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n")):
            pixels = rust_router.decode_image(content)
        else:
            pixels = np.asarray(package.read_image(io.BytesIO(content) if path == STDIN else path))
    except package.InputError as error:
        raise DataError(str(error).replace("the upload", name, 1)) from error
    except (DataError, OSError) as error:
        raise DataError(f"{name} cannot be decoded as an image ({error}); expected a JPEG, PNG or the like") from error
    try:
        return shown(pixels, ResizeCenterCrop(size=metadata.image_size, resize=metadata.resize))
    except ConfigError as error:
        reason = str(error).removeprefix("image 0: ")  # the only one of its batch
        raise DataError(f"{name} cannot be resized as an image of the model: {reason}") from error
