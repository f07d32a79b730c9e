"""Speak RFC 6455 with one client: bytes to messages, messages to bytes, and a clean end.

uvicorn makes one `RelayProtocol` for each upgrade (`ws=`). The handshake goes through ASGI (see
`handshake`); once the endpoint handed the connection over to a sink, nothing of ASGI is left and
each message goes to the sink by a plain call. Knows no channel: the sink is all it sees of the room
above.
"""

import asyncio
import logging
from collections.abc import Callable, Iterator
from enum import Enum, auto
from time import monotonic, perf_counter
from typing import Any, Protocol, cast

from uvicorn.config import Config
from uvicorn.server import ServerState

from service.errors import Close, Drop, Refusal
from service.wire.allowance import Allowance
from service.wire.backlog import Backlog
from service.wire.deflate import PLAIN
from service.wire.frames import CLOSE, CONTROL, PING, PONG, BreachError, control
from service.wire.frames import close as close_frame
from service.wire.parser import HALF, PAUSE, Event, Parser
from service.wire.shared import Shared

log = logging.getLogger(__name__)

RECORD_BYTES = 16_384


class Sink(Protocol):
    """Where a connection's messages go, and what it says of itself. Never blocks, never raises."""

    def publish(self, client: "RelayProtocol", opcode: int, payload: bytes) -> None:
        """Take a whole message from the client."""

    def hold_back(self, client: "RelayProtocol") -> None:
        """Pause the client, who is about to say more, where too much waits to be written."""

    def leave(self, client: "RelayProtocol") -> None:
        """Write to the client no longer. Said once; it may still publish what it said before."""

    def fell_behind(self, client: "RelayProtocol") -> None:
        """Take note that the client's socket is full."""

    def caught_up(self, client: "RelayProtocol") -> None:
        """Take note that nothing waits for the client any more."""

    def when_written(self, act: Callable[[], None]) -> None:
        """Call `act` once all that was published so far has been written."""


class State(Enum):
    """Where a connection is in its life."""

    HANDSHAKE = auto()
    OPEN = auto()
    PARTING = auto()  # nothing is heard any more; our close frame follows what the client is owed
    CLOSING = auto()  # our close frame is out, the client's is awaited
    DISCARDING = auto()  # nothing is said or heard any more; TCP's end is awaited
    LOST = auto()


class _Gone(asyncio.Transport):
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


GONE = _Gone()


class RelayProtocol(asyncio.Protocol):
    """One client's connection, from the upgrade to its end.

    Args:
        config, server_state, app_state, _loop: what uvicorn gives a WebSocket protocol.
        shared: bounds and books.
    """

    __slots__ = (
        "_allowance",
        "_backlog",
        "_deadline",
        "_drained_at_ping",
        "_early",
        "_ending",
        "_expiry",
        "_goodbye",
        "_holds",
        "_in_turns",
        "_is_first",
        "_is_member",
        "_kept_bytes",
        "_on_lost",
        "_parser",
        "_paused_at",
        "_sends_no_more",
        "_shared",
        "_sink",
        "_state",
        "_transport",
        "_unanswered_since",
        "_unheard",
        "_write_now",
        "encoding",
        "tells_positions",
        "write",
    )

    # The fan-out's way in: the transport's own write while nothing waits, ours while something
    # does, and a count of what was missed once the client has left. Never blocks, never raises
    # but RuntimeError where the transport was closed under it.
    write: Callable[[bytes], None]

    def __init__(
        self,
        config: Config,
        server_state: ServerState,
        app_state: dict[str, Any],
        _loop: asyncio.AbstractEventLoop | None = None,
        *,
        shared: Shared,
    ) -> None:
        self._shared = shared
        self._state = State.HANDSHAKE
        self._transport: asyncio.Transport
        self._parser: Parser | None = None
        self._sink: Sink | None = None
        self._is_member = False  # of the sink: it writes to the client
        self._early = b""
        self._kept_bytes = 0  # of a message that is not whole, as the others were told
        self._backlog: Backlog | None = None
        self._drained_at_ping = 0
        self._holds = 0
        self._paused_at = 0.0  # since when it is not read; 0: it is
        self._unanswered_since = 0.0
        self._unheard: Iterator[Event] | None = None  # what is left of the last read
        self._in_turns = False  # whether read_on is called again, or being called
        self._is_first = False  # before the others who wait: to finish a message
        self._sends_no_more = False  # TCP's end came, or TLS's
        self._deadline: asyncio.TimerHandle | None = None
        self._ending: Close | None = None
        self._goodbye = b""
        self._allowance: Allowance | None = None
        self._expiry: asyncio.TimerHandle | None = None
        self._on_lost: Callable[[], None] | None = None
        self.encoding = PLAIN
        self.tells_positions = False  # whether its messages begin with where they stand in the log
        self.write = shared.withhold_disconnected

    # The handshake's side

    @property
    def has_sink(self) -> bool:
        """Whether somebody took the connection over."""
        return self._sink is not None

    @property
    def in_handshake(self) -> bool:
        """Whether the upgrade was neither accepted nor refused yet."""
        return self._state is State.HANDSHAKE

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Take over the transport from the HTTP side."""
        self._transport = cast(asyncio.Transport, transport)
        is_tls = transport.get_extra_info("ssl_object") is not None
        self._write_now = self._write_records if is_tls else self._transport.write

    def open(self, response: bytes, encoding: int) -> None:
        """Send the 101 and be a WebSocket from now on.

        Args:
            response: the whole response head.
            encoding: PLAIN, or the window's bits of what the client is to be sent.
        """
        shared = self._shared
        self._state = State.OPEN
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
            shared.fell_behind.remove(self)
            self.note_backlog(response, 0)

    def hand_over(self, sink: Sink) -> None:
        """Give all further messages to the sink, those that came early first."""
        self._sink = sink
        self._is_member = True
        self._parser = Parser(self._shared.max_message_bytes, inflates=self.encoding != PLAIN)
        if self._backlog is None:
            self.write = self._write_now
        else:
            self.write = self._write_behind
            sink.fell_behind(self)
        if self._early:
            early, self._early = self._early, b""
            self._transport.resume_reading()
            self.data_received(early)

    def pass_on(self, sink: Sink) -> None:
        """Give all further messages to another sink. The one before is asked nothing more."""
        self._sink = sink
        if self._backlog is not None:
            sink.fell_behind(self)

    def allow(self, allowance: Allowance) -> None:
        """Hold the client to what it may send."""
        self._allowance = allowance

    def expire_in(self, seconds: float) -> None:
        """Close the client after so many seconds (3000), unless it has gone by then."""
        # uvloop counts in milliseconds, rounded: one more, so that it is never too early.
        self._expiry = asyncio.get_running_loop().call_later(seconds + 0.001, self._expire)

    def when_lost(self, act: Callable[[], None]) -> None:
        """Call `act` once, when the TCP connection has ended."""
        self._on_lost = act

    def refuse(self, response: bytes) -> None:
        """Answer the upgrade with an HTTP response and end the connection."""
        if self._state is State.LOST:
            return
        self._state = State.DISCARDING
        if self._early:
            self._early = b""
            self._transport.resume_reading()
        self._transport.write(response)
        self._end()

    def expect_within(self, seconds: float) -> None:
        """Cut the connection off unless it gets on within so many seconds."""
        self._cancel_deadline()
        self._deadline = asyncio.get_running_loop().call_later(seconds, self._cut_off)

    # What the client says

    def data_received(self, data: bytes) -> None:
        """Take bytes from the client: the hot path's first half."""
        self._unanswered_since = 0.0
        if self._parser is None:
            self._keep_early(data)
            return
        events = self._parser.feed(data)
        if self._hear(events) is not None:
            # uvloop reads up to 256 KB at a time, and goes on reading as long as there is so much.
            # Tiny frames by the ten thousand, or what inflates to a thousand times as much, would
            # keep everybody waiting.
            self._unheard = events
            self._read_no_more()
            self._hear_soon()

    def read_on(self, until: float) -> bool:
        """Hear some more of what was read.

        Args:
            until: when to stop, by `time.perf_counter`.

        Returns:
            False to be called again behind the others; True where it is heard to the end, held
            back, or in the queue already.
        """
        try:
            is_done = self._read_on(until)
        except BaseException:  # as uvloop does where data_received raises
            self._unheard = None
            self._in_turns = False
            self.abort(Close.INTERNAL)
            raise
        self._in_turns = not is_done
        if is_done or not self._is_first:
            return is_done
        self._shared.reading.add(self.read_on, first=True)
        return True

    def _read_on(self, until: float) -> bool:
        while self._unheard is not None:
            if self._holds:
                return True  # resume_reading comes back here
            pause = self._hear(self._unheard)
            if pause is None:
                self._unheard = None
            elif pause is HALF:
                # All of them half inflated would fill the memory.
                if perf_counter() > until and not self._holds:
                    self._is_first = True
                    return False
            elif self._is_first or perf_counter() > until:
                self._is_first = False
                return self._holds > 0
        if self._transport is GONE:
            self._finish()
        elif self._sends_no_more and self._parser is not None:
            self._vanish()
        elif not self._holds:
            self._read_again()
        return True

    def _hear_soon(self) -> None:
        if not self._holds and not self._in_turns:
            self._in_turns = True
            self._shared.reading.add(self.read_on)

    def _read_no_more(self) -> None:
        self._paused_at = self._paused_at or monotonic()
        self._transport.pause_reading()

    def _read_again(self) -> None:
        if self._paused_at and self._allowance is not None:
            self._allowance.excuse(monotonic() - self._paused_at)
        self._paused_at = 0.0
        if not self._transport.is_closing():
            self._transport.resume_reading()

    # The hot path: one loop, no call but what a message needs.
    def _hear(self, events: Iterator[Event]) -> Event | None:  # noqa: C901
        """Take events until the parser pauses; return how it does, or None at their end."""
        parser, sink = self._parser, self._sink
        assert parser is not None
        assert sink is not None
        pongs = []
        end: tuple[Close, bytes] | None = None
        pause: Event | None = None
        try:
            for event in events:
                opcode, payload = event
                if opcode & CONTROL:
                    if opcode == PING:
                        pongs.append(control(PONG, payload))
                    elif opcode == CLOSE:
                        end = Close.CLIENT, _answer(payload)
                elif event is PAUSE or event is HALF:
                    pause = event
                    break
                elif self._allowance is not None and (why := self._allowance.objection()):
                    end = why, close_frame(why.code, why.reason)
                    break
                else:
                    sink.publish(self, opcode, payload)
        except BreachError as breach:
            why = breach.close
            reason = f"{why.reason}: {breach.detail}" if breach.detail else why.reason
            end = why, close_frame(why.code, reason)
        if pongs and self._state is State.OPEN:
            # Behind our own close frame nothing is said: pings are not answered any more.
            self._put(b"".join(pongs))
        if end is not None:
            self._part(*end)
        if self._parser is None:  # or it parted over what it said
            return None
        if parser.kept_bytes != self._kept_bytes:
            self._note_kept(parser.kept_bytes)
        if pause is None or self._parser is None:
            return None
        sink.hold_back(self)
        return pause

    def _note_kept(self, size: int) -> None:
        self._kept_bytes = size
        self._shared.unfinished.note(self, size)

    def drop_unfinished(self) -> None:
        """Close the client, so that what is kept of its message is freed."""
        self._part_for(Close.UNFINISHED)

    def tell_unavailable(self) -> None:
        """Close the client: its message could not be relayed."""
        self._part_for(Close.UNAVAILABLE)

    def eof_received(self) -> bool:
        """Take note that the client sends no more: without a close frame it vanished.

        Returns:
            Whether the connection stays open for what the client is still owed.
        """
        self._sends_no_more = True
        if self._state is State.PARTING and self._transport.can_write_eof():
            return True
        self._say_goodbye()
        if self._unheard is None:
            self._vanish()
        else:
            # TLS brings both in one call. uvloop throws away what is written from now on, and may
            # take half a minute to close.
            self._leave_sink()
        if self._deadline is None:
            self.expect_within(self._shared.deadline_s)
        return False

    def connection_lost(self, exc: Exception | None) -> None:
        """Settle the books: whatever happened, this is called once and last.

        What was read before is heard all the same, and until then it counts as a connection: words
        that nobody waits for must not be a way around the limits.
        """
        # Batches may name this object for a while: what TLS had waiting must not wait with it.
        self._transport = GONE
        self._write_now = GONE.write
        self._leave_sink()
        self._cancel_deadline()
        if self._backlog is not None:
            # How much of it left before the loss nobody knows: what was not seen to go is missed.
            self._settle(self._backlog, self._backlog.noted_bytes)
        if self._unheard is None:
            self._finish()

    def _vanish(self) -> None:
        self._leave(Close.VANISHED)
        self._state = State.DISCARDING
        self._hear_no_more()

    def _finish(self) -> None:
        """Hear and say nothing more, and count the connection as ended."""
        if self._state is State.LOST:
            return
        shared = self._shared
        self._leave(Close.VANISHED)
        self._state = State.LOST
        self._hear_no_more()
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

    # What the relay says

    def close(self, why: Close, reason: str = "") -> None:
        """Start the closing handshake; the client has `deadline_s` to answer.

        Messages that the client sends until it answers are still relayed. One that is parting
        already parts now.

        Args:
            why: the code and the label.
            reason: what stands on the wire instead of `why.reason`.
        """
        self._forget_lost()
        self._say_goodbye()
        if self._state is not State.OPEN:
            return
        self._leave(why)
        self._state = State.CLOSING
        self.expect_within(self._shared.deadline_s)
        self._put(close_frame(why.code, reason or why.reason))

    def close_when_written(self, why: Close, reason: str) -> None:
        """Close once the client was written all that it is owed so far."""
        if self._sink is not None and self._state is State.OPEN:
            self._sink.when_written(lambda: self.close(why, reason))

    def abort(self, why: Close) -> None:
        """End the TCP connection now; what waits is dropped and counted."""
        self._forget_lost()
        self._leave(why)
        if self._backlog is not None:
            self._settle(self._backlog, self.backlog_bytes)
        self._transport.abort()

    def ping(self, frame: bytes, now: float) -> None:
        """Send the sweep's ping; the client's silence is timed from the first unanswered one."""
        if self._state is State.OPEN:
            self._put(frame)
            if not self._unanswered_since:
                self._unanswered_since = now
                self._drained_at_ping = self.drained_bytes

    def is_silent(self, since: float) -> bool:
        """Tell whether the client owes an answer to a ping sent at `since` or before.

        A client that the relay itself does not read, or whose socket took some of what it is
        behind with, is not silent: its time begins again with the next ping.
        """
        if self._state is not State.OPEN or not 0.0 < self._unanswered_since <= since:
            return False
        if self._holds or self._unheard or self.drained_bytes != self._drained_at_ping:
            self._unanswered_since = 0.0
            return False
        return True

    # Flow control

    @property
    def backlog_bytes(self) -> int:
        """What waits in the transport for the client to read on."""
        return self._transport.get_write_buffer_size()

    @property
    def drained_bytes(self) -> int:
        """How much was seen to leave for the client's socket since it is behind; 0 if it is not."""
        backlog = self._backlog
        return backlog.drained(self.backlog_bytes) if backlog is not None else 0

    def pause_reading(self) -> None:
        """Read no more from the client until `resume_reading` was called as often."""
        self._holds += 1
        if self._holds == 1:
            self._shared.held += 1
            self._read_no_more()

    def resume_reading(self) -> None:
        """Read on, if nobody else holds the client back."""
        self._holds -= 1
        if self._holds == 0:
            self._shared.held -= 1
            if self._unheard is not None:
                self._hear_soon()
            else:
                self._read_again()

    def pause_writing(self) -> None:
        """Take note that the write under way filled the socket: the client is behind now."""
        self._backlog = Backlog()
        if self._is_member and self._sink is not None:
            self.write = self._write_behind
            self._sink.fell_behind(self)
        self._shared.fell_behind.append(self)

    def note_backlog(self, data: bytes, messages: int) -> None:
        """Note the write that made the client fall behind. `pause_writing` does not know it."""
        assert self._backlog is not None
        self._backlog.note(data, messages, self.backlog_bytes)
        self._shared.backlogs.add(self)
        if messages:
            self._shared.ledger.sent_bytes += len(data)

    def resume_writing(self) -> None:
        """Take note that all that waited has left for the socket."""
        if self._backlog is None:
            return
        if self in self._shared.fell_behind:  # within one write: it was never behind
            self._shared.fell_behind.remove(self)
        self._settle(self._backlog, 0)
        if self._is_member and self._sink is not None:
            self.write = self._write_now
            self._sink.caught_up(self)

    def drop_backlog(self) -> None:
        """End the connection, so that what waits for it is freed."""
        self.abort(Close.SLOW_CONSUMER)

    # Inside

    def _keep_early(self, data: bytes) -> None:
        # RFC 6455 section 4.1 has clients wait for the 101, but bytes that came with the request
        # or while the endpoint decides are not lost: one read of them, then the rest stays with
        # TCP. Past the handshake there is no parser because nothing counts any more.
        if self._state is State.HANDSHAKE and data:
            self._early += data
            self._transport.pause_reading()

    def _part_for(self, why: Close) -> None:
        self._part(why, close_frame(why.code, why.reason))

    def _part(self, why: Close, goodbye: bytes) -> None:
        """Hear the client no more, and say goodbye behind all that it is owed.

        Args:
            why: what is counted, if nothing was before.
            goodbye: a close frame, for a client that has none yet.
        """
        self._hear_no_more()
        self._ending = self._ending or why
        if self._transport is GONE:
            self._finish()
        elif self._state is State.CLOSING:  # it has our close frame, and this is how it answers
            self._state = State.DISCARDING
            self._end()
        elif self._state is State.OPEN:
            self._goodbye = goodbye
            self._state = State.PARTING
            self.expect_within(self._shared.deadline_s)
            assert self._sink is not None
            self._sink.when_written(self._say_goodbye)

    def _forget_lost(self) -> None:
        """Give up what was not heard yet of a connection that has ended."""
        if self._transport is GONE:
            self._finish()

    def _hear_no_more(self) -> None:
        self._parser = self._unheard = None
        if self._kept_bytes:
            self._note_kept(0)

    def _say_goodbye(self) -> None:
        if self._state is State.PARTING:
            self._leave_sink()
            self._put(self._goodbye)
            self._state = State.DISCARDING
            self._end()

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
        if self._transport.can_write_eof() and not self._sends_no_more:
            self._transport.write_eof()
        else:  # TLS has no half-close; its shutdown does the same
            self._transport.close()

    def _put(self, data: bytes) -> None:
        """Write a control frame, behind whatever waits."""
        if not data or self._transport.is_closing():
            return
        shared = self._shared
        backlog = self._backlog
        if backlog is not None:
            if (
                self._state is State.OPEN
                and self.backlog_bytes + len(data) > shared.backlogs.limit_bytes
            ):
                self.close(Close.SLOW_CONSUMER)
                return
            self._write_now(data)
            backlog.note(data, 0, self.backlog_bytes)
            shared.backlogs.grew(len(data))
            return
        self._write_now(data)
        if self._backlog is not None:
            shared.fell_behind.remove(self)
            self.note_backlog(data, 0)

    def _write_records(self, data: bytes) -> None:
        """Write to a TLS transport, a record's worth at a time (RFC 8446 section 5.1).

        What uvloop's TLS layer has passed to the TCP transport below is in nobody's count. It
        passes on what it is given in one piece, whatever the size, until that one has 64 KiB.
        """
        if len(data) <= RECORD_BYTES:
            self._transport.write(data)
            return
        view = memoryview(data)
        for start in range(0, len(data), RECORD_BYTES):
            self._transport.write(view[start : start + RECORD_BYTES])

    def _write_behind(self, batch: bytes) -> None:
        """Write a batch to a client that is behind, or close it where that is too much."""
        shared = self._shared
        backlog = self._backlog
        assert backlog is not None
        waiting = self.backlog_bytes
        shared.ledger.deliveries += backlog.trim(waiting)
        if waiting + len(batch) > shared.backlogs.limit_bytes:
            log.info("slow consumer closed", extra={"backlog_bytes": waiting})
            self.close(Close.SLOW_CONSUMER)
            self.write(batch)  # counts it, now that the client has left
            return
        self._write_now(batch)
        shared.withheld += 1
        shared.ledger.sent_bytes += len(batch)
        backlog.note(batch, shared.messages_in_hand, self.backlog_bytes)
        shared.backlogs.grew(len(batch))

    @property
    def _drop(self) -> Drop:
        slow = self._ending is Close.SLOW_CONSUMER
        return Drop.SLOW_CONSUMER if slow else Drop.DISCONNECTED

    def _settle(self, backlog: Backlog, waiting: int) -> None:
        """Enter into the books what of the backlog went and what never will."""
        delivered, dropped = backlog.split(waiting)
        self._shared.ledger.deliveries += delivered
        self._shared.ledger.drops[self._drop] += dropped
        self._shared.backlogs.discard(self)
        self._backlog = None

    def _expire(self) -> None:
        self._expiry = None
        self._part_for(Close.TOKEN_EXPIRED)

    def _cut_off(self) -> None:
        self._deadline = None
        if self._state is State.PARTING and not self._transport.is_closing():
            # What it is owed takes too long, maybe because of others; it is told why it goes.
            self._say_goodbye()
            return
        if self._state is State.HANDSHAKE:
            self._shared.ledger.refusals[Refusal.HANDSHAKE_TIMEOUT] += 1
        self._transport.abort()

    def _cancel_deadline(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None


def _answer(payload: bytes) -> bytes:
    """Return what answers a client's close frame: the same code (RFC 6455 section 5.5.1).

    Where it gave none it is told 1000: an answer without a code reads like an end without an
    answer.
    """
    return control(CLOSE, payload) if payload else close_frame(Close.CLIENT.code)
