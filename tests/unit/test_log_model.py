"""A model of a log that loses entries: which gaps replicas report, and which clients recover.

The log is a list that follows the rules of the script that appends to a Redis stream. The reader
and the history are the real ones. After a failover, losses can't be reported unless the next
replica that appends had read the lost entries; every other loss must be reported before any later
message. The examples are the same in every run.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    rule,
    run_state_machine_as_test,
)
from websocket_relay.backplane.codec import PRODUCER_EPOCHS, Packet, pack, split_into_parts
from websocket_relay.backplane.interface import LogEntry, Position
from websocket_relay.backplane.replicated import ReplicatedBackplane
from websocket_relay.backplane.stream import Id, Stream, StreamEntry
from websocket_relay.backplane.timings import DEFAULT_TIMINGS
from websocket_relay.channels.history import History

from tests.support.broker_logs import Pending

pytestmark = pytest.mark.fast

REPLICAS = st.integers(0, 2)
CHANNEL = "news"
NEVER = (10**9, 0)
PART_BYTES = 32


@dataclass
class StoredEntry:
    """An entry of the log.

    Attributes:
        before: the id of the entry before it, if the log knows it.
    """

    entry_id: Id
    packed: bytes
    before: Id | None


@dataclass
class ModelLog:
    """A stream: its entries, the latest id that it has assigned, and its clock."""

    entries: list[StoredEntry] = field(default_factory=list)
    latest: Id = (0, 0)
    clock: int = 1

    def append(self, packed: bytes, read_up_to: Id) -> Id:
        """Append as the script does."""
        top = max(self.entries[-1].entry_id if self.entries else (0, 0), self.latest)
        entry_id = max((self.clock, 0), (top[0], top[1] + 1))
        before: Id | None = self.latest
        if self.latest < read_up_to:
            before, entry_id = None, max(entry_id, (read_up_to[0], read_up_to[1] + 1))
        self.entries.append(StoredEntry(entry_id, packed, before))
        self.latest = entry_id
        return entry_id


class UnreadStream(Stream):
    """A stream that is never read by the backplane itself: the model passes entries to it."""


class ModelReplica:
    """A replica, as a producer and as a reader of the log."""

    def __init__(self, number: int, epoch: int) -> None:
        self.producer = (number + 1) * PRODUCER_EPOCHS + epoch
        self.next_sequence = 0
        self.read_up_to: Id = (0, 0)
        self.latest_known: Id = (0, 0)  # read or appended
        self.last_read = 0  # the number, of all reads, of its last one that returned entries
        self.delivered: list[Position] = []
        self.history = History(
            max_messages=10_000,
            max_bytes=1 << 30,
            max_age_s=1e9,
            max_channels=10,
            clock=lambda: 0.0,
        )
        self.backplane = ReplicatedBackplane(
            UnreadStream(),  # type: ignore[abstract]
            address="model",
            pending=Pending(),
            relays_locally=False,
            max_message_bytes=1000,
            describe=lambda: b"",
            observe_append=lambda _: None,
            observe_lag=lambda _: None,
            timings=DEFAULT_TIMINGS,
        )
        self.backplane.consume(self._deliver, self.history.record_gap)

    def _deliver(self, entries: Sequence[LogEntry], _: object) -> None:
        for entry in entries:
            self.delivered.append(entry.position)
            self.history.add(entry)

    def read(self, log: ModelLog, count: int) -> int:
        """Read at most so many entries; return how many."""
        unread = [each for each in log.entries if each.entry_id > self.read_up_to][:count]
        for stored in unread:
            follows = stored.before == self.read_up_to
            self.backplane.consumer.on_entry(StreamEntry(stored.entry_id, stored.packed, follows))
            self.read_up_to = stored.entry_id
            self.latest_known = max(self.latest_known, self.read_up_to)
        return len(unread)


class LogModel(RuleBasedStateMachine):
    """All events that can happen to a log and its readers."""

    @initialize()
    def start(self) -> None:
        self.log = ModelLog()
        self.readers = [ModelReplica(number, 0) for number in range(3)]
        self.epochs = 1
        # All confirmed messages, and the count of reads before each.
        self.messages: dict[Position, int] = {}
        self.reads = 0
        # For each message that a failover lost: the entry from which on a reader that missed it
        # must report a gap, if the next producer had known the message, NEVER if it had not, and
        # None before the next append.
        self.reportable_from: dict[Position, Id | None] = {}
        for reader in self.readers:
            self._append(reader, 0)
        for reader in self.readers:
            self._read(reader, 1000)
        self.first_floor = self.readers[0].history.floor
        self.has_lost_entries = False

    def _append(self, reader: ModelReplica, count: int, max_bytes: int = 1000) -> None:
        producer, sequence = reader.producer, reader.next_sequence
        packet = Packet(producer, sequence, [CHANNEL] * count, b"\1" * count, [b""] * count)
        packed = pack(packet)
        parts = split_into_parts(packed, max_bytes) if len(packed) > max_bytes else [packed]
        for part in parts:
            detects_loss = self.log.latest < reader.latest_known
            entry_id = self.log.append(part, reader.latest_known)
            for position, reportable_from in self.reportable_from.items():
                if reportable_from is None:
                    is_known = detects_loss and reader.latest_known >= position[:2]
                    self.reportable_from[position] = entry_id if is_known else NEVER
            reader.latest_known = max(reader.latest_known, entry_id)
        reader.next_sequence += count
        for index in range(count):
            self.messages[Position(*reader.latest_known, index)] = self.reads

    def _read(self, reader: ModelReplica, count: int) -> None:
        self.reads += 1
        if reader.read(self.log, count):
            reader.last_read = self.reads

    @rule(number=REPLICAS, count=st.integers(0, 3))
    def append(self, number: int, count: int) -> None:
        self._append(self.readers[number], count)

    @rule(number=REPLICAS)
    def append_in_parts(self, number: int) -> None:
        self._append(self.readers[number], 2, max_bytes=PART_BYTES)

    @rule(number=REPLICAS, count=st.integers(1, 4))
    def read(self, number: int, count: int) -> None:
        self._read(self.readers[number], count)

    @rule()
    def pass_time(self) -> None:
        self.log.clock += 1

    @rule(data=st.data())
    def delete(self, data: st.DataObject) -> None:
        if self.log.entries:
            self.has_lost_entries = True
            del self.log.entries[data.draw(st.integers(0, len(self.log.entries) - 1))]

    @rule(count=st.integers(1, 3))
    def trim(self, count: int) -> None:
        self.has_lost_entries = True
        del self.log.entries[:count]

    @rule(count=st.integers(1, 3), clock_lag=st.integers(0, 2))
    def fail_over(self, count: int, clock_lag: int) -> None:
        """Continue with a server that lacks the latest entries and whose clock is late."""
        self.has_lost_entries = True
        lost = self.log.entries[-count:]
        del self.log.entries[-count:]
        if lost:
            self.log.latest = lost[0].before or (0, 0)
        for position in self.messages:
            if position[:2] > self.log.latest:
                self.reportable_from[position] = None
        self.log.clock = max(1, self.log.clock - clock_lag)

    @rule(number=REPLICAS)
    def restart(self, number: int) -> None:
        self.readers[number] = ModelReplica(number, self.epochs)
        self.epochs += 1
        self._read(self.readers[number], 1000)

    def _expected(self, reader: ModelReplica, after: Position, up_to: Position) -> set[Position]:
        """Return the messages between two positions that a replica must have delivered."""
        return {
            position
            for position, reads in self.messages.items()
            if after < position <= up_to
            # After a failover, the next entry reports the loss of messages appended since.
            and reads < reader.last_read
            and self._is_reportable(position, reader.read_up_to)
        }

    def _is_reportable(self, position: Position, read_up_to: Id) -> bool:
        return (self.reportable_from.get(position, read_up_to) or NEVER) <= read_up_to

    @invariant()
    def no_message_is_delivered_after_an_unreported_loss(self) -> None:
        for reader in self.readers:
            if reader.delivered:
                floor, last = reader.history.floor, reader.delivered[-1]
                missing = self._expected(reader, floor, last) - set(reader.delivered)
                assert not missing, f"{missing} before {last}, reported up to {floor}"

    @invariant()
    def no_gap_is_reported_without_a_loss(self) -> None:
        if not self.has_lost_entries:
            assert {reader.history.floor for reader in self.readers} == {self.first_floor}

    @invariant()
    def positions_grow(self) -> None:
        for reader in self.readers:
            assert reader.delivered == sorted(set(reader.delivered))

    @invariant()
    def a_recovered_client_misses_no_message(self) -> None:
        for reader in self.readers:
            position = reader.backplane.position
            kept = {each.position for each in reader.history.latest_entries(CHANNEL, 10_000)}
            for other in self.readers:
                for since in other.delivered[-3:]:
                    if since <= position and reader.history.is_complete_after(CHANNEL, since):
                        missing = self._expected(reader, since, position) - kept
                        assert not missing, f"{missing} after {since}"


def test_every_reportable_loss_is_reported_and_recovered_clients_miss_no_message() -> None:
    run_state_machine_as_test(
        LogModel,
        settings=settings(
            max_examples=100,
            stateful_step_count=30,
            deadline=None,
            derandomize=True,
            database=None,
        ),
    )
