"""Own the outages: when one begins and ends, and what becomes of messages in one.

Each heartbeat checks whether the stream can be reached. While none is read back in time there is an
*outage*. At its start the pending messages are abandoned. Until its end messages are delivered on
this replica alone, or rejected.

Knows no broker's protocol and no client.
"""

import asyncio
import logging
import time
from collections.abc import Sequence

from websocket_relay.backplane.confirmations import Confirmations
from websocket_relay.backplane.consumer import Consumer
from websocket_relay.backplane.heartbeat import Heartbeats
from websocket_relay.backplane.interface import BackplaneState, Identity
from websocket_relay.backplane.producer import AbandonedMessages, Producer
from websocket_relay.backplane.timings import Timings
from websocket_relay.counters import BackplaneCounters
from websocket_relay.messages import Message, Publisher

log = logging.getLogger(__name__)


class ResponsiveClock:
    """Monotonic time in seconds without the stalls of this process: it read no responses then."""

    def __init__(self) -> None:
        self._stalled_s = 0.0

    def now(self) -> float:
        """Return the time."""
        return time.monotonic() - self._stalled_s

    def exclude(self, stall_s: float) -> None:
        """Set the clock back by a stall that has just ended."""
        self._stalled_s += stall_s


class OutageMonitor:
    """The outages of one replica, and its heartbeats.

    Args:
        producer, consumer, heartbeats: of this replica.
        waits: for messages of this replica.
        counters: of the backplane.
        clock: of producer and consumer, too.
        timings: the intervals.
        address: address of the broker, without secrets; it is logged.
        relays_locally: whether messages are relayed on this replica alone during an outage; if not,
            their publishers are notified.

    Attributes:
        state, started, up: see `Backplane`.
    """

    def __init__(
        self,
        producer: Producer,
        consumer: Consumer,
        heartbeats: Heartbeats,
        waits: Confirmations,
        *,
        counters: BackplaneCounters,
        clock: ResponsiveClock,
        timings: Timings,
        address: str,
        relays_locally: bool,
    ) -> None:
        self._producer = producer
        self._consumer = consumer
        self._heartbeats = heartbeats
        self._waits = waits
        self._counters = counters
        self._clock = clock
        self._timings = timings
        self._address = address
        self._relays_locally = relays_locally
        self.state = BackplaneState.STARTING
        self.started, self.up = asyncio.Event(), asyncio.Event()
        self._heartbeat_read_at = 0.0  # by the clock
        self._confirmation_deadline = 0.0  # ends the waits for messages of earlier producer epochs

    async def run(self) -> None:
        """Send heartbeats and check for outages until cancelled."""
        interval_s = self._timings.monitor_interval_s
        checked_at = heartbeat_due = time.monotonic()
        while True:
            now = time.monotonic()
            if now - checked_at > 2 * interval_s:  # this process was stopped or starved
                self._clock.exclude(now - checked_at)
            checked_at = now
            if now > self._confirmation_deadline:
                self._waits.expire(self._producer.producer_id)
            if not self._heartbeats.sent_at:
                if now >= heartbeat_due:
                    self.send_heartbeat(now)
                    heartbeat_due = now + self._timings.heartbeat_interval_s
            elif self._is_overdue():
                if self._producer.heartbeat_confirmed_at:  # reader on a former primary
                    self._consumer.reconnect()
                if self.state is BackplaneState.OUTAGE:  # the latest heartbeat was lost
                    self.send_heartbeat(now)
                else:
                    self.start_outage(now)
            await asyncio.sleep(interval_s)

    def send_heartbeat(self, now: float) -> None:
        """Append a heartbeat."""
        self._producer.append_heartbeat(self._heartbeats.start_heartbeat(now))

    def _is_overdue(self) -> bool:
        """Return whether the broker takes too long to confirm an append, or to return an entry.

        Other entries of the stream are read before the heartbeat, and reads may be paused. That
        time does not count.
        """
        producer, consumer = self._producer, self._consumer
        if producer.in_flight_since:
            if self.state is BackplaneState.OUTAGE:
                return False
            # The append in flight may be the heartbeat itself, if it is read before its
            # confirmation.
            since = max(producer.in_flight_since, self._heartbeat_read_at)
        elif producer.heartbeat_confirmed_at and not consumer.is_paused:
            since = max(producer.heartbeat_confirmed_at, consumer.unread_seen_at)
        else:
            return False
        return self._clock.now() - since > self._timings.outage_after_s

    def on_heartbeat_read(self) -> None:
        """End the outage, if there is one: a heartbeat of this producer epoch was read back."""
        self._heartbeat_read_at = self._clock.now()
        if self.state is not BackplaneState.UP:
            log.info("backplane up")
            self.state = BackplaneState.UP
            self._producer.append_in_outage = None
            self._consumer.producers.is_current = True
            self.started.set()
            self.up.set()

    def start_outage(self, now: float) -> None:
        """Abandon pending messages: reject them, or deliver them on this replica alone.

        Messages that are confirmed and unread are awaited for `confirmation_timeout_s`.
        """
        mode = "local" if self._relays_locally else "reject"
        log.error("backplane outage", extra={"broker": self._address, "on_outage": mode})
        self._waits.expire(self._producer.producer_id)
        self._counters.outages += 1
        self.state = BackplaneState.OUTAGE
        self.started.set()
        self.up.clear()
        producer, consumer = self._producer, self._consumer
        producer.append_in_outage = self._append_in_outage
        epoch = producer.producer_id, producer.first_sequence
        next_unread = consumer.producers.next_sequence(*epoch)
        abandoned = producer.abandon(next_unread)
        if self._relays_locally:
            consumer.skip_from(abandoned.producer, abandoned.sequence)
        self._end_waits(abandoned, is_read=next_unread >= abandoned.sequence)
        self._confirmation_deadline = now + self._timings.confirmation_timeout_s
        self.send_heartbeat(now)

    def _end_waits(self, abandoned: AbandonedMessages, *, is_read: bool) -> None:
        """Deliver or reject messages, and end the waits for them.

        Args:
            abandoned: the messages.
            is_read: whether all messages before them were read.
        """
        producer, sequence, packets = abandoned
        waits = self._waits.pop_abandoned(producer, sequence)
        if not is_read:
            # Waits that are added from now on end after the messages of this producer epoch, too.
            # One may be that of a client that closes because its message is rejected below.
            self._waits.add(producer, sequence, lambda _: None)
            for wait in waits:
                if wait.awaits_all:
                    self._waits.add_to_latest(wait.callback)
        ending = Confirmations(wait for wait in waits if is_read or not wait.awaits_all)
        for packet in packets:
            count = len(packet.payloads)
            if self._relays_locally:
                messages = zip(packet.kinds, packet.payloads, strict=True)
                self._consumer.deliver_locally(packet.channels, messages, packet.identities())
                ending.on_delivered(producer, sequence, count, self._consumer.position)
            else:
                self._counters.unavailable += count
                for publisher in packet.publishers:
                    publisher.fail_publish(is_unconfirmed=packet.is_sent)
            sequence += count
        ending.expire(self._producer.producer_id)

    def _append_in_outage(
        self,
        channel: str,
        messages: Sequence[Message],
        payload_bytes: int,
        publisher: Publisher,
        identity: Identity | None,
    ) -> None:
        count = len(messages)
        if self._relays_locally:
            identities = None if identity is None else identity.of_each()
            self._consumer.deliver_locally([channel] * count, messages, identities)
        else:
            self._counters.unavailable += count
            publisher.fail_publish(is_unconfirmed=False)
