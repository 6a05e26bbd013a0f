"""`advmoe evaluate`, `advmoe predict` and readers of the metadata get the same pixels from an image file."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image, ImageOps

from advmoe.cli.app import main
from advmoe.cli.predict import read_image
from advmoe.data.folders import image_folder
from advmoe.data.loader import BatchLoader
from advmoe.data.pictures import SUFFIXES
from advmoe.data.sources import shorter_side
from advmoe.data.transforms import RandomResizedCrop
from advmoe.data.views import in_memory
from advmoe.errors import AdvMoEError, DataError
from advmoe.models.network import RoutedNetwork
from advmoe.training.checkpoint import Checkpoint, save_checkpoint

export = pytest.importorskip("advmoe_export")
pytest.importorskip("onnxruntime")

SIZE = 16


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An image folder of one class with images of several sizes and formats."""
    folder = tmp_path_factory.mktemp("pictures")
    (folder / "class").mkdir()
    rng = np.random.default_rng(0)
    for number, (size, name, mode) in enumerate(
        [
            ((90, 60), "png", "RGB"),
            ((31, 77), "jpg", "RGB"),
            ((40, 40), "png", "L"),
            ((9, 12), "png", "RGBA"),
            ((64, 51), "jpg", "CMYK"),
        ]
    ):
        coarse = Image.fromarray(rng.integers(0, 256, (7, 5, 3), dtype=np.uint8))
        coarse.resize(size, Image.Resampling.BICUBIC).convert(mode).save(folder / "class" / f"{number}.{name}")
    levels = rng.integers(0, 65536, (30, 20), dtype=np.uint16)
    Image.fromarray(levels).save(folder / "class" / "5.png")
    return folder


@pytest.fixture(scope="module")
def model_file(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> tuple[Any, Path]:
    model = request.getfixturevalue("small_moe")()
    path = tmp_path_factory.mktemp("model") / "model.onnx"
    labels = [str(number) for number in range(10)]
    export.export_model(model, path, image_size=SIZE, labels=labels, resize=shorter_side("folder", SIZE))
    return model, path


def test_prediction_and_evaluation_show_a_model_the_same_pixels(pictures: Path, model_file: tuple[Any, Path]) -> None:
    model, path = model_file
    evaluated = in_memory(image_folder(pictures), SIZE).images
    session = export.Session(path)
    predicted = np.stack([read_image(file, session.metadata) for file in sorted((pictures / "class").iterdir())])
    np.testing.assert_array_equal(predicted, evaluated)
    with torch.no_grad():
        logits = model(torch.from_numpy(evaluated.transpose(0, 3, 1, 2) / np.float32(255)))
    np.testing.assert_allclose(session.run(predicted).logits, logits, atol=1e-5 * float(logits.abs().max()))


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_training_prediction_and_serving_ignore_the_orientation_that_a_camera_noted(
    kind: str, model_file: tuple[Any, Path], tmp_path: Path
) -> None:
    note = Image.Exif()
    note[0x0112] = 6  # "turn by 90 degrees to the right"
    coarse = Image.fromarray(np.random.default_rng(3).integers(0, 256, (5, 7, 3), dtype=np.uint8))
    photo = coarse.resize((40, 30), Image.Resampling.BICUBIC)
    plain, turned = (tmp_path / name / "class" / "photo.jpg" for name in ("plain", "turned"))
    for file, options in ((plain, {}), (turned, {"exif": note})):
        file.parent.mkdir(parents=True)
        photo.save(file, kind, **options)
    metadata = export.Session(model_file[1]).metadata

    def trained_on(file: Path) -> torch.Tensor:
        crop = RandomResizedCrop(size=SIZE)
        (batch,) = BatchLoader(image_folder(file.parent.parent), batch_size=1, augment=crop).epoch(0)
        return batch.images

    ways: list[Callable[[Path], Any]] = [
        trained_on,
        lambda file: in_memory(image_folder(file.parent.parent), SIZE).images,
        lambda file: read_image(file, metadata),
        lambda file: export.prepare(file, metadata),
        lambda file: export.prepare(Image.open(file), metadata),
    ]
    for way in ways:
        np.testing.assert_array_equal(way(plain), way(turned))
    with Image.open(turned) as opened:  # the note is there, and matters to a program that follows it
        upright = export.prepare(ImageOps.exif_transpose(opened), metadata)
    assert (upright != export.prepare(turned, metadata)).any()


def test_the_metadata_alone_tell_how_to_prepare_an_image(pictures: Path, model_file: tuple[Any, Path]) -> None:
    metadata = export.Session(model_file[1]).metadata
    assert metadata.resize == 18  # 8/7 of 16, as 256 is of 224

    def apart(a: NDArray[np.uint8], b: NDArray[np.uint8]) -> int:
        return int(np.abs(a.astype(int) - b.astype(int)).max())

    for file in sorted((pictures / "class").iterdir()):
        ours, theirs = read_image(file, metadata), export.prepare(file, metadata)
        # Two passes of 8-bit rounding; decoders of JPEG differ by up to 4 levels, of CMYK by 6.
        assert apart(ours, theirs) <= (1 if file.suffix == ".png" else 7), file
    with Image.open(pictures / "class" / "0.png") as image:
        np.testing.assert_array_equal(export.prepare(image, metadata), export.prepare(np.asarray(image), metadata))


def test_images_of_the_models_size_are_not_touched(model_file: tuple[Any, Path], tmp_path: Path) -> None:
    pixels = np.random.default_rng(1).integers(0, 256, (SIZE, SIZE, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "image.png")
    path = tmp_path / "model.onnx"
    export.export_model(model_file[0], path, image_size=SIZE, labels=[str(number) for number in range(10)])
    metadata = export.Session(path).metadata
    assert metadata.resize == shorter_side("cifar10", SIZE) == shorter_side(None, SIZE) == SIZE
    np.testing.assert_array_equal(read_image(tmp_path / "image.png", metadata), pixels)
    np.testing.assert_array_equal(export.prepare(pixels, metadata), pixels)


def test_export_writes_the_preparation_of_the_data_set_it_was_trained_on(
    tiny_vgg: Callable[..., RoutedNetwork], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Enough(export.ExportError):  # type: ignore[misc, name-defined]
        pass

    def recorded(*_: Any, **settings: Any) -> None:
        raise Enough(f"resize={settings['resize']}")

    monkeypatch.setattr(export, "export_model", recorded)
    model = tiny_vgg()
    for dataset, resize in (("folder", 37), ("cifar10", 32)):  # 8/7 of 32 is 36.6
        contents = Checkpoint(model=model.config, weights=model.state_dict(), train={"dataset": dataset})
        save_checkpoint(tmp_path / "model.pt", contents)
        messages: list[str] = []
        monkeypatch.setattr("advmoe.cli.console.fail", messages.append)
        assert main(["export", str(tmp_path / "model.pt"), str(tmp_path / "model.onnx")]) == 1
        assert messages == [f"resize={resize}"]


def test_other_formats_are_read_and_files_that_are_no_images_are_named(
    model_file: tuple[Any, Path], tmp_path: Path
) -> None:
    metadata = export.Session(model_file[1]).metadata
    color = np.full((40, 30, 3), (200, 10, 40), np.uint8)
    Image.fromarray(color).save(tmp_path / "image.webp", lossless=True)
    np.testing.assert_array_equal(read_image(tmp_path / "image.webp", metadata), color[:SIZE, :SIZE])
    (tmp_path / "text.jpg").write_text("not an image")
    (tmp_path / "cut.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    for name, read in (("text.jpg", export.prepare), ("cut.png", export.prepare), ("gone.png", export.prepare)):
        with pytest.raises(export.InputError, match=name):
            read(tmp_path / name, metadata)
    with pytest.raises(DataError, match=r"no image file .*gone.png"):
        read_image(tmp_path / "gone.png", metadata)
    with pytest.raises(DataError, match=r"cut.png cannot be decoded as an image"):
        read_image(tmp_path / "cut.png", metadata)
    with pytest.raises(export.InputError, match=r"expected uint8 RGB pixels .*, got float64 \[4, 4\]"):
        export.prepare(np.zeros((4, 4)), metadata)


def test_an_image_that_grows_beyond_the_limit_is_refused_before_it_is_resized(
    model_file: tuple[Any, Path], tmp_path: Path
) -> None:
    from advmoe_export.errors import TooManyPixelsError

    metadata = export.Session(model_file[1]).metadata
    # One row becomes 18 rows, so 2^26 / 18^2 = 207,126.3 columns reach the limit, which Rust has too.
    for size, read in (((207_127, 1), export.prepare), ((1, 207_127), export.prepare), ((207_127, 1), read_image)):
        Image.new("L", size).save(tmp_path / "line.png")
        with pytest.raises((TooManyPixelsError, AdvMoEError), match=r"would be resized to .*67108864 pixels"):
            read(tmp_path / "line.png", metadata)
    Image.new("L", (2000, 1)).save(tmp_path / "line.png")
    assert export.prepare(tmp_path / "line.png", metadata).shape == (SIZE, SIZE, 3)


def test_the_formats_read_are_those_that_folders_select(tmp_path: Path) -> None:
    from advmoe_export.preparation import FORMATS

    endings = Image.registered_extensions()
    assert {endings[suffix] for suffix in SUFFIXES} == set(FORMATS)
    # Pillow starts Ghostscript for EPS, and decodes the image in an ICO before its size can be checked.
    (tmp_path / "image.png").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 40 40\n%%EndComments\n%%EOF\n")
    Image.new("RGB", (16, 16)).save(tmp_path / "icon.png", "ICO")
    for name in ("image.png", "icon.png"):
        with pytest.raises(
            export.InputError, match=f"{name} .* none of the formats.; expected one of: JPEG, PNG, WEBP"
        ):
            export.read_image(tmp_path / name)


def test_a_jpeg_of_very_many_scans_is_not_decoded() -> None:
    content = io.BytesIO()
    Image.new("L", (64, 64)).save(content, "JPEG", progressive=True)
    whole = content.getvalue()
    last, end = whole.rfind(b"\xff\xda"), whole.rfind(b"\xff\xd9")
    many = whole[:end] + 100 * whole[last:end] + whole[end:]
    with pytest.raises(export.InputError, match="the upload is a JPEG of more than 100 scans"):
        export.read_image(io.BytesIO(many))
    # 0xFFDA in a thumbnail and after the end of the image is no scan of it.
    thumbnail = b"\xff\xe1" + (2 + 400).to_bytes(2, "big") + 200 * b"\xff\xda"
    assert export.read_image(io.BytesIO(whole[:2] + thumbnail + whole[2:] + 200 * b"\xff\xda")).size == (64, 64)


def jpeg(mode: str = "RGB", **options: Any) -> bytes:
    """A photograph-like JPEG of 40 x 30 pixels."""
    content = io.BytesIO()
    coarse = Image.fromarray(np.random.default_rng(2).integers(0, 256, (5, 6, 3), dtype=np.uint8))
    coarse.resize((40, 30), Image.Resampling.BICUBIC).convert(mode).save(content, "JPEG", **options)
    return content.getvalue()


def segment(marker: int, content: bytes) -> bytes:
    return bytes([0xFF, marker]) + (2 + len(content)).to_bytes(2, "big") + content


EXIF = segment(0xE1, b"Exif\0\0" + 20 * b"x")


@pytest.mark.parametrize(
    ("mode", "options"),
    [
        ("RGB", {}),
        ("RGB", {"keep_rgb": True}),
        ("RGB", {"progressive": True, "subsampling": 2}),
        ("RGB", {"restart_marker_blocks": 2, "comment": b"a remark", "exif": Image.Exif()}),
        ("RGB", {"icc_profile": 100_000 * b"p"}),
        ("L", {}),
        ("CMYK", {}),
    ],
)
def test_the_pixels_of_a_jpeg_do_not_depend_on_its_remarks(mode: str, options: dict[str, Any]) -> None:
    content = jpeg(mode, **options)
    with Image.open(io.BytesIO(content)) as plain:
        expected = np.asarray(plain.convert("RGB"))
    np.testing.assert_array_equal(np.asarray(export.read_image(io.BytesIO(content))), expected)


def test_a_jpeg_is_handed_on_without_exif_data_wherever_they_hide(monkeypatch: pytest.MonkeyPatch) -> None:
    content = jpeg()
    handed: list[bytes] = []
    opened = Image.open

    def spied(file: Any, **options: Any) -> Any:
        handed.append(file.getvalue())
        return opened(file, **options)

    monkeypatch.setattr("PIL.Image.open", spied)
    hidden = (
        content[:2] + 3 * EXIF + content[2:],
        content[:2] + b"junk" + EXIF + content[2:],
        content[:2] + segment(0xF0, EXIF) + content[2:],  # Pillow does not skip this kind of segment
        content[:2] + b"\xff\xd0" + EXIF + content[2:],  # a marker without a length
        content + EXIF,
    )
    for several in hidden:
        assert export.read_image(io.BytesIO(several)).size == (40, 30)
    assert handed == len(hidden) * [content]
    # after its end, a JPEG has nothing that could be decoded
    with pytest.raises(export.InputError, match="cannot be decoded"):
        export.read_image(io.BytesIO(content[:2] + b"\xff\xd9" + EXIF + content[2:]))
    assert handed[-1] == b"\xff\xd8\xff\xd9"


def test_a_jpeg_of_very_many_segments_or_of_half_of_its_bytes_is_refused() -> None:
    content = jpeg()
    with pytest.raises(export.InputError, match="the upload is a JPEG of more than 10000 segments"):
        export.read_image(io.BytesIO(content[:2] + 10_001 * EXIF + content[2:]))
    for length in (2, 3, 20, len(content) // 2):
        with pytest.raises(export.InputError, match="cannot be decoded as an image"):
            export.read_image(io.BytesIO(content[:length]))


def test_all_depths_of_gray_look_alike_and_32_bits_are_refused(tmp_path: Path) -> None:
    levels = np.arange(0, 65536, 4369, dtype=np.uint16).reshape(4, 4)  # 0, 0x1111, ..., 0xffff
    eight = (levels >> 8).astype(np.uint8)
    Image.fromarray(levels).save(tmp_path / "deep.png")
    Image.fromarray(eight).save(tmp_path / "gray.pgm")
    (tmp_path / "deep.pgm").write_bytes(b"P5 4 4 65535\n" + levels.astype(">u2").tobytes())
    for name in ("deep.png", "gray.pgm", "deep.pgm"):
        assert np.array_equal(np.asarray(export.read_image(tmp_path / name)), np.repeat(eight[..., None], 3, axis=2))
    for dtype in (np.int32, np.float32):
        Image.fromarray(levels.astype(dtype)).save(tmp_path / "deeper.tif")
        with pytest.raises(export.InputError, match="at most 16 bits per channel, got 32"):
            export.read_image(tmp_path / "deeper.tif")
