"""A log of control entries in the process, which several replicas read at once."""

import json
from collections.abc import Sequence
from typing import Any, cast

from websocket_relay.backplane.interface import Backplane, LogEntry, Position
from websocket_relay.cluster.control_log import ControlLog
from websocket_relay.messages import Message, Publisher


class SharedLog:
    """The log: an entry is read by all replicas before `append` returns.

    Attributes:
        entries: the content of all entries.
        fails: whether entries are rejected, as in an outage.
        confirms: whether it is known that these are not in the log.
    """

    def __init__(self) -> None:
        self.entries: list[dict[str, Any]] = []
        self.fails, self.confirms = False, True
        self._controls: list[ControlLog] = []

    def control(self) -> ControlLog:
        """Return the control log of another replica."""
        control = ControlLog(cast(Backplane, self))
        self._controls.append(control)
        return control

    def append(
        self,
        channel: str,
        messages: Sequence[Message],
        payload_bytes: int,
        publisher: Publisher,
        identity: object = None,
    ) -> None:
        """Append an entry; see `interface.Backplane`."""
        if self.fails:
            publisher.fail_publish(is_unconfirmed=not self.confirms)
            return
        ((kind, payload),) = messages
        self.entries.append(json.loads(payload))
        position = Position(2, len(self.entries), 0)
        for control in list(self._controls):
            control.on_entry(LogEntry(position, channel, kind, payload))
