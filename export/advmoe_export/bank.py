"""The weight bank of an MoE layer, and the tensors of each expert in the file.

Experts may share rows of the bank (N * r > 1). If the rows of an expert are consecutive, its tensor
is a view of the bank. Rows that several experts share are therefore stored once in the file.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

from advmoe_export.errors import UnsupportedModelError
from advmoe_export.operators import LINEAR, expert_rows, initializer


class Stored(NamedTuple):
    """A constant in the file: floats, or integers with a scale and a zero point along one axis."""

    pieces: tuple[ir.TensorProtocol, ...]
    """Parts along the first axis. There are several if the rows are not consecutive in the bank."""
    scale: ir.TensorProtocol | None = None
    zero: ir.TensorProtocol | None = None
    axis: int = 0


def _one_piece(array: npt.NDArray[Any], name: str) -> tuple[ir.TensorProtocol, ...]:
    return (ir.tensor(array, name=name),)


LARGEST_BIAS = 2**30
"""Largest integer of a bias. The other half of int32 is for the sum to which a kernel adds it."""


def quantize_rows(
    weight: npt.NDArray[Any], bias: npt.NDArray[Any] | None = None, x_scale: float = 1.0
) -> tuple[npt.NDArray[np.int8], npt.NDArray[np.float32]]:
    """Quantize weights to integers in -127 ... 127, with one scale per row.

    Args:
        weight: [rows, ...].
        bias: [rows] or None. The scale of a row is large enough for its bias, also if its weights
            are zero.
        x_scale: smallest scale of the input. A bias has the unit `x_scale` times its row's scale.
    """
    largest = np.abs(weight.reshape(len(weight), -1)).max(axis=1).astype(np.float64)
    least = np.full(len(weight), 1e-8 / 127)
    if bias is not None:
        least = np.maximum(least, np.abs(bias.astype(np.float64)) / (LARGEST_BIAS * x_scale))
    scale = np.maximum(largest / 127, least).astype(np.float32)
    codes = np.rint(weight / scale.reshape(-1, *([1] * (weight.ndim - 1))))
    return codes.astype(np.int8), scale


def quantize_bias(bias: npt.NDArray[Any], scale: npt.NDArray[np.float32]) -> npt.NDArray[np.int32]:
    """Quantize a bias to integers in units of `scale`. Integer kernels add them to their sums."""
    codes = np.rint(bias.astype(np.float64) / scale.astype(np.float64))  # float32 has no 2**31 - 1
    return np.clip(codes, -(2**31) + 1, 2**31 - 1).astype(np.int32)


@dataclass(eq=False, kw_only=True)
class Bank:
    """The weights of all experts of one MoE layer.

    `weight` is [bank, ...], `bias` [bank] or None.
    """

    weight: np.ndarray
    bias: np.ndarray | None
    rows: tuple[tuple[int, ...], ...]
    """Bank rows of each expert, in the order of its outputs."""
    x_scales: tuple[float, ...] | None = None
    """Scale of each expert's uint8 input if the layer is quantized, else None."""
    _tensors: dict[object, tuple[Stored, Stored | None]] = field(default_factory=dict)

    @property
    def num_experts(self) -> int:
        """N."""
        return len(self.rows)

    @property
    def size(self) -> int:
        """Number of outputs of one expert."""
        return len(self.rows[0])

    def selection(self, expert: int) -> slice | list[int]:
        """An index that selects the rows of one expert from the bank."""
        rows = self.rows[expert]
        side_by_side = rows == tuple(range(rows[0], rows[0] + len(rows)))
        return slice(rows[0], rows[0] + len(rows)) if side_by_side else list(rows)

    def expert_weight(self, expert: int) -> np.ndarray:
        """The filters of one expert."""
        return self.weight[self.selection(expert)]

    def expert_bias(self, expert: int) -> np.ndarray | None:
        """The bias of one expert."""
        return None if self.bias is None else self.bias[self.selection(expert)]

    def stored(self, node: ir.Node, expert: int) -> tuple[Stored, Stored | None]:
        """Weight and bias of one expert as the file stores them.

        The weight of a linear layer is transposed. Every call returns the same tensor objects, so
        the file stores each tensor once.
        """
        own = self.rows[expert], None if self.x_scales is None else self.x_scales[expert]
        if own not in self._tensors:  # at r = 1 all experts have the same rows
            self._tensors[own] = self._make_tensors(node, expert)
        return self._tensors[own]

    def _make_tensors(self, node: ir.Node, expert: int) -> tuple[Stored, Stored | None]:
        name, axis = f"{node.name}.expert{expert}", 1 if node.op_type == LINEAR else 0
        bias = self.expert_bias(expert)
        bank = self.weight if self.x_scales is None else self.codes[0]
        if axis == 1:
            weight = _one_piece(np.ascontiguousarray(bank[self.selection(expert)].T), f"{name}.weight")
        else:
            weight = tuple(ir.tensor(bank[run], name=f"{name}.weight") for run in self._runs(expert))
        plain_bias = None if bias is None else Stored(_one_piece(bias, f"{name}.bias"))
        if self.x_scales is None:
            return Stored(weight), plain_bias
        scale = self.codes[1][self.selection(expert)]
        integers = Stored(
            weight,
            ir.tensor(scale, name=f"{name}.scale"),
            ir.tensor(np.zeros(len(scale), np.int8), name=f"{name}.zero"),
            axis,
        )
        if bias is None or axis == 1:
            return integers, plain_bias
        bias_scale = (scale * np.float32(self.x_scales[expert])).astype(np.float32)
        codes = quantize_bias(bias, bias_scale)
        return integers, Stored(
            _one_piece(codes, f"{name}.bias"),
            ir.tensor(bias_scale, name=f"{name}.bias_scale"),
            ir.tensor(np.zeros(len(codes), np.int32), name=f"{name}.bias_zero"),
        )

    def _runs(self, expert: int) -> list[slice]:
        """The rows of one expert, as slices of consecutive rows of the bank."""
        rows = self.rows[expert]
        starts = [0, *(place for place in range(1, len(rows)) if rows[place] != rows[place - 1] + 1), len(rows)]
        return [slice(rows[first], rows[first] + end - first) for first, end in pairwise(starts)]

    @cached_property
    def codes(self) -> tuple[npt.NDArray[np.int8], npt.NDArray[np.float32]]:
        """The weights as integers, and the scale of each row."""
        assert self.x_scales is not None
        return quantize_rows(self.weight, self.bias, min(self.x_scales))

    def stacked(self) -> tuple[np.ndarray, np.ndarray | None]:
        """Filters and biases of all experts, concatenated: [N * size, ...].

        The result is a view of the bank if the bank has that order already.
        """
        everything = [row for rows in self.rows for row in rows]
        chosen = slice(len(everything)) if everything == list(range(len(everything))) else everything
        return self.weight[chosen], None if self.bias is None else self.bias[chosen]


def read_bank(node: ir.Node) -> Bank:
    """The weight bank of an MoE layer.

    Raises:
        UnsupportedModelError: the weights are not constant, or an expert has rows outside the bank.
    """
    weight = initializer(node.inputs[1], "the weight of a routed operator")
    assert weight is not None
    bias = initializer(node.inputs[2], "the bias of a routed operator")
    rows = expert_rows(node)
    if not all(0 <= row < len(weight) for own in rows for row in own):
        raise UnsupportedModelError(
            f"experts of '{node.name}' must lie in a bank of {len(weight)} rows, got rows up to {max(map(max, rows))}"
        )
    scales = node.attributes.get_floats("x_scales", None)
    x_scales = None if scales is None else tuple(scales)
    return Bank(weight=weight, bias=bias, rows=rows, x_scales=x_scales)
