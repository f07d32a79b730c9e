"""Own one client's connection: its writes, its backlog, its closing. Knows no protocol.

`websocket` and `sse` are the protocols: what a client is sent, and how its connection closes. The
rest is the same for both, and the channels see this class only.
"""

import asyncio
import logging
import sys
from collections.abc import Callable
from enum import Enum, auto
from typing import Protocol, cast

from websocket_relay.outcomes import Close, Drop
from websocket_relay.wire.context import ConnectionContext
from websocket_relay.wire.deflate import PLAIN
from websocket_relay.wire.send_backlog import SendBacklog

log = logging.getLogger(__name__)

CHUNK_BYTES = 65_536
"""How much of a backlog a transport is given at a time."""

TLS_RECORD_BYTES = 16_384
"""The same with TLS: the maximum payload of a record (RFC 8446 section 5.1)."""


class Publisher(Protocol):
    """A connection that publishes, as a sink sees it."""

    def pause_reading(self) -> None:
        """Stop reading until `resume_reading` was called as often."""

    def resume_reading(self) -> None:
        """Undo one `pause_reading`."""

    def fail_publish(self, *, is_unconfirmed: bool) -> None:
        """Close the connection: its message could not be relayed.

        Args:
            is_unconfirmed: whether the message may have been relayed all the same.
        """


class MessageSink(Protocol):
    """Receives a connection's messages and state changes. Never blocks, never raises."""

    def publish(self, client: Publisher, opcode: int, payload: bytes) -> None:
        """Publish a complete message of the client."""

    def pause_if_over_limit(self, client: Publisher) -> None:
        """Pause a client that has more to publish, if too much waits to be written."""

    def detach_connection(self, client: "Connection") -> None:
        """Stop writing to the client. Called once; it may still publish what it sent before."""

    def on_backlog_started(self, client: "Connection") -> None:
        """Record that the client's socket is full: the connection lags."""

    def on_backlog_drained(self, client: "Connection") -> None:
        """Record that the client's backlog is empty."""

    def call_when_written(self, callback: Callable[[], None]) -> None:
        """Call `callback` once everything published so far has been written."""


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

    def pause_reading(self) -> None:
        pass


CLOSED_TRANSPORT = _ClosedTransport()


class ConnectionState(Enum):
    """The states of a connection."""

    HANDSHAKE = auto()  # the upgrade is neither accepted nor refused
    OPEN = auto()
    CLOSE_PENDING = auto()  # parsing has stopped; our close frame follows the pending deliveries
    CLOSING = auto()  # our close frame is sent, the client's is awaited
    DISCARDING = auto()  # input is discarded, nothing more is sent; TCP's end is awaited
    LOST = auto()  # the TCP connection has ended


class Connection(asyncio.Protocol):
    """One client's connection, from the upgrade on.

    Args:
        shared: bounds and counters.

    Attributes:
        write: sends a batch, and never blocks. It is the transport's own write while nothing
            waits, the backlog's while the connection lags, and a drop counter once the connection
            has left its sink.
        encoding: the encoding of its deliveries, see `deflate` and `sse.SSE`.
        sends_positions: whether each of its messages begins with its position in the log.
        sends_heartbeats: whether its client was sent a welcome, and is sent heartbeats.
    """

    __slots__ = (
        "_backlog",
        "_chunk_bytes",
        "_close_reason",
        "_deadline_timer",
        "_expiry_timer",
        "_has_received_eof",
        "_is_member",
        "_on_lost",
        "_shared",
        "_sink",
        "_state",
        "_transport",
        "_write_now",
        "encoding",
        "sends_heartbeats",
        "sends_positions",
        "write",
    )

    write: Callable[[bytes], None]

    @staticmethod
    def count_complete_messages(batch: bytes, end: int) -> int:
        """Return how many messages end within the first `end` bytes of a batch."""
        raise NotImplementedError

    def __init__(self, shared: ConnectionContext) -> None:
        self._shared = shared
        self._state = ConnectionState.HANDSHAKE
        self._transport: asyncio.Transport
        self._write_now: Callable[[bytes], None]
        self._chunk_bytes = CHUNK_BYTES
        self._sink: MessageSink | None = None
        self._is_member = False  # of the sink, which writes to the client
        self._backlog: SendBacklog | None = None
        self._has_received_eof = False  # TCP's FIN, or TLS's close_notify
        self._deadline_timer: asyncio.TimerHandle | None = None
        self._close_reason: Close | None = None
        self._expiry_timer: asyncio.TimerHandle | None = None
        self._on_lost: Callable[[], None] | None = None
        self.encoding = PLAIN
        self.sends_positions = False
        self.sends_heartbeats = False
        self.write = shared.drop_disconnected

    # Lifetime

    @property
    def has_unparsed(self) -> bool:
        """Whether bytes were read from the client that are not parsed yet."""
        return False

    @property
    def has_sink(self) -> bool:
        """Whether the connection has a sink."""
        return self._sink is not None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Take over the transport from the HTTP side."""
        self._transport = cast(asyncio.Transport, transport)
        is_tls = transport.get_extra_info("ssl_object") is not None
        self._write_now = self._write_records if is_tls else self._transport.write
        self._chunk_bytes = TLS_RECORD_BYTES if is_tls else CHUNK_BYTES

    def open(self, response: bytes, encoding: int) -> None:
        """Send the response head, and register the connection as established.

        Args:
            response: the whole response head.
            encoding: the encoding of deliveries, see `deflate` and `sse.SSE`.
        """
        shared = self._shared
        self._state = ConnectionState.OPEN
        self.encoding = encoding
        self._cancel_deadline()
        shared.clients.register(self)
        shared.counters.connections += 1
        self._transport.write(response)
        # With a high-water mark of 1 byte, the transport calls pause_writing in the write that
        # fills the socket; see SendBacklog. With uvloop, write() then also writes at once rather
        # than at the end of the loop iteration, so a slice's duration is that of its system calls.
        self._transport.set_write_buffer_limits(high=1, low=0)
        if self._backlog is not None:  # responses sent before the upgrade fill the socket
            self.start_backlog(response, 0)

    def attach_sink(self, sink: MessageSink) -> None:
        """Attach a sink, which writes to the client from now on."""
        self._sink = sink
        self._is_member = True
        if self._backlog is None:
            self.write = self._write_now
        else:
            self.write = self._write_to_backlog
            sink.on_backlog_started(self)

    def switch_sink(self, sink: MessageSink) -> None:
        """Send all further messages to another sink. The previous one gets no more calls."""
        self._sink = sink
        if self._backlog is not None:
            sink.on_backlog_started(self)

    def start_expiry_timer(self, seconds: float) -> None:
        """Close the connection after `seconds` (code 3000), unless it has closed by then."""
        # uvloop rounds to milliseconds: one more, so that the timer never fires early.
        self._expiry_timer = asyncio.get_running_loop().call_later(
            seconds + 0.001, self._on_token_expired
        )

    def when_lost(self, callback: Callable[[], None]) -> None:
        """Call `callback` once, when the TCP connection has ended."""
        self._on_lost = callback

    def start_deadline(self, seconds: float) -> None:
        """Abort the connection unless it makes progress within `seconds`."""
        self._cancel_deadline()
        self._deadline_timer = asyncio.get_running_loop().call_later(seconds, self._on_deadline)

    def connection_lost(self, exc: Exception | None) -> None:
        """Release the backlog and count it. Called once and last, in every case."""
        # Batches may refer to this object for a while, which must not keep TLS's buffers in memory.
        self._transport = CLOSED_TRANSPORT
        self._write_now = CLOSED_TRANSPORT.write
        self._detach_from_sink()
        self._cancel_deadline()
        if self._backlog is not None:
            # How much was sent before the loss is unknown: what was not seen to leave is a drop.
            self._discard_backlog(self._backlog, sys.maxsize)

    # Closing and keepalive

    def close(self, why: Close, reason: str = "") -> None:
        """Close the connection; the reason on the wire is `reason`, or else `why.reason`."""
        raise NotImplementedError

    def ping(self, frame: bytes, now: float) -> None:
        """Send a keepalive: `frame`, where the protocol has frames."""
        raise NotImplementedError

    def is_ping_overdue(self, since: float) -> bool:
        """Return whether a ping sent at `since` or before is still unanswered."""
        raise NotImplementedError

    def _on_token_expired(self) -> None:
        """Close the connection: its token has expired."""
        raise NotImplementedError

    def close_when_written(self, why: Close, reason: str) -> None:
        """Close once everything published for the client so far has been written."""
        if self._sink is not None and self._state is ConnectionState.OPEN:
            self._sink.call_when_written(lambda: self.close(why, reason))

    def abort(self, why: Close) -> None:
        """End the TCP connection now; its backlog is dropped and counted."""
        self._detach(why)
        if self._backlog is not None:
            self._discard_backlog(self._backlog, self.backlog_bytes)
        self._transport.abort()

    # Flow control

    @property
    def is_closing(self) -> bool:
        """Whether the transport is closing: writes are lost, and `connection_lost` follows."""
        return self._transport.is_closing()

    @property
    def backlog_bytes(self) -> int:
        """Bytes that wait for the client to read."""
        buffered_bytes = self._transport.get_write_buffer_size()
        return (
            buffered_bytes if self._backlog is None else self._backlog.unsent_bytes(buffered_bytes)
        )

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
        return backlog.drained(self._transport.get_write_buffer_size())

    def pause_reading(self) -> None:
        """Stop reading from the client until `resume_reading` was called as often."""

    def resume_reading(self) -> None:
        """Undo one `pause_reading`."""

    def pause_writing(self) -> None:
        """Start a backlog: the write in progress filled the socket."""
        if self._backlog is not None:
            self._backlog.is_blocked = True
            return
        self._backlog = SendBacklog(self.count_complete_messages)
        if self._is_member and self._sink is not None:
            self.write = self._write_to_backlog
            self._sink.on_backlog_started(self)
        if self._shared.is_writing:
            self._shared.newly_lagging.append(self)

    def start_backlog(self, data: bytes, messages: int) -> None:
        """Queue the write that filled the socket; `pause_writing` does not get its bytes."""
        assert self._backlog is not None
        self._backlog.add_blocked_write(data, messages)
        self._shared.backlogs.add_slow_consumer(self)
        if messages:
            self._shared.counters.sent_bytes += len(data)

    def resume_writing(self) -> None:
        """Give the transport the next chunk: the previous one has left for the socket."""
        backlog, transport, counters = self._backlog, self._transport, self._shared.counters
        if backlog is None or transport.is_closing():
            return
        backlog.is_blocked = False
        counters.deliveries += backlog.advance()
        while chunk := backlog.next_chunk(self._chunk_bytes):
            transport.write(chunk)
            if backlog.is_blocked or transport.is_closing():
                return
            counters.deliveries += backlog.advance()
        self._discard_backlog(backlog, 0)
        if self._is_member and self._sink is not None:
            self.write = self._write_now
            self._sink.on_backlog_drained(self)
        elif self._state is ConnectionState.DISCARDING:
            self._half_close()

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

    # Private

    def _finalize(self) -> None:
        """Enter the last state, and count the connection as closed."""
        if self._state is ConnectionState.LOST:
            return
        shared = self._shared
        self._detach(Close.CONNECTION_LOST)
        self._state = ConnectionState.LOST
        self._cancel_deadline()
        if self._on_lost is not None:
            callback, self._on_lost = self._on_lost, None
            callback()
        if shared.clients.unregister(self):
            assert self._close_reason is not None
            shared.counters.disconnections += 1
            shared.counters.closes[self._close_reason] += 1
            log.debug("client disconnected", extra={"close": self._close_reason.label})
        self._sink = None

    def _detach(self, why: Close) -> None:
        """Leave the sink; the first close reason is the one that counts."""
        self._close_reason = self._close_reason or why
        self._detach_from_sink()

    def _detach_from_sink(self) -> None:
        if self._expiry_timer is not None:
            self._expiry_timer.cancel()
            self._expiry_timer = None
        # No bound method of this object: a batch may still refer to it after the connection closed.
        shared = self._shared
        shared.unparsed.resume_publisher(self)
        slow = self._close_reason is Close.SLOW_CONSUMER
        self.write = shared.drop_slow_consumer if slow else shared.drop_disconnected
        if self._is_member and self._sink is not None:
            self._is_member = False
            self._sink.detach_connection(self)

    def _close_after_flush(self) -> None:
        # The server closes TCP first (RFC 6455 section 7.1.1), its sending half only: to close both
        # with unread bytes in the socket would send a reset, which can cost the client the close
        # frame. Further input is discarded until the client's FIN, or our deadline.
        if self._transport.is_closing():
            return
        self.start_deadline(self._shared.deadline_s)
        if self._backlog is None:  # otherwise once it is empty: see resume_writing
            self._half_close()

    def _half_close(self) -> None:
        if self._transport.can_write_eof() and not self._has_received_eof:
            self._transport.write_eof()
        else:  # TLS has no half-close; its shutdown has the same effect
            self._transport.close()

    def _stays_open_after_eof(self) -> bool:
        """Return whether the connection stays open although the client has ended its side.

        TCP's FIN leaves the other direction open for the backlog. uvloop's TLS shuts both
        directions, and sends only what it was given by now.
        """
        backlog = self._backlog
        if backlog is None:
            return False
        if self._transport.can_write_eof():
            return True
        if unsent := backlog.take_unsent():
            self._transport.write(unsent)
        return False

    def _write_control(self, data: bytes) -> None:
        """Write a control frame after the backlog."""
        if not data or self._transport.is_closing():
            return
        shared = self._shared
        backlog = self._backlog
        if backlog is not None:
            if (
                self._state is ConnectionState.OPEN
                and self.backlog_bytes + len(data) > shared.backlogs.limit_bytes
            ):
                self.close(Close.SLOW_CONSUMER)
                return
            shared.backlogs.record_growth(backlog.add_write(data, 0))
            return
        self._write_now(data)
        if self._backlog is not None:
            self.start_backlog(data, 0)

    def _write_records(self, data: bytes) -> None:
        """Write to a TLS transport, one record's worth at a time (RFC 8446 section 5.1).

        No counter includes the bytes that uvloop's TLS layer has passed to the TCP transport below
        it. The layer passes each write on whole, whatever its size, until that transport buffers
        64 KiB. So the layer is given at most one record that it can't pass on.
        """
        if len(data) <= TLS_RECORD_BYTES:
            self._transport.write(data)
            return
        view = memoryview(data)
        for end in range(TLS_RECORD_BYTES, len(data) + TLS_RECORD_BYTES, TLS_RECORD_BYTES):
            self._transport.write(view[end - TLS_RECORD_BYTES : end])
            if self._backlog is not None:
                self._backlog.first_chunk_bytes = min(end, len(data))
                return

    def _write_to_backlog(self, batch: bytes) -> None:
        """Queue a batch for a lagging connection, or close it if its backlog is full."""
        shared = self._shared
        backlog = self._backlog
        assert backlog is not None
        buffered_bytes = self.backlog_bytes
        if buffered_bytes + len(batch) > shared.backlogs.limit_bytes:
            log.info("slow consumer closed", extra={"backlog_bytes": buffered_bytes})
            self.close(Close.SLOW_CONSUMER)
            self.write(batch)  # counts the drop: the connection has left its sink
            return
        memory_bytes = backlog.add_write(batch, shared.batch_messages)
        shared.not_sent += 1
        shared.counters.sent_bytes += len(batch)
        shared.backlogs.record_growth(memory_bytes)

    @property
    def _drop_reason(self) -> Drop:
        slow = self._close_reason is Close.SLOW_CONSUMER
        return Drop.SLOW_CONSUMER if slow else Drop.DISCONNECTED

    def _discard_backlog(self, backlog: SendBacklog, unsent: int) -> None:
        """Discard the backlog; count which of its messages were sent and which never will be."""
        delivered, dropped = backlog.count_sent_messages(unsent)
        self._shared.counters.deliveries += delivered
        self._shared.counters.drops[self._drop_reason] += dropped
        self._shared.backlogs.remove_slow_consumer(self)
        self._backlog = None

    def _on_deadline(self) -> None:
        self._deadline_timer = None
        self._transport.abort()

    def _cancel_deadline(self) -> None:
        if self._deadline_timer is not None:
            self._deadline_timer.cancel()
            self._deadline_timer = None
