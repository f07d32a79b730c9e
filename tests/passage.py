"""Stand between a replica and its broker, and pass on what they say: tests interfere."""

import asyncio
from contextlib import suppress
from typing import Self


class Passage:
    """A port that leads to another one of this machine.

    Args:
        port: where it leads.
    """

    def __init__(self, port: int) -> None:
        self._there = port
        self._tasks: dict[asyncio.Task[None], asyncio.StreamWriter] = {}

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        self.port = self._server.sockets[0].getsockname()[1]
        return self

    async def __aexit__(self, *exception: object) -> None:
        self._server.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def opened(self, writer: asyncio.StreamWriter) -> None:
        """Take note of a connection, known by its way back to the replica."""

    def closed(self, writer: asyncio.StreamWriter) -> None:
        """Take note that it has ended."""

    def asks(self, data: bytes, writer: asyncio.StreamWriter) -> None:
        """Take note of what the replica says."""

    def answers(self, data: bytes, writer: asyncio.StreamWriter) -> bytes | None:
        """Return what it hears of what the broker says; None ends the connection."""
        return data

    def leads_to(self) -> int:
        """Return where a new connection goes."""
        return self._there

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks[task] = writer
        self.opened(writer)
        with suppress(OSError, asyncio.CancelledError):
            await self._pass(reader, writer)
        del self._tasks[task]
        self.closed(writer)

    async def _pass(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        there_reader, there = await asyncio.open_connection("127.0.0.1", self.leads_to())

        async def pass_on() -> None:
            while data := await reader.read(1 << 16):
                self.asks(data, writer)
                there.write(data)

        async def pass_back() -> None:
            while data := await there_reader.read(1 << 16):
                heard = self.answers(data, writer)
                if heard is None:
                    return
                writer.write(heard)

        both = {asyncio.create_task(pass_on()), asyncio.create_task(pass_back())}
        try:
            await asyncio.wait(both, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for each in both:
                each.cancel()
            writer.transport.abort()
            there.transport.abort()
            await asyncio.gather(*both, return_exceptions=True)
