"""Hold publishers back while too much of what they said waits to be written.

TCP does the rest: a publisher whose connection is not read fills its own socket and waits.
"""

from typing import Protocol


class Publisher(Protocol):
    """What is asked of a client that publishes too fast."""

    def pause_reading(self) -> None: ...
    def resume_reading(self) -> None: ...


class Gate:
    """A bound on bytes that wait, and the publishers who wait for them to be fewer.

    What passes the bound is at most one read of each publisher: it is paused in the act.

    Args:
        limit_bytes: publishers are held from here on.
    """

    def __init__(self, limit_bytes: int) -> None:
        self._limit_bytes = limit_bytes
        self._held: dict[Publisher, None] = {}
        self.bytes = 0

    def __len__(self) -> int:
        return len(self._held)

    @property
    def is_shut(self) -> bool:
        """Whether more waits than should."""
        return self.bytes > self._limit_bytes

    def hold(self, publisher: Publisher) -> bool:
        """Pause a publisher, if it is not paused here already; tell whether it was news."""
        if publisher in self._held:
            return False
        self._held[publisher] = None
        publisher.pause_reading()
        return True

    def release(self, publisher: Publisher) -> None:
        """Let one go that is leaving."""
        if publisher in self._held:
            del self._held[publisher]
            publisher.resume_reading()

    def drained(self, size: int) -> None:
        """Take note that so many bytes were written; let publishers go on once half is free.

        They go on in the order they were held, and only as many as there is room for, each with
        a read of RESUMED_READ_BYTES.
        """
        self.bytes -= size
        room = self._limit_bytes // 2 - self.bytes
        while self._held and room >= 0:
            self.release(next(iter(self._held)))
            room -= RESUMED_READ_BYTES


RESUMED_READ_BYTES = 65_536
"""What a released publisher is expected to bring with its first read."""
