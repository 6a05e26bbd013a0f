"""Run the application on uvicorn until SIGTERM or Ctrl-C, then finish the running requests."""

from __future__ import annotations

import functools
import logging
import os
import signal
import socket
import sys
import threading
from collections.abc import Callable
from types import FrameType

import uvicorn

from advmoe_export.errors import ProviderError
from advmoe_export.serve.app import ModelServer
from advmoe_export.serve.config import ServeConfig
from advmoe_export.serve.connection import Connection, Limits
from advmoe_export.session import Session

logger = logging.getLogger("advmoe_export.serve")
MARGIN = 1.0
"""Seconds after `grace` in which the process ends."""


class AddressError(ProviderError):
    """The server cannot listen on the address."""


def serve(config: ServeConfig, *, announce: Callable[[str], None] = lambda line: None) -> None:
    """Serve a model. Returns after SIGTERM or SIGINT, when the running requests are answered.

    The process is ended if work in a thread is not over a second after `config.grace`. A thread
    cannot be interrupted, and Python waits for it.

    Args:
        config: settings of the server.
        announce: called once with a line of text when the server listens.

    Raises:
        ModelFileError: the model file is missing, is damaged, or was not written by this package.
        ProviderError: no provider starts.
        InputError: the model fails for batches of `max_batch`.
        AddressError: the address is in use, or does not belong to this machine.
    """
    limits = Limits(connections=config.max_connections, seconds=config.timeout)
    session = Session(config.model, providers=config.provider, threads=config.threads or None)
    with _listen(config.host, config.port) as listener:
        port = listener.getsockname()[1]
        model = ModelServer(session, config)
        model.warm_up()
        server = _Server(
            model,
            uvicorn.Config(
                model.app(),
                http=functools.partial(Connection, limits=limits),  # type: ignore[arg-type]  # makes connections
                ws="none",
                log_level="warning",
                access_log=False,
                lifespan="on",
                server_header=False,
                # uvicorn's 5 s are less than proxies wait: a request that crosses the closing of
                # its connection is lost
                timeout_keep_alive=config.keep_alive,  # type: ignore[arg-type]  # asyncio takes fractions
                timeout_graceful_shutdown=config.grace,  # type: ignore[arg-type]
            ),
            lambda: announce(
                f"serving '{config.model}' as '{config.model_name}' on {session.provider}: http://{_shown(config.host)}:{port}"
            ),
        )
        # uvicorn handles signals while it runs. At its end it raises them again for the earlier
        # handlers.
        before = {number: signal.signal(number, _ignore) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            server.run(sockets=[listener])
        finally:
            server.end.cancel()
            for number, handler in before.items():
                signal.signal(number, handler)


class _Server(uvicorn.Server):
    """A uvicorn server that refuses new requests after the first signal to stop."""

    def __init__(self, model: ModelServer, config: uvicorn.Config, started: Callable[[], None]) -> None:
        super().__init__(config)
        self._model, self._on_start = model, started
        self.end = threading.Timer(model.config.grace + MARGIN, _leave)
        """Ends the process if it has not stopped in time."""
        self.end.daemon = True

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Start to listen, and announce it."""
        await super().startup(sockets)
        if self.started:
            self._on_start()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Finish the running requests."""
        self.end.start()
        await super().shutdown(sockets)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Refuse new requests. A second Ctrl-C does not wait for running requests."""
        self._model.batcher.stop()
        super().handle_exit(sig, frame)


def _listen(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # asyncio turns Nagle's algorithm off for sockets of this protocol only. It would delay answers
    # by 40 ms.
    listener = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
        listener.listen()  # another socket can bind the address too until one of them listens
    except OSError as error:
        listener.close()
        raise AddressError(
            f"cannot listen on {_shown(host)}:{port}: {error.strerror or error}; choose another host or port"
        ) from error
    return listener


def _shown(host: str) -> str:
    """The host as in a URL: IPv6 addresses have brackets."""
    return f"[{host}]" if ":" in host else host


def _leave() -> None:
    logger.error("a thread is still working; the process ends without it")
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os._exit(0)


def _ignore(number: int, frame: FrameType | None) -> None:
    """The signal has been handled."""
