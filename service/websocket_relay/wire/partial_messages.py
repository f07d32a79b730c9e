"""Bound the memory of incomplete incoming messages of all clients together. Knows no frame.

limits.max_message_bytes bounds one message. Without this bound, ten thousand clients that each
start a message of that size and stall would fill the memory, and nothing else would close them:
they answer pings.
"""

from typing import Protocol


class PartialSender(Protocol):
    """A client with an incomplete message."""

    def drop_partial_message(self) -> None: ...


class PartialMessages:
    """The incomplete incoming messages.

    Args:
        limit_bytes: maximum of all together; above it, the senders of the largest are closed.
    """

    def __init__(self, limit_bytes: int) -> None:
        self.limit_bytes = limit_bytes
        self._bytes_by_sender: dict[PartialSender, int] = {}
        self.total_bytes = 0

    def record_partial_bytes(self, sender: PartialSender, buffered_bytes: int) -> None:
        """Record how much of a client's message is buffered: 0 once it is complete or discarded."""
        self.total_bytes += buffered_bytes - self._bytes_by_sender.pop(sender, 0)
        if buffered_bytes:
            self._bytes_by_sender[sender] = buffered_bytes
        while self.total_bytes > self.limit_bytes:
            max(self._bytes_by_sender, key=self._bytes_by_sender.__getitem__).drop_partial_message()
