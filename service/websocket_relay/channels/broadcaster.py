"""Own the channels: who is in which, what the log says to them, and whose turn it is to write.

All channels share the time there is for writing. No task, queue or timer per connection.
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
        shared: what all connections share.
        max_channels: channels at a time.
        pending_limit_bytes: publishers of a channel are held while more waits for its fan-out.
        deflate_from_bytes: shorter messages are not compressed.
        history: what is kept for those who come back.
        written: told, for each batch, the seconds from its first message to its last write.
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
        self.written = written
        self._max_channels = max_channels
        self._pending_limit_bytes = pending_limit_bytes
        self._deflate_from_bytes = deflate_from_bytes
        self._channels: dict[str, Channel] = {}
        self._turns = TimeSlicer(backplane.turns)
        self._history = history
        backplane.tail(self._deliver, self._lose)

    def __len__(self) -> int:
        """How many channels there are."""
        return len(self._channels)

    def has_room(self, name: str) -> bool:
        """Tell whether a client may join a channel without there being too many of them."""
        return name in self._channels or len(self._channels) < self._max_channels

    def subscribe(self, name: str, client: Connection, wish: ReplayRequest | None = None) -> None:
        """Let a client into a channel, which comes to be with its first member.

        Args:
            wish: what it wants to hear first.
        """
        channel = self._channels.get(name)
        if channel is None:
            channel = self._channels[name] = Channel(
                name,
                self,
                pending_limit_bytes=self._pending_limit_bytes,
                batch_limit_bytes=self._pending_limit_bytes // BATCHES_PER_BACKLOG,
                deflate_from_bytes=self._deflate_from_bytes,
            )
        if wish is None:
            channel.join(client)
            client.hand_over(channel)
            return
        client.tells_positions = wish.tells_positions
        replay = Recovery(client, channel, wish, self, self._history, self._deflate_from_bytes)
        client.hand_over(replay)
        replay.begin()

    def courier(self, name: str) -> OneShotPublisher:
        """Return one for somebody who is no client of a channel and wants to publish there."""
        channel = self._channels.get(name)
        shared = self.shared
        return OneShotPublisher(
            (shared.pending, shared.appends, *([channel.gate] if channel is not None else []))
        )

    async def publish(
        self, name: str, said: Sequence[tuple[int, bytes]], courier: OneShotPublisher
    ) -> Position:
        """Relay what somebody says who is no client: opcodes and payloads.

        Returns:
            Where the last of it stands, once it is there; of nothing, where a message stood.

        Raises:
            RefusedError: it could not be relayed.
        """
        if not said:
            return self._history.newest
        ledger = self.shared.ledger
        ledger.messages += len(said)
        ledger.received_bytes += sum(len(payload) for _, payload in said)
        return await courier.deliver(self.backplane, name, said)

    # What channels ask

    def schedule(self, work: SlicedWork) -> None:
        """Give somebody who is not in the queue turns to write."""
        self._turns.add(work)

    def call_later(self, delay_s: float, act: Callable[[], None]) -> object:
        """Call `act` after a while."""
        return asyncio.get_running_loop().call_later(delay_s, act)

    def forget(self, channel: Channel) -> None:
        """Let go of a channel that has no members."""
        if self._channels.get(channel.name) is channel:
            del self._channels[channel.name]

    # Inside

    def _lose(self, position: Position) -> None:
        """Take note that something before a position may have been said and not delivered."""
        if position <= self._history.floor:  # told already
            return
        self._history.begin_after(position)
        for channel in list(self._channels.values()):
            channel.tell({"type": "gap", "position": str(position)})

    def _deliver(self, entry: LogEntry) -> None:
        self._history.add(entry)
        channel = self._channels.get(entry.channel)
        if channel is not None:
            channel.deliver(entry)
            pending = self.shared.pending
            if pending.is_shut:
                pending.hold(self.backplane)
