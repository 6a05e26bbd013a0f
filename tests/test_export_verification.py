"""The verification of an export: what it compares, and what it refuses."""

import dataclasses
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from advmoe_export import export_model
from advmoe_export.trace import Traced, trace
from advmoe_export.verify import Reference, run_reference, verify

LABELS = [f"class {i}" for i in range(10)]
VERIFY = sys.modules["advmoe_export.verify"]  # the package's own `verify` is the function


@pytest.fixture(scope="module")
def traced(small_moe: Callable[..., Any]) -> Traced:
    return trace(small_moe(), image_size=(16, 16), opset=18)


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
    # 1, 2, 7 and 64 images, and three times 5 copies of one.
    assert report.explanation().startswith("only 0 of 89 synthetic images take the module's pathway")
    spoil(monkeypatch, flip(0.1))
    assert verify(exported, traced.program, optimizations=["all"]).passed


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
