"""Keep the log in the process: one replica, a counter, a plain call."""

import time

from service.backplane.base import Deliver, Entry, Position


class MemoryBackplane:
    """`memory://`: an entry is delivered before `append` returns.

    The log is lost with the process. The next one's positions are greater all the same, as long as
    the clock does not go back: they begin with the time of its start.
    """

    def __init__(self) -> None:
        self._started_ms = time.time_ns() // 1_000_000
        self._count = 0
        self._deliver: Deliver | None = None

    def tail(self, deliver: Deliver) -> Position:
        """Give every entry from now on to `deliver`; return what they are behind."""
        self._deliver = deliver
        return Position(self._started_ms, self._count, 0)

    def append(self, channel: str, opcode: int, payload: bytes) -> None:
        """Add a message at the end, and deliver it."""
        self._count += 1
        if self._deliver is not None:
            position = Position(self._started_ms, self._count, 0)
            self._deliver(Entry(position, channel, opcode, payload))
