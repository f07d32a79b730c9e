"""Compress and inflate messages by RFC 7692 (permessage-deflate). Knows no connection.

Nothing is kept from one message to the next, on either side: a message is compressed once for all
who can inflate it, and a connection that rests holds no window of 32 KiB.
"""

import zlib
from collections.abc import Iterable, Iterator
from typing import Any

from websockets.exceptions import NegotiationError
from websockets.extensions.permessage_deflate import ServerPerMessageDeflateFactory
from websockets.headers import build_extension, parse_extension

from websocket_relay.outcomes import Close
from websocket_relay.wire.frames import OPCODE, RSV1, ProtocolViolationError, header

PLAIN = 0
"""The encoding of clients without compression; all others are named by their window's bits."""

MAX_WINDOW_BITS = 15

LEVEL = 3  # twice as fast as zlib's default of 6, for some 4 % more bytes
SLICE_BYTES = 16_384  # what is compressed before others get a look at the loop; some 0.15 ms

TAIL = b"\x00\x00\xff\xff"  # of every message, never sent (section 7.2.1)
LAST_BLOCK = b"\x03\x00"  # empty; it ends a stream where a block may begin, and nowhere else

INFLATER_BYTES = 48_000  # what one inflater has in use, most of it the window
INFLATED_SLICE_BYTES = 16_384  # what is inflated at once; some 0.03 ms
DEFLATED_SLICE_BYTES = (
    2_048  # of what is inflated at once; 0.1 ms at worst, and zlib copies the rest
)

_TERMS = ServerPerMessageDeflateFactory(
    server_no_context_takeover=True, client_no_context_takeover=True
)


def negotiate(offers: str) -> tuple[str, int] | None:
    """Accept the first offer that can be met (section 5).

    Args:
        offers: what the client's Sec-WebSocket-Extensions headers hold, joined by commas.

    Returns:
        The response header's value, and the bits of the window that compressed messages to the
        client must keep to; None where there is no such offer.

    Raises:
        websockets.exceptions.InvalidHeaderFormat: these are no offers (RFC 6455 section 9.1).
    """
    for name, parameters in parse_extension(offers):
        if name == _TERMS.name:
            try:
                answer, agreed = _TERMS.process_request_params(parameters, [])
            except NegotiationError:
                continue
            return build_extension([(name, answer)]), agreed.local_max_window_bits
    return None


def deflate_messages(
    messages: Iterable[tuple[bytes, bytes]], window_bits: int, min_bytes: int
) -> Iterator[bytes]:
    """Return frames with each message compressed where that makes it smaller.

    Args:
        messages: the heads and payloads of their plain frames.
        window_bits: of the LZ77 window, 9 to 15.
        min_bytes: shorter messages are not compressed.

    Yields:
        Frames, and in the middle of a long one `b""`, for the caller to look at the clock.
    """
    for head, payload in messages:
        if len(payload) >= min_bytes:
            deflater = zlib.compressobj(LEVEL, zlib.DEFLATED, -window_bits)
            parts = []
            for start in range(0, len(payload), SLICE_BYTES):
                if start:
                    yield b""
                parts.append(deflater.compress(payload[start : start + SLICE_BYTES]))
            parts.append(deflater.flush(zlib.Z_SYNC_FLUSH)[: -len(TAIL)])
            size = sum(map(len, parts))
            if size < len(payload):
                yield b"".join((header(RSV1 | head[0] & OPCODE, size), *parts))
                continue
        yield head + payload


class Inflater:
    """Inflate one message as it comes, up to a bound (section 7.2.2).

    Args:
        max_bytes: what it may come to.
    """

    __slots__ = ("_room_bytes", "_stream")

    def __init__(self, max_bytes: int) -> None:
        self._room_bytes = max_bytes
        self._stream: Any = None  # none between two streams

    def feed(self, data: bytes) -> Iterator[bytes]:
        """Yield what more of the message's compressed bytes come to, in slices.

        Args:
            data: DEFLATED_SLICE_BYTES at most.

        Raises:
            BreachError: they come to too much, or to nothing at all.
        """
        is_more = True
        while is_more:
            if self._stream is None:
                self._stream = zlib.decompressobj(-MAX_WINDOW_BITS)
            most = min(INFLATED_SLICE_BYTES, self._room_bytes + 1)
            try:
                part = self._stream.decompress(data, most)
            except zlib.error:
                raise ProtocolViolationError(Close.BAD_DEFLATE) from None
            self._room_bytes -= len(part)
            if self._room_bytes < 0:
                raise ProtocolViolationError(Close.TOO_BIG)
            yield part
            if self._stream.eof:
                # A block may say it is the last one, and others may follow (section 7.2.3.4).
                data = self._stream.unused_data
                self._stream = None
                is_more = bool(data)
            else:
                data = self._stream.unconsumed_tail
                is_more = bool(data) or len(part) == most  # zlib may have read more than it told

    def finish(self) -> None:
        """Take note of the message's end; all that it comes to was returned before.

        Raises:
            BreachError: it ends in the middle of a block.
        """
        if self._stream is None:
            return
        surplus = any(self.feed(TAIL)) or any(self.feed(LAST_BLOCK))
        if surplus or self._stream is not None:
            raise ProtocolViolationError(Close.BAD_DEFLATE)
