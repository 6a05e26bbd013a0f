"""Inputs of a model: images of its size, floating-point, finite, and in [0, 1]."""

from collections.abc import Callable

import pytest
import torch

from advmoe.errors import DataError
from advmoe.models.network import RoutedNetwork
from advmoe.models.routing import Routing


@pytest.fixture(scope="module")
def model(tiny_vgg: Callable[..., RoutedNetwork]) -> RoutedNetwork:
    return tiny_vgg(warm=True).eval()


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize(
    ("images", "message"),
    [
        (torch.rand(2, 1, 32, 32), r"expected images \[B, 3, 32, 32\], got \[2, 1, 32, 32\]"),  # would be broadcast
        (torch.rand(3, 32, 32), r"got \[3, 32, 32\]"),  # one image, without the batch
        (torch.rand(2, 32, 32, 3), r"got \[2, 32, 32, 3\]"),  # channels last
        (torch.rand(2, 3, 32, 64), r"got \[2, 3, 32, 64\]"),
        (torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8), "floating-point numbers in .*, got torch.uint8"),
        (torch.ones(2, 3, 32, 32, dtype=torch.int64), "got torch.int64"),
        (torch.rand(2, 3, 32, 32).numpy(), r"expected images as a tensor \[B, 3, 32, 32\], got ndarray"),
    ],
    ids=lambda value: str(list(value.shape)) if isinstance(value, torch.Tensor) else "",
)
def test_other_shapes_and_types_are_refused(
    model: RoutedNetwork, images: torch.Tensor, message: str, training: bool
) -> None:
    model.train(training)
    try:
        with pytest.raises(DataError, match=message):
            model(images)
    finally:
        model.eval()


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (float("nan"), "not finite"),
        (float("inf"), "not finite"),
        (200.0, r"got values up to 200; divide by 255\?"),
    ],
)
def test_images_that_are_not_finite_or_of_another_range_are_refused(
    model: RoutedNetwork, value: float, message: str
) -> None:
    images = torch.rand(2, 3, 32, 32)
    images[1, 2, 3, 4] = value
    with pytest.raises(DataError, match=message):
        model(images)


@pytest.mark.parametrize(
    ("pathways", "message"),
    [
        (torch.zeros(2, 12, dtype=torch.int64), r"expected pathways int64 \[3, 12\].*got int64 \[2, 12\]"),
        (torch.zeros(3, 13, dtype=torch.int64), r"got int64 \[3, 13\]"),
        (torch.zeros(3, 12), r"got float32 \[3, 12\]"),
        (torch.full((3, 12), 2), "experts 0 to 1, got experts 2 to 2"),
        (torch.full((3, 12), -1), "experts 0 to 1, got experts -1 to -1"),
        (torch.zeros(3, 12, dtype=torch.int64).numpy(), "as a tensor or a Routing, got ndarray"),
        (Routing(torch.zeros(2, 12, dtype=torch.int64), None), r"got int64 \[2, 12\]"),
    ],
)
def test_pathways_of_other_images_or_networks_are_refused(
    model: RoutedNetwork, pathways: torch.Tensor, message: str
) -> None:
    with pytest.raises(DataError, match=message):
        model(torch.rand(3, 3, 32, 32), pathways)


@pytest.mark.parametrize("granularity", ["layer", "image"])
def test_the_routing_of_a_pass_forces_the_pathways_of_another(
    granularity: str, tiny_vgg: Callable[..., RoutedNetwork]
) -> None:
    model = tiny_vgg(warm=True, granularity=granularity).eval()
    images, others = torch.rand(8, 3, 32, 32), torch.rand(8, 3, 32, 32)
    logits, routing = model.forward_with_routing(images)
    assert torch.equal(model(images, routing), logits)
    _, forced = model.forward_with_routing(others, routing)
    assert torch.equal(forced.expert_index_BL, routing.expert_index_BL)
    assert torch.equal(model(others, routing), model(others, routing.expert_index_BL))


def test_an_exported_graph_has_no_check_of_values(tiny_vgg: Callable[..., RoutedNetwork]) -> None:
    model = tiny_vgg(warm=True, kind="s_dense").eval()
    batch = {"images": {0: torch.export.Dim("batch", min=2)}}
    exported = torch.export.export(model, (torch.rand(4, 3, 32, 32),), dynamic_shapes=batch)
    assert not [node for node in exported.graph.nodes if "aminmax" in str(node.target)]
    assert exported.module()(torch.rand(5, 3, 32, 32)).shape == (5, 10)


def test_no_image_is_a_batch(model: RoutedNetwork) -> None:
    assert model(torch.rand(0, 3, 32, 32)).shape == (0, 10)
