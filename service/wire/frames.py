"""Encode RFC 6455 server frames (section 5.2). Knows no connection and no channel.

A server's frames are not masked (RFC 6455 section 5.1), so one encoding serves all clients.
"""

from struct import Struct

from websockets.frames import Opcode

FIN = 0x80
MAX_CONTROL_BYTES = 125  # payload of a control frame (section 5.5)
CONTROL = 0x08  # opcodes with this bit are control frames (section 5.5)

_SHORT = Struct("!BB").pack
_MEDIUM = Struct("!BBH").pack
_LONG = Struct("!BBQ").pack


def header(opcode: int, size: int) -> bytes:
    """Return the head of one final, unmasked frame with a payload of `size` bytes."""
    if size < 126:
        return _SHORT(FIN | opcode, size)
    if size < 65536:
        return _MEDIUM(FIN | opcode, 126, size)
    return _LONG(FIN | opcode, 127, size)


def ping(payload: bytes) -> bytes:
    """Return a ping frame (section 5.5.2) with up to 125 bytes."""
    return header(Opcode.PING, len(payload)) + payload


def close(code: int, reason: str = "") -> bytes:
    """Return a close frame (section 5.5.1); a reason that is too long is cut."""
    body = code.to_bytes(2, "big") + reason.encode()[: MAX_CONTROL_BYTES - 2]
    return header(Opcode.CLOSE, len(body)) + body


def count_whole(batch: bytes, end: int) -> int:
    """Return how many data messages end within the first `end` bytes of a batch of frames.

    Args:
        batch: whole frames with heads as `header` makes them.
        end: how many of its bytes count.
    """
    count = position = 0
    while position < end:
        opcode, size = batch[position] & 0x0F, batch[position + 1]
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
