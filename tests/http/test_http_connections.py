"""The limit of HTTP connections: evictions in favour of new connections, on both ports."""

import asyncio
import ssl
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from functools import partial

import pytest
from websocket_relay.outcomes import Refusal
from websocket_relay.wire.http_connections import MAX_REFUSED, STARTS_A_TURN, HttpConnections

from tests.support.events_client import subscribe_events
from tests.support.http_requests import get_request, post_request
from tests.support.issuer import KeyServer, key_set, make_signer
from tests.support.raw_client import RawClient, Response, upgrade_request
from tests.support.relay_process import HOST, StartRelay, eventually, receive

PARTIAL_HEAD = b"GET /healthz HTTP/1.1\r\nHost: localhost\r\nX-Slow: "
REASON = "http_connections"


async def request_page(raw: RawClient, path: str = "/healthz") -> Response:
    """Send a request and read the whole response."""
    await raw.send(get_request(path))
    response = await raw.read_response()
    await raw.read_exactly(int(response.headers["content-length"]))
    return response


@asynccontextmanager
async def open_connections(
    port: int, count: int, first_bytes: bytes = b""
) -> AsyncIterator[Sequence[RawClient]]:
    """Open connections to a port, one after the other. Each sends `first_bytes` and no more."""
    async with AsyncExitStack() as stack:
        opened = []
        for _ in range(count):
            raw = await stack.enter_async_context(
                await RawClient.connect(HOST, port, receive_buffer_bytes=4096)
            )
            if first_bytes:
                await raw.send(first_bytes)
            opened.append(raw)
        yield opened


async def test_at_the_limit_the_connection_that_is_idle_longest_is_evicted(
    relay_with: StartRelay,
) -> None:
    relay = relay_with(limits={"max_http_connections": 3})
    async with open_connections(relay.port, 3) as idle:
        for raw in (*idle, idle[0]):
            assert (await request_page(raw)).status == 200
        async with await relay.connect_tcp() as new:
            assert (await request_page(new)).status == 200
            assert await idle[1].read_to_end() == b"", "a response to no request"
            for raw in (idle[0], idle[2], new):
                assert (await request_page(raw)).status == 200
            assert await relay.metric("websocket_http_connections", port="relay") == 3
            assert await relay.metric("websocket_http_evictions_total") == 1
            assert await relay.metric("websocket_refusals_total", reason=REASON) == 0


async def test_an_unfinished_request_is_evicted_with_a_response(relay_with: StartRelay) -> None:
    relay = relay_with(limits={"max_http_connections": 3})
    partial_post = post_request("news", b"begun", length=100)
    async with (
        open_connections(relay.port, 3, partial_post) as unfinished,
        await relay.connect_tcp() as new,
    ):
        assert (await request_page(new)).status == 200
        refusal = await unfinished[0].read_response()
        assert refusal.status == 503
        assert 1 <= int(refusal.headers["retry-after"]) <= 5
        assert await unfinished[0].read_to_end() == b"too many HTTP connections\n"
        await unfinished[1].send(bytes(95))
        assert (await unfinished[1].read_response()).status == 202
        assert await relay.metric("websocket_refusals_total", reason=REASON) == 1


@pytest.mark.parametrize(
    "first_bytes",
    [
        pytest.param(b"", id="silent"),
        pytest.param(PARTIAL_HEAD, id="partial heads"),
        pytest.param(get_request("/healthz"), id="idle"),
        pytest.param(get_request("/stats") * 16, id="busy"),
        pytest.param(upgrade_request("/nowhere"), id="refused"),
    ],
)
async def test_connections_that_are_kept_open_block_no_new_client(
    relay_with: StartRelay, channel: str, first_bytes: bytes
) -> None:
    relay = relay_with(limits={"max_http_connections": 5, "handshake_timeout_s": 60})
    before = relay.descriptors()
    async with (
        open_connections(relay.port, 50, first_bytes),
        relay.client(channel) as client,
    ):
        await client.send("message")
        assert await receive(client) == "message"
        assert (await relay.get("/readyz")).status_code == 200

        async def descriptors() -> tuple[bool, object]:
            count = relay.descriptors()
            return count <= before + 1 + 5, count

        await eventually(descriptors, "descriptors of 5 HTTP connections and the client")
    assert relay.unexpected_lines == []


async def test_refusals_of_evicted_requests_are_logged_once(relay_with: StartRelay) -> None:
    relay = relay_with(limits={"max_http_connections": 1})
    async with open_connections(relay.port, 20, PARTIAL_HEAD):
        await relay.await_metric("websocket_refusals_total", 19, reason=REASON)
    warnings = [event for event in relay.log_events if event["level"] == "warning"]
    fields = [(event["event"], event["reason"], event["setting"]) for event in warnings]
    assert fields == [("clients refused", REASON, "limits.max_http_connections")]


async def test_unfinished_requests_over_tls_are_evicted(
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
        writer.write(PARTIAL_HEAD)
        writers.append(writer)
    async with relay.client(channel) as client:
        await client.send("message")
        assert await receive(client) == "message"
    await relay.await_metric_at_least("websocket_refusals_total", 7, reason=REASON)
    for writer in writers:
        writer.transport.abort()


async def test_websocket_clients_and_event_streams_do_not_count_as_http_connections(
    relay_with: StartRelay, channel: str
) -> None:
    relay = relay_with(limits={"max_http_connections": 2})
    async with AsyncExitStack() as stack:
        clients = [await stack.enter_async_context(relay.client(channel)) for _ in range(5)]
        for _ in range(5):
            await stack.enter_async_context(subscribe_events(relay, channel))
        await relay.await_metric("websocket_connected_clients", 10)
        assert await relay.metric("websocket_http_connections", port="relay") == 0
        await clients[0].send("to all")
        for client in clients:
            assert await receive(client) == "to all"


async def test_a_new_connection_is_refused_while_posts_occupy_all_connections(
    relay_with: StartRelay, channel: str
) -> None:
    known, new = make_signer("ES256", "known"), make_signer("ES256", "new", 1)
    with KeyServer(key_set(known)) as server:
        relay = relay_with(
            auth={"mode": "jwt", "jwt": {"jwks_url": server.url, "algorithms": ["ES256"]}},
            limits={"max_http_connections": 2},
        )
        server.body = key_set(new)
        server.may_answer.clear()
        post = post_request(channel, b"message", f"Authorization: Bearer {new.token()}")
        async with open_connections(relay.port, 2, post) as publishing:
            await asyncio.to_thread(server.block_until_requested, 2)
            await relay.await_metric("websocket_http_connections", 2, port="relay")
            async with await relay.connect_tcp() as refused:
                await relay.await_metric("websocket_refusals_total", 1, reason=REASON)
                assert not refused.has_received(), "a response before the request"
                await refused.send(get_request("/healthz"))
                response = await refused.read_response()
                assert response.status == 503
                assert 1 <= int(response.headers["retry-after"]) <= 5
                assert await refused.read_to_end() == b"too many HTTP connections\n"
            server.may_answer.set()
            for raw in publishing:
                assert (await raw.read_response()).status == 202
            assert (await relay.get("/healthz")).status_code == 200


async def test_refused_connections_that_send_no_request_are_bounded_and_counted_once(
    relay_with: StartRelay, channel: str
) -> None:
    known, new = make_signer("ES256", "known"), make_signer("ES256", "new", 1)
    with KeyServer(key_set(known)) as server:
        auth = {"mode": "jwt", "jwt": {"jwks_url": server.url, "algorithms": ["ES256"]}}
        relay = relay_with(auth=auth, limits={"max_http_connections": 1})
        server.may_answer.clear()
        post = post_request(channel, b"posted", f"Authorization: Bearer {new.token()}")
        async with open_connections(relay.port, 1, post):
            await asyncio.to_thread(server.block_until_requested, 2)
            async with open_connections(relay.port, MAX_REFUSED + 1) as refused:
                assert await refused[0].read_to_end() == b"", "a response to no request"
                count = len(refused)
                await relay.await_metric("websocket_refusals_total", count, reason=REASON)
                assert (await request_page(refused[-1])).status == 503
                assert await relay.metric("websocket_refusals_total", reason=REASON) == count
            server.may_answer.set()


# The metrics port


@pytest.mark.parametrize(
    "first_bytes",
    [
        pytest.param(b"", id="silent"),
        pytest.param(PARTIAL_HEAD, id="partial heads"),
        pytest.param(get_request("/metrics") * 16, id="slow readers"),
        pytest.param(get_request("/healthz"), id="idle"),
    ],
)
async def test_connections_that_are_kept_open_do_not_block_the_metrics_port(
    relay_with: StartRelay, first_bytes: bytes
) -> None:
    relay = relay_with(limits={"handshake_timeout_s": 60})
    before = relay.descriptors()
    async with open_connections(relay.metrics_port, 100, first_bytes):
        for path in ("/healthz", "/readyz", "/metrics"):
            assert (await relay.get_metrics(path)).status_code == 200
        assert relay.descriptors() <= before + 40
        assert await relay.metric("websocket_http_connections", port="metrics") <= 32
        assert (await relay.get("/healthz")).status_code == 200


async def test_each_port_has_its_own_limit(relay_with: StartRelay) -> None:
    relay = relay_with(limits={"max_http_connections": 1, "handshake_timeout_s": 60})
    async with (
        open_connections(relay.metrics_port, 40, PARTIAL_HEAD),
        await relay.connect_tcp() as raw,
    ):
        await relay.await_metric_at_least(
            "websocket_refusals_total", 8, reason="metrics_connections"
        )
        assert (await request_page(raw)).status == 200
        assert await relay.metric("websocket_refusals_total", reason=REASON) == 0


# Iterations of the event loop


async def test_a_bounded_number_of_requests_starts_in_one_loop_iteration_in_order() -> None:
    connections = HttpConnections(10, Refusal.HTTP_CONNECTIONS, lambda refusal: None)
    started: list[int] = []

    def start(number: int) -> None:
        if connections.may_start_request():
            started.append(number)
        else:
            connections.queue_request(partial(started.append, number))

    count = 3 * STARTS_A_TURN
    for number in range(count):
        start(number)
    for iteration in (1, 2, 3):
        assert started == list(range(iteration * STARTS_A_TURN))
        await asyncio.sleep(0)
    await asyncio.sleep(0)
    start(count)
    assert started == list(range(count + 1)), "a request after an idle iteration is delayed"
