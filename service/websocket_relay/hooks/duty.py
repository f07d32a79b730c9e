"""Decide which replica delivers the events: from the heartbeats in the log, without a vote.

It is the one that has been ready for longest, among those that are alive: it knows the most of what
is not delivered. A replica that is new, or may have missed entries, is the last in that order.

Knows no event and no receiver.
"""

import time
from collections import OrderedDict
from collections.abc import Callable, Mapping
from typing import Any

from websocket_relay.backplane.interface import START, Position
from websocket_relay.cluster.control_log import ControlEntry, ControlLog
from websocket_relay.cluster.incarnations import MAX_INCARNATIONS, SILENCE_S, Incarnations

START_S = 2.0
"""Interval between two attempts to append `hooks.start`."""

FACT = "hooks"
"""The name in a heartbeat of the position since which a replica is ready to deliver."""


class Duty:
    """Whether this replica delivers the events.

    Args:
        control: the control entries.
        replicas: those that are alive.
        is_alone: whether there are no others.
        is_up: returns whether entries can be appended. In an outage no replica delivers.
        is_complete: returns whether this replica knows the clients of all others.
        is_started: returns whether it is known from which event on they are delivered.
        position: returns what was read last.
        clock: monotonic time in seconds.
    """

    def __init__(
        self,
        control: ControlLog,
        replicas: Incarnations,
        *,
        is_alone: bool,
        is_up: Callable[[], bool],
        is_complete: Callable[[], bool],
        is_started: Callable[[], bool],
        position: Callable[[], Position],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._control = control
        self._replicas = replicas
        self._is_alone = is_alone
        self._is_up = is_up
        self._is_complete = is_complete
        self._is_started = is_started
        self._position = position
        self._clock = clock
        self._ready_at: Position | None = None
        self._start_due = 0.0
        self._has_resigned = False
        self._resigned: OrderedDict[str, None] = OrderedDict()  # incarnations
        self._is_first = is_alone
        control.handle("hooks.resign", self._on_resignation)

    def facts(self) -> Mapping[str, str]:
        """Return the facts about this replica for its heartbeats."""
        return {FACT: str(self._ready_at)} if self._ready_at is not None else {}

    def tick(self) -> None:
        """Do what is due now."""
        if self._is_alone:
            return
        if not self._is_up():
            self._ready_at = None
        elif not self._is_complete():
            self._is_first = False
            return
        elif not self._is_started():
            self._start()
        elif self._ready_at is None and not self._has_resigned:
            self._ready_at = self._position()
        self._is_first = min(self._candidates(), default=(START, ""))[1] == self._replicas.own

    def _start(self) -> None:
        """Append `hooks.start`: the log contains nothing of a replica that has delivered."""
        now = self._clock()
        if now >= self._start_due:
            self._start_due = now + START_S
            self._control.append("hooks.start", {"incarnation": self._replicas.own})

    def is_own(self) -> bool:
        """Return whether this replica delivers now."""
        if self._has_resigned:
            return False
        return self._is_alone or (self._is_first and self._ready_at is not None and self._is_up())

    def has_successor(self) -> bool:
        """Return whether another replica can deliver instead of this one."""
        return not self._is_alone and any(
            incarnation != self._replicas.own for _, incarnation in self._candidates()
        )

    def resign(self) -> None:
        """Let another replica deliver from now on: this one ends."""
        self._has_resigned = True
        self._ready_at = None
        if not self._is_alone and self._is_up():
            self._control.append("hooks.resign", {"incarnation": self._replicas.own})

    def on_gap(self) -> None:
        """Record that this replica may have missed events."""
        self._ready_at = None

    def _candidates(self) -> list[tuple[Position, str]]:
        return [
            (ready_at, incarnation)
            for incarnation, facts in self._replicas.alive(SILENCE_S).items()
            if incarnation not in self._resigned and (ready_at := _ready_at(facts)) is not None
        ]

    def _on_resignation(self, entry: ControlEntry) -> None:
        self._resigned[entry.fields["incarnation"]] = None
        if len(self._resigned) > MAX_INCARNATIONS:
            self._resigned.popitem(last=False)


def _ready_at(facts: Mapping[str, Any]) -> Position | None:
    try:
        return Position.parse(facts[FACT])
    except (KeyError, TypeError, ValueError):  # other settings, or another version
        return None
