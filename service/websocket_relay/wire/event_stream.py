"""Own one event stream: from its response head to its end. Knows no channel and no HTTP.

Its client sends nothing after its request.
"""

import asyncio
import random
import socket
import sys
from collections.abc import Callable

from websocket_relay.wire import sse
from websocket_relay.wire.connection import Connection, MessageSink
from websocket_relay.wire.context import ConnectionContext
from websocket_relay.wire.delivery_format import DeliveryFormat

RECONNECT_DELAY_MS = 500, 2500
"""Range of the delay before a client reconnects after its connection broke: a random one for each.
By default, all browsers wait for the same few seconds."""


def open_event_stream(
    transport: asyncio.Transport,
    shared: ConnectionContext,
    delivery_format: DeliveryFormat,
    silence_s: float,
) -> Connection:
    """Take over a transport after the response head; return the connection.

    Args:
        transport: of the request.
        shared: bounds and counters.
        delivery_format: how messages are encoded for the client.
        silence_s: a client whose machine acknowledges nothing for this long is closed, and so is
            one that reads nothing for this long while its socket is full.
    """
    connection = Connection(shared, EventStream)
    transport.set_protocol(connection)
    connection.connection_made(transport)
    # A client does not answer events. TCP detects a dead one (RFC 5482), as each keepalive comment
    # needs an acknowledgement. Systems other than Linux use their own timeout.
    accepted = transport.get_extra_info("socket")
    if sys.platform == "linux" and accepted.family != socket.AF_UNIX:
        silence_ms = round(silence_s * 1000)
        accepted.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, silence_ms)
    connection.open(b"retry: %d\n\n" % random.randint(*RECONNECT_DELAY_MS), delivery_format)
    return connection


class StreamNotices:
    """The notices of a stream's replay: see `recovery.ReplayListener`.

    Args:
        connection: of the stream.
        finished: is called once the replay is complete; None: nothing is.
    """

    def __init__(self, connection: Connection, finished: Callable[[], None] | None = None) -> None:
        self._connection = connection
        self._finished = finished

    def on_replay_started(self, position: object, *, is_recovered: bool) -> None:
        """Send the welcome, the first event."""
        shared = self._connection.shared
        fields = {
            "type": "welcome",
            "recovered": is_recovered,
            "position": str(position),
            "heartbeat_ms": round(shared.ping_interval_s * 1000),
        }
        shared.write([self._connection], sse.encode_event("welcome", fields), messages=0)

    def on_replay_finished(self, position: object) -> None:
        """Send no event: the messages go on."""
        if self._finished is not None:
            self._finished()

    def is_own(self, position: object) -> bool:
        """Return False: a stream publishes nothing."""
        return False


class EventStream:
    """Server-sent events, as the protocol of a connection: see `connection.WireProtocol`.

    Args:
        connection: the connection.
    """

    __slots__ = ("_connection",)

    has_unparsed = False
    has_closing_handshake = False
    encode_close = staticmethod(sse.encode_close)

    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    def count_complete_messages(self, batch: bytes, end: int) -> int:
        """Return how many messages end within the first `end` bytes of a batch."""
        return batch.count(b"\n\n", 0, end)

    def ping(self, frame: bytes, heartbeat: bytes, now: float) -> None:
        """Send a comment, so that proxies see traffic on the response."""
        self._connection.write_control(sse.KEEPALIVE_COMMENT)

    def is_ping_overdue(self, since: float) -> bool:
        """Return False: TCP_USER_TIMEOUT detects dead clients, see `open_event_stream`."""
        return False

    # A client publishes nothing, so there is nothing to parse, to pause or to fail.

    def data_received(self, data: bytes) -> None: ...
    def start_parsing(self, sink: MessageSink) -> None: ...
    def stop_parsing(self) -> None: ...
    def pause_reading(self) -> None: ...
    def resume_reading(self) -> None: ...
    def fail_publish(self, *, is_unconfirmed: bool) -> None: ...
