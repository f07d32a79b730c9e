"""Connections end by a closing handshake, or at a deadline if the peer does not complete it."""

import asyncio
from contextlib import AsyncExitStack

import pytest

from tests.support.raw_client import (
    CLOSE,
    PING,
    PONG,
    TEXT,
    RawClient,
    close_payload,
    frame,
)
from tests.support.relay_process import POLL_S, RelayProcess, await_close, receive
from tests.support.rfc_cases import await_descriptors

NORMAL_CLOSE = frame(CLOSE, close_payload(1000))
VIOLATION = frame(TEXT, b"bare", mask=False)


async def assert_closed_by_deadline(
    relay: RelayProcess, descriptors: int, clients: int = 0
) -> None:
    """Wait until the relay has so few descriptors and clients.

    Reading the descriptors takes far less processor time than reading the metrics page.
    """
    await await_descriptors(relay, descriptors)
    await relay.await_metric("websocket_connected_clients", clients)


# Closing handshakes


@pytest.mark.parametrize(
    ("payload", "code"),
    [
        pytest.param(close_payload(4999, "bye é".encode()), 4999, id="code and reason"),
        pytest.param(b"", 1000, id="empty"),
    ],
)
async def test_a_close_frame_is_answered_with_its_code_or_1000(
    relay: RelayProcess, channel: str, payload: bytes, code: int
) -> None:
    async with relay.raw_client(channel) as raw:
        await raw.send(frame(CLOSE, payload))
        assert (await raw.read_close_frame())[0] == code
        assert await raw.read_to_end() == b""


async def test_a_library_client_completes_the_closing_handshake(
    relay: RelayProcess, channel: str
) -> None:
    async with relay.client(channel) as client:
        await client.close(1000, "done")
        assert (await await_close(client))[0] == 1000


async def test_a_message_sent_before_a_close_frame_is_relayed(
    relay: RelayProcess, channel: str
) -> None:
    async with relay.client(channel) as other:
        async with relay.raw_client(channel) as raw:
            await raw.send(frame(TEXT, b"last message") + NORMAL_CLOSE)
            assert (await raw.read_close_frame())[0] == 1000
        assert await receive(other) == "last message"


async def test_bytes_after_a_close_frame_are_ignored(relay: RelayProcess, channel: str) -> None:
    trailing = frame(TEXT, b"too late") + frame(PING, b"too late") + b"\xff\xff\xff"
    async with relay.client(channel) as other:
        async with relay.raw_client(channel) as raw:
            await raw.send(NORMAL_CLOSE + trailing)
            assert (await raw.read_close_frame())[0] == 1000
            assert await raw.read_to_end() == b""
        await other.send("next")
        assert await receive(other) == "next"


async def test_no_delivery_is_expected_to_a_client_that_has_closed(
    relay: RelayProcess, channel: str
) -> None:
    async with relay.client(channel) as other, relay.raw_client(channel) as raw:
        await raw.send(NORMAL_CLOSE)
        await raw.read_close_frame()
        before = await relay.metric("websocket_expected_deliveries_total")
        await other.send("for one subscriber")
        await receive(other)
        await relay.await_metric("websocket_expected_deliveries_total", before + 1)


# Much is still to be written when a connection closes

TEXTS = [f"{number} ".ljust(10_000, "x") for number in range(100)]
ALL_TEXTS = b"".join(frame(TEXT, text.encode()) for text in TEXTS)


@pytest.mark.parametrize("finishes", [False, True], ids=["without FIN", "with FIN"])
async def test_a_close_frame_follows_the_clients_own_messages(
    relay: RelayProcess, channel: str, finishes: bool
) -> None:
    for ending, code in ((frame(CLOSE, close_payload(4000)), 4000), (VIOLATION, 1002)):
        async with relay.raw_client(channel) as raw:
            await raw.send(ALL_TEXTS + ending)
            if finishes:
                raw.end_stream()
            assert [await raw.read_message() for _ in TEXTS] == TEXTS
            assert (await raw.read_close_frame())[0] == code
            assert await raw.read_to_end() == b"", code


async def test_a_closed_client_that_reads_nothing_is_aborted_at_the_deadline(
    short_deadline_relay: RelayProcess, channel: str
) -> None:
    relay, endings = short_deadline_relay, (NORMAL_CLOSE, VIOLATION)
    before = await relay.metrics()
    async with AsyncExitStack() as stack:
        channels = [f"{channel}-{number}" for number in range(len(endings))]
        subscribers = [await stack.enter_async_context(relay.client(each)) for each in channels]
        descriptors = relay.descriptors()
        for each, ending in zip(channels, endings, strict=True):
            raw = await stack.enter_async_context(relay.raw_client(each, receive_buffer_bytes=4096))
            await raw.send(ALL_TEXTS + ending)
        for subscriber in subscribers:
            for text in TEXTS:
                assert await receive(subscriber) == text
        await assert_closed_by_deadline(relay, descriptors, len(subscribers))
    await relay.await_metric("websocket_connected_clients", 0)
    after = await relay.metrics()
    expected, delivered, dropped = (
        after.value(name) - before.value(name)
        for name in (
            "websocket_expected_deliveries_total",
            "websocket_deliveries_total",
            "websocket_drops_total",
        )
    )
    assert expected == delivered + dropped == len(endings) * 2 * len(TEXTS)


async def test_a_slow_consumer_that_starts_a_close_is_aborted_at_the_deadline(
    short_deadline_relay: RelayProcess, channel: str
) -> None:
    relay = short_deadline_relay
    async with relay.raw_client(channel) as publisher:
        descriptors = relay.descriptors()
        async with relay.raw_client(channel, receive_buffer_bytes=4_096) as stuck:
            # Messages that fit into one backlog, until the kernel accepts no more of them.
            while await relay.metric("websocket_backlog_bytes") == 0:
                await publisher.send(frame(TEXT, b"x" * 262_144))
                await publisher.read_message()
            await stuck.send(NORMAL_CLOSE)
            await assert_closed_by_deadline(relay, descriptors, clients=1)
            await relay.await_metric("websocket_backlog_bytes", 0)
            await publisher.send(frame(TEXT, b"still here"))
            assert await publisher.read_message() == "still here"


# Deadlines


async def test_a_client_that_never_closes_tcp_after_its_close_is_aborted_at_the_deadline(
    short_deadline_relay: RelayProcess, channel: str
) -> None:
    descriptors = short_deadline_relay.descriptors()
    async with short_deadline_relay.raw_client(channel) as lingering:
        await lingering.send(NORMAL_CLOSE)
        await lingering.read_close_frame()
        assert await lingering.read_to_end() == b""
        await assert_closed_by_deadline(short_deadline_relay, descriptors)


async def test_a_client_that_never_answers_the_relays_close_is_aborted_at_the_deadline(
    short_deadline_relay: RelayProcess, channel: str
) -> None:
    descriptors = short_deadline_relay.descriptors()
    async with short_deadline_relay.raw_client(channel) as silent:
        await short_deadline_relay.await_metric("websocket_connected_clients", 1)
        await silent.send(VIOLATION)
        assert (await silent.read_close_frame())[0] == 1002
        await silent.read_to_end()
        await assert_closed_by_deadline(short_deadline_relay, descriptors)


async def send_until_aborted(raw: RawClient) -> None:
    while True:
        await raw.send(frame(TEXT, b"another message") + frame(PONG))
        await asyncio.sleep(POLL_S)


async def test_a_client_that_sends_on_after_the_relays_close_is_aborted_at_the_deadline(
    short_deadline_relay: RelayProcess, channel: str
) -> None:
    async with short_deadline_relay.client(channel) as other:
        async with short_deadline_relay.raw_client(channel) as sending:
            await sending.send(VIOLATION)
            assert (await sending.read_close_frame())[0] == 1002
            with pytest.raises(ConnectionError):
                await send_until_aborted(sending)
        await other.send("still here")
        assert await receive(other) == "still here"
