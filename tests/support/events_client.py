"""A client of server-sent events, as the standard has it, over a plain connection."""

import asyncio
import json
import ssl
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

from tests.support.raw_client import PATIENCE_S
from tests.support.relay_process import HOST, RelayProcess


@dataclass(frozen=True, slots=True)
class ServerSentEvent:
    """One event: the id that stood last, its name, and what it says."""

    id: str
    name: str
    data: str

    @property
    def json(self) -> Any:
        """What it says, where that is JSON."""
        return json.loads(self.data)


class EventStreamResponse:
    """An answer of server-sent events.

    Attributes:
        status, headers: of the answer.
        comments: how many comments came.
        retry: when to come back, as was said last, in milliseconds.
    """

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self.writer = writer
        self.status = 0
        self.headers: dict[str, str] = {}
        self.comments = 0
        self.retry: int | None = None
        self._id = ""

    async def read_head(self) -> None:
        """Read the answer's head."""
        lines = (await self._until(b"\r\n\r\n")).decode().splitlines()
        self.status = int(lines[0].split()[1])
        fields = [line.partition(": ") for line in lines[1:] if line]
        for name, _, value in fields:
            had = self.headers.get(name.lower())
            self.headers[name.lower()] = f"{had}, {value}" if had else value

    async def next_event(self) -> ServerSentEvent:
        """Return the next event.

        Raises:
            EOFError: the answer has ended.
        """
        name = "message"
        data: list[str] = []
        while True:
            line = (await self._until(b"\n")).decode().removesuffix("\n")
            if not line:
                if data:
                    return ServerSentEvent(self._id, name, "\n".join(data))
                name = "message"
                continue
            field, _, value = line.partition(":")
            value = value.removeprefix(" ")
            match field:
                case "":
                    self.comments += 1
                case "event":
                    name = value
                case "data":
                    data.append(value)
                case "id":
                    self._id = value
                case "retry":
                    self.retry = int(value)

    async def next_messages(self, count: int) -> list[str]:
        """Return what the next events say."""
        return [(await self.next_event()).data for _ in range(count)]

    async def read_body(self) -> str:
        """Return all of an answer that is none of events."""
        async with asyncio.timeout(PATIENCE_S):
            return (await self._reader.read()).decode()

    async def _until(self, mark: bytes) -> bytes:
        async with asyncio.timeout(PATIENCE_S):
            return await self._reader.readuntil(mark)


@asynccontextmanager
async def request_events(
    relay: RelayProcess,
    channel: str,
    query: str = "",
    *,
    version: str = "1.1",
    context: ssl.SSLContext | None = None,
    headers: Mapping[str, str] | None = None,
) -> AsyncIterator[EventStreamResponse]:
    """Ask for a channel's events, and read the answer's head."""
    reader, writer = await asyncio.open_connection(HOST, relay.port, ssl=context, limit=1 << 24)
    fields = {
        "Host": "localhost",
        "Accept": "text/event-stream",
        "Connection": "close",
        **(headers or {}),
    }
    lines = "".join(f"{name}: {value}\r\n" for name, value in fields.items())
    path = f"/channels/{channel}/events{query}"
    writer.write(f"GET {path} HTTP/{version}\r\n{lines}\r\n".encode())
    events = EventStreamResponse(reader, writer)
    try:
        await events.read_head()
        yield events
    finally:
        writer.transport.abort()


@asynccontextmanager
async def subscribe_events(
    relay: RelayProcess, channel: str, query: str = "", **options: Any
) -> AsyncIterator[EventStreamResponse]:
    """Listen to a channel, from its welcome on."""
    async with request_events(relay, channel, query, **options) as events:
        assert events.status == 200
        welcome = await events.next_event()
        assert welcome.name == "welcome"
        yield events
