"""Partial messages: the memory of all of them together is bounded."""

import asyncio
from contextlib import AsyncExitStack

from tests.support.raw_client import BINARY, CONTINUATION, PATIENCE_S, TEXT, RawClient, frame
from tests.support.relay_process import RelayProcess, StartRelay, receive

MIB = 1_048_576
WHOLE = frame(BINARY, bytes(MIB))
PARTIAL_BYTES = MIB - 1000
HEADER_BYTES = 14
TOTAL_BYTES = 8 * MIB
TOO_MANY = (1013, "too many partial messages")


async def start_message(relay: RelayProcess, channel: str, stack: AsyncExitStack) -> RawClient:
    """Connect a client that sends all of a message except its end."""
    client = await stack.enter_async_context(relay.raw_client(channel))
    await client.send(WHOLE[:PARTIAL_BYTES])
    return client


async def test_clients_that_never_finish_a_message_are_closed_at_the_total_limit(
    relay_with: StartRelay, channel: str
) -> None:
    relay = relay_with(limits={"total_backlog_bytes": TOTAL_BYTES})
    before_bytes = relay.rss_bytes()
    async with AsyncExitStack() as stack:
        clients = [await start_message(relay, channel, stack) for _ in range(40)]
        answers = [asyncio.create_task(client.complete_close()) for client in clients]
        closed, _ = await asyncio.wait(answers, return_when=asyncio.FIRST_COMPLETED)
        await relay.await_metric("websocket_closes_total", 32, reason="partial_messages")
        assert await relay.metric("websocket_connected_clients") == 8
        assert await relay.metric("websocket_partial_message_bytes") <= TOTAL_BYTES
        assert relay.rss_bytes() < before_bytes + TOTAL_BYTES + 16 * MIB
        assert {answer.result() for answer in closed} == {TOO_MANY}
        for answer in answers:
            answer.cancel()
        await asyncio.wait(answers)
    await relay.await_metric("websocket_partial_message_bytes", 0)


async def test_the_largest_partial_message_is_dropped_first_and_a_small_one_completes(
    relay_with: StartRelay, channel: str
) -> None:
    relay = relay_with(limits={"total_backlog_bytes": 2 * MIB})
    async with (
        AsyncExitStack() as stack,
        relay.raw_client(channel) as small,
        relay.client(channel) as other,
    ):
        await small.send(frame(TEXT, b"one ", fin=False))
        await relay.await_metric("websocket_partial_message_bytes", 4)
        large = [await start_message(relay, channel, stack) for _ in range(3)]
        answers = [asyncio.create_task(client.complete_close()) for client in large]
        async with asyncio.timeout(PATIENCE_S):
            closed, pending = await asyncio.wait(answers, return_when=asyncio.FIRST_COMPLETED)
        assert [answer.result() for answer in closed] == [TOO_MANY]
        for answer in pending:
            answer.cancel()
        await relay.await_metric("websocket_closes_total", 1, reason="partial_messages")
        await small.send(frame(CONTINUATION, b"two"))
        assert await receive(other) == "one two"


async def test_a_client_closed_for_its_partial_message_receives_the_reason(
    relay_with: StartRelay, channel: str
) -> None:
    relay = relay_with(limits={"total_backlog_bytes": MIB})
    async with AsyncExitStack() as stack:
        first = await start_message(relay, channel, stack)
        await relay.await_metric_at_least(
            "websocket_partial_message_bytes", PARTIAL_BYTES - HEADER_BYTES
        )
        second = await stack.enter_async_context(relay.raw_client(channel))
        await second.send(WHOLE[: MIB // 2])
        assert await first.complete_close() == TOO_MANY
        await relay.await_metric("websocket_connected_clients", 1)


async def test_a_single_message_is_never_over_the_total_limit(
    relay_with: StartRelay, channel: str
) -> None:
    relay = relay_with(limits={"total_backlog_bytes": 1024})
    async with relay.raw_client(channel) as client:
        await client.send(WHOLE)
        await relay.await_metric("websocket_messages_total", 1)
        assert await relay.metric("websocket_closes_total", reason="partial_messages") == 0
