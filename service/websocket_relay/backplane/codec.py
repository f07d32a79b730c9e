"""Turn messages into what a broker keeps, and back. Knows no broker.

A *packet* is what one replica appended in one go: its messages as columns, so that many small ones
cost little, on the broker and to read. A packet that is larger than what the broker takes goes in
parts, one behind the other.

Each is signed with where it comes from and numbered through: so a reader knows a packet that came
twice, because its writer never heard that the first one arrived, and knows what it missed.
"""

import struct
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from itertools import accumulate, pairwise
from typing import NamedTuple

from websocket_relay.outcomes import RelayError

PACKET = 1
PART = 2

CANARY = 1  # a flag

HEAD = struct.Struct("<BBQQII")
"""What it is, flags, origin, number; then messages and channels, or which part and of how many."""

MESSAGE_BYTES = 7
"""What a message takes in the columns: its size, channel and opcode."""

MAX_CHANNELS = 65_536
MAX_NOTE_BYTES = 1024

OPCODES = b"\x01\x02"  # text and binary

MAX_UNFINISHED = 16
"""Packets of the largest size that may be on their way in parts at a time."""


class FormatError(RelayError):
    """It was not made by a relay that this one understands."""


class Packet(NamedTuple):
    """What was appended in one go.

    Attributes:
        origin: the life of a replica that it comes from.
        number: of its first message; counted over all lives of the replica, without what it gave
            up.
        channels, opcodes, payloads: of its messages, in their order.
        note: what its origin says of itself, where it waits for the packet to come back (a canary).
    """

    origin: int
    number: int
    channels: Sequence[str]
    opcodes: bytes
    payloads: Sequence[bytes]
    note: bytes | None = None


def pack(packet: Packet) -> bytes:
    """Return the bytes of a packet."""
    origin, number, channels, opcodes, payloads, note = packet
    count = len(payloads)
    names = {name: index for index, name in enumerate(dict.fromkeys(channels))}
    listed = [name.encode() for name in names]
    column = b""
    if len(names) > 1:
        column = struct.pack(f"<{count}H", *map(names.__getitem__, channels))
    return b"".join(
        (
            HEAD.pack(PACKET, 0 if note is None else CANARY, origin, number, count, len(names)),
            bytes(map(len, listed)),
            *listed,
            struct.pack(f"<{count}I", *map(len, payloads)),
            column,
            opcodes,
            *payloads,
            note or b"",
        )
    )


HOLE = pack(Packet(0, 0, (), b"", ()))
"""Stands in a stream in the place of entries that the broker lost."""


def unpack(data: bytes) -> Packet:
    """Return the packet that these bytes are.

    Raises:
        FormatError: they are none.
    """
    try:
        return _unpack(data)
    except (struct.error, IndexError, ValueError):
        raise FormatError("malformed") from None


def _unpack(data: bytes) -> Packet:
    kind, flags, origin, number, count, name_count = HEAD.unpack_from(data)
    if kind != PACKET:
        raise FormatError("not a packet")
    # Before anything is made that is as long as it claims.
    if name_count > min(count, MAX_CHANNELS) or HEAD.size + name_count + 5 * count > len(data):
        raise FormatError("cut off")
    names, at = _names(data, name_count)
    lengths = struct.unpack_from(f"<{count}I", data, at)
    at += 4 * count
    channels: Sequence[str] = names * count
    if name_count != 1:
        column = struct.unpack_from(f"<{count}H", data, at)
        at += 2 * count
        channels = list(map(names.__getitem__, column))
    opcodes = data[at : at + count]
    if opcodes.translate(None, OPCODES):
        raise FormatError("neither text nor binary")
    bounds = list(accumulate(lengths, initial=at + count))
    note = data[bounds[-1] :] if flags & CANARY else None
    if bounds[-1] + len(note or b"") != len(data):
        raise FormatError("cut off")
    if len(note or b"") > MAX_NOTE_BYTES:
        raise FormatError("too long a note")
    payloads = [data[start:end] for start, end in pairwise(bounds)]
    return Packet(origin, number, channels, opcodes, payloads, note)


def _names(data: bytes, count: int) -> tuple[list[str], int]:
    """Return the channels' names, and where they end."""
    at = HEAD.size + count
    names = []
    for size in data[HEAD.size : at]:
        names.append(data[at : at + size].decode())
        at += size
    if not all(names):
        raise FormatError("a channel without a name")
    return names, at


def split_into_parts(data: bytes, origin: int, number: int, max_bytes: int) -> Iterator[bytes]:
    """Yield a packet's bytes in pieces that a broker takes: all in one where it fits."""
    if len(data) <= max_bytes:
        yield data
        return
    size = max_bytes - HEAD.size
    count = -(-len(data) // size)
    for index in range(count):
        head = HEAD.pack(PART, 0, origin, number, index, count)
        yield head + data[index * size : (index + 1) * size]


class _PartialPacket:
    """A packet of which parts have come."""

    __slots__ = ("count", "number", "parts", "size")

    def __init__(self, number: int, count: int) -> None:
        self.number = number
        self.count = count
        self.parts: list[bytes] = []
        self.size = 0


class PartAssembler:
    """Put parts together again.

    A writer that was not answered begins with the first part again, and its first try may arrive
    late. So parts come twice, or behind those of the packet that follows; both are left out.

    Args:
        max_bytes: what a packet may come to.

    Attributes:
        dropped: packets of which some parts came, and never the rest.
        stray: origin and number of the part that came last, if those before it did not come.
    """

    def __init__(self, max_bytes: int) -> None:
        self.dropped = 0
        self.stray: tuple[int, int] | None = None
        self.bytes = 0
        self._max_bytes = max_bytes
        # By origin, each has one packet on its way; the one that was heard of last is the last.
        self._unfinished: OrderedDict[int, _PartialPacket] = OrderedDict()

    def join(self, data: bytes) -> bytes | None:
        """Return a packet's bytes, or None where more parts of it are to come.

        Raises:
            FormatError: these are no part and no packet.
        """
        if data[:1] == b"\x01":  # PACKET
            return data
        try:
            kind, _, origin, number, index, count = HEAD.unpack_from(data)
        except struct.error:
            raise FormatError("malformed") from None
        if kind != PART or index >= count:
            raise FormatError("of a kind that is not known")
        unfinished = self._find(origin, number, index, count)
        is_stray = unfinished is None or index > len(unfinished.parts)
        self.stray = (origin, number) if is_stray else None
        if unfinished is None or index != len(unfinished.parts):
            return None
        part = data[HEAD.size :]
        if unfinished.size + len(part) > self._max_bytes:
            self._drop(origin)
            raise FormatError("too long")
        unfinished.parts.append(part)
        unfinished.size += len(part)
        self.bytes += len(part)
        if index + 1 == count:
            self.bytes -= unfinished.size
            del self._unfinished[origin]
            return b"".join(unfinished.parts)
        while self.bytes > MAX_UNFINISHED * self._max_bytes or len(self._unfinished) > 1000:
            self._drop(next(iter(self._unfinished)))
        return None

    def _find(self, origin: int, number: int, index: int, count: int) -> _PartialPacket | None:
        """Return the packet that a part belongs to, or None where its first part is missing."""
        unfinished = self._unfinished.get(origin)
        if unfinished is not None:
            self._unfinished.move_to_end(origin)
            if (unfinished.number, unfinished.count) == (number, count):
                return unfinished
            if number < unfinished.number:  # came late
                return None
        if index:
            return None
        if unfinished is not None:
            self._drop(origin)
        unfinished = self._unfinished[origin] = _PartialPacket(number, count)
        return unfinished

    def _drop(self, origin: int) -> None:
        self.bytes -= self._unfinished.pop(origin).size
        self.dropped += 1
