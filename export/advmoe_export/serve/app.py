"""The URLs of the server: the Open Inference Protocol, Prometheus metrics, and a page for browsers."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import io
import logging
import os
import re
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from importlib.metadata import version
from importlib.resources import files
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import HTMLResponse, JSONResponse, Response
from starlette.routing import Route

from advmoe_export.errors import ExportError, InputError, TooManyPixelsError
from advmoe_export.monitor import RouteMonitor
from advmoe_export.preparation import SAFE_FORMATS, prepare, read_image
from advmoe_export.serve import protocol
from advmoe_export.serve.batching import Batcher, Outputs, OverloadedError, StoppingError
from advmoe_export.serve.config import ServeConfig
from advmoe_export.serve.metrics import Metrics
from advmoe_export.session import Session

logger = logging.getLogger("advmoe_export.serve")
TOP = 5
"""Number of classes in the answers of the page and of /classify."""
FORM_HEAD = 1000
"""Bytes of a body in which a form, such as that of curl -F, says that it is one."""
RETRY = {"Retry-After": "1"}
Handler = Callable[[Request], Awaitable[Response]]
Result = TypeVar("Result")


class RefusedError(Exception):
    """A request that is answered by an error."""

    def __init__(self, status: int, message: str, headers: Mapping[str, str] | None = None) -> None:
        super().__init__(message)
        self.status, self.headers = status, headers


class ModelServer:
    """One model behind the URLs of `app`."""

    def __init__(self, session: Session, config: ServeConfig) -> None:
        self.session, self.config = session, config
        self.metadata = session.metadata
        self.metrics = Metrics(self.metadata)
        recorded = bool(self.metadata.expert_load) and "expert_index" in self.metadata.outputs
        self.monitor = RouteMonitor(self.metadata, window=config.drift_window) if recorded else None
        self.batcher = Batcher(
            session.execute,
            max_batch=min(config.max_batch, self.metadata.batch_size or config.max_batch),
            max_delay=config.max_delay_ms / 1000,
            max_requests=config.max_queue,
            workers=config.workers,
            observe=self._observe,
        )
        # Pools of their own, so that images that take long to decode do not keep numbers waiting.
        self._decoding = ThreadPoolExecutor(_cores(), thread_name_prefix="image")
        self._translating = ThreadPoolExecutor(_cores(), thread_name_prefix="request")
        self.ready = False
        self._page = files("advmoe_export.serve").joinpath("page.html").read_text("utf-8")

    def _observe(self, images: int, seconds: float, outputs: Outputs) -> None:
        self.metrics.batch(images, seconds, outputs)
        if self.monitor is not None:
            with np.errstate(invalid="ignore"):  # the probabilities, which are not recorded, may be NaN
                self.monitor.record(self.session.interpret(dict(outputs)))

    def app(self) -> Starlette:
        """The application."""
        model = "/v2/models/{name}"
        routes: list[tuple[str, str, str, Handler]] = [
            ("GET", "/", "page", self.page),
            ("POST", "/classify", "classify", self.classify),
            ("GET", "/load", "load", self.load),
            ("GET", "/metrics", "metrics", self.prometheus),
            ("GET", "/v2", "server_metadata", self.server_metadata),
            ("GET", "/v2/health/live", "live", self.live),
            ("GET", "/v2/health/ready", "is_ready", self.is_ready),
        ]
        for prefix in (model, f"{model}/versions/{{version}}"):
            routes += [
                ("GET", prefix, "model_metadata", self.model_metadata),
                ("GET", f"{prefix}/ready", "model_ready", self.is_ready),
                ("POST", f"{prefix}/infer", "infer", self.infer),
            ]
        return Starlette(
            routes=[
                Route(path, self._guarded(name, handler), methods=[method]) for method, path, name, handler in routes
            ],
            exception_handlers={HTTPException: _http_error},
            lifespan=self._lifespan,
        )

    @asynccontextmanager
    async def _lifespan(self, app: Starlette) -> AsyncIterator[None]:
        with self._decoding, self._translating:
            async with self.batcher.running():
                self.ready = True
                yield
                self.ready = False

    def warm_up(self) -> None:
        """Run the smallest and the largest batch, so that no request waits for the first allocations.

        Raises:
            InputError: the model fails, for example because the memory is too small.
        """
        height, width = self.metadata.image_size
        sizes = {1, self.batcher.max_batch} if self.metadata.batch_size is None else {self.metadata.batch_size}
        for size in sorted(sizes):
            try:
                self.session.run_raw(np.zeros((size, height, width, 3), np.uint8))
            except Exception as error:  # onnxruntime raises many types
                reason = " ".join(str(error).split())
                raise InputError(
                    f"the model fails for {size} images at a time ({reason}); choose a smaller max_batch "
                    f"than {self.batcher.max_batch} if the memory is too small"
                ) from error

    # --- handlers ---------------------------------------------------------------------------------

    async def page(self, request: Request) -> Response:
        """The page for browsers."""
        return HTMLResponse(self._page, headers=_page_headers(self._page))

    async def load(self, request: Request) -> Response:
        """The model, and the load of its experts at export and now, by layer in the order of the network."""
        meta = self.metadata
        drifts = {} if self.monitor is None else {drift.layer: drift for drift in self.monitor.drift()}
        recorded = meta.expert_load or [None] * len(meta.layers)
        return JSONResponse(
            {
                "model": self.config.model_name,
                "described": {key: meta.model[key] for key in ("arch", "kind", "dataset") if key in meta.model},
                "labels": list(meta.labels),
                "images": 0 if self.monitor is None else self.monitor.compared,
                "layers": [
                    {
                        "layer": layer,
                        "experts": experts,
                        "exported": None if share is None else list(share),
                        "served": list(drifts[layer].served) if layer in drifts else None,
                        "drift": drifts[layer].distance if layer in drifts else None,
                        "noise": drifts[layer].noise if layer in drifts else None,
                    }
                    for layer, experts, share in zip(meta.layers, meta.num_experts, recorded, strict=True)
                ],
            }
        )

    async def classify(self, request: Request) -> Response:
        """Classify the image file in the body. The answer is JSON for people and scripts."""
        begin = time.perf_counter()
        with self.batcher.admit():
            body = await self._body(request)
            pixels = await self._in_thread(self._decoding, self._decode, body)
            outputs = await self._compute(request, pixels)
        protocol.check_finite(protocol.LOGITS, outputs[protocol.LOGITS])
        prediction = self.session.interpret(dict(outputs))
        best, probabilities = prediction.best(0, TOP), prediction.probabilities[0]
        return JSONResponse(
            {
                "label": prediction.labels[0],
                "top": [{"label": self.metadata.labels[i], "probability": float(probabilities[i])} for i in best],
                "pathway": None if prediction.pathway is None else prediction.pathway[0].tolist(),
                "margin": None if prediction.margin is None else prediction.margin[0].tolist(),
                "milliseconds": round(1000 * (time.perf_counter() - begin), 2),
            }
        )

    async def infer(self, request: Request) -> Response:
        """Run the model, by the Open Inference Protocol."""
        self._known(request)
        with self.batcher.admit():
            body = await self._body(request)
            header = request.headers.get(protocol.HEADER)
            infer, images = await self._in_thread(self._translating, self._parse, body, header)
            outputs = await self._compute(request, images)
            content, json_length = await self._in_thread(self._translating, self._write, infer, outputs)
        if json_length is None:
            return Response(content, media_type="application/json")
        headers = {protocol.HEADER: str(json_length)}
        return Response(content, media_type="application/octet-stream", headers=headers)

    async def server_metadata(self, request: Request) -> Response:
        """Name, version and extensions of the server."""
        return JSONResponse(protocol.server_metadata(version("advmoe-export")))

    async def model_metadata(self, request: Request) -> Response:
        """Inputs and outputs of the model."""
        self._known(request)
        return JSONResponse(protocol.model_metadata(self.metadata, self.config.model_name))

    async def live(self, request: Request) -> Response:
        """Whether the process answers."""
        return JSONResponse({"live": True})

    async def is_ready(self, request: Request) -> Response:
        """Whether the server accepts requests and computes them."""
        if "name" in request.path_params:
            self._known(request)
        ready = self.ready and self.batcher.working and not self.batcher.stopping
        return JSONResponse({"ready": ready}, status_code=200 if ready else 503)

    async def prometheus(self, request: Request) -> Response:
        """Metrics for Prometheus."""
        self.metrics.waiting.set(self.batcher.waiting)
        self.metrics.requests.set(self.batcher.requests)
        drifts = [] if self.monitor is None else self.monitor.drift()
        return Response(self.metrics.text(drifts), media_type="text/plain; version=0.0.4; charset=utf-8")

    # --- what handlers share ----------------------------------------------------------------------

    def _guarded(self, name: str, handler: Handler) -> Handler:
        """Add a time-out and metrics to a handler, and convert its errors to responses of one line."""

        async def guarded(request: Request) -> Response:
            begin = time.perf_counter()
            response = await self._answer(request, handler)
            self.metrics.request(name, response.status_code, time.perf_counter() - begin)
            return response

        return guarded

    async def _answer(self, request: Request, handler: Handler) -> Response:
        try:
            async with asyncio.timeout(self.config.timeout):
                return await handler(request)
        except TimeoutError:
            reading = not getattr(request.state, "body_read", request.method == "GET")
            what = "the body did not arrive" if reading else "the model did not answer"
            return _error(408 if reading else 504, f"{what} within {self.config.timeout:g} seconds", close=reading)
        except asyncio.CancelledError:  # the time to stop is over
            if not self.batcher.stopping:
                raise
            return _error(503, "the server is stopping", RETRY, close=True)
        except ClientDisconnect:
            return _error(400, "the client went away")
        except OverloadedError:
            return _error(429, f"{self.config.max_queue} requests are waiting already; try again later", RETRY)
        except StoppingError:
            return _error(503, "the server is stopping", RETRY, close=True)
        except RefusedError as refusal:
            return _error(refusal.status, str(refusal), refusal.headers, close=refusal.status == 413)
        except TooManyPixelsError as error:
            return _error(413, str(error))
        except InputError as error:
            return _error(400, str(error))
        except HTTPException:
            raise
        except Exception as error:
            logger.exception("the model failed")
            reason = " ".join(str(error).split()) if isinstance(error, ExportError) else type(error).__name__
            return _error(500, f"the model failed ({reason}); the server's log says more")

    def _known(self, request: Request) -> None:
        """Refuse names and versions that are not served."""
        name, number = request.path_params["name"], request.path_params.get("version", protocol.VERSION)
        if (name, number) != (self.config.model_name, protocol.VERSION):
            raise RefusedError(
                404,
                f"no model '{name[:100]}' of version {number[:20]}; "
                f"this server has '{self.config.model_name}', version {protocol.VERSION}",
            )

    async def _body(self, request: Request) -> bytes:
        """The body. It is refused as soon as its size exceeds the limit."""
        limit = self.config.max_body
        given = request.headers.get("content-length", "0")
        if given.isdecimal() and int(given) > limit:
            raise RefusedError(413, f"the body has {int(given)} bytes, at most {limit} are accepted")
        body = bytearray()
        async for chunk in request.stream():
            body += chunk
            if len(body) > limit:
                raise RefusedError(413, f"the body has more than {limit} bytes, the most that are accepted")
        request.state.body_read = True
        return bytes(body)

    async def _compute(self, request: Request, images: npt.NDArray[Any]) -> Outputs:
        """All outputs for the images of a request whose body was read.

        Raises:
            ClientDisconnect: the client went away. Images that still waited are not computed.
        """
        computed = asyncio.create_task(self.batcher.submit(images))
        gone = asyncio.create_task(_disconnected(request))
        try:
            await asyncio.wait((computed, gone), return_when=asyncio.FIRST_COMPLETED)
            if not computed.done():
                raise ClientDisconnect
            return computed.result()
        finally:
            computed.cancel()
            gone.cancel()

    async def _in_thread(self, pool: ThreadPoolExecutor, work: Callable[..., Result], *arguments: Any) -> Result:
        """Do work of an admitted request in one of a pool's few threads.

        A thread cannot be interrupted. If the request is given up meanwhile, it stays admitted
        until the work ends, so that the number of admitted requests bounds threads and memory.
        """
        doing = pool.submit(work, *arguments)
        try:
            return await asyncio.wrap_future(doing)
        except asyncio.CancelledError:
            if not doing.cancel():
                self.batcher.hold(doing)
            raise

    def _decode(self, body: bytes) -> npt.NDArray[Any]:
        """An uploaded image as a batch of one, in the input format of the model."""
        if not body:
            raise InputError("expected an image file as the body of the request, got nothing")
        if body.startswith(b"--") and b"form-data" in body[:FORM_HEAD]:
            raise InputError("expected an image file as the body, got a form; send the file itself: curl --data-binary")
        picture = read_image(io.BytesIO(body), max_pixels=self.config.max_pixels, formats=SAFE_FORMATS)
        return self.session.check(prepare(picture, self.metadata)[None], any_size=True)

    def _parse(self, body: bytes, json_length: str | None) -> tuple[protocol.InferRequest, npt.NDArray[Any]]:
        if json_length is not None and not re.fullmatch(r"\d{1,12}", json_length):
            raise InputError(f"{protocol.HEADER} must be a number, got '{json_length[:100]}'")
        length = None if json_length is None else int(json_length)
        request = protocol.read_request(body, length, self.metadata, self.batcher.max_batch)
        return request, self.session.check(request.images, any_size=True)

    def _write(self, request: protocol.InferRequest, outputs: Outputs) -> tuple[bytes, int | None]:
        return protocol.write_response(request, outputs, model=self.config.model_name, labels=self.metadata.labels)


async def _disconnected(request: Request) -> None:
    """Return when the client has gone."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _cores() -> int:
    """Number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _error(status: int, message: str, headers: Mapping[str, str] | None = None, *, close: bool = False) -> Response:
    """An error in the format of the protocol. `close` ends a connection whose body was not read."""
    connection = {"Connection": "close"} if close else {}
    return JSONResponse({"error": message}, status_code=status, headers={**(headers or {}), **connection})


async def _http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    return _error(error.status_code, f"{request.method} {request.url.path[:200]}: {error.detail}", error.headers)


def _page_headers(page: str) -> dict[str, str]:
    """Headers that allow the page to use its own script and style only."""
    sources = {}
    for tag in ("script", "style"):
        contents = re.findall(rf"<{tag}>(.*?)</{tag}>", page, re.DOTALL)
        hashes = (base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() for text in contents)
        sources[tag] = " ".join(f"'sha256-{value}'" for value in hashes)
    policy = (
        f"default-src 'none'; script-src {sources['script']}; style-src {sources['style']}; "
        "img-src blob: data:; connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
    return {
        "Content-Security-Policy": policy,
        "X-Content-Type-Options": "nosniff",
        "Referrer-Policy": "no-referrer",
        "Cache-Control": "no-cache",
    }
