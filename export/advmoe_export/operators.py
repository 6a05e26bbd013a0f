"""The routed operators `advmoe::moe_conv2d` and `advmoe::moe_linear`, and what each becomes for a single expert.

The two are all this package knows about a model. In a traced graph they are opaque nodes

    y = moe_conv2d(x, weight, bias, expert_index) {starts, size, stride, padding, dilation, groups}
    y = moe_linear(x, weight, bias, expert_index) {starts, size}

where row r of x (an image, or a token) is computed with rows starts[e] ... starts[e] + size - 1 (modulo the bank's
rows) of the weight
bank, e = expert_index[r]. Nothing of this domain is left in a finished file.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import onnx
import onnx_ir as ir

from advmoe_export.errors import UnsupportedModelError
from advmoe_export.scope import Scope

DOMAIN = "advmoe"
CONV = "moe_conv2d"
LINEAR = "moe_linear"
INPUTS = ("x", "weight", "bias", "expert_index")
ATTRIBUTES: dict[str, dict[str, str]] = {
    CONV: {"starts": "INTS", "size": "INT", "stride": "INTS", "padding": "INTS", "dilation": "INTS", "groups": "INT"},
    LINEAR: {"starts": "INTS", "size": "INT"},
}


def is_routed(node: ir.Node) -> bool:
    """Whether the node is one of the routed operators."""
    return node.domain == DOMAIN


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


@dataclass(eq=False, kw_only=True)
class Bank:
    """The weights of all experts of one routed node, as arrays that share memory wherever experts share filters.

    `weight` is [rows, ...], `bias` [rows] or None; a window that wraps around finds its rows again behind the end.
    """

    weight: np.ndarray
    bias: np.ndarray | None
    starts: tuple[int, ...]
    size: int
    _tensors: dict[tuple[str, int], ir.TensorProtocol] = field(default_factory=dict)

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

    def tensors(
        self, expert: int, name: str, *, transposed: bool = False
    ) -> tuple[ir.TensorProtocol, ir.TensorProtocol | None]:
        """One expert's weight and bias as tensors; the same objects whenever they are asked for."""
        if ("weight", expert) not in self._tensors:
            weight = self.expert_weight(expert)
            weight = np.ascontiguousarray(weight.T) if transposed else weight
            self._tensors["weight", expert] = ir.tensor(weight, name=f"{name}.expert{expert}.weight")
            bias = self.expert_bias(expert)
            if bias is not None:
                self._tensors["bias", expert] = ir.tensor(bias, name=f"{name}.expert{expert}.bias")
        return self._tensors["weight", expert], self._tensors.get(("bias", expert))

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
    return Bank(weight=weight, bias=bias, starts=starts, size=size)


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
    scope: Scope, node: ir.Node, bank: Bank, expert: int, x: ir.Value, *, name: str, shape: ir.Shape
) -> ir.Value:
    """What one expert computes, its weights inside the scope."""
    weight, bias = bank.tensors(expert, str(node.name), transposed=node.op_type == LINEAR)
    return apply(
        scope,
        node,
        x,
        scope.constant(weight),
        None if bias is None else scope.constant(bias),
        name=name,
        shape=shape,
    )
