"""Keepalive: a client that does not answer pings is closed, any other stays connected."""

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
from tests.support.relay_process import RelayProcess, StartRelay, receive
from tests.support.relay_v1 import connect_relay_v1
from tests.support.rfc_cases import await_descriptors

MESSAGE_BYTES = 65_536


@pytest.fixture(scope="module")
def pinging_relay(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RelayProcess]:
    """A relay that pings often, with a timeout that a busy machine meets."""
    settings = {"keepalive": {"ping_interval_s": 0.2, "ping_timeout_s": 2}}
    with RelayProcess(tmp_path_factory.mktemp("pinging"), settings) as relay:
        yield relay


async def test_a_client_of_relay_v1_receives_a_heartbeat_with_each_ping(
    pinging_relay: RelayProcess, channel: str
) -> None:
    async with connect_relay_v1(pinging_relay, channel) as client:
        assert client.welcome["heartbeat_ms"] == 200
        await client.next_notice("live")
        heartbeat = await client.next_notice("heartbeat")
        assert heartbeat["position"] == client.position


async def answer_pings(raw: RawClient, duration_s: float) -> None:
    """Answer pings with their payloads, until the first one after this time."""
    started_at = time.monotonic()
    while time.monotonic() < started_at + duration_s:
        received = await raw.read_frame()
        if received.opcode == PING:
            await raw.send(frame(PONG, received.payload))


async def test_a_client_that_answers_no_ping_is_closed_with_1011_and_counted(
    pinging_relay: RelayProcess, channel: str
) -> None:
    relay = pinging_relay
    await relay.await_metric("websocket_connected_clients", 0)
    before = await relay.metric("websocket_closes_total", code="1011")
    async with relay.client(channel) as other:
        async with relay.raw_client(channel) as silent:
            assert (await silent.read_frame()).opcode == PING
            assert await silent.complete_close() == (1011, "ping timeout")
        await relay.await_metric("websocket_closes_total", before + 1, code="1011")
        await relay.await_metric("websocket_connected_clients", 1)
        await other.send("still here")
        assert await receive(other) == "still here"


async def test_a_client_that_answers_no_ping_and_no_close_is_aborted(
    relay_with: StartRelay,
) -> None:
    relay = relay_with(
        keepalive={"ping_interval_s": 0.3, "ping_timeout_s": 0.3},
        limits={"handshake_timeout_s": 1},
    )
    descriptors = relay.descriptors()
    async with relay.raw_client("news") as silent:
        await relay.await_metric("websocket_connected_clients", 1)
        await await_descriptors(relay, descriptors)
        await relay.await_metric("websocket_connected_clients", 0)
        assert await relay.metric("websocket_disconnections_total") == 1
        assert (await silent.read_frame()).opcode == PING


async def test_clients_that_answer_pings_stay_connected_without_a_message(
    pinging_relay: RelayProcess, channel: str
) -> None:
    async with (
        pinging_relay.client(channel) as idle,
        pinging_relay.raw_client(channel) as raw,
    ):
        await answer_pings(raw, duration_s=2.5)  # past an interval and a timeout
        await idle.send("still here")
        assert await receive(idle) == "still here"
        assert await raw.read_message() == "still here"


async def test_unexpected_pongs_are_ignored(pinging_relay: RelayProcess, channel: str) -> None:
    async with pinging_relay.raw_client(channel) as raw:
        first = await raw.read_frame()
        await raw.send(frame(PONG, first.payload))
        await raw.send(frame(PONG, b"nonsense") + frame(PONG, first.payload))
        await answer_pings(raw, duration_s=0.5)
        await raw.send(frame(TEXT, b"still here"))
        assert await raw.read_message() == "still here"


async def test_a_publisher_paused_by_flow_control_is_not_closed_for_late_pongs(
    relay_with: StartRelay,
) -> None:
    """Its pongs follow the messages in its send queue, as in a client with one write queue."""
    relay = relay_with(
        keepalive={"ping_interval_s": 0.3, "ping_timeout_s": 2},
        limits={"send_backlog_bytes": 4 * 1_048_576},  # the subscriber must not be closed
    )
    count = 700
    flood = frame(BINARY, bytes(MESSAGE_BYTES)) * count
    started_at = time.monotonic()

    async def write(raw: RawClient, queue: asyncio.Lock, wire: bytes) -> None:
        async with queue:
            await raw.send(wire, patience_s=50)

    async def read(raw: RawClient, queue: asyncio.Lock, pause_s: float) -> None:
        messages = 0
        while messages < count:
            received = await raw.read_frame()
            if received.opcode == PING:
                group.create_task(write(raw, queue, frame(PONG, received.payload)))
            else:
                assert received.opcode == BINARY
                messages += 1
                await asyncio.sleep(pause_s)
        raw.socket.close()  # it answers no more pings

    async with (
        relay.raw_client("news") as publisher,
        relay.raw_client("news", receive_buffer_bytes=MESSAGE_BYTES) as subscriber,
        asyncio.TaskGroup() as group,
    ):
        queue = asyncio.Lock()
        group.create_task(write(publisher, queue, flood))
        group.create_task(read(publisher, queue, 0))
        group.create_task(read(subscriber, asyncio.Lock(), 0.006))
    assert time.monotonic() - started_at > 2.5, "the flood must outlast a ping and its timeout"
    await relay.await_metric("websocket_disconnections_total", 2)
    assert await relay.metric("websocket_closes_total", code="1011") == 0
