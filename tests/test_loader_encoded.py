"""Encoded images: decoded and transformed as by Pillow and torchvision, from folders and packs."""

from __future__ import annotations

import io
import math
import os
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from sklearn.datasets import load_sample_images
from torchvision.io import ImageReadMode, decode_jpeg
from torchvision.transforms.v2 import functional as reference

from advmoe import rust_router
from advmoe.data.cache import packed
from advmoe.data.folders import image_folder
from advmoe.data.loader import BatchLoader, CropFlip
from advmoe.data.parquet import HubLayout
from advmoe.data.sets import DatasetInfo, EncodedSet
from advmoe.data.transforms import RandomResizedCrop, ResizeCenterCrop, Transform
from advmoe.errors import ConfigError, DataError

SEED, STREAM = 5, 1


@pytest.fixture(scope="module")
def photo() -> Image.Image:
    return Image.fromarray(load_sample_images().images[0]).resize((160, 120))


def encode(image: Image.Image, kind: str = "JPEG", **options: Any) -> bytes:
    out = io.BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


def in_folder(folder: Path, contents: list[bytes]) -> EncodedSet:
    """Images of one class, in order."""
    (folder / "class").mkdir(parents=True)
    for number, content in enumerate(contents):
        (folder / "class" / f"{number:04d}.jpg").write_bytes(content)
    return image_folder(folder)


def load(images: EncodedSet, transform: Transform | None = None, epoch: int = 0) -> NDArray[np.uint8]:
    """All images of an epoch, uint8 [n, H, W, 3]."""
    loader = BatchLoader(
        images, batch_size=3, augment=transform, dtype=torch.uint8, seed=SEED, stream=STREAM, channels_last=True
    )
    return torch.cat([batch.images for batch in loader.epoch(epoch)]).permute(0, 2, 3, 1).numpy()


def words(purpose: int, epoch: int, index: int, count: int) -> list[int]:
    philox = np.random.Philox(key=[SEED, STREAM], counter=[0, index, epoch, purpose])
    return [int(word) for word in philox.random_raw(count)]


def difference(a: NDArray[np.uint8], b: NDArray[np.uint8]) -> NDArray[np.int16]:
    return np.abs(a.astype(np.int16) - b.astype(np.int16))


@pytest.mark.filterwarnings("ignore:The image decoding:DeprecationWarning")
@pytest.mark.parametrize(
    ("mode", "options"),
    [
        ("RGB", {"quality": 90, "subsampling": 0}),
        ("RGB", {"quality": 75, "subsampling": 2}),
        ("RGB", {"quality": 90, "progressive": True}),
        ("RGB", {"quality": 90, "subsampling": 1, "restart_marker_rows": 1}),
        ("L", {"quality": 90}),
        ("CMYK", {"quality": 90}),
    ],
)
def test_jpeg_differs_from_libjpeg_by_rounding_only(
    photo: Image.Image, tmp_path: Path, mode: str, options: dict[str, Any]
) -> None:
    content = encode(photo.convert(mode), **options)
    (ours,) = load(in_folder(tmp_path, [content]))
    pillow = np.asarray(Image.open(io.BytesIO(content)).convert("RGB"))
    apart = difference(ours, pillow)
    # Color conversion of CMYK is rounded at more places.
    assert apart.max() <= (6 if mode == "CMYK" else 4)
    assert apart.mean() < 0.5
    if mode != "CMYK":  # torchvision's CMYK differs from Pillow's by more than a level itself
        data = torch.frombuffer(bytearray(content), dtype=torch.uint8)
        theirs = decode_jpeg(data, mode=ImageReadMode.RGB).permute(1, 2, 0).numpy()
        assert difference(ours, theirs).max() <= 4


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "LA", "P", "1", "I;16"])
def test_png_of_every_mode_is_what_pillow_shows(photo: Image.Image, tmp_path: Path, mode: str) -> None:
    if mode == "I;16":
        levels = np.asarray(photo.convert("L")).astype(np.uint16) * 257
        content, expected = encode(Image.fromarray(levels), "PNG"), photo.convert("L").convert("RGB")
    else:
        image = photo.convert(mode)
        content, expected = encode(image, "PNG"), image.convert("RGB")
    (ours,) = load(in_folder(tmp_path, [content]))
    np.testing.assert_array_equal(ours, np.asarray(expected))


def test_formats_are_told_by_content_and_exif_is_ignored(photo: Image.Image, tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # "turn by 90 degrees"
    (tmp_path / "class").mkdir()
    (tmp_path / "class" / "a.JPEG").write_bytes(encode(photo, "PNG"))
    (tmp_path / "class" / "b.png").write_bytes(encode(photo, quality=95, exif=exif))
    images = load(image_folder(tmp_path))
    np.testing.assert_array_equal(images[0], np.asarray(photo))
    assert difference(images[1], np.asarray(photo)).mean() < 4


def oracle_part(index: int, epoch: int, height: int, width: int, transform: RandomResizedCrop) -> tuple[int, ...]:
    """torchvision's RandomResizedCrop.get_params, one Philox block of area, ratio, top and left for each attempt."""
    draws = words(1, epoch, index, 40)
    for area_word, ratio_word, top, left in zip(*[iter(draws)] * 4, strict=True):
        unit = [(word >> 11) / 2**53 for word in (area_word, ratio_word)]
        area = height * width * (transform.scale[0] + (transform.scale[1] - transform.scale[0]) * unit[0])
        low, high = (math.log(ratio) for ratio in transform.ratio)
        ratio = math.exp(low + (high - low) * unit[1])
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            return (top * (height - h + 1)) >> 64, (left * (width - w + 1)) >> 64, h, w
    raise AssertionError("no attempt fits; choose another image")


def test_random_resized_crop_is_torchvisions_for_the_same_draws(photo: Image.Image, tmp_path: Path) -> None:
    source = in_folder(tmp_path, [encode(photo, "PNG")] * 12)
    transform = RandomResizedCrop(size=(48, 40))
    parts, mirrors = [], []
    for index, ours in enumerate(load(source, transform, epoch=2)):
        top, left, height, width = oracle_part(index, 2, 120, 160, transform)
        crop = photo.crop((left, top, left + width, top + height)).resize((40, 48), Image.Resampling.BILINEAR)
        mirrored = words(2, 2, index, 1)[0] >> 63
        expected = np.asarray(crop)[:, ::-1] if mirrored else np.asarray(crop)
        assert difference(ours, expected).max() <= 1  # fixed-point weights of another precision
        parts.append((top, left, height, width))
        mirrors.append(mirrored)
    assert len(set(parts)) == 12
    assert 0 < sum(mirrors) < 12


@pytest.mark.parametrize(
    ("mode", "options"),
    [
        ("RGB", {"subsampling": 0}),
        ("RGB", {"subsampling": 1}),
        ("RGB", {"subsampling": 2}),
        ("RGB", {"subsampling": 2, "restart_marker_blocks": 3}),
        ("RGB", {"subsampling": 2, "progressive": True}),
        ("L", {}),
        ("CMYK", {}),
    ],
)
def test_a_part_of_a_jpeg_is_that_of_the_whole_image(
    photo: Image.Image, tmp_path: Path, mode: str, options: dict[str, Any]
) -> None:
    # Decoding stops below the part. One part of sixteen ends with a row of blocks, where the next
    # one's color counts.
    content = encode(photo.convert(mode), quality=90, **options)

    class Whole:
        images = np.stack([rust_router.decode_image(content)] * 120)
        labels = np.zeros(120, dtype=np.int64)

    encoded = in_folder(tmp_path, [content] * 120)
    whole, part = (
        next(
            BatchLoader(source, batch_size=120, augment=RandomResizedCrop(size=40, scale=(0.02, 1.0)), seed=SEED).epoch(
                0
            )
        )
        for source in (Whole(), encoded)
    )
    assert torch.equal(whole.images, part.images)


def test_damage_below_the_part_that_is_shown_does_not_matter(photo: Image.Image, tmp_path: Path) -> None:
    # The upper half of the rows needs about half of the bytes, a part in it less than that.
    content = encode(photo, quality=90)
    cut = content[: 3 * len(content) // 4]
    transform = RandomResizedCrop(size=8, scale=(0.01, 0.02))
    tops = [oracle_part(index, 0, 120, 160, transform) for index in range(40)]
    upper = [index for index, (top, _, height, _) in enumerate(tops) if top + height < 60]
    lower = [index for index, (top, _, height, _) in enumerate(tops) if top + height > 112]
    assert upper
    assert lower
    source = in_folder(tmp_path, [cut] * 40)

    def shown(rows: list[int]) -> int:
        loader = BatchLoader(
            source,
            indices=np.array(rows),
            batch_size=1,
            augment=transform,
            seed=SEED,
            stream=STREAM,
            on_bad_image="skip",
        )
        return sum(len(batch.indices) for batch in loader.epoch(0))

    assert shown(upper) == len(upper)
    assert shown(lower) == 0


@pytest.mark.parametrize("interruption", ["scan", "comment"])
def test_a_jpeg_whose_scan_is_interrupted_does_not_show_the_image_before_it(
    photo: Image.Image, tmp_path: Path, interruption: str
) -> None:
    content = encode(photo.resize((64, 64)), quality=90)
    scan = content.index(b"\xff\xda")
    data = scan + 2 + int.from_bytes(content[scan + 2 : scan + 4])
    marker = {"scan": content[scan:data], "comment": b"\xff\xfe\x00\x04ab"}[interruption]
    bad = content[: data + 2 * (len(content) - data) // 5] + marker + b"\xff\xd9"
    red, green = (encode(Image.new("RGB", (64, 64), color)) for color in ("red", "green"))
    source = in_folder(tmp_path, [red, green, bad])
    for before in (0, 1):
        loader = BatchLoader(source, indices=np.array([before, 2]), batch_size=2, num_threads=1)
        with pytest.raises(DataError, match=r"0002.jpg at byte 0\): its data end before its last row"):
            next(loader.epoch(0))


@pytest.mark.parametrize("color", [(1, 254, 2), (254, 1, 252)])
def test_no_color_of_the_last_pixel_is_taken_for_a_missing_one(color: tuple[int, int, int]) -> None:
    # Before decoding, the last pixel has one of these colors, or one that differs by rounding.
    content = encode(Image.new("RGB", (16, 16), color), quality=100, subsampling=0)
    expected = np.full((16, 16, 3), color, dtype=np.uint8)
    assert difference(rust_router.decode_image(content), expected).max() <= 1


def test_padding_between_the_segments_of_a_jpeg_is_skipped_as_by_pillow(photo: Image.Image, tmp_path: Path) -> None:
    content = encode(photo, quality=90)
    scan = content.index(b"\xff\xda")
    padded = content[:scan] + bytes(7) + b"\xff" * 5 + content[scan:]
    (ours,) = load(in_folder(tmp_path, [padded]))
    pillow = np.asarray(Image.open(io.BytesIO(padded)).convert("RGB"))
    assert difference(ours, pillow).max() <= 4


@pytest.mark.parametrize("size", [(120, 160), (75, 50), (64, 64), (40, 33)])
def test_resize_and_center_crop_are_torchvisions(photo: Image.Image, tmp_path: Path, size: tuple[int, int]) -> None:
    image = photo.resize(size[::-1])
    (ours,) = load(in_folder(tmp_path, [encode(image, "PNG")]), ResizeCenterCrop(size=(32, 48), resize=64))
    resized = reference.resize(image, [64], interpolation=reference.InterpolationMode.BILINEAR)
    expected = np.asarray(reference.center_crop(resized, [32, 48]))
    assert difference(ours, expected).max() <= 1


def test_encoded_and_decoded_images_give_the_same_batches(photo: Image.Image, tmp_path: Path) -> None:
    images = [np.asarray(photo.rotate(30 * turn)) for turn in range(7)]
    encoded = in_folder(tmp_path, [encode(Image.fromarray(image), "PNG") for image in images])

    class Decoded:
        def __init__(self) -> None:
            self.images = np.stack(images)
            self.labels = np.zeros(7, dtype=np.int64)

    for transform in (None, CropFlip(), RandomResizedCrop(size=24), ResizeCenterCrop(size=24, resize=30)):
        expected = None
        for source in (Decoded(), encoded):
            for num_threads in (1, 2, 7):
                loader = BatchLoader(
                    source, batch_size=3, shuffle=True, augment=transform, seed=1, num_threads=num_threads
                )
                got = torch.cat([batch.images for batch in loader.epoch(0)])
                expected = got if expected is None else expected
                assert torch.equal(got, expected)


def parquet(path: Path, contents: list[bytes | None], labels: list[int]) -> None:
    images = [{"bytes": content, "path": None} for content in contents]
    pq.write_table(pa.table({"image": images, "label": labels}), path)


HUB = HubLayout(
    repository="nobody/nothing", folder="data", train="train", test="test", image_column="image", label_column="label"
)
LETTERS = DatasetInfo(
    name="letters", num_classes=2, class_names=("a", "b"), image_size=32, mean=(0, 0, 0), std=(1, 1, 1), eps=0.1
)


def test_a_pack_is_made_once_and_again_when_its_source_or_itself_changed(photo: Image.Image, tmp_path: Path) -> None:
    files = [tmp_path / "train-0.parquet", tmp_path / "train-1.parquet"]
    parquet(files[0], [encode(photo, "PNG")], [1])
    parquet(files[1], [encode(photo.rotate(90, expand=False), "PNG")], [0])
    pack = tmp_path / "train.pack"
    reports: list[tuple[int, int]] = []

    def again() -> EncodedSet:
        reports.clear()
        return packed(tuple(files), pack, HUB, LETTERS, progress=lambda _, *counts: reports.append(counts))

    first = again()
    assert reports == [(2, 2)]
    assert first.labels.tolist() == [1, 0]
    np.testing.assert_array_equal(load(first)[0], np.asarray(photo))
    again()
    assert reports == []
    parquet(files[1], [encode(photo, "PNG")] * 2, [0, 0])
    assert len(again()) == 3
    assert reports == [(3, 3)]
    pack.write_bytes(pack.read_bytes()[:-1])
    again()
    assert reports == [(3, 3)]
    os.utime(files[0], (1, 1))
    again()
    assert reports == [(3, 3)]
    assert {path.name for path in tmp_path.iterdir()} == {"train-0.parquet", "train-1.parquet", "train.pack"}


@pytest.mark.parametrize(
    ("contents", "labels", "message"),
    [
        ([b"x", None], [0, 0], r"train.parquet, row 1: the image is missing"),
        ([b"x", b""], [0, 0], r"train.parquet, row 1: the image is missing"),
        ([b"x", b"y"], [0, 2], r"train.parquet, .*label 2 of image 1 is out of range"),
    ],
)
def test_parquet_that_cannot_be_packed_leaves_no_pack(
    tmp_path: Path, contents: list[bytes | None], labels: list[int], message: str
) -> None:
    parquet(tmp_path / "train.parquet", contents, labels)
    with pytest.raises(DataError, match=message):
        packed((tmp_path / "train.parquet",), tmp_path / "pack", HUB, LETTERS)
    assert [path.name for path in tmp_path.iterdir()] == ["train.parquet"]


def test_parquet_that_is_none_is_named(tmp_path: Path) -> None:
    path = tmp_path / "train.parquet"
    with pytest.raises(DataError, match=r"cannot read .*train.parquet: No such file"):
        packed((path,), tmp_path / "pack", HUB, LETTERS)
    path.write_bytes(b"PAR1 and nothing else")
    with pytest.raises(DataError, match=r"train.parquet is truncated or not a parquet file; [^\n]+$"):
        packed((path,), tmp_path / "pack", HUB, LETTERS)
    pq.write_table(pa.table({"img": ["x"], "label": [0]}), path)
    with pytest.raises(DataError, match=r"has no column 'image': it has img, label"):
        packed((path,), tmp_path / "pack", HUB, LETTERS)


HOSTILE = (
    "empty",
    "zeros",
    "text",
    "gif",
    "jpeg cut in its header",
    "jpeg cut in its data",
    "jpeg cut at its end",
    "jpeg of 65,535 x 65,535 pixels",
    "jpeg without data",
    "png cut in its header",
    "png cut in its data",
    "png with a wrong checksum",
    "png bomb",
)


@pytest.fixture(scope="module")
def hostile(photo: Image.Image) -> dict[str, bytes]:
    """Files that are no images, or worse."""
    jpeg, png = encode(photo, quality=90), encode(photo, "PNG")
    frame = jpeg.index(b"\xff\xc0")  # marker, length (2), precision (1), height (2), width (2)
    giant_jpeg = jpeg[: frame + 5] + b"\xff\xff\xff\xff" + jpeg[frame + 9 :]
    bomb = io.BytesIO()
    Image.new("1", (8300, 8300)).save(bomb, "PNG")  # some 10 kB that would be 200 MB of RGB
    contents = (
        b"",
        bytes(1000),
        b"<html>404 Not Found</html>",
        b"GIF89a" + bytes(100),
        jpeg[:100],
        jpeg[: len(jpeg) // 2],
        jpeg[:-200],
        giant_jpeg,
        jpeg[: jpeg.index(b"\xff\xda")] + b"\xff\xd9",
        png[:20],
        png[: len(png) // 2],
        png[:40] + bytes([png[40] ^ 1]) + png[41:],
        bomb.getvalue(),
    )
    return dict(zip(HOSTILE, contents, strict=True))


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_file_is_named_with_its_row(
    photo: Image.Image, hostile: dict[str, bytes], tmp_path: Path, name: str
) -> None:
    source = in_folder(tmp_path, [encode(photo), hostile[name]])
    with pytest.raises(DataError, match=r"^image 1 \(.*0001.jpg at byte 0\): [^\n]+$"):
        load(source)


def test_bad_images_are_skipped_on_request_and_reported(
    photo: Image.Image, hostile: dict[str, bytes], tmp_path: Path
) -> None:
    bad = list(hostile.values())
    source = in_folder(tmp_path, [bad[0], encode(photo), *bad[1:], encode(photo)])
    loader = BatchLoader(source, batch_size=4, shuffle=True, on_bad_image="skip")
    batches = list(loader.epoch(0))
    assert sorted(int(index) for batch in batches for index in batch.indices) == [1, len(bad) + 1]
    assert all(len(batch.images) == len(batch.labels) == len(batch.indices) for batch in batches)
    assert sorted(loader.skipped) == [row for row in range(len(bad) + 2) if row not in (1, len(bad) + 1)]
    assert "0000.jpg" in loader.skipped[0]


def test_other_threads_of_python_run_while_an_image_is_decoded() -> None:
    content = encode(Image.new("RGB", (2000, 2000)))
    rust_router.decode_image(content)  # the first call imports modules, which releases the lock too
    began, ended = threading.Event(), threading.Event()

    def decode() -> None:
        began.set()
        rust_router.decode_image(content)
        ended.set()

    def decoding_is_seen() -> bool:
        began.clear()
        ended.clear()
        thread = threading.Thread(target=decode)
        thread.start()
        began.wait()
        seen = not ended.is_set()
        thread.join()
        return seen

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1000.0)  # a thread runs until it waits, ends or releases the lock by itself
    try:
        assert any(decoding_is_seen() for _ in range(50))
    finally:
        sys.setswitchinterval(interval)


def test_images_of_different_sizes_need_a_transform_that_resizes(photo: Image.Image, tmp_path: Path) -> None:
    source = in_folder(tmp_path, [encode(photo), encode(photo.resize((50, 60)))])
    with pytest.raises(ConfigError, match="expected images of 120x160, but image 1 is 60x50; resize them"):
        load(source)
    assert load(source, ResizeCenterCrop(size=32, resize=32)).shape == (2, 32, 32, 3)


def test_folders_without_images_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="expected a folder of class folders"):
        image_folder(tmp_path / "missing")
    (tmp_path / "class").mkdir()
    with pytest.raises(DataError, match=r"holds no JPEG or PNG images; expected .*/<class>/"):
        image_folder(tmp_path)


def test_a_file_that_goes_missing_is_named(photo: Image.Image, tmp_path: Path) -> None:
    source = in_folder(tmp_path, [encode(photo)])
    (tmp_path / "class" / "0000.jpg").unlink()
    with pytest.raises(DataError, match=r"image 0 \(.*0000.jpg at byte 0\): No such file"):
        load(source)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: CropFlip(padding=-1), "expected padding >= 0, got -1"),
        (lambda: RandomResizedCrop(size=0), "expected a size of 1 to 65535 pixels, got 0"),
        (lambda: RandomResizedCrop(scale=(0.5, 0.1)), "expected rising scale"),
        (lambda: ResizeCenterCrop(size=224, resize=200), "expected resize from 224 to 65535, got 200"),
        (lambda: rust_router.PackWriter("/nowhere/x.pack"), "cannot write /nowhere/x.pack"),
    ],
)
def test_what_cannot_be_done_is_refused(make: object, message: str) -> None:
    with pytest.raises((ConfigError, DataError), match=message):
        make()  # type: ignore[operator]
