"""Own the channels of a replica: create and remove them, and route log entries to them.

All channels share one time slicer for their writes. There is no task, queue or timer per
connection. Knows no HTTP, no broker's library and no admission policy.
"""

import asyncio
from collections.abc import Callable, Sequence

from websocket_relay.backplane.interface import Backplane, LogEntry, Position
from websocket_relay.channels.channel import Channel
from websocket_relay.channels.history import History
from websocket_relay.channels.one_shot_publisher import OneShotPublisher
from websocket_relay.channels.recovery import Recovery, ReplayRequest
from websocket_relay.wire.connection import Connection
from websocket_relay.wire.context import ConnectionContext
from websocket_relay.wire.time_slicer import SlicedWork, TimeSlicer

BATCHES_PER_BACKLOG = 4
"""How many full batches fit into one client's backlog: one batch alone never closes a client."""


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
        self._time_slicer = TimeSlicer(backplane.loop_iterations)
        self._history = history
        backplane.consume(self._deliver, self._on_gap)

    def __len__(self) -> int:
        """Return the number of channels."""
        return len(self._channels)

    def has_channel_capacity(self, name: str) -> bool:
        """Return whether a client may join a channel without exceeding `max_channels`."""
        return name in self._channels or len(self._channels) < self._max_channels

    def subscribe(
        self, name: str, client: Connection, replay_request: ReplayRequest | None = None
    ) -> None:
        """Subscribe a client to a channel; the first subscription creates the channel.

        Args:
            name: of the channel.
            client: the connection to subscribe.
            replay_request: messages to send before the client joins; None joins at once.
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
        if replay_request is None:
            channel.add_member(client)
            client.attach_sink(channel)
            return
        client.sends_positions = replay_request.sends_positions
        recovery = Recovery(
            client, channel, replay_request, self, self._history, self._deflate_from_bytes
        )
        client.attach_sink(recovery)
        recovery.start_replay()

    def create_one_shot_publisher(self, name: str) -> OneShotPublisher:
        """Return a publisher to a channel for a caller that has no connection in it."""
        channel = self._channels.get(name)
        shared = self.shared
        return OneShotPublisher(
            (
                shared.pending_fan_out,
                shared.pending_appends,
                *([channel.high_water_mark] if channel is not None else []),
            )
        )

    async def publish(
        self, name: str, messages: Sequence[tuple[int, bytes]], publisher: OneShotPublisher
    ) -> Position:
        """Publish messages from a caller that has no connection in the channel.

        Args:
            name: of the channel.
            messages: opcodes and payloads.
            publisher: from `create_one_shot_publisher`, for the same channel.

        Returns:
            The position of the last message, once it is delivered on this replica; the newest
            position in the history if there are no messages.

        Raises:
            RefusedError: the messages could not be relayed.
        """
        if not messages:
            return self._history.newest
        counters = self.shared.counters
        counters.messages += len(messages)
        counters.received_bytes += sum(len(payload) for _, payload in messages)
        return await publisher.publish_all(self.backplane, name, messages)

    # ChannelHost

    def schedule(self, work: SlicedWork) -> None:
        """Add work to the time slicer. It must not be scheduled already."""
        self._time_slicer.schedule_work(work)

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

    def _deliver(self, entry: LogEntry) -> None:
        self._history.add(entry)
        channel = self._channels.get(entry.channel)
        if channel is not None:
            channel.deliver(entry)
            pending = self.shared.pending_fan_out
            if pending.is_exceeded:
                pending.pause_publisher(self.backplane)
