"""Read HTTP request heads under a deadline and pass WebSocket upgrades on.

Extends uvicorn's HTTP protocol with what it lacks: a deadline and a size limit for an incomplete
request, and an upgrade that keeps the bytes after the upgrade request and parses the request only
once. Knows no WebSocket frame and no channel.
"""

import asyncio
import re
import select
from collections.abc import Callable, Iterator
from functools import partial
from http import HTTPStatus
from time import perf_counter
from typing import Any, cast
from urllib.parse import unquote

import httptools
from uvicorn._types import ASGI3Application, WebSocketScope
from uvicorn.config import Config
from uvicorn.protocols.http.flow_control import FlowControl
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle
from uvicorn.server import ServerState

from websocket_relay.outcomes import Refusal, RefusedError
from websocket_relay.security_headers import with_security_headers
from websocket_relay.wire.connection import Connection
from websocket_relay.wire.context import ConnectionContext
from websocket_relay.wire.handshake import Handshake, validate_handshake
from websocket_relay.wire.http_connections import HttpConnections
from websocket_relay.wire.request_framing import RequestFraming
from websocket_relay.wire.time_slicer import SLICE_S

MAX_HEAD_BYTES = 65_536
"""Maximum size of a request head or of its trailers: above the limits of common servers."""

MAX_FIELDS = 256
"""Maximum number of header and trailer fields in one request. A field of four bytes takes fifty
times as much memory."""

MAX_PIPELINED = 32
"""Maximum number of pipelined requests that wait on one connection for earlier responses."""

SAFE_METHODS = ("GET", "HEAD", "OPTIONS")
"""Safe methods change nothing (RFC 9110 section 9.2.1). They can be refused at any time."""

CONNECTION_KEY = "relay.connection"
"""The key of the HttpProtocol in the ASGI scope of its requests."""

HOST = re.compile(
    rb"((?:[A-Za-z0-9._~!$&'()*+,;=-]|%[0-9A-Fa-f]{2})*|\[[0-9A-Fa-f:.]+\])(:[0-9]*)?"
)
"""The value of a Host field (RFC 9110 section 7.2, RFC 3986 section 3.2)."""


class PausableReader:
    """Count the pauses of a transport. Reading resumes when all of them are resumed.

    Args:
        transport: the transport to pause and resume.
    """

    def __init__(self, transport: asyncio.Transport) -> None:
        self._transport = transport
        self._pauses = 0

    def pause_reading(self) -> None:
        """Pause reading until `resume_reading` is called equally often."""
        self._pauses += 1
        if self._pauses == 1:
            self._transport.pause_reading()

    def resume_reading(self) -> None:
        """Undo one pause; resume reading after the last one."""
        self._pauses -= 1
        if not self._pauses and not self._transport.is_closing():
            self._transport.resume_reading()


class HttpProtocol(HttpToolsProtocol):
    """An HTTP connection, until its end or its upgrade.

    Args:
        config, server_state, app_state, _loop: uvicorn's arguments of an HTTP protocol.
        shared: shared limits and counters.
        plain: the HTTP connections of the port.
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
        # With TLS this object is created at TCP accept. connection_made follows after the TLS
        # handshake, or never if the handshake fails. uvicorn's base class and its parser reference
        # each other: initialized here, each failed handshake of a flood would leave a reference
        # cycle to the garbage collector.
        self._base_arguments = (config, server_state, app_state, _loop)
        self.peer: tuple[str, int] | None = None  # in place of the address of the connection
        self._context = shared
        self._http_connections = plain
        # The deadline includes the TLS handshake.
        self._deadline_at = asyncio.get_running_loop().time() + shared.deadline_s
        self._deadline_timer: asyncio.TimerHandle | None = None
        self._framing = RequestFraming()
        self._unparsed = b""  # received, not parsed yet
        self._is_paused = False  # whether reading is paused because of `_unparsed`
        self._head_bytes = 0
        self._field_bytes = 0
        self._uses_safe_methods = True  # whether all pending requests use safe methods
        self._is_websocket_request = False  # whether the current request is a WebSocket upgrade
        self._ignores_offer = False  # whether the parser has stopped at an offer that is ignored
        self._receiving_cycle: RequestResponseCycle | None = None
        self._responding_cycle: RequestResponseCycle | None = None
        self._refusal = b""  # the response to the first request, if it is refused already
        self._drain_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().__init__(*self._base_arguments)
        super().connection_made(transport)
        if self.peer is not None:
            self.client = self.peer
        self._reading = PausableReader(transport)
        self.flow = FlowControl(cast(asyncio.Transport, self._reading))
        self._deadline_timer = self.loop.call_at(self._deadline_at, self._on_deadline)
        error = self._http_connections.register(self)
        if error is not None:
            self._refusal = self._context.refusals.respond(error)
            if not self._http_connections.keep_refused(self, error):
                self._respond_and_close(self._refusal)

    def connection_lost(self, exc: Exception | None) -> None:
        self._cancel_deadline_timer()
        self._cancel_drain_timer()
        self._mark_disconnected()
        self._http_connections.unregister(self)
        self._unset_keepalive_if_required()  # uvicorn does so only without an error
        super().connection_lost(exc)
        self._unparsed = b""
        # A queued request and this object reference each other.
        self.pipeline.clear()
        self.cycle = None  # type: ignore[assignment]  # None is its initial value
        self._receiving_cycle = self._responding_cycle = None

    def data_received(self, data: bytes) -> None:
        if self._refusal:
            self._respond_and_close(self._refusal)  # not before a request arrives: see `evict`
            return
        if self._is_paused:
            self._unparsed += data
            return
        self._unparsed = self._parse_slice(data, perf_counter() + SLICE_S)
        if self._unparsed:
            self._is_paused = True
            self._reading.pause_reading()
            self._context.parse_slicer.schedule_work(self._parse_rest())

    def _parse_rest(self) -> Iterator[None]:
        """Parse the unparsed bytes, one slice of time a step."""
        while self._unparsed and not self.transport.is_closing():
            data, self._unparsed = self._unparsed, b""
            try:
                self._unparsed = self._parse_slice(data, perf_counter() + SLICE_S)
            except Exception:  # as uvloop does if data_received raises
                self.transport.abort()
                raise
            yield
        self._unparsed = b""
        self._resume_reading()

    def _resume_reading(self) -> None:
        if self._is_paused:
            self._is_paused = False
            self._reading.resume_reading()

    def _parse_slice(self, data: bytes, until: float) -> bytes:
        """Parse until `until`, by `perf_counter`; return the unparsed rest."""
        self._unset_keepalive_if_required()
        if self._deadline_timer is None and self._between_requests():
            self._deadline_at = self.loop.time() + self._context.deadline_s
            self._deadline_timer = self.loop.call_at(self._deadline_at, self._on_deadline)
        start = 0
        try:
            while start < len(data):
                if start and perf_counter() > until:  # many tiny chunks take long
                    break
                end = self._framing.consume_piece(data, start)
                self._head_bytes += end - start
                try:
                    self.parser.feed_data(data[start:end])
                except httptools.HttpParserUpgrade:
                    if self._is_websocket_request:
                        self._upgrade(data[end:])
                        return b""
                if self._ignores_offer:
                    self._parse_without_offer()
                start = end
        except httptools.HttpParserError as error:
            self._refuse(_refusal_of(error))
            return b""
        if self._head_bytes > MAX_HEAD_BYTES:
            self._refuse(RefusedError(Refusal.HEAD_TOO_LARGE))
            return b""
        return data[start:]

    def _parse_without_offer(self) -> None:
        """Parse the head of the current request again, without its offer of an upgrade.

        A server may ignore an offer (RFC 9110 section 7.8). httptools can't: it treats the request
        as one without a body, and with `Connection: close` as the last one.
        """
        self.parser = httptools.HttpRequestParser(self)
        self.parser.set_dangerous_leniencies(lenient_data_after_close=True)  # as uvicorn does
        fields = (b"%b: %b\r\n" % field for field in self.headers if field[0] != b"upgrade")
        self.parser.feed_data(b"%b%b\r\n" % (self._framing.line, b"".join(fields)))

    # A client that does not read its responses. uvicorn would wait for it without a limit.

    def pause_writing(self) -> None:
        super().pause_writing()
        self._start_drain_timer()
        self._update_idle_state()

    def resume_writing(self) -> None:
        super().resume_writing()
        self._cancel_drain_timer()
        self._update_idle_state()

    def timeout_keep_alive_handler(self) -> None:
        if self.is_request_arriving():
            self.timeout_keep_alive_task = self.loop.call_later(
                self.timeout_keep_alive, self.timeout_keep_alive_handler
            )
            return
        super().timeout_keep_alive_handler()
        self._start_drain_timer()

    def is_request_arriving(self) -> bool:
        """Return whether an idle connection has bytes that are not read or not parsed yet.

        A pipelined request may wait for its slice of time. A request may also wait in the socket:
        libuv runs timers before it reads, and in a busy loop it may have arrived long before.
        """
        if self.transport.is_closing() or not self._is_idle():
            return False
        if self._unparsed:
            return True
        readable = select.poll()
        readable.register(self.transport.get_extra_info("socket"), select.POLLIN)
        return bool(readable.poll(0))

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if self.transport.is_closing():
            self._start_drain_timer()
        self._update_idle_state()

    def _start_drain_timer(self) -> None:
        self._cancel_drain_timer()
        timeout_s = self._context.deadline_s
        self._drain_timer = self.loop.call_later(timeout_s, self.transport.abort)

    def _cancel_drain_timer(self) -> None:
        if self._drain_timer is not None:
            self._drain_timer.cancel()
            self._drain_timer = None

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: ASGI3Application) -> None:
        self._responding_cycle = cycle
        cast(dict[str, Any], cycle.scope)[CONNECTION_KEY] = self
        app = with_security_headers(app)
        if self._http_connections.may_start_request():
            super()._start_asgi_task(cycle, app)
        else:
            self._http_connections.queue_request(partial(self._run_request, cycle, app))

    def _run_request(self, cycle: RequestResponseCycle, app: ASGI3Application) -> None:
        if not cycle.disconnected:
            super()._start_asgi_task(cycle, app)

    def _mark_disconnected(self) -> None:
        # Of pipelined requests, uvicorn marks only the newest one as disconnected. The one whose
        # response is in progress would fail on the closed transport, with a traceback.
        if self._responding_cycle is not None:
            self._responding_cycle.disconnected = True

    # Two counters, because neither covers all cases. `_head_bytes` counts received bytes outside of
    # complete heads and bodies: an endless head, or trailers, which uvicorn stores like headers.
    # `_field_bytes` counts the stored fields: one read may bring a complete head, or complete
    # trailers, that are too large.

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._field_bytes = 0

    def on_url(self, url: bytes) -> None:
        self._count_field_bytes(url)
        super().on_url(url)

    def on_header(self, name: bytes, value: bytes) -> None:
        self._count_field_bytes(name, value)
        if len(self.headers) >= MAX_FIELDS:
            raise RefusedError(Refusal.HEAD_TOO_LARGE)
        # llhttp keeps trailing whitespace (RFC 9112 section 5.1).
        super().on_header(name, value.rstrip(b" \t"))

    def _count_field_bytes(self, *parts: bytes) -> None:
        self._field_bytes += sum(map(len, parts))
        if self._field_bytes > MAX_HEAD_BYTES:
            raise RefusedError(Refusal.HEAD_TOO_LARGE)

    def on_headers_complete(self) -> None:
        self._head_bytes = 0
        self._check_head()
        self._is_websocket_request = (
            self._offers_websocket() and self.config.ws_protocol_class is not None
        )
        self._ignores_offer = self.parser.should_upgrade() and not self._is_websocket_request
        if self._ignores_offer:
            return  # see `_parse_without_offer`
        super().on_headers_complete()
        if not self._is_websocket_request:
            self._receiving_cycle = self.cycle

    def _check_head(self) -> None:
        """Enforce the rules that uvicorn and its parser do not enforce.

        Raises:
            RefusedError: the request violates one. This stops the parser.
        """
        version, method = self.parser.get_http_version(), self.parser.get_method()
        if version not in ("1.0", "1.1"):
            status = HTTPStatus.HTTP_VERSION_NOT_SUPPORTED
            raise RefusedError(Refusal.INVALID_REQUEST, "HTTP version not supported", status)
        # llhttp accepts several spaces as one, other line terminators before the request line, and
        # names of other protocols (RFC 9112 section 3).
        if self._framing.line != b"%b %b HTTP/%b\r\n" % (method, self.url, version.encode()):
            raise RefusedError(Refusal.INVALID_REQUEST)
        hosts = [value for name, value in self.headers if name == b"host"]
        if len(hosts) > 1 or (not hosts and version != "1.0"):  # RFC 9112 section 3.2
            raise RefusedError(Refusal.INVALID_REQUEST)
        if hosts and not HOST.fullmatch(hosts[0]):
            raise RefusedError(Refusal.INVALID_REQUEST)
        # CONNECT addresses a proxy and `*` the server as a whole. The relay supports neither.
        # Clients must not send fragments.
        if method == b"CONNECT" or self.url == b"*" or b"#" in self.url:
            raise RefusedError(Refusal.INVALID_REQUEST)
        # After an upgrade the bytes are frames, where a proxy in front of the relay sees a body.
        if self._set_body_framing(version) and self._offers_websocket():
            raise RefusedError(Refusal.INVALID_REQUEST)
        if len(self.pipeline) >= MAX_PIPELINED:
            status = HTTPStatus.TOO_MANY_REQUESTS
            raise RefusedError(Refusal.INVALID_REQUEST, "too many pipelined requests", status)

    def _set_body_framing(self, version: str) -> bool:
        """Determine the framing of the body; return whether there is a body.

        Raises:
            RefusedError: the framing is invalid or not supported (RFC 9112 sections 6.1 and 6.3).
        """
        length, codings = 0, []
        for name, value in self.headers:
            if name == b"content-length":
                length = int(value)
            elif name == b"transfer-encoding":
                codings += value.lower().split(b",")
        if codings == [b"chunked"] and version == "1.1":
            self._framing.expect_chunks()
        elif codings:
            *others, last = (coding.strip() for coding in codings)
            if last == b"chunked" and any(others) and version == "1.1":
                status = HTTPStatus.NOT_IMPLEMENTED
                raise RefusedError(Refusal.INVALID_REQUEST, "transfer coding not supported", status)
            raise RefusedError(Refusal.INVALID_REQUEST)
        elif length:
            self._framing.expect_content(length)
        return bool(codings or length)

    def _offers_websocket(self) -> bool:
        # uvicorn uses only the last line of each field. Both are lists and may have several lines.
        return (
            self.parser.should_upgrade()
            and b"upgrade" in self._tokens(b"connection")
            and b"websocket" in self._tokens(b"upgrade")
        )

    def _tokens(self, field: bytes) -> set[bytes]:
        """Return the members of a list field in lower case (RFC 9110 section 5.6.1)."""
        return {
            token.strip().lower()
            for name, value in self.headers
            if name == field
            for token in value.split(b",")
        }

    def _should_upgrade(self) -> bool:
        return self._is_websocket_request

    def on_body(self, body: bytes) -> None:
        self._head_bytes = 0
        super().on_body(body)

    def on_message_complete(self) -> None:
        self._head_bytes = 0
        if self._ignores_offer:
            return
        self._receiving_cycle = None
        self._framing.expect_request()
        super().on_message_complete()
        if not self._is_websocket_request:
            self._cancel_deadline_timer()
            self._uses_safe_methods &= self.scope["method"] in SAFE_METHODS
            self._update_idle_state()

    def _between_requests(self) -> bool:
        return self.cycle is None or self.cycle.response_complete

    def _update_idle_state(self) -> None:
        awaits_request = self._between_requests()
        self._uses_safe_methods |= awaits_request
        if (
            awaits_request
            or self._receiving_cycle is not None
            or self.flow.write_paused
            or self.transport.is_closing()
        ):
            self._http_connections.mark_idle(self)
        else:
            self._http_connections.mark_busy(self, is_safe=self._uses_safe_methods)

    def evict(self, error: RefusedError) -> None:
        """End the connection in favour of another one.

        An idle connection closes without a response, as it may at any time (RFC 9112 section 9.5).
        So does a connection without a first request, during shutdown or if it is refused already:
        nginx 1.22 treats a response that arrives before it has sent the request as part of the next
        relay's response. TLS connections are aborted, because TLS shutdown waits for the peer.
        """
        closes_at_once = self.scheme == "http" and not self.transport.get_write_buffer_size()
        is_unused = not self._head_bytes and self._receiving_cycle is self._responding_cycle is None
        if (
            self.transport.is_closing()
            or self._is_idle()
            or (is_unused and (error.why is Refusal.DRAINING or self._refusal))
        ):
            self._http_connections.evictions += 1
            (self.transport.close if closes_at_once else self.transport.abort)()
        elif closes_at_once:
            self._refuse(error)
        else:
            self._context.refusals.record(error)
            self.transport.abort()

    def _is_idle(self) -> bool:
        return (
            self.cycle is not None and self.cycle.response_complete and self._deadline_timer is None
        )

    def delimit_body_by_close(self) -> None:
        """Delimit the body of the next response by the connection's end (RFC 9112 section 6.3)."""
        if self._responding_cycle is not None:
            self._responding_cycle.chunked_encoding = False

    @property
    def is_disconnected(self) -> bool:
        """Whether the client can no longer receive a response."""
        return self.transport.is_closing()

    async def drain_responses(self) -> None:
        """Wait until the responses to earlier requests are written to the socket."""
        await self.flow.drain()

    def detach_transport(self) -> asyncio.Transport | None:
        """Detach the transport from HTTP after the head of the current response.

        Returns:
            The transport; None if the client has disconnected.
        """
        cycle, transport = self._responding_cycle, self.transport
        if transport.is_closing():  # uvicorn notices only at connection_lost
            self._mark_disconnected()
        if cycle is None or cycle.disconnected:
            return None
        cycle.response_complete = cycle.disconnected = True
        self.flow.resume_reading()  # a body or a pipelined request may have paused it
        self._unparsed = b""
        self._resume_reading()
        self.connections.discard(self)
        self._http_connections.unregister(self)
        self._cancel_deadline_timer()
        self._cancel_drain_timer()
        self._unset_keepalive_if_required()
        self.pipeline.clear()
        self.parser = self.cycle = None  # type: ignore[assignment]  # break cycles
        self._receiving_cycle = self._responding_cycle = None
        return transport

    def _upgrade(self, trailing: bytes) -> None:
        """Pass the transport to a WebSocket protocol, and the request to the application."""
        if not self._between_requests() or self.flow.write_paused:
            # Pipelined: earlier responses would mix with the frames, or are not read yet. A
            # transport that is already paused would not report that the WebSocket has a backlog.
            detail = "pipelined after a request without a response"
            self._refuse(RefusedError(Refusal.INVALID_HANDSHAKE, detail))
            return
        try:
            scope = self._scope()
        except httptools.HttpParserInvalidURLError:
            self._refuse(RefusedError(Refusal.INVALID_REQUEST))
            return
        method, version = self.scope["method"], self.parser.get_http_version()
        self._resume_reading()  # before the WebSocket connection pauses it
        self.connections.discard(self)
        self._http_connections.unregister(self)
        self._cancel_deadline_timer()
        self._cancel_drain_timer()
        websocket = cast(Callable[..., Connection], self.ws_protocol_class)(
            self.config, self.server_state, self.app_state, self.loop
        )
        websocket.connection_made(self.transport)
        self.transport.set_protocol(websocket)
        self.parser = None  # type: ignore[assignment]  # breaks a reference cycle
        websocket.start_deadline(self._deadline_at - self.loop.time())
        websocket.data_received(trailing)
        handshake = Handshake(websocket, self._context, self._http_connections)
        try:
            result = validate_handshake(
                method, version, self.headers, compresses=self._context.compresses
            )
        except RefusedError as error:
            handshake.refuse(error)
            return
        scope["subprotocols"] = result.subprotocols
        task = self.loop.create_task(handshake.run(self.app, scope, result))
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
        }

    def _on_deadline(self) -> None:
        self._deadline_timer = None
        if not self.transport.is_closing():
            self._refuse(RefusedError(Refusal.HANDSHAKE_TIMEOUT))

    def _refuse(self, error: RefusedError) -> None:
        self._respond_and_close(self._context.refusals.respond(error))

    def _respond_and_close(self, response: bytes) -> None:
        self._cancel_deadline_timer()
        if self._can_respond():
            self.transport.write(response)
        self._mark_disconnected()
        self.pipeline.clear()
        self.transport.close()
        self._start_drain_timer()
        self._update_idle_state()

    def _can_respond(self) -> bool:
        """Return whether the client would treat a response as the response to its request.

        It would not within another response. A request with an invalid body may have its response
        already: a proxy would treat a second one as the response to its next request.
        """
        responding, receiving = self._responding_cycle, self._receiving_cycle
        if responding and responding.response_started and not responding.response_complete:
            return False
        return receiving is None or not receiving.response_started

    def _cancel_deadline_timer(self) -> None:
        if self._deadline_timer is not None:
            self._deadline_timer.cancel()
            self._deadline_timer = None


def _refusal_of(error: httptools.HttpParserError) -> RefusedError:
    # No local variable of data_received may refer to a callback's exception. The traceback
    # references that frame: the cycle would keep the request until garbage collection.
    cause = error.__context__
    return cause if isinstance(cause, RefusedError) else RefusedError(Refusal.INVALID_REQUEST)
