"""The life of a connection: its table of states and events, all of it."""

from collections.abc import Iterator
from itertools import product

import pytest
from websocket_relay.wire.close_states import (
    TRANSITIONS,
    CloseAction,
    ConnectionEvent,
    ConnectionState,
)

pytestmark = pytest.mark.fast

ENDED = (ConnectionState.LOST, ConnectionState.CLOSED)
BEFORE_THE_END = [state for state in ConnectionState if state not in ENDED]
AFTER_CLOSE = (ConnectionState.CLOSING, ConnectionState.DISCARDING, *ENDED)


def paths(start: ConnectionState, *, avoid: CloseAction | None = None) -> set[ConnectionState]:
    """Return all states that can be reached, by transitions without an action."""
    reached, pending = {start}, [start]
    while pending:
        state = pending.pop()
        for event in ConnectionEvent:
            following, actions = TRANSITIONS[state, event]
            if following not in reached and avoid not in actions:
                reached.add(following)
                pending.append(following)
    return reached


def transitions_with(action: CloseAction) -> Iterator[tuple[ConnectionState, ConnectionState]]:
    for (state, _), (following, actions) in TRANSITIONS.items():
        if action in actions:
            yield state, following


def test_every_state_has_a_transition_for_every_event() -> None:
    assert TRANSITIONS.keys() == set(product(ConnectionState, ConnectionEvent))


def test_every_state_can_be_reached() -> None:
    assert paths(ConnectionState.HANDSHAKE) == set(ConnectionState)


@pytest.mark.parametrize("state", ConnectionState)
def test_a_connection_ends_with_its_tcp_connection_in_every_state(state: ConnectionState) -> None:
    following, _ = TRANSITIONS[state, ConnectionEvent.DISCONNECT]
    assert following in ENDED
    assert TRANSITIONS[following, ConnectionEvent.PARSED][0] is ConnectionState.CLOSED


@pytest.mark.parametrize("state", BEFORE_THE_END)
def test_a_deadline_aborts_or_is_followed_by_another_one(state: ConnectionState) -> None:
    following, actions = TRANSITIONS[state, ConnectionEvent.DEADLINE]
    if CloseAction.ABORT not in actions:
        assert CloseAction.START_DEADLINE in actions
        assert CloseAction.ABORT in TRANSITIONS[following, ConnectionEvent.DEADLINE][1]


@pytest.mark.parametrize("state", BEFORE_THE_END)
def test_an_abort_aborts_in_every_state_before_the_end(state: ConnectionState) -> None:
    assert CloseAction.ABORT in TRANSITIONS[state, ConnectionEvent.ABORT][1]


def test_a_close_frame_is_sent_once_and_nothing_opens_the_connection_again() -> None:
    for _, following in transitions_with(CloseAction.SEND_CLOSE):
        assert following in AFTER_CLOSE
        for state in paths(following):
            assert state in AFTER_CLOSE
            for event in ConnectionEvent:
                assert CloseAction.SEND_CLOSE not in TRANSITIONS[state, event][1]


def test_a_connection_that_was_open_leaves_its_channel_before_it_is_released() -> None:
    assert paths(ConnectionState.OPEN, avoid=CloseAction.LEAVE) <= {
        ConnectionState.OPEN,
        ConnectionState.CLOSE_PENDING,
        ConnectionState.DISCARDING,  # after EOF, at which it has left
        *ENDED,
    }
    left = {event for event in ConnectionEvent if leaves(ConnectionState.OPEN, event)}
    assert left == {
        ConnectionEvent.CLOSE,
        ConnectionEvent.EOF,
        ConnectionEvent.DEADLINE,
        ConnectionEvent.ABORT,
        ConnectionEvent.DISCONNECT,
    }
    assert all(
        leaves(ConnectionState.CLOSE_PENDING, event)
        for event in ConnectionEvent
        if TRANSITIONS[ConnectionState.CLOSE_PENDING, event][0] is not ConnectionState.CLOSE_PENDING
    )


def leaves(state: ConnectionState, event: ConnectionEvent) -> bool:
    return CloseAction.LEAVE in TRANSITIONS[state, event][1]


def test_a_connection_is_released_once_when_its_tcp_connection_has_ended() -> None:
    released = set(transitions_with(CloseAction.RELEASE))
    assert released == {(ConnectionState.LOST, ConnectionState.CLOSED)}
    for event in ConnectionEvent:
        assert TRANSITIONS[ConnectionState.CLOSED, event] == (ConnectionState.CLOSED, ())


def test_our_side_ends_only_under_a_deadline() -> None:
    """A state in which our side has ended is entered with a deadline, or has one already."""
    for state, _ in transitions_with(CloseAction.END_SENDING):
        for event in ConnectionEvent:
            _, actions = TRANSITIONS[state, event]
            if CloseAction.END_SENDING in actions and CloseAction.START_DEADLINE not in actions:
                assert event in {ConnectionEvent.PARSED, ConnectionEvent.FLUSHED}, (state, event)
