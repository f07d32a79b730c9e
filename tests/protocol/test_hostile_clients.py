"""Clients that mean harm: what they send costs little memory and leaves the others in peace.

What breaks the protocol is in test_frames, who is slow in test_slow_consumers, who never finishes a
message in test_unfinished_messages; here it is about how much, how many and for how long.
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
    Relay,
    StartRelay,
    eventually,
    path_of,
    receive,
    receive_many,
)
from tests.support.rfc_cases import next_frame

KIB = 1_024
MIB = 1_048_576
CALM_S = 5.0  # what anybody else may wait for a message meanwhile, on a busy machine


class Watch:
    """What is seen of the relay while something goes on.

    Attributes:
        grew_bytes: by how much its memory grew at most.
        waited_s: what a client of another channel waited for its messages at most.
    """

    def __init__(self) -> None:
        self.grew_bytes = 0
        self.waited_s = 0.0


@asynccontextmanager
async def watched(relay: Relay) -> AsyncIterator[Watch]:
    """Look at the memory meanwhile, and have a client of another channel talk to itself."""
    watch = Watch()
    heard = asyncio.Event()

    async def talk() -> None:
        async with relay.client("calm") as calm:
            while True:
                sent_at = time.monotonic()
                await calm.send("hello")
                assert await receive(calm) == "hello"
                watch.waited_s = max(watch.waited_s, time.monotonic() - sent_at)
                heard.set()
                await asyncio.sleep(0.005)

    async def is_heard() -> None:
        heard.clear()
        async with asyncio.timeout(CALM_S):
            await heard.wait()

    async with asyncio.TaskGroup() as group:
        talking = group.create_task(talk())
        await is_heard()
        started_bytes = relay.forget_peak()
        yield watch
        await is_heard()
        talking.cancel()
    watch.grew_bytes = relay.peak_rss_bytes() - started_bytes
    assert watch.waited_s < CALM_S


async def send_often(raw: RawClient, wire: bytes, times: int) -> None:
    for _ in range(times):
        await raw.send(wire)


async def send_for_ever(raw: RawClient, wire: bytes) -> None:
    """Send until the relay has had enough."""
    with suppress(ConnectionError):
        while True:
            await raw.send(wire)


# Floods of frames that cost nothing to send


async def test_a_flood_of_pings_is_answered_in_order_and_delays_nobody(relay: Relay) -> None:
    count = 100_000
    async with watched(relay) as watch, relay.raw_client("news") as raw:

        async def ping() -> None:
            for first in range(0, count, 1_000):
                numbers = range(first, first + 1_000)
                await raw.send(b"".join(frame(PING, struct.pack("!I", n)) for n in numbers))

        async with asyncio.TaskGroup() as group:
            group.create_task(ping())
            for number in range(count):
                received = await next_frame(raw)
                assert received.opcode == PONG
                assert received.payload == struct.pack("!I", number)
    assert watch.grew_bytes < 16 * MIB


async def test_pings_of_many_who_never_read_are_not_answered_without_bound(
    relay_with: StartRelay,
) -> None:
    limits = {"send_backlog_bytes": 256 * KIB, "handshake_timeout_s": 2}
    relay = relay_with(limits=limits)
    count = 20
    async with watched(relay) as watch, AsyncExitStack() as stack:
        deaf = [
            await stack.enter_async_context(relay.raw_client("news", receive_buffer_bytes=4096))
            for _ in range(count)
        ]
        await asyncio.gather(*(send_for_ever(raw, frame(PING, bytes(125)) * 500) for raw in deaf))
        await relay.metric_is("websocket_closes_total", count, code="1013")
    assert watch.grew_bytes < 32 * MIB


FLOODS = [
    pytest.param(b"", frame(PONG), id="pongs"),
    pytest.param(b"", frame(PONG, bytes(125)), id="long pongs"),
    pytest.param(frame(TEXT, fin=False), frame(CONTINUATION, fin=False), id="empty fragments"),
    pytest.param(
        frame(TEXT, fin=False),
        frame(CONTINUATION, fin=False) + frame(PONG),
        id="empty fragments and pongs",
    ),
]


@pytest.mark.parametrize(("first", "wire"), FLOODS)
async def test_a_flood_that_nobody_hears_takes_no_memory_and_delays_nobody(
    relay: Relay, first: bytes, wire: bytes
) -> None:
    async with watched(relay) as watch, AsyncExitStack() as stack:
        floods = []
        for _ in range(5):
            raw = await stack.enter_async_context(relay.raw_client("news"))
            await raw.send(first)
            floods.append(raw)
        await asyncio.gather(*(send_often(raw, wire * 1_000, 60) for raw in floods))
    assert watch.grew_bytes < 16 * MIB


async def test_a_flood_of_tiny_fragments_ends_at_the_bound_of_a_message(
    relay_with: StartRelay,
) -> None:
    """A hundred thousand fragments of a byte each from each of four: they take their bytes."""
    count, most = 4, 100_000
    relay = relay_with(limits={"max_message_bytes": most, "handshake_timeout_s": 2})
    async with watched(relay) as watch, AsyncExitStack() as stack:
        floods = []
        for _ in range(count):
            raw = await stack.enter_async_context(relay.raw_client("news"))
            await raw.send(frame(BINARY, fin=False))
            floods.append(raw)
        wire = frame(CONTINUATION, b"x", fin=False) * 1_000
        await asyncio.gather(*(send_often(raw, wire, most // 1_000) for raw in floods))
        assert await relay.metric("websocket_closes_total", code="1009") == 0
        for raw in floods:
            await raw.send(frame(CONTINUATION, b"x", fin=False))
        await relay.metric_is("websocket_closes_total", count, code="1009")
    assert watch.grew_bytes < 8 * MIB


async def test_a_flood_of_empty_messages_reaches_all_and_delays_nobody(relay: Relay) -> None:
    count = 50_000
    async with (
        watched(relay) as watch,
        relay.raw_client("news") as raw,
        asyncio.TaskGroup() as group,
    ):
        group.create_task(send_often(raw, frame(TEXT) * 1_000, count // 1_000))
        for _ in range(count):
            assert await raw.message() == ""
    assert watch.grew_bytes < 32 * MIB


# Claims


def claim(size: int, opcode: int = BINARY) -> bytes:
    """The head of a frame that says it is this long."""
    return struct.pack("!BBQ", 0x80 | opcode, 0x80 | 127, size) + bytes(4)


@pytest.mark.parametrize(
    ("size", "code"),
    [
        pytest.param(2**63, 1002, id="2^63"),
        pytest.param(2**64 - 1, 1002, id="2^64 - 1"),
        pytest.param(2**63 - 1, 1009, id="2^63 - 1"),
        pytest.param(2**32, 1009, id="2^32"),
        pytest.param(2**31 - 1, 1009, id="2^31 - 1"),
    ],
)
@pytest.mark.parametrize("begun", [b"", frame(TEXT, b"x", fin=False)], ids=["whole", "fragment"])
async def test_a_frame_that_claims_more_than_may_be_is_refused_at_its_head(
    relay: Relay, size: int, code: int, begun: bytes
) -> None:
    async with watched(relay) as watch, relay.raw_client("news") as culprit:
        await culprit.send(begun + claim(size, CONTINUATION if begun else BINARY))
        assert (await culprit.close_frame())[0] == code
    assert watch.grew_bytes < 4 * MIB


async def test_a_claim_that_may_be_takes_no_memory_before_its_bytes_come(relay: Relay) -> None:
    count = 300
    async with watched(relay) as watch, AsyncExitStack() as stack:
        for _ in range(count):
            raw = await stack.enter_async_context(relay.raw_client("news"))
            await raw.send(claim(MIB) + b"x")
        await relay.metric_is("websocket_connected_clients", count + 1)
    assert watch.grew_bytes < count * 32 * KIB + 4 * MIB


# Clients that send and never read, that never close, that come and go


async def test_many_who_send_and_never_read_fill_no_memory(relay_with: StartRelay) -> None:
    limits = {
        "max_message_bytes": 128 * KIB,
        "send_backlog_bytes": MIB,
        "total_backlog_bytes": 8 * MIB,
        "handshake_timeout_s": 2,
    }
    relay = relay_with(limits=limits)
    count = 30
    async with watched(relay) as watch, AsyncExitStack() as stack:
        deaf = [
            await stack.enter_async_context(
                relay.raw_client(f"news-{number % 3}", receive_buffer_bytes=4096)
            )
            for number in range(count)
        ]
        wire = frame(BINARY, bytes(64 * KIB)) * 4
        await asyncio.gather(*(send_for_ever(raw, wire) for raw in deaf))
        await relay.metric_is("websocket_connected_clients", 1)
        await relay.metric_is("websocket_backlog_bytes", 0)
    assert watch.grew_bytes < 96 * MIB


async def test_many_who_leave_the_end_of_a_message_unread_hold_no_more_than_all_may(
    relay_with: StartRelay,
) -> None:
    """A write that has left in part is there as a whole: that counts, not what is left of it."""
    limits = {"total_backlog_bytes": 12 * MIB, "handshake_timeout_s": 2}
    relay = relay_with(limits=limits, history={"max_messages": 0})
    count = 64
    async with AsyncExitStack() as stack:
        clients = [
            await stack.enter_async_context(
                relay.raw_client(f"of-{number}", receive_buffer_bytes=16 * KIB)
            )
            for number in range(count)
        ]
        before_bytes = relay.rss_bytes()
        for raw in clients:
            await raw.send(frame(BINARY, bytes(MIB - 16)))
            await raw.exactly(MIB - 260 * KIB)
        assert relay.rss_bytes() < before_bytes + 36 * MIB
        assert 11 * MIB < await relay.metric("websocket_backlog_bytes") <= 12 * MIB
        assert await relay.metric("websocket_closes_total", reason="slow_consumer") == count - 11
    await relay.metric_is("websocket_backlog_bytes", 0)


@pytest.mark.parametrize(
    ("last", "code"),
    [
        pytest.param(frame(TEXT, b"x", mask=False), 1002, id="after a breach"),
        pytest.param(frame(CLOSE, close_payload(1000)), 1000, id="after its own close"),
    ],
)
async def test_who_goes_on_after_the_close_is_not_heard_and_cut_off(
    hasty_relay: Relay, last: bytes, code: int
) -> None:
    async with watched(hasty_relay) as watch, hasty_relay.client("news") as bystander:
        async with hasty_relay.raw_client("news") as raw:
            await raw.send(frame(TEXT, b"before") + last)
            assert await raw.message() == "before"
            assert (await raw.close_frame())[0] == code
            await send_for_ever(raw, frame(TEXT, b"behind") * 1_000)
        await hasty_relay.metric_is("websocket_connected_clients", 2)
        await bystander.send("after")
        assert await receive_many(bystander, 2) == ["before", "after"]
    assert watch.grew_bytes < 16 * MIB


async def test_clients_who_come_and_go_leave_no_memory_and_no_descriptors(relay: Relay) -> None:
    endings: list[Callable[[RawClient], object]] = [
        lambda raw: raw.send(frame(CLOSE, close_payload(1000))),
        lambda raw: raw.send(frame(TEXT, b"x", mask=False)),
        lambda raw: raw.send(frame(TEXT, b"begun", fin=False)),
        lambda raw: raw.vanish(),
        lambda raw: raw.finish(),
    ]

    async def come_and_go(count: int) -> None:
        for number in range(count):
            async with relay.raw_client("news") as raw:
                await raw.send(frame(TEXT, b"hello"))
                ended = endings[number % len(endings)](raw)
                if asyncio.iscoroutine(ended):
                    await ended
        await relay.metric_is("websocket_connected_clients", 0)

    await come_and_go(500)
    started_bytes, started_descriptors = relay.rss_bytes(), relay.descriptors()
    await come_and_go(2_500)

    async def descriptors() -> tuple[bool, object]:
        count = relay.descriptors()
        return count <= started_descriptors, count

    await eventually(descriptors, f"{started_descriptors} descriptors")
    assert relay.rss_bytes() < started_bytes + 2 * MIB


# Requests


BOMBS = [
    pytest.param(b"a:\r\n" * 60_000, id="many empty fields"),
    pytest.param(b"".join(b"x-%d: y\r\n" % n for n in range(20_000)), id="many fields"),
    pytest.param(b"x: " + b"y" * 250_000 + b"\r\n", id="a huge value"),
    pytest.param(b"x" * 250_000 + b": y\r\n", id="a huge name"),
    pytest.param(b"Sec-WebSocket-Protocol: " + b"a, " * 80_000 + b"a\r\n", id="many offers"),
]


@pytest.mark.parametrize("bomb", BOMBS)
@pytest.mark.parametrize(
    ("before", "behind"),
    [
        pytest.param(upgrade_request()[:-2], b"\r\n", id="upgrade"),
        pytest.param(upgrade_request()[:-2], b"", id="unfinished"),
        pytest.param(b"GET / HTTP/1.1\r\nHost: localhost\r\n", b"\r\n", id="plain"),
        pytest.param(
            b"POST / HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n",
            b"\r\n",
            id="trailers",
        ),
    ],
)
async def test_a_header_bomb_goes_off_outside(
    relay: Relay, before: bytes, bomb: bytes, behind: bytes
) -> None:
    async with watched(relay) as watch, AsyncExitStack() as stack:
        bombers = [await stack.enter_async_context(await relay.tcp()) for _ in range(40)]

        async def blow_up(raw: RawClient) -> None:
            with suppress(ConnectionError):
                await raw.send(before + bomb + behind)
            received = await raw.ended()  # a reset may have taken the answer away
            assert b"HTTP/1.1 101 " not in received
            assert b"HTTP/1.1 2" not in received

        await asyncio.gather(*(blow_up(raw) for raw in bombers))
    assert watch.grew_bytes < 24 * MIB


async def test_a_chunk_extension_without_end_is_cut_off(relay: Relay) -> None:
    async with watched(relay) as watch, await relay.tcp() as raw:
        head = b"POST / HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n1;"
        await raw.send(head)
        await send_for_ever(raw, b"x" * 65_536)
    assert watch.grew_bytes < 4 * MIB


async def test_empty_lines_without_end_are_cut_off(relay: Relay) -> None:
    """Servers skip them before a request (RFC 9112 section 2.2)."""
    async with watched(relay) as watch, await relay.tcp() as raw:
        await send_for_ever(raw, b"\r\n" * 32_768)
    assert watch.grew_bytes < 4 * MIB


async def test_a_flood_of_pipelined_requests_is_cut_off(relay: Relay) -> None:
    wire = b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n" * 5_000
    async with watched(relay) as watch, AsyncExitStack() as stack:
        floods = [await stack.enter_async_context(await relay.tcp()) for _ in range(40)]
        await asyncio.gather(*(send_for_ever(raw, wire) for raw in floods))
    assert watch.grew_bytes < 24 * MIB


async def test_bytes_by_the_megabyte_behind_an_upgrade_wait_in_tcp_and_are_not_lost(
    relay: Relay, channel: str
) -> None:
    size, count = 64 * KIB, 512
    async with watched(relay) as watch, await relay.tcp() as eager:

        async def send() -> None:
            await eager.send(upgrade_request(path_of(channel)))
            for number in range(count):
                await eager.send(frame(BINARY, struct.pack("!I", number).ljust(size, b"x")))

        async with asyncio.TaskGroup() as group:
            group.create_task(send())
            assert (await eager.response()).status == 101
            for number in range(count):
                received = await eager.message()
                assert isinstance(received, bytes)
                assert received[:4] == struct.pack("!I", number)
    assert watch.grew_bytes < 32 * MIB


@pytest.mark.parametrize(
    "behind",
    [
        pytest.param(frame(TEXT, b"hello"), id="frames"),
        pytest.param(b"GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n", id="a request"),
        pytest.param(upgrade_request(), id="an upgrade"),
    ],
)
async def test_bytes_behind_a_refused_upgrade_are_nothing(relay: Relay, behind: bytes) -> None:
    before = await relay.metrics()
    async with await relay.tcp() as raw:
        await raw.send(upgrade_request("/nowhere") + behind)
        received = await raw.ended()
    assert received.startswith(b"HTTP/1.1 404 ")
    assert received.count(b"HTTP/1.1 ") == 1
    after = await relay.metrics()
    for name in ("websocket_connections_total", "websocket_messages_total"):
        assert after.value(name) == before.value(name)


# Channels


async def test_a_flood_of_channel_names_stops_at_the_limit_and_leaves_no_memory(
    relay_with: StartRelay,
) -> None:
    most = 100
    relay = relay_with(channels={"max_channels": most})
    number = 0

    async def fill_and_leave() -> None:
        nonlocal number
        async with AsyncExitStack() as stack:
            for _ in range(most):
                number += 1
                await stack.enter_async_context(relay.raw_client(f"name-{number}".ljust(128, "x")))
            await relay.metric_is("websocket_channels", most)
            with pytest.raises(InvalidStatus, match="503"):
                async with relay.client("one-too-many"):
                    pass
            async with relay.client(f"name-{number}".ljust(128, "x")) as joining:
                await joining.send("there is room in a channel that exists")
                await receive(joining)
        await relay.metric_is("websocket_channels", 0)

    for _ in range(3):
        await fill_and_leave()
    started_bytes = relay.rss_bytes()
    for _ in range(27):
        await fill_and_leave()
    assert await relay.metric("websocket_refusals_total", reason="channels") == 30
    assert relay.rss_bytes() < started_bytes + 2 * MIB


async def test_names_by_the_thousand_are_refused_without_a_trace(relay_with: StartRelay) -> None:
    relay = relay_with(channels={"max_channels": 1})

    async def ask(first: int, count: int) -> None:
        for number in range(first, first + count):
            async with await relay.tcp() as raw:
                await raw.send(upgrade_request(path_of(f"{number}".rjust(128, "x"))))
                assert (await raw.response()).status == 503

    async with relay.client("first") as client:
        await ask(0, 500)
        started_bytes = relay.rss_bytes()
        await ask(500, 3_000)
        assert relay.rss_bytes() < started_bytes + 2 * MIB
        assert await relay.metric("websocket_channels") == 1
        await client.send("still here")
        assert await receive(client) == "still here"
