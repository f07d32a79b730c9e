"""Read request heads under a deadline and hand upgrades over, without parsing them twice.

Everything of HTTP is uvicorn's; what it lacks is added here: a deadline and a bound for an
unfinished request (uvicorn has neither), and a way to the WebSocket side that keeps the bytes
behind the upgrade request.
"""

import asyncio
from collections.abc import Callable
from http import HTTPStatus
from typing import Any, cast
from urllib.parse import unquote

import httptools
from uvicorn._types import ASGI3Application, WebSocketScope
from uvicorn.config import Config
from uvicorn.protocols.http.httptools_impl import (
    STATUS_LINE,
    HttpToolsProtocol,
    RequestResponseCycle,
)
from uvicorn.server import ServerState
from websockets.datastructures import Headers
from websockets.http11 import Request

from service.errors import Refusal
from service.wire.handshake import Handshake
from service.wire.protocol import RelayProtocol
from service.wire.shared import Shared

MAX_HEAD_BYTES = 65_536
"""What a request's head or its trailers may take: what common servers let in, and room to spare."""


class RequestProtocol(HttpToolsProtocol):
    """A TCP connection until it is upgraded, or for as long as it speaks HTTP.

    Args:
        config, server_state, app_state, _loop: what uvicorn gives an HTTP protocol.
        shared: bounds and books.
    """

    def __init__(
        self,
        config: Config,
        server_state: ServerState,
        app_state: dict[str, Any],
        _loop: asyncio.AbstractEventLoop | None = None,
        *,
        shared: Shared,
    ) -> None:
        super().__init__(config, server_state, app_state, _loop)
        self._shared = shared
        # With TLS this object is made at TCP accept and connection_made comes after the TLS
        # handshake: the time that took counts.
        self._due_at = self.loop.time() + shared.deadline_s
        self._deadline: asyncio.TimerHandle | None = None
        self._head_bytes = 0
        self._answering: RequestResponseCycle | None = None
        self._reader_deadline: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._deadline = self.loop.call_at(self._due_at, self._time_out)

    def connection_lost(self, exc: Exception | None) -> None:
        self._cancel_deadline()
        self._cancel_reader_deadline()
        self._disconnect_answer()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        self._unset_keepalive_if_required()
        if self._deadline is None and self._between_requests():
            self._due_at = self.loop.time() + self._shared.deadline_s
            self._deadline = self.loop.call_at(self._due_at, self._time_out)
        self._head_bytes += len(data)
        try:
            self.parser.feed_data(data)
        except httptools.HttpParserError:
            self._refuse_malformed()
        except httptools.HttpParserUpgrade as upgrade:
            if self._should_upgrade():
                self._upgrade(data[upgrade.args[0] :])
        else:
            if self._head_bytes > MAX_HEAD_BYTES:
                status = HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE
                self._refuse(status, Refusal.HANDSHAKE, "Request head too large.")

    # A client that does not read its answers: uvicorn waits for it for ever.

    def pause_writing(self) -> None:
        super().pause_writing()
        self._set_reader_deadline()

    def resume_writing(self) -> None:
        super().resume_writing()
        self._cancel_reader_deadline()

    def timeout_keep_alive_handler(self) -> None:
        super().timeout_keep_alive_handler()
        self._set_reader_deadline()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if self.transport.is_closing():
            self._set_reader_deadline()

    def _set_reader_deadline(self) -> None:
        self._cancel_reader_deadline()
        timeout_s = self._shared.deadline_s
        self._reader_deadline = self.loop.call_later(timeout_s, self.transport.abort)

    def _cancel_reader_deadline(self) -> None:
        if self._reader_deadline is not None:
            self._reader_deadline.cancel()
            self._reader_deadline = None

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: ASGI3Application) -> None:
        self._answering = cycle
        super()._start_asgi_task(cycle, app)

    def _disconnect_answer(self) -> None:
        # uvicorn tells only the newest of pipelined requests that nobody listens any more; the
        # one that is being answered would fail on a closed transport, with a traceback.
        if self._answering is not None:
            self._answering.disconnected = True

    # Bytes that are neither a head that is complete nor a body count against the bound: a head
    # that does not end, and trailers, which uvicorn keeps like headers.

    def on_headers_complete(self) -> None:
        self._head_bytes = 0
        super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        self._head_bytes = 0
        super().on_body(body)

    def on_message_complete(self) -> None:
        self._head_bytes = 0
        super().on_message_complete()
        if not self.parser.should_upgrade():
            self._cancel_deadline()

    def _between_requests(self) -> bool:
        return self.cycle is None or self.cycle.response_complete

    def _upgrade(self, early: bytes) -> None:
        """Give the transport to a WebSocket protocol, and the request to the application."""
        if not self._between_requests() or self.flow.write_paused:
            # Pipelined: answers would end up among the frames, or are still to be read; and a
            # transport that is paused already would not tell that the WebSocket is behind.
            self._refuse_malformed()
            return
        try:
            scope = self._scope()
        except httptools.HttpParserInvalidURLError:
            self._refuse_malformed()
            return
        request = self._request()
        self.connections.discard(self)
        self._cancel_deadline()
        self._cancel_reader_deadline()
        client = cast(Callable[..., RelayProtocol], self.ws_protocol_class)(
            self.config, self.server_state, self.app_state, self.loop
        )
        client.connection_made(self.transport)
        self.transport.set_protocol(client)
        self.parser = None  # type: ignore[assignment]  # it holds this object, and this object it
        client.expect_within(self._due_at - self.loop.time())
        client.data_received(early)
        handshake = Handshake(client, request, self._shared)
        if handshake.refuse_malformed():
            return
        task = self.loop.create_task(handshake.run(self.app, scope))
        self.tasks.add(task)
        task.add_done_callback(self.tasks.discard)

    def _request(self) -> Request:
        headers = Headers(
            [(name.decode("latin-1"), value.decode("latin-1")) for name, value in self.headers]
        )
        version = f"HTTP/{self.parser.get_http_version()}"
        return Request(self.url.decode("latin-1"), headers, self.scope["method"], version)

    def _scope(self) -> WebSocketScope:
        url = httptools.parse_url(self.url)
        raw_path = url.path or b"/"
        return {
            "type": "websocket",
            "asgi": {"version": self.asgi_version, "spec_version": "2.4"},
            "http_version": "1.1",
            "scheme": "wss" if self.scheme == "https" else "ws",
            "server": self.server,
            "client": self.client,
            "root_path": self.root_path,
            "path": unquote(raw_path.decode("latin-1")),
            "raw_path": raw_path,
            "query_string": url.query or b"",
            "headers": self.headers,
            "subprotocols": [
                name.strip()
                for header, value in self.headers
                if header == b"sec-websocket-protocol"
                for name in value.decode("latin-1").split(",")
            ],
            "state": self.app_state.copy(),
            "extensions": {"websocket.http.response": {}},
        }

    def _time_out(self) -> None:
        self._deadline = None
        if not self.transport.is_closing():
            status = HTTPStatus.REQUEST_TIMEOUT
            self._refuse(status, Refusal.HANDSHAKE_TIMEOUT, "Request not finished in time.")

    def _refuse_malformed(self) -> None:
        self._refuse(HTTPStatus.BAD_REQUEST, Refusal.HANDSHAKE, "Invalid HTTP request.")

    def _refuse(self, status: HTTPStatus, why: Refusal, text: str) -> None:
        self._shared.ledger.refusals[why] += 1
        self._cancel_deadline()
        self._disconnect_answer()
        self.pipeline.clear()
        self.transport.write(
            STATUS_LINE[status]
            + b"content-type: text/plain; charset=utf-8\r\nconnection: close\r\n"
            + f"content-length: {len(text)}\r\n\r\n{text}".encode()
        )
        self.transport.close()
        self._set_reader_deadline()

    def _cancel_deadline(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None
