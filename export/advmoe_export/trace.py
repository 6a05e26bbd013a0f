"""Trace a torch module to a flat ONNX graph of standard and routed operators.

The exporter of PyTorch translates all standard operators. Only this module and `verify` need torch.
"""

from __future__ import annotations

import contextlib
import copy
import io
import itertools
import logging
import re
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import onnx_ir as ir
import onnx_ir.passes.common as common

from advmoe_export import operators
from advmoe_export.errors import UnsupportedModelError
from advmoe_export.reference import as_float_tensor, probe_images

BATCH = "batch"
"""Name of the dynamic dimension of a traced graph."""
FOLDED_PROBES = 16
"""Number of synthetic images on which a folded module is compared with the module."""
FOLDED_TOLERANCE = 1e-3
"""Largest difference of their logits, relative to the largest logit."""


@dataclass(frozen=True, kw_only=True)
class Traced:
    """A module as a program and as a graph.

    `program` is the `torch.export.ExportedProgram`; `graph` is [B, 3, H, W] `images` -> [B,
    classes] `logits`.
    """

    program: Any
    graph: ir.Graph


def trace(model: Any, *, image_size: tuple[int, int], opset: int) -> Traced:
    """Trace a module in evaluation mode for any batch size at a fixed image size.

    Args:
        model: a `torch.nn.Module` from float images [B, 3, H, W] in [0, 1] to logits [B, classes].
            If it has a method `folded`, that gives the module to trace, equal to this one. A module
            on a GPU stays there; a copy on the CPU is traced.
        image_size: (H, W).
        opset: version of the standard operators, at least 18.

    Raises:
        UnsupportedModelError: torch cannot trace the module for every batch size, or `folded` gives
            another network.
    """
    import torch

    example = torch.linspace(0, 1, 2 * 3 * image_size[0] * image_size[1]).reshape(2, 3, *image_size)
    training = {module: module.training for module in model.modules()}
    folded = model.folded() if hasattr(model, "folded") else model
    network = on_cpu(folded)
    try:
        if folded is not model:
            _check_folded(model, network, image_size)
        with _quiet(), torch.no_grad():
            program = torch.export.export(
                network.eval(), (example,), dynamic_shapes=({0: torch.export.Dim(BATCH, min=1)},), strict=False
            )
            exported = torch.onnx.export(
                program,
                dynamo=True,
                opset_version=opset,
                input_names=["images"],
                output_names=["logits"],
                custom_translation_table=_translations(),
                verbose=False,
            )
    except UnsupportedModelError:
        raise
    except Exception as error:
        reason = " ".join(str(error.__cause__ or error).split())[:300]
        raise UnsupportedModelError(
            f"torch could not export the module for images [B, 3, {image_size[0]}, {image_size[1]}] of any batch size: "
            f"{reason}"
        ) from error
    finally:
        for module, mode in training.items():
            module.training = mode
    assert exported is not None
    onnx_model = exported.model
    common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(onnx_model)
    common.InlinePass()(onnx_model)
    graph = onnx_model.graph
    _name_batch(graph, program)
    if len(graph.outputs) != 1 or graph.outputs[0].shape is None or len(graph.outputs[0].shape) != 2:
        shapes = ", ".join(str(value.shape) for value in graph.outputs)
        raise UnsupportedModelError(
            f"the module must return logits [B, classes] and nothing else, got outputs {shapes}"
        )
    for node in graph:
        if any(attr.type in (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS) for attr in node.attributes.values()):
            raise UnsupportedModelError(
                f"the module has control flow of its own ('{node.op_type}' at '{node.name}'); "
                "use a routed operator instead"
            )
    return Traced(program=program, graph=graph)


def on_cpu(model: Any) -> Any:
    """The module, or a copy of it if some of its tensors are on another device."""
    tensors = itertools.chain(model.parameters(), model.buffers())
    return model if all(tensor.device.type == "cpu" for tensor in tensors) else copy.deepcopy(model).cpu()


def _check_folded(model: Any, folded: Any, image_size: tuple[int, int]) -> None:
    """Check that a folded module gives the logits of the module, for most of some synthetic images.

    An image at a near tie of a router may take another expert.

    Raises:
        UnsupportedModelError: the logits of half of the images or more differ.
    """
    import torch

    images = as_float_tensor(probe_images(image_size, "float32", count=FOLDED_PROBES))
    with torch.no_grad():
        expected, found = on_cpu(model).eval()(images), folded.eval()(images)
    same = (found - expected).abs().amax(dim=1) <= FOLDED_TOLERANCE * expected.abs().max()
    if 2 * int(same.sum()) <= len(images):
        raise UnsupportedModelError(
            f"the method `folded` of the module gives other logits than the module for {int((~same).sum())} of "
            f"{len(images)} synthetic images; mend it, or remove it"
        )


def _name_batch(graph: ir.Graph, program: Any) -> None:
    """Replace torch's symbol for the batch dimension by its name in all values."""
    (name,) = program.graph_signature.user_inputs
    images = next(node for node in program.graph.nodes if node.name == name)
    symbol = re.compile(rf"\b{re.escape(str(images.meta['val'].shape[0]))}\b")
    for value in (*graph.inputs, *(output for node in graph for output in node.outputs)):
        if value.shape is not None:
            value.shape = ir.Shape(
                dim if isinstance(dim, int) else symbol.sub(BATCH, str(dim.value)) for dim in value.shape
            )


def _translations() -> dict[Any, Callable[..., Any]]:
    """Translations of the routed operators for torch's exporter: one node of the same name each."""
    import onnxscript
    import torch

    operators.register_schemas()
    domain = onnxscript.values.Opset(operators.DOMAIN, 1)
    table: dict[Any, Callable[..., Any]] = {}
    for name, attributes in operators.ATTRIBUTES.items():
        operator = getattr(getattr(torch.ops, operators.DOMAIN), name, None)
        if operator is not None:
            table[operator.default] = _translation(getattr(domain, name), tuple(attributes))
    return table


def _translation(emit: Callable[..., Any], attributes: tuple[str, ...]) -> Callable[..., Any]:
    def translate(x: Any, weight: Any, bias: Any, expert_index: Any, *values: Any) -> Any:
        constants = {
            key: list(value) if isinstance(value, list | tuple) else value
            for key, value in zip(attributes, values, strict=True)
        }
        return emit(x, weight, bias, expert_index, **constants)

    return translate


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Suppress the output and the warnings of torch's exporter. Its errors remain exceptions."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "torch.export", "onnxscript", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
