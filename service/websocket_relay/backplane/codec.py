"""Encode messages as the entries of a broker's stream, and decode them. Knows no broker.

A *packet* holds the messages of one append. It stores them as columns, so that many small messages
cost few bytes on the broker and little CPU time to decode. A packet that exceeds the broker's entry
limit is split into parts, which are appended one after another.

Each packet carries its producer and the sequence number of its first message. With them a reader
detects a duplicate (the producer retries an append whose confirmation was lost) and a loss.
"""

import struct
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import accumulate, pairwise
from typing import NamedTuple

from websocket_relay.backplane.interface import SOURCE_BYTES, Identities, Position, Source
from websocket_relay.messages import BINARY, CONTROL, TEXT
from websocket_relay.outcomes import RelayError

PACKET = 1
PART = 2

PACKET_MARK = bytes((PACKET,))
"""The first byte of an entry that holds a whole packet."""

HEARTBEAT_FLAG, IDENTITIES_FLAG = 1, 2

HEAD = struct.Struct("<BBQQII")
"""Type, flags, producer and sequence number; then the counts of messages and channels (packet), or
the index of the part and the count of parts (part)."""

MESSAGE_OVERHEAD_BYTES = 7
"""Bytes that a message takes in the columns besides its payload: length, channel and kind."""

SOURCE_COUNT = struct.Struct("<H")
"""Begins the identities. The sources follow, then a column of their indices, and one of numbers."""

SOURCE = struct.Struct(f"<{SOURCE_BYTES}sQQQ")
"""The key of a source, and the position after which all identities were known."""

IDENTITY_OVERHEAD_BYTES = 10
"""Bytes that the identity of a message takes in the columns: index of the source, and number."""

PRODUCER_EPOCHS = 1 << 16
"""Count of producer epochs, which are the lower bits of a producer. Each outage starts a new
producer epoch. A message that was abandoned in an earlier one may still arrive; it is discarded
after the first packet of the new one. So messages of a client are never delivered out of order."""

MAX_PRODUCERS = 10_000
"""Replicas that are remembered, the latest ones: more than a stream has had."""

MAX_CHANNELS = 65_536
MAX_HEARTBEAT_BYTES = 1024

KINDS = bytes((TEXT, BINARY, CONTROL))

MAX_PARTIAL_PACKETS = 16
"""Bound on the memory of partial packets, in packets of the largest size."""


class FormatError(RelayError):
    """The bytes were not written by a relay of a compatible version."""


class Packet(NamedTuple):
    """The messages of one append.

    Attributes:
        producer: id of the replica, with the producer epoch in the lower bits.
        sequence: sequence number of the first message. The numbers continue over all producer
            epochs of a replica; those of abandoned messages are used again.
        channels, kinds, payloads: columns, one item per message, in order.
        heartbeat: heartbeat of the producer, which waits to read this packet back; None if the
            packet carries none.
        identities: of the messages; None if no message has one.
    """

    producer: int
    sequence: int
    channels: Sequence[str]
    kinds: bytes
    payloads: Sequence[bytes]
    heartbeat: bytes | None = None
    identities: Identities | None = None


def pack(packet: Packet) -> bytes:
    """Encode a packet."""
    producer, sequence, channels, kinds, payloads, heartbeat, identities = packet
    count = len(payloads)
    names = {name: index for index, name in enumerate(dict.fromkeys(channels))}
    encoded_names = [name.encode() for name in names]
    column = b""
    if len(names) > 1:
        column = struct.pack(f"<{count}H", *map(names.__getitem__, channels))
    flags = 0 if heartbeat is None else HEARTBEAT_FLAG
    if identities is not None:
        flags |= IDENTITIES_FLAG
    return b"".join(
        (
            HEAD.pack(PACKET, flags, producer, sequence, count, len(names)),
            bytes(map(len, encoded_names)),
            *encoded_names,
            struct.pack(f"<{count}I", *map(len, payloads)),
            column,
            kinds,
            *payloads,
            b"" if identities is None else _pack_identities(identities),
            heartbeat or b"",
        )
    )


def _pack_identities(identities: Identities) -> bytes:
    sources, indices, numbers, _ = identities
    count = len(indices)
    return b"".join(
        (
            SOURCE_COUNT.pack(len(sources)),
            *(SOURCE.pack(key, *complete_after) for key, complete_after in sources),
            struct.pack(f"<{count}H", *indices),
            struct.pack(f"<{count}Q", *numbers),
        )
    )


FILLER_ENTRY = pack(Packet(0, 0, (), b"", ()))
"""Replaces an entry that the broker lost."""


def unpack(data: bytes) -> Packet:
    """Decode a packet.

    Raises:
        FormatError: the bytes are not a packet.
    """
    try:
        flags, producer, sequence, channels, lengths, at = _unpack_head(data)
    except (struct.error, IndexError, ValueError):
        raise FormatError("malformed") from None
    count = len(lengths)
    kinds = data[at : at + count]
    bounds = list(accumulate(lengths, initial=at + count))
    end = bounds[-1]
    identities = None
    if flags & IDENTITIES_FLAG:
        identities, end = _unpack_identities(data, end, count)
    heartbeat = data[end:] if flags & HEARTBEAT_FLAG else None
    if kinds.translate(None, KINDS):
        raise FormatError("invalid kind")
    if end + len(heartbeat or b"") != len(data):
        raise FormatError("truncated")
    if len(heartbeat or b"") > MAX_HEARTBEAT_BYTES:
        raise FormatError("heartbeat too long")
    payloads = [data[start:end] for start, end in pairwise(bounds)]
    return Packet(producer, sequence, channels, kinds, payloads, heartbeat, identities)


def _unpack_head(data: bytes) -> tuple[int, int, int, Sequence[str], Sequence[int], int]:
    """Return flags, producer, sequence number, channels and lengths; then where the kinds start."""
    kind, flags, producer, sequence, count, name_count = HEAD.unpack_from(data)
    if kind != PACKET:
        raise FormatError("not a packet")
    at = HEAD.size + name_count
    # Checked before anything of the claimed size is allocated.
    if name_count > min(count, MAX_CHANNELS) or at + 5 * count > len(data):
        raise FormatError("truncated")
    names = []
    for size in data[HEAD.size : at]:
        names.append(data[at : at + size].decode())
        at += size
    if not all(names):
        raise FormatError("empty channel name")
    lengths = struct.unpack_from(f"<{count}I", data, at)
    at += 4 * count
    channels: Sequence[str] = names * count
    if name_count != 1:
        column = struct.unpack_from(f"<{count}H", data, at)
        at += 2 * count
        channels = list(map(names.__getitem__, column))
    return flags, producer, sequence, channels, lengths, at


def _unpack_identities(data: bytes, at: int, count: int) -> tuple[Identities, int]:
    """Decode the identities of `count` messages; return where they end, too.

    Raises:
        FormatError: the bytes are not that.
    """
    try:
        (source_count,) = SOURCE_COUNT.unpack_from(data, at)
        at += SOURCE_COUNT.size
        end = at + source_count * SOURCE.size
        sources = [
            Source(key, Position(*position))
            for key, *position in SOURCE.iter_unpack(memoryview(data)[at:end])
        ]
        indices = struct.unpack_from(f"<{count}H", data, end)
        numbers = struct.unpack_from(f"<{count}Q", data, end + 2 * count)
    except struct.error:
        raise FormatError("truncated") from None
    if max(indices, default=0) > len(sources):
        raise FormatError("unknown source")
    return Identities(sources, indices, numbers), end + IDENTITY_OVERHEAD_BYTES * count


def split_into_parts(data: bytes, max_bytes: int) -> Iterator[bytes]:
    """Yield the parts of a packet, of at most `max_bytes` each."""
    _, _, producer, sequence, _, _ = HEAD.unpack_from(data)
    size = max_bytes - HEAD.size
    count = -(-len(data) // size)
    for index in range(count):
        head = HEAD.pack(PART, 0, producer, sequence, index, count)
        yield head + data[index * size : (index + 1) * size]


@dataclass(slots=True)
class _PartialPacket:
    """A packet of which the first parts have arrived."""

    sequence: int
    count: int
    parts: list[bytes] = field(default_factory=list)
    size: int = 0


class PartAssembler:
    """Reassemble packets from their parts.

    A producer whose append was not confirmed retries from the first part, and parts of the first
    attempt may arrive late. So a part may arrive twice, or after parts of the following packet. The
    assembler ignores both.

    Args:
        max_bytes: largest size of a packet.

    Attributes:
        dropped: count of packets of which some parts arrived and the rest never did.
        orphan_part: producer and sequence number of the latest part if an earlier part of its
            packet is missing, else None.
    """

    def __init__(self, max_bytes: int) -> None:
        self.dropped = 0
        self.orphan_part: tuple[int, int] | None = None
        self.bytes = 0
        self._max_bytes = max_bytes
        # By producer, least recently active first; a producer has one packet in flight at a time.
        self._partial: OrderedDict[int, _PartialPacket] = OrderedDict()

    def join(self, part: bytes) -> bytes | None:
        """Return the bytes of a packet, or None if more of its parts are expected.

        Raises:
            FormatError: the bytes are not a part, or its packet is too long.
        """
        try:
            kind, _, producer, sequence, index, count = HEAD.unpack_from(part)
        except struct.error:
            raise FormatError("malformed") from None
        if kind != PART or index >= count:
            raise FormatError("unknown entry type")
        partial = self._find(producer, sequence, index, count)
        is_stray = partial is None or index > len(partial.parts)
        self.orphan_part = (producer, sequence) if is_stray else None
        if partial is None or index != len(partial.parts):
            return None
        content = part[HEAD.size :]
        if partial.size + len(content) > self._max_bytes:
            self._drop(producer)
            raise FormatError("packet too long")
        partial.parts.append(content)
        partial.size += len(content)
        self.bytes += len(content)
        if index + 1 == count:
            self.bytes -= partial.size
            del self._partial[producer]
            return b"".join(partial.parts)
        while self.bytes > MAX_PARTIAL_PACKETS * self._max_bytes or len(self._partial) > 1000:
            self._drop(next(iter(self._partial)))
        return None

    def _find(self, producer: int, sequence: int, index: int, count: int) -> _PartialPacket | None:
        """Return the packet that a part belongs to, or None if its first part is missing."""
        partial = self._partial.get(producer)
        if partial is not None:
            self._partial.move_to_end(producer)
            if (partial.sequence, partial.count) == (sequence, count):
                return partial
            if sequence < partial.sequence:  # arrived late
                return None
        if index:
            return None
        if partial is not None:
            self._drop(producer)
        partial = self._partial[producer] = _PartialPacket(sequence, count)
        return partial

    def _drop(self, producer: int) -> None:
        self.bytes -= self._partial.pop(producer).size
        self.dropped += 1
