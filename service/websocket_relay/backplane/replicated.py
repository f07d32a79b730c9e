"""Keep the log on a broker: append to its stream and consume it. Owns the total order.

Every message of this replica is appended to the stream and read back from it, like the messages of
other replicas; there is no second delivery path. `producer` appends, `consumer` reads and delivers,
`heartbeat` and `outage` watch over both. Here they are connected, and waits for messages of this
replica are kept until the consumer has read them.

Knows no broker's protocol and no client.
"""

import asyncio
from collections.abc import Callable

from websocket_relay.backplane.codec import PRODUCER_EPOCHS
from websocket_relay.backplane.confirmations import Confirmations, OnPosition
from websocket_relay.backplane.consumer import Consumer
from websocket_relay.backplane.heartbeat import TIMESTAMP, Heartbeats
from websocket_relay.backplane.interface import BackplaneState, OnHeartbeat, Position
from websocket_relay.backplane.outage import OutageMonitor, ResponsiveClock
from websocket_relay.backplane.producer import MAX_PACKET_BYTES, PendingBytes, Producer
from websocket_relay.backplane.stream import Retries, Stream
from websocket_relay.backplane.timings import Timings
from websocket_relay.cancellation import run_cancellable
from websocket_relay.counters import BackplaneCounters


class ReplicatedBackplane:
    """The log of one replica, on a broker's stream.

    Args:
        stream: the broker's stream.
        address: address of the broker, without secrets; it is logged.
        pending: bound on the bytes of pending appends.
        relays_locally: whether messages are relayed on this replica alone during an outage; if not,
            their publishers are notified.
        max_message_bytes: message limit of the clients of any replica.
        describe: returns the description of this replica for the others, in a few bytes.
        observe_append: receives the duration of each append in seconds.
        observe_lag: receives the seconds from the append of a heartbeat until it is read back.
        timings: the intervals and time limits.

    Attributes:
        stream, producer, consumer, outages: the parts.
        on_heartbeat: see `interface.Backplane`.
    """

    is_local = False

    def __init__(
        self,
        stream: Stream,
        *,
        address: str,
        pending: PendingBytes,
        relays_locally: bool,
        max_message_bytes: int,
        describe: Callable[[], bytes],
        observe_append: Callable[[float], None],
        observe_lag: Callable[[float], None],
        timings: Timings,
    ) -> None:
        self.counters = BackplaneCounters()
        self.relays_locally = relays_locally
        self.stream = stream
        self._waits = Confirmations()
        clock = ResponsiveClock()
        self._heartbeats = Heartbeats(describe, observe_lag, timings.replica_timeout_s)
        self.producer = Producer(
            stream,
            pending,
            Retries("append", address, timings),
            observe_append=observe_append,
            append_timeout_s=timings.append_timeout_s,
            clock=clock.now,
        )
        self.consumer = Consumer(
            stream,
            Retries("read", address, timings),
            self.counters,
            self._waits,
            self._on_heartbeat,
            self._is_own,
            max_packet_bytes=max_message_bytes + MAX_PACKET_BYTES,
            clock=clock.now,
        )
        self.outages = OutageMonitor(
            self.producer,
            self.consumer,
            self._heartbeats,
            self._waits,
            counters=self.counters,
            clock=clock,
            timings=timings,
            address=address,
            relays_locally=relays_locally,
        )
        # The parts' own, without a call that passes on to them.
        self.append = self.producer.append
        self.flush = self.producer.flush
        self.consume = self.consumer.consume
        self.pause_reading = self.consumer.pause_reading
        self.resume_reading = self.consumer.resume_reading
        self.replicas = self._heartbeats.replicas
        self.started, self.up = self.outages.started, self.outages.up
        self.on_heartbeat: OnHeartbeat = lambda _position, _description: None

    @property
    def state(self) -> BackplaneState:
        """Whether the stream can be appended to and read."""
        return self.outages.state

    @property
    def is_relaying_alone(self) -> bool:
        """Whether the entries that are delivered now are in no log."""
        return self.consumer.is_relaying_alone

    @property
    def position(self) -> Position:
        """The position up to which everything has been delivered here."""
        position = self.consumer.position
        # An entry without messages has no position that clients could send back.
        return position if position.index >= 0 else position._replace(index=0).before()

    @property
    def complete_until(self) -> float:
        """When the latest heartbeat that was read back was sent: earlier entries were read."""
        return self._heartbeats.complete_until

    @property
    def unconfirmed_messages(self) -> int:
        """The count of messages whose append is pending or in flight."""
        return self.producer.unconfirmed_messages

    def when_delivered(self, callback: OnPosition) -> None:
        """Call `callback` once the message that was appended last is read back, or can't be."""
        if self.state is BackplaneState.OUTAGE:  # the message was delivered here alone, or rejected
            callback(self.position if self.relays_locally else None)
        else:
            self._waits.add(self.producer.producer_id, self.producer.following, callback)

    def when_settled(self, callback: Callable[[], None]) -> None:
        """Call `callback` once each message appended so far is read back or abandoned."""
        own, following = self.producer.producer_id, self.producer.following
        next_unread = self.consumer.producers.next_sequence(own, self.producer.first_sequence)
        if next_unread < following:
            self._waits.add(own, following, lambda _: callback(), awaits_all=True)
        elif self._waits:  # for messages of an earlier producer epoch
            self._waits.add_to_latest(lambda _: callback())
        else:
            callback()

    async def run(self) -> None:
        """Append, read and send heartbeats until cancelled."""
        try:
            async with asyncio.TaskGroup() as group:
                for start in (self.producer.run, self.consumer.run, self.outages.run):
                    group.create_task(run_cancellable(start))
        finally:
            await self.stream.close()

    def _is_own(self, producer: int) -> bool:
        """Return whether a producer is this replica, in any producer epoch."""
        return producer // PRODUCER_EPOCHS == self.producer.producer_id // PRODUCER_EPOCHS

    def _on_heartbeat(self, producer: int, heartbeat: bytes) -> None:
        """Record a heartbeat that was read."""
        self._heartbeats.record_heartbeat(producer // PRODUCER_EPOCHS, heartbeat)
        self.on_heartbeat(self.consumer.position, heartbeat[TIMESTAMP.size :])
        if producer == self.producer.producer_id:
            self._heartbeats.record_own_heartbeat(heartbeat)
            self.outages.on_heartbeat_read()
