"""Clients that speak relay.v1: they know each message's position, and come back with it."""

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
    """A client that speaks relay.v1, and what it was told."""

    connection: ClientConnection
    welcome: dict[str, Any] = field(default_factory=dict)
    position: str = ""
    notices: list[dict[str, Any]] = field(default_factory=list)  # by the relay itself

    async def next_message(self) -> Message:
        """Return the next message without its position, which is remembered."""
        position, message = await self.next_with_position()
        while position == "":
            self.notices.append(json.loads(message))
            position, message = await self.next_with_position()
        assert parse_position(position) > parse_position(self.position), "positions grow"
        self.position = position
        return message

    async def next_messages(self, count: int) -> list[Message]:
        return [await self.next_message() for _ in range(count)]

    async def next_with_position(self) -> tuple[str, Message]:
        received = await receive(self.connection)
        if isinstance(received, bytes):
            position, _, payload = received.partition(b"\n")
            return position.decode(), payload
        text_position, _, text = received.partition("\n")
        return text_position, text


def parse_position(position: str) -> tuple[int, ...]:
    return tuple(map(int, position.split("-")))


def path_with_query(channel: str, **query: object) -> str:
    asked = "&".join(f"{name}={value}" for name, value in query.items())
    return f"{path_of(channel)}?{asked}" if asked else path_of(channel)


@asynccontextmanager
async def connect_relay_v1(
    relay: RelayProcess, channel: str, *, since: str = "", history: int = 0, **options: Any
) -> AsyncIterator[RelayV1Client]:
    """Connect a client that speaks relay.v1, and read its welcome."""
    query: dict[str, object] = {"since": since} if since else {}
    if history:
        query["history"] = history
    path = path_with_query(channel, **query)
    # With a bound on what it has not read, this client would not see the answer to its close.
    options = {"max_queue": None} | options
    async with relay.client(path=path, subprotocols=[RELAY_V1], **options) as connection:
        assert connection.subprotocol == RELAY_V1
        heard = RelayV1Client(connection)
        position, welcome = await heard.next_with_position()
        assert position == "", "the first is the relay's own"
        heard.welcome = json.loads(welcome)
        assert heard.welcome["type"] == "welcome"
        heard.position = heard.welcome["position"]
        yield heard


async def publish_all(relay: RelayProcess, channel: str, *messages: Message) -> None:
    """Have somebody say something, and wait until it was relayed."""
    async with relay.client(channel) as client:

        async def send() -> None:
            for message in messages:
                await client.send(message)

        async with asyncio.TaskGroup() as group:
            group.create_task(send())
            assert await receive_many(client, len(messages)) == list(messages)


def number_texts(first: int, end: int) -> list[str]:
    return [str(number) for number in range(first, end)]
