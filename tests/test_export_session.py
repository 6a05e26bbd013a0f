"""Sessions: accepted images, refused files, providers, and missing packages."""

import dataclasses
import errno
import json
import pickle
import re
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from advmoe_export import (
    InputError,
    ModelFileError,
    ProviderError,
    RouteMonitor,
    Session,
    export_model,
    prepare,
    time_session,
)
from advmoe_export.metadata import KEY
from advmoe_export.model_file import read_metadata, read_properties
from advmoe_export.reference import probe_images
from advmoe_export.triton import config
from google.protobuf import text_format
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

LABELS = [f"class {i}" for i in range(10)]
PIXELS = np.random.default_rng(0).integers(0, 256, (5, 16, 16, 3), dtype=np.uint8)


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory, small_moe: Callable[..., Any]) -> Path:
    path = tmp_path_factory.mktemp("session") / "small.onnx"
    export_model(small_moe(), path, image_size=16, labels=LABELS, images=PIXELS.transpose(0, 3, 1, 2) / np.float32(255))
    return path


@pytest.fixture(scope="module")
def session(path: Path) -> Session:
    return Session(path, threads=1)


# --- images ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("threads", ["two", 0, 1.5])
def test_a_wrong_number_of_threads_is_one_line(path: Path, threads: Any) -> None:
    with pytest.raises(InputError, match=f"expected threads to be None or an integer of at least 1, got {threads!r}"):
        Session(path, threads=threads)


def test_one_image_is_a_batch_of_one(session: Session) -> None:
    expected = session.run(PIXELS[:1]).logits
    assert expected.shape == (1, 10)
    np.testing.assert_array_equal(session.run(PIXELS[0]).logits, expected)
    np.testing.assert_array_equal(session.run(PIXELS[0].transpose(2, 0, 1) / np.float32(255)).logits, expected)


def test_tensors_on_the_cpu_are_arrays(session: Session) -> None:
    expected = session.run(PIXELS).logits
    tensor = torch.from_numpy(PIXELS)
    for images in (tensor, tensor.permute(0, 3, 1, 2) / 255, list(tensor)):
        np.testing.assert_array_equal(session.run(images).logits, expected)
    np.testing.assert_array_equal(session.run(tensor[0]).logits, session.run(PIXELS[0]).logits)


def test_pillow_images_and_paths_are_prepared_like_the_images_of_the_evaluation(
    session: Session, tmp_path: Path
) -> None:
    photo = Image.fromarray(np.random.default_rng(1).integers(0, 256, (40, 23, 3), dtype=np.uint8))
    photo.save(tmp_path / "photo.png")
    expected = session.run(prepare(photo, session.metadata)[None]).logits
    for images in (photo, tmp_path / "photo.png", str(tmp_path / "photo.png"), [photo], (tmp_path / "photo.png",)):
        np.testing.assert_array_equal(session.run(images).logits, expected)
    mixed = session.run([photo, PIXELS[0], tmp_path / "photo.png"])
    assert mixed.logits.shape == (3, 10)
    np.testing.assert_array_equal(mixed.pathway, session.run([photo, PIXELS[0], photo]).pathway)


@pytest.mark.parametrize(
    ("images", "message"),
    [
        ([], "expected at least one image: .*, got an empty sequence"),
        ([[1, 2], [3, 4]], "got a sequence with list in it"),
        ([0.5], "got a sequence with float in it"),
        (None, "got NoneType"),
        (7, "got int"),
        ([PIXELS], r"expected a sequence of single images, got an array \[5, 16, 16, 3\] in it"),
        ([PIXELS[0], PIXELS[0] / np.float32(255)], "images of one type and size in a batch, got uint8 .* and float32"),
        (PIXELS[0, 0], r"got uint8 \[16, 3\]"),
        ("missing.png", "no image file missing.png"),
        (np.full((2, 3, 16, 16), np.nan, np.float32), "got NaN in 2 of 2; look for a division by zero"),
        (np.full((1, 3, 16, 16), 255, np.float32), "got values from 255 to 255; divide 8-bit images by 255"),
        (np.full((1, 3, 16, 16), -1.5, np.float32), "got values from -1.5 to -1.5; do not normalize them"),
        (np.full((1, 3, 16, 16), np.inf, np.float32), "got values from inf to inf; do not normalize them"),
        (
            np.zeros((1, 3, 16, 16), np.int64),
            r"got int64 \[1, 3, 16, 16\]; convert levels of 0 to 255 by images.astype",
        ),
        (PIXELS / np.float32(255), r"got float32 \[5, 16, 16, 3\]; put .* first: images.transpose\(0, 3, 1, 2\)"),
        (PIXELS.transpose(0, 3, 1, 2), r"got uint8 \[5, 3, 16, 16\]; put .* last: images.transpose\(0, 2, 3, 1\)"),
        (PIXELS[:, :8], r"got uint8 \[5, 8, 16, 3\]; convert the images to RGB of this size"),
        (PIXELS[..., :1], r"got uint8 \[5, 16, 16, 1\]; convert the images to RGB of this size"),
        (torch.zeros(1, 3, 16, 16, device="meta"), "Tensor is no array for NumPy: .*meta"),
        ([torch.zeros(3, 16, 16, requires_grad=True)], "Tensor is no array for NumPy: .*requires grad"),
    ],
)
def test_what_is_no_image_is_one_line(session: Session, images: Any, message: str) -> None:
    with pytest.raises(InputError, match=message) as raised:
        session.run(images)
    assert "\n" not in str(raised.value)


def test_a_list_is_no_array_for_what_takes_arrays(session: Session) -> None:
    with pytest.raises(InputError, match="expected a batch as one array of NumPy, got list"):
        session.run_raw(PIXELS.tolist())


def test_a_session_goes_to_another_process_by_its_path_and_arguments(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(path.parent)
    content = pickle.dumps(Session(path.name, threads=1, optimization="basic"))
    monkeypatch.chdir(tmp_path)
    again = pickle.loads(content)
    kept = {"providers": ("cpu",), "threads": 1, "optimization": "basic", "check_data": True}
    assert again._again.keywords == kept
    np.testing.assert_array_equal(again.run(PIXELS).pathway, Session(path).run(PIXELS).pathway)


def test_a_file_with_a_fixed_batch_size_takes_smaller_batches_only(session: Session) -> None:
    metadata = dataclasses.replace(session.metadata, batch_size=4)
    fixed = SimpleNamespace(metadata=metadata, _expectation=session._expectation)
    assert Session.check(fixed, PIXELS[:3], any_size=True).shape == (3, 3, 16, 16)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="takes batches of 4, got uint8"):
        Session.check(fixed, PIXELS, any_size=True)  # type: ignore[arg-type]


def test_timing_needs_few_images_for_a_large_batch(session: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    made, run = [], []

    def make(image_size: tuple[int, int], input_type: str, count: int) -> np.ndarray:
        made.append(count)
        return probe_images(image_size, input_type, count)

    monkeypatch.setattr("advmoe_export.bench.probe_images", make)
    monkeypatch.setattr(Session, "run_raw", lambda self, images: run.append(len(images)))
    time_session(session, [1, 100, 600], seconds=0)
    assert made == [4, 64, 64]
    assert set(run) == {1, 100, 600}


@pytest.mark.parametrize("window", [0, -1])
def test_a_monitor_needs_a_window_of_an_image(window: int, session: Session) -> None:
    with pytest.raises(InputError, match=f"window of at least 1 image, got {window}"):
        RouteMonitor(session.metadata, window=window)


# --- metadata -------------------------------------------------------------------------------------


def rewritten(path: Path, folder: Path, change: Callable[[dict[str, Any]], object]) -> Path:
    """A copy of the graph with changed metadata."""
    model = onnx.load(path, load_external_data=False)
    (entry,) = (entry for entry in model.metadata_props if entry.key == KEY)
    document = json.loads(entry.value)
    changed = change(document)
    entry.value = changed if isinstance(changed, str) else json.dumps(document)
    (folder / "copy.onnx").write_bytes(model.SerializeToString())
    return folder / "copy.onnx"


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("labels", "cat", r"Expected `array`, got `str` - at `\$.labels`"),
        ("labels", [1, 2], r"Expected `str`, got `int` - at `\$.labels\[0\]`"),
        ("labels", [], r"Expected `array` of length >= 1"),
        ("image_size", [16], r"Expected `array` of length 2"),
        ("image_size", [16, "16"], r"Expected `int`, got `str` - at `\$.image_size\[1\]`"),
        ("image_size", [16, -1], r"Expected `int` >= 1"),
        ("image_size", [16, 10**30], r"damaged: "),
        ("resize", 3, "resize must be at least 16, got 3"),
        ("input_type", "float64", r"Invalid enum value 'float64' - at `\$.input_type`"),
        ("batch_size", "any", r"at `\$.batch_size`"),
        ("num_experts", None, r"at `\$.num_experts`"),
        ("num_experts", [2], "4 layers but 1 numbers of experts"),
        ("expert_load", [[0.5, 0.5]] * 3, "one share per layer and expert"),
        ("expert_load", [[0.5, "much"]] * 4, r"Expected `float`, got `str`"),
        ("expert_load_images", 0, r"Expected `int` >= 1"),
        ("expert_load", [[0.5, float("nan")]] * 4, "damaged: "),
        ("outputs", ["probabilities"], "must include 'logits'"),
        ("tool", [], r"at `\$.tool`"),
        ("model", 7, r"at `\$.model`"),
        ("format_version", "2", "it has no version"),
        ("format_version", True, "it has no version"),
        ("format_version", 99, "reads version .*; update the package"),
    ],
)
def test_metadata_of_a_wrong_type_is_one_line_that_names_the_field(
    path: Path, tmp_path: Path, field: str, value: object, message: str
) -> None:
    with pytest.raises(ModelFileError, match=message) as raised:
        Session(rewritten(path, tmp_path, lambda document: document.update({field: value})))
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "7", '"x"', "[" * 100_000])
def test_metadata_that_is_no_object_is_one_line(path: Path, tmp_path: Path, text: str) -> None:
    with pytest.raises(ModelFileError, match=r"the metadata of .* is damaged"):
        Session(rewritten(path, tmp_path, lambda document: text))


def test_a_file_of_an_earlier_version_does_not_tell_the_number_of_images(path: Path, tmp_path: Path) -> None:
    earlier = read_metadata(rewritten(path, tmp_path, lambda document: document.pop("expert_load_images")))
    assert earlier == dataclasses.replace(read_metadata(path), expert_load_images=None)


def test_a_missing_field_is_named(path: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelFileError, match="missing required field `labels`"):
        Session(rewritten(path, tmp_path, lambda document: document.pop("labels")))


def test_metadata_is_read_without_onnx_as_onnx_reads_it(path: Path) -> None:
    props = onnx.load(path, load_external_data=False).metadata_props
    assert read_properties(path.read_bytes()) == {entry.key: entry.value for entry in props}


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_damaged_bytes_are_refused_or_read_but_never_crash(path: Path, data: st.DataObject) -> None:
    content = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    del content[data.draw(st.integers(0, len(content))) :]
    try:
        properties = read_properties(bytes(content))
    except ValueError:
        return
    assert all(isinstance(text, str) for text in properties.values())


def test_the_reason_of_onnxruntime_is_shown_in_full(path: Path, tmp_path: Path) -> None:
    outside = tmp_path / "elsewhere" / ("long" * 40) / "outside.data"
    outside.parent.mkdir(parents=True)
    outside.write_bytes(Path(f"{path}.data").read_bytes())
    (tmp_path / "model").mkdir()
    graph = tmp_path / "model" / "small.onnx"
    graph.write_bytes(path.read_bytes())
    Path(f"{graph}.data").symlink_to(outside)
    with pytest.raises(ModelFileError) as raised:
        Session(graph)
    message = str(raised.value)
    assert "\n" not in message
    whole = ""
    try:
        onnxruntime.InferenceSession(graph, providers=["CPUExecutionProvider"])
    except Exception as error:
        whole = " ".join(str(error).split())
    assert len(whole) > 300
    assert message.endswith(whole)


def test_a_graph_with_other_inputs_is_one_line(path: Path, tmp_path: Path) -> None:
    other = onnx.load(path, load_external_data=False)
    value = onnx.helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, [1])
    result = onnx.helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, [1])
    node = onnx.helper.make_node("Relu", ["x"], ["y"])
    other.graph.CopyFrom(onnx.helper.make_graph([node], "other", [value], [result]))
    target = tmp_path / path.name
    onnx.save(other, target)
    Path(f"{target}.data").write_bytes(Path(f"{path}.data").read_bytes())
    with pytest.raises(ModelFileError, match=r"takes x tensor\(float\) \[1\], expected images .*: another graph"):
        Session(target)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"labels": ["cat"]}, r"returns logits tensor\(float\) \[B, 10\], .*expected logits tensor\(float\) \[B, 1\]"),
        ({"labels": LABELS * 2}, r"expected logits tensor\(float\) \[B, 20\]"),
        ({"image_size": [8, 8]}, r"takes images tensor\(float\) \[B, 3, 16, 16\], expected images .* \[B, 3, 8, 8\]"),
        ({"input_type": "uint8"}, r"expected images tensor\(uint8\) \[B, 16, 16, 3\]"),
        ({"batch_size": 4}, r"expected images tensor\(float\) \[4, 3, 16, 16\]"),
        ({"num_experts": [2], "layers": ["conv"], "expert_load": None}, r"expert_index tensor\(int64\) \[B, 1\]"),
        ({"outputs": ["logits", "pathway"]}, r"expected logits tensor\(float\) \[B, 10\], pathway by its metadata"),
    ],
)
def test_metadata_that_describe_another_graph_are_one_line(
    path: Path, tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    other = rewritten(path, tmp_path, lambda document: document.update(change))
    graph = other.rename(tmp_path / path.name)  # a graph names its data file
    Path(f"{graph}.data").write_bytes(Path(f"{path}.data").read_bytes())
    with pytest.raises(ModelFileError, match=message) as raised:
        Session(graph)
    assert "\n" not in str(raised.value)


def test_weights_that_cannot_be_read_are_one_line(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = Path.open

    def refuse(self: Path, *arguments: Any, **options: Any) -> Any:
        if self.suffix == ".data":
            raise PermissionError(errno.EACCES, "Permission denied")
        return opened(self, *arguments, **options)

    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(ModelFileError, match=r"cannot read '.*small\.onnx\.data': Permission denied"):
        Session(path)


def test_a_path_that_no_file_can_have_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(ModelFileError, match=r"cannot read '.*\.onnx': File name too long"):
        Session(tmp_path / f"{'long' * 100}.onnx")


# --- providers ------------------------------------------------------------------------------------


def described(name: str, kind: str, *sizes: int) -> SimpleNamespace:
    """An input or output as onnxruntime describes it."""
    return SimpleNamespace(name=name, type=f"tensor({kind})", shape=["batch", *sizes])


def fake_runtime(starting: Sequence[str], installed: Sequence[str] = ("CUDAExecutionProvider",)) -> SimpleNamespace:
    """onnxruntime in which only some providers start, and which complains as the real one does."""

    def start(path: Path, options: Any, *, providers: Any, enable_fallback: int) -> Any:
        name = providers[0][0]
        if name == "TensorrtExecutionProvider" and name not in starting:
            raise RuntimeError("TensorRT\nis not here")
        if name not in (*starting, "CPUExecutionProvider"):
            print("Failed to load libcublasLt.so.13")
        names = [*([name] if name in starting else []), "CPUExecutionProvider"]
        return SimpleNamespace(
            get_providers=lambda: list(dict.fromkeys(names)),
            get_inputs=lambda: [described("images", "float", 3, 16, 16)],
            get_outputs=lambda: [described("logits", "float", 10), described("expert_index", "int64", 4)],
            options=dict(providers),
        )

    runtime = SimpleNamespace(
        __version__="1.0",
        severities=[],
        preloaded=[],
        get_available_providers=lambda: [*installed, "CPUExecutionProvider"],
        SessionOptions=SimpleNamespace,
        GraphOptimizationLevel=SimpleNamespace(
            ORT_DISABLE_ALL=0, ORT_ENABLE_BASIC=1, ORT_ENABLE_EXTENDED=2, ORT_ENABLE_ALL=3
        ),
        InferenceSession=start,
    )
    runtime.set_default_logger_severity = runtime.severities.append
    runtime.preload_dlls = lambda: runtime.preloaded.append(True)
    return runtime


@pytest.mark.parametrize(
    ("wanted", "starting", "used"),
    [
        (["cuda", "cpu"], ["CUDAExecutionProvider"], "CUDAExecutionProvider"),
        (["cuda", "cpu"], [], "CPUExecutionProvider"),
        (["tensorrt", "cuda", "cpu"], ["CUDAExecutionProvider"], "CUDAExecutionProvider"),
        (["cpu", "cuda"], ["CUDAExecutionProvider"], "CPUExecutionProvider"),
        (["NoSuchProvider", "cpu"], [], "CPUExecutionProvider"),
        ("cuda", ["CUDAExecutionProvider"], "CUDAExecutionProvider"),
    ],
)
def test_the_first_provider_that_starts_is_used_without_noise(
    wanted: str | list[str],
    starting: list[str],
    used: str,
    path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    runtime = fake_runtime(starting, ("TensorrtExecutionProvider", "CUDAExecutionProvider"))
    monkeypatch.setitem(sys.modules, "onnxruntime", runtime)
    session = Session(path, providers=wanted)
    assert session.provider == used
    assert capfd.readouterr() == ("", "")
    if used == "CUDAExecutionProvider":
        # TF32 and an exhaustive search are off; CUDA's libraries were looked for first.
        assert session._session.options[used] == {"cudnn_conv_algo_search": "HEURISTIC", "use_tf32": "0"}
        assert runtime.preloaded
    assert runtime.severities[-1:] in ([], [2])  # 2 is onnxruntime's own default


@pytest.mark.parametrize("has_cuda", [True, False])
def test_cuda_runs_the_nodes_that_tensorrt_cannot_take(
    has_cuda: bool, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = ["TensorrtExecutionProvider", *(["CUDAExecutionProvider"] if has_cuda else [])]
    runtime = fake_runtime(names, names)
    monkeypatch.setitem(sys.modules, "onnxruntime", runtime)
    session = Session(path, providers="tensorrt")
    assert session.provider == "TensorrtExecutionProvider"
    assert list(session._session.options) == names
    assert session._session.options.get("CUDAExecutionProvider", {}).get("use_tf32") == ("0" if has_cuda else None)
    assert runtime.preloaded == [True]


@pytest.mark.parametrize(("batch_size", "sizes"), [(None, [1, 32]), (4, [1])])
def test_triton_turns_tf32_off_and_warms_up(batch_size: int | None, sizes: list[int], path: Path) -> None:
    model = onnx.load(path, load_external_data=False)
    metadata = dataclasses.replace(read_metadata(path), batch_size=batch_size)
    text = config(model, metadata, "small", 32, 500)
    assert [int(size) for size in re.findall(r"batch_size: (\d+), inputs", text)] == sizes
    # The option stands where Triton's CUDA provider looks for it.
    cuda = 'gpu_execution_accelerator [ { name: "cuda", parameters { key: "use_tf32", value: "0" } } ]'
    assert f"optimization {{ execution_accelerators {{ {cuda} }} }}" in text


def test_tritons_schema_knows_the_accelerator(path: Path) -> None:
    service = pytest.importorskip("tritonclient.grpc.model_config_pb2", reason="Triton's schema: tritonclient[grpc]")
    text = config(onnx.load(path, load_external_data=False), read_metadata(path), "small", 32, 500)
    parsed = text_format.Parse(text, service.ModelConfig())
    (accelerator,) = parsed.optimization.execution_accelerators.gpu_execution_accelerator
    assert (accelerator.name, dict(accelerator.parameters)) == ("cuda", {"use_tf32": "0"})


def test_providers_that_do_not_start_are_one_line_with_the_reason(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", fake_runtime([]))
    with pytest.raises(ProviderError) as raised:
        Session(path, providers=["tensorrt", "cuda"])
    assert str(raised.value) == (
        "'TensorrtExecutionProvider' is not part of this onnxruntime, which has CUDAExecutionProvider, "
        "CPUExecutionProvider; 'CUDAExecutionProvider' did not start (Failed to load libcublasLt.so.13); "
        "add 'cpu' to the providers to fall back to it"
    )


def test_a_provider_that_is_not_installed_gets_advice(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", fake_runtime([], installed=()))
    for name, advice in (
        ("cuda", "CUDA needs advmoe-export[gpu] instead of [cpu]"),
        ("gpu", "short names are cpu, cuda, tensorrt"),
    ):
        with pytest.raises(ProviderError) as raised:
            Session(path, providers=name)
        assert f"which has CPUExecutionProvider; {advice}; add 'cpu'" in str(raised.value)


def test_bound_inputs_and_outputs_give_the_same_results(session: Session) -> None:
    images = PIXELS.transpose(0, 3, 1, 2) / np.float32(255)
    expected = session.run_raw(images)
    bound = dict(zip(session.outputs, session._run_on_device(images), strict=True))
    for name, values in expected.items():
        np.testing.assert_array_equal(bound[name], values)


# --- what is installed ----------------------------------------------------------------------------


def blocked(code: str, *names: str) -> subprocess.CompletedProcess[str]:
    """Run code in a process in which some packages cannot be imported."""
    head = f"import sys\nfor name in {names!r}: sys.modules[name] = None\n"
    return subprocess.run([sys.executable, "-c", head + code], capture_output=True, text=True, check=False)


def test_serving_needs_onnxruntime_and_nothing_of_the_exporter(path: Path) -> None:
    code = (
        "import numpy as np\n"
        "from advmoe_export import RouteMonitor, Session, time_session\n"
        f"session = Session({str(path)!r}, threads=1)\n"
        "prediction = session.run(np.zeros((2, 16, 16, 3), np.uint8))\n"
        "RouteMonitor(session.metadata).record(prediction)\n"
        "assert time_session(session, [1], seconds=0)[0].batch == 1\n"
        "print(prediction.labels[0], prediction.pathway.shape)"
    )
    done = blocked(code, "onnx", "onnx_ir", "onnxscript", "torch", "torchvision", "advmoe", "PIL")
    label = Session(path).run(np.zeros((1, 16, 16, 3), np.uint8)).labels[0]
    assert (done.stdout.strip(), done.stderr) == (f"{label} (2, 4)", "")


def test_without_onnxruntime_the_message_says_which_extra_to_install(path: Path) -> None:
    code = (
        "from advmoe_export import ExportError, Session\n"
        f"try: Session({str(path)!r})\n"
        "except ExportError as error: print(error)"
    )
    done = blocked(code, "onnxruntime")
    assert "pip install 'advmoe-export[cpu]', or 'advmoe-export[gpu]'" in done.stdout
    assert done.stdout.count("\n") == 1


def test_without_onnx_exporting_says_which_extra_to_install() -> None:
    code = (
        "from advmoe_export import ExportError\n"
        "try: from advmoe_export import export_model; export_model(None, 'x.onnx', image_size=8, labels=[])\n"
        "except ExportError as error: print(error)"
    )
    done = blocked(code, "onnx")
    assert "pip install 'advmoe-export[export]'" in done.stdout, done


def test_without_onnxruntime_exporting_says_that_it_is_needed_too() -> None:
    code = (
        "from advmoe_export import ExportError\n"
        "try: from advmoe_export import export_model\n"
        "except ExportError as error: print(error)"
    )
    assert "pip install 'advmoe-export[cpu,export]'" in blocked(code, "onnxruntime").stdout


def test_metadata_survives_a_copy_of_itself(path: Path) -> None:
    metadata = read_metadata(path)
    assert metadata.of(**dataclasses.asdict(metadata)) == metadata
