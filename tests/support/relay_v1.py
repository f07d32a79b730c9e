"""Clients of the subprotocol relay.v1, with one channel by their path or any number by commands."""

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
Notice = dict[str, Any]

ROUTINE = {"heartbeat", "live", "published"}
"""The types of notices that come at any time."""


def encode_command(kind: str, payload: Message = "", **fields: object) -> Message:
    """Return a command: its header, and its payload."""
    header = json.dumps({"type": kind, **fields})
    if isinstance(payload, bytes):
        return header.encode() + b"\n" + payload
    return f"{header}\n{payload}"


def decode(received: Message) -> tuple[Notice, Message]:
    """Return the header and the payload of what the relay sends."""
    if isinstance(received, bytes):
        line, _, payload = received.partition(b"\n")
        return json.loads(line), payload
    text_line, _, text = received.partition("\n")
    return json.loads(text_line), text


@dataclass
class RelayV1Client:
    """A client of relay.v1.

    Args:
        connection: of the client.

    Attributes:
        welcome: the first notice.
        subscribed: the answer to the subscription by the path; empty: there is none.
        position: of the last message, before that of `subscribed`.
        notices: those that `next_message` has passed over, without routine ones.
    """

    connection: ClientConnection
    channel: str = ""
    welcome: Notice = field(default_factory=dict)
    subscribed: Notice = field(default_factory=dict)
    position: str = ""
    notices: list[Notice] = field(default_factory=list)
    last_id: int = 0

    @property
    def recovery(self) -> tuple[bool, str]:
        """Whether the subscription by the path is recovered, and where its replay starts."""
        return self.subscribed["recovered"], self.subscribed["position"]

    async def receive(self) -> tuple[Notice, Message]:
        """Return the header and the payload of whatever comes next."""
        return decode(await receive(self.connection))

    async def next_notice(self, kind: str = "") -> Notice:
        """Return the next notice, of a kind if it is given; no message may come before it.

        Without a kind, heartbeats are skipped.
        """
        skipped = ROUTINE - {kind} if kind else {"heartbeat"}
        header, payload = await self.receive()
        while header.get("type") in skipped:
            header, payload = await self.receive()
        assert header.get("type", "message") == (kind or header["type"]), (header, payload)
        assert payload == ""
        return header

    async def next_message(self) -> Message:
        """Return the next message; store its position, and the notices before it."""
        header, payload = await self.receive()
        while "type" in header:
            if header["type"] not in ROUTINE:
                self.notices.append(header)
            header, payload = await self.receive()
        position = header["position"]
        is_first = not self.position
        assert is_first or parse_position(position) > parse_position(self.position), (
            "positions must grow"
        )
        self.position = position
        return payload

    async def next_messages(self, count: int) -> list[Message]:
        return [await self.next_message() for _ in range(count)]

    async def send(self, kind: str, payload: Message = "", **fields: Any) -> int:
        """Send a command with the next id; return that."""
        self.last_id += 1
        header: dict[str, Any] = {"id": self.last_id, **fields}
        await self.connection.send(encode_command(kind, payload, **header))
        return self.last_id

    async def publish(self, message: Message, **fields: Any) -> int:
        """Publish a message, to the channel of the path if no other is given; return the id."""
        header: dict[str, Any] = {"channel": self.channel, **fields}
        return await self.send("publish", message, **header)

    async def subscribe(self, channel: str, **fields: Any) -> Notice:
        """Subscribe to a channel; return the answer."""
        number = await self.send("subscribe", channel=channel, **fields)
        notice = await self.next_notice()
        while notice["type"] not in {"subscribed", "error"}:
            notice = await self.next_notice()
        assert notice["id"] == number
        return notice


def parse_position(position: str) -> tuple[int, ...]:
    """Return the epoch, offset and index of a position."""
    return tuple(map(int, position.split("-")))


def path_with_query(channel: str, **query: object) -> str:
    """Return the path of a channel with a query."""
    text = "&".join(f"{name}={value}" for name, value in query.items())
    return f"{path_of(channel)}?{text}" if text else path_of(channel)


@asynccontextmanager
async def open_relay_v1(
    relay: RelayProcess, path: str = "/", **options: Any
) -> AsyncIterator[RelayV1Client]:
    """Connect a client with relay.v1, and read its welcome.

    Args:
        options: of `RelayProcess.client`.
    """
    # With a bound on its unread messages, the library would not read the answer to its close frame.
    options = {"max_queue": None} | options
    async with relay.client(path=path, subprotocols=[RELAY_V1], **options) as connection:
        assert connection.subprotocol == RELAY_V1
        client = RelayV1Client(connection)
        client.welcome = await client.next_notice("welcome")
        yield client


@asynccontextmanager
async def connect_relay_v1(
    relay: RelayProcess, channel: str, *, since: str = "", history: int = 0, **options: Any
) -> AsyncIterator[RelayV1Client]:
    """Connect a client with relay.v1 that is subscribed by its path.

    Args:
        since: the position from which it resumes; empty: it does not resume.
        history: the number of past messages to request.
        options: of `RelayProcess.client`.
    """
    query: dict[str, object] = {"since": since} if since else {}
    if history:
        query["history"] = history
    async with open_relay_v1(relay, path_with_query(channel, **query), **options) as client:
        client.channel = channel
        client.subscribed = await client.next_notice("subscribed")
        client.position = client.subscribed["position"]
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
