"""What is kept of identified publishes: bounds, and what is forgotten first."""

from collections.abc import Iterator
from itertools import count

import pytest
from websocket_relay.backplane.interface import (
    IDEMPOTENCY_KEY,
    SESSION,
    SOURCE_BYTES,
    START,
    Identities,
    LogEntry,
    Position,
    Source,
)
from websocket_relay.channels.publications import (
    MAX_RUNS,
    Decision,
    Publications,
    SessionName,
    Verdict,
)

pytestmark = pytest.mark.fast


class Log:
    """A log of one replica whose clock a test sets.

    Attributes:
        now_s: the time.
    """

    def __init__(self, max_records: int = 100_000) -> None:
        self.now_s = 0.0
        self.publications = Publications(300, lambda: self.now_s, max_records)
        self._offsets: Iterator[int] = count(1)

    def append(self, source: bytes, *numbers: int, complete_after: Position = START) -> Position:
        """Append publishes as one packet; return the position of the last one."""
        offset = next(self._offsets)
        entries = [
            LogEntry(Position(1, offset, index), "a", 1, b"") for index in range(len(numbers))
        ]
        self.decisions = self._decide(source, entries, numbers, complete_after)
        return entries[-1].position

    def _decide(
        self,
        source: bytes,
        entries: list[LogEntry],
        numbers: tuple[int, ...],
        complete_after: Position,
    ) -> list[Decision]:
        identities = Identities((Source(source, complete_after),), (1,) * len(numbers), numbers)
        return self.publications.decide(entries, identities)


def session(number: int) -> bytes:
    return bytes((SESSION,)) + number.to_bytes(SOURCE_BYTES - 1, "big")


def key(number: int) -> bytes:
    return bytes((IDEMPOTENCY_KEY,)) + number.to_bytes(SOURCE_BYTES - 1, "big")


def is_known(log: Log, source: bytes) -> bool:
    """Return whether a session is known by its latest publish."""
    return log.publications.is_known(SessionName(START, ""), source, None)


def test_each_of_a_thousand_messages_in_flight_is_found_by_its_number() -> None:
    log = Log()
    positions = {number: log.append(session(1), number) for number in range(1, MAX_RUNS + 1)}
    record = log.publications.session(session(1))
    assert record is not None
    assert {number: record.find(number) for number in positions} == positions
    for number, position in positions.items():
        log.append(session(1), number)
        assert log.decisions == [position]


def test_numbers_that_are_next_to_each_other_in_a_packet_are_one_record() -> None:
    log = Log()
    for first in range(1, 10_001, 100):
        log.append(session(1), *range(first, first + 100))
    assert len(log.publications) == 100
    log.append(session(1), 1, 150, 10_000)
    assert log.decisions == [Position(1, 1, 0), Position(1, 2, 49), Position(1, 100, 99)]


def test_a_number_between_two_publishes_is_neither_new_nor_known() -> None:
    log = Log()
    log.append(session(1), 3, 5)
    log.append(session(1), 1, 2, 4)
    assert log.decisions == [Verdict.UNKNOWN] * 3
    log.append(session(1), 6)
    assert log.decisions == [Verdict.NEW]


def test_above_the_bound_earlier_positions_are_forgotten_before_sessions() -> None:
    """A session that is not known any more can't be resumed."""
    log = Log(max_records=1_000)
    for number in range(1, 51):
        for source in range(100):
            log.append(session(source), number)
            assert len(log.publications) <= 1_000
    assert log.publications.complete_after == START
    for source in range(100):
        assert is_known(log, session(source))
        log.append(session(source), 50)
        assert log.decisions[0] in log_positions(log, source)
        log.append(session(source), 51)
        assert log.decisions == [Verdict.NEW]


def log_positions(log: Log, source: int) -> list[Position]:
    record = log.publications.session(session(source))
    assert record is not None
    return [record.position]


def test_the_positions_of_the_session_that_has_been_idle_longest_are_forgotten_first() -> None:
    log = Log(max_records=100)
    for number in range(1, 41):
        log.append(session(1), number)
    positions = [log.append(session(2), number) for number in range(1, 41)]
    for number in range(30):
        log.append(key(number), 0)
    log.append(session(1), 39, 40)
    assert log.decisions == [Verdict.UNKNOWN, Position(1, 40, 0)]
    log.append(session(2), *range(1, 41))
    assert log.decisions == positions


def test_above_the_bound_with_sessions_alone_the_oldest_is_forgotten() -> None:
    log = Log(max_records=100)
    positions = [log.append(session(source), 1) for source in range(150)]
    assert len(log.publications) == 100
    assert log.publications.complete_after == positions[49]
    assert not is_known(log, session(49))
    assert is_known(log, session(50))


def test_records_are_forgotten_with_their_age_and_what_is_forgotten_leaves_nothing() -> None:
    log = Log()
    for number in range(1, 11):
        log.append(session(1), number)
    log.append(key(1), 0)
    log.now_s = 301
    last = log.append(session(2), 1)
    assert len(log.publications) == 1
    assert last > log.publications.complete_after > START
    log.now_s = 602
    log.append(key(2), 0)
    assert len(log.publications) == 1
    assert not is_known(log, session(2))


def test_a_session_that_its_publishers_replica_does_not_know_starts_again() -> None:
    log = Log()
    position = log.append(session(1), 1, 2, 3)
    log.append(session(1), 3, complete_after=position)
    assert log.decisions == [Verdict.NEW]
    assert len(log.publications) == 1


def test_a_session_holds_the_positions_of_its_own_publishes_only() -> None:
    log = Log()
    own = [*(log.append(session(1), number) for number in (1, 2)), log.append(session(1), 3, 4)]
    other = log.append(session(2), 1)
    own.append(log.append(session(1), 9))
    record = log.publications.session(session(1))
    assert record is not None
    assert all(record.holds(position) for position in own)
    assert record.holds(own[2]._replace(index=0))
    for position in (START, other, own[2]._replace(index=2), Position(2, 1, 0)):
        assert not record.holds(position)
