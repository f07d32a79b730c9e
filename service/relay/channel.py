"""Own one channel: its members, the batches it owes them, and the slices they are written in.

A *batch* is one list of messages and one list of recipients: the members when its messages were
published. Any join or leave seals the open batch, so a client gets exactly what was published
while it was a member, and the books are exact. While a fan-out is under way, messages gather in
the next batch: under load one write carries many messages, when idle one leaves at once.
"""

import asyncio
from collections import deque
from collections.abc import Callable
from time import perf_counter
from typing import Protocol

from service.backplane.base import Backplane, Entry
from service.errors import Drop
from service.relay.gate import Gate
from service.wire.frames import header
from service.wire.protocol import RelayProtocol
from service.wire.shared import Shared

WRITES_BETWEEN_LOOKS = 32  # at the clock; a write of little data takes some microseconds
BYTES_BETWEEN_LOOKS = 131_072  # the kernel copies about this much in the same time

HOLD_STEP_S = 0.1  # a member that takes nothing for this long is stalled
HOLD_STEPS = 10  # a batch waits no longer for members that are behind


class Batch:
    """Messages that leave together, and who gets them."""

    __slots__ = ("_data", "_parts", "messages", "next", "opened_at", "recipients", "size")

    def __init__(self, recipients: list[RelayProtocol], opened_at: float) -> None:
        self.recipients = recipients
        self.opened_at = opened_at
        self.messages = 0
        self.size = 0  # bytes of all frames
        self.next = 0  # the first recipient that was not written to yet
        self._parts: list[bytes] = []
        self._data = b""

    def add(self, opcode: int, payload: bytes) -> int:
        """Add a message; return the bytes of its frame."""
        head = header(opcode, len(payload))
        self._parts += (head, payload)
        size = len(head) + len(payload)
        self.size += size
        self.messages += 1
        return size

    @property
    def data(self) -> bytes:
        """All frames, encoded once for all recipients."""
        if self._parts:
            self._data = b"".join(self._parts)
            self._parts.clear()
        return self._data


class Office(Protocol):
    """What a channel asks of the room it is in."""

    shared: Shared
    backplane: Backplane
    gate: Gate

    def schedule(self, channel: "Channel") -> None:
        """Call the channel's `fan_out` soon, and until it is done."""

    def call_later(self, delay_s: float, act: Callable[[], None]) -> asyncio.TimerHandle:
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
    """

    def __init__(
        self, name: str, office: Office, *, pending_limit_bytes: int, batch_limit_bytes: int
    ) -> None:
        self.name = name
        self._office = office
        self._shared = office.shared
        self._backplane = office.backplane
        self._batch_limit_bytes = batch_limit_bytes
        self._gate = Gate(pending_limit_bytes)
        self._members: dict[RelayProtocol, None] = {}
        self._snapshot: list[RelayProtocol] | None = None  # of the members, until they change
        self._open: Batch | None = None  # takes messages; the last one in the queue
        self._queue: deque[Batch | Callable[[], None]] = deque()
        self._behind: dict[RelayProtocol, int] = {}  # members, and what they took when last seen
        self._stalled: set[RelayProtocol] = set()  # of those, the ones that took nothing
        self._hold: asyncio.TimerHandle | None = None
        self._hold_steps = 0

    def __len__(self) -> int:
        return len(self._members)

    # What members say: this is their sink

    def publish(self, client: RelayProtocol, opcode: int, payload: bytes) -> None:
        """Relay a member's message to all members, on every replica."""
        ledger = self._shared.ledger
        ledger.messages += 1
        ledger.received_bytes += len(payload)
        self._backplane.append(self.name, opcode, payload)
        for gate in (self._gate, self._office.gate):
            if gate.is_shut and gate.hold(client):
                ledger.publisher_pauses += 1

    def join(self, client: RelayProtocol) -> None:
        """Let a client in: it gets all that is published from now on."""
        self._members[client] = None
        self._changed()

    def leave(self, client: RelayProtocol) -> None:
        """Let a client go; what it was still owed is counted when its turn comes."""
        del self._members[client]
        self._changed()
        self._gate.release(client)
        self._office.gate.release(client)
        self._is_not_behind(client)
        if not self._members:
            self._office.forget(self)

    def fell_behind(self, client: RelayProtocol) -> None:
        """Take note that a member's socket is full."""
        self._behind[client] = 0

    def caught_up(self, client: RelayProtocol) -> None:
        """Take note that nothing waits for a member any more."""
        self._is_not_behind(client)

    def when_written(self, act: Callable[[], None]) -> None:
        """Call `act` once all that was published so far has been written."""
        if not self._queue:
            act()
            return
        self._open = None
        self._queue.append(act)

    # What the log says

    def deliver(self, entry: Entry) -> None:
        """Owe an entry of the log to the members of now."""
        batch = self._open or self._begin()
        size = batch.add(entry.opcode, entry.payload)
        self._gate.bytes += size
        self._office.gate.bytes += size
        self._shared.ledger.owed += len(batch.recipients)
        if batch.size >= self._batch_limit_bytes:
            self._open = None

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
                continue
            if not batch.next and self._must_hold():
                return True  # _end_hold schedules
            if self._open is batch:
                self._open = None
            if not self._write(batch, until):
                return False
            self._finish(batch)
        return True

    # Inside

    def _changed(self) -> None:
        self._snapshot = None
        self._open = None

    def _begin(self) -> Batch:
        if self._snapshot is None:
            self._snapshot = list(self._members)
        self._open = batch = Batch(self._snapshot, perf_counter())
        if not self._queue:
            self._office.schedule(self)
        self._queue.append(batch)
        return batch

    def _write(self, batch: Batch, until: float) -> bool:
        """Write a batch to its recipients until the time is over; tell whether all got it.

        No await, and no Python call but the write itself, for each client.
        """
        shared = self._shared
        data, recipients = batch.data, batch.recipients
        step = max(1, min(WRITES_BETWEEN_LOOKS, BYTES_BETWEEN_LOOKS // len(data)))
        shared.messages_in_hand = batch.messages
        position, end = batch.next, len(recipients)
        shared.withheld = 0
        started = position
        while position < end:
            some = recipients[position : position + step]
            position += len(some)
            writing = iter(some)
            while True:
                try:
                    for client in writing:
                        client.write(data)
                    break
                except RuntimeError:  # the transport was closed, connection_lost comes next
                    shared.withheld += 1
                    shared.ledger.drops[Drop.DISCONNECTED] += batch.messages
            if shared.fell_behind:
                self._note_backlogs(data, batch.messages)
            if perf_counter() > until:
                break
        batch.next = position
        taken = position - started - shared.withheld
        shared.messages_in_hand = 0
        shared.ledger.deliveries += taken * batch.messages
        shared.ledger.sent_bytes += taken * len(data)
        return position == end

    def _note_backlogs(self, data: bytes, messages: int) -> None:
        fell_behind = self._shared.fell_behind
        self._shared.withheld += len(fell_behind)
        for client in fell_behind:
            client.note_backlog(data, messages)
        fell_behind.clear()

    def _finish(self, batch: Batch) -> None:
        self._queue.popleft()
        self._office.written(perf_counter() - batch.opened_at)
        self._office.gate.drained(batch.size)
        self._gate.drained(batch.size)

    # A channel goes at the pace of half its members. Where at least half of them are behind it
    # is the publisher that is too fast: the next batch waits, HOLD_STEP_S * HOLD_STEPS at most,
    # for them to catch up, and the gate holds the publisher meanwhile. A member that took nothing
    # for a step is not slow but stalled, and nobody waits for it.

    def _must_hold(self) -> bool:
        if self._hold is None and self._hold_steps == 0 and self._half_is_behind():
            self._behind.update({client: client.sent_bytes for client in self._behind})
            self._hold = self._office.call_later(HOLD_STEP_S, self._look_again)
        elif self._hold is None:
            self._hold_steps = 0
        return self._hold is not None

    def _half_is_behind(self) -> bool:
        moving = len(self._behind) - len(self._stalled)
        return moving > 0 and moving * 2 >= len(self._members)

    def _look_again(self) -> None:
        self._hold_steps += 1
        for client, seen in self._behind.items():
            sent = client.sent_bytes
            if sent == seen:
                self._stalled.add(client)
            else:
                self._stalled.discard(client)
                self._behind[client] = sent
        if self._hold_steps == HOLD_STEPS or not self._half_is_behind():
            self._end_hold()
        else:
            self._hold = self._office.call_later(HOLD_STEP_S, self._look_again)

    def _is_not_behind(self, client: RelayProtocol) -> None:
        self._behind.pop(client, None)
        self._stalled.discard(client)
        if self._hold is not None and not self._half_is_behind():
            self._end_hold()

    def _end_hold(self) -> None:
        # The steps stay until the next batch began, so that it is not held again.
        assert self._hold is not None
        self._hold.cancel()
        self._hold = None
        self._hold_steps = max(1, self._hold_steps)
        self._office.schedule(self)
