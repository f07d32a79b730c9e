"""Own one RFC 6455 connection: from bytes to messages, and through the closing handshake.

uvicorn creates one `WebSocketConnection` for each upgrade (`ws=`). The handshake goes through ASGI
(see `handshake`). Once the endpoint has attached a sink, ASGI is not involved any more, and each
message goes to the sink by a plain call. Knows no channel: the sink is its only view of one.
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
    TEXT,
    ProtocolViolationError,
    control,
    count_complete_messages,
    header,
)
from websocket_relay.wire.frames import close as close_frame
from websocket_relay.wire.parser import PAUSE, PAUSE_INFLATING, Parser, ParserEvent
from websocket_relay.wire.publish_policy import PublishPolicy

log = logging.getLogger(__name__)

HEARTBEAT = b'\n{"type":"heartbeat"}'
HEARTBEAT_FRAME = header(TEXT, len(HEARTBEAT)) + HEARTBEAT
"""Follows each ping to a client of relay.v1: a script in a browser does not see pings."""


class WebSocketConnection(Connection):
    """One client's connection, from the upgrade to its end.

    Args:
        config, server_state, app_state, _loop: the arguments that uvicorn passes to a WebSocket
            protocol.
        shared: bounds and counters.
    """

    __slots__ = (
        "_drained_bytes_at_ping",
        "_early_data",
        "_has_priority",
        "_is_queued",
        "_parser",
        "_partial_bytes",
        "_pause_count",
        "_ping_unanswered_since",
        "_publish_policy",
        "_queued_close_frame",
        "_read_paused_at",
        "_unparsed",
        "_unparsed_bytes",
    )

    count_complete_messages = staticmethod(count_complete_messages)

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
        self._early_data = b""
        self._partial_bytes = 0  # of an incomplete message, as last reported to `PartialMessages`
        self._drained_bytes_at_ping = 0
        self._pause_count = 0
        self._read_paused_at = 0.0  # start of the pause in reading; 0: none
        self._ping_unanswered_since = 0.0
        self._unparsed: Iterator[ParserEvent] | None = None  # the rest of the last read
        self._unparsed_bytes = 0  # as added to `shared.unparsed`; unchanged until all is parsed
        self._is_queued = False  # whether parse_slice is queued or running
        self._has_priority = False  # goes before other queued work, to finish a message
        self._queued_close_frame = b""
        self._publish_policy: PublishPolicy | None = None

    # Handshake

    @property
    def in_handshake(self) -> bool:
        """Whether the upgrade is neither accepted nor refused yet."""
        return self._state is ConnectionState.HANDSHAKE

    def attach_sink(self, sink: MessageSink) -> None:
        """Attach the sink, and parse what arrived during the handshake."""
        super().attach_sink(sink)
        self._parser = Parser(self._shared.max_message_bytes, inflates=self.encoding != PLAIN)
        if self._early_data:
            early_data, self._early_data = self._early_data, b""
            self._transport.resume_reading()
            self.data_received(early_data)

    def set_publish_policy(self, policy: PublishPolicy) -> None:
        """Set what the client may publish."""
        self._publish_policy = policy

    def reject_upgrade(self, response: bytes) -> None:
        """Answer the upgrade with an HTTP response and close the connection."""
        if self._state is ConnectionState.LOST:
            return
        self._state = ConnectionState.DISCARDING
        if self._early_data:
            self._early_data = b""
            self._transport.resume_reading()
        self._transport.write(response)
        self._close_after_flush()

    # Receiving

    def data_received(self, data: bytes) -> None:
        """Parse bytes from the client: first half of the hot path."""
        self._ping_unanswered_since = 0.0
        if self._parser is None:
            self._keep_early_data(data)
            return
        events = self._parser.feed(data)
        shared = self._shared
        pending, appends = shared.pending_fan_out, shared.pending_appends
        if pending.bytes > pending.limit_bytes or appends.bytes > appends.limit_bytes:
            self._defer_parsing(events, len(data))
        elif (pause := self._process_events(events)) is not None:
            # uvloop reads up to 256 KB at a time, and goes on reading as long as there is so much.
            # Tens of thousands of tiny frames, or data that inflates to a thousand times its size,
            # would block the loop.
            if pause is PAUSE_INFLATING and (self._is_paused or shared.parse_slicer.is_busy):
                self._discard_half_inflated()
            self._defer_parsing(events, len(data))

    def _defer_parsing(self, events: Iterator[ParserEvent], size: int) -> None:
        """Queue the rest of a read for parsing in slices, and pause reading until then."""
        shared = self._shared
        self._unparsed = events
        self._unparsed_bytes = size
        shared.unparsed.bytes += size
        self._pause_transport()
        self._schedule_parsing()
        if shared.unparsed.is_exceeded:
            shared.pause_all_reading()

    @property
    def has_unparsed(self) -> bool:
        """Whether bytes were read from the client that are not parsed yet."""
        return self._unparsed is not None

    def parse_slice(self, until: float) -> bool:
        """Parse more of the last read.

        Args:
            until: when to stop, by `time.perf_counter`.

        Returns:
            False to be called again after the other queued work; True if all is parsed, the client
            is paused, or the call is in the queue already.
        """
        try:
            is_done = self._parse_slice(until)
        except BaseException:  # as uvloop does if data_received raises
            self._release_unparsed()
            self._is_queued = False
            self.abort(Close.INTERNAL_ERROR)
            raise
        self._is_queued = not is_done
        if is_done or not self._has_priority:
            return is_done
        self._shared.parse_slicer.schedule_work(self.parse_slice, first=True)
        return True

    def _parse_slice(self, until: float) -> bool:
        while self._unparsed is not None:
            if self._apply_flow_control():
                return True  # resume_reading queues the rest
            pause = self._process_events(self._unparsed)
            if pause is None:
                self._release_unparsed()
            elif pause is PAUSE_INFLATING and self._is_paused:
                self._discard_half_inflated()
            elif perf_counter() > until or (self._has_priority and pause is PAUSE):
                # Too many half-inflated messages would fill the memory: this one is finished first.
                self._has_priority = pause is PAUSE_INFLATING
                return self._is_paused
        if self._transport is CLOSED_TRANSPORT:
            self._finalize()
        elif self._has_received_eof and self._parser is not None:
            self._close_abnormally()
        elif self._shared.unparsed.is_exceeded:
            self._shared.unparsed.pause_publisher(self)
        elif not self._is_paused:
            self._resume_transport()
        return True

    @property
    def _is_paused(self) -> bool:
        return self._pause_count > 0

    def _apply_flow_control(self) -> bool:
        """Pause the client if too much waits; return whether it is paused."""
        assert self._sink is not None
        self._sink.pause_if_over_limit(self)
        return self._is_paused

    def _release_unparsed(self) -> None:
        self._unparsed = None
        if self._unparsed_bytes:
            self._shared.unparsed.drained(self._unparsed_bytes)
            self._unparsed_bytes = 0

    def _discard_half_inflated(self) -> None:
        """Discard a half-inflated message, if it can be inflated again from its start."""
        if self._parser is not None and self._parser.discard_inflated():
            self._report_partial_bytes(0)

    def _schedule_parsing(self) -> None:
        if not self._pause_count and not self._is_queued:
            self._is_queued = True
            self._shared.parse_slicer.schedule_work(self.parse_slice)

    def _pause_transport(self) -> None:
        self._read_paused_at = self._read_paused_at or monotonic()
        self._transport.pause_reading()

    def _resume_transport(self) -> None:
        if self._read_paused_at and self._publish_policy is not None:
            self._publish_policy.credit_paused_time(monotonic() - self._read_paused_at)
        self._read_paused_at = 0.0
        if not self._transport.is_closing():
            self._transport.resume_reading()

    # The hot path: one loop, no call but those that a message needs.
    def _process_events(self, events: Iterator[ParserEvent]) -> ParserEvent | None:  # noqa: C901
        """Process events until the parser pauses; return that event, or None at their end."""
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
                        end = Close.CLIENT, _close_response(payload)
                elif event is PAUSE or event is PAUSE_INFLATING:
                    pause = event
                    break
                elif self._publish_policy is not None and (why := self._publish_policy.violation()):
                    end = why, close_frame(why.code, why.reason)
                    break
                else:
                    sink.publish(self, opcode, payload)
        except ProtocolViolationError as error:
            why = error.close
            reason = f"{why.reason}: {error.detail}" if error.detail else why.reason
            end = why, close_frame(why.code, reason)
        if pongs and self._state is ConnectionState.OPEN:
            # Nothing follows our own close frame: pings are not answered any more.
            self._write_control(b"".join(pongs))
        if end is not None:
            self._queue_close(*end)
        if self._parser is None:  # an event above stopped the parsing
            return None
        if parser.buffered_bytes != self._partial_bytes:
            self._report_partial_bytes(parser.buffered_bytes)
        if pause is None or self._parser is None:
            return None
        sink.pause_if_over_limit(self)
        return pause

    def _report_partial_bytes(self, size: int) -> None:
        self._partial_bytes = size
        self._shared.partial_messages.record_partial_bytes(self, size)

    def drop_partial_message(self) -> None:
        """Close the connection, so that the memory of its incomplete message is freed."""
        self._queue_close_for(Close.PARTIAL_MESSAGES)

    def fail_publish(self, *, is_unconfirmed: bool) -> None:
        """Close the connection: its message could not be relayed."""
        self._queue_close_for(Close.BACKPLANE_UNAVAILABLE)

    def eof_received(self) -> bool:
        """Close after the client's EOF: an abnormal closure, if no close frame came before it.

        Returns:
            Whether the connection stays open to send the client's backlog.
        """
        self._has_received_eof = True
        if self._state is ConnectionState.CLOSE_PENDING and self._transport.can_write_eof():
            return True
        self._send_queued_close()
        if self._unparsed is None:
            self._close_abnormally()
        else:
            # With TLS, data and EOF arrive in one call. uvloop discards writes from now on, and
            # takes up to half a minute to close.
            self._detach_from_sink()
        if self._deadline_timer is None:
            self.start_deadline(self._shared.deadline_s)
        return self._stays_open_after_eof()

    def connection_lost(self, exc: Exception | None) -> None:
        """Release the backlog and count it. Called once and last, in every case.

        Bytes that were read before are parsed all the same. Until then the connection counts as
        established: a client that sends and disconnects must not bypass the limits.
        """
        super().connection_lost(exc)
        if self._unparsed is None:
            self._finalize()

    def _close_abnormally(self) -> None:
        self._detach(Close.CONNECTION_LOST)
        self._state = ConnectionState.DISCARDING
        self._stop_parsing()
        if self._backlog is None:  # otherwise once it is empty: see resume_writing
            self._transport.close()

    def _finalize(self) -> None:
        self._stop_parsing()
        super()._finalize()

    # Closing and keepalive

    def close(self, why: Close, reason: str = "") -> None:
        """Start the closing handshake; the client has `deadline_s` to answer.

        Messages that the client sends until it answers are still relayed. If a close frame is
        queued already, that one is sent now instead.

        Args:
            why: the close code and the metric label.
            reason: the reason on the wire, instead of `why.reason`.
        """
        self._finalize_if_lost()
        self._send_queued_close()
        if self._state is not ConnectionState.OPEN:
            return
        self._detach(why)
        self._state = ConnectionState.CLOSING
        self.start_deadline(self._shared.deadline_s)
        self._write_control(close_frame(why.code, reason or why.reason))

    def abort(self, why: Close) -> None:
        """End the TCP connection now; its backlog is dropped and counted."""
        self._finalize_if_lost()
        super().abort(why)

    def ping(self, frame: bytes, now: float) -> None:
        """Send the keepalive's ping; silence is timed from the first unanswered one."""
        if self._state is ConnectionState.OPEN:
            self._write_control(frame + HEARTBEAT_FRAME if self.sends_heartbeats else frame)
            if not self._ping_unanswered_since:
                self._ping_unanswered_since = now
                self._drained_bytes_at_ping = self.drained_bytes

    def is_ping_overdue(self, since: float) -> bool:
        """Return whether a ping sent at `since` or before is still unanswered.

        A client is not silent if the relay itself has paused reading from it, or if some of its
        backlog has left for its socket: its time starts again with the next ping.
        """
        if (
            self._state is not ConnectionState.OPEN
            or not 0.0 < self._ping_unanswered_since <= since
        ):
            return False
        if self._pause_count or self._unparsed or self.drained_bytes != self._drained_bytes_at_ping:
            self._ping_unanswered_since = 0.0
            return False
        return True

    # Flow control

    def pause_reading(self) -> None:
        """Stop reading from the client until `resume_reading` was called as often."""
        self._pause_count += 1
        if self._pause_count == 1:
            self._shared.paused_connections += 1
            self._pause_transport()

    def resume_reading(self) -> None:
        """Undo one `pause_reading`; the last one resumes parsing and reading."""
        self._pause_count -= 1
        if self._pause_count == 0:
            self._shared.paused_connections -= 1
            if self._unparsed is not None:
                self._schedule_parsing()
            else:
                self._resume_transport()

    # Private

    def _keep_early_data(self, data: bytes) -> None:
        # RFC 6455 section 4.1 requires clients to wait for the 101. Bytes that arrive with the
        # request or before the endpoint's decision are kept all the same: one read of them; TCP
        # buffers the rest. After the handshake, a missing parser means that input is discarded.
        if self._state is ConnectionState.HANDSHAKE and data:
            self._early_data += data
            self._transport.pause_reading()

    def _queue_close_for(self, why: Close) -> None:
        self._queue_close(why, close_frame(why.code, why.reason))

    def _queue_close(self, why: Close, frame: bytes) -> None:
        """Stop parsing, and queue a close frame after all pending deliveries.

        Args:
            why: the close reason that is counted, unless there is one already.
            frame: the close frame, for a client that was sent none yet.
        """
        self._stop_parsing()
        self._close_reason = self._close_reason or why
        if self._transport is CLOSED_TRANSPORT:
            self._finalize()
        elif self._state is ConnectionState.CLOSING:  # our close frame is sent; this answers it
            self._state = ConnectionState.DISCARDING
            self._close_after_flush()
        elif self._state is ConnectionState.OPEN:
            self._queued_close_frame = frame
            self._state = ConnectionState.CLOSE_PENDING
            self.start_deadline(self._shared.deadline_s)
            assert self._sink is not None
            self._sink.call_when_written(self._send_queued_close)

    def _finalize_if_lost(self) -> None:
        """Discard the unparsed bytes of a connection that has ended."""
        if self._transport is CLOSED_TRANSPORT:
            self._finalize()

    def _stop_parsing(self) -> None:
        self._parser = None
        self._release_unparsed()
        if self._partial_bytes:
            self._report_partial_bytes(0)

    def _send_queued_close(self) -> None:
        if self._state is ConnectionState.CLOSE_PENDING:
            self._detach_from_sink()
            self._write_control(self._queued_close_frame)
            self._state = ConnectionState.DISCARDING
            self._close_after_flush()

    def _on_token_expired(self) -> None:
        self._expiry_timer = None
        self._queue_close_for(Close.TOKEN_EXPIRED)

    def _on_deadline(self) -> None:
        if self._state is ConnectionState.CLOSE_PENDING and not self._transport.is_closing():
            # Pending deliveries take too long, maybe because of others: send the close frame now.
            self._deadline_timer = None
            self._send_queued_close()
            return
        if self._state is ConnectionState.HANDSHAKE:
            self._shared.counters.refusals[Refusal.HANDSHAKE_TIMEOUT] += 1
        super()._on_deadline()


def _close_response(payload: bytes) -> bytes:
    """Return the response to a client's close frame: the same code (RFC 6455 section 5.5.1).

    A close frame without a code is answered with 1000: a response without a code reads like an end
    without a response.
    """
    return control(CLOSE, payload) if payload else close_frame(Close.CLIENT.code)
