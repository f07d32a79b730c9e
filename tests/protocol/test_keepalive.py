"""Dead peers are found and ended; whoever shows life is left alone."""

import asyncio
import time
from collections.abc import Iterator

import pytest

from tests.support.raw_client import (
    BINARY,
    PING,
    PONG,
    TEXT,
    RawClient,
    frame,
)
from tests.support.relay_process import Relay, StartRelay, receive

MESSAGE_BYTES = 65_536


@pytest.fixture(scope="module")
def pinging_relay(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Relay]:
    """A relay that pings often, with patience for a busy machine."""
    settings = {"keepalive": {"ping_interval_s": 0.3, "ping_timeout_s": 3}}
    with Relay(tmp_path_factory.mktemp("pinging"), settings) as relay:
        yield relay


async def answer_pings(raw: RawClient, count: int) -> None:
    """Answer so many pings, with what they carry."""
    while count:
        received = await raw.frame()
        if received.opcode == PING:
            await raw.send(frame(PONG, received.payload))
            count -= 1


async def test_a_client_that_answers_no_ping_is_closed_and_counted(
    pinging_relay: Relay, channel: str
) -> None:
    relay = pinging_relay
    await relay.metric_is("websocket_connected_clients", 0)
    before = await relay.metric("websocket_closes_total", code="1011")
    async with relay.client(channel) as bystander:
        async with relay.raw_client(channel) as dead:
            assert (await dead.frame()).opcode == PING
            assert await dead.answer_close() == (1011, "ping timeout")
        await relay.metric_is("websocket_closes_total", before + 1, code="1011")
        await relay.metric_is("websocket_connected_clients", 1)
        await bystander.send("still here")
        assert await receive(bystander) == "still here"


async def test_a_dead_client_that_does_not_even_read_is_dropped(relay_with: StartRelay) -> None:
    relay = relay_with(
        keepalive={"ping_interval_s": 0.3, "ping_timeout_s": 0.3},
        limits={"handshake_timeout_s": 1},
    )
    async with relay.raw_client("news") as dead:
        await relay.metric_is("websocket_connected_clients", 1)
        await relay.metric_is("websocket_connected_clients", 0)
        assert await relay.metric("websocket_disconnections_total") == 1
        assert (await dead.frame()).opcode == PING


async def test_a_client_that_answers_its_pings_lives_on(pinging_relay: Relay, channel: str) -> None:
    async with pinging_relay.raw_client(channel) as alive:
        await answer_pings(alive, 12)
        await alive.send(frame(TEXT, b"still here"))
        assert await alive.message() == "still here"


async def test_a_usual_client_lives_on_without_a_message(
    pinging_relay: Relay, channel: str
) -> None:
    async with (
        pinging_relay.client(channel) as idle,
        pinging_relay.raw_client(channel) as clock,
    ):
        await answer_pings(clock, 12)
        await idle.send("still here")
        assert await receive(idle) == "still here"


async def test_a_pong_to_an_older_ping_does_no_harm(pinging_relay: Relay, channel: str) -> None:
    async with pinging_relay.raw_client(channel) as raw:
        first = await raw.frame()
        await raw.send(frame(PONG, first.payload))
        await raw.send(frame(PONG, b"nonsense") + frame(PONG, first.payload))
        await answer_pings(raw, 4)
        await raw.send(frame(TEXT, b"still here"))
        assert await raw.message() == "still here"


async def test_a_publisher_that_backpressure_holds_up_is_not_taken_for_dead(
    relay_with: StartRelay,
) -> None:
    """Its pongs wait behind what it has yet to send, as in a client with one write queue."""
    relay = relay_with(
        keepalive={"ping_interval_s": 0.5, "ping_timeout_s": 3},
        limits={"send_backlog_bytes": 4 * 1_048_576},  # the reader is not what this is about
    )
    count = 800
    flood = frame(BINARY, bytes(MESSAGE_BYTES)) * count
    started = time.monotonic()

    async def write(raw: RawClient, queue: asyncio.Lock, wire: bytes) -> None:
        async with queue:
            await raw.send(wire, patience_s=50)

    async def read(raw: RawClient, queue: asyncio.Lock, pause_s: float) -> None:
        seen = 0
        while seen < count:
            received = await raw.frame()
            if received.opcode == PING:
                group.create_task(write(raw, queue, frame(PONG, received.payload)))
            else:
                assert received.opcode == BINARY
                seen += 1
                await asyncio.sleep(pause_s)

    async with (
        relay.raw_client("news") as publisher,
        relay.raw_client("news", receive_buffer_bytes=MESSAGE_BYTES) as reader,
        asyncio.TaskGroup() as group,
    ):
        queue = asyncio.Lock()
        group.create_task(write(publisher, queue, flood))
        group.create_task(read(publisher, queue, 0))
        group.create_task(read(reader, asyncio.Lock(), 0.006))
    assert time.monotonic() - started > 3.5, "the flood must outlast a ping and its timeout"
    await relay.metric_is("websocket_disconnections_total", 2)
    assert await relay.metric("websocket_closes_total", code="1011") == 0
