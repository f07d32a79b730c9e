"""Define the life of a connection: one table of states, events and actions, for every protocol.

Knows no connection and no protocol. The table is drawn in docs/explanation/architecture.md.
"""

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


TABLE = """
HANDSHAKE     ACCEPT       OPEN
HANDSHAKE     REFUSE       DISCARDING    START_DEADLINE END_SENDING
HANDSHAKE     PARSED       DISCARDING    END_SENDING
HANDSHAKE     DEADLINE     DISCARDING    ABORT
HANDSHAKE     ABORT        DISCARDING    ABORT
HANDSHAKE     DISCONNECT   LOST
OPEN          CLOSE        CLOSING       LEAVE START_DEADLINE SEND_CLOSE
OPEN          QUEUE_CLOSE  CLOSE_PENDING STOP_PARSING START_DEADLINE AWAIT_DELIVERIES
OPEN          EOF          OPEN          LEAVE START_DEADLINE
OPEN          PARSED       DISCARDING    STOP_PARSING END_SENDING
OPEN          DEADLINE     DISCARDING    LEAVE ABORT
OPEN          ABORT        DISCARDING    LEAVE ABORT
OPEN          DISCONNECT   LOST          LEAVE
CLOSE_PENDING CLOSE        DISCARDING    LEAVE SEND_CLOSE START_DEADLINE END_SENDING
CLOSE_PENDING DELIVERED    DISCARDING    LEAVE SEND_CLOSE START_DEADLINE END_SENDING
CLOSE_PENDING DEADLINE     DISCARDING    LEAVE SEND_CLOSE START_DEADLINE END_SENDING
CLOSE_PENDING ABORT        DISCARDING    LEAVE ABORT
CLOSE_PENDING DISCONNECT   LOST          LEAVE
CLOSING       QUEUE_CLOSE  DISCARDING    STOP_PARSING START_DEADLINE END_SENDING
CLOSING       PARSED       DISCARDING    STOP_PARSING END_SENDING
CLOSING       DEADLINE     DISCARDING    ABORT
CLOSING       ABORT        DISCARDING    ABORT
CLOSING       DISCONNECT   LOST
DISCARDING    QUEUE_CLOSE  DISCARDING    STOP_PARSING
DISCARDING    FLUSHED      DISCARDING    END_SENDING
DISCARDING    PARSED       DISCARDING    STOP_PARSING END_SENDING
DISCARDING    DEADLINE     DISCARDING    ABORT
DISCARDING    ABORT        DISCARDING    ABORT
DISCARDING    DISCONNECT   LOST
LOST          CLOSE        CLOSED        STOP_PARSING RELEASE
LOST          QUEUE_CLOSE  CLOSED        STOP_PARSING RELEASE
LOST          PARSED       CLOSED        STOP_PARSING RELEASE
LOST          ABORT        CLOSED        STOP_PARSING RELEASE
"""
"""State, event, next state, actions. An event that a state does not list changes nothing."""

TRANSITIONS: dict[tuple[ConnectionState, ConnectionEvent], Transition] = {
    (state, event): (state, ()) for state in ConnectionState for event in ConnectionEvent
}
"""The transition of every state and event."""

for _state, _event, _following, *_actions in map(str.split, TABLE.strip().splitlines()):
    TRANSITIONS[ConnectionState[_state], ConnectionEvent[_event]] = (
        ConnectionState[_following],
        tuple(CloseAction[action] for action in _actions),
    )
