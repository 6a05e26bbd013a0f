"""Write the first layers of a network image by image, as a `Scan`, for batches of several images.

Gathering sub-batches copies every activation several times. In the first layers of a CNN,
activations are large and weights are small. Computing one image after the other is faster there,
because activations and weights stay in the cache. In later layers weights are larger than
activations, and sub-batches are faster.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import onnx_ir as ir

from advmoe_export.passes.regions import Plan, Region
from advmoe_export.passes.rows import keeps_rows_apart, row_dim
from advmoe_export.scope import Scope

WEIGHT_SHARE = 1.0
"""Largest ratio of a region's weights to its activations at which it runs image by image."""


def steps_per_image(plan: Plan) -> int:
    """Number of first steps of the plan that run image by image. Steps that mix images end them."""
    count = 0
    for position, step in enumerate(plan.steps):
        if not isinstance(step, Region):
            if not keeps_rows_apart(step):
                break
        elif _weight_bytes(plan, step) <= WEIGHT_SHARE * _activation_bytes(step):
            count = position + 1
    batch = row_dim(plan.graph.inputs[0])
    return count if all(row_dim(value) == batch for value in live_values(plan, count)) else 0


def _weight_bytes(plan: Plan, region: Region) -> int:
    return sum(plan.banks[node].expert_weight(0).nbytes for node in region.nodes if node in plan.banks)


def _activation_bytes(region: Region) -> int:
    """Bytes of the inputs and outputs of a region for one image."""
    return sum(_row_bytes(value) for value in (*region.inputs, *region.outputs))


def _row_bytes(value: ir.Value) -> int:
    if value.shape is None or value.dtype is None:
        return 0
    return int(math.prod(dim for dim in value.shape[1:] if isinstance(dim, int)) * value.dtype.itemsize)


def live_values(plan: Plan, count: int) -> list[ir.Value]:
    """Values of the first `count` steps that later steps or the caller need."""
    first = {node for step in plan.steps[:count] for node in (step.nodes if isinstance(step, Region) else [step])}
    return [
        output
        for node in plan.graph
        if node in first
        for output in node.outputs
        if output.is_graph_output() or any(use.node not in first for use in output.uses())
    ]


def write_scan(
    scope: Scope, images: ir.Value, live: list[ir.Value], write: Callable[[Scope, ir.Value], list[ir.Value]]
) -> list[ir.Value]:
    """Write one `Scan` over the images. Returns the copies of `live`, each [B, ...].

    Args:
        scope: the scope to write into.
        images: the images, [B, ...].
        live: values of the traced graph that are needed after the `Scan`, each [B, ...].
        write: function that writes the steps for one image [1, ...] into a scope, and returns the
            copies of `live`, each [1, ...].
    """
    assert images.shape is not None
    body = scope.child()
    image = ir.Value(name=scope.names.fresh("image"), type=images.type, shape=ir.Shape(images.shape[1:]))
    single = ir.Shape([1, *images.shape[1:]])
    row = body.op("Unsqueeze", [image, body.integers(0)], name="image.row", dtype=images.dtype, shape=single)
    results = [
        body.op(
            "Squeeze", [found, body.integers(0)], name=f"{value.name}.row", dtype=found.dtype, shape=value.shape[1:]
        )
        for value, found in zip(live, write(body, row), strict=True)
        if value.shape is not None
    ]
    return scope.ops(
        "Scan",
        [images],
        {"body": body.graph([image], results, scope.names.fresh("each image")), "num_scan_inputs": 1},
        outputs=[(str(value.name), value.dtype, value.shape) for value in live],
    )
