"""Hostile clients: what they send costs little memory and delays no other client.

test_frames has protocol violations, test_slow_consumers has slow clients, test_unfinished_messages
has partial messages. This file is about volumes, numbers and durations.
"""

import asyncio
import struct
import time
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager, suppress

import pytest
from websockets.exceptions import InvalidStatus

from tests.support.raw_client import (
    BINARY,
    CLOSE,
    CONTINUATION,
    PING,
    PONG,
    TEXT,
    RawClient,
    close_payload,
    frame,
    upgrade_request,
)
from tests.support.relay_process import (
    HOST,
    POLL_S,
    RelayProcess,
    StartRelay,
    path_of,
    receive,
    receive_many,
)
from tests.support.rfc_cases import await_descriptors, read_frame_except_pings

KIB = 1_024
MIB = 1_048_576
MAX_DELAY_S = 5.0  # of another client's message, on a busy machine


class ObservedEffects:
    """The observed effects on the relay.

    Attributes:
        growth_bytes: the largest growth of its memory.
        delay_s: the largest delay of a message in another channel.
    """

    def __init__(self) -> None:
        self.growth_bytes = 0
        self.delay_s = 0.0


@asynccontextmanager
async def watched(relay: RelayProcess) -> AsyncIterator[ObservedEffects]:
    """Measure the relay's memory and the delay of messages in another channel, until the exit."""
    watch = ObservedEffects()
    received = asyncio.Event()

    async def echo() -> None:
        async with relay.client("calm") as calm:
            while True:
                sent_at = time.monotonic()
                await calm.send("hello")
                assert await receive(calm) == "hello"
                watch.delay_s = max(watch.delay_s, time.monotonic() - sent_at)
                received.set()
                await asyncio.sleep(0.005)

    async def wait_for_echo() -> None:
        received.clear()
        async with asyncio.timeout(MAX_DELAY_S):
            await received.wait()

    async with asyncio.TaskGroup() as group:
        echoing = group.create_task(echo())
        await wait_for_echo()
        started_bytes = relay.reset_peak_rss()
        yield watch
        await wait_for_echo()
        echoing.cancel()
    watch.growth_bytes = relay.peak_rss_bytes() - started_bytes
    assert watch.delay_s < MAX_DELAY_S


async def send_times(raw: RawClient, wire: bytes, times: int) -> None:
    for _ in range(times):
        await raw.send(wire)


async def send_until_aborted(raw: RawClient, wire: bytes, pause_s: float = 0) -> None:
    with suppress(ConnectionError):
        while True:
            await raw.send(wire)
            if pause_s:
                await asyncio.sleep(pause_s)


# Floods of frames that cost nothing to send


async def test_a_flood_of_pings_is_answered_in_order_and_delays_no_other_client(
    relay: RelayProcess,
) -> None:
    count = 30_000
    async with watched(relay) as watch, relay.raw_client("news") as raw:

        async def ping() -> None:
            for first in range(0, count, 1_000):
                numbers = range(first, first + 1_000)
                await raw.send(b"".join(frame(PING, struct.pack("!I", n)) for n in numbers))

        async with asyncio.TaskGroup() as group:
            group.create_task(ping())
            for number in range(count):
                received = await read_frame_except_pings(raw)
                assert received.opcode == PONG
                assert received.payload == struct.pack("!I", number)
    assert watch.growth_bytes < 16 * MIB


async def test_pongs_to_clients_that_never_read_are_bounded_by_the_send_backlog(
    relay_with: StartRelay,
) -> None:
    limits = {"send_backlog_bytes": 256 * KIB, "handshake_timeout_s": 2}
    relay = relay_with(limits=limits)
    count = 20
    async with watched(relay) as watch, AsyncExitStack() as stack:
        stalled = [
            await stack.enter_async_context(relay.raw_client("news", receive_buffer_bytes=4096))
            for _ in range(count)
        ]
        pings = frame(PING, bytes(125)) * 500
        await asyncio.gather(*(send_until_aborted(raw, pings) for raw in stalled))
        await relay.await_metric("websocket_closes_total", count, code="1013")
    assert watch.growth_bytes < 32 * MIB


FLOODS = [
    pytest.param(b"", frame(PONG), id="pongs"),
    pytest.param(b"", frame(PONG, bytes(125)), id="long pongs"),
    pytest.param(
        frame(TEXT, fin=False),
        frame(CONTINUATION, fin=False) + frame(PONG),
        id="empty fragments and pongs",
    ),
]


@pytest.mark.parametrize(("first", "wire"), FLOODS)
async def test_a_flood_that_is_not_relayed_takes_no_memory_and_delays_no_other_client(
    relay: RelayProcess, first: bytes, wire: bytes
) -> None:
    async with watched(relay) as watch, AsyncExitStack() as stack:
        clients = []
        for _ in range(5):
            raw = await stack.enter_async_context(relay.raw_client("news"))
            await raw.send(first)
            clients.append(raw)
        await asyncio.gather(*(send_times(raw, wire * 1_000, 40) for raw in clients))
    assert watch.growth_bytes < 16 * MIB


async def test_a_flood_of_one_byte_fragments_is_closed_at_the_message_limit(
    relay_with: StartRelay,
) -> None:
    """A fragment takes its byte of memory: an object for each would take 50 times as much."""
    count, max_bytes = 2, 100_000
    relay = relay_with(limits={"max_message_bytes": max_bytes})
    async with watched(relay) as watch, AsyncExitStack() as stack:
        clients = []
        for _ in range(count):
            raw = await stack.enter_async_context(relay.raw_client("news"))
            await raw.send(frame(BINARY, fin=False))
            clients.append(raw)
        wire = frame(CONTINUATION, b"x", fin=False) * 1_000
        await asyncio.gather(*(send_times(raw, wire, max_bytes // 1_000) for raw in clients))
        assert await relay.metric("websocket_closes_total", code="1009") == 0
        for raw in clients:
            await raw.send(frame(CONTINUATION, b"x", fin=False))
            assert (await raw.complete_close())[0] == 1009
        await relay.await_metric("websocket_closes_total", count, code="1009")
    assert watch.growth_bytes < 6 * MIB


async def test_a_flood_of_empty_messages_is_delivered_and_delays_no_other_client(
    relay: RelayProcess,
) -> None:
    count = 20_000
    async with (
        watched(relay) as watch,
        relay.raw_client("news") as raw,
        asyncio.TaskGroup() as group,
    ):
        group.create_task(send_times(raw, frame(TEXT) * 1_000, count // 1_000))
        for _ in range(count):
            assert await raw.read_message() == ""
    assert watch.growth_bytes < 32 * MIB


# Declared sizes


def declared(size: int, opcode: int = BINARY) -> bytes:
    """Encode the header of a frame that declares this payload size."""
    return struct.pack("!BBQ", 0x80 | opcode, 0x80 | 127, size) + bytes(4)


async def test_a_frame_that_declares_too_large_a_size_is_closed_at_its_header(
    relay: RelayProcess,
) -> None:
    sizes = {2**63: 1002, 2**64 - 1: 1002, 2**63 - 1: 1009, 2**32: 1009, 2**31 - 1: 1009}
    async with watched(relay) as watch:
        for size, code in sizes.items():
            for first in (b"", frame(TEXT, b"x", fin=False)):
                async with relay.raw_client("news") as raw:
                    await raw.send(first + declared(size, CONTINUATION if first else BINARY))
                    assert (await raw.read_close_frame())[0] == code, (size, first)
    assert watch.growth_bytes < 4 * MIB


async def test_a_declared_size_takes_no_memory_before_its_bytes_arrive(relay: RelayProcess) -> None:
    count = 300
    async with watched(relay) as watch, AsyncExitStack() as stack:
        for _ in range(count):
            raw = await stack.enter_async_context(relay.raw_client("news"))
            await raw.send(declared(MIB) + b"x")
        await relay.await_metric("websocket_connected_clients", count + 1)
    assert watch.growth_bytes < count * 32 * KIB + 4 * MIB


# Clients that send and never read, that never close, that connect and disconnect


async def test_publishers_that_never_read_are_bounded_by_the_total_backlog(
    relay_with: StartRelay,
) -> None:
    limits = {
        "max_message_bytes": 128 * KIB,
        "send_backlog_bytes": MIB,
        "total_backlog_bytes": 8 * MIB,
        "handshake_timeout_s": 2,
    }
    relay = relay_with(limits=limits)
    count = 21
    async with watched(relay) as watch, AsyncExitStack() as stack:
        stalled = [
            await stack.enter_async_context(
                relay.raw_client(f"news-{number % 3}", receive_buffer_bytes=4096)
            )
            for number in range(count)
        ]
        wire = frame(BINARY, bytes(64 * KIB)) * 4
        await asyncio.gather(*(send_until_aborted(raw, wire) for raw in stalled))
        await relay.await_metric("websocket_connected_clients", 1)
        await relay.await_metric("websocket_backlog_bytes", 0)
    assert watch.growth_bytes < 96 * MIB


async def test_partly_read_messages_of_many_clients_are_bounded_by_the_total_backlog(
    relay_with: StartRelay,
) -> None:
    """A partly sent write keeps all of its memory, so all of it counts."""
    limits = {"total_backlog_bytes": 12 * MIB, "handshake_timeout_s": 2}
    relay = relay_with(limits=limits, history={"max_messages": 0})
    count = 40
    message = frame(BINARY, bytes(MIB - 16))
    async with AsyncExitStack() as stack:
        clients = [
            await stack.enter_async_context(
                relay.raw_client(f"of-{number}", receive_buffer_bytes=16 * KIB)
            )
            for number in range(count)
        ]
        before_bytes = relay.rss_bytes()
        for raw in clients:
            await raw.send(message)
            await raw.read_exactly(MIB - 260 * KIB)
        assert relay.rss_bytes() < before_bytes + 36 * MIB
        assert 11 * MIB < await relay.metric("websocket_backlog_bytes") <= 12 * MIB
        assert await relay.metric("websocket_closes_total", reason="slow_consumer") == count - 11
    await relay.await_metric("websocket_backlog_bytes", 0)


@pytest.mark.parametrize(
    ("last", "code"),
    [
        pytest.param(frame(TEXT, b"x", mask=False), 1002, id="after a violation"),
        pytest.param(frame(CLOSE, close_payload(1000)), 1000, id="after its own close"),
    ],
)
async def test_messages_after_a_close_are_discarded_and_their_sender_aborted(
    short_deadline_relay: RelayProcess, last: bytes, code: int
) -> None:
    async with watched(short_deadline_relay) as watch, short_deadline_relay.client("news") as other:
        async with short_deadline_relay.raw_client("news") as raw:
            await raw.send(frame(TEXT, b"before") + last)
            assert await raw.read_message() == "before"
            assert (await raw.read_close_frame())[0] == code
            await send_until_aborted(raw, frame(TEXT, b"trailing") * 1_000, pause_s=POLL_S)
        await short_deadline_relay.await_metric("websocket_connected_clients", 2)
        await other.send("after")
        assert await receive_many(other, 2) == ["before", "after"]
    assert watch.growth_bytes < 16 * MIB


async def test_disconnected_clients_leave_no_memory_and_no_descriptors(relay: RelayProcess) -> None:
    endings: list[Callable[[RawClient], object]] = [
        lambda raw: raw.send(frame(CLOSE, close_payload(1000))),
        lambda raw: raw.send(frame(TEXT, b"x", mask=False)),
        lambda raw: raw.send(frame(TEXT, b"partial", fin=False)),
        lambda raw: raw.reset(),
        lambda raw: raw.end_stream(),
    ]

    async def connect_and_disconnect(count: int) -> None:
        for number in range(count):
            async with relay.raw_client("news") as raw:
                await raw.send(frame(TEXT, b"hello"))
                ended = endings[number % len(endings)](raw)
                if asyncio.iscoroutine(ended):
                    await ended
        await relay.await_metric("websocket_connected_clients", 0)

    await connect_and_disconnect(300)
    started_bytes, started_descriptors = relay.rss_bytes(), relay.descriptors()
    await connect_and_disconnect(700)
    await await_descriptors(relay, started_descriptors)
    assert relay.rss_bytes() < started_bytes + MIB


# Requests

OVERSIZED = [
    pytest.param(b"a:\r\n" * 60_000, id="many empty fields"),
    pytest.param(b"".join(b"x-%d: y\r\n" % n for n in range(20_000)), id="many fields"),
    pytest.param(b"x: " + b"y" * 250_000 + b"\r\n", id="a long value"),
    pytest.param(b"x" * 250_000 + b": y\r\n", id="a long name"),
    pytest.param(b"Sec-WebSocket-Protocol: " + b"a, " * 80_000 + b"a\r\n", id="many offers"),
]
REQUESTS = {  # the bytes before and after the oversized fields
    "upgrade": (upgrade_request()[:-2], b"\r\n"),
    "unfinished upgrade": (upgrade_request()[:-2], b""),
    "plain": (b"GET / HTTP/1.1\r\nHost: localhost\r\n", b"\r\n"),
    "trailers": (
        b"POST / HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n",
        b"\r\n",
    ),
}


@pytest.mark.parametrize("fields", OVERSIZED)
async def test_oversized_headers_and_trailers_are_refused_without_memory(
    relay: RelayProcess, fields: bytes
) -> None:
    async def send_request(raw: RawClient, kind: str) -> None:
        before, after = REQUESTS[kind]
        with suppress(ConnectionError):
            await raw.send(before + fields + after)
        received = await raw.read_to_end()  # a reset can discard the response
        assert b"HTTP/1.1 101 " not in received, kind
        assert b"HTTP/1.1 2" not in received, kind

    async with watched(relay) as watch, AsyncExitStack() as stack:
        kinds = [*REQUESTS] * 10
        clients = [await stack.enter_async_context(await relay.connect_tcp()) for _ in kinds]
        await asyncio.gather(*map(send_request, clients, kinds))
    assert watch.growth_bytes < 24 * MIB


async def test_an_endless_chunk_extension_is_aborted(relay: RelayProcess) -> None:
    async with watched(relay) as watch, await relay.connect_tcp() as raw:
        head = b"POST / HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n1;"
        await raw.send(head)
        await send_until_aborted(raw, b"x" * 65_536)
    assert watch.growth_bytes < 4 * MIB


async def test_endless_empty_lines_before_a_request_are_aborted(relay: RelayProcess) -> None:
    """Servers skip them before a request (RFC 9112 section 2.2)."""
    async with watched(relay) as watch, await relay.connect_tcp() as raw:
        await send_until_aborted(raw, b"\r\n" * 32_768)
    assert watch.growth_bytes < 4 * MIB


async def test_a_flood_of_pipelined_requests_is_aborted(
    short_deadline_relay: RelayProcess,
) -> None:
    """Each is answered after the one before it; no client reads the responses."""
    relay = short_deadline_relay
    wire = b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n" * 5_000
    async with watched(relay) as watch, AsyncExitStack() as stack:
        clients = [
            await stack.enter_async_context(
                await RawClient.connect(HOST, relay.port, receive_buffer_bytes=4096)
            )
            for _ in range(20)
        ]
        await asyncio.gather(*(send_until_aborted(raw, wire) for raw in clients))
    assert watch.growth_bytes < 24 * MIB


async def test_frames_sent_right_after_an_upgrade_request_wait_in_tcp_and_are_all_delivered(
    relay: RelayProcess, channel: str
) -> None:
    size, count = 64 * KIB, 512
    async with watched(relay) as watch, await relay.connect_tcp() as eager:

        async def send() -> None:
            await eager.send(upgrade_request(path_of(channel)))
            for number in range(count):
                await eager.send(frame(BINARY, struct.pack("!I", number).ljust(size, b"x")))

        async with asyncio.TaskGroup() as group:
            group.create_task(send())
            assert (await eager.read_response()).status == 101
            for number in range(count):
                received = await eager.read_message()
                assert isinstance(received, bytes)
                assert received[:4] == struct.pack("!I", number)
    assert watch.growth_bytes < 32 * MIB


async def test_bytes_after_a_refused_upgrade_are_ignored(relay: RelayProcess) -> None:
    before = await relay.metrics()
    for trailing in (
        frame(TEXT, b"hello"),
        b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n",
        upgrade_request(),
    ):
        async with await relay.connect_tcp() as raw:
            await raw.send(upgrade_request("/nowhere") + trailing)
            received = await raw.read_to_end()
        assert received.startswith(b"HTTP/1.1 404 "), trailing
        assert received.count(b"HTTP/1.1 ") == 1, trailing
    after = await relay.metrics()
    for name in ("websocket_connections_total", "websocket_messages_total"):
        assert after.value(name) == before.value(name)


# Channels


async def test_channels_are_bounded_and_leave_no_memory_when_their_clients_disconnect(
    relay_with: StartRelay,
) -> None:
    max_channels, rounds = 100, 10
    relay = relay_with(channels={"max_channels": max_channels})
    numbers = iter(range(max_channels * rounds))

    async def fill_and_disconnect() -> None:
        async with AsyncExitStack() as stack:
            names = [f"name-{next(numbers)}".ljust(128, "x") for _ in range(max_channels)]
            for name in names:
                await stack.enter_async_context(relay.raw_client(name))
            await relay.await_metric("websocket_channels", max_channels)
            with pytest.raises(InvalidStatus, match="503"):
                async with relay.client("one-too-many"):
                    pass
            async with relay.client(names[-1]) as joining:
                await joining.send("an existing channel accepts subscribers")
                await receive(joining)
        await relay.await_metric("websocket_channels", 0)

    for _ in range(3):
        await fill_and_disconnect()
    started_bytes = relay.rss_bytes()
    for _ in range(rounds - 3):
        await fill_and_disconnect()
    assert await relay.metric("websocket_refusals_total", reason="channels") == rounds
    assert relay.rss_bytes() < started_bytes + MIB


async def test_refused_channel_names_leave_no_memory(relay_with: StartRelay) -> None:
    relay = relay_with(channels={"max_channels": 1})

    async def request_channels(first: int, count: int) -> None:
        for number in range(first, first + count):
            async with await relay.connect_tcp() as raw:
                await raw.send(upgrade_request(path_of(f"{number}".rjust(128, "x"))))
                assert (await raw.read_response()).status == 503

    async with relay.client("first") as client:
        await request_channels(0, 200)
        started_bytes = relay.rss_bytes()
        await request_channels(200, 1_000)
        assert relay.rss_bytes() < started_bytes + MIB // 2
        assert await relay.metric("websocket_channels") == 1
        await client.send("still here")
        assert await receive(client) == "still here"
