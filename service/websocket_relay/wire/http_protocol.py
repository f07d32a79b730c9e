"""Own one HTTP/1.1 connection: heads under a deadline, one request after another, upgrades.

Takes the place of uvicorn's HTTP protocol (its setting `http`). Knows no WebSocket frame and no
channel.
"""

import asyncio
import select
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager
from functools import partial
from time import perf_counter
from typing import Any, Protocol, cast

from websocket_relay.identity import user_of_certificate
from websocket_relay.outcomes import Refusal, RefusedError
from websocket_relay.wire.asgi import Scope, start_now
from websocket_relay.wire.connection import Connection
from websocket_relay.wire.context import ConnectionContext
from websocket_relay.wire.handshake import Handshake, validate_handshake
from websocket_relay.wire.http_connections import HttpConnections
from websocket_relay.wire.http_exchange import HttpExchange, ObserveRequest
from websocket_relay.wire.request_body import RequestBody
from websocket_relay.wire.request_head import (
    HEAD_END,
    MAX_HEAD_BYTES,
    RequestHead,
    check_partial_head,
    check_request_line,
    parse_head,
    skip_empty_lines,
)
from websocket_relay.wire.sockets import peer_of
from websocket_relay.wire.time_slicer import SLICE_S
from websocket_relay.wire.tls_transport import CERTIFICATE
from websocket_relay.wire.websocket import WebSocket

CONNECTION_KEY = "relay.connection"
"""The key of the HttpProtocol in the ASGI scope of its requests."""

PEER_KEY = "relay.peer"
"""The key of a pair: the address of the peer, which may be a proxy, and the user that its
certificate names; empty: it names none."""

ASGI_VERSIONS = {"version": "3.0", "spec_version": "2.4"}


class ServerConfig(Protocol):
    """The part of `uvicorn.Config` that a connection uses."""

    loaded_app: Any
    timeout_keep_alive: int
    root_path: str


class ServerState(Protocol):
    """What the connections of one port share; uvicorn passes an object of its own.

    Attributes:
        connections: the HTTP connections.
        tasks: of the requests in progress.
        default_headers: of all responses.
    """

    connections: set[Any]
    tasks: set[asyncio.Task[None]]
    default_headers: list[tuple[bytes, bytes]]


class HttpProtocol(asyncio.Protocol):
    """An HTTP connection, until its end or its upgrade.

    Args:
        config, server_state, app_state, _loop: uvicorn's arguments of an HTTP protocol.
        shared: shared limits and counters.
        plain: the HTTP connections of the port.
        accepts_upgrades: whether WebSockets are served; an offer of one is ignored otherwise.
        observe: called with each request and its response; None: they are not measured.

    Attributes:
        peer: the address of the client, in place of that of the connection if it is set before.
    """

    def __init__(
        self,
        config: ServerConfig,
        server_state: ServerState,
        app_state: object = None,
        _loop: object = None,
        *,
        shared: ConnectionContext,
        plain: HttpConnections,
        accepts_upgrades: bool = False,
        observe: ObserveRequest | None = None,
    ) -> None:
        # With TLS this object is created at TCP accept. connection_made follows after the TLS
        # handshake, or never if the handshake fails.
        self._config = config
        self._state = server_state
        self._context = shared
        self._http_connections = plain
        self._accepts_upgrades = accepts_upgrades
        self._observe = observe
        self._loop = asyncio.get_running_loop()
        self.peer: tuple[str, int] | None = None
        self._subject: str | None = None  # the user of the peer's certificate; None: not read yet
        self._transport: asyncio.Transport
        self._refusal = b""  # the response to the first request, if it is refused already
        # Reading
        self._partial_head = b""
        self._empty_bytes = 0  # of empty lines before the head
        self._body: RequestBody | None = None  # that is arriving
        self._unparsed = b""  # received, not parsed yet
        self._is_parsing_queued = False
        self._is_paused = False
        # The current request, until its response is written and it has arrived as a whole
        self._exchange: HttpExchange | None = None
        self._has_served = False
        self._keeps_alive = True
        # Writing
        self._drained: asyncio.Event | None = None  # while the client reads too slowly
        # Timers. The first deadline includes the TLS handshake.
        self._deadline_at = self._loop.time() + shared.deadline_s
        self._deadline_timer: asyncio.TimerHandle | None = None
        self._keep_alive_timer: asyncio.TimerHandle | None = None
        self._drain_timer: asyncio.TimerHandle | None = None

    # The connection

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Register the connection; the first request has to arrive before the deadline."""
        self._transport = cast(asyncio.Transport, transport)
        self._state.connections.add(self)
        self._deadline_timer = self._loop.call_at(self._deadline_at, self._on_deadline)
        error = self._http_connections.register(self)
        if error is not None:
            self._refusal = self._context.refusals.respond(error)
            if not self._http_connections.keep_refused(self, error):
                self._respond_and_close(self._refusal)

    def connection_lost(self, exc: Exception | None) -> None:
        """Release everything."""
        self._leave()
        if self._exchange is not None:
            self._exchange.disconnect()
            self._exchange = None
        self._wake_writer()

    def _leave(self) -> None:
        """Stop to be one of the HTTP connections of the port."""
        self._state.connections.discard(self)
        self._http_connections.unregister(self)
        self._cancel_deadline()
        self._cancel_keep_alive()
        self._cancel_drain()
        self._unparsed = b""
        self._body = None

    def shutdown(self) -> None:
        """Close the connection, after its response if there is one in progress."""
        self._keeps_alive = False
        if self._exchange is None:
            self._transport.close()
        else:
            self._exchange.keeps_alive = False

    def abort(self) -> None:
        """End the connection at once."""
        self._transport.abort()

    # Reading

    def data_received(self, data: bytes) -> None:
        """Parse until all is parsed, a response has to be awaited, or a slice of time is over."""
        if self._refusal:
            self._respond_and_close(self._refusal)  # not before a request arrives: see `evict`
            return
        if self._unparsed:
            self._unparsed += data
            return
        self._cancel_keep_alive()
        start, until = 0, perf_counter() + SLICE_S
        try:
            while start < len(data) and self._may_parse:
                if self._body is not None:
                    start = self._parse_body(self._body, data, start)
                else:
                    head, start = self._read_head(data, start)
                    if head is None:
                        break
                    if self._accepts_upgrades and head.offers_websocket:
                        self._upgrade(head, data[start:])
                        return
                    self._start_exchange(head)
                if perf_counter() > until:  # many tiny chunks take long
                    break
            self._keep(data[start:])
        except RefusedError as error:
            self.refuse(error)

    def _keep(self, rest: bytes) -> None:
        """Keep what is not parsed yet.

        Raises:
            RefusedError: it can't be the next request. The body before it may be longer than its
                Content-Length: nothing is made of its beginning.
        """
        self._unparsed = rest
        self._update_reading()
        if rest and self._may_parse:
            self._queue_parsing()
        elif rest and self._exchange is not None and self._exchange.keeps_alive:
            check_request_line(rest, skip_empty_lines(rest, 0))

    def _queue_parsing(self) -> None:
        if not self._is_parsing_queued:
            self._is_parsing_queued = True
            self._context.parse_slicer.schedule_work(self._parse_rest())

    def _parse_rest(self) -> Iterator[None]:
        """Parse the unparsed bytes, one slice of time a step."""
        try:
            while self._unparsed and self._may_parse:
                data, self._unparsed = self._unparsed, b""
                self.data_received(data)
                yield
        except Exception:  # as uvloop does if data_received raises
            self._transport.abort()
            raise
        finally:
            self._is_parsing_queued = False

    @property
    def _may_parse(self) -> bool:
        """Whether a body or the next request may be parsed: requests are served one by one."""
        if self._transport.is_closing():
            return False
        return self._body is not None or (self._exchange is None and self._drained is None)

    def _read_head(self, data: bytes, start: int) -> tuple[RequestHead | None, int]:
        """Read a head, or keep the part of it that has arrived.

        Returns:
            The head, None if it is not complete; and the offset in `data` after it.
        """
        checked = len(self._partial_head)
        moved_by = 0
        if checked:
            data, moved_by = self._partial_head + data[start:], start - checked
            start = 0
        if data.startswith(b"\r\n", start):
            line_at = skip_empty_lines(data, start)
            self._empty_bytes += line_at - start
            if self._empty_bytes > MAX_HEAD_BYTES:
                raise RefusedError(Refusal.HEAD_TOO_LARGE)
            start, checked = line_at, 0
        end = data.find(HEAD_END, start + max(0, checked - len(HEAD_END) + 1))
        if end < 0:
            self._partial_head = data[start:]
            check_partial_head(self._partial_head, checked)
            if not self._partial_head:  # an empty line only
                self._continue()
            elif self._deadline_timer is None:
                self._start_deadline()
            self._update_idle_state()
            return None, moved_by + len(data)
        end += len(HEAD_END)
        self._partial_head, self._empty_bytes = b"", 0
        return parse_head(data[start:end]), moved_by + end

    def _parse_body(self, body: RequestBody, data: bytes, start: int) -> int:
        content, end = body.decode(data, start)
        assert self._exchange is not None
        self._exchange.add_body(content, is_last=body.is_complete)
        if body.is_complete:
            self._body = None
            self._cancel_deadline()
            if self._exchange.is_complete and not self._exchange.keeps_alive:
                self._transport.close()
            elif self._exchange.is_complete:
                self._finish_exchange()
            else:
                self._update_idle_state()
        return end

    def resume_body(self) -> None:
        """Read more of the body: the application has read what there was."""
        self._update_reading()

    def _update_reading(self) -> None:
        """Pause reading while what was read has to wait; TCP slows the client down."""
        exchange = self._exchange
        pauses = bool(self._unparsed) or (exchange is not None and exchange.is_reading_paused)
        if pauses != self._is_paused and not self._transport.is_closing():
            self._is_paused = pauses
            if pauses:
                self._transport.pause_reading()
            else:
                self._transport.resume_reading()

    # Requests

    def _start_exchange(self, head: RequestHead) -> None:
        exchange = self._exchange = HttpExchange(self, self._transport, head, self._observe)
        exchange.keeps_alive = exchange.keeps_alive and self._keeps_alive
        if exchange.is_received:
            self._cancel_deadline()
        else:
            self._body = RequestBody(head)
            if self._deadline_timer is None:
                self._start_deadline()
        self._update_idle_state()
        scope = self._scope("http", head)
        scope[CONNECTION_KEY] = self
        run = partial(exchange.run, self._config.loaded_app, scope)
        if self._http_connections.may_start_request():
            self._add_task(self._loop.create_task(run()))
        else:
            self._http_connections.queue_request(partial(self._start_queued, exchange, run))

    def _start_queued(
        self, exchange: HttpExchange, run: Callable[[], Coroutine[Any, Any, None]]
    ) -> None:
        if not exchange.is_disconnected:
            self._add_task(self._loop.create_task(run()))

    def _add_task(self, task: asyncio.Task[None]) -> None:
        self._state.tasks.add(task)
        task.add_done_callback(self._state.tasks.discard)

    def _scope(self, kind: str, head: RequestHead) -> Scope:
        if self.peer is None:
            self.peer = peer_of(self._transport)
        if self._subject is None:
            certificate = self._transport.get_extra_info(CERTIFICATE)
            self._subject = user_of_certificate(certificate) if certificate else ""
        is_secure = self._transport.get_extra_info("sslcontext") is not None
        scheme = "http" if kind == "http" else "ws"
        return {
            "type": kind,
            "asgi": ASGI_VERSIONS,
            "http_version": head.version,
            "scheme": f"{scheme}s" if is_secure else scheme,
            "method": head.method,
            "server": None,
            "client": self.peer,
            "root_path": self._config.root_path,
            "path": head.decoded_path,
            "raw_path": head.path,
            "query_string": head.query,
            "headers": head.headers,
            PEER_KEY: (self.peer, self._subject),
        }

    def on_exchange_complete(self) -> None:
        """Go on with the next request, once this one has arrived as a whole."""
        exchange = self._exchange
        if exchange is None:
            return
        self._has_served = True
        if not exchange.keeps_alive:
            self._cancel_deadline()
            if self._body is None:
                self._transport.close()
            else:  # closing with unread bytes would send a reset, and the response could be lost
                self._transport.write_eof()
            self._start_drain()
            self._update_idle_state()
        elif self._body is None:
            self._finish_exchange()
        else:
            self._update_reading()  # the rest of the body is discarded
            self._update_idle_state()

    def _finish_exchange(self) -> None:
        self._exchange = None
        self._update_idle_state()
        self._continue()

    def _continue(self) -> None:
        """Parse the next request, or wait for it."""
        if not self._may_parse or self._body is not None:
            return
        if self._unparsed:
            self._queue_parsing()
        elif self._keep_alive_timer is None:
            timeout_s = self._config.timeout_keep_alive
            self._keep_alive_timer = self._loop.call_later(timeout_s, self._on_keep_alive_timeout)

    def _update_idle_state(self) -> None:
        exchange = self._exchange
        if (
            exchange is None
            or exchange.is_complete
            or self._body is not None
            or self._drained is not None
            or self._transport.is_closing()
        ):
            self._http_connections.mark_idle(self)
        else:
            self._http_connections.mark_busy(self, is_safe=exchange.is_safe)

    # Writing. A client that does not read its responses must not be waited for without a limit.

    @property
    def default_lines(self) -> bytes:
        """Fields of every response, with their line ends."""
        return b"".join(b"%b: %b\r\n" % field for field in self._state.default_headers)

    async def drain(self) -> None:
        """Wait until what is written has left for the socket, or the connection ends."""
        while self._drained is not None and not self._transport.is_closing():
            await self._drained.wait()

    def pause_writing(self) -> None:
        """Record that the client reads too slowly."""
        if self._drained is None:
            self._drained = asyncio.Event()
        self._start_drain()
        self._update_idle_state()

    def resume_writing(self) -> None:
        """Go on: the client has read."""
        self._wake_writer()
        if not self._transport.is_closing():
            self._cancel_drain()
        self._update_idle_state()
        self._continue()

    def _wake_writer(self) -> None:
        if self._drained is not None:
            self._drained.set()
            self._drained = None

    # The end, and refusals

    def _start_deadline(self) -> None:
        self._deadline_at = self._loop.time() + self._context.deadline_s
        self._deadline_timer = self._loop.call_at(self._deadline_at, self._on_deadline)

    def _on_deadline(self) -> None:
        self._deadline_timer = None
        if not self._transport.is_closing():
            self.refuse(RefusedError(Refusal.HANDSHAKE_TIMEOUT))

    def _on_keep_alive_timeout(self) -> None:
        self._keep_alive_timer = None
        if self.is_request_arriving():
            self._continue()
        elif self._exchange is None and not self._transport.is_closing():
            self._transport.close()
            self._start_drain()

    def is_request_arriving(self) -> bool:
        """Return whether an idle connection has bytes that are not read or not parsed yet.

        A pipelined request may wait for its slice of time. A request may also wait in the socket:
        libuv runs timers before it reads, and in a busy loop it may have arrived long before.
        """
        if self._transport.is_closing() or not self._is_idle:
            return False
        if self._unparsed:
            return True
        readable = select.poll()
        readable.register(self._transport.get_extra_info("socket"), select.POLLIN)
        return bool(readable.poll(0))

    @property
    def _is_idle(self) -> bool:
        return self._has_served and self._exchange is None and not self._partial_head

    def evict(self, error: RefusedError) -> None:
        """End the connection in favour of another one.

        An idle connection closes without a response, as it may at any time (RFC 9112 section 9.5).
        So does a connection without a first request, during shutdown or if it is refused already:
        nginx 1.22 treats a response that arrives before it has sent the request as part of the next
        relay's response.
        """
        transport = self._transport
        closes_at_once = not transport.get_write_buffer_size()
        is_unused = not self._partial_head and self._exchange is None
        if (
            transport.is_closing()
            or self._is_idle
            or (is_unused and (error.why is Refusal.DRAINING or self._refusal))
        ):
            self._http_connections.evictions += 1
            (transport.close if closes_at_once else transport.abort)()
        elif closes_at_once:
            self.refuse(error)
        else:
            self._context.refusals.record(error)
            transport.abort()

    def refuse(self, error: RefusedError) -> None:
        """End the connection, with a response where one can be sent."""
        self._respond_and_close(self._context.refusals.respond(error))

    def _respond_and_close(self, response: bytes) -> None:
        """End the connection, with a response if the client takes it as that to its request.

        It would not within another response. A request with an invalid body may have its response
        already: a proxy would treat a second one as the response to its next request.
        """
        self._cancel_deadline()
        self._cancel_keep_alive()
        is_due = self._exchange is None or not self._exchange.has_started
        if is_due and not self._transport.is_closing():
            self._transport.write(response)
        if self._exchange is not None:
            self._exchange.disconnect()
        self._unparsed = b""
        self._transport.close()
        self._start_drain()
        self._update_idle_state()

    def _cancel_deadline(self) -> None:
        if self._deadline_timer is not None:
            self._deadline_timer.cancel()
            self._deadline_timer = None

    def _cancel_keep_alive(self) -> None:
        if self._keep_alive_timer is not None:
            self._keep_alive_timer.cancel()
            self._keep_alive_timer = None

    def _start_drain(self) -> None:
        self._cancel_drain()
        timeout_s = self._context.deadline_s
        self._drain_timer = self._loop.call_later(timeout_s, self._transport.abort)

    def _cancel_drain(self) -> None:
        if self._drain_timer is not None:
            self._drain_timer.cancel()
            self._drain_timer = None

    @contextmanager
    def cancelled_when_lost(self) -> Iterator[None]:
        """Cancel the current task, which is that of the request, if the client disconnects."""
        exchange, task = self._exchange, asyncio.current_task()
        if exchange is None or task is None:  # it has disconnected already
            yield
            return
        exchange.on_lost = task.cancel
        try:
            yield
        finally:
            exchange.on_lost = None

    # Leaving HTTP

    def delimit_body_by_close(self) -> None:
        """Delimit the body of the current response by the connection's end."""
        if self._exchange is not None:
            self._exchange.delimits_by_close = True

    @property
    def is_disconnected(self) -> bool:
        """Whether the client can no longer receive a response."""
        return self._transport.is_closing()

    def detach_transport(self) -> asyncio.Transport | None:
        """Detach the transport from HTTP after the head of the current response.

        Returns:
            The transport; None if the client has disconnected.
        """
        exchange, transport = self._exchange, self._transport
        if exchange is None or exchange.is_disconnected or transport.is_closing():
            return None
        exchange.flush_head()
        exchange.is_complete = True
        self._leave()
        self._exchange = None
        self._update_reading()
        return transport

    def _upgrade(self, head: RequestHead, trailing: bytes) -> None:
        """Pass the transport to a WebSocket, and the request to the application.

        Raises:
            RefusedError: there is a body. These bytes are frames then, where a proxy sees a body.
        """
        if head.has_body:
            raise RefusedError(Refusal.INVALID_REQUEST)
        deadline_s = self._context.deadline_s
        if self._deadline_timer is not None:  # the first request's, from TCP accept
            deadline_s = self._deadline_at - self._loop.time()
        self._leave()
        self._update_reading()
        connection = Connection(self._context, WebSocket)
        connection.connection_made(self._transport)
        self._transport.set_protocol(connection)
        if trailing:
            connection.data_received(trailing)
        handshake = Handshake(connection, self._context, self._http_connections)
        try:
            result = validate_handshake(head, compresses=self._context.compresses)
        except RefusedError as error:
            handshake.refuse(error)
            return
        scope = self._scope("websocket", head)
        scope["subprotocols"] = result.subprotocols
        task = start_now(handshake.run(self._config.loaded_app, scope, result))
        if task is not None:
            self._add_task(task)
            connection.start_deadline(deadline_s)
            connection.when_lost(task.cancel)
