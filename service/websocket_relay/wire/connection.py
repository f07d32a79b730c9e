"""Own one client's connection: its writes, its backlog, its end. Knows no protocol.

What differs between WebSockets and event streams is in a `WireProtocol` that each connection has.
When a connection closes, and how, is in the table of `close_states`, for both.
"""

import asyncio
import logging
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Protocol, cast

from websocket_relay.identity import ClientIdentity
from websocket_relay.messages import Message, Pausable, Publisher
from websocket_relay.outcomes import Close, Drop, Refusal, RefusedError
from websocket_relay.wire.close_states import (
    TRANSITIONS,
    CloseAction,
    ConnectionEvent,
    ConnectionState,
)
from websocket_relay.wire.context import ConnectionContext
from websocket_relay.wire.delivery_format import PLAIN_FORMAT, DeliveryFormat
from websocket_relay.wire.publish_policy import PublishPolicy
from websocket_relay.wire.send_backlog import SendBacklog
from websocket_relay.wire.sockets import socket_of
from websocket_relay.wire.tls_transport import RECORD_BYTES, TlsTransport

log = logging.getLogger(__name__)

CHUNK_BYTES = 65_536
"""How much of a backlog a transport is given at a time; with TLS a record."""


class WireProtocol(Publisher, Pausable, Protocol):
    """A protocol of one connection. It is the publisher of the client's messages, too."""

    @property
    def has_unparsed(self) -> bool:
        """Whether bytes were read from the client that are not parsed yet."""

    @property
    def has_closing_handshake(self) -> bool:
        """Whether a client answers a close."""

    def data_received(self, data: bytes) -> None:
        """Process bytes from the client."""

    def start_parsing(self, sink: "MessageSink") -> None:
        """Pass the client's messages to a sink from now on."""

    def stop_parsing(self) -> None:
        """Parse nothing more."""

    def encode_close(self, code: int, reason: str, retry_ms: int | None) -> bytes:
        """Return what closes the connection on the wire.

        Args:
            code: the close code.
            reason: 123 bytes at most.
            retry_ms: after which time the client should reconnect, as the reason has it; None: no
                hint.
        """

    def count_complete_messages(self, batch: bytes, end: int) -> int:
        """Return how many messages end within the first `end` bytes of a batch."""

    def ping(self, frame: bytes, heartbeat: bytes, now: float) -> None:
        """Send a keepalive.

        Args:
            frame: a ping, for a protocol that has frames.
            heartbeat: a notice for a client of relay.v1: a script in a browser does not see pings.
            now: the time of the event loop.
        """

    def is_ping_overdue(self, since: float) -> bool:
        """Return whether a ping sent at `since` or before is still unanswered."""


class Sender(Protocol):
    """A socket, or TLS on one, that is written to while nothing waits in its transport.

    The transport's own write takes a third longer: it buffers first.
    """

    def send(self, data: bytes, /) -> int:
        """Send as much as the socket takes; return how many bytes that are."""

    def detach(self) -> object:
        """Forget the descriptor, which its transport closes."""


class MessageSink(Protocol):
    """Receives a connection's messages and state changes. Never blocks."""

    def publish(self, publisher: WireProtocol, messages: Sequence[Message]) -> None:
        """Publish complete messages of a client.

        Raises:
            ProtocolViolationError: a message violates the protocol; those before it are published.
        """

    def pause_if_over_limit(self, publisher: WireProtocol) -> None:
        """Pause a client that has more to publish, if too much waits to be written."""

    def detach_connection(self, client: "Connection") -> None:
        """Stop writing to the client. Called once; it may still publish what it sent before."""

    def on_backlog_started(self, client: "Connection") -> None:
        """Record that the client's socket is full: the connection lags."""

    def on_backlog_drained(self, client: "Connection") -> None:
        """Record that the client's backlog is empty."""

    def call_when_written(self, callback: Callable[[], None]) -> None:
        """Call `callback` once everything published so far has been written."""

    @property
    def channel_names(self) -> Sequence[str]:
        """The channels that the client is subscribed to."""


class _ClosedTransport(asyncio.Transport):
    """Replaces a transport that has closed. Each call does nothing and never fails."""

    def is_closing(self) -> bool:
        return True

    def get_write_buffer_size(self) -> int:
        return 0

    def write(self, data: bytes | bytearray | memoryview) -> None:
        pass

    def abort(self) -> None:
        pass

    def close(self) -> None:
        pass

    def write_eof(self) -> None:
        pass

    def pause_reading(self) -> None:
        pass

    def resume_reading(self) -> None:
        pass


CLOSED_TRANSPORT = _ClosedTransport()


class Connection(asyncio.Protocol):
    """One client's connection, from the upgrade on: a member of a channel, and what it is sent.

    Args:
        shared: bounds and counters.
        protocol: creates the protocol of the connection.

    Attributes:
        state: see `close_states`.
        transport: the transport; one that does nothing once TCP has ended.
        protocol: what the client speaks.
        delivery_format: how its messages are encoded.
        publish_policy: what the client may publish; None: anything.
        identity: who the client is; None: neither presence nor the server API is configured.
        has_input_ended: whether nothing more is read: after TCP's FIN or TLS's close_notify, or
            after the end of TCP.
        write: sends a batch as far as the socket takes it, and returns how many bytes that are:
            the socket's own send. None while the connection lags, and once it has left its sink:
            `queue_or_drop` then.
    """

    __slots__ = (
        "_backlog",
        "_close_code",
        "_close_frame",
        "_close_reason",
        "_deadline_timer",
        "_expiry_timer",
        "_is_member",
        "_on_lost",
        "_sink",
        "_socket",
        "data_received",
        "delivery_format",
        "has_input_ended",
        "identity",
        "protocol",
        "publish_policy",
        "shared",
        "state",
        "transport",
        "write",
    )

    # The protocol's own: one call less for each read.
    data_received: Callable[[bytes], None]  # type: ignore[assignment]
    write: Callable[[bytes], int] | None

    def __init__(
        self, shared: ConnectionContext, protocol: "Callable[[Connection], WireProtocol]"
    ) -> None:
        self.shared = shared
        self.state = ConnectionState.HANDSHAKE
        self.transport: asyncio.Transport
        self._sink: MessageSink | None = None
        self._is_member = False  # of the sink, which writes to the client
        self._backlog: SendBacklog | None = None
        self.has_input_ended = False
        self._deadline_timer: asyncio.TimerHandle | None = None
        self._close_reason: Close | None = None  # the first one counts
        self._close_code = 0  # if it is not that of the reason
        self._close_frame = b""
        self._expiry_timer: asyncio.TimerHandle | None = None
        self._on_lost: Callable[[], object] | None = None
        self.delivery_format = PLAIN_FORMAT
        self.publish_policy: PublishPolicy | None = None
        self.identity: ClientIdentity | None = None
        self._socket: Sender | None = None
        self.write = None
        self.protocol = protocol(self)
        self.data_received = self.protocol.data_received

    # Handshake

    @property
    def in_handshake(self) -> bool:
        """Whether the upgrade is neither accepted nor refused yet."""
        return self.state is ConnectionState.HANDSHAKE

    @property
    def has_sink(self) -> bool:
        """Whether the connection has a sink."""
        return self._sink is not None

    @property
    def is_open(self) -> bool:
        """Whether the connection is neither closed nor closing."""
        return self.state is ConnectionState.OPEN

    @property
    def is_member(self) -> bool:
        """Whether the connection's sink may write to it."""
        return self._is_member

    @property
    def channel_names(self) -> Sequence[str]:
        """The channels that the client is subscribed to."""
        return self._sink.channel_names if self._is_member and self._sink is not None else ()

    @property
    def close_reason(self) -> Close | None:
        """Why the connection ends, or has ended; None: it does not."""
        return self._close_reason

    @property
    def close_code(self) -> int:
        """The close code that the client, or the relay, has sent first; 0: none yet."""
        return self._close_code or (self._close_reason.code if self._close_reason else 0)

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Take over the transport from the HTTP side."""
        self.transport = cast(asyncio.Transport, transport)

    def open(self, response: bytes, delivery_format: DeliveryFormat) -> None:
        """Send the response head, and register the connection as established.

        Args:
            response: the whole response head.
            delivery_format: how messages are encoded for the client.
        """
        shared = self.shared
        self.delivery_format = delivery_format
        self._on_lost = None
        self._cancel_deadline()
        shared.clients.register(self)
        shared.counters.connections += 1
        self._handle(ConnectionEvent.ACCEPT)
        transport = self.transport
        # With a high-water mark of 0, the transport calls pause_writing in each write that it can't
        # complete; see SendBacklog. With uvloop, write() then also writes at once rather than at
        # the end of the loop iteration, so that nothing overtakes what it was given.
        transport.set_write_buffer_limits(high=0, low=0)
        transport.write(response)
        if isinstance(transport, TlsTransport):
            transport.attach()
            self._socket = transport
        else:
            self._socket = socket_of(transport)

    def reject_upgrade(self, response: bytes) -> None:
        """Answer the upgrade with an HTTP response and close the connection."""
        if self.state is ConnectionState.HANDSHAKE:
            self.protocol.stop_parsing()
            self.transport.write(response)
            self._handle(ConnectionEvent.REFUSE)

    def attach_sink(self, sink: MessageSink) -> None:
        """Attach a sink, which writes to the client from now on; publish what has arrived."""
        self._sink = sink
        self._is_member = True
        if self._backlog is None:
            self._send_directly()
        else:
            sink.on_backlog_started(self)
        self.protocol.start_parsing(sink)

    def start_expiry_timer(self, seconds: float | None) -> None:
        """Close the connection after `seconds` (code 3000), unless it has closed by then.

        Args:
            seconds: from now; None: never. It replaces the time before.
        """
        if self._expiry_timer is not None:
            self._expiry_timer.cancel()
            self._expiry_timer = None
        if seconds is None:
            return
        # uvloop rounds to milliseconds: one more, so that the timer never fires early.
        self._expiry_timer = asyncio.get_running_loop().call_later(
            seconds + 0.001, self.queue_close, Close.TOKEN_EXPIRED
        )

    def when_lost(self, callback: Callable[[], object]) -> None:
        """Call `callback` once, when the TCP connection has ended.

        It replaces the one before, as does the end of the handshake.
        """
        self._on_lost = callback

    def start_deadline(self, seconds: float) -> None:
        """End the connection unless it makes progress within `seconds`."""
        self._cancel_deadline()
        self._deadline_timer = asyncio.get_running_loop().call_later(seconds, self._on_deadline)

    # The end

    def close(self, why: Close, retry_ms: int | None = None, *, when_written: bool = False) -> None:
        """Close the connection; its client has `deadline_s` to answer.

        Messages that the client sends until it answers are still relayed. If a close frame is
        queued already, that one is sent now instead.

        Args:
            why: the close code and the metric label.
            retry_ms: after which time the client should reconnect; None: no hint.
            when_written: once everything published for the client so far is written; False: now.
        """
        if when_written:
            if self._sink is not None and self.state is ConnectionState.OPEN:
                self._sink.call_when_written(partial(self.close, why, retry_ms))
            return
        if self.state is ConnectionState.OPEN:
            self._close_frame = self._encode_close(why, retry_ms)
        self._handle(ConnectionEvent.CLOSE, why)
        if self.state is ConnectionState.CLOSING and not self.protocol.has_closing_handshake:
            self._handle(ConnectionEvent.QUEUE_CLOSE)

    def queue_close(self, why: Close, frame: bytes = b"", code: int = 0) -> None:
        """Stop parsing, and close after all pending deliveries.

        Args:
            why: the close reason that is counted, unless there is one already.
            frame: what closes the connection on the wire; empty: the encoding of `why`.
            code: the close code; 0: that of `why`.
        """
        if self._close_reason is None:
            self._close_code = code
        if self.state is ConnectionState.OPEN:
            self._close_frame = frame or self._encode_close(why, None)
        self._handle(ConnectionEvent.QUEUE_CLOSE, why)

    def disconnect(self, code: int, reason: str) -> bool:
        """Close with a code and a reason of an operator, after all pending deliveries.

        Of a connection that is closing already, nothing more is published.

        Returns:
            Whether the connection was open.
        """
        is_open = self.is_open
        self.queue_close(Close.DISCONNECTED, self.protocol.encode_close(code, reason, None), code)
        return is_open

    def _encode_close(self, why: Close, retry_ms: int | None) -> bytes:
        return self.protocol.encode_close(why.code, why.text(retry_ms), retry_ms)

    def abort(self, why: Close) -> None:
        """End the TCP connection now; its backlog is dropped and counted."""
        self._handle(ConnectionEvent.ABORT, why)

    def abort_slow_consumer(self) -> None:
        """Abort the connection, so that the memory of its backlog is freed."""
        self.abort(Close.SLOW_CONSUMER)

    def close_after_write_error(self) -> None:
        """Close the connection: a write to it raised."""
        try:
            self.close(Close.INTERNAL_ERROR)
        except Exception:
            log.exception("write failed")
            self.abort(Close.INTERNAL_ERROR)

    def eof_received(self) -> bool:
        """Close after the client's EOF: an abnormal closure, if no close frame came before it.

        Returns:
            Whether the connection stays open to send the client's backlog.
        """
        self.has_input_ended = True
        if self.state is ConnectionState.CLOSE_PENDING:
            return True
        self._handle(ConnectionEvent.EOF)
        if not self.protocol.has_unparsed:
            self.on_input_parsed()
        return self._backlog is not None

    def connection_lost(self, exc: Exception | None) -> None:
        """Release the backlog and count it. Called once and last, in every case.

        Bytes that were read before are parsed all the same. Until then the connection counts as
        established: a client that sends and disconnects must not bypass the limits.
        """
        if self._socket is not None:
            self._socket.detach()
            self._socket = None
        # Batches may refer to this object for a while, which must not keep TLS's buffers in memory.
        self.transport = CLOSED_TRANSPORT
        self.has_input_ended = True
        self._cancel_deadline()
        self._handle(ConnectionEvent.DISCONNECT)
        if self._backlog is not None:
            # How much was sent before the loss is unknown: what was not seen to leave is a drop.
            self._discard_backlog(self._backlog, sys.maxsize)
        if not self.protocol.has_unparsed:
            self.on_input_parsed()

    def on_input_parsed(self) -> None:
        """Close the connection: the client's side has ended, and all of its bytes are parsed."""
        self._handle(ConnectionEvent.PARSED, Close.CONNECTION_LOST)

    def ping(self, frame: bytes, heartbeat: bytes, now: float) -> None:
        """Send a keepalive, see `WireProtocol.ping`."""
        if self.state is ConnectionState.OPEN:
            self.protocol.ping(frame, heartbeat, now)

    def is_ping_overdue(self, since: float) -> bool:
        """Return whether a ping sent at `since` or before is still unanswered."""
        return self.state is ConnectionState.OPEN and self.protocol.is_ping_overdue(since)

    def _on_deadline(self) -> None:
        self._deadline_timer = None
        if self.state is ConnectionState.HANDSHAKE:
            self.shared.refusals.record(RefusedError(Refusal.HANDSHAKE_TIMEOUT))
        self._handle(ConnectionEvent.DEADLINE)

    def _handle(self, event: ConnectionEvent, why: Close | None = None) -> None:
        """Make a transition: enter the next state, then act.

        Args:
            event: what happens.
            why: the reason that is counted, unless there is one already.
        """
        if self._close_reason is None:
            is_lost = self.state is ConnectionState.LOST and event is not QUEUE_CLOSE
            self._close_reason = Close.CONNECTION_LOST if is_lost else why
        self.state, actions = TRANSITIONS[self.state, event]
        for action in actions:
            ACTIONS[action](self)

    def _leave(self) -> None:
        if self._expiry_timer is not None:
            self._expiry_timer.cancel()
            self._expiry_timer = None
        self.shared.unparsed.resume_publisher(self.protocol)
        self.write = None
        if self._is_member and self._sink is not None:
            self._is_member = False
            self._sink.detach_connection(self)

    def _stop_parsing(self) -> None:
        self.protocol.stop_parsing()

    def _send_close(self) -> None:
        self.write_control(self._close_frame)

    def _await_deliveries(self) -> None:
        assert self._sink is not None
        self._sink.call_when_written(partial(self._handle, ConnectionEvent.DELIVERED))

    def _start_close_deadline(self) -> None:
        self.start_deadline(self.shared.deadline_s)

    def _end_sending(self) -> None:
        # The server closes TCP first (RFC 6455 section 7.1.1), its sending half only: to close both
        # with unread bytes in the socket would send a reset, which can cost the client the close
        # frame. Further input is discarded until the client's FIN, or our deadline.
        if self._backlog is not None or self.transport.is_closing():
            return  # FLUSHED follows, or the end
        if self.has_input_ended:
            self.transport.close()
        else:
            self.transport.write_eof()

    def _abort_transport(self) -> None:
        if self._backlog is not None:
            self._discard_backlog(self._backlog, self.backlog_bytes)
        self.transport.abort()

    def _release(self) -> None:
        shared = self.shared
        if self._on_lost is not None:
            callback, self._on_lost = self._on_lost, None
            callback()
        if shared.clients.unregister(self):
            assert self._close_reason is not None
            shared.counters.disconnections += 1
            shared.counters.closes[self._close_reason] += 1
            log.debug("client disconnected", extra={"close": self._close_reason.label})
        self._sink = None
        # These two reference each other. Nothing calls either of them any more.
        del self.protocol, self.data_received

    def _cancel_deadline(self) -> None:
        if self._deadline_timer is not None:
            self._deadline_timer.cancel()
            self._deadline_timer = None

    # Writes and the backlog

    @property
    def is_closing(self) -> bool:
        """Whether the transport is closing: writes are lost, and `connection_lost` follows."""
        return self.transport.is_closing()

    @property
    def backlog_bytes(self) -> int:
        """Bytes that wait for the client to read."""
        buffered_bytes = self.transport.get_write_buffer_size()
        return (
            buffered_bytes if self._backlog is None else self._backlog.unsent_bytes(buffered_bytes)
        )

    @property
    def is_lagging(self) -> bool:
        """Whether a part of what was written waits for the client to read."""
        return self._backlog is not None

    @property
    def memory_bytes(self) -> int:
        """Memory of the backlog: a write that was sent in part counts whole."""
        return self._backlog.memory_bytes if self._backlog is not None else 0

    @property
    def drained_bytes(self) -> int:
        """Bytes that have left for the socket since the connection lags; 0 if it does not."""
        backlog = self._backlog
        if backlog is None:
            return 0
        return backlog.drained(self.transport.get_write_buffer_size())

    @property
    def _is_encrypted(self) -> bool:
        return isinstance(self._socket, TlsTransport)

    def pause_writing(self) -> None:
        """Start a backlog: the write in progress filled the socket.

        The author of a batch adds its bytes (`start_backlog`). Other writes are not counted: a
        control frame, the response to the upgrade, or what TLS sends of itself.
        """
        if self._backlog is not None:
            self._backlog.is_blocked = True
            return
        copy_bytes = RECORD_BYTES if self._is_encrypted else 0
        self._backlog = SendBacklog(self.protocol.count_complete_messages, copy_bytes)
        self.write = None
        if self._is_member and self._sink is not None:
            self._sink.on_backlog_started(self)
        if self.shared.newly_lagging is not None:
            self.shared.newly_lagging.append(self)
        else:
            self.shared.backlogs.add_slow_consumer(self)

    def _send_directly(self) -> None:
        """Send batches from now on: nothing waits in the transport."""
        self.write = self._socket.send if self._socket is not None else None

    def write_rest(self, data: bytes, sent_bytes: int) -> None:
        """Pass on to the transport what the socket has not taken of a batch.

        Raises:
            ConnectionError: the transport is closing.
        """
        if self.transport.is_closing():
            raise ConnectionError
        if self._backlog is not None:  # with TLS the transport has a record already
            self._backlog.first_chunk_bytes = sent_bytes
        else:
            self.transport.write(memoryview(data)[sent_bytes:])

    def start_backlog(self, data: bytes, messages: int) -> None:
        """Queue the write that filled the socket; `pause_writing` does not get its bytes."""
        assert self._backlog is not None
        self._backlog.add_blocked_write(data, messages)
        self.shared.backlogs.add_slow_consumer(self)
        if messages:
            self.shared.counters.sent_bytes += len(data)

    def resume_writing(self) -> None:
        """Give the transport the next chunk: the previous one has left for the socket."""
        backlog, transport, counters = self._backlog, self.transport, self.shared.counters
        if backlog is None or transport.is_closing():
            return
        backlog.is_blocked = False
        counters.deliveries += backlog.advance()
        chunk_bytes = RECORD_BYTES if self._is_encrypted else CHUNK_BYTES
        while chunk := backlog.next_chunk(chunk_bytes):
            transport.write(chunk)
            if backlog.is_blocked or transport.is_closing():
                return
            counters.deliveries += backlog.advance()
        self._discard_backlog(backlog, 0)
        if self._is_member and self._sink is not None:
            self._send_directly()
            self._sink.on_backlog_drained(self)
        self._handle(ConnectionEvent.FLUSHED)

    def queue_or_drop(self, batch: bytes, messages: int) -> None:
        """Queue a batch for a lagging connection; count it as dropped if the connection closes.

        Args:
            batch: whole frames or events.
            messages: number of messages in them.
        """
        shared, backlog = self.shared, self._backlog
        if self._is_member and backlog is not None:
            unsent_bytes = self.backlog_bytes
            if unsent_bytes + len(batch) <= shared.backlogs.limit_bytes:
                shared.counters.sent_bytes += len(batch)
                shared.backlogs.record_growth(backlog.add_write(batch, messages))
                return
            log.info("slow consumer closed", extra={"backlog_bytes": unsent_bytes})
            self.close(Close.SLOW_CONSUMER)
        shared.counters.drops[self._drop_reason] += messages

    def write_control(self, data: bytes) -> None:
        """Write a control frame after the backlog."""
        if not data or self.transport.is_closing():
            return
        shared = self.shared
        backlog = self._backlog
        if backlog is None:
            self.transport.write(data)
        elif (
            self.state is ConnectionState.OPEN
            and self.backlog_bytes + len(data) > shared.backlogs.limit_bytes
        ):
            self.close(Close.SLOW_CONSUMER)
        else:
            shared.backlogs.record_growth(backlog.add_write(data, 0))

    @property
    def _drop_reason(self) -> Drop:
        slow = self._close_reason is Close.SLOW_CONSUMER
        return Drop.SLOW_CONSUMER if slow else Drop.DISCONNECTED

    def _discard_backlog(self, backlog: SendBacklog, unsent: int) -> None:
        """Discard the backlog; count which of its messages were sent and which never will be."""
        delivered, dropped = backlog.count_sent_messages(unsent)
        self.shared.counters.deliveries += delivered
        self.shared.counters.drops[self._drop_reason] += dropped
        self.shared.backlogs.remove_slow_consumer(self)
        self._backlog = None


QUEUE_CLOSE = ConnectionEvent.QUEUE_CLOSE

ACTIONS: Mapping[CloseAction, Callable[[Connection], None]] = {
    CloseAction.LEAVE: Connection._leave,
    CloseAction.STOP_PARSING: Connection._stop_parsing,
    CloseAction.SEND_CLOSE: Connection._send_close,
    CloseAction.AWAIT_DELIVERIES: Connection._await_deliveries,
    CloseAction.START_DEADLINE: Connection._start_close_deadline,
    CloseAction.END_SENDING: Connection._end_sending,
    CloseAction.ABORT: Connection._abort_transport,
    CloseAction.RELEASE: Connection._release,
}
