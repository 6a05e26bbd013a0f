"""Small data and small networks that several test files share."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import advmoe
from advmoe.data.digits import load_digits
from advmoe.data.sources import Dataset
from advmoe.models.network import RoutedNetwork

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def digits() -> Dataset:
    """The first 200 training and 40 test images of the digits, 32 x 32."""
    whole = load_digits()
    return Dataset(info=whole.info, train=whole.train.take(np.arange(200)), test=whole.test.take(np.arange(40)))


@pytest.fixture
def tiny_vgg() -> Callable[..., RoutedNetwork]:
    """Makes a VGG-16 of 4 to 32 channels with fixed weights, in training mode."""

    def make(seed: int = 0, **settings: Any) -> RoutedNetwork:
        torch.manual_seed(seed)
        return advmoe.create_model("vgg16", **{"kind": "moe", "width": 0.0625, **settings})

    return make


@pytest.fixture
def images() -> Tensor:
    """[8, 3, 32, 32] uniform in [0, 1], so images that differ more than natural ones."""
    return torch.rand(8, 3, 32, 32, generator=torch.Generator().manual_seed(1))
