"""Own the connections that a run breaks: proxies that delay, drop, cut and reset their data.

Knows no broker and no relay.
"""

import asyncio
import socket
import struct
from collections.abc import Iterable, Mapping
from enum import Enum

from tests.support.tcp_proxy import ProxiedConnection, TcpProxy

RESET = struct.pack("ii", 1, 0)
"""Value of SO_LINGER: an aborted connection sends RST, and drops unsent data."""

ABORT_AFTER_S = 0.1
"""Time in which the sent part of a frame reaches the client."""


class Direction(Enum):
    """One direction of a connection."""

    REQUESTS = "requests"
    REPLIES = "replies"


class BreakableProxy(TcpProxy):
    """A proxy in front of a server.

    Args:
        port: of the server; None: connections end at once.
        roles: the use of connections, by a text that one of their requests contains.
    """

    def __init__(self, port: int | None = None, roles: Mapping[str, bytes] | None = None) -> None:
        super().__init__(port)
        self._markers = dict(roles or {})
        self._roles: dict[ProxiedConnection, str] = {}
        self._held_role = ""
        self._held: dict[tuple[ProxiedConnection, Direction], list[bytes]] = {}
        self._torn: set[ProxiedConnection] = set()
        self._is_partitioned = False

    def hold(self, connections: Iterable[ProxiedConnection], *directions: Direction) -> None:
        """Delay all data until `release`; none is lost."""
        for connection in connections:
            for direction in directions:
                self._held.setdefault((connection, direction), [])

    def hold_role(self, role: str) -> None:
        """Delay replies on connections of a role, new ones included, until `release`."""
        self._held_role = role

    def release(self) -> None:
        """Deliver all delayed data, in order."""
        self._held_role = ""
        held, self._held = self._held, {}
        for (connection, direction), pieces in held.items():
            replies = direction is Direction.REPLIES
            writer = connection.client if replies else connection.server
            if writer is not None and not writer.is_closing():
                writer.write(b"".join(pieces))

    def tear(self) -> None:
        """Close each connection in the middle of the next reply."""
        self._torn.update(self.connections)

    def reset(self, connections: Iterable[ProxiedConnection]) -> None:
        """End connections with RST, on both sides."""
        for connection in connections:
            for writer in (connection.client, connection.server):
                if writer is not None and not writer.transport.is_closing():
                    end = writer.get_extra_info("socket")
                    end.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
            connection.abort()

    def partition(self) -> None:
        """Drop all data, on new connections too, until `reconnect`."""
        self._is_partitioned = True
        self.stall()

    def reconnect(self) -> None:
        """End the partition; new connections work."""
        if self._is_partitioned:
            self._is_partitioned = False
            self.reset(self.connections)

    def heal(self) -> None:
        """Undo everything."""
        self.release()
        self._torn.clear()
        self.reconnect()
        self.reset(
            each for each in self.connections if each.loses_client_bytes or each.loses_server_bytes
        )

    # Hooks of the proxy

    def on_open(self, connection: ProxiedConnection) -> None:
        """Apply the partition to a new connection."""
        connection.loses_client_bytes = connection.loses_server_bytes = self._is_partitioned

    def on_close(self, connection: ProxiedConnection) -> None:
        """Remove the state of a connection."""
        self._torn.discard(connection)
        self._roles.pop(connection, None)
        for direction in Direction:
            self._held.pop((connection, direction), None)

    def on_request(self, data: bytes, connection: ProxiedConnection) -> bytes | None:
        """Forward a request, unless it is delayed."""
        for role, marker in self._markers.items():
            if marker in data:
                self._roles[connection] = role
        return self._unless_held(data, connection, Direction.REQUESTS)

    def on_response(self, data: bytes, connection: ProxiedConnection) -> bytes | None:
        """Forward a reply, unless it is delayed or cut."""
        if connection in self._torn:
            connection.client.write(data[: len(data) // 2])
            asyncio.get_running_loop().call_later(ABORT_AFTER_S, connection.abort)
            return None
        return self._unless_held(data, connection, Direction.REPLIES)

    def _unless_held(
        self, data: bytes, connection: ProxiedConnection, direction: Direction
    ) -> bytes:
        is_role_held = bool(self._held_role) and self._roles.get(connection) == self._held_role
        if is_role_held and direction is Direction.REPLIES:
            self.hold([connection], direction)
        pieces = self._held.get((connection, direction))
        if pieces is None:
            return data
        pieces.append(data)
        return b""
