"""Exported files: outputs, metadata, and no leftover files after an error."""

import errno
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from advmoe_export import (
    PROFILES,
    InputError,
    ModelFileError,
    ProviderError,
    Session,
    UnsupportedModelError,
    VerificationError,
    export_model,
)
from advmoe_export.reference import _run_module, run_reference
from advmoe_export.trace import Traced, _check_folded, on_cpu, trace
from claimed_gpu import claimed_gpu
from torch import Tensor, nn

from advmoe.models.experts import ExpertLayout
from advmoe.models.moe_conv import MoEConv2d
from advmoe.models.router import Router
from advmoe.models.routing import Decision

VERIFY = sys.modules["advmoe_export.verify"]  # the package's own `verify` is the function
LABELS = [f"class {i}" for i in range(10)]
Make = Callable[..., Any]


@pytest.fixture(scope="module", autouse=True)
def _trace_each_network_once() -> Iterator[None]:
    """Tracing is nine tenths of an export; networks that print alike have the same weights here."""
    traced: dict[tuple[object, ...], Traced] = {}

    def trace_once(model: nn.Module, **options: Any) -> Traced:
        key = (str(model), getattr(model, "decisions", None), *options.items())
        if key not in traced:
            traced[key] = trace(model, **options)
        return Traced(program=traced[key].program, graph=traced[key].graph.clone())

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("advmoe_export.exporter.trace", trace_once)
        yield


@pytest.fixture
def pictures() -> Tensor:
    """[8, 3, 16, 16], each of its own color."""
    generator = torch.Generator().manual_seed(3)
    colors = torch.rand(8, 3, 1, 1, generator=generator)
    return (colors + 0.1 * torch.randn(8, 3, 16, 16, generator=generator)).clamp(0, 1)


def operators(path: Path) -> list[onnx.NodeProto]:
    """All nodes of a file, those in branches included."""

    def walk(graph: onnx.GraphProto) -> list[onnx.NodeProto]:
        found = []
        for node in graph.node:
            found.append(node)
            for attribute in node.attribute:
                found += walk(attribute.g) if attribute.HasField("g") else []
        return found

    return walk(onnx.load(path, load_external_data=False).graph)


@pytest.mark.parametrize("profile", PROFILES)
def test_a_file_computes_what_the_module_computes(
    profile: str, small_moe: Make, pictures: Tensor, tmp_path: Path
) -> None:
    model = small_moe(decisions=(0, 1, 1, 2))
    path = tmp_path / "model.onnx"
    report = export_model(model, path, image_size=16, labels=LABELS, profile=profile, margins=True)
    assert report.verification.passed
    session = Session(path, threads=1)
    for size in (1,) if profile == "latency" else (1, 3, 8):
        logits, expert_index_BL, margin_BL = model.forward_with_routing(pictures[:size])
        prediction = session.run(pictures[:size].numpy())
        np.testing.assert_array_equal(prediction.pathway, expert_index_BL)
        np.testing.assert_allclose(prediction.logits, logits.detach(), rtol=0, atol=1e-5 * logits.abs().max().item())
        np.testing.assert_allclose(prediction.probabilities.sum(axis=1), 1.0, rtol=1e-6)
        assert prediction.labels == tuple(f"class {i}" for i in logits.argmax(dim=1).tolist())
        np.testing.assert_allclose(prediction.margin, margin_BL.detach(), rtol=0, atol=1e-4)
    assert len(expert_index_BL.unique(dim=0)) > 1 or profile == "latency"
    assert "experts with 8 channels" in report.warnings[0]


@pytest.mark.parametrize(("num_experts", "model_scale"), [(2, 0.5), (2, 0.75), (3, 0.5), (2, 1.0)])
def test_a_file_holds_standard_operators_only_and_every_weight_once(
    small_moe: Make, tmp_path: Path, num_experts: int, model_scale: float
) -> None:
    model = small_moe(num_experts=num_experts, model_scale=model_scale)
    report = export_model(model, tmp_path / "model.onnx", image_size=16, labels=LABELS)
    nodes = operators(report.path)
    assert {node.domain for node in nodes} == {""}
    # BatchNorm is folded away; both forms of the hybrid graph, and experts that have channels in
    # common, point at the same bytes.
    assert report.data_bytes <= 1.01 * report.parameter_bytes
    assert not any(node.op_type == "BatchNormalization" for node in nodes)


@pytest.mark.parametrize("profile", PROFILES)
def test_every_constant_of_a_file_is_read(profile: str, small_moe: Make, tmp_path: Path) -> None:
    # Routers per block, so that steps of one image, and of several, need different constants.
    model = small_moe(decisions=(0, 1, 1, 2))
    report = export_model(model, tmp_path / "model.onnx", image_size=16, labels=LABELS, profile=profile)
    graphs = [onnx.load(report.path, load_external_data=False).graph]
    graphs += [
        attribute.g for node in operators(report.path) for attribute in node.attribute if attribute.HasField("g")
    ]
    read = {name for graph in graphs for node in graph.node for name in node.input}
    # onnxruntime prints a warning for each constant that is not.
    assert [value.name for graph in graphs for value in graph.initializer if value.name not in read] == []


def test_a_single_image_meets_one_branch_per_layer(small_moe: Make, tmp_path: Path) -> None:
    model = small_moe(num_experts=3, model_scale=0.4)
    report = export_model(model, tmp_path / "model.onnx", image_size=16, labels=LABELS, profile="latency")
    found = [node.op_type for node in operators(report.path)]
    # 4 MoE layers; a tree over 3 experts has 2 inner nodes; the shortcut joins the branches it is
    # added in; the stem.
    assert found.count("If") == 4 * 2
    assert found.count("Conv") == 4 * 3 + 3 + 1


@pytest.mark.parametrize(("weight_share", "scanned"), [(0.0, 0), (1.0, 3), (np.inf, 4)])
def test_a_batch_goes_image_by_image_where_activations_outweigh_weights_and_in_sub_batches_elsewhere(
    weight_share: float,
    scanned: int,
    small_moe: Make,
    pictures: Tensor,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("advmoe_export.passes.per_image.WEIGHT_SHARE", weight_share)
    model = small_moe()
    report = export_model(model, tmp_path / "model.onnx", image_size=16, labels=LABELS, profile="throughput")
    found = [node.op_type for node in operators(report.path)]
    # Weights over activations of the layers: 864 / 5128, 576 / 2568, 576 / 3080, and behind the
    # last pooling 576 / 520.
    assert found.count("Scan") == min(scanned, 1)
    assert found.count("If") == scanned
    assert found.count("NonZero") == (4 - scanned) * 2
    logits, expert_index_BL, _ = model.forward_with_routing(pictures)
    prediction = Session(report.path).run(pictures.numpy())
    np.testing.assert_array_equal(prediction.pathway, expert_index_BL)
    np.testing.assert_allclose(prediction.logits, logits.detach(), atol=1e-5 * logits.abs().max().item())


class Centered(nn.Module):
    """Two MoE layers. Between them, each image loses the mean over the images of its batch."""

    def __init__(self) -> None:
        super().__init__()
        layout = ExpertLayout(num_channels=8, num_experts=2, model_scale=0.5)
        self.first, self.second = (MoEConv2d(channels, layout, 3, padding=1) for channels in (3, 4))
        self.routers = nn.ModuleList(Router(channels, 2) for channels in (3, 4))
        self.head = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x, self.routers[0].decide(x))
        y = y - y.mean(0, keepdim=True)
        return self.head(self.second(y, self.routers[1].decide(y)).mean((2, 3)))


def test_layers_behind_a_step_that_mixes_images_do_not_run_image_by_image(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The module's results hold for a batch of these 64 images only, so no other batch is compared.
    monkeypatch.setattr(VERIFY, "_batches", lambda source, reference, fixed: [("all", reference)])
    torch.manual_seed(0)
    options: dict[str, Any] = {"image_size": 16, "labels": ["no", "yes"], "profile": "throughput"}
    report = export_model(Centered().eval(), tmp_path / "model.onnx", **options)
    found = [node.op_type for node in operators(report.path)]
    assert (found.count("Scan"), found.count("If"), found.count("NonZero")) == (1, 1, 2)
    monkeypatch.undo()
    with pytest.raises(VerificationError, match="was not written"):
        export_model(Centered().eval(), tmp_path / "other.onnx", **options)


def test_static_has_no_control_flow_and_gathers_the_weights_of_a_single_image(small_moe: Make, tmp_path: Path) -> None:
    model = small_moe()
    report = export_model(model, tmp_path / "one.onnx", image_size=16, labels=LABELS, profile="static", batch_size=1)
    found = [node.op_type for node in operators(report.path)]
    assert not {"If", "NonZero", "Loop", "Scan"} & set(found)
    assert found.count("Conv") == 4 + 2  # with stem and shortcut one per layer: no expert is computed in vain
    with pytest.raises(InputError, match="takes batches of 1"):
        Session(report.path).run(np.zeros((2, 3, 16, 16), dtype=np.float32))


def test_uint8_images_are_preprocessed_inside(small_moe: Make, tmp_path: Path) -> None:
    model = small_moe()
    pixels = np.random.default_rng(0).integers(0, 256, (5, 16, 16, 3), dtype=np.uint8)
    path = tmp_path / "model.onnx"
    report = export_model(model, path, image_size=16, labels=LABELS, input_type="uint8", images=pixels)
    logits, expert_index_BL, _ = model.forward_with_routing(torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 255)
    prediction = Session(path).run(pixels)
    np.testing.assert_allclose(prediction.logits, logits.detach(), atol=1e-5 * logits.abs().max().item())
    # the load is recorded: share of the 5 images per layer and expert
    load = torch.stack([(expert_index_BL == e).double().mean(0) for e in range(2)], dim=1)
    np.testing.assert_allclose(report.metadata.expert_load, load)
    assert report.metadata.expert_load_images == 5
    with pytest.raises(InputError, match="reads uint8 images"):
        Session(path).run(np.zeros((1, 3, 16, 16), dtype=np.float32))


def test_metadata_survives_the_file(small_moe: Make, tmp_path: Path) -> None:
    described = {"architecture": "vgg16", "num_experts": 2, "mean": [0.0, 0.0, 0.0]}
    report = export_model(small_moe(), tmp_path / "model.onnx", image_size=16, labels=LABELS, metadata=described)
    metadata = Session(report.path).metadata
    assert metadata == report.metadata
    assert metadata.model == described
    assert metadata.labels == tuple(LABELS)
    assert metadata.num_experts == (2,) * 4
    assert metadata.layers == ("convs.0", "convs.1", "convs.2", "convs.3")


class Tied(nn.Module):
    """The same weights as two MoE layers, with a BatchNorm behind the second."""

    def __init__(self) -> None:
        super().__init__()
        layout = ExpertLayout(num_channels=6, num_experts=2, model_scale=0.5)
        self.conv, self.norm = MoEConv2d(3, layout, 3, padding=1), nn.BatchNorm2d(3)
        self.router, self.head = Router(3, 2), nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.conv(x, self.router.decide(x)))
        return self.head(self.norm(self.conv(y, self.router.decide(y))).mean((2, 3)))


@pytest.mark.parametrize("dtype", ["fp32", "fp16", "int8"])
def test_layers_are_named_after_the_module_in_every_dtype(dtype: str, pictures: Tensor, tmp_path: Path) -> None:
    torch.manual_seed(0)
    options: dict[str, Any] = {"image_size": 16, "labels": ["no", "yes"], "profile": "throughput", "dtype": dtype}
    report = export_model(Tied().eval(), tmp_path / "model.onnx", calibration=pictures.numpy(), **options)
    assert report.metadata.layers == ("conv", "conv (2)")


class UserNetwork(nn.Module):
    """Somebody's own network, two of our convolutions behind one hand-written decision, no router of ours."""

    def __init__(self) -> None:
        super().__init__()
        layout = ExpertLayout(num_channels=8, num_experts=2, model_scale=0.5)
        self.first, self.second = (MoEConv2d(channels, layout, 3, padding=1) for channels in (3, 4))
        self.head = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        decision = Decision((x[:, 0].mean((1, 2)) > 0.5).long(), None, None)
        y = torch.relu(self.first(x, decision))
        return self.head((torch.relu(self.second(y, decision)) + y).mean((2, 3)))


def test_a_users_own_module_with_our_convolution_is_exported(pictures: Tensor, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = UserNetwork()
    report = export_model(model, tmp_path / "own.onnx", image_size=16, labels=["no", "yes"])
    # One decision, so both convolutions and all between them run in one branch: 2 experts * 2
    # convolutions, in 2 forms.
    assert [node.op_type for node in operators(report.path)].count("Conv") == 2 * 2 * 2
    prediction = Session(report.path).run(pictures.numpy())
    chosen = (pictures[:, 0].mean((1, 2)) > 0.5).long()
    np.testing.assert_array_equal(prediction.pathway, torch.stack((chosen, chosen), dim=1))


def test_a_module_on_a_gpu_is_exported_from_a_copy(small_moe: Make) -> None:
    model = small_moe()
    assert on_cpu(model) is model
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    with claimed_gpu():
        model = model.to("cuda")
        copy = on_cpu(model)
        assert all(value.is_cuda for value in model.state_dict().values())
        assert not any(value.is_cuda for value in copy.state_dict().values())
    assert all(torch.equal(value, weights[name]) for name, value in copy.state_dict().items())


def test_a_folded_module_that_is_another_network_is_refused(tiny_vgg: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_vgg(warm=True, expert_affine=True)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "affine" in name:
                parameter.normal_(std=0.3)
    monkeypatch.setattr(MoEConv2d, "fold_affine", lambda conv: setattr(conv, "affine", None))  # forgets the scales
    monkeypatch.setattr("torch.export.export", None)
    with pytest.raises(UnsupportedModelError, match=r"`folded` .* gives other logits .* for \d+ of 16 synth"):
        trace(model, image_size=(32, 32), opset=18)
    assert model.training
    monkeypatch.undo()
    _check_folded(model, model.folded(), (32, 32))


def test_every_part_of_a_module_keeps_its_mode(small_moe: Make) -> None:
    model = small_moe().train()
    model.norms[1].eval()  # frozen statistics
    trace(model, image_size=(16, 16), opset=18)
    assert [part.training for part in (model, *model.norms)] == [True, True, False, True, True]


def test_targets_of_another_length_are_found_before_the_model_is_traced(
    pictures: Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr("advmoe_export.exporter.trace")
    options: dict[str, Any] = {"images": pictures.numpy(), "targets": np.zeros(7, np.int64)}
    with pytest.raises(InputError, match=r"one target per image, \[8\], got \[7\]"):
        export_model(nn.Identity(), tmp_path / "model.onnx", image_size=16, labels=LABELS, **options)


@pytest.mark.parametrize(
    ("images", "targets", "message"),
    [
        (None, np.zeros(8, np.int64), r"one target per image, \[0\], got \[8\]"),
        (np.zeros((2, 3, 16, 16)), ["cat", "dog"], "targets as integers, the places of their logits, got <U3"),
        (np.zeros((2, 3, 16, 16)), np.zeros(2), "targets as integers, .*, got float64"),
        ([[1.0], [2.0, 3.0]], None, "list is no array for NumPy: .* inhomogeneous"),
        (torch.zeros(2, 3, 8, 8), None, r"got float32 \[2, 3, 8, 8\]"),
        (0.5, None, r"got float64 \[\]"),
    ],
)
def test_images_and_targets_that_cannot_be_compared_are_one_line(
    images: Any, targets: Any, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr("advmoe_export.exporter.trace")
    options: dict[str, Any] = {"images": images, "targets": targets}
    with pytest.raises(InputError, match=message):
        export_model(nn.Identity(), tmp_path / "model.onnx", image_size=16, labels=LABELS, **options)


def test_the_reference_is_the_modules_own_result(small_moe: Make, pictures: Tensor) -> None:
    for num_experts in (1, 3):
        model = small_moe(num_experts=num_experts, decisions=(0, 1, 1, 2))
        reference = run_reference(trace(model, image_size=(16, 16), opset=18).program, pictures.numpy())
        logits, expert_index_BL, margin_BL = model.forward_with_routing(pictures)
        np.testing.assert_allclose(reference.logits, logits.detach(), atol=1e-5)
        np.testing.assert_array_equal(reference.expert_index, expert_index_BL)
        expected = np.full((8, 4), np.inf) if num_experts == 1 else margin_BL.detach()  # one expert has no rival
        np.testing.assert_allclose(reference.margin, expected, atol=1e-5)


def test_the_module_computes_the_given_images_once_and_in_small_batches(
    small_moe: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    computed = []

    def counted(network: Any, decisions: Any, images: Any) -> Any:
        computed.append(len(images))
        return _run_module(network, decisions, images)

    monkeypatch.setattr("advmoe_export.reference._run_module", counted)
    images = np.random.default_rng(0).random((150, 3, 16, 16), dtype=np.float32)
    report = export_model(small_moe(), tmp_path / "model.onnx", image_size=16, labels=LABELS, images=images)
    assert sorted(computed) == [22, 64, 64, 64]  # 150 images given, and 64 synthetic ones
    assert report.agreement is not None
    assert report.agreement.images == 150


@pytest.mark.parametrize("number", [3, 10])
def test_a_file_with_a_fixed_batch_size_is_compared_on_all_images(
    number: int, small_moe: Make, pictures: Tensor, tmp_path: Path
) -> None:
    images = torch.cat([pictures, pictures.flip(3)])[:number]
    form = {"profile": "static", "batch_size": 4}
    path = tmp_path / "model.onnx"
    model = small_moe()
    targets = model(images).argmax(dim=1).numpy()
    targets[-1] += 1  # the last image is wrong, and among those that do not fill a batch
    report = export_model(model, path, image_size=16, labels=LABELS, images=images.numpy(), targets=targets, **form)
    assert report.agreement is not None
    assert (report.agreement.images, report.agreement.same_label, report.agreement.same_pathway) == (number, 1.0, 1.0)
    assert report.agreement.module_accuracy == report.agreement.file_accuracy == pytest.approx(1 - 1 / number)
    assert ("given, from 0", number) in {(check.batch, check.size) for check in report.verification.checks}
    session = Session(path)
    outputs = session.execute(session.check(images[:3].numpy(), any_size=True))
    np.testing.assert_allclose(outputs["logits"], model(images[:3]).detach(), atol=1e-4)


def test_a_graph_that_differs_is_not_left_behind(
    small_moe: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import advmoe_export.passes.fold_batchnorm as pass_

    affine = pass_._affine

    def wrong(node: object) -> object:
        found = affine(node)  # type: ignore[arg-type]
        return None if found is None else (found[0] * 1.001, found[1])

    monkeypatch.setattr(pass_, "_affine", wrong)
    with pytest.raises(VerificationError, match=r"was not written: .*(no near tie|logits differ by)") as raised:
        export_model(small_moe(), tmp_path / "model.onnx", image_size=16, labels=LABELS)
    assert not raised.value.report.passed
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_one_line_and_leaves_nothing(
    small_moe: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def write(model: object, path: Path) -> str:
        path.write_bytes(b"half of it")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("advmoe_export.exporter.write_external", write)
    with pytest.raises(ModelFileError, match=r"cannot write '.*model\.onnx': No space left on device"):
        export_model(small_moe(), tmp_path / "model.onnx", image_size=16, labels=LABELS)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("opset", [19, 21, 23, 25])
def test_later_versions_of_the_operators_give_the_same_results(
    opset: int, small_moe: Make, pictures: Tensor, tmp_path: Path
) -> None:
    model, path = small_moe(), tmp_path / "model.onnx"
    export_model(model, path, image_size=16, labels=LABELS, opset=opset)
    declared = onnx.load(path, load_external_data=False).opset_import
    assert [(entry.domain, entry.version) for entry in declared] == [("", opset)]
    logits, pathway, _ = model.forward_with_routing(pictures)
    found = Session(path).run(pictures.numpy())
    np.testing.assert_allclose(found.logits, logits.detach(), atol=1e-5)
    np.testing.assert_array_equal(found.pathway, pathway)


def test_bad_requests_say_what_to_do(small_moe: Make, tmp_path: Path) -> None:
    model = small_moe()
    with pytest.raises(ModelFileError, match=r"folder '.*missing' does not exist"):
        export_model(model, tmp_path / "missing" / "model.onnx", image_size=16, labels=LABELS)
    with pytest.raises(UnsupportedModelError, match="unknown profile 'fast', expected one of: hybrid"):
        export_model(model, tmp_path / "model.onnx", image_size=16, labels=LABELS, profile="fast")
    with pytest.raises(UnsupportedModelError, match="has 10 classes, got 2 labels"):
        export_model(model, tmp_path / "model.onnx", image_size=16, labels=["a", "b"])
    with pytest.raises(UnsupportedModelError, match="opset must be in 18"):
        export_model(model, tmp_path / "model.onnx", image_size=16, labels=LABELS, opset=9)
    dense = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 10))
    with pytest.raises(UnsupportedModelError, match="calls no routed operator"):
        export_model(dense, tmp_path / "model.onnx", image_size=16, labels=LABELS)
    assert list(tmp_path.iterdir()) == []
    assert export_model(
        dense, tmp_path / "dense.onnx", image_size=16, labels=LABELS, allow_unrouted=True
    ).verification.passed


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({"val_loss": float("nan")}, "Out of range float values are not JSON compliant"),
        ({"weights": torch.zeros(1)}, "Object of type Tensor is not JSON serializable"),
        ({1: "one"}, r"Expected `str`, got `int`"),
    ],
)
def test_metadata_that_json_cannot_hold_are_one_line(
    metadata: Any, message: str, small_moe: Make, tmp_path: Path
) -> None:
    with pytest.raises(UnsupportedModelError, match=f"the file cannot hold its metadata: .*{message}"):
        export_model(small_moe(), tmp_path / "model.onnx", image_size=16, labels=LABELS, metadata=metadata)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"profile": "fast"}, "unknown profile 'fast'"),
        ({"batch_size": 4}, "batch_size 4 does not go with profile 'hybrid'"),
        ({"profile": "static", "batch_size": 0}, "batch_size 0 does not go with profile 'static'"),
        ({"dtype": "fp8"}, "unknown dtype 'fp8', expected one of: fp32, fp16, int8$"),
        ({"dtype": "FP-16"}, "unknown dtype 'FP-16', expected .*; did you mean 'fp16'"),
        ({"dtype": "int8"}, "int8 needs real images to calibrate with"),
        ({"dtype": "int8", "profile": "static", "calibration": np.zeros((1, 3, 16, 16))}, "another profile than"),
        ({"input_type": "int8"}, "unknown input type 'int8'"),
        ({"opset": 9}, "opset must be in 18"),
        ({"image_size": "16"}, r"expected image_size to be an integer or \(height, width\) in pixels, got '16'"),
        ({"image_size": (3, 16, 16)}, r"in pixels, got \(3, 16, 16\)"),
        ({"image_size": 16.0}, "in pixels, got 16.0"),
    ],
)
def test_bad_options_are_found_before_the_model_is_traced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any], message: str
) -> None:
    monkeypatch.delattr("advmoe_export.exporter.trace")
    with pytest.raises(UnsupportedModelError, match=message):
        export_model(nn.Identity(), tmp_path / "model.onnx", **{"image_size": 16, "labels": LABELS, **options})


def test_a_place_without_room_for_the_weights_is_found_before_the_model_is_traced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr("advmoe_export.exporter.trace")
    path = tmp_path / "model.onnx"
    (tmp_path / "model.onnx.data").mkdir()
    with pytest.raises(ModelFileError, match=r"its weights go to '.*model.onnx.data', which is a folder"):
        export_model(nn.Identity(), path, image_size=16, labels=LABELS)
    (tmp_path / "model.onnx.data").rmdir()
    monkeypatch.setattr("os.access", lambda *_: False)  # the superuser may write everywhere
    with pytest.raises(ModelFileError, match="no permission to write in the folder"):
        export_model(nn.Identity(), path, image_size=16, labels=LABELS)


def test_an_image_size_may_be_a_number_of_numpy(small_moe: Make, tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    export_model(small_moe(), path, image_size=np.int64(16), labels=LABELS)
    assert Session(path).metadata.image_size == (16, 16)


@pytest.mark.parametrize("name", ["images", "calibration"])
@pytest.mark.parametrize(
    ("wrong", "input_type", "message"),
    [
        (np.full((2, 3, 16, 16), 200, np.float32), "float32", "values from 200 to 200; divide 8-bit images by 255"),
        (np.zeros((2, 3, 8, 8), np.float32), "float32", r"got float32 \[2, 3, 8, 8\]"),
        (np.zeros((2, 3, 16, 16), np.float32), "uint8", "reads uint8 images"),
        (np.zeros((3, 16, 16), np.float32), "float32", r"got float32 \[3, 16, 16\]"),
    ],
)
def test_wrong_images_are_found_before_the_model_is_traced(
    name: str, wrong: np.ndarray, input_type: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr("advmoe_export.exporter.trace")
    options: dict[str, Any] = {"dtype": "int8", "input_type": input_type, name: wrong}
    with pytest.raises(InputError, match=message):
        export_model(nn.Identity(), tmp_path / "model.onnx", image_size=16, labels=LABELS, **options)


def test_calibration_images_are_converted_like_those_of_a_session(small_moe: Make, tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (8, 16, 16, 3), dtype=np.uint8)
    digests = set()
    floats = pixels.transpose(0, 3, 1, 2) / 255  # float64
    for number, images in enumerate((pixels, floats, torch.from_numpy(floats))):
        path = tmp_path / f"{number}.onnx"
        options = {"dtype": "int8", "profile": "latency", "calibration": images}
        digests.add(export_model(small_moe(), path, image_size=16, labels=LABELS, **options).metadata.data_sha256)
    assert len(digests) == 1


def test_margins_of_a_network_without_routers_are_refused(tmp_path: Path) -> None:
    dense = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 10))
    with pytest.raises(UnsupportedModelError, match="margins need routers"):
        export_model(dense, tmp_path / "m.onnx", image_size=16, labels=LABELS, allow_unrouted=True, margins=True)


def test_a_session_refuses_what_it_cannot_run(small_moe: Make, tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    export_model(small_moe(), path, image_size=16, labels=LABELS, profile="throughput")
    session = Session(path)
    with pytest.raises(InputError, match="at least one image"):
        session.run(np.zeros((0, 3, 16, 16), dtype=np.float32))
    with pytest.raises(InputError, match=r"got float32 \[1, 3, 8, 8\]"):
        session.run(np.zeros((1, 3, 8, 8), dtype=np.float32))
    with pytest.raises(InputError, match="divide 8-bit images by 255"):
        session.run(np.full((1, 3, 16, 16), 255, dtype=np.float32))
    with pytest.raises(ProviderError, match="'NoSuchProvider' is not part of this onnxruntime"):
        Session(path, providers=["NoSuchProvider"])
    with pytest.raises(ModelFileError, match="no model file"):
        Session(tmp_path / "other.onnx")
    for name in ("", "best.pt"):
        with pytest.raises(ModelFileError, match=r"is no exported model; export it first.*: advmoe export "):
            Session(tmp_path / name)
    data = tmp_path / "model.onnx.data"
    content = data.read_bytes()
    data.write_bytes(bytes([content[0] ^ 1]) + content[1:])
    with pytest.raises(ModelFileError, match="damaged or belongs to another export"):
        Session(path)
    data.write_bytes(content[:-1])
    with pytest.raises(ModelFileError, match="copy both files"):
        Session(path)
    data.unlink()
    with pytest.raises(ModelFileError, match=r"weights in 'model.onnx.data', which is not in the same folder"):
        Session(path)
    path.write_bytes(b"not a graph")
    with pytest.raises(ModelFileError, match="not an ONNX file"):
        Session(path)
    onnx.save(onnx.helper.make_model(onnx.helper.make_graph([], "empty", [], [])), path)
    with pytest.raises(ModelFileError, match="was not written by advmoe-export"):
        Session(path)
