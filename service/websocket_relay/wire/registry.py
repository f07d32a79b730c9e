"""Own the set of established connections. Knows nothing of what they send."""

import asyncio
from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from websocket_relay.wire.connection import Connection


class ConnectionRegistry:
    """The established connections."""

    def __init__(self) -> None:
        self._clients: set[Connection] = set()
        self.none_left = asyncio.Event()
        self.none_left.set()

    def __len__(self) -> int:
        return len(self._clients)

    def __iter__(self) -> Iterator["Connection"]:
        """Iterate over a copy: clients come and go while somebody walks over them."""
        return iter(list(self._clients))

    def add(self, client: "Connection") -> None:
        """Take in a client that got its 101."""
        self._clients.add(client)
        self.none_left.clear()

    def discard(self, client: "Connection") -> bool:
        """Let go of one whose TCP connection ended; tell whether it was here."""
        was_here = client in self._clients
        self._clients.discard(client)
        if not self._clients:
            self.none_left.set()
        return was_here
