"""Collect notices of joins and leaves that are written together. Knows no channel."""

from collections.abc import Iterator, Mapping

from websocket_relay.wire.connection import Connection
from websocket_relay.wire.delivery_format import DeliveryFormat

Watchers = Mapping[DeliveryFormat, list[Connection]]
"""Clients that are notified of joins and leaves a channel."""


class Notices:
    """Notices that are written together.

    Args:
        watchers: who is notified, at the time of the notices; never changed.

    Attributes:
        memory_bytes: of the notices.
    """

    __slots__ = ("_frames", "_watchers", "memory_bytes")

    def __init__(self, watchers: Watchers) -> None:
        self._watchers = watchers
        self._frames: dict[DeliveryFormat, list[bytes]] = {each: [] for each in watchers}
        self.memory_bytes = 0

    def add(self, fields: Mapping[str, object]) -> int:
        """Add a notice; return the bytes of memory that it takes."""
        size = 0
        for delivery_format, frames in self._frames.items():
            frame = delivery_format.encode_notice(fields)
            frames.append(frame)
            size += len(frame)
        self.memory_bytes += size
        return size

    def groups(self) -> Iterator[tuple[list[Connection], bytes]]:
        """Yield clients that are sent the same bytes, and the bytes."""
        for delivery_format, clients in self._watchers.items():
            yield clients, b"".join(self._frames[delivery_format])
