"""The verification of an export: what it compares, and what it refuses."""

import dataclasses
import json
import math
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from advmoe_export import PROFILES, ExportReport, Session, UnsupportedModelError, VerificationError, export_model
from advmoe_export.bank import Bank
from advmoe_export.coverage import Coverage, least, warn_of_gaps
from advmoe_export.reference import Reference, probe_images, run_reference
from advmoe_export.report import TOLERANCES
from advmoe_export.trace import Traced, trace
from advmoe_export.verify import compare_on, verify
from conftest import SmallMoE
from torch import Tensor, nn

from advmoe.models.experts import ExpertLayout
from advmoe.models.moe_conv import MoEConv2d
from advmoe.models.routing import Decision

LABELS = [f"class {i}" for i in range(10)]
VERIFY = sys.modules["advmoe_export.verify"]  # the package's own `verify` is the function


@pytest.fixture(scope="module")
def traced(small_moe: Callable[..., Any]) -> Traced:
    return trace(small_moe(), image_size=(16, 16), opset=18)


@pytest.fixture(autouse=True)
def _trace_once(traced: Traced, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tracing is nine tenths of an export."""

    def trace_once(model: nn.Module, **options: Any) -> Traced:
        if not isinstance(model, SmallMoE):
            return trace(model, **options)
        return Traced(program=traced.program, graph=traced.graph.clone())

    monkeypatch.setattr("advmoe_export.exporter.trace", trace_once)


@pytest.fixture(scope="module")
def exported(small_moe: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("exported") / "model.onnx"
    export_model(small_moe(), path, image_size=16, labels=LABELS, margins=True)
    return path


def spoil(monkeypatch: pytest.MonkeyPatch, change: Callable[[Reference], Reference]) -> None:
    """Let the module seem to have other results."""
    monkeypatch.setattr(VERIFY, "run_reference", lambda program, images: change(run_reference(program, images)))


def test_decisions_that_all_differ_are_no_agreement_even_at_near_ties(
    exported: Path, traced: Traced, monkeypatch: pytest.MonkeyPatch
) -> None:
    def flip(share: float) -> Callable[[Reference], Reference]:
        def change(reference: Reference) -> Reference:
            index, margin = reference.expert_index.copy(), reference.margin.copy()
            flipped = np.arange(len(index)) >= len(index) * (1 - share)
            index[flipped, 0] = 1 - index[flipped, 0]
            margin[flipped, 0] = 0.0
            return dataclasses.replace(reference, expert_index=index, margin=margin)

        return change

    spoil(monkeypatch, flip(1.0))
    report = verify(exported, traced.program, optimizations=["all"])
    assert all(check.passed for check in report.checks)
    assert not report.passed
    assert report.compared["convs.0"] == (0, 0)
    # 1, 2, 7 and 64 images, and three times 5 copies of one.
    assert report.explanation().startswith("only 0 of 89 synthetic images take the module's pathway")
    assert math.isnan(report.difference)
    lenient = verify(exported, traced.program, optimizations=["all"], tolerance=TOLERANCES["int8"])
    assert lenient.passed
    assert lenient.explanation() == "no image takes the module's pathway, so no logits were compared"
    spoil(monkeypatch, flip(0.1))
    assert verify(exported, traced.program, optimizations=["all"]).passed


def test_a_batch_that_is_compared_at_several_levels_counts_once(exported: Path, traced: Traced) -> None:
    report = verify(exported, traced.program, optimizations=["disable", "all"])
    assert len(report.checks) == 14
    assert report.batches == 7  # 1, 2, 7 and 64 images, and three times 5 copies of one


def test_a_different_decision_without_a_margin_is_the_worst(
    exported: Path, traced: Traced, monkeypatch: pytest.MonkeyPatch
) -> None:
    def change(reference: Reference) -> Reference:
        index, margin = reference.expert_index.copy(), reference.margin.copy()
        index[9, 2], margin[9, 2] = 1 - index[9, 2], np.nan
        return dataclasses.replace(reference, expert_index=index, margin=margin)

    spoil(monkeypatch, change)
    report = verify(exported, traced.program, optimizations=["all"])
    assert not report.passed
    assert report.explanation().startswith("image 9 takes expert")
    assert "margin inf is no near tie" in report.explanation()


@pytest.mark.parametrize("wrong", [1e-2, np.nan])
def test_wrong_margins_are_found(wrong: float, exported: Path, traced: Traced, monkeypatch: pytest.MonkeyPatch) -> None:
    def change(reference: Reference) -> Reference:
        margin = reference.margin.copy()
        margin[3, 1] += wrong * max(1.0, float(margin.max()))
        return dataclasses.replace(reference, margin=margin)

    spoil(monkeypatch, change)
    report = verify(exported, traced.program, optimizations=["all"])
    assert not report.passed
    assert "router margins differ by" in report.explanation()
    assert "at image 3, layer 'convs.1'" in report.explanation()


def images_of(count: int) -> np.ndarray:
    """float32 [count, 3, 16, 16], each image of its own color."""
    rng = np.random.default_rng(0)
    return (0.8 * rng.random((count, 3, 1, 1)) + 0.2 * rng.random((count, 3, 16, 16))).astype(np.float32)


def export_int8(model: Any, path: Path, **options: Any) -> ExportReport:
    return export_model(model, path, image_size=16, labels=LABELS, dtype="int8", profile="latency", **options)


def test_int8_is_judged_on_the_calibration_images_if_there_are_no_others(
    small_moe: Callable[..., Any], tmp_path: Path
) -> None:
    report = export_int8(small_moe(), tmp_path / "model.onnx", calibration=images_of(8))
    assert report.agreement is not None
    assert report.agreement.images == 8
    assert report.agreement.same_label >= 0.5
    assert report.agreement.module_accuracy is None
    assert report.metadata.expert_load is None

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is no JSON")

    document = json.loads(report.to_json(), parse_constant=refuse)
    assert document["verification"]["tolerance"]["margin"] is None  # any margin is accepted


def test_the_recorded_load_is_that_of_the_file(
    small_moe: Callable[..., Any], traced: Traced, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    execute = Session.execute

    def otherwise(session: Session, prepared: np.ndarray) -> dict[str, np.ndarray]:
        outputs = execute(session, prepared)
        return {**outputs, "expert_index": 1 - outputs["expert_index"]}

    monkeypatch.setattr(Session, "execute", otherwise)  # int8 accepts any decisions
    images = images_of(8)
    report = export_int8(small_moe(), tmp_path / "model.onnx", images=images)
    metadata = Session(report.path).metadata
    assert metadata == report.metadata
    assert metadata.expert_load_images == 8
    assert metadata.expert_load is not None
    of_module = run_reference(traced.program, images).expert_index.mean(axis=0)
    np.testing.assert_allclose(np.array(metadata.expert_load)[:, 0], of_module)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda logits: -logits, "int8 gives .* of 8 images the label of the module, expected at least 50%"),
        (lambda logits: logits - 1e6, "logits differ by"),
        (lambda logits: logits + np.inf, "logits of 64 of 64 images are infinite or NaN"),
    ],
)
def test_an_int8_file_with_other_labels_or_absurd_logits_is_not_written(
    wrong: Callable[[np.ndarray], np.ndarray],
    message: str,
    small_moe: Callable[..., Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    execute = Session.execute

    def spoilt(session: Session, prepared: np.ndarray) -> dict[str, np.ndarray]:
        outputs = execute(session, prepared)
        return {**outputs, "logits": wrong(outputs["logits"])}

    monkeypatch.setattr(Session, "execute", spoilt)
    with pytest.raises(VerificationError, match=f"was not written: .*{message}"):
        export_int8(small_moe(), tmp_path / "model.onnx", calibration=images_of(8))
    assert list(tmp_path.iterdir()) == []


class Collapsed(nn.Module):
    """Two MoE layers: both experts of the first decide by brightness, the router of the second knows one of three."""

    def __init__(self) -> None:
        super().__init__()
        self.first = MoEConv2d(3, ExpertLayout(num_channels=8, num_experts=2, model_scale=0.5), 3, padding=1)
        self.second = MoEConv2d(4, ExpertLayout(num_channels=12, num_experts=3, model_scale=1 / 3), 3, padding=1)
        self.router, self.head = nn.Linear(4, 3), nn.Linear(4, 10)
        self.router.weight.data.zero_()
        self.router.bias.data.copy_(torch.tensor([0.0, 1.0, 0.0]))

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.first(x, Decision((x.mean((1, 2, 3)) > 0.5).long(), None, None)))
        decision = Decision(self.router(y.mean((2, 3))).argmax(dim=1), None, None)
        return self.head(self.second(y, decision).mean((2, 3)))


def test_experts_that_no_compared_image_reached_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runs = Bank._runs
    # The file gets wrong filters for the expert 2, which shows in no comparison.
    monkeypatch.setattr(Bank, "_runs", lambda bank, expert: runs(bank, 0 if expert == 2 else expert))
    torch.manual_seed(0)
    report = export_model(Collapsed(), tmp_path / "model.onnx", image_size=16, labels=LABELS, profile="throughput")
    compared = report.verification.compared
    assert list(compared) == ["first", "second"]
    # 1, 2, 7 and 64 images, and one image of each of the two pathways 5 times.
    assert compared["second"] == (0, 84, 0)
    assert sum(compared["first"]) == 84
    assert min(compared["first"]) >= 5
    assert json.loads(report.to_json())["verification"]["compared"]["second"] == [0, 84, 0]
    assert report.warnings[-1] == (
        "no compared image reached these experts, so the file was not compared with the module there: "
        "0, 2 of 'second'; compare on more images"
    )


def test_a_warning_names_few_layers_and_the_tokens_of_a_layer_count_together(exported: Path) -> None:
    counts = {f"layer {number}": (1, 0) for number in range(7)} | {"last": (1, 1)}
    (warning,) = warn_of_gaps(counts)
    assert "1 of 'layer 3'; 1 of 'layer 4' and of 2 more layers; compare" in warning
    assert warn_of_gaps({"last": (1, 1)}) == ()
    tokens = dataclasses.replace(Session(exported).metadata, layers=("mlp[0]", "mlp[1]"), num_experts=(3, 3))
    coverage = Coverage(tokens)
    coverage.add(np.array([[0, 0], [0, 2]]))
    assert coverage.counts == {"mlp": (3, 0, 1)}
    assert least([coverage, Coverage(tokens)]) == {"mlp": (0, 0, 0)}


class Times(nn.Module):
    """A product by two factors, so that each fits into float16."""

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, x: Tensor) -> Tensor:
        return x * 100 * (self.factor / 100)


class Large(nn.Module):
    """A network with activations of about 100 * `size`, and logits of ordinary size."""

    def __init__(self, size: float, weight: float = 1.0) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.size = size
        self.larger = Times(100 * size)
        self.first, self.second = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 10, 1, bias=False)
        self.second.weight.data *= weight

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.second(self.larger(torch.relu(self.first(x)))).mean((2, 3))
        return y / 100 / self.size


def test_an_overflow_of_float16_is_found_on_a_cpu(tmp_path: Path) -> None:
    options: dict[str, Any] = {"image_size": 16, "labels": LABELS, "dtype": "fp16", "allow_unrouted": True}
    path = tmp_path / "model.onnx"
    report = export_model(Large(1e1), path, **options)
    assert {check.optimization for check in report.verification.checks} >= {"all", "rounded"}
    # Each factor is within float16, their product is not.
    message = r"infinite or NaN .*'rounded'; float16 ends at 65504 and the values after 'larger' reach (.*), so"
    with pytest.raises(VerificationError, match=message) as caught:
        export_model(Large(6e4), tmp_path / "large.onnx", **options)
    large, images = Large(6e4), torch.from_numpy(probe_images((16, 16), "float32"))
    largest = float(large.larger(torch.relu(large.first(images))).detach().max())
    found = re.search(message, str(caught.value))
    assert found is not None
    assert found[1] == f"{largest:.4g}"
    with pytest.raises(UnsupportedModelError, match=r"at 65504, but 'second.weight' has a value of size .*; export"):
        export_model(Large(1e1, weight=1e6), tmp_path / "weight.onnx", **options)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["model.onnx", "model.onnx.data"]


@pytest.mark.parametrize("profile", PROFILES)
def test_every_value_of_a_float16_file_is_rounded(profile: str, small_moe: Callable[..., Any], tmp_path: Path) -> None:
    images = images_of(3)
    path = tmp_path / "model.onnx"
    options: dict[str, Any] = {"image_size": 16, "labels": LABELS, "dtype": "fp16", "profile": profile}
    report = export_model(small_moe(), path, images=images, **options)
    differences = {check.optimization: check.difference for check in report.verification.checks if check.size == 1}
    # Rounding the activations adds to the rounding of the weights, which all graphs have.
    assert differences["rounded"] != differences["disable"]
    assert report.agreement is not None
    assert report.agreement.same_pathway == 1.0


def flipped(reference: Any, *flips: tuple[int, int, float]) -> Any:
    index, margin = reference.expert_index.copy(), reference.margin.copy()
    for image, layer, value in flips:
        if image < len(index):
            index[image, layer], margin[image, layer] = 1 - index[image, layer], value
    return dataclasses.replace(reference, expert_index=index, margin=margin)


def test_the_worst_of_several_decisions_counts(exported: Path, traced: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    spoil(monkeypatch, lambda reference: flipped(reference, (9, 2, 1.0), (20, 2, 0.0)))
    report = verify(exported, traced.program, optimizations=["all"])
    assert not report.passed
    assert report.explanation().startswith("image 9 takes expert")


def test_the_first_different_decision_of_an_image_counts(
    exported: Path, traced: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    spoil(monkeypatch, lambda reference: flipped(reference, (9, 1, 0.0), (9, 3, 1.0)))
    assert verify(exported, traced.program, optimizations=["all"]).passed  # the later one follows from a near tie
    spoil(monkeypatch, lambda reference: flipped(reference, (9, 1, 1.0), (9, 3, 0.0)))
    assert not verify(exported, traced.program, optimizations=["all"]).passed


def test_logits_of_fp32_agree_to_a_hundred_thousandth(
    exported: Path, traced: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    for factor, passed in ((1 + 1e-6, True), (1 + 1e-4, False)):
        spoil(
            monkeypatch,
            lambda reference, factor=factor: dataclasses.replace(reference, logits=reference.logits * factor),
        )
        assert verify(exported, traced.program, optimizations=["all"]).passed == passed
        monkeypatch.undo()


def test_the_accuracy_of_the_file_is_that_of_its_own_labels(
    exported: Path, traced: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    execute = Session.execute
    monkeypatch.setattr(
        Session, "execute", lambda self, images: {**execute(self, images), "logits": -execute(self, images)["logits"]}
    )
    reference = run_reference(traced.program, images_of(8))
    agreement = compare_on(exported, reference, reference.logits.argmax(axis=1))
    assert (agreement.module_accuracy, agreement.file_accuracy, agreement.same_label) == (1.0, 0.0, 0.0)
