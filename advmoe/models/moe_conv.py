"""The MoE convolution: every image is convolved with the filters of its own expert, and with no others.

The batch is dispatched (grouped by expert), each group runs one ordinary convolution, the results are combined back
into batch order. In training too the cost is that of one expert per image.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from advmoe.models.routing import Decision, ExpertLayout, pass_gate


def expert_rows(bank: Tensor, start: int, size: int) -> Tensor:
    """Rows start .. start + size - 1 of a weight bank, wrapping around at its end."""
    end = start + size
    if end <= len(bank):
        return bank[start:end]
    return torch.cat((bank[start:], bank[: end - len(bank)]))


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
    starts: Sequence[int],
    size: int,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> Tensor:
    def convolve(expert: int, part: Tensor) -> Tensor:
        rows = expert_rows(weight, starts[expert], size)
        rows_bias = None if bias is None else expert_rows(bias, starts[expert], size)
        return F.conv2d(part, rows, rows_bias, list(stride), list(padding), list(dilation), groups)

    return dispatch(x, expert_index, len(starts), convolve)


# The operator an exporter sees as one node. Its kernel is the function above; `moe_conv2d` below calls the function
# itself while running eagerly, so that autograd differentiates through it.
_operator = torch.library.custom_op(
    "advmoe::moe_conv2d",
    lambda *args: _moe_conv2d(*args).clone(),
    mutates_args=(),
    schema=(
        "(Tensor x, Tensor weight, Tensor? bias, Tensor expert_index, int[] starts, int size, int[] stride, "
        "int[] padding, int[] dilation, int groups) -> Tensor"
    ),
)


@_operator.register_fake
def _(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    expert_index: Tensor,
    starts: Sequence[int],
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
    starts: Sequence[int],
    size: int,
    stride: int = 1,
    padding: int = 0,
    dilation: int = 1,
    groups: int = 1,
) -> Tensor:
    """Convolve image b with the filters of expert `expert_index_B[b]`.

    Args:
        x_BCHW: layer input.
        weight: weight bank [rows, C / groups, kh, kw]; expert e owns rows starts[e] ... starts[e] + size - 1, modulo
            rows.
        bias: bias bank [rows] or None.
        expert_index_B: int64, one of range(len(starts)) per image.
        starts: first row of each expert.
        size: output channels of an expert.
        stride: as in `torch.nn.functional.conv2d`, the same in both directions; so are padding and dilation.
        padding: zeros added on each side.
        dilation: spacing of the kernel's taps.
        groups: groups of the convolution.

    Returns:
        [B, size, H', W'], in batch order.
    """
    geometry = ([stride] * 2, [padding] * 2, [dilation] * 2, groups)
    compute = torch.ops.advmoe.moe_conv2d if torch.compiler.is_exporting() else _moe_conv2d
    y_BCHW: Tensor = compute(x_BCHW, weight, bias, expert_index_B, list(starts), size, *geometry)
    return y_BCHW


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
        self.starts = layout.starts
        self.weight = nn.Parameter(torch.empty(len(layout.bank_channels), in_channels, kernel_size, kernel_size))
        nn.init.kaiming_normal_(self.weight, nonlinearity="relu")

    def forward(self, x_BCHW: Tensor, decision: Decision) -> Tensor:
        """Output of each image's expert, [B, size, H', W'], in the expert's own (packed) channel order."""
        y_BCHW = moe_conv2d(
            x_BCHW,
            self.weight,
            None,
            decision.expert_index_B,
            starts=self.starts,
            size=self.out_channels,
            stride=self.stride,
            padding=self.padding,
        )
        return pass_gate(y_BCHW, decision, lambda: self.mean_expert(x_BCHW))

    def mean_expert(self, x_BCHW: Tensor) -> Tensor:
        """Mean of all experts' outputs: one convolution with their mean filters."""
        experts = [expert_rows(self.weight, start, self.out_channels) for start in self.starts]
        return F.conv2d(x_BCHW, torch.stack(experts).mean(dim=0), None, self.stride, self.padding)

    def extra_repr(self) -> str:
        """Shown by print(model)."""
        layout = self.layout
        return (
            f"{self.in_channels}, {self.out_channels} of {layout.num_channels}, experts={layout.num_experts}, "
            f"kernel_size={self.weight.shape[-1]}, stride={self.stride}, padding={self.padding}"
        )
