"""Slow consumers and fast publishers: the relay closes the former and slows the latter."""

import asyncio
import hashlib
import struct
from contextlib import AsyncExitStack
from itertools import count

import pytest
from websockets.asyncio.client import ClientConnection

from tests.support.accounting import assert_counters_add_up_at_rest
from tests.support.raw_client import (
    BINARY,
    CLOSE,
    CONTINUATION,
    PING,
    RawClient,
    frame,
    relayed_frame,
)
from tests.support.relay_process import RelayProcess, StartRelay, receive

KIB = 1_024
MIB = 1_048_576
MESSAGE_BYTES = 65_536
SMALL_BUFFER = 4_096
LOW_LIMITS = {
    "send_backlog_bytes": 512 * KIB,
    "max_message_bytes": 128 * KIB,
    "handshake_timeout_s": 1,
}
NO_PINGS = {"ping_interval_s": 3_600}  # streams contain nothing but messages


def numbered(number: int, size: int = MESSAGE_BYTES) -> bytes:
    return struct.pack("!Q", number) + bytes(size - 8)


async def publish_and_receive(publisher: RawClient, payload: bytes) -> None:
    """Publish a message, and wait until the relay delivers it to its publisher."""
    await publisher.send(frame(BINARY, payload))
    assert await publisher.read_message() == payload


async def publish_until_drop(
    relay: RelayProcess, publisher: RawClient, subscriber: ClientConnection
) -> int:
    """Publish until the relay has dropped a message for a slow consumer.

    Every message is delivered to the publisher and to the subscriber before the next is published.

    Returns:
        How many messages were published.
    """
    for number in count():
        await publish_and_receive(publisher, numbered(number))
        assert await receive(subscriber) == numbered(number)
        if number % 4 == 3 and await relay.metric("websocket_drops_total", reason="slow_consumer"):
            return number + 1
    raise AssertionError("unreachable")


async def read_to_close_frame(raw: RawClient) -> int:
    """Read whole messages in their order up to the close frame; return how many there were."""
    number = 0
    while await raw.peek_opcode() != CLOSE:
        received = await raw.read_message()
        assert received == numbered(number, len(received))
        number += 1
    return number


# Clients that stall


async def test_a_stalled_client_is_closed_and_delays_no_other_client(
    relay_with: StartRelay,
) -> None:
    """The channel waits two seconds for the client; other channels do not."""
    relay = relay_with(limits=LOW_LIMITS | {"handshake_timeout_s": 30})
    async with (
        relay.raw_client("news", receive_buffer_bytes=SMALL_BUFFER) as stalled,
        relay.client("news") as subscriber,
        relay.raw_client("news") as publisher,
        relay.client("other") as other,
    ):
        publishing = asyncio.create_task(publish_until_drop(relay, publisher, subscriber))
        echoes = 0
        while not publishing.done():
            await other.send("hello")
            assert await receive(other) == "hello"
            echoes += 1
        published = await publishing
        assert echoes > published

        assert await read_to_close_frame(stalled) < published
        assert await stalled.complete_close() == (1013, "slow consumer")
        await relay.await_metric("websocket_connected_clients", 3)
        assert await relay.metric("websocket_closes_total", code="1013") == 1
    await assert_counters_add_up_at_rest(relay)


async def test_stalled_clients_that_never_read_again_are_aborted_at_the_deadline(
    relay_with: StartRelay,
) -> None:
    relay = relay_with(limits=LOW_LIMITS)
    stalled = 8
    async with AsyncExitStack() as stack:
        for _ in range(stalled):
            await stack.enter_async_context(
                relay.raw_client("news", receive_buffer_bytes=SMALL_BUFFER)
            )
        subscriber = await stack.enter_async_context(relay.client("news"))
        publisher = await stack.enter_async_context(relay.raw_client("news"))
        await publish_until_drop(relay, publisher, subscriber)
        await relay.await_metric("websocket_connected_clients", 2)
        await relay.await_metric("websocket_backlog_bytes", 0)
        assert await relay.metric("websocket_closes_total", code="1013") == stalled
    await assert_counters_add_up_at_rest(relay)


async def test_a_stalled_tls_client_is_closed_and_delays_no_other_client(
    tls_relay_with: StartRelay,
) -> None:
    relay = tls_relay_with(limits=LOW_LIMITS)
    async with relay.client("news") as publisher, relay.client("news") as subscriber:
        # Its library stops reading from the socket once one message waits to be received.
        stalled = await relay.client("news", max_queue=1)
        number = 0
        while not await relay.metric("websocket_drops_total", reason="slow_consumer"):
            for _ in range(8):
                await publisher.send(numbered(number))
                assert await receive(publisher) == numbered(number)
                assert await receive(subscriber) == numbered(number)
                number += 1
        await relay.await_metric("websocket_connected_clients", 2)
        stalled.transport.abort()
    await assert_counters_add_up_at_rest(relay)


async def test_a_client_that_stalls_and_then_reads_slowly_within_its_backlog_is_not_closed(
    relay_with: StartRelay,
) -> None:
    relay = relay_with(limits={"send_backlog_bytes": 32 * MIB})
    messages = 160
    async with (
        relay.raw_client("news", receive_buffer_bytes=SMALL_BUFFER) as slow,
        relay.raw_client("news") as publisher,
    ):
        for number in range(messages):
            await publish_and_receive(publisher, numbered(number))
        assert await relay.metric("websocket_backlog_bytes") > 0
        assert await relay.metric("websocket_slow_clients") == 1

        async def read_slowly() -> None:
            for number in range(messages + 40):
                assert await slow.read_message() == numbered(number)
                await asyncio.sleep(0.001)

        async with asyncio.TaskGroup() as group:
            group.create_task(read_slowly())
            for number in range(messages, messages + 40):
                await publish_and_receive(publisher, numbered(number))
        await relay.await_metric("websocket_backlog_bytes", 0)
        await relay.await_metric("websocket_slow_clients", 0)
        assert await relay.metric("websocket_drops_total") == 0
        assert await relay.metric("websocket_disconnections_total") == 0
    await assert_counters_add_up_at_rest(relay)


async def test_a_slow_client_that_ends_its_stream_still_receives_its_backlog(
    relay_with: StartRelay,
) -> None:
    relay = relay_with(limits={"send_backlog_bytes": 32 * MIB}, keepalive=NO_PINGS)
    messages = 40
    async with (
        relay.raw_client("news", receive_buffer_bytes=SMALL_BUFFER) as ending,
        relay.raw_client("news") as publisher,
    ):
        for number in range(messages):
            await publish_and_receive(publisher, numbered(number))
        assert await relay.metric("websocket_slow_clients") == 1
        ending.end_stream()
        for number in range(messages):
            assert await ending.read_message() == numbered(number)
        assert await ending.read_to_end() == b""
        await relay.await_metric("websocket_closes_total", 1, reason="connection_lost")
        assert await relay.metric("websocket_drops_total") == 0
    await assert_counters_add_up_at_rest(relay)


async def test_the_client_with_the_largest_backlog_is_closed_when_all_together_are_too_large(
    relay_with: StartRelay,
) -> None:
    relay = relay_with(limits={"send_backlog_bytes": 8 * MIB, "total_backlog_bytes": 12 * MIB})
    async with AsyncExitStack() as stack:
        stalled = {
            name: await stack.enter_async_context(
                relay.raw_client(name, receive_buffer_bytes=SMALL_BUFFER)
            )
            for name in ("largest", "second", "third")
        }
        publishers = {
            name: await stack.enter_async_context(relay.raw_client(name)) for name in stalled
        }
        sent = dict.fromkeys(stalled, 0)

        async def publish(name: str) -> None:
            for _ in range(6):  # faster than reading the metrics after each message
                await publish_and_receive(publishers[name], numbered(sent[name]))
                sent[name] += 1

        # Backlogs of 6, 3 and more than 3 MiB exceed the total of 12 MiB.
        for name, total in (("largest", 6 * MIB), ("second", 9 * MIB)):
            while await relay.metric("websocket_backlog_bytes") < total:
                await publish(name)
        assert await relay.metric("websocket_drops_total") == 0
        while await relay.metric("websocket_drops_total", reason="slow_consumer") == 0:
            await publish("third")

        # It is aborted without a close frame, which would come after the backlog to be released.
        await relay.await_metric("websocket_connected_clients", 5)
        await stalled["largest"].read_to_end()
        assert await relay.metric("websocket_closes_total", code="1013") == 1
        for name in ("second", "third"):
            for number in range(sent[name]):
                assert await stalled[name].read_message() == numbered(number)
    await assert_counters_add_up_at_rest(relay)


# Publishers that flood


async def read_stream(
    raw: RawClient, total_bytes: int, progress: list[int], index: int, pause_s: float
) -> str:
    """Read exactly `total_bytes`, with a pause after each read; return their digest."""
    digest = hashlib.blake2b()
    read_bytes = 0
    while read_bytes < total_bytes:
        chunk = await raw.read_chunk()
        assert chunk, f"closed after {read_bytes} of {total_bytes} bytes"
        digest.update(chunk)
        read_bytes += len(chunk)
        progress[index] = read_bytes
        await asyncio.sleep(pause_s)
    assert read_bytes == total_bytes
    return digest.hexdigest()


async def flood(relay: RelayProcess, payloads: list[bytes], repeats: int) -> int:
    """Publish as fast as the socket accepts, to a subscriber that reads slower.

    The subscriber is half of its channel, so the channel waits for it. One of several subscribers
    that lags, as it may on a busy machine, would be waited for two seconds and then closed.

    Returns:
        The maximum of the bytes that were sent and that the subscriber had not read.
    """
    wire = b"".join(frame(BINARY, payload) for payload in payloads)
    relayed = b"".join(relayed_frame(BINARY, payload) for payload in payloads)
    expected = hashlib.blake2b()
    for _ in range(repeats):
        expected.update(relayed)
    total_bytes = len(relayed) * repeats
    rss_at_start = relay.rss_bytes()
    max_rss = 0
    max_unread = 0
    progress = [0, 0]

    async def publish(publisher: RawClient) -> None:
        nonlocal max_unread, max_rss
        for turn in range(1, repeats + 1):
            await publisher.send(wire, patience_s=50)
            max_unread = max(max_unread, len(relayed) * turn - min(progress))
            max_rss = max(max_rss, relay.rss_bytes())

    async with (
        relay.raw_client("news") as publisher,
        relay.raw_client("news", receive_buffer_bytes=MESSAGE_BYTES) as subscriber,
    ):
        async with asyncio.TaskGroup() as group:
            group.create_task(publish(publisher))
            digests = [
                group.create_task(read_stream(raw, total_bytes, progress, index, pause_s))
                for index, (raw, pause_s) in enumerate(((publisher, 0.0), (subscriber, 0.001)))
            ]
        max_rss = max(max_rss, relay.rss_bytes())
        assert {digest.result() for digest in digests} == {expected.hexdigest()}
        metrics = await relay.metrics()
        assert metrics.value("websocket_disconnections_total") == 0
        assert metrics.value("websocket_drops_total") == 0
        assert metrics.value("websocket_messages_total") == len(payloads) * repeats
        assert metrics.value("websocket_expected_deliveries_total") == 2 * len(payloads) * repeats
    assert max_rss < rss_at_start + 30 * MIB
    await assert_counters_add_up_at_rest(relay)
    return max_unread


async def test_a_flood_of_large_messages_is_slowed_and_nothing_is_lost(
    relay_with: StartRelay,
) -> None:
    relay = relay_with(keepalive=NO_PINGS)
    payloads = [numbered(number) for number in range(16)]
    max_unread = await flood(relay, payloads, repeats=80)
    assert max_unread < 40 * MIB, "half of the flood was buffered"
    assert await relay.metric("websocket_publisher_pauses_total") > 0


async def test_a_flood_of_small_messages_loses_nothing(
    relay_with: StartRelay,
) -> None:
    relay = relay_with(keepalive=NO_PINGS)
    payloads = [numbered(number, 64) for number in range(5_000)]
    await flood(relay, payloads, repeats=15)


async def test_two_floods_in_two_channels_do_not_delay_a_third_channel(
    relay_with: StartRelay,
) -> None:
    relay = relay_with(keepalive=NO_PINGS)
    repeats = 12
    wire = frame(BINARY, numbered(1)) * 32
    total_bytes = len(relayed_frame(BINARY, numbered(1))) * 32 * repeats
    progress = [0, 0]

    async def publish(publisher: RawClient) -> None:
        for _ in range(repeats):
            await publisher.send(wire, patience_s=50)

    async with (
        relay.raw_client("one") as one,
        relay.raw_client("two") as two,
        relay.client("calm") as calm,
    ):
        async with asyncio.TaskGroup() as group:
            for index, raw in enumerate((one, two)):
                group.create_task(publish(raw))
                group.create_task(read_stream(raw, total_bytes, progress, index, 0.0))
            for _ in range(10):
                await calm.send("hello")
                assert await receive(calm) == "hello"
        assert await relay.metric("websocket_disconnections_total") == 0


async def test_a_flood_is_delivered_to_every_client_but_the_stalled_one(
    relay_with: StartRelay,
) -> None:
    relay = relay_with(keepalive=NO_PINGS, limits={"handshake_timeout_s": 1})
    repeats = 8
    wire = frame(BINARY, numbered(1)) * 32
    total_bytes = len(relayed_frame(BINARY, numbered(1))) * 32 * repeats
    progress = [0, 0]

    async def publish(publisher: RawClient) -> None:
        for _ in range(repeats):
            await publisher.send(wire, patience_s=50)

    async with (
        relay.raw_client("news") as publisher,
        relay.raw_client("news") as subscriber,
        relay.raw_client("news", receive_buffer_bytes=SMALL_BUFFER),
    ):
        async with asyncio.TaskGroup() as group:
            group.create_task(publish(publisher))
            for index, raw in enumerate((publisher, subscriber)):
                group.create_task(read_stream(raw, total_bytes, progress, index, 0.0))
        await relay.await_metric("websocket_connected_clients", 2)
        assert await relay.metric("websocket_closes_total", code="1013") == 1
        assert await relay.metric("websocket_drops_total", reason="slow_consumer") > 0
    await assert_counters_add_up_at_rest(relay)


async def test_a_flood_over_tls_is_slowed_and_nothing_is_lost(tls_relay_with: StartRelay) -> None:
    # The backlog is sufficient for a busy machine that suspends the readers for a moment.
    relay = tls_relay_with(keepalive=NO_PINGS, limits={"send_backlog_bytes": 4 * MIB})
    messages = 640
    rss_at_start = relay.rss_bytes()
    max_rss = 0

    async def publish(publisher: ClientConnection) -> None:
        for number in range(messages):
            await publisher.send(numbered(number))

    async def read(client: ClientConnection, pause_s: float) -> None:
        nonlocal max_rss
        for number in range(messages):
            assert await receive(client) == numbered(number)
            max_rss = max(max_rss, relay.rss_bytes())
            await asyncio.sleep(pause_s)

    async with (
        relay.client("news") as publisher,
        relay.client("news", max_queue=4) as subscriber,  # half of the channel: see `flood`
    ):
        async with asyncio.TaskGroup() as group:
            group.create_task(publish(publisher))
            group.create_task(read(publisher, 0.0))
            group.create_task(read(subscriber, 0.001))
        assert await relay.metric("websocket_drops_total") == 0
        assert await relay.metric("websocket_disconnections_total") == 0
    assert max_rss < rss_at_start + 30 * MIB
    await assert_counters_add_up_at_rest(relay)


async def send_until_reset(raw: RawClient, wire: bytes) -> None:
    """Send until the relay ends the connection.

    Raises:
        ConnectionError: it has ended.
    """
    while True:
        await raw.send(wire)


async def test_a_publisher_that_does_not_read_is_closed_as_a_slow_consumer(
    relay_with: StartRelay,
) -> None:
    relay = relay_with(limits=LOW_LIMITS)
    wire = frame(BINARY, numbered(0)) * 8
    async with relay.client("news", max_queue=None) as subscriber:
        async with relay.raw_client("news", receive_buffer_bytes=SMALL_BUFFER) as publisher:
            with pytest.raises(ConnectionError):
                await send_until_reset(publisher, wire)
        await relay.await_metric("websocket_connected_clients", 1)
        assert await relay.metric("websocket_closes_total", code="1013") == 1
        await subscriber.send("still connected")
        while await receive(subscriber) != "still connected":
            pass


async def test_a_client_that_pings_and_never_reads_is_closed_and_its_pongs_take_little_memory(
    relay_with: StartRelay,
) -> None:
    relay = relay_with(limits=LOW_LIMITS)
    wire = frame(PING, bytes(125)) * 2_000
    rss_at_start = relay.rss_bytes()
    max_rss = 0

    async def ping_until_reset(raw: RawClient) -> None:
        nonlocal max_rss
        while True:
            await raw.send(wire)
            max_rss = max(max_rss, relay.rss_bytes())

    async with relay.raw_client("news", receive_buffer_bytes=SMALL_BUFFER) as raw:
        with pytest.raises(ConnectionError):
            await ping_until_reset(raw)
    await relay.await_metric("websocket_closes_total", 1, code="1013")
    assert max_rss < rss_at_start + 30 * MIB
    await assert_counters_add_up_at_rest(relay)


async def test_a_message_of_very_many_fragments_takes_little_memory(
    relay_with: StartRelay,
) -> None:
    relay = relay_with(keepalive=NO_PINGS)
    rss_at_start = relay.rss_bytes()
    fragments = 200_000
    async with relay.raw_client("news") as raw:
        await raw.send(frame(BINARY, b"a", fin=False))
        await raw.send(frame(CONTINUATION, b"b", fin=False) * fragments)
        await raw.send(frame(CONTINUATION))
        assert await raw.read_message() == b"a" + b"b" * fragments
        assert relay.rss_bytes() < rss_at_start + 30 * MIB


async def test_nothing_is_left_of_a_publisher_that_is_reset_during_its_flood(
    relay_with: StartRelay,
) -> None:
    relay = relay_with(keepalive=NO_PINGS)
    wire = frame(BINARY, numbered(0)) * 16
    async with relay.client("news", max_queue=None) as subscriber:
        for _ in range(5):
            async with relay.raw_client("news") as publisher:
                await publisher.send(wire)
                publisher.reset()
        await relay.await_metric("websocket_connected_clients", 1)
        await subscriber.send("still connected")
        while await receive(subscriber) != "still connected":
            pass
        await relay.await_metric("websocket_paused_publishers", 0)
    await assert_counters_add_up_at_rest(relay)
