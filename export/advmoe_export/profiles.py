"""The forms a model can take, and the graph of each.

| profile    | batch           | how a region runs                                                         |
|------------|-----------------|---------------------------------------------------------------------------|
| hybrid     | any             | `If(batch == 1)`: as latency, else as throughput; weights are stored once |
| latency    | 1               | an `If` tree around the experts                                           |
| throughput | any             | one sub-batch per expert                                                  |
| static     | fixed or any    | no control flow: gathered weights at batch 1, else all experts and select |
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import onnx_ir as ir
import onnx_ir.passes.common as common

from advmoe_export.errors import UnsupportedModelError
from advmoe_export.passes.branches import write_branches
from advmoe_export.passes.dispatch import write_dispatch
from advmoe_export.passes.lower import Lowering, write_plain
from advmoe_export.passes.per_image import live_values, steps_per_image, write_scan
from advmoe_export.passes.regions import Plan, Region
from advmoe_export.passes.rows import row_dim
from advmoe_export.passes.select import write_selection
from advmoe_export.scope import Names, Scope
from advmoe_export.trace import BATCH

PROFILES = ("hybrid", "latency", "throughput", "static")
IR_VERSION = 10
"""Version of the file format; onnxruntime reads it from 1.20 on."""


def build(plan: Plan, *, profile: str, opset: int, batch_size: int | None = None) -> ir.Model:
    """The finished graph of a profile, all weights still in memory.

    Args:
        plan: the traced graph with its regions.
        profile: one of `PROFILES`.
        opset: version of the standard operators.
        batch_size: batch size to fix, for `static` only.

    Raises:
        UnsupportedModelError: unknown profile, or a batch size it does not take.
    """
    if profile not in PROFILES:
        raise UnsupportedModelError(f"unknown profile '{profile}', expected one of: {', '.join(PROFILES)}")
    if batch_size is not None and (profile != "static" or batch_size < 1):
        raise UnsupportedModelError(
            f"batch_size {batch_size} does not go with profile '{profile}': only 'static' fixes one, of at least 1"
        )
    fixed = 1 if profile == "latency" else batch_size
    names = Names()
    outputs_of_model = [str(value.name) for value in plan.graph.outputs]
    for name in ("images", *outputs_of_model):
        names.fresh(name)
    scope = Scope(names)
    source = plan.graph.inputs[0]
    assert source.shape is not None
    images = ir.Value(
        name="images",
        shape=ir.Shape([BATCH if fixed is None else fixed, *source.shape[1:]]),
        type=source.type,
    )
    sizes: Mapping[str, int] = {} if fixed is None else {BATCH: fixed}
    if profile == "hybrid" and plan.regions:
        outputs = _by_batch(plan, scope, images)
    elif profile == "static":
        outputs = write_selected(Lowering(plan=plan, scope=scope, sizes=sizes, binding={source: images}))
    elif fixed is not None:
        outputs = _write(Lowering(plan=plan, scope=scope, sizes=sizes, binding={source: images}))
    else:
        outputs = _write_many(plan, scope, images)
    for value, name in zip(outputs, outputs_of_model, strict=True):
        value.name = name
    return finish(scope, [images], outputs, opset)


def finish(scope: Scope, inputs: list[ir.Value], outputs: list[ir.Value], opset: int) -> ir.Model:
    """A model of what was written into a scope, without nodes that nobody needs."""
    graph = scope.graph(inputs, outputs, "advmoe")
    graph.opset_imports[""] = opset
    model = ir.Model(graph, ir_version=IR_VERSION, producer_name="advmoe-export")
    common.RemoveUnusedNodesPass()(model)
    return model


def write_selected(state: Lowering) -> list[ir.Value]:
    """Write the whole plan without control flow."""
    return _write(state, select=True)


def _by_batch(plan: Plan, scope: Scope, images: ir.Value) -> list[ir.Value]:
    """`If(batch == 1)`: one row's form, else many rows' form."""
    assert images.shape is not None
    batch = scope.op("Shape", [images], {"start": 0, "end": 1}, name="batch", dtype=ir.DataType.INT64, shape=[1])
    single = scope.op("Equal", [batch, scope.integers(1)], name="single", dtype=ir.DataType.BOOL, shape=[1])
    one, many = scope.child(), scope.child()
    static = [1, *(int(dim) for dim in images.shape[1:])]  # type: ignore[arg-type]
    image = one.op("Reshape", [images, one.integers(*static)], name="image", dtype=images.dtype, shape=static)
    state = Lowering(plan=plan, scope=one, sizes={BATCH: 1}, binding={plan.graph.inputs[0]: image})
    branches = {
        "then_branch": one.graph([], _write(state), "one image"),
        "else_branch": many.graph([], _write_many(plan, many, images), "many images"),
    }
    outputs = [(str(value.name), value.dtype, value.shape) for value in plan.graph.outputs]
    return scope.ops("If", [single], branches, outputs=outputs)


def _write_many(plan: Plan, scope: Scope, images: ir.Value) -> list[ir.Value]:
    """Any number of images: the first layers one by one, the others in sub-batches."""
    state = Lowering(plan=plan, scope=scope, sizes={}, binding={plan.graph.inputs[0]: images})
    count = steps_per_image(plan)
    if count:
        live = live_values(plan, count)

        def write(body: Scope, image: ir.Value) -> list[ir.Value]:
            single = Lowering(plan=plan, scope=body, sizes={BATCH: 1}, binding={plan.graph.inputs[0]: image})
            for step in plan.steps[:count]:
                _write_step(single, step)
            return [single.binding[value] for value in live]

        state.binding.update(zip(live, write_scan(scope, images, live, write), strict=True))
    return _write(state, plan.steps[count:])


def _write(state: Lowering, steps: Sequence[ir.Node | Region] | None = None, *, select: bool = False) -> list[ir.Value]:
    """Write steps of a plan, all by default; returns the graph's outputs, rows in their original order."""
    for step in state.plan.steps if steps is None else steps:
        _write_step(state, step, select=select)
    outputs = state.plan.graph.outputs
    return [state.fetch(value, state.orders.original(str(row_dim(value)))) for value in outputs]


def _write_step(state: Lowering, step: ir.Node | Region, *, select: bool = False) -> None:
    if not isinstance(step, Region):
        write_plain(state, step)
        return
    rows = state.fixed(step.expert_index.shape)
    if select:
        write_selection(state, step)
    elif step.num_experts == 1 or (rows is not None and rows[0] == 1):
        write_branches(state, step)
    else:
        write_dispatch(state, step)
