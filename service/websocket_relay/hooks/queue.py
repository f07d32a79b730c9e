"""Own the events that are not delivered yet, within bounds. Knows no log and no receiver.

The log alone changes the queue: events are added in its order, and removed by its entries. So all
replicas that have read the same have the same queue, and drop the same events.
"""

from bisect import bisect_right
from collections.abc import Sequence
from operator import attrgetter

from websocket_relay.hooks.events import DROPPED, Event, EventId

_id_of = attrgetter("event_id")


class EventQueue:
    """Events in their order.

    Args:
        max_events: events beyond it are dropped.
        max_bytes: likewise of the payloads of the events.

    Attributes:
        bytes: payloads of the events.
    """

    def __init__(self, max_events: int, max_bytes: int) -> None:
        self._max_events = max_events
        self._max_bytes = max_bytes
        self._events: list[Event] = []
        # Whether the last event is one of dropped events whose number may still grow: it is not
        # delivered then. Once events were removed it is final, and the same on all replicas.
        self._is_last_open = False
        self.bytes = 0

    def __len__(self) -> int:
        return len(self._events)

    @property
    def oldest(self) -> Event | None:
        """The first event; None: there is none."""
        return self._events[0] if self._events else None

    @property
    def newest_id(self) -> EventId | None:
        """The id of the last event; None: there is none."""
        return self._events[-1].event_id if self._events else None

    def add(self, event: Event) -> bool:
        """Add an event, which is the newest; return whether it fits.

        For those that do not fit there is one event with their number. It has the id of the last.
        """
        if len(self._events) < self._max_events:
            size = self.bytes + event.payload_bytes
            if size <= self._max_bytes:
                self._events.append(event)
                self.bytes = size
                self._is_last_open = False
                return True
        self._record_dropped(event)
        return False

    def _record_dropped(self, event: Event) -> None:
        count = 1
        if self._is_last_open:
            count += self._events.pop().facts["count"]
        # If it is the first, nothing is removed before it is delivered.
        self._is_last_open = bool(self._events)
        self._events.append(Event(event.event_id, event.at, DROPPED, "", {"count": count}))

    def remove_through(self, event_id: EventId) -> None:
        """Remove the events up to an id."""
        count = bisect_right(self._events, event_id, key=_id_of)
        if count:
            self.bytes -= sum(event.payload_bytes for event in self._events[:count])
            del self._events[:count]
            self._is_last_open = False

    def clear(self) -> None:
        """Remove all events."""
        self._events.clear()
        self.bytes = 0
        self._is_last_open = False

    def following(self, event_id: EventId, count: int) -> Sequence[Event]:
        """Return the next events after an id that can be delivered.

        Args:
            event_id: the last one that was delivered.
            count: of events at most.
        """
        start = bisect_right(self._events, event_id, key=_id_of)
        end = len(self._events) - self._is_last_open
        return self._events[start : min(start + count, end)]
