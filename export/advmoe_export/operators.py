"""The routed operators `advmoe::moe_conv2d` and `advmoe::moe_linear`.

This package knows nothing else about a model. In a traced graph these operators are opaque nodes:

    y = moe_conv2d(x, weight, bias, expert_index) {rows, size, stride, padding}
    y = moe_linear(x, weight, bias, expert_index) {rows, size}

Row r of x is an image or a token. Expert e = expert_index[r] computes row r with the rows rows[e *
size], ..., rows[(e + 1) * size - 1] of the weight bank. A finished file contains no node of this
domain.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx
import onnx_ir as ir

from advmoe_export.errors import UnsupportedModelError

DOMAIN = "advmoe"
CONV = "moe_conv2d"
LINEAR = "moe_linear"
FAKE_QUANTIZE = "fake_quantize"
"""y = fake_quantize(x, expert_index) {scales, zero_points}: rounds each row to the levels of its expert."""
INPUTS = ("x", "weight", "bias", "expert_index")
ATTRIBUTES: dict[str, dict[str, str]] = {
    CONV: {"rows": "INTS", "size": "INT", "stride": "INTS", "padding": "INTS"},
    LINEAR: {"rows": "INTS", "size": "INT"},
}


def is_routed(node: ir.Node) -> bool:
    """Whether the node depends on a decision: an MoE layer, or a rounding per expert."""
    return node.domain == DOMAIN


def has_bank(node: ir.Node) -> bool:
    """Whether the node is an MoE layer: a routed operator with weights."""
    return node.domain == DOMAIN and node.op_type in ATTRIBUTES


def decision_of(node: ir.Node) -> ir.Value | None:
    """The decision, int64 [rows], of a routed node; None for an ordinary node."""
    return node.inputs[-1] if is_routed(node) else None


def expert_rows(node: ir.Node) -> tuple[tuple[int, ...], ...]:
    """Bank rows of each expert of a routed node."""
    rows, size = ints(node, "rows"), node.attributes.get_int("size")
    return tuple(tuple(rows[start : start + size]) for start in range(0, len(rows), size))


def ints(node: ir.Node, name: str) -> Sequence[int]:
    """An attribute that is a list of integers."""
    return tuple(node.attributes.get_ints(name))


def initializer(value: ir.Value | None, what: str) -> np.ndarray | None:
    """The array of an initializer; None for an absent input.

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


def register_schemas() -> None:
    """Register the signatures of the operators with onnx, where torch's exporter looks them up.

    A second call does nothing.
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
