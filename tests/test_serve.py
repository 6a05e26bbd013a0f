"""The server: protocol, page, limits and shutdown."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import io
import json
import math
import re
import signal
import socket
import struct
import threading
import time
import tracemalloc
import zlib
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import httpx
import numpy as np
import pytest
import torch
from advmoe_export import ExportError, InputError, Session, export_model
from advmoe_export.monitor import RouteMonitor
from advmoe_export.serve import server as serve_module
from PIL import Image
from serving import server
from torch import nn

pytest.importorskip("starlette")
pytest.importorskip("uvicorn")

import uvicorn
from advmoe_export.serve.app import ModelServer
from advmoe_export.serve.batching import Batcher, OverloadedError, StoppingError
from advmoe_export.serve.command import parse
from advmoe_export.serve.config import ServeConfig
from advmoe_export.serve.connection import Connection, Limits
from advmoe_export.serve.protocol import read_request
from advmoe_export.serve.server import AddressError, _listen
from uvicorn.server import ServerState

from advmoe.cli.app import main

LABELS = [f"class {i}" for i in range(10)]
PIXELS = np.rint(255 * np.random.default_rng(0).random((16, 1, 1, 3)) * np.ones((16, 16, 16, 3))).astype(np.uint8)
FLOATS = np.divide(PIXELS.transpose(0, 3, 1, 2), 255, dtype=np.float32)


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory, small_moe: Callable[..., Any]) -> Path:
    path = tmp_path_factory.mktemp("serve") / "small.onnx"
    export_model(small_moe(), path, image_size=16, labels=LABELS, images=FLOATS, profile="throughput", resize=18)
    return path


@pytest.fixture(scope="module")
def session(path: Path) -> Session:
    return Session(path, threads=1)


def saved(name: str, size: tuple[int, int] = (40, 30), **options: Any) -> bytes:
    """An image file in a format of Pillow's."""
    content = io.BytesIO()
    Image.fromarray(np.random.default_rng(1).integers(0, 256, (*size, 3), dtype=np.uint8)).save(
        content, name, **options
    )
    return content.getvalue()


def png() -> bytes:
    return saved("PNG")


@asynccontextmanager
async def client(session: Session, **settings: Any) -> AsyncIterator[tuple[httpx.AsyncClient, ModelServer]]:
    """A client of the application in this process."""
    model = ModelServer(session, ServeConfig(model=session.path, **{"max_batch": 16} | settings))
    app = model.app()
    transport = httpx.ASGITransport(app)
    async with model._lifespan(app), httpx.AsyncClient(transport=transport, base_url="http://test") as http:
        yield http, model


def ask(session: Session, method: str, url: str, *, settings: Mapping[str, Any] | None = None, **request: Any) -> Any:
    """The response to one request."""

    async def run() -> httpx.Response:
        async with client(session, **(settings or {})) as (http, _):
            return await http.request(method, url, **request)

    return asyncio.run(run())


def infer(images: np.ndarray, **more: Any) -> dict[str, Any]:
    datatype = "UINT8" if images.dtype == np.uint8 else "FP32"
    tensor = {"name": "images", "shape": list(images.shape), "datatype": datatype, "data": images.tolist()}
    return {"inputs": [tensor], **more}


# --- the protocol ---------------------------------------------------------------------------------


def test_health_and_metadata(session: Session) -> None:
    assert ask(session, "GET", "/v2/health/live").json() == {"live": True}
    for url in ("/v2/health/ready", "/v2/models/small/ready", "/v2/models/small/versions/1/ready"):
        assert ask(session, "GET", url).status_code == 200
    assert ask(session, "GET", "/v2").json()["extensions"] == ["binary_tensor_data", "classification"]
    described = ask(session, "GET", "/v2/models/small").json()
    assert described["inputs"] == [{"name": "images", "datatype": "FP32", "shape": [-1, 3, 16, 16]}]
    assert described["outputs"] == [
        {"name": "logits", "datatype": "FP32", "shape": [-1, 10]},
        {"name": "expert_index", "datatype": "INT64", "shape": [-1, 4]},
    ]


@pytest.mark.parametrize("images", [FLOATS[:3], PIXELS[:3]])
@pytest.mark.parametrize("nested", [True, False])
def test_json_gives_what_a_session_gives(session: Session, images: np.ndarray, nested: bool) -> None:
    request = infer(images, id="42")
    if not nested:
        request["inputs"][0]["data"] = images.reshape(-1).tolist()
    answer = ask(session, "POST", "/v2/models/small/infer", json=request).json()
    expected = session.run(images)
    assert (answer["id"], answer["model_name"], answer["model_version"]) == ("42", "small", "1")
    logits, experts = answer["outputs"]
    assert (logits["name"], logits["datatype"], logits["shape"]) == ("logits", "FP32", [3, 10])
    # Batches are joined, so sums may be in another order than in the session.
    np.testing.assert_allclose(np.reshape(logits["data"], (3, 10)), expected.logits, rtol=1e-4, atol=1e-6)
    np.testing.assert_array_equal(np.reshape(experts["data"], (3, 4)), expected.pathway)


def test_raw_tensors_behind_the_json_give_the_same(session: Session) -> None:
    raw = FLOATS[:2].astype("<f4").tobytes()
    tensor = {"name": "images", "shape": [2, 3, 16, 16], "datatype": "FP32"}
    header = json.dumps(
        {
            "inputs": [{**tensor, "parameters": {"binary_data_size": len(raw)}}],
            "outputs": [{"name": "logits", "parameters": {"binary_data": True}}, {"name": "expert_index"}],
        }
    ).encode()
    response = ask(
        session,
        "POST",
        "/v2/models/small/versions/1/infer",
        content=header + raw,
        headers={"Inference-Header-Content-Length": str(len(header))},
    )
    length = int(response.headers["Inference-Header-Content-Length"])
    logits, experts = json.loads(response.content[:length])["outputs"]
    values = np.frombuffer(response.content[length:], "<f4")
    assert logits["parameters"]["binary_data_size"] == 2 * 10 * 4 == len(response.content) - length
    expected = session.run(FLOATS[:2])
    np.testing.assert_allclose(values.reshape(2, 10), expected.logits, rtol=1e-4, atol=1e-6)
    np.testing.assert_array_equal(np.reshape(experts["data"], (2, 4)), expected.pathway)


def test_tritons_classification_names_the_best_classes(session: Session) -> None:
    outputs = [{"name": "logits", "parameters": {"classification": 2}}]
    answer = ask(session, "POST", "/v2/models/small/infer", json=infer(FLOATS[:1], outputs=outputs)).json()
    (entry,) = answer["outputs"]
    assert (entry["datatype"], entry["shape"]) == ("BYTES", [1, 2])
    order = np.argsort(-session.run(FLOATS[:1]).logits[0])[:2]
    assert [text.split(":")[1:] for text in entry["data"]] == [[str(i), LABELS[i]] for i in order]


@pytest.mark.parametrize("more", [{}, {"outputs": []}, {"outputs": None}, {"parameters": None}])
def test_no_outputs_are_all_outputs_and_parameters_may_be_null(session: Session, more: dict[str, Any]) -> None:
    request = infer(FLOATS[:1], **more)
    request["inputs"][0]["parameters"] = None
    answer = ask(session, "POST", "/v2/models/small/infer", json=request).json()
    assert [output["name"] for output in answer["outputs"]] == ["logits", "expert_index"]
    request["outputs"] = [{"name": "expert_index", "parameters": None}]
    answer = ask(session, "POST", "/v2/models/small/infer", json=request).json()
    assert [output["name"] for output in answer["outputs"]] == ["expert_index"]


def answers_for(session: Session, logits: np.ndarray, *requests: dict[str, Any]) -> list[httpx.Response]:
    """The answers if the model gives these logits [K] for each image."""

    def run(images: np.ndarray) -> dict[str, np.ndarray]:
        return {**session.execute(images), "logits": np.repeat(logits[None], len(images), axis=0)}

    async def send() -> list[httpx.Response]:
        async with client(session) as (http, model):
            model.batcher._run = run
            return [await http.post(**request) for request in requests]

    return asyncio.run(send())


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_logits_that_json_cannot_express_are_an_error_and_as_raw_tensors_an_answer(
    session: Session, value: float
) -> None:
    logits = np.arange(10, dtype=np.float32)
    logits[3] = value
    url = "/v2/models/small/infer"
    best = [{"name": "logits", "parameters": {"classification": 2}}]
    raw = [{"name": "logits", "parameters": {"binary_data": True}}]
    *failed, fine = answers_for(
        session,
        logits,
        {"url": "/classify", "content": png()},
        {"url": url, "json": infer(FLOATS[:1])},
        {"url": url, "json": infer(FLOATS[:1], outputs=best)},
        {"url": url, "json": infer(FLOATS[:1], outputs=raw)},
    )
    for answer in failed:
        assert answer.status_code == 500
        assert "the output 'logits' has values that are NaN or infinite" in answer.json()["error"]
    length = int(fine.headers["Inference-Header-Content-Length"])
    np.testing.assert_array_equal(np.frombuffer(fine.content[length:], "<f4"), logits)


def test_classes_whose_probabilities_are_rounded_to_zero_are_ranked_by_their_logits(session: Session) -> None:
    # exp(-200) is below the smallest number of FP32, about exp(-103)
    logits = np.array([-900, -800, -700, -600, -500, -400, -300, -200, 0, -1000], np.float32)
    (answer,) = answers_for(session, logits, {"url": "/classify", "content": png()})
    top = answer.json()["top"]
    assert [entry["probability"] for entry in top] == [1, 0, 0, 0, 0]
    assert [entry["label"] for entry in top] == [LABELS[i] for i in (8, 7, 6, 5, 4)]


def change(**fields: Any) -> dict[str, Any]:
    request = infer(FLOATS[:1])
    request["inputs"][0] |= fields
    return request


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b"", "expected an infer request"),
        (b"{", "expected an infer request"),
        (b"[" * 100_000, "expected an infer request"),
        (b"{}", "missing required field `inputs`"),
        (b'{"inputs": []}', "Expected `array` of length 1 - at `$.inputs`"),
        (change(name="x"), "expected one input named 'images', got x"),
        (change(datatype="BYTES"), "expected images of datatype FP32 or UINT8, got 'BYTES'"),
        (change(shape=[1, 3, 16]), "Expected `array` of length 4 - at `$.inputs[0].shape`"),
        (change(shape=[-1, -3, 16, 16]), "expected at least one image: FP32 [B, 3, 16, 16]"),
        (change(shape=[2**62, 0, 16, 16], data=[]), "got FP32 [4611686018427387904, 0, 16, 16]"),
        (change(shape=[10**30, 3, 16, 16], data=[]), f"expected at most 32 images in a request, got {10**30}"),
        (change(shape=[10**30, 3, 16, 16], data=None, parameters={"binary_data_size": 0}), "at most 32 images"),
        (change(shape="big"), "Expected `array`, got `str`"),
        (change(data=None), "expected 'data' as a list of numbers, 768 for shape [1, 3, 16, 16], got 0"),
        (change(data=[1, 2]), "expected 'data' as a list of numbers, 768 for shape [1, 3, 16, 16], got 2"),
        (change(data=[[]] * 768), "nested as [1, 3, 16, 16]"),
        (change(data=[True] * 768), "flat or nested list of FP32 numbers: Expected `float`, got `bool`"),
        (change(data=[1e39] * 768), "values from inf to inf"),
        (change(data=[[[[0] * 700]], [[[0] * 68]]]), "a flat list of numbers, or nested as [1, 3, 16, 16]"),
        (change(data=FLOATS[:1].transpose(0, 2, 3, 1).tolist()), "nested as [1, 3, 16, 16], got [1, 16, 16, 3]"),
        (change(data=PIXELS[:1].reshape(1, 3, 16, 16).tolist(), datatype="UINT8", shape=[1, 16, 16, 3]), "nested as"),
        (change(data=["a"] * 768), "flat or nested list of FP32 numbers: Expected `float`, got `str`"),
        (change(data=[2.0] * 768), "values from 2 to 2; divide 8-bit images by 255"),
        (change(data=[300] * 768, datatype="UINT8", shape=[1, 16, 16, 3]), "Expected `int` <= 255"),
        (change(shape=[1, 3, 8, 32]), "got FP32 [1, 3, 8, 32]"),
        (change(data=[], shape=[0, 3, 16, 16]), "expected at least one image"),
        (change(parameters={"binary_data_size": 4}), "expected 3072 bytes after the JSON"),
        (infer(FLOATS[:1], outputs=[{"name": "secret"}]), "unknown output 'secret', expected one of: logits"),
        (infer(FLOATS[:1], outputs=[{"name": "logits"}] * 2), "expected each output once, got 'logits' 2 times"),
        (infer(FLOATS[:1], outputs=[{"name": "logits"}] * 9000), "at most 65536 bytes of JSON besides 'data'"),
        (
            infer(FLOATS[:1], outputs=[{"name": "expert_index", "parameters": {"classification": 1}}]),
            "classification needs the output 'logits'",
        ),
        (infer(np.repeat(FLOATS, 3, axis=0)), "expected at most 32 images in a request, got 48"),
    ],
)
def test_a_mistaken_request_is_one_line(session: Session, body: bytes | dict[str, Any], message: str) -> None:
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    response = ask(session, "POST", "/v2/models/small/infer", content=content, settings={"max_batch": 32})
    assert response.status_code == 400
    assert message in response.json()["error"]
    assert "\n" not in response.json()["error"]


def test_a_list_that_is_far_too_long_is_refused_before_it_is_made(session: Session) -> None:
    body = json.dumps(change(data=0)).replace('"data": 0', '"data": [' + "[]," * 10**6 + "[]]").encode()
    tracemalloc.start()
    with pytest.raises(InputError, match="768 for shape"):
        read_request(body, None, session.metadata, 32)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 2 * len(body)  # a million lists take 64 MB, 20 times the body


@pytest.mark.parametrize("length", ["x", "-1", "0", "99999999", "1" * 30])
def test_a_wrong_length_of_the_json_is_one_line(session: Session, length: str) -> None:
    response = ask(
        session, "POST", "/v2/models/small/infer", content=b"{}", headers={"Inference-Header-Content-Length": length}
    )
    assert (response.status_code, response.json()["error"].split(" must be")[0]) == (
        400,
        "inference-header-content-length",
    )


def test_what_is_not_there_is_named(session: Session) -> None:
    for url in ("/v2/models/other", "/v2/models/small/versions/2", "/v2/models/other/ready"):
        response = ask(session, "GET", url)
        assert response.status_code == 404
        assert "this server has 'small', version 1" in response.json()["error"]
    assert ask(session, "GET", "/nothing").json() == {"error": "GET /nothing: Not Found"}
    assert ask(session, "DELETE", "/v2").status_code == 405


def test_a_file_with_a_fixed_batch_size_serves_single_images(small_moe: Callable[..., Any], tmp_path: Path) -> None:
    path = tmp_path / "three.onnx"
    export_model(small_moe(), path, image_size=16, labels=LABELS, images=FLOATS, profile="static", batch_size=3)
    session = Session(path, threads=1)
    answer = ask(session, "POST", "/v2/models/three/infer", json=infer(FLOATS[:1])).json()
    expected = session.run(FLOATS[[0, 0, 0]]).logits[:1]
    np.testing.assert_allclose(np.reshape(answer["outputs"][0]["data"], (1, 10)), expected, rtol=1e-5)
    assert "at most 3 images" in ask(session, "POST", "/v2/models/three/infer", json=infer(FLOATS[:4])).json()["error"]


def test_a_form_is_refused_with_advice(session: Session) -> None:
    response = httpx.Request("POST", "http://server", files={"image": ("cat.png", png())})
    answer = ask(session, "POST", "/classify", content=response.read())
    assert answer.status_code == 400
    assert "got a form; send the file itself: curl --data-binary" in answer.text


def test_a_model_without_experts_is_served_without_pathways(tmp_path: Path) -> None:
    torch.manual_seed(0)
    layers = (nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 10))
    path = tmp_path / "dense.onnx"
    export_model(nn.Sequential(*layers), path, image_size=16, labels=LABELS, images=FLOATS, allow_unrouted=True)
    session = Session(path, threads=1)
    answer = ask(session, "POST", "/classify", content=png()).json()
    assert (answer["label"] in LABELS, answer["pathway"]) == (True, None)
    assert ask(session, "GET", "/load").json()["layers"] == []
    assert "route_drift{" not in ask(session, "GET", "/metrics").text


# --- people, and Prometheus -----------------------------------------------------------------------


def test_an_image_file_is_classified_as_a_session_classifies_it(session: Session, tmp_path: Path) -> None:
    (tmp_path / "photo.png").write_bytes(png())
    expected = session.run(tmp_path / "photo.png")
    answer = ask(session, "POST", "/classify", content=png()).json()
    assert answer["label"] == expected.labels[0] == answer["top"][0]["label"]
    assert expected.pathway is not None
    assert answer["pathway"] == expected.pathway[0].tolist()
    probabilities = [entry["probability"] for entry in answer["top"]]
    assert probabilities == pytest.approx(sorted(expected.probabilities[0], reverse=True)[:5], rel=1e-4)


def test_load_and_drift_are_those_of_the_images_served(session: Session) -> None:
    async def run() -> tuple[dict[str, Any], str, dict[str, Any], str]:
        async with client(session) as (http, _):
            before, idle = (await http.get("/load")).json(), (await http.get("/metrics")).text
            for _ in range(4):
                await http.post("/v2/models/small/infer", json=infer(FLOATS[:1]))
            return before, idle, (await http.get("/load")).json(), (await http.get("/metrics")).text

    before, idle, after, metrics = asyncio.run(run())
    assert (before["images"], after["images"]) == (0, 4)
    assert {(layer["drift"], layer["noise"]) for layer in before["layers"]} == {(None, None)}
    assert "route_drift{" not in idle
    assert before["model"] == "small"
    pathway = session.run(FLOATS[:1]).pathway
    assert pathway is not None
    for layer, expert, recorded in zip(after["layers"], pathway[0], session.metadata.expert_load or (), strict=True):
        assert layer["exported"] == list(recorded)
        assert layer["served"][expert] == 1.0
        # all load is on one expert now, so what it had not before has moved
        assert layer["drift"] == pytest.approx(1 - recorded[expert])
        name = layer["layer"]
        assert f'advmoe_expert_images_total{{expert="{expert}",layer="{name}"}} 4.0' in metrics
        assert f'advmoe_expert_images_total{{expert="{1 - expert}",layer="{name}"}} 0.0' in metrics
        assert f'advmoe_route_drift{{layer="{name}"}} {layer["drift"]}' in metrics
    assert "advmoe_images_total 4.0" in metrics
    assert 'advmoe_requests_total{endpoint="infer",status="200"} 4.0' in metrics
    assert 'advmoe_request_seconds_count{endpoint="infer"} 4.0' in metrics
    assert 'advmoe_batch_images_bucket{le="1.0"} 4.0' in metrics


def test_drift_forgets_images_that_left_the_window(session: Session) -> None:
    other = next(i for i in range(16) if (session.run(FLOATS[i]).pathway != session.run(FLOATS[0]).pathway).any())

    async def run() -> dict[str, Any]:
        async with client(session, drift_window=4) as (http, _):
            for image in (0, 0, 0, other, other, other, other):
                await http.post("/v2/models/small/infer", json=infer(FLOATS[image : image + 1]))
            return dict((await http.get("/load")).json())

    load = asyncio.run(run())
    pathway = session.run(FLOATS[other]).pathway
    assert pathway is not None
    assert load["images"] == 4
    assert all(layer["served"][e] == 1.0 for layer, e in zip(load["layers"], pathway[0], strict=True))


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_the_orientation_that_a_camera_noted_is_ignored_as_in_training(session: Session, kind: str) -> None:
    note = Image.Exif()
    note[0x0112] = 6  # "turn by 90 degrees to the right"
    plain, turned = (
        ask(session, "POST", "/classify", content=saved(kind, **more)).json() for more in ({}, {"exif": note})
    )
    assert plain["top"] == turned["top"]
    assert plain["pathway"] == turned["pathway"]
    assert "image-orientation: none" in ask(session, "GET", "/").text  # the page shows what the model sees


def test_the_page_may_run_its_own_script_and_nothing_else(session: Session) -> None:
    response = ask(session, "GET", "/")
    policy = response.headers["Content-Security-Policy"]
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
    assert policy.count("'sha256-") == 2
    assert "http://" not in response.text.replace("http://www.w3.org/2000/svg", "")  # nothing is loaded from elsewhere
    assert "https://" not in response.text


# --- bounds ---------------------------------------------------------------------------------------


def bomb(width: int, height: int) -> bytes:
    """A PNG of a few kilobytes that unpacks to 3 * width * height bytes of zeros."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    packer = zlib.compressobj(9)
    rows = b"".join(packer.compress(bytes(1 + 3 * width)) for _ in range(min(height, 16))) + packer.flush()
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


@pytest.mark.parametrize(
    ("content", "status", "message"),
    [
        (b"", 400, "expected an image file as the body of the request, got nothing"),
        (
            b"hello",
            400,
            "the upload cannot be decoded as an image (it is in none of the formats); expected one of: JPEG",
        ),
        (png()[:-40], 400, "the upload cannot be decoded as an image"),
        (bytes(2**20 + 1), 413, "the body has 1048577 bytes, at most 1048576 are accepted"),
        (bomb(8000, 8000), 413, "the upload has 8000 x 8000 pixels, at most 40000000 are decoded"),
        (bomb(60000, 60000), 413, "far too many pixels"),
        (bomb(300_000, 1), 413, "an image of 300000 x 1 pixels would be resized to 5400000 x 18, more than 67108864"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EOF\n", 400, "the upload cannot be decoded as an image"),
        *((saved(name), 400, "expected one of: JPEG, PNG, WEBP") for name in ("TIFF", "PPM", "GIF", "BMP")),
    ],
)
def test_an_upload_that_is_no_image_or_too_large_is_one_line(
    session: Session, content: bytes, status: int, message: str
) -> None:
    response = ask(session, "POST", "/classify", content=content, settings={"max_upload_mb": 1.0})
    assert response.status_code == status
    assert message in response.json()["error"]
    assert "\n" not in response.json()["error"]


def test_a_body_of_unknown_length_is_cut_off_at_the_limit(session: Session) -> None:
    sent = 0

    async def chunks() -> AsyncIterator[bytes]:
        nonlocal sent
        for _ in range(1000):
            sent += 2**16
            yield bytes(2**16)

    response = ask(session, "POST", "/classify", content=chunks(), settings={"max_upload_mb": 1.0})
    assert (response.status_code, sent) == (413, 2**20 + 2**16)


class Gate:
    """A model that waits to be let through, and remembers its batches."""

    def __init__(self) -> None:
        self.open = threading.Event()
        self.batches: list[list[int]] = []

    def __call__(self, images: np.ndarray) -> dict[str, np.ndarray]:
        self.batches.append(images.tolist())
        assert self.open.wait(10)
        return {"double": 2 * images}


async def until(condition: Callable[[], bool]) -> None:
    for _ in range(2000):
        if condition():
            return
        await asyncio.sleep(0.001)
    raise AssertionError("it did not happen")


def test_requests_that_wait_for_the_worker_are_joined_up_to_the_largest_batch() -> None:
    async def run() -> tuple[list[list[int]], list[list[int]]]:
        gate = Gate()
        batcher = Batcher(gate, max_batch=4)
        async with batcher.running():
            first = asyncio.create_task(batcher.submit(np.array([0])))
            await until(lambda: gate.batches == [[0]])
            others = [asyncio.create_task(batcher.submit(np.array(part))) for part in ([1, 2], [3], [4, 5], [6])]
            await until(lambda: batcher.waiting == 6)
            gate.open.set()
            results = [result["double"].tolist() for result in await asyncio.gather(first, *others)]
        return gate.batches, results

    batches, results = asyncio.run(run())
    assert batches == [[0], [1, 2, 3], [4, 5, 6]]  # [1, 2, 3, 4, 5] would be more than 4
    assert results == [[0], [2, 4], [6], [8, 10], [12]]


def test_a_lone_request_waits_for_others_if_it_is_told_to() -> None:
    async def run() -> list[list[int]]:
        gate = Gate()
        gate.open.set()
        batcher = Batcher(gate, max_batch=2, max_delay=10)
        async with batcher.running():
            await asyncio.gather(*(batcher.submit(np.array([i])) for i in range(2)))  # full: does not wait 10 s
        return gate.batches

    assert asyncio.run(run()) == [[0, 1]]


def test_a_request_that_was_given_up_is_not_computed() -> None:
    async def run() -> list[list[int]]:
        gate = Gate()
        batcher = Batcher(gate, max_batch=1)
        async with batcher.running():
            first, second, third = (asyncio.create_task(batcher.submit(np.array([i]))) for i in range(3))
            await until(lambda: gate.batches == [[0]] and batcher.waiting == 2)
            second.cancel()
            gate.open.set()
            await asyncio.gather(first, third)
        return gate.batches

    assert asyncio.run(run()) == [[0], [2]]


def test_a_failure_of_the_model_reaches_its_requests_and_leaves_the_worker_alive() -> None:
    def model(images: np.ndarray) -> dict[str, np.ndarray]:
        if images[0] == 13:
            raise RuntimeError("out of memory")
        return {"same": images}

    async def run() -> int:
        batcher = Batcher(model, max_batch=1)
        async with batcher.running():
            with pytest.raises(RuntimeError, match="out of memory"):
                await batcher.submit(np.array([13]))
            return int((await batcher.submit(np.array([7])))["same"][0])

    assert asyncio.run(run()) == 7


def test_a_failure_of_the_counting_reaches_its_requests_and_leaves_the_worker_alive() -> None:
    def observe(images: int, seconds: float, outputs: Mapping[str, np.ndarray]) -> None:
        if outputs["same"][0] == 13:
            raise InputError("not of this model")

    async def run() -> int:
        batcher = Batcher(lambda images: {"same": images}, max_batch=1, observe=observe)
        async with batcher.running():
            with pytest.raises(InputError, match="not of this model"):
                await batcher.submit(np.array([13]))
            return int((await batcher.submit(np.array([7])))["same"][0])

    assert asyncio.run(run()) == 7


def test_images_that_cannot_be_joined_reach_their_requests_and_leave_the_worker_alive() -> None:
    async def run() -> int:
        batcher = Batcher(lambda images: {"same": images}, max_batch=2)
        async with batcher.running():
            parts = np.zeros((1, 2)), np.zeros((1, 3))
            errors = await asyncio.gather(*map(batcher.submit, parts), return_exceptions=True)
            assert [type(error) for error in errors] == [ValueError, ValueError]
            assert batcher.working
            return int((await batcher.submit(np.array([7])))["same"][0])

    assert asyncio.run(run()) == 7


def test_readiness_ends_with_a_worker(session: Session, caplog: pytest.LogCaptureFixture) -> None:
    class Lost(BaseException):
        """An error that no request causes."""

    async def run() -> tuple[int, int]:
        async with client(session, timeout=0.2) as (http, model):

            def observe(*_: Any) -> None:
                raise Lost

            before = await http.get("/v2/health/ready")
            model.batcher._observe = observe
            await http.post("/v2/models/small/infer", json=infer(FLOATS[:1]))
            return before.status_code, (await http.get("/v2/health/ready")).status_code

    assert asyncio.run(run()) == (200, 503)
    assert "a worker of the batches has ended" in caplog.text


def test_images_that_were_given_up_do_not_wait_for_a_worker() -> None:
    async def run() -> list[int]:
        gate = Gate()
        batcher = Batcher(gate, max_batch=1)
        async with batcher.running():
            first, second = (asyncio.create_task(batcher.submit(np.array([i]))) for i in range(2))
            await until(lambda: gate.batches == [[0]] and batcher.waiting == 1)
            second.cancel()
            await asyncio.wait([second])
            waiting = batcher.waiting
            gate.open.set()
            return [waiting, len((await first)["double"])]

    assert asyncio.run(run()) == [0, 1]


def test_admission_is_bounded_and_ends_with_the_stop() -> None:
    batcher = Batcher(Gate(), max_batch=1, max_requests=2)
    with batcher.admit(), batcher.admit():
        with pytest.raises(OverloadedError), batcher.admit():
            pass
        assert batcher.requests == 2
    assert batcher.requests == 0
    batcher.stop()
    with pytest.raises(StoppingError), batcher.admit():
        pass


def test_a_request_that_was_admitted_before_the_stop_is_computed_although_it_submits_later() -> None:
    async def run() -> list[int]:
        gate = Gate()
        batcher = Batcher(gate, max_batch=1)
        async with batcher.running():
            with batcher.admit():  # its body is still being read
                first = asyncio.create_task(batcher.submit(np.array([1])))
                await until(lambda: gate.batches == [[1]])
                batcher.stop()
                gate.open.set()
                await first
                await asyncio.sleep(0)  # the worker looks for its next batch
                assert batcher.working
                async with asyncio.timeout(5):
                    return list((await batcher.submit(np.array([2])))["double"])

    assert asyncio.run(run()) == [4]


def test_overload_is_429_time_outs_are_504_and_health_answers_meanwhile(
    session: Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    release = threading.Event()
    execute = session.execute

    def slow(images: np.ndarray) -> Any:
        assert release.wait(10)
        return execute(images)

    async def run() -> tuple[list[httpx.Response], httpx.Response, httpx.Response]:
        async with client(session, max_queue=2, timeout=0.5) as (http, model):
            monkeypatch.setattr(model.batcher, "_run", slow)
            waiting = [asyncio.create_task(http.post("/classify", content=png())) for _ in range(2)]
            await until(lambda: model.batcher.requests == 2)
            refused = await http.post("/classify", content=png())
            health = await http.get("/v2/health/ready")
            answers = [await task for task in waiting]
            assert model.batcher.requests == 0
            release.set()
            return answers, refused, health

    answers, refused, health = asyncio.run(run())
    assert (refused.status_code, refused.headers["Retry-After"]) == (429, "1")
    assert "2 requests are waiting already" in refused.json()["error"]
    assert health.status_code == 200
    assert [answer.status_code for answer in answers] == [504, 504]
    assert answers[0].json()["error"] == "the model did not answer within 0.5 seconds"


def test_a_request_that_was_given_up_is_counted_until_its_thread_is_free(
    session: Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    release, started = threading.Event(), []
    decode = ModelServer._decode

    def slow(self: ModelServer, body: bytes) -> Any:
        started.append(body)
        assert release.wait(10)
        return decode(self, body)

    monkeypatch.setattr(ModelServer, "_decode", slow)
    monkeypatch.setattr("advmoe_export.serve.app._cores", lambda: 2)

    async def run() -> tuple[list[int], int, int, int]:
        async with client(session, max_queue=3, timeout=0.3) as (http, model):
            answers = await asyncio.gather(*(http.post("/classify", content=png()) for _ in range(3)))
            held, decoded = model.batcher.requests, len(started)
            # of three requests, two are in threads, which cannot be interrupted, and one waited for a thread
            await asyncio.gather(*(http.post("/classify", content=png()) for _ in range(2)))
            release.set()
            await until(lambda: model.batcher.requests == 0)
            fine = await http.post("/classify", content=png())
            return [answer.status_code for answer in answers], held, decoded, fine.status_code

    assert asyncio.run(run()) == ([504] * 3, 2, 2, 200)
    assert len(started) == 3


def test_images_that_take_long_to_decode_do_not_keep_numbers_waiting(
    session: Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    release = threading.Event()
    decode = ModelServer._decode

    def slow(self: ModelServer, body: bytes) -> Any:
        assert release.wait(10)
        return decode(self, body)

    monkeypatch.setattr(ModelServer, "_decode", slow)
    monkeypatch.setattr("advmoe_export.serve.app._cores", lambda: 1)

    async def run() -> tuple[int, list[int]]:
        async with client(session) as (http, model):
            images = [asyncio.create_task(http.post("/classify", content=png())) for _ in range(3)]
            await until(lambda: model.batcher.requests == 3)
            numbers = await http.post("/v2/models/small/infer", json=infer(PIXELS[:1]))
            release.set()
            return numbers.status_code, [(await image).status_code for image in images]

    assert asyncio.run(run()) == (200, [200] * 3)


# --- a real server --------------------------------------------------------------------------------


def test_an_idle_connection_is_closed_when_it_was_idle_as_long_as_allowed(path: Path) -> None:
    assert ServeConfig(model=path).keep_alive > 60  # what proxies wait by default
    with (
        server(path, "--keep-alive", "0.2") as (_, http),
        socket.create_connection((http.base_url.host, http.base_url.port or 0), timeout=20) as connection,
    ):
        connection.sendall(b"GET /v2/health/live HTTP/1.1\r\nHost: test\r\n\r\n")
        while connection.recv(1000):
            pass  # the answer, and then the end, or a time-out


def connect(http: httpx.Client) -> socket.socket:
    return socket.create_connection((http.base_url.host, http.base_url.port or 0), timeout=20)


def receive(connection: socket.socket) -> str:
    """A response whose body is a JSON object."""
    answer = b""
    while not answer.endswith(b"}"):
        part = connection.recv(65536)
        assert part, answer
        answer += part
    return answer.decode()


@pytest.fixture
def slow_body(path: Path) -> Iterator[tuple[Any, httpx.Client, socket.socket]]:
    """A server with a connection that has sent half of its body."""
    with server(path, "--timeout", "5", "--max-queue", "1") as (process, http):
        connection = socket.create_connection((http.base_url.host, http.base_url.port or 0))
        body = png()
        head = f"POST /classify HTTP/1.1\r\nHost: test\r\nContent-Length: {len(body)}\r\n\r\n".encode()
        connection.sendall(head + body[:100])
        while "advmoe_open_requests 1.0" not in http.get("/metrics").text:
            time.sleep(0.01)
        yield process, http, connection
        connection.close()


def test_sigterm_finishes_the_request_under_way_refuses_others_and_ends_with_0(
    slow_body: tuple[Any, httpx.Client, socket.socket],
) -> None:
    process, http, connection = slow_body
    assert http.post("/classify", content=png()).status_code == 429
    process.send_signal(signal.SIGTERM)
    connection.sendall(png()[100:])
    answer = receive(connection)
    assert answer.startswith("HTTP/1.1 200")
    assert '"label":"class ' in answer
    assert process.wait(20) == 0
    with pytest.raises(httpx.HTTPError):
        http.get("/v2/health/live")


def test_the_images_of_a_client_that_has_gone_are_not_computed(path: Path, tmp_path: Path) -> None:
    gate, busy = tmp_path / "open", tmp_path / "busy"
    gate.touch()
    gated = (
        "import time\nfrom pathlib import Path\nfrom advmoe_export import Session\nexecute = Session.execute\n"
        f"def wait(self, images):\n    Path({str(busy)!r}).touch()\n"
        f"    while not Path({str(gate)!r}).exists():\n        time.sleep(0.01)\n"
        "    return execute(self, images)\nSession.execute = wait"
    )
    body = png()
    request = b"POST /classify HTTP/1.1\r\nHost: test\r\nContent-Length: %d\r\n\r\n" % len(body) + body
    with server(path, before=gated) as (_, http), connect(http) as first:

        def wait_for(*lines: str) -> None:
            for _ in range(500):
                text = http.get("/metrics").text
                if all(f"{line}\n" in text for line in lines):
                    return
                time.sleep(0.01)
            raise AssertionError(text)

        gate.unlink()
        busy.unlink()
        first.sendall(request)
        while not busy.exists():
            time.sleep(0.01)
        with connect(http) as second:
            second.sendall(request)
            wait_for("advmoe_open_requests 2.0", "advmoe_waiting_images 1.0")
        wait_for("advmoe_open_requests 1.0", "advmoe_waiting_images 0.0")
        gate.touch()
        assert receive(first).startswith("HTTP/1.1 200")
        with connect(http) as third:
            third.sendall(request)
            assert receive(third).startswith("HTTP/1.1 200")
        assert "advmoe_images_total 2.0\n" in http.get("/metrics").text


def test_a_body_that_never_comes_is_given_up(path: Path) -> None:
    with server(path, "--timeout", "0.3") as (_, http):
        connection = socket.create_connection((http.base_url.host, http.base_url.port or 0))
        connection.sendall(b"POST /classify HTTP/1.1\r\nHost: test\r\nContent-Length: 1000\r\n\r\nhalf")
        answer = receive(connection)
        connection.close()
        assert answer.startswith("HTTP/1.1 408")
        assert "the body did not arrive within 0.3 seconds" in answer
        assert http.post("/classify", content=png()).status_code == 200


@pytest.mark.parametrize("grace", ["0", "0.1"])
def test_the_process_ends_although_a_thread_does_not(path: Path, grace: str) -> None:
    hanging = (
        "import time\nfrom advmoe_export.serve.app import ModelServer\nModelServer._decode = lambda *_: time.sleep(100)"
    )
    with server(path, "--grace", grace, before=hanging) as (process, http), connect(http) as connection:
        connection.sendall(b"POST /classify HTTP/1.1\r\nHost: test\r\nContent-Length: 1\r\n\r\nx")
        while "advmoe_open_requests 1.0" not in http.get("/metrics").text:
            time.sleep(0.01)
        process.send_signal(signal.SIGTERM)
        answer = receive(connection)
        assert answer.startswith("HTTP/1.1 503")
        assert "the server is stopping" in answer
        assert process.wait(20) == 0


def test_a_head_is_refused_as_soon_as_it_is_too_long(path: Path) -> None:
    with server(path) as (_, http):
        for start in (b"GET /", b"GET / HTTP/1.1\r\nHost: test\r\na: ", b"GET / HTTP/1.1\r\n" + b"a: b\r\n" * 12_000):
            with connect(http) as connection:
                connection.sendall(start.ljust(2**16, b"x") + b"x")
                assert receive(connection).startswith("HTTP/1.1 431"), start[:20]
        fine = {f"name-{i}": "x" * 1000 for i in range(60)}
        assert http.post("/classify", content=bytes(2**20), headers=fine).status_code == 400
        with connect(http) as connection:  # an endless trailer belongs to no body
            connection.sendall(b"POST /classify HTTP/1.1\r\nHost: test\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n")
            with contextlib.suppress(ConnectionError):
                for _ in range(1000):
                    connection.sendall(b"a: b\r\n" * 2**14)
                raise AssertionError("65 MB of trailers were taken")


def test_a_body_in_many_small_chunks_is_read(path: Path) -> None:
    content = b"".join(b"1\r\n%c\r\n" % byte for byte in png()) + b"0\r\na: b\r\n\r\n"
    head = b"POST /classify HTTP/1.1\r\nHost: test\r\nTransfer-Encoding: chunked\r\n\r\n"
    with server(path) as (_, http), connect(http) as connection:
        connection.sendall(2 * (head + content))
        for _ in range(2):
            assert receive(connection).startswith("HTTP/1.1 200")


def test_an_offer_to_upgrade_is_ignored_and_the_body_is_read(path: Path) -> None:
    # JDK's HttpClient offers HTTP/2 with each request
    lines = b"Connection: Upgrade, HTTP2-Settings\r\nuPgrade: h2c\r\nHTTP2-Settings: AAEAAEAAAAIAAAAB\r\n"
    # a chunk of a PNG is followed by what may be an offer, but is a part of the body
    upload = png() + b"\nUpgrade: h2c\r\nup"
    length = f"Content-Length: {len(upload)}\r\n\r\n".encode()
    request = b"POST /classify HTTP/1.1\r\nHost: test\r\n" + lines + length + upload
    with server(path) as (_, http):
        offer = request.index(b"uPgrade")
        for cut in (0, offer - 1, offer, offer + 1, offer + 7, offer + 8, len(request) - 1):
            with connect(http) as connection:
                connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                connection.sendall(request[:cut])
                time.sleep(0.02)
                connection.sendall(request[cut:])
                assert receive(connection).startswith("HTTP/1.1 200"), cut
        with connect(http) as connection:
            connection.sendall(2 * request)
            for _ in range(2):
                assert receive(connection).startswith("HTTP/1.1 200")
        with connect(http) as connection:
            connection.sendall(b"GET /v2/health/live HTTP/1.1\r\n" + lines + b"Host: test\r\n\r\n")
            assert receive(connection).startswith("HTTP/1.1 200")


@pytest.mark.parametrize("size", [1, 2, 3, 7, 100, 10_000])
def test_a_body_that_looks_like_an_offer_to_upgrade_is_not_changed(size: int) -> None:
    body = b"\nUpgrade: h2c\r\n\r\nupgrade:\nup"
    head = b"POST / HTTP/1.1\r\nupgrade: h2c\r\nUp: 1\r\nUpgrade-Insecure-Requests: 1\r\nConnection: upgrade\r\n"
    chunked = b"%x\r\n%s\r\n0\r\n\r\n" % (len(body), body)
    stream = head + b"Content-Length: %d\r\n\r\n" % len(body) + body
    stream += head + b"Transfer-Encoding: chunked\r\n\r\n" + chunked
    bodies, headers = [], []

    async def application(scope: Any, receive: Any, send: Any) -> None:
        got, more = b"", True
        while more:
            message = await receive()
            got, more = got + message["body"], message["more_body"]
        headers.append([name for name, _ in scope["headers"]])
        bodies.append(got)
        await send({"type": "http.response.start", "status": 204, "headers": []})
        await send({"type": "http.response.body"})

    async def run() -> None:
        config = uvicorn.Config(app=application, ws="none", lifespan="off")
        limits = Limits(connections=1, seconds=10)
        connection = Connection(config=config, server_state=ServerState(), app_state={}, limits=limits)
        transport = MagicMock()
        transport.get_extra_info.return_value = None
        transport.is_closing.return_value = False
        connection.connection_made(transport)
        for begin in range(0, len(stream), size):
            connection.data_received(stream[begin : begin + size])
        await until(lambda: len(bodies) == 2)
        connection.connection_lost(None)

    asyncio.run(run())
    assert bodies == [body, body]
    for names in headers:
        assert names[:4] == [b"x-upgrade", b"up", b"upgrade-insecure-requests", b"connection"]


@pytest.mark.parametrize("start", [b"", b"GET / HTTP/1.1\r\na: ", b"\r\n"])
@pytest.mark.parametrize("before", [b"", b"GET /v2 HTTP/1.1\r\nHost: test\r\n\r\n"])
def test_a_connection_without_a_request_is_closed(path: Path, start: bytes, before: bytes) -> None:
    with server(path, "--timeout", "0.5", "--keep-alive", "0.5") as (_, http), connect(http) as connection:
        if before:
            connection.sendall(before)
            receive(connection)
        connection.settimeout(0.1)
        connection.sendall(start)
        for _ in range(200):
            try:
                connection.sendall(start[-1:])
                if not connection.recv(1000):
                    break
            except TimeoutError:
                continue
            except ConnectionError:
                break
        else:
            raise AssertionError("it is open after 20 s")


def test_an_answered_request_whose_body_trickles_is_closed_and_one_whose_body_ended_is_not(path: Path) -> None:
    with server(path, "--timeout", "1", "--max-queue", "1") as (_, http), connect(http) as first:
        first.sendall(b"POST /classify HTTP/1.1\r\nHost: test\r\nContent-Length: 9\r\n\r\n")
        while "advmoe_open_requests 1.0" not in http.get("/metrics").text:
            time.sleep(0.01)
        with connect(http) as ended, connect(http) as trickling:
            for connection in (ended, trickling):
                connection.sendall(b"POST /classify HTTP/1.1\r\nHost: test\r\nContent-Length: 9\r\n\r\n")
                assert receive(connection).startswith("HTTP/1.1 429")
            ended.sendall(b"123456789")
            trickling.sendall(b"1")
            assert trickling.recv(1000) == b""
            ended.sendall(b"GET /v2/health/live HTTP/1.1\r\nHost: test\r\n\r\n")
            assert receive(ended).startswith("HTTP/1.1 200")


def test_a_connection_whose_answers_are_not_read_is_closed() -> None:
    async def aborted(read: bool) -> bool:
        config = uvicorn.Config(app=lambda: None, ws="none", timeout_keep_alive=0)
        limits = Limits(connections=1, seconds=10)
        connection = Connection(config=config, server_state=ServerState(), app_state={}, limits=limits)
        transport = MagicMock()
        transport.get_extra_info.return_value = None
        transport.get_write_buffer_size.return_value = 10**5
        connection.connection_made(transport)
        connection.pause_writing()
        if read:
            connection.resume_writing()
        await asyncio.sleep(0.02)
        connection.connection_lost(None)
        return bool(transport.abort.called)

    assert asyncio.run(aborted(read=False))
    assert not asyncio.run(aborted(read=True))


@pytest.mark.parametrize("ended", [False, True])
def test_a_slow_reader_keeps_its_connection_as_long_as_it_reads(ended: bool) -> None:
    async def run() -> list[int]:
        config = uvicorn.Config(app=lambda: None, ws="none", timeout_keep_alive=0)
        limits = Limits(connections=1, seconds=10)
        connection = Connection(config=config, server_state=ServerState(), app_state={}, limits=limits)
        transport = MagicMock()
        transport.get_extra_info.return_value = None
        transport.is_closing.return_value = False
        # bytes that are not sent yet: at the begin, and at each look
        sizes = [9, 7, 4, 4, 3]
        transport.get_write_buffer_size.side_effect = lambda: sizes.pop(0)
        connection.connection_made(transport)
        if ended:
            connection.on_response_complete()
        else:
            connection.pause_writing()
        await until(lambda: transport.abort.called)
        connection.connection_lost(None)
        return sizes

    assert asyncio.run(run()) == [3]  # the look that finds 4 bytes for the second time ends it


def test_a_client_that_does_not_wait_for_answers_loses_its_connection(path: Path) -> None:
    request = b"GET /v2/health/live HTTP/1.1\r\nHost: test\r\n\r\n"
    with server(path) as (_, http):
        for count, answers in ((10, 10), (16, 16), (17, 0), (1000, 0)):
            with connect(http) as connection:
                connection.sendall(count * request)
                got = b""
                with contextlib.suppress(ConnectionError):
                    while got.count(b"HTTP/1.1 200") < count and (part := connection.recv(65536)):
                        got += part
                assert got.count(b"HTTP/1.1 200") == answers


def test_connections_beyond_the_limit_are_refused_and_logged_once(path: Path) -> None:
    with server(path, "--max-connections", "3") as (process, http):
        with contextlib.ExitStack() as stack:
            for _ in range(3):
                stack.enter_context(connect(http))
            for _ in range(2):
                answer = receive(stack.enter_context(connect(http)))
                assert answer.startswith("HTTP/1.1 503")
                assert "3 connections are open already" in answer
        for _ in range(200):
            with contextlib.suppress(httpx.HTTPError):
                if http.get("/v2/health/live").status_code == 200:
                    break
            time.sleep(0.01)
        process.terminate()
        assert process.wait(20) == 0
        assert process.stderr is not None
        assert process.stderr.read().splitlines() == ["3 connections are open; more are refused"]


def test_a_model_that_fails_at_the_largest_batch_is_one_line(
    path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(self: Session, images: np.ndarray) -> Any:
        if len(images) == 64:
            raise MemoryError("Unable to allocate 3 GiB")

    monkeypatch.setattr(Session, "run_raw", run)
    assert main(["serve", str(path), "--port", "0"]) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: the model fails for 64 images at a time (Unable to allocate 3 GiB); choose a")


def test_an_address_of_ipv6_has_brackets(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    if not socket.has_ipv6:
        pytest.skip("this Python has no IPv6")
    with socket.socket(socket.AF_INET6) as taken:
        try:
            taken.bind(("::1", 0))
        except OSError:
            pytest.skip("this machine has no IPv6")
        taken.listen()
        port = taken.getsockname()[1]
        assert main(["serve", str(path), "--host", "::1", "--port", str(port)]) == 1
        assert f"cannot listen on [::1]:{port}: " in capsys.readouterr().err
    with server(path, "--host", "::1") as (_, http):
        assert http.get("/v2/health/live").status_code == 200


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--max-batch", "1000000"], "max_batch must be 1 to 4096, got 1000000"),
        (["--max-connections", "0"], "max_connections must be at least 1, got 0"),
        (["--port", "x"], "argument --port: invalid int value: 'x'"),
        (["--prot", "80"], "unrecognized arguments: --prot 80; did you mean '--port'?; see 'advmoe serve --help'"),
        (["--quick=1"], "unrecognized arguments: --quick=1; see 'advmoe serve --help'"),
        (["--workers", "0"], "workers must be at least 1, got 0"),
        (["--timeout", "nan"], "timeout must be above 0, got nan"),
        (["--keep-alive", "0"], "keep_alive must be above 0, got 0"),
        (["--max-delay-ms", "inf"], "max_delay_ms must be at least 0, got inf"),
        (["--port", "70000"], "port must be 0 to 65535, got 70000"),
        (["--name", "a/b"], "name must not contain '/', got 'a/b'"),
    ],
)
def test_a_mistaken_option_is_one_line(options: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(InputError, match="^" + re.escape(message)):
        parse(["model.onnx", *options], "advmoe serve")
    assert main(["serve", "model.onnx", *options]) == 1
    assert capsys.readouterr().err.startswith(f"error: {message}")


def test_answers_are_not_held_back_by_nagles_algorithm() -> None:
    with _listen("127.0.0.1", 0) as listener:
        assert listener.proto == socket.IPPROTO_TCP  # asyncio sets TCP_NODELAY on the connections of such sockets only


def test_of_two_servers_that_start_at_once_on_a_port_the_second_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as other:
        other.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        other.bind(("127.0.0.1", 0))
        bind = socket.socket.bind

        def bind_as_other_listens(self: socket.socket, address: Any) -> None:
            bind(self, address)
            other.listen()

        monkeypatch.setattr(socket.socket, "bind", bind_as_other_listens)
        port = other.getsockname()[1]
        with pytest.raises(AddressError, match=f"cannot listen on 127.0.0.1:{port}: Address already in use"):
            _listen("127.0.0.1", port)


def test_an_address_in_use_and_a_missing_file_are_one_line(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert main(["serve", str(path), "--port", str(port)]) == 1
        assert f"cannot listen on 127.0.0.1:{port}: Address already in use" in capsys.readouterr().err
    assert main(["serve", "missing.onnx"]) == 1
    assert "no model file 'missing.onnx'" in capsys.readouterr().err


def test_every_setting_is_an_option_with_its_default(capsys: pytest.CaptureFixture[str]) -> None:
    assert parse(["m.onnx"], "x") == ServeConfig(model=Path("m.onnx"))
    assert parse(["m.onnx", "--provider", "cuda", "--provider", "cpu"], "x").provider == ("cuda", "cpu")
    with pytest.raises(SystemExit):
        parse(["--help"], "x")
    text = capsys.readouterr().out
    for field in ServeConfig.__dataclass_fields__:
        assert field == "model" or f"--{field.replace('_', '-')}" in text
    words = " ".join(text.split())
    assert "--timeout SECONDS" in words
    assert "Most images in one request and in one batch. 1 to 4096. Default: 64." in words
    assert "refused with 413. Above 0. Default: 16." in words


def test_without_its_packages_the_server_says_which_extra_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    from advmoe_export.serve.command import run

    monkeypatch.setitem(sys.modules, "uvicorn", None)
    monkeypatch.delitem(sys.modules, "advmoe_export.serve.server", raising=False)
    with pytest.raises(ExportError, match=r"needs the package 'uvicorn', .*advmoe-export\[cpu,serve\]"):
        run(["model.onnx"], program="advmoe-serve")


def test_infer_is_refused_too_when_too_many_wait(session: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    release = threading.Event()
    execute = session.execute

    def slow(images: np.ndarray) -> Any:
        assert release.wait(100)
        return execute(images)

    async def scenario() -> tuple[int, int, int]:
        async with client(session, max_queue=1, timeout=100.0) as (http, model):
            monkeypatch.setattr(model.batcher, "_run", slow)
            url = "/v2/models/small/infer"
            waiting = asyncio.create_task(http.post(url, json=infer(FLOATS[:1])))
            await asyncio.sleep(1)
            await until(lambda: model.batcher.waiting == 0)
            refused = asyncio.create_task(http.post(url, json=infer(FLOATS[:1])))
            await asyncio.wait([refused], timeout=30)
            release.set()
            model.batcher.stop()
            stopped = await http.post(url, json=infer(FLOATS[:1]))
            return (await waiting).status_code, (await refused).status_code, stopped.status_code

    assert asyncio.run(scenario()) == (200, 429, 503)


def test_the_noise_of_a_drift_is_the_expected_distance_of_a_share(session: Session) -> None:
    even = tuple((0.5, 0.5) for _ in session.metadata.layers)
    # 16 images at p = 1/2: E|x - p| = sqrt(2 / pi * 1/4 * 1/16) for each of two experts, of which half is the distance.
    # If p is measured on 48 images: E|x - y| = sqrt(2 / pi * 1/4 * (1/16 + 1/48)). Earlier files do not tell.
    for images, noise in ((None, math.sqrt(2 / math.pi / 64)), (48, math.sqrt(2 / math.pi / 48))):
        metadata = dataclasses.replace(session.metadata, expert_load=even, expert_load_images=images)
        monitor = RouteMonitor(metadata)
        assert monitor.drift() == []
        monitor.record(session.run(FLOATS))
        assert [drift.noise for drift in monitor.drift()] == pytest.approx([noise] * len(even))


def test_settings_of_a_server_reach_what_they_set(
    session: Session, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = ServeConfig(model=path, max_delay_ms=50.0, workers=3, threads=2)
    batcher = ModelServer(session, config).batcher
    assert (batcher._max_delay, batcher._workers) == (0.05, 3)
    asked: list[Any] = []

    def stop(*_: Any, **options: Any) -> None:
        asked.append(options)
        raise KeyboardInterrupt

    monkeypatch.setattr(serve_module, "Session", stop)
    with pytest.raises(KeyboardInterrupt):
        serve_module.serve(config)
    assert asked == [{"providers": ("cpu",), "threads": 2}]
