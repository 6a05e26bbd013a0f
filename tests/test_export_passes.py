"""Passes of the exporter: their order is checked, and the same module gives the same file."""

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import torch
from advmoe_export.bank import quantize_bias, quantize_rows
from advmoe_export.errors import UnsupportedModelError
from advmoe_export.exporter import export_model, plan_graph
from advmoe_export.passes.contract import GraphPass
from advmoe_export.passes.fold_batchnorm import FoldBatchNorm
from advmoe_export.passes.half import UseHalfPrecision, routers_are_float32
from advmoe_export.passes.interface import AddExpertIndex, AddRouterMargin, ReadUint8Images
from advmoe_export.passes.quantize import Quantize
from advmoe_export.passes.storage import write_external
from advmoe_export.passes.two_way import CompareTwoWay
from advmoe_export.profiles import build
from advmoe_export.trace import trace
from torch import Tensor, nn

from advmoe.models.experts import ExpertLayout
from advmoe.models.moe_conv import MoEConv2d
from advmoe.models.moe_linear import MoELinear
from advmoe.models.router import ImageRouter
from advmoe.models.routing import scaled

PICTURES = np.random.default_rng(0).random((16, 3, 16, 16), dtype=np.float32)
PIXELS = np.zeros((16, 16, 16, 3), np.uint8)


@pytest.fixture(scope="module")
def traced(small_moe: Callable[..., Any]) -> ir.Graph:
    return trace(small_moe(), image_size=(16, 16), opset=18).graph


def test_an_opset_that_onnxruntime_does_not_know_stops_a_calibration_in_one_line(traced: ir.Graph) -> None:
    with pytest.raises(UnsupportedModelError, match=r"could not load the graph, of opset 99, .* int8: ") as raised:
        run(traced, FoldBatchNorm(), Quantize(PICTURES, 99))
    assert "\n" not in str(raised.value)


def run(graph: ir.Graph, *passes: GraphPass) -> ir.Graph:
    model = ir.Model(graph.clone(), ir_version=10)
    for step in passes:
        step(model)
    return model.graph


def test_the_order_of_an_export_satisfies_every_pass(traced: ir.Graph) -> None:
    graph = run(traced, FoldBatchNorm(), CompareTwoWay(), AddExpertIndex(), AddRouterMargin(), ReadUint8Images())
    assert [output.name for output in graph.outputs] == ["logits", "expert_index", "router_margin"]
    run(graph, UseHalfPrecision())
    run(graph, Quantize(PIXELS, 18))


@pytest.mark.parametrize(
    ("passes", "reason"),
    [
        ([AddExpertIndex()], "AddExpertIndex cannot run: .* decides between two experts by an ArgMax"),
        ([CompareTwoWay(), AddRouterMargin()], "AddRouterMargin cannot run: the graph has no output 'expert_index'"),
        (
            [CompareTwoWay(), AddExpertIndex(), CompareTwoWay()],
            "CompareTwoWay cannot run: the graph has the outputs logits, expert_index",
        ),
        ([UseHalfPrecision()], "UseHalfPrecision cannot run: .* can still be folded"),
        ([Quantize(PICTURES, 18)], "Quantize cannot run: .* can still be folded"),
        ([FoldBatchNorm(), UseHalfPrecision(), ReadUint8Images()], "ReadUint8Images cannot run: .* float16 already"),
        ([FoldBatchNorm(), UseHalfPrecision(), Quantize(PICTURES, 18)], "Quantize cannot run: .* float16 already"),
        ([FoldBatchNorm(), Quantize(PICTURES, 18), UseHalfPrecision()], "UseHalfPrecision cannot run: .* quantized"),
        ([FoldBatchNorm(), Quantize(PIXELS, 18)], "the graph reads FLOAT images, the calibration images are uint8"),
        ([ReadUint8Images(), ReadUint8Images()], "ReadUint8Images cannot run: images are UINT8, not float32"),
    ],
)
def test_a_wrong_order_is_refused(traced: ir.Graph, passes: list[GraphPass], reason: str) -> None:
    with pytest.raises(ir.passes.PreconditionError, match=reason):
        run(traced, *passes)


@pytest.mark.parametrize(
    ("step", "before", "reason"),
    [
        (FoldBatchNorm, [], "can still be folded"),
        (CompareTwoWay, [], "decides between two experts by an ArgMax"),
        (AddExpertIndex, [CompareTwoWay()], "no output 'expert_index'"),
        (ReadUint8Images, [], "not uint8"),
    ],
)
def test_a_pass_that_does_nothing_is_caught(
    step: type[GraphPass], before: list[GraphPass], reason: str, traced: ir.Graph, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(step, "change", lambda self, graph: None)
    with pytest.raises(ir.passes.PostconditionError, match=f"{step.__name__} left its work undone: .*{reason}"):
        run(traced, *before, step())


def test_a_graph_with_routed_operators_left_is_not_stored(traced: ir.Graph, tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="is of domain 'advmoe', not of the ONNX standard"):
        write_external(ir.Model(traced.clone(), ir_version=10), tmp_path / "data")


def stored(model: ir.Model, folder: Path) -> tuple[bytes, str]:
    """The bytes of the data file, and a digest of the graph."""
    write_external(model, folder / "data")
    return (folder / "data").read_bytes(), hashlib.sha256(ir.to_proto(model).SerializeToString()).hexdigest()


def test_weights_lie_in_the_order_of_the_graph_wherever_they_lay_in_memory(tmp_path: Path) -> None:
    memory = np.arange(200, dtype=np.float32)
    for first, second in ((memory[:100], memory[100:]), (memory[100:], memory[:100])):
        values = [
            ir.Value(
                name=name, const_value=ir.tensor(array), shape=ir.Shape([100]), type=ir.TensorType(ir.DataType.FLOAT)
            )
            for name, array in (("a", first), ("b", second))
        ]
        graph = ir.Graph([], [], nodes=[], initializers=values, opset_imports={"": 18})
        content, _ = stored(ir.Model(graph, ir_version=10), tmp_path)
        # 100 floats end at byte 400; the second array starts at the next multiple of 64.
        assert content == first.tobytes() + bytes(48) + second.tobytes()


def test_the_same_module_gives_the_same_bytes(traced: ir.Graph, tmp_path: Path) -> None:
    files = []
    for _ in range(2):
        plan = plan_graph(traced.clone(), dtype="int8", calibration=PICTURES)
        files.append(stored(build(plan, profile="hybrid", opset=18), tmp_path))
        memory = [np.zeros(n) for n in range(0, 5000, 7)]  # so that the next arrays get other addresses
    assert files[0] == files[1]
    assert memory


def test_a_scalar_is_stored_as_a_scalar_and_once(traced: ir.Graph) -> None:
    graph = run(traced, FoldBatchNorm(), CompareTwoWay())
    zeros = [value for name, value in graph.initializers.items() if name.startswith("zero")]
    assert [list(value.shape) for value in zeros if value.shape is not None] == [[]]


class Normalized(nn.Module):
    """A routed linear layer and a head, one of which is the last, with a BatchNorm between or after them."""

    def __init__(self, *, routed_last: bool) -> None:
        super().__init__()
        self.routed = MoELinear(3, 4, ((0, 1), (2, 3)))
        self.routed.weight.data.normal_()
        self.routed.bias.data.normal_()
        self.router, self.norm, self.head = nn.Linear(3, 2), nn.BatchNorm1d(2), nn.Linear(2, 2)
        self.norm.running_mean.add_(1)
        self.routed_last = routed_last

    def forward(self, x: Tensor) -> Tensor:
        features = x.mean((2, 3))
        y = self.norm(self.routed(features, self.router(features).argmax(dim=1)))
        return y if self.routed_last else self.head(self.norm(torch.relu(y)))


@pytest.mark.parametrize("routed_last", [True, False])
def test_the_logits_keep_their_name_if_a_batchnorm_is_folded_into_the_layer_that_gives_them(
    routed_last: bool, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    model = Normalized(routed_last=routed_last).eval()
    report = export_model(model, tmp_path / "model.onnx", image_size=16, labels=["no", "yes"], profile="throughput")
    assert report.metadata.outputs == ("logits", "expert_index")
    assert not any(node.op_type == "BatchNormalization" for node in ir.load(report.path).graph)


class Scaled(nn.Module):
    """Two MoE layers that obey one router of three convolutions, which also scales their outputs."""

    def __init__(self) -> None:
        super().__init__()
        layout = ExpertLayout(num_channels=8, num_experts=3, model_scale=0.5)
        self.stem = nn.Conv2d(3, 3, 3, padding=1)
        self.router = ImageRouter(3, router_gradient="value")
        self.first, self.second = (MoEConv2d(channels, layout, 3, padding=1) for channels in (3, 4))
        self.head = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        decision = self.router.decide(x)
        y = torch.relu(scaled(self.first(self.stem(x), decision), decision))
        return self.head(scaled(self.second(y, decision), decision).mean((2, 3)))


def test_a_router_that_scales_the_output_stays_in_float32() -> None:
    torch.manual_seed(0)
    graph = run(trace(Scaled(), image_size=(16, 16), opset=18).graph, FoldBatchNorm(), CompareTwoWay())
    half, eighth = run(graph, UseHalfPrecision()), run(graph, Quantize(PICTURES, 18))
    assert routers_are_float32(half) is None
    types = {
        (node.op_type, node.inputs[0].dtype)
        for node in half
        if node.op_type in {"ArgMax", "Softmax", "GatherElements", "moe_conv2d"} and node.inputs[0] is not None
    }
    # The scale is converted after its softmax.
    single = {(op, ir.DataType.FLOAT) for op in ("ArgMax", "Softmax", "GatherElements")}
    assert types == {("moe_conv2d", ir.DataType.FLOAT16), *single}
    # Three convolutions of the router, and the stem, which int8 spares because it reads the image.
    for rounded, float_convolutions in ((half, 3), (eighth, 4)):
        weights = [node.inputs[1] for node in rounded if node.op_type == "Conv"]
        assert len(weights) == 4
        plain = [w for w in weights if w is not None and w.const_value is not None and w.dtype == ir.DataType.FLOAT]
        assert len(plain) == float_convolutions
    softmax = next(node for node in half if node.op_type == "Softmax")
    softmax.outputs[0].type = ir.TensorType(ir.DataType.FLOAT16)
    assert "computes in float16" in str(routers_are_float32(half))


class Standardized(nn.Conv2d):
    """A convolution that standardizes its weight in every pass, as networks without BatchNorm do.

    The exporter of PyTorch computes small weights at once, so this one needs many channels.
    """

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight / (self.weight.std((1, 2, 3), keepdim=True) + 1e-5)
        return nn.functional.conv2d(x, weight, self.bias, padding=1)


@pytest.mark.parametrize(
    "rest",
    [[], [Standardized(64, 64, 3)], [Standardized(64, 64, 3), nn.Conv2d(64, 4, 3)]],
    ids=["nothing", "computed", "both"],
)
def test_int8_spares_convolutions_with_computed_weights_and_needs_others(rest: list[nn.Module]) -> None:
    model = nn.Sequential(nn.Conv2d(3, 64, 3), nn.ReLU(), *rest, nn.AdaptiveAvgPool2d(1), nn.Flatten())
    graph = trace(model, image_size=(16, 16), opset=18).graph
    if len(rest) < 2:
        with pytest.raises(UnsupportedModelError, match="int8 needs expert layers, or convolutions with constant weig"):
            run(graph, FoldBatchNorm(), Quantize(PICTURES, 18))
        return
    graph = run(graph, FoldBatchNorm(), Quantize(PICTURES, 18))
    makers = [node.inputs[1].producer() for node in graph if node.op_type == "Conv" and node.inputs[1] is not None]
    assert [None if maker is None else maker.op_type for maker in makers] == [None, "Div", "DequantizeLinear"]


def test_the_bias_of_a_filter_without_weights_survives_int8() -> None:
    """BatchNorm with a scale near 0, folded, leaves such filters."""
    weight = np.array([0.0, 1e-12, 1e-6, 0.3, 0.3], np.float32).reshape(5, 1, 1, 1)
    bias = np.array([0.5, -0.5, 40.0, -0.3, 0.0], np.float32)
    for x_scale in (1e-3, 0.05):
        codes, scale = quantize_rows(weight, bias, x_scale)
        restored = quantize_bias(bias, scale * np.float32(x_scale)) * (scale.astype(np.float64) * x_scale)
        np.testing.assert_allclose(restored, bias, rtol=1e-3)
        np.testing.assert_array_equal(codes.reshape(-1)[-2:], 127)


def test_a_bias_beyond_int32_keeps_its_sign() -> None:
    scale = np.full(2, 1e-12, np.float32)
    np.testing.assert_array_equal(quantize_bias(np.array([0.5, -0.5], np.float32), scale), [2**31 - 1, 1 - 2**31])
