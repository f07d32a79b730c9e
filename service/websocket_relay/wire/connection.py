"""Write to one client, watch what it is behind with, and let it go in order. Knows no protocol.

What a client is sent, and how it says goodbye, is its protocol's: see `protocol` for WebSockets and
`events` for server-sent events. All else is the same for both, and the rooms above see this only.
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

PIECE_BYTES = 65_536
"""What a transport is given at a time of a client's backlog."""

RECORD_BYTES = 16_384
"""The same with TLS: what a record holds at most (RFC 8446 section 5.1)."""


class Publisher(Protocol):
    """What is asked of a client that publishes."""

    def pause_reading(self) -> None:
        """Read no more from it until `resume_reading` was called as often."""

    def resume_reading(self) -> None:
        """Read on."""

    def tell_unavailable(self, *, in_doubt: bool) -> None:
        """Close it: its message could not be relayed."""


class MessageSink(Protocol):
    """Where a connection's messages go, and what it says of itself. Never blocks, never raises."""

    def publish(self, client: Publisher, opcode: int, payload: bytes) -> None:
        """Take a whole message from the client."""

    def hold_back(self, client: Publisher) -> None:
        """Pause the client, who is about to say more, where too much waits to be written."""

    def leave(self, client: "Connection") -> None:
        """Write to the client no longer. Said once; it may still publish what it said before."""

    def fell_behind(self, client: "Connection") -> None:
        """Take note that the client's socket is full."""

    def caught_up(self, client: "Connection") -> None:
        """Take note that nothing waits for the client any more."""

    def when_written(self, act: Callable[[], None]) -> None:
        """Call `act` once all that was published so far has been written."""


class _ClosedTransport(asyncio.Transport):
    """What stands for a transport that has ended. Nothing can be done to it, and nothing fails."""

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
    """Where a connection is in its life."""

    HANDSHAKE = auto()
    OPEN = auto()
    PARTING = auto()  # nothing is heard any more; our goodbye follows what the client is owed
    CLOSING = auto()  # our close frame is out, the client's is awaited
    DISCARDING = auto()  # nothing is said or heard any more; TCP's end is awaited
    LOST = auto()


class Connection(asyncio.Protocol):
    """One client's connection, once it is one.

    Args:
        shared: bounds and books.
    """

    __slots__ = (
        "_backlog",
        "_deadline",
        "_ending",
        "_expiry",
        "_is_member",
        "_on_lost",
        "_piece_bytes",
        "_sends_no_more",
        "_shared",
        "_sink",
        "_state",
        "_transport",
        "_write_now",
        "encoding",
        "tells_positions",
        "write",
    )

    # The fan-out's way in: the transport's own write while nothing waits, ours while something
    # does, and a count of what was missed once the client has left. Never blocks.
    write: Callable[[bytes], None]

    @staticmethod
    def count_whole(batch: bytes, end: int) -> int:
        """Return how many messages end within the first `end` bytes of a batch."""
        raise NotImplementedError

    def __init__(self, shared: ConnectionContext) -> None:
        self._shared = shared
        self._state = ConnectionState.HANDSHAKE
        self._transport: asyncio.Transport
        self._write_now: Callable[[bytes], None]
        self._piece_bytes = PIECE_BYTES
        self._sink: MessageSink | None = None
        self._is_member = False  # of the sink: it writes to the client
        self._backlog: SendBacklog | None = None
        self._sends_no_more = False  # TCP's end came, or TLS's
        self._deadline: asyncio.TimerHandle | None = None
        self._ending: Close | None = None
        self._expiry: asyncio.TimerHandle | None = None
        self._on_lost: Callable[[], None] | None = None
        self.encoding = PLAIN
        self.tells_positions = False  # whether its messages begin with where they stand in the log
        self.write = shared.withhold_disconnected

    # From the upgrade on

    @property
    def is_unheard(self) -> bool:
        """Whether something was read from the client that is not heard yet."""
        return False

    @property
    def has_sink(self) -> bool:
        """Whether somebody took the connection over."""
        return self._sink is not None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Take over the transport from the HTTP side."""
        self._transport = cast(asyncio.Transport, transport)
        is_tls = transport.get_extra_info("ssl_object") is not None
        self._write_now = self._write_records if is_tls else self._transport.write
        self._piece_bytes = RECORD_BYTES if is_tls else PIECE_BYTES

    def open(self, response: bytes, encoding: int) -> None:
        """Send the head of the answer, and be a client from now on.

        Args:
            response: the whole response head.
            encoding: of what the client is to be sent, see `relay.batch.Form`.
        """
        shared = self._shared
        self._state = ConnectionState.OPEN
        self.encoding = encoding
        self._cancel_deadline()
        shared.clients.add(self)
        shared.ledger.connections += 1
        self._transport.write(response)
        # A mark of nothing tells at once when a client could not take all; see Backlog. With
        # uvloop it also makes write() write now rather than at the end of the loop's turn, so
        # that the time a slice takes is the time its system calls take.
        self._transport.set_write_buffer_limits(high=1, low=0)
        if self._backlog is not None:  # answers from before the upgrade fill the socket
            self.note_backlog(response, 0)

    def hand_over(self, sink: MessageSink) -> None:
        """Let a sink write to the client."""
        self._sink = sink
        self._is_member = True
        if self._backlog is None:
            self.write = self._write_now
        else:
            self.write = self._write_behind
            sink.fell_behind(self)

    def pass_on(self, sink: MessageSink) -> None:
        """Give all further messages to another sink. The one before is asked nothing more."""
        self._sink = sink
        if self._backlog is not None:
            sink.fell_behind(self)

    def expire_in(self, seconds: float) -> None:
        """Close the client after so many seconds (3000), unless it has gone by then."""
        # uvloop counts in milliseconds, rounded: one more, so that it is never too early.
        self._expiry = asyncio.get_running_loop().call_later(seconds + 0.001, self._expire)

    def when_lost(self, act: Callable[[], None]) -> None:
        """Call `act` once, when the TCP connection has ended."""
        self._on_lost = act

    def expect_within(self, seconds: float) -> None:
        """Cut the connection off unless it gets on within so many seconds."""
        self._cancel_deadline()
        self._deadline = asyncio.get_running_loop().call_later(seconds, self._cut_off)

    def connection_lost(self, exc: Exception | None) -> None:
        """Settle the books: whatever happened, this is called once and last."""
        # Batches may name this object for a while: what TLS had waiting must not wait with it.
        self._transport = CLOSED_TRANSPORT
        self._write_now = CLOSED_TRANSPORT.write
        self._leave_sink()
        self._cancel_deadline()
        if self._backlog is not None:
            # How much of it left before the loss nobody knows: what was not seen to go is missed.
            self._settle(self._backlog, sys.maxsize)

    # What the relay says

    def close(self, why: Close, reason: str = "") -> None:
        """Say goodbye; what is said of why on the wire is `reason`, or else `why.reason`."""
        raise NotImplementedError

    def ping(self, frame: bytes, now: float) -> None:
        """Send a sign of life; the sweep's frame, where the client speaks frames."""
        raise NotImplementedError

    def is_silent(self, since: float) -> bool:
        """Tell whether the client owes an answer to a ping sent at `since` or before."""
        raise NotImplementedError

    def _expire(self) -> None:
        """Let the client go: its token has expired."""
        raise NotImplementedError

    def close_when_written(self, why: Close, reason: str) -> None:
        """Close once the client was written all that it is owed so far."""
        if self._sink is not None and self._state is ConnectionState.OPEN:
            self._sink.when_written(lambda: self.close(why, reason))

    def abort(self, why: Close) -> None:
        """End the TCP connection now; what waits is dropped and counted."""
        self._leave(why)
        if self._backlog is not None:
            self._settle(self._backlog, self.backlog_bytes)
        self._transport.abort()

    # Flow control

    @property
    def is_closing(self) -> bool:
        """Whether the transport is ending: what is written is lost, and `connection_lost` comes."""
        return self._transport.is_closing()

    @property
    def backlog_bytes(self) -> int:
        """What waits for the client to read on."""
        waiting = self._transport.get_write_buffer_size()
        return waiting if self._backlog is None else self._backlog.unsent(waiting)

    @property
    def held_bytes(self) -> int:
        """The memory that this takes: a write that has left in part is held whole."""
        return self._backlog.held_bytes if self._backlog is not None else 0

    @property
    def drained_bytes(self) -> int:
        """How much was seen to leave for the client's socket since it is behind; 0 if it is not."""
        backlog = self._backlog
        if backlog is None:
            return 0
        return backlog.drained(self._transport.get_write_buffer_size())

    def pause_reading(self) -> None:
        """Read no more from the client until `resume_reading` was called as often."""

    def resume_reading(self) -> None:
        """Read on, if nobody else holds the client back."""

    def pause_writing(self) -> None:
        """Take note that the write under way filled the socket: the client is behind now."""
        if self._backlog is not None:
            self._backlog.is_stuck = True
            return
        self._backlog = SendBacklog(self.count_whole)
        if self._is_member and self._sink is not None:
            self.write = self._write_behind
            self._sink.fell_behind(self)
        if self._shared.is_writing:
            self._shared.fell_behind.append(self)

    def note_backlog(self, data: bytes, messages: int) -> None:
        """Note the write that made the client fall behind. `pause_writing` does not know it."""
        assert self._backlog is not None
        self._backlog.begin(data, messages)
        self._shared.backlogs.add(self)
        if messages:
            self._shared.ledger.sent_bytes += len(data)

    def resume_writing(self) -> None:
        """Give the transport the next piece: what it had has left for the socket."""
        backlog, transport, ledger = self._backlog, self._transport, self._shared.ledger
        if backlog is None or transport.is_closing():
            return
        backlog.is_stuck = False
        ledger.deliveries += backlog.advance()
        while piece := backlog.piece(self._piece_bytes):
            transport.write(piece)
            if backlog.is_stuck or transport.is_closing():
                return
            ledger.deliveries += backlog.advance()
        self._settle(backlog, 0)
        if self._is_member and self._sink is not None:
            self.write = self._write_now
            self._sink.caught_up(self)
        elif self._state is ConnectionState.DISCARDING:
            self._shut()

    def drop_backlog(self) -> None:
        """End the connection, so that what waits for it is freed."""
        self.abort(Close.SLOW_CONSUMER)

    def fail(self) -> None:
        """End the connection: a write to it raised."""
        try:
            self.close(Close.INTERNAL)
        except Exception:
            log.exception("write failed")
            self.abort(Close.INTERNAL)

    # Inside

    def _finish(self) -> None:
        """Say nothing more, and count the connection as ended."""
        if self._state is ConnectionState.LOST:
            return
        shared = self._shared
        self._leave(Close.VANISHED)
        self._state = ConnectionState.LOST
        self._cancel_deadline()
        if self._on_lost is not None:
            act, self._on_lost = self._on_lost, None
            act()
        if shared.clients.discard(self):
            assert self._ending is not None
            shared.ledger.disconnections += 1
            shared.ledger.closes[self._ending] += 1
            log.debug("client gone", extra={"close": self._ending.label})
        self._sink = None

    def _leave(self, why: Close) -> None:
        """Leave the sink; the first reason is the one that counts."""
        self._ending = self._ending or why
        self._leave_sink()

    def _leave_sink(self) -> None:
        if self._expiry is not None:
            self._expiry.cancel()
            self._expiry = None
        # A function that does not hold this object: a batch may still name it when it is gone.
        shared = self._shared
        shared.unheard.release(self)
        slow = self._ending is Close.SLOW_CONSUMER
        self.write = shared.withhold_slow if slow else shared.withhold_disconnected
        if self._is_member and self._sink is not None:
            self._is_member = False
            self._sink.leave(self)

    def _end(self) -> None:
        # The server closes TCP first (RFC 6455 section 7.1.1), its sending half only: closing
        # both with unread bytes in the socket would send a reset, and with it the client could
        # lose the close frame. What still comes is thrown away until the client's end, or ours.
        if self._transport.is_closing():
            return
        self.expect_within(self._shared.deadline_s)
        if self._backlog is None:  # otherwise once it has left: see resume_writing
            self._shut()

    def _shut(self) -> None:
        if self._transport.can_write_eof() and not self._sends_no_more:
            self._transport.write_eof()
        else:  # TLS has no half-close; its shutdown does the same
            self._transport.close()

    def _outlasts_end(self) -> bool:
        """Tell whether the connection stays open, the client having ended its side of it.

        TCP's end leaves the other direction open for what waits. uvloop's TLS shuts both, and sends
        no more than it has by now.
        """
        backlog = self._backlog
        if backlog is None:
            return False
        if self._transport.can_write_eof():
            return True
        if rest := backlog.rest():
            self._transport.write(rest)
        return False

    def _put(self, data: bytes) -> None:
        """Write a control frame, behind whatever waits."""
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
            shared.backlogs.grew(backlog.note(data, 0))
            return
        self._write_now(data)
        if self._backlog is not None:
            self.note_backlog(data, 0)

    def _write_records(self, data: bytes) -> None:
        """Write to a TLS transport, a record's worth at a time (RFC 8446 section 5.1).

        What uvloop's TLS layer has passed to the TCP transport below is in nobody's count. It
        passes on what it is given in one piece, whatever the size, until that one has 64 KiB: so it
        is given no more than one record that it can't pass on.
        """
        if len(data) <= RECORD_BYTES:
            self._transport.write(data)
            return
        view = memoryview(data)
        for end in range(RECORD_BYTES, len(data) + RECORD_BYTES, RECORD_BYTES):
            self._transport.write(view[end - RECORD_BYTES : end])
            if self._backlog is not None:
                self._backlog.first_handed_bytes = min(end, len(data))
                return

    def _write_behind(self, batch: bytes) -> None:
        """Write a batch to a client that is behind, or close it where that is too much."""
        shared = self._shared
        backlog = self._backlog
        assert backlog is not None
        waiting = self.backlog_bytes
        if waiting + len(batch) > shared.backlogs.limit_bytes:
            log.info("slow consumer closed", extra={"backlog_bytes": waiting})
            self.close(Close.SLOW_CONSUMER)
            self.write(batch)  # counts it, now that the client has left
            return
        held = backlog.note(batch, shared.messages_in_hand)
        shared.withheld += 1
        shared.ledger.sent_bytes += len(batch)
        shared.backlogs.grew(held)

    @property
    def _drop(self) -> Drop:
        slow = self._ending is Close.SLOW_CONSUMER
        return Drop.SLOW_CONSUMER if slow else Drop.DISCONNECTED

    def _settle(self, backlog: SendBacklog, unsent: int) -> None:
        """Enter into the books what of the backlog went and what never will."""
        delivered, dropped = backlog.split(unsent)
        self._shared.ledger.deliveries += delivered
        self._shared.ledger.drops[self._drop] += dropped
        self._shared.backlogs.discard(self)
        self._backlog = None

    def _cut_off(self) -> None:
        self._deadline = None
        self._transport.abort()

    def _cancel_deadline(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None
