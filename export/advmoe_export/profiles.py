"""The profiles of an exported model, and the graph of each.

| profile    | batch           | how a region runs                                                         |
|------------|-----------------|---------------------------------------------------------------------------|
| hybrid     | any             | `If(batch == 1)`: latency, else throughput; weights are stored once       |
| latency    | 1               | an `If` tree around the experts                                           |
| throughput | any             | one sub-batch per expert                                                  |
| static     | fixed or any    | no control flow: weights gathered for 1 image, else all experts computed  |
"""

from __future__ import annotations

from collections.abc import Mapping

import onnx_ir as ir

from advmoe_export.passes.lower import Lowering
from advmoe_export.passes.per_image import live_values, steps_per_image, write_scan
from advmoe_export.passes.regions import Plan
from advmoe_export.passes.write import finish, write_step, write_steps
from advmoe_export.scope import Names, Scope
from advmoe_export.trace import BATCH


def build(plan: Plan, *, profile: str, opset: int, batch_size: int | None = None) -> ir.Model:
    """The finished graph of a profile. Its weights are in memory.

    Args:
        plan: the traced graph with its regions.
        profile: one of `PROFILES`.
        opset: version of the standard operators.
        batch_size: batch size to fix, for `static` only.
    """
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
        outputs = write_steps(Lowering(plan=plan, scope=scope, sizes=sizes, binding={source: images}), select=True)
    elif fixed is not None:
        outputs = write_steps(Lowering(plan=plan, scope=scope, sizes=sizes, binding={source: images}))
    else:
        outputs = _write_many(plan, scope, images)
    for value, name in zip(outputs, outputs_of_model, strict=True):
        value.name = name
    return finish(scope, [images], outputs, opset)


def _by_batch(plan: Plan, scope: Scope, images: ir.Value) -> list[ir.Value]:
    """Write `If(batch == 1)`: the form for one image, or the form for several."""
    assert images.shape is not None
    batch = scope.op("Shape", [images], {"start": 0, "end": 1}, name="batch", dtype=ir.DataType.INT64, shape=[1])
    single = scope.op("Equal", [batch, scope.integers(1)], name="single", dtype=ir.DataType.BOOL, shape=[1])
    one, many = scope.child(), scope.child()
    static = [1, *(int(dim) for dim in images.shape[1:])]  # type: ignore[arg-type]
    image = one.op("Reshape", [images, one.integers(*static)], name="image", dtype=images.dtype, shape=static)
    state = Lowering(plan=plan, scope=one, sizes={BATCH: 1}, binding={plan.graph.inputs[0]: image})
    branches = {
        "then_branch": one.graph([], write_steps(state), "one image"),
        "else_branch": many.graph([], _write_many(plan, many, images), "many images"),
    }
    outputs = [(str(value.name), value.dtype, value.shape) for value in plan.graph.outputs]
    return scope.ops("If", [single], branches, outputs=outputs)


def _write_many(plan: Plan, scope: Scope, images: ir.Value) -> list[ir.Value]:
    """Write the form for several images: first layers image by image, later layers in sub-batches."""
    state = Lowering(plan=plan, scope=scope, sizes={}, binding={plan.graph.inputs[0]: images})
    count = steps_per_image(plan)
    if count:
        live = live_values(plan, count)

        def write(body: Scope, image: ir.Value) -> list[ir.Value]:
            single = Lowering(plan=plan, scope=body, sizes={BATCH: 1}, binding={plan.graph.inputs[0]: image})
            for step in plan.steps[:count]:
                write_step(single, step)
            return [single.binding[value] for value in live]

        state.binding.update(zip(live, write_scan(scope, images, live, write), strict=True))
    return write_steps(state, plan.steps[count:])
