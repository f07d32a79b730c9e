"""Own which replicas are alive, as this one has read it. Knows no entry.

An *incarnation* of a replica ends when others declare so in the log. A replica that was frozen for
too long reads its own end, and begins a new incarnation.
"""

import secrets
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from websocket_relay.backplane.interface import START, Position

INCARNATION_BYTES = 8
MAX_INCARNATIONS = 10_000

FORGET_S = 60.0
"""Without presence nothing declares the end of a replica. One that is silent for so long is
forgotten; if it was only frozen, its next heartbeat brings it back."""

SILENCE_S = 3.0
"""Each replica writes a heartbeat every second. One that is silent for longer is not alive. A
replica that has not read its own for longer can't know how long the others have been silent: an
outage silences all alike."""


@dataclass(slots=True)
class Incarnation:
    """A replica, as its heartbeats describe it.

    Attributes:
        seen_at: when its latest sign of life was read, by the clock.
        position: of that sign.
        facts: of its latest heartbeat.
    """

    seen_at: float
    position: Position
    facts: Mapping[str, Any] = field(default_factory=dict)


class Incarnations:
    """The replicas whose signs of life were read.

    Args:
        clock: monotonic time in seconds.
        forget_s: replicas are forgotten after this silence; None: `remove` forgets them.

    Attributes:
        own: the present incarnation of this replica.
    """

    def __init__(
        self, clock: Callable[[], float] = time.monotonic, *, forget_s: float | None = None
    ) -> None:
        self._clock = clock
        self._forget_s = forget_s
        self._incarnations: dict[str, Incarnation] = {}
        self._own_seen_at = clock()
        self._listens_since: float | None = None  # since the first sign of this replica
        self.own = _new_incarnation()

    @property
    def listened_s(self) -> float:
        """How long the signs of all replicas are read."""
        return 0.0 if self._listens_since is None else self._clock() - self._listens_since

    def __contains__(self, incarnation: str) -> bool:
        return incarnation in self._incarnations

    def begin_anew(self) -> None:
        """Begin a new incarnation of this replica: the present one has ended."""
        self.own = _new_incarnation()

    def record_sign(
        self, incarnation: str, position: Position, facts: Mapping[str, Any] | None = None
    ) -> None:
        """Record that a replica has written something.

        Args:
            incarnation: of the replica.
            position: of what it has written.
            facts: of a heartbeat; None: it was something else.
        """
        now = self._clock()
        if incarnation == self.own:
            if now - self._own_seen_at > SILENCE_S:
                self.forgive()
            self._own_seen_at = now
            if self._listens_since is None:
                self._listens_since = now
        known = self._incarnations.pop(incarnation, None)
        if known is None:
            known = Incarnation(now, position)
        known.seen_at, known.position = now, position
        if facts is not None:
            known.facts = facts
        self._incarnations[incarnation] = known  # at the end: the longest silent one is the first
        if len(self._incarnations) > MAX_INCARNATIONS:
            del self._incarnations[next(iter(self._incarnations))]
        if incarnation == self.own and self._forget_s is not None:
            for silent in self.silent(self._forget_s):
                self.remove(silent)

    def learn_of(self, incarnation: str, position: Position, silence_s: float) -> None:
        """Record a replica that is silent and was not known here, so that its end is declared.

        Args:
            incarnation: of the replica.
            position: of its latest sign, as another replica has read it.
            silence_s: for at least so long.
        """
        if incarnation not in self._incarnations:
            seen_at = self._clock() - silence_s
            self._incarnations[incarnation] = Incarnation(seen_at, position)

    def forgive(self) -> None:
        """Count the silence of all replicas from now on."""
        now = self._clock()
        for incarnation in self._incarnations.values():
            incarnation.seen_at = now

    def hush(self, incarnation: str) -> None:
        """Count the silence of a replica from now on."""
        if known := self._incarnations.get(incarnation):
            known.seen_at = self._clock()

    def remove(self, incarnation: str) -> None:
        """Forget a replica."""
        self._incarnations.pop(incarnation, None)

    def position(self, incarnation: str) -> Position:
        """Return the position of the latest sign of a replica."""
        known = self._incarnations.get(incarnation)
        return known.position if known is not None else START

    def silent(self, seconds: float) -> Sequence[str]:
        """Return the others that have been silent for longer than some seconds."""
        now = self._clock()
        if now - self._own_seen_at > SILENCE_S:
            return ()
        return [
            incarnation
            for incarnation, known in self._incarnations.items()
            if incarnation != self.own and now - known.seen_at > seconds
        ]

    def alive(self, seconds: float) -> Mapping[str, Mapping[str, Any]]:
        """Return the facts of the replicas that have not been silent for longer, in one order."""
        since = self._clock() - seconds
        return {
            incarnation: known.facts
            for incarnation, known in sorted(self._incarnations.items())
            if known.seen_at >= since
        }


def _new_incarnation() -> str:
    return secrets.token_hex(INCARNATION_BYTES)
