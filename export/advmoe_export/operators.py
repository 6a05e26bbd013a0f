"""The routed operators `advmoe::moe_conv2d` and `advmoe::moe_linear`, and what each becomes for a single expert.

The two are all this package knows about a model. In a traced graph they are opaque nodes

    y = moe_conv2d(x, weight, bias, expert_index) {starts, size, stride, padding, dilation, groups}
    y = moe_linear(x, weight, bias, expert_index) {starts, size}

where row r of x (an image, or a token) is computed with rows starts[e] ... starts[e] + size - 1 (modulo the bank's
rows) of the weight bank, e = expert_index[r]. Nothing of this domain is left in a finished file.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
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
    CONV: {"starts": "INTS", "size": "INT", "stride": "INTS", "padding": "INTS", "dilation": "INTS", "groups": "INT"},
    LINEAR: {"starts": "INTS", "size": "INT"},
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

    values: ir.TensorProtocol
    scale: ir.TensorProtocol | None = None
    zero: ir.TensorProtocol | None = None
    axis: int = 0


def _restore(scope: Scope, stored: Stored) -> ir.Value:
    """A stored constant as floats in a scope."""
    values = scope.constant(stored.values)
    if stored.scale is None or stored.zero is None:
        return values
    return scope.op(
        "DequantizeLinear",
        [values, scope.constant(stored.scale), scope.constant(stored.zero)],
        {"axis": stored.axis},
        name=f"{stored.values.name}.restored",
        dtype=ir.DataType.FLOAT,
        shape=values.shape,
    )


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
    """The weights of all experts of one routed node, as arrays that share memory wherever experts share filters.

    `weight` is [rows, ...], `bias` [rows] or None; a window that wraps around finds its rows again behind the end.
    """

    weight: np.ndarray
    bias: np.ndarray | None
    starts: tuple[int, ...]
    size: int
    x_scales: tuple[float, ...] | None = None
    """Scale of the uint8 input of each expert, where the operator is quantised."""
    _tensors: dict[int, tuple[Stored, Stored | None]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        over = max(start + self.size for start in self.starts) - len(self.weight)
        if over > 0:
            self.weight = np.concatenate((self.weight, self.weight[:over]))
            self.bias = None if self.bias is None else np.concatenate((self.bias, self.bias[:over]))

    @property
    def num_experts(self) -> int:
        """N."""
        return len(self.starts)

    def window(self, expert: int) -> slice:
        """Rows of one expert."""
        return slice(self.starts[expert], self.starts[expert] + self.size)

    def expert_weight(self, expert: int) -> np.ndarray:
        """A view of one expert's filters."""
        return self.weight[self.window(expert)]

    def expert_bias(self, expert: int) -> np.ndarray | None:
        """A view of one expert's bias."""
        return None if self.bias is None else self.bias[self.window(expert)]

    def written(self, scope: Scope, node: ir.Node, expert: int) -> tuple[ir.Value, ir.Value | None]:
        """One expert's weight and bias in a scope, the weight of a linear operator transposed.

        The tensors are the same objects whenever they are asked for, so that they are stored once.
        """
        if expert not in self._tensors:
            self._tensors[expert] = self._make_tensors(node, expert)
        weight, bias = self._tensors[expert]
        return _restore(scope, weight), None if bias is None else _restore(scope, bias)

    def _make_tensors(self, node: ir.Node, expert: int) -> tuple[Stored, Stored | None]:
        name, axis = f"{node.name}.expert{expert}", 1 if node.op_type == LINEAR else 0
        weight, bias = self.expert_weight(expert), self.expert_bias(expert)
        scale = None
        if self.x_scales is not None:
            weight, scale = self.codes[0][self.window(expert)], self.codes[1][self.window(expert)]
            zero = np.zeros(len(scale), np.int8)
        if axis == 1:
            weight = np.ascontiguousarray(weight.T)
        if scale is None or self.x_scales is None:
            plain = Stored(ir.tensor(weight, name=f"{name}.weight"))
            return plain, None if bias is None else Stored(ir.tensor(bias, name=f"{name}.bias"))
        integers = Stored(
            ir.tensor(weight, name=f"{name}.weight"),
            ir.tensor(scale, name=f"{name}.scale"),
            ir.tensor(zero, name=f"{name}.zero"),
            axis,
        )
        if bias is None or axis == 1:
            return integers, None if bias is None else Stored(ir.tensor(bias, name=f"{name}.bias"))
        bias_scale = (scale * np.float32(self.x_scales[expert])).astype(np.float32)
        codes = quantize_bias(bias, bias_scale)
        return integers, Stored(
            ir.tensor(codes, name=f"{name}.bias"),
            ir.tensor(bias_scale, name=f"{name}.bias_scale"),
            ir.tensor(np.zeros(len(codes), np.int32), name=f"{name}.bias_zero"),
        )

    @cached_property
    def codes(self) -> tuple[npt.NDArray[np.int8], npt.NDArray[np.float32]]:
        """The weights as integers, and the scale of each row."""
        return quantize_rows(self.weight)

    def stacked(self) -> tuple[np.ndarray, np.ndarray | None]:
        """All experts' filters one after another, [N * size, ...]; a view of the bank where that is its order
        already.
        """
        n, size = self.num_experts, self.size
        if self.starts == tuple(range(0, n * size, size)):
            return self.weight[: n * size], None if self.bias is None else self.bias[: n * size]
        weight = np.concatenate([self.expert_weight(e) for e in range(n)])
        bias = None if self.bias is None else np.concatenate([self.bias[self.window(e)] for e in range(n)])
        return weight, bias


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
        UnsupportedModelError: weights are not constant, or a window does not fit the bank.
    """
    weight = initializer(node.inputs[1], "the weight of a routed operator")
    assert weight is not None
    bias = initializer(node.inputs[2], "the bias of a routed operator")
    starts, size = tuple(ints(node, "starts")), node.attributes.get_int("size")
    if size > len(weight) or not all(0 <= start < len(weight) for start in starts):
        raise UnsupportedModelError(
            f"experts of '{node.name}' must lie in a bank of {len(weight)} rows, got windows of {size} rows at {starts}"
        )
    scales = node.attributes.get_floats("x_scales", None)
    x_scales = None if scales is None else tuple(scales)
    return Bank(weight=weight, bias=bias, starts=starts, size=size, x_scales=x_scales)


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
