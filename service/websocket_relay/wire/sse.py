"""Encode server-sent events (HTML, section 9.2), and own one connection that receives them.

Such a client sends nothing after its request. Knows no channel and no HTTP.
"""

import asyncio
import base64
import json
import random
import re
import socket
import sys
from collections.abc import Iterable, Iterator, Mapping

from websocket_relay.outcomes import Close
from websocket_relay.wire.connection import Connection, ConnectionState
from websocket_relay.wire.context import ConnectionContext
from websocket_relay.wire.frames import BINARY, OPCODE
from websocket_relay.wire.publish_policy import PublishPolicy

SSE = -1
"""Stands for the encoding (see `deflate`) of an SSE connection."""

KEEPALIVE_COMMENT = b":\n\n"

RECONNECT_DELAY_MS = 500, 2500
"""Range of the delay before a client reconnects after its connection broke: a random one for each.
By default, all browsers wait for the same few seconds."""

RETRY_HINT = re.compile(r"retry_ms=([0-9]+)")


def encode_event(name: str, fields: Mapping[str, object]) -> bytes:
    """Return an event of the relay itself: a JSON object under a name.

    A position among the fields becomes the event's id: a client that reconnects before its first
    message resumes from there.
    """
    text = json.dumps(fields, separators=(",", ":"))
    id_line = f"id: {fields['position']}\n" if "position" in fields else ""
    return f"{id_line}event: {name}\ndata: {text}\n\n".encode()


def encode_messages(
    messages: Iterable[tuple[bytes, bytes]], positions: Iterable[object]
) -> Iterator[bytes]:
    """Yield one event for each message.

    Args:
        messages: frame heads as `frames.header` encodes them, and payloads.
        positions: their positions, which a client sends back in Last-Event-ID.
    """
    for (head, payload), position in zip(messages, positions, strict=True):
        name = str(position).encode()
        if head[0] & OPCODE == BINARY:
            yield b"id: %b\nevent: binary\ndata: %b\n\n" % (name, base64.b64encode(payload))
        elif b"\n" in payload or b"\r" in payload:
            yield b"id: %b\ndata: %b\n\n" % (name, _data_lines(payload))
        else:
            yield b"id: %b\ndata: %b\n\n" % (name, payload)


def _data_lines(payload: bytes) -> bytes:
    """Prefix each line with the field name. Every kind of line ending arrives as a line feed."""
    # Not a regular expression: for 1 MiB of line feeds it blocks the loop for 0.25 seconds.
    normalized = payload.replace(b"\r\n", b"\n").replace(b"\r", b"\n")
    return normalized.replace(b"\n", b"\ndata: ")


def count_complete_messages(batch: bytes, end: int) -> int:
    """Return how many messages end within the first `end` bytes of a batch of events."""
    return batch.count(b"\n\n", 0, end)


class SseConnection(Connection):
    """One client's connection, from the response head to its end.

    Args:
        shared: bounds and counters.
        silence_s: a client whose machine acknowledges nothing for this long is closed, and so is
            one that reads nothing for this long while its socket is full.
    """

    __slots__ = ("_silence_s",)

    count_complete_messages = staticmethod(count_complete_messages)

    def __init__(self, shared: ConnectionContext, silence_s: float) -> None:
        super().__init__(shared)
        self._silence_s = silence_s

    def set_publish_policy(self, policy: PublishPolicy) -> None:
        """Ignore the policy: an SSE client publishes nothing."""

    def start_stream(self, transport: asyncio.Transport) -> None:
        """Take over the transport after the response head."""
        self.connection_made(transport)
        # A client does not answer events. TCP detects a dead one (RFC 5482), as each keepalive
        # comment needs an acknowledgement. Systems other than Linux use their own timeout.
        connection = transport.get_extra_info("socket")
        if sys.platform == "linux" and connection.family != socket.AF_UNIX:
            silence_ms = round(self._silence_s * 1000)
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, silence_ms)
        self.open(b"retry: %d\n\n" % random.randint(*RECONNECT_DELAY_MS), SSE)

    def data_received(self, data: bytes) -> None:
        """Ignore the bytes."""

    def eof_received(self) -> bool:
        """Close: a client that ended its side reads no more events."""
        self._detach(Close.CONNECTION_LOST)
        self._state = ConnectionState.DISCARDING
        self._has_received_eof = True
        self._close_after_flush()
        return self._stays_open_after_eof()

    def connection_lost(self, exc: Exception | None) -> None:
        """Release and count what is left."""
        super().connection_lost(exc)
        self._finalize()

    def close(self, why: Close, reason: str = "") -> None:
        """Send a close event, and end the response."""
        if self._state is not ConnectionState.OPEN:
            return
        wire_reason = reason or why.reason
        self._detach(why)
        # Before the write: in this state, no write closes the connection for its backlog's size.
        self._state = ConnectionState.DISCARDING
        retry = RETRY_HINT.search(wire_reason)
        retry_field = f"retry: {retry[1]}\n".encode() if retry else b""
        self._write_control(
            retry_field + encode_event("close", {"code": why.code, "reason": wire_reason})
        )
        self._close_after_flush()

    def ping(self, frame: bytes, now: float) -> None:
        """Send a comment, so that proxies see traffic on the response."""
        if self._state is ConnectionState.OPEN:
            self._write_control(KEEPALIVE_COMMENT)

    def is_ping_overdue(self, since: float) -> bool:
        """Return False: TCP_USER_TIMEOUT detects dead clients, see `start_stream`."""
        return False

    def _on_token_expired(self) -> None:
        self._expiry_timer = None
        self.close_when_written(Close.TOKEN_EXPIRED, Close.TOKEN_EXPIRED.reason)
