"""Own one channel: its members, the batches it owes them, and the slices they are written in.

A *batch* is one list of messages and one list of recipients: the members when its messages were
published. Any join or leave seals the open batch, so a client gets exactly what was published
while it was a member, and the books are exact. While a fan-out is under way, messages gather in
the next batch: under load one write carries many messages, when idle one leaves at once.
"""

from collections import deque
from collections.abc import Callable, Mapping
from time import perf_counter
from typing import Protocol

from websocket_relay.backplane.interface import Backplane, LogEntry
from websocket_relay.channels.batch import (
    Batch,
    DeliveryFormat,
    Recipients,
    encode_notice,
    format_of,
)
from websocket_relay.wire.connection import Connection, Publisher
from websocket_relay.wire.context import ConnectionContext
from websocket_relay.wire.flow_control import HighWaterMark
from websocket_relay.wire.time_slicer import SlicedWork

WRITES_BETWEEN_LOOKS = 32  # at the clock; a write of little data takes some microseconds
BYTES_BETWEEN_LOOKS = 131_072  # the kernel copies about this much in the same time

POINTER_BYTES = 8

HOLD_LOOK_S = 0.02  # how often a held batch is looked at
HOLD_S = 2.0  # a batch waits no longer for members that are behind
HOLD_FOR_HALF_S = 10.0  # or this long, where half of the channel is

WAIT_SHARE = 0.05
"""A member that is slower than the others may cost its channel HOLD_S at once, and this part of the
time in the long run."""

STALLED_S = 2.0
"""A member that took nothing for this long is not slow but stalled, and not waited for. A full TCP
window alone may stand still for 0.2 seconds (the persist timer, RFC 9293 section 3.8.6.1), and with
TLS some 80 KiB that have left its layer are not seen to go."""


class ChannelHost(Protocol):
    """What a channel asks of the room it is in."""

    shared: ConnectionContext
    backplane: Backplane

    def schedule(self, work: SlicedWork) -> None:
        """Give somebody who is not in the queue turns to write."""

    def call_later(self, delay_s: float, act: Callable[[], None]) -> object:
        """Call `act` after a while."""

    def forget(self, channel: "Channel") -> None:
        """Let go of a channel that has no members."""

    def written(self, seconds: float) -> None:
        """Take note how long a batch took from its first message to its last write."""


class Channel:
    """One channel of one replica. It is the sink of its members' connections.

    Args:
        name: what stands in the path.
        office: the broadcaster.
        pending_limit_bytes: publishers are held while more than this waits for its fan-out.
        batch_limit_bytes: a batch is sealed once it holds this much.
        deflate_from_bytes: shorter messages are not compressed.
    """

    def __init__(
        self,
        name: str,
        office: ChannelHost,
        *,
        pending_limit_bytes: int,
        batch_limit_bytes: int,
        deflate_from_bytes: int,
    ) -> None:
        self.name = name
        self._office = office
        self._shared = office.shared
        self._backplane = office.backplane
        self._batch_limit_bytes = batch_limit_bytes
        self._deflate_from_bytes = deflate_from_bytes
        self._gate = HighWaterMark(pending_limit_bytes)
        self._gates = (self._gate, self._shared.pending, self._shared.appends)
        self._members: dict[DeliveryFormat, dict[Connection, None]] = {}
        self._expected: set[Connection] = set()  # no members yet: they hear what was before
        self._snapshot: Recipients | None = None  # of the members, until they change
        self._open: Batch | None = None  # takes messages; the last one in the queue
        self._queue: deque[Batch | Callable[[], None]] = deque()
        # Members that are behind, with what they had taken when they were last seen to move.
        self._behind: dict[Connection, tuple[int, float]] = {}
        # Members that were waited for, and when that will have been paid back at WAIT_SHARE.
        self._indebted: dict[Connection, float] = {}
        self._held_since = 0.0  # since when the first batch waits for them; 0: it does not

    def __len__(self) -> int:
        return sum(map(len, self._members.values()))

    # What members say: this is their sink

    def publish(self, client: Publisher, opcode: int, payload: bytes) -> None:
        """Relay a member's message to all members, on every replica."""
        ledger = self._shared.ledger
        ledger.messages += 1
        ledger.received_bytes += len(payload)
        self._backplane.append(self.name, opcode, payload, client)
        self.hold_back(client)

    def hold_back(self, client: Publisher) -> None:
        """Read a publisher no more while too much waits to be written."""
        for gate in self._gates:
            if gate.is_shut and gate.hold(client):
                self._shared.ledger.publisher_pauses += 1

    @property
    def gate(self) -> HighWaterMark:
        """The bound on what waits for its fan-out."""
        return self._gate

    def expect(self, client: Connection) -> None:
        """Be there for a client that will join later, and may publish already."""
        self._expected.add(client)

    def join(self, client: Connection) -> None:
        """Let a client in: it gets all that is published from now on."""
        self._expected.discard(client)
        self._members.setdefault(format_of(client), {})[client] = None
        self._changed()

    def leave(self, client: Connection) -> None:
        """Let a client go; what it was still owed is counted when its turn comes."""
        if client in self._expected:
            self._expected.discard(client)
        else:
            form = format_of(client)
            group = self._members[form]
            del group[client]
            if not group:
                del self._members[form]
            self._changed()
        for gate in self._gates:
            gate.release(client)
        self._behind.pop(client, None)
        self._indebted.pop(client, None)
        if not self._members and not self._expected:
            self._office.forget(self)

    def fell_behind(self, client: Connection) -> None:
        """Take note that a member's socket is full."""
        self._behind[client] = (0, perf_counter())

    def caught_up(self, client: Connection) -> None:
        """Take note that nothing waits for a member any more."""
        self._behind.pop(client, None)

    def when_written(self, act: Callable[[], None]) -> None:
        """Call `act` once all that was published so far has been written."""
        self._backplane.when_settled(lambda: self._when_queue_is_written(act))

    def _when_queue_is_written(self, act: Callable[[], None]) -> None:
        if not self._queue:
            act()
            return
        self._open = None
        self._queue.append(act)

    # What the log says

    def deliver(self, entry: LogEntry) -> None:
        """Owe an entry of the log to the members of now."""
        if not self._members:  # those who are expected read it in the history
            return
        batch = self._open or self._begin()
        kept = batch.add(entry)
        self._gate.bytes += kept
        self._shared.pending.bytes += kept
        self._shared.ledger.owed += batch.owed
        if batch.size >= self._batch_limit_bytes:
            self._open = None

    def tell(self, said: Mapping[str, object]) -> None:
        """Say something of the relay's own to those who are told such things."""
        self._when_queue_is_written(lambda: self._tell(said))

    def _tell(self, said: Mapping[str, object]) -> None:
        for form, group in self._members.items():
            if form.tells_positions:
                self._shared.write(list(group), encode_notice(said, form), messages=0)

    def fan_out(self, until: float) -> bool:
        """Write what is owed, for a slice of time.

        Args:
            until: when to stop, by `time.perf_counter`; one look's worth is always done.

        Returns:
            Whether there is nothing left to do for now.
        """
        while self._queue:
            batch = self._queue[0]
            if not isinstance(batch, Batch):
                self._queue.popleft()
                batch()
                if perf_counter() > until:
                    return not self._queue
                continue
            if self._open is batch:
                self._open = None
            if self._behind and not batch.is_begun and self._must_hold(batch):
                self._office.call_later(HOLD_LOOK_S, lambda: self._office.schedule(self.fan_out))
                return True
            kept = batch.kept_bytes
            is_written = self._write(batch, until)
            self._keep(batch.kept_bytes - kept)
            if not is_written:
                return False
            self._finish(batch)
            if perf_counter() > until:
                return not self._queue
        return True

    # Inside

    def _changed(self) -> None:
        self._snapshot = None
        self._open = None

    def _keep(self, size: int) -> None:
        """Take note of memory that what waits for its fan-out takes, or that it gives back."""
        if size > 0:
            self._gate.bytes += size
            self._shared.pending.bytes += size
        elif size:
            self._gate.drained(-size)
            self._shared.pending.drained(-size)

    def _begin(self) -> Batch:
        audience_bytes = 0
        if self._snapshot is None:
            self._snapshot = [(form, list(group)) for form, group in self._members.items()]
            audience_bytes = POINTER_BYTES * len(self)
            self._keep(audience_bytes)
        self._open = batch = Batch(self._snapshot, audience_bytes, perf_counter())
        if not self._queue:
            self._office.schedule(self.fan_out)
        self._queue.append(batch)
        return batch

    def _write(self, batch: Batch, until: float) -> bool:
        """Write a batch to one group after another until the time is over; tell if all got it."""
        while True:
            if not batch.encode(self._deflate_from_bytes, until):
                return False
            if not self._write_to_group(batch, until):
                return False
            if not batch.next_group():
                return True
            if perf_counter() > until:
                return False

    def _write_to_group(self, batch: Batch, until: float) -> bool:
        """Write a batch to its recipients until the time is over; tell whether all got it."""
        data, recipients = batch.data, batch.recipients
        step = max(1, min(WRITES_BETWEEN_LOOKS, BYTES_BETWEEN_LOOKS // len(data)))
        position, end = batch.next, len(recipients)
        while position < end:
            self._shared.write(recipients[position : position + step], data, batch.messages)
            position += step
            if perf_counter() > until:
                break
        batch.next = position
        return position >= end

    def _finish(self, batch: Batch) -> None:
        self._queue.popleft()
        self._office.written(perf_counter() - batch.opened_at)
        self._keep(-batch.kept_bytes)

    # Where a member is behind but moving, and the next batch would not fit into its backlog, the
    # batch waits a moment for it to fit, and the gate holds the publishers meanwhile: one that
    # only goes fast is slowed to the pace of its listeners. Where half of the channel is behind
    # that is the publisher's pace to find; a few slow members can delay the others a little only,
    # and then the write closes them.

    def _must_hold(self, batch: Batch) -> bool:
        now = perf_counter()
        moving = self._moving(now)
        limit_bytes = self._shared.backlogs.limit_bytes
        # The size is that of plain frames: what is compressed may be waited for without need.
        full = [client for client in moving if client.backlog_bytes + batch.size > limit_bytes]
        if full and self._may_wait(full, len(moving) * 2 >= len(self), now):
            return True
        self._held_since = 0.0
        return False

    def _may_wait(self, full: list[Connection], half_is_behind: bool, now: float) -> bool:
        self._held_since = self._held_since or now
        held_s = now - self._held_since
        if half_is_behind:
            return held_s < HOLD_FOR_HALF_S
        credit_until = now + HOLD_S / WAIT_SHARE
        if held_s >= HOLD_S or all(self._indebted.get(c, 0.0) > credit_until for c in full):
            return False
        for client in full:
            owed_until = max(now, self._indebted.get(client, 0.0))
            self._indebted[client] = owed_until + HOLD_LOOK_S / WAIT_SHARE
        return True

    def _moving(self, now: float) -> list[Connection]:
        """Return the members that are behind and took something of it lately."""
        moving = []
        for client, (seen, moved_at) in self._behind.items():
            drained = client.drained_bytes
            if drained != seen:
                self._behind[client] = (drained, now)
            if drained != seen or now - moved_at < STALLED_S:
                moving.append(client)
        return moving
