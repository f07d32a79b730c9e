"""Deliver the events to the receiver, where this replica is the one to do so.

One request is in flight at a time, so the receiver is sent the events in their order. A batch that
is not accepted is sent again, after growing pauses. Knows no channel and no client.
"""

import asyncio
import logging
import time
from collections.abc import Callable, Sequence
from typing import Protocol

from websocket_relay.backoff import backoff
from websocket_relay.cluster.control_log import ControlLog
from websocket_relay.counters import Values
from websocket_relay.hooks.duty import Duty
from websocket_relay.hooks.events import NO_EVENT, Event, encode
from websocket_relay.hooks.pending import PendingEvents
from websocket_relay.outgoing_http import CallAnswer, CallError

log = logging.getLogger(__name__)

MAX_BATCH_EVENTS = 500
MAX_BATCH_BYTES = 1_048_576
"""Size of a request at most, unless a single event is larger."""

SLICE_BYTES = 16_384
"""Bytes that are encoded before the event loop runs other tasks."""

TICK_S = 0.2
"""Interval of `hooks.done`: what was accepted in it is delivered twice if this replica ends."""

CHECKPOINT_S = 5.0
"""The log never contains less than one `hooks.done`, though it is trimmed."""

FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.25, 30.0

ACCEPTED, REJECTED, UNANSWERED = "accepted", "rejected", "unanswered"
MAX_FAILURE_TEXTS = 8

HEAD, TAIL = b'{"events":[', b"]}"


class Receiver(Protocol):
    """Accepts requests."""

    async def post(self, body: bytes) -> CallAnswer:
        """Send a JSON body; return the answer, whatever its status.

        Raises:
            CallError: there was none in time.
        """


class Batch:
    """The next events, as one request.

    Attributes:
        body: JSON.
        events: how many it has.
        last: the id of the last one.
    """

    def __init__(self) -> None:
        self.body = bytearray(HEAD)
        self.events = 0
        self.last = NO_EVENT

    def fits(self, size: int) -> bool:
        """Return whether so many bytes fit: the first event always does."""
        return not self.events or len(self.body) + size + len(TAIL) <= MAX_BATCH_BYTES


class HookDelivery:
    """The delivery of one replica.

    Args:
        pending: the events.
        duty: whether this replica delivers.
        control: the control entries.
        receiver: of the events.
        is_alone: whether what is not delivered at the end is lost.
        when_settled: calls back once all that was appended is read.
        pauses_s: the first and the longest pause after failures.
        clock: monotonic time in seconds.

    Attributes:
        started: set once all that happens is delivered: nothing is published before that.
    """

    def __init__(
        self,
        pending: PendingEvents,
        duty: Duty,
        control: ControlLog,
        receiver: Receiver,
        *,
        is_alone: bool,
        when_settled: Callable[[Callable[[], None]], None],
        pauses_s: tuple[float, float] = (FIRST_PAUSE_S, LONGEST_PAUSE_S),
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._pending = pending
        self._duty = duty
        self._control = control
        self._receiver = receiver
        self._is_alone = is_alone
        self._when_settled = when_settled
        self._pauses_s = pauses_s
        self._clock = clock
        self._pauses = backoff(*pauses_s)
        self._resume_at = 0.0  # by the clock: the end of the pause after a failure
        self._accepted = NO_EVENT  # the last one that this replica has delivered
        self._is_done_due = False
        self._checkpoint_at = 0.0
        self._texts: set[str] = set()  # of the failures since the last success
        self._awake = asyncio.Event()
        self._attempted = asyncio.Event()
        self._delivered = 0
        self._attempts = dict.fromkeys((ACCEPTED, REJECTED, UNANSWERED), 0)
        pending.changed = self._on_changed
        self.started = asyncio.Event()
        self._on_changed()

    async def run(self) -> None:
        """Deliver events until cancelled."""
        async with asyncio.TaskGroup() as group:
            group.create_task(self._tick())
            group.create_task(self._deliver())

    def metrics(self) -> Values:
        """Return the values of the metrics of webhooks."""
        queue = self._pending.queue
        oldest = queue.oldest
        at = oldest.at if oldest is not None else 0
        return {
            "hook_events": self._delivered,
            "hook_attempts": dict(self._attempts),
            "hook_events_dropped": self._pending.dropped,
            "hook_pending_events": len(queue),
            "hook_pending_bytes": queue.bytes,
            "hook_pending_seconds": max(0.0, time.time() - at) if at else 0.0,
        }

    def _on_changed(self) -> None:
        self._awake.set()
        if self._pending.is_started:
            self.started.set()

    # What is due

    async def _tick(self) -> None:
        while True:
            self._duty.tick()
            self._append_done()
            await asyncio.sleep(TICK_S)

    def _append_done(self) -> None:
        """Append what was accepted. If that is not known, repeat what was read, as a checkpoint."""
        if self._is_alone or not self._duty.is_own():
            return
        now = self._clock()
        if self._is_done_due or now >= self._checkpoint_at:
            self._is_done_due = False
            self._checkpoint_at = now + CHECKPOINT_S
            up_to = max(self._accepted, self._pending.done)
            self._control.append("hooks.done", {"up_to": str(up_to)}, failed=self._repeat_done)

    def _repeat_done(self) -> None:
        self._is_done_due = True

    # Delivery

    async def _deliver(self) -> None:
        while True:
            pause_s = self._resume_at - self._clock()
            if pause_s > 0 or not self._has_next():
                await _wait_for(self._awake, pause_s if pause_s > 0 else TICK_S)
            else:
                await self._deliver_batch()

    def _has_next(self) -> bool:
        return self._duty.is_own() and bool(self._next(1))

    def _next(self, count: int) -> Sequence[Event]:
        return self._pending.queue.following(self._accepted, count)

    async def _deliver_batch(self) -> None:
        """Send the next events once."""
        batch = await encode_batch(self._next(MAX_BATCH_EVENTS))
        if not batch.events:  # another replica has delivered them
            return
        result, problem = await self._attempt(bytes(batch.body))
        self._attempts[result] += 1
        if result == ACCEPTED:
            self._on_accepted(batch)
        else:
            self._on_failure(problem)
        self._attempted.set()

    async def _attempt(self, body: bytes) -> tuple[str, str]:
        """Return the result of a request, and what the problem is."""
        try:
            status, _ = await self._receiver.post(body)
        except CallError as error:
            return UNANSWERED, str(error)
        except Exception as error:  # whatever a receiver answers, it does not end the relay
            log.exception("hooks not delivered")
            return UNANSWERED, type(error).__name__
        return (ACCEPTED, "") if 200 <= status < 300 else (REJECTED, f"status {status}")

    def _on_accepted(self, batch: Batch) -> None:
        if self._texts:
            self._texts.clear()
            log.info("hooks recovered")
        self._pauses = backoff(*self._pauses_s)
        self._delivered += batch.events
        self._accepted = max(self._accepted, batch.last)
        self._is_done_due = True
        if self._is_alone:
            self._pending.queue.remove_through(self._accepted)

    def _on_failure(self, problem: str) -> None:
        if problem not in self._texts and len(self._texts) < MAX_FAILURE_TEXTS:
            self._texts.add(problem)
            log.warning("hooks failed", extra={"error": problem})
        self._resume_at = self._clock() + next(self._pauses)

    # Shutdown

    async def drain(self, until: float) -> None:
        """Deliver what is pending, if this replica delivers; then leave it to the others.

        If another one can do so, the first failure ends it.

        Args:
            until: when to end, by the event loop's clock.
        """
        if self._duty.is_own():
            try:
                async with asyncio.timeout_at(until):
                    await self._drain()
            except TimeoutError:
                pass
            self._is_done_due = self._accepted > self._pending.done
            if self._is_done_due:
                self._append_done()
        self._duty.resign()
        if self._is_alone and (lost := len(self._pending.queue)):
            self._pending.dropped += lost
            log.error("hook events lost", extra={"events": lost})

    async def _drain(self) -> None:
        settled = asyncio.Event()
        self._when_settled(settled.set)
        await settled.wait()
        last = self._pending.queue.newest_id
        self._pauses, self._resume_at = backoff(*self._pauses_s), 0.0
        while last is not None and last > self._accepted and self._duty.is_own():
            self._awake.set()
            await _wait_for(self._attempted, TICK_S)
            if self._resume_at > self._clock() and self._duty.has_successor():
                return


async def _wait_for(event: asyncio.Event, seconds: float) -> None:
    """Wait until an event is set after now, so long at most."""
    event.clear()
    try:
        async with asyncio.timeout(seconds):
            await event.wait()
    except TimeoutError:
        pass


async def encode_batch(events: Sequence[Event]) -> Batch:
    """Return as many of the next events as fit into one request, in slices of time."""
    batch = Batch()
    body, rest_bytes = batch.body, SLICE_BYTES
    for event in events:
        end = len(body)
        if not batch.fits(event.payload_bytes):
            break
        body += b"," if batch.events else b""
        for piece in encode(event):
            body += piece
            rest_bytes -= len(piece)
            if rest_bytes < 0:
                rest_bytes = SLICE_BYTES
                await asyncio.sleep(0)
        if not batch.fits(0):
            del body[end:]
            break
        batch.events += 1
        batch.last = event.event_id
    body += TAIL
    return batch
