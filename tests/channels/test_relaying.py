"""What one client sends, all clients of its channel receive: everyone, once, in order, as sent."""

import asyncio
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager

import pytest
from websockets.asyncio.client import ClientConnection
from websockets.typing import Data

from tests.support.relay_process import Relay, receive, receive_many

MIB = 1_048_576


@asynccontextmanager
async def clients(relay: Relay, channel: str, count: int) -> AsyncIterator[list[ClientConnection]]:
    async with AsyncExitStack() as stack:
        yield [await stack.enter_async_context(relay.client(channel)) for _ in range(count)]


async def test_a_client_connects(relay: Relay, channel: str) -> None:
    async with relay.client(channel) as client:
        await asyncio.wait_for(await client.ping(), 20)


async def test_a_message_reaches_every_client_of_the_channel(relay: Relay, channel: str) -> None:
    async with clients(relay, channel, 5) as everyone:
        await everyone[0].send("hello")
        assert [await receive(client) for client in everyone] == ["hello"] * 5


async def test_the_sender_hears_itself(relay: Relay, channel: str) -> None:
    async with relay.client(channel) as alone:
        await alone.send("anybody there?")
        assert await receive(alone) == "anybody there?"


async def test_a_client_hears_all_that_is_sent_once_it_is_connected(
    relay: Relay, channel: str
) -> None:
    async with relay.client(channel) as publisher:
        for number in range(50):
            async with relay.client(channel) as newcomer:
                await publisher.send(str(number))
                assert await receive(newcomer) == str(number)
        assert await receive_many(publisher, 50) == [str(number) for number in range(50)]


async def test_a_newcomer_does_not_hear_what_was_sent_before(relay: Relay, channel: str) -> None:
    async with relay.client(channel) as first:
        await first.send("before")
        await receive(first)
        async with relay.client(channel) as newcomer:
            await first.send("after")
            assert await receive(newcomer) == "after"


@pytest.mark.parametrize(
    "message",
    [
        pytest.param("plain", id="text"),
        pytest.param(b"plain", id="binary"),
        pytest.param("", id="empty text"),
        pytest.param(b"", id="empty binary"),
        pytest.param("žluťoučký kůň \U0001f40e 日本語 \u200d", id="unicode"),
        pytest.param("\ufeffmark \uffff \U0010ffff", id="byte order mark and noncharacters"),
        pytest.param("a\x00b\x00", id="NUL in text"),
        pytest.param(b"\x00\x00\x00", id="NUL in binary"),
        pytest.param(bytes(range(256)), id="every byte"),
        pytest.param('{"looks": "like JSON"}\r\n\r\n', id="JSON and line ends"),
    ],
)
async def test_a_message_arrives_as_it_was_sent(relay: Relay, channel: str, message: Data) -> None:
    async with relay.client(channel) as sender, relay.client(channel) as other:
        await sender.send(message)
        for client in (sender, other):
            received = await receive(client)
            assert received == message
            assert type(received) is type(message)


@pytest.mark.parametrize("size", [1, 125, 126, 127, 65_535, 65_536, MIB - 1, MIB])
async def test_a_message_of_any_allowed_size_arrives_whole(
    relay: Relay, channel: str, size: int
) -> None:
    binary = (bytes(range(251)) * (size // 251 + 1))[:size]
    async with relay.client(channel) as sender, relay.client(channel) as other:
        for message in (binary, "x" * size):
            await sender.send(message)
            assert await receive(other) == message
            assert await receive(sender) == message


async def test_text_and_binary_keep_their_kind_when_they_are_mixed(
    relay: Relay, channel: str
) -> None:
    messages: list[Data] = [
        str(number) if number % 3 else str(number).encode() for number in range(300)
    ]
    async with relay.client(channel) as sender, relay.client(channel) as other:
        for message in messages:
            await sender.send(message)
        assert await receive_many(other, 300) == messages
        assert await receive_many(sender, 300) == messages


async def test_all_clients_see_the_messages_of_many_publishers_in_one_order(
    relay: Relay, channel: str
) -> None:
    async def publish(client: ClientConnection, name: int) -> None:
        for number in range(100):
            await client.send(f"{name} {number}")

    async with clients(relay, channel, 6) as everyone, asyncio.TaskGroup() as group:
        heard = [group.create_task(receive_many(client, 500)) for client in everyone]
        for name, client in enumerate(everyone[:5]):
            group.create_task(publish(client, name))
    order = heard[0].result()
    assert all(task.result() == order for task in heard)
    for name in range(5):
        own = [message for message in order if str(message).startswith(f"{name} ")]
        assert own == [f"{name} {number}" for number in range(100)]


async def test_a_hundred_clients_that_send_at_once_all_hear_everything_exactly_once(
    relay: Relay, channel: str
) -> None:
    async def send_and_hear(client: ClientConnection, name: int) -> Counter[Data]:
        for number in range(3):
            await client.send(f"{name} {number}")
        return Counter(await receive_many(client, 300))

    async with clients(relay, channel, 100) as everyone:
        async with asyncio.TaskGroup() as group:
            heard = [
                group.create_task(send_and_hear(client, name))
                for name, client in enumerate(everyone)
            ]
        sent = Counter(f"{name} {number}" for name in range(100) for number in range(3))
        assert all(task.result() == sent for task in heard)
        await everyone[0].send("the end")
        assert [await receive(client) for client in everyone] == ["the end"] * 100


async def test_a_client_that_leaves_is_counted_and_the_others_go_on(
    relay: Relay, channel: str
) -> None:
    before = await relay.metric("websocket_disconnections_total")
    async with clients(relay, channel, 2) as (sender, other):
        async with relay.client(channel):
            await relay.metric_is("websocket_connected_clients", 3)
        await relay.metric_is("websocket_connected_clients", 2)
        await sender.send("still here")
        assert await receive(other) == "still here"
        assert await relay.metric("websocket_disconnections_total") == before + 1


async def test_a_client_that_is_reset_is_counted_and_the_others_go_on(
    relay: Relay, channel: str
) -> None:
    before = await relay.metric("websocket_disconnections_total")
    async with clients(relay, channel, 2) as (sender, other):
        async with relay.raw_client(channel) as lost:
            await relay.metric_is("websocket_connected_clients", 3)
            lost.vanish()
            await relay.metric_is("websocket_connected_clients", 2)
        await sender.send("still here")
        assert await receive(other) == "still here"
        assert await relay.metric("websocket_disconnections_total") == before + 1


async def test_a_client_whose_stream_ends_without_a_close_is_counted_and_the_others_go_on(
    relay: Relay, channel: str
) -> None:
    before = await relay.metric("websocket_disconnections_total")
    async with clients(relay, channel, 2) as (sender, other):
        async with relay.raw_client(channel) as lost:
            lost.finish()
            await lost.ended()
            await relay.metric_is("websocket_connected_clients", 2)
        await sender.send("still here")
        assert await receive(other) == "still here"
        assert await relay.metric("websocket_disconnections_total") == before + 1


async def test_clients_that_come_and_go_while_others_talk_disturb_nobody(
    relay: Relay, channel: str
) -> None:
    async def come_and_go() -> None:
        for turn in range(15):
            async with relay.raw_client(channel) as visitor:
                if turn % 2:
                    visitor.vanish()

    async with clients(relay, channel, 2) as (sender, other):
        async with asyncio.TaskGroup() as group:
            visits = [group.create_task(come_and_go()) for _ in range(4)]
            sent = 0
            while not all(visit.done() for visit in visits):
                await sender.send(str(sent))
                assert await receive(sender) == str(sent)
                sent += 1
        assert await receive_many(other, sent) == [str(number) for number in range(sent)]
