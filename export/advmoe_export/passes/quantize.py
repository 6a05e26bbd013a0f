"""Quantize convolutions and expert layers to int8. Routers and residual sums stay in float32.

Weights are int8, symmetric, with one scale per output channel. Activations are uint8 with one scale
per tensor and expert, measured on the images of the expert. The graph contains QuantizeLinear and
DequantizeLinear nodes inside the branches, which onnxruntime fuses into integer kernels.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import onnxruntime as ort

from advmoe_export.bank import quantize_bias, quantize_rows
from advmoe_export.errors import UnsupportedModelError
from advmoe_export.operators import CONV, DOMAIN, FAKE_QUANTIZE, decision_of, expert_rows, has_bank
from advmoe_export.passes.contract import GraphPass, is_flat, is_full_precision
from advmoe_export.passes.editing import constant, insert_one
from advmoe_export.passes.fold_batchnorm import batchnorm_is_folded
from advmoe_export.passes.half import router_nodes
from advmoe_export.passes.lower import Lowering
from advmoe_export.passes.regions import plan_regions
from advmoe_export.passes.storage import write_external
from advmoe_export.passes.write import finish, write_steps
from advmoe_export.scope import Scope

UINT8, INT8, INT32 = ir.DataType.UINT8, ir.DataType.INT8, ir.DataType.INT32
Range = npt.NDArray[np.float32]
"""[N, 2]: smallest and largest value over the images of each expert; N = 1 without a decision."""
BATCH_OF_CALIBRATION = 16


@dataclass(frozen=True)
class Affine:
    """Scales and zero points: the code q of expert e has the value scale[e] * (q - zero[e])."""

    scale: npt.NDArray[np.float32]
    zero: npt.NDArray[np.uint8]


class Quantize(GraphPass):
    """Quantize convolutions and expert layers.

    Args:
        images: calibration images in the input format of the graph.
        opset: version of the standard operators.
    """

    needs = (is_flat, batchnorm_is_folded, is_full_precision)

    def __init__(self, images: npt.NDArray[Any], opset: int) -> None:
        self.images, self.opset = images, opset

    def requires(self, model: ir.Model) -> None:
        """Check `needs`, and that the graph reads the calibration images."""
        super().requires(model)
        dtype = model.graph.inputs[0].dtype
        if dtype is None or dtype.numpy() != self.images.dtype:
            raise ir.passes.PreconditionError(
                f"Quantize cannot run: the graph reads {dtype} images, the calibration images are {self.images.dtype}"
            )

    def change(self, graph: ir.Graph) -> None:
        """Measure ranges, then round weights and activations.

        Raises:
            UnsupportedModelError: there is nothing to quantize, or onnxruntime cannot load the graph.
        """
        _quantize(graph, self.images, self.opset)


def _quantize(graph: ir.Graph, images: npt.NDArray[Any], opset: int) -> None:
    skipped = {use.node for use in _first_convolutions(graph)} | router_nodes(graph)
    layers = [node for node in graph if (has_bank(node) or _has_constant_weights(node)) and node not in skipped]
    if not layers:
        raise UnsupportedModelError(
            "int8 needs expert layers, or convolutions with constant weights behind the first one, and the module has "
            "none; export with fp32 or fp16"
        )
    ends = {node: _end(node) for node in layers if node.op_type in ("Conv", CONV)}
    wanted = {value: None for node in layers for value in (node.inputs[0], ends.get(node)) if value is not None}
    ranges = calibrate(graph, list(wanted), layers, images, opset)
    rounded: dict[ir.Value, ir.Value] = {}
    done: dict[tuple[ir.Value, ir.Value | None], tuple[ir.Value, Affine]] = {}
    for node in layers:
        source, decision = node.inputs[0], decision_of(node)
        assert source is not None
        if (source, decision) not in done:
            measured = ranges[rounded.get(source, source), decision]
            done[source, decision] = _fake_quantize(graph, node, source, decision, measured)
        quantized, affine = done[source, decision]
        node.replace_input_with(0, quantized)
        if has_bank(node):
            node.attributes["x_scales"] = ir.AttrFloat32s("x_scales", [float(s) for s in affine.scale])
        else:
            _quantize_weights(graph, node, float(affine.scale[0]))
        if node in ends:
            end = ends[node]
            uses = [(use.node, use.idx) for use in end.uses()]
            after = end.producer()
            assert after is not None
            follower = _next(graph, after)
            result, affine = _fake_quantize(graph, follower, end, decision, ranges[end, decision])
            for user, position in uses:
                user.replace_input_with(position, result)
            done[result, decision] = (result, affine)
            rounded[result] = end


def _first_convolutions(graph: ir.Graph) -> list[Any]:
    """The convolutions that read the normalized image.

    They read three channels only. int8 would save little time there, and reduce the accuracy.
    """
    found, values = [], list(graph.inputs)
    for value in values:
        for use in value.uses():
            if use.node.op_type == "Conv" or has_bank(use.node):
                found.append(use)
            elif use.node.op_type in ("Cast", "Transpose", "Div", "Sub", "Mul", "Add"):
                values.extend(use.node.outputs)
    return found


def _has_constant_weights(node: ir.Node) -> bool:
    """Whether the node is a convolution whose weight and bias are not computed while the model runs."""
    parameters = [value for value in node.inputs[1:] if value is not None]
    return node.op_type == "Conv" and all(value.const_value is not None for value in parameters)


def _end(node: ir.Node) -> ir.Value:
    """The value to quantize after a convolution: the output of its ReLU, or its own output."""
    output = node.outputs[0]
    uses = list(output.uses())
    if len(uses) == 1 and uses[0].node.op_type == "Relu":
        return uses[0].node.outputs[0]
    return output


def _next(graph: ir.Graph, node: ir.Node) -> ir.Node:
    nodes = list(graph)
    return nodes[nodes.index(node) + 1]


def _fake_quantize(
    graph: ir.Graph, before: ir.Node, value: ir.Value, decision: ir.Value | None, measured: Range
) -> tuple[ir.Value, Affine]:
    """Round a value to 256 levels. With a decision, each row uses the levels of its expert."""
    low, high = np.minimum(measured[:, 0], 0.0), np.maximum(measured[:, 1], 0.0)
    scale = np.maximum((high - low) / 255.0, 1e-8).astype(np.float32)
    affine = Affine(scale, np.clip(np.rint(-low / scale), 0, 255).astype(np.uint8))
    output = (f"{value.name}.rounded", value.dtype, value.shape)
    if decision is not None:
        attributes = [
            ir.AttrFloat32s("scales", [float(s) for s in affine.scale]),
            ir.AttrInt64s("zero_points", [int(z) for z in affine.zero]),
        ]
        result = ir.Value(name=output[0], type=value.type, shape=value.shape)
        node = ir.Node(DOMAIN, FAKE_QUANTIZE, [value, decision], attributes, outputs=[result], name=f"{output[0]}.node")
        graph.insert_before(before, node)
        return result, affine
    scale_value = constant(graph, affine.scale[0], f"{value.name}.scale")
    zero = constant(graph, affine.zero[0], f"{value.name}.zero")
    codes = insert_one(
        graph, before, "QuantizeLinear", [value, scale_value, zero], {}, (f"{value.name}.codes", UINT8, value.shape)
    )
    return insert_one(graph, before, "DequantizeLinear", [codes, scale_value, zero], {}, output), affine


def _quantize_weights(graph: ir.Graph, conv: ir.Node, x_scale: float) -> None:
    """Replace an ordinary convolution's weight and bias by dequantized integers."""
    weight = conv.inputs[1].const_value.numpy()  # type: ignore[union-attr]
    name = str(conv.inputs[1].name)  # type: ignore[union-attr]
    has_bias = len(conv.inputs) > 2 and conv.inputs[2] is not None
    bias = conv.inputs[2].const_value.numpy() if has_bias else None  # type: ignore[union-attr]
    codes, scale = quantize_rows(weight, bias, x_scale)
    integers: list[tuple[int, Any, Any, Any, Any]] = [(1, codes, scale, np.zeros(len(scale), np.int8), weight.shape)]
    if bias is not None:
        bias_scale = (scale * np.float32(x_scale)).astype(np.float32)
        integers.append((2, quantize_bias(bias, bias_scale), bias_scale, np.zeros(len(scale), np.int32), bias.shape))
    for position, values, scales, zeros, shape in integers:
        what = f"{name}.{position}"
        parts = [
            constant(graph, array, f"{what}.{kind}")
            for array, kind in ((values, "int"), (scales, "scale"), (zeros, "zero"))
        ]
        restored = insert_one(
            graph,
            conv,
            "DequantizeLinear",
            parts,
            {"axis": 0},
            (f"{what}.restored", ir.DataType.FLOAT, ir.Shape(shape)),
        )
        conv.replace_input_with(position, restored)


def calibrate(
    graph: ir.Graph, values: list[ir.Value], layers: list[ir.Node], images: npt.NDArray[Any], opset: int
) -> Mapping[tuple[ir.Value, ir.Value | None], Range]:
    """Measure the ranges of values over images, for each decision that reads or writes them.

    The graph runs in the form without control flow, where every value exists for all images.
    """
    plan = plan_regions(graph)
    source = graph.inputs[0]
    scope = Scope()
    read = ir.Value(name=scope.names.fresh("images"), type=source.type, shape=source.shape)
    state = Lowering(plan=plan, scope=scope, sizes={}, binding={source: read})
    write_steps(state, select=True)
    decisions = {decision: None for node in layers if (decision := decision_of(node)) is not None}
    outputs = [state.binding[value] for value in (*values, *decisions)]
    model = finish(scope, [read], outputs, opset)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "calibration.onnx"
        write_external(model, path.with_name("calibration.data"))
        ir.save(model, path)
        options = ort.SessionOptions()
        options.log_severity_level = 3
        try:
            session = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        except Exception as error:  # onnxruntime raises types of its own
            reason = " ".join(str(error).split())
            raise UnsupportedModelError(
                f"onnxruntime {ort.__version__} could not load the graph, of opset {opset}, to calibrate int8: {reason}"
            ) from error
        names = [str(output.name) for output in outputs]
        extremes: dict[tuple[ir.Value, ir.Value | None], Range] = {}
        pairs = {
            (value, decision_of(node)) for node in layers for value in (node.inputs[0], _end(node)) if value in values
        }
        for start in range(0, len(images), BATCH_OF_CALIBRATION):
            results = session.run(names, {"images": images[start : start + BATCH_OF_CALIBRATION]})
            found = dict(zip((*values, *decisions), results, strict=True))
            for value, decision in pairs:
                assert value is not None
                flat = found[value].reshape(len(found[value]), -1)
                experts = np.zeros(len(flat), np.int64) if decision is None else found[decision]
                count = 1 if decision is None else _num_experts(layers, decision)
                known = extremes.setdefault((value, decision), np.full((count, 2), np.nan, np.float32))
                for expert in np.unique(experts):
                    chosen = flat[experts == expert]
                    known[expert, 0] = np.fmin(known[expert, 0], chosen.min())
                    known[expert, 1] = np.fmax(known[expert, 1], chosen.max())
    return {pair: _complete(known) for pair, known in extremes.items()}


def _num_experts(layers: list[ir.Node], decision: ir.Value) -> int:
    return next(len(expert_rows(node)) for node in layers if decision_of(node) is decision)


def _complete(known: Range) -> Range:
    """Use the range over all other experts for experts without calibration images."""
    return np.where(np.isnan(known), (np.nanmin(known[:, 0]), np.nanmax(known[:, 1])), known).astype(np.float32)
