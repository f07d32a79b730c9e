"""Bound what all clients together have begun to say and not finished.

One message has its bound, limits.max_message_bytes. Ten thousand clients who each begin one that
long and go silent would still fill the memory, and nothing else would end them: they answer pings.
"""

from typing import Protocol


class PartialSender(Protocol):
    """What is asked of a client that has begun a message."""

    def drop_unfinished(self) -> None: ...


class PartialMessages:
    """The messages that are not whole yet.

    Args:
        limit_bytes: what they may come to; past it those who have said most are closed.
    """

    def __init__(self, limit_bytes: int) -> None:
        self._limit_bytes = limit_bytes
        self._kept: dict[PartialSender, int] = {}
        self.total_bytes = 0

    def note(self, speaker: PartialSender, kept_bytes: int) -> None:
        """Take note of what is kept of a client's message; nothing once it is whole or lost."""
        self.total_bytes += kept_bytes - self._kept.pop(speaker, 0)
        if kept_bytes:
            self._kept[speaker] = kept_bytes
        while self.total_bytes > self._limit_bytes:
            max(self._kept, key=self._kept.__getitem__).drop_unfinished()
