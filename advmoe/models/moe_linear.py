"""The MoE linear layer: multiplies every unit (an image's tokens, or one token) by the weights of
its own expert only.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from advmoe.models.dispatch import Order, dispatch, exporting
from advmoe.models.rows import Rows, expert_rows, split_rows


def _expert_linear(x: Tensor, weight: Tensor, bias: Tensor | None, rows: tuple[int, ...]) -> Tensor:
    return F.linear(x, expert_rows(weight, rows), None if bias is None else expert_rows(bias, rows))


def _moe_linear(x: Tensor, weight: Tensor, bias: Tensor | None, expert_index: Tensor, rows: Rows) -> Tensor:
    def multiply(expert: int, part: Tensor) -> Tensor:
        return _expert_linear(part, weight, bias, rows[expert])

    return dispatch(x, Order.of(expert_index, len(rows)), multiply)


# Like `advmoe::moe_conv2d`, this is one opaque node for exporters. Eager execution calls the
# function itself.
_operator = torch.library.custom_op(
    "advmoe::moe_linear",
    lambda x, weight, bias, expert_index, rows, size: _moe_linear(
        x, weight, bias, expert_index, split_rows(rows, size)
    ).clone(),
    mutates_args=(),
    schema="(Tensor x, Tensor weight, Tensor? bias, Tensor expert_index, int[] rows, int size) -> Tensor",
)


@_operator.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor | None, expert_index: Tensor, rows: Sequence[int], size: int) -> Tensor:
    return F.linear(x, weight[:size], None if bias is None else bias[:size])


def moe_linear(x: Tensor, weight: Tensor, bias: Tensor | None, expert_index: Tensor, *, rows: Rows) -> Tensor:
    """Multiply row b of x by the weights of expert `expert_index[b]`: y[b] = x[b] @ W_e.T + bias_e.

    Args:
        x: [U, ..., D_in]. What is routed as one lies along U: an image with all its tokens ([B, T,
            D_in]), or a single token ([B * T, D_in]).
        weight: Weight bank [bank, D_in]; expert e multiplies by its rows rows[e].
        bias: Bias bank [bank] or None, shared out in the same way.
        expert_index: int64 [U], each one of range(len(rows)).
        rows: Bank rows of each expert, in the order of its outputs.

    Returns:
        [U, ..., len(rows[0])], in the order of x.
    """
    if exporting():
        flat = list(chain.from_iterable(rows))
        y: Tensor = torch.ops.advmoe.moe_linear(x, weight, bias, expert_index, flat, len(rows[0]))
        return y
    return _moe_linear(x, weight, bias, expert_index, rows)


class MoELinear(nn.Module):
    """A linear layer whose outputs are divided among experts. The caller provides the decision.

    Args:
        in_features: Number of inputs, D_in.
        bank: Outputs of all experts together.
        rows: Outputs of each expert, in order.
    """

    def __init__(self, in_features: int, bank: int, rows: Rows) -> None:
        super().__init__()
        self.rows = rows
        self.weight = nn.Parameter(torch.empty(bank, in_features))
        self.bias = nn.Parameter(torch.empty(bank))

    @property
    def num_experts(self) -> int:
        """N."""
        return len(self.rows)

    def forward(self, x: Tensor, expert_index: Tensor) -> Tensor:
        """[U, ..., D_in] and int64 [U] -> [U, ..., outputs of an expert]."""
        return moe_linear(x, self.weight, self.bias, expert_index, rows=self.rows)

    def one_expert(self, expert: int, x: Tensor) -> Tensor:
        """[..., D_in] -> [..., outputs of an expert], everything by the same expert."""
        return _expert_linear(x, self.weight, self.bias, self.rows[expert])

    def extra_repr(self) -> str:
        """Shown by print(model)."""
        bank, in_features = self.weight.shape
        return f"{in_features}, {len(self.rows[0])} of {bank}, experts={self.num_experts}"
