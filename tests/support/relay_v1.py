"""Clients with the subprotocol relay.v1: they receive positions and notices, and can resume."""

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

from websockets.asyncio.client import ClientConnection
from websockets.typing import Subprotocol

from tests.support.relay_process import RelayProcess, path_of, receive, receive_many

RELAY_V1 = Subprotocol("relay.v1")
Message = str | bytes


@dataclass
class RelayV1Client:
    """A client with the subprotocol relay.v1.

    Args:
        connection: of the client.
        welcome: the first notice, without the interval of heartbeats.
        heartbeat_ms: that interval.
        position: of the last message, before that of the welcome.
        notices: all later notices.
    """

    connection: ClientConnection
    welcome: dict[str, Any] = field(default_factory=dict)
    heartbeat_ms: int = 0
    position: str = ""
    notices: list[dict[str, Any]] = field(default_factory=list)

    async def next_message(self) -> Message:
        """Return the next message; store its position, and the notices before it."""
        position, message = await self.next_with_position()
        while position == "":
            self.notices.append(json.loads(message))
            position, message = await self.next_with_position()
        assert parse_position(position) > parse_position(self.position), "positions must grow"
        self.position = position
        return message

    async def next_messages(self, count: int) -> list[Message]:
        return [await self.next_message() for _ in range(count)]

    async def next_with_position(self) -> tuple[str, Message]:
        """Return the position and payload of the next message; a notice has an empty position."""
        received = await receive(self.connection)
        if isinstance(received, bytes):
            position, _, payload = received.partition(b"\n")
            return position.decode(), payload
        text_position, _, text = received.partition("\n")
        return text_position, text


def parse_position(position: str) -> tuple[int, ...]:
    """Return the epoch, offset and index of a position."""
    return tuple(map(int, position.split("-")))


def path_with_query(channel: str, **query: object) -> str:
    """Return the path of a channel with a query."""
    text = "&".join(f"{name}={value}" for name, value in query.items())
    return f"{path_of(channel)}?{text}" if text else path_of(channel)


@asynccontextmanager
async def connect_relay_v1(
    relay: RelayProcess, channel: str, *, since: str = "", history: int = 0, **options: Any
) -> AsyncIterator[RelayV1Client]:
    """Connect a client with relay.v1, and read its welcome.

    Args:
        since: the position from which it resumes; empty: it does not resume.
        history: the number of past messages to request.
        options: of `RelayProcess.client`.
    """
    query: dict[str, object] = {"since": since} if since else {}
    if history:
        query["history"] = history
    path = path_with_query(channel, **query)
    # With a bound on its unread messages, the library would not read the answer to its close frame.
    options = {"max_queue": None} | options
    async with relay.client(path=path, subprotocols=[RELAY_V1], **options) as connection:
        assert connection.subprotocol == RELAY_V1
        client = RelayV1Client(connection)
        position, welcome = await client.next_with_position()
        assert position == "", "the first message is no notice"
        client.welcome = json.loads(welcome)
        assert client.welcome["type"] == "welcome"
        client.heartbeat_ms = client.welcome.pop("heartbeat_ms")
        client.position = client.welcome["position"]
        yield client


async def publish_all(relay: RelayProcess, channel: str, *messages: Message) -> None:
    """Publish messages as one client, and wait until all are relayed."""
    async with relay.client(channel) as client:

        async def send() -> None:
            for message in messages:
                await client.send(message)

        async with asyncio.TaskGroup() as group:
            group.create_task(send())
            assert await receive_many(client, len(messages)) == list(messages)


def number_texts(first: int, end: int) -> list[str]:
    """Return the numbers of a range as texts: messages that are easy to compare."""
    return [str(number) for number in range(first, end)]
