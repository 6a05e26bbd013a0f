"""Image folders, ImageNet and TinyImageNet, as small copies in the exact form of the originals."""

import copy
import hashlib
import io
import json
import os
import pickle
import re
import shutil
import threading
import time
import zipfile
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from advmoe import rust_router
from advmoe.data.cache import packed
from advmoe.data.folders import image_folder
from advmoe.data.imagenet import IMAGENET, load_imagenet
from advmoe.data.loader import BatchLoader
from advmoe.data.pictures import find_pictures
from advmoe.data.sets import Progress
from advmoe.data.sources import Dataset, EncodedSet, dataset_info, load_dataset
from advmoe.data.tiny_imagenet import TINY_IMAGENET, TinyImageNet, load_tiny_imagenet
from advmoe.data.transforms import CropFlip, RandomResizedCrop
from advmoe.data.views import in_memory, training_transform
from advmoe.errors import DataError

WNIDS = ("n01440764", "n01443537", "n02084071")
rng = np.random.default_rng(0)


def encoded(side: int = 64, mode: str = "RGB", kind: str = "PNG") -> bytes:
    pixels = rng.integers(0, 256, (side, side, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).convert(mode).save(buffer, kind)
    return buffer.getvalue()


def decoded(content: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(content)).convert("RGB"))


def write(root: Path, files: dict[str, bytes]) -> Path:
    for name, content in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(content)
    return root


def everything(root: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in root.rglob("*") if path.is_file()}


# Any image folder


PETS = {
    "train/dog/2.png": encoded(),
    "train/dog/1.JPG": encoded(kind="JPEG"),
    "train/cat/deep/er/9.jpeg": encoded(kind="JPEG"),
    "train/cat/notes.txt": b"not an image",
    "train/cat/.hidden.png": b"",
    "val/cat/1.png": encoded(),
}


def test_reads_any_image_folder_where_it_lies(tmp_path: Path) -> None:
    before = everything(write(tmp_path, PETS))
    dataset = load_dataset("folder", tmp_path)
    train, test = dataset.train, dataset.test
    assert isinstance(train, EncodedSet)
    assert isinstance(test, EncodedSet)
    assert dataset.info.class_names == train.class_names == ("cat", "dog")
    assert dataset.info.num_classes == 2
    assert train.labels.tolist() == [0, 1, 1]  # classes by sorted name, and files sorted within
    names = ("train/cat/deep/er/9.jpeg", "train/dog/1.JPG", "train/dog/2.png")
    assert train.files == tuple(str(tmp_path / name) for name in names)
    assert (test.labels.tolist(), test.files) == ([0], (str(tmp_path / "val/cat/1.png"),))
    assert everything(tmp_path) == before


def test_the_classes_of_a_folder_are_known_before_its_images_are_read(tmp_path: Path) -> None:
    assert dataset_info("folder", write(tmp_path, PETS)).class_names == ("cat", "dog")


@pytest.mark.parametrize("name", ["validation", "valid", "test"])
def test_the_validation_folder_may_have_other_names(tmp_path: Path, name: str) -> None:
    write(tmp_path, PETS)
    (tmp_path / "val").rename(tmp_path / name)
    assert len(load_dataset("folder", tmp_path).test) == 1


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (
            {"val/cat/1.png": None},
            r"has no folder val \(validation or valid or test\); there are train; expected train/<class>/\*.jpg",
        ),
        ({name: None for name in PETS if name.startswith("train")}, "has no folder train; there are val; expected"),
        ({"train/stray.png": b"x"}, r"train/stray\.png lies outside the class folders; move it to"),
        ({"val/cow/1.png": b"x"}, "val/cow is a class that the training images do not have"),
        (
            {"train/dog/1.JPG": None, "train/dog/2.png": None, "train/dog/a.webp": b"x"},
            r"train/dog holds no JPEG or PNG images; add some, or delete the folder; the files there are 1 \.webp",
        ),
        (
            {"train/cat/deep/er/9.jpeg": None, "train/cat/notes.txt": None, "train/cat/.hidden.png": None},
            "has the class folder dog only",
        ),
        ({"val/cat/1.png": None, "val/cat/1.webp": b"x"}, "val holds no JPEG or PNG images"),
    ],
)
def test_refuses_folders_that_do_not_fit(tmp_path: Path, changed: dict[str, bytes | None], message: str) -> None:
    write(tmp_path, {name: content for name, content in {**PETS, **changed}.items() if content is not None})
    with pytest.raises(DataError, match=message):
        load_dataset("folder", tmp_path)


def test_a_link_that_leads_back_is_refused(tmp_path: Path) -> None:
    write(tmp_path, PETS)
    (tmp_path / "train/cat/all").symlink_to(tmp_path)  # train/cat/all/train/dog/1.JPG would be a cat
    with pytest.raises(DataError, match=r"train/cat/all/train and .*/train are one folder, by a link; remove the link"):
        load_dataset("folder", tmp_path)


def test_a_folder_linked_twice_is_refused_and_once_is_followed(tmp_path: Path) -> None:
    write(tmp_path / "data", PETS)
    (tmp_path / "data/train/dog").rename(tmp_path / "elsewhere")
    (tmp_path / "data/train/dog").symlink_to(tmp_path / "elsewhere")
    assert load_dataset("folder", tmp_path / "data").train.labels.tolist() == [0, 1, 1]
    (tmp_path / "data/train/cow").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(DataError, match=r"train/dog and .*/train/cow are one folder"):
        load_dataset("folder", tmp_path / "data")


def test_the_training_images_are_no_test_images(tmp_path: Path) -> None:
    write(tmp_path, {name: content for name, content in PETS.items() if name.startswith("train")})
    (tmp_path / "val").symlink_to("train")
    with pytest.raises(DataError, match=r"/val and .*/train are one folder, by a link"):
        load_dataset("folder", tmp_path)


@pytest.mark.parametrize(
    ("link", "target"),
    [
        ("val/dog", "../train/dog"),
        ("val/cat/more", "../../train/cat/deep"),
        ("val/dog", "../train"),
        ("train/cow", "../val/cat"),
    ],
)
def test_a_class_of_one_split_is_not_linked_into_the_other(tmp_path: Path, link: str, target: str) -> None:
    (write(tmp_path, PETS) / link).symlink_to(target)
    with pytest.raises(DataError, match=r"/val/.* and .*/train.* are one folder, by a link"):
        load_dataset("folder", tmp_path)


def test_splits_may_be_links_to_different_folders(tmp_path: Path) -> None:
    write(tmp_path, PETS)
    for split in ("train", "val"):
        (tmp_path / split).rename(tmp_path / f"the-{split}")
        (tmp_path / split).symlink_to(f"the-{split}")
    dataset = load_dataset("folder", tmp_path)
    assert (len(dataset.train), len(dataset.test)) == (3, 1)


def test_splits_may_be_written_in_capitals_if_only_one_folder_is_meant(tmp_path: Path) -> None:
    write(tmp_path, PETS)
    (tmp_path / "train").rename(tmp_path / "Train")
    (tmp_path / "val").rename(tmp_path / "Valid")
    dataset = load_dataset("folder", tmp_path)
    assert (len(dataset.train), len(dataset.test)) == (3, 1)
    assert "not read" not in dataset.info.notes[1].split("PNG: ")[1]
    (tmp_path / "TEST").mkdir()
    with pytest.raises(DataError, match=r"has no folder val .*; several may be meant: TEST, Valid; expected"):
        load_dataset("folder", tmp_path)


def test_links_to_images_that_are_gone_are_found_when_the_folder_is_listed(tmp_path: Path) -> None:
    write(tmp_path, PETS)
    (tmp_path / "train/dog/0.png").symlink_to("nowhere.png")
    (tmp_path / "train/dog/4.png").symlink_to("2.png")
    (tmp_path / "val/cat/old").symlink_to("nowhere")  # not an image
    info = dataset_info("folder", tmp_path)
    assert info.gone == (str(tmp_path / "train/dog/0.png"),)


def test_hidden_folders_hold_no_images(tmp_path: Path) -> None:
    hidden = (".ipynb_checkpoints/x.png", "cat/.ipynb_checkpoints/0-checkpoint.png", "dog/deep/.thumbs/1.png")
    write(tmp_path, PETS | {f"train/{name}": b"x" for name in hidden})
    assert len(load_dataset("folder", tmp_path).train) == 3
    (tmp_path / "train/cat/.twice").symlink_to("../dog")  # nor does it matter where a hidden link leads
    assert len(load_dataset("folder", tmp_path).train) == 3


@pytest.mark.parametrize(
    ("pattern", "meant"),
    [
        ("", ["a/1.png", "a/deep/2.png"]),
        ("*", ["a/1.png", "a/deep/2.png"]),
        ("**/*.png", ["a/1.png", "a/deep/2.png"]),
        ("a/.*", ["a/.thumbs/1.png"]),
        ("a/.thumbs", ["a/.thumbs/1.png"]),
        (".away/../a/*.png", ["a/1.png"]),
    ],
)
def test_pictures_in_hidden_folders_are_meant_only_by_name(tmp_path: Path, pattern: str, meant: list[str]) -> None:
    names = ("a/1.png", "a/deep/2.png", "a/.thumbs/1.png", ".away/3.png", ".4.png")
    write(tmp_path, dict.fromkeys(names, b""))
    assert [path.resolve() for path in find_pictures([tmp_path / pattern])] == [tmp_path / name for name in meant]


@pytest.mark.parametrize(
    ("sides", "gpu", "expected"),
    [
        ([20, 20, 500], True, 32),  # no size enlarges images less
        ([95, 95, 500], True, 64),
        ([96, 96, 500], True, 96),
        ([500, 500, 20], True, 224),
        ([500, 500, 20], False, 64),
        ([40, 40, 500], False, 32),
    ],
)
def test_the_size_follows_the_median_image_and_the_machine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sides: list[int], gpu: bool, expected: int
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: gpu)
    files = {f"train/{'ab'[n % 2]}/{n}.png": encoded(side) for n, side in enumerate(sides)}
    write(tmp_path, files | {"train/a/bad.png": b"not an image", "val/a/1.png": encoded()})
    info = dataset_info("folder", tmp_path)
    assert info.image_size == expected
    assert f"the default image size is {expected}" in info.notes[0]
    assert ("slow without a GPU" in info.notes[0]) == (expected < 224 and not gpu and sides[0] == 500)
    info.check_image_size(123)  # any other may be asked for


def test_few_and_unequal_images_are_pointed_out(tmp_path: Path) -> None:
    image = encoded(8)

    def notes(cats: int, dogs: int, tested: int) -> tuple[str, ...]:
        shutil.rmtree(tmp_path, ignore_errors=True)
        counts = {"train/cat": cats, "train/dog": dogs, "val/cat": tested - 1, "val/dog": 1}
        write(tmp_path, {f"{place}/{n}.png": image for place, count in counts.items() for n in range(count)})
        return dataset_info("folder", tmp_path).warnings

    few, unequal, tested = notes(9, 90, 25)
    assert few.startswith("fewer than 100 training images of cat (9), dog (90); ")
    assert unequal.startswith("class dog has 90 training images, 10 times as many as cat (9) or more; ")
    assert unequal.endswith("about the small class")
    assert tested == "accuracy on 25 test images has a standard error of up to 10.0 points"  # sqrt(0.5 * 0.5 / 25)
    assert notes(100, 101, 200) == ()
    shutil.rmtree(tmp_path / "val/dog")
    assert dataset_info("folder", tmp_path).warnings[0] == "no test images of dog: accuracies leave this class out"


def test_all_classes_that_a_warning_is_about_are_told(tmp_path: Path) -> None:
    image = encoded(8)
    write(tmp_path, {f"train/big/{number}.png": image for number in range(100)})
    write(tmp_path, {f"train/{name}/0.png": image for name in "abcdefg"} | {"val/big/0.png": image})
    few, unequal, missing, _ = dataset_info("folder", tmp_path).warnings
    small = "a (1), b (1), c (1), d (1), e (1) and 2 more"
    assert few.startswith(f"fewer than 100 training images of {small}; ")
    assert unequal.startswith(f"class big has 100 training images, 10 times as many as {small} or more; ")
    assert unequal.endswith("about the small classes")
    assert missing == "no test images of a, b, c, d, e and 2 more: accuracies leave these classes out"


def test_what_a_folder_holds_is_told_and_what_is_not_read(tmp_path: Path) -> None:
    write(tmp_path, PETS)
    there = "3 training and 1 test images of 2 classes; not read, since they are not JPEG or PNG: "
    assert dataset_info("folder", tmp_path).notes[1] == f"{there}1 .txt"
    write(tmp_path, {"val/dog/a.WEBP": b"", "train/dog/b.webp": b"", "train/.git/c.heic": b""})
    assert dataset_info("folder", tmp_path).notes[1] == f"{there}2 .webp, 1 .txt"
    write(tmp_path, {"test/dog/a.png": b""})
    told = dataset_info("folder", tmp_path).notes[1]
    assert told == f"{there}2 .webp, 1 .txt; the test images are those of val, and test is not read"


def test_no_file_that_is_not_read_is_left_out_of_the_count(tmp_path: Path) -> None:
    write(tmp_path, PETS | {f"train/cat/{n}.{kind}": b"" for kind in ("gif", "bmp", "tif", "heic") for n in range(3)})
    write(tmp_path, {f"train/dog/{n}.webp": b"" for n in range(2)} | {"train/dog/a.svg": b"", "val/cat/b.psd": b""})
    told = dataset_info("folder", tmp_path).notes[1]
    # one text is there from the start, so that three files have the three rarest endings
    assert told.endswith("are not JPEG or PNG: 3 .bmp, 3 .gif, 3 .heic, 3 .tif, 2 .webp, 3 with 3 other endings")


def test_each_folder_is_listed_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # a million files on a network drive take minutes
    write(tmp_path, PETS)
    seen: list[str] = []
    scan = os.scandir

    def noted(place: Path | str) -> Any:
        seen.append(str(place))
        return scan(place)

    monkeypatch.setattr(os, "scandir", noted)
    load_dataset("folder", tmp_path)
    classes = [f"{tmp_path}/{name}" for name in ("train/cat", "train/cat/deep", "train/cat/deep/er", "train/dog")]
    # the names of the classes are read first
    assert seen == [f"{tmp_path}/train", f"{tmp_path}/train", *classes, f"{tmp_path}/val", f"{tmp_path}/val/cat"]


def test_images_of_ones_own_need_their_folder() -> None:
    with pytest.raises(DataError, match=r"needs the folder of your images") as caught:
        dataset_info("folder")
    assert caught.value.options == ("data_dir",)


# Encoded sets


def spans(tmp_path: Path, **changed: object) -> EncodedSet:
    contents = [encoded(8) for _ in range(3)]
    (tmp_path / "packed").write_bytes(b"".join(contents))
    first, second, _ = (len(content) for content in contents)
    arrays = {
        "file_index": [0, 0, 0],
        "offsets": [0, first, first + second],
        "lengths": [first, second, 0],  # 0: to the end of the file
        "labels": [0, 1, 0],
        **changed,
    }
    return EncodedSet(
        files=(str(tmp_path / "packed"),),
        class_names=("even", "odd"),
        **{name: np.asarray(values) for name, values in arrays.items()},
    )


@pytest.mark.parametrize(
    ("start", "told"),
    [
        (b"RIFF\x10\x00\x00\x00WEBPVP8 ", "got WebP; convert it to JPEG or PNG"),
        (b"\x00\x00\x00\x18ftypheic", "got HEIC; convert it"),
        (b"\x00\x00\x00\x1cftypavif", "got AVIF; convert it"),
        (b"GIF89a", "got GIF; convert it"),
        (b"BM\x36\x00", "got BMP; convert it"),
        (b"II*\x00", "got TIFF; convert it"),
        (b"\x00\x00\x00\x0cJXL \x0d\x0a", "got JPEG XL; convert it"),
        (b"%PDF-1.7", "got PDF; convert it"),
        (b"\n <!DOCTYPE html>", "got an HTML page, perhaps a failed download; download the image again"),
        (b"RIFF\x10\x00\x00\x00WAVE", r"got bytes that begin with \[52, 49, 46, 46\]"),
    ],
)
def test_the_format_of_a_file_that_is_no_image_is_told(tmp_path: Path, start: bytes, told: str) -> None:
    write(tmp_path, {"a/0.png": encoded(8), "a/1.jpg": start + bytes(30)})
    images = image_folder(tmp_path)
    with pytest.raises(DataError, match=rf"image 1 \(.*/a/1\.jpg .*: expected JPEG or PNG, {told}"):
        in_memory(images, 8)
    reasons: dict[int, str] = {}
    in_memory(images, 8, skip_bad_images=True, skipped=reasons)
    assert re.search(rf"expected JPEG or PNG, {told}", reasons[1])


def test_an_encoded_set_comes_into_memory_at_the_size_asked_for(tmp_path: Path) -> None:
    whole = spans(tmp_path)
    same_size = in_memory(whole, 7)  # shorter side 8, as it is; the middle 7 of 8 begin at row and column 0 or 1
    raw = (tmp_path / "packed").read_bytes()
    first = decoded(raw[: whole.lengths[0]])
    windows = [first[top : top + 7, left : left + 7] for top in (0, 1) for left in (0, 1)]
    assert any(np.array_equal(same_size.images[0], window) for window in windows)
    assert same_size.labels.tolist() == [0, 1, 0]
    assert same_size.class_names == ("even", "odd")
    assert in_memory(same_size, 7) is same_size
    np.testing.assert_array_equal(in_memory(whole.take(np.array([2, 0])), 7).images, same_size.images[[2, 0]])


def test_a_file_that_has_shrunk_is_named(tmp_path: Path) -> None:
    whole = spans(tmp_path)
    (tmp_path / "packed").write_bytes(b"short")
    with pytest.raises(DataError, match=r"image 0 \(.*packed at byte 0\)"):
        in_memory(whole, 7)


@pytest.mark.parametrize("bad", [[0], [2], [0, 1, 2, 5]])
def test_progress_counts_skipped_images_and_ends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bad: list[int]
) -> None:
    monkeypatch.setattr("advmoe.data.views.BatchLoader", partial(BatchLoader, prefetch=0))
    files = {f"a/{n:04d}.png": b"x" if n in bad else encoded(8) for n in range(300)}
    files |= {f"a/{n:04d}.png": b"x" for n in range(256, 300) if len(bad) > 1}  # all of the second and last batch
    calls: list[tuple[str, int, int]] = []
    images = image_folder(write(tmp_path, files))
    found = in_memory(images, 8, skip_bad_images=True, progress=lambda *call: calls.append(call))
    assert len(found) == 300 - sum(content == b"x" for content in files.values())
    assert calls == [("decoding images", done, 300) for done in (256, 300)]


def test_an_encoded_set_is_copied_and_pickled_after_it_was_read(tmp_path: Path) -> None:
    whole = spans(tmp_path)
    expected = in_memory(whole, 7).images
    assert "source" in vars(whole)
    for again in (pickle.loads(pickle.dumps(whole)), copy.deepcopy(whole), copy.copy(whole)):
        assert again.files == whole.files
        np.testing.assert_array_equal(in_memory(again, 7).images, expected)


def test_training_cuts_images_in_memory_as_cifar_and_encoded_ones_as_imagenet(tmp_path: Path) -> None:
    whole = spans(tmp_path)
    assert training_transform(in_memory(whole, 7), 32, flip=False) == CropFlip(padding=4, flip=False)
    assert training_transform(whole, 224, flip=True) == RandomResizedCrop(size=224, flip=True)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"labels": [0, 1, 2]}, "label 2 of image 2 is out of range"),
        ({"offsets": [0, 2]}, r"offsets must be int64 \[3\], one per image, not int64 \[2\]"),
        ({"lengths": [0.5, 1, 2]}, "lengths must be int64"),
        ({"file_index": [0, 1, 0]}, r"file_index must lie in 0\.\.0"),
        ({"offsets": [0, -1, 0]}, "offsets and lengths must be 0 or more"),
    ],
)
def test_an_encoded_set_refuses_arrays_that_do_not_fit(
    tmp_path: Path, changed: dict[str, object], message: str
) -> None:
    with pytest.raises(DataError, match=message):
        spans(tmp_path, **changed)


# ImageNet


SMALL_IMAGENET = replace(
    IMAGENET,
    info=replace(IMAGENET.info, num_classes=3, class_names=("tench", "goldfish", "dog"), train_size=6, test_size=3),
)


def write_imagenet(root: Path) -> Path:
    files = {f"train/{wnid}/{wnid}_{n}.JPEG": encoded(kind="JPEG") for wnid in WNIDS for n in (1, 2)}
    files |= {f"val/{wnid}/ILSVRC2012_val_0000000{n}.JPEG": encoded(kind="JPEG") for n, wnid in enumerate(WNIDS)}
    return write(root, files)


@pytest.mark.parametrize("sub_folder", ["", "imagenet", "imagenet-1k"])
def test_reads_imagenet_with_everybodys_class_numbers(tmp_path: Path, sub_folder: str) -> None:
    root = write_imagenet(tmp_path / sub_folder)
    dataset = load_imagenet(SMALL_IMAGENET, tmp_path)
    assert isinstance(dataset.train, EncodedSet)
    assert dataset.train.labels.tolist() == [0, 0, 1, 1, 2, 2]
    assert dataset.train.class_names == ("tench", "goldfish", "dog")
    assert dataset.train.files[2] == str(root / "train/n01443537/n01443537_1.JPEG")
    assert dataset.test.labels.tolist() == [0, 1, 2]


def write_imagenet_of_the_hub(root: Path) -> Path:
    contents = [encoded(8) for _ in range(9)]
    folder = root / "imagenet-1k" / "data"
    folder.mkdir(parents=True)
    for name, rows in (
        ("train-00000-of-00002", slice(0, 4)),
        ("train-00001-of-00002", slice(4, 6)),
        ("validation-00000-of-00001", slice(6, 9)),
    ):
        images = [{"bytes": content, "path": None} for content in contents[rows]]
        table = pa.table({"image": images, "label": [0, 0, 1, 1, 2, 2, 0, 1, 2][rows]})
        pq.write_table(table, folder / f"{name}.parquet")
    return folder


def test_reads_imagenet_from_the_hub_through_packs_made_once(tmp_path: Path) -> None:
    write_imagenet_of_the_hub(tmp_path)
    before = everything(tmp_path)
    reports: list[tuple[str, int, int]] = []
    for expected in ([("packing imagenet", 6, 6), ("packing imagenet", 3, 3)], []):
        dataset = load_imagenet(
            SMALL_IMAGENET, tmp_path, packs=tmp_path / "packs", progress=lambda *report: reports.append(report)
        )
        assert reports == expected
        reports.clear()
        assert dataset.train.labels.tolist() == [0, 0, 1, 1, 2, 2]
        assert dataset.test.class_names == ("tench", "goldfish", "dog")
        seen = in_memory(dataset.test, 7).images
        assert seen.shape == (3, 7, 7, 3)
    assert {path: raw for path, raw in everything(tmp_path).items() if path.suffix != ".pack"} == before
    assert len(everything(tmp_path)) == len(before) + 2


def pack_validation(root: Path, progress: Progress | None = None) -> EncodedSet:
    shards = (root / "imagenet-1k" / "data" / "validation-00000-of-00001.parquet",)
    return packed(shards, root / "test.pack", SMALL_IMAGENET.hub, SMALL_IMAGENET.info, progress=progress)


def test_what_a_killed_process_left_of_a_pack_is_removed(tmp_path: Path) -> None:
    write_imagenet_of_the_hub(tmp_path)
    for name in ("test.pack.999-0.partial", "test.packs", "other.pack.999-0.partial"):
        (tmp_path / name).write_bytes(b"half")
    assert len(pack_validation(tmp_path)) == 3
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"imagenet-1k", "test.pack", "test.packs", "other.pack.999-0.partial"}


def test_a_pack_that_another_makes_is_waited_for_and_not_made_twice(tmp_path: Path) -> None:
    write_imagenet_of_the_hub(tmp_path)
    made: list[str] = []
    sizes: list[int] = []
    second = threading.Thread(
        target=lambda: sizes.append(len(pack_validation(tmp_path, lambda *_: made.append("second"))))
    )

    def while_the_first_writes(*_: object) -> None:
        made.append("first")
        second.start()
        while second.is_alive() and not caught:
            time.sleep(0.01)

    with pytest.warns(UserWarning, match=r"another process is making .*test.pack; this one waits for it") as caught:
        sizes.append(len(pack_validation(tmp_path, while_the_first_writes)))
    second.join()
    assert (made, sizes) == (["first"], [3, 3])
    assert {path.name for path in tmp_path.iterdir()} == {"imagenet-1k", "test.pack"}


def test_a_pack_that_the_system_cannot_read_is_not_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_imagenet_of_the_hub(tmp_path)
    pack = tmp_path / "test.pack"
    pack.mkdir()
    with pytest.raises(DataError, match=r"cannot read .*test.pack: Is a directory; make it readable, or remove it"):
        pack_validation(tmp_path)
    with pytest.raises(DataError) as of_rust:
        rust_router.open_pack(pack)
    pack.rmdir()
    pack.write_bytes(b"opens, and cannot be read further on")

    def fail(_: Path) -> None:
        raise of_rust.value

    monkeypatch.setattr(rust_router, "open_pack", fail)
    with pytest.raises(DataError, match=r"test.pack .*\(os error \d+\); make it readable, or remove it"):
        pack_validation(tmp_path)
    assert pack.read_bytes().startswith(b"opens")
    assert {path.name for path in tmp_path.iterdir()} == {"imagenet-1k", "test.pack"}


def test_take_keeps_the_files_it_needs_in_the_order_asked_for(tmp_path: Path) -> None:
    write_imagenet(tmp_path)
    whole = load_imagenet(SMALL_IMAGENET, tmp_path).train
    assert isinstance(whole, EncodedSet)
    part = whole.take(np.array([4, 1, 4]))
    assert part.files == (whole.files[1], whole.files[4])
    assert part.file_index.tolist() == [1, 0, 1]
    assert part.labels.tolist() == [2, 0, 2]
    np.testing.assert_array_equal(in_memory(part, 7).images, in_memory(whole, 7).images[[4, 1, 4]])
    assert len(whole.take(np.array([], np.int64))) == 0


def test_imagenet_names_are_in_the_order_of_the_wnids() -> None:
    # n01440764 is the first id of ILSVRC 2012, n01443537 the second, n15075141 the last.
    names = IMAGENET.info.class_names
    assert (names[0], names[1], names[999]) == ("tench", "goldfish", "toilet tissue")


def test_links_to_images_of_imagenet_that_are_gone_are_found_when_the_folders_are_listed(tmp_path: Path) -> None:
    root = write_imagenet(tmp_path)
    gone = (f"train/{WNIDS[1]}/{WNIDS[1]}_2.JPEG", f"val/{WNIDS[0]}/ILSVRC2012_val_00000000.JPEG")
    for name in gone:
        (root / name).unlink()
        (root / name).symlink_to("nowhere.JPEG")
    (root / f"train/{WNIDS[2]}/{WNIDS[2]}_2.JPEG").unlink()
    (root / f"train/{WNIDS[2]}/{WNIDS[2]}_2.JPEG").symlink_to(f"{WNIDS[2]}_1.JPEG")
    assert load_imagenet(SMALL_IMAGENET, tmp_path).info.gone == tuple(str(root / name) for name in gone)


def test_refuses_an_imagenet_folder_without_val(tmp_path: Path) -> None:
    write_imagenet(tmp_path)
    (tmp_path / "val").rename(tmp_path / "elsewhere")
    with pytest.raises(DataError, match="has no folder val"):
        load_imagenet(SMALL_IMAGENET, tmp_path)


def test_refuses_unsorted_validation_images(tmp_path: Path) -> None:
    write(write_imagenet(tmp_path), {"val/ILSVRC2012_val_00000009.JPEG": b"x"})
    with pytest.raises(DataError, match=r"val_00000009\.JPEG lies outside the class folders; move it to .*/val/"):
        load_imagenet(SMALL_IMAGENET, tmp_path)


def test_other_image_folders_are_not_taken_for_imagenet(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"has 2 class folders \(cat, dog, \.\.\.\).* 1000 named by WordNet.*'folder'"):
        load_dataset("imagenet", write(tmp_path, PETS))


def test_refuses_imagenet_with_a_class_missing(tmp_path: Path) -> None:
    shutil.rmtree(write_imagenet(tmp_path) / "train" / WNIDS[1])
    with pytest.raises(DataError, match=r"has 2 class folders .* where imagenet has 3 named"):
        load_imagenet(SMALL_IMAGENET, tmp_path)


def test_says_where_imagenet_comes_from(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"imagenet was not found in .* get it from ILSVRC/imagenet-1k on the hub"):
        load_dataset("imagenet", tmp_path)


# TinyImageNet


SMALL_TINY = replace(TINY_IMAGENET, info=replace(TINY_IMAGENET.info, num_classes=3, train_size=6, test_size=3))
TINY_TRAIN = {
    f"train/{wnid}/images/{wnid}_{n}.JPEG": encoded(kind="JPEG", mode="L" if n else "RGB")
    for wnid in WNIDS
    for n in (0, 1)
}
TINY_VAL = {f"val/images/val_{n}.JPEG": encoded(kind="JPEG") for n in range(3)}
VAL_CLASSES = (2, 0, 1)
TINY = {
    "wnids.txt": b"n02084071\nn01440764\nn01443537",  # published in no order
    "words.txt": b"n01443537\tgoldfish, Carassius auratus\n",
    **{f"train/{wnid}/{wnid}_boxes.txt": b"" for wnid in WNIDS},
    **TINY_TRAIN,
    **TINY_VAL,
    "val/val_annotations.txt": "".join(
        f"val_{n}.JPEG\t{WNIDS[label]}\t0\t32\t44\t62\n" for n, label in enumerate(VAL_CLASSES)
    ).encode(),
    "test/images/test_0.JPEG": encoded(kind="JPEG"),
}


def load_tiny(data_dir: Path, tiny: TinyImageNet = SMALL_TINY) -> Dataset:
    return load_tiny_imagenet(tiny, data_dir, download=False)


def write_tiny_zip(data_dir: Path) -> TinyImageNet:
    path = data_dir / "tiny-imagenet-200.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in TINY.items():
            archive.writestr(f"tiny-imagenet-200/{name}", content)
    md5 = hashlib.md5(path.read_bytes()).hexdigest()
    return replace(SMALL_TINY, archive=replace(TINY_IMAGENET.archive, md5=md5))


def write_tiny_parquet(folder: Path, *, names: tuple[str, ...] | None = WNIDS) -> None:
    folder.mkdir(parents=True)
    metadata = {"info": {"features": {"label": {"names": names, "_type": "ClassLabel"}, "image": {"_type": "Image"}}}}
    for split, images, labels in (
        ("train-00000-of-00001-1359597a978bc4fa", TINY_TRAIN, [0, 0, 1, 1, 2, 2]),
        ("valid-00000-of-00001-70d52db3c749a935", TINY_VAL, list(VAL_CLASSES)),
    ):
        table = pa.table({"image": [{"bytes": image, "path": None} for image in images.values()], "label": labels})
        if names is not None:
            table = table.replace_schema_metadata({"huggingface": json.dumps(metadata)})
        pq.write_table(table, folder / f"{split}.parquet")


def assert_is_small_tiny(dataset: Dataset) -> None:
    assert dataset.info.class_names == dataset.train.class_names == WNIDS
    assert dataset.train.labels.tolist() == [0, 0, 1, 1, 2, 2]
    assert dataset.test.labels.tolist() == list(VAL_CLASSES)
    for images, files in ((dataset.train, TINY_TRAIN), (dataset.test, TINY_VAL)):
        for image, content in zip(images.images, files.values(), strict=True):
            # Two JPEG decoders round differently: by up to 4 levels, as the tests of the loader
            # have it.
            np.testing.assert_allclose(image.astype(int), decoded(content).astype(int), atol=4)


@pytest.mark.parametrize("sub_folder", ["tiny-imagenet-200", "tinyimagenet/tiny-imagenet-200", "renamed"])
def test_reads_the_official_tiny_imagenet_folder(tmp_path: Path, sub_folder: str) -> None:
    before = everything(write(tmp_path / sub_folder, TINY))
    assert_is_small_tiny(load_tiny(tmp_path / "renamed" if sub_folder == "renamed" else tmp_path))
    assert everything(tmp_path) == before


def test_reads_validation_images_sorted_into_class_folders(tmp_path: Path) -> None:
    files = {name: content for name, content in TINY.items() if not name.startswith("val/")}
    files |= {
        f"val/{WNIDS[label]}/images/val_{n}.JPEG": TINY_VAL[f"val/images/val_{n}.JPEG"]
        for n, label in enumerate(VAL_CLASSES)
    }
    dataset = load_tiny(write(tmp_path / "tiny-imagenet-200", files).parent)
    assert dataset.test.labels.tolist() == [0, 1, 2]


def test_reads_the_official_tiny_imagenet_zip_in_place(tmp_path: Path) -> None:
    tiny = write_tiny_zip(tmp_path)
    assert_is_small_tiny(load_tiny(tmp_path, tiny))
    assert [path.name for path in tmp_path.iterdir()] == ["tiny-imagenet-200.zip"]


@pytest.mark.parametrize("sub_folder", ["data", "", "tiny-imagenet/data", "zh-plus/tiny-imagenet/data"])
def test_reads_tiny_imagenet_from_the_hub_with_the_class_names_of_its_files(tmp_path: Path, sub_folder: str) -> None:
    write_tiny_parquet(tmp_path / "root" / sub_folder)
    assert_is_small_tiny(load_tiny(tmp_path / "root"))


def test_numbers_stand_for_class_names_that_the_files_do_not_tell(tmp_path: Path) -> None:
    write_tiny_parquet(tmp_path / "data", names=None)
    assert load_tiny(tmp_path).info.class_names == ("0", "1", "2")


def test_refuses_tiny_imagenet_whose_validation_images_are_training_images(tmp_path: Path) -> None:
    files = {name: content for name, content in TINY.items() if not name.startswith("val/")}
    root = write(tmp_path / "tiny-imagenet-200", files)
    (root / "val").mkdir()
    for wnid in WNIDS:
        (root / "val" / wnid).symlink_to(f"../train/{wnid}")
    with pytest.raises(DataError, match=r"val/n01440764 and .*train/n01440764 are one folder, by a link"):
        load_tiny(tmp_path)


def without(*names: str) -> Callable[[Path], None]:
    return lambda root: [(root / name).unlink() for name in names] and None


def rewritten(name: str, content: bytes) -> Callable[[Path], None]:
    return lambda root: (root / name).write_bytes(content) and None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (without(*TINY_VAL), "lacks the training or the validation images"),
        (without("val/images/val_1.JPEG"), "6 training and 2 test images, where tinyimagenet has 6 and 3"),
        (without("val/val_annotations.txt"), "val/images is a class that the training images do not have"),
        (
            rewritten("val/val_annotations.txt", b"val_0.JPEG\tn02084071\t0\t0\t1\t1\n"),
            "class of val/images/val_1",
        ),
        (rewritten("val/val_annotations.txt", b"val_0.JPEG"), "val_annotations.txt, line 1: '' is no class"),
        (rewritten("val/images/val_2.JPEG", encoded()[:100]), r"val_2\.JPEG: the image cannot be decoded"),
        (
            rewritten("val/images/val_2.JPEG", encoded(32)),
            r"val_2\.JPEG: the image has 32x32 pixels, expected 64x64",
        ),
        (rewritten("val/images/val_2.JPEG", b""), r"val_2\.JPEG: the image cannot be decoded \(it is empty"),
    ],
)
def test_refuses_a_damaged_tiny_imagenet_folder(tmp_path: Path, change: Callable[[Path], None], message: str) -> None:
    change(write(tmp_path / "tiny-imagenet-200", TINY))
    with pytest.raises(DataError, match=message):
        load_tiny(tmp_path)


def test_refuses_tiny_imagenet_with_other_classes(tmp_path: Path) -> None:
    write(tmp_path / "tiny-imagenet-200", TINY)
    with pytest.raises(DataError, match="has 3 classes, where tinyimagenet has 200"):
        load_tiny(tmp_path, TINY_IMAGENET)


def test_refuses_a_half_extracted_tiny_imagenet_folder(tmp_path: Path) -> None:
    write(tmp_path / "tiny-imagenet-200", {name: raw for name, raw in TINY.items() if not name.startswith("val")})
    with pytest.raises(DataError, match=r"is incomplete: expected .*/train and .*/val"):
        load_tiny(tmp_path)


def test_refuses_a_half_downloaded_zip_and_leaves_it_alone(tmp_path: Path) -> None:
    tiny = write_tiny_zip(tmp_path)
    path = tmp_path / "tiny-imagenet-200.zip"
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(DataError, match=r"half-downloaded or damaged: .*\(1,000 bytes\)"):
        load_tiny(tmp_path, tiny)
    assert path.stat().st_size == 1000


def test_refuses_a_published_zip_that_is_no_zip(tmp_path: Path) -> None:
    write(tmp_path, {"tiny-imagenet-200.zip": b"something else"})
    md5 = hashlib.md5(b"something else").hexdigest()
    with pytest.raises(DataError, match="cannot be read as a zip archive"):
        load_tiny(tmp_path, replace(SMALL_TINY, archive=replace(TINY_IMAGENET.archive, md5=md5)))


def test_says_what_was_looked_for_when_tiny_imagenet_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"tinyimagenet was not found in .* data/\*\.parquet, tiny-imagenet-200 or"):
        load_tiny(tmp_path)
