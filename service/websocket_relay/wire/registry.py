"""Own the set of established connections. Knows nothing of what they send."""

import asyncio
from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from websocket_relay.wire.connection import Connection


class ConnectionRegistry:
    """The established connections.

    Attributes:
        all_closed: set while there is no established connection.
    """

    def __init__(self) -> None:
        self._connections: set[Connection] = set()
        self.all_closed = asyncio.Event()
        self.all_closed.set()

    def __len__(self) -> int:
        return len(self._connections)

    def __iter__(self) -> Iterator["Connection"]:
        """Iterate over a copy: the set may change during the iteration."""
        return iter(list(self._connections))

    def register(self, client: "Connection") -> None:
        """Register a connection whose 101 response was sent."""
        self._connections.add(client)
        self.all_closed.clear()

    def unregister(self, client: "Connection") -> bool:
        """Remove a connection whose TCP connection ended; return whether it was registered."""
        was_registered = client in self._connections
        self._connections.discard(client)
        if not self._connections:
            self.all_closed.set()
        return was_registered
