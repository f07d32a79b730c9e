"""The history compared with a list of all published messages, without a relay."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from websocket_relay.backplane.interface import ENTRY_BYTES, START, LogEntry, Position
from websocket_relay.channels.history import (
    CHANNEL_BYTES,
    EVICTION_DIVISOR,
    EXPIRY_SLICE_MESSAGES,
    History,
)
from websocket_relay.channels.usage_ranking import PRECISION, STARTS, Usage, UsageRanking

pytestmark = pytest.mark.fast

AGE_S = 10.0

deterministic = settings(max_examples=80, deadline=None, derandomize=True, database=None)


@dataclass
class RecordedHistory:
    """A history, and all messages that were published to it."""

    max_messages: int = 1_000_000
    max_bytes: int = 1_000_000_000
    max_channels: int = 1_000_000
    now_s: float = 0.0
    published: dict[str, list[LogEntry]] = field(default_factory=dict)
    published_at_s: dict[Position, float] = field(default_factory=dict)
    latest_gap: Position = START
    count: int = 0

    def __post_init__(self) -> None:
        self.history = History(
            max_messages=self.max_messages,
            max_bytes=self.max_bytes,
            max_age_s=AGE_S,
            max_channels=self.max_channels,
            clock=lambda: self.now_s,
        )

    def publish(self, channel: str, payload: bytes = b"", times: int = 1) -> None:
        for _ in range(times):
            self.count += 1
            entry = LogEntry(Position(1, self.count, 0), channel, 1, payload)
            self.published.setdefault(channel, []).append(entry)
            self.published_at_s[entry.position] = self.now_s
            self.history.add(entry)

    def record_gap(self) -> None:
        self.count += 1
        self.latest_gap = Position(1, self.count, 0)
        self.history.record_gap(self.latest_gap)

    def pass_time(self, seconds: float) -> None:
        self.evict_expired()
        self.now_s += seconds
        self.evict_expired()

    def evict_expired(self) -> None:
        for _ in self.history.evict_expired():
            pass

    def kept(self, channel: str) -> list[LogEntry]:
        return list(self.history.entries_after(channel, START, self.count))

    def missing(self, channel: str) -> list[LogEntry]:
        """Return the messages that are not kept; assert that the kept ones are the latest."""
        published, kept = self.published[channel], self.kept(channel)
        assert kept == published[len(published) - len(kept) :]
        assert kept == list(self.history.latest_entries(channel, self.count))
        return published[: len(published) - len(kept)]

    def complete_from(self, channel: str) -> Position:
        """Return the first position after which all messages are kept."""
        missing = self.missing(channel)
        return max(self.latest_gap, missing[-1].position if missing else START)

    def sizes(self) -> dict[str, tuple[int, int]]:
        """Return the messages and bytes of each channel of which messages are kept."""
        kept = {channel: self.kept(channel) for channel in self.published}
        return {
            channel: (len(entries), sum(len(entry.payload) + ENTRY_BYTES for entry in entries))
            for channel, entries in kept.items()
            if entries
        }


# Eviction


def test_messages_of_the_largest_channel_are_evicted_and_none_of_a_quiet_one() -> None:
    recorded = RecordedHistory(max_messages=100)
    recorded.publish("quiet", times=5)
    recorded.publish("noisy", times=10_000)
    assert recorded.missing("quiet") == []
    assert 95 - 100 // EVICTION_DIVISOR <= len(recorded.kept("noisy")) <= 95


def test_the_channel_with_most_bytes_is_evicted_from_although_it_has_few_messages() -> None:
    recorded = RecordedHistory(max_bytes=100_000)
    recorded.publish("small", b"x", times=50)
    recorded.publish("large", b"x" * 10_000, times=100)
    assert recorded.missing("small") == []
    assert 0 < len(recorded.kept("large")) < 10


def test_a_message_over_the_limit_is_not_kept_and_evicts_no_other() -> None:
    recorded = RecordedHistory(max_bytes=10_000)
    recorded.publish("small", b"x")
    recorded.publish("large", b"x" * 20_000)
    assert recorded.missing("small") == []
    assert recorded.kept("large") == []
    assert recorded.history.complete_after("large") == Position(1, 2, 0)


def test_of_equally_large_channels_the_least_recently_used_is_evicted_from() -> None:
    recorded = RecordedHistory(max_messages=10)
    for number in range(25):
        recorded.publish(str(number))
    assert [number for number in range(25) if recorded.kept(str(number))] == list(range(15, 25))


def test_many_channels_with_one_message_leave_one_message_to_each_channel() -> None:
    """The limit is shared: the more channels there are, the less each one keeps."""
    recorded = RecordedHistory(max_messages=60)
    recorded.publish("busy", times=100)
    for number in range(59):
        recorded.publish(str(number))
    assert len(recorded.kept("busy")) == 1
    assert all(recorded.kept(str(number)) for number in range(59))


# Completeness


def test_a_channel_is_complete_after_its_own_last_eviction() -> None:
    recorded = RecordedHistory(max_messages=10)
    recorded.publish("quiet", times=2)
    recorded.publish("noisy", times=50)
    assert recorded.history.is_complete_after("quiet", START)
    assert recorded.history.complete_after("noisy") == recorded.complete_from("noisy")


def test_an_emptied_channel_is_complete_after_its_last_message() -> None:
    recorded = RecordedHistory()
    recorded.publish("old", times=3)
    recorded.pass_time(AGE_S)
    recorded.publish("new")
    assert recorded.kept("old") == []
    assert not recorded.history.is_complete_after("old", Position(1, 2, 0))
    assert recorded.history.is_complete_after("old", Position(1, 3, 0))
    assert recorded.history.is_complete_after("new", START)


def test_emptied_channels_over_the_limit_of_the_table_are_not_complete_too_early() -> None:
    recorded = RecordedHistory(max_channels=2)
    recorded.publish("quiet")
    for number in range(5):
        recorded.publish(str(number))
    recorded.pass_time(AGE_S)
    recorded.publish("quiet")
    assert recorded.history.complete_after("4") == Position(1, 6, 0)
    assert recorded.history.complete_after("1") == Position(1, 4, 0), (
        "as the last one that left the table"
    )
    assert recorded.history.complete_after("unknown") == Position(1, 4, 0)
    assert not recorded.history.is_complete_after("1", Position(1, 3, 0))


def test_a_full_table_does_not_affect_a_channel_with_messages() -> None:
    recorded = RecordedHistory(max_messages=10, max_channels=2)
    for number in range(50):
        recorded.publish(str(number))
        if number % 5 == 0:
            recorded.publish("quiet")
    assert recorded.kept("quiet")
    assert START < recorded.complete_from("quiet") == recorded.history.complete_after("quiet")
    assert recorded.history.complete_after("0") > recorded.complete_from("0"), "the table is full"


# Any sequence of operations

NAMES = st.sampled_from("abcdef")
OPERATIONS = st.lists(
    st.one_of(
        st.tuples(st.just("publish"), NAMES, st.integers(0, 2_000), st.integers(1, 12)),
        st.tuples(st.just("expire"), st.floats(0.5, 6)),
        st.tuples(st.just("gap")),
    ),
    max_size=40,
)


def performed(
    recorded: RecordedHistory, operations: Iterable[tuple[object, ...]]
) -> Iterable[None]:
    """Perform operations, yielding after each; messages are published one by one."""
    for operation in operations:
        match operation:
            case ("publish", str(channel), int(size), int(times)):
                for _ in range(times):
                    recorded.publish(channel, bytes(size))
                    yield
            case ("expire", float(seconds)):
                recorded.pass_time(seconds)
                yield
            case _:
                recorded.record_gap()
                yield


def assert_bounds(recorded: RecordedHistory) -> None:
    sizes = recorded.sizes()
    assert len(recorded.history) == sum(messages for messages, _ in sizes.values())
    used = sum(size for _, size in sizes.values()) + CHANNEL_BYTES * len(sizes)
    assert recorded.history.bytes == used
    assert len(recorded.history) <= recorded.max_messages
    assert used <= recorded.max_bytes


@deterministic
@given(operations=OPERATIONS, max_messages=st.integers(0, 40), max_bytes=st.integers(1_024, 40_000))
def test_limits_are_never_exceeded_and_completeness_is_exact(
    operations: list[tuple[object, ...]], max_messages: int, max_bytes: int
) -> None:
    recorded = RecordedHistory(max_messages, max_bytes)
    for _ in performed(recorded, operations):
        assert_bounds(recorded)
        for channel in recorded.published:
            assert recorded.history.complete_after(channel) == recorded.complete_from(channel)


@deterministic
@given(operations=OPERATIONS, max_messages=st.integers(0, 40), max_channels=st.integers(0, 3))
def test_with_a_small_table_no_channel_is_complete_too_early(
    operations: list[tuple[object, ...]], max_messages: int, max_channels: int
) -> None:
    recorded = RecordedHistory(max_messages, max_channels=max_channels)
    for _ in performed(recorded, operations):
        for channel in recorded.published:
            assert recorded.history.complete_after(channel) >= recorded.complete_from(channel)


@deterministic
@given(
    messages=st.lists(st.tuples(NAMES, st.integers(0, 2_000), st.integers(1, 60)), max_size=25),
    max_messages=st.integers(1, 200),
    max_bytes=st.integers(1_024, 100_000),
)
def test_a_channel_is_evicted_from_only_while_no_other_is_an_eighth_larger(
    messages: list[tuple[str, int, int]], max_messages: int, max_bytes: int
) -> None:
    recorded = RecordedHistory(max_messages, max_bytes)
    operations = (("publish", *each) for each in messages)
    before: dict[str, int] = {}
    for _ in performed(recorded, operations):
        evicted = [
            name for name in recorded.published if len(recorded.missing(name)) > before.get(name, 0)
        ]
        sizes = recorded.sizes()
        largest = [max((each[limit] for each in sizes.values()), default=0) for limit in (0, 1)]
        for name in evicted:
            count, size = sizes.get(name, (0, 0))
            last_size = len(recorded.missing(name)[-1].payload) + ENTRY_BYTES
            before_last = (count + 1, size + last_size)  # before its last eviction
            assert any(
                before_last[limit] * (PRECISION + 1) >= largest[limit] * PRECISION
                for limit in (0, 1)
            )
        before = {name: len(recorded.missing(name)) for name in recorded.published}


@deterministic
@given(operations=OPERATIONS)
def test_expired_messages_are_evicted_and_no_others(operations: list[tuple[object, ...]]) -> None:
    recorded = RecordedHistory()
    for _ in performed(recorded, operations):
        recorded.evict_expired()
        for channel, entries in recorded.published.items():
            young = [
                entry
                for entry in entries
                if recorded.published_at_s[entry.position] > recorded.now_s - AGE_S
            ]
            assert recorded.kept(channel) == young


def test_many_expired_messages_are_evicted_in_slices_while_others_are_published() -> None:
    recorded = RecordedHistory()
    recorded.publish("one", times=1_000)
    for number in range(1_000):
        recorded.publish(str(number))
    recorded.evict_expired()
    recorded.now_s = AGE_S
    left = len(recorded.history)
    for _ in recorded.history.evict_expired():
        assert left - len(recorded.history) <= EXPIRY_SLICE_MESSAGES
        recorded.publish("one")
        left = len(recorded.history)
    assert 0 < len(recorded.kept("one")) == len(recorded.history) < 10
    assert recorded.history.complete_after("one") == Position(1, 1_000, 0)
    assert recorded.history.complete_after("999") == Position(1, 2_000, 0)


# Memory


def test_former_channels_take_no_memory_except_in_the_bounded_table() -> None:
    recorded = RecordedHistory(max_messages=20, max_channels=30)
    for number in range(5_000):
        recorded.publish(str(number))
        recorded.pass_time(0.01)
    assert (
        sum(len(step.peers) for step in recorded.history._steps) + len(recorded.history._peers)
        == 20
    )
    assert len(recorded.history._emptied) == 30
    assert len(recorded.history._channels) == len(recorded.history)


# The ranking


def test_size_classes_are_an_eighth_of_their_size_wide_and_have_no_gaps() -> None:
    assert STARTS[0] == 0
    assert all(0 < other - one <= max(1, one / PRECISION) for one, other in pairwise(STARTS))
    assert STARTS[-1] > 2**50, "larger than any memory"


@deterministic
@given(st.lists(st.tuples(st.integers(0, 7), st.integers(1, 500), st.booleans()), max_size=60))
def test_the_largest_usage_found_is_at_most_an_eighth_too_small(
    changes: list[tuple[int, int, bool]],
) -> None:
    usages: dict[int, Usage] = {}
    ranking = UsageRanking(lambda: [(usage, number) for number, usage in usages.items()])
    for number, size, searches in changes:
        if number not in usages:
            usage = usages[number] = Usage(size)
            ranking.insert(usage, number)
        elif size % 5 == 0:
            ranking.remove(usages.pop(number))
        else:
            usage = usages[number]
            usage.size = size
            if size >= usage.end:
                ranking.reclassify(usage)
        if searches and usages:
            found = usages[ranking.largest()].size
            largest = max(usage.size for usage in usages.values())
            assert found * (PRECISION + 1) >= largest * PRECISION
