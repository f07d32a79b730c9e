"""Messages that are begun and not finished: what all of them together may take."""

from contextlib import AsyncExitStack

from tests.support.raw_client import BINARY, CONTINUATION, TEXT, RawClient, frame
from tests.support.relay_process import Relay, StartRelay, receive

MIB = 1_048_576
BEGUN_BYTES = MIB - 1000
TOGETHER_BYTES = 8 * MIB


async def begin(relay: Relay, channel: str, stack: AsyncExitStack) -> RawClient:
    """Connect a client that says all but the end of a message."""
    client = await stack.enter_async_context(relay.raw_client(channel))
    await client.send(frame(BINARY, bytes(MIB))[:BEGUN_BYTES])
    return client


async def test_clients_who_never_finish_are_closed_before_they_fill_the_memory(
    relay_with: StartRelay, channel: str
) -> None:
    relay = relay_with(limits={"total_backlog_bytes": TOGETHER_BYTES, "handshake_timeout_s": 2})
    before_bytes = relay.rss_bytes()
    async with AsyncExitStack() as stack:
        for _ in range(60):
            await begin(relay, channel, stack)
        await relay.metric_is("websocket_closes_total", 52, reason="unfinished")
        assert await relay.metric("websocket_connected_clients") == 8
        assert await relay.metric("websocket_partial_message_bytes") <= TOGETHER_BYTES
        assert relay.rss_bytes() < before_bytes + TOGETHER_BYTES + 16 * MIB
    await relay.metric_is("websocket_partial_message_bytes", 0)


async def test_who_has_said_most_goes_first_and_the_others_finish(
    relay_with: StartRelay, channel: str
) -> None:
    relay = relay_with(limits={"total_backlog_bytes": 2 * MIB, "handshake_timeout_s": 2})
    async with (
        AsyncExitStack() as stack,
        relay.raw_client(channel) as modest,
        relay.client(channel) as other,
    ):
        await modest.send(frame(TEXT, b"one ", fin=False))
        await relay.metric_is("websocket_partial_message_bytes", 4)
        for _ in range(3):
            await begin(relay, channel, stack)
        await relay.metric_is("websocket_closes_total", 1, reason="unfinished")
        await modest.send(frame(CONTINUATION, b"two"))
        assert await receive(other) == "one two"


async def test_who_is_closed_for_it_is_told_so(relay_with: StartRelay, channel: str) -> None:
    relay = relay_with(limits={"total_backlog_bytes": MIB})
    async with AsyncExitStack() as stack:
        first = await begin(relay, channel, stack)
        await relay.metric_reaches("websocket_partial_message_bytes", BEGUN_BYTES - 14)
        second = await stack.enter_async_context(relay.raw_client(channel))
        await second.send(frame(BINARY, bytes(MIB))[: MIB // 2])
        assert await first.answer_close() == (1013, "too many partial messages")
        await relay.metric_is("websocket_connected_clients", 1)


async def test_one_message_alone_always_has_room(relay_with: StartRelay, channel: str) -> None:
    relay = relay_with(limits={"total_backlog_bytes": 1024})
    async with relay.raw_client(channel) as client:
        await client.send(frame(BINARY, bytes(MIB)))
        await relay.metric_is("websocket_messages_total", 1)
        assert await relay.metric("websocket_closes_total", reason="unfinished") == 0
