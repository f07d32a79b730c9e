"""Backlogs and ends over TLS, where more bytes wait than were written."""

import asyncio
import socket
import ssl
import threading

import pytest

from tests.support.books import assert_books_balance
from tests.support.raw_client import (
    CLOSE,
    PATIENCE_S,
    PING,
    TEXT,
    close_payload,
    frame,
    upgrade_request,
)
from tests.support.relay_process import HOST, Relay, StartRelay, receive, receive_many

MESSAGE = bytes(65_536)


async def test_the_books_balance_over_tls_from_the_first_message(
    tls_relay_with: StartRelay,
) -> None:
    relay = tls_relay_with()
    async with relay.client("news") as one, relay.client("news") as two:
        for number in range(10):
            await one.send(str(number))
            assert await receive(one) == await receive(two) == str(number)
        assert await relay.metric("websocket_deliveries_total") == 20
        assert_books_balance(await relay.metrics())


async def test_a_tls_client_that_falls_silent_while_it_is_behind_is_found(
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
        while not await relay.metric("websocket_slow_clients"):
            for _ in range(4):  # it must be behind before it is found to be silent
                await publisher.send(MESSAGE)
                assert await receive(publisher) == MESSAGE
        await relay.metric_is("websocket_closes_total", 1, reason="ping_timeout")
        await relay.metric_is("websocket_connected_clients", 1)
        assert_books_balance(await relay.metrics())


def end_tls(tls: ssl.SSLSocket) -> None:
    """Say TLS's end and wait for no answer; what comes instead may be what was not read yet."""
    tls.setblocking(False)
    try:
        tls.unwrap()
    except ssl.SSLWantReadError:
        pass
    except ssl.SSLError as error:
        if error.reason != "APPLICATION_DATA_AFTER_CLOSE_NOTIFY":
            raise


def say_and_hang_up(relay: Relay, path: str, wire: bytes) -> None:
    """Send, end TLS right behind it, and read on to TCP's end: to close now would be a reset."""
    with socket.create_connection((HOST, relay.port), PATIENCE_S) as tcp:
        assert relay.tls_context is not None
        with relay.tls_context.wrap_socket(tcp.dup(), server_hostname="localhost") as tls:
            tls.sendall(upgrade_request(path))
            assert b" 101 " in tls.recv(4096)
            tls.sendall(wire)
            end_tls(tls)
        tcp.settimeout(PATIENCE_S)
        while tcp.recv(65_536):
            pass


@pytest.mark.parametrize(
    ("end", "reason"), [(b"", "connection_lost"), (frame(CLOSE, close_payload(1000)), "client")]
)
async def test_what_a_tls_client_says_right_before_it_leaves_is_relayed(
    tls_relay_with: StartRelay, end: bytes, reason: str
) -> None:
    relay = tls_relay_with()
    texts = [str(number) for number in range(20_000)]
    wire = b"".join(frame(TEXT, text.encode()) for text in texts) + end
    async with relay.client("news") as listener:
        leaving = asyncio.create_task(
            asyncio.to_thread(say_and_hang_up, relay, "/channels/news", wire)
        )
        assert await receive_many(listener, len(texts)) == texts
        await relay.metric_is("websocket_closes_total", 1, reason=reason)
        await relay.metric_is("websocket_connected_clients", 1)
        await leaving
        assert_books_balance(await relay.metrics())


def hang_up_unread(
    relay: Relay, path: str, wire: bytes, is_behind: threading.Event, is_let_go: threading.Event
) -> None:
    """Read nothing, and when the relay waits for that, send and end TLS; TCP stays open."""
    with socket.socket() as tcp:
        tcp.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        tcp.settimeout(PATIENCE_S)
        tcp.connect((HOST, relay.port))
        assert relay.tls_context is not None
        with relay.tls_context.wrap_socket(tcp.dup(), server_hostname="localhost") as tls:
            tls.sendall(upgrade_request(path))
            assert b" 101 " in tls.recv(4096)
            assert is_behind.wait(PATIENCE_S)
            tls.sendall(wire)
            end_tls(tls)
        assert is_let_go.wait(PATIENCE_S)


@pytest.mark.parametrize("said", [b"", frame(PING) * 2_000], ids=["nothing", "much"])
async def test_a_tls_client_that_hangs_up_behind_is_let_go_by_the_deadline(
    tls_relay_with: StartRelay, said: bytes
) -> None:
    relay = tls_relay_with(limits={"handshake_timeout_s": 1})
    is_behind, is_let_go = threading.Event(), threading.Event()
    async with relay.client("news") as publisher:
        hanging = asyncio.create_task(
            asyncio.to_thread(hang_up_unread, relay, "/channels/news", said, is_behind, is_let_go)
        )
        await relay.metric_is("websocket_connected_clients", 2)
        while not await relay.metric("websocket_slow_clients"):
            await publisher.send(MESSAGE)
            assert await receive(publisher) == MESSAGE
        is_behind.set()
        await relay.metric_is("websocket_closes_total", 1, reason="connection_lost")
        await relay.metric_is("websocket_connected_clients", 1)
        is_let_go.set()
        await hanging
        assert_books_balance(await relay.metrics())
