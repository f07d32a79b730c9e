"""Own what a plain client publishes that is sent no message of its own (`?echo=false`).

Its messages carry an origin through the log, by which they are found again at their delivery.
"""

from collections.abc import Callable, Sequence

from websocket_relay.backplane.interface import START, Identity, Source
from websocket_relay.channels.broadcaster import Broadcaster, LocalPublisher
from websocket_relay.channels.channel import Channel
from websocket_relay.channels.publications import Decision, new_origin
from websocket_relay.messages import Message
from websocket_relay.wire.connection import Connection, WireProtocol


class EcholessClient(LocalPublisher):
    """The sink of one plain client's messages.

    Args:
        connection: of the client, which is a member of the channel, or will be.
        channel: the channel.
        broadcaster: owns the channel.
    """

    __slots__ = ("_broadcaster", "_channel", "_source", "connection")

    def __init__(self, connection: Connection, channel: Channel, broadcaster: Broadcaster) -> None:
        self.connection = connection
        self._channel = channel
        self._broadcaster = broadcaster
        self._source = Source(new_origin(), START)
        broadcaster.attach_publisher(self._source.key, self)

    def acknowledge(self, publishes: Sequence[tuple[int, Decision]]) -> None:
        """Do nothing: a plain client is sent no acknowledgements."""

    # MessageSink

    @property
    def channel_names(self) -> Sequence[str]:
        """The channel that the client is subscribed to."""
        return self._channel.names

    def publish(self, publisher: WireProtocol, messages: Sequence[Message]) -> None:
        """Publish the client's messages, with its origin."""
        identity = Identity(self._source, (0,) * len(messages))
        self._broadcaster.append(self._channel.name, messages, publisher, identity)
        self._channel.pause_if_over_limit(publisher)

    def pause_if_over_limit(self, publisher: WireProtocol) -> None:
        """Pause reading from the client while a high-water mark is exceeded."""
        self._channel.pause_if_over_limit(publisher)

    def detach_connection(self, client: Connection) -> None:
        """Remove the client from the channel."""
        self._broadcaster.detach_publisher(self._source.key, self)
        self._channel.detach_connection(client)

    def on_backlog_started(self, client: Connection) -> None:
        """Mark the client as slow."""
        self._channel.on_backlog_started(client)

    def on_backlog_drained(self, client: Connection) -> None:
        """Clear the mark."""
        self._channel.on_backlog_drained(client)

    def call_when_written(self, callback: Callable[[], None]) -> None:
        """Call `callback` once all that was published so far has been written."""
        self._channel.call_when_written(callback)
