"""Slow clients and fast publishers: who waits, who is dropped, who is spared."""

import asyncio
import hashlib
import struct
from contextlib import AsyncExitStack

import pytest
from websockets.asyncio.client import ClientConnection

from tests.support.books import assert_balanced_at_rest
from tests.support.raw_client import (
    BINARY,
    CLOSE,
    CONTINUATION,
    PING,
    RawClient,
    frame,
    relayed_frame,
)
from tests.support.relay_process import Relay, StartRelay, receive, receive_many

KIB = 1_024
MIB = 1_048_576
MESSAGE_BYTES = 65_536
SMALL_BUFFER = 4_096
TIGHT = {
    "send_backlog_bytes": 512 * KIB,
    "max_message_bytes": 128 * KIB,
    "handshake_timeout_s": 2,
}
NEVER = {"ping_interval_s": 3_600}  # so that streams are nothing but messages


def numbered(number: int, size: int = MESSAGE_BYTES) -> bytes:
    return struct.pack("!Q", number) + bytes(size - 8)


async def publish_and_hear(publisher: RawClient, payload: bytes) -> None:
    """Publish, and wait until it has been relayed."""
    await publisher.send(frame(BINARY, payload))
    assert await publisher.message() == payload


async def read_on(raw: RawClient) -> int:
    """Read on after a stall, up to the close frame: whole messages, none left out.

    Returns:
        How many there were.
    """
    count = 0
    while await raw.peek() != CLOSE:
        received = await raw.message()
        assert received == numbered(count, len(received))
        count += 1
    return count


# Clients that stall


async def test_a_stalled_client_is_closed_and_delays_nobody(relay_with: StartRelay) -> None:
    patient = {"handshake_timeout_s": 30}  # time to read on to the close frame
    relay = relay_with(limits=TIGHT | patient)
    count = 256
    async with (
        relay.raw_client("news", receive_buffer_bytes=SMALL_BUFFER) as stalled,
        relay.client("news") as reader,
        relay.raw_client("news") as publisher,
    ):
        heard = asyncio.create_task(receive_many(reader, count))
        for number in range(count):
            await publish_and_hear(publisher, numbered(number))
        assert await heard == [numbered(number) for number in range(count)]
        await relay.metric_reaches("websocket_drops_total", 1, reason="slow_consumer")

        assert await read_on(stalled) < count
        assert await stalled.answer_close() == (1013, "slow consumer")
        await relay.metric_is("websocket_connected_clients", 2)
        assert await relay.metric("websocket_closes_total", code="1013") == 1
    await assert_balanced_at_rest(relay)


async def test_a_stalled_client_that_never_reads_again_is_cut_off(relay_with: StartRelay) -> None:
    relay = relay_with(limits=TIGHT)
    async with (
        relay.raw_client("news", receive_buffer_bytes=SMALL_BUFFER),
        relay.raw_client("news") as publisher,
    ):
        for number in range(256):
            await publish_and_hear(publisher, numbered(number))
        await relay.metric_reaches("websocket_drops_total", 1, reason="slow_consumer")
        await relay.metric_is("websocket_connected_clients", 1)
        await relay.metric_is("websocket_backlog_bytes", 0)
        assert await relay.metric("websocket_closes_total", code="1013") == 1
    await assert_balanced_at_rest(relay)


async def test_many_stalled_clients_delay_nobody(relay_with: StartRelay) -> None:
    relay = relay_with(limits=TIGHT)
    count = 200
    async with AsyncExitStack() as stack:
        for _ in range(20):
            await stack.enter_async_context(
                relay.raw_client("news", receive_buffer_bytes=SMALL_BUFFER)
            )
        reader = await stack.enter_async_context(relay.client("news"))
        publisher = await stack.enter_async_context(relay.raw_client("news"))
        heard = asyncio.create_task(receive_many(reader, count))
        for number in range(count):
            await publish_and_hear(publisher, numbered(number))
        assert await heard == [numbered(number) for number in range(count)]
        await relay.metric_is("websocket_closes_total", 20, code="1013")
    await assert_balanced_at_rest(relay)


async def test_a_stalled_client_over_tls_is_closed_and_delays_nobody(
    tls_relay_with: StartRelay,
) -> None:
    relay = tls_relay_with(limits=TIGHT)
    count = 400
    async with AsyncExitStack() as stack:
        publisher = await stack.enter_async_context(relay.client("news"))
        reader = await stack.enter_async_context(relay.client("news"))
        # Its library stops reading from the socket once one message waits to be received.
        stalled = await relay.client("news", max_queue=1)
        heard = asyncio.create_task(receive_many(reader, count))
        for number in range(count):
            await publisher.send(numbered(number))
            assert await receive(publisher) == numbered(number)
        assert await heard == [numbered(number) for number in range(count)]
        await relay.metric_reaches("websocket_drops_total", 1, reason="slow_consumer")
        await relay.metric_is("websocket_connected_clients", 2)
        stalled.transport.abort()
    await assert_balanced_at_rest(relay)


async def test_a_client_that_reads_slowly_within_its_backlog_gets_everything_in_order(
    relay_with: StartRelay,
) -> None:
    relay = relay_with(limits={"send_backlog_bytes": 32 * MIB})
    count = 256
    async with (
        relay.raw_client("news", receive_buffer_bytes=SMALL_BUFFER) as slow,
        relay.raw_client("news") as publisher,
    ):

        async def read_slowly() -> None:
            for number in range(count):
                assert await slow.message() == numbered(number)
                await asyncio.sleep(0.004)

        async with asyncio.TaskGroup() as group:
            group.create_task(read_slowly())
            for number in range(count):
                await publish_and_hear(publisher, numbered(number))
        await publish_and_hear(publisher, b"the end.")
        assert await slow.message() == b"the end."
        assert await relay.metric("websocket_drops_total") == 0
        assert await relay.metric("websocket_disconnections_total") == 0
    await assert_balanced_at_rest(relay)


async def test_a_client_that_stalls_for_a_while_within_its_backlog_is_not_closed(
    relay_with: StartRelay,
) -> None:
    relay = relay_with(limits={"send_backlog_bytes": 32 * MIB})
    count = 160
    async with (
        relay.raw_client("news", receive_buffer_bytes=SMALL_BUFFER) as pausing,
        relay.raw_client("news") as publisher,
    ):
        for number in range(count):
            await publish_and_hear(publisher, numbered(number))
        assert await relay.metric("websocket_backlog_bytes") > 0
        assert await relay.metric("websocket_slow_clients") == 1
        for number in range(count):
            assert await pausing.message() == numbered(number)
        await relay.metric_is("websocket_backlog_bytes", 0)
        await relay.metric_is("websocket_slow_clients", 0)
        assert await relay.metric("websocket_disconnections_total") == 0


async def test_a_client_that_says_nothing_more_still_gets_what_waits_for_it(
    relay_with: StartRelay,
) -> None:
    relay = relay_with(limits={"send_backlog_bytes": 32 * MIB}, keepalive=NEVER)
    count = 40
    async with (
        relay.raw_client("news", receive_buffer_bytes=SMALL_BUFFER) as leaving,
        relay.raw_client("news") as publisher,
    ):
        for number in range(count):
            await publish_and_hear(publisher, numbered(number))
        assert await relay.metric("websocket_slow_clients") == 1
        leaving.finish()
        for number in range(count):
            assert await leaving.message() == numbered(number)
        assert await leaving.ended() == b""
        await relay.metric_is("websocket_closes_total", 1, reason="connection_lost")
        assert await relay.metric("websocket_drops_total") == 0
    await assert_balanced_at_rest(relay)


async def test_the_worst_goes_first_where_all_backlogs_together_are_too_many(
    relay_with: StartRelay,
) -> None:
    relay = relay_with(limits={"send_backlog_bytes": 8 * MIB, "total_backlog_bytes": 12 * MIB})
    async with AsyncExitStack() as stack:
        stalled = {
            name: await stack.enter_async_context(
                relay.raw_client(name, receive_buffer_bytes=SMALL_BUFFER)
            )
            for name in ("worst", "second", "third")
        }
        publishers = {
            name: await stack.enter_async_context(relay.raw_client(name)) for name in stalled
        }
        sent = dict.fromkeys(stalled, 0)

        async def publish(name: str) -> None:
            for _ in range(6):  # to look at the metrics takes longer
                await publish_and_hear(publishers[name], numbered(sent[name]))
                sent[name] += 1

        # Shares of 6, 3 and 3 and a bit make more than the 12 that all may have.
        for name, total in (("worst", 6 * MIB), ("second", 9 * MIB)):
            while await relay.metric("websocket_backlog_bytes") < total:
                await publish(name)
        assert await relay.metric("websocket_drops_total") == 0
        while await relay.metric("websocket_drops_total", reason="slow_consumer") == 0:
            await publish("third")

        # No close frame is insisted on: what waits before it is what has to go.
        await relay.metric_is("websocket_connected_clients", 5)
        await stalled["worst"].ended()
        assert await relay.metric("websocket_closes_total", code="1013") == 1
        for name in ("second", "third"):
            for number in range(sent[name]):
                assert await stalled[name].message() == numbered(number)
    await assert_balanced_at_rest(relay)


async def test_a_client_that_stalls_in_one_channel_does_not_touch_another(
    relay_with: StartRelay,
) -> None:
    relay = relay_with(limits=TIGHT)
    async with (
        relay.raw_client("busy", receive_buffer_bytes=SMALL_BUFFER),
        relay.raw_client("busy") as publisher,
        relay.client("calm") as calm,
    ):
        for number in range(200):
            await publish_and_hear(publisher, numbered(number))
            if not number % 20:
                await calm.send("hello")
                assert await receive(calm) == "hello"
        await relay.metric_is("websocket_closes_total", 1, code="1013")


# Publishers that flood


async def read_stream(
    raw: RawClient, total_bytes: int, progress: list[int], index: int, pause_s: float
) -> str:
    """Read exactly so many bytes, with pauses; return their digest."""
    digest = hashlib.blake2b()
    seen_bytes = 0
    while seen_bytes < total_bytes:
        chunk = await raw.chunk()
        assert chunk, f"closed after {seen_bytes} of {total_bytes} bytes"
        digest.update(chunk)
        seen_bytes += len(chunk)
        progress[index] = seen_bytes
        await asyncio.sleep(pause_s)
    assert seen_bytes == total_bytes
    return digest.hexdigest()


async def flood(relay: Relay, payloads: list[bytes], repeats: int) -> int:
    """Publish as fast as the socket takes it, to a reader that is slower than that.

    It is half of its channel, so it is waited for. One of several who falls behind the others, as
    on a busy machine one may, is waited for two seconds and then closed.

    Returns:
        By how many bytes the publisher was ahead of the reader, at most.
    """
    wire = b"".join(frame(BINARY, payload) for payload in payloads)
    relayed = b"".join(relayed_frame(BINARY, payload) for payload in payloads)
    expected = hashlib.blake2b()
    for _ in range(repeats):
        expected.update(relayed)
    total_bytes = len(relayed) * repeats
    started_rss = relay.rss_bytes()
    highest_rss = 0
    farthest_ahead = 0
    progress = [0, 0]

    async def publish(publisher: RawClient) -> None:
        nonlocal farthest_ahead, highest_rss
        for turn in range(1, repeats + 1):
            await publisher.send(wire, patience_s=50)
            farthest_ahead = max(farthest_ahead, len(relayed) * turn - min(progress))
            highest_rss = max(highest_rss, relay.rss_bytes())

    async with (
        relay.raw_client("news") as publisher,
        relay.raw_client("news", receive_buffer_bytes=MESSAGE_BYTES) as reader,
    ):
        async with asyncio.TaskGroup() as group:
            group.create_task(publish(publisher))
            digests = [
                group.create_task(read_stream(raw, total_bytes, progress, index, pause_s))
                for index, (raw, pause_s) in enumerate(((publisher, 0.0), (reader, 0.001)))
            ]
        highest_rss = max(highest_rss, relay.rss_bytes())
        assert {digest.result() for digest in digests} == {expected.hexdigest()}
        metrics = await relay.metrics()
        assert metrics.value("websocket_disconnections_total") == 0
        assert metrics.value("websocket_drops_total") == 0
        assert metrics.value("websocket_messages_total") == len(payloads) * repeats
        assert metrics.value("websocket_expected_deliveries_total") == 2 * len(payloads) * repeats
    assert highest_rss < started_rss + 60 * MIB
    await assert_balanced_at_rest(relay)
    return farthest_ahead


@pytest.mark.timeout(120)
async def test_a_flood_of_big_messages_is_slowed_and_nothing_is_lost(
    relay_with: StartRelay,
) -> None:
    relay = relay_with(keepalive=NEVER)
    payloads = [numbered(number) for number in range(32)]
    farthest_ahead = await flood(relay, payloads, repeats=100)
    assert farthest_ahead < 100 * MIB, "half of the flood waited somewhere"


@pytest.mark.timeout(120)
async def test_a_flood_of_small_messages_is_slowed_and_nothing_is_lost(
    relay_with: StartRelay,
) -> None:
    relay = relay_with(keepalive=NEVER)
    payloads = [struct.pack("!Q", number) for number in range(5_000)]
    await flood(relay, payloads, repeats=100)


@pytest.mark.timeout(120)
async def test_two_floods_in_two_channels_share_the_relay(relay_with: StartRelay) -> None:
    relay = relay_with(keepalive=NEVER)
    wire = frame(BINARY, numbered(1)) * 32
    total_bytes = len(relayed_frame(BINARY, numbered(1))) * 32 * 20
    progress = [0, 0, 0]

    async def publish(publisher: RawClient) -> None:
        for _ in range(20):
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
            for _ in range(20):
                await calm.send("hello")
                assert await receive(calm) == "hello"
        assert await relay.metric("websocket_disconnections_total") == 0


async def test_a_flood_past_a_stalled_client_reaches_everybody_else(
    relay_with: StartRelay,
) -> None:
    relay = relay_with(keepalive=NEVER, limits={"handshake_timeout_s": 2})
    repeats = 20
    wire = frame(BINARY, numbered(1)) * 32
    total_bytes = len(relayed_frame(BINARY, numbered(1))) * 32 * repeats
    progress = [0, 0]

    async def publish(publisher: RawClient) -> None:
        for _ in range(repeats):
            await publisher.send(wire, patience_s=50)

    async with (
        relay.raw_client("news") as publisher,
        relay.raw_client("news") as reader,
        relay.raw_client("news", receive_buffer_bytes=SMALL_BUFFER),
    ):
        async with asyncio.TaskGroup() as group:
            group.create_task(publish(publisher))
            for index, raw in enumerate((publisher, reader)):
                group.create_task(read_stream(raw, total_bytes, progress, index, 0.0))
        await relay.metric_is("websocket_connected_clients", 2)
        assert await relay.metric("websocket_closes_total", code="1013") == 1
        assert await relay.metric("websocket_drops_total", reason="slow_consumer") > 0
    await assert_balanced_at_rest(relay)


@pytest.mark.timeout(120)
async def test_a_flood_over_tls_is_slowed_and_nothing_is_lost(tls_relay_with: StartRelay) -> None:
    # Room enough for what is on its way when a busy machine lets the readers stand still.
    relay = tls_relay_with(keepalive=NEVER, limits={"send_backlog_bytes": 4 * MIB})
    count = 1_000
    started_rss = relay.rss_bytes()
    highest_rss = 0

    async def publish(publisher: ClientConnection) -> None:
        for number in range(count):
            await publisher.send(numbered(number))

    async def read(client: ClientConnection, pause_s: float) -> None:
        nonlocal highest_rss
        for number in range(count):
            assert await receive(client) == numbered(number)
            highest_rss = max(highest_rss, relay.rss_bytes())
            await asyncio.sleep(pause_s)

    async with (
        relay.client("news") as publisher,
        relay.client("news", max_queue=4) as reader,  # half of the channel: see `flood`
    ):
        async with asyncio.TaskGroup() as group:
            group.create_task(publish(publisher))
            group.create_task(read(publisher, 0.0))
            group.create_task(read(reader, 0.001))
        assert await relay.metric("websocket_drops_total") == 0
        assert await relay.metric("websocket_disconnections_total") == 0
    assert highest_rss < started_rss + 60 * MIB
    await assert_balanced_at_rest(relay)


async def send_for_ever(raw: RawClient, wire: bytes) -> None:
    while True:
        await raw.send(wire)


async def test_a_publisher_that_does_not_read_is_dropped_like_any_stalled_client(
    relay_with: StartRelay,
) -> None:
    relay = relay_with(limits=TIGHT)
    wire = frame(BINARY, numbered(0)) * 8
    async with relay.client("news", max_queue=None) as reader:
        async with relay.raw_client("news", receive_buffer_bytes=SMALL_BUFFER) as deaf:
            with pytest.raises(ConnectionError):
                await send_for_ever(deaf, wire)
        await relay.metric_is("websocket_connected_clients", 1)
        assert await relay.metric("websocket_closes_total", code="1013") == 1
        await reader.send("still here")
        while await receive(reader) != "still here":
            pass


async def test_a_client_that_pings_and_never_reads_is_closed_and_takes_no_memory(
    relay_with: StartRelay,
) -> None:
    relay = relay_with(limits=TIGHT)
    wire = frame(PING, bytes(125)) * 2_000
    started_rss = relay.rss_bytes()
    highest_rss = 0

    async def ping_for_ever(raw: RawClient) -> None:
        nonlocal highest_rss
        while True:
            await raw.send(wire)
            highest_rss = max(highest_rss, relay.rss_bytes())

    async with relay.raw_client("news", receive_buffer_bytes=SMALL_BUFFER) as deaf:
        with pytest.raises(ConnectionError):
            await ping_for_ever(deaf)
    await relay.metric_is("websocket_closes_total", 1, code="1013")
    assert highest_rss < started_rss + 30 * MIB
    await assert_balanced_at_rest(relay)


async def test_countless_fragments_are_one_message_and_take_little_memory(
    relay_with: StartRelay,
) -> None:
    relay = relay_with(keepalive=NEVER)
    started_rss = relay.rss_bytes()
    count = 200_000
    async with relay.raw_client("news") as raw:
        await raw.send(frame(BINARY, b"a", fin=False))
        await raw.send(frame(CONTINUATION, b"b", fin=False) * count)
        await raw.send(frame(CONTINUATION))
        assert await raw.message() == b"a" + b"b" * count
        assert relay.rss_bytes() < started_rss + 30 * MIB


async def test_a_publisher_that_vanishes_while_it_floods_leaves_no_trace(
    relay_with: StartRelay,
) -> None:
    relay = relay_with(keepalive=NEVER)
    wire = frame(BINARY, numbered(0)) * 16
    async with relay.client("news", max_queue=None) as reader:
        for _ in range(5):
            async with relay.raw_client("news") as publisher:
                await publisher.send(wire)
                publisher.vanish()
        await relay.metric_is("websocket_connected_clients", 1)
        await reader.send("still here")
        while await receive(reader) != "still here":
            pass
        await relay.metric_is("websocket_paused_publishers", 0)
    await assert_balanced_at_rest(relay)
