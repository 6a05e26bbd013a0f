"""The routed operators `advmoe::moe_conv2d` and `advmoe::moe_linear`, and what each becomes for a single expert.

The two are all this package knows about a model. In a traced graph they are opaque nodes

    y = moe_conv2d(x, weight, bias, expert_index) {rows, size, stride, padding, dilation, groups}
    y = moe_linear(x, weight, bias, expert_index) {rows, size}

where row r of x (an image, or a token) is computed with rows[e * size], ..., rows[(e + 1) * size - 1] of the weight
bank, e = expert_index[r]. Nothing of this domain is left in a finished file.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import onnx
import onnx_ir as ir

from advmoe_export.errors import UnsupportedModelError
from advmoe_export.scope import Scope

DOMAIN = "advmoe"
CONV = "moe_conv2d"
LINEAR = "moe_linear"
FAKE_QUANTIZE = "fake_quantize"
"""Rounds x to the uint8 levels of each row's expert: y = fake_quantize(x, expert_index) {scales, zero_points}."""
INPUTS = ("x", "weight", "bias", "expert_index")
ATTRIBUTES: dict[str, dict[str, str]] = {
    CONV: {"rows": "INTS", "size": "INT", "stride": "INTS", "padding": "INTS", "dilation": "INTS", "groups": "INT"},
    LINEAR: {"rows": "INTS", "size": "INT"},
}


def is_routed(node: ir.Node) -> bool:
    """Whether the node obeys a decision: a routed operator, or a quantisation with scales of each expert."""
    return node.domain == DOMAIN


def has_bank(node: ir.Node) -> bool:
    """Whether the node is a routed operator with weights: an MoE layer."""
    return node.domain == DOMAIN and node.op_type in ATTRIBUTES


def decision_of(node: ir.Node) -> ir.Value | None:
    """The decision int64 [rows] that a node obeys; None for ordinary nodes."""
    return node.inputs[-1] if is_routed(node) else None


def register_schemas() -> None:
    """Make the operators known to onnx, which torch's exporter asks for their signature; does nothing the second
    time.
    """
    defs = onnx.defs
    optional = defs.OpSchema.FormalParameterOption.Optional
    single = defs.OpSchema.FormalParameterOption.Single
    for name, attributes in ATTRIBUTES.items():
        if defs.has(name, DOMAIN):
            continue
        inputs = [
            defs.OpSchema.FormalParameter(
                parameter,
                "tensor(int64)" if parameter == "expert_index" else "T",
                param_option=optional if parameter == "bias" else single,
            )
            for parameter in INPUTS
        ]
        defs.register_schema(
            defs.OpSchema(
                name,
                DOMAIN,
                1,
                inputs=inputs,
                outputs=[defs.OpSchema.FormalParameter("y", "T")],
                type_constraints=[("T", ["tensor(float)", "tensor(float16)"], "activations and weights")],
                attributes=[
                    defs.OpSchema.Attribute(key, getattr(defs.OpSchema.AttrType, kind), "", required=True)
                    for key, kind in attributes.items()
                ],
            )
        )


class Stored(NamedTuple):
    """A constant as it lies in the file: numbers, or integers with a scale and a zero point along one axis."""

    pieces: tuple[ir.TensorProtocol, ...]
    """Its parts along the first axis; several where they lie apart in the bank that experts share."""
    scale: ir.TensorProtocol | None = None
    zero: ir.TensorProtocol | None = None
    axis: int = 0


def _restore(scope: Scope, stored: Stored) -> ir.Value:
    """A stored constant as floats in a scope."""
    values = _join(scope, stored.pieces)
    if stored.scale is None or stored.zero is None:
        return values
    return scope.op(
        "DequantizeLinear",
        [values, scope.constant(stored.scale), scope.constant(stored.zero)],
        {"axis": stored.axis},
        name=f"{stored.pieces[0].name}.restored",
        dtype=ir.DataType.FLOAT,
        shape=values.shape,
    )


def _join(scope: Scope, pieces: Sequence[ir.TensorProtocol]) -> ir.Value:
    """The pieces of a constant as one value; onnxruntime joins them when it loads the file."""
    values = [scope.constant(piece) for piece in pieces]
    if len(values) == 1:
        return values[0]
    shape = [sum(piece.shape.numpy()[0] for piece in pieces), *pieces[0].shape.numpy()[1:]]
    return scope.op("Concat", values, {"axis": 0}, name=f"{pieces[0].name}.joined", dtype=pieces[0].dtype, shape=shape)


def _one_piece(array: npt.NDArray[Any], name: str) -> tuple[ir.TensorProtocol, ...]:
    return (ir.tensor(array, name=name),)


def quantize_rows(weight: npt.NDArray[Any]) -> tuple[npt.NDArray[np.int8], npt.NDArray[np.float32]]:
    """Codes [rows, ...] in -127 ... 127 and one scale per row."""
    largest = np.abs(weight.reshape(len(weight), -1)).max(axis=1)
    scale = (np.maximum(largest, 1e-8) / 127).astype(np.float32)
    codes = np.rint(weight / scale.reshape(-1, *([1] * (weight.ndim - 1))))
    return codes.astype(np.int8), scale


def quantize_bias(bias: npt.NDArray[Any], scale: npt.NDArray[np.float32]) -> npt.NDArray[np.int32]:
    """Codes of a bias in units of scale, as integer kernels add it to their sums."""
    return np.clip(np.rint(bias / scale), -(2**31) + 1, 2**31 - 1).astype(np.int32)


@dataclass(eq=False, kw_only=True)
class Bank:
    """The weights of all experts of one routed node: views of one array wherever an expert's rows lie side by side.

    `weight` is [bank, ...], `bias` [bank] or None.
    """

    weight: np.ndarray
    bias: np.ndarray | None
    rows: tuple[tuple[int, ...], ...]
    """Rows of each expert, in the order of its outputs."""
    x_scales: tuple[float, ...] | None = None
    """Scale of the uint8 input of each expert, where the operator is quantised."""
    _tensors: dict[object, tuple[Stored, Stored | None]] = field(default_factory=dict)

    @property
    def num_experts(self) -> int:
        """N."""
        return len(self.rows)

    @property
    def size(self) -> int:
        """Outputs of one expert."""
        return len(self.rows[0])

    def selection(self, expert: int) -> slice | list[int]:
        """What picks one expert's rows out of the bank."""
        rows = self.rows[expert]
        side_by_side = rows == tuple(range(rows[0], rows[0] + len(rows)))
        return slice(rows[0], rows[0] + len(rows)) if side_by_side else list(rows)

    def expert_weight(self, expert: int) -> np.ndarray:
        """One expert's filters."""
        return self.weight[self.selection(expert)]

    def expert_bias(self, expert: int) -> np.ndarray | None:
        """One expert's bias."""
        return None if self.bias is None else self.bias[self.selection(expert)]

    def written(self, scope: Scope, node: ir.Node, expert: int) -> tuple[ir.Value, ir.Value | None]:
        """One expert's weight and bias in a scope, the weight of a linear operator transposed.

        The tensors are the same objects whenever they are asked for, so that they are stored once.
        """
        own = self.rows[expert], None if self.x_scales is None else self.x_scales[expert]
        if own not in self._tensors:  # at r = 1 all experts have the same rows
            self._tensors[own] = self._make_tensors(node, expert)
        weight, bias = self._tensors[own]
        return _restore(scope, weight), None if bias is None else _restore(scope, bias)

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
        """One expert's rows as stretches that lie side by side in the bank."""
        rows = self.rows[expert]
        starts = [0, *(place for place in range(1, len(rows)) if rows[place] != rows[place - 1] + 1), len(rows)]
        return [slice(rows[first], rows[first] + end - first) for first, end in pairwise(starts)]

    @cached_property
    def codes(self) -> tuple[npt.NDArray[np.int8], npt.NDArray[np.float32]]:
        """The weights as integers, and the scale of each row."""
        return quantize_rows(self.weight)

    def stacked(self) -> tuple[np.ndarray, np.ndarray | None]:
        """All experts' filters one after another, [N * size, ...]; a view of the bank where that is its order
        already.
        """
        everything = [row for rows in self.rows for row in rows]
        chosen = slice(len(everything)) if everything == list(range(len(everything))) else everything
        return self.weight[chosen], None if self.bias is None else self.bias[chosen]


def initializer(value: ir.Value | None, what: str) -> np.ndarray | None:
    """The array behind an initializer.

    Raises:
        UnsupportedModelError: the value is computed at run time.
    """
    if value is None:
        return None
    if value.const_value is None:
        raise UnsupportedModelError(
            f"{what} '{value.name}' must be a parameter of the module, but it is computed while the model runs; "
            "store it as a parameter before exporting"
        )
    return np.ascontiguousarray(value.const_value.numpy())


def read_bank(node: ir.Node) -> Bank:
    """The weight bank of a routed node.

    Raises:
        UnsupportedModelError: weights are not constant, or an expert's rows are not in the bank.
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


def expert_rows(node: ir.Node) -> tuple[tuple[int, ...], ...]:
    """Bank rows of each expert of a routed node."""
    rows, size = ints(node, "rows"), node.attributes.get_int("size")
    return tuple(tuple(rows[start : start + size]) for start in range(0, len(rows), size))


def ints(node: ir.Node, name: str) -> Sequence[int]:
    """An integer list attribute."""
    return tuple(node.attributes.get_ints(name))


def apply(
    scope: Scope, node: ir.Node, x: ir.Value, weight: ir.Value, bias: ir.Value | None, *, name: str, shape: ir.Shape
) -> ir.Value:
    """The operator's ordinary form, for given weights: Conv, Gemm or MatMul.

    The weight of a linear operator comes transposed, [D_in, size].
    """
    if node.op_type == LINEAR:
        y = scope.op("MatMul", [x, weight], name=name, dtype=x.dtype, shape=shape)
        return y if bias is None else scope.op("Add", [y, bias], name=f"{name}_bias", dtype=x.dtype, shape=shape)
    assert weight.shape is not None
    padding = ints(node, "padding")
    return scope.op(
        "Conv",
        [x, weight] if bias is None else [x, weight, bias],
        {
            "dilations": ints(node, "dilation"),
            "group": node.attributes.get_int("groups"),
            "kernel_shape": [int(d) for d in weight.shape[2:]],  # type: ignore[arg-type]
            "pads": [*padding, *padding],
            "strides": ints(node, "stride"),
        },
        name=name,
        dtype=x.dtype,
        shape=shape,
    )


def compute_expert(
    scope: Scope, node: ir.Node, bank: Bank | None, expert: int, x: ir.Value, *, name: str, shape: ir.Shape
) -> ir.Value:
    """What one expert computes, its weights inside the scope.

    Args:
        scope: where to write.
        node: the routed node.
        bank: its weights; None for `fake_quantize`, which has none.
        expert: which of the experts.
        x: the rows that chose it.
        name: of the result.
        shape: of the result.
    """
    if bank is None:
        return _round(scope, node, expert, x, name, shape)
    weight, bias = bank.written(scope, node, expert)
    return apply(scope, node, x, weight, bias, name=name, shape=shape)


def _round(scope: Scope, node: ir.Node, expert: int, x: ir.Value, name: str, shape: ir.Shape) -> ir.Value:
    scale = np.float32(node.attributes.get_floats("scales")[expert])
    zero = np.uint8(node.attributes.get_ints("zero_points")[expert])
    levels = [scope.constant(ir.tensor(np.asarray(value), name=f"{name}.level")) for value in (scale, zero)]
    codes = scope.op("QuantizeLinear", [x, *levels], name=f"{name}.codes", dtype=ir.DataType.UINT8, shape=shape)
    return scope.op("DequantizeLinear", [codes, *levels], name=name, dtype=x.dtype, shape=shape)
