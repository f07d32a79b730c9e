"""Blocked users: which order counts, until when, and what a replica that starts learns."""

import asyncio

import pytest
from websocket_relay.backplane.interface import Position
from websocket_relay.cluster.blocks import PART_BLOCKS, RELEASED_S, Blocks, BlockStatements

from tests.support.control_logs import SharedLog

pytestmark = pytest.mark.fast


class Clock:
    """Seconds since 1970 that a test sets."""

    def __init__(self) -> None:
        self.now = 1_000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


def at(offset: int) -> Position:
    return Position(1, offset, 0)


def test_a_user_is_blocked_until_the_time_has_come(clock: Clock) -> None:
    blocks = Blocks(clock)
    assert not blocks
    assert not blocks.is_blocked("ada")
    assert blocks.decide("ada", 1_010, at(1))
    assert blocks.is_blocked("ada")
    assert not blocks.is_blocked("eve")
    clock.now = 1_010
    assert not blocks.is_blocked("ada")
    assert list(blocks.current()) == []


def test_the_latest_order_about_a_user_counts_in_whatever_order_they_are_read(
    clock: Clock,
) -> None:
    blocks = Blocks(clock)
    assert blocks.decide("ada", 1_100, at(2))
    assert not blocks.decide("ada", 1_500, at(1)), "a statement of an earlier block"
    assert [block.until for _, block in blocks.current()] == [1_100]
    assert not blocks.decide("ada", 1_000, at(3)), "the order ends the block"
    assert not blocks.is_blocked("ada")
    clock.now += RELEASED_S - 1
    assert blocks.has_capacity("ada", 2_000)
    assert not blocks.decide("ada", 1_100, at(2)), "a late statement of the block that has ended"
    assert not blocks.is_blocked("ada")


def test_of_too_many_blocks_the_one_that_ends_first_is_dropped(clock: Clock) -> None:
    blocks = Blocks(clock, max_blocks=3)
    had_capacity = []
    for number in range(3):
        had_capacity.append(blocks.has_capacity("more", 3_000))
        blocks.decide(str(number), 2_000 + number, at(number))
    had_capacity.append(blocks.has_capacity("more", 3_000))
    assert had_capacity == [True, True, True, False]
    blocks.decide("more", 3_000, at(9))
    assert [user for user, _ in blocks.current()] == ["1", "2", "more"]
    assert blocks.metrics() == {"blocked_users": 3, "blocks_dropped": 1}
    clock.now = 2_002
    assert blocks.has_capacity("another", 3_000), "what has ended takes no place"
    assert len(blocks) == 1


def test_of_too_many_blocks_each_may_be_prolonged_or_ended(clock: Clock) -> None:
    blocks = Blocks(clock, max_blocks=3)
    for number, until in enumerate((1_010, 2_000, 2_001)):
        blocks.decide(str(number), until, at(number))
    assert not blocks.has_capacity("more", 3_000)
    assert blocks.has_capacity("1", 3_000)
    blocks.decide("1", 3_000, at(3))
    assert blocks.has_capacity("not blocked", clock.now)
    blocks.decide("not blocked", clock.now, at(4))
    assert {user: block.until for user, block in blocks.current()} == {
        "0": 1_010,
        "1": 3_000,
        "2": 2_001,
    }
    assert blocks.metrics()["blocks_dropped"] == 0
    assert blocks.has_capacity("2", clock.now)
    blocks.decide("2", clock.now, at(5))
    assert not blocks.is_blocked("2")


class Replica:
    """The blocks of a replica, on a log that it shares with others."""

    def __init__(self, log: SharedLog, clock: Clock) -> None:
        self.blocks = Blocks(clock)
        self.learned: list[str] = []
        self.up = asyncio.Event()
        self.up.set()
        self.statements = BlockStatements(
            self.blocks,
            log.control(),
            is_alone=False,
            up=self.up,
            learned=self.learned.append,
        )


async def test_a_replica_that_starts_asks_and_each_block_is_stated_once(clock: Clock) -> None:
    log = SharedLog()
    old = [Replica(log, clock) for _ in range(3)]
    for replica in old:
        replica.statements.append_due()
        for number in range(PART_BLOCKS + 1):
            replica.blocks.decide(str(number), 2_000, at(number))
    old[0].blocks.decide("only here", 2_000, at(9_000))
    before = len(log.entries)
    new = Replica(log, clock)
    for replica in (new, *old, *old):
        replica.statements.append_due()
    stated = [fields for fields in log.entries[before:] if fields["kind"] == "blocks.state"]
    assert [len(fields["blocks"]) for fields in stated] == [PART_BLOCKS, 2]
    assert len(new.learned) == PART_BLOCKS + 2
    assert new.blocks.is_blocked("only here")
    assert old[1].learned == ["only here"]


async def test_without_blocks_a_question_is_not_answered(clock: Clock) -> None:
    log = SharedLog()
    one, two = Replica(log, clock), Replica(log, clock)
    for replica in (one, two, one, two):
        replica.statements.append_due()
    assert [fields["kind"] for fields in log.entries] == ["blocks.ask", "blocks.ask"]


async def test_after_a_gap_a_replica_asks_again(clock: Clock) -> None:
    log = SharedLog()
    one = Replica(log, clock)
    one.statements.append_due()
    one.statements.append_due()
    assert len(log.entries) == 1
    one.statements.on_gap()
    one.statements.append_due()
    assert len(log.entries) == 2
