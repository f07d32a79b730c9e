"""Ends of event streams: slow consumers, a draining relay, peers whose connection is lost."""

import asyncio
import ctypes
import socket
import struct
import time
from contextlib import AsyncExitStack

import pytest

from tests.support.accounting import assert_counters_add_up, assert_counters_add_up_at_rest
from tests.support.events_client import EventStreamResponse, subscribe_events
from tests.support.programs import skip_test
from tests.support.raw_client import RawClient
from tests.support.relay_process import RelayProcess, StartRelay, await_close, receive, receive_many

REQUEST = b"GET /channels/a/events HTTP/1.1\r\nHost: localhost\r\n\r\n"
KIB = 1_024


async def stalled_event_stream(relay: RelayProcess) -> RawClient:
    """Return a subscriber that reads nothing, once it is connected."""
    before = await relay.metric("websocket_connected_clients")
    raw = await relay.connect_tcp(receive_buffer_bytes=4096)
    await raw.send(REQUEST)
    await relay.await_metric("websocket_connected_clients", before + 1)
    return raw


async def test_a_stalled_event_stream_is_closed_and_delays_no_other_client(
    relay_with: StartRelay,
) -> None:
    relay = relay_with(limits={"send_backlog_bytes": 64 * KIB, "handshake_timeout_s": 1})
    async with (
        relay.client("a", max_queue=None) as publisher,
        subscribe_events(relay, "a") as events,
        await stalled_event_stream(relay),
    ):
        for number in range(100):
            text = f"{number} ".ljust(16_000, "x")
            await publisher.send(text)
            assert await receive(publisher) == text
            assert (await events.next_event()).data == text
        await relay.await_metric("websocket_closes_total", 1, reason="slow_consumer")
        await relay.await_metric("websocket_connected_clients", 2)
        assert await relay.metric("websocket_drops_total", reason="slow_consumer") > 0
    await assert_counters_add_up_at_rest(relay)


async def test_an_event_stream_whose_backlog_is_full_to_the_last_byte_is_closed(
    relay_with: StartRelay,
) -> None:
    """The close event itself does not fit into the backlog."""
    relay = relay_with(limits={"send_backlog_bytes": 64 * KIB, "handshake_timeout_s": 1})
    async with relay.client("a") as publisher, await stalled_event_stream(relay):

        async def publish(count: int, text: str) -> None:
            for _ in range(count):
                await publisher.send(text)
            assert await receive_many(publisher, count) == [text] * count

        # The buffers of the kernel fill first. What is published between two readings of the
        # metric is less than the limit of the backlog.
        while not await relay.metric("websocket_slow_clients"):
            await publish(10, "x" * 4_000)
        while not await relay.metric("websocket_drops_total", reason="slow_consumer"):
            await publish(50, "")  # the smallest event
        await relay.await_metric("websocket_closes_total", 1, reason="slow_consumer")
    await assert_counters_add_up_at_rest(relay)
    assert relay.unexpected_lines == []


async def test_an_event_stream_with_a_backlog_receives_all_of_it_before_the_relay_stops(
    relay_with: StartRelay,
) -> None:
    relay = relay_with(shutdown={"spread_s": 0.1})
    async with (
        relay.client("a", max_queue=None) as publisher,
        await stalled_event_stream(relay) as raw,
    ):
        for _ in range(50):
            await publisher.send("x" * 10_000)
        await receive_many(publisher, 50)
        relay.signal()
        assert (await await_close(publisher))[0] == 1001
        received = bytearray()
        while chunk := await raw.read_chunk():
            received += chunk
        assert received.count(b"data: xxx") == 50
        assert received.endswith(b'"}\n\n')
        assert b"event: close\ndata: " in received[-200:]
        raw.end_stream()
        assert await relay.exit_code() == 0


async def test_each_event_stream_starts_with_its_own_retry_time(
    relay: RelayProcess, channel: str
) -> None:
    async with AsyncExitStack() as stack:
        retries_ms = [
            (await stack.enter_async_context(subscribe_events(relay, channel))).retry
            for _ in range(10)
        ]
    assert len(set(retries_ms)) > 1
    assert all(retry_ms and 500 <= retry_ms <= 2500 for retry_ms in retries_ms)


async def closed_by_drain(events: EventStreamResponse) -> tuple[float, int]:
    """Read the close event and the end; return the time of the end, and the retry time in ms."""
    close = await events.next_event()
    assert close.name == "close"
    assert close.json["code"] == 1001
    assert events.retry is not None
    assert close.json["reason"] == f"draining; retry_ms={events.retry}"
    with pytest.raises(EOFError):
        await events.next_event()
    events.writer.close()
    return time.monotonic(), events.retry


async def test_a_drain_closes_event_streams_and_websocket_clients_spread_over_time(
    relay_with: StartRelay,
) -> None:
    relay = relay_with(shutdown={"spread_s": 1})
    async with AsyncExitStack() as stack:
        streams = [await stack.enter_async_context(subscribe_events(relay, "a")) for _ in range(20)]
        clients = [await stack.enter_async_context(relay.client("a")) for _ in range(5)]
        await clients[0].send("last message")
        for events in streams:
            assert await events.next_messages(1) == ["last message"]
        relay.signal()
        ends = sorted(await asyncio.gather(*map(closed_by_drain, streams)))
        assert ends[-1][0] - ends[0][0] > 0.5, "all at once"
        assert ends[14][0] - ends[4][0] > 0.15, "in two bursts"
        assert len({retry_ms for _, retry_ms in ends}) > 10
        assert {(await await_close(client))[0] for client in clients} == {1001}
        assert await relay.exit_code() == 0


async def test_event_streams_that_a_drain_closes_are_counted_as_draining(
    relay_with: StartRelay,
) -> None:
    relay = relay_with(shutdown={"spread_s": 0.2})
    async with AsyncExitStack() as stack:
        streams = [await stack.enter_async_context(subscribe_events(relay, "a")) for _ in range(5)]
        last = await stack.enter_async_context(relay.raw_client("a"))
        relay.signal()
        for events in streams:
            await closed_by_drain(events)
        # The client does not answer its close frame. Until then the relay serves its metrics.
        await relay.await_metric("websocket_closes_total", 5, reason="draining")
        await relay.await_metric("websocket_connected_clients", 1)
        await last.complete_close()


async def test_an_event_stream_over_tls_receives_all_messages_and_a_close_event(
    tls_relay_with: StartRelay,
) -> None:
    relay = tls_relay_with(shutdown={"spread_s": 0.1})
    async with (
        relay.client("a", max_queue=None) as publisher,
        subscribe_events(relay, "a", context=relay.tls_context) as events,
    ):
        for number in range(20):
            text = f"{number} ".ljust(50_000, "x")
            await publisher.send(text)
            assert (await events.next_event()).data == text
            assert await receive(publisher) == text
        await relay.await_metric("websocket_deliveries_total", 40)
        assert_counters_add_up(await relay.metrics())
        relay.signal()
        assert (await events.next_event()).name == "close"
        with pytest.raises(EOFError):
            await events.next_event()
        assert await relay.exit_code() == 0


async def test_the_counters_balance_after_event_streams_joined_left_and_stalled_under_load(
    relay_with: StartRelay,
) -> None:
    relay = relay_with(limits={"send_backlog_bytes": 32 * KIB, "handshake_timeout_s": 1})
    is_over = asyncio.Event()

    async def publish() -> None:
        async with relay.client("a", max_queue=None) as publisher:
            while not is_over.is_set():
                for _ in range(10):
                    await publisher.send("x" * 500)
                await receive_many(publisher, 10)

    async def join_and_leave(messages: int) -> None:
        for _ in range(10):
            async with subscribe_events(relay, "a", "?history=5") as events:
                await events.next_messages(messages)

    async with asyncio.TaskGroup() as group, AsyncExitStack() as stack:
        publishing = group.create_task(publish())
        await stack.enter_async_context(await stalled_event_stream(relay))
        await asyncio.gather(*map(join_and_leave, (1, 10, 50)))
        await relay.await_metric("websocket_closes_total", 1, reason="slow_consumer")
        is_over.set()
        await publishing
    await assert_counters_add_up_at_rest(relay)


def drop_all_packets(raw: RawClient) -> None:
    """Drop all packets to a socket in the kernel from now on, as if its machine lost its network.

    A socket filter accepts no byte (BPF_RET, 0). Linux allows every user to attach one; the sandbox
    of a container may not.
    """
    accept_nothing = ctypes.create_string_buffer(struct.pack("HBBI", 0x06, 0, 0, 0))
    program = struct.pack("HP", 1, ctypes.addressof(accept_nothing))
    so_attach_filter = 26
    try:
        raw.socket.setsockopt(socket.SOL_SOCKET, so_attach_filter, program)
    except PermissionError:
        skip_test("this user may not attach a filter to a socket")


async def test_an_event_stream_whose_peer_lost_its_network_is_detected(
    relay_with: StartRelay,
) -> None:
    relay = relay_with(keepalive={"ping_interval_s": 0.3, "ping_timeout_s": 0.7})
    async with await relay.connect_tcp() as raw, subscribe_events(relay, "a") as other:
        await raw.send(REQUEST)
        await relay.await_metric("websocket_connected_clients", 2)
        started = time.monotonic()
        drop_all_packets(raw)
        await relay.await_metric("websocket_connected_clients", 1)
        assert time.monotonic() - started < 8
        assert await relay.metric("websocket_closes_total", reason="connection_lost") == 1
        async with relay.client("a") as publisher:
            await publisher.send("still connected")
            assert await other.next_messages(1) == ["still connected"]


async def test_the_end_of_an_event_stream_is_detected_after_trailing_bytes(
    relay_with: StartRelay,
) -> None:
    """A pipelined request, or a body, must not keep the relay from reading until the end."""
    relay = relay_with()
    body = b"GET /events HTTP/1.1\r\nHost: localhost\r\nContent-Length: 900000\r\n\r\n"
    for wire in (REQUEST * 2, body + bytes(500_000)):
        raw = await relay.connect_tcp()
        await raw.send(wire)
        assert (await raw.read_response()).status == 200
        await relay.await_metric("websocket_connected_clients", 1)
        raw.end_stream()
        await relay.await_metric("websocket_connected_clients", 0)
        await raw.read_to_end()
        raw.reset()


async def test_a_peer_that_resets_before_its_response_causes_no_error(
    relay_with: StartRelay,
) -> None:
    relay = relay_with()
    for _ in range(20):
        raw = await relay.connect_tcp()
        await raw.send(REQUEST)
        raw.reset()
    await relay.await_metric("websocket_http_connections", 0, port="relay")
    assert await relay.stop() == 0
    assert [event for event in relay.log_events if event["level"] == "error"] == []
