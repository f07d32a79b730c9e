"""Receive server-sent events on a TCP connection, by the rules of the HTML standard."""

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
    """One event.

    Args:
        id: the last id that the stream has set.
        name: of the event.
        data: its lines, joined.
    """

    id: str
    name: str
    data: str

    @property
    def json(self) -> Any:
        """The data, parsed as JSON."""
        return json.loads(self.data)


class EventStreamResponse:
    """The response to a request for an event stream.

    Attributes:
        status, headers: of the response.
        comments: the number of comments received.
        retry: the last delay before a reconnection that the relay sent, in milliseconds.
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
        """Read the head of the response."""
        lines = (await self._read_until(b"\r\n\r\n")).decode().splitlines()
        self.status = int(lines[0].split()[1])
        fields = [line.partition(": ") for line in lines[1:] if line]
        for name, _, value in fields:
            earlier = self.headers.get(name.lower())
            self.headers[name.lower()] = f"{earlier}, {value}" if earlier else value

    async def next_event(self) -> ServerSentEvent:
        """Return the next event.

        Raises:
            EOFError: the response has ended.
        """
        name = "message"
        data: list[str] = []
        while True:
            line = (await self._read_until(b"\n")).decode().removesuffix("\n")
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
        """Return the data of the next events."""
        return [(await self.next_event()).data for _ in range(count)]

    async def read_body(self) -> str:
        """Return the body of a response that is no event stream."""
        async with asyncio.timeout(PATIENCE_S):
            return (await self._reader.read()).decode()

    async def _read_until(self, separator: bytes) -> bytes:
        async with asyncio.timeout(PATIENCE_S):
            return await self._reader.readuntil(separator)


@asynccontextmanager
async def request_events(
    relay: RelayProcess,
    channel: str | None,
    query: str = "",
    *,
    version: str = "1.1",
    context: ssl.SSLContext | None = None,
    headers: Mapping[str, str] | None = None,
) -> AsyncIterator[EventStreamResponse]:
    """Request the events of a channel, and read the head of the response.

    Args:
        channel: None: the path names none, the query may.
        query: of the URL, with its question mark.
        version: of HTTP.
        context: for TLS.
        headers: that differ.
    """
    reader, writer = await asyncio.open_connection(HOST, relay.port, ssl=context, limit=1 << 24)
    fields = {
        "Host": "localhost",
        "Accept": "text/event-stream",
        "Connection": "close",
        **(headers or {}),
    }
    lines = "".join(f"{name}: {value}\r\n" for name, value in fields.items())
    path = f"/channels/{channel}/events" if channel is not None else "/events"
    writer.write(f"GET {path}{query} HTTP/{version}\r\n{lines}\r\n".encode())
    events = EventStreamResponse(reader, writer)
    try:
        await events.read_head()
        yield events
    finally:
        writer.transport.abort()


@asynccontextmanager
async def subscribe_events(
    relay: RelayProcess, channel: str | None, query: str = "", **options: Any
) -> AsyncIterator[EventStreamResponse]:
    """Subscribe to the events of a channel, and read the event `welcome`."""
    async with request_events(relay, channel, query, **options) as events:
        assert events.status == 200
        welcome = await events.next_event()
        assert welcome.name == "welcome"
        yield events
