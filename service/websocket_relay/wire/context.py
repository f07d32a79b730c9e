"""Hold what all connections of a replica share: bounds, books, and who is connected."""

import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING

from websocket_relay.counters import Counters
from websocket_relay.outcomes import Drop
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
        compresses: whether clients that offer permessage-deflate get it.
        deadline_s: from TCP accept to the 101, and from a close frame to the connection's end.
        ledger: where it is counted.
        backlogs: who is behind, and the bounds on that.
        unfinished: what was begun to be said, and the bound on that.
        unheard: the bound on what was read and is not heard yet.
        appends: the bound on what waits to get into the log.
        pending: the bound on what waits for its fan-out.
    """

    def __init__(
        self,
        *,
        max_message_bytes: int,
        compresses: bool,
        deadline_s: float,
        ledger: Counters,
        backlogs: SendBacklogs,
        unfinished: PartialMessages,
        unheard: HighWaterMark,
        appends: HighWaterMark,
        pending: HighWaterMark,
    ) -> None:
        self.max_message_bytes = max_message_bytes
        self.compresses = compresses
        self.deadline_s = deadline_s
        self.ledger = ledger
        self.backlogs = backlogs
        self.unfinished = unfinished
        self.unheard = unheard
        self.appends = appends
        self.pending = pending
        self.clients = ConnectionRegistry()
        self.reading = TimeSlicer()  # of clients who said more in one read than is heard at once
        self.held = 0  # clients that are not read now, because they publish too fast
        # The write that is being made, as the fan-out announces it: whether there is one; how many
        # messages it holds; how many clients did not take it straight to their socket; and whose
        # transport could not write all of it at once.
        self.is_writing = False
        self.messages_in_hand = 0
        self.withheld = 0
        self.fell_behind: list[Connection] = []

    def write(self, clients: "Sequence[Connection]", data: bytes, messages: int) -> None:
        """Write the same bytes to some clients, and do the books: the hot path's second half.

        No await, and no Python call but the write itself, for each client.

        Args:
            clients: who gets them.
            data: whole frames.
            messages: how many messages they hold.
        """
        self.is_writing = True
        self.messages_in_hand = messages
        self.withheld = 0
        for client in clients:
            # Two steps: CPython 3.11 has a fast path for reading a slot, and none for calling what
            # it holds in the same breath. The try costs nothing there.
            write = client.write
            try:
                write(data)
            except Exception:
                if not client.is_closing:
                    log.exception("write failed")
                self._give_up(client)
        if self.fell_behind:
            self.withheld += len(self.fell_behind)
            for client in self.fell_behind:
                client.note_backlog(data, messages)
            self.fell_behind.clear()
        taken = len(clients) - self.withheld
        self.is_writing = False
        self.messages_in_hand = 0
        self.ledger.deliveries += taken * messages
        self.ledger.sent_bytes += taken * len(data)

    def read_nobody(self) -> None:
        """Hold all clients but those that have something to be heard, until less of it waits."""
        for client in self.clients:
            if not client.is_unheard:
                self.unheard.hold(client)

    def withhold_disconnected(self, batch: bytes) -> None:
        """Count a batch that was owed to a client that has gone since."""
        self._withhold(Drop.DISCONNECTED)

    def withhold_slow(self, batch: bytes) -> None:
        """Count a batch that was owed to a client that was closed because it was slow."""
        self._withhold(Drop.SLOW_CONSUMER)

    def _give_up(self, client: "Connection") -> None:
        """Count a batch that could not be written to a client, and end the client."""
        self._withhold(Drop.DISCONNECTED)
        if not client.is_closing:
            client.fail()
        if client in self.fell_behind:  # by the write that failed, or by the close frame
            self.fell_behind.remove(client)

    def _withhold(self, why: Drop) -> None:
        self.withheld += 1
        self.ledger.drops[why] += self.messages_in_hand
