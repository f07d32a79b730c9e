"""The table of identified publishes, entry by entry: what is a repeat, and what is kept."""

from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from websocket_relay.backplane.interface import (
    ORIGIN,
    SOURCE_BYTES,
    START,
    UPPER_BOUND,
    Identities,
    Identity,
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
    content_digest,
    key_source,
    new_origin,
)
from websocket_relay.messages import BINARY, TEXT

pytestmark = pytest.mark.fast

AGE_S = 300.0
USER = "alice"
OPENED_AT = Position(1, 0, 0)

POSITIONS = st.builds(
    Position,
    st.integers(0, 10**20 - 1),
    st.integers(0, 10**20 - 1),
    st.integers(0, UPPER_BOUND),
)

NEW, UNKNOWN = Verdict.NEW, Verdict.UNKNOWN

deterministic = settings(max_examples=80, deadline=None, derandomize=True, database=None)


def session_source(user: str = USER) -> bytes:
    return SessionName.create(OPENED_AT, user).source_of(user)


def at(offset: int, index: int = 0) -> Position:
    return Position(1, offset, index)


class PacketReader:
    """A table, and the packets that it reads one after the other, at offsets from 1 on."""

    def __init__(self, max_records: int = 2_000) -> None:
        self.now_s = 0.0
        self.offset = 0
        self.table = Publications(AGE_S, lambda: self.now_s, max_records)

    def read(
        self,
        source: bytes,
        numbers: Sequence[int],
        complete_after: Position = START,
        payloads: Sequence[bytes] = (),
    ) -> list[Decision]:
        """Read a packet with one append."""
        identities = Identity(Source(source, complete_after), numbers).of_each()
        return self.read_packet(identities, payloads or [b""] * len(numbers))

    def read_packet(self, identities: Identities, payloads: Sequence[bytes]) -> list[Decision]:
        self.offset += 1
        entries = [
            LogEntry(at(self.offset, index), "news", TEXT, payload)
            for index, payload in enumerate(payloads)
        ]
        return self.table.decide(entries, identities)

    def publish(self, source: bytes, number: int, complete_after: Position = START) -> Decision:
        return self.read(source, [number], complete_after)[0]


def find(reader: PacketReader, source: bytes, number: int) -> Decision:
    record = reader.table.session(source)
    assert record is not None
    return record.find(number)


# Sessions in the log


def test_a_publish_with_a_greater_number_is_new() -> None:
    reader, source = PacketReader(), session_source()
    assert [reader.publish(source, number) for number in (1, 2, 7)] == [NEW] * 3


def test_a_repeat_has_the_position_of_the_first() -> None:
    reader, source = PacketReader(), session_source()
    reader.publish(source, 5)
    assert reader.publish(source, 5) == at(1)
    assert reader.publish(source, 6) is NEW


def test_a_repeat_does_not_change_what_is_known_of_the_session() -> None:
    reader, source = PacketReader(), session_source()
    for number in (1, 2, 1, 2):
        reader.publish(source, number)
    record = reader.table.session(source)
    assert record is not None
    assert (record.last, record.position) == (2, at(2))


def test_sessions_are_independent_of_each_other() -> None:
    reader = PacketReader()
    one, other = session_source(), session_source()
    assert reader.publish(one, 1) is NEW
    assert reader.publish(other, 1) is NEW
    assert reader.publish(one, 1) == at(1)
    assert reader.publish(other, 1) == at(2)


def test_a_number_that_was_skipped_is_neither_new_nor_known() -> None:
    """Its message may have been refused: whether it was published is not known."""
    reader, source = PacketReader(), session_source()
    reader.read(source, [3, 5])
    assert reader.read(source, [1, 2, 4]) == [UNKNOWN] * 3
    assert reader.publish(source, 6) is NEW


def test_what_the_publisher_did_not_know_does_not_count() -> None:
    reader, source = PacketReader(), session_source()
    reader.publish(source, 5)
    assert reader.publish(source, 5, complete_after=at(1)) is NEW
    assert len(reader.table) == 1
    assert reader.publish(source, 5, complete_after=at(1)) == at(2)


def test_the_publisher_that_knew_all_after_the_position_before_knew_the_publish() -> None:
    reader, source = PacketReader(), session_source()
    reader.publish(source, 5)
    assert reader.publish(source, 5, complete_after=at(1).before()) == at(1)


def test_connections_of_one_session_have_known_different_publishes() -> None:
    reader, key = PacketReader(), session_source()
    reader.read(key, [1, 2])
    sources = [Source(key, START), Source(key, at(1, 1))]
    assert reader.read_packet(Identities(sources, [1, 2], [2, 2]), [b""] * 2) == [at(1, 1), NEW]


def test_numbers_may_go_back_where_the_publisher_had_forgotten_the_session() -> None:
    reader, source = PacketReader(), session_source()
    reader.read(source, [4, 5, 6])
    reader.publish(source, 2, complete_after=at(1, 2))
    record = reader.table.session(source)
    assert record is not None
    assert (record.last, record.find(2)) == (2, at(2))


# Positions of earlier publishes


def test_publishes_next_to_each_other_take_one_record() -> None:
    reader, source = PacketReader(), session_source()
    reader.read(source, range(10, 110))
    assert len(reader.table) == 1
    assert [find(reader, source, number) for number in (9, 10, 59, 109)] == [
        UNKNOWN,
        at(1),
        at(1, 49),
        at(1, 99),
    ]


def test_publishes_in_several_packets_take_a_record_each() -> None:
    reader, source = PacketReader(), session_source()
    for numbers in ([1, 2], [3], [4, 5, 6]):
        reader.read(source, numbers)
    assert len(reader.table) == 3
    assert [find(reader, source, number) for number in range(1, 7)] == [
        at(1),
        at(1, 1),
        at(2),
        at(3),
        at(3, 1),
        at(3, 2),
    ]


def test_publishes_with_others_between_them_have_their_own_positions() -> None:
    reader, one, other = PacketReader(), session_source(), session_source()
    identities = Identities(
        [Source(one, START), Source(other, START)], [1, 2, 1, 0, 1], [1, 1, 2, 0, 3]
    )
    reader.read_packet(identities, [b""] * 5)
    assert [find(reader, one, number) for number in (1, 2, 3)] == [
        at(1),
        at(1, 2),
        at(1, 4),
    ]


def test_a_session_holds_the_positions_of_its_own_publishes_only() -> None:
    reader, source = PacketReader(), session_source()
    for numbers in ([1], [2], [3, 4]):
        reader.read(source, numbers)
    reader.publish(session_source(), 1)
    reader.publish(source, 9)
    record = reader.table.session(source)
    assert record is not None
    assert all(map(record.holds, (at(1), at(2), at(3), at(3, 1), at(5))))
    assert not any(map(record.holds, (START, at(3, 2), at(4), at(6), Position(2, 1, 0))))


def test_the_positions_of_the_latest_thousand_publishes_of_a_session_are_kept() -> None:
    reader, source = PacketReader(), session_source()
    for number in range(1, MAX_RUNS + 3):
        reader.publish(source, number)
    assert len(reader.table) == MAX_RUNS
    assert reader.publish(source, 2) is UNKNOWN
    kept = range(3, MAX_RUNS + 3)
    assert [reader.publish(source, number) for number in kept] == list(map(at, kept))


@deterministic
@given(st.lists(st.lists(st.integers(1, 3), min_size=1, max_size=5), max_size=20), st.data())
def test_any_publish_of_a_session_has_its_position(
    packets: list[list[int]], data: st.DataObject
) -> None:
    """A packet is given by the steps from each number to the next."""
    reader, source, last = PacketReader(), session_source(), 0
    positions: dict[int, Position] = {}
    for steps in packets:
        numbers = []
        for step in steps:
            last += step
            numbers.append(last)
        reader.read(source, numbers)
        for index, number in enumerate(numbers):
            positions[number] = at(reader.offset, index)
    if last:
        number = data.draw(st.integers(0, last))
        assert find(reader, source, number) == positions.get(number, UNKNOWN)


# Bounds


def test_above_the_bound_earlier_positions_are_forgotten_before_sessions() -> None:
    """A session that is not known any more can't be resumed."""
    reader, sources = PacketReader(max_records=1_000), [session_source() for _ in range(100)]
    latest = {}
    for number in range(1, 51):
        for source in sources:
            reader.publish(source, number)
            latest[source] = at(reader.offset)
            assert len(reader.table) <= 1_000
    assert reader.table.complete_after == START
    for source in sources:
        assert reader.publish(source, 50) == latest[source]
        assert reader.publish(source, 51) is NEW


def test_the_positions_of_the_session_that_has_been_idle_longest_are_forgotten_first() -> None:
    reader, idle, active = PacketReader(max_records=100), session_source(), session_source()
    for source in (idle, active):
        for number in range(1, 41):
            reader.publish(source, number)
    for number in range(30):
        reader.publish(key_source(str(number), "news", USER), 0)
    assert reader.read(idle, [39, 40]) == [UNKNOWN, at(40)]
    assert reader.read(active, range(1, 41)) == [at(offset) for offset in range(41, 81)]


def test_of_a_session_with_more_positions_than_the_bound_the_latest_is_kept() -> None:
    reader, source = PacketReader(max_records=2), session_source()
    for number in (1, 2, 3):
        reader.publish(source, number)
    assert reader.read(source, [2, 3]) == [UNKNOWN, at(3)]
    assert (len(reader.table), reader.table.complete_after) == (1, START)


def test_above_the_bound_with_sessions_alone_the_oldest_is_forgotten() -> None:
    reader = PacketReader(max_records=100)
    names = [SessionName.create(START, USER) for _ in range(150)]
    for name in names:
        reader.publish(name.source_of(USER), 1)
    assert len(reader.table) == 100
    assert reader.table.complete_after == at(50)
    known = [reader.table.is_known(name, name.source_of(USER), None) for name in names]
    assert known == [False] * 50 + [True] * 100


def test_the_records_of_the_latest_publishes_are_kept() -> None:
    reader = PacketReader(max_records=2)
    session, key = session_source(), key_source("k", "news", USER)
    reader.publish(session, 1)
    reader.publish(key, 0)
    # New again: their publishers had forgotten the first ones.
    reader.publish(session, 1, complete_after=at(1))
    reader.publish(key_source("other", "news", USER), 0)
    assert reader.table.key(key) is None
    assert reader.publish(session, 1) == at(3)
    assert reader.table.complete_after == at(2)


def test_a_publish_renews_the_records_of_its_session() -> None:
    reader, one, other = PacketReader(), session_source(), session_source()
    reader.publish(one, 1)
    reader.publish(other, 1)
    reader.now_s = AGE_S
    reader.publish(one, 2)
    assert reader.table.session(other) is not None
    reader.now_s = AGE_S + 1
    reader.publish(key_source("k", "news", USER), 0)
    assert reader.table.session(other) is None
    assert reader.publish(one, 1) == at(1)
    assert reader.table.complete_after == at(2)


def test_records_are_forgotten_with_their_age_and_what_is_forgotten_leaves_nothing() -> None:
    reader, source = PacketReader(), session_source()
    for number in range(1, 11):
        reader.publish(source, number)
    reader.publish(key_source("k", "news", USER), 0)
    reader.now_s = AGE_S + 1
    reader.publish(session_source(), 1)
    assert len(reader.table) == 1
    assert reader.table.complete_after == at(11)


def test_a_gap_does_not_make_earlier_publishes_known_again() -> None:
    table = PacketReader().table
    table.record_gap(at(5))
    table.record_gap(at(3))
    assert table.complete_after == at(5)


# Whether a session can be resumed


def test_a_session_is_known_by_its_start_by_what_its_client_saw_or_by_its_last_publish() -> None:
    reader = PacketReader()
    name = SessionName.create(OPENED_AT, USER)
    source = name.source_of(USER)
    assert reader.table.is_known(name, source, None)
    reader.table.record_gap(OPENED_AT)
    assert reader.table.is_known(name, source, None)
    reader.table.record_gap(at(0, 5))
    assert not reader.table.is_known(name, source, None)
    assert not reader.table.is_known(name, source, at(0, 4))
    assert reader.table.is_known(name, source, at(0, 5))
    reader.publish(source, 1)
    assert reader.table.is_known(name, source, None)
    reader.table.record_gap(at(1))
    assert reader.table.is_known(name, source, None)
    reader.table.record_gap(at(2))
    assert not reader.table.is_known(name, source, None)
    assert reader.table.is_known(name, source, at(2))


# Names of sessions


@deterministic
@given(POSITIONS, st.text(max_size=50))
def test_a_session_has_the_same_name_and_source_on_every_replica(
    opened_at: Position, user: str
) -> None:
    name = SessionName.create(opened_at, user)
    parsed = SessionName.parse(name.text, user)
    assert parsed == name
    assert parsed.opened_at == opened_at
    assert parsed.source_of(user) == name.source_of(user)
    assert len(name.source_of(user)) == SOURCE_BYTES
    assert SessionName.create(opened_at, user) != name


def test_a_session_is_of_one_user() -> None:
    name = SessionName.create(OPENED_AT, USER)
    assert SessionName.parse(name.text, "bob") is None
    assert name.source_of("bob") != name.source_of(USER)


@deterministic
@given(st.text(max_size=80) | st.text("0123456789-._aZ\n", max_size=80))
def test_any_other_text_is_no_session(text: str) -> None:
    with pytest.raises(ValueError, match="not a session"):
        SessionName.parse(text, USER)


@deterministic
@given(st.data())
def test_a_changed_name_is_another_session_or_none(data: st.DataObject) -> None:
    name = SessionName.create(OPENED_AT, USER)
    at_character = data.draw(st.integers(0, len(name.text) - 1))
    character = data.draw(st.characters())
    text = name.text[:at_character] + character + name.text[at_character + 1 :]
    try:
        parsed = SessionName.parse(text, USER)
    except ValueError:
        return
    if parsed is not None and text != name.text:
        assert parsed.source_of(USER) != name.source_of(USER)


@pytest.mark.parametrize("suffix", ["\n", " ", "a", "\x00"])
def test_a_name_with_trailing_characters_is_no_session(suffix: str) -> None:
    with pytest.raises(ValueError, match="not a session"):
        SessionName.parse(SessionName.create(OPENED_AT, USER).text + suffix, USER)


# Requests with an Idempotency-Key


def test_a_repeated_request_has_the_position_of_the_last_message_of_the_first() -> None:
    reader, source = PacketReader(), key_source("k", "news", USER)
    assert reader.read(source, [0, 0, 0]) == [NEW] * 3
    assert reader.read(source, [0, 0, 0]) == [at(1, 2)] * 3
    record = reader.table.key(source)
    assert record is not None
    assert record.position == at(1, 2)
    assert len(reader.table) == 1


def test_one_key_twice_in_a_packet_is_relayed_once() -> None:
    reader, source = PacketReader(), Source(key_source("k", "news", USER), START)
    identities = Identities([source, source], [1, 1, 2, 2], [0] * 4)
    decisions = reader.read_packet(identities, [b"1", b"2", b"1", b"2"])
    assert decisions == [NEW] * 2 + [at(1, 1)] * 2


def test_a_request_whose_first_the_publisher_did_not_know_is_relayed() -> None:
    reader, source = PacketReader(), key_source("k", "news", USER)
    reader.publish(source, 0)
    assert reader.publish(source, 0, complete_after=at(1).before()) == at(1)
    assert reader.publish(source, 0, complete_after=at(1)) is NEW
    assert reader.publish(source, 0, complete_after=at(1)) == at(3)


def test_other_content_under_one_key_has_another_digest() -> None:
    reader, source = PacketReader(), key_source("k", "news", USER)
    reader.read(source, [0, 0], payloads=[b"a", b"b"])
    reader.read(source, [0], payloads=[b"other"])
    record = reader.table.key(source)
    assert record is not None
    assert record.digest == content_digest([(TEXT, b"a"), (TEXT, b"b")])


def test_a_digest_depends_on_kinds_payloads_and_where_each_ends() -> None:
    contents = [
        [(TEXT, b"ab")],
        [(BINARY, b"ab")],
        [(TEXT, b"ac")],
        [(TEXT, b"a"), (TEXT, b"b")],
        [(TEXT, b""), (TEXT, b"ab")],
        [(TEXT, b"ab"), (TEXT, b"")],
        [(TEXT, b"1:1:ab")],
        [],
    ]
    assert len(set(map(content_digest, contents))) == len(contents)


def test_a_key_is_of_one_user_and_channel() -> None:
    parts = [("k", "news", "a"), ("k", "news", "b"), ("k", "new", "sa"), ("kn", "ews", "a")]
    assert len({key_source(*each) for each in parts}) == len(parts)


# Other entries


def test_entries_without_an_identity_are_new_and_take_no_record() -> None:
    reader = PacketReader()
    identities = Identities([Source(new_origin(), START)], [0, 1, 1, 0], [0, 0, 0, 0])
    assert reader.read_packet(identities, [b""] * 4) == [NEW] * 4
    assert len(reader.table) == 0


def test_sources_of_different_kinds_differ() -> None:
    sources = [session_source(), key_source("k", "news", USER), new_origin()]
    assert len({each[0] for each in sources}) == 3
    assert {len(each) for each in sources} == {SOURCE_BYTES}
    assert sources[2][0] == ORIGIN
    assert new_origin() != sources[2]


def test_a_session_is_not_found_as_a_key_and_the_other_way_round() -> None:
    reader, session, key = PacketReader(), session_source(), key_source("k", "news", USER)
    reader.publish(session, 1)
    reader.publish(key, 0)
    assert reader.table.key(session) is None
    assert reader.table.session(key) is None
