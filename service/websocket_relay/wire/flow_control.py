"""Pause publishers while too many of their bytes wait. Knows no connection and no channel.

TCP does the rest: a publisher that is not read fills its own send buffer and blocks.
"""

import asyncio

from websocket_relay.messages import Pausable


class HighWaterMark:
    """A bound on waiting bytes, and the publishers that are paused until there are fewer.

    The low-water mark, at which publishers resume, is half of the limit.

    Args:
        limit_bytes: the high-water mark, above which publishers are paused.
    """

    def __init__(self, limit_bytes: int) -> None:
        self.limit_bytes = limit_bytes
        self._paused: dict[Pausable, None] = {}
        self._is_resuming = False
        self.bytes = 0

    @property
    def is_exceeded(self) -> bool:
        """Whether the waiting bytes are above the high-water mark."""
        return self.bytes > self.limit_bytes

    def pause_publisher(self, publisher: Pausable) -> bool:
        """Pause a publisher unless it is paused here already; return whether that changed it."""
        if publisher in self._paused:
            return False
        self._paused[publisher] = None
        publisher.pause_reading()
        return True

    def resume_publisher(self, publisher: object) -> None:
        """Resume a publisher, if it is paused here."""
        if publisher in self._paused:
            del self._paused[publisher]
            publisher.resume_reading()

    async def wait_below(self) -> None:
        """Return at once below the high-water mark, else when a publisher would be resumed."""
        if self.is_exceeded:
            turn = _Turn()
            self.pause_publisher(turn)
            try:
                await turn.has_come.wait()
            finally:
                self.resume_publisher(turn)

    def drained(self, size: int) -> None:
        """Subtract processed bytes; resume publishers below the low-water mark."""
        self.bytes -= size
        if self._paused and not self._is_resuming and self._bytes_below_low_water >= 0:
            self._is_resuming = True
            asyncio.get_running_loop().call_soon(self._resume_some)

    @property
    def _bytes_below_low_water(self) -> int:
        return self.limit_bytes // 2 - self.bytes

    def _resume_some(self) -> None:
        # In the order in which they were paused. One iteration of the loop resumes only as many
        # as fit below the low-water mark: all at once would send everything that has gathered in
        # their socket buffers.
        for _ in range(1 + max(0, self._bytes_below_low_water) // RESUMED_READ_BYTES):
            if self._paused:
                self.resume_publisher(next(iter(self._paused)))
        self._is_resuming = bool(self._paused) and self._bytes_below_low_water >= 0
        if self._is_resuming:  # the resumed ones may send nothing: resume more
            asyncio.get_running_loop().call_soon(self._resume_some)


class _Turn:
    """A publisher without a connection, which waits to be resumed once."""

    def __init__(self) -> None:
        self.has_come = asyncio.Event()

    def pause_reading(self) -> None: ...

    def resume_reading(self) -> None:
        self.has_come.set()


RESUMED_READ_BYTES = 65_536
"""What a resumed publisher is expected to send with its first read."""
