"""The MoE convolution: every image is convolved with the filters of its own expert, and with no others.

The batch is dispatched (grouped by expert), each group runs one ordinary convolution, the results are combined back
into batch order. In training too the cost is that of one expert per image.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from itertools import chain

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from advmoe.models.experts import ExpertLayout
from advmoe.models.routing import Decision, pass_gate

Rows = tuple[tuple[int, ...], ...]
"""Rows of a weight bank that belong to each expert, in the order of its output slots; as many for each."""


@lru_cache(maxsize=1024)
def _selection(rows: tuple[int, ...], device: torch.device) -> slice | Tensor:
    """What picks these rows out of a bank: a slice, which copies nothing, wherever they lie side by side."""
    if rows == tuple(range(rows[0], rows[0] + len(rows))):
        return slice(rows[0], rows[0] + len(rows))
    with torch.inference_mode(False):  # it outlives the pass that asked for it
        return torch.tensor(rows, device=device)


def expert_rows(bank: Tensor, rows: tuple[int, ...]) -> Tensor:
    """The rows of a weight bank that an expert owns, in the order of its slots."""
    chosen = _selection(rows, bank.device)
    return bank[chosen] if isinstance(chosen, slice) else bank.index_select(0, chosen)


def split_rows(rows: Sequence[int], size: int) -> Rows:
    """The rows of each expert, from all of them in one list."""
    return tuple(tuple(rows[start : start + size]) for start in range(0, len(rows), size))


def dispatch(x: Tensor, expert_index_B: Tensor, num_experts: int, compute: Callable[[int, Tensor], Tensor]) -> Tensor:
    """Apply `compute(expert, sub_batch)` to the images of each expert that has any, and combine in batch order."""
    counts = torch.bincount(expert_index_B, minlength=num_experts).tolist()
    present = [expert for expert, count in enumerate(counts) if count]
    if len(present) < 2:  # also for an empty batch, whose shape an expert knows
        return compute(present[0] if present else 0, x)
    order_B = expert_index_B.argsort(stable=True)
    parts = x[order_B].split([counts[expert] for expert in present])
    y = torch.cat([compute(expert, part) for expert, part in zip(present, parts, strict=True)])
    inverse_B = torch.empty_like(order_B)
    inverse_B[order_B] = torch.arange(len(order_B), device=order_B.device)
    return y[inverse_B]


def _moe_conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    expert_index: Tensor,
    rows: Rows,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> Tensor:
    def convolve(expert: int, part: Tensor) -> Tensor:
        own = expert_rows(weight, rows[expert])
        own_bias = None if bias is None else expert_rows(bias, rows[expert])
        return F.conv2d(part, own, own_bias, list(stride), list(padding), list(dilation), groups)

    return dispatch(x, expert_index, len(rows), convolve)


# The operator an exporter sees as one node. Its kernel is the function above; `moe_conv2d` below calls the function
# itself while running eagerly, so that autograd differentiates through it. A schema has no list of lists: `rows` holds
# the rows of all experts one after another, `size` of each.
_operator = torch.library.custom_op(
    "advmoe::moe_conv2d",
    lambda x, weight, bias, expert_index, rows, size, *geometry: _moe_conv2d(
        x, weight, bias, expert_index, split_rows(rows, size), *geometry
    ).clone(),
    mutates_args=(),
    schema=(
        "(Tensor x, Tensor weight, Tensor? bias, Tensor expert_index, int[] rows, int size, int[] stride, "
        "int[] padding, int[] dilation, int groups) -> Tensor"
    ),
)


@_operator.register_fake
def _(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    expert_index: Tensor,
    rows: Sequence[int],
    size: int,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> Tensor:
    return F.conv2d(
        x, weight[:size], None if bias is None else bias[:size], list(stride), list(padding), list(dilation), groups
    )


def moe_conv2d(
    x_BCHW: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    expert_index_B: Tensor,
    *,
    rows: Rows,
    stride: int = 1,
    padding: int = 0,
    dilation: int = 1,
    groups: int = 1,
) -> Tensor:
    """Convolve image b with the filters of expert `expert_index_B[b]`.

    Args:
        x_BCHW: layer input.
        weight: weight bank [bank, C / groups, kh, kw]; expert e convolves with its rows rows[e].
        bias: bias bank [bank] or None, shared out in the same way.
        expert_index_B: int64, one of range(len(rows)) per image.
        rows: bank rows of each expert, in the order of its output channels.
        stride: as in `torch.nn.functional.conv2d`, the same in both directions; so are padding and dilation.
        padding: zeros added on each side.
        dilation: spacing of the kernel's taps.
        groups: groups of the convolution.

    Returns:
        [B, len(rows[0]), H', W'], in batch order.
    """
    geometry = ([stride] * 2, [padding] * 2, [dilation] * 2, groups)
    if torch.compiler.is_exporting():
        flat = list(chain.from_iterable(rows))
        y_BCHW: Tensor = torch.ops.advmoe.moe_conv2d(
            x_BCHW, weight, bias, expert_index_B, flat, len(rows[0]), *geometry
        )
        return y_BCHW
    return _moe_conv2d(x_BCHW, weight, bias, expert_index_B, rows, *geometry)


class MoEConv2d(nn.Module):
    """A convolution whose filters are shared out among experts (paper, Sec. 3); the decision comes from outside."""

    def __init__(
        self,
        in_channels: int,
        layout: ExpertLayout,
        kernel_size: int,
        *,
        stride: int = 1,
        padding: int = 0,
    ) -> None:
        super().__init__()
        self.in_channels = in_channels
        self.out_channels = layout.size
        self.layout = layout
        self.stride = stride
        self.padding = padding
        self.rows = layout.rows
        self.weight = nn.Parameter(torch.empty(len(layout.bank_channels), in_channels, kernel_size, kernel_size))
        nn.init.kaiming_normal_(self.weight, nonlinearity="relu")

    def forward(self, x_BCHW: Tensor, decision: Decision) -> Tensor:
        """Output of each image's expert, [B, size, H', W'], in the expert's own (packed) channel order."""
        y_BCHW = moe_conv2d(
            x_BCHW,
            self.weight,
            None,
            decision.expert_index_B,
            rows=self.rows,
            stride=self.stride,
            padding=self.padding,
        )
        return pass_gate(y_BCHW, decision, lambda: self.mean_expert(x_BCHW))

    def mean_expert(self, x_BCHW: Tensor) -> Tensor:
        """Mean of all experts' outputs: one convolution with their mean filters."""
        experts = [expert_rows(self.weight, rows) for rows in self.rows]
        return F.conv2d(x_BCHW, torch.stack(experts).mean(dim=0), None, self.stride, self.padding)

    def extra_repr(self) -> str:
        """Shown by print(model)."""
        layout = self.layout
        return (
            f"{self.in_channels}, {self.out_channels} of {layout.num_channels}, experts={layout.num_experts}, "
            f"kernel_size={self.weight.shape[-1]}, stride={self.stride}, padding={self.padding}"
        )
