"""Own the control entries of the log: what replicas write for each other, and no client is sent.

All replicas read them in one order, among the messages. So state that is computed from them alone,
by the same rules, is the same on every replica at the same position. Knows no rule.
"""

import json
import logging
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from websocket_relay.backplane.interface import Backplane, LogEntry, Position
from websocket_relay.messages import CONTROL

log = logging.getLogger(__name__)

CLUSTER = "$"
"""Takes the place of a channel in entries that are about none: no channel has this name."""

Fields = Mapping[str, Any]


class ControlEntry(NamedTuple):
    """A control entry that was read.

    Attributes:
        position: in the log.
        channel: that it is about, or CLUSTER.
        fields: its content.
    """

    position: Position
    channel: str
    fields: Fields


Handler = Callable[[ControlEntry], None]


class ControlLog:
    """Appends control entries, and passes those that are read to their handlers.

    Args:
        backplane: the log.
        clock: seconds since 1970.

    Attributes:
        reading: the entry that is passed to its handler now; None: none is.
        time: when the latest entry, or heartbeat, that was read was appended, by the clock of its
            replica. So it is the same on every replica at the same position. 0: none was read.
    """

    def __init__(self, backplane: Backplane, clock: Callable[[], float] = time.time) -> None:
        self._backplane = backplane
        self._clock = clock
        self.reading: ControlEntry | None = None
        self.time = 0.0
        self._handlers: dict[str, Handler] = {}

    @property
    def position(self) -> Position:
        """The position up to which everything was read."""
        return self._backplane.position

    def handle(self, kind: str, handler: Handler) -> None:
        """Pass all entries of a kind to a handler, of every replica, in the order of the log."""
        self._handlers[kind] = handler

    def append(
        self,
        kind: str,
        fields: Fields,
        channel: str = CLUSTER,
        failed: Callable[[], None] = lambda: None,
        unconfirmed: Callable[[], None] | None = None,
    ) -> None:
        """Append an entry. With a log in memory, it is read before this returns.

        Args:
            kind: whose handler reads it.
            fields: what JSON can hold.
            channel: that it is about.
            failed: called if the entry is not in the log.
            unconfirmed: called if this is unknown; None: `failed` is.
        """
        stamped = {"kind": kind, "at": round(self._clock(), 3), **fields}
        payload = json.dumps(stamped, separators=(",", ":")).encode()
        messages = [(CONTROL, payload)]
        self._backplane.append(
            channel, messages, len(payload), _Appended(failed, unconfirmed or failed)
        )

    def on_entry(self, entry: LogEntry) -> None:
        """Pass an entry to its handler.

        An entry of a kind that has no handler is of a newer version, or of a replica with other
        settings.
        """
        position, channel, _, payload = entry
        outer = self.reading  # with a log in memory, a handler that appends
        try:
            fields = json.loads(payload)
            self.time = float(fields.get("at", self.time))
            handler = self._handlers.get(fields.get("kind"))
            if handler is not None:
                self.reading = ControlEntry(position, channel, fields)
                handler(self.reading)
        except (ValueError, TypeError, KeyError, AttributeError):
            log.exception("control entry not understood")
        finally:
            self.reading = outer


class _Appended:
    """The publisher of a control entry."""

    def __init__(self, failed: Callable[[], None], unconfirmed: Callable[[], None]) -> None:
        self._failed = failed
        self._unconfirmed = unconfirmed

    def fail_publish(self, *, is_unconfirmed: bool) -> None:
        """Report that the entry is not in the log, or that this is unknown."""
        if is_unconfirmed:
            self._unconfirmed()
        else:
            self._failed()
