"""Connections without a request: how long they stay open, and that no request meets their end."""

import asyncio
import gc
import socket
import time
import weakref
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from functools import partial
from typing import Any

import pytest
from websocket_relay.app import Port, Replica
from websocket_relay.config.model import Settings
from websocket_relay.outcomes import Refusal, RefusedError
from websocket_relay.server.listener import FINISH_S, Listener
from websocket_relay.server.sockets import tcp_sockets
from websocket_relay.wire import http_protocol, time_slicer
from websocket_relay.wire.http_connections import MAX_ARRIVING, STARTS_A_TURN, HttpConnections
from websocket_relay.wire.http_protocol import HttpProtocol

from tests.support.http_requests import get_request
from tests.support.raw_client import PATIENCE_S, RawClient
from tests.support.relay_process import HOST, StartRelay, eventually

TIMEOUT_S = 0.5
REQUEST = get_request("/")


App = Callable[[Any, Any, Any], Awaitable[None]]


async def answer(scope: Any, receive: Any, send: Any) -> None:
    await send({"type": "http.response.start", "status": 204, "headers": []})
    await send({"type": "http.response.body"})


class NewConnection:
    """A connection that has just been accepted."""

    def is_request_arriving(self) -> bool:
        return False

    def evict(self, error: RefusedError) -> None: ...


@asynccontextmanager
async def listening(
    connections: HttpConnections, app: App = answer, *, timeout_s: float = 60
) -> AsyncIterator[Listener]:
    """Listen in the loop of the test."""
    shared = Replica(Settings()).shared
    http = partial(HttpProtocol, shared=shared, plain=connections)
    listener = Listener(
        Port(app, connections, http),
        tcp_sockets("server", HOST, 0),
        keepalive_timeout_s=timeout_s,
    )
    await listener.listen()
    try:
        yield listener
    finally:
        await listener.shutdown()


async def connect_to(listener: Listener) -> RawClient:
    assert listener.address.port is not None
    return await RawClient.connect(HOST, listener.address.port)


@asynccontextmanager
async def idle_clients(listener: Listener, count: int) -> AsyncIterator[list[RawClient]]:
    """Yield clients that had a response each, oldest first."""
    async with AsyncExitStack() as stack:
        clients = []
        for _ in range(count):
            client = await stack.enter_async_context(await connect_to(listener))
            clients.append(client)
            await client.send(REQUEST)
            assert (await client.read_response()).status == 204
        yield clients


@pytest.fixture
def connections() -> HttpConnections:
    return HttpConnections(2, Refusal.HTTP_CONNECTIONS, lambda refusal: None)


async def test_a_request_that_arrives_before_the_timeout_is_answered_by_a_busy_loop(
    connections: HttpConnections,
) -> None:
    """The timer is due when the loop has read nothing since the request."""
    async with (
        listening(connections, timeout_s=TIMEOUT_S) as listener,
        idle_clients(listener, 1) as (client,),
    ):
        ours, theirs = socket.socketpair()
        loop = asyncio.get_running_loop()

        def block() -> None:
            loop.remove_reader(theirs)
            client.socket.send(REQUEST)
            time.sleep(TIMEOUT_S + 0.1)

        with ours, theirs:
            theirs.setblocking(False)
            loop.add_reader(theirs, block)
            ours.send(b"x")
            assert (await client.read_response()).status == 204
        assert await client.read_to_end() == b"", "closed at the next timeout"


async def test_a_connection_whose_request_has_arrived_is_not_evicted(
    connections: HttpConnections,
) -> None:
    async with listening(connections) as listener, idle_clients(listener, 2) as (oldest, other):
        oldest.socket.send(REQUEST)
        assert connections.register(NewConnection()) is None
        assert (await oldest.read_response()).status == 204
        assert await other.read_to_end() == b""


async def test_a_connection_whose_request_waits_for_the_parser_is_not_evicted(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    connections = HttpConnections(1, Refusal.HTTP_CONNECTIONS, lambda refusal: None)
    refusals = []

    async def answer_and_register(scope: Any, receive: Any, send: Any) -> None:
        await answer(scope, receive, send)
        error = connections.register(NewConnection())
        refusals.append(error and error.why)

    for module in (http_protocol, time_slicer):
        monkeypatch.setattr(module, "SLICE_S", -1)  # a slice parses a line or the fields
    async with (
        listening(connections, answer_and_register) as listener,
        await connect_to(listener) as client,
    ):
        await client.send(REQUEST * 2)
        for _ in range(2):
            assert (await client.read_response()).status == 204
        assert refusals == [Refusal.HTTP_CONNECTIONS, None], "evicted after the second response"


async def test_a_request_in_progress_is_not_evicted_while_a_connection_is_idle() -> None:
    """Bytes have arrived on all idle connections: the ends of the clients, for example."""
    connections = HttpConnections(MAX_ARRIVING + 2, Refusal.HTTP_CONNECTIONS, lambda refusal: None)

    started = asyncio.Event()

    async def answer_the_root(scope: Any, receive: Any, send: Any) -> None:
        if scope["path"] == "/":
            await answer(scope, receive, send)
            return
        started.set()
        while (await receive())["type"] != "http.disconnect":
            pass

    async with (
        listening(connections, answer_the_root) as listener,
        await connect_to(listener) as busy,
        idle_clients(listener, MAX_ARRIVING) as clients,
        idle_clients(listener, 1) as (youngest,),
    ):
        await busy.send(get_request("/never"))
        await started.wait()
        for client in (*clients, youngest):
            client.socket.send(REQUEST)
        assert connections.register(NewConnection()) is None
        for client in clients:
            assert (await client.read_response()).status == 204
        assert not busy.has_received()
        assert len(listener.server_state.tasks) == 1


async def test_a_drain_answers_requests_that_have_arrived_and_closes_idle_connections() -> None:
    count = 2 * STARTS_A_TURN
    connections = HttpConnections(2 * count, Refusal.HTTP_CONNECTIONS, lambda refusal: None)
    loop = asyncio.get_running_loop()

    async def answer_slowly(scope: Any, receive: Any, send: Any) -> None:
        if connections.evictions:
            await asyncio.sleep(2 * FINISH_S)
        await answer(scope, receive, send)

    async with (
        listening(connections, answer_slowly) as listener,
        idle_clients(listener, count) as clients,
        idle_clients(listener, 1) as (idle,),
    ):
        for client in clients:
            client.socket.send(REQUEST)
        connections.evict_idle(Refusal.DRAINING)
        assert await listener.wait_for_responses(until=loop.time() + PATIENCE_S) == 0
        await listener.shutdown()
        for client in clients:
            assert (await client.read_response()).status == 204
        assert await idle.read_to_end() == b""


async def test_a_connection_that_is_reset_while_idle_leaves_no_memory(
    connections: HttpConnections,
) -> None:
    async with listening(connections) as listener, idle_clients(listener, 1) as (client,):
        left = [weakref.ref(each) for each in listener.server_state.connections]
        client.reset()

        async def is_lost() -> tuple[bool, object]:
            return len(connections) == 0, len(connections)

        await eventually(is_lost, "the relay sees the reset")
        gc.collect()
        assert [reference() for reference in left] == [None]


async def test_an_idle_connection_is_closed_after_the_setting_and_not_before(
    relay_with: StartRelay,
) -> None:
    relay = relay_with(server={"keepalive_timeout_s": 1})
    for port in (relay.port, relay.metrics_port):
        async with await RawClient.connect(HOST, port) as raw:
            await raw.send(get_request("/healthz"))
            response = await raw.read_response()
            await raw.read_exactly(int(response.headers["content-length"]))
            answered_at = time.monotonic()
            assert await raw.read_to_end() == b""
            assert 0.9 < time.monotonic() - answered_at < 4
