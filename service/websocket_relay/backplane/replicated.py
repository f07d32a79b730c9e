"""Keep the log on a broker: append to its stream and consume it. Owns the total order.

Every message of this replica is appended to the stream and read back from it, like the messages of
other replicas; there is no second delivery path. Messages gather while an append is in flight and
leave together in the next one. One append is in flight at a time, and it is retried until it is
confirmed. All readers detect a duplicate by its sequence number and discard it alike (see `codec`).
So a short unavailability of the broker costs only a delay.

A *heartbeat* checks whether the stream can be reached: each second every replica marks a packet and
waits to read it back. While none is read back in time there is an *outage*.

Knows no broker's protocol and no client.
"""

import asyncio
import logging
import random
import socket
import struct
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Sequence
from functools import partial
from itertools import repeat
from typing import NamedTuple, Protocol

from websocket_relay.backplane.codec import (
    FILLER_ENTRY,
    MESSAGE_OVERHEAD_BYTES,
    FormatError,
    Packet,
    PartAssembler,
    pack,
    split_into_parts,
    unpack,
)
from websocket_relay.backplane.confirmations import Confirmation, Confirmations, OnPosition
from websocket_relay.backplane.interface import (
    START,
    BackplaneState,
    LogEntry,
    OnEntries,
    OnGap,
    Position,
)
from websocket_relay.cancellation import run_cancellable
from websocket_relay.counters import BackplaneCounters
from websocket_relay.messages import Publisher
from websocket_relay.outcomes import RelayError
from websocket_relay.redaction import redact

log = logging.getLogger(__name__)

PACKET_BYTES = 131_072
"""A packet is sealed at this size: larger ones are hardly cheaper, and a reader delivers a whole
packet without yielding to the event loop."""

MAX_PACKET_BYTES = 4_194_304
"""Size of a packet at most, without its last message: a packet that is sealed late, with empty
messages, each to a channel of its own."""

PENDING_OVERHEAD_BYTES = 64
"""Memory of a pending message besides its bytes in the packet: an object, and places in two
lists."""

APPEND_TIMEOUT_S = 2.0
"""An append that is not confirmed within this time is retried."""

HEARTBEAT_INTERVAL_S = 1.0
"""Interval of heartbeats."""

REPLICA_TIMEOUT_S = 5.0
"""A replica without a heartbeat in this time is not alive any more."""

OUTAGE_AFTER_S = 3.0
"""As a rule a broker that restarts, or fails over, is available again within this time, and a
client that waits for its own message has not timed out."""

CONFIRMATION_TIMEOUT_S = 5.0
"""Time from the start of an outage in which a message that was confirmed before it may still be
read back. Then the waits for it end: as a rule clients time out after ten seconds."""

MONITOR_INTERVAL_S = 0.1
"""Interval of the checks for an outage."""

BACKOFF_S = (0.05, 1.0)
"""First and longest pause after a failure; each is randomly reduced by up to a half."""

TURNS = 8
"""Tasks that wake each other while a message passes to the broker, and back from it: those of this
module, and those of the broker's library. With a lower value, fan-outs to full channels delay
messages, so that fewer of them leave together: at 4, one in five with nats-py."""

MAX_PRODUCERS = 10_000
"""Replicas whose sequence numbers are remembered, the latest ones: more than a stream has had."""

PRODUCER_EPOCHS = 1 << 16
"""Count of producer epochs, which are the lower bits of a producer. Each outage starts a new
producer epoch. A message that was abandoned in an earlier one may still arrive; it is discarded
after the first packet of the new one. So messages of a client are never delivered out of order."""

MAX_FAILURE_TEXTS = 8
"""Distinct errors that are logged of a streak of failures."""

INDEX_LIMIT = 1 << 32
"""Greater than the index of any message in a packet."""

TIMESTAMP = struct.Struct("<d")
"""First field of a heartbeat: when it was sent, by the monotonic clock of its producer."""

RESET = struct.pack("ii", 1, 0)
"""Value of SO_LINGER: unsent bytes are discarded."""

Id = tuple[int, int]
"""Id of an entry: epoch and offset of its positions."""

# NamedTuples are built in batches of a thousand. `_make` and the classes themselves are Python
# calls; these are C calls.
_new_position: Callable[[tuple[int, int, int]], Position] = partial(tuple.__new__, Position)
_new_entry: Callable[[tuple[Position, str, int, bytes]], LogEntry] = partial(
    tuple.__new__, LogEntry
)


class BrokerError(RelayError):
    """The broker is unavailable, or rejected a request. A retry may succeed."""


class StreamEntry(NamedTuple):
    """An entry of a stream.

    Attributes:
        entry_id: id of the entry.
        data: bytes of the entry.
        follows: whether the stream never held another entry between this one and the one that was
            read before.
    """

    entry_id: Id
    data: bytes
    follows: bool


class StreamRead(NamedTuple):
    """The result of a read.

    Attributes:
        entries: in the order of the stream.
        is_last: whether the stream held no further entries.
    """

    entries: Sequence[StreamEntry]
    is_last: bool = True


class Stream(Protocol):
    """A stream on a broker. The ids of its entries only grow."""

    @property
    def max_entry_bytes(self) -> int:
        """The size limit of an entry, as far as is known."""

    async def open_writer(self) -> None:
        """Connect for `append`, unless the connection is open. This has time limits of its own.

        Raises:
            BrokerError: the broker can't be reached.
        """

    async def append(self, data: bytes, timeout_s: float) -> None:
        """Append an entry. Call `open_writer` right before.

        Args:
            data: bytes of the entry.
            timeout_s: time limit of the broker's response.

        Raises:
            BrokerError: the append is unconfirmed; the entry may be in the stream.
        """

    async def read(self, after: Id) -> StreamRead:
        """Return the next entries after an id; wait for about a second if there are none.

        Raises:
            BrokerError: the stream can't be read now.
        """

    def reconnect_reader(self) -> None:
        """Open a new connection for the next read: entries are not read back by the present one."""

    async def close(self) -> None:
        """Close the connections to the broker."""


class PendingBytes(Protocol):
    """The bound on the bytes of pending appends: above it publishers are paused."""

    bytes: int

    def drained(self, size: int) -> None:
        """Record that so many bytes are not pending any more."""


class OutgoingPacket:
    """Messages of this replica for one append."""

    __slots__ = (
        "channels",
        "is_abandoned",
        "is_heartbeat",
        "opcodes",
        "payloads",
        "publishers",
        "sequence",
        "size",
    )

    def __init__(self) -> None:
        self.channels: list[str] = []
        self.opcodes = bytearray()
        self.payloads: list[bytes] = []
        self.publishers: dict[Publisher, None] = {}
        self.size = 0
        self.sequence = 0  # sequence number of the first message, once the append is in flight
        self.is_heartbeat = False
        self.is_abandoned = False

    @property
    def memory_bytes(self) -> int:
        """The memory that the messages take."""
        return self.size + PENDING_OVERHEAD_BYTES * len(self.payloads)


class ProducerStates:
    """The producer epoch and the next sequence number of each replica, as read from the stream."""

    def __init__(self) -> None:
        # By replica: producer epoch and next sequence number.
        self._latest: OrderedDict[int, tuple[int, int]] = OrderedDict()
        self.is_current = False  # whether an unknown producer is new: its numbers start at 0

    def next_sequence(self, producer: int, first_sequence: int) -> int:
        """Return the next sequence number to read of a producer that starts at `first_sequence`."""
        replica, producer_epoch = divmod(producer, PRODUCER_EPOCHS)
        latest_epoch, following = self._latest.get(replica, (producer_epoch, first_sequence))
        return following if producer_epoch == latest_epoch else first_sequence

    def is_expected(self, producer: int, sequence: int) -> bool:
        """Return whether a packet that starts with this message is unread, and may be read."""
        replica, producer_epoch = divmod(producer, PRODUCER_EPOCHS)
        latest_epoch, following = self._latest.get(replica, (producer_epoch, sequence))
        return producer_epoch > latest_epoch or (
            producer_epoch == latest_epoch and sequence >= following
        )

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


class ReplicatedBackplane:
    """The log of one replica, on a broker's stream.

    Args:
        stream: the broker's stream.
        address: address of the broker, without secrets; it is logged.
        pending: bound on the bytes of pending appends.
        relays_locally: whether messages are relayed on this replica alone during an outage; if not,
            their publishers are notified.
        max_message_bytes: message limit of the clients of any replica.
        describe: returns the description of this replica for the others, in a few bytes.
        observe_append: receives the duration of each append in seconds.
        observe_lag: receives the seconds from the append of a heartbeat until it is read back.
    """

    is_local = False

    def __init__(
        self,
        stream: Stream,
        *,
        address: str,
        pending: PendingBytes,
        relays_locally: bool,
        max_message_bytes: int,
        describe: Callable[[], bytes],
        observe_append: Callable[[float], None],
        observe_lag: Callable[[float], None],
    ) -> None:
        self.counters = BackplaneCounters()
        self.state = BackplaneState.STARTING
        self.started, self.up = asyncio.Event(), asyncio.Event()
        self._stream = stream
        self._address = address
        self._pending = pending
        self.relays_locally = relays_locally
        self._describe = describe
        self._observe_append = observe_append
        self._observe_lag = observe_lag
        self._deliver: OnEntries
        self._on_gap: OnGap
        # Append
        self._is_outage = False  # state is OUTAGE; checked for every message
        self._outbox: deque[OutgoingPacket] = deque()
        self._in_flight: OutgoingPacket | None = None
        self._in_flight_since = 0.0
        self._outbox_filled = asyncio.Event()
        self._pending_reduced = asyncio.Event()  # an append was confirmed, or packets abandoned
        # By replica: when the latest heartbeat was read, and its description.
        self._replicas: OrderedDict[int, tuple[float, bytes]] = OrderedDict()
        self._producer = _new_producer()
        # Sequence number of the next message; of the first one of this producer epoch.
        self._next_sequence = self._first_sequence = 0
        # Read
        self._last_read_id: Id = (0, 0)
        self._position = START
        self._position_waits = Confirmations()  # waits for the position of a message
        self._settled_waits = Confirmations()  # waits until no message is in flight
        self._confirmation_deadline = 0.0  # ends the waits for messages of earlier producer epochs
        # Whether nothing is missing before the next entry; false at the start, too.
        self._is_contiguous = False
        self._producers = ProducerStates()
        # By producer: the sequence number from which on messages were delivered here in an outage.
        self._delivered_locally: OrderedDict[int, int] = OrderedDict()
        self._assembler = PartAssembler(max_message_bytes + MAX_PACKET_BYTES)
        self._read_allowed = asyncio.Event()
        self._read_allowed.set()
        # Heartbeat in flight: when it was sent, and when its append was confirmed; 0: none is.
        self._heartbeat_sent_at = 0.0
        self._heartbeat_confirmed_at = 0.0
        self._complete_until = 0.0
        self._unread_seen_at = 0.0  # the latest time at which the stream held further entries
        self._failures: dict[str, set[str]] = {}

    # Interface of `Backplane`

    def consume(self, deliver: OnEntries, lost: OnGap) -> None:
        """Pass every entry from now on to `deliver`; call `lost` where entries are missing."""
        self._deliver = deliver
        self._on_gap = lost

    def append(self, channel, messages, payload_bytes, publisher) -> None:
        self.append_batch(channel, messages, publisher)

    def _append_one(self, channel: str, opcode: int, payload: bytes, publisher: Publisher) -> None:
        """Append a message."""
        if self._is_outage:
            self._handle_in_outage(channel, opcode, payload, publisher)
            return
        outbox = self._outbox
        outgoing = outbox[-1] if outbox else self._start_packet()
        outgoing.channels.append(channel)
        outgoing.opcodes.append(opcode)
        outgoing.payloads.append(payload)
        outgoing.publishers[publisher] = None
        size = len(payload) + MESSAGE_OVERHEAD_BYTES
        outgoing.size += size
        self._pending.bytes += size + PENDING_OVERHEAD_BYTES
        if outgoing.size >= PACKET_BYTES:
            self._start_packet()

    def append_batch(
        self, channel: str, messages: Sequence[tuple[int, bytes]], publisher: Publisher
    ) -> None:
        """Append messages in one packet: next to each other, and all of them or none."""
        if self._is_outage:
            for opcode, payload in messages:
                self._handle_in_outage(channel, opcode, payload, publisher)
            return
        count = len(messages)
        size = sum(len(payload) for _, payload in messages) + MESSAGE_OVERHEAD_BYTES * count
        outgoing = self._outbox[-1] if self._outbox else self._start_packet()
        if outgoing.payloads and outgoing.size + size > PACKET_BYTES:
            outgoing = self._start_packet()
        outgoing.channels.extend(repeat(channel, count))
        outgoing.opcodes.extend(opcode for opcode, _ in messages)
        outgoing.payloads.extend(payload for _, payload in messages)
        outgoing.publishers[publisher] = None
        outgoing.size += size
        self._pending.bytes += size + PENDING_OVERHEAD_BYTES * count
        if outgoing.size >= PACKET_BYTES:
            self._start_packet()

    def when_delivered(self, callback: OnPosition) -> None:
        """Call `callback` once the message that was appended last is read back, or can't be."""
        if self._is_outage:  # the message was delivered here alone, or rejected
            callback(self._position if self.relays_locally else None)
        else:
            self._position_waits.add(self._producer, self._following, callback)

    def when_settled(self, callback: Callable[[], None]) -> None:
        """Call `callback` once each message appended so far is read back or abandoned."""
        following = self._following
        if self._next_read < following:
            self._settled_waits.add(self._producer, following, lambda _: callback())
        elif self._settled_waits:  # for messages of an earlier producer epoch
            self._settled_waits.add_to_latest(lambda _: callback())
        else:
            callback()

    @property
    def _next_read(self) -> int:
        """The sequence number of the first message of this producer epoch that is unread."""
        return self._producers.next_sequence(self._producer, self._first_sequence)

    @property
    def _following(self) -> int:
        """The sequence number of the message that is appended next."""
        return self._next_sequence + sum(len(each.payloads) for each in self._outbox)

    @property
    def position(self) -> Position:
        """The position up to which everything has been delivered here."""
        return self._position

    @property
    def complete_until(self) -> float:
        """When the latest heartbeat that was read back was sent: earlier entries were read."""
        return self._complete_until

    def pause_reading(self) -> None:
        """Pause reads of the stream until `resume_reading`: too many bytes are pending."""
        self._read_allowed.clear()

    def resume_reading(self) -> None:
        """Resume reads of the stream."""
        if not self._read_allowed.is_set():
            self._unread_seen_at = time.monotonic()
            self._read_allowed.set()

    def replicas(self) -> Sequence[bytes]:
        """Return the descriptions of the replicas with a recent heartbeat, this one included."""
        since = time.monotonic() - REPLICA_TIMEOUT_S
        return [description for read_at, description in self._replicas.values() if read_at > since]

    @property
    def unconfirmed_messages(self) -> int:
        """The count of messages whose append is pending or in flight."""
        return sum(len(each.payloads) for each in self._unconfirmed)

    async def run(self) -> None:
        """Append, read and send heartbeats until cancelled."""
        try:
            async with asyncio.TaskGroup() as group:
                for start in (self._write, self._read, self._monitor):
                    group.create_task(run_cancellable(start))
        finally:
            await self._stream.close()

    async def flush(self) -> None:
        """Return once each append is confirmed or abandoned."""
        while self.unconfirmed_messages:
            self._pending_reduced.clear()
            await self._pending_reduced.wait()

    # Append

    @property
    def _unconfirmed(self) -> list[OutgoingPacket]:
        in_flight = self._in_flight
        if in_flight is None or in_flight.is_abandoned:
            return [*self._outbox]
        return [in_flight, *self._outbox]

    def _start_packet(self) -> OutgoingPacket:
        outgoing = OutgoingPacket()
        self._outbox.append(outgoing)
        self._outbox_filled.set()
        return outgoing

    async def _write(self) -> None:
        while True:
            await self._outbox_filled.wait()
            outgoing = self._outbox.popleft()
            if not self._outbox:
                self._outbox_filled.clear()
            if outgoing.payloads or outgoing.is_heartbeat:
                await self._append(outgoing)

    async def _append(self, outgoing: OutgoingPacket) -> None:
        self._in_flight, self._in_flight_since = outgoing, time.monotonic()
        producer, sequence = self._producer, self._next_sequence
        outgoing.sequence = sequence
        self._next_sequence += len(outgoing.payloads)
        heartbeat = (
            TIMESTAMP.pack(self._heartbeat_sent_at) + self._describe()
            if outgoing.is_heartbeat
            else None
        )
        opcodes = bytes(outgoing.opcodes)
        data = pack(
            Packet(producer, sequence, outgoing.channels, opcodes, outgoing.payloads, heartbeat)
        )
        pause_s = BACKOFF_S[0]
        while not outgoing.is_abandoned:
            started = time.perf_counter()
            try:
                is_stored = await self._store(outgoing, data, producer)
            except (BrokerError, TimeoutError) as error:
                self._record_failure("append", error)
                pause_s = await _pause(pause_s)
            else:
                if is_stored:
                    self._record_success("append")
                    self._observe_append(time.perf_counter() - started)
                break
        self._in_flight = None
        self._pending_reduced.set()
        if not outgoing.is_abandoned:
            self._pending.drained(outgoing.memory_bytes)
            if outgoing.is_heartbeat:
                self._heartbeat_confirmed_at = time.monotonic()

    async def _store(self, outgoing: OutgoingPacket, data: bytes, producer: int) -> bool:
        """Append a packet, unless an outage abandons it first; return whether it is stored.

        Raises:
            BrokerError, TimeoutError: the append is unconfirmed.
        """
        # The broker's size limit may be lower than before a restart.
        limit = self._stream.max_entry_bytes
        for part in split_into_parts(data, producer, outgoing.sequence, limit):
            await self._stream.open_writer()  # this may take longer than an outage needs to start
            if outgoing.is_abandoned:
                return False
            await self._stream.append(part, APPEND_TIMEOUT_S)
        return True

    # Read

    async def _read(self) -> None:
        pause_s = BACKOFF_S[0]
        while True:
            try:
                read = await self._stream.read(self._last_read_id)
            except (BrokerError, TimeoutError) as error:
                self._record_failure("read", error)
                pause_s = await _pause(pause_s)
                continue
            self._record_success("read")
            pause_s = BACKOFF_S[0]
            for entry in read.entries:
                if not self._read_allowed.is_set():
                    await self._read_allowed.wait()
                self.on_entry(entry)
                if not read.is_last:
                    self._unread_seen_at = time.monotonic()
                # A packet takes a millisecond or two. Yield, so that its messages are written to
                # clients before the next read.
                await asyncio.sleep(0)
            if not self._read_allowed.is_set():
                await self._read_allowed.wait()

    def on_entry(self, entry: StreamEntry) -> None:
        """Deliver the messages of the next entry; first report a gap before it, if there is one."""
        (epoch, offset), data, follows = entry
        previous_id, self._last_read_id = self._last_read_id, entry.entry_id
        self._position = Position(epoch, offset, -1)  # before the first message of the entry
        self._is_contiguous = self._is_contiguous and follows and data != FILLER_ENTRY
        if data == FILLER_ENTRY:  # as a rule more of them follow; one gap is reported for all
            return
        if not self._is_contiguous:
            self._is_contiguous = True
            if self._producers.is_current:
                self._record_gap(previous_id)
            self._on_gap(Position(epoch, offset, 0).before())
        try:
            whole = self._assembler.join(data)
            packet = unpack(whole) if whole is not None else None
        except FormatError as error:
            self.counters.unreadable += 1
            log.debug("unreadable entry", extra={"error": str(error)})
            self._report_gap_through(entry.entry_id)  # may hold messages of a newer version
            return
        if self._assembler.dropped:
            self.counters.unreadable += self._assembler.dropped
            self._assembler.dropped = 0
        if packet is not None:
            self._deliver_packet(epoch, offset, packet)
        elif self._assembler.orphan_part is not None and self._producers.is_expected(
            *self._assembler.orphan_part
        ):
            # The first parts of a packet are lost. Its messages have the position of its last part.
            self._report_gap_through(entry.entry_id)

    def _record_gap(self, after: Id) -> None:
        self.counters.gaps += 1
        log.error("backplane lost messages", extra={"after": f"{after[0]}-{after[1]}"})

    def _report_gap_through(self, entry_id: Id) -> None:
        """Report a gap that ends with this entry: messages in it, if any, are not delivered."""
        # Messages that are relayed locally in a later outage get positions after this entry.
        self._position = Position(*entry_id, INDEX_LIMIT)
        self._on_gap(self._position)

    def _deliver_packet(self, epoch: int, offset: int, packet: Packet) -> None:
        producer, sequence, channels, opcodes, payloads, heartbeat = packet
        count = len(payloads)
        missing = self._producers.record_packet(producer, sequence, count)
        if missing < 0:
            self.counters.duplicates += 1
            return
        if missing:
            self.counters.lost += missing
            log.error("backplane lost messages", extra={"count": missing})
            self._on_gap(Position(epoch, offset, 0).before())
        self._position = Position(epoch, offset, count - 1)
        # Skip messages that were delivered here in an outage, and are in the log after all.
        if not self._delivered_locally or sequence < self._delivered_locally.get(
            producer, sequence + 1
        ):
            indices = zip(repeat(epoch), repeat(offset), range(count), strict=False)
            positions = map(_new_position, indices)
            deliver = self._deliver
            columns = zip(positions, channels, opcodes, payloads, strict=True)
            deliver(list(map(_new_entry, columns)))
        if heartbeat is not None:
            self._record_replica(producer, heartbeat[TIMESTAMP.size :])
        if producer // PRODUCER_EPOCHS == self._producer // PRODUCER_EPOCHS:
            self._position_waits.on_packet(producer, sequence, self._position)
            self._settled_waits.on_packet(producer, sequence, self._position)
        if producer == self._producer and heartbeat is not None:
            self._on_own_heartbeat(heartbeat)

    def _record_replica(self, producer: int, description: bytes) -> None:
        replicas = self._replicas
        replica = producer // PRODUCER_EPOCHS
        replicas[replica] = time.monotonic(), description
        replicas.move_to_end(replica)
        if len(replicas) > MAX_PRODUCERS:
            replicas.popitem(last=False)

    # Heartbeats and outages

    async def _monitor(self) -> None:
        self._send_heartbeat(time.monotonic())
        checked_at = time.monotonic()
        due = checked_at + HEARTBEAT_INTERVAL_S
        while True:
            await asyncio.sleep(MONITOR_INTERVAL_S)
            now = time.monotonic()
            if now - checked_at > 2 * MONITOR_INTERVAL_S:  # this process was stopped or starved
                self._discount_stall(now - checked_at)
            checked_at = now
            if now > self._confirmation_deadline:
                self._expire_earlier_epochs()
            if not self._heartbeat_sent_at:
                if now >= due:
                    self._send_heartbeat(now)
                    due = now + HEARTBEAT_INTERVAL_S
            elif self._is_overdue(now):
                if self._heartbeat_confirmed_at:  # after a failover: reader on the former primary
                    self._stream.reconnect_reader()
                if self._is_outage:  # the latest heartbeat was lost
                    self._send_heartbeat(now)
                else:
                    self._start_outage(now)

    def _send_heartbeat(self, now: float) -> None:
        self._heartbeat_sent_at, self._heartbeat_confirmed_at = now, 0.0
        outgoing = self._outbox[-1] if self._outbox else self._start_packet()
        outgoing.is_heartbeat = True

    def _is_overdue(self, now: float) -> bool:
        """Return whether the broker takes too long to confirm an append, or to return an entry.

        Other entries of the stream are read before the heartbeat, and reads may be paused. That
        time does not count.
        """
        if self._in_flight is not None:
            return not self._is_outage and now - self._in_flight_since > OUTAGE_AFTER_S
        if not self._heartbeat_confirmed_at or not self._read_allowed.is_set():
            return False
        return now - max(self._heartbeat_confirmed_at, self._unread_seen_at) > OUTAGE_AFTER_S

    def _discount_stall(self, stall_s: float) -> None:
        """Exclude a stall of this process from the measured times: it could not read responses."""
        self._in_flight_since += stall_s
        self._unread_seen_at += stall_s
        if self._heartbeat_confirmed_at:
            self._heartbeat_confirmed_at += stall_s

    def _on_own_heartbeat(self, heartbeat: bytes) -> None:
        if len(heartbeat) >= TIMESTAMP.size:
            self._complete_until = max(self._complete_until, *TIMESTAMP.unpack_from(heartbeat))
        if self._heartbeat_sent_at:
            self._observe_lag(time.monotonic() - self._heartbeat_sent_at)
            self._heartbeat_sent_at = 0.0
        # The append in flight may be the heartbeat itself, if it is read before its confirmation.
        self._in_flight_since = time.monotonic()
        if self.state is not BackplaneState.UP:
            log.info("backplane up")
            self.state = BackplaneState.UP
            self._is_outage = False
            self._producers.is_current = True
            self.started.set()
            self.up.set()

    def _start_outage(self, now: float) -> None:
        """Abandon pending messages: reject them, or deliver them on this replica alone.

        Messages that are confirmed and unread are awaited for `CONFIRMATION_TIMEOUT_S`.
        """
        log.error(
            "backplane outage", extra={"broker": self._address, "on_outage": self._outage_mode}
        )
        self._expire_earlier_epochs()
        self.counters.outages += 1
        self.state = BackplaneState.OUTAGE
        self._is_outage = True
        self.started.set()
        self.up.clear()
        abandoned = self._unconfirmed
        self._outbox.clear()
        self._outbox_filled.clear()
        producer, sequence = self._producer, self._next_sequence
        if self._in_flight is not None and not self._in_flight.is_abandoned:
            self._in_flight.is_abandoned = True
            sequence = self._in_flight.sequence
            if self._next_read > sequence:  # it is in the stream: it was read back
                self._pending.drained(abandoned.pop(0).memory_bytes)
                sequence = self._next_sequence
        if self.relays_locally:
            self._delivered_locally[producer] = sequence
            if len(self._delivered_locally) > MAX_PRODUCERS:
                self._delivered_locally.popitem(last=False)
        is_read = self._next_read >= sequence
        # Continue with the number of the first abandoned message, or readers would count the
        # abandoned ones as lost.
        self._producer, self._first_sequence = _next_producer_epoch(producer, sequence)
        self._next_sequence = self._first_sequence
        self._abandon_from(producer, sequence, abandoned, is_read=is_read)
        self._pending_reduced.set()
        self._confirmation_deadline = now + CONFIRMATION_TIMEOUT_S
        self._send_heartbeat(now)

    def _abandon_from(
        self, producer: int, sequence: int, abandoned: Sequence[OutgoingPacket], *, is_read: bool
    ) -> None:
        """Abandon packets, and end the waits for their messages.

        Args:
            producer, sequence: of their first message.
            abandoned: the packets.
            is_read: whether all messages before them were read.
        """
        position_waits = deque(self._position_waits.pop_abandoned(producer, sequence))
        settled_waits = self._settled_waits.pop_abandoned(producer, sequence)
        if not is_read:
            # Waits that are added from now on end after the messages of this producer epoch, too.
            # One may be that of a client that closes because its message is rejected below.
            for wait in (*settled_waits, Confirmation(producer, sequence, lambda _: None)):
                self._settled_waits.add(producer, sequence, wait.callback)
        following = sequence
        for outgoing in abandoned:
            self._abandon(outgoing, following, position_waits)
            following += len(outgoing.payloads)
        for wait in position_waits:
            wait.callback(None)
        if is_read:
            for wait in settled_waits:
                wait.callback(None)

    def _expire_earlier_epochs(self) -> None:
        """End the waits for messages of earlier producer epochs."""
        self._position_waits.expire(self._producer)
        self._settled_waits.expire(self._producer)

    @property
    def _outage_mode(self) -> str:
        return "local" if self.relays_locally else "reject"

    def _abandon(
        self, outgoing: OutgoingPacket, sequence: int, position_waits: deque[Confirmation]
    ) -> None:
        self._pending.drained(outgoing.memory_bytes)
        if self.relays_locally:
            columns = zip(outgoing.channels, outgoing.opcodes, outgoing.payloads, strict=True)
            for following, message in enumerate(columns, sequence + 1):
                self._deliver_locally(*message)
                while position_waits and position_waits[0].next_sequence <= following:
                    position_waits.popleft().callback(self._position)
        else:
            self.counters.unavailable += len(outgoing.payloads)
            is_unconfirmed = outgoing is self._in_flight
            for publisher in outgoing.publishers:
                publisher.fail_publish(is_unconfirmed=is_unconfirmed)

    def _handle_in_outage(
        self, channel: str, opcode: int, payload: bytes, publisher: Publisher
    ) -> None:
        if self.relays_locally:
            self._deliver_locally(channel, opcode, payload)
        else:
            self.counters.unavailable += 1
            publisher.fail_publish(is_unconfirmed=False)

    def _deliver_locally(self, channel: str, opcode: int, payload: bytes) -> None:
        epoch, offset, index = self._position
        self._position = Position(epoch, offset, index + 1)
        self.counters.local += 1
        self._deliver([LogEntry(self._position, channel, opcode, payload)])

    def _record_failure(self, action: str, error: Exception) -> None:
        texts = self._failures.setdefault(action, set())
        text = str(error) or "not answered in time"
        if text not in texts and len(texts) < MAX_FAILURE_TEXTS:
            texts.add(text)
            fields = {"broker": self._address, "action": action, "error": text}
            log.warning("backplane failed", extra=fields)

    def _record_success(self, action: str) -> None:
        if action in self._failures:
            del self._failures[action]
            log.info("backplane recovered", extra={"action": action})


def broker_error(error: Exception, secrets: Sequence[str], *, is_expected: bool) -> BrokerError:
    """Convert an error of a broker's library: one line of text, without secrets.

    Args:
        is_expected: whether the library documents this error. A malformed response of the broker
            may raise any other.
    """
    text = str(error) or "not answered in time"
    if isinstance(error, RuntimeError):  # raised by uvloop for a closed transport
        text = "connection lost"
    elif not is_expected:
        text = f"unexpected error: {type(error).__name__}: {text}"
    return BrokerError(redact(secrets, text))


def reset_on_close(writer: asyncio.StreamWriter) -> None:
    """Make an abort of a connection reset it at once, and discard its unsent bytes.

    Otherwise the kernel keeps the connection until the broker has received those bytes, which a
    frozen broker never does. Call it right after connecting: a closed transport does not return
    its socket.

    Raises:
        BrokerError: the connection is closed already.
    """
    connected = writer.get_extra_info("socket")
    if connected is None:
        raise BrokerError("connection lost")
    connected.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)


def _new_producer() -> int:
    return random.getrandbits(48) * PRODUCER_EPOCHS


def _next_producer_epoch(producer: int, sequence: int) -> tuple[int, int]:
    """Return the producer with its next epoch, and its first sequence number.

    Args:
        sequence: number after the last message that was confirmed in the present producer epoch.
    """
    following = producer + 1
    return (following, sequence) if following % PRODUCER_EPOCHS else (_new_producer(), 0)


async def _pause(pause_s: float) -> float:
    """Sleep after a failure; return the pause for the next one."""
    await asyncio.sleep(pause_s * random.uniform(0.5, 1))
    return min(2 * pause_s, BACKOFF_S[1])
