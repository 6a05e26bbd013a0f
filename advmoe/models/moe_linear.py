"""The MoE linear layer: every row (an image's tokens, or one token) meets the weights of its own expert only."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from advmoe.models.moe_conv import dispatch, expert_rows


def _expert_linear(x: Tensor, weight: Tensor, bias: Tensor | None, start: int, size: int) -> Tensor:
    return F.linear(x, expert_rows(weight, start, size), None if bias is None else expert_rows(bias, start, size))


def _moe_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, expert_index: Tensor, starts: Sequence[int], size: int
) -> Tensor:
    def multiply(expert: int, part: Tensor) -> Tensor:
        return _expert_linear(part, weight, bias, starts[expert], size)

    return dispatch(x, expert_index, len(starts), multiply)


# As `advmoe::moe_conv2d`: one opaque node for exporters, while eager execution calls the function itself.
_operator = torch.library.custom_op(
    "advmoe::moe_linear",
    lambda *args: _moe_linear(*args).clone(),
    mutates_args=(),
    schema="(Tensor x, Tensor weight, Tensor? bias, Tensor expert_index, int[] starts, int size) -> Tensor",
)


@_operator.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor | None, expert_index: Tensor, starts: Sequence[int], size: int) -> Tensor:
    return F.linear(x, weight[:size], None if bias is None else bias[:size])


def moe_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, expert_index: Tensor, *, starts: Sequence[int], size: int
) -> Tensor:
    """Multiply row b of x by the weights of expert `expert_index[b]`: y[b] = x[b] @ W_e.T + bias_e.

    Args:
        x: [rows, ..., D_in]. A row is what is routed as one: an image with all its tokens ([B, T, D_in]), or a single
            token ([B * T, D_in]).
        weight: weight bank [bank, D_in]; expert e owns entries starts[e] ... starts[e] + size - 1, modulo bank.
        bias: bias bank [bank] or None, shared out in the same way.
        expert_index: int64 [rows], each one of range(len(starts)).
        starts: first entry of each expert.
        size: outputs of an expert.

    Returns:
        [rows, ..., size], in the order of x.
    """
    compute = torch.ops.advmoe.moe_linear if torch.compiler.is_exporting() else _moe_linear
    y: Tensor = compute(x, weight, bias, expert_index, list(starts), size)
    return y


class MoELinear(nn.Module):
    """A linear layer whose outputs are shared out among experts; the decision comes from outside.

    Args:
        in_features: D_in.
        bank: outputs of all experts together.
        starts: first output of each expert in the bank; a window wraps around at its end.
        size: outputs of one expert.
    """

    def __init__(self, in_features: int, bank: int, starts: Sequence[int], size: int) -> None:
        super().__init__()
        self.starts = tuple(starts)
        self.size = size
        self.weight = nn.Parameter(torch.empty(bank, in_features))
        self.bias = nn.Parameter(torch.empty(bank))

    @property
    def num_experts(self) -> int:
        """N."""
        return len(self.starts)

    @property
    def disjoint(self) -> bool:
        """Whether no output belongs to two experts, so that the weight bank splits evenly among them."""
        return len(self.weight) == self.num_experts * self.size

    def forward(self, x: Tensor, expert_index: Tensor) -> Tensor:
        """[rows, ..., D_in] and int64 [rows] -> [rows, ..., size]."""
        return moe_linear(x, self.weight, self.bias, expert_index, starts=self.starts, size=self.size)

    def one_expert(self, expert: int, x: Tensor) -> Tensor:
        """[..., D_in] -> [..., size], all rows by the same expert."""
        return _expert_linear(x, self.weight, self.bias, self.starts[expert], self.size)

    def extra_repr(self) -> str:
        """Shown by print(model)."""
        bank, in_features = self.weight.shape
        return f"{in_features}, {self.size} of {bank}, experts={self.num_experts}"
