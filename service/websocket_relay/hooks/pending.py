"""Compute the events from the log, and keep those that no replica has delivered.

Every replica computes the same events, in the same order and with the same ids, by reading the log.
So the replica that delivers them can be replaced by any other at any time. `hooks.done` names the
last event that the receiver has accepted. `hooks.start`, of which the first in a log counts, means
that what is before it is not delivered.

Knows no receiver, and does not append.
"""

import time
from collections.abc import Callable, Mapping, Sequence

from websocket_relay.backplane.interface import START, LogEntry
from websocket_relay.cluster.control_log import ControlEntry, ControlLog
from websocket_relay.hooks.events import (
    JOINED,
    LEFT,
    NO_EVENT,
    OCCUPIED,
    PUBLISHED,
    VACATED,
    Event,
    EventId,
)
from websocket_relay.hooks.queue import EventQueue
from websocket_relay.patterns import matches_any

STATEMENT = "presence.state"
MAX_COVERED = 10_000


class PendingEvents:
    """The events that are not delivered yet.

    Args:
        control: the control entries.
        queue: of the events.
        patterns: of the channels whose messages are events.
        is_alone: whether there are no other replicas, and nothing is read at the start.
        is_presence_complete: returns whether all that other replicas stated about their clients is
            read. Until then, statements repeat what happened earlier.
        is_relayed_alone: returns whether messages are relayed on this replica alone.
        clock: seconds since 1970.

    Attributes:
        is_started: whether the place in the log is known from which events are delivered.
        done: the last event that was accepted, as far as was read.
        dropped: events that did not fit into the queue, or are in no log.
        changed: is called when there is more, or less, to deliver.
    """

    def __init__(
        self,
        control: ControlLog,
        queue: EventQueue,
        patterns: Sequence[str],
        *,
        is_alone: bool,
        is_presence_complete: Callable[[], bool],
        is_relayed_alone: Callable[[], bool],
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._control = control
        self.queue = queue
        self._patterns = patterns
        self._is_alone = is_alone
        self._is_presence_complete = is_presence_complete
        self._is_relayed_alone = is_relayed_alone
        self._clock = clock
        self._covered: dict[str, bool] = {}  # by channel: whether its messages are events
        self._latest = NO_EVENT
        self.is_started = is_alone
        self.done = NO_EVENT
        self.dropped = 0
        self.changed: Callable[[], None] = lambda: None
        control.handle("hooks.start", self._on_start)
        control.handle("hooks.done", self._on_done)

    @property
    def time(self) -> float:
        """The present time in the log, in seconds since 1970: as far as is read."""
        # There is none before the first heartbeat: at the start of a log, or of its retention.
        at = 0.0 if self._is_alone else self._control.time
        return at or round(self._clock(), 3)

    def on_change(self, channel: str, client: str, user: str, code: int | None, count: int) -> None:
        """Add the events of a client that joined or left; called while its entry is read.

        Args:
            channel: of the client.
            client: its id.
            user: of the client; empty: not known.
            code: the close code of one that left; None: it joined.
            count: of the clients in the channel now.
        """
        entry = self._control.reading
        if entry is None:
            return
        if entry.fields["kind"] == STATEMENT and not self._is_presence_complete():
            return
        who = {"client": client, "user": user}
        if code is None:
            if count == 1:
                self._add_next(entry, OCCUPIED, channel, {})
            self._add_next(entry, JOINED, channel, who)
        else:
            self._add_next(entry, LEFT, channel, {**who, "code": code})
            if count == 0:
                self._add_next(entry, VACATED, channel, {})

    def on_message(self, entry: LogEntry) -> None:
        """Add the event of a message that was relayed, if its channel's messages are events."""
        position, channel, kind, payload = entry
        covers = self._covered.get(channel)
        if covers is None:
            covers = self._find_covered(channel)
        if not covers:
            return
        if self._is_relayed_alone():  # no other replica knows it
            self.dropped += 1
            return
        facts = {"position": str(position)}
        event_id = EventId(position, 0)
        self._add(Event(event_id, self.time, PUBLISHED, channel, facts, (kind, payload)))

    def _find_covered(self, channel: str) -> bool:
        if len(self._covered) >= MAX_COVERED:
            self._covered.clear()
        covers = self._covered[channel] = matches_any(self._patterns, channel)
        return covers

    def _add_next(
        self, entry: ControlEntry, kind: str, channel: str, facts: Mapping[str, object]
    ) -> None:
        position, ordinal = self._latest
        following = ordinal + 1 if position == entry.position else 0
        event_id = EventId(entry.position, following)
        self._add(Event(event_id, self.time, kind, channel, facts))

    def _add(self, event: Event) -> None:
        self._latest = event.event_id
        if not self.queue.add(event) and self.is_started:
            self.dropped += 1
        self.changed()

    def _on_start(self, entry: ControlEntry) -> None:
        if not self.is_started:
            self.is_started = True
            self.queue.clear()
            self.changed()

    def _on_done(self, entry: ControlEntry) -> None:
        self.is_started = True
        done = EventId.parse(entry.fields["up_to"])
        if done.position != START:
            self.done = max(self.done, done)
            self.queue.remove_through(done)
        self.changed()
