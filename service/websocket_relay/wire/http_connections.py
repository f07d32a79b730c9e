"""Bound the plain HTTP connections of one port, and start their requests a few at a time.

Owns which connection ends first where there are too many. Knows no request and no answer.
"""

import asyncio
from collections import OrderedDict, deque
from collections.abc import Callable
from typing import Protocol

from websocket_relay.outcomes import Refusal

STARTS_A_TURN = 4
"""Requests that start in one turn of the loop. What they do takes a fraction of a millisecond each;
between two turns messages are read and delivered, and new connections accepted."""

MAX_REFUSED = 256
"""Connections that are refused, and kept until their request is there to be answered."""


class HttpConnection(Protocol):
    """A connection that can end before its time."""

    def make_room(self, why: Refusal) -> None:
        """End, so that another connection may come."""


class HttpConnections:
    """The connections of one port that are neither WebSockets nor event streams.

    A connection counts from TCP accept to its upgrade or end; a handshake that was refused counts
    until its client is gone. Where there are too many, one makes room for the new one: the one
    whose peer has kept the relay waiting longest, for the rest of a request, for the next one or to
    read an answer; and where none does, the one whose request has waited longest for the relay,
    unless it may have changed something. So nobody who holds connections open, or keeps them busy,
    keeps others out.

    Args:
        limit: how many there may be at a time.
        why: what is said where there are more.
        refused: counts what is refused, and has it logged.
        has_descriptors: tells whether there are file descriptors for those that there are.
    """

    def __init__(
        self,
        limit: int,
        why: Refusal,
        refused: Callable[[Refusal], None],
        *,
        has_descriptors: Callable[[], bool] = lambda: True,
    ) -> None:
        self.refused = refused
        self.deciding = 0  # handshakes that are neither accepted nor refused yet
        self.evictions = 0  # of connections that owed nobody an answer
        self._limit = limit
        self._why = why
        self._has_descriptors = has_descriptors
        self._members: set[HttpConnection] = set()
        # Longest first: those that wait for their peers, and those whose peers wait.
        self._idle: OrderedDict[HttpConnection, None] = OrderedDict()
        self._busy: OrderedDict[HttpConnection, None] = OrderedDict()
        self._refused: OrderedDict[HttpConnection, None] = OrderedDict()
        self._requests: deque[Callable[[], None]] = deque()
        self._starts_left = STARTS_A_TURN
        self._is_scheduled = False

    def __len__(self) -> int:
        return len(self._members)

    def enter(self, connection: HttpConnection) -> Refusal | None:
        """Count a connection, which waits for its peer.

        Returns:
            Why it must be refused, where no other one makes room for it.
        """
        why = None
        if len(self._members) >= self._limit:
            why = self._why
        elif not self._has_descriptors():
            why = Refusal.DESCRIPTORS
        if why is not None and not self._end_one(why):
            return why
        self._members.add(connection)
        self._idle[connection] = None
        return None

    def keep_refused(self, connection: HttpConnection, why: Refusal) -> bool:
        """Count a refusal; tell whether the connection may stay until its request can be answered.

        Where there are too many of those, the oldest one ends.
        """
        self.refused(why)
        if why is Refusal.DESCRIPTORS:
            return False
        self._refused[connection] = None
        if len(self._refused) > MAX_REFUSED:
            self._end_first(self._refused, why)
        return True

    def await_peer(self, connection: HttpConnection) -> None:
        """Take note that a connection can't go on before its peer does."""
        self._busy.pop(connection, None)
        if connection in self._members:
            self._idle.setdefault(connection)

    def await_relay(self, connection: HttpConnection, *, is_safe: bool) -> None:
        """Take note that a connection's peer has done its part.

        Args:
            is_safe: whether its request changes nothing (RFC 9110 section 9.2.1).
        """
        self._idle.pop(connection, None)
        if not is_safe:
            self._busy.pop(connection, None)
        elif connection in self._members:
            self._busy.setdefault(connection)

    def leave(self, connection: HttpConnection) -> None:
        """Count a connection no longer."""
        self._members.discard(connection)
        self._idle.pop(connection, None)
        self._busy.pop(connection, None)
        self._refused.pop(connection, None)

    def end_idle(self, why: Refusal) -> None:
        """End all connections that wait for their peers; refuse what they have begun to send."""
        for waiting in (self._idle, self._refused):
            while waiting:
                self._end_first(waiting, why)

    def _end_one(self, why: Refusal) -> bool:
        """End the connection that can be spared most; tell whether there was one."""
        spared = self._idle or self._busy
        if not spared:
            return False
        self._end_first(spared, why)
        return True

    def _end_first(self, waiting: OrderedDict[HttpConnection, None], why: Refusal) -> None:
        connection, _ = waiting.popitem(last=False)
        self._members.discard(connection)
        connection.make_room(why)

    def start(self, request: Callable[[], None]) -> None:
        """Start a request, after those that came before it, in this turn of the loop or later."""
        if self._starts_left:
            self._starts_left -= 1
            request()
        else:
            self._requests.append(request)
        self._schedule()

    def _schedule(self) -> None:
        if not self._is_scheduled:
            self._is_scheduled = True
            asyncio.get_running_loop().call_soon(self._start_some)

    def _start_some(self) -> None:
        self._is_scheduled = False
        self._starts_left = STARTS_A_TURN
        while self._requests and self._starts_left:
            self._starts_left -= 1
            self._schedule()
            self._requests.popleft()()
