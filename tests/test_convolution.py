"""The gradients of convolutions with few filters, against those of autograd for `torch.nn.functional.conv2d`."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from advmoe.models import convolution
from advmoe.models.convolution import FILTERS, VECTOR, conv2d, is_narrow
from advmoe.models.experts import ExpertLayout
from advmoe.models.moe_conv import MoEConv2d
from advmoe.models.routing import Decision

GEOMETRY = [
    pytest.param(3, 4, 3, 1, id="a stem"),
    pytest.param(5, 8, 3, 0, id="no padding"),
    pytest.param(15, 3, 1, 0, id="1x1"),
    pytest.param(4, 2, 5, 2, id="5x5"),
    pytest.param(2, 3, (3, 5), (0, 1), id="a rectangle"),
]


def gradients_of(y: Tensor, x: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
    slopes = torch.randn(y.shape, generator=torch.Generator().manual_seed(2))
    return torch.autograd.grad((y * slopes).sum(), (x, weight))


@pytest.mark.parametrize(("channels", "filters", "size", "padding"), GEOMETRY)
def test_the_gradients_of_narrow_convolutions_are_those_of_autograd(
    channels: int, filters: int, size: int | tuple[int, int], padding: int | tuple[int, int]
) -> None:
    sides = (size, size) if isinstance(size, int) else size
    places = (padding, padding) if isinstance(padding, int) else padding
    x = torch.randn(4, channels, 7, 9, requires_grad=True)
    weight = torch.randn(filters, channels, *sides, requires_grad=True)
    assert is_narrow(x, weight, (1, 1), places)
    expected_y = F.conv2d(x, weight, None, 1, places)
    y = conv2d(x, weight, (1, 1), places)
    assert "NarrowConvolution" in type(y.grad_fn).__name__
    torch.testing.assert_close(y, expected_y, rtol=0, atol=0)
    torch.testing.assert_close(gradients_of(y, x, weight), gradients_of(expected_y, x, weight), rtol=1e-5, atol=1e-5)


def test_the_experts_of_a_routed_convolution_take_the_same_way(monkeypatch: pytest.MonkeyPatch) -> None:
    filters: list[int] = []
    original = convolution.gradient_of_input

    def spy(gradient: Tensor, weight: Tensor, padding: list[int]) -> Tensor:
        filters.append(len(weight))
        return original(gradient, weight, padding)

    monkeypatch.setattr(convolution, "gradient_of_input", spy)
    layout = ExpertLayout(num_channels=8, num_experts=2, model_scale=0.5)
    layer, x = MoEConv2d(6, layout, 3, padding=1), torch.randn(4, 6, 5, 5, requires_grad=True)
    decision = Decision(torch.tensor([0, 1, 1, 0]), None)
    found = gradients_of(layer(x, decision), x, layer.weight)
    assert filters == [4, 4]
    exact = layer.double()
    y = exact(x.double(), decision)
    expected = gradients_of(y, x, exact.weight)
    assert filters == [4, 4], "double precision takes the other way"
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs.float(), rtol=1e-5, atol=1e-5)


def test_gradients_that_are_not_wanted_are_none() -> None:
    x, weight, slopes = torch.randn(4, 6, 5, 5), torch.randn(4, 6, 3, 3), torch.randn(4, 4, 5, 5)
    assert convolution.gradients(slopes, x, weight, [1, 1], [1, 1], (True, False, False))[1:] == (None, None)


def test_second_derivatives_pass_through() -> None:
    x, weight = torch.randn(2, 3, 5, 5, requires_grad=True), torch.randn(4, 3, 3, 3, requires_grad=True)

    def penalty(y: Tensor) -> Tensor:
        (slope,) = torch.autograd.grad(y.pow(2).sum(), x, create_graph=True)
        return slope.pow(2).sum()

    found = torch.autograd.grad(penalty(conv2d(x, weight, (1, 1), (1, 1))), weight)
    expected = torch.autograd.grad(penalty(F.conv2d(x, weight, None, 1, 1)), weight)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize(
    ("channels", "filters", "stride", "padding", "change"),
    [
        pytest.param(VECTOR, 4, 1, 1, lambda x: x, id="a vector of input channels"),
        pytest.param(4, FILTERS + 1, 1, 1, lambda x: x, id="more filters"),
        pytest.param(4, 4, 2, 1, lambda x: x, id="a stride"),
        pytest.param(4, 4, 1, 3, lambda x: x, id="more padding than the filter is wide"),
        pytest.param(4, 4, 1, 1, lambda x: x.double(), id="double precision"),
        pytest.param(4, 4, 1, 1, lambda x: x.contiguous(memory_format=torch.channels_last), id="channels-last"),
    ],
)
def test_other_convolutions_are_left_to_autograd(
    channels: int, filters: int, stride: int, padding: int, change: object
) -> None:
    x = change(torch.randn(2, channels, 7, 7)).requires_grad_()  # type: ignore[operator]
    weight = torch.randn(filters, channels, 3, 3, dtype=x.dtype)
    y = conv2d(x, weight, (stride, stride), (padding, padding))
    assert "NarrowConvolution" not in type(y.grad_fn).__name__
    torch.testing.assert_close(y, F.conv2d(x, weight, None, stride, padding))
