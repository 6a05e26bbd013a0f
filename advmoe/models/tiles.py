"""A Triton convolution that computes each tile of an image with the image's expert, without sorting images.

The grid of programs depends on shapes only. The host therefore needs no counts and does not wait,
and only the chosen expert is computed. Products are summed in fp32 and in a fixed order. Numbers of
fp32 are multiplied as torch's own convolutions multiply them (`convolves_in_tf32`).

Shape suffixes: B batch, C channels (of the input), N experts, S slots of an expert (its output
channels).
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from advmoe.device import convolves_in_tf32
from advmoe.models.dispatch import row_products
from advmoe.models.first_order import first_order
from advmoe.models.routing import Decision

SPLITS = 8
"""Number of programs that divide the images of one expert in the gradient of its filters."""
LARGEST = 64
"""Maximum of rows and columns of a tile. The minimum is 16, as tensor cores require."""
DEPTH = 32
"""Number of products that a program sums at a time."""


class Geometry(NamedTuple):
    """Geometry of a convolution, equal in both directions."""

    stride: int
    padding: int


@triton.jit  # type: ignore[untyped-decorator]
def _convolve_tile(  # type: ignore[no-untyped-def]
    x,
    bank,
    expert_of,
    y,
    channels_in,
    height_in,
    width_in,
    channels_out,
    height_out,
    width_out,
    expert_step,
    out_step,
    in_step,
    kernel_height: tl.constexpr,
    kernel_width: tl.constexpr,
    stride: tl.constexpr,
    padding: tl.constexpr,
    backward: tl.constexpr,
    precision: tl.constexpr,
    pixels: tl.constexpr,
    columns: tl.constexpr,
    depth: tl.constexpr,
):
    """Computes some places and channels of one image's output; in the backward pass, of the gradient of its input."""
    places = height_out * width_out
    tiles = tl.cdiv(places, pixels)
    image = (tl.program_id(0) // tiles).to(tl.int64)  # a batch may have more than 2^31 numbers
    place = (tl.program_id(0) % tiles) * pixels + tl.arange(0, pixels)
    channel = tl.program_id(1) * columns + tl.arange(0, columns)
    row = place // width_out
    column = place % width_out
    filters = bank + tl.load(expert_of + image) * expert_step
    taps = kernel_height * kernel_width
    total = tl.zeros((pixels, columns), dtype=tl.float32)
    for start in range(0, channels_in * taps, depth):
        term = start + tl.arange(0, depth)
        source = term // taps
        tap = term % taps
        tap_h = tap // kernel_width
        tap_w = tap % kernel_width
        if backward:
            h = row[:, None] + padding - tap_h[None, :]
            w = column[:, None] + padding - tap_w[None, :]
            seen = (h >= 0) & (w >= 0) & (h % stride == 0) & (w % stride == 0)
            h = h // stride
            w = w // stride
        else:
            h = row[:, None] * stride - padding + tap_h[None, :]
            w = column[:, None] * stride - padding + tap_w[None, :]
            seen = (h >= 0) & (w >= 0)
        seen = seen & (h < height_in) & (w < width_in) & (source < channels_in)[None, :] & (place < places)[:, None]
        values = tl.load(x + ((image * channels_in + source[None, :]) * height_in + h) * width_in + w, seen, 0.0)
        weights = tl.load(
            filters + channel[None, :] * out_step + source[:, None] * in_step + tap[:, None],
            (channel < channels_out)[None, :] & (source < channels_in)[:, None],
            0.0,
        )
        total = tl.dot(values, weights, total, input_precision=precision)
    tl.store(
        y + (image * channels_out + channel[None, :]) * places + place[:, None],
        total.to(y.dtype.element_ty),
        (place < places)[:, None] & (channel < channels_out)[None, :],
    )


@triton.jit  # type: ignore[untyped-decorator]
def _filter_gradient_tile(  # type: ignore[no-untyped-def]
    x,
    gradient,
    order,
    first_of,
    partial,
    channels_in,
    height_in,
    width_in,
    channels_out,
    height_out,
    width_out,
    kernel_height: tl.constexpr,
    kernel_width: tl.constexpr,
    stride: tl.constexpr,
    padding: tl.constexpr,
    experts,
    splits: tl.constexpr,
    precision: tl.constexpr,
    rows: tl.constexpr,
    columns: tl.constexpr,
    depth: tl.constexpr,
):
    """Computes one tap of some filters of one expert, from every `splits`-th of the expert's images."""
    taps = kernel_height * kernel_width
    split = tl.program_id(0) % splits
    tap = tl.program_id(0) // splits % taps
    expert = tl.program_id(0) // splits // taps
    filter = tl.program_id(1) * rows + tl.arange(0, rows)
    source = tl.program_id(2) * columns + tl.arange(0, columns)
    places = height_out * width_out
    total = tl.zeros((rows, columns), dtype=tl.float32)
    first = tl.load(first_of + expert)
    last = tl.load(first_of + expert + 1)
    for position in range(first + split, last, splits):
        image = tl.load(order + position)
        for start in range(0, places, depth):
            place = start + tl.arange(0, depth)
            h = place // width_out * stride - padding + tap // kernel_width
            w = place % width_out * stride - padding + tap % kernel_width
            seen = (place < places) & (h >= 0) & (w >= 0) & (h < height_in) & (w < width_in)
            slopes = tl.load(
                gradient + (image * channels_out + filter[:, None]) * places + place[None, :],
                (filter < channels_out)[:, None] & (place < places)[None, :],
                0.0,
            )
            values = tl.load(
                x + ((image * channels_in + source[None, :]) * height_in + h[:, None]) * width_in + w[:, None],
                seen[:, None] & (source < channels_in)[None, :],
                0.0,
            )
            total = tl.dot(slopes, values, total, input_precision=precision)
    tl.store(
        partial
        + (((split * experts + expert) * channels_out + filter[:, None]) * channels_in + source[None, :]) * taps
        + tap,
        total,
        (filter < channels_out)[:, None] & (source < channels_in)[None, :],
    )


def convolve(x: Tensor, bank: Tensor, expert_index_B: Tensor, geometry: Geometry) -> Tensor:
    """Convolve each image [C, H, W] with its expert's filters in bank [N, S, C, kh, kw] -> [B, S, H', W']."""
    x, bank = x.contiguous(), bank.contiguous()
    images, channels, height, width = x.shape
    _, size, _, *kernel = bank.shape
    out = [
        (length + 2 * geometry.padding - taps) // geometry.stride + 1
        for length, taps in zip((height, width), kernel, strict=True)
    ]
    y = x.new_empty(images, size, *out)
    taps = kernel[0] * kernel[1]
    _launch(x, bank, expert_index_B, y, (bank.stride(0), channels * taps, taps), geometry, backward=False)
    return y


def input_gradient(gradient: Tensor, bank: Tensor, expert_index_B: Tensor, x: Tensor, geometry: Geometry) -> Tensor:
    """The gradient of `convolve` by x, computed from the gradient of its output."""
    gradient, bank = gradient.contiguous(), bank.contiguous()
    of_x = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    taps = bank.shape[3] * bank.shape[4]
    steps = (bank.stride(0), taps, bank.shape[2] * taps)
    _launch(gradient, bank, expert_index_B, of_x, steps, geometry, backward=True)
    return of_x


def filter_gradient(gradient: Tensor, x: Tensor, expert_index_B: Tensor, bank: Tensor, geometry: Geometry) -> Tensor:
    """The gradient of `convolve` by the bank, computed from the gradient of its output."""
    gradient, x = gradient.contiguous(), x.contiguous()
    experts, size, channels, *kernel = bank.shape
    sorted_B, order_B = expert_index_B.sort(stable=True)
    first_of = torch.searchsorted(sorted_B, torch.arange(experts + 1, device=x.device))
    partial = torch.empty((SPLITS, *bank.shape), dtype=torch.float32, device=x.device)
    rows, columns = _tile(size), _tile(channels)
    grid = (experts * kernel[0] * kernel[1] * SPLITS, triton.cdiv(size, rows), triton.cdiv(channels, columns))
    shapes = (*x.shape[1:], *gradient.shape[1:], *kernel)
    tile = (rows, columns, DEPTH)
    with _on_device_of(x):
        _filter_gradient_tile[grid](
            x, gradient, order_B, first_of, partial, *shapes, *geometry, experts, SPLITS, _precision(x), *tile
        )
    return partial.sum(dim=0).to(bank.dtype)


def _launch(
    x: Tensor,
    bank: Tensor,
    expert_index_B: Tensor,
    y: Tensor,
    steps: tuple[int, int, int],
    geometry: Geometry,
    *,
    backward: bool,
) -> None:
    pixels, columns = _tile(y.shape[2] * y.shape[3]), _tile(y.shape[1])
    grid = (len(y) * triton.cdiv(y.shape[2] * y.shape[3], pixels), triton.cdiv(y.shape[1], columns))
    if not len(y):
        return
    shapes = (*x.shape[1:], *y.shape[1:], *steps, *bank.shape[3:])
    chosen_B, tile = expert_index_B.contiguous(), (pixels, columns, DEPTH)
    with _on_device_of(x):
        _convolve_tile[grid](x, bank, chosen_B, y, *shapes, *geometry, backward, _precision(x), *tile)


def _on_device_of(x: Tensor) -> AbstractContextManager[object]:
    """Triton starts programs on the current GPU, which need not be that of the numbers."""
    return torch.cuda.device_of(x) if x.is_cuda else nullcontext()


def _precision(x: Tensor) -> str:
    """How Triton multiplies numbers like those of x: TF32 and bf16 use the tensor cores, exact fp32 does not."""
    return "tf32" if x.dtype == torch.float32 and convolves_in_tf32() else "ieee"


def _tile(length: int) -> int:
    return max(16, min(LARGEST, int(triton.next_power_of_2(length))))


class _TiledConvolution(torch.autograd.Function):
    """The routed convolution by tiles, with the router's signal in the backward pass."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        bank: Tensor,
        bias: Tensor | None,
        gate: Tensor | None,
        decision: Decision,
        geometry: Geometry,
    ) -> Tensor:
        y = _plus(convolve(x, bank, decision.expert_index_B, geometry), bias, decision.expert_index_B)
        ctx.decision, ctx.geometry = decision._replace(logits_BN=None, gate=None), geometry
        of_gate = ctx.needs_input_grad[3]
        ctx.save_for_backward(x, bank, bias, y if of_gate and decision.signal != "mean" else None)
        ctx.gate_dtype = None if gate is None else gate.dtype
        return y

    @staticmethod
    @first_order
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, bank, bias, y = ctx.saved_tensors
        chosen_B, geometry = ctx.decision.expert_index_B, ctx.geometry
        needs_x, needs_bank, needs_bias, needs_gate = ctx.needs_input_grad[:4]
        of_bias = None
        if needs_bias:
            of_bias = torch.zeros_like(bias).index_add_(0, chosen_B, gradient.sum(dim=(2, 3)).to(bias.dtype))
        return (
            input_gradient(gradient, bank, chosen_B, x, geometry) if needs_x else None,
            filter_gradient(gradient, x, chosen_B, bank, geometry) if needs_bank else None,
            of_bias,
            _signal(ctx.decision, x, bank, bias, y, gradient, geometry).to(ctx.gate_dtype) if needs_gate else None,
            None,
            None,
        )


def _plus(y: Tensor, bias: Tensor | None, expert_index_B: Tensor) -> Tensor:
    return y if bias is None else y + bias[expert_index_B][:, :, None, None]


def _signal(
    decision: Decision,
    x: Tensor,
    bank: Tensor,
    bias: Tensor | None,
    y: Tensor | None,
    gradient: Tensor,
    geometry: Geometry,
) -> Tensor:
    """The gradient of a decision's gate (`advmoe.models.routing.Decision`)."""
    chosen_B, number = decision.expert_index_B, len(bank)
    if decision.signal == "mean":
        apart = None if bias is None else bias - bias.mean(dim=0)
        difference = _plus(convolve(x, bank - bank.mean(dim=0), chosen_B, geometry), apart, chosen_B)
        return row_products(gradient, difference)
    assert y is not None
    own_B = row_products(gradient, y)
    if decision.signal == "own":
        return own_B
    if number == 1:
        return own_B.new_zeros(len(own_B), 1)
    if decision.signal == "all" and number > 2:
        columns = []
        for expert in range(number):
            output = F.conv2d(x, bank[expert], None if bias is None else bias[expert], *geometry)
            columns.append(row_products(gradient, output))
        return (torch.stack(columns, dim=1) - own_B[:, None]).scatter(1, chosen_B[:, None], 0.0)
    other_B = 1 - chosen_B if decision.signal == "all" else decision.other_B
    assert other_B is not None
    of_other_B = row_products(gradient, _plus(convolve(x, bank, other_B, geometry), bias, other_B)) - own_B
    signal_BN = own_B.new_zeros(len(own_B), number).scatter(1, other_B[:, None], of_other_B[:, None])
    return signal_BN.scatter(1, chosen_B[:, None], 0.0)


def tiled_convolution(x: Tensor, bank: Tensor, bias: Tensor | None, decision: Decision, geometry: Geometry) -> Tensor:
    """The routed convolution of images [B, C, H, W] by a bank [N, S, C, kh, kw] with biases [N, S]."""
    y: Tensor = _TiledConvolution.apply(x, bank, bias, decision.gate, decision, geometry)
    return y
