"""Notices of joins and leaves that are written together. Knows no channel."""

from collections.abc import Iterable, Iterator, Mapping

from websocket_relay.wire.connection import Connection
from websocket_relay.wire.delivery_format import DeliveryFormat

Notice = Mapping[str, object]
"""The fields of a notice."""

Watchers = Mapping[DeliveryFormat, list[Connection]]
"""Clients that are notified of joins and leaves in a channel."""


class Notices:
    """Notices that are written together.

    Args:
        notices: in their order.
        watchers: who is notified.

    Attributes:
        memory_bytes: of the notices.
    """

    __slots__ = ("_encoded", "_watchers", "memory_bytes")

    def __init__(self, notices: Iterable[Notice], watchers: Watchers) -> None:
        self._watchers = watchers
        self._encoded = {each: b"".join(map(each.encode_notice, notices)) for each in watchers}
        self.memory_bytes = sum(map(len, self._encoded.values()))

    def groups(self) -> Iterator[tuple[list[Connection], bytes]]:
        """Yield clients that are sent the same bytes, and the bytes."""
        for delivery_format, clients in self._watchers.items():
            yield clients, self._encoded[delivery_format]
