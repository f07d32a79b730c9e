"""How streams of server-sent events end: slow listeners, a relay that stops, peers that vanish."""

import asyncio
import ctypes
import socket
import struct
import time
from contextlib import AsyncExitStack

import pytest

from tests.support.books import assert_balanced_at_rest, assert_books_balance
from tests.support.events_client import Events, listening
from tests.support.programs import not_tested
from tests.support.raw_client import RawClient
from tests.support.relay_process import Relay, StartRelay, closed, receive

ASK = b"GET /channels/a/events HTTP/1.1\r\nHost: localhost\r\n\r\n"
KIB = 1_024


async def stalled_listener(relay: Relay) -> RawClient:
    """Return a listener that reads nothing, once it is one."""
    before = await relay.metric("websocket_connected_clients")
    raw = await relay.tcp(receive_buffer_bytes=4096)
    await raw.send(ASK)
    await relay.metric_is("websocket_connected_clients", before + 1)
    return raw


async def test_a_listener_that_reads_nothing_is_cut_off_and_delays_nobody(
    relay_with: StartRelay,
) -> None:
    relay = relay_with(limits={"send_backlog_bytes": 64 * KIB, "handshake_timeout_s": 1})
    async with (
        relay.client("a", max_queue=None) as speaker,
        listening(relay, "a") as events,
        await stalled_listener(relay),
    ):
        for number in range(100):
            text = f"{number} ".ljust(16_000, "x")
            await speaker.send(text)
            assert await receive(speaker) == text
            assert (await events.event()).data == text
        await relay.metric_is("websocket_closes_total", 1, reason="slow_consumer")
        await relay.metric_is("websocket_connected_clients", 2)
        assert await relay.metric("websocket_drops_total", reason="slow_consumer") > 0
    await assert_balanced_at_rest(relay)


async def test_a_listener_whose_backlog_is_full_to_the_last_byte_is_closed_all_the_same(
    relay_with: StartRelay,
) -> None:
    """The close event itself does not fit into the backlog."""
    relay = relay_with(limits={"send_backlog_bytes": 16 * KIB, "handshake_timeout_s": 1})
    async with relay.client("a") as speaker, await stalled_listener(relay):
        while not await relay.metric("websocket_slow_clients"):
            await speaker.send("x" * 4_000)
            await receive(speaker)
        while not await relay.metric("websocket_drops_total", reason="slow_consumer"):
            for _ in range(20):
                await speaker.send("")
                await receive(speaker)
        await relay.metric_is("websocket_closes_total", 1, reason="slow_consumer")
    await assert_balanced_at_rest(relay)
    assert relay.complaints == []


async def test_a_listener_that_is_behind_when_the_relay_stops_reads_to_the_end(
    relay_with: StartRelay,
) -> None:
    relay = relay_with(shutdown={"spread_s": 0.1})
    async with relay.client("a", max_queue=None) as speaker, await stalled_listener(relay) as raw:
        for _ in range(50):
            await speaker.send("x" * 10_000)
        for _ in range(50):
            await receive(speaker)
        relay.signal()
        assert (await closed(speaker))[0] == 1001
        heard = bytearray()
        while chunk := await raw.chunk():
            heard += chunk
        assert heard.count(b"data: xxx") == 50
        assert heard.endswith(b'"}\n\n')
        assert b"event: close\ndata: " in heard[-200:]
        raw.finish()
        assert await relay.exit_code() == 0


async def test_each_listener_is_told_when_to_come_back_should_it_be_cut_off(
    relay: Relay, channel: str
) -> None:
    async with AsyncExitStack() as stack:
        told = [
            (await stack.enter_async_context(listening(relay, channel))).retry for _ in range(10)
        ]
    assert len(set(told)) > 1
    assert all(retry_ms and 500 <= retry_ms <= 2500 for retry_ms in told)


async def test_listeners_and_clients_are_let_go_one_after_another(relay_with: StartRelay) -> None:
    relay = relay_with(shutdown={"spread_s": 2})

    async def told(events: Events) -> tuple[float, int]:
        close = await events.event()
        assert close.name == "close"
        assert close.said["code"] == 1001
        assert events.retry is not None
        assert close.said["reason"] == f"draining; retry_ms={events.retry}"
        with pytest.raises(EOFError):
            await events.event()
        events.writer.close()
        return time.monotonic(), events.retry

    async with AsyncExitStack() as stack:
        listeners = [await stack.enter_async_context(listening(relay, "a")) for _ in range(20)]
        clients = [await stack.enter_async_context(relay.client("a")) for _ in range(5)]
        await clients[0].send("last words")
        for events in listeners:
            assert await events.messages(1) == ["last words"]
        relay.signal()
        ends = sorted(await asyncio.gather(*map(told, listeners)))
        assert ends[-1][0] - ends[0][0] > 1, "all at once"
        assert ends[14][0] - ends[4][0] > 0.3, "in two bursts"
        assert len({retry_ms for _, retry_ms in ends}) > 10
        assert {(await closed(client))[0] for client in clients} == {1001}
        assert await relay.exit_code() == 0


async def test_listeners_that_are_let_go_are_counted_as_that(relay_with: StartRelay) -> None:
    relay = relay_with(shutdown={"spread_s": 1})
    async with AsyncExitStack() as stack:
        listeners = [await stack.enter_async_context(listening(relay, "a")) for _ in range(5)]
        last = await stack.enter_async_context(relay.raw_client("a"))
        relay.signal()
        for events in listeners:
            assert (await events.event()).name == "close"
            events.writer.close()
        # The client does not answer its close: so long the metrics can be read.
        await relay.metric_is("websocket_closes_total", 5, reason="draining")
        await relay.metric_is("websocket_connected_clients", 1)
        await last.answer_close()


async def test_listeners_over_tls_hear_all_and_are_let_go(tls_relay_with: StartRelay) -> None:
    relay = tls_relay_with(shutdown={"spread_s": 0.1})
    async with (
        relay.client("a", max_queue=None) as speaker,
        listening(relay, "a", context=relay.tls_context) as events,
    ):
        for number in range(20):
            text = f"{number} ".ljust(50_000, "x")
            await speaker.send(text)
            assert (await events.event()).data == text
            assert await receive(speaker) == text
        await relay.metric_is("websocket_deliveries_total", 40)
        assert_books_balance(await relay.metrics())
        relay.signal()
        assert (await events.event()).name == "close"
        with pytest.raises(EOFError):
            await events.event()
        assert await relay.exit_code() == 0


async def test_the_books_balance_after_listeners_came_went_and_stalled_under_load(
    relay_with: StartRelay,
) -> None:
    relay = relay_with(limits={"send_backlog_bytes": 32 * KIB, "handshake_timeout_s": 1})
    is_over = asyncio.Event()

    async def talk() -> None:
        async with relay.client("a") as speaker:
            while not is_over.is_set():
                await speaker.send("x" * 500)
                await receive(speaker)

    async def come_and_go(messages: int) -> None:
        for _ in range(10):
            async with listening(relay, "a", "?history=5") as events:
                await events.messages(messages)

    async with asyncio.TaskGroup() as group, AsyncExitStack() as stack:
        talking = group.create_task(talk())
        for _ in range(3):
            await stack.enter_async_context(await stalled_listener(relay))
        await asyncio.gather(*map(come_and_go, (1, 10, 50)))
        await relay.metric_is("websocket_closes_total", 3, reason="slow_consumer")
        is_over.set()
        await talking
    await assert_balanced_at_rest(relay)


def lose_all_packets(raw: RawClient) -> None:
    """Have the kernel throw away all that comes to a socket from now on: its machine is gone.

    A socket filter that takes nothing (BPF_RET, 0). Linux lets every user attach one, a container's
    sandbox may not.
    """
    take_nothing = ctypes.create_string_buffer(struct.pack("HBBI", 0x06, 0, 0, 0))
    program = struct.pack("HP", 1, ctypes.addressof(take_nothing))
    so_attach_filter = 26
    try:
        raw.socket.setsockopt(socket.SOL_SOCKET, so_attach_filter, program)
    except PermissionError:
        not_tested("this user may not attach a filter to a socket")


async def test_a_listener_that_vanishes_without_a_word_is_found(relay_with: StartRelay) -> None:
    relay = relay_with(keepalive={"ping_interval_s": 0.3, "ping_timeout_s": 0.7})
    async with await relay.tcp() as raw, listening(relay, "a") as other:
        await raw.send(ASK)
        await relay.metric_is("websocket_connected_clients", 2)
        started = time.monotonic()
        lose_all_packets(raw)
        await relay.metric_is("websocket_connected_clients", 1)
        assert time.monotonic() - started < 8
        assert await relay.metric("websocket_closes_total", reason="connection_lost") == 1
        async with relay.client("a") as speaker:
            await speaker.send("still here")
            assert await other.messages(1) == ["still here"]


async def test_a_listener_that_hangs_up_is_seen_though_it_said_more_than_it_should(
    relay_with: StartRelay,
) -> None:
    """A request behind it, or a body, must not keep the relay from reading on to the end."""
    relay = relay_with()
    body = b"GET /events HTTP/1.1\r\nHost: localhost\r\nContent-Length: 900000\r\n\r\n"
    for wire in (ASK * 2, body + bytes(500_000)):
        raw = await relay.tcp()
        await raw.send(wire)
        assert (await raw.response()).status == 200
        await relay.metric_is("websocket_connected_clients", 1)
        raw.finish()
        await relay.metric_is("websocket_connected_clients", 0)
        await raw.ended()
        raw.vanish()


async def test_a_listener_that_is_gone_before_its_answer_is_no_error(
    relay_with: StartRelay,
) -> None:
    relay = relay_with()
    for _ in range(20):
        raw = await relay.tcp()
        await raw.send(ASK)
        raw.vanish()
    await relay.metric_is("websocket_http_connections", 0, port="relay")
    assert await relay.stop() == 0
    assert [event for event in relay.log_events if event["level"] == "error"] == []
