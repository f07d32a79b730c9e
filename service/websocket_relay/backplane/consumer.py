"""Own what this replica reads: the entries after the last one, in order, each message once.

Detects duplicates and losses by the sequence numbers of the producers, and missing entries by what
the driver reports. Delivers the messages that this replica relays alone in an outage, too, so that
all positions come from here.

Knows no broker's protocol, and appends nothing.
"""

import asyncio
import logging
from collections import OrderedDict
from collections.abc import Callable, Iterable
from itertools import repeat

from websocket_relay.backplane.codec import (
    FILLER_ENTRY,
    MAX_PRODUCERS,
    PACKET_MARK,
    PRODUCER_EPOCHS,
    FormatError,
    Packet,
    PartAssembler,
    unpack,
)
from websocket_relay.backplane.confirmations import Confirmations
from websocket_relay.backplane.interface import (
    START,
    Identities,
    LogEntry,
    OnEntries,
    OnGap,
    Position,
    new_entry,
    new_position,
)
from websocket_relay.backplane.stream import BrokerError, Id, Retries, Stream, StreamEntry
from websocket_relay.counters import BackplaneCounters
from websocket_relay.messages import Message

log = logging.getLogger(__name__)

NO_SEQUENCE = 1 << 64
"""Greater than any sequence number."""

INDEX_LIMIT = 1 << 32
"""Greater than the index of any message in a packet."""


class ProducerStates:
    """The producer epoch and the next sequence number of each replica, as read from the stream.

    Attributes:
        is_current: whether an unknown producer is new: its numbers start at 0.
    """

    def __init__(self) -> None:
        # By replica: producer epoch and next sequence number.
        self._latest: OrderedDict[int, tuple[int, int]] = OrderedDict()
        self.is_current = False

    def next_sequence(self, producer: int, first_sequence: int) -> int:
        """Return the next sequence number to read of a producer that starts at `first_sequence`.

        It is greater than any number if a later epoch of the producer was read.
        """
        replica, producer_epoch = divmod(producer, PRODUCER_EPOCHS)
        latest_epoch, following = self._latest.get(replica, (producer_epoch, first_sequence))
        if producer_epoch == latest_epoch:
            return following
        return first_sequence if producer_epoch > latest_epoch else NO_SEQUENCE

    def record_packet(self, producer: int, sequence: int, count: int) -> int:
        """Record a packet that was read; return how many messages before it are missing.

        Returns:
            A negative number if the packet is a duplicate, or its producer epoch is not the latest.
        """
        replica, producer_epoch = divmod(producer, PRODUCER_EPOCHS)
        expected = 0 if self.is_current and not producer_epoch else sequence
        latest_epoch, following = self._latest.get(replica, (producer_epoch, expected))
        if producer_epoch < latest_epoch:
            return -1
        # A producer epoch continues after the last confirmed message of the one before. Messages
        # that were abandoned there may have been read all the same; their numbers are used again.
        expected = following if producer_epoch == latest_epoch else min(following, sequence)
        self._latest[replica] = producer_epoch, max(sequence + count, expected)
        self._latest.move_to_end(replica)
        if len(self._latest) > MAX_PRODUCERS:
            self._latest.popitem(last=False)
        return sequence - expected


class Consumer:
    """The reads of one replica.

    Args:
        stream: the broker's stream.
        retries: of reads.
        counters: of the backplane.
        waits: for messages of this replica.
        on_heartbeat: receives the producer and the heartbeat of a packet after its messages.
        is_own: returns whether this replica is a producer.
        max_packet_bytes: largest size of a packet of any replica.
        clock: monotonic time in seconds.

    Attributes:
        producers: what was read of each producer.
        position: the position up to which everything has been delivered here.
        unread_seen_at: the latest time at which the stream held further entries, by the clock.
        is_relaying_alone: whether the entries that are delivered now are not in the stream.
    """

    def __init__(
        self,
        stream: Stream,
        retries: Retries,
        counters: BackplaneCounters,
        waits: Confirmations,
        on_heartbeat: Callable[[int, bytes], None],
        is_own: Callable[[int], bool],
        *,
        max_packet_bytes: int,
        clock: Callable[[], float],
    ) -> None:
        self._stream = stream
        self._retries = retries
        self._counters = counters
        self._waits = waits
        self._on_heartbeat = on_heartbeat
        self._is_own = is_own
        self._clock = clock
        self._deliver: OnEntries
        self._on_gap: OnGap
        self.producers = ProducerStates()
        self.position = START
        self.unread_seen_at = 0.0
        self.is_relaying_alone = False
        self._last_read_id: Id = (0, 0)
        # Whether nothing is missing before the next entry; false at the start, too.
        self._is_contiguous = False
        self._assembler = PartAssembler(max_packet_bytes)
        # The first message that was delivered here in the latest outage: producer, and number.
        self._delivered_locally = (-1, 0)
        self._must_reconnect = False
        self._read_allowed = asyncio.Event()
        self._read_allowed.set()

    def consume(self, deliver: OnEntries, lost: OnGap) -> None:
        """Pass every entry from now on to `deliver`; call `lost` where entries are missing."""
        self._deliver = deliver
        self._on_gap = lost

    @property
    def is_paused(self) -> bool:
        """Whether nothing is read."""
        return not self._read_allowed.is_set()

    def pause_reading(self) -> None:
        """Pause reads of the stream until `resume_reading`: too many bytes are pending."""
        self._read_allowed.clear()

    def resume_reading(self) -> None:
        """Resume reads of the stream."""
        if self.is_paused:
            self.unread_seen_at = self._clock()
            self._read_allowed.set()

    async def run(self) -> None:
        """Read and deliver entries until cancelled."""
        while True:
            await self._read_allowed.wait()
            try:
                must_reconnect, self._must_reconnect = self._must_reconnect, False
                read = await self._stream.read(self._last_read_id, must_reconnect=must_reconnect)
            except BrokerError as error:
                await self._retries.pause_after(error)
                continue
            self._retries.record_success()
            for entry in read.entries:
                await self._read_allowed.wait()
                self.on_entry(entry)
                if not read.is_last:
                    self.unread_seen_at = self._clock()
                # A packet takes a millisecond or two. Yield, so that its messages are written to
                # clients before the next read.
                await asyncio.sleep(0)

    def on_entry(self, entry: StreamEntry) -> None:
        """Deliver the messages of the next entry; first report a gap before it, if there is one."""
        (epoch, offset), data, follows = entry
        previous_id, self._last_read_id = self._last_read_id, entry.entry_id
        self.position = Position(epoch, offset, 0)  # clients may be sent it: no index is negative
        if data == FILLER_ENTRY:  # as a rule more of them follow; one gap is reported for all
            self._is_contiguous = False
            return
        if not (self._is_contiguous and follows):
            self._is_contiguous = True
            self._report_gap_after(previous_id)
        try:
            packed = data if data[:1] == PACKET_MARK else self._join_parts(data)
            if packed is None:
                return
            packet = unpack(packed)
        except FormatError as error:
            self._counters.unreadable += 1
            log.debug("unreadable entry", extra={"error": str(error)})
            self._report_gap_through_entry()  # it may hold messages of a newer version
            return
        if not self._is_next_of_producer(packet):
            return
        producer, sequence, channels, kinds, payloads, heartbeat, identities = packet
        count = len(payloads)
        self.position = Position(epoch, offset, max(count - 1, 0))  # a heartbeat has no message
        # Skip messages that were delivered here in an outage, and are in the log after all.
        local_producer, first_local = self._delivered_locally
        if count and (producer != local_producer or sequence < first_local):
            indices = zip(repeat(epoch), repeat(offset), range(count), strict=False)
            columns = zip(map(new_position, indices), channels, kinds, payloads, strict=True)
            if identities is not None:
                identities = identities._replace(is_own=self._is_own(producer))
            self._deliver(list(map(new_entry, columns)), identities)
        self._waits.on_delivered(producer, sequence, count, self.position)
        if heartbeat is not None:
            self._on_heartbeat(producer, heartbeat)

    def _join_parts(self, part: bytes) -> bytes | None:
        """Return the bytes of a packet, or None if more of its parts are expected, or some missing.

        Raises:
            FormatError: the entry is not a part.
        """
        assembler = self._assembler
        packed = assembler.join(part)
        self._counters.unreadable += assembler.dropped
        assembler.dropped = 0
        if assembler.orphan_part is not None:
            producer, sequence = assembler.orphan_part
            if sequence >= self.producers.next_sequence(producer, sequence):
                # The first parts of a packet are lost. Its messages have the position of its last
                # part.
                self._report_gap_through_entry()
        return packed

    def _is_next_of_producer(self, packet: Packet) -> bool:
        """Record a packet; return whether it is no duplicate. Report messages missing before it."""
        missing = self.producers.record_packet(
            packet.producer, packet.sequence, len(packet.payloads)
        )
        if missing < 0:
            self._counters.duplicates += 1
            return False
        if missing:
            self._counters.lost += missing
            log.error("backplane lost messages", extra={"count": missing})
            self._report_gap()
        return True

    def _report_gap_after(self, previous_id: Id) -> None:
        """Report that entries are missing before the present one."""
        if self.producers.is_current:
            self._counters.gaps += 1
            after = f"{previous_id[0]}-{previous_id[1]}"
            log.error("backplane lost messages", extra={"after": after})
        self._report_gap()

    def _report_gap(self) -> None:
        self._on_gap(self.position._replace(index=0).before())

    def _report_gap_through_entry(self) -> None:
        """Report a gap that ends with the present entry: messages in it are not delivered."""
        # Messages that are relayed locally in a later outage get positions after this entry.
        self.position = self.position._replace(index=INDEX_LIMIT)
        self._on_gap(self.position)

    # Outages

    def skip_from(self, producer: int, sequence: int) -> None:
        """Skip the messages of a producer from `sequence` on: they are delivered locally.

        Those of an earlier outage need not be skipped any more: a heartbeat was read since, and
        messages of its producer epoch are duplicates then.
        """
        self._delivered_locally = producer, sequence

    def reconnect(self) -> None:
        """Open a new connection for the next read: entries are not read back by the present one."""
        self._must_reconnect = True

    def deliver_locally(
        self,
        channels: Iterable[str],
        messages: Iterable[Message],
        identities: Identities | None,
    ) -> None:
        """Deliver messages on this replica alone, with the positions after the last one."""
        epoch, offset, index = self.position
        entries = [
            LogEntry(Position(epoch, offset, following), channel, *message)
            for following, (channel, message) in enumerate(
                zip(channels, messages, strict=True), index + 1
            )
        ]
        if entries:
            self.position = entries[-1].position
            self._counters.local += len(entries)
            self.is_relaying_alone = True
            self._deliver(entries, identities)
            self.is_relaying_alone = False
