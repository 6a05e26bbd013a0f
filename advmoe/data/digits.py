"""Digits: 1,797 real handwritten digits that are part of the package, for experiments without a download.

They are the test half of "Optical Recognition of Handwritten Digits" (E. Alpaydin and C. Kaynak,
UCI Machine Learning Repository, 1998, CC BY 4.0); `digits.txt` beside the file says more.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

from advmoe.data.sets import Dataset, DatasetInfo, ImageSet
from advmoe.data.splits import split_validation

ORIGINALS = Path(__file__).with_name("digits.npz")
TEST_SIZE = 360
SPLIT_SEED = 0

DIGITS = DatasetInfo(
    name="digits",
    num_classes=10,
    class_names=tuple("0123456789"),
    image_size=32,
    mean=(0.3055, 0.3055, 0.3055),
    std=(0.3235, 0.3235, 0.3235),
    eps=8 / 255,
    flip=False,
    train_size=1797 - TEST_SIZE,
    test_size=TEST_SIZE,
)


def load_digits() -> Dataset:
    """Load the digits as 32x32 RGB with a fixed, stratified split of 1,437 training and 360 test images.

    The originals are 8x8 with 17 gray levels 0..16 (white ink on black). Levels are spread over
    0..255, the side is enlarged four times by Pillow's bilinear filter, and the gray plane is
    repeated for red, green and blue. The originals do not say who wrote them, so a writer may
    appear in both splits.
    """
    with np.load(ORIGINALS) as originals:
        levels, labels = np.round(originals["images"] * (255 / 16)).astype(np.uint8), originals["labels"]
    size = (DIGITS.image_size, DIGITS.image_size)
    gray = np.stack([np.asarray(Image.fromarray(image).resize(size, Image.Resampling.BILINEAR)) for image in levels])
    everything = ImageSet(
        images=np.repeat(gray[..., None], 3, axis=-1),
        labels=labels.astype(np.int64),
        class_names=DIGITS.class_names,
    )
    train_rows, test_rows = split_validation(everything.labels, size=TEST_SIZE, seed=SPLIT_SEED)
    return Dataset(info=DIGITS, train=everything.take(train_rows), test=everything.take(test_rows))
