"""What the history keeps: compared with a list of all that was said, without a relay."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import pairwise

from hypothesis import given, settings
from hypothesis import strategies as st
from websocket_relay.backplane.interface import START, LogEntry, Position
from websocket_relay.channels.history import (
    CHANNEL_BYTES,
    ENTRY_BYTES,
    EVICTION_DIVISOR,
    EXPIRY_SLICE_MESSAGES,
    History,
)
from websocket_relay.channels.usage_ranking import PRECISION, STARTS, Usage, UsageRanking

AGE_S = 10.0


@dataclass
class Kept:
    """A history, and all that was said to it."""

    max_messages: int = 1_000_000
    max_bytes: int = 1_000_000_000
    max_channels: int = 1_000_000
    now: float = 0.0
    said: dict[str, list[LogEntry]] = field(default_factory=dict)
    times: dict[Position, float] = field(default_factory=dict)
    gap: Position = START
    count: int = 0

    def __post_init__(self) -> None:
        self.history = History(
            max_messages=self.max_messages,
            max_bytes=self.max_bytes,
            max_age_s=AGE_S,
            max_channels=self.max_channels,
            clock=lambda: self.now,
        )

    def say(self, channel: str, payload: bytes = b"", times: int = 1) -> None:
        for _ in range(times):
            self.count += 1
            entry = LogEntry(Position(1, self.count, 0), channel, 1, payload)
            self.said.setdefault(channel, []).append(entry)
            self.times[entry.position] = self.now
            self.history.add(entry)

    def lose(self) -> None:
        self.count += 1
        self.gap = Position(1, self.count, 0)
        self.history.record_gap(self.gap)

    def run_expiry(self, seconds: float) -> None:
        self.evict_expired()
        self.now += seconds
        self.evict_expired()

    def evict_expired(self) -> None:
        for _ in self.history.evict_expired():
            pass

    def of(self, channel: str) -> list[LogEntry]:
        return list(self.history.entries_after(channel, START, self.count))

    def missing(self, channel: str) -> list[LogEntry]:
        """Return what was said and is not kept; check that the rest is the latest."""
        said, kept = self.said[channel], self.of(channel)
        assert kept == said[len(said) - len(kept) :]
        assert kept == list(self.history.latest_entries(channel, self.count))
        return said[: len(said) - len(kept)]

    def first_known(self, channel: str) -> Position:
        """Return the first position behind which all is kept."""
        missing = self.missing(channel)
        return max(self.gap, missing[-1].position if missing else START)

    def sizes(self) -> dict[str, tuple[int, int]]:
        """Return the messages and bytes of each channel of which something is kept."""
        kept = {channel: self.of(channel) for channel in self.said}
        return {
            channel: (len(entries), sum(len(entry.payload) + ENTRY_BYTES for entry in entries))
            for channel, entries in kept.items()
            if entries
        }


# Who loses


def test_the_channel_that_holds_most_messages_loses_and_a_quiet_one_nothing() -> None:
    kept = Kept(max_messages=100)
    kept.say("quiet", times=5)
    kept.say("noisy", times=10_000)
    assert kept.missing("quiet") == []
    assert 95 - 100 // EVICTION_DIVISOR <= len(kept.of("noisy")) <= 95


def test_the_channel_that_holds_most_bytes_loses_though_it_has_few_messages() -> None:
    kept = Kept(max_bytes=100_000)
    kept.say("small", b"x", times=50)
    kept.say("large", b"x" * 10_000, times=100)
    assert kept.missing("small") == []
    assert 0 < len(kept.of("large")) < 10


def test_a_message_that_is_larger_than_the_bound_is_not_kept_and_takes_nothing_with_it() -> None:
    kept = Kept(max_bytes=10_000)
    kept.say("small", b"x")
    kept.say("large", b"x" * 20_000)
    assert kept.missing("small") == []
    assert kept.of("large") == []
    assert kept.history.complete_after("large") == Position(1, 2, 0)


def test_of_channels_that_hold_equally_much_the_longest_untouched_loses() -> None:
    kept = Kept(max_messages=10)
    for number in range(25):
        kept.say(str(number))
    assert [number for number in range(25) if kept.of(str(number))] == list(range(15, 25))


def test_channels_with_one_message_each_leave_every_channel_one() -> None:
    """A bound for all is a share for each: more channels, less for one."""
    kept = Kept(max_messages=60)
    kept.say("busy", times=100)
    for number in range(59):
        kept.say(str(number))
    assert len(kept.of("busy")) == 1
    assert all(kept.of(str(number)) for number in range(59))


# From where on a channel is complete


def test_a_channel_is_complete_behind_its_own_last_loss_whatever_others_lost() -> None:
    kept = Kept(max_messages=10)
    kept.say("quiet", times=2)
    kept.say("noisy", times=50)
    assert kept.history.is_complete_after("quiet", START)
    assert kept.history.complete_after("noisy") == kept.first_known("noisy")


def test_of_a_channel_that_lost_all_messages_it_is_known_where_it_is_complete() -> None:
    kept = Kept()
    kept.say("old", times=3)
    kept.run_expiry(AGE_S)
    kept.say("new")
    assert kept.of("old") == []
    assert not kept.history.is_complete_after("old", Position(1, 2, 0))
    assert kept.history.is_complete_after("old", Position(1, 3, 0))
    assert kept.history.is_complete_after("new", START)


def test_channels_past_the_table_of_those_without_messages_are_never_wrongly_complete() -> None:
    kept = Kept(max_channels=2)
    kept.say("quiet")
    for number in range(5):
        kept.say(str(number))
    kept.run_expiry(AGE_S)
    kept.say("quiet")
    assert kept.history.complete_after("4") == Position(1, 6, 0)
    assert kept.history.complete_after("1") == Position(1, 4, 0), "as the last that is not known"
    assert kept.history.complete_after("never heard of") == Position(1, 4, 0)
    assert not kept.history.is_complete_after("1", Position(1, 3, 0))


def test_a_channel_that_holds_messages_does_not_suffer_from_a_full_table() -> None:
    kept = Kept(max_messages=10, max_channels=2)
    for number in range(50):
        kept.say(str(number))
        if number % 5 == 0:
            kept.say("quiet")
    assert kept.of("quiet")
    assert START < kept.first_known("quiet") == kept.history.complete_after("quiet")
    assert kept.history.complete_after("0") > kept.first_known("0"), "the table is full"


# Whatever happens

NAMES = st.sampled_from("abcdef")
ACTS = st.lists(
    st.one_of(
        st.tuples(st.just("say"), NAMES, st.integers(0, 2_000), st.integers(1, 12)),
        st.tuples(st.just("age"), st.floats(0.5, 6)),
        st.tuples(st.just("lose")),
    ),
    max_size=40,
)


def carry_out(kept: Kept, acts: Iterable[tuple[object, ...]]) -> Iterable[None]:
    """Do one thing after another; messages one by one."""
    for act in acts:
        match act:
            case ("say", str(channel), int(size), int(times)):
                for _ in range(times):
                    kept.say(channel, bytes(size))
                    yield
            case ("age", float(seconds)):
                kept.run_expiry(seconds)
                yield
            case _:
                kept.lose()
                yield


def check_bounds(kept: Kept) -> None:
    sizes = kept.sizes()
    assert len(kept.history) == sum(messages for messages, _ in sizes.values())
    used = sum(size for _, size in sizes.values()) + CHANNEL_BYTES * len(sizes)
    assert kept.history.bytes == used
    assert len(kept.history) <= kept.max_messages
    assert used <= kept.max_bytes


@settings(deadline=None, derandomize=True, database=None)
@given(acts=ACTS, max_messages=st.integers(0, 40), max_bytes=st.integers(1_024, 40_000))
def test_bounds_hold_and_every_channel_is_known_to_be_complete_exactly_where_it_is(
    acts: list[tuple[object, ...]], max_messages: int, max_bytes: int
) -> None:
    kept = Kept(max_messages, max_bytes)
    for _ in carry_out(kept, acts):
        check_bounds(kept)
        for channel in kept.said:
            assert kept.history.complete_after(channel) == kept.first_known(channel)


@settings(deadline=None, derandomize=True, database=None)
@given(acts=ACTS, max_messages=st.integers(0, 40), max_channels=st.integers(0, 3))
def test_with_a_table_that_is_too_small_no_channel_is_known_to_be_complete_where_it_is_not(
    acts: list[tuple[object, ...]], max_messages: int, max_channels: int
) -> None:
    kept = Kept(max_messages, max_channels=max_channels)
    for _ in carry_out(kept, acts):
        for channel in kept.said:
            assert kept.history.complete_after(channel) >= kept.first_known(channel)


@settings(deadline=None, derandomize=True, database=None)
@given(
    said=st.lists(st.tuples(NAMES, st.integers(0, 2_000), st.integers(1, 60)), max_size=25),
    max_messages=st.integers(1, 200),
    max_bytes=st.integers(1_024, 100_000),
)
def test_a_channel_loses_only_while_none_holds_an_eighth_more(
    said: list[tuple[str, int, int]], max_messages: int, max_bytes: int
) -> None:
    kept = Kept(max_messages, max_bytes)
    acts = (("say", *each) for each in said)
    before: dict[str, int] = {}
    for _ in carry_out(kept, acts):
        losers = {name for name in kept.said if len(kept.missing(name)) > before.get(name, 0)}
        sizes = kept.sizes()
        for loser in losers:
            messages, size = sizes.get(loser, (0, 0))
            last = len(kept.missing(loser)[-1].payload) + ENTRY_BYTES
            held = (messages + 1, size + last)  # when it lost its last
            most = [max((each[bound] for each in sizes.values()), default=0) for bound in (0, 1)]
            assert any(held[bound] * (PRECISION + 1) >= most[bound] * PRECISION for bound in (0, 1))
        before = {name: len(kept.missing(name)) for name in kept.said}


@settings(deadline=None, derandomize=True, database=None)
@given(acts=ACTS)
def test_what_is_too_old_is_forgotten_and_nothing_else(acts: list[tuple[object, ...]]) -> None:
    kept = Kept()
    for _ in carry_out(kept, acts):
        kept.evict_expired()
        for channel, entries in kept.said.items():
            young = [entry for entry in entries if kept.times[entry.position] > kept.now - AGE_S]
            assert kept.of(channel) == young


def test_much_that_is_too_old_is_forgotten_a_part_at_a_time_while_more_is_said() -> None:
    kept = Kept()
    kept.say("one", times=1_000)
    for number in range(1_000):
        kept.say(str(number))
    kept.evict_expired()
    kept.now = AGE_S
    left = len(kept.history)
    for _ in kept.history.evict_expired():
        assert left - len(kept.history) <= EXPIRY_SLICE_MESSAGES
        kept.say("one")
        left = len(kept.history)
    assert 0 < len(kept.of("one")) == len(kept.history) < 10
    assert kept.history.complete_after("one") == Position(1, 1_000, 0)
    assert kept.history.complete_after("999") == Position(1, 2_000, 0)


# Memory


def test_channels_that_come_and_go_leave_nothing_but_the_bounded_table() -> None:
    kept = Kept(max_messages=20, max_channels=30)
    for number in range(5_000):
        kept.say(str(number))
        kept.run_expiry(0.01)
    assert sum(len(step.peers) for step in kept.history._steps) + len(kept.history._peers) == 20
    assert len(kept.history._emptied) == 30
    assert len(kept.history._channels) == len(kept.history)


# The ranking


def test_classes_are_an_eighth_of_their_sizes_wide_and_have_no_gaps() -> None:
    assert STARTS[0] == 0
    assert all(0 < other - one <= max(1, one / PRECISION) for one, other in pairwise(STARTS))
    assert STARTS[-1] > 2**50, "more than any memory"


@settings(deadline=None, derandomize=True, database=None)
@given(st.lists(st.tuples(st.integers(0, 7), st.integers(1, 500), st.booleans()), max_size=60))
def test_no_share_is_an_eighth_larger_than_the_one_that_is_found(
    changes: list[tuple[int, int, bool]],
) -> None:
    shares: dict[int, Usage] = {}
    ranking = UsageRanking(lambda: [(share, number) for number, share in shares.items()])
    for number, size, looks in changes:
        if number not in shares:
            share = shares[number] = Usage(size)
            ranking.insert(share, number)
        elif size % 5 == 0:
            ranking.remove(shares.pop(number))
        else:
            share = shares[number]
            share.size = size
            if size >= share.end:
                ranking.reclassify(share)
        if looks and shares:
            found = shares[ranking.largest()].size
            most = max(share.size for share in shares.values())
            assert found * (PRECISION + 1) >= most * PRECISION
