"""Own the recovery of one client: replay messages from the history, then make it a member.

The replica's own history is replayed, which holds what the log delivered; the broker is not read.
The client becomes a member only after the whole replay is written. So there is no gap and no
duplicate between replayed and live messages, and no second queue: recovery reads on in the history
at the client's own pace.

Knows no broker, no HTTP and no other member of the channel.
"""

from collections import deque
from collections.abc import Iterator, Sequence
from time import monotonic
from typing import NamedTuple, Protocol

from websocket_relay.backplane.interface import BackplaneState, LogEntry, Position
from websocket_relay.channels.channel import Channel, ChannelHost
from websocket_relay.channels.history import History
from websocket_relay.outcomes import Close
from websocket_relay.wire.connection import Connection
from websocket_relay.wire.delivery_format import DeliveryFormat

REPLAY_CHUNK_BYTES = 65_536  # of payload in one write
REPLAY_CHUNK_MESSAGES = 256  # in one write

TAIL_POLL_S = 0.02
"""A client may resume from a position that another replica has read and this one has not yet:
interval between two checks whether this replica has read it."""


class ReplayRequest(NamedTuple):
    """The messages that a client requests before live ones.

    Attributes:
        since: replay all messages after this position; None: not requested.
        history_count: replay the channel's latest messages, up to this many; ignored if `since` is
            given.
    """

    since: Position | None
    history_count: int

    @property
    def is_requested(self) -> bool:
        """Whether there is something to replay."""
        return self.since is not None or self.history_count > 0


class ReplayListener(Protocol):
    """Notifies a client of its replay."""

    def on_replay_started(self, position: Position, *, is_recovered: bool) -> None:
        """Record that all messages of the channel after a position follow.

        Args:
            position: where the replay starts.
            is_recovered: whether that is all that the client requested.
        """

    def on_replay_finished(self, position: Position) -> None:
        """Record that messages after a position are delivered as they are published."""

    def is_own(self, position: Position) -> bool:
        """Return whether the client is known to have published the message at a position."""


class Recovery:
    """The replay for one client, which publishes to its channel, and joins it after the replay.

    Args:
        client: the connection in recovery.
        channel: the channel that it joins.
        delivery_format: how it is sent messages.
        request: what to replay.
        listener: notifies the client; None: it is sent no notices.
        host: the broadcaster.
        history: the messages to replay.
        deflate_from_bytes: shorter messages are not compressed.
    """

    def __init__(
        self,
        client: Connection,
        channel: Channel,
        delivery_format: DeliveryFormat,
        request: ReplayRequest,
        listener: ReplayListener | None,
        host: ChannelHost,
        history: History,
        deflate_from_bytes: int,
    ) -> None:
        self._client = client
        self._channel = channel
        self._delivery_format = delivery_format
        self._request = request
        self._listener = listener
        self._host = host
        self._history = history
        self._deflate_from_bytes = deflate_from_bytes
        self._cursor: Position | None = None  # replayed up to here; None: not known yet
        # What the client has published since, if it is sent no message of its own.
        self._own_positions: deque[Position] = deque()
        self._is_recovered = True
        self._is_started = listener is None
        self._started_at = monotonic()
        self._is_socket_full = False
        self._is_finished = False
        self._is_scheduled = False
        channel.add_recovery(client, self)
        if not self._is_since_unread():
            # Chosen now: the client's own messages come after those that it missed.
            self._cursor = self._choose_start()

    def start_replay(self) -> None:
        """Schedule the replay, unless it is scheduled."""
        if not self._is_scheduled:
            self._is_scheduled = True
            self._host.schedule(self._replay())

    def pause(self) -> None:
        """Pause the replay: the client's socket is full."""
        self._is_socket_full = True

    def resume(self) -> None:
        """Resume the replay: the client's send backlog is empty."""
        self._is_socket_full = False
        self.start_replay()

    def cancel(self) -> None:
        """End the recovery: the client leaves the channel, or disconnects.

        A subscription that ends before its replay starts is answered all the same.
        """
        self._is_finished = True
        if self._listener is not None and not self._is_started:
            position = self._cursor or self._request.since or self._history.newest
            self._report_start(self._listener, position)

    def record_own(self, position: Position) -> None:
        """Record a message of the client itself, which the replay will reach."""
        if self._delivery_format.echoes:
            return
        own = self._own_positions
        own.append(position)
        # The history bounds their number: the replay does not reach those that it has evicted.
        evicted_up_to = self._history.evicted_up_to(self._channel.name)
        while own and own[0] <= evicted_up_to:
            own.popleft()

    def _replay(self) -> Iterator[None]:
        """Make one write at a time, until the client is a member or can't be written to."""
        while not self._is_finished and not self._is_socket_full:
            if self._cursor is None:
                if self._is_since_unread():
                    self._wait_for_tail()
                    break
                self._cursor = self._choose_start()
            if self._listener is not None and not self._is_started:
                self._report_start(self._listener, self._cursor)
            else:
                self._cursor = self._send_after(self._cursor)
            yield
        self._is_scheduled = False

    def _report_start(self, listener: ReplayListener, position: Position) -> None:
        self._is_started = True
        listener.on_replay_started(position, is_recovered=self._is_recovered)

    def _is_since_unread(self) -> bool:
        """Return whether the log may hold the position `since`, not read by this replica yet.

        Once this replica has read all that the log held when the client connected, the log does
        not hold the position.
        """
        since, backplane = self._request.since, self._host.backplane
        if since is None or since <= backplane.position:
            return False
        if backplane.relays_locally and backplane.state is BackplaneState.OUTAGE:
            return False  # this replica relays without the log
        return backplane.complete_until < self._started_at

    def _wait_for_tail(self) -> None:
        if self._host.backplane.state is BackplaneState.OUTAGE:
            # Any answer now could be wrong. Like a new client, which is refused in an outage, the
            # client has to try another replica.
            self._client.close(Close.BACKPLANE_UNAVAILABLE)
        else:
            self._host.call_later(TAIL_POLL_S, self.start_replay)

    def _choose_start(self) -> Position:
        """Return the position after which the replay starts; count whether recovery is complete."""
        since, count = self._request
        newest = self._history.newest
        complete_after = max(map(self._history.complete_after, self._channel.names))
        if since is not None:
            is_in_log = since <= self._host.backplane.position
            self._is_recovered = is_in_log and since >= complete_after
            counters = self._host.shared.counters
            counters.recovered += self._is_recovered
            counters.not_recovered += not self._is_recovered
            return max(since, complete_after) if is_in_log else newest
        latest = self._latest_entries(count) if count else ()
        if not latest:
            return newest
        return max(latest[0].position.before(), complete_after)  # not across a gap

    def _latest_entries(self, count: int) -> Sequence[LogEntry]:
        """Return the newest `count` entries of the channel, oldest first."""
        names = self._channel.names
        if len(names) == 1:
            return self._history.latest_entries(names[0], count)
        return sorted(
            entry for name in names for entry in self._history.latest_entries(name, count)
        )[-count:]

    def _entries_after(self, position: Position, count: int) -> Sequence[LogEntry]:
        """Return the first `count` entries of the channel after a position."""
        names = self._channel.names
        if len(names) == 1:
            return self._history.entries_after(names[0], position, count)
        return sorted(
            entry for name in names for entry in self._history.entries_after(name, position, count)
        )[:count]

    def _send_after(self, cursor: Position) -> Position:
        """Write some messages after a position; if there are none, make the client a member.

        Returns:
            The new cursor.
        """
        name, floor = self._channel.name, self._history.floor
        delivery_format, shared = self._delivery_format, self._host.shared
        if self._listener is not None and floor > cursor:
            # The log has lost messages in the meantime, right after the cursor or later: the
            # replay up to the floor would be incomplete. A client that is sent no notices gets
            # what there is, as members do.
            cursor = floor
            shared.write([self._client], delivery_format.encode_gap(name, floor), messages=0)
        if cursor < max(map(self._history.evicted_up_to, self._channel.names)):
            # The history evicted messages faster than the client read them.
            self._client.close(Close.SLOW_CONSUMER)
            return cursor
        chunk = _first_chunk(self._entries_after(cursor, REPLAY_CHUNK_MESSAGES))
        if not chunk:
            self._is_finished = True
            self._channel.add_member(self._client, delivery_format)
            if self._listener is not None:
                self._listener.on_replay_finished(cursor)
            return cursor
        if entries := self._without_own(chunk):
            data = b"".join(delivery_format.encode_messages(entries, self._deflate_from_bytes))
            shared.counters.expected_deliveries += len(entries)
            shared.write([self._client], data, messages=len(entries))
        return chunk[-1].position

    def _without_own(self, chunk: Sequence[LogEntry]) -> Sequence[LogEntry]:
        """Return the entries of a chunk that the client is to be sent: not its own without echo."""
        if self._delivery_format.echoes:
            return chunk
        own, last, listener = self._own_positions, chunk[-1].position, self._listener
        passed = set[Position]()
        while own and own[0] <= last:
            passed.add(own.popleft())
        return [
            entry
            for entry in chunk
            if entry.position not in passed
            and not (listener is not None and listener.is_own(entry.position))
        ]


def _first_chunk(entries: Sequence[LogEntry]) -> Sequence[LogEntry]:
    """Return the first entries, up to REPLAY_CHUNK_BYTES of payload; at least one if there is."""
    size = 0
    for count, entry in enumerate(entries):
        size += len(entry.payload)
        if size > REPLAY_CHUNK_BYTES:
            return entries[: max(1, count)]
    return entries
