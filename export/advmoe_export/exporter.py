"""Export a module as a verified file.

The steps are trace, passes, profile, storage and verification. The file gets its final name after
the last step.
"""

from __future__ import annotations

import dataclasses
import json
import operator
import os
import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy.typing as npt
import onnx
import onnx_ir as ir

from advmoe_export.errors import ModelFileError, UnsupportedModelError
from advmoe_export.metadata import KEY, ModelMetadata
from advmoe_export.model_file import data_file
from advmoe_export.operators import CONV, decision_of
from advmoe_export.options import check_options
from advmoe_export.passes.contract import GraphPass
from advmoe_export.passes.fold_batchnorm import FoldBatchNorm
from advmoe_export.passes.half import UseHalfPrecision
from advmoe_export.passes.interface import AddExpertIndex, AddRouterMargin, ReadUint8Images, routed_nodes
from advmoe_export.passes.quantize import Quantize
from advmoe_export.passes.regions import Plan, plan_regions
from advmoe_export.passes.rows import row_dim
from advmoe_export.passes.storage import write_external
from advmoe_export.passes.two_way import CompareTwoWay
from advmoe_export.passes.write import IR_VERSION
from advmoe_export.profiles import build
from advmoe_export.reference import run_reference
from advmoe_export.report import MIN_AGREEMENT, Agreement, Tolerance, VerificationError, VerificationReport
from advmoe_export.session import OPTIMIZATION_LEVELS, as_array, check_images
from advmoe_export.trace import BATCH, trace
from advmoe_export.verify import check_targets, compare_on, verify

LAYOUT_BLOCK = 16
"""Number of channels in a block of onnxruntime's fast memory layout for convolutions."""


@dataclass(frozen=True, kw_only=True)
class ExportReport:
    """The result of an export."""

    path: Path
    """File of the graph. The weights are in `data_path`, in the same folder."""
    data_path: Path
    graph_bytes: int
    data_bytes: int
    parameter_bytes: int
    """Bytes of the module's parameters, for comparison."""
    metadata: ModelMetadata
    verification: VerificationReport
    agreement: Agreement | None
    """Comparison of module and file on the given images, for int8 otherwise on the calibration images.

    It is None without images.
    """
    warnings: tuple[str, ...]
    """Reasons why the file is slower than possible, or verified in part only, one sentence each."""

    def to_json(self) -> str:
        """The report as a JSON object."""
        document = dataclasses.asdict(self) | {"path": str(self.path), "data_path": str(self.data_path)}
        return json.dumps(document | {"verification": json.loads(self.verification.to_json())})


def export_model(
    model: Any,
    path: str | os.PathLike[str],
    *,
    image_size: int | tuple[int, int],
    labels: Sequence[str],
    resize: int | None = None,
    metadata: Mapping[str, Any] | None = None,
    profile: str = "hybrid",
    batch_size: int | None = None,
    opset: int = 18,
    dtype: str = "fp32",
    input_type: str = "float32",
    margins: bool = False,
    images: npt.NDArray[Any] | None = None,
    targets: npt.NDArray[Any] | None = None,
    calibration: npt.NDArray[Any] | None = None,
    allow_unrouted: bool = False,
    tolerance: Tolerance | None = None,
) -> ExportReport:
    """Export a module as one ONNX graph that computes the chosen experts of each image only.

    The file and its data file (`path` + `.data`) get their final names after they were compared
    with the module.

    Args:
        model: a `torch.nn.Module` from float images [B, 3, H, W] in [0, 1] to logits [B, classes],
            including normalization, on any device. Its routed layers call `advmoe::moe_conv2d` or
            `advmoe::moe_linear`.
        path: the `.onnx` file to write.
        image_size: height and width of the images.
        labels: class names in the order of the logits.
        resize: length in pixels to which the shorter side of an image is resized before the center
            crop, as in the evaluation of the module. The default is the longer side of
            `image_size`; images of this size are then not changed if it is square.
        metadata: further facts about the model, as JSON data.
        profile: `hybrid` (any batch), `latency` (batch 1), `throughput` (batches), `static` (no
            control flow).
        batch_size: batch size to fix, for `static` only.
        opset: version of ONNX's standard operators.
        dtype: type of weights and activations, `fp32`, `fp16` or `int8`. Routers stay in fp32.
        input_type: `float32` for NCHW images in [0, 1], `uint8` for NHWC images in 0 ... 255.
        margins: whether the graph has the output `router_margin`.
        images: real images in the form of `input_type`, as an array or a tensor on the CPU. The
            verification uses them in addition to synthetic images, and the expert load of the file
            is measured on them.
        targets: int64 [B], classes of `images`, for the accuracy in the report.
        calibration: real images in the form of `input_type`, for the value ranges of int8. The
            default is `images`; the reported accuracy is then measured on the calibration images.
        allow_unrouted: whether a module without routed layers (Dense, S-Dense) is accepted.
        tolerance: largest differences that the verification accepts.

    Raises:
        UnsupportedModelError: the module or an option cannot be exported, or `metadata` is no JSON
            data.
        InputError: `images` or `calibration` have the wrong shape, type or range, or `targets` are not
            one integer per image.
        ModelFileError: the files cannot be written.
        VerificationError: the results of graph and module differ, or an int8 file and the module
            agree on the labels of less than half of the images. No file remains at `path`.
    """
    target = check_options(
        path, profile=profile, batch_size=batch_size, opset=opset, dtype=dtype, input_type=input_type
    )
    try:
        height, width = image_size if isinstance(image_size, tuple | list) else (image_size, image_size)
        size = (operator.index(height), operator.index(width))
    except (TypeError, ValueError):
        expected = "an integer or (height, width) in pixels"
        raise UnsupportedModelError(f"expected image_size to be {expected}, got {image_size!r}") from None
    if resize is not None and not max(size) <= resize < 2**16:
        raise UnsupportedModelError(f"resize must be in {max(size)} ... {2**16 - 1}, got {resize}")
    images, calibration = (None if given is None else as_array(given) for given in (images, calibration))
    calibration = images if calibration is None else calibration
    if dtype == "int8" and (calibration is None or not calibration.size):
        raise UnsupportedModelError("int8 needs real images to calibrate with: give calibration images")
    if images is not None and images.size:
        images = check_images(images, size, input_type)
    check_targets(targets, 0 if images is None else len(images))
    if calibration is not None and calibration.size:
        calibration = check_images(calibration, size, input_type)
    traced = trace(model, image_size=size, opset=opset)
    graph = traced.graph
    classes = graph.outputs[0].shape[1]  # type: ignore[index]
    if len(labels) != classes:
        raise UnsupportedModelError(
            f"the model has {classes} classes, got {len(labels)} labels; give one name per class"
        )
    if not routed_nodes(graph) and not allow_unrouted:
        raise UnsupportedModelError(
            "expected a mixture of experts, but the module calls no routed operator (advmoe::moe_conv2d, "
            "advmoe::moe_linear); to export a dense network on purpose, allow it"
        )
    if margins and not routed_nodes(graph):
        raise UnsupportedModelError("margins need routers, and the module has none; export without margins")
    reference = None if images is None or len(images) == 0 else run_reference(traced.program, images)
    names = _layer_names(graph)
    plan = plan_graph(graph, margins=margins, input_type=input_type, dtype=dtype, calibration=calibration, opset=opset)
    onnx_model = build(plan, profile=profile, opset=opset, batch_size=batch_size)
    described = ModelMetadata.of(
        labels=tuple(str(label) for label in labels),
        image_size=size,
        resize=max(size) if resize is None else resize,
        input_type=input_type,
        profile=profile,
        dtype=dtype,
        opset=opset,
        batch_size=1 if profile == "latency" else batch_size,
        outputs=tuple(str(value.name) for value in onnx_model.graph.outputs),
        **_layers(plan, names),
        expert_load=None,  # the load of the finished file is measured
        tool={name: version(name) for name in ("advmoe-export", "onnx-ir", "torch", "onnxscript")},
        data_sha256="",
        data_bytes=0,
        model=dict(metadata or {}),
    )
    try:
        with tempfile.TemporaryDirectory(prefix=f".{target.name}.", dir=target.parent) as folder:
            draft = Path(folder) / target.name
            described = _write(onnx_model, draft, described)
            agreement = None if reference is None else compare_on(draft, reference, targets)
            if agreement is not None:
                described = dataclasses.replace(
                    described, expert_load=agreement.expert_load, expert_load_images=agreement.images
                )
                _save(onnx_model, draft, described)
            report = verify(
                draft, traced.program, reference=reference, tolerance=tolerance, optimizations=OPTIMIZATION_LEVELS
            )
            if not report.passed:
                raise VerificationError(f"'{target}' was not written: {report.explanation()}", report)
            if dtype == "int8":
                if agreement is None and calibration is not None:
                    agreement = compare_on(draft, run_reference(traced.program, calibration), None)
                assert agreement is not None
                if agreement.same_label < MIN_AGREEMENT:
                    raise VerificationError(
                        f"'{target}' was not written: int8 gives {agreement.same_label:.2%} of {agreement.images} "
                        f"images the label of the module, expected at least {MIN_AGREEMENT:.0%}; calibrate with more "
                        "images like those it will classify, or export with fp32",
                        report,
                    )
            sizes = draft.stat().st_size, described.data_bytes
            data_file(draft).replace(data_file(target))
            draft.replace(target)
    except OSError as error:
        raise ModelFileError(f"cannot write '{target}': {error.strerror or error}") from error
    return ExportReport(
        path=target,
        data_path=data_file(target),
        graph_bytes=sizes[0],
        data_bytes=sizes[1],
        parameter_bytes=sum(parameter.numel() * parameter.element_size() for parameter in model.parameters()),
        metadata=described,
        verification=dataclasses.replace(report, path=str(target)),
        agreement=agreement,
        warnings=(*_misaligned(plan), *report.warnings),
    )


def plan_graph(
    graph: ir.Graph,
    *,
    margins: bool = False,
    input_type: str = "float32",
    dtype: str = "fp32",
    calibration: npt.NDArray[Any] | None = None,
    opset: int = 18,
) -> Plan:
    """Run all passes over the traced graph. Each pass checks its requirements.

    The arguments are those of `export_model`.
    """
    passes: list[GraphPass] = [FoldBatchNorm(), CompareTwoWay()]
    if routed_nodes(graph):
        passes.append(AddExpertIndex())
        if margins:
            passes.append(AddRouterMargin())
    if input_type == "uint8":
        passes.append(ReadUint8Images())
    if dtype == "fp16":
        passes.append(UseHalfPrecision())
    elif dtype == "int8":
        assert calibration is not None
        passes.append(Quantize(calibration, opset))
    model = ir.Model(graph, ir_version=IR_VERSION)
    for step in passes:  # not ir.passes.Sequential, which hides errors of the user in a PassError
        step(model)
    return plan_regions(graph)


def _write(model: ir.Model, path: Path, metadata: ModelMetadata) -> ModelMetadata:
    """Write graph and data file, and check the result against the ONNX standard."""
    digest = write_external(model, data_file(path))
    metadata = dataclasses.replace(metadata, data_sha256=digest, data_bytes=data_file(path).stat().st_size)
    _save(model, path, metadata)
    onnx.checker.check_model(str(path), full_check=True)
    return metadata


def _save(model: ir.Model, path: Path, metadata: ModelMetadata) -> None:
    """Write the graph, whose data file exists."""
    model.metadata_props[KEY] = metadata.to_json()
    ir.save(model, path)
    with path.open("rb+") as file:
        os.fsync(file.fileno())


def _layer_names(graph: ir.Graph) -> dict[ir.Node, str]:
    """The name of each MoE layer of a graph as traced, before passes rename its weight.

    Further layers with the same weight get a number.
    """
    names: dict[ir.Node, str] = {}
    uses: Counter[str] = Counter()
    for node in routed_nodes(graph):
        name = str(node.inputs[1].name).removesuffix(".weight")  # type: ignore[union-attr]
        uses[name] += 1
        names[node] = name if uses[name] == 1 else f"{name} ({uses[name]})"
    return names


def _layers(plan: Plan, names: Mapping[ir.Node, str]) -> dict[str, tuple[Any, ...]]:
    """Number of experts and layer name of each column of `expert_index`."""
    experts: list[int] = []
    layers: list[str] = []
    for node, bank in plan.banks.items():
        columns = _columns(node)
        experts += [bank.num_experts] * columns
        layers += [names[node]] if columns == 1 else [f"{names[node]}[{token}]" for token in range(columns)]
    return {"num_experts": tuple(experts), "layers": tuple(layers)}


def _misaligned(plan: Plan) -> tuple[str, ...]:
    """Warnings about experts whose number of channels prevents the fast layout."""
    sizes = sorted(
        {bank.size for node, bank in plan.banks.items() if node.op_type == CONV and bank.size % LAYOUT_BLOCK}
    )
    if not sizes:
        return ()
    listed = ", ".join(map(str, sizes))
    return (
        f"experts with {listed} channels prevent onnxruntime's fast layout on some machines; "
        f"choose width and model scale so that r * C is a multiple of {LAYOUT_BLOCK}",
    )


def _columns(node: ir.Node) -> int:
    """Number of decisions of a routed operator per image: 1, or the number of tokens."""
    decision = decision_of(node)
    if decision is None or decision.shape is None or row_dim(decision) is None:
        return 1
    rows = decision.shape[0].evaluate({BATCH: 1})  # type: ignore[union-attr]
    return rows if isinstance(rows, int) else 1
