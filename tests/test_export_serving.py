"""Serving an exported file: Triton's model repository, timing, and the monitor of the experts' load."""

import dataclasses
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from advmoe_export import (
    InputError,
    ModelFileError,
    RouteMonitor,
    Session,
    export_model,
    time_session,
    write_triton_repository,
)
from advmoe_export.metadata import KEY
from google.protobuf import text_format

from advmoe.rust_router import RouteLog

LABELS = [f"class {i}" for i in range(10)]
IMAGES = np.random.default_rng(0).random((16, 1, 1, 3)) * np.ones((16, 16, 16, 3))
PIXELS = np.rint(255 * IMAGES).astype(np.uint8)


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Path:
    make: Callable[..., Any] = request.getfixturevalue("small_moe")
    path = tmp_path_factory.mktemp("exported") / "small.onnx"
    export_model(make(), path, image_size=16, labels=LABELS, input_type="uint8", images=PIXELS, profile="throughput")
    return path


def test_tritons_folder_holds_a_model_that_runs_as_its_configuration_says(exported: Path, tmp_path: Path) -> None:
    service = pytest.importorskip("tritonclient.grpc.model_config_pb2", reason="Triton's schema: tritonclient[grpc]")
    folder = write_triton_repository(exported, tmp_path / "models", max_batch_size=32)
    config = text_format.Parse((folder / "config.pbtxt").read_text(), service.ModelConfig())
    assert (config.name, config.platform, config.max_batch_size) == ("small", "onnxruntime_onnx", 32)
    assert config.HasField("dynamic_batching")
    assert [(warm.batch_size, warm.inputs["images"].zero_data) for warm in config.model_warmup] == [
        (1, True),
        (32, True),
    ]
    served = ort.InferenceSession(folder / "1" / "model.onnx", providers=["CPUExecutionProvider"])
    kinds = {
        "tensor(uint8)": service.TYPE_UINT8,
        "tensor(float)": service.TYPE_FP32,
        "tensor(int64)": service.TYPE_INT64,
    }
    for entries, values in ((config.input, served.get_inputs()), (config.output, served.get_outputs())):
        assert [(e.name, e.data_type, list(e.dims)) for e in entries] == [
            (value.name, kinds[value.type], value.shape[1:]) for value in values
        ]
        # Triton adds the batch dimension itself, and insists that it is dynamic in the model
        assert all(value.shape[0] == "batch" for value in values)
    assert (folder / "labels.txt").read_text().splitlines() == LABELS
    expected = Session(exported).run(PIXELS)
    np.testing.assert_array_equal(served.run(["logits"], {"images": PIXELS})[0], expected.logits)


def test_a_triton_folder_is_written_whole_or_not_at_all(exported: Path, tmp_path: Path) -> None:
    folder = write_triton_repository(exported, tmp_path / "models", name="digits")
    assert sorted(path.name for path in folder.rglob("*")) == [
        "1",
        "config.pbtxt",
        "labels.txt",
        "model.onnx",
        "model.onnx.data",
    ]
    with pytest.raises(ModelFileError, match="exists already"):
        write_triton_repository(exported, tmp_path / "models", name="digits")
    with pytest.raises(ModelFileError, match="model name of letters"):
        write_triton_repository(exported, tmp_path / "models", name="a/b")
    assert [path.name for path in (tmp_path / "models").iterdir()] == ["digits"]


def test_timing_gives_one_line_per_batch_size(exported: Path) -> None:
    timings = time_session(Session(exported, threads=1), [1, 4], seconds=0.01)
    assert [timing.batch for timing in timings] == [1, 4]
    for timing in timings:
        assert 0 < timing.median_ms <= timing.p95_ms
        assert timing.images_per_second == pytest.approx(1e3 * timing.batch / timing.median_ms)
    with pytest.raises(InputError, match="batch size of at least 1, got 0"):
        time_session(Session(exported), [0])


def test_the_monitor_sees_no_drift_in_the_images_of_the_export_and_much_in_others(exported: Path) -> None:
    session = Session(exported)
    log = RouteLog(session.metadata.num_experts)
    monitor = RouteMonitor(session.metadata, log=log)
    prediction = session.run(PIXELS)
    monitor.record(prediction)
    assert all(drift.distance == 0 for drift in monitor.drift())
    indices, experts, labels, predictions = log.rows(("served", 0))
    np.testing.assert_array_equal(indices, np.arange(16))
    np.testing.assert_array_equal(experts, prediction.pathway)
    assert set(labels) == {-1}
    np.testing.assert_array_equal(predictions, prediction.logits.argmax(axis=1))

    other = RouteMonitor(session.metadata)
    other.record(session.run(np.repeat(PIXELS[:1], 16, axis=0)))
    assert prediction.pathway is not None
    # One image 16 times: a layer that sent k of the 16 images its way moves by 1 - k / 16.
    stays = (prediction.pathway == prediction.pathway[0]).mean(axis=0)
    served = {drift.layer: drift.distance for drift in other.drift()}
    for layer, share in zip(session.metadata.layers, stays, strict=True):
        assert served[layer] == pytest.approx(1 - share)
    assert other.drift()[0].distance == max(served.values()) > 0


def test_the_monitor_refuses_what_it_cannot_compare(exported: Path) -> None:
    session = Session(exported)
    with pytest.raises(InputError, match="no recorded expert load"):
        RouteMonitor(dataclasses.replace(session.metadata, expert_load=None))
    with pytest.raises(InputError, match="expected a pathway of 4 layers, got none"):
        RouteMonitor(session.metadata).record(dataclasses.replace(session.run(PIXELS), pathway=None))


def test_a_prediction_of_a_model_of_more_experts_changes_no_count(exported: Path) -> None:
    session = Session(exported)
    prediction = session.run(PIXELS)
    assert prediction.pathway is not None
    monitor = RouteMonitor(session.metadata)
    monitor.record(prediction)
    before = monitor.drift()
    other = prediction.pathway.copy()
    other[3, 2] = 4
    with pytest.raises(InputError, match=r"expected experts 0 to 1 in layer 'convs\.2', got expert 4; use predictions"):
        monitor.record(dataclasses.replace(prediction, pathway=other))
    assert monitor.drift() == before
    assert monitor.images == len(PIXELS)


@pytest.mark.parametrize("label", ["a cat\nor dog", "caf\udce9"])
def test_a_label_that_takes_more_than_a_line_of_triton_is_refused(label: str, exported: Path, tmp_path: Path) -> None:
    model = onnx.load(exported, load_external_data=False)
    (entry,) = (entry for entry in model.metadata_props if entry.key == KEY)
    entry.value = json.dumps(json.loads(entry.value) | {"labels": [label, *LABELS[1:]]})
    graph = tmp_path / exported.name
    graph.write_bytes(model.SerializeToString())
    Path(f"{graph}.data").write_bytes(Path(f"{exported}.data").read_bytes())
    with pytest.raises(ModelFileError, match=r"one label of UTF-8 a line.* rename the class") as raised:
        write_triton_repository(graph, tmp_path / "models")
    assert "\n" not in str(raised.value)
    assert not (tmp_path / "models").exists()


def test_serving_needs_neither_torch_nor_the_code_of_the_model(exported: Path) -> None:
    code = (
        "import sys, numpy as np\n"
        "for name in ('torch', 'onnxscript', 'advmoe'): sys.modules[name] = None\n"
        "from advmoe_export import RouteMonitor, Session\n"
        f"session = Session({str(exported)!r}, threads=1)\n"
        "prediction = session.run(np.zeros((2, 16, 16, 3), np.uint8))\n"
        "RouteMonitor(session.metadata).record(prediction)\n"
        "print(prediction.labels[0], prediction.pathway.shape)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    label = Session(exported).run(np.zeros((1, 16, 16, 3), np.uint8)).labels[0]
    assert done.stdout.strip() == f"{label} (2, 4)"
