"""Own what this replica appends: its packets, and their sequence numbers.

Messages gather while an append is in flight and leave together in the next one. One append is in
flight at a time, and it is retried until it is confirmed or abandoned. All readers detect a
duplicate by its sequence number and discard it alike (see `codec`). So a short unavailability of
the broker costs only a delay.

Knows no broker's protocol, and does not read the stream.
"""

import asyncio
import random
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

from websocket_relay.backplane.codec import (
    IDENTITY_OVERHEAD_BYTES,
    MESSAGE_OVERHEAD_BYTES,
    PRODUCER_EPOCHS,
    SOURCE,
    Packet,
    pack,
    split_into_parts,
)
from websocket_relay.backplane.interface import (
    IDEMPOTENCY_KEY,
    AppendMessages,
    Identities,
    Identity,
    Source,
)
from websocket_relay.backplane.stream import BrokerError, Retries, Stream
from websocket_relay.messages import Message, Publisher

PACKET_BYTES = 131_072
"""A packet is sealed at this size: larger ones are hardly cheaper, and a reader delivers a whole
packet without yielding to the event loop."""

MAX_PACKET_BYTES = 4_194_304
"""Size of a packet at most, without the messages that were appended last: a packet that is sealed
late, with empty messages, each to a channel of its own."""

PENDING_OVERHEAD_BYTES = 64
"""Memory of a pending message besides its bytes in the packet: an object, and places in two
lists."""


class PendingBytes(Protocol):
    """The bound on the bytes of pending appends: above it publishers are paused."""

    bytes: int

    def drained(self, size: int) -> None:
        """Record that so many bytes are not pending any more."""


@dataclass(slots=True, eq=False)
class OutgoingPacket:
    """Messages of this replica for one append.

    Attributes:
        channels, kinds, payloads: columns, one item per message.
        publishers: of the messages.
        heartbeat: for `codec.Packet`.
        size: bytes of the messages in the packet.
        sequence: sequence number of the first message, once the packet is sent.
        is_sent: whether its append was started, so the stream may contain it.
        sources: of the messages that have an identity, see `Identities`.
        indices, numbers: columns, up to the last of these messages.
    """

    channels: list[str] = field(default_factory=list)
    kinds: bytearray = field(default_factory=bytearray)
    payloads: list[bytes] = field(default_factory=list)
    publishers: dict[Publisher, None] = field(default_factory=dict)
    heartbeat: bytes | None = None
    size: int = 0
    sequence: int = 0
    is_sent: bool = False
    sources: list[Source] = field(default_factory=list)
    indices: list[int] = field(default_factory=list)
    numbers: list[int] = field(default_factory=list)

    @property
    def memory_bytes(self) -> int:
        """The memory that the messages take."""
        return self.size + PENDING_OVERHEAD_BYTES * len(self.payloads)

    def add_identity(self, identity: Identity) -> int:
        """Add the identity of messages before they are added; return the bytes that it takes."""
        source, numbers = identity
        sources = self.sources
        # Two requests with one key are two appends: only the first of them is relayed.
        if not sources or sources[-1] != source or source.key[0] == IDEMPOTENCY_KEY:
            sources.append(source)
        self._pad_columns()
        self.indices += [len(sources)] * len(numbers)
        self.numbers += numbers
        return SOURCE.size + IDENTITY_OVERHEAD_BYTES * len(numbers)

    def identities(self) -> Identities | None:
        """Return the identities of all messages; None if there is none."""
        if not self.sources:
            return None
        self._pad_columns()
        return Identities(self.sources, self.indices, self.numbers, is_own=True)

    def _pad_columns(self) -> None:
        missing = [0] * (len(self.payloads) - len(self.indices))
        self.indices += missing
        self.numbers += missing


class AbandonedMessages(NamedTuple):
    """What an outage abandons: the end of a producer epoch.

    Attributes:
        producer, sequence: of the first message.
        packets: the messages, in their order.
    """

    producer: int
    sequence: int
    packets: Sequence[OutgoingPacket]


class Producer:
    """The appends of one replica.

    Args:
        stream: the broker's stream.
        pending: bound on the bytes of pending appends.
        retries: of appends.
        observe_append: receives the duration of each append in seconds.
        append_timeout_s: time limit of the broker's response.
        clock: monotonic time in seconds.

    Attributes:
        producer_id: id of this replica, with the present producer epoch.
        first_sequence: sequence number of the first message of this producer epoch.
        in_flight_since: when the append in flight was started, by the clock, even if it has been
            abandoned; 0: none is in flight.
        heartbeat_confirmed_at: when the append of the latest heartbeat was confirmed, by the clock;
            0: it is not.
        append_in_outage: receives the messages instead during an outage; None: there is no outage.
    """

    def __init__(
        self,
        stream: Stream,
        pending: PendingBytes,
        retries: Retries,
        *,
        observe_append: Callable[[float], None],
        append_timeout_s: float,
        clock: Callable[[], float],
    ) -> None:
        self._stream = stream
        self._pending = pending
        self._retries = retries
        self._observe_append = observe_append
        self._append_timeout_s = append_timeout_s
        self._clock = clock
        self.producer_id = _new_producer()
        self._next_sequence = self.first_sequence = 0  # of the packet that is appended next
        self._outbox: deque[OutgoingPacket] = deque()
        self._open_packet: OutgoingPacket | None = None  # the last of the outbox, if not sealed
        self._outbox_filled = asyncio.Event()
        self._in_flight: OutgoingPacket | None = None
        self.in_flight_since = self.heartbeat_confirmed_at = 0.0
        self._pending_reduced = asyncio.Event()  # an append was confirmed, or packets abandoned
        self.append_in_outage: AppendMessages | None = None

    def append(
        self,
        channel: str,
        messages: Sequence[Message],
        payload_bytes: int,
        publisher: Publisher,
        identity: Identity | None = None,
    ) -> None:
        """Append messages in one packet."""
        if self.append_in_outage is not None:
            self.append_in_outage(channel, messages, payload_bytes, publisher, identity)
            return
        packet = self._open_packet
        if packet is None:
            packet = self._start_packet()
            self._outbox_filled.set()
        identity_bytes = packet.add_identity(identity) if identity is not None else 0
        for kind, payload in messages:
            packet.channels.append(channel)
            packet.kinds.append(kind)
            packet.payloads.append(payload)
        packet.publishers[publisher] = None
        count = len(messages)
        size = payload_bytes + MESSAGE_OVERHEAD_BYTES * count + identity_bytes
        packet.size += size
        self._pending.bytes += size + PENDING_OVERHEAD_BYTES * count
        if packet.size >= PACKET_BYTES:
            self._open_packet = None

    def append_heartbeat(self, heartbeat: bytes) -> None:
        """Append a heartbeat, together with pending messages if there are some."""
        packet = self._open_packet or self._start_packet()
        self._outbox_filled.set()
        packet.heartbeat = heartbeat
        self.heartbeat_confirmed_at = 0.0

    @property
    def following(self) -> int:
        """The sequence number of the message that is appended next."""
        return self._next_sequence + sum(len(each.payloads) for each in self._outbox)

    @property
    def unconfirmed_messages(self) -> int:
        """The count of messages whose append is pending or in flight."""
        return sum(len(each.payloads) for each in self._unconfirmed)

    async def flush(self) -> None:
        """Return once each append is confirmed or abandoned."""
        while self.unconfirmed_messages:
            self._pending_reduced.clear()
            await self._pending_reduced.wait()

    async def run(self) -> None:
        """Append one packet after the other until cancelled."""
        stream = self._stream
        while True:
            await self._outbox_filled.wait()
            packet = self._in_flight = self._outbox.popleft()
            if not self._outbox:
                self._open_packet = None
                self._outbox_filled.clear()
            self.in_flight_since = self._clock()
            packet.is_sent, packet.sequence = True, self._next_sequence
            self._next_sequence += len(packet.payloads)
            columns = packet.channels, bytes(packet.kinds), packet.payloads
            marks = packet.heartbeat, packet.identities()
            entry = pack(Packet(self.producer_id, packet.sequence, *columns, *marks))
            while self._in_flight is packet:  # not abandoned
                started_at = time.perf_counter()
                limit = stream.max_entry_bytes  # it may be lower than before a broker's restart
                parts = split_into_parts(entry, limit) if len(entry) > limit else (entry,)
                try:
                    for part in parts:
                        await stream.open_writer()  # may take longer than an outage needs to start
                        if self._in_flight is not packet:
                            break
                        await stream.append(part, self._append_timeout_s)
                    else:
                        self._retries.record_success()
                        self._observe_append(time.perf_counter() - started_at)
                    break
                except BrokerError as error:
                    await self._retries.pause_after(error)
            if self._in_flight is packet:
                self._in_flight = None
                self._pending.drained(packet.memory_bytes)
                self._pending_reduced.set()
                if packet.heartbeat is not None:
                    self.heartbeat_confirmed_at = self._clock()
            self.in_flight_since = 0.0

    def abandon(self, next_unread: int) -> AbandonedMessages:
        """Abandon the messages that are not confirmed, and start the next producer epoch.

        Args:
            next_unread: sequence number of the first message of the present epoch that is not read
                back. An append is confirmed, too, if its messages were read back.
        """
        packets = self._unconfirmed
        for packet in packets:
            self._pending.drained(packet.memory_bytes)
        self._in_flight = self._open_packet = None
        self._outbox.clear()
        self._outbox_filled.clear()
        self._pending_reduced.set()
        producer, sequence = self.producer_id, self._next_sequence
        if packets and packets[0].is_sent:
            if next_unread > packets[0].sequence:
                del packets[0]
            else:
                sequence = packets[0].sequence
        # Continue with the number of the first abandoned message, or readers would count the
        # abandoned ones as lost.
        self.producer_id, self.first_sequence = _next_producer_epoch(producer, sequence)
        self._next_sequence = self.first_sequence
        return AbandonedMessages(producer, sequence, packets)

    @property
    def _unconfirmed(self) -> list[OutgoingPacket]:
        return [*self._outbox] if self._in_flight is None else [self._in_flight, *self._outbox]

    def _start_packet(self) -> OutgoingPacket:
        packet = self._open_packet = OutgoingPacket()
        self._outbox.append(packet)
        return packet


def _new_producer() -> int:
    return random.getrandbits(48) * PRODUCER_EPOCHS


def _next_producer_epoch(producer: int, sequence: int) -> tuple[int, int]:
    """Return the producer with its next epoch, and its first sequence number.

    Args:
        sequence: number after the last message that was confirmed in the present producer epoch.
    """
    following = producer + 1
    return (following, sequence) if following % PRODUCER_EPOCHS else (_new_producer(), 0)
