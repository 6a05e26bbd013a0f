"""Convolutions with few filters on a CPU: the gradient of the input, computed by a forward convolution.

oneDNN's gradient by the input pads small numbers of channels to a vector of 16, its forward
convolution does not. The gradient of a convolution with stride 1 *is* a forward convolution, with
the filters transposed and rotated by 180 degrees. With up to eight filters, that takes two thirds
to a quarter of the time, and the same values come out but for the order of sums (docs/log.md).

Shape suffixes: B batch, C channels, H height, W width.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

FILTERS, VECTOR = 8, 16
"""The detour pays with at most so many filters, and fewer input channels than a vector has numbers."""

PLACES = 64
"""Places of an output from which on the gradients of filters by single images are cheaper by a convolution with groups
than by products of matrices (docs/log.md)."""
ROOM = 2**26
"""Bytes of such gradients that a convolution with groups computes at a time."""
IMAGES, CACHED = 16, 2**21
"""Images, and bytes of such gradients, that products of matrices compute at a time."""


def is_narrow(x: Tensor, weight: Tensor, stride: Sequence[int], padding: Sequence[int]) -> bool:
    """Whether the gradient of x [B, C, H, W] is cheaper by a forward convolution."""
    number, channels, *size = weight.shape
    return (
        number <= FILTERS
        and channels < VECTOR
        and x.is_cpu
        and x.dtype == weight.dtype == torch.float32
        and tuple(stride) == (1, 1)
        and all(side > places for side, places in zip(size, padding, strict=True))
        and x.is_contiguous()  # channels-last has a fast gradient
    )


def gradient_of_input(gradient: Tensor, weight: Tensor, padding: Sequence[int]) -> Tensor:
    """Gradient [B, C, H, W] of the input of a convolution with stride 1, from that of its output."""
    rest = [side - 1 - places for side, places in zip(weight.shape[2:], padding, strict=True)]
    return F.conv2d(gradient, weight.transpose(0, 1).flip(2, 3), None, 1, rest)


def gradients(
    gradient: Tensor,
    x: Tensor,
    weight: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    wanted: tuple[bool, bool, bool],
) -> tuple[Any, Any, Any]:
    """Gradients of a convolution by its input, filters and bias, as far as wanted.

    Args:
        gradient: Gradient of the loss by the output, [B, C', H', W'].
        x: Input, [B, C, H, W].
        weight: Filters, [C', C, kh, kw].
        stride: Stride in both directions.
        padding: Zeros added on each side, in both directions.
        wanted: Which of the three are wanted. The others are None.
    """
    of_x = None
    if wanted[0] and is_narrow(x, weight, stride, padding):
        of_x, wanted = gradient_of_input(gradient, weight, padding), (False, *wanted[1:])
        if not any(wanted):
            return of_x, None, None
    found = torch.ops.aten.convolution_backward(
        gradient, x, weight, [len(weight)], stride, padding, [1, 1], False, [0, 0], 1, list(wanted)
    )
    return (found[0] if of_x is None else of_x), found[1], found[2]


class Piece(NamedTuple):
    """A part of the gradients of filters by single images."""

    images: slice
    """Which of the B images."""
    columns: slice
    """Which of the C' C kh kw numbers of all filters, in their order."""
    values: Tensor
    """The gradients, [images, columns]."""


def gradients_of_filters(
    gradient: Tensor, x: Tensor, weight: Tensor, stride: Sequence[int], padding: Sequence[int]
) -> Iterator[Piece]:
    """Gradient of the filters by each image alone, piece by piece; arguments as for `gradients`.

    All pieces together are as large as B times the filters, which may be much more than the images.
    """
    if gradient.shape[2] * gradient.shape[3] < PLACES:
        return _by_products(gradient, x, weight, stride, padding)
    return _by_groups(gradient, x, weight, stride, padding)


def _by_groups(
    gradient: Tensor, x: Tensor, weight: Tensor, stride: Sequence[int], padding: Sequence[int]
) -> Iterator[Piece]:
    """The images are the groups of one convolution."""
    at_a_time = max(1, ROOM // (x.element_size() * weight.numel()))
    for start in range(0, len(x), at_a_time):
        images = slice(start, min(start + at_a_time, len(x)))
        number = images.stop - start
        inputs, slopes = (each[images].reshape(1, -1, *each.shape[2:]) for each in (x, gradient))
        filters = weight.new_empty(1).expand(number * len(weight), *weight.shape[1:])  # only their form is looked at
        found = torch.ops.aten.convolution_backward(
            slopes, inputs, filters, None, stride, padding, [1, 1], False, [0, 0], number, [False, True, False]
        )
        yield Piece(images, slice(0, weight.numel()), found[1].reshape(number, -1))


def _by_products(
    gradient: Tensor, x: Tensor, weight: Tensor, stride: Sequence[int], padding: Sequence[int]
) -> Iterator[Piece]:
    """Products of matrices, for some filters and some images at a time, so that a cache holds them."""
    unfolded = F.unfold(x, weight.shape[2:], padding=tuple(padding), stride=tuple(stride))  # [B, C kh kw, H' W']
    places, slopes, length = unfolded.transpose(1, 2), gradient.flatten(2), unfolded.shape[1]
    rows = max(1, CACHED // (x.element_size() * IMAGES * length))
    for start in range(0, len(x), IMAGES):
        images = slice(start, min(start + IMAGES, len(x)))
        for row in range(0, len(weight), rows):
            last = min(row + rows, len(weight))
            values = torch.bmm(slopes[images, row:last], places[images])
            yield Piece(images, slice(row * length, last * length), values.flatten(1))


class _NarrowConvolution(torch.autograd.Function):
    @staticmethod
    def forward(x: Tensor, weight: Tensor, padding: Sequence[int]) -> Tensor:
        return F.conv2d(x, weight, None, 1, padding)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, weight, ctx.padding = inputs
        ctx.save_for_backward(x, weight)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        x, weight = ctx.saved_tensors
        of_x, of_weight, _ = gradients(gradient, x, weight, (1, 1), ctx.padding, (*ctx.needs_input_grad[:2], False))
        return of_x, of_weight, None


def conv2d(x: Tensor, weight: Tensor, stride: Sequence[int], padding: Sequence[int] | str) -> Tensor:
    """`torch.nn.functional.conv2d` without bias; narrow convolutions get the cheaper gradient."""
    if (
        torch.is_grad_enabled()
        and x.requires_grad
        and not torch.compiler.is_compiling()
        and not torch.is_autocast_enabled("cpu")
        and not isinstance(padding, str)
        and is_narrow(x, weight, stride, padding)
    ):
        y: Tensor = _NarrowConvolution.apply(x, weight, padding)
        return y
    return F.conv2d(x, weight, None, stride, padding)
