"""Send server-sent events to one client (HTML, section 9.2). It says nothing after its request."""

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
"""What stands in the place of an encoding (see `deflate`) for a client of this kind."""

LIFE_SIGN = b":\n\n"

RETURN_MS = 500, 2500
"""When a listener comes back whose connection was cut: each at a time of its own. Browsers would
all wait for the same few seconds."""

RETRY_MS = re.compile(r"retry_ms=([0-9]+)")


def encode_event(name: str, said: Mapping[str, object]) -> bytes:
    """Return an event of the relay's own: JSON, under a name.

    The position that it tells is its id: who comes back before it has heard a message goes on from
    there, and not without a place.
    """
    text = json.dumps(said, separators=(",", ":"))
    place = f"id: {said['position']}\n" if "position" in said else ""
    return f"{place}event: {name}\ndata: {text}\n\n".encode()


def encode_messages(
    messages: Iterable[tuple[bytes, bytes]], positions: Iterable[object]
) -> Iterator[bytes]:
    """Yield events.

    Args:
        messages: heads as `frames.header` makes them, and payloads.
        positions: where they stand; what a client brings back in Last-Event-ID.
    """
    for (head, payload), position in zip(messages, positions, strict=True):
        name = str(position).encode()
        if head[0] & OPCODE == BINARY:
            yield b"id: %b\nevent: binary\ndata: %b\n\n" % (name, base64.b64encode(payload))
        elif b"\n" in payload or b"\r" in payload:
            yield b"id: %b\ndata: %b\n\n" % (name, _lines(payload))
        else:
            yield b"id: %b\ndata: %b\n\n" % (name, payload)


def _lines(payload: bytes) -> bytes:
    """Give each line a field. Whatever ended one arrives as a line feed."""
    # Not a regular expression: over 1 MiB of line feeds it holds up the loop for 0.25 seconds.
    fed = payload.replace(b"\r\n", b"\n").replace(b"\r", b"\n")
    return fed.replace(b"\n", b"\ndata: ")


def count_whole(batch: bytes, end: int) -> int:
    """Return how many messages end within the first `end` bytes of a batch of events."""
    return batch.count(b"\n\n", 0, end)


class SseConnection(Connection):
    """One client's connection, from the answer's head to its end.

    Args:
        shared: bounds and books.
        silence_s: a client whose machine confirms nothing for so long is gone, and so is one that
            reads nothing for so long with its socket full.
    """

    __slots__ = ("_silence_s",)

    count_whole = staticmethod(count_whole)

    def __init__(self, shared: ConnectionContext, silence_s: float) -> None:
        super().__init__(shared)
        self._silence_s = silence_s

    def allow(self, allowance: PublishPolicy) -> None:
        """Take no notice: it says nothing."""

    def begin(self, transport: asyncio.Transport) -> None:
        """Take over the transport behind the answer's head."""
        self.connection_made(transport)
        # Events are not answered: TCP tells who is gone (RFC 5482), as there is always a sign of
        # life to confirm. Elsewhere than on Linux it takes its own time.
        if sys.platform == "linux":
            silence_ms = round(self._silence_s * 1000)
            connection = transport.get_extra_info("socket")
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, silence_ms)
        self.open(b"retry: %d\n\n" % random.randint(*RETURN_MS), SSE)

    def data_received(self, data: bytes) -> None:
        """Take no notice."""

    def eof_received(self) -> bool:
        """Take it for the end: who listens no more need not be written to."""
        self._leave(Close.VANISHED)
        self._state = ConnectionState.DISCARDING
        self._sends_no_more = True
        self._end()
        return self._outlasts_end()

    def connection_lost(self, exc: Exception | None) -> None:
        """Settle the books."""
        super().connection_lost(exc)
        self._finish()

    def close(self, why: Close, reason: str = "") -> None:
        """Say goodbye, and end the answer."""
        if self._state is not ConnectionState.OPEN:
            return
        said = reason or why.reason
        self._leave(why)
        self._state = (
            ConnectionState.DISCARDING
        )  # first: nothing that is put now closes it for its size
        retry = RETRY_MS.search(said)
        told = f"retry: {retry[1]}\n".encode() if retry else b""
        self._put(told + encode_event("close", {"code": why.code, "reason": said}))
        self._end()

    def ping(self, frame: bytes, now: float) -> None:
        """Send a comment, so that proxies see that the answer goes on."""
        if self._state is ConnectionState.OPEN:
            self._put(LIFE_SIGN)

    def is_silent(self, since: float) -> bool:
        """Tell nothing: see `begin`."""
        return False

    def _expire(self) -> None:
        self._expiry = None
        self.close_when_written(Close.TOKEN_EXPIRED, Close.TOKEN_EXPIRED.reason)
