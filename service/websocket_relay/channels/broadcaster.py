"""Own the channels of a replica: create and remove them, and route log entries to them.

All channels share one time slicer for their writes. There is no task, queue or timer per
connection. Knows no HTTP, no broker's library and no admission policy.
"""

import asyncio
from collections.abc import Callable, Sequence

from websocket_relay.backplane.interface import Backplane, Identities, LogEntry, Position
from websocket_relay.channels.channel import Channel
from websocket_relay.channels.history import History
from websocket_relay.channels.recovery import Recovery, ReplayRequest
from websocket_relay.messages import Message, Publisher
from websocket_relay.outcomes import Refusal, RefusedError
from websocket_relay.wire.connection import Connection
from websocket_relay.wire.context import ConnectionContext
from websocket_relay.wire.delivery_format import DeliveryFormat
from websocket_relay.wire.time_slicer import TimeSlicer

BATCHES_PER_BACKLOG = 4
"""How many full batches fit into one client's backlog: one batch alone never closes a client."""

REST_TURNS = 8
"""Iterations of the event loop between two slices of fan-out, if messages pass a broker. They wake
some tasks one after the other, of the backplane and of the broker's library. With a lower value,
fan-outs to full channels delay messages, so that fewer of them leave together: at 4, one in five
with nats-py."""


class Broadcaster:
    """All channels of one replica.

    Args:
        backplane: the log.
        shared: the context that all connections share.
        max_channels: maximum number of channels at a time.
        pending_limit_bytes: publishers of a channel are paused while more than this is pending
            fan-out.
        deflate_from_bytes: shorter messages are not compressed.
        history: the recent messages for clients that resume or request history.
        written: called for each batch with the seconds from its first message to its last write.
    """

    def __init__(
        self,
        *,
        backplane: Backplane,
        shared: ConnectionContext,
        max_channels: int,
        pending_limit_bytes: int,
        deflate_from_bytes: int,
        history: History,
        written: Callable[[float], None],
    ) -> None:
        self.backplane = backplane
        self.shared = shared
        self.observe_delivery = written
        self._max_channels = max_channels
        self.pending_limit_bytes = pending_limit_bytes
        self._deflate_from_bytes = deflate_from_bytes
        self._channels: dict[str, Channel] = {}
        self.schedule = TimeSlicer(0 if backplane.is_local else REST_TURNS).schedule_work
        self._history = history
        backplane.consume(self._deliver, self._on_gap)

    def metrics(self) -> dict[str, int]:
        """Return the values of the metrics of the channels."""
        return {"channels": len(self._channels)}

    def has_channel_capacity(self, name: str) -> bool:
        """Return whether a client may join a channel without exceeding `max_channels`."""
        return name in self._channels or len(self._channels) < self._max_channels

    def subscribe(
        self,
        name: str,
        client: Connection,
        delivery_format: DeliveryFormat,
        replay_request: ReplayRequest | None = None,
    ) -> None:
        """Subscribe a client to a channel; the first subscription creates the channel.

        Args:
            name: of the channel.
            client: the connection to subscribe.
            delivery_format: how it is sent messages. With positions, it is sent a welcome, too.
            replay_request: messages to send before the client joins; None: none.
        """
        channel = self._channels.get(name)
        if channel is None:
            channel = self._channels[name] = Channel(
                name,
                self,
                pending_limit_bytes=self.pending_limit_bytes,
                batch_limit_bytes=self.pending_limit_bytes // BATCHES_PER_BACKLOG,
                deflate_from_bytes=self._deflate_from_bytes,
            )
        client.delivery_format = delivery_format
        if replay_request is None:
            channel.add_member(client)
            client.attach_sink(channel)
            return
        recovery = Recovery(
            client, channel, replay_request, self, self._history, self._deflate_from_bytes
        )
        client.attach_sink(channel)
        recovery.start_replay()

    async def wait_for_capacity(self, name: str) -> None:
        """Return when no high-water mark is exceeded; publish then, before any other await."""
        channel = self._channels.get(name)
        marks = channel.publish_limits if channel is not None else self.shared.publish_limits
        # Checked again after each wait: publishers that resume earlier may exceed a mark.
        while exceeded := next((mark for mark in marks if mark.is_exceeded), None):
            await exceeded.wait_below()

    async def publish(self, name: str, messages: Sequence[Message]) -> Position:
        """Publish messages from a caller that has no connection in the channel.

        Returns:
            The position of the last message, once it is delivered on this replica; the newest
            position in the history if there are no messages.

        Raises:
            RefusedError: the messages could not be relayed.
        """
        if not messages:
            return self._history.newest
        results: asyncio.Queue[Position | Refusal | None] = asyncio.Queue()
        self.append(name, messages, AwaitedPublisher(results))
        self.backplane.when_delivered(results.put_nowait)
        result = await results.get()
        if isinstance(result, Position):
            return result
        # None: the broker accepted the messages, and did not deliver them.
        raise RefusedError(result or Refusal.UNCONFIRMED)

    # ChannelHost

    def append(self, channel: str, messages: Sequence[Message], publisher: Publisher) -> None:
        """Append messages to the log, and count them: the one way in."""
        payload_bytes = 0
        for _, payload in messages:
            payload_bytes += len(payload)
        self.shared.counters.messages += len(messages)
        self.shared.counters.received_bytes += payload_bytes
        self.backplane.append(channel, messages, payload_bytes, publisher)

    def call_later(self, delay_s: float, callback: Callable[[], None]) -> object:
        """Call `callback` after `delay_s` seconds."""
        return asyncio.get_running_loop().call_later(delay_s, callback)

    def remove_channel(self, channel: Channel) -> None:
        """Remove a channel that has no members."""
        if self._channels.get(channel.name) is channel:
            del self._channels[channel.name]

    # Inside

    def _on_gap(self, position: Position) -> None:
        """Record and announce that messages up to a position may be lost."""
        if position <= self._history.floor:  # announced already
            return
        self._history.record_gap(position)
        for channel in list(self._channels.values()):
            channel.send_notice({"type": "gap", "position": str(position)})

    def _deliver(self, entries: Sequence[LogEntry], identities: Identities | None) -> None:
        for entry in entries:
            self._history.add(entry)
            channel = self._channels.get(entry.channel)
            if channel is not None:
                channel.deliver(entry)
        pending = self.shared.pending_fan_out
        if pending.is_exceeded:
            pending.pause_publisher(self.backplane)


class AwaitedPublisher:
    """The publisher of messages whose result is awaited.

    Args:
        results: receives the refusal, if the messages are not relayed.
    """

    def __init__(self, results: "asyncio.Queue[Position | Refusal | None]") -> None:
        self._results = results

    def fail_publish(self, *, is_unconfirmed: bool) -> None:
        """Report that the messages were not relayed, or that this is unknown."""
        self._results.put_nowait(
            Refusal.UNCONFIRMED if is_unconfirmed else Refusal.BACKPLANE_UNAVAILABLE
        )
