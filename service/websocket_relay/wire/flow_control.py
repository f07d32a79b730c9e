"""Hold publishers back while too much of what they said waits to be written.

TCP does the rest: a publisher whose connection is not read fills its own socket and waits.
"""

import asyncio
from typing import Protocol


class Pausable(Protocol):
    """What is asked of a client that publishes too fast."""

    def pause_reading(self) -> None: ...
    def resume_reading(self) -> None: ...


class HighWaterMark:
    """A bound on bytes that wait, and the publishers who wait for them to be fewer.

    Args:
        limit_bytes: publishers are held from here on.
    """

    def __init__(self, limit_bytes: int) -> None:
        self.limit_bytes = limit_bytes
        self._held: dict[Pausable, None] = {}
        self._is_opening = False
        self.bytes = 0

    @property
    def is_shut(self) -> bool:
        """Whether more waits than should."""
        return self.bytes > self.limit_bytes

    def hold(self, publisher: Pausable) -> bool:
        """Pause a publisher, if it is not paused here already; tell whether it was news."""
        if publisher in self._held:
            return False
        self._held[publisher] = None
        publisher.pause_reading()
        return True

    def release(self, publisher: object) -> None:
        """Let one go that is leaving, if it is held."""
        if publisher in self._held:
            del self._held[publisher]
            publisher.resume_reading()

    def drained(self, size: int) -> None:
        """Take note that so many bytes were written; let publishers go on once half is free."""
        self.bytes -= size
        if self._held and not self._is_opening and self._room >= 0:
            self._is_opening = True
            asyncio.get_running_loop().call_soon(self._open)

    @property
    def _room(self) -> int:
        return self.limit_bytes // 2 - self.bytes

    def _open(self) -> None:
        # In the order they were held, and in one turn of the loop only as many as there is room
        # for: all at once they would bring all that has gathered in their sockets.
        for _ in range(1 + max(0, self._room) // RESUMED_READ_BYTES):
            if self._held:
                self.release(next(iter(self._held)))
        self._is_opening = bool(self._held) and self._room >= 0
        if self._is_opening:  # those released may have nothing to say; the others go next
            asyncio.get_running_loop().call_soon(self._open)


RESUMED_READ_BYTES = 65_536
"""What a released publisher is expected to bring with its first read."""
