"""Relaying: every client of a channel receives every message once, in one order, unchanged."""

import asyncio
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager

from websockets.asyncio.client import ClientConnection
from websockets.typing import Data

from tests.support.relay_process import RelayProcess, receive, receive_many

MIB = 1_048_576


@asynccontextmanager
async def connected_clients(
    relay: RelayProcess, channel: str, count: int
) -> AsyncIterator[list[ClientConnection]]:
    async with AsyncExitStack() as stack:
        yield [await stack.enter_async_context(relay.client(channel)) for _ in range(count)]


async def test_a_ping_is_answered(relay: RelayProcess, channel: str) -> None:
    async with relay.client(channel) as client:
        await asyncio.wait_for(await client.ping(), 20)


async def test_a_message_is_delivered_to_every_client_of_the_channel(
    relay: RelayProcess, channel: str
) -> None:
    """The publisher is one of these clients."""
    async with connected_clients(relay, channel, 5) as clients:
        await clients[0].send("hello")
        assert [await receive(client) for client in clients] == ["hello"] * 5


async def test_a_client_receives_every_message_that_is_published_after_its_upgrade(
    relay: RelayProcess, channel: str
) -> None:
    """A message that was published before is not delivered to it."""
    async with relay.client(channel) as publisher:
        for number in range(30):
            async with relay.client(channel) as subscriber:
                await publisher.send(str(number))
                assert await receive(subscriber) == str(number)
        assert await receive_many(publisher, 30) == [str(number) for number in range(30)]


PAYLOADS: list[Data] = [
    "text",
    b"binary",
    "",
    b"",
    "žluťoučký kůň \U0001f40e 日本語 \u200d",
    "\ufeffbyte order mark, noncharacters \uffff \U0010ffff",
    "NUL\x00\x00",
    b"\x00\x00\x00",
    bytes(range(256)),
    '{"looks": "like JSON"}\r\n\r\n',
]


async def test_a_message_is_delivered_unchanged(relay: RelayProcess, channel: str) -> None:
    async with relay.client(channel) as publisher, relay.client(channel) as subscriber:
        for payload in PAYLOADS:
            await publisher.send(payload)
            for client in (publisher, subscriber):
                received = await receive(client)
                assert received == payload
                assert type(received) is type(payload)


async def test_a_message_of_any_allowed_size_is_delivered_whole(
    relay: RelayProcess, channel: str
) -> None:
    """The length field of a frame changes after 125 and 65,535 bytes (RFC 6455 section 5.2)."""
    async with relay.client(channel) as publisher, relay.client(channel) as subscriber:
        for size in (1, 125, 126, 65_535, 65_536, MIB):
            binary = (bytes(range(251)) * (size // 251 + 1))[:size]
            for message in (binary, "x" * size):
                await publisher.send(message)
                assert await receive(subscriber) == message
                assert await receive(publisher) == message


async def test_text_and_binary_messages_keep_their_type_and_order(
    relay: RelayProcess, channel: str
) -> None:
    messages: list[Data] = [
        str(number) if number % 3 else str(number).encode() for number in range(300)
    ]
    async with relay.client(channel) as publisher, relay.client(channel) as subscriber:
        for message in messages:
            await publisher.send(message)
        assert await receive_many(subscriber, 300) == messages
        assert await receive_many(publisher, 300) == messages


async def test_all_clients_receive_the_messages_of_many_publishers_in_one_order(
    relay: RelayProcess, channel: str
) -> None:
    async def publish(client: ClientConnection, name: int) -> None:
        for number in range(100):
            await client.send(f"{name} {number}")

    async with connected_clients(relay, channel, 6) as clients, asyncio.TaskGroup() as group:
        received = [group.create_task(receive_many(client, 500)) for client in clients]
        for name, client in enumerate(clients[:5]):
            group.create_task(publish(client, name))
    order = received[0].result()
    assert all(task.result() == order for task in received)
    for name in range(5):
        own = [message for message in order if str(message).startswith(f"{name} ")]
        assert own == [f"{name} {number}" for number in range(100)]


async def test_many_clients_that_publish_at_once_all_receive_every_message_once(
    relay: RelayProcess, channel: str
) -> None:
    count, per_client = 40, 3

    async def publish_and_receive(client: ClientConnection, name: int) -> Counter[Data]:
        for number in range(per_client):
            await client.send(f"{name} {number}")
        return Counter(await receive_many(client, count * per_client))

    async with connected_clients(relay, channel, count) as clients:
        async with asyncio.TaskGroup() as group:
            received = [
                group.create_task(publish_and_receive(client, name))
                for name, client in enumerate(clients)
            ]
        published = [f"{name} {number}" for name in range(count) for number in range(per_client)]
        assert all(task.result() == Counter(published) for task in received)
        await clients[0].send("the end")
        assert [await receive(client) for client in clients] == ["the end"] * count


async def test_the_end_of_a_client_is_counted_and_the_others_stay_connected(
    relay: RelayProcess, channel: str
) -> None:
    """A client closes, is reset, or ends its stream without a close frame."""

    async def close() -> None:
        async with relay.client(channel):
            await relay.await_metric("websocket_connected_clients", 3)

    async def reset() -> None:
        async with relay.raw_client(channel) as raw:
            await relay.await_metric("websocket_connected_clients", 3)
            raw.reset()

    async def end_stream() -> None:
        async with relay.raw_client(channel) as raw:
            await relay.await_metric("websocket_connected_clients", 3)
            raw.end_stream()
            await raw.read_to_end()

    before = await relay.metric("websocket_disconnections_total")
    async with connected_clients(relay, channel, 2) as (publisher, subscriber):
        for number, end_client in enumerate((close, reset, end_stream), start=1):
            await end_client()
            await relay.await_metric("websocket_connected_clients", 2)
            await publisher.send(str(number))
            assert await receive(subscriber) == str(number)
            assert await relay.metric("websocket_disconnections_total") == before + number


async def test_clients_that_connect_and_disconnect_do_not_disturb_the_others(
    relay: RelayProcess, channel: str
) -> None:
    async def connect_and_disconnect() -> None:
        for turn in range(15):
            async with relay.raw_client(channel) as raw:
                if turn % 2:
                    raw.reset()

    async with connected_clients(relay, channel, 2) as (publisher, subscriber):
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(connect_and_disconnect()) for _ in range(4)]
            sent = 0
            while not all(task.done() for task in tasks):
                await publisher.send(str(sent))
                assert await receive(publisher) == str(sent)
                sent += 1
        assert await receive_many(subscriber, sent) == [str(number) for number in range(sent)]
