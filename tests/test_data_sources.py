"""Data sets by name, image sets as values, the embedded digits, and validation splits."""

import sys

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from advmoe.data import sources
from advmoe.data.digits import ORIGINALS, load_digits
from advmoe.data.loader import BatchLoader
from advmoe.data.sources import ImageSet, dataset_info, dataset_names, load_dataset
from advmoe.data.splits import split_validation
from advmoe.errors import ConfigError, DataError


def tiny_set(n: int = 6) -> ImageSet:
    images = np.arange(n * 2 * 2 * 3, dtype=np.uint8).reshape(n, 2, 2, 3)
    return ImageSet(images=images, labels=np.arange(n) % 2, class_names=("a", "b"))


def test_all_data_sets_are_known_by_name() -> None:
    assert dataset_names() == tuple(sources._SOURCES)


def test_every_name_has_consistent_facts() -> None:
    for name in dataset_names():
        if name == "folder":
            continue  # only the files tell
        info = dataset_info(name)
        assert info.name == name
        assert info.num_classes >= 2
        assert len(set(info.class_names)) in (0, info.num_classes)
        assert 0 < info.eps <= 8 / 255
        assert all(0 < value < 1 for value in (*info.mean, *info.std))


def test_the_data_sets_of_the_paper_are_known() -> None:
    sizes = {name: (dataset_info(name).num_classes, dataset_info(name).image_size) for name in dataset_names()[:4]}
    assert sizes == {"cifar10": (10, 32), "cifar100": (100, 32), "tinyimagenet": (200, 64), "imagenet": (1000, 224)}
    # Section 5 of the paper: 8/255 on CIFAR, 2/255 on TinyImageNet and ImageNet.
    assert [dataset_info(name).eps for name in sizes] == [8 / 255, 8 / 255, 2 / 255, 2 / 255]


def test_cifar10_facts() -> None:
    info = dataset_info("cifar10")
    assert info.eps == 8 / 255
    assert info.class_names[3] == "cat"
    assert (info.num_classes, info.image_size, info.train_size, info.test_size) == (10, 32, 50_000, 10_000)


@pytest.mark.parametrize("name", ["cifar-10", "CIFAR10", "cifar_10"])
def test_an_unknown_name_gets_the_known_ones_and_the_closest(name: str) -> None:
    with pytest.raises(ConfigError, match=r"unknown data set .*known are cifar10, .*did you mean 'cifar10'\?"):
        dataset_info(name)


def test_an_unknown_name_like_no_other_gets_the_known_ones() -> None:
    with pytest.raises(ConfigError, match=r"unknown data set 'xyz': known are cifar10, [^?]*$"):
        load_dataset("xyz")


def test_take_copies_rows_in_the_order_asked_for() -> None:
    whole = tiny_set()
    part = whole.take(np.array([4, 1]))
    np.testing.assert_array_equal(part.images, whole.images[[4, 1]])
    assert part.labels.tolist() == [0, 1]
    assert len(part) == 2
    assert not np.shares_memory(part.images, whole.images)


def test_torchs_loader_makes_the_same_batches_of_a_set_as_ours() -> None:
    images = load_digits().test
    for (pixels, labels), batch in zip(
        DataLoader(images, batch_size=100),
        BatchLoader(images, batch_size=100).epoch(0),
        strict=True,
    ):
        assert (pixels.dtype, labels.dtype) == (torch.float32, torch.int64)
        assert torch.equal(pixels, batch.images)
        assert torch.equal(labels, batch.labels)
    assert len(list(images)) == len(images), "iteration ends"
    with pytest.raises(TypeError, match="slice"):
        images[1:3]


@pytest.mark.parametrize(
    ("images", "labels", "message"),
    [
        (np.zeros((2, 4, 4, 3), np.float32), np.zeros(2, np.int64), "uint8 array .* not float32"),
        (np.zeros((2, 3, 4, 4), np.uint8), np.zeros(2, np.int64), r"not uint8 \[2, 3, 4, 4\]"),
        (np.zeros((2, 4, 4, 3), np.uint8)[:, ::-1], np.zeros(2, np.int64), "C-contiguous"),
        (np.zeros((2, 4, 4, 3), np.uint8), np.zeros(3, np.int64), r"labels must be int64 \[2\]"),
        (np.zeros((2, 4, 4, 3), np.uint8), np.zeros(2, np.int32), "not int32"),
        (np.zeros((2, 4, 4, 3), np.uint8), np.array([0, 2]), "label 2 of image 1 is out of range; labels must be 0..1"),
    ],
)
def test_image_sets_refuse_what_the_loader_could_not_read(images: np.ndarray, labels: np.ndarray, message: str) -> None:
    with pytest.raises(DataError, match=message):
        ImageSet(images=images, labels=labels, class_names=("a", "b"))


def test_digits_are_complete_balanced_and_always_the_same() -> None:
    first, second = load_digits(), load_dataset("digits")
    assert (len(first.train), len(first.test)) == (1437, 360)
    assert first.train.images.shape == (1437, 32, 32, 3)
    # 174..183 originals per digit, a fifth of each: 34.9..36.7, rounded either way.
    assert set(np.bincount(first.test.labels)) <= {35, 36, 37}
    np.testing.assert_array_equal(first.test.images, second.test.images)
    np.testing.assert_array_equal(first.train.labels, second.train.labels)


def test_digits_need_nothing_but_the_package_and_are_scikit_learns(monkeypatch: pytest.MonkeyPatch) -> None:
    originals = pytest.importorskip("sklearn.datasets").load_digits()
    with np.load(ORIGINALS) as packed:
        np.testing.assert_array_equal(packed["images"], originals.images)
        np.testing.assert_array_equal(packed["labels"], originals.target)
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)  # an import of it fails
    assert len(load_digits().train) == 1437


def test_digits_span_the_gray_levels_and_match_their_stated_statistics() -> None:
    dataset = load_digits()
    assert (dataset.train.images.min(), dataset.train.images.max()) == (0, 255)
    pixels = dataset.train.images / 255
    np.testing.assert_allclose(pixels.mean((0, 1, 2)), dataset.info.mean, atol=5e-5)
    np.testing.assert_allclose(pixels.std((0, 1, 2)), dataset.info.std, atol=5e-5)


LABELS = np.repeat([0, 1, 2], [50, 30, 20])


def test_a_validation_split_is_a_sorted_stratified_partition() -> None:
    train, validation = split_validation(LABELS, fraction=0.1, seed=0)
    assert sorted([*train, *validation]) == list(range(100))
    assert list(train) == sorted(train)
    assert list(validation) == sorted(validation)
    assert np.bincount(LABELS[validation]).tolist() == [5, 3, 2]  # a tenth of 50, 30, 20


def test_a_validation_split_hands_out_what_rounding_leaves_by_largest_remainder() -> None:
    _, validation = split_validation(LABELS, size=7, seed=0)
    # 7 x (.5, .3, .2) = 3.5, 2.1, 1.4: floors 3, 2, 1, and the seventh goes to the class with
    # remainder .5.
    assert np.bincount(LABELS[validation]).tolist() == [4, 2, 1]


def test_a_validation_split_leaves_each_class_a_training_image() -> None:
    labels = np.array([0] * 8 + [1, 2])
    train, validation = split_validation(labels, size=7, seed=3)
    assert len(validation) == 7
    assert sorted(labels[train]) == [0, 1, 2]


def test_a_validation_split_follows_its_seed() -> None:
    draws = [split_validation(LABELS, size=20, seed=seed)[1].tolist() for seed in (0, 0, 1)]
    assert draws[0] == draws[1] != draws[2]
    # Written down once: the split behind reported numbers must not change with a version of NumPy.
    assert split_validation(np.zeros(12, np.int64), size=4, seed=0)[1].tolist() == [0, 2, 9, 11]


@pytest.mark.parametrize("options", [{}, {"fraction": 0.1, "size": 10}])
def test_a_validation_split_needs_one_size(options: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match="either fraction= or size="):
        split_validation(LABELS, seed=0, **options)


def test_a_validation_split_of_one_image_per_class_asks_for_images() -> None:
    with pytest.raises(ConfigError, match=r"3 images are one for each of the 3 classes.*; add images"):
        split_validation(np.arange(3), size=1, seed=0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"fraction": 1.0, "seed": 0}, "between 0 and 1, not 1.0"),
        ({"fraction": 0.001, "seed": 0}, "cannot hold 0 of 100 images out"),
        ({"size": 98, "seed": 0}, r"must be 1\.\.97"),
        ({"size": 10, "seed": -1}, "seed of a validation split must be 0 or more"),
    ],
)
def test_a_validation_split_refuses_impossible_sizes(options: dict[str, float], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        split_validation(LABELS, **options)
