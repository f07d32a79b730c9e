"""Backlogs and closes over TLS, where encrypted bytes are buffered besides those of the socket."""

import asyncio
import socket
import ssl
import threading

import pytest

from tests.support.accounting import assert_counters_add_up
from tests.support.raw_client import (
    CLOSE,
    PATIENCE_S,
    PING,
    TEXT,
    close_payload,
    frame,
    upgrade_request,
)
from tests.support.relay_process import HOST, RelayProcess, StartRelay, receive, receive_many

MESSAGE = bytes(65_536)


async def test_the_counters_over_tls_add_up_from_the_first_message(
    tls_relay_with: StartRelay,
) -> None:
    relay = tls_relay_with()
    async with relay.client("news") as one, relay.client("news") as two:
        for number in range(10):
            await one.send(str(number))
            assert await receive(one) == await receive(two) == str(number)
        assert await relay.metric("websocket_deliveries_total") == 20
        assert_counters_add_up(await relay.metrics())


async def test_a_tls_client_that_stops_reading_is_closed_by_the_ping_timeout(
    tls_relay_with: StartRelay,
) -> None:
    relay = tls_relay_with(
        keepalive={"ping_interval_s": 0.3, "ping_timeout_s": 1},
        limits={"handshake_timeout_s": 1},
    )
    async with (
        relay.client("news", close_timeout=0.1) as silent,
        relay.client("news") as publisher,
    ):
        silent.transport.pause_reading()
        page = await relay.metrics()
        while not page.value("websocket_slow_clients"):
            if page.value("websocket_connected_clients") == 1:
                break  # on a busy machine the ping timeout is earlier
            for _ in range(8):
                await publisher.send(MESSAGE)
                assert await receive(publisher) == MESSAGE
            page = await relay.metrics()
        await relay.await_metric("websocket_closes_total", 1, reason="ping_timeout")
        await relay.await_metric("websocket_connected_clients", 1)
        assert_counters_add_up(await relay.metrics())


def close_tls(tls: ssl.SSLSocket) -> None:
    """Send close_notify without waiting for the peer's; unread data may arrive in its place."""
    tls.setblocking(False)
    try:
        tls.unwrap()
    except ssl.SSLWantReadError:
        pass
    except ssl.SSLError as error:
        if error.reason != "APPLICATION_DATA_AFTER_CLOSE_NOTIFY":
            raise


def send_and_close_tls(relay: RelayProcess, path: str, wire: bytes) -> None:
    """Send, close TLS at once, and read to the end of TCP; a close of TCP now would be a reset."""
    with socket.create_connection((HOST, relay.port), PATIENCE_S) as tcp:
        assert relay.tls_context is not None
        with relay.tls_context.wrap_socket(tcp.dup(), server_hostname="localhost") as tls:
            tls.sendall(upgrade_request(path))
            assert b" 101 " in tls.recv(4096)
            tls.sendall(wire)
            close_tls(tls)
        tcp.settimeout(PATIENCE_S)
        while tcp.recv(65_536):
            pass


@pytest.mark.parametrize(
    ("end", "reason"),
    [(b"", "connection_lost"), (frame(CLOSE, close_payload(1000)), "client")],
    ids=["without a close frame", "with a close frame"],
)
async def test_messages_that_a_tls_client_sends_right_before_its_end_are_relayed(
    tls_relay_with: StartRelay, end: bytes, reason: str
) -> None:
    relay = tls_relay_with()
    texts = [f"{number:0100}" for number in range(3_000)]
    wire = b"".join(frame(TEXT, text.encode()) for text in texts) + end
    async with relay.client("news") as subscriber:
        ending = asyncio.create_task(
            asyncio.to_thread(send_and_close_tls, relay, "/channels/news", wire)
        )
        assert await receive_many(subscriber, len(texts)) == texts
        await relay.await_metric("websocket_closes_total", 1, reason=reason)
        await relay.await_metric("websocket_connected_clients", 1)
        await ending
        assert_counters_add_up(await relay.metrics())


def close_tls_without_reading(
    relay: RelayProcess,
    path: str,
    wire: bytes,
    is_slow: threading.Event,
    is_closed: threading.Event,
) -> None:
    """Read nothing; once the client is slow, send and close TLS. TCP stays open."""
    with socket.socket() as tcp:
        tcp.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        tcp.settimeout(PATIENCE_S)
        tcp.connect((HOST, relay.port))
        assert relay.tls_context is not None
        with relay.tls_context.wrap_socket(tcp.dup(), server_hostname="localhost") as tls:
            tls.sendall(upgrade_request(path))
            assert b" 101 " in tls.recv(4096)
            assert is_slow.wait(PATIENCE_S)
            tls.sendall(wire)
            close_tls(tls)
        assert is_closed.wait(PATIENCE_S)


@pytest.mark.parametrize("wire", [b"", frame(PING) * 2_000], ids=["nothing", "pings"])
async def test_a_slow_client_that_closes_tls_and_keeps_tcp_open_is_aborted_at_the_deadline(
    tls_relay_with: StartRelay, wire: bytes
) -> None:
    relay = tls_relay_with(limits={"handshake_timeout_s": 1})
    is_slow, is_closed = threading.Event(), threading.Event()
    async with relay.client("news") as publisher:
        closing = asyncio.create_task(
            asyncio.to_thread(
                close_tls_without_reading, relay, "/channels/news", wire, is_slow, is_closed
            )
        )
        await relay.await_metric("websocket_connected_clients", 2)
        while not await relay.metric("websocket_slow_clients"):
            await publisher.send(MESSAGE)
            assert await receive(publisher) == MESSAGE
        is_slow.set()
        await relay.await_metric("websocket_closes_total", 1, reason="connection_lost")
        await relay.await_metric("websocket_connected_clients", 1)
        is_closed.set()
        await closing
        assert_counters_add_up(await relay.metrics())
