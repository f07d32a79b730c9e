"""Bound the HTTP connections of one port, and start their requests a few at a time.

Owns the choice of the connection to evict when the limit is reached. Knows no request and no
response.
"""

import asyncio
from collections import OrderedDict, deque
from collections.abc import Callable
from itertools import chain, islice
from typing import Protocol

from websocket_relay.outcomes import Refusal, RefusedError

STARTS_A_TURN = 4
"""Requests that start in one loop iteration. Each takes a fraction of a millisecond. Between two
iterations the loop reads and delivers messages and accepts new connections."""

MAX_REFUSED = 256
"""Refused connections that stay open until their request arrives and can be answered."""

MAX_ARRIVING = 16
"""Idle connections that are skipped for one eviction, because a request is arriving on them."""


class HttpConnection(Protocol):
    """A connection that can be evicted."""

    def is_request_arriving(self) -> bool:
        """Return whether the connection is idle and its next request waits to be parsed."""

    def evict(self, error: RefusedError) -> None:
        """End the connection in favour of another one."""


class HttpConnections:
    """The connections of one port that are neither WebSockets nor event streams.

    A connection counts from TCP accept until its upgrade or its end. After a refused handshake it
    counts until the client disconnects. At the limit, a new connection evicts an existing one:

    1. the idle connection that has waited longest for its peer: for the rest of a request, for the
       next request, or for the peer to read a response. Up to MAX_ARRIVING connections are skipped
       if bytes have arrived on them since: a request, or their end. The one after these is
       evicted in any case;
    2. without idle connections, the busy one whose request has waited longest for the relay. A
       connection whose requests may have changed something is never evicted while busy.

    A client that keeps connections open or busy therefore blocks no other client.

    Args:
        max_connections: the maximum number of connections at a time.
        limit_refusal: the refusal above the limit.
        record_refusal: records a refusal that has no response.
        has_descriptors: returns whether the file descriptors suffice for the existing connections.
    """

    def __init__(
        self,
        max_connections: int,
        limit_refusal: Refusal,
        record_refusal: Callable[[RefusedError], None],
        *,
        has_descriptors: Callable[[], bool] = lambda: True,
    ) -> None:
        self.record_refusal = record_refusal
        self.pending_handshakes = 0  # handshakes that are neither accepted nor refused yet
        self.evictions = 0  # of connections without an unanswered request
        self.max_connections = max_connections
        self._limit_refusal = limit_refusal
        self._has_descriptors = has_descriptors
        self._members: set[HttpConnection] = set()
        # Oldest first. Idle: the relay waits for the peer. Busy: the peer waits for the relay.
        self._idle: OrderedDict[HttpConnection, None] = OrderedDict()
        self._busy: OrderedDict[HttpConnection, None] = OrderedDict()
        self._refused: OrderedDict[HttpConnection, None] = OrderedDict()
        self._requests: deque[Callable[[], None]] = deque()
        self._starts_left = STARTS_A_TURN
        self._is_scheduled = False

    def __len__(self) -> int:
        return len(self._members)

    def register(self, connection: HttpConnection) -> RefusedError | None:
        """Count a connection and mark it idle. At the limit, evict another one.

        Returns:
            The refusal of the connection if no other one can be evicted.
        """
        error = None
        if len(self._members) >= self.max_connections:
            error = RefusedError(self._limit_refusal)
        elif not self._has_descriptors():
            error = RefusedError(Refusal.DESCRIPTORS)
        if error is not None and not self._evict_one(error):
            return error
        self._members.add(connection)
        self._idle[connection] = None
        return None

    def keep_refused(self, connection: HttpConnection, error: RefusedError) -> bool:
        """Return whether a refused connection may wait for its request.

        Above MAX_REFUSED, the oldest refused connection is evicted.
        """
        if error.why is Refusal.DESCRIPTORS:
            return False
        self._refused[connection] = None
        if len(self._refused) > MAX_REFUSED:
            self._evict(next(iter(self._refused)), error)
        return True

    def mark_idle(self, connection: HttpConnection) -> None:
        """Record that a connection waits for its peer."""
        self._busy.pop(connection, None)
        if connection in self._members:
            self._idle.setdefault(connection)

    def mark_busy(self, connection: HttpConnection, *, is_safe: bool) -> None:
        """Record that a connection waits for the relay.

        Args:
            is_safe: whether its requests use only safe methods (RFC 9110 section 9.2.1). Otherwise
                the connection can't be evicted.
        """
        self._idle.pop(connection, None)
        if not is_safe:
            self._busy.pop(connection, None)
        elif connection in self._members:
            self._busy.setdefault(connection)

    def unregister(self, connection: HttpConnection) -> None:
        """Remove a connection from the count."""
        self._members.discard(connection)
        self._idle.pop(connection, None)
        self._busy.pop(connection, None)
        self._refused.pop(connection, None)

    def evict_idle(self, why: Refusal) -> None:
        """Evict all connections that wait for their peers; refuse their partial requests.

        A connection on which a request is arriving stays: `Listener.wait_for_responses` waits for
        the response.
        """
        for connection in (*self._idle, *self._refused):
            if not connection.is_request_arriving():
                self._evict(connection, RefusedError(why))

    def _evict_one(self, error: RefusedError) -> bool:
        """Evict the first candidate; return whether there is one."""
        first = islice(self._idle, MAX_ARRIVING)
        silent = (each for each in first if not each.is_request_arriving())
        further = islice(self._idle, MAX_ARRIVING, MAX_ARRIVING + 1)
        connection = next(chain(silent, further, self._busy), None)
        if connection is None:
            return False
        self._evict(connection, error)
        return True

    def _evict(self, connection: HttpConnection, error: RefusedError) -> None:
        self.unregister(connection)
        connection.evict(error)

    @property
    def queued_requests(self) -> int:
        """The number of requests that wait for a later loop iteration."""
        return len(self._requests)

    def may_start_request(self) -> bool:
        """Return whether a request may start in this loop iteration, and count it if it may."""
        self._schedule()
        may_start = self._starts_left > 0
        self._starts_left -= may_start
        return may_start

    def queue_request(self, request: Callable[[], None]) -> None:
        """Start a request in a later loop iteration. Requests start in order."""
        self._requests.append(request)

    def _schedule(self) -> None:
        if not self._is_scheduled:
            self._is_scheduled = True
            asyncio.get_running_loop().call_soon(self._start_queued)

    def _start_queued(self) -> None:
        self._is_scheduled = False
        self._starts_left = STARTS_A_TURN
        while self._requests and self._starts_left:
            self._starts_left -= 1
            self._schedule()
            self._requests.popleft()()
