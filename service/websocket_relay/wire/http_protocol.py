"""Read request heads under a deadline and hand upgrades over, without parsing them twice.

Everything of HTTP is uvicorn's; what it lacks is added here: a deadline and a bound for an
unfinished request (uvicorn has neither), and a way to the WebSocket side that keeps the bytes
behind the upgrade request.
"""

import asyncio
import re
from collections.abc import Callable
from functools import partial
from http import HTTPStatus
from time import perf_counter
from typing import Any, cast
from urllib.parse import unquote

import httptools
from uvicorn._types import ASGI3Application, WebSocketScope
from uvicorn.config import Config
from uvicorn.protocols.http.flow_control import FlowControl
from uvicorn.protocols.http.httptools_impl import (
    STATUS_LINE,
    HttpToolsProtocol,
    RequestResponseCycle,
)
from uvicorn.server import ServerState

from websocket_relay.outcomes import Refusal, random_retry_after_s
from websocket_relay.wire.context import ConnectionContext
from websocket_relay.wire.handshake import Handshake
from websocket_relay.wire.http_connections import HttpConnections
from websocket_relay.wire.request_framing import RequestFraming
from websocket_relay.wire.security_headers import SECURITY_HEADERS
from websocket_relay.wire.time_slicer import SLICE_S
from websocket_relay.wire.websocket import WebSocketConnection

MAX_HEAD_BYTES = 65_536
"""What a request's head or its trailers may take: what common servers let in, and room to spare."""

MAX_FIELDS = 256
"""Header fields and trailers of one request. Each costs fifty times the four bytes it may have."""

MAX_PIPELINED = 32
"""Requests that may wait on one connection for the answers to those before them."""

SAFE_METHODS = ("GET", "HEAD", "OPTIONS")
"""They change nothing (RFC 9110 section 9.2.1), so they may be refused at any time."""

CONNECTION_KEY = "relay.connection"
"""Where an endpoint finds the connection that it answers, in the ASGI scope."""

HOST = re.compile(
    rb"((?:[A-Za-z0-9._~!$&'()*+,;=-]|%[0-9A-Fa-f]{2})*|\[[0-9A-Fa-f:.]+\])(:[0-9]*)?"
)
"""A Host field's value (RFC 9110 section 7.2, RFC 3986 section 3.2)."""


class RequestError(Exception):
    """A request that goes no further. The parser's callbacks raise it, which stops the parser."""

    def __init__(self, status: HTTPStatus, text: str) -> None:
        super().__init__(text)
        self.status = status
        self.text = text


TOO_LARGE = (HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE, "Request head too large.")
MALFORMED = (HTTPStatus.BAD_REQUEST, "Invalid HTTP request.")
NOT_IMPLEMENTED = (HTTPStatus.NOT_IMPLEMENTED, "Transfer coding not supported.")


class PausableReader:
    """A transport's reading, which goes on when all who paused it have resumed it.

    Args:
        transport: what is read.
    """

    def __init__(self, transport: asyncio.Transport) -> None:
        self._transport = transport
        self._holds = 0

    def pause_reading(self) -> None:
        """Read no more until `resume_reading` was called as often."""
        self._holds += 1
        if self._holds == 1:
            self._transport.pause_reading()

    def resume_reading(self) -> None:
        """Read on, if nobody else wants it paused."""
        self._holds -= 1
        if not self._holds and not self._transport.is_closing():
            self._transport.resume_reading()


class HttpProtocol(HttpToolsProtocol):
    """A TCP connection until it is upgraded, or for as long as it speaks HTTP.

    Args:
        config, server_state, app_state, _loop: what uvicorn gives an HTTP protocol.
        shared: bounds and books.
        plain: the port's connections of this kind.
    """

    def __init__(
        self,
        config: Config,
        server_state: ServerState,
        app_state: dict[str, Any],
        _loop: asyncio.AbstractEventLoop | None = None,
        *,
        shared: ConnectionContext,
        plain: HttpConnections,
    ) -> None:
        # With TLS this object is made at TCP accept, connection_made comes after the TLS handshake,
        # and where that fails nothing comes: uvicorn's part, which holds a parser that holds it in
        # turn, would be garbage for the collector, and floods of such handshakes a lot of it.
        self._made_with = (config, server_state, app_state, _loop)
        self._shared = shared
        self._plain = plain
        self._due_at = asyncio.get_running_loop().time() + shared.deadline_s  # TLS's time counts
        self._deadline: asyncio.TimerHandle | None = None
        self._framing = RequestFraming()
        self._unfed = b""  # what was read and waits for its turn to be fed to the parser
        self._is_held = False  # whether it is not read because of that
        self._head_bytes = 0
        self._field_bytes = 0
        self._is_safe = True  # whether no request under way changes anything
        self._upgrades = False  # whether the request under way asks for a WebSocket
        self._receiving: RequestResponseCycle | None = None
        self._answering: RequestResponseCycle | None = None
        self._refusal: Refusal | None = None  # what answers the first request
        self._reader_deadline: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().__init__(*self._made_with)
        super().connection_made(transport)
        self._reading = PausableReader(transport)
        self.flow = FlowControl(cast(asyncio.Transport, self._reading))
        self._deadline = self.loop.call_at(self._due_at, self._time_out)
        self._refusal = self._plain.enter(self)
        if self._refusal is not None and not self._plain.keep_refused(self, self._refusal):
            self._ask_to_come_back(self._refusal)

    def connection_lost(self, exc: Exception | None) -> None:
        self._cancel_deadline()
        self._cancel_reader_deadline()
        self._disconnect_answer()
        self._plain.leave(self)
        super().connection_lost(exc)
        self._unfed = b""
        # A request that waits for its turn holds this object, and this object it.
        self.pipeline.clear()
        self.cycle = None  # type: ignore[assignment]  # None is its first value
        self._receiving = self._answering = None

    def data_received(self, data: bytes) -> None:
        if self._refusal is not None:
            self._ask_to_come_back(self._refusal)  # not before: see `make_room`
            return
        if self._is_held:
            self._unfed += data
            return
        self._unfed = self._feed_some(data, perf_counter() + SLICE_S)
        if self._unfed:
            self._is_held = True
            self._reading.pause_reading()
            self._shared.reading.add(self._feed_more)

    def _feed_more(self, until: float) -> bool:
        """Feed some of what waits; tell whether that was all."""
        data, self._unfed = self._unfed, b""
        if data and not self.transport.is_closing():
            try:
                self._unfed = self._feed_some(data, until)
            except BaseException:  # as uvloop does where data_received raises
                self.transport.abort()
                raise
        if self._unfed:
            return False
        self._read_again()
        return True

    def _read_again(self) -> None:
        if self._is_held:
            self._is_held = False
            self._reading.resume_reading()

    def _feed_some(self, data: bytes, until: float) -> bytes:
        """Feed the parser until a time; return what is left then."""
        self._unset_keepalive_if_required()
        if self._deadline is None and self._between_requests():
            self._due_at = self.loop.time() + self._shared.deadline_s
            self._deadline = self.loop.call_at(self._due_at, self._time_out)
        try:
            rest = self._feed(data, until)
        except httptools.HttpParserError as error:
            self._refuse_unparsed(error)
            return b""
        if self._head_bytes > MAX_HEAD_BYTES:
            status, text = TOO_LARGE
            self._refuse(status, Refusal.HANDSHAKE, text)
            return b""
        return rest

    def _feed(self, data: bytes, until: float) -> bytes:
        start = 0
        while start < len(data):
            if start and perf_counter() > until:  # tiny chunks take long
                return data[start:]
            end = self._framing.pass_piece(data, start)
            self._head_bytes += end - start
            try:
                self.parser.feed_data(data[start:end])
            except httptools.HttpParserUpgrade:
                if self._upgrades:
                    self._upgrade(data[end:])
                    return b""
                # Another protocol is offered and not taken up: HTTP goes on (RFC 9110 section 7.8).
            start = end
        return b""

    # A client that does not read its answers: uvicorn waits for it for ever.

    def pause_writing(self) -> None:
        super().pause_writing()
        self._set_reader_deadline()
        self._note_whose_turn()

    def resume_writing(self) -> None:
        super().resume_writing()
        self._cancel_reader_deadline()
        self._note_whose_turn()

    def timeout_keep_alive_handler(self) -> None:
        super().timeout_keep_alive_handler()
        self._set_reader_deadline()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if self.transport.is_closing():
            self._set_reader_deadline()
        self._note_whose_turn()

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
        cast(dict[str, Any], cycle.scope)[CONNECTION_KEY] = self
        self._plain.start(partial(self._run, cycle, app))

    def _run(self, cycle: RequestResponseCycle, app: ASGI3Application) -> None:
        if not cycle.disconnected:
            super()._start_asgi_task(cycle, app)

    def _disconnect_answer(self) -> None:
        # uvicorn tells only the newest of pipelined requests that nobody listens any more; the
        # one that is being answered would fail on a closed transport, with a traceback.
        if self._answering is not None:
            self._answering.disconnected = True

    # Two counts, for neither sees all. Bytes that are neither a head that is complete nor a body: a
    # head that does not end, and trailers, which uvicorn keeps like headers. And what is kept of
    # them: one read may bring a head or trailers that are too much and complete.

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._field_bytes = 0

    def on_url(self, url: bytes) -> None:
        self._keep(url)
        super().on_url(url)

    def on_header(self, name: bytes, value: bytes) -> None:
        self._keep(name, value)
        if len(self.headers) >= MAX_FIELDS:
            raise RequestError(*TOO_LARGE)
        super().on_header(name, value.rstrip(b" \t"))  # llhttp leaves it (RFC 9112 section 5.1)

    def _keep(self, *parts: bytes) -> None:
        self._field_bytes += sum(map(len, parts))
        if self._field_bytes > MAX_HEAD_BYTES:
            raise RequestError(*TOO_LARGE)

    def on_headers_complete(self) -> None:
        self._head_bytes = 0
        self._check_head()
        self._upgrades = self._asks_for_websocket()
        super().on_headers_complete()
        if not self._upgrades:
            self._receiving = self.cycle

    def _check_head(self) -> None:
        """Hold a request to what uvicorn and its parser let pass.

        Raises:
            UnacceptableError: it goes no further.
        """
        version, method = self.parser.get_http_version(), self.parser.get_method()
        if version not in ("1.0", "1.1"):
            status = HTTPStatus.HTTP_VERSION_NOT_SUPPORTED
            raise RequestError(status, "HTTP/1.1 is spoken here.")
        # llhttp takes several spaces for one, other line ends before the request line, and other
        # protocols' names (RFC 9112 section 3).
        if self._framing.line != b"%b %b HTTP/%b\r\n" % (method, self.url, version.encode()):
            raise RequestError(*MALFORMED)
        hosts = [value for name, value in self.headers if name == b"host"]
        if len(hosts) > 1 or (not hosts and version != "1.0"):  # RFC 9112 section 3.2
            raise RequestError(*MALFORMED)
        if hosts and not HOST.fullmatch(hosts[0]):
            raise RequestError(*MALFORMED)
        # Neither a proxy nor a server as a whole can be asked here, and fragments stay at home.
        if method == b"CONNECT" or self.url == b"*" or b"#" in self.url:
            raise RequestError(*MALFORMED)
        # httptools takes a request that offers an upgrade for one without a body. What is sent as
        # its body would be read as requests, which no proxy in front has seen.
        if self._expect_body(version) and self.parser.should_upgrade():
            raise RequestError(*MALFORMED)
        if len(self.pipeline) >= MAX_PIPELINED:
            raise RequestError(HTTPStatus.TOO_MANY_REQUESTS, "Too many requests at once.")

    def _expect_body(self, version: str) -> bool:
        """Tell whether a body follows the head, and how it is framed.

        Raises:
            UnacceptableError: that can't be told (RFC 9112 sections 6.1 and 6.3).
        """
        length, codings = 0, []
        for name, value in self.headers:
            if name == b"content-length":
                length = int(value)
            elif name == b"transfer-encoding":
                codings += value.lower().split(b",")
        if codings == [b"chunked"] and version == "1.1":
            self._framing.begin_chunks()
        elif codings:
            *others, last = (coding.strip() for coding in codings)
            if last == b"chunked" and any(others) and version == "1.1":
                raise RequestError(*NOT_IMPLEMENTED)
            raise RequestError(*MALFORMED)
        elif length:
            self._framing.begin_content(length)
        return bool(codings or length)

    def _asks_for_websocket(self) -> bool:
        # uvicorn takes the last line of each; both are lists, in as many lines as one likes.
        return (
            self.parser.should_upgrade()
            and self.config.ws_protocol_class is not None
            and b"upgrade" in self._tokens(b"connection")
            and b"websocket" in self._tokens(b"upgrade")
        )

    def _tokens(self, field: bytes) -> set[bytes]:
        """Return a list field's members in lower case (RFC 9110 section 5.6.1)."""
        return {
            token.strip().lower()
            for name, value in self.headers
            if name == field
            for token in value.split(b",")
        }

    def _should_upgrade(self) -> bool:
        return self._upgrades

    def on_body(self, body: bytes) -> None:
        self._head_bytes = 0
        super().on_body(body)

    def on_message_complete(self) -> None:
        self._head_bytes = 0
        self._receiving = None
        self._framing.begin_request()
        super().on_message_complete()
        if not self._upgrades:
            self._cancel_deadline()
            self._is_safe &= self.scope["method"] in SAFE_METHODS
            self._note_whose_turn()

    def _between_requests(self) -> bool:
        return self.cycle is None or self.cycle.response_complete

    def _note_whose_turn(self) -> None:
        awaits_request = self._between_requests()
        self._is_safe |= awaits_request
        if (
            awaits_request
            or self._receiving is not None
            or self.flow.write_paused
            or self.transport.is_closing()
        ):
            self._plain.await_peer(self)
        else:
            self._plain.await_relay(self, is_safe=self._is_safe)

    def make_room(self, why: Refusal) -> None:
        """End, so that another connection may come.

        One that is idle ends without a word, as it might at any time (RFC 9112 section 9.5), and at
        the stop so does one whose first request has not come: nginx 1.22 takes an answer that is
        there before it has sent the request for a part of the next relay's. TLS has no quick end
        but this: its own waits for the peer.
        """
        has_quick_end = self.scheme == "http" and not self.transport.get_write_buffer_size()
        is_new = not self._head_bytes and self._receiving is self._answering is None
        if self.transport.is_closing() or self._is_idle() or (is_new and why is Refusal.DRAINING):
            self._plain.evictions += 1
            (self.transport.close if has_quick_end else self.transport.abort)()
        elif has_quick_end:
            self._refuse_for_now(why)
        else:
            self._plain.refused(why)
            self.transport.abort()

    def _is_idle(self) -> bool:
        return self.cycle is not None and self.cycle.response_complete and self._deadline is None

    def leave_open(self) -> None:
        """Let the answer that is about to be sent end with the connection (RFC 9112 6.3)."""
        if self._answering is not None:
            self._answering.chunked_encoding = False

    @property
    def is_gone(self) -> bool:
        """Whether nobody would hear an answer."""
        return self.transport.is_closing()

    async def answers_are_out(self) -> None:
        """Return when the answers to the requests before this one have left for the socket."""
        await self.flow.drain()

    def take_over(self) -> asyncio.Transport | None:
        """Give the transport away behind the head of the answer that is being sent.

        Returns:
            None where the client has gone.
        """
        cycle, transport = self._answering, self.transport
        if transport.is_closing():  # uvicorn learns it from connection_lost, which is still to come
            self._disconnect_answer()
        if cycle is None or cycle.disconnected:
            return None
        cycle.response_complete = cycle.disconnected = True
        self.flow.resume_reading()  # a body, or a request behind this one, may have paused it
        self._unfed = b""
        self._read_again()
        self.connections.discard(self)
        self._plain.leave(self)
        self._cancel_deadline()
        self._cancel_reader_deadline()
        self._unset_keepalive_if_required()
        self.pipeline.clear()
        self.parser = self.cycle = None  # type: ignore[assignment]  # they hold this object
        self._receiving = self._answering = None
        return transport

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
        method, version = self.scope["method"], self.parser.get_http_version()
        self._read_again()  # before the client pauses it
        self.connections.discard(self)
        self._plain.leave(self)
        self._cancel_deadline()
        self._cancel_reader_deadline()
        client = cast(Callable[..., WebSocketConnection], self.ws_protocol_class)(
            self.config, self.server_state, self.app_state, self.loop
        )
        client.connection_made(self.transport)
        self.transport.set_protocol(client)
        self.parser = None  # type: ignore[assignment]  # it holds this object, and this object it
        client.expect_within(self._due_at - self.loop.time())
        client.data_received(early)
        handshake = Handshake(client, self._shared, self._plain)
        agreement = handshake.validate(method, version, self.headers)
        if agreement is None:
            return
        scope["subprotocols"] = agreement.subprotocols
        task = self.loop.create_task(handshake.run(self.app, scope))
        self.tasks.add(task)
        task.add_done_callback(self.tasks.discard)

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
            "subprotocols": [],
            "state": self.app_state.copy(),
            "extensions": {"websocket.http.response": {}},
        }

    def _time_out(self) -> None:
        self._deadline = None
        if not self.transport.is_closing():
            status = HTTPStatus.REQUEST_TIMEOUT
            self._refuse(status, Refusal.HANDSHAKE_TIMEOUT, "Request not finished in time.")

    def _refuse_unparsed(self, error: httptools.HttpParserError) -> None:
        # What a callback raised must not be named in data_received: its traceback holds that frame,
        # and with it the request would wait for the garbage collector.
        cause = error.__context__
        if isinstance(cause, RequestError):
            self._refuse(cause.status, Refusal.HANDSHAKE, cause.text)
        else:
            self._refuse_malformed()

    def _refuse_malformed(self) -> None:
        status, text = MALFORMED
        self._refuse(status, Refusal.HANDSHAKE, text)

    def _refuse_for_now(self, why: Refusal) -> None:
        self._plain.refused(why)
        self._ask_to_come_back(why)

    def _ask_to_come_back(self, why: Refusal) -> None:
        self._end_with(why.status, f"{why.reason}\n", f"retry-after: {random_retry_after_s()}\r\n")

    def _refuse(self, status: HTTPStatus, why: Refusal, text: str) -> None:
        self._shared.ledger.refusals[why] += 1
        self._end_with(status, text)

    def _end_with(self, status: HTTPStatus, text: str, field: str = "") -> None:
        self._cancel_deadline()
        if self._may_answer():
            defaults = [b"%b: %b\r\n" % header for header in self.server_state.default_headers]
            safe = [f"{name}: {value}\r\n".encode() for name, value in SECURITY_HEADERS]
            self.transport.write(
                STATUS_LINE[status]
                + b"".join([*defaults, *safe])
                + b"content-type: text/plain; charset=utf-8\r\nconnection: close\r\n"
                + f"{field}content-length: {len(text)}\r\n\r\n{text}".encode()
            )
        self._disconnect_answer()
        self.pipeline.clear()
        self.transport.close()
        self._set_reader_deadline()
        self._note_whose_turn()

    def _may_answer(self) -> bool:
        """Tell whether an answer would be read as one.

        Not within another one; and a request whose body is at fault may have its answer already:
        a proxy would take the second for the answer to its next request.
        """
        answering, receiving = self._answering, self._receiving
        if answering and answering.response_started and not answering.response_complete:
            return False
        return receiving is None or not receiving.response_started

    def _cancel_deadline(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None
