"""Name what RFC 6455 frames are made of, and encode a server's. Knows no connection and no channel.

A server's frames are not masked (RFC 6455 section 5.1), so one encoding serves all clients.
"""

from struct import Struct

from websocket_relay.outcomes import Close

CONTINUATION, TEXT, BINARY, CLOSE, PING, PONG = 0x0, 0x1, 0x2, 0x8, 0x9, 0xA

FIN = 0x80
RESERVED = 0x70
RSV1 = 0x40  # the message is compressed (RFC 7692 section 6)
OPCODE = 0x0F
CONTROL = 0x08  # opcodes with this bit are control frames (section 5.5)

MAX_CONTROL_BYTES = 125  # payload of a control frame (section 5.5)


class ProtocolViolationError(Exception):
    """The client broke the protocol.

    Args:
        close: what answers it.
        detail: what was wrong, in words that hold nothing of what the client said.
    """

    def __init__(self, close: Close, detail: str = "") -> None:
        super().__init__(close, detail)
        self.close = close
        self.detail = detail


_SHORT = Struct("!BB").pack
_MEDIUM = Struct("!BBH").pack
_LONG = Struct("!BBQ").pack


def header(opcode: int, size: int) -> bytes:
    """Return the head of one final, unmasked frame.

    Args:
        opcode: with RSV1 where the payload is compressed.
        size: the payload's bytes.
    """
    if size < 126:
        return _SHORT(FIN | opcode, size)
    if size < 65536:
        return _MEDIUM(FIN | opcode, 126, size)
    return _LONG(FIN | opcode, 127, size)


def control(opcode: int, payload: bytes) -> bytes:
    """Return a control frame (section 5.5) with up to 125 bytes."""
    return header(opcode, len(payload)) + payload


def close(code: int, reason: str = "") -> bytes:
    """Return a close frame (section 5.5.1); a reason that is too long is cut."""
    return control(CLOSE, code.to_bytes(2, "big") + reason.encode()[: MAX_CONTROL_BYTES - 2])


def count_whole(batch: bytes, end: int) -> int:
    """Return how many data messages end within the first `end` bytes of a batch of frames.

    Args:
        batch: whole frames with heads as `header` makes them.
        end: how many of its bytes count.
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
