"""Speak RFC 6455 with one client: bytes to messages, messages to bytes, and a clean end.

uvicorn makes one `WebSocketConnection` for each upgrade (`ws=`). The handshake goes through ASGI
(see `handshake`); once the endpoint handed the connection over to a sink, nothing of ASGI is left
and each message goes to the sink by a plain call. Knows no channel: the sink is all it sees of the
room above.
"""

import asyncio
import logging
from collections.abc import Iterator
from time import monotonic, perf_counter
from typing import Any

from uvicorn.config import Config
from uvicorn.server import ServerState

from websocket_relay.outcomes import Close, Refusal
from websocket_relay.wire.connection import (
    CLOSED_TRANSPORT,
    Connection,
    ConnectionState,
    MessageSink,
)
from websocket_relay.wire.context import ConnectionContext
from websocket_relay.wire.deflate import PLAIN
from websocket_relay.wire.frames import (
    CLOSE,
    CONTROL,
    PING,
    PONG,
    ProtocolViolationError,
    control,
    count_whole,
)
from websocket_relay.wire.frames import close as close_frame
from websocket_relay.wire.parser import HALF, PAUSE, Parser, ParserEvent
from websocket_relay.wire.publish_policy import PublishPolicy

log = logging.getLogger(__name__)


class WebSocketConnection(Connection):
    """One client's connection, from the upgrade to its end.

    Args:
        config, server_state, app_state, _loop: what uvicorn gives a WebSocket protocol.
        shared: bounds and books.
    """

    __slots__ = (
        "_allowance",
        "_drained_at_ping",
        "_early",
        "_goodbye",
        "_holds",
        "_in_turns",
        "_is_first",
        "_kept_bytes",
        "_parser",
        "_paused_at",
        "_unanswered_since",
        "_unheard",
        "_unheard_bytes",
    )

    count_whole = staticmethod(count_whole)

    def __init__(
        self,
        config: Config,
        server_state: ServerState,
        app_state: dict[str, Any],
        _loop: asyncio.AbstractEventLoop | None = None,
        *,
        shared: ConnectionContext,
    ) -> None:
        super().__init__(shared)
        self._parser: Parser | None = None
        self._early = b""
        self._kept_bytes = 0  # of a message that is not whole, as the others were told
        self._drained_at_ping = 0
        self._holds = 0
        self._paused_at = 0.0  # since when it is not read; 0: it is
        self._unanswered_since = 0.0
        self._unheard: Iterator[ParserEvent] | None = None  # what is left of the last read
        self._unheard_bytes = 0  # as the others were told; it counts as a whole until it is heard
        self._in_turns = False  # whether read_on is called again, or being called
        self._is_first = False  # before the others who wait: to finish a message
        self._goodbye = b""
        self._allowance: PublishPolicy | None = None

    # The handshake's side

    @property
    def in_handshake(self) -> bool:
        """Whether the upgrade was neither accepted nor refused yet."""
        return self._state is ConnectionState.HANDSHAKE

    def hand_over(self, sink: MessageSink) -> None:
        """Give all further messages to the sink, those that came early first."""
        super().hand_over(sink)
        self._parser = Parser(self._shared.max_message_bytes, inflates=self.encoding != PLAIN)
        if self._early:
            early, self._early = self._early, b""
            self._transport.resume_reading()
            self.data_received(early)

    def allow(self, allowance: PublishPolicy) -> None:
        """Hold the client to what it may send."""
        self._allowance = allowance

    def refuse(self, response: bytes) -> None:
        """Answer the upgrade with an HTTP response and end the connection."""
        if self._state is ConnectionState.LOST:
            return
        self._state = ConnectionState.DISCARDING
        if self._early:
            self._early = b""
            self._transport.resume_reading()
        self._transport.write(response)
        self._end()

    # What the client says

    def data_received(self, data: bytes) -> None:
        """Take bytes from the client: the hot path's first half."""
        self._unanswered_since = 0.0
        if self._parser is None:
            self._keep_early(data)
            return
        events = self._parser.feed(data)
        shared = self._shared
        pending, appends = shared.pending, shared.appends
        if pending.bytes > pending.limit_bytes or appends.bytes > appends.limit_bytes:
            self._set_aside(events, len(data))
        elif (pause := self._hear(events)) is not None:
            # uvloop reads up to 256 KB at a time, and goes on reading as long as there is so much.
            # Tiny frames by the ten thousand, or what inflates to a thousand times as much, would
            # keep everybody waiting.
            if pause is HALF and (self._is_held or shared.reading.is_busy):
                self._let_go()
            self._set_aside(events, len(data))

    def _set_aside(self, events: Iterator[ParserEvent], size: int) -> None:
        """Hear what was read later, in turns, and read no more until then."""
        shared = self._shared
        self._unheard = events
        self._unheard_bytes = size
        shared.unheard.bytes += size
        self._read_no_more()
        self._hear_soon()
        if shared.unheard.is_shut:
            shared.read_nobody()

    @property
    def is_unheard(self) -> bool:
        """Whether something was read from the client that is not heard yet."""
        return self._unheard is not None

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
            self._note_heard()
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
            if self._must_wait():
                return True  # resume_reading comes back here
            pause = self._hear(self._unheard)
            if pause is None:
                self._note_heard()
            elif pause is HALF and self._is_held:
                self._let_go()
            elif perf_counter() > until or (self._is_first and pause is PAUSE):
                self._is_first = pause is HALF  # all of them half inflated would fill the memory
                return self._is_held
        if self._transport is CLOSED_TRANSPORT:
            self._finish()
        elif self._sends_no_more and self._parser is not None:
            self._vanish()
        elif self._shared.unheard.is_shut:
            self._shared.unheard.hold(self)
        elif not self._is_held:
            self._read_again()
        return True

    @property
    def _is_held(self) -> bool:
        return self._holds > 0

    def _must_wait(self) -> bool:
        """Tell whether the client is held back, now that it is about to be heard."""
        assert self._sink is not None
        self._sink.hold_back(self)
        return self._is_held

    def _note_heard(self) -> None:
        self._unheard = None
        if self._unheard_bytes:
            self._shared.unheard.drained(self._unheard_bytes)
            self._unheard_bytes = 0

    def _let_go(self) -> None:
        """Keep nothing of a message that is half inflated, where it can be inflated again."""
        if self._parser is not None and self._parser.let_go():
            self._note_kept(0)

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
    def _hear(self, events: Iterator[ParserEvent]) -> ParserEvent | None:  # noqa: C901
        """Take events until the parser pauses; return how it does, or None at their end."""
        parser, sink = self._parser, self._sink
        assert parser is not None
        assert sink is not None
        pongs = []
        end: tuple[Close, bytes] | None = None
        pause: ParserEvent | None = None
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
        except ProtocolViolationError as breach:
            why = breach.close
            reason = f"{why.reason}: {breach.detail}" if breach.detail else why.reason
            end = why, close_frame(why.code, reason)
        if pongs and self._state is ConnectionState.OPEN:
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

    def tell_unavailable(self, *, in_doubt: bool) -> None:
        """Close the client: its message could not be relayed."""
        self._part_for(Close.UNAVAILABLE)

    def eof_received(self) -> bool:
        """Take note that the client sends no more: without a close frame it vanished.

        Returns:
            Whether the connection stays open for what the client is still owed.
        """
        self._sends_no_more = True
        if self._state is ConnectionState.PARTING and self._transport.can_write_eof():
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
        return self._outlasts_end()

    def connection_lost(self, exc: Exception | None) -> None:
        """Settle the books: whatever happened, this is called once and last.

        What was read before is heard all the same, and until then it counts as a connection: words
        that nobody waits for must not be a way around the limits.
        """
        super().connection_lost(exc)
        if self._unheard is None:
            self._finish()

    def _vanish(self) -> None:
        self._leave(Close.VANISHED)
        self._state = ConnectionState.DISCARDING
        self._hear_no_more()
        if self._backlog is None:  # otherwise once it has left: see resume_writing
            self._transport.close()

    def _finish(self) -> None:
        self._hear_no_more()
        super()._finish()

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
        if self._state is not ConnectionState.OPEN:
            return
        self._leave(why)
        self._state = ConnectionState.CLOSING
        self.expect_within(self._shared.deadline_s)
        self._put(close_frame(why.code, reason or why.reason))

    def abort(self, why: Close) -> None:
        """End the TCP connection now; what waits is dropped and counted."""
        self._forget_lost()
        super().abort(why)

    def ping(self, frame: bytes, now: float) -> None:
        """Send the sweep's ping; the client's silence is timed from the first unanswered one."""
        if self._state is ConnectionState.OPEN:
            self._put(frame)
            if not self._unanswered_since:
                self._unanswered_since = now
                self._drained_at_ping = self.drained_bytes

    def is_silent(self, since: float) -> bool:
        """Tell whether the client owes an answer to a ping sent at `since` or before.

        A client that the relay itself does not read, or whose socket took some of what it is
        behind with, is not silent: its time begins again with the next ping.
        """
        if self._state is not ConnectionState.OPEN or not 0.0 < self._unanswered_since <= since:
            return False
        if self._holds or self._unheard or self.drained_bytes != self._drained_at_ping:
            self._unanswered_since = 0.0
            return False
        return True

    # Flow control

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

    # Inside

    def _keep_early(self, data: bytes) -> None:
        # RFC 6455 section 4.1 has clients wait for the 101, but bytes that came with the request
        # or while the endpoint decides are not lost: one read of them, then the rest stays with
        # TCP. Past the handshake there is no parser because nothing counts any more.
        if self._state is ConnectionState.HANDSHAKE and data:
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
        if self._transport is CLOSED_TRANSPORT:
            self._finish()
        elif (
            self._state is ConnectionState.CLOSING
        ):  # it has our close frame, and this is how it answers
            self._state = ConnectionState.DISCARDING
            self._end()
        elif self._state is ConnectionState.OPEN:
            self._goodbye = goodbye
            self._state = ConnectionState.PARTING
            self.expect_within(self._shared.deadline_s)
            assert self._sink is not None
            self._sink.when_written(self._say_goodbye)

    def _forget_lost(self) -> None:
        """Give up what was not heard yet of a connection that has ended."""
        if self._transport is CLOSED_TRANSPORT:
            self._finish()

    def _hear_no_more(self) -> None:
        self._parser = None
        self._note_heard()
        if self._kept_bytes:
            self._note_kept(0)

    def _say_goodbye(self) -> None:
        if self._state is ConnectionState.PARTING:
            self._leave_sink()
            self._put(self._goodbye)
            self._state = ConnectionState.DISCARDING
            self._end()

    def _expire(self) -> None:
        self._expiry = None
        self._part_for(Close.TOKEN_EXPIRED)

    def _cut_off(self) -> None:
        if self._state is ConnectionState.PARTING and not self._transport.is_closing():
            # What it is owed takes too long, maybe because of others; it is told why it goes.
            self._deadline = None
            self._say_goodbye()
            return
        if self._state is ConnectionState.HANDSHAKE:
            self._shared.ledger.refusals[Refusal.HANDSHAKE_TIMEOUT] += 1
        super()._cut_off()


def _answer(payload: bytes) -> bytes:
    """Return what answers a client's close frame: the same code (RFC 6455 section 5.5.1).

    Where it gave none it is told 1000: an answer without a code reads like an end without an
    answer.
    """
    return control(CLOSE, payload) if payload else close_frame(Close.CLIENT.code)
