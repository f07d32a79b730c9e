"""Own what all connections of a replica share: bounds, counters and the connection registry.

Contains the fan-out's write loop. Knows no protocol and no channel.
"""

import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING

from websocket_relay.counters import Counters
from websocket_relay.outcomes import Drop
from websocket_relay.refusals import Refusals
from websocket_relay.wire.flow_control import HighWaterMark
from websocket_relay.wire.partial_messages import PartialMessages
from websocket_relay.wire.registry import ConnectionRegistry
from websocket_relay.wire.send_backlog import SendBacklogs
from websocket_relay.wire.time_slicer import TimeSlicer

if TYPE_CHECKING:
    from websocket_relay.wire.connection import Connection

log = logging.getLogger(__name__)


class ConnectionContext:
    """What every connection of one replica is given.

    Args:
        max_message_bytes: a larger message closes its sender.
        max_channels_per_connection: subscriptions of one connection of relay.v1.
        compresses: whether clients that offer permessage-deflate get it.
        deadline_s: from TCP accept to the 101, and from a close frame to the connection's end.
        ping_interval_s: from one ping to the next.
        counters: the replica's counters.
        refusals: records and renders refusals.
        backlogs: the lagging connections, and the bounds on their backlogs.
        partial_messages: the incomplete incoming messages, and the bound on them.
        unparsed: the bound on bytes that are read and not parsed yet.
        pending_appends: the bound on messages that wait to be appended to the log.
        pending_fan_out: the bound on messages that wait for their fan-out.
    """

    def __init__(
        self,
        *,
        max_message_bytes: int,
        max_channels_per_connection: int,
        compresses: bool,
        deadline_s: float,
        ping_interval_s: float,
        counters: Counters,
        refusals: Refusals,
        backlogs: SendBacklogs,
        partial_messages: PartialMessages,
        unparsed: HighWaterMark,
        pending_appends: HighWaterMark,
        pending_fan_out: HighWaterMark,
    ) -> None:
        self.max_message_bytes = max_message_bytes
        self.max_channels_per_connection = max_channels_per_connection
        self.compresses = compresses
        self.deadline_s = deadline_s
        self.ping_interval_s = ping_interval_s
        self.counters = counters
        self.refusals = refusals
        self.backlogs = backlogs
        self.partial_messages = partial_messages
        self.unparsed = unparsed
        self.pending_appends = pending_appends
        self.pending_fan_out = pending_fan_out
        self.clients = ConnectionRegistry()
        self.publish_limits = (pending_fan_out, pending_appends)
        self.parse_slicer = TimeSlicer()  # of reads that hold more than is parsed at once
        self.paused_connections = 0  # connections that are paused because they publish too fast
        # During `write`: the connections whose transport could not send all of the batch.
        self.newly_lagging: list[Connection] | None = None

    def write(self, clients: "Sequence[Connection]", data: bytes, messages: int) -> None:
        """Write the same bytes to several connections, and count it: second half of the hot path.

        No await, and no Python call for each connection but the write itself.

        Args:
            clients: the recipients.
            data: whole frames or events.
            messages: number of messages in them.
        """
        sent, size = len(clients), len(data)
        lagging: list[Connection] = []
        self.newly_lagging = lagging
        try:
            for client in clients:
                # Two steps: CPython 3.11 has a fast path for loading a slot, and none for a call
                # of a slot's value in the same instruction. The try costs nothing there.
                write = client.write
                if write is None:
                    sent -= 1
                    client.queue_or_drop(data, messages)
                    continue
                try:
                    try:
                        sent_bytes = write(data)
                    except OSError:  # full, or disconnected: the transport finds out
                        sent_bytes = 0
                    if sent_bytes != size:
                        client.write_rest(data, sent_bytes)
                except Exception:
                    if not client.is_closing:
                        log.exception("write failed")
                    sent -= 1
                    self._drop_failed_write(client, messages)
        finally:
            self.newly_lagging = None
        sent -= len(lagging)
        for client in lagging:
            client.start_backlog(data, messages)
        self.counters.deliveries += sent * messages
        self.counters.sent_bytes += sent * size

    def metrics(self) -> dict[str, int]:
        """Return the values of the metrics of backlogs and flow control."""
        return {
            "slow_clients": len(self.backlogs),
            "backlog_bytes": self.backlogs.total_bytes,
            "backlog_limit_bytes": self.backlogs.total_limit_bytes,
            "partial_message_bytes": self.partial_messages.total_bytes,
            "paused_publishers": self.paused_connections,
            "backplane_pending_bytes": self.pending_appends.bytes,
        }

    def pause_all_reading(self) -> None:
        """Pause every connection that has nothing unparsed, until the unparsed bytes drain."""
        for client in self.clients:
            if not client.protocol.has_unparsed:
                self.unparsed.pause_publisher(client.protocol)

    def _drop_failed_write(self, client: "Connection", messages: int) -> None:
        """Count a batch as dropped, because its write raised, and close the connection."""
        self.counters.drops[Drop.DISCONNECTED] += messages
        lagging, self.newly_lagging = self.newly_lagging, None
        if lagging is not None and client in lagging:  # by the write that failed
            lagging.remove(client)
            client.start_backlog(b"", 0)
        if not client.is_closing:
            client.close_after_write_error()
        self.newly_lagging = lagging
