"""Decide who may come in. Knows no HTTP framework; a refusal is a fact for others to tell."""

import random
import re
from collections.abc import Callable, Sequence

from service.errors import Refusal
from service.health import Health

CHANNEL_NAME = re.compile(r"[A-Za-z0-9._:-]{1,128}")

DEFAULT_CHANNEL = "default"

RETRY_AFTER_S = (1, 5)
"""Between these a refused client is told to come back, at random, so that not all do at once."""


class Admission:
    """The checks before an upgrade, in the order in which a client hears of them.

    Args:
        allowed_origins: what browsers may say in Origin; `*` lets all in.
        max_connections: clients at a time; 0 for no limit.
        connections: tells how many there are.
        has_room: tells whether a channel may be joined.
        health: tells whether the relay stops.
    """

    def __init__(
        self,
        *,
        allowed_origins: Sequence[str],
        max_connections: int,
        connections: Callable[[], int],
        has_room: Callable[[str], bool],
        health: Health,
    ) -> None:
        lowered = {origin.lower() for origin in allowed_origins}
        self._origins = None if "*" in lowered else lowered
        self._max_connections = max_connections
        self._connections = connections
        self._has_room = has_room
        self._health = health

    def refusal(self, channel: str, origin: str | None) -> Refusal | None:
        """Return why a client may not join a channel, or None where it may.

        Args:
            channel: the name in the path.
            origin: the Origin header; only browsers send one, and they always do.
        """
        if not CHANNEL_NAME.fullmatch(channel):
            return Refusal.PATH
        if self._origins is not None and origin is not None and origin.lower() not in self._origins:
            return Refusal.ORIGIN
        if self._health.refusing:
            return Refusal.DRAINING
        if self._max_connections and self._connections() >= self._max_connections:
            return Refusal.CONNECTIONS
        if not self._has_room(channel):
            return Refusal.CHANNELS
        return None


def retry_after_s() -> int:
    """Return when a client that was refused for now should come back."""
    return random.randint(*RETRY_AFTER_S)
