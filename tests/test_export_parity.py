"""Exported files compute the same as the module, for every profile, granularity, dtype and kind of batch.

Each network is traced once. The passes run on copies of the traced graph.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch
from advmoe_export.exporter import plan_graph
from advmoe_export.passes.storage import write_external
from advmoe_export.profiles import build
from advmoe_export.trace import trace
from torch import Tensor, nn

from advmoe.models.experts import ExpertLayout
from advmoe.models.moe_conv import MoEConv2d
from advmoe.models.routing import Decision

GRANULARITIES = {
    "layer": {"decisions": (0, 1, 2, 3)},
    "block": {"decisions": (0, 1, 1, 2), "num_experts": 3, "model_scale": 0.5},
    "image": {"decisions": (0, 0, 0, 0), "num_experts": 5, "model_scale": 0.25},
}
FORMS = [("hybrid", None), ("latency", None), ("throughput", None), ("static", None), ("static", 1), ("static", 7)]
NEAR_TIE = 1e-4


class Network(NamedTuple):
    """A traced module, and what it says about images."""

    traced: ir.Graph
    images: np.ndarray
    logits: np.ndarray
    experts: np.ndarray
    margins: np.ndarray


@pytest.fixture(scope="module", params=GRANULARITIES)
def network(request: pytest.FixtureRequest, small_moe: Callable[..., Any]) -> Network:
    model = small_moe(**GRANULARITIES[request.param])
    generator = torch.Generator().manual_seed(4)
    colors = torch.rand(64, 3, 1, 1, generator=generator)
    images = (colors + 0.1 * torch.randn(64, 3, 16, 16, generator=generator)).clamp(0, 1)
    with torch.no_grad():
        logits, experts, margins = model.forward_with_routing(images)
    assert len(experts.unique(dim=0)) > 1
    traced = trace(model, image_size=(16, 16), opset=18).graph
    return Network(traced, images.numpy(), logits.numpy(), experts.numpy(), margins.numpy())


def batches(network: Network, fixed: int | None) -> list[np.ndarray]:
    """Rows of the images: several sizes, and one image repeated, so that one expert of each layer has all the work."""
    if fixed is not None:
        return [np.arange(start, start + fixed) for start in range(0, 4 * fixed, fixed)] + [np.zeros(fixed, np.int64)]
    rarest = int(np.unique(network.experts, axis=0, return_index=True)[1].max())
    sizes = [np.arange(size) for size in (1, 2, 7, 64)]
    return [*sizes, np.zeros(7, np.int64), np.full(7, rarest)]


def run(
    network: Network, path: Path, profile: str, fixed: int | None, dtype: str, level: str
) -> list[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Rows, logits and experts of every batch."""
    plan = plan_graph(network.traced.clone(), dtype=dtype, calibration=network.images)
    model = build(plan, profile=profile, opset=18, batch_size=fixed)
    write_external(model, path.with_name(path.name + ".data"))
    ir.save(model, path)
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    options.graph_optimization_level = getattr(ort.GraphOptimizationLevel, level)
    session = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    results = []
    for rows in batches(network, 1 if profile == "latency" else fixed):
        logits, experts = session.run(["logits", "expert_index"], {"images": network.images[rows]})
        results.append((rows, logits, experts))
    return results


@pytest.mark.parametrize("level", ["ORT_DISABLE_ALL", "ORT_ENABLE_ALL"])
@pytest.mark.parametrize(("profile", "fixed"), FORMS)
def test_fp32_takes_the_same_experts_and_gives_the_same_logits(
    network: Network, profile: str, fixed: int | None, level: str, tmp_path: Path
) -> None:
    for rows, logits, experts in run(network, tmp_path / "model.onnx", profile, fixed, "fp32", level):
        differs = experts != network.experts[rows]
        assert not (differs & (network.margins[rows] > NEAR_TIE)).any()
        same = ~differs.any(axis=1)
        assert same.any()
        expected = network.logits[rows][same]
        assert np.abs(logits[same] - expected).max() <= 1e-5 * np.abs(expected).max()


@pytest.mark.parametrize(("profile", "fixed"), FORMS)
def test_fp16_stays_within_its_rounding(network: Network, profile: str, fixed: int | None, tmp_path: Path) -> None:
    for rows, logits, experts in run(network, tmp_path / "model.onnx", profile, fixed, "fp16", "ORT_ENABLE_ALL"):
        assert logits.dtype == np.float32
        same = (experts == network.experts[rows]).all(axis=1)
        assert same.mean() >= 0.9
        expected = network.logits[rows][same]
        assert np.abs(logits[same] - expected).max() <= 1e-2 * np.abs(expected).max()


@pytest.mark.parametrize("profile", ["hybrid", "latency", "throughput"])
def test_int8_keeps_most_pathways_and_labels(network: Network, profile: str, tmp_path: Path) -> None:
    results = run(network, tmp_path / "model.onnx", profile, None, "int8", "ORT_ENABLE_ALL")
    rows, logits, experts = max(results, key=lambda result: len(np.unique(result[0])))
    same = (experts == network.experts[rows]).all(axis=1)
    assert same.mean() >= 0.8
    # 256 levels per tensor: a few per cent of the largest logit after five layers
    expected = network.logits[rows][same]
    assert np.abs(logits[same] - expected).max() <= 0.15 * np.abs(expected).max()


def test_logits_wrong_by_a_ten_thousandth_would_be_noticed(network: Network, tmp_path: Path) -> None:
    """The tolerance of these tests has teeth."""
    spoilt = network._replace(logits=network.logits * np.float32(1.0001))
    rows, logits, _ = run(network, tmp_path / "model.onnx", "throughput", None, "fp32", "ORT_ENABLE_ALL")[-1]
    assert np.abs(logits - spoilt.logits[rows]).max() > 1e-5 * np.abs(logits).max()


class Parallel(nn.Module):
    """Two MoE layers with decisions of their own on one input, joined, and two more behind them."""

    def __init__(self, join: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.join = join
        layout = ExpertLayout(num_channels=8, num_experts=2, model_scale=0.5)
        inputs = (3, 3, 8 if join == "cat" else 4, 4)
        self.convs = nn.ModuleList(MoEConv2d(channels, layout, 3, padding=1) for channels in inputs)
        self.head = nn.Linear(8, 10)

    def forward(self, x: Tensor) -> Tensor:
        left, right = (conv(x, choose(x, place)) for place, conv in enumerate(self.convs[:2]))
        joined = torch.cat([left, right], dim=1) if self.join == "cat" else torch.maximum(left, right)
        after = self.convs[2](joined, choose(x, 2))
        aside = self.convs[3](left, choose(right + 0.5, 0))  # its input and its decision have two orders
        logits: Tensor = self.head(torch.cat([after, aside], dim=1).mean((2, 3)))
        return logits


def choose(x: Tensor, channel: int) -> Decision:
    """Decide by the sign of a channel's deviation from 1/2."""
    return Decision((x[:, channel].mean((1, 2)) > 0.5).long(), None, None)


@pytest.mark.parametrize("join", ["cat", "maximum"])
def test_parallel_layers_are_joined_row_by_row(join: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("advmoe_export.passes.per_image.WEIGHT_SHARE", 0.0)  # sub-batches in all layers
    model = Parallel(join).eval()
    images = torch.rand(16, 3, 1, 1, generator=torch.Generator().manual_seed(1)).expand(16, 3, 8, 8).contiguous()
    with torch.no_grad():
        expected = model(images).numpy()
    traced = trace(model, image_size=(8, 8), opset=18).graph
    for profile in ("throughput", "hybrid"):
        path = tmp_path / f"{profile}.onnx"
        built = build(plan_graph(traced.clone()), profile=profile, opset=18)
        write_external(built, path.with_name(path.name + ".data"))
        ir.save(built, path)
        session = ort.InferenceSession(path, providers=["CPUExecutionProvider"])
        for size in (1, 5, 16):
            logits = session.run(["logits"], {"images": images[:size].numpy()})[0]
            np.testing.assert_allclose(logits, expected[:size], atol=1e-5 * np.abs(expected).max())
