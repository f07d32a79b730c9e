"""Proxy TCP connections: a test can change the target, cut connections, and make them lose bytes.

Knows no protocol. A subclass may inspect and change the bytes.
"""

import asyncio
from collections.abc import Callable
from contextlib import suppress
from typing import Self

from tests.support.raw_client import PATIENCE_S

HOST = "127.0.0.1"
READ_BYTES = 65_536


class ProxiedConnection:
    """One connection of a client through the proxy.

    Attributes:
        client: the stream to the client.
        server: the stream to the server; None until it is connected.
        loses_client_bytes: whether bytes from the client are discarded.
        loses_server_bytes: whether bytes from the server are discarded.
    """

    def __init__(self, client: asyncio.StreamWriter) -> None:
        self.client = client
        self.server: asyncio.StreamWriter | None = None
        self.loses_client_bytes = False
        self.loses_server_bytes = False

    def abort(self) -> None:
        """Abort both sides."""
        for writer in (self.client, self.server):
            if writer is not None:
                writer.transport.abort()


class TcpProxy:
    """Forwards connections to a port of this machine, in both directions.

    Args:
        target: the port for new connections; None: they are aborted.
    """

    def __init__(self, target: int | None) -> None:
        self.target = target
        self.port = 0
        self._connections: dict[asyncio.Task[None], ProxiedConnection] = {}
        self._lost = asyncio.Event()

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(self._serve, HOST, 0)
        self.port = self._server.sockets[0].getsockname()[1]
        return self

    async def __aexit__(self, *exception: object) -> None:
        self._server.close()
        for task in self._connections:
            task.cancel()
        await asyncio.gather(*self._connections, return_exceptions=True)

    def url(self, path: str = "/") -> str:
        return f"ws://{HOST}:{self.port}{path}"

    # Faults that tests cause. They affect the connections that exist, and no later one.

    @property
    def connections(self) -> list[ProxiedConnection]:
        return list(self._connections.values())

    def cut(self) -> None:
        """Abort all connections."""
        for connection in self.connections:
            connection.abort()

    def lose_client_bytes(self) -> None:
        """Discard all further bytes from clients."""
        for connection in self.connections:
            connection.loses_client_bytes = True

    def lose_server_bytes(self) -> None:
        """Discard all further bytes from the server."""
        for connection in self.connections:
            connection.loses_server_bytes = True

    def stall(self) -> None:
        """Discard all further bytes in both directions, as after a change of the network."""
        self.lose_client_bytes()
        self.lose_server_bytes()

    async def await_lost_bytes(self) -> None:
        """Wait until bytes were discarded."""
        async with asyncio.timeout(PATIENCE_S):
            await self._lost.wait()

    # Hooks for subclasses

    def on_open(self, connection: ProxiedConnection) -> None:
        """Handle a new connection of a client."""

    def on_close(self, connection: ProxiedConnection) -> None:
        """Handle the end of a connection."""

    def on_request(self, data: bytes, connection: ProxiedConnection) -> bytes | None:
        """Return the bytes for the server; None ends the connection."""
        return data

    def on_response(self, data: bytes, connection: ProxiedConnection) -> bytes | None:
        """Return the bytes for the client; None ends the connection."""
        return data

    # One connection

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        connection = self._connections[task] = ProxiedConnection(writer)
        self.on_open(connection)
        with suppress(OSError, asyncio.CancelledError):
            await self._connect(reader, connection)
        connection.abort()
        del self._connections[task]
        self.on_close(connection)

    async def _connect(self, reader: asyncio.StreamReader, connection: ProxiedConnection) -> None:
        if self.target is None:
            return
        server_reader, server = await asyncio.open_connection(HOST, self.target)
        connection.server = server

        def request(data: bytes) -> bytes | None:
            if connection.loses_client_bytes:
                return self._discard()
            return self.on_request(data, connection)

        def response(data: bytes) -> bytes | None:
            if connection.loses_server_bytes:
                return self._discard()
            return self.on_response(data, connection)

        async with asyncio.TaskGroup() as group:
            group.create_task(forward(reader, server, request))
            group.create_task(forward(server_reader, connection.client, response))

    def _discard(self) -> bytes:
        self._lost.set()
        return b""


class BlockedReadsProxy(TcpProxy):
    """A proxy in front of a broker that can block reads of the stream.

    Args:
        port: of the broker.

    Attributes:
        is_blocked: whether the entries that relays read are discarded.
    """

    def __init__(self, port: int) -> None:
        super().__init__(port)
        self.is_blocked = False
        self._reading: set[ProxiedConnection] = set()

    def release(self) -> None:
        """Stop blocking reads."""
        self.is_blocked = False
        self.cut()  # a reply that was partly discarded would corrupt the next one

    def on_close(self, connection: ProxiedConnection) -> None:
        self._reading.discard(connection)

    def on_request(self, data: bytes, connection: ProxiedConnection) -> bytes:
        if b"XREAD" in data or b".CONSUMER.MSG.NEXT." in data:
            self._reading.add(connection)
        return data

    def on_response(self, data: bytes, connection: ProxiedConnection) -> bytes:
        return self._discard() if self.is_blocked and connection in self._reading else data


async def forward(
    reader: asyncio.StreamReader,
    writer: asyncio.StreamWriter,
    change: Callable[[bytes], bytes | None],
) -> None:
    """Forward the bytes of one side, changed, and then its end.

    Args:
        change: returns the bytes to forward; None: ends the connection.
    """
    with suppress(OSError):  # one side has closed: the other one is closed below
        while data := await reader.read(READ_BYTES):
            changed = change(data)
            if changed is None or writer.is_closing():  # uvloop accepts no data then
                break
            writer.write(changed)
            await writer.drain()
    writer.close()
