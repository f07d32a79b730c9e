"""Connections without a request: how long they stay open, and that no request meets their end."""

import asyncio
import socket
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from functools import partial
from typing import Any

import pytest
from websocket_relay.app import build
from websocket_relay.config.model import Settings
from websocket_relay.outcomes import Refusal
from websocket_relay.server.listener import Listener
from websocket_relay.server.sockets import tcp_sockets
from websocket_relay.wire.http_connections import HttpConnections
from websocket_relay.wire.http_protocol import HttpProtocol

from tests.support.http_requests import get_request
from tests.support.raw_client import RawClient
from tests.support.relay_process import HOST, StartRelay

TIMEOUT_S = 0.5
REQUEST = get_request("/")


async def answer(scope: Any, receive: Any, send: Any) -> None:
    await send({"type": "http.response.start", "status": 204, "headers": []})
    await send({"type": "http.response.body"})


class NewConnection:
    """A connection that has just been accepted."""

    def is_request_arriving(self) -> bool:
        return False

    def evict(self, refusal: Refusal) -> None: ...


@asynccontextmanager
async def idle_connections(
    connections: HttpConnections, count: int
) -> AsyncIterator[list[RawClient]]:
    """Listen in the loop of the test; yield clients that had a response each, oldest first."""
    shared = build(Settings(), None, None).shared
    listener = Listener(
        answer,
        tcp_sockets("server", HOST, 0),
        http_connections=connections,
        http=partial(HttpProtocol, shared=shared, plain=connections),
        ws="none",
        timeout_keep_alive=TIMEOUT_S,
    )
    await listener.listen()
    async with AsyncExitStack() as stack:
        stack.push_async_callback(listener.shutdown)
        clients = []
        for _ in range(count):
            assert listener.address.port is not None
            client = await RawClient.connect(HOST, listener.address.port)
            clients.append(await stack.enter_async_context(client))
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
    async with idle_connections(connections, 1) as (client,):
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
    async with idle_connections(connections, 2) as (oldest, other):
        oldest.socket.send(REQUEST)
        assert connections.register(NewConnection()) is None
        assert (await oldest.read_response()).status == 204
        assert await other.read_to_end() == b""


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
