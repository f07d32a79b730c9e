"""Those who wait until messages of a replica come back from the log."""

import pytest
from websocket_relay.backplane.confirmations import Confirmations
from websocket_relay.backplane.interface import Position
from websocket_relay.backplane.replicated import PRODUCER_EPOCHS

pytestmark = pytest.mark.fast

LIFE = 7 * PRODUCER_EPOCHS
NEXT_LIFE = LIFE + 1

Told = dict[str, Position | None]


def waiting_for(told: Told, *waiters: tuple[str, int, int]) -> Confirmations:
    """Let those of these names wait for the message before a number, each in a life."""
    awaiting = Confirmations()
    for name, origin, following in waiters:

        def answer(position: Position | None, name: str = name) -> None:
            told[name] = position

        awaiting.add(origin, following, answer)
    return awaiting


def test_each_is_told_the_position_of_its_own_message() -> None:
    told: Told = {}
    awaiting = waiting_for(told, ("a", LIFE, 4), ("b", LIFE, 5), ("c", LIFE, 6))
    awaiting.on_packet(LIFE, 3, Position(9, 2, 1))
    assert told == {"a": Position(9, 2, 0), "b": Position(9, 2, 1)}
    awaiting.on_packet(LIFE, 5, Position(9, 7, 0))
    assert told["c"] == Position(9, 7, 0)
    assert not awaiting


def test_a_message_that_was_left_out_of_the_log_has_no_position() -> None:
    told: Told = {}
    awaiting = waiting_for(told, ("lost", LIFE, 4), ("read", LIFE, 5))
    awaiting.on_packet(LIFE, 4, Position(9, 2, 0))
    assert told == {"lost": None, "read": Position(9, 2, 0)}


def test_a_packet_without_messages_tells_only_that_those_before_it_are_lost() -> None:
    told: Told = {}
    awaiting = waiting_for(told, ("lost", LIFE, 4), ("waits", LIFE, 5))
    awaiting.on_packet(LIFE, 4, Position(9, 2, -1))
    assert told == {"lost": None}


def test_nothing_of_a_life_comes_after_a_later_one() -> None:
    told: Told = {}
    awaiting = waiting_for(told, ("early", LIFE, 4), ("late", NEXT_LIFE, 1), ("on", NEXT_LIFE, 2))
    awaiting.on_packet(NEXT_LIFE, 0, Position(9, 2, 0))
    assert told == {"early": None, "late": Position(9, 2, 0)}


def test_a_packet_of_an_earlier_life_is_not_what_the_later_one_waits_for() -> None:
    told: Told = {}
    awaiting = waiting_for(told, ("late", NEXT_LIFE, 1))
    awaiting.on_packet(LIFE, 0, Position(9, 2, 5))
    assert told == {}


def test_who_waits_for_what_is_given_up_is_let_go_and_nobody_else() -> None:
    told: Told = {}
    awaiting = waiting_for(told, ("kept", LIFE, 4), ("a", LIFE, 5), ("b", LIFE, 6))
    assert [waiter.next_sequence for waiter in awaiting.pop_abandoned(LIFE, 4)] == [5, 6]
    assert (told, len(awaiting)) == ({}, 1)


def test_who_waits_for_an_earlier_life_too_long_is_told() -> None:
    told: Told = {}
    awaiting = waiting_for(told, ("early", LIFE, 4), ("late", NEXT_LIFE, 1))
    awaiting.expire(NEXT_LIFE)
    assert (told, len(awaiting)) == ({"early": None}, 1)
