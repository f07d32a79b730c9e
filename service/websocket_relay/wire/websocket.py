"""Speak RFC 6455 with one client: from bytes to messages, and through the closing handshake.

Messages go to the connection's sink by a plain call. Knows no channel: the sink is its only view of
one.
"""

from collections.abc import Iterator
from time import monotonic

from websocket_relay.messages import Message
from websocket_relay.outcomes import Close
from websocket_relay.wire.close_states import ConnectionState
from websocket_relay.wire.connection import Connection, MessageSink
from websocket_relay.wire.deflate import PLAIN
from websocket_relay.wire.delivery_format import Layout
from websocket_relay.wire.frames import (
    CLOSE,
    CONTROL,
    PING,
    PONG,
    ProtocolViolationError,
    control,
    count_complete_messages,
)
from websocket_relay.wire.frames import close as close_frame
from websocket_relay.wire.parser import PAUSE, PAUSE_INFLATING, Parser, ParserEvent
from websocket_relay.wire.relay_v1 import MAX_COMMAND_BYTES


class WebSocket:
    """RFC 6455, as the protocol of a connection: see `connection.WireProtocol`.

    Args:
        connection: the connection.
    """

    __slots__ = (
        "_connection",
        "_drained_bytes_at_ping",
        "_early_data",
        "_is_queued",
        "_parser",
        "_partial_bytes",
        "_pause_count",
        "_ping_unanswered_since",
        "_read_paused_at",
        "_sink",
        "_unparsed",
        "_unparsed_bytes",
    )

    has_closing_handshake = True
    count_complete_messages = staticmethod(count_complete_messages)

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._sink: MessageSink
        self._parser: Parser | None = None
        self._early_data = b""
        self._partial_bytes = 0  # of an incomplete message, as last reported to `PartialMessages`
        self._drained_bytes_at_ping = 0
        self._pause_count = 0
        self._read_paused_at = 0.0  # start of the pause in reading; 0: none
        self._ping_unanswered_since = 0.0
        self._unparsed: Iterator[ParserEvent] | None = None  # the rest of the last read
        self._unparsed_bytes = 0  # as added to `shared.unparsed`; unchanged until all is parsed
        self._is_queued = False  # whether the parsing of the rest is queued or running

    # Receiving

    def start_parsing(self, sink: MessageSink) -> None:
        """Pass the client's messages to a sink; parse what arrived during the handshake."""
        self._sink = sink
        layout, encoding, _ = self._connection.delivery_format
        header_bytes = MAX_COMMAND_BYTES + 1 if layout is Layout.HEADER else 0  # and its line feed
        max_bytes = self._connection.shared.max_message_bytes + header_bytes
        self._parser = Parser(max_bytes, inflates=encoding != PLAIN)
        if early_data := self._take_early_data():
            self.data_received(early_data)

    def data_received(self, data: bytes) -> None:
        """Parse bytes from the client: first half of the hot path."""
        self._ping_unanswered_since = 0.0
        if self._parser is None:
            self._keep_early_data(data)
            return
        events = self._parser.feed(data)
        shared = self._connection.shared
        pending, appends = shared.publish_limits
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
        shared = self._connection.shared
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

    def _parse_rest(self) -> Iterator[bool]:
        """Parse the rest of the last read, until it is parsed or the client is paused.

        Yields:
            After each step: whether a message is half inflated. It goes first then: too many of
            these would fill the memory.
        """
        try:
            while self._unparsed is not None:
                if self._pause_if_over_limit():
                    return  # resume_reading queues the rest
                pause = self._process_events(self._unparsed)
                if pause is None:
                    self._release_unparsed()
                elif pause is PAUSE_INFLATING and self._is_paused:
                    self._discard_half_inflated()
                else:
                    yield pause is PAUSE_INFLATING
        except Exception:  # as uvloop does if data_received raises
            self._release_unparsed()
            self._connection.abort(Close.INTERNAL_ERROR)
            raise
        finally:
            self._is_queued = False
        if self._connection.has_input_ended:
            self._connection.on_input_parsed()
        elif self._connection.shared.unparsed.is_exceeded:
            self._connection.shared.unparsed.pause_publisher(self)
        elif not self._is_paused:
            self._resume_transport()

    def _pause_if_over_limit(self) -> bool:
        self._sink.pause_if_over_limit(self)
        return self._is_paused

    def _release_unparsed(self) -> None:
        self._unparsed = None
        if self._unparsed_bytes:
            self._connection.shared.unparsed.drained(self._unparsed_bytes)
            self._unparsed_bytes = 0

    def _discard_half_inflated(self) -> None:
        """Discard a half-inflated message, if it can be inflated again from its start."""
        if self._parser is not None and self._parser.discard_inflated():
            self._report_partial_bytes(0)

    def _schedule_parsing(self) -> None:
        if not self._pause_count and not self._is_queued:
            self._is_queued = True
            self._connection.shared.parse_slicer.schedule_work(self._parse_rest())

    # The hot path: one loop, no call but those that a message needs.
    def _process_events(self, events: Iterator[ParserEvent]) -> ParserEvent | None:  # noqa: C901
        """Process events until the parser pauses; return that event, or None at their end."""
        parser, policy = self._parser, self._connection.publish_policy
        assert parser is not None
        messages: list[Message] = []
        pongs = b""
        end: tuple[Close, bytes, int] | None = None
        pause: ParserEvent | None = None
        try:
            for event in events:
                opcode, payload = event
                if opcode & CONTROL:
                    if opcode == PING:
                        pongs += control(PONG, payload)
                    elif opcode == CLOSE:
                        end = _end_of(payload)
                elif event is PAUSE or event is PAUSE_INFLATING:
                    pause = event
                    break
                elif policy is not None and (why := policy.violation()):
                    end = why, close_frame(why.code, why.reason), why.code
                    break
                else:
                    messages.append(event)
        except ProtocolViolationError as error:
            end = _end_after(error)
        if messages:
            try:
                self._sink.publish(self, messages)
            except ProtocolViolationError as error:
                end = _end_after(error)
        if pongs and self._connection.state is ConnectionState.OPEN:
            # Nothing follows our own close frame: pings are not answered any more.
            self._connection.write_control(pongs)
        if end is not None:
            self._connection.queue_close(*end)
        if self._parser is None:  # an event above stopped the parsing
            return None
        if parser.buffered_bytes != self._partial_bytes:
            self._report_partial_bytes(parser.buffered_bytes)
        return pause if self._parser is not None else None

    def _report_partial_bytes(self, size: int) -> None:
        self._partial_bytes = size
        self._connection.shared.partial_messages.record_partial_bytes(self, size)

    def drop_partial_message(self) -> None:
        """Close the connection, so that the memory of its incomplete message is freed."""
        self._connection.queue_close(Close.PARTIAL_MESSAGES)

    def fail_publish(self, *, is_unconfirmed: bool) -> None:
        """Close the connection: its message could not be relayed."""
        self._connection.queue_close(Close.BACKPLANE_UNAVAILABLE)

    def stop_parsing(self) -> None:
        """Parse nothing more; further input is discarded."""
        self._parser = None
        self._release_unparsed()
        self._take_early_data()
        if self._partial_bytes:
            self._report_partial_bytes(0)

    # RFC 6455 section 4.1 requires clients to wait for the 101. Bytes that arrive with the request
    # or before the endpoint's decision are kept all the same: one read of them; TCP buffers the
    # rest. After the handshake, a missing parser means that input is discarded.

    def _keep_early_data(self, data: bytes) -> None:
        if self._connection.in_handshake and data:
            self._early_data += data
            self._connection.transport.pause_reading()

    def _take_early_data(self) -> bytes:
        early_data, self._early_data = self._early_data, b""
        if early_data:
            self._connection.transport.resume_reading()
        return early_data

    # Closing and keepalive

    def encode_close(self, code: int, reason: str, retry_ms: int | None) -> bytes:
        """Return a close frame."""
        return close_frame(code, reason)

    def ping(self, frame: bytes, heartbeat: bytes, now: float) -> None:
        """Send the keepalive's ping; silence is timed from the first unanswered one."""
        connection = self._connection
        has_headers = connection.delivery_format.layout is Layout.HEADER
        connection.write_control(frame + heartbeat if has_headers else frame)
        if not self._ping_unanswered_since:
            self._ping_unanswered_since = now
            self._drained_bytes_at_ping = connection.drained_bytes

    def is_ping_overdue(self, since: float) -> bool:
        """Return whether a ping sent at `since` or before is still unanswered.

        A client is not silent if the relay itself has paused reading from it, or if some of its
        backlog has left for its socket: its time starts again with the next ping.
        """
        if not 0.0 < self._ping_unanswered_since <= since:
            return False
        has_drained = self._connection.drained_bytes != self._drained_bytes_at_ping
        if self._is_paused or self.has_unparsed or has_drained:
            self._ping_unanswered_since = 0.0
            return False
        return True

    # Flow control

    @property
    def _is_paused(self) -> bool:
        return self._pause_count > 0

    def pause_reading(self) -> None:
        """Stop reading from the client until `resume_reading` was called as often."""
        self._pause_count += 1
        if self._pause_count == 1:
            self._connection.shared.paused_connections += 1
            self._pause_transport()

    def resume_reading(self) -> None:
        """Undo one `pause_reading`; the last one resumes parsing and reading."""
        self._pause_count -= 1
        if self._pause_count == 0:
            self._connection.shared.paused_connections -= 1
            if self._unparsed is not None:
                self._schedule_parsing()
            else:
                self._resume_transport()

    def _pause_transport(self) -> None:
        self._read_paused_at = self._read_paused_at or monotonic()
        self._connection.transport.pause_reading()

    def _resume_transport(self) -> None:
        policy = self._connection.publish_policy
        if self._read_paused_at and policy is not None:
            policy.credit_paused_time(monotonic() - self._read_paused_at)
        self._read_paused_at = 0.0
        if not self._connection.transport.is_closing():
            self._connection.transport.resume_reading()


def _end_after(error: ProtocolViolationError) -> tuple[Close, bytes, int]:
    """Return the close reason, the close frame and the code that answer a violation."""
    why = error.close
    reason = f"{why.reason}: {error.detail}" if error.detail else why.reason
    return why, close_frame(why.code, reason), why.code


def _end_of(payload: bytes) -> tuple[Close, bytes, int]:
    """Return what answers a client's close frame: the same code (RFC 6455 section 5.5.1).

    A close frame without a code is answered with 1000: a response without a code reads like an end
    without a response.
    """
    if not payload:
        return Close.CLIENT, close_frame(Close.CLIENT.code), Close.CLIENT.code
    return Close.CLIENT, control(CLOSE, payload), int.from_bytes(payload[:2], "big")
