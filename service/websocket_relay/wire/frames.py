"""Define the constants of RFC 6455 frames and encode server frames.

Server frames are not masked (RFC 6455 section 5.1), so one encoded frame serves all clients.
Knows no connection and no channel.
"""

from collections.abc import Iterable, Iterator
from itertools import islice
from struct import Struct

from websocket_relay.messages import Message
from websocket_relay.outcomes import Close

CONTINUATION, CLOSE, PING, PONG = 0x0, 0x8, 0x9, 0xA
"""Opcodes (section 5.2). Those of messages are their kinds: `messages.TEXT` and BINARY."""

FIN = 0x80
RESERVED = 0x70
RSV1 = 0x40  # set if the message is compressed (RFC 7692 section 6)
OPCODE = 0x0F
CONTROL = 0x08  # opcodes with this bit are control frames (section 5.5)

MAX_CONTROL_BYTES = 125  # maximum payload of a control frame (section 5.5)

MAX_HEADER_BYTES = 10  # of a frame that is not masked

MESSAGES_PER_STEP = 256
"""Messages that are encoded between two checks of the clock: in some 0.05 ms."""


class ProtocolViolationError(Exception):
    """The client violates the protocol.

    Args:
        close: the close code and reason to send.
        detail: the rule that is violated; never contains client data.
    """

    def __init__(self, close: Close, detail: str = "") -> None:
        super().__init__(close, detail)
        self.close = close
        self.detail = detail


_PACK_SHORT = Struct("!BB").pack
_PACK_MEDIUM = Struct("!BBH").pack
_PACK_LONG = Struct("!BBQ").pack


def header(opcode: int, size: int) -> bytes:
    """Encode the header of one unmasked frame with the FIN bit set.

    Args:
        opcode: combined with RSV1 if the payload is compressed.
        size: the payload length in bytes.
    """
    if size < 126:
        return _PACK_SHORT(FIN | opcode, size)
    if size < 65536:
        return _PACK_MEDIUM(FIN | opcode, 126, size)
    return _PACK_LONG(FIN | opcode, 127, size)


def encode_messages(messages: Iterable[Message]) -> Iterator[bytes]:
    """Yield the frames of messages, those of one step at a time."""
    pending = iter(messages)
    while step := tuple(islice(pending, MESSAGES_PER_STEP)):
        parts: list[bytes] = []
        for kind, payload in step:
            parts += header(kind, len(payload)), payload
        yield b"".join(parts)


def control(opcode: int, payload: bytes) -> bytes:
    """Encode a control frame (section 5.5) with a payload of at most 125 bytes."""
    return header(opcode, len(payload)) + payload


def close(code: int, reason: str = "") -> bytes:
    """Encode a close frame (section 5.5.1); truncate the reason to 123 bytes."""
    return control(CLOSE, code.to_bytes(2, "big") + reason.encode()[: MAX_CONTROL_BYTES - 2])


def count_complete_messages(batch: bytes, end: int) -> int:
    """Count the data messages that end within the first `end` bytes of a batch of frames.

    Args:
        batch: complete frames with headers as encoded by `header`.
        end: the number of bytes to examine.
    """
    count = position = 0
    while position < end:
        opcode, size = batch[position] & OPCODE, batch[position + 1]
        position += 2
        if size == 126:
            size = int.from_bytes(batch[position : position + 2], "big")
            position += 2
        elif size == 127:
            size = int.from_bytes(batch[position : position + 8], "big")
            position += 8
        position += size
        if position <= end and not opcode & CONTROL:
            count += 1
    return count
