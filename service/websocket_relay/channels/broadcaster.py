"""Own the channels of a replica: create and remove them, and route log entries to them.

All channels share one time slicer for their writes. There is no task, queue or timer per
connection. Knows no HTTP, no broker's library and no admission policy.
"""

import asyncio
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from itertools import chain
from typing import NamedTuple, Protocol

from websocket_relay.backplane.interface import (
    Backplane,
    Identities,
    Identity,
    LogEntry,
    Position,
    Source,
)
from websocket_relay.channels.channel import Channel
from websocket_relay.channels.history import History
from websocket_relay.channels.publications import Decision, Publications, Verdict, content_digest
from websocket_relay.channels.recovery import Recovery, ReplayListener, ReplayRequest
from websocket_relay.messages import CONTROL, Message, Publisher
from websocket_relay.outcomes import Refusal, RefusedError
from websocket_relay.wire.connection import Connection
from websocket_relay.wire.context import ConnectionContext
from websocket_relay.wire.delivery_format import DeliveryFormat
from websocket_relay.wire.flow_control import HighWaterMark
from websocket_relay.wire.time_slicer import TimeSlicer

BATCHES_PER_BACKLOG = 4
"""How many full batches fit into one client's backlog: one batch alone never closes a client."""

REST_TURNS = 8
"""Iterations of the event loop between two slices of fan-out, if messages pass a broker. They wake
some tasks one after the other, of the backplane and of the broker's library. With a lower value,
fan-outs to full channels delay messages, so that fewer of them leave together: at 4, one in five
with nats-py."""


IDENTIFIED_A_TURN = 100
"""Messages with a source of their own that are appended in one turn of the event loop: each takes
some 30 µs. A request that is interrupted between two slices is completed by its repeat."""

NO_PUBLISHERS: Mapping[Position, Connection] = {}


class Publish(NamedTuple):
    """A message for a channel, among those for others.

    Attributes:
        channel: name of the channel.
        message: the message.
        source: of a request with an Idempotency-Key, see `publications.line_source`; empty: it has
            none.
    """

    channel: str
    message: Message
    source: bytes = b""


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
        publications: the identified publishes in the log.
        written: called for each batch with the seconds from its first message to its last write.

    Attributes:
        attendance: of clients in channels; None: nothing asks.
        on_control: receives the entries that replicas write for each other.
        on_message: receives each message that is relayed; None: nothing asks.
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
        publications: Publications,
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
        self.publications = publications
        self._publishers: dict[bytes, LocalPublisher] = {}  # by source
        self._combined: dict[str, list[Channel]] = {}  # by the name of each of their channels
        self.attendance: Attendance | None = None
        self.on_control: Callable[[LogEntry], None] = lambda _: None
        self.on_message: Callable[[LogEntry], None] | None = None
        self.gap_listeners: list[Callable[[], None]] = []
        backplane.consume(self._deliver, self._on_gap)

    def metrics(self) -> dict[str, int]:
        """Return the values of the metrics of the channels."""
        return {"channels": len(self._channels)}

    def has_channel_capacity(self, names: Sequence[str]) -> bool:
        """Return whether a client may join a channel, or a combined one, within `max_channels`.

        Args:
            names: of the channels; none: the client joins later.
        """
        is_new = bool(names) and _key_of(names) not in self._channels
        return not is_new or len(self._channels) < self._max_channels

    def channel(self, name: str) -> Channel:
        """Return a channel; create it if there is none."""
        channel = self._channels.get(name)
        if channel is None:
            channel = self._create_channel(name, (name,))
            channel.limit_publishers(self._marks_of_combined(name))
        return channel

    def combined_channel(self, names: Sequence[str]) -> Channel:
        """Return the channel that has the messages of several others, in their one order.

        Its members are sent each message with its channel's name. It has no publishers.
        """
        if len(names) == 1:
            return self.channel(names[0])
        key = _key_of(names)
        channel = self._channels.get(key)
        if channel is None:
            channel = self._create_channel(key, names)
            for name in names:
                self._combined.setdefault(name, []).append(channel)
                self._on_combined_changed(name)
        return channel

    def _marks_of_combined(self, name: str) -> Sequence[HighWaterMark]:
        """Return the high-water marks of the channels that combine a channel with others."""
        return [combined.high_water_mark for combined in self._combined.get(name, ())]

    def _on_combined_changed(self, name: str) -> None:
        channel = self._channels.get(name)
        if channel is not None:
            channel.limit_publishers(self._marks_of_combined(name))

    def _create_channel(self, key: str, names: Sequence[str]) -> Channel:
        channel = self._channels[key] = Channel(
            key,
            names,
            self,
            pending_limit_bytes=self.pending_limit_bytes,
            batch_limit_bytes=self.pending_limit_bytes // BATCHES_PER_BACKLOG,
            deflate_from_bytes=self._deflate_from_bytes,
        )
        return channel

    def subscribe(
        self,
        channel: Channel,
        client: Connection,
        delivery_format: DeliveryFormat,
        replay_request: ReplayRequest | None,
        listener: ReplayListener | None = None,
    ) -> None:
        """Subscribe a client to a channel.

        Args:
            channel: the channel.
            client: the connection to subscribe.
            delivery_format: how it is sent messages.
            replay_request: messages to send before the client joins; None: none.
            listener: notifies the client; None: it is sent no notices.
        """
        if self.attendance is not None:
            self.attendance.on_subscribed(channel.names, client)
        if replay_request is None:
            channel.add_member(client, delivery_format)
            return
        Recovery(
            client,
            channel,
            delivery_format,
            replay_request,
            listener,
            self,
            self._history,
            self._deflate_from_bytes,
        ).start_replay()

    async def wait_for_capacity(self, *names: str) -> None:
        """Return when no high-water mark is exceeded; publish then, before any other await."""
        marks = list(dict.fromkeys(chain.from_iterable(map(self.publish_limits_of, names))))
        # Checked again after each wait: publishers that resume earlier may exceed a mark.
        while exceeded := next((mark for mark in marks if mark.is_exceeded), None):
            await exceeded.wait_below()

    def publish_limits_of(self, name: str) -> Sequence[HighWaterMark]:
        """Return the high-water marks that pause those who publish to a channel."""
        channel = self._channels.get(name)
        if channel is not None:
            return channel.publish_limits
        return (*self._marks_of_combined(name), *self.shared.publish_limits)

    async def publish(
        self, name: str, messages: Sequence[Message], source: bytes = b""
    ) -> Position:
        """Publish messages from a caller that has no connection in the channel.

        Args:
            name: of the channel.
            messages: what to publish.
            source: of a request with an Idempotency-Key; empty: it has none.

        Returns:
            The position of the last message, once it is delivered on this replica; the newest
            position in the history if there are no messages.

        Raises:
            RefusedError: the messages could not be relayed.
        """
        if not messages:
            return self._history.newest
        identity = None
        if source:
            if (first := self._first_position(source, messages)) is not None:
                self.shared.counters.publish_repeats += len(messages)
                return first
            identity = self._identity_of(source, len(messages))
        results: asyncio.Queue[Position | Refusal | None] = asyncio.Queue()
        self.append(name, messages, AwaitedPublisher(results), identity)
        self.backplane.when_delivered(results.put_nowait)
        result = await results.get()
        if isinstance(result, Position):
            return (self._first_position(source, messages) if source else None) or result
        # None: the broker accepted the messages, and did not deliver them.
        raise RefusedError(result or Refusal.UNCONFIRMED)

    async def publish_each(self, publishes: Sequence[Publish]) -> Sequence[Position]:
        """Publish messages to channels, next to each other.

        The caller has checked that the backplane is available, without an await since.

        Returns:
            The position of each message, once all are delivered on this replica.

        Raises:
            RefusedError: they could not be relayed, or this is unknown of some.
        """
        awaited = AwaitedPublishes(len(publishes))
        for index, (name, message, _) in enumerate(publishes):
            self.append(name, (message,), awaited)
            self.backplane.when_delivered(partial(awaited.on_delivered, index))
        return await awaited.result()

    async def publish_each_once(self, publishes: Sequence[Publish]) -> Sequence[Position]:
        """Publish messages with sources to channels, in slices, unless they are repeats.

        Returns:
            The position of each message, once all are delivered on this replica. That of a repeat
            is the position of the first one.

        Raises:
            RefusedError: they could not be relayed, or this is unknown of some; or one differs from
                the first one.
        """
        await self._first_positions(publishes)  # all are compared before one is relayed
        awaited = AwaitedPublishes(len(publishes))
        for index, publish in enumerate(publishes):
            name, message, source = publish
            if index % IDENTIFIED_A_TURN == 0:
                await asyncio.sleep(0)
                following = publishes[index : index + IDENTIFIED_A_TURN]
                await self.wait_for_capacity(*{each.channel for each in following})
            # No await between this and the append: the identity states what is known now.
            if (first := self._first_position_of(publish)) is not None:
                self.shared.counters.publish_repeats += 1
                awaited.on_delivered(index, first)
                continue
            self.append(name, (message,), awaited, self._identity_of(source, 1))
            self.backplane.when_delivered(partial(awaited.on_delivered, index))
        positions = await awaited.result()
        # Another request with the key may have been relayed before.
        firsts = await self._first_positions(publishes)
        return [first or position for first, position in zip(firsts, positions, strict=True)]

    async def _first_positions(self, publishes: Sequence[Publish]) -> Sequence[Position | None]:
        firsts: list[Position | None] = []
        for index, publish in enumerate(publishes):
            if index % IDENTIFIED_A_TURN == 0:
                await asyncio.sleep(0)
            firsts.append(self._first_position_of(publish))
        return firsts

    def _first_position_of(self, publish: Publish) -> Position | None:
        _, message, source = publish
        return self._first_position(source, (message,))

    def _identity_of(self, source: bytes, count: int) -> Identity:
        return Identity(Source(source, self.publications.complete_after), (0,) * count)

    def _first_position(self, source: bytes, messages: Sequence[Message]) -> Position | None:
        """Return the position of the first request with a key; None: the log holds none.

        Raises:
            RefusedError: that request had other messages.
        """
        first = self.publications.key(source)
        if first is None:
            return None
        if first.digest != content_digest(messages):
            raise RefusedError(Refusal.IDEMPOTENCY_KEY_REUSED)
        return first.position

    # Publishers that are identified in the log, and have a connection here

    def attach_publisher(
        self, source: bytes, publisher: "LocalPublisher"
    ) -> "LocalPublisher | None":
        """Register the publisher of a source; return the one before, if there is one."""
        previous = self._publishers.get(source)
        self._publishers[source] = publisher
        return previous

    def detach_publisher(self, source: bytes, publisher: "LocalPublisher") -> None:
        """Remove the publisher of a source, unless it was replaced."""
        if self._publishers.get(source) is publisher:
            del self._publishers[source]

    # ChannelHost

    def append(
        self,
        channel: str,
        messages: Sequence[Message],
        publisher: Publisher,
        identity: Identity | None = None,
    ) -> None:
        """Append messages to the log, and count them: the one way in.

        Identified messages are counted when they are read back: they may be repeats.
        """
        payload_bytes = 0
        for _, payload in messages:
            payload_bytes += len(payload)
        if identity is None:
            self.shared.counters.messages += len(messages)
        self.shared.counters.received_bytes += payload_bytes
        self.backplane.append(channel, messages, payload_bytes, publisher, identity)

    def call_later(self, delay_s: float, callback: Callable[[], None]) -> object:
        """Call `callback` after `delay_s` seconds."""
        return asyncio.get_running_loop().call_later(delay_s, callback)

    def remove_channel(self, channel: Channel) -> None:
        """Remove a channel that has no members."""
        if self._channels.get(channel.name) is not channel:
            return
        del self._channels[channel.name]
        if len(channel.names) > 1:
            for name in channel.names:
                self._combined[name].remove(channel)
                if not self._combined[name]:
                    del self._combined[name]
                self._on_combined_changed(name)

    def on_left(self, channel: Channel, client: Connection) -> None:
        """Record that a client has left a channel."""
        if self.attendance is not None:
            self.attendance.on_unsubscribed(channel.names, client)

    def notify_watchers(self, name: str, fields: Mapping[str, object]) -> None:
        """Notify the clients here that watch a channel of a join or a leave."""
        if (channel := self._channels.get(name)) is not None:
            channel.notify_watchers(fields)
        for combined in self._combined.get(name, ()):
            combined.notify_watchers(fields)

    def count_subscribers(self, names: Sequence[str]) -> int:
        """Return how many clients here may be sent the messages of some channels."""
        channels = {self._channels[name] for name in names if name in self._channels}
        for name in names:
            channels.update(self._combined.get(name, ()))
        return sum(map(len, channels))

    # The server API

    def clients_of(self, name: str) -> Iterator[Connection]:
        """Yield the clients here that are subscribed to a channel."""
        if (channel := self._channels.get(name)) is not None:
            yield from channel.clients()
        for combined in self._combined.get(name, ()):
            yield from combined.clients()

    def channel_names(self) -> Sequence[str]:
        """Return the channels that clients here are subscribed to."""
        own = (name for name, channel in self._channels.items() if len(channel.names) == 1)
        return list(dict.fromkeys([*own, *self._combined]))

    def usage_of(self, name: str) -> tuple[int, int]:
        """Return how many clients a channel has here, and how many messages they were sent.

        The messages are those since the first of these clients has subscribed.
        """
        own = self._channels.get(name)
        channels = [*([own] if own is not None else []), *self._combined.get(name, ())]
        clients = sum(channel.client_count for channel in channels)
        return clients, max((channel.messages_of(name) for channel in channels), default=0)

    # Inside

    def _on_gap(self, position: Position) -> None:
        """Record and announce that messages up to a position may be lost."""
        if position <= self._history.floor:  # announced already
            return
        self._history.record_gap(position)
        self.publications.record_gap(position)
        for channel in list(self._channels.values()):
            channel.send_gap(position)
        for listener in self.gap_listeners:
            listener()

    def _deliver(self, entries: Sequence[LogEntry], identities: Identities | None) -> None:
        publishers: Mapping[Position, Connection] = NO_PUBLISHERS
        if identities is not None:
            entries, publishers = self._without_repeats(entries, identities)
        on_message = self.on_message
        for entry in entries:
            if entry[2] == CONTROL:
                self.on_control(entry)
                continue
            if on_message is not None:
                on_message(entry)
            self._history.add(entry)
            channel = self._channels.get(entry.channel)
            if channel is not None:
                channel.deliver(entry, publishers.get(entry.position) if publishers else None)
            if self._combined:
                for combined in self._combined.get(entry.channel, ()):
                    combined.deliver(entry)
        pending = self.shared.pending_fan_out
        if pending.is_exceeded:
            pending.pause_publisher(self.backplane)

    def _without_repeats(
        self, entries: Sequence[LogEntry], identities: Identities
    ) -> tuple[Sequence[LogEntry], Mapping[Position, Connection]]:
        """Return the entries that are no repeats; acknowledge those of publishers here.

        Returns:
            The entries, and by position the connections of their publishers.
        """
        acknowledged: dict[LocalPublisher, list[tuple[int, Decision]]] = {}
        new: list[LogEntry] = []
        publishers: dict[Position, Connection] = {}
        sources, indices, numbers, is_own = identities
        decisions = self.publications.decide(entries, identities)
        for entry, index, number, decision in zip(
            entries, indices, numbers, decisions, strict=True
        ):
            position = entry[0]
            if decision is Verdict.NEW:
                new.append(entry)
            publisher = self._publishers.get(sources[index - 1].key) if index else None
            if publisher is not None:
                publishers[position] = publisher.connection
                first = position if decision is Verdict.NEW else decision
                acknowledged.setdefault(publisher, []).append((number, first))
        if is_own:
            dropped = len(entries) - len(new)
            identified = len(entries) - indices.count(0)
            self.shared.counters.messages += identified - dropped
            self.shared.counters.publish_repeats += dropped - decisions.count(Verdict.UNKNOWN)
        for publisher, publishes in acknowledged.items():
            publisher.acknowledge(publishes)
        return new, publishers


def _key_of(names: Sequence[str]) -> str:
    """Return the name of the channel that has the messages of these: no name has a comma."""
    return ",".join(names)


class Attendance(Protocol):
    """Records who is subscribed to which channels."""

    def on_subscribed(self, names: Sequence[str], client: Connection) -> None:
        """Record that a client subscribes to channels."""

    def on_unsubscribed(self, names: Sequence[str], client: Connection) -> None:
        """Record that a client has left channels, or its connection ends."""


class LocalPublisher(Protocol):
    """A publisher that is identified in the log, and has a connection to this replica.

    Attributes:
        connection: the connection.
    """

    connection: Connection

    def acknowledge(self, publishes: Sequence[tuple[int, Decision]]) -> None:
        """Record publishes that were read: their numbers, and their positions or what they are."""


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


class AwaitedPublishes:
    """The publisher of several messages whose positions are awaited.

    Args:
        count: number of messages.
    """

    def __init__(self, count: int) -> None:
        self._missing = count
        self._positions: dict[int, Position] = {}
        # What is in one packet fails as a whole; several messages may be in several.
        self._is_whole = count == 1
        self._refusal: Refusal | None = None  # the first one counts
        self._done = asyncio.Event()
        if not count:
            self._done.set()

    def fail_publish(self, *, is_unconfirmed: bool) -> None:
        """Report that messages were not relayed, or that this is unknown."""
        is_known = self._is_whole and not is_unconfirmed
        self._fail(Refusal.BACKPLANE_UNAVAILABLE if is_known else Refusal.UNCONFIRMED)

    def on_delivered(self, index: int, position: Position | None) -> None:
        """Record the position of a message; None: it was not relayed, or this is unknown."""
        if position is None:
            self._fail(Refusal.UNCONFIRMED)
            return
        self._positions[index] = position
        self._missing -= 1
        if not self._missing:
            self._done.set()

    async def result(self) -> Sequence[Position]:
        """Return the positions in the order of the messages, or raise a RefusedError."""
        await self._done.wait()
        if self._refusal is not None:
            raise RefusedError(self._refusal)
        return [self._positions[index] for index in range(len(self._positions))]

    def _fail(self, refusal: Refusal) -> None:
        self._refusal = self._refusal or refusal
        self._done.set()
