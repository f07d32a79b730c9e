"""Stand between two ends of TCP: a proxy that can be led elsewhere, cut, and made to lose bytes.

Knows no protocol. A subclass may look at what is said, and change it.
"""

import asyncio
from collections.abc import Callable
from contextlib import suppress
from typing import Self

from tests.support.raw_client import PATIENCE_S

HOST = "127.0.0.1"
READ_BYTES = 65_536


class ProxiedConnection:
    """One client's way to the server.

    Attributes:
        client: what is written to the client.
        server: what is written to the server, once it is connected.
        is_muted: what the client says is lost.
        is_deaf: what the server says is lost.
    """

    def __init__(self, client: asyncio.StreamWriter) -> None:
        self.client = client
        self.server: asyncio.StreamWriter | None = None
        self.loses_client_bytes = False
        self.loses_server_bytes = False

    def abort(self) -> None:
        """End it at once, without a word."""
        for writer in (self.client, self.server):
            if writer is not None:
                writer.transport.abort()


class TcpProxy:
    """Passes on to a port of this machine all that is said to its own, and back.

    Args:
        target: the port that new connections go to; None: they end at once.
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

    # What tests do. It concerns the connections of now; later ones are whole.

    @property
    def connections(self) -> list[ProxiedConnection]:
        return list(self._connections.values())

    def cut(self) -> None:
        """End all connections at once, without a word."""
        for connection in self.connections:
            connection.abort()

    def lose_client_bytes(self) -> None:
        """Lose what clients say from now on."""
        for connection in self.connections:
            connection.loses_client_bytes = True

    def lose_server_bytes(self) -> None:
        """Lose what clients are told from now on."""
        for connection in self.connections:
            connection.loses_server_bytes = True

    def stall(self) -> None:
        """Lose everything from now on, as when the network is another."""
        self.lose_client_bytes()
        self.lose_server_bytes()

    async def await_lost_bytes(self) -> None:
        """Wait until bytes were lost."""
        async with asyncio.timeout(PATIENCE_S):
            await self._lost.wait()

    # What subclasses look at

    def on_open(self, connection: ProxiedConnection) -> None:
        """Take note of a client."""

    def on_close(self, connection: ProxiedConnection) -> None:
        """Take note that its connection has ended."""

    def on_request(self, data: bytes, connection: ProxiedConnection) -> bytes | None:
        """Return what the server hears of what the client says; None ends the connection."""
        return data

    def on_response(self, data: bytes, connection: ProxiedConnection) -> bytes | None:
        """Return what the client hears of what the server says; None ends the connection."""
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
        client = connection.client
        back, server = await asyncio.open_connection(HOST, self.target)
        connection.server = server

        def up(data: bytes) -> bytes | None:
            return (
                self._lose() if connection.loses_client_bytes else self.on_request(data, connection)
            )

        def down(data: bytes) -> bytes | None:
            return (
                self._lose()
                if connection.loses_server_bytes
                else self.on_response(data, connection)
            )

        async with asyncio.TaskGroup() as group:
            group.create_task(forward(reader, server, up))
            group.create_task(forward(back, client, down))

    def _lose(self) -> bytes:
        self._lost.set()
        return b""


class BlockedReadsProxy(TcpProxy):
    """A way to a broker on which, while it is told so, nothing of a stream can be read.

    Args:
        port: the broker's.

    Attributes:
        is_held: whether it is.
    """

    def __init__(self, port: int) -> None:
        super().__init__(port)
        self.is_blocked = False
        self._reading: set[ProxiedConnection] = set()

    def release(self) -> None:
        """Let the stream be read again."""
        self.is_blocked = False
        self.cut()  # what was lost of an answer would be missing in the next one

    def on_close(self, connection: ProxiedConnection) -> None:
        self._reading.discard(connection)

    def on_request(self, data: bytes, connection: ProxiedConnection) -> bytes:
        if b"XREAD" in data or b".CONSUMER.MSG.NEXT." in data:
            self._reading.add(connection)
        return data

    def on_response(self, data: bytes, connection: ProxiedConnection) -> bytes:
        return self._lose() if self.is_blocked and connection in self._reading else data


async def forward(
    reader: asyncio.StreamReader,
    writer: asyncio.StreamWriter,
    passed: Callable[[bytes], bytes | None],
) -> None:
    """Pass on what one side says, as it is changed, and its end."""
    with suppress(OSError):  # one side is gone, and the other learns it
        while data := await reader.read(READ_BYTES):
            said = passed(data)
            if said is None or writer.is_closing():  # uvloop takes nothing then
                break
            writer.write(said)
            await writer.drain()
    writer.close()
