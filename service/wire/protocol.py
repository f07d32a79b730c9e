"""Speak RFC 6455 with one client: bytes to messages, messages to bytes, and a clean end.

uvicorn makes one `RelayProtocol` for each upgrade (`ws=`). The handshake goes through ASGI (see
`handshake`); once the endpoint handed the connection over to a sink, nothing of ASGI is left and
each message goes to the sink by a plain call. Parsing is `websockets`' sans-I/O ServerProtocol.
Knows no channel: the sink is all it sees of the room above.
"""

import asyncio
import logging
from collections.abc import Callable
from enum import Enum, auto
from time import perf_counter
from typing import Any, Protocol, cast

from uvicorn.config import Config
from uvicorn.server import ServerState
from websockets.exceptions import PayloadTooBig, ProtocolError
from websockets.frames import Frame, Opcode
from websockets.protocol import SEND_EOF
from websockets.server import ServerProtocol

from service.errors import Close, Drop, Refusal
from service.wire.allowance import Allowance
from service.wire.backlog import Backlog
from service.wire.frames import MAX_CONTROL_BYTES
from service.wire.frames import close as close_frame
from service.wire.shared import Shared

log = logging.getLogger(__name__)

# What ends websockets' parser, in the relay's words; anything else is a fault of the relay.
PARSER_CLOSES: dict[type[Exception], Close] = {
    ProtocolError: Close.PROTOCOL,
    UnicodeDecodeError: Close.NOT_UTF8,  # in the reason of a close frame
    PayloadTooBig: Close.TOO_BIG,
}

EMPTY = b"\x88\x00"  # a close frame without a code
NORMAL = close_frame(Close.CLIENT.code)

RECORD_BYTES = 16_384

PIECE_BYTES = 2048  # parsed at once; of the smallest frames it holds some three hundred
QUICK_S = 0.0001  # a piece that took no longer may be followed by a larger one

TEXT, BINARY, CONT = Opcode.TEXT, Opcode.BINARY, Opcode.CONT


def dismiss(parser: ServerProtocol) -> None:
    """Free a parser at once: its generator holds it, and it holds its generator."""
    parser.parser.close()


class Sink(Protocol):
    """Where a connection's messages go, and what it says of itself. Never blocks, never raises."""

    def publish(self, client: "RelayProtocol", opcode: int, payload: bytes) -> None:
        """Take a whole message from the client."""

    def leave(self, client: "RelayProtocol") -> None:
        """Write to the client no longer. Said once."""

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
        "_fragments",
        "_fragments_opcode",
        "_holds",
        "_on_lost",
        "_parser",
        "_shared",
        "_sink",
        "_state",
        "_transport",
        "_unanswered_since",
        "_unread",
        "_write_now",
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
        self._parser: ServerProtocol | None = None
        self._sink: Sink | None = None
        self._early = b""
        self._fragments: bytearray | None = None
        self._fragments_opcode = TEXT
        self._backlog: Backlog | None = None
        self._drained_at_ping = 0
        self._holds = 0
        self._unanswered_since = 0.0
        self._unread: memoryview | None = None
        self._deadline: asyncio.TimerHandle | None = None
        self._ending: Close | None = None
        self._allowance: Allowance | None = None
        self._expiry: asyncio.TimerHandle | None = None
        self._on_lost: Callable[[], None] | None = None
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

    def open(self, response: bytes, parser: ServerProtocol) -> None:
        """Send the 101 and be a WebSocket from now on.

        Args:
            response: the whole response head.
            parser: a parser in the state OPEN.
        """
        shared = self._shared
        self._state = State.OPEN
        self._parser = parser
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
        if self._backlog is None:
            self.write = self._write_now
        else:
            self.write = self._write_behind
            sink.fell_behind(self)
        if self._early:
            early, self._early = self._early, b""
            self._transport.resume_reading()
            self.data_received(early)

    def allow(self, allowance: Allowance) -> None:
        """Hold the client to what it may send."""
        self._allowance = allowance

    def expire_in(self, seconds: float) -> None:
        """Close the client after so many seconds (3000), unless it has gone by then."""
        self._expiry = asyncio.get_running_loop().call_later(seconds, self._expire)

    def when_lost(self, act: Callable[[], None]) -> None:
        """Call `act` once, when the TCP connection has ended."""
        self._on_lost = act

    def refuse(self, response: bytes) -> None:
        """Answer the upgrade with an HTTP response and end the connection."""
        if self._state is State.LOST:
            return
        self._state = State.DISCARDING
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
        elif len(data) <= PIECE_BYTES:
            self._parse(data)
        else:
            # uvloop reads up to 256 KB at a time, and goes on reading as long as there is so much.
            # Tiny frames by the ten thousand would keep everybody waiting.
            self._unread = memoryview(data)
            self._transport.pause_reading()
            self._shared.reading.add(self.read_on)

    def read_on(self, until: float) -> bool:
        """Parse some of what was read, in pieces that grow while they are quickly done.

        Args:
            until: when to stop, by `time.perf_counter`.

        Returns:
            Whether there is nothing to do for now: all is parsed, or the client is held back.
        """
        size = PIECE_BYTES
        started = perf_counter()
        while self._unread and self._parser is not None and not self._holds:
            piece, self._unread = bytes(self._unread[:size]), self._unread[size:]
            self._parse(piece)
            now = perf_counter()
            if now > until:
                return False
            if now - started < QUICK_S:
                size *= 2
            started = now
        if self._unread and self._parser is not None:
            return True  # held: resume_reading comes back here
        self._unread = None
        if not self._holds and not self._transport.is_closing():
            self._transport.resume_reading()
        return True

    def _hear_out(self) -> None:
        """Take what was read before the end: one read at most. TLS brings both in one call."""
        unread, self._unread = self._unread, None
        if unread and self._parser is not None:
            self._parse(bytes(unread))

    def _parse(self, data: bytes) -> None:
        parser = self._parser
        assert parser is not None
        parser.receive_data(data)
        for frame in parser.events_received():
            opcode = frame.opcode  # type: ignore[union-attr]  # no Request after the handshake
            if opcode is TEXT or opcode is BINARY or opcode is CONT:
                self._data_frame(frame)  # type: ignore[arg-type]
            elif opcode is Opcode.CLOSE:
                self._leave(Close.CLIENT)
                if not frame.data:  # type: ignore[union-attr]
                    self._say_normal(parser)
            if self._parser is None:
                return  # a message ended the connection; what came behind it does not count
        if parser.parser_exc is not None:
            why = PARSER_CLOSES.get(type(parser.parser_exc), Close.INTERNAL)
            self._fail(why, str(parser.parser_exc) if why is Close.PROTOCOL else "")
        elif parser.writes:
            self._flush(parser)  # pongs, and the echo of a close frame

    def eof_received(self) -> None:
        """Take note that the client sends no more: without a close frame it vanished."""
        self._hear_out()
        self._leave(Close.VANISHED)
        self._state = State.DISCARDING
        self._drop_parser()
        if self._deadline is None and self.backlog_bytes:
            self.expect_within(self._shared.deadline_s)

    def connection_lost(self, exc: Exception | None) -> None:
        """Settle the books: whatever happened, this is called once and last."""
        shared = self._shared
        self._hear_out()
        self._leave(Close.VANISHED)
        self._state = State.LOST
        self._drop_parser()
        # Batches may name this object for a while: what TLS had waiting must not wait with it.
        self._transport = GONE
        self._write_now = GONE.write
        self._cancel_deadline()
        if self._backlog is not None:
            # How much of it left before the loss nobody knows: what was not seen to go is missed.
            self._settle(self._backlog, self._backlog.noted_bytes)
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

        Messages that the client sends until it answers are still relayed.

        Args:
            why: the code and the label.
            reason: what stands on the wire instead of `why.reason`.
        """
        if self._state is not State.OPEN or self._parser is None:
            return
        self._leave(why)
        self._state = State.CLOSING
        self._parser.send_close(why.code, reason or why.reason)
        self.expect_within(self._shared.deadline_s)
        self._put(b"".join(self._parser.data_to_send()))

    def close_when_written(self, why: Close, reason: str) -> None:
        """Close once the client was written all that it is owed so far."""
        if self._sink is not None and self._state is State.OPEN:
            self._sink.when_written(lambda: self.close(why, reason))

    def abort(self, why: Close) -> None:
        """End the TCP connection now; what waits is dropped and counted."""
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
        if self._holds or self._unread or self.drained_bytes != self._drained_at_ping:
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
            self._transport.pause_reading()

    def resume_reading(self) -> None:
        """Read on, if nobody else holds the client back."""
        self._holds -= 1
        if self._holds == 0:
            self._shared.held -= 1
            if self._unread:
                self._shared.reading.add(self.read_on)
            elif not self._transport.is_closing():
                self._transport.resume_reading()

    def pause_writing(self) -> None:
        """Take note that the write under way filled the socket: the client is behind now."""
        self._backlog = Backlog()
        if self._sink is not None and self._state is State.OPEN:
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
        if self._sink is not None and self._state is State.OPEN:
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

    def _data_frame(self, frame: Frame) -> None:
        payload = frame.data
        opcode = frame.opcode
        size = len(payload) + (len(self._fragments) if self._fragments is not None else 0)
        if size > self._shared.max_message_bytes:
            self._fail(Close.TOO_BIG)
            return
        if opcode is CONT or not frame.fin:
            if self._fragments is None:
                self._fragments = bytearray()
                self._fragments_opcode = opcode
                self._allow_more(MAX_CONTROL_BYTES)
            # One growing buffer: a flood of tiny fragments costs their bytes, not their number.
            self._fragments += payload
            if not frame.fin:
                return
            payload, opcode = bytes(self._fragments), self._fragments_opcode
            self._fragments = None
            self._allow_more(0)
        elif type(payload) is not bytes:
            payload = bytes(payload)
        if opcode is TEXT:
            try:
                payload.decode()
            except UnicodeDecodeError:
                self._fail(Close.NOT_UTF8)
                return
        if self._allowance is not None and (objection := self._allowance.objection()):
            self._fail(objection)
        elif self._sink is not None:
            self._sink.publish(self, opcode, payload)

    def _allow_more(self, size: int) -> None:
        # The parser holds control frames between fragments against what is left for the message.
        assert self._parser is not None
        self._parser.max_message_size = self._shared.max_message_bytes + size

    def _fail(self, why: Close, detail: str = "") -> None:
        """Fail the connection (RFC 6455 section 7.1.7): say why, and hear nothing any more.

        What the parser would say is not said: it may have read on, to a close frame even, when a
        message in front of that turns out to be one too many.
        """
        reason = f"{why.reason}: {detail}" if detail else why.reason
        was_open = self._state is State.OPEN
        self._leave(why)
        self._state = State.DISCARDING
        if was_open:
            self._put(close_frame(why.code, reason))
        self._end()

    def _say_normal(self, parser: ServerProtocol) -> None:
        # The parser echoes what the client said (RFC 6455 section 5.5.1). Where it gave no code
        # it is told 1000: an answer without a code reads like an end without an answer.
        parser.writes[:] = [NORMAL if data == EMPTY else data for data in parser.writes]

    def _leave(self, why: Close) -> None:
        """Say goodbye to the sink, once; the first reason is the one that counts."""
        if self._ending is not None:
            return
        self._ending = why
        if self._expiry is not None:
            self._expiry.cancel()
            self._expiry = None
        # A function that does not hold this object: a batch may still name it when it is gone.
        shared = self._shared
        slow = why is Close.SLOW_CONSUMER
        self.write = shared.withhold_slow if slow else shared.withhold_disconnected
        if self._sink is not None:
            self._sink.leave(self)

    def _flush(self, parser: ServerProtocol) -> None:
        """Write what the parser wants written, and end where it says so."""
        writes = parser.data_to_send()
        ends = writes[-1:] == [SEND_EOF]
        is_open = self._state is State.OPEN
        if ends:
            self._state = State.DISCARDING
        if is_open:  # behind our close frame nothing is said: pings are not answered any more
            self._put(b"".join(writes))
        if ends:
            self._end()

    def _drop_parser(self) -> None:
        self._fragments = None
        if self._parser is not None:
            dismiss(self._parser)
            self._parser = None

    def _end(self) -> None:
        # The server closes TCP first (RFC 6455 section 7.1.1), its sending half only: closing
        # both with unread bytes in the socket would send a reset, and with it the client could
        # lose the close frame. What still comes is thrown away until the client's end, or ours.
        self._drop_parser()
        if self._transport.is_closing():
            return
        self.expect_within(self._shared.deadline_s)
        if self._transport.can_write_eof():
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
        self.close_when_written(Close.TOKEN_EXPIRED, Close.TOKEN_EXPIRED.reason)

    def _cut_off(self) -> None:
        self._deadline = None
        if self._state is State.HANDSHAKE:
            self._shared.ledger.refusals[Refusal.HANDSHAKE_TIMEOUT] += 1
        self._transport.abort()

    def _cancel_deadline(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None
