"""Own one channel: its members, the batches that are pending for them, and its slices of fan-out.

A *batch* is one list of messages and one list of recipients: the members at the time its messages
were published. Any join or leave seals the open batch. So a client is sent exactly what was
published while it was a member, and the accounting is exact. During a fan-out, messages collect in
the next batch: under load one write carries many messages; on an idle channel a message is written
at once.

Knows no broker, no history and no protocol.
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from itertools import chain
from time import perf_counter
from typing import TYPE_CHECKING, Protocol

from websocket_relay.backplane.interface import Backplane, Identity, LogEntry, Position
from websocket_relay.channels.batch import Batch, Recipients
from websocket_relay.channels.notices import Notice, Notices
from websocket_relay.messages import Message, Publisher
from websocket_relay.wire.connection import Connection, WireProtocol
from websocket_relay.wire.context import ConnectionContext
from websocket_relay.wire.delivery_format import DeliveryFormat
from websocket_relay.wire.flow_control import HighWaterMark
from websocket_relay.wire.time_slicer import SlicedWork

if TYPE_CHECKING:
    from websocket_relay.channels.recovery import Recovery

WRITES_PER_CLOCK_CHECK = 32  # a write of little data takes some microseconds
BYTES_PER_CLOCK_CHECK = 131_072  # the kernel copies about this much in the same time

NOTICE_INTERVAL_S = 0.05  # of notices to the same members, if no message follows
MAX_HELD_NOTICES = 100

DELAY_POLL_S = 0.02  # interval between two checks of a delayed batch
MAX_DELAY_S = 2.0  # longest delay of a batch for slow members
MAX_DELAY_HALF_SLOW_S = 10.0  # the same if at least half of the members are slow

DELAY_SHARE = 0.05
"""A slow member may delay its channel by up to MAX_DELAY_S in a row, and by this share of the time
in the long run."""

STALL_TIMEOUT_S = 2.0
"""A member that drained nothing for this long is stalled, not slow, and delays no batch. A full TCP
window alone may stand still for 0.2 seconds (the persist timer, RFC 9293 section 3.8.6.1), and with
TLS some 80 KiB that have left uvloop's TLS layer are not seen to drain."""


class ChannelHost(Protocol):
    """What a channel requires of its broadcaster."""

    shared: ConnectionContext
    backplane: Backplane

    def append(
        self,
        channel: str,
        messages: Sequence[Message],
        publisher: Publisher,
        identity: Identity | None = None,
    ) -> None:
        """Append messages to the log, and count them."""

    def schedule(self, work: SlicedWork) -> None:
        """Add work to the time slicer."""

    def call_later(self, delay_s: float, callback: Callable[[], None]) -> object:
        """Call `callback` after `delay_s` seconds."""

    def remove_channel(self, channel: "Channel") -> None:
        """Remove a channel that has no members."""

    def on_left(self, channel: "Channel", client: Connection) -> None:
        """Record that a client has left a channel."""

    def count_subscribers(self, names: Sequence[str]) -> int:
        """Return how many clients here may be sent the messages of some channels."""

    def observe_delivery(self, seconds: float) -> None:
        """Record the time from a batch's first message to its last write."""


class Channel:
    """One channel of one replica. It is the sink of its members' connections.

    Args:
        name: as in the path.
        names: of the channels whose messages it has: its own, unless it combines several.
        host: the broadcaster.
        pending_limit_bytes: publishers are paused while more than this is pending fan-out.
        batch_limit_bytes: a batch is sealed once its plain frames reach this size.
        deflate_from_bytes: shorter messages are not compressed.
    """

    def __init__(
        self,
        name: str,
        names: Sequence[str],
        host: ChannelHost,
        *,
        pending_limit_bytes: int,
        batch_limit_bytes: int,
        deflate_from_bytes: int,
    ) -> None:
        self.name = name
        self.names = names
        self._host = host
        self._shared = host.shared
        self._batch_limit_bytes = batch_limit_bytes
        self._deflate_from_bytes = deflate_from_bytes
        self.high_water_mark = HighWaterMark(pending_limit_bytes)
        self.limit_publishers(())
        self._members: dict[DeliveryFormat, dict[Connection, None]] = {}
        self._echoless: list[dict[Connection, None]] = []  # members that get nothing of their own
        self._recoveries: dict[Connection, Recovery] = {}  # of clients that are not members yet
        self._recipients: Recipients | None = None  # snapshot of the members; None: outdated
        self._open_batch: Batch | None = None  # accepts messages; the last one in the queue
        self._queue: deque[Batch | Notices | Callable[[], None]] = deque()
        self._watchers: dict[Connection, DeliveryFormat] = {}  # members to notify of joins
        # Members that are next, and what is called then.
        self._next_watchers: dict[Connection, tuple[DeliveryFormat, Callable[[], None]]] = {}
        self._held_notices: list[Notice] = []
        self._notified_at = 0.0  # by time.perf_counter
        # Members with a full socket: drained bytes at the last check, and time of the last change.
        self._slow_members: dict[Connection, tuple[int, float]] = {}
        # Members that delayed a batch: the time at which DELAY_SHARE has made up for the delay.
        self._delay_repaid_at: dict[Connection, float] = {}
        self._delayed_since = 0.0  # since when the first batch is delayed; 0: it is not
        self._messages = 0  # written since the channel exists here
        # The same by channel, if it combines several.
        self._messages_of: dict[str, int] | None = {} if len(names) > 1 else None

    def __len__(self) -> int:
        return sum(map(len, self._members.values()))

    def limit_publishers(self, marks: Iterable[HighWaterMark]) -> None:
        """Pause publishers at the marks of channels that combine this one with others, too."""
        self.publish_limits = (self.high_water_mark, *marks, *self._shared.publish_limits)

    def add_recovery(self, client: Connection, recovery: "Recovery") -> None:
        """Keep the channel for a client in recovery: it joins later, and may publish already."""
        self._recoveries[client] = recovery
        if client.is_lagging:
            recovery.pause()

    def add_member(self, client: Connection, delivery_format: DeliveryFormat) -> None:
        """Add a member: it is sent all that is published from now on."""
        self._members.setdefault(delivery_format, {})[client] = None
        self._on_members_changed()
        self._recoveries.pop(client, None)
        if client.is_lagging:
            self.on_backlog_started(client)

    def remove_member(self, client: Connection, delivery_format: DeliveryFormat) -> None:
        """Remove a client. Batches that still name it are written, or counted as drops."""
        if recovery := self._recoveries.pop(client, None):
            recovery.cancel()
        else:
            group = self._members[delivery_format]
            del group[client]
            if not group:
                del self._members[delivery_format]
            self._on_members_changed()
        for mark in self.publish_limits:
            mark.resume_publisher(client.protocol)
        self._watchers.pop(client, None)
        self._next_watchers.pop(client, None)
        self._slow_members.pop(client, None)
        self._delay_repaid_at.pop(client, None)
        if not self._members and not self._recoveries:
            self._host.remove_channel(self)

    def messages_of(self, name: str) -> int:
        """Return how many messages of one of its channels were written since it exists here."""
        return self._messages if self._messages_of is None else self._messages_of.get(name, 0)

    @property
    def client_count(self) -> int:
        """The number of members, and of clients in recovery."""
        return len(self) + len(self._recoveries)

    def clients(self) -> Iterator[Connection]:
        """Yield the members, and the clients in recovery."""
        yield from chain.from_iterable(self._members.values())
        yield from self._recoveries

    # MessageSink of the clients' connections

    @property
    def channel_names(self) -> Sequence[str]:
        """The channels that a member is subscribed to."""
        return self.names

    def publish(self, publisher: WireProtocol, messages: Sequence[Message]) -> None:
        """Publish a client's messages to all members, on every replica."""
        self._host.append(self.name, messages, publisher)
        self.pause_if_over_limit(publisher)

    def pause_if_over_limit(self, publisher: WireProtocol) -> None:
        """Pause reading from a publisher while a high-water mark is exceeded."""
        for mark in self.publish_limits:
            if mark.is_exceeded and mark.pause_publisher(publisher):
                self._shared.counters.publisher_pauses += 1

    def detach_connection(self, client: Connection) -> None:
        """Remove a client that ends."""
        self.remove_member(client, client.delivery_format)
        self._host.on_left(self, client)

    def on_backlog_started(self, client: Connection) -> None:
        """Mark a member as slow: its socket is full."""
        if recovery := self._recoveries.get(client):
            recovery.pause()
        else:
            self._slow_members[client] = (0, perf_counter())

    def on_backlog_drained(self, client: Connection) -> None:
        """Clear the mark: the member's send backlog is empty."""
        if recovery := self._recoveries.get(client):
            recovery.resume()
        else:
            self._slow_members.pop(client, None)

    def call_when_written(self, callback: Callable[[], None]) -> None:
        """Call `callback` once all that was published so far has been written."""
        self._host.backplane.when_settled(partial(self.when_queue_is_written, callback))

    def when_queue_is_written(self, callback: Callable[[], None]) -> None:
        """Call `callback` once the batches in the queue are written, which is now if it is empty.

        Callbacks are called in their order.
        """
        self._write_notices()
        if not self._queue:
            callback()
            return
        self._open_batch = None
        self._queue.append(callback)

    # Who is here

    # In a storm of joins each would be written to all who have joined. So notices are held for a
    # moment, unless it was quiet before, or a message follows, which they precede.

    def add_watcher(
        self, client: Connection, delivery_format: DeliveryFormat, on_added: Callable[[], None]
    ) -> None:
        """Notify a member of joins and leaves.

        Args:
            client: the member.
            delivery_format: how it is sent notices.
            on_added: called when the notices begin, which is now unless others are held.
        """
        self._next_watchers[client] = delivery_format, on_added
        if not self._held_notices:
            self._add_watchers()

    def notify_watchers(self, notice: Notice) -> None:
        """Write a notice to the members that watch, behind what was published before it."""
        if not self._watchers:
            return
        self._open_batch = None  # the next message starts one, behind the notice
        self._held_notices.append(notice)
        delay_s = self._notified_at + NOTICE_INTERVAL_S - perf_counter()
        if delay_s <= 0 or len(self._held_notices) >= MAX_HELD_NOTICES:
            self._write_notices()
        elif len(self._held_notices) == 1:
            self._host.call_later(delay_s, self._write_notices)

    def _write_notices(self) -> None:
        if not self._held_notices:
            return
        watchers: dict[DeliveryFormat, list[Connection]] = {}
        for client, delivery_format in self._watchers.items():
            watchers.setdefault(delivery_format, []).append(client)
        notices = Notices(self._held_notices, watchers)
        self._held_notices = []
        self._notified_at = perf_counter()
        self._adjust_pending(notices.memory_bytes)
        if not self._queue:
            self._host.schedule(self._fan_out())
        self._queue.append(notices)
        self._add_watchers()

    def _add_watchers(self) -> None:
        # One by one: the first may cause that the next one ends, or that a notice is held.
        while self._next_watchers and not self._held_notices:
            client = next(iter(self._next_watchers))
            self._watchers[client], on_added = self._next_watchers.pop(client)
            on_added()

    # Fan-out

    def deliver(self, entry: LogEntry, publisher: Connection | None = None) -> None:
        """Add an entry of the log to the open batch, for the current members.

        Args:
            entry: the message.
            publisher: its connection, if it is one that may be sent no message of its own.
        """
        if publisher is not None and (recovery := self._recoveries.get(publisher)):
            recovery.record_own(entry.position)
        if not self._members:  # clients in recovery read the entry from the history
            return
        batch = self._open_batch or self._start_batch()
        memory_bytes = batch.add(entry)
        self.high_water_mark.bytes += memory_bytes
        self._shared.pending_fan_out.bytes += memory_bytes
        self._shared.counters.expected_deliveries += batch.recipients.count
        if self._echoless and publisher is not None and self._is_without_echo(publisher):
            self._shared.counters.expected_deliveries -= 1
            batch.own_positions.setdefault(publisher, set()).add(entry.position)
        if batch.frame_bytes >= self._batch_limit_bytes:
            self._open_batch = None

    def _is_without_echo(self, publisher: Connection) -> bool:
        return any(publisher in group for group in self._echoless)

    def send_gap(self, position: Position) -> None:
        """Notify members that messages up to a position may be missing, after queued batches."""
        self.when_queue_is_written(partial(self._write_gap, position))

    def _write_gap(self, position: Position) -> None:
        for delivery_format, group in self._members.items():
            if notice := delivery_format.encode_gap(self.name, position):
                self._shared.write(list(group), notice, messages=0)

    def _start_batch(self) -> Batch:
        recipients = self._recipients
        if recipients is None:
            recipients = self._recipients = Recipients(self._members.items())
        if not recipients.batches:
            self._adjust_pending(recipients.memory_bytes)
        recipients.batches += 1
        self._write_notices()
        self._open_batch = batch = Batch(recipients, perf_counter())
        if not self._queue:
            self._host.schedule(self._fan_out())
        self._queue.append(batch)
        return batch

    def _fan_out(self) -> Iterator[None]:
        """Write the batches of the queue, one step of writes at a time, until it is empty."""
        while self._queue:
            batch = self._queue[0]
            if isinstance(batch, Notices):
                yield from self._fan_out_notices(batch)
                self._queue.popleft()
                self._adjust_pending(-batch.memory_bytes)
            elif not isinstance(batch, Batch):
                batch()
                self._queue.popleft()
            elif self._slow_members and self._must_delay(batch):
                self._host.call_later(DELAY_POLL_S, lambda: self._host.schedule(self._fan_out()))
                return
            else:
                if self._open_batch is batch:
                    self._open_batch = None
                yield from self._write(batch)
                self._queue.popleft()
                self._finish_batch(batch)
            # The end follows at once where nothing is left: the next batch schedules this anew.
            if self._queue:
                yield

    def _write(self, batch: Batch) -> Iterator[None]:
        """Encode a batch for each group of its recipients, and write it to the group."""
        for index, (delivery_format, clients, entries) in enumerate(batch.groups):
            if index:
                yield
            parts: list[bytes] = []
            for part in delivery_format.encode_messages(entries, self._deflate_from_bytes):
                if parts:
                    yield
                self._adjust_pending(len(part))
                parts.append(part)
            encoded = parts[0] if len(parts) == 1 else b"".join(parts)
            for step, some in enumerate(steps(clients, len(encoded))):
                if step:
                    yield
                self._shared.write(some, encoded, len(entries))
            self._adjust_pending(-len(encoded))

    def _fan_out_notices(self, notices: Notices) -> Iterator[None]:
        """Write notices to each group of clients that watch."""
        for clients, encoded in notices.groups():
            for some in steps(clients, len(encoded)):
                self._shared.write(some, encoded, messages=0)
                yield

    def _finish_batch(self, batch: Batch) -> None:
        self._host.observe_delivery(perf_counter() - batch.opened_at)
        self._messages += len(batch.entries)
        if self._messages_of is not None:
            for entry in batch.entries:
                self._messages_of[entry.channel] = self._messages_of.get(entry.channel, 0) + 1
        self._adjust_pending(-batch.memory_bytes)
        batch.recipients.batches -= 1
        if not batch.recipients.batches:
            self._adjust_pending(-batch.recipients.memory_bytes)

    # Inside

    def _on_members_changed(self) -> None:
        members = self._members.items()
        self._echoless = [group for delivery_format, group in members if not delivery_format.echoes]
        self._recipients = None
        self._open_batch = None

    def _adjust_pending(self, size: int) -> None:
        """Add to the bytes that are pending fan-out or, if `size` is negative, free some."""
        if size > 0:
            self.high_water_mark.bytes += size
            self._shared.pending_fan_out.bytes += size
        elif size:
            self.high_water_mark.drained(-size)
            self._shared.pending_fan_out.drained(-size)

    # Delay policy. If a slow member still drains, and the next batch would not fit into its send
    # backlog, the channel delays the batch until it fits. Flow control pauses the publishers in
    # the meantime, so a publisher that is merely fast slows down to the pace of its subscribers.
    # If at least half of a publisher's subscribers are slow, it has to adapt to them. A few slow
    # members may delay the others only a little; then the write closes the slow members.

    def _must_delay(self, batch: Batch) -> bool:
        now = perf_counter()
        draining = self._draining_members(now)
        limit_bytes = self._shared.backlogs.limit_bytes
        # The size is that of plain frames: a batch that fits once compressed may be delayed in
        # vain.
        full = [
            client for client in draining if client.backlog_bytes + batch.frame_bytes > limit_bytes
        ]
        is_half_slow = len(draining) * 2 >= self._host.count_subscribers(self.names)
        if full and self._may_delay(full, is_half_slow, now):
            return True
        self._delayed_since = 0.0
        return False

    def _may_delay(self, full: list[Connection], is_half_slow: bool, now: float) -> bool:
        self._delayed_since = self._delayed_since or now
        delayed_s = now - self._delayed_since
        if is_half_slow:
            return delayed_s < MAX_DELAY_HALF_SLOW_S
        repaid_limit = now + MAX_DELAY_S / DELAY_SHARE
        if delayed_s >= MAX_DELAY_S or all(
            self._delay_repaid_at.get(client, 0.0) > repaid_limit for client in full
        ):
            return False
        for client in full:
            repaid_at = max(now, self._delay_repaid_at.get(client, 0.0))
            self._delay_repaid_at[client] = repaid_at + DELAY_POLL_S / DELAY_SHARE
        return True

    def _draining_members(self, now: float) -> list[Connection]:
        """Return the slow members that drained some of their send backlog lately."""
        draining = []
        for client, (last_drained_bytes, changed_at) in self._slow_members.items():
            drained_bytes = client.drained_bytes
            if drained_bytes != last_drained_bytes:
                self._slow_members[client] = (drained_bytes, now)
            if drained_bytes != last_drained_bytes or now - changed_at < STALL_TIMEOUT_S:
                draining.append(client)
        return draining


def steps(clients: list[Connection], size: int) -> Iterator[list[Connection]]:
    """Yield the clients of one step of writes after the other.

    Args:
        clients: recipients of the same bytes.
        size: of these.
    """
    step = max(1, min(WRITES_PER_CLOCK_CHECK, BYTES_PER_CLOCK_CHECK // size))
    for start in range(0, len(clients), step):
        yield clients[start : start + step]
