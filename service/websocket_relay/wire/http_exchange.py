"""Own one HTTP request and its response, between a connection and an ASGI application.

Knows the ASGI HTTP messages (spec 2.4) and how a response is framed (RFC 9112 section 6). Knows no
socket and no timer.
"""

import asyncio
import logging
from collections.abc import Callable
from http import HTTPStatus
from time import perf_counter
from typing import Protocol

from websocket_relay.outcomes import Refusal, RefusedError
from websocket_relay.security_headers import SECURITY_HEADERS
from websocket_relay.wire.asgi import App, Event, Scope
from websocket_relay.wire.request_head import RequestHead, list_members

log = logging.getLogger(__name__)

MAX_UNREAD_BYTES = 65_536
"""Body bytes that wait for the application before reading from the client pauses."""

STATUS_LINES = {
    status.value: f"HTTP/1.1 {status.value} {status.phrase}\r\n".encode() for status in HTTPStatus
}

SECURITY_LINES = {
    name.lower().encode(): f"{name}: {value}\r\n".encode() for name, value in SECURITY_HEADERS
}

CONTINUE = b"HTTP/1.1 100 Continue\r\n\r\n"

SAFE_METHODS = ("GET", "HEAD", "OPTIONS")
"""Safe methods change nothing (RFC 9110 section 9.2.1). They can be refused at any time."""


Headers = list[tuple[bytes, bytes]]

ObserveRequest = Callable[[Scope, int, Headers, float], None]
"""Called with the scope of a request, the status and the headers of its response, and the seconds
from its head to the end of the response."""


class ExchangeConnection(Protocol):
    """The part of a connection that an exchange uses."""

    @property
    def default_lines(self) -> bytes:
        """Fields of every response, with their line ends."""

    async def drain(self) -> None:
        """Wait until the client has read enough for more to be written."""

    def resume_body(self) -> None:
        """Read more of the body."""

    def on_exchange_complete(self) -> None:
        """Go on: the response is written."""

    def refuse(self, error: RefusedError) -> None:
        """End the connection, with a response where one can be sent."""


class HttpExchange:
    """One request and its response.

    Args:
        connection: the connection.
        transport: its transport.
        head: the head of the request.
        observe: called with the request and its response; None: not measured.

    Attributes:
        delimits_by_close: whether the end of the connection ends a response that has no
            Content-Length (RFC 9112 section 6.3), as with HTTP/1.0.
        keeps_alive: whether another request may follow.
        on_lost: called once if the client disconnects; None: nothing is.
        is_safe: whether the method changes nothing.
        has_started: whether the response has begun.
        is_complete: whether all of the response is written.
        is_disconnected: whether the client can't receive the response any more.
        is_received: whether the whole request has arrived.
    """

    __slots__ = (
        "_body_is_forbidden",
        "_connection",
        "_expects_continue",
        "_head",
        "_headers",
        "_is_read",
        "_missing_bytes",
        "_observe",
        "_started_at",
        "_status",
        "_transport",
        "_unread",
        "_unread_bytes",
        "_waiter",
        "delimits_by_close",
        "has_started",
        "is_complete",
        "is_disconnected",
        "is_received",
        "is_safe",
        "keeps_alive",
        "on_lost",
    )

    def __init__(
        self,
        connection: ExchangeConnection,
        transport: asyncio.Transport,
        head: RequestHead,
        observe: ObserveRequest | None = None,
    ) -> None:
        self._connection = connection
        self._transport = transport
        self._observe = observe
        self._started_at = perf_counter()
        self._status, self._headers = 500, Headers()
        expectation = head.fields.get(b"expect", b"").lower()
        self._expects_continue = expectation == b"100-continue" and head.version == "1.1"
        self._body_is_forbidden = head.method == "HEAD"
        self._head = b""  # of the response, until its body follows: one system call for both
        self._is_read = False  # whether the application has read all of the body
        self._missing_bytes: int | None = None  # of a response with a Content-Length
        self._unread: list[bytes] = []
        self._unread_bytes = 0
        self._waiter: asyncio.Future[None] | None = None
        self.delimits_by_close = head.version == "1.0"
        self.has_started = self.is_complete = self.is_disconnected = False
        self.on_lost: Callable[[], object] | None = None
        self.is_received = not head.has_body
        self.is_safe = head.method in SAFE_METHODS
        self.keeps_alive = head.keeps_alive

    async def run(self, app: App, scope: Scope) -> None:
        """Run the application, which answers the request."""
        try:
            await app(scope, self._receive, self._send)
        except Exception:
            log.exception("request failed")
        if not (self.is_complete or self.is_disconnected or self._transport.is_closing()):
            # Within a response the client sees only that the connection ends early.
            self._connection.refuse(RefusedError(Refusal.INTERNAL_ERROR))
        if self._observe is not None:
            taken_s = perf_counter() - self._started_at
            self._observe(scope, self._status, self._headers, taken_s)

    # The request

    @property
    def is_reading_paused(self) -> bool:
        """Whether the application has more of the body to read than it should."""
        return self._unread_bytes > MAX_UNREAD_BYTES and not self.is_complete

    def add_body(self, content: bytes, *, is_last: bool) -> None:
        """Pass on a part of the body; it is discarded after the response."""
        self.is_received = is_last
        if self.is_complete:
            return
        if content:
            self._expects_continue = False
            self._unread.append(content)
            self._unread_bytes += len(content)
        self._wake()

    def disconnect(self) -> None:
        """Record that the client can't receive the response any more."""
        self.is_disconnected = True
        self._wake()
        if self.on_lost is not None:
            self.on_lost()
            self.on_lost = None

    @property
    def _has_unread(self) -> bool:
        return bool(self._unread) or (self.is_received and not self._is_read)

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    async def _receive(self) -> Event:
        if self._expects_continue and not self.has_started and not self.is_received:
            self._expects_continue = False
            self._write(CONTINUE)
        while not (self.is_disconnected or self.is_complete or self._has_unread):
            if self._waiter is None or self._waiter.done():
                self._waiter = asyncio.get_running_loop().create_future()
            await self._waiter
        if not self._has_unread:
            return {"type": "http.disconnect"}
        body = b"".join(self._unread)
        self._unread.clear()
        self._unread_bytes = 0
        self._is_read = self.is_received
        self._connection.resume_body()
        return {"type": "http.request", "body": body, "more_body": not self.is_received}

    # The response

    async def _send(self, event: Event) -> None:
        if event["type"] == "http.response.start" and not self.has_started:
            self._start(event["status"], list(event.get("headers", ())))
        elif event["type"] == "http.response.body" and self.has_started and not self.is_complete:
            await self._connection.drain()
            self._write_body(event.get("body", b""), is_last=not event.get("more_body", False))
        else:
            raise RuntimeError(f"unexpected ASGI message {event['type']!r}")

    def _start(self, status: int, headers: Headers) -> None:
        self.has_started = True
        self._status, self._headers = status, headers
        lines = [STATUS_LINES[status], self._connection.default_lines]
        if self._expects_continue and not self.is_received:
            self.keeps_alive = False  # the client may send the body, or not (RFC 9110 10.1.1)
        names = set()
        for name, value in headers:
            names.add(name)
            if name == b"content-length":
                self._missing_bytes = int(value)
            elif name == b"connection":
                self.keeps_alive = self.keeps_alive and b"close" not in list_members(value)
                continue
            lines.append(b"%b: %b\r\n" % (name, value))
        lines += [line for name, line in SECURITY_LINES.items() if name not in names]
        if status in (HTTPStatus.NO_CONTENT, HTTPStatus.NOT_MODIFIED):
            self._body_is_forbidden = True
        elif self._missing_bytes is None:
            if self.delimits_by_close:
                self.keeps_alive = False
            else:
                lines.append(b"Transfer-Encoding: chunked\r\n")
        if not self.keeps_alive:
            lines.append(b"Connection: close\r\n")
        lines.append(b"\r\n")
        self._head = b"".join(lines)

    def _write(self, data: bytes) -> None:
        if not self._transport.is_closing():
            self._transport.write(data)

    def flush_head(self) -> None:
        """Write the head of the response now."""
        self._write(self._head)
        self._head = b""

    def _write_body(self, body: bytes, *, is_last: bool) -> None:
        if self._body_is_forbidden or self.is_disconnected:
            body = b""
        elif self._missing_bytes is not None:
            self._missing_bytes -= len(body)
            if self._missing_bytes < 0 or (is_last and self._missing_bytes):
                raise RuntimeError("the body has another size than its Content-Length")
        elif not self.delimits_by_close:
            if body:
                body = b"%x\r\n%b\r\n" % (len(body), body)
            if is_last:
                body += b"0\r\n\r\n"
        if body or self._head:
            if not self._transport.is_closing():
                self._transport.write(self._head + body)
            self._head = b""
        if is_last:
            self.is_complete = True
            self._connection.on_exchange_complete()
