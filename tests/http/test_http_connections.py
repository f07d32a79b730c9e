"""HTTP connections past their bound: those held open make room, and keep nobody out."""

import asyncio
import ssl
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager

import pytest
from websocket_relay.outcomes import Refusal
from websocket_relay.wire.http_connections import MAX_REFUSED, STARTS_A_TURN, HttpConnections

from tests.support.events_client import listening
from tests.support.http_requests import get, posting
from tests.support.issuer import KeyServer, key_set, signer
from tests.support.raw_client import RawClient, Response, upgrade_request
from tests.support.relay_process import HOST, StartRelay, eventually, receive

SLOW_HEAD = b"GET /healthz HTTP/1.1\r\nHost: localhost\r\nX-Slow: "
TOO_MANY = "http_connections"


async def ask(raw: RawClient, path: str = "/healthz") -> Response:
    """Send a request and read the whole answer."""
    await raw.send(get(path))
    answer = await raw.response()
    await raw.exactly(int(answer.headers["content-length"]))
    return answer


@asynccontextmanager
async def connections(port: int, count: int, first: bytes = b"") -> AsyncIterator[list[RawClient]]:
    """Open so many connections to a port, one after the other, which send this and no more."""
    async with AsyncExitStack() as stack:
        opened = []
        for _ in range(count):
            raw = await stack.enter_async_context(
                await RawClient.to(HOST, port, receive_buffer_bytes=4096)
            )
            if first:
                await raw.send(first)
            opened.append(raw)
        yield opened


async def test_past_the_limit_the_connection_that_is_idle_longest_makes_room(
    relay_with: StartRelay,
) -> None:
    relay = relay_with(limits={"max_http_connections": 3})
    async with connections(relay.port, 3) as idle:
        for raw in (*idle, idle[0]):
            assert (await ask(raw)).status == 200
        async with await relay.tcp() as new:
            assert (await ask(new)).status == 200
            assert await idle[1].ended() == b"", "it ends without an answer"
            for raw in (idle[0], idle[2], new):
                assert (await ask(raw)).status == 200
            assert await relay.metric("websocket_http_connections", port="relay") == 3
            assert await relay.metric("websocket_http_evictions_total") == 1
            assert await relay.metric("websocket_refusals_total", reason=TOO_MANY) == 0


async def test_a_request_that_is_never_finished_makes_room_and_is_told_so(
    relay_with: StartRelay,
) -> None:
    relay = relay_with(limits={"max_http_connections": 3})
    first = posting("news", b"begun", length=100)
    async with connections(relay.port, 3, first) as slow, await relay.tcp() as new:
        assert (await ask(new)).status == 200
        refusal = await slow[0].response()
        assert refusal.status == 503
        assert 1 <= int(refusal.headers["retry-after"]) <= 5
        assert await slow[0].ended() == b"too many HTTP connections\n"
        await slow[1].send(bytes(95))
        assert (await slow[1].response()).status == 202
        assert await relay.metric("websocket_refusals_total", reason=TOO_MANY) == 1


@pytest.mark.parametrize(
    "held",
    [
        pytest.param(b"", id="silent"),
        pytest.param(SLOW_HEAD, id="slow heads"),
        pytest.param(get("/healthz"), id="idle"),
        pytest.param(get("/stats") * 16, id="busy"),
        pytest.param(upgrade_request("/nowhere"), id="refused"),
    ],
)
async def test_connections_that_are_held_open_keep_nobody_out(
    relay_with: StartRelay, channel: str, held: bytes
) -> None:
    relay = relay_with(limits={"max_http_connections": 5, "handshake_timeout_s": 60})
    before = relay.descriptors()
    async with connections(relay.port, 50, held), relay.client(channel) as client:
        await client.send("in")
        assert await receive(client) == "in"
        assert (await relay.get("/readyz")).status_code == 200

        async def descriptors() -> tuple[bool, object]:
            count = relay.descriptors()
            return count <= before + 1 + 5, count

        await eventually(descriptors, "5 connections beside the client")
    assert relay.complaints == []


async def test_the_log_hears_once_of_requests_that_had_to_make_room(relay_with: StartRelay) -> None:
    relay = relay_with(limits={"max_http_connections": 1})
    async with connections(relay.port, 20, SLOW_HEAD):
        await relay.metric_is("websocket_refusals_total", 19, reason=TOO_MANY)
    warnings = [event for event in relay.log_events if event["level"] == "warning"]
    told = [(event["event"], event["reason"], event["setting"]) for event in warnings]
    assert told == [("clients refused", TOO_MANY, "limits.max_http_connections")]


async def test_over_tls_unfinished_requests_make_room_too(
    tls_relay_with: StartRelay, channel: str
) -> None:
    relay = tls_relay_with(limits={"max_http_connections": 3, "handshake_timeout_s": 60})
    context = relay.tls_context
    assert isinstance(context, ssl.SSLContext)
    writers = []
    for _ in range(10):
        _, writer = await asyncio.open_connection(
            HOST, relay.port, ssl=context, server_hostname="localhost"
        )
        writer.write(SLOW_HEAD)
        writers.append(writer)
    async with relay.client(channel) as client:
        await client.send("in")
        assert await receive(client) == "in"
    await relay.metric_reaches("websocket_refusals_total", 7, reason=TOO_MANY)
    for writer in writers:
        writer.transport.abort()


async def test_clients_and_listeners_to_events_are_not_counted(
    relay_with: StartRelay, channel: str
) -> None:
    relay = relay_with(limits={"max_http_connections": 2})
    async with AsyncExitStack() as stack:
        clients = [await stack.enter_async_context(relay.client(channel)) for _ in range(5)]
        for _ in range(5):
            await stack.enter_async_context(listening(relay, channel))
        await relay.metric_is("websocket_connected_clients", 10)
        assert await relay.metric("websocket_http_connections", port="relay") == 0
        await clients[0].send("to all")
        for client in clients:
            assert await receive(client) == "to all"


async def test_where_all_wait_for_the_relay_a_new_connection_is_refused(
    relay_with: StartRelay, channel: str
) -> None:
    known, new = signer("ES256", "known"), signer("ES256", "new", 1)
    with KeyServer(key_set(known)) as server:
        relay = relay_with(
            auth={"mode": "jwt", "jwt": {"jwks_url": server.url, "algorithms": ["ES256"]}},
            limits={"max_http_connections": 2},
        )
        server.body = key_set(new)
        server.go_on.clear()
        post = posting(channel, b"said", f"Authorization: Bearer {new.token()}")
        async with connections(relay.port, 2, post) as waiting:
            await asyncio.to_thread(server.await_requests, 2)
            await relay.metric_is("websocket_http_connections", 2, port="relay")
            async with await relay.tcp() as refused:
                await relay.metric_is("websocket_refusals_total", 1, reason=TOO_MANY)
                assert not refused.has_received(), "there is no answer before there is a request"
                await refused.send(get("/healthz"))
                answer = await refused.response()
                assert answer.status == 503
                assert 1 <= int(answer.headers["retry-after"]) <= 5
                assert await refused.ended() == b"too many HTTP connections\n"
            server.go_on.set()
            for raw in waiting:
                assert (await raw.response()).status == 202
            assert (await relay.get("/healthz")).status_code == 200


async def test_those_that_wait_to_be_refused_are_bounded_and_counted_once(
    relay_with: StartRelay, channel: str
) -> None:
    known, new = signer("ES256", "known"), signer("ES256", "new", 1)
    with KeyServer(key_set(known)) as server:
        auth = {"mode": "jwt", "jwt": {"jwks_url": server.url, "algorithms": ["ES256"]}}
        relay = relay_with(auth=auth, limits={"max_http_connections": 1})
        server.go_on.clear()
        post = posting(channel, b"posted", f"Authorization: Bearer {new.token()}")
        async with connections(relay.port, 1, post):
            await asyncio.to_thread(server.await_requests, 2)
            async with connections(relay.port, MAX_REFUSED + 1) as refused:
                assert await refused[0].ended() == b"", "evicted without an answer"
                count = len(refused)
                await relay.metric_is("websocket_refusals_total", count, reason=TOO_MANY)
                assert (await ask(refused[-1])).status == 503
                assert await relay.metric("websocket_refusals_total", reason=TOO_MANY) == count
            server.go_on.set()


# The metrics port


@pytest.mark.parametrize(
    "held",
    [
        pytest.param(b"", id="silent"),
        pytest.param(SLOW_HEAD, id="slow heads"),
        pytest.param(get("/metrics") * 16, id="slow readers"),
        pytest.param(get("/healthz"), id="idle"),
    ],
)
async def test_one_peer_can_not_block_the_metrics_port(relay_with: StartRelay, held: bytes) -> None:
    relay = relay_with(limits={"handshake_timeout_s": 60})
    before = relay.descriptors()
    async with connections(relay.metrics_port, 500, held):
        for path in ("/healthz", "/readyz", "/metrics"):
            assert (await relay.get_metrics(path)).status_code == 200
        assert relay.descriptors() <= before + 40
        assert await relay.metric("websocket_http_connections", port="metrics") <= 32
        assert (await relay.get("/healthz")).status_code == 200


async def test_the_ports_have_bounds_of_their_own(relay_with: StartRelay) -> None:
    relay = relay_with(limits={"max_http_connections": 1, "handshake_timeout_s": 60})
    async with connections(relay.metrics_port, 40, SLOW_HEAD), await relay.tcp() as raw:
        await relay.metric_reaches("websocket_refusals_total", 8, reason="metrics_connections")
        assert (await ask(raw)).status == 200
        assert await relay.metric("websocket_refusals_total", reason=TOO_MANY) == 0


# Turns


async def test_a_few_requests_start_in_one_turn_of_the_loop_in_their_order() -> None:
    plain = HttpConnections(10, Refusal.HTTP_CONNECTIONS, lambda why: None)
    started: list[int] = []
    count = 3 * STARTS_A_TURN
    for number in range(count):
        plain.start_request(lambda number=number: started.append(number))  # type: ignore[misc]
    for turn in (1, 2, 3):
        assert started == list(range(turn * STARTS_A_TURN))
        await asyncio.sleep(0)
    await asyncio.sleep(0)
    plain.start_request(lambda: started.append(count))
    assert started == list(range(count + 1)), "after a rest a request starts at once"
