"""Negotiate permessage-deflate (RFC 7692), compress and inflate messages.

Neither side keeps a compression context between messages. One compressed copy of a message
therefore serves all clients that can inflate it, and an idle connection keeps no 32 KiB window.
Knows no connection and no channel.
"""

import zlib
from collections.abc import Iterable, Iterator
from functools import lru_cache
from typing import Any

from websockets.exceptions import NegotiationError
from websockets.extensions.permessage_deflate import ServerPerMessageDeflateFactory
from websockets.headers import build_extension, parse_extension

from websocket_relay.messages import Message
from websocket_relay.outcomes import Close
from websocket_relay.wire.frames import RSV1, ProtocolViolationError, header

PLAIN = 0
"""No compression. Other encodings of WebSocket clients are LZ77 window sizes in bits."""

MAX_WINDOW_BITS = 15

COMPRESSION_LEVEL = 3  # twice as fast as zlib's default of 6, with about 4 % more bytes
DEFLATE_SLICE_BYTES = 16_384  # compressed between two checks of the clock; about 0.15 ms

MESSAGE_TAIL = b"\x00\x00\xff\xff"  # ends every compressed message, never sent (section 7.2.1)
FINAL_BLOCK = b"\x03\x00"  # empty; ends a stream only at a block boundary

INFLATER_BYTES = 48_000  # memory of one inflater, most of it the window
INFLATED_SLICE_BYTES = 16_384  # maximum output of one inflate call; about 0.03 ms
# Maximum input of one inflate call: 0.1 ms at worst. zlib copies the input that it leaves unread.
DEFLATED_SLICE_BYTES = 2_048

KNOWN_CHARACTERS = 256  # of offers that are remembered

_NEGOTIATOR = ServerPerMessageDeflateFactory(
    server_no_context_takeover=True, client_no_context_takeover=True
)


def negotiate(offers: str) -> tuple[str, int] | None:
    """Accept the first permessage-deflate offer that the relay supports (section 5).

    Args:
        offers: the values of the client's Sec-WebSocket-Extensions headers, joined by commas.

    Returns:
        The value of the response header, and the maximum window size, in bits, of messages to the
        client. None if no offer is acceptable.

    Raises:
        websockets.exceptions.InvalidHeaderFormat: the offers are malformed (RFC 6455 section 9.1).
    """
    return (_known if len(offers) <= KNOWN_CHARACTERS else _negotiate)(offers)


def _negotiate(offers: str) -> tuple[str, int] | None:
    for name, parameters in parse_extension(offers):
        if name == _NEGOTIATOR.name:
            try:
                answer, agreed = _NEGOTIATOR.process_request_params(parameters, [])
            except NegotiationError:
                continue
            return build_extension([(name, answer)]), agreed.local_max_window_bits
    return None


_known = lru_cache(maxsize=64)(_negotiate)
"""Browsers of one kind make the same offer, whose parsing takes a tenth of a handshake."""


def deflate_messages(
    messages: Iterable[Message], window_bits: int, min_bytes: int
) -> Iterator[bytes]:
    """Encode each message as one frame, compressed if that makes it smaller.

    Args:
        messages: the messages.
        window_bits: the size of the LZ77 window, 9 to 15.
        min_bytes: shorter messages are not compressed.

    Yields:
        Frames; between the slices of a long message `b""`, so that the caller can check the clock.
    """
    for kind, payload in messages:
        if len(payload) >= min_bytes:
            deflater = zlib.compressobj(COMPRESSION_LEVEL, zlib.DEFLATED, -window_bits)
            parts = []
            for start in range(0, len(payload), DEFLATE_SLICE_BYTES):
                if start:
                    yield b""
                parts.append(deflater.compress(payload[start : start + DEFLATE_SLICE_BYTES]))
            parts.append(deflater.flush(zlib.Z_SYNC_FLUSH)[: -len(MESSAGE_TAIL)])
            size = sum(map(len, parts))
            if size < len(payload):
                yield b"".join((header(RSV1 | kind, size), *parts))
                continue
        yield header(kind, len(payload)) + payload


class Inflater:
    """Inflate one message incrementally, up to a maximum size (section 7.2.2).

    Args:
        max_bytes: the maximum inflated size.
    """

    __slots__ = ("_remaining_bytes", "_stream")

    def __init__(self, max_bytes: int) -> None:
        self._remaining_bytes = max_bytes
        self._stream: Any = None  # None between two DEFLATE streams

    def feed(self, data: bytes) -> Iterator[bytes]:
        """Inflate more of the message and yield the output in slices.

        Args:
            data: compressed bytes, DEFLATED_SLICE_BYTES at most.

        Raises:
            ProtocolViolationError: the output exceeds the maximum, or the data does not inflate.
        """
        has_more = True
        while has_more:
            if self._stream is None:
                self._stream = zlib.decompressobj(-MAX_WINDOW_BITS)
            max_length = min(INFLATED_SLICE_BYTES, self._remaining_bytes + 1)
            try:
                part = self._stream.decompress(data, max_length)
            except zlib.error:
                raise ProtocolViolationError(Close.INVALID_COMPRESSION) from None
            self._remaining_bytes -= len(part)
            if self._remaining_bytes < 0:
                raise ProtocolViolationError(Close.MESSAGE_TOO_BIG)
            yield part
            if self._stream.eof:
                # Further blocks may follow a block with the BFINAL bit (section 7.2.3.4).
                data = self._stream.unused_data
                self._stream = None
                has_more = bool(data)
            else:
                data = self._stream.unconsumed_tail
                has_more = bool(data) or len(part) == max_length  # zlib may buffer more output

    def finish(self) -> None:
        """Check that the message ends at a block boundary. `feed` has yielded all of its output.

        Raises:
            ProtocolViolationError: the message ends within a block.
        """
        if self._stream is None:
            return
        has_trailing_output = any(self.feed(MESSAGE_TAIL)) or any(self.feed(FINAL_BLOCK))
        if has_trailing_output or self._stream is not None:
            raise ProtocolViolationError(Close.INVALID_COMPRESSION)
