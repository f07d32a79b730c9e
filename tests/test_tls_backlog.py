"""Backlogs and ends over TLS, where more bytes wait than were written."""

import asyncio

from tests.conftest import StartRelay
from tests.raw_client import TEXT, frame, upgrade_request
from tests.relay_process import Relay, receive, receive_many

MESSAGE = bytes(65_536)


async def assert_books_balance(relay: Relay) -> None:
    metrics = await relay.metrics()
    owed = metrics.value("websocket_owed_total")
    assert owed == metrics.value("websocket_deliveries_total") + metrics.value(
        "websocket_drops_total"
    )


async def test_the_books_balance_over_tls_from_the_first_message(
    tls_relay_with: StartRelay,
) -> None:
    relay = tls_relay_with()
    async with relay.client("news") as one, relay.client("news") as two:
        for number in range(10):
            await one.send(str(number))
            assert await receive(one) == await receive(two) == str(number)
        assert await relay.metric("websocket_deliveries_total") == 20
        await assert_books_balance(relay)


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
            await publisher.send(MESSAGE)
            assert await receive(publisher) == MESSAGE
        await relay.metric_is("websocket_closes_total", 1, reason="ping_timeout")
        await relay.metric_is("websocket_connected_clients", 1)
        await assert_books_balance(relay)


async def test_what_a_tls_client_says_right_before_it_leaves_is_relayed(
    tls_relay_with: StartRelay,
) -> None:
    relay = tls_relay_with()
    count = 2_000
    async with relay.client("news") as listener:
        reader, writer = await asyncio.open_connection(
            "localhost", relay.port, ssl=relay.tls_context
        )
        writer.write(upgrade_request("/channels/news"))
        assert b" 101 " in await reader.readuntil(b"\r\n\r\n")
        writer.write(b"".join(frame(TEXT, str(number).encode()) for number in range(count)))
        writer.close()
        heard = await receive_many(listener, count)
        assert heard == [str(number) for number in range(count)]
