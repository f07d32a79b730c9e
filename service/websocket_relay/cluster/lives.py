"""Own which replicas are alive, as this one has read it. Knows no entry.

A *life* of a replica is a time without an end that others have declared in the log. A replica that
was frozen for too long reads its own end, and begins a new life.
"""

import secrets
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from websocket_relay.backplane.interface import START, Position

LIFE_BYTES = 8
MAX_LIVES = 10_000

OWN_SILENCE_S = 3.0
"""This replica reads its own heartbeat every second. After a longer time without one, it can't know
how long the others have been silent: an outage silences all alike."""


@dataclass(slots=True)
class Life:
    """A replica, as its heartbeats describe it.

    Attributes:
        seen_at: when its latest sign of life was read, by the clock.
        position: of that sign.
        facts: of its latest heartbeat.
    """

    seen_at: float
    position: Position
    facts: Mapping[str, Any] = field(default_factory=dict)


class Lives:
    """The replicas whose signs of life were read.

    Args:
        clock: monotonic time in seconds.

    Attributes:
        own: the present life of this replica.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._lives: dict[str, Life] = {}
        self._own_seen_at = clock()
        self._listens_since: float | None = None  # since the first sign of this replica
        self.own = _new_life()

    @property
    def listened_s(self) -> float:
        """How long the signs of all replicas are read."""
        return 0.0 if self._listens_since is None else self._clock() - self._listens_since

    def __contains__(self, life: str) -> bool:
        return life in self._lives

    def begin_anew(self) -> None:
        """Begin a new life of this replica: the present one has ended."""
        self.own = _new_life()

    def record_sign(
        self, life: str, position: Position, facts: Mapping[str, Any] | None = None
    ) -> None:
        """Record that a replica has written something.

        Args:
            life: of the replica.
            position: of what it has written.
            facts: of a heartbeat; None: it was something else.
        """
        now = self._clock()
        if life == self.own:
            if now - self._own_seen_at > OWN_SILENCE_S:
                self.forgive()
            self._own_seen_at = now
            if self._listens_since is None:
                self._listens_since = now
        known = self._lives.pop(life, None)
        if known is None:
            known = Life(now, position)
        known.seen_at, known.position = now, position
        if facts is not None:
            known.facts = facts
        self._lives[life] = known  # at the end: the longest silent one is the first
        if len(self._lives) > MAX_LIVES:
            del self._lives[next(iter(self._lives))]

    def forgive(self) -> None:
        """Count the silence of all replicas from now on."""
        now = self._clock()
        for life in self._lives.values():
            life.seen_at = now

    def hush(self, life: str) -> None:
        """Count the silence of a replica from now on."""
        if known := self._lives.get(life):
            known.seen_at = self._clock()

    def remove(self, life: str) -> None:
        """Forget a replica."""
        self._lives.pop(life, None)

    def position(self, life: str) -> Position:
        """Return the position of the latest sign of a replica."""
        known = self._lives.get(life)
        return known.position if known is not None else START

    def silent(self, seconds: float) -> Sequence[str]:
        """Return the others that have been silent for longer than some seconds."""
        now = self._clock()
        if now - self._own_seen_at > OWN_SILENCE_S:
            return ()
        return [
            life
            for life, known in self._lives.items()
            if life != self.own and now - known.seen_at > seconds
        ]

    def alive(self, seconds: float) -> Mapping[str, Mapping[str, Any]]:
        """Return the facts of the replicas that have not been silent for longer, in one order."""
        since = self._clock() - seconds
        return {
            life: known.facts
            for life, known in sorted(self._lives.items())
            if known.seen_at >= since
        }


def _new_life() -> str:
    return secrets.token_hex(LIFE_BYTES)
