"""Connections whose clients must send requests and read answers, or lose them.

uvicorn ends a connection that is idle after an answer. It waits for all other clients forever, and
it collects a request line and headers of any length.
"""

from __future__ import annotations

import asyncio
import json
import logging
import math
import re
from dataclasses import dataclass
from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

logger = logging.getLogger("advmoe_export.serve")
MAX_HEAD = 2**16
"""Most bytes of a request line and its headers."""
MAX_AHEAD = 16
"""Most requests that a client may send before earlier ones are answered. uvicorn keeps all of them."""
_OFFER = re.compile(rb"\nupgrade:", re.IGNORECASE)
_CUT_OFFER = re.compile(rb"\n(u|up|upg|upgr|upgra|upgrad|upgrade)\Z", re.IGNORECASE)
PAUSE = 60.0
"""Seconds between two messages that there are too many connections."""


@dataclass(kw_only=True)
class Limits:
    """What the connections of a server share."""

    connections: int
    """Most connections at a time."""
    seconds: float
    """Time for a request line and its headers, and for the rest of a body that was not wanted."""
    complained: float = -math.inf
    """When the log last said that there are too many connections."""


class Connection(HttpToolsProtocol):
    """A connection with limits. uvicorn passes the other arguments."""

    def __init__(self, *arguments: Any, limits: Limits, **more: Any) -> None:
        super().__init__(*arguments, **more)
        self._limits = limits
        self._head = 0
        """Bytes that were parsed since the last head, chunk or body."""
        self._in_head = False
        """Whether the parser is between the begin of a request and the end of its headers."""
        self._line_begins = True
        """Whether the next byte for the parser follows the end of a line."""
        self._held = b""
        """The begin of a header's name that may become an offer to upgrade."""
        self._unsent: asyncio.TimerHandle | None = None
        """Ends a connection whose client owes a request."""
        self._left = 0
        """Bytes that were not sent when the last answer ended, or at the last look."""
        self._unread: asyncio.TimerHandle | None = None
        """Ends a connection whose client does not read an answer."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Expect a request. The connection is refused if there are too many."""
        super().connection_made(transport)
        if len(self.connections) <= self._limits.connections:
            self._expect_request()
            return
        if self.loop.time() >= self._limits.complained + PAUSE:
            self._limits.complained = self.loop.time()
            logger.warning("%d connections are open; more are refused", self._limits.connections)
        self._refuse("503 Service Unavailable", f"{self._limits.connections} connections are open already")

    def connection_lost(self, exc: Exception | None) -> None:
        """Forget the limits of time."""
        for timer in (self._unsent, self._unread):
            if timer is not None:
                timer.cancel()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Parse a part of a request. Too long a head, chunk header or trailer is refused before its end."""
        while data and not self.transport.is_closing():
            part, data = data[: MAX_HEAD - self._head], data[MAX_HEAD - self._head :]
            if part:
                self._head += len(part)
                self._parse_without_offers(part)
            elif self._running:
                self.transport.abort()
            else:
                self._refuse("431 Request Header Fields Too Large", f"at most {MAX_HEAD} bytes of headers are accepted")
        if not self._running and self.timeout_keep_alive_task is None and not self.transport.is_closing():
            self._expect_request()

    def _parse_without_offers(self, data: bytes) -> None:
        """Parse bytes, with another name for the header `Upgrade`.

        The parser takes what follows a head with this header for another protocol, and the body
        would be lost. A server may ignore the offer (RFC 9110, 7.8). Bodies are not changed: the
        parser has read all before a name when `_in_head` is asked whether it belongs to a head.
        """
        text = (b"\n" if self._line_begins else b" ") + self._held + data
        self._held, begin = b"", 1
        for offer in _OFFER.finditer(text):
            self._parse(text[begin : offer.start() + 1])
            begin = offer.start() + 1
            if self._in_head:
                self._parse(b"x-")
        cut = _CUT_OFFER.search(text, max(begin - 1, len(text) - len(b"\nupgrade")))
        if cut is not None:
            self._parse(text[begin : cut.start() + 1])
            begin = cut.start() + 1
            if self._in_head:  # more must follow, in a body nothing may
                self._held, self._line_begins = text[begin:], True
                return
        self._parse(text[begin:])
        self._line_begins = text.endswith(b"\n")

    def _parse(self, data: bytes) -> None:
        if data and not self.transport.is_closing():
            super().data_received(data)

    def on_message_begin(self) -> None:
        """Note that a head begins."""
        self._in_head = True
        super().on_message_begin()

    def on_headers_complete(self) -> None:
        """Start the request, which has a limit of time of its own, or let it wait for those before it."""
        self._head = 0
        self._in_head = False
        self._requested()
        if self._running + len(self.pipeline) >= MAX_AHEAD:
            self.transport.abort()
        if not self.transport.is_closing():
            super().on_headers_complete()

    def on_chunk_header(self) -> None:
        """Count up to the next chunk, or to the end of the trailers."""
        self._head = 0

    def on_body(self, body: bytes) -> None:
        """Do not count the body, which the application limits."""
        self._head = max(0, self._head - len(body))
        super().on_body(body)

    def on_message_complete(self) -> None:
        """Count the next head. If the answer was sent before the body ended, the connection is idle now."""
        self._head = 0
        super().on_message_complete()
        if not self._running and not self.transport.is_closing():
            self._requested()
            self._unset_keepalive_if_required()
            self.timeout_keep_alive_task = self.loop.call_later(
                self.timeout_keep_alive, self.timeout_keep_alive_handler
            )

    def on_response_complete(self) -> None:
        """Expect the next request, or start one that waits."""
        super().on_response_complete()
        self._left = self.transport.get_write_buffer_size()

    def timeout_keep_alive_handler(self) -> None:
        """End an idle connection. `close` would wait for a client that does not read the last answer.

        The connection was not idle if the client has read a part of that answer meanwhile.
        """
        before, self._left = self._left, self.transport.get_write_buffer_size()
        if self._left < before:
            self.timeout_keep_alive_task = self.loop.call_later(
                self.timeout_keep_alive, self.timeout_keep_alive_handler
            )
        else:
            self.transport.abort()

    def pause_writing(self) -> None:
        """Wait for the client to read, as long as for an idle one."""
        super().pause_writing()
        self._expect_reading(self.transport.get_write_buffer_size())

    def resume_writing(self) -> None:
        """Go on writing."""
        if self._unread is not None:
            self._unread.cancel()
        super().resume_writing()

    def _expect_reading(self, left: int) -> None:
        """End the connection if the client reads nothing of `left` bytes. What it reads starts the time anew."""

        def look() -> None:
            now = self.transport.get_write_buffer_size()
            if now < left:
                self._expect_reading(now)
            else:
                self.transport.abort()

        self._unread = self.loop.call_later(self.timeout_keep_alive, look)

    @property
    def _running(self) -> bool:
        """Whether a request has not been answered yet."""
        return self.cycle is not None and not self.cycle.response_complete

    def _expect_request(self) -> None:
        """End the connection unless the head of a request is complete in time. Further bytes do not extend it."""
        if self._unsent is None:
            self._unsent = self.loop.call_later(self._limits.seconds, self.transport.abort)

    def _requested(self) -> None:
        if self._unsent is not None:
            self._unsent.cancel()
            self._unsent = None

    def _refuse(self, status: str, message: str) -> None:
        body = json.dumps({"error": message})
        head = f"content-type: application/json\r\ncontent-length: {len(body)}\r\nconnection: close\r\n\r\n"
        self.transport.write(f"HTTP/1.1 {status}\r\n{head}{body}".encode())
        self.transport.close()
