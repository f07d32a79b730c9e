"""Define the life of a connection: one table of states, events and actions, for every protocol.

Knows no connection and no protocol. The table is drawn in docs/explanation/architecture.md.
"""

from collections.abc import Mapping
from enum import Enum


class ConnectionState(Enum):
    """The states of a connection; the value describes one."""

    HANDSHAKE = "neither accepted nor refused"
    OPEN = "messages are delivered, and published"
    CLOSE_PENDING = "parsing has stopped; our close frame follows the pending deliveries"
    CLOSING = "our close frame is sent, the client's is awaited; its messages are still published"
    DISCARDING = "nothing more is sent but the backlog, input is discarded; TCP's end is awaited"
    LOST = "TCP has ended; what the client sent before is still parsed"
    CLOSED = "counted as closed"


class ConnectionEvent(Enum):
    """What happens to a connection; the value describes it."""

    ACCEPT = "the head of the response is sent"
    REFUSE = "an HTTP response refuses the handshake"
    CLOSE = "the relay closes the connection now"
    QUEUE_CLOSE = (
        "the client's close frame, a violation, an expired token or a failed publish:"
        " close after the pending deliveries"
    )
    DELIVERED = "the pending deliveries are written"
    FLUSHED = "the backlog is empty"
    EOF = "the client has ended its side of TCP"
    PARSED = "after EOF or DISCONNECT: all that the client sent is parsed"
    DEADLINE = "the deadline has passed"
    ABORT = "the relay ends the TCP connection"
    DISCONNECT = "the TCP connection has ended"


class CloseAction(Enum):
    """What a connection does in a transition; the value describes it."""

    LEAVE = "leave the channel: no more deliveries"
    STOP_PARSING = "parse nothing more"
    SEND_CLOSE = "write the close frame"
    AWAIT_DELIVERIES = "DELIVERED follows once everything published so far is written"
    START_DEADLINE = "DEADLINE follows if TCP does not end in time"
    END_SENDING = "once the backlog is empty, end our side of TCP"
    ABORT = "drop the backlog, abort TCP"
    RELEASE = "count the connection as closed, release its parts"


Transition = tuple[ConnectionState, tuple[CloseAction, ...]]
"""The next state, and what is done once the connection is in it, in this order."""


def _rows() -> Mapping[ConnectionState, Mapping[ConnectionEvent, Transition]]:
    state, event, do = ConnectionState, ConnectionEvent, CloseAction
    disconnect = {event.DISCONNECT: (state.LOST, ())}
    lost_member = {event.DISCONNECT: (state.LOST, (do.LEAVE,))}
    aborted = (state.DISCARDING, (do.ABORT,))
    aborted_member = (state.DISCARDING, (do.LEAVE, do.ABORT))
    last_frame = (
        state.DISCARDING,
        (do.LEAVE, do.SEND_CLOSE, do.START_DEADLINE, do.END_SENDING),
    )
    released = (state.CLOSED, (do.STOP_PARSING, do.RELEASE))
    return {
        state.HANDSHAKE: {
            event.ACCEPT: (state.OPEN, ()),
            event.REFUSE: (state.DISCARDING, (do.START_DEADLINE, do.END_SENDING)),
            event.PARSED: (state.DISCARDING, (do.END_SENDING,)),
            event.DEADLINE: aborted,
            event.ABORT: aborted,
            **disconnect,
        },
        state.OPEN: {
            event.CLOSE: (state.CLOSING, (do.LEAVE, do.START_DEADLINE, do.SEND_CLOSE)),
            event.QUEUE_CLOSE: (
                state.CLOSE_PENDING,
                (do.STOP_PARSING, do.START_DEADLINE, do.AWAIT_DELIVERIES),
            ),
            event.EOF: (state.OPEN, (do.LEAVE, do.START_DEADLINE)),
            event.PARSED: (state.DISCARDING, (do.STOP_PARSING, do.END_SENDING)),
            event.DEADLINE: aborted_member,
            event.ABORT: aborted_member,
            **lost_member,
        },
        state.CLOSE_PENDING: {
            event.CLOSE: last_frame,
            event.DELIVERED: last_frame,
            # The pending deliveries take too long, maybe because of other clients.
            event.DEADLINE: last_frame,
            event.ABORT: aborted_member,
            **lost_member,
        },
        state.CLOSING: {
            event.QUEUE_CLOSE: (
                state.DISCARDING,
                (do.STOP_PARSING, do.START_DEADLINE, do.END_SENDING),
            ),
            event.PARSED: (state.DISCARDING, (do.STOP_PARSING, do.END_SENDING)),
            event.DEADLINE: aborted,
            event.ABORT: aborted,
            **disconnect,
        },
        state.DISCARDING: {
            event.QUEUE_CLOSE: (state.DISCARDING, (do.STOP_PARSING,)),
            event.FLUSHED: (state.DISCARDING, (do.END_SENDING,)),
            event.PARSED: (state.DISCARDING, (do.STOP_PARSING, do.END_SENDING)),
            event.DEADLINE: aborted,
            event.ABORT: aborted,
            **disconnect,
        },
        state.LOST: {
            event.CLOSE: released,
            event.QUEUE_CLOSE: released,
            event.PARSED: released,
            event.ABORT: released,
        },
        state.CLOSED: {},
    }


TRANSITIONS: Mapping[tuple[ConnectionState, ConnectionEvent], Transition] = {
    (state, event): _rows()[state].get(event, (state, ()))
    for state in ConnectionState
    for event in ConnectionEvent
}
"""The transition of every state and event; most events change nothing in most states."""
