"""Confirmations: waits that end when a replica's own messages are read back from the log."""

import pytest
from websocket_relay.backplane.codec import PRODUCER_EPOCHS
from websocket_relay.backplane.confirmations import Confirmations
from websocket_relay.backplane.interface import Position

pytestmark = pytest.mark.fast

PRODUCER = 7 * PRODUCER_EPOCHS
NEXT_EPOCH = PRODUCER + 1

Results = dict[str, Position | None]


def confirmations_of(results: Results, *waits: tuple[str, int, int]) -> Confirmations:
    """Wait for some messages.

    Args:
        results: receives the result of each wait, by its name.
        waits: a name, a producer with its epoch, and the sequence number after the message.
    """
    confirmations = Confirmations()
    for name, producer, following in waits:

        def record_result(position: Position | None, name: str = name) -> None:
            results[name] = position

        confirmations.add(producer, following, record_result)
    return confirmations


def test_each_wait_ends_with_the_position_of_its_own_message() -> None:
    results: Results = {}
    waits = ("a", PRODUCER, 4), ("b", PRODUCER, 5), ("c", PRODUCER, 6)
    confirmations = confirmations_of(results, *waits)
    confirmations.on_delivered(PRODUCER, 3, 2, Position(9, 2, 1))
    assert results == {"a": Position(9, 2, 0), "b": Position(9, 2, 1)}
    confirmations.on_delivered(PRODUCER, 5, 1, Position(9, 7, 0))
    assert results["c"] == Position(9, 7, 0)
    assert not confirmations


def test_a_message_missing_from_the_log_has_no_position() -> None:
    results: Results = {}
    confirmations = confirmations_of(results, ("lost", PRODUCER, 4), ("read", PRODUCER, 5))
    confirmations.on_delivered(PRODUCER, 4, 1, Position(9, 2, 0))
    assert results == {"lost": None, "read": Position(9, 2, 0)}


def test_a_packet_without_messages_ends_only_the_waits_before_it() -> None:
    results: Results = {}
    confirmations = confirmations_of(results, ("lost", PRODUCER, 4), ("pending", PRODUCER, 5))
    confirmations.on_delivered(PRODUCER, 4, 0, Position(9, 2, -1))
    assert results == {"lost": None}


def test_a_packet_of_a_later_epoch_ends_the_waits_of_earlier_epochs() -> None:
    results: Results = {}
    waits = ("early", PRODUCER, 4), ("late", NEXT_EPOCH, 1), ("later", NEXT_EPOCH, 2)
    confirmations = confirmations_of(results, *waits)
    confirmations.on_delivered(NEXT_EPOCH, 0, 1, Position(9, 2, 0))
    assert results == {"early": None, "late": Position(9, 2, 0)}


def test_a_packet_of_an_earlier_epoch_ends_no_wait_of_a_later_one() -> None:
    results: Results = {}
    confirmations = confirmations_of(results, ("late", NEXT_EPOCH, 1))
    confirmations.on_delivered(PRODUCER, 0, 6, Position(9, 2, 5))
    assert results == {}


def test_abandoned_waits_are_removed_without_a_result_and_the_others_stay() -> None:
    results: Results = {}
    waits = ("kept", PRODUCER, 4), ("a", PRODUCER, 5), ("b", PRODUCER, 6)
    confirmations = confirmations_of(results, *waits)
    abandoned = confirmations.pop_abandoned(PRODUCER, 4)
    assert [wait.next_sequence for wait in abandoned] == [5, 6]
    assert (results, len(confirmations)) == ({}, 1)


def test_waits_of_earlier_epochs_expire_without_a_position() -> None:
    results: Results = {}
    confirmations = confirmations_of(results, ("early", PRODUCER, 4), ("late", NEXT_EPOCH, 1))
    confirmations.expire(NEXT_EPOCH)
    assert (results, len(confirmations)) == ({"early": None}, 1)
