"""A model of a log that loses entries: what replicas tell of it, and whom they call recovered.

The log is a list, with the rules of the script that appends to a Redis stream. What reads it is the
real reader and the real history. What a server lost when it went back can't be told where the next
to append did not know of it; all other losses have to be told before anything that comes after.
"""

from dataclasses import dataclass, field

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule
from websocket_relay.backplane.codec import Packet, pack, split_into_parts
from websocket_relay.backplane.interface import LogEntry, Position
from websocket_relay.backplane.replicated import (
    PRODUCER_EPOCHS,
    Id,
    ReplicatedBackplane,
    Stream,
    StreamEntry,
)
from websocket_relay.channels.history import History

from tests.support.logs_kept import Pending

REPLICAS = st.integers(0, 2)
CHANNEL = "news"
NEVER = (10**9, 0)
PART_BYTES = 32


@dataclass
class Stored:
    """An entry of the log."""

    identity: Id
    data: bytes
    before: Id | None


@dataclass
class Log:
    """A stream, and what it remembers besides its entries."""

    entries: list[Stored] = field(default_factory=list)
    last: Id = (0, 0)
    clock: int = 1

    def append(self, data: bytes, known: Id) -> Id:
        """Do what the script does."""
        top = self.entries[-1].identity if self.entries else (0, 0)
        identity = max((self.clock, 0), (max(top, self.last)[0], max(top, self.last)[1] + 1))
        before: Id | None = self.last
        if self.last < known:
            before, identity = None, max(identity, (known[0], known[1] + 1))
        self.entries.append(Stored(identity, data, before))
        self.last = identity
        return identity


class Never(Stream):
    """A stream that is not read by itself."""


class Reader:
    """A replica, and all that it said of the log."""

    def __init__(self, number: int, life: int) -> None:
        self.origin = (number + 1) * PRODUCER_EPOCHS + life
        self.said = 0
        self.after: Id = (0, 0)
        self.known: Id = (0, 0)
        self.read_at = 0  # which read of all was its last that brought something
        self.delivered: list[Position] = []
        self.history = History(
            max_messages=10_000,
            max_bytes=1 << 30,
            max_age_s=1e9,
            max_channels=10,
            clock=lambda: 0.0,
        )
        self.backplane = ReplicatedBackplane(
            Never(),  # type: ignore[abstract]
            address="model",
            pending=Pending(),
            relays_locally=False,
            max_message_bytes=1000,
            describe=lambda: b"",
            observe_append=lambda _: None,
            observe_lag=lambda _: None,
        )
        self.backplane.consume(self._deliver, self.history.record_gap)

    def _deliver(self, entry: LogEntry) -> None:
        self.delivered.append(entry.position)
        self.history.add(entry)

    def read(self, log: Log, count: int) -> int:
        """Read some entries, or all that there are; return how many."""
        found = [each for each in log.entries if each.identity > self.after][:count]
        for stored in found:
            follows = stored.before == self.after
            self.backplane.on_entry(StreamEntry(stored.identity, stored.data, follows))
            self.after = stored.identity
            self.known = max(self.known, self.after)
        return len(found)


class LogModel(RuleBasedStateMachine):
    """Everything that may happen to a log and to those who read it."""

    @initialize()
    def begin(self) -> None:
        self.log = Log()
        self.readers = [Reader(number, 0) for number in range(3)]
        self.lives = 1
        # All that were ever acknowledged, and after how many reads.
        self.messages: dict[Position, int] = {}
        self.reads = 0
        # Of a message that a server lost when it went back: the entry from which on those who did
        # not read it have to be told, if the next to append knew of it. None: nobody did so far.
        self.known_from: dict[Position, Id | None] = {}
        for reader in self.readers:
            self._append(reader, 0)
        for reader in self.readers:
            self._read(reader, 1000)
        self.floor = self.readers[0].history.floor
        self.is_whole = True

    def _append(self, reader: Reader, count: int, max_bytes: int = 1000) -> None:
        packet = Packet(reader.origin, reader.said, [CHANNEL] * count, b"\1" * count, [b""] * count)
        for part in split_into_parts(pack(packet), reader.origin, reader.said, max_bytes):
            is_witness = self.log.last < reader.known
            identity = self.log.append(part, reader.known)
            for position, known_from in self.known_from.items():
                if known_from is None:
                    knows = is_witness and reader.known >= position[:2]
                    self.known_from[position] = identity if knows else NEVER
            reader.known = max(reader.known, identity)
        reader.said += count
        for nth in range(count):
            self.messages[Position(*reader.known, nth)] = self.reads

    def _read(self, reader: Reader, count: int) -> None:
        self.reads += 1
        if reader.read(self.log, count):
            reader.read_at = self.reads

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
            self.is_whole = False
            del self.log.entries[data.draw(st.integers(0, len(self.log.entries) - 1))]

    @rule(count=st.integers(1, 3))
    def trim(self, count: int) -> None:
        self.is_whole = False
        del self.log.entries[:count]

    @rule(count=st.integers(1, 3), back=st.integers(0, 2))
    def fail_over(self, count: int, back: int) -> None:
        """Go on with a server that lacks the latest entries, and whose clock is behind."""
        self.is_whole = False
        lost = self.log.entries[-count:]
        del self.log.entries[-count:]
        if lost:
            self.log.last = lost[0].before or (0, 0)
        for position in self.messages:
            if position[:2] > self.log.last:
                self.known_from[position] = None
        self.log.clock = max(1, self.log.clock - back)

    @rule(number=REPLICAS)
    def restart(self, number: int) -> None:
        self.readers[number] = Reader(number, self.lives)
        self.lives += 1
        self._read(self.readers[number], 1000)

    def _has_to_have(self, reader: Reader, after: Position, up_to: Position) -> set[Position]:
        """Return the messages between two positions that a replica has to have delivered."""
        return {
            position
            for position, reads in self.messages.items()
            if after < position <= up_to
            # What a server that went back is given later the next entry has to tell.
            and reads < reader.read_at
            and self._can_be_told(position, reader.after)
        }

    def _can_be_told(self, position: Position, read: Id) -> bool:
        return (self.known_from.get(position, read) or NEVER) <= read

    @invariant()
    def no_message_comes_after_a_loss_that_was_not_told(self) -> None:
        for reader in self.readers:
            if reader.delivered:
                floor, last = reader.history.floor, reader.delivered[-1]
                missing = self._has_to_have(reader, floor, last) - set(reader.delivered)
                assert not missing, f"{missing} before {last}, told up to {floor}"

    @invariant()
    def no_gap_is_told_where_nothing_was_lost(self) -> None:
        if self.is_whole:
            assert {reader.history.floor for reader in self.readers} == {self.floor}

    @invariant()
    def positions_grow(self) -> None:
        for reader in self.readers:
            assert reader.delivered == sorted(set(reader.delivered))

    @invariant()
    def who_is_recovered_misses_nothing(self) -> None:
        for reader in self.readers:
            position = reader.backplane.position
            kept = {each.position for each in reader.history.latest_entries(CHANNEL, 10_000)}
            for other in self.readers:
                for since in other.delivered[-3:]:
                    if since <= position and reader.history.is_complete_after(CHANNEL, since):
                        missing = self._has_to_have(reader, since, position) - kept
                        assert not missing, f"{missing} after {since}"


TestLogModel = LogModel.TestCase
TestLogModel.settings = settings(max_examples=100, stateful_step_count=30, deadline=None)
